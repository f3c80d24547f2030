"""Preferences -> pairs of answers to one prompt, and the batches that hold them.

    ds = PreferenceDataset("dataset/dpo.jsonl", Tokenizer.load(), max_seq_len=1024, max_prompt_length=512)
    prompt, (chosen, chosen_trained), (rejected, rejected_trained) = ds.pair(7)

An example is a pair. Its prompt is read once, by both answers (dataset/batches/shared_prompts.py), so both are in one
forward pass whatever the batch size.

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

from dataset.batches.loader import FEW_SHAPES, IGNORED, Loader, select
from dataset.batches.packing import pair_row_length
from dataset.batches.shared_prompts import Answer, PrefixBatch, Shared, fill_rows
from dataset.tokens.examples import EntryDataset
from model.attention import find_segments
from tokenizer.text import Tokenizer

Side = tuple[np.ndarray, np.ndarray]  # ids of an answer; which of them are trained on, bool


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

    def pair(self, i: int) -> tuple[np.ndarray, Side, Side]:
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

    def sequences(self, i: int) -> list[Side]:
        prompt, *answers = self.pair(i)
        untrained = np.zeros(len(prompt), bool)
        return [(np.append(prompt, ids), np.append(untrained, trained)) for ids, trained in answers]


@dataclass(frozen=True)
class PairBatch(PrefixBatch):
    answers: torch.Tensor  # (B, T) int64, 2p + 1 in the chosen and 2p + 2 in the rejected answer of pair p, else 0
    reference: torch.Tensor | None  # (P, 2) fp32


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
        filled = fill_rows(
            [[self._shared(example) for example in row] for row in rows], length, self.dataset.end_of_text
        )
        examples = tuple(example for row in rows for example in row)
        reference = self.dataset.reference
        if reference is not None:
            reference = torch.from_numpy(reference[self.dataset.order[list(examples)]].reshape(-1, 2))
        return PairBatch(
            tokens=filled.tokens,
            targets=filled.targets,
            documents=filled.documents,
            positions=filled.positions,
            selected=select(filled.targets.numpy()),
            trained_tokens=int((filled.targets != IGNORED).sum()),
            examples=examples,
            prefixes=filled.prefixes,
            segments=find_segments(filled.documents, filled.prefixes, one_size=self.lengths is not None),
            answers=filled.answers,
            reference=reference,
        )

    def _shared(self, example: int) -> Shared:
        prompt, *sides = self.dataset.pair(example)
        return Shared(
            prompt[:-1], [Answer(np.append(prompt[-1:], ids), np.append(False, trained)) for ids, trained in sides]
        )
