"""How likely a model finds texts: the log-probabilities of many rows at once.

    rows = [encode_chat(tokenizer, messages) for messages in conversations]       # or `windows` of documents
    logp = log_likelihoods(model, rows)                                           # logp[i]: (trained ids of row i,)
    sums = totals(tokenizer, rows, logp)                                          # (rows, 3): nats, tokens, bytes
    print(METRICS["ppl"].value(sums.sum(0)), METRICS["bpb"].value(sums.sum(0)))   # evaluation/metrics.py

Rows are packed and batched by the loader of the training stages. So the numbers of a row do not depend on its
neighbours, and a position costs what it costs in a forward pass of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from common.console import Progress, UserError
from dataset.batches.loader import IGNORED, Loader
from dataset.tokens.examples import TokenDataset
from model.transformer import CausalLM
from tokenizer.chat import Encoded
from tokenizer.text import Tokenizer

Criterion = Callable[[Tensor, Tensor, slice], Tensor]
WINDOW = 512  # positions of a packed row, unless an example is longer
ROWS = 8  # packed rows of a forward pass
AT_ONCE = 512  # examples that are packed together


def windows(tokenizer: Tokenizer, text: str, length: int = WINDOW) -> list[Encoded]:
    """A document in parts of at most `length` targets. Every token of it, and the end, is a target once.

    Each part sees only itself, as a row of pretraining does: <|endoftext|> opens the first, and the last token of a
    part opens the next one.
    """
    end = tokenizer.end_of_text
    ids = [end, *tokenizer.encode(text), end]
    parts = [ids[begin : begin + length + 1] for begin in range(0, len(ids) - 1, length)]
    return [Encoded(part, [True] * len(part)) for part in parts]


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
    some = sorted((i for i, row in enumerate(rows) if any(row.trained[1:])), key=lambda i: -len(rows[i].ids))
    limit = model.config.max_position_embeddings
    if some and len(rows[some[0]].ids) - 1 > limit:
        raise UserError(f"a row of {len(rows[some[0]].ids)} tokens exceeds the model's {limit} positions")
    with closing(Progress(progress or "likelihoods", len(some), " rows")) as bar:
        for begin in range(0, len(some), AT_ONCE):  # those alike in length: a row is as long as the longest of them
            numbers = some[begin : begin + AT_ONCE]
            for example, logp in _packed(model, [rows[i] for i in numbers], criterion):
                found[numbers[example]] = logp
            bar.advance(len(numbers))
    return found


def _packed(model: CausalLM, examples: list[Encoded], criterion: Criterion | None) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the example, log-probabilities of its trained ids)"""
    data = _InMemory(examples)
    length = max(WINDOW, int(data.lengths.max()) - 1)
    at_once = max(1, ROWS * WINDOW // length)
    loader = Loader(
        data,
        packing=True,
        batch_size=at_once,
        accumulation_steps=-(-len(examples) // at_once),  # all examples in one step, as they are packed together
        max_seq_len=length,
        shuffle=False,
    )
    device = model.model.embed_tokens.weight.device
    for batch in loader.batches(0):
        there = batch.to(device)
        loss = model(there.tokens, **there.context(), criterion=criterion).loss.cpu()  # (B, T)
        logp = -loss[batch.targets != IGNORED]
        counts = [sum(examples[i].trained[1:]) for i in batch.examples]
        yield from zip(batch.examples, np.split(logp.numpy(), np.cumsum(counts)[:-1]))


def totals(tokenizer: Tokenizer, rows: Sequence[Encoded], logp: Sequence[np.ndarray]) -> np.ndarray:
    """(rows, 3) fp64: nats, trained tokens and bytes of their text. Control tokens have nats, and no bytes."""
    found = np.zeros((len(rows), 3))
    for total, row, own in zip(found, rows, logp):
        trained = np.array(row.ids[1:], np.int64)[np.array(row.trained[1:], bool)]
        total[:] = -own.sum(dtype=np.float64), len(own), tokenizer.token_bytes[trained].sum()
    return found


class _InMemory(TokenDataset):
    """Encoded rows as a data set, for the loader."""

    fingerprint, summary, end_of_text = "", "rows in memory", 0

    def __init__(self, rows: list[Encoded]):
        self.rows = rows
        self.order = np.arange(len(rows))
        self.lengths = np.array([len(row.ids) for row in rows], np.int32)

    def _tokens(self, example: int) -> np.ndarray:
        return np.array(self.rows[example].ids)

    def _trained(self, example: int) -> np.ndarray:
        return np.array(self.rows[example].trained, bool)
