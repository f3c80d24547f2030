"""Preferences -> pairs of answers to one prompt, and the batches that hold them.

    ds = PreferenceDataset("dataset/dpo.jsonl", Tokenizer.load(), max_seq_len=1024, max_prompt_length=512)
    prompt, (chosen, chosen_trained), (rejected, rejected_trained) = ds.pair(7)

An example is a pair. Its prompt is read once, by both answers: a row of a batch holds, for each pair in it,

    document  1 1 1 1 2 2 2 3 3 3 3 | 4 4 ...       1 = the prompt but its last id, 2 = that id and the chosen answer,
    prefix    1 1 1 1 1 1 1 1 1 1 1 | 4 4 ...       3 = that id and the rejected one
    position  0 1 2 3 4 5 6 4 5 6 7 | 0 1 ...

where every position sees what stands before it in its document and in its prefix. So an answer gets exactly what it
would get alone after its prompt, and both answers of a pair are in one forward pass whatever the batch size.

A pair may take 2 x max_seq_len positions of a row: `max_seq_len` limits its prompt with the longer answer, as in
dataset/tokens/lengths.py, and the row holds both answers.

B = rows of a batch, T = their length, P = pairs in it
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset.batches.loader import FEW_SHAPES, IGNORED, Batch, Loader, select
from dataset.batches.packing import pair_row_length
from dataset.tokens.examples import EntryDataset
from model.attention import find_segments
from tokenizer.text import Tokenizer

Answer = tuple[np.ndarray, np.ndarray]  # ids; which of them are trained on, bool


class PreferenceDataset(EntryDataset):
    """Pairs of answers to one prompt."""

    kind, called = "preference", "pair"
    reference: np.ndarray | None = None  # (distinct pairs, 2) log-probabilities of chosen and rejected, where needed

    def __init__(
        self,
        paths: Sequence[str | Path] | str | Path,
        tokenizer: Tokenizer,
        *,
        on_long: str = "truncate",
        max_prompt_length: int = 0,
        **options,
    ):
        super().__init__(paths, tokenizer, on_long=on_long, max_prompt_length=max_prompt_length, **options)
        self.fingerprint = self._fingerprint("preference", on_long, self.max_seq_len, max_prompt_length)
        self.path = self._caches[0].path
        self.distinct = self.view(np.unique(self.order, return_index=True)[1], "distinct")  # each pair once

    def pair(self, i: int) -> tuple[np.ndarray, Answer, Answer]:
        """Ids of the prompt, the chosen and the rejected answer."""
        cache, entry, cut = self._place(int(self.order[i]))
        start, stop = cache.offsets[entry : entry + 2].tolist()
        begin = start + int(cache.columns["prompts"].array[entry])
        middle = begin + int(cache.columns["chosen"].array[entry])
        trained = cache.columns["trained"]
        chosen, rejected = (
            (cache.tokens[a:b], trained[a:b].astype(bool)) for a, b in ((begin, middle), (middle, stop))
        )
        return cache.tokens[start + cut : begin], chosen, rejected

    def sequences(self, i: int) -> list[Answer]:
        prompt, *answers = self.pair(i)
        untrained = np.zeros(len(prompt), bool)
        return [(np.append(prompt, ids), np.append(untrained, trained)) for ids, trained in answers]


@dataclass(frozen=True)
class PairBatch(Batch):
    prefixes: torch.Tensor  # (B, T) int32
    answers: torch.Tensor  # (B, T) int64, 2p + 1 in the chosen and 2p + 2 in the rejected answer of pair p, else 0
    reference: torch.Tensor | None  # (P, 2) fp32

    def context(self):
        return super().context() | dict(prefixes=self.prefixes)


class PairLoader(Loader):
    """`batch_size` counts pairs. The length of a step's rows follows from its pairs: pair_row_length."""

    dataset: PreferenceDataset

    ROWS_PER_EXAMPLE = 2
    lengths: tuple[int, int] | None = None  # of rows, after `limit_shapes`: the usual one, and one that holds all pairs

    def row_length(self, step: int) -> int:
        lengths = self._pair_lengths(step)
        if self.lengths is None:
            return pair_row_length(lengths, self.max_seq_len)
        usual, longest = self.lengths
        return usual if max(lengths) <= usual else longest

    def _pair_lengths(self, step: int) -> list[int]:
        return (self.dataset.lengths[self.examples(step)] - 1).tolist()

    def limit_shapes(self, most: int = FEW_SHAPES) -> None:
        """Two lengths of rows, the usual one and one that holds all pairs, with half as many numbers of rows each."""
        found = [pair_row_length(self._pair_lengths(step), self.max_seq_len) for step in self._some_steps()]
        holds_all = pair_row_length([int(self.dataset.lengths.max()) - 1], self.max_seq_len)
        usual = statistics.median_high(found)
        self.lengths = (usual, max(usual, holds_all))
        super().limit_shapes(most // len(set(self.lengths)))

    def _batch(self, rows: list[list[int]], length: int) -> PairBatch:
        shape = (len(rows), length)
        tokens = np.full(shape, self.dataset.end_of_text, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        documents, prefixes = np.zeros((2, *shape), np.int32)
        positions, answers = np.zeros((2, *shape), np.int64)
        pair = 0
        for r, row in enumerate(rows):
            begin = 0
            for prefix, example in zip(range(1, 3 * len(row), 3), row):
                prompt, *sides = self.dataset.pair(example)
                shared = len(prompt) - 1
                here = slice(begin, begin + shared)
                tokens[r, here], positions[r, here] = prompt[:-1], np.arange(shared)
                documents[r, here] = prefixes[r, here] = prefix
                for side, (ids, trained) in enumerate(sides, start=1):
                    here = slice(here.stop, here.stop + len(ids))
                    tokens[r, here] = np.append(prompt[-1], ids[:-1])
                    targets[r, here][trained] = ids[trained]  # the ids' own type, uint16, cannot hold IGNORED
                    positions[r, here] = np.arange(shared, shared + len(ids))
                    documents[r, here], prefixes[r, here] = prefix + side, prefix
                    answers[r, here] = 2 * pair + side
                begin, pair = here.stop, pair + 1
            positions[r, begin:] = np.arange(length - begin)
        examples = tuple(example for row in rows for example in row)
        numbers, seen = torch.from_numpy(documents), torch.from_numpy(prefixes)
        reference = self.dataset.reference
        if reference is not None:
            reference = torch.from_numpy(reference[self.dataset.order[list(examples)]].reshape(-1, 2))
        return PairBatch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            documents=numbers,
            positions=torch.from_numpy(positions),
            selected=select(targets),
            trained_tokens=int((targets != IGNORED).sum()),
            examples=examples,
            prefixes=seen,
            segments=find_segments(numbers, seen),
            answers=torch.from_numpy(answers),
            reference=reference,
        )
