"""Rows -> examples: token sequences to train on, read from the token cache.

    ds = SFTDataset("dataset/sft.jsonl", Tokenizer.load(), max_seq_len=512)
    ds.tokens(7), ds.trained(7), ds.source(7)      # ids, which of them are trained on, 'dataset/sft.jsonl:8'
    train, val = ds.split(0.01, seed=42)

A data set reads one kind of data (dataset/kinds.py). Its tokens are stored once, in the token cache; repeats and splits
are orders over them. So an example has two numbers: `i` counts in the order, and the number of the *distinct* example
counts what is stored.
"""

from __future__ import annotations

import copy
import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np

from common.console import UserError
from common.files import relative_to_root
from dataset.read.mapping import Mapping
from dataset.read.row_errors import MAX_BAD_ROWS, MAX_EMPTY_ROWS
from dataset.tokens.encode import opening
from dataset.tokens.lengths import fit
from dataset.tokens.order import held_out, repeated, weighted
from dataset.tokens.stream import END, Pieces, Stream, joined, piece
from dataset.tokens.token_cache import UNNAMED, TokenCache, token_caches
from tokenizer.text import Tokenizer

Self = TypeVar("Self", bound="TokenDataset")


class TokenDataset:
    """Examples in an order, in which one may stand twice, or not at all. The base of all data sets.

    A subclass states its `kind`, fills in `order`, `lengths`, `fingerprint` and `summary`, and reads a distinct example
    in `_read` and `_source`; in `_extras` too, where an objective needs more than tokens.

    paths        one or several files. `file:3` repeats its examples three times an epoch, `file:0.5` takes a seeded
                 half of them, `file:2.5` does both
    max_seq_len  positions of a row
    data_limit   use only the first rows, of all files together (0: all)
    seed         chooses the rows that `file:0.5` takes
    cache_dir, num_workers, on_bad_row, max_bad_rows, max_empty_rows, mapping: as in `token_caches`
    """

    kind: ClassVar[str]  # a key of KINDS

    max_seq_len: int
    end_of_text: int  # fills rows
    start_of_text: int  # opens documents in a stream; mostly the same
    order: np.ndarray  # (examples,) the number of each as a distinct example
    lengths: np.ndarray  # (examples,) int32, ids of each
    fingerprint: str  # the same for the same examples in the same order
    summary: str  # for people
    too_long: tuple[int, int, int] = (0, 0, 0)  # examples left out for their length, of how many; ids of the longest

    def __init__(
        self,
        paths: Sequence[str | Path] | str | Path,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int,
        cache_dir: str | Path | None = None,
        num_workers: int | None = None,
        on_bad_row: str = "error",
        max_bad_rows: float = MAX_BAD_ROWS,
        max_empty_rows: float = MAX_EMPTY_ROWS,
        data_limit: int = 0,
        seed: int = 42,
        mapping: Mapping | None = None,
    ):
        self.max_seq_len, self.end_of_text = max_seq_len, tokenizer.end_of_text
        self.start_of_text = tokenizer.start_of_text[0]
        self._tokenizer_hash, self._seed, left = tokenizer.hash, seed, data_limit
        self._mapping = mapping and replace(mapping, path="")
        self._caches: list[TokenCache] = []  # of all files one after the other; a large file has several
        self._files: list[int] = []  # of each cache: which file it is of
        self._weights: list[float] = []  # of each file: how often its examples come in an epoch
        known: dict[str, Path] = {}  # content -> file
        for spec in [paths] if isinstance(paths, (str, Path)) else paths:
            path, weight = weighted(spec)
            caches = token_caches(
                path,
                tokenizer,
                self.kind,
                cache_dir=cache_dir,
                num_workers=num_workers,
                on_bad_row=on_bad_row,
                max_bad_rows=max_bad_rows,
                max_empty_rows=max_empty_rows,
                limit=left,
                mapping=mapping,
            )
            for content in {cache.facts["content"] for cache in caches}:
                refuse_again(known.setdefault(content, path), path)
            self._caches += caches
            self._files += [len(self._weights)] * len(caches)
            self._weights.append(weight)
            left -= sum(cache.facts["rows"] for cache in caches)
            if data_limit and left <= 0:
                break
        if not self._caches:
            raise UserError("--data_path: no file given")

    def __len__(self) -> int:
        return len(self.order)

    @property
    def files(self) -> list[dict[str, str]]:
        """The data files it reads, {"path", "sha256"} each; a path inside the repository is relative to its root."""
        found = dict.fromkeys((str(cache.path), cache.facts["content"]) for cache in self._caches)
        return [dict(path=relative_to_root(path), sha256=content) for path, content in found]

    @property
    def stored_bytes(self) -> int:
        """Of all tokens on the disk."""
        return sum(len(cache.tokens) * cache.tokens.dtype.itemsize for cache in self._caches)

    def tokens(self, i: int) -> np.ndarray:
        """(n,) ids of example i, uint16 or uint32."""
        return self._read(int(self.order[i]))[0]

    def trained(self, i: int) -> np.ndarray | None:
        """(n,) bool: which of tokens(i) are trained on; None: all. The first is never a target, whatever it says."""
        return self._read(int(self.order[i]))[1]

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        """tokens(i), trained(i)"""
        return self._read(int(self.order[i]))

    def sequences(self, i: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """What a model reads of the example, (tokens, trained) each: one sequence, of a preference two."""
        return [self.read(i)]

    def extras(self, i: int) -> dict[str, np.ndarray]:
        """What else is known of each of tokens(i) as a target, by name: (n, ...) each. The loader packs it beside the
        targets, so the first token's is never used."""
        return self._extras(int(self.order[i]))

    def source(self, i: int) -> str:
        """file:line where the example begins."""
        return self._source(int(self.order[i]))

    def will_read(self, i: int) -> None:
        """Example i will be asked for soon: a hint, so that a slow disk can begin. Only large data needs it."""

    def _read(self, example: int) -> tuple[np.ndarray, np.ndarray | None]:
        raise NotImplementedError

    def _source(self, example: int) -> str:
        raise NotImplementedError

    def _extras(self, example: int) -> dict[str, np.ndarray]:
        return {}

    def split(self: Self, val_fraction: float, seed: int) -> tuple[Self, Self]:
        """(training, validation): views, the same for the same seed. A repeated example is on one side only. The
        summary of the second is about both."""
        distinct = np.unique(self.order)
        chosen = held_out(len(distinct), val_fraction, seed, "examples")
        validates = np.zeros(int(distinct[-1]) + 1, bool)
        validates[distinct] = chosen
        name = f"{val_fraction} {seed}"
        train = self.view(np.flatnonzero(~validates[self.order]), f"train {name}")
        val = self.view(np.unique(self.order, return_index=True)[1][chosen], f"val {name}")
        val.summary = f"{len(val):,} of these, {len(train):,} left to train on"
        return train, val

    def view(self: Self, examples: np.ndarray, name: str) -> Self:
        """The same data set with these examples only, in this order; the name goes into its fingerprint."""
        view = copy.copy(self)
        view.order, view.lengths = self.order[examples], self.lengths[examples]
        view.fingerprint = _hash(self.fingerprint, name)
        return view

    def _fingerprint(self, *options: object) -> str:
        data = []
        for file, weight in enumerate(self._weights):
            parts = [cache.facts for cache, own in zip(self._caches, self._files) if own == file]
            data.append([parts[0]["content"], *(sum(f[key] for f in parts) for key in ("rows", "bad")), weight])
        seed = self._seed if any(weight % 1 for weight in self._weights) else ""  # else it does not change the data
        mapped = [self._mapping] if self._mapping else []  # other columns of the same content are other data
        formats = {cache.facts.get("format", UNNAMED) for cache in self._caches} - {UNNAMED}  # and other tokens of it
        return _hash(json.dumps(data), self._tokenizer_hash, *options, seed, *mapped, *formats)

    def _left_aside(self) -> str:
        """For the summary: what of the files did not become an example, with the first places."""
        facts = [cache.facts for cache in self._caches]
        unread = dict.fromkeys(name for f in facts for name in f["unread"])
        empty, where = sum(f["empty"] for f in facts), [place for f in facts for place in f["first_empty"]][:3]
        bad, rejects = sum(f["bad"] for f in facts), [f["rejects"] for f in facts if f["bad"]]
        rejects = [*rejects[:3], *["..."] * (len(rejects) > 3)]
        return (
            (f"; columns not read: {', '.join(unread)}" if unread else "")
            + (f"; {empty:,} rows with nothing to train on left out ({', '.join(where)})" if empty else "")
            + (f"; {bad:,} bad rows skipped (see {', '.join(rejects)})" if bad else "")
        )


class PretrainDataset(TokenDataset):
    """One continuous stream, cut into rows.

    Documents d1 d2 ... become E d1 E d2 ... E, where E is <|endoftext|>. As an input E belongs to the document it
    opens, as a target it ends the one before, so that every token is a target once. Where the tokenizer puts a B before
    texts (Llama), they become E B d1 E B d2 E; there B opens a document, and E belongs to the one before. Row r is
    stream[rT : (r + 1)T + 1], T inputs and the target of the last. Only the stream's last row may be shorter. Files of
    one weight share a stream.
    """

    kind = "text"

    def __init__(self, paths: Sequence[str | Path] | str | Path, tokenizer: Tokenizer, **options):
        super().__init__(paths, tokenizer, **options)
        whole = [piece(i, 0, len(cache.tokens)) for i, cache in enumerate(self._caches)]
        self._lay_out(whole)
        self.fingerprint = self._fingerprint("pretrain", self.max_seq_len, *opening(tokenizer)[1:])
        documents, tokens = (sum(cache.facts[key] for cache in self._caches) for key in ("documents", "tokens"))
        self.summary = f"{documents:,} documents, {tokens:,} tokens{self._left_aside()}"

    def _lay_out(self, pieces: list[Pieces], *, repeat: bool = True) -> None:
        """Cuts streams of these pieces, given for each cache, into rows. repeat: as the files' weights say."""
        by_weight: dict[float, list[Pieces]] = {}
        for file, own in zip(self._files, pieces):
            if len(own.cache):
                by_weight.setdefault(self._weights[file] if repeat else 1.0, []).append(own)
        self._streams = [Stream(self._caches, group, self.end_of_text) for group in by_weight.values()]
        rows = [-(-(stream.length - 1) // self.max_seq_len) for stream in self._streams]
        self._first_rows = np.cumsum([0, *rows])
        lengths = [np.full(n, self.max_seq_len + 1, np.int32) for n in rows]
        for own, n, stream in zip(lengths, rows, self._streams):
            own[-1] = stream.length - (n - 1) * self.max_seq_len
        self.order = repeated(rows, list(by_weight), self._seed)
        self.lengths = np.concatenate(lengths)[self.order]

    def split(self, val_fraction: float, seed: int) -> tuple[PretrainDataset, PretrainDataset]:
        """(training, validation): streams of different documents, so no part of a long one is on both sides.

        A .txt file is one document, or does not say where one ends: its end is held out.
        """
        counts = [0 if cache.facts["kind"] == "plain" else len(cache) for cache in self._caches]
        documents, texts = sum(counts), [file for file, n in zip(self._files, counts) if not n]
        alone = texts and round(val_fraction * documents) in (0, documents)  # of the .txt files there is enough
        chosen = np.zeros(documents, bool) if alone else held_out(documents, val_fraction, seed, "documents")
        sizes = np.bincount(self._files, [len(cache.tokens) for cache in self._caches]).astype(np.int64)
        sides: tuple[list[Pieces], list[Pieces]] = [], []
        first, before = 0, dict.fromkeys(self._files, 0)
        for i, (cache, file, n) in enumerate(zip(self._caches, self._files, counts)):
            size = len(cache.tokens)
            if n:
                own = np.flatnonzero(chosen[first : first + n])
                begins, ends = cache.offsets.array[own], cache.offsets.array[own + 1]
                sides[0].append(piece(i, [0, *ends], [*begins, size]))
                sides[1].append(piece(i, begins, ends))
            else:
                cut = int(sizes[file]) - max(1, round(val_fraction * int(sizes[file])))  # in the file
                here = min(max(cut - before[file], 0), size)
                sides[0].append(piece(i, 0, here))
                opens = [piece(END, 0, 1)] if before[file] + here == cut > 0 else []  # it begins inside the document
                sides[1].append(joined([*opens, piece(i, here, size)]))
            first, before[file] = first + n, before[file] + size
        train, val = copy.copy(self), copy.copy(self)
        train._lay_out(sides[0])
        val._lay_out(sides[1], repeat=False)
        for view, name in ((train, "train"), (val, "val")):
            view.fingerprint = _hash(self.fingerprint, f"{name} documents {val_fraction} {seed}")
        found = [f"{int(chosen.sum()):,} of these documents"] if chosen.any() else []
        found += ["the end of each .txt file"] if texts else []
        val.summary = f"{' and '.join(found)}, {len(val):,} rows; {len(train):,} rows left to train on"
        return train, val

    def will_read(self, i: int) -> None:
        stream, start = self._place(int(self.order[i]))
        stream.will_read(start, min(start + self.max_seq_len + 1, stream.length))

    def _read(self, row: int) -> tuple[np.ndarray, None]:
        stream, start = self._place(row)
        return stream.read(start, min(start + self.max_seq_len + 1, stream.length)), None

    def _source(self, row: int) -> str:
        stream, start = self._place(row)
        return stream.source(start)

    def _place(self, row: int) -> tuple[Stream, int]:
        which = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self._streams[which], (row - int(self._first_rows[which])) * self.max_seq_len


class EntryDataset(TokenDataset):
    """Each entry of the token caches is an example. dataset/tokens/lengths.py says what happens to those too long.

    max_prompt_length  cut prompts of more ids (0: only what does not fit)
    on_long            "drop": leave out what is too long, and cut nothing
    """

    called = "example"  # in messages

    def __init__(
        self,
        paths: Sequence[str | Path] | str | Path,
        tokenizer: Tokenizer,
        *,
        on_long: str = "truncate",
        max_prompt_length: int = 0,
        **options,
    ):
        super().__init__(paths, tokenizer, **options)
        kept, cuts, sizes, longest, shortened, left_out = [], [], [], 0, 0, 0
        for cache in self._caches:
            lengths = cache.lengths()
            keep, cut = fit(lengths, self.max_seq_len, max_prompt_length=max_prompt_length, on_long=on_long)
            kept.append(np.flatnonzero(keep).astype(np.int32))
            cuts.append(cut[keep])
            sizes.append((lengths.total - cut)[keep])
            longest = max(longest, int((lengths.prompt + lengths.answer).max(initial=0)) - 1)
            shortened += int((cuts[-1] > 0).sum())
            left_out += int((~keep).sum())
        counts = [len(entries) for entries in kept]
        self.distinct_count = sum(counts)
        self.too_long = left_out, left_out + self.distinct_count, longest
        if not self.distinct_count:
            raise UserError(f"--max_seq_len {self.max_seq_len}: no {self.called} fits, the longest needs {longest}")
        self._kept, self._cuts, self._first = kept, cuts, np.cumsum([0, *counts]).tolist()
        self.order = repeated(np.bincount(self._files, counts).astype(int).tolist(), self._weights, self._seed)
        self.lengths = np.concatenate(sizes)[self.order]
        self.summary = f"{len(self):,} {self.called}s, {int(self.lengths.sum()):,} tokens"
        if shortened or left_out:
            self.summary += (
                f"; too long: {shortened:,} cut, {left_out:,} left out (the longest needs --max_seq_len {longest})"
            )
        self.summary += self._left_aside()

    def _place(self, example: int) -> tuple[TokenCache, int, int]:
        """(its cache, its entry there, how many ids are cut from its left)"""
        which = bisect_right(self._first, example) - 1
        nth = example - self._first[which]
        return self._caches[which], int(self._kept[which][nth]), int(self._cuts[which][nth])

    def _source(self, example: int) -> str:
        cache, entry, _ = self._place(example)
        return cache.where(entry)


class SFTDataset(EntryDataset):
    """Conversations, with the mask of what is trained on.

    An answer is trained on whole or not at all: one whose beginning was cut is context only.
    """

    kind = "chat"

    def __init__(
        self,
        paths: Sequence[str | Path] | str | Path,
        tokenizer: Tokenizer,
        *,
        on_long: str = "truncate",
        **options,
    ):
        super().__init__(paths, tokenizer, on_long=on_long, max_prompt_length=0, **options)
        self.fingerprint = self._fingerprint("sft", on_long, self.max_seq_len)

    def _read(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        cache, entry, cut = self._place(example)
        start, stop = cache.offsets[entry : entry + 2].tolist()
        trained = cache.columns["trained"][start + cut : stop].astype(bool)
        if cut and trained[0]:  # the beginning of this answer was cut
            trained[: trained.argmin()] = False
        return cache.tokens[start + cut : stop], trained


def refuse_again(first: Path, again: Path) -> None:
    """UserError for a file with the content of an earlier one: its rows would be on both sides of a split."""
    if first is again:
        return
    if first.resolve() == again.resolve():
        raise UserError(f"{again} is named twice; {again}:2 repeats it")
    raise UserError(f"{first} and {again} have the same content; leave one out: {first}:2 repeats it")


def _hash(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
