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
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np

from common.console import UserError
from dataset.read.mapping import Mapping
from dataset.read.row_errors import MAX_BAD_ROWS
from dataset.tokens.lengths import fit
from dataset.tokens.stream import Stream
from dataset.tokens.token_cache import MAX_EMPTY_ROWS, TokenCache, token_cache
from tokenizer.text import Tokenizer

SPLIT, PART = 1 << 62, 1 << 61  # streams of `shuffled`; the loader uses the epochs 0, 1, ... as streams


def shuffled(n: int, seed: int, stream: int) -> np.ndarray:
    """A permutation of n, the same on every machine and with every numpy: n sorted keys of Philox, a counter RNG.

    Generator.permutation may change between numpy versions (NEP 19), the raw Philox stream may not. An index in the low
    bits makes the keys unique, so how ties are sorted never shows.
    """
    bits = max(n - 1, 1).bit_length()
    keys = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(n)
    keys >>= np.uint64(bits)
    keys <<= np.uint64(bits)
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    keys &= np.uint64((1 << bits) - 1)
    return keys.astype(np.int32 if n < 1 << 31 else np.int64)


def weighted(spec: str | Path) -> tuple[Path, float]:
    """`data.jsonl:2.5` -> (data.jsonl, 2.5)."""
    path, colon, number = str(spec).rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return Path(spec), 1.0
    if not colon or Path(spec).exists():
        return Path(spec), 1.0
    if not 0 < weight < float("inf"):
        raise UserError(f"--data_path {spec}: the number after the colon must be above 0")
    return Path(path), weight


Self = TypeVar("Self", bound="TokenDataset")


class TokenDataset:
    """Examples in an order, in which one may stand twice, or not at all. The base of all data sets.

    A subclass states its `kind`, fills in `order`, `lengths`, `fingerprint` and `summary`, and reads a distinct example
    in `_tokens`, `_trained` and `_source`; in `_extras` too, where an objective needs more than tokens.

    paths        one or several files. `file:3` repeats its examples three times an epoch, `file:0.5` takes a seeded
                 half of them, `file:2.5` does both
    max_seq_len  positions of a row
    data_limit   use only the first rows, of all files together (0: all)
    seed         chooses the rows that `file:0.5` takes
    cache_dir, num_workers, on_bad_row, max_bad_rows, max_empty_rows, mapping: as in `token_cache`
    """

    kind: ClassVar[str]  # a key of KINDS

    max_seq_len: int
    end_of_text: int  # opens documents in a stream, fills rows
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
        self._tokenizer_hash, self._seed, left = tokenizer.hash, seed, data_limit
        self._caches: list[TokenCache] = []
        self._weights: list[float] = []  # of each cache: how often its examples come in an epoch
        for spec in [paths] if isinstance(paths, (str, Path)) else paths:
            path, weight = weighted(spec)
            cache = token_cache(
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
            self._caches.append(cache)
            self._weights.append(weight)
            left -= cache.facts["rows"]
            if data_limit and left <= 0:
                break
        if not self._caches:
            raise UserError("--data_path: no file given")

    def __len__(self) -> int:
        return len(self.order)

    def tokens(self, i: int) -> np.ndarray:
        """(n,) ids of example i, uint16 or uint32."""
        return self._tokens(int(self.order[i]))

    def trained(self, i: int) -> np.ndarray | None:
        """(n,) bool: which of tokens(i) are trained on; None: all. The first is never a target, whatever it says."""
        return self._trained(int(self.order[i]))

    def sequences(self, i: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """What a model reads of the example, (tokens, trained) each: one sequence, of a preference two."""
        return [(self.tokens(i), self.trained(i))]

    def extras(self, i: int) -> dict[str, np.ndarray]:
        """What else is known of each of tokens(i) as a target, by name: (n, ...) each. The loader packs it beside the
        targets, so the first token's is never used."""
        return self._extras(int(self.order[i]))

    def source(self, i: int) -> str:
        """file:line where the example begins."""
        return self._source(int(self.order[i]))

    def _tokens(self, example: int) -> np.ndarray:
        raise NotImplementedError

    def _trained(self, example: int) -> np.ndarray | None:
        raise NotImplementedError

    def _source(self, example: int) -> str:
        raise NotImplementedError

    def _extras(self, example: int) -> dict[str, np.ndarray]:
        return {}

    def split(self: Self, val_fraction: float, seed: int) -> tuple[Self, Self]:
        """(training, validation): views, the same for the same seed. A repeated example is on one side only."""
        if not 0 < val_fraction < 1:
            raise UserError(f"--val_fraction {val_fraction}: must be between 0 and 1")
        distinct = np.unique(self.order)
        count = max(1, round(val_fraction * len(distinct)))
        if count >= len(distinct):
            raise UserError(f"--val_fraction {val_fraction}: {len(distinct)} examples are too few to split")
        held_out = np.zeros(int(distinct[-1]) + 1, bool)
        held_out[distinct[shuffled(len(distinct), seed, SPLIT)[:count]]] = True
        name = f"{val_fraction} {seed}"
        return (
            self.view(np.flatnonzero(~held_out[self.order]), f"train {name}"),
            self.view(np.unique(self.order, return_index=True)[1][held_out[distinct]], f"val {name}"),
        )

    def view(self: Self, examples: np.ndarray, name: str) -> Self:
        """The same data set with these examples only, in this order; the name goes into its fingerprint."""
        view = copy.copy(self)
        view.order, view.lengths = self.order[examples], self.lengths[examples]
        view.fingerprint = _hash(self.fingerprint, name)
        return view

    def _fingerprint(self, *options: object) -> str:
        facts = [cache.facts for cache in self._caches]
        data = [[f["content"], f["rows"], f["bad"], weight] for f, weight in zip(facts, self._weights)]
        seed = self._seed if any(weight % 1 for weight in self._weights) else ""  # else it does not change the data
        return _hash(json.dumps(data), self._tokenizer_hash, *options, seed)

    def _left_aside(self) -> str:
        """For the summary: what of the files did not become an example, with the first places."""
        facts = [cache.facts for cache in self._caches]
        unread = dict.fromkeys(name for f in facts for name in f["unread"])
        empty, where = sum(f["empty"] for f in facts), [place for f in facts for place in f["first_empty"]][:3]
        bad, rejects = sum(f["bad"] for f in facts), [f["rejects"] for f in facts if f["bad"]]
        return (
            (f"; columns not read: {', '.join(unread)}" if unread else "")
            + (f"; {empty:,} rows with nothing to train on left out ({', '.join(where)})" if empty else "")
            + (f"; {bad:,} bad rows skipped (see {', '.join(rejects)})" if bad else "")
        )


class PretrainDataset(TokenDataset):
    """One continuous stream, cut into rows.

    Documents d1 d2 ... become E d1 E d2 ... E, where E is <|endoftext|>. As an input E belongs to the document it
    opens, as a target it ends the one before, so that every token is a target once. Row r is stream[rT : (r + 1)T + 1],
    T inputs and the target of the last. Only the stream's last row may be shorter. Files of one weight share a stream.
    """

    kind = "text"

    def __init__(self, paths: Sequence[str | Path] | str | Path, tokenizer: Tokenizer, **options):
        super().__init__(paths, tokenizer, **options)
        by_weight: dict[float, list[TokenCache]] = {}
        for cache, weight in zip(self._caches, self._weights):
            by_weight.setdefault(weight, []).append(cache)
        self._streams = [Stream(group) for group in by_weight.values()]
        rows = [-(-(stream.length - 1) // self.max_seq_len) for stream in self._streams]
        self._first_rows = np.cumsum([0, *rows])
        lengths = [np.full(n, self.max_seq_len + 1, np.int32) for n in rows]
        for own, n, stream in zip(lengths, rows, self._streams):
            own[-1] = stream.length - (n - 1) * self.max_seq_len
        self.order = repeated(rows, list(by_weight), self._seed)
        self.lengths = np.concatenate(lengths)[self.order]
        self.fingerprint = self._fingerprint("pretrain", self.max_seq_len)
        documents, tokens = (sum(cache.facts[key] for cache in self._caches) for key in ("documents", "tokens"))
        self.summary = f"{documents:,} documents, {tokens:,} tokens{self._left_aside()}"

    def _tokens(self, row: int) -> np.ndarray:
        stream, start = self._place(row)
        return stream.read(start, start + self.max_seq_len + 1, self.end_of_text)

    def _trained(self, row: int) -> None:
        return None

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
            longest = max(longest, int((lengths.prompt + lengths.answer).max()) - 1)
            shortened += int((cuts[-1] > 0).sum())
            left_out += int((~keep).sum())
        counts = [len(entries) for entries in kept]
        self.distinct_count = sum(counts)
        self.too_long = left_out, left_out + self.distinct_count, longest
        if not self.distinct_count:
            raise UserError(f"--max_seq_len {self.max_seq_len}: no {self.called} fits, the longest needs {longest}")
        self._kept, self._cuts, self._first = kept, cuts, np.cumsum([0, *counts])
        self.order = repeated(counts, self._weights, self._seed)
        self.lengths = np.concatenate(sizes)[self.order]
        self.summary = f"{len(self):,} {self.called}s, {int(self.lengths.sum()):,} tokens"
        if shortened or left_out:
            self.summary += (
                f"; too long: {shortened:,} cut, {left_out:,} left out (the longest needs --max_seq_len {longest})"
            )
        self.summary += self._left_aside()

    def _place(self, example: int) -> tuple[TokenCache, int, int]:
        """(its cache, its entry there, how many ids are cut from its left)"""
        which = int(np.searchsorted(self._first, example, side="right")) - 1
        nth = example - int(self._first[which])
        return self._caches[which], int(self._kept[which][nth]), int(self._cuts[which][nth])

    def _source(self, example: int) -> str:
        cache, entry, _ = self._place(example)
        return f"{cache.path}:{cache.lines[entry]}"


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

    def _tokens(self, example: int) -> np.ndarray:
        cache, entry, cut = self._place(example)
        start, stop = cache.offsets[entry : entry + 2].tolist()
        return cache.tokens[start + cut : stop]

    def _trained(self, example: int) -> np.ndarray:
        cache, entry, cut = self._place(example)
        start, stop = cache.offsets[entry : entry + 2].tolist()
        trained = cache.columns["trained"][start + cut : stop].astype(bool)
        if cut and trained[0]:  # the beginning of this answer was cut
            trained[: trained.argmin()] = False
        return trained


def repeated(sizes: list[int], weights: list[float], seed: int) -> np.ndarray:
    """Distinct examples, group after group, each group repeated by its weight's whole part and a seeded rest of it."""
    parts, first = [], 0
    for group, (size, weight) in enumerate(zip(sizes, weights)):
        parts += [np.arange(first, first + size)] * int(weight)
        rest = round((weight - int(weight)) * size)
        parts.append(first + np.sort(shuffled(size, seed, PART + group)[:rest]))
        first += size
    order = np.concatenate(parts)
    if not len(order):
        raise UserError(f"--data_path: {weights} of {sizes} examples leave none")
    return order.astype(np.int32 if first < 1 << 31 else np.int64)


def _hash(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
