"""How likely a model finds texts: the log-probabilities of many rows at once.

    rows = [encode_chat(tokenizer, messages) for messages in conversations]       # or `windows` of documents
    logp = log_likelihoods(model, rows)                                           # logp[i]: (trained ids of row i,)
    sums = totals(tokenizer, rows, logp)                                          # (rows, 3): nats, tokens, bytes
    print(METRICS["ppl"].value(sums.sum(0)), METRICS["bpb"].value(sums.sum(0)))   # evaluation/metrics.py

Rows are packed and batched as in the training stages. So the numbers of a row do not depend on its neighbours, and a
position costs what it costs in a forward pass of training. A prompt that several rows begin with is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from common.console import Progress, UserError
from dataset.batches.loader import IGNORED
from evaluation.shared_prompts import BundleLoader, Bundles, bundled
from model.transformer import CausalLM
from tokenizer.chat import Encoded
from tokenizer.text import Tokenizer

Criterion = Callable[[Tensor, Tensor, slice], Tensor]
WINDOW = 512  # positions of a packed row, unless an example is longer
ROWS = 8  # packed rows of a forward pass
AT_ONCE = 512  # examples, with all rows of the same prompt, that are packed together
PART = 2048  # bytes of a single document that are drawn together for its error bars


def windows(tokenizer: Tokenizer, text: str, length: int = WINDOW) -> list[Encoded]:
    """A document in parts of at most `length` targets. Every token of it, and the end, is a target once.

    Each part sees only itself, as a row of pretraining does: `start_of_text`, which is no target, opens the first, and
    the last token of a part opens the next one.
    """
    start = tokenizer.start_of_text
    ids = [*start, *tokenizer.encode(text), tokenizer.end_of_text]
    trained = [False] * len(start) + [True] * (len(ids) - len(start))
    parts = [slice(begin, begin + length + 1) for begin in range(0, len(ids) - 1, length)]
    return [Encoded(ids[part], trained[part]) for part in parts]


@torch.inference_mode()
def log_likelihoods(
    model: CausalLM, rows: Sequence[Encoded], *, progress: str = "", criterion: Criterion | None = None
) -> list[np.ndarray]:
    """The natural logarithm of the probability of each trained id of each row, fp32, in the order of the row.

    The first id of a row is never predicted. The model has to be in evaluation mode. progress: what a bar says.
    criterion: another loss than cross-entropy, as in the model's forward; it is returned with the opposite sign.
    UserError if a row has more targets than the model has positions.
    """
    found = [np.empty(0, np.float32)] * len(rows)
    some = [i for i, row in enumerate(rows) if any(row.trained[1:])]
    longest, limit = max((len(rows[i].ids) for i in some), default=0), model.config.max_position_embeddings
    if longest - 1 > limit:
        raise UserError(f"a row of {longest} tokens exceeds the model's {limit} positions")
    bundles = sorted(bundled(rows, some, WINDOW), key=lambda bundle: -bundle.size)
    with closing(Progress(progress or "likelihoods", len(some), " rows")) as bar:
        for begin in range(0, len(bundles), AT_ONCE):  # those alike in length: a row is as long as the longest of them
            for number, logp in _packed(model, Bundles(rows, bundles[begin : begin + AT_ONCE]), criterion):
                found[number] = logp
                bar.advance(1)
    return found


def _packed(model: CausalLM, data: Bundles, criterion: Criterion | None) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the row, log-probabilities of its trained ids)"""
    length = max(WINDOW, int(data.lengths.max()) - 1)
    at_once = max(1, ROWS * WINDOW // length)
    loader = BundleLoader(
        data,
        packing=True,
        batch_size=at_once,
        accumulation_steps=-(-len(data) // at_once),  # all examples in one step, as they are packed together
        max_seq_len=length,
        shuffle=False,
    )
    device = model.model.embed_tokens.weight.device
    for batch in loader.batches(0):
        there = batch.to(device)
        loss = model(there.tokens, **there.context(), criterion=criterion).loss.cpu()  # (B, T)
        logp = -loss[batch.targets != IGNORED]
        numbers = [number for example in batch.examples for number in data.bundles[example].rows]
        counts = [sum(data.all[number].trained[1:]) for number in numbers]
        yield from zip(numbers, np.split(logp.numpy(), np.cumsum(counts)[:-1]))


def totals(tokenizer: Tokenizer, rows: Sequence[Encoded], logp: Sequence[np.ndarray]) -> np.ndarray:
    """(rows, 3) fp64: nats, trained tokens and bytes of their text. Control tokens have nats, and no bytes."""
    found = np.zeros((len(rows), 3))
    for total, row, own in zip(found, rows, logp):
        trained = np.array(row.ids[1:], np.int64)[np.array(row.trained[1:], bool)]
        total[:] = -own.sum(dtype=np.float64), len(own), tokenizer.token_bytes[trained].sum()
    return found


def totals_by_part(tokenizer: Tokenizer, rows: Sequence[Encoded], logp: Sequence[np.ndarray]) -> np.ndarray:
    """The `windows` of a document -> totals of each PART bytes of it. A part is the same text for every tokenizer and
    every length of windows; a token belongs to the part in which it begins."""
    ids = np.concatenate([row.ids[1:] for row in rows])
    sizes = tokenizer.token_bytes[ids].astype(np.int64)
    begins = np.minimum(np.cumsum(sizes) - sizes, max(sizes.sum() - 1, 0))  # the end belongs to the last part
    parts = begins // PART
    found = np.zeros((parts[-1] + 1, 3))
    np.add.at(found, parts, np.stack((-np.concatenate(logp), np.ones(len(ids)), sizes), axis=1))
    return found
