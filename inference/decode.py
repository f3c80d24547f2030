"""Next tokens from a model: the key/value cache, sampling, and a loop that yields one token of every row at a time.

    for (token,) in decode(model, [prompt_ids], max_new_tokens=64, stop={tokenizer.im_end}):
        print(stream.push(token), end="", flush=True)

    replies = generate(model, [ids_1, ids_2, ...], Sampling(temperature=0), max_new_tokens=32, stop={tokenizer.im_end})

Letters: B rows, T new positions, S cached positions, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.console import UserError
from model.config import ModelConfig
from model.rope import count_positions
from model.transformer import CausalLM

PREFILL_POSITIONS = 1024  # prompt positions computed at once: bounds the memory that a long prompt needs


class KVCache:
    """Keys and values of all past positions, in memory taken once.

    Rows of different length are padded on the left; the padding is a document of its own (number 0), so nothing sees
    it. On CPUs the cache is fp32: attention of one query over bf16 keys is several times slower there.
    """

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        if torch.device(device).type == "cpu":
            dtype = torch.float32
        shape = (config.num_hidden_layers, rows, capacity, config.num_key_value_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.documents: Tensor | None = None  # (B, S), only where rows are padded
        self.length = 0  # positions filled; set it back to forget what came after

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def extend(self, tokens: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Makes room for tokens (B, T) -> positions (B or 1, S) and documents (B, S) of all that is cached then.

        documents (B, T) None: the tokens continue the document that each row ends with; if all rows are one document,
        the result is None as well.
        """
        past, T = self.length, tokens.shape[1]
        if past + T > self.capacity:
            raise UserError(f"{past + T} tokens do not fit into a cache of {self.capacity}")
        self.length = past + T
        if documents is None and self.documents is None:
            return torch.arange(past + T, device=tokens.device)[None], None
        if documents is None:
            documents = self.documents[:, -1:].expand(-1, T)
        before = self.documents[:, :past] if self.documents is not None else documents[:, :0]
        self.documents = torch.cat((before, documents), dim=1)
        return count_positions(self.documents), self.documents

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, T, K, D) of the newest positions -> those of all positions (B, S, K, D)."""
        past = self.length - k.shape[1]
        self.keys[layer, :, past : self.length] = k
        self.values[layer, :, past : self.length] = v
        return self.keys[layer, :, : self.length], self.values[layer, :, : self.length]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 takes the most likely one; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.85
    top_p: float = 0.85
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        limits = [
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 = off)"),
        ]
        if wrong := [f"{name} {getattr(self, name)} must be {rule}" for name, fine, rule in limits if not fine]:
            raise UserError("; ".join(wrong))

    def draw(self, logits: Tensor, seen: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """logits (B, V), seen (B, V) bool: tokens of the text so far -> (B,) token ids."""
        logits = logits.float()
        if seen is not None:  # CTRL, arXiv:1909.05858, section 4.1, as Hugging Face applies it to negative scores
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], float("-inf"))
        if self.top_p < 1:  # the fewest tokens whose probability reaches top_p (arXiv:1904.09751, section 3.1)
            ordered, index = logits.softmax(-1).sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            logits = logits.masked_fill(beyond.gather(-1, index.argsort(-1)), float("-inf"))
        # argmax of p / Exponential(1) is a draw from p, without the device synchronisation of torch.multinomial
        noise = torch.empty_like(logits).exponential_(generator=generator)
        return (logits.softmax(-1) / noise).argmax(-1)


def pad_left(prompts: list[list[int]], device) -> tuple[Tensor, Tensor | None]:
    """Token ids (B, T) and documents (B, T): 0 for padding, 1 for the prompt; None where nothing is padded."""
    T = max(map(len, prompts))
    tokens = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)
    if all(len(p) == T for p in prompts):
        return tokens, None
    return tokens, torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=device)


def prefill(model: CausalLM, tokens: Tensor, documents: Tensor | None, cache: KVCache) -> Tensor:
    """Reads tokens (B, T) into the cache, chunk by chunk -> logits (B, V) after the last of them."""
    B, T = tokens.shape
    for start in range(0, T, PREFILL_POSITIONS):
        part = tokens[:, start : start + PREFILL_POSITIONS]
        last = torch.arange(1, B + 1, device=tokens.device) * part.shape[1] - 1
        numbers = None if documents is None else documents[:, start : start + PREFILL_POSITIONS]
        logits = model(part, documents=numbers, selected=last, cache=cache).logits
    return logits


@torch.inference_mode()
def decode(
    model: CausalLM,
    prompts: list[list[int]],
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    *,
    max_new_tokens: int,
    stop: set[int] = frozenset(),
    cache: KVCache | None = None,
) -> Iterator[list[int | None]]:
    """Yields lists of B token ids; None for a row that has ended. A `stop` token ends its row and is not yielded.

    cache: one that already holds `cache.length` tokens of the (single) prompt, to continue a conversation.
    """
    if not prompts or not all(prompts):
        raise UserError("generation needs at least one token to start from")
    device = model.model.embed_tokens.weight.device
    longest = max(map(len, prompts))
    limit = model.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's {limit} positions: "
            "shorten the conversation or ask for fewer (--max_new_tokens)"
        )
    if cache is None:
        dtype = model.compute_dtype or model.model.embed_tokens.weight.dtype
        cache = KVCache(model.config, len(prompts), longest + max_new_tokens, dtype, device)
    generator = None
    if sampling.temperature > 0:
        generator = torch.Generator(device)
        generator.manual_seed(sampling.seed) if sampling.seed is not None else generator.seed()
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            seen[row, prompt] = True

    tokens, documents = pad_left([prompt[cache.length :] for prompt in prompts], device)
    logits = prefill(model, tokens, documents, cache)
    ended = [False] * len(prompts)
    for remaining in range(max_new_tokens, 0, -1):
        drawn = sampling.draw(logits, seen, generator)  # (B,)
        ids = drawn.tolist()
        ended = [done or token in stop for done, token in zip(ended, ids)]
        if all(ended):
            return
        yield [None if done else token for done, token in zip(ended, ids)]
        if remaining == 1:
            return
        if seen is not None:
            seen.scatter_(1, drawn[:, None], True)
        logits = model(drawn[:, None], cache=cache).logits[:, -1]


def generate(model: CausalLM, prompts: list[list[int]], sampling: Sampling, **options) -> list[list[int]]:
    """All of `decode`'s tokens, row by row."""
    replies: list[list[int]] = [[] for _ in prompts]
    for step in decode(model, prompts, sampling, **options):
        for reply, token in zip(replies, step):
            if token is not None:
                reply.append(token)
    return replies
