"""A model X-rayed on one text: everything that the page of scripts/xray.py shows, as plain values.

    figures = xray(contender, "What is 7+5?", max_new_tokens=16)
    write_page("xray.html", "xray", "X-ray", figures)

Letters: L layers, T positions, H query heads, V vocabulary.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor

from common.console import UserError
from evaluation.lineage import facts as facts_of_stage
from evaluation.models import Contender
from evaluation.trace import Trace, changes, lens, trace
from inference.generate import generate
from inference.sampling import Sampling
from model.lora import adapter_disabled
from tokenizer.text import Tokenizer

LONGEST = 512  # tokens: the page grows with their square, to about 25 MB of attention for `small`
GUESSES = 8  # of the next token, at each position
LENS_GUESSES = 3  # at each position of each layer


def xray(contender: Contender, prompt: str, *, system: str = "", max_new_tokens: int = 0) -> dict[str, Any]:
    """Reads the prompt, continues it greedily by up to max_new_tokens tokens, and looks at all of it."""
    ids = contender.encode(prompt, system)
    limit = min(LONGEST, contender.model.config.max_position_embeddings)
    if len(ids) + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones are more than the {limit} that a page can "
            "show; take a shorter --prompt, or lower --max_new_tokens"
        )
    with contender.active() as model:
        stop = contender.tokenizer.stop_ids
        said: list[int] = []
        if max_new_tokens:
            (said,) = generate(model, [ids], Sampling(temperature=0), max_new_tokens=max_new_tokens, stop=stop)
        seen = trace(model, ids + said)
        guesses = [_likeliest(logits, LENS_GUESSES) for logits in lens(model, seen)]
        lora = _lora(contender, ids + said, seen) if contender.adapter else None
    figures = dict(
        model=contender.facts(),
        stages=[dict(stage=entry.get("stage", "?"), facts=facts_of_stage(entry)) for entry in contender.history.stages],
        ids=ids + said,
        prompt_tokens=len(ids),
        next=_predictions(seen.logits, ids + said),
        lens=guesses,
        attention=_packed(seen.attention),
        norms=dict(
            stream=_rounded(seen.stream.norm(dim=-1)),
            attention=_rounded(seen.attention_added.norm(dim=-1)),
            mlp=_rounded(seen.mlp_added.norm(dim=-1)),
        ),
        experts=_experts(contender, seen),
        lora=lora,
    )
    return figures | dict(vocabulary=_texts(contender.tokenizer, figures))


def _likeliest(logits: Tensor, count: int) -> list[list[list[float]]]:
    """logits (T, V) -> for each position [[id, probability], ...], the likeliest first."""
    top = logits.softmax(-1).topk(min(count, logits.shape[-1]), dim=-1)
    values = [[float(f"{p:.3g}") for p in row] for row in top.values.tolist()]
    return [[list(pair) for pair in zip(*row)] for row in zip(top.indices.tolist(), values)]


def _predictions(logits: Tensor, ids: list[int]) -> dict[str, Any]:
    """What the model expects after each position: the likeliest tokens, the entropy in bits, and of the token that
    really follows its probability, its surprise in bits and its rank (1: the likeliest)."""
    log_p = logits.log_softmax(-1)
    following = torch.tensor(ids[1:])[:, None]
    actual = log_p[:-1].gather(1, following)
    rank = (log_p[:-1] > actual).sum(-1) + 1
    return dict(
        top=_likeliest(logits, GUESSES),
        entropy=_rounded(-(log_p.exp() * log_p).sum(-1) / math.log(2)),
        probability=_rounded(actual[:, 0].exp()),
        surprise=_rounded(-actual[:, 0] / math.log(2)),
        rank=rank.tolist(),
    )


def _packed(attention: Tensor) -> dict[str, Any]:
    """(L, H, T, T) probabilities -> a byte each, base64. Only what a token can see, t + 1 numbers in row t. A byte b
    stands for (b / 255)^2, which keeps the small ones apart."""
    L, H, T, _ = attention.shape
    rows, columns = torch.tril_indices(T, T)
    values = (attention[:, :, rows, columns].sqrt() * 255).round().to(torch.uint8)  # (L, H, T (T + 1) / 2)
    return dict(layers=L, heads=H, data=base64.b64encode(values.numpy().tobytes()).decode())


def _experts(contender: Contender, seen: Trace) -> list[dict[str, Any]]:
    """Of each layer with experts: who was chosen for each token, and how often each was. Empty: a dense model."""
    found = []
    for layer, probabilities in seen.routing.items():
        k = contender.model.config.num_experts_per_tok
        weights, chosen = probabilities.topk(k, dim=-1)
        counts = torch.bincount(chosen.flatten(), minlength=probabilities.shape[-1])
        found.append(
            dict(
                layer=layer,
                counts=counts.tolist(),
                mean=_rounded(probabilities.mean(0)),
                chosen=chosen.tolist(),
                weights=_rounded(weights),
            )
        )
    return found


def _lora(contender: Contender, ids: list[int], seen: Trace) -> dict[str, Any]:
    """What the adapter changes: in the weights, layer by layer, and in the prediction at each position (the
    Kullback-Leibler divergence, in bits, of what is expected with it from what is expected without)."""
    assert contender.adapter
    with adapter_disabled(contender.model):
        without = trace(contender.model, ids)
    log_p, log_q = seen.logits.log_softmax(-1), without.logits.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1) / math.log(2)
    moved = (seen.stream - without.stream).norm(dim=-1) / without.stream.norm(dim=-1)  # (L + 1, T)
    return dict(
        weights=changes(contender.model, contender.adapter),
        divergence=_rounded(divergence.clamp_min(0)),
        moved=_rounded(moved),
        without=_predictions(without.logits, ids),
    )


def _texts(tokenizer: Tokenizer, figures: dict[str, Any]) -> dict[str, str]:
    """The text of every id that occurs."""
    used = set(figures["ids"])
    tops = [figures["next"]["top"], *figures["lens"]]
    if figures["lora"]:
        tops.append(figures["lora"]["without"]["top"])
    used.update(int(id) for top in tops for position in top for id, _ in position)
    return {str(id): text_of(tokenizer, id) for id in sorted(used)}


def text_of(tokenizer: Tokenizer, id: int) -> str:
    r"""Bytes that are no whole character are written as \xe5."""
    (raw,) = tokenizer.bytes_of([id])
    return raw.decode("utf-8", errors="backslashreplace")


def _rounded(values: Tensor) -> list:
    """Four digits are enough to look at, and keep the page small."""
    if values.dim() > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.4g}") for value in values.tolist()]
