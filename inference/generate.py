"""Tokens for many prompts, as many at a time as there are rows. When one has ended, the next one takes its place.

replies = generate(model, [ids_1, ids_2, ...], Sampling(temperature=0), max_new_tokens=32, stop={tokenizer.im_end})
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import torch

from inference.engine import Engine
from inference.request import Request
from inference.sampling import Sampling
from model.cost import cache_bytes
from model.transformer import CausalLM

ROWS = 64


def generate(
    model: CausalLM,
    prompts: Sequence[list[int]],
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    *,
    max_new_tokens: int | Sequence[int],
    stop: AbstractSet[int] = frozenset(),
    rows: int = ROWS,
    ended: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """What follows each prompt, without the `stop` token that ends it. It does not depend on the other prompts.

    max_new_tokens  for all prompts, or for each
    rows            at most; fewer where a GPU has no room for so many as long as the longest
    ended           is called with the number of those that have just come to an end

    With a seed, each prompt has its own random numbers: the first those of the seed, the next those of seed + 1.
    Raises UserError if a prompt is empty, if it does not fit with its new tokens into `max_position_embeddings`, or if
    the model computes NaN.
    """
    if not prompts:
        return []
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    settings = [sampling] * len(prompts)
    if sampling.seed is not None:
        settings = [replace(sampling, seed=(sampling.seed + n) % 2**63) for n in range(len(prompts))]
    requests = [Request(*own, frozenset(stop)) for own in zip(prompts, settings, most)]
    capacity = min(max(map(len, prompts)) + max(most), model.config.max_position_embeddings)
    engine = Engine(model, min(rows, len(prompts), rows_that_fit(model, capacity)), capacity)
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))  # rows of about one length waste no columns
    sequences = {n: engine.submit(requests[n]) for n in order}
    while engine.busy:
        moved = engine.step()
        if error := next((sequence.error for sequence in moved if sequence.error), None):
            raise error
        ended(sum(sequence.finish_reason is not None for sequence in moved))
    return [sequences[n].tokens for n in range(len(prompts))]


def rows_that_fit(model: CausalLM, capacity: int) -> int:
    """How many sequences of so many tokens may be in memory. A GPU gives each all its room at once, half of what is
    free to all of them; a CPU only what they fill."""
    weight = model.model.embed_tokens.weight
    if weight.device.type != "cuda":
        return sys.maxsize
    width = (model.compute_dtype or weight.dtype).itemsize
    return max(_free_bytes(weight.device) // 2 // cache_bytes(model.config, 1, capacity, width), 1)


def _free_bytes(device: torch.device) -> int:
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, unused
    return torch.cuda.mem_get_info(device)[0] + kept
