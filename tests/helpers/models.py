"""A model of some thousand parameters over the shipped tokenizer, and what it should say of an answer."""

import numpy as np
import torch

from model.config import ModelConfig
from model.transformer import CausalLM
from tokenizer.text import Tokenizer

TOKENIZER = Tokenizer.load()


def small_model(std: float = 0.05, **changes) -> CausalLM:
    """Random weights, the same ones each time. Norms are around 1; `changes` are fields of ModelConfig."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = CausalLM(ModelConfig(vocab_size=TOKENIZER.vocab_size, **shape, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=std)
    return model


def answer_logp(model, prompt, answer) -> torch.Tensor:
    """Of one answer (ids, trained) after its prompt, alone in its row: the sum over what is trained on."""
    ids, trained = answer
    row = torch.from_numpy(np.append(prompt, ids).astype(np.int64))[None]
    log_p = model(row[:, :-1]).logits.float().log_softmax(-1)
    of_targets = log_p[0].gather(1, row[0, 1:, None])[len(prompt) - 1 :, 0]
    return of_targets[torch.from_numpy(trained)].sum()
