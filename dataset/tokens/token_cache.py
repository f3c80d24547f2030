"""A data file's tokens, worked out once: rows are tokenised in parallel into flat files, which are mapped afterwards.

    [cache] = token_caches("dataset/pretrain.jsonl", tokenizer, "text")
    cache.tokens[cache.offsets[7]:cache.offsets[8]]     # the eighth entry, uint16 (uint32 from 65,537 ids on)

An entry is a document, a conversation or a pair of answers, as dataset/tokens/encode.py makes them of a row. The key of
a cache is made of the data's content, the tokenizer's hash (which covers its chat template) and the options that choose
rows. It does not depend on --max_seq_len or --batch_size, so changing these reads the same cache.

A file of 2 GB or more has a cache for each of its parts, of about 1 GB: tokenising that was stopped continues after the
last complete part.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from multiprocessing import current_process, get_context, parent_process
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.console import Progress, UserError, note
from dataset.kinds import KINDS
from dataset.read.jsonl import Chunk, Head, Jsonl, entry_name, refuse_changes
from dataset.read.mapping import Mapping, Reader, find_reader, require_reader
from dataset.read.row_errors import MAX_BAD_ROWS, MAX_EMPTY_ROWS, RowErrors, allowed, too_many_bad, too_many_empty
from dataset.read.text import TextFile
from dataset.tokens.cache import Mapped, find_entry, get_or_build, require_space
from dataset.tokens.encode import BadRow, Block, open_document, opening, token_dtype
from dataset.tokens.lengths import Lengths
from tokenizer.text import Tokenizer

FORMAT = 6  # part of every key: raise it when the files change, and old caches are made anew, as other data
UNNAMED = 6  # the last format that fingerprints did not name; states, teachers' files and references were made under it
TOKENISED_BYTES = 1 << 20  # bytes of rows that are tokenised together
PART_BYTES = 1 << 30  # bytes of rows that are tokenised into a cache of their own
ESTIMATED_FROM = 256 << 20  # bytes of rows from which the space that their tokens need is estimated first
SAMPLES, SAMPLED_BYTES = 8, 64 << 10  # for that: places in the file, bytes of rows at each
PROCESSES_FROM = 32 << 20  # bytes of data from which starting processes pays


class TokenCache:
    """The mapped files. N ids in n entries: tokens (N,), offsets (n + 1,), lines (n,); columns as its kind has them."""

    def __init__(self, path: Path, folder: Path, facts: dict):
        self.path, self.facts, self.kind = path, facts, KINDS[facts["kind"]]
        self.tokens = Mapped(folder / "tokens", np.dtype(facts["dtype"]).type)
        self.offsets = Mapped(folder / "offsets", np.int64)
        self.lines = Mapped(folder / "lines", np.int64)
        self.columns = {name: Mapped(folder / name, dtype) for name, dtype in self.kind.columns.items()}

    def __len__(self) -> int:
        return len(self.lines)

    def lengths(self) -> Lengths:
        """Of every entry, int32. What this reads is mapped for this only: many files do not stay open for it."""
        ids = np.diff(Mapped(self.offsets.path, np.int64).array).astype(np.int32)
        columns = {name: Mapped(own.path, own.dtype.type).array for name, own in self.columns.items()}
        return self.kind.lengths(ids, columns)

    def where(self, entry: int) -> str:
        """file:line of an entry's row."""
        try:
            return f"{self.path}:{self.lines[entry]}"
        except OSError:  # removed since the run started: it trains on what it has mapped
            return str(self.path)


def token_caches(
    path: str | Path,
    tokenizer: Tokenizer,
    kind: str,
    *,
    cache_dir: str | Path | None = None,
    num_workers: int | None = None,
    on_bad_row: str = "error",
    max_bad_rows: float = MAX_BAD_ROWS,
    max_empty_rows: float = MAX_EMPTY_ROWS,
    limit: int = 0,
    mapping: Mapping | None = None,
) -> list[TokenCache]:
    """The caches of one file's parts, in order, made now where they are not there.

    kind         a key of KINDS: what the rows must be
    num_workers  processes that tokenise (None: one for each core)
    on_bad_row   "error", or "skip": see RowErrors
    max_bad_rows, max_empty_rows  shares of the rows of each part that may be skipped, and that may have nothing to
                 train on
    limit        use only the first rows (0: all)
    """
    if getattr(current_process(), "_inheriting", False):  # one of our workers, which runs its parent's script again
        raise RuntimeError("this script runs when it is imported; put its code under `if __name__ == '__main__':`")

    def check(rows: Jsonl | Head) -> Reader:
        return require_reader(rows, kind, mapping, on_bad_row=on_bad_row, limit=limit)

    if plain := Path(path).suffix.lower() == ".txt":
        if kind != "text":
            raise UserError(f"{path}: plain text is for pretraining; this stage needs JSONL with conversations")
        source = TextFile(path, cache_dir=cache_dir)
    else:
        source = Jsonl(path, cache_dir=cache_dir, check=check)
    what = "plain" if plain else kind
    rows, taken = (limit, limit) if 0 < limit < len(source) else (len(source), 0)
    columns = mapping and replace(mapping, path="")
    state = f"{FORMAT} {source.content} {tokenizer.hash} {what} {taken}" + (f" {columns}" if columns else "")
    if KINDS[kind].stream and (more := opening(tokenizer)[1:]):
        state += f" opened by {more}"
    parts = source.parts(PART_BYTES, rows)
    states = [f"{state} {part.start}-{part.stop}" for part in parts] if len(parts) > 1 else [state]
    names = [entry_name(source.path, what, own) for own in states]
    missing = [part for part, name in zip(parts, names) if not find_entry(source.cache, name)]

    def build(part: range, folder: Path) -> dict:
        if isinstance(source, TextFile):
            reader = Reader("plain")
        else:
            reader = find_reader(source, kind, mapping)
            if not reader.layout:  # the index was made by a stage that reads another kind
                check(source)
        if part in missing[:1]:  # others that wait for it do not say it again
            _check_space(source, tokenizer, reader, missing)
        called = f"{parts.index(part) + 1}-of-{len(parts)}" if len(parts) > 1 else ""
        in_part = 1 if plain else len(part)
        with RowErrors(source.path, source.cache, in_part, on_bad_row, max_bad_rows, called) as errors:
            facts = _Builder(folder, source, part, called, tokenizer, reader).build(in_part, num_workers, errors)
        refuse_changes(source.path, source.before)  # else other text would be kept as that of this content
        _check_empty(source.path, facts, max_empty_rows)
        return facts

    caches = []
    for part, name in zip(parts, names):
        folder, facts = get_or_build(source.cache, name, partial(build, part))
        if facts["bad"] and on_bad_row != "skip":  # the cache was made under "skip"
            raise UserError(f"{facts['first_bad'][0]} (--on_bad_row skip leaves such rows out)")
        most = allowed(facts["rows"], max_bad_rows)
        if facts["bad"] > most:  # likewise, with other limits
            raise too_many_bad(facts["first_bad"], most, max_bad_rows)
        _check_empty(source.path, facts, max_empty_rows)
        caches.append(TokenCache(source.path, folder, facts))
    return caches


def _check_space(source: Jsonl | TextFile, tokenizer: Tokenizer, reader: Reader, parts: list[range]) -> None:
    """Before much is tokenised: says how much space the tokens will need. UserError if there is less. The ratio of
    tokens to text is that of a sample of rows."""
    size = sum(map(source.bytes_of, parts))
    if size < ESTIMATED_FROM:
        return
    read = written = 0
    for chunk in source.samples(SAMPLES, SAMPLED_BYTES):
        block = encode(chunk, tokenizer, reader)
        written += block.tokens.nbytes + 16 * len(block.lengths)  # an offset and a line number of each entry
        written += sum(column.nbytes for column in block.columns.values())
        read += sum(map(len, chunk.rows))
    need = 1.05 * size * written / read
    free = require_space(source.cache, need, f"{source.path}: the tokens of {size / 1e9:,.1f} GB")
    note(
        f"tokenising {source.path}: {size / 1e9:,.1f} GB become about {need / 1e9:,.1f} GB in {source.cache} ({free}; "
        "--cache_dir names another folder)"
    )


def _check_empty(path: Path, facts: dict, share: float) -> None:
    """UserError if too many of the rows have nothing to train on, or all."""
    rows, empty = facts["rows"], facts["empty"]
    if not too_many_empty(rows, empty, facts["entries"], share):
        return
    what = "text in them" if KINDS[facts["kind"]].stream else "assistant's turn to train on"
    where = ", ".join(facts["first_empty"]) or path
    more = f" (--max_empty_rows {share:g} allows no more)" if facts["entries"] else ""
    raise UserError(f"{where}: {empty:,} of {rows:,} rows have no {what}; is this the right file?{more}")


class _Builder:
    """Writes the files of a part block after block, so that memory stays bounded.

    part    one of the source's `parts`
    called  "3-of-9"; empty: the part is the whole file
    """

    def __init__(
        self, folder: Path, source: Jsonl | TextFile, part: range, called: str, tokenizer: Tokenizer, reader: Reader
    ):
        self.folder, self.source, self.part, self.called = folder, source, part, called
        self.tokenizer, self.reader, self.kind = tokenizer, reader, KINDS[reader.kind]
        self.plain = isinstance(source, TextFile)
        self.files: dict[str, BinaryIO] = {}
        self.tokens, self.entries = 0, 0  # written so far
        self.empty, self.first_empty = 0, []  # rows without anything to train on

    def build(self, rows: int, num_workers: int | None, errors: RowErrors) -> dict:
        """-> the facts that are kept beside the files."""
        source = self.source
        size, name = source.bytes_of(self.part), f"{source.path.name} {self.called}".strip()
        chunks = source.chunks(TOKENISED_BYTES, self.part)
        with ExitStack() as stack:
            progress = stack.enter_context(closing(Progress(f"tokenising {name}", size)))
            for own in ("tokens", "offsets", "lines", *self.kind.columns):
                self.files[own] = stack.enter_context(open(self.folder / own, "wb"))
            np.zeros(1, np.int64).tofile(self.files["offsets"])
            if self.plain and not self.part.start:
                self.write(open_document(self.tokenizer))
            found = blocks(chunks, size, self.tokenizer, self.reader, num_workers)
            for chunk, block in stack.enter_context(closing(found)):
                for line, reason, raw in block.bad:
                    if self.plain:  # a document cannot do without a piece of it
                        raise UserError(f"{source.path}:{line}: {reason}")
                    errors.add(line, reason, raw)
                self.write(block)
                progress.advance(sum(map(len, chunk.rows)) + len(chunk.rows))
        return {
            "source": str(source.path.resolve()),
            "content": source.content,
            "format": FORMAT,
            "kind": self.reader.kind,
            "tokenizer": self.tokenizer.hash,
            "dtype": token_dtype(self.tokenizer).name,
            "rows": rows,
            "entries": self.entries,
            "documents": int(not self.part.start) if self.plain else self.entries,
            "tokens": self.tokens,
            "empty": self.empty,
            "first_empty": self.first_empty,
            "unread": list(self.reader.unread),
            "bad": errors.count,
            "first_bad": errors.first,
            "rejects": str(errors.target),
        }

    def write(self, block: Block) -> None:
        offsets = self.tokens + np.cumsum(block.lengths)
        arrays = {"tokens": block.tokens, "offsets": offsets, "lines": block.lines, **block.columns}
        for name, file in self.files.items():
            arrays[name].tofile(file)
        self.tokens += len(block.tokens)
        self.entries += len(block.lengths)
        self.empty += len(block.empty)
        self.first_empty = [*self.first_empty, *(f"{self.source.path}:{line}" for line in block.empty)][:3]


# ---- tokenising: the same function here and in the worker processes


def encode(chunk: Chunk, tokenizer: Tokenizer, reader: Reader) -> Block:
    """Rows as they stand in the file -> ids."""
    rows: list[tuple[int, dict]] = []
    bad: list[BadRow] = []
    for raw, line in zip(chunk.rows, chunk.lines.tolist()):
        try:
            rows.append((line, reader(raw)))
        except ValueError as error:
            bad.append((line, str(error), raw))
    block = KINDS[reader.kind].encode(rows, tokenizer)
    block.bad = bad + block.bad
    return block


# ---- in parallel


def blocks(
    chunks: Iterator[Chunk], size: int, tokenizer: Tokenizer, reader: Reader, num_workers: int | None
) -> Generator[tuple[Chunk, Block], None, None]:
    """Every chunk with its block, in order. size: bytes of all of them. Small data stays in this process, where
    `tokenizers` uses threads."""
    workers = num_workers or cores()
    if sys.platform == "win32":
        workers = min(workers, 61)  # Python cannot wait for more processes there
    if workers > 1 and size >= PROCESSES_FROM:
        yield from _blocks_from_processes(chunks, tokenizer, reader, workers)
    for chunk in chunks:  # all of them, or those that the processes have left
        yield chunk, encode(chunk, tokenizer, reader)


def _blocks_from_processes(
    chunks: Iterator[Chunk], tokenizer: Tokenizer, reader: Reader, workers: int
) -> Iterator[tuple[Chunk, Block]]:
    """As `blocks`. If the processes die, it ends early and leaves the other chunks to the caller."""
    # spawned, not forked: a fork would inherit locks held by torch's threads
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start_worker, initargs=(type(tokenizer), tokenizer.path, reader)
    )
    waiting: deque[tuple[Chunk, Future]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, Future()))  # before it is sent: once a process has died, that is an error
            waiting[-1] = chunk, pool.submit(_encode_in_worker, chunk)
            while len(waiting) > 3 * workers:
                yield waiting[0][0], waiting[0][1].result()
                waiting.popleft()
        while waiting:
            yield waiting[0][0], waiting[0][1].result()
            waiting.popleft()
    except BrokenProcessPool:
        message = "tokenising: a process died (out of memory, or as it says above), going on in this one"
        note(message)
        for chunk, _ in waiting:
            yield chunk, encode(chunk, tokenizer, reader)
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker: tuple[Tokenizer, Reader]


def _start_worker(loader: type[Tokenizer], path: str, reader: Reader) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    _worker = (loader.load(path), reader)


def _end_with_parent() -> None:
    """A worker waits for rows without end, also when the process that sends them was killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: Chunk) -> Block:
    return encode(chunk, *_worker)
