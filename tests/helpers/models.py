"""Models of some thousand parameters with random weights, and what one should say of an answer."""

import numpy as np
import torch

from evaluation.device import random_model
from model.config import ModelConfig
from model.transformer import CausalLM
from tokenizer.text import Tokenizer

TOKENIZER = Tokenizer.load()


TINY_SHAPE = dict(
    vocab_size=67,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
)
SPEAKER_SHAPE = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
SPEAKERS = {  # kinds of models that generate text: what they have besides SPEAKER_SHAPE
    "dense": {},
    "moe": dict(num_experts=4),
    "window": dict(sliding_window=4),
    "norms": dict(post_norms=True, qk_norm=True, attention_bias=True, rope_interleaved=True),
    "mixed": dict(  # a window in some layers, half of each head rotated
        sliding_window=6,
        layer_types=("full_attention", "sliding_attention", "sliding_attention"),
        rope_local_theta=20.0,
        rotary_fraction=0.5,
    ),
}
TINY_TOKENS = torch.arange(40).view(2, 20) % 67


def tiny_model(**changes) -> CausalLM:
    """For TINY_TOKENS. `changes` are fields of ModelConfig."""
    return random_model(ModelConfig(**{**TINY_SHAPE, **changes}), std=0.15)


def small_model(std: float = 0.05, **changes) -> CausalLM:
    """For the shipped tokenizer. `changes` are fields of ModelConfig."""
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    return random_model(ModelConfig(vocab_size=TOKENIZER.vocab_size, **{**shape, **changes}), std)


@torch.no_grad()
def continuation(
    model: CausalLM, prompt: list[int], most: int, stop: frozenset[int] | set[int] = frozenset()
) -> list[int]:
    """The likeliest token again and again, each from a full pass over all the text before it: without a cache."""
    text = list(prompt)
    while len(text) < len(prompt) + most:
        token = int(model(torch.tensor([text])).logits[0, -1].argmax())
        if token in stop:
            break
        text.append(token)
    return text[len(prompt) :]


def answer_logp(model, prompt, answer) -> torch.Tensor:
    """Of one answer (ids, trained) after its prompt, alone in its row: the sum over what is trained on."""
    ids, trained = answer
    row = torch.from_numpy(np.append(prompt, ids).astype(np.int64))[None]
    log_p = model(row[:, :-1]).logits.float().log_softmax(-1)
    of_targets = log_p[0].gather(1, row[0, 1:, None])[len(prompt) - 1 :, 0]
    return of_targets[torch.from_numpy(trained)].sum()
