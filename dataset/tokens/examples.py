"""Rows -> examples: token sequences to train on, read from the token cache.

    ds = SFTDataset("dataset/sft.jsonl", Tokenizer.load(), max_seq_len=512)
    ds.tokens(7), ds.trained(7), ds.source(7)      # ids, which of them are trained on, 'dataset/sft.jsonl:8'
    train, val = ds.split(0.01, seed=42)

An example of n ids is n - 1 positions: its ids but the last are the inputs, its ids but the first are the targets. So
with rows of T positions, an example has at most T + 1 ids.

`paths` is one or several files. `file:3` repeats its examples three times an epoch, `file:0.5` takes a seeded half of
them, `file:2.5` does both. Repeats and views are an order over the examples; tokens are stored once.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.console import UserError
from dataset.read.mapping import Mapping
from dataset.tokens.token_cache import TokenCache, token_cache
from tokenizer.text import Tokenizer

SPLIT, PART = 1 << 62, 1 << 61  # streams of `shuffled`; the loader's are the epochs 0, 1, ...


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


class TokenDataset:
    """What both datasets share: an order over the distinct examples, so that one may come twice, or not at all.

    A subclass fills in `_tokens`, `_trained`, `_source`, for the number of a distinct example, and `_extras` where an
    objective needs more than the tokens.
    """

    max_seq_len: int
    end_of_text: int  # opens documents in a stream, fills rows
    order: np.ndarray  # example -> distinct example
    lengths: np.ndarray  # int32, ids of each example
    fingerprint: str
    summary: str

    def __len__(self) -> int:
        return len(self.order)

    def tokens(self, i: int) -> np.ndarray:
        return self._tokens(int(self.order[i]))

    def trained(self, i: int) -> np.ndarray | None:
        """Which of tokens(i) are trained on, bool; None = all of them. The first is no target, whatever it says."""
        return self._trained(int(self.order[i]))

    def sequences(self, i: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """What a model reads of the example, (tokens, trained) each: one sequence, of a preference two."""
        return [(self.tokens(i), self.trained(i))]

    def extras(self, i: int) -> dict[str, np.ndarray]:
        """What else is known of each of tokens(i) as a target, by name: (n, ...) each. The loader packs it beside the
        targets, so the first token's is never used."""
        return self._extras(int(self.order[i]))

    def _extras(self, example: int) -> dict[str, np.ndarray]:
        return {}

    def source(self, i: int) -> str:
        """file:line where the example begins."""
        return self._source(int(self.order[i]))

    def split(self, val_fraction: float, seed: int) -> tuple["TokenDataset", "TokenDataset"]:
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

    def view(self, examples: np.ndarray, name: str) -> "TokenDataset":
        view = copy.copy(self)
        view.order, view.lengths = self.order[examples], self.lengths[examples]
        view.fingerprint = _hash(self.fingerprint, name)
        return view


class PretrainDataset(TokenDataset):
    """One continuous stream, cut into rows.

    Documents d1 d2 ... become E d1 E d2 ... E, where E is <|endoftext|>. As an input E belongs to the document it
    opens, as a target it ends the one before, so that every token is a target once. Row r is stream[rT : (r + 1)T + 1],
    T inputs and the target of the last. Only the stream's last row may be shorter. Files of one weight share a stream.
    """

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
        mapping: Mapping | None = None,
    ):
        self.max_seq_len, self.end_of_text = max_seq_len, tokenizer.end_of_text
        options = dict(cache_dir=cache_dir, num_workers=num_workers, on_bad_row=on_bad_row, mapping=mapping)
        caches = read_caches(paths, tokenizer, "text", data_limit, options)
        by_weight: dict[float, list[TokenCache]] = {}
        for cache, weight in caches:
            by_weight.setdefault(weight, []).append(cache)
        self._streams = [_Stream(group) for group in by_weight.values()]
        rows = [-(-(stream.length - 1) // max_seq_len) for stream in self._streams]
        self._first_rows = np.cumsum([0, *rows])
        lengths = [np.full(n, max_seq_len + 1, np.int32) for n in rows]
        for own, n, stream in zip(lengths, rows, self._streams):
            own[-1] = stream.length - (n - 1) * max_seq_len
        self.order = repeated(rows, list(by_weight), seed)
        self.lengths = np.concatenate(lengths)[self.order]
        self.fingerprint = fingerprint_of(caches, tokenizer, seed, "pretrain", max_seq_len)
        documents, tokens = (sum(cache.facts[key] for cache, _ in caches) for key in ("documents", "tokens"))
        self.summary = f"{documents:,} documents, {tokens:,} tokens{rows_without_use(caches)}"

    def _tokens(self, row: int) -> np.ndarray:
        stream, start = self._place(row)
        return stream.read(start, start + self.max_seq_len + 1, self.end_of_text)

    def _trained(self, row: int) -> None:
        return None

    def _source(self, row: int) -> str:
        stream, start = self._place(row)
        return stream.source(start)

    def _place(self, row: int) -> tuple["_Stream", int]:
        which = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self._streams[which], (row - int(self._first_rows[which])) * self.max_seq_len


class _Stream:
    """The tokens of several caches one after the other, and one <|endoftext|> that ends the last document."""

    def __init__(self, caches: list[TokenCache]):
        self.caches = caches
        self.starts = np.cumsum([0, *(len(cache.tokens) for cache in caches)])
        self.length = int(self.starts[-1]) + 1

    def read(self, start: int, stop: int, end: int) -> np.ndarray:
        parts = []
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        for cache, begin in zip(self.caches[first:], self.starts[first:].tolist()):
            if begin >= stop:
                break
            parts.append(cache.tokens[max(start - begin, 0) : stop - begin])
        if stop >= self.length:
            parts.append(np.array([end], parts[0].dtype if parts else np.uint32))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def source(self, position: int) -> str:
        which = int(np.searchsorted(self.starts, position, side="right")) - 1
        cache = self.caches[which]
        document = int(np.searchsorted(cache.offsets.array, position - int(self.starts[which]), side="right")) - 1
        return f"{cache.path}:{cache.lines[document]}"


class SFTDataset(TokenDataset):
    """One conversation an example, with its trained positions.

    A conversation of more than T + 1 ids is cut from the left (`on_long` "truncate") or left out ("drop"). An answer is
    trained on whole or not at all: one that lost its beginning is context only, and where the last answer does not fit
    with at least one token before it, the conversation is left out. `summary` counts both.
    """

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
        mapping: Mapping | None = None,
    ):
        self.max_seq_len, self.end_of_text = max_seq_len, tokenizer.end_of_text
        options = dict(cache_dir=cache_dir, num_workers=num_workers, on_bad_row=on_bad_row, mapping=mapping)
        caches = read_caches(paths, tokenizer, "chat", data_limit, options)
        self._caches = [cache for cache, _ in caches]
        most = max_seq_len + 1
        kept, lengths, longest, cut, left_out = [], [], 0, 0, 0
        for cache in self._caches:
            full = np.diff(cache.offsets.array).astype(np.int32)
            fits = full <= most
            keep = fits | (cache.answers.array > full - most) if on_long == "truncate" else fits
            kept.append(np.flatnonzero(keep).astype(np.int32))
            lengths.append(np.minimum(full[keep], most))
            longest = max(longest, int(full.max()))
            cut += int((keep & ~fits).sum())
            left_out += int((~keep).sum())
        rows = [len(k) for k in kept]
        if not sum(rows):
            raise UserError(f"--max_seq_len {max_seq_len}: no example fits, the longest needs {longest - 1}")
        self._kept, self._first = kept, np.cumsum([0, *rows])
        self.order = repeated(rows, [weight for _, weight in caches], seed)
        self.lengths = np.concatenate(lengths)[self.order]
        self.fingerprint = fingerprint_of(caches, tokenizer, seed, "sft", on_long, max_seq_len)
        long = f"; too long: {cut:,} cut, {left_out:,} left out (the longest needs --max_seq_len {longest - 1})"
        long = long if cut or left_out else ""
        self.summary = f"{len(self):,} examples, {int(self.lengths.sum()):,} tokens{long}{rows_without_use(caches)}"

    def _place(self, example: int) -> tuple[TokenCache, int, int, int]:
        """(cache, entry in it, where its kept tokens start and stop)"""
        which = int(np.searchsorted(self._first, example, side="right")) - 1
        number = int(self._kept[which][example - int(self._first[which])])
        cache = self._caches[which]
        start, stop = cache.offsets[number : number + 2].tolist()
        return cache, number, max(start, stop - self.max_seq_len - 1), stop

    def _tokens(self, example: int) -> np.ndarray:
        cache, _, start, stop = self._place(example)
        return cache.tokens[start:stop]

    def _trained(self, example: int) -> np.ndarray:
        cache, number, start, stop = self._place(example)
        trained = cache.trained[start:stop].astype(bool)
        if start > cache.offsets[number] and trained[0]:  # the cut took the beginning of this answer
            trained[: trained.argmin()] = False
        return trained

    def _source(self, example: int) -> str:
        cache, number, _, _ = self._place(example)
        return f"{cache.path}:{cache.lines[number]}"


def read_caches(paths, tokenizer: Tokenizer, kind: str, data_limit: int, options: dict):
    """[(cache, weight)] in order; data_limit rows of all together."""
    caches, left = [], data_limit
    for spec in [paths] if isinstance(paths, (str, Path)) else paths:
        path, weight = weighted(spec)
        caches.append((token_cache(path, tokenizer, kind, limit=left, **options), weight))
        left -= caches[-1][0].facts["rows"]
        if data_limit and left <= 0:
            break
    if not caches:
        raise UserError("--data_path: no file given")
    return caches


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


def fingerprint_of(caches: list[tuple[TokenCache, float]], tokenizer: Tokenizer, seed: int, *options: object) -> str:
    data = [[cache.facts["content"], cache.facts["rows"], cache.facts["bad"], weight] for cache, weight in caches]
    chosen = seed if any(weight % 1 for _, weight in caches) else ""  # else the seed has no say in what the data is
    return _hash(json.dumps(data), tokenizer.hash, *options, chosen)


def _hash(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def rows_without_use(caches: list[tuple[TokenCache, float]]) -> str:
    """What did not become an example, with the first places."""
    empty = sum(cache.facts["empty"] for cache, _ in caches)
    where = [place for cache, _ in caches for place in cache.facts["first_empty"]][:3]
    bad = sum(cache.facts["bad"] for cache, _ in caches)
    rejects = ", ".join(cache.facts["rejects"] for cache, _ in caches if cache.facts["bad"])
    unread = dict.fromkeys(name for cache, _ in caches for name in cache.facts["unread"])
    aside = f"; columns not read: {', '.join(unread)}" if unread else ""
    return (
        aside
        + (f"; {empty:,} rows with nothing to train on left out ({', '.join(where)})" if empty else "")
        + (f"; {bad:,} bad rows skipped (see {rejects})" if bad else "")
    )
