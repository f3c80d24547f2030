"""Tokens from a model, one for every row at a time, or all of them at once.

    for (token,) in decode(model, [prompt_ids], max_new_tokens=64, stop={tokenizer.im_end}):
        print(stream.push(token), end="", flush=True)

    replies = generate(model, [ids_1, ids_2, ...], Sampling(temperature=0), max_new_tokens=32, stop={tokenizer.im_end})

Letters: B rows, T positions of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from common.console import UserError
from inference.cache import KVCache
from inference.drawn import Drawn, to_device
from inference.sampling import Said, Sampling
from model.transformer import CausalLM

PREFILL_POSITIONS = 1024  # prompt positions computed at once: bounds the memory that a long prompt needs


def pad_left(prompts: list[list[int]], device: torch.device | str) -> tuple[Tensor, Tensor | None]:
    """Token ids (B, T) and documents (B, T): 0 for padding, 1 for the prompt; None if no row is padded."""
    T = max(map(len, prompts))
    tokens = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)
    if all(len(p) == T for p in prompts):
        return tokens, None
    return tokens, torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=device)


def prefill(model: CausalLM, tokens: Tensor, documents: Tensor | None, cache: KVCache) -> Tensor:
    """Reads tokens (B, T) into the cache, chunk by chunk -> logits (B, V) after the last token of each row."""
    B, T = tokens.shape
    logits = torch.empty(0)
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
    stop: AbstractSet[int] = frozenset(),
    cache: KVCache | None = None,
    late: bool | None = None,
) -> Iterator[list[int | None]]:
    """Yields lists of B token ids, None for a row that has ended. A `stop` token ends its row and is not yielded.

    cache  to continue a conversation, one that already holds the first `cache.length` tokens of the single prompt
    late   tokens are read a step after they were drawn, as by the engine, so that a GPU does not wait for the host. The
           tokens are the same; a cache may hold one more than was yielded. None: on CUDA
    Raises UserError if there is no prompt, or if prompt and new tokens exceed `max_position_embeddings`.
    """
    if not prompts or not all(prompts):
        raise UserError("generation needs at least one token to start from")
    device = model.model.embed_tokens.weight.device
    late = device.type == "cuda" if late is None else late
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
    if not sampling.greedy:
        generator = torch.Generator(device)
        generator.manual_seed(sampling.seed) if sampling.seed is not None else generator.seed()
    said = [Said(sampling, prompt, stop) for prompt in prompts] if Said.needed(sampling) else []

    tokens, documents = pad_left([prompt[cache.length :] for prompt in prompts], device)
    logits = prefill(model, tokens, documents, cache)
    computed = list(range(len(prompts)))  # the rows that are computed; some of them may have ended
    ended = [False] * len(prompts)
    unread: deque[Drawn] = deque()
    for remaining in range(max_new_tokens, 0, -1):
        if said:
            logits = logits.float()
            for row, scores in zip(computed, logits):
                said[row].adjust(scores)
        tokens = sampling.draw(logits, generator)  # (n,) of the n rows computed
        unread.append(Drawn(computed, tokens))
        # penalties depend on the tokens; and behind the last ones nothing is computed meanwhile
        while len(unread) > (late and not said and remaining > 1):
            drawn = unread.popleft()
            ids: list[int | None] = [None] * len(prompts)
            for row, token in zip(drawn.sequences, drawn.read()[0]):
                ended[row] = ended[row] or token in stop
                ids[row] = None if ended[row] else token
                if said:
                    said[row].add(token)
            if all(ended):
                return
            yield ids
        if remaining == 1:
            return
        going = [n for n, row in enumerate(computed) if not ended[row]]
        # copying the cache costs about as much as a step. With random draws, a row's numbers depend on its place
        if generator is None and len(going) <= len(computed) // 2:
            computed, kept = [computed[n] for n in going], to_device(going, device)
            cache.keep(kept)
            tokens = tokens[kept]
        logits = model(tokens[:, None], cache=cache).logits[:, -1]


def generate(model: CausalLM, prompts: list[list[int]], sampling: Sampling, **options) -> list[list[int]]:
    """All of `decode`'s tokens, row by row."""
    replies: list[list[int]] = [[] for _ in prompts]
    for step in decode(model, prompts, sampling, **options):
        for reply, token in zip(replies, step):
            if token is not None:
                reply.append(token)
    return replies
