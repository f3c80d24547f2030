"""Rows that begin with the same prompt are read together, the prompt once: options of a question, answers to it.

    data = Bundles([Encoded(...), ...])                  # bundles of rows
    loader = BundleLoader(data, packing=True, ...)       # batches like those of training

How they lie in a row: dataset/batches/shared_prompts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataset.batches.loader import IGNORED, Loader, select
from dataset.batches.shared_prompts import Answer, PrefixBatch, Shared, fill_rows
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

    def parts(self, example: int) -> Shared:
        """-> the ids that several rows share, and the rest of each of these rows."""
        bundle = self.bundles[example]
        shared = len(bundle.prompt) - 1 if len(bundle.rows) > 1 else 0
        rows = [self.all[number] for number in bundle.rows]
        return Shared(bundle.prompt[:shared], [Answer(row.ids[shared:], row.trained[shared:]) for row in rows])

    def extras(self, i: int) -> dict[str, np.ndarray]:
        return {}

    def will_read(self, i: int) -> None:
        pass


class BundleLoader(Loader):
    dataset: Bundles

    def _batch(self, rows: list[list[int]], length: int) -> PrefixBatch:
        parts = [[self.dataset.parts(example) for example in row] for row in rows]
        filled = fill_rows(parts, length, self.dataset.end_of_text)
        several = any(len(shared.answers) > 1 for row in parts for shared in row)
        prefixes = filled.prefixes if several else None
        return PrefixBatch(
            tokens=filled.tokens,
            targets=filled.targets,
            documents=filled.documents,
            positions=filled.positions,
            selected=select(filled.targets.numpy()),
            trained_tokens=int((filled.targets != IGNORED).sum()),
            examples=tuple(example for row in rows for example in row),
            prefixes=prefixes,
            segments=find_segments(filled.documents, prefixes),
            whole_rows=not several and bool((filled.documents == filled.documents[:, :1]).all()),
        )
