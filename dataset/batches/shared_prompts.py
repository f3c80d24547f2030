"""Rows of a batch in which several answers follow one prompt, which stands there once.

    filled = fill_rows([[Shared(prompt[:-1], [Answer(ids, trained), ...]), ...], ...], length, end_of_text)

A row holds, for each prompt in it,

    document  1 1 1 1 2 2 2 3 3 3 3 | 4 4 ...       1 = the prompt but its last id, 2 = that id and an answer,
    prefix    1 1 1 1 1 1 1 1 1 1 1 | 4 4 ...       3 = that id and another answer
    position  0 1 2 3 4 5 6 4 5 6 7 | 0 1 ...

where every position sees what stands before it in its document and in its prefix. So an answer gets exactly what it
would get alone after its prompt.

B = rows of a batch, T = their length
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dataset.batches.loader import IGNORED, Batch


class Answer(NamedTuple):
    ids: Sequence[int] | np.ndarray  # the prompt's last id, then the answer's
    trained: Sequence[bool] | np.ndarray  # as many; whether an id is a target


class Shared(NamedTuple):
    ids: Sequence[int] | np.ndarray  # of the prompt, but its last one; may be empty
    answers: list[Answer]


@dataclass(frozen=True)
class PrefixBatch(Batch):
    prefixes: torch.Tensor | None  # (B, T) int32; None: nothing is shared in this batch

    def context(self):
        return super().context() | ({} if self.prefixes is None else dict(prefixes=self.prefixes))


class Filled(NamedTuple):
    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64
    positions: torch.Tensor  # (B, T) int64
    documents: torch.Tensor  # (B, T) int32
    prefixes: torch.Tensor  # (B, T) int32
    answers: torch.Tensor  # (B, T) int64: which answer it is, from 1 over the whole batch; 0 in prompts and fillings


def fill_rows(rows: list[list[Shared]], length: int, filler: int) -> Filled:
    """rows: the prompts of each row of a batch, with their answers. filler: the token where nothing stands."""
    shape = (len(rows), length)
    tokens, targets = np.full(shape, filler, np.int64), np.full(shape, IGNORED, np.int64)
    documents, prefixes = np.zeros((2, *shape), np.int32)
    positions, answers = np.zeros((2, *shape), np.int64)
    answer = 0
    for r, row in enumerate(rows):
        begin, document = 0, 0
        for shared in row:
            size = len(shared.ids)
            document += 1
            prefix, here = document, slice(begin, begin + size)
            tokens[r, here], positions[r, here] = shared.ids, np.arange(size)
            documents[r, here] = prefixes[r, here] = prefix
            for ids, trained in shared.answers:
                answer, document = answer + 1, document + 1
                here = slice(here.stop, here.stop + len(ids) - 1)
                tokens[r, here] = ids[:-1]
                # into an array of int64: the ids' own type, uint16, cannot hold IGNORED
                targets[r, here] = np.where(trained[1:], np.asarray(ids[1:], np.int64), IGNORED)
                positions[r, here] = np.arange(size, size + len(ids) - 1)
                documents[r, here], prefixes[r, here] = document, prefix
                answers[r, here] = answer
            begin = here.stop
        positions[r, begin:] = np.arange(length - begin)
    return Filled(*map(torch.from_numpy, (tokens, targets, positions, documents, prefixes, answers)))
