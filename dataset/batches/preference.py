"""Preferences -> pairs of answers to one prompt, and the batches that hold them.

    ds = PreferenceDataset("dataset/dpo.jsonl", Tokenizer.load(), max_seq_len=1024, max_prompt_length=512)
    prompt, (chosen, chosen_trained), (rejected, rejected_trained) = ds.pair(7)

An example is a pair. Its prompt is read once, by both answers: a row of a batch holds, for each pair in it,

    document  1 1 1 1 2 2 2 3 3 3 3 | 4 4 ...       1 = the prompt but its last id, 2 = that id and the chosen answer,
    prefix    1 1 1 1 1 1 1 1 1 1 1 | 4 4 ...       3 = that id and the rejected one
    position  0 1 2 3 4 5 6 4 5 6 7 | 0 1 ...

where every position sees what stands before it in its document and in its prefix. So an answer gets exactly what it
would get alone after its prompt, and both answers of a pair are in one forward pass whatever the batch size.

Too long: a prompt of more than `max_prompt_length` ids loses its beginning, and so it does, on both sides alike, where
it leaves less than an answer's ids of `max_seq_len`. An answer is never cut: a pair whose longer answer does not fit
after one id of its prompt is left out. With `on_long="drop"` nothing is cut and all of these are left out. `summary`
counts both.

B = rows of a batch, T = their length, P = pairs in it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.console import UserError
from dataset.batches.loader import IGNORED, Batch, Loader, select
from dataset.batches.packing import pair_row_length
from dataset.read.mapping import Mapping
from dataset.tokens.examples import TokenDataset, fingerprint_of, read_caches, repeated, rows_without_use
from tokenizer.text import Tokenizer

Answer = tuple[np.ndarray, np.ndarray]  # ids; which of them are trained on, bool


class PreferenceDataset(TokenDataset):
    reference: np.ndarray | None = None  # (distinct examples, 2) log-probability of chosen and rejected, if need be

    def __init__(
        self,
        paths: Sequence[str | Path] | str | Path,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int,
        cache_dir=None,
        num_workers: int | None = None,
        on_bad_row: str = "error",
        data_limit: int = 0,
        seed: int = 42,
        on_long: str = "truncate",
        max_prompt_length: int = 0,
        mapping: Mapping | None = None,
    ):
        self.max_seq_len, self.end_of_text = max_seq_len, tokenizer.end_of_text
        options = dict(cache_dir=cache_dir, num_workers=num_workers, on_bad_row=on_bad_row, mapping=mapping)
        caches = read_caches(paths, tokenizer, "preference", data_limit, options)
        self._caches = [cache for cache, _ in caches]
        self.path = self._caches[0].path
        kept, prompts, lengths, longest, cut, left_out = [], [], [], 0, 0, 0
        for cache in self._caches:
            prompt, chosen = cache.prompts.array, cache.chosen.array
            rejected = np.diff(cache.offsets.array).astype(np.int32) - prompt - chosen
            longer = np.maximum(chosen, rejected)
            room = np.minimum(max_seq_len + 1 - longer, max_prompt_length or max_seq_len)
            fits = prompt <= room
            keep = fits | (room >= 1) if on_long == "truncate" else fits
            kept.append(np.flatnonzero(keep).astype(np.int32))
            prompts.append(np.minimum(prompt, room)[keep])
            lengths.append(prompts[-1] + chosen[keep] + rejected[keep])  # a position less, as everywhere
            longest = max(longest, int((prompt + longer).max()))
            cut += int((keep & ~fits).sum())
            left_out += int((~keep).sum())
        rows = [len(k) for k in kept]
        if not sum(rows):
            raise UserError(f"--max_seq_len {max_seq_len}: no pair fits, the longest needs {longest - 1}")
        self._kept, self._prompts, self._first = kept, prompts, np.cumsum([0, *rows])
        self.order = repeated(rows, [weight for _, weight in caches], seed)
        self.lengths = np.concatenate(lengths)[self.order]
        limits = (on_long, max_seq_len, max_prompt_length)
        self.fingerprint = fingerprint_of(caches, tokenizer, seed, "preference", *limits)
        self.distinct = self.view(np.unique(self.order, return_index=True)[1], "distinct")
        long = f"; too long: {cut:,} prompts cut, {left_out:,} pairs left out (the longest needs {longest - 1})"
        self.summary = f"{len(self):,} pairs, {int(self.lengths.sum()):,} tokens" + (
            f"{long if cut or left_out else ''}{rows_without_use(caches)}"
        )

    def pair(self, i: int) -> tuple[np.ndarray, Answer, Answer]:
        """Ids of the prompt, the chosen and the rejected answer."""
        cache, number, prompt = self._place(int(self.order[i]))
        start, stop = cache.offsets[number : number + 2].tolist()
        begin = start + int(cache.prompts.array[number])
        middle = begin + int(cache.chosen.array[number])
        chosen, rejected = (
            (cache.tokens[a:b], cache.trained[a:b].astype(bool)) for a, b in ((begin, middle), (middle, stop))
        )
        return cache.tokens[begin - prompt : begin], chosen, rejected

    def sequences(self, i: int) -> list[Answer]:
        prompt, *answers = self.pair(i)
        untrained = np.zeros(len(prompt), bool)
        return [(np.append(prompt, ids), np.append(untrained, trained)) for ids, trained in answers]

    def _place(self, example: int):
        """(cache, entry in it, ids that are left of its prompt)"""
        which = int(np.searchsorted(self._first, example, side="right")) - 1
        nth = example - int(self._first[which])
        return self._caches[which], int(self._kept[which][nth]), int(self._prompts[which][nth])

    def _source(self, example: int) -> str:
        cache, number, _ = self._place(example)
        return f"{cache.path}:{cache.lines[number]}"


@dataclass(frozen=True)
class PairBatch(Batch):
    prefixes: torch.Tensor  # (B, T) int32
    answers: torch.Tensor  # (B, T) int64, 2p + 1 in the chosen and 2p + 2 in the rejected answer of pair p, else 0
    reference: torch.Tensor | None  # (P, 2) fp32

    def context(self):
        return super().context() | dict(prefixes=self.prefixes)


class PairLoader(Loader):
    """`batch_size` counts pairs. The rows of a step are as long as suits its pairs."""

    ROWS_PER_EXAMPLE = 2

    def row_length(self, step: int) -> int:
        return pair_row_length((self.dataset.lengths[self.examples(step)] - 1).tolist(), self.max_seq_len)

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
                    targets[r, here] = np.where(trained, ids, IGNORED)
                    positions[r, here] = np.arange(shared, shared + len(ids))
                    documents[r, here], prefixes[r, here] = prefix + side, prefix
                    answers[r, here] = 2 * pair + side
                begin, pair = here.stop, pair + 1
            positions[r, begin:] = np.arange(length - begin)
        examples = tuple(example for row in rows for example in row)
        reference = self.dataset.reference
        if reference is not None:
            reference = torch.from_numpy(reference[self.dataset.order[list(examples)]].reshape(-1, 2))
        return PairBatch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            documents=torch.from_numpy(documents),
            positions=torch.from_numpy(positions),
            selected=select(targets),
            trained_tokens=int((targets != IGNORED).sum()),
            examples=examples,
            prefixes=torch.from_numpy(prefixes),
            answers=torch.from_numpy(answers),
            reference=reference,
        )
