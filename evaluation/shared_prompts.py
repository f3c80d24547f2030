"""Rows that begin with the same prompt are read together, the prompt once: options of a question, answers to it.

    data = Bundles([Encoded(...), ...])                  # bundles of rows
    loader = BundleLoader(data, packing=True, ...)       # batches like those of training

A row of a batch holds the prompt but its last id, then each answer behind that last id. What an answer sees are its own
positions and the prompt's, as in dataset/batches/preference.py. So it gets what it would get alone after its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dataset.batches.loader import IGNORED, Batch, Loader, select
from dataset.tokens.examples import TokenDataset
from model.attention import find_segments
from tokenizer.chat import Encoded

SHORTEST = 8  # ids: below that, a prompt is not worth being shared


@dataclass
class Bundle:
    prompt: list[int]  # ids before the first that is trained; empty: one row, read as it is
    rows: list[int]  # numbers of the rows that begin with it
    size: int  # positions that they take in a batch


def bundled(rows: Sequence[Encoded], numbers: Sequence[int], most: int) -> list[Bundle]:
    """Rows with the same prompt together. A bundle has at most `most` positions, or twice those of its longest row."""
    found: list[Bundle] = []
    latest: dict[tuple[int, ...], Bundle] = {}  # the bundle of a prompt that may have room
    for number in numbers:
        row = rows[number]
        first = next(i for i, trained in enumerate(row.trained) if trained and i > 0)
        if first <= SHORTEST:
            found.append(Bundle([], [number], len(row.ids) - 1))
            continue
        prompt, more = row.ids[:first], len(row.ids) - first
        bundle = latest.get(tuple(prompt))
        if bundle is None or bundle.size + more > max(most, 2 * len(row.ids)):
            bundle = latest[tuple(prompt)] = Bundle(prompt, [], first - 1)
            found.append(bundle)
        bundle.rows.append(number)
        bundle.size += more
    return found


class Bundles(TokenDataset):
    """An example is a bundle."""

    fingerprint, summary, end_of_text = "", "rows in memory", 0

    def __init__(self, rows: Sequence[Encoded], bundles: Sequence[Bundle]):
        self.all, self.bundles = rows, bundles
        self.order = np.arange(len(bundles))
        self.lengths = np.array([bundle.size + 1 for bundle in bundles], np.int32)

    def parts(self, example: int) -> tuple[list[int], list[Encoded]]:
        """-> (the positions that several rows share, the rest of each of these rows)."""
        bundle = self.bundles[example]
        shared = len(bundle.prompt) - 1 if len(bundle.rows) > 1 else 0
        rows = [self.all[number] for number in bundle.rows]
        return bundle.prompt[:shared], [Encoded(row.ids[shared:], row.trained[shared:]) for row in rows]

    def extras(self, i: int) -> dict[str, np.ndarray]:
        return {}

    def will_read(self, i: int) -> None:
        pass


@dataclass(frozen=True)
class BundleBatch(Batch):
    prefixes: torch.Tensor | None  # (B, T) int32; None: nothing is shared in this batch

    def context(self):
        return super().context() | ({} if self.prefixes is None else dict(prefixes=self.prefixes))


class BundleLoader(Loader):
    dataset: Bundles

    def _batch(self, rows: list[list[int]], length: int) -> BundleBatch:
        shape = (len(rows), length)
        tokens = np.full(shape, self.dataset.end_of_text, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        documents, prefixes = np.zeros((2, *shape), np.int32)
        positions = np.zeros(shape, np.int64)
        for r, row in enumerate(rows):
            begin, document = 0, 0
            for example in row:
                shared, parts = self.dataset.parts(example)
                document += 1
                prefix, here = document, slice(begin, begin + len(shared))
                tokens[r, here], positions[r, here] = shared, np.arange(len(shared))
                documents[r, here] = prefixes[r, here] = prefix
                for ids, trained in parts:
                    document += 1
                    here = slice(here.stop, here.stop + len(ids) - 1)
                    tokens[r, here] = ids[:-1]
                    targets[r, here] = np.where(trained[1:], ids[1:], IGNORED)
                    positions[r, here] = np.arange(len(shared), len(shared) + len(ids) - 1)
                    documents[r, here], prefixes[r, here] = document, prefix
                begin = here.stop
            positions[r, begin:] = np.arange(length - begin)
        numbers = torch.from_numpy(documents)
        shares = any(len(self.dataset.bundles[example].rows) > 1 for row in rows for example in row)
        seen = torch.from_numpy(prefixes) if shares else None
        return BundleBatch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            documents=numbers,
            positions=torch.from_numpy(positions),
            selected=select(targets),
            trained_tokens=int((targets != IGNORED).sum()),
            examples=tuple(example for row in rows for example in row),
            segments=find_segments(numbers, seen),
            whole_rows=not shares and bool((documents == documents[:, :1]).all()),
            prefixes=seen,
        )
