"""A data file's tokens, worked out once: rows are tokenised in parallel into flat files, which are mapped afterwards.

    cache = token_cache("dataset/pretrain.jsonl", tokenizer, "text")
    cache.tokens[cache.offsets[7]:cache.offsets[8]]     # the eighth entry, uint16 (uint32 from 65,537 ids on)

An entry is a document, a conversation or a pair of answers, as dataset/tokens/encode.py makes them of a row. The key of
a cache is made of the data's content, the tokenizer's hash (which covers its chat template) and the options that choose
rows. It does not depend on --max_seq_len or --batch_size, so changing these reads the same cache.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from multiprocessing import current_process, get_context
from pathlib import Path

import numpy as np

from common.console import Progress, UserError, note
from dataset.kinds import KINDS
from dataset.read.jsonl import Chunk, Jsonl, TextFile, entry_name
from dataset.read.mapping import Mapping, Reader, find_reader
from dataset.read.row_errors import MAX_BAD_ROWS, RowErrors, allowed, too_many_bad
from dataset.tokens.cache import Mapped, get_or_build
from dataset.tokens.encode import BadRow, Block, open_document, token_dtype
from dataset.tokens.lengths import Lengths
from tokenizer.text import Tokenizer

FORMAT = 5  # part of every key: raise it when the files change, and old caches are made anew
TOKENISED_BYTES = 1 << 20  # bytes of rows that are tokenised together
PROCESSES_FROM = 32 << 20  # bytes of data from which starting processes pays
MAX_EMPTY_ROWS = 0.05  # share of rows without anything to train on; above it the data must be wrong


class TokenCache:
    """The mapped files. N ids in n entries: tokens (N,), offsets (n + 1,), lines (n,); columns as its kind has them."""

    def __init__(self, path: Path, folder: Path, facts: dict):
        self.path, self.facts, self.kind = path, facts, KINDS[facts["kind"]]
        self.tokens = Mapped(folder / "tokens", np.dtype(facts["dtype"]).type)
        self.offsets = Mapped(folder / "offsets", np.int64)
        self.lines = Mapped(folder / "lines", np.int64)
        self.columns = {name: Mapped(folder / name, dtype) for name, dtype in self.kind.columns.items()}

    def __len__(self) -> int:
        return len(self.lines.array)

    def lengths(self) -> Lengths:
        """Of every entry, int32."""
        ids = np.diff(self.offsets.array).astype(np.int32)
        return self.kind.lengths(ids, {name: column.array for name, column in self.columns.items()})


def token_cache(
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
) -> TokenCache:
    """The cache of one file, made now if it is not there.

    kind         a key of KINDS: what the rows must be
    num_workers  processes that tokenise (None: one for each core)
    on_bad_row   "error", or "skip": see RowErrors
    max_bad_rows, max_empty_rows  shares of the rows that may be skipped, and that may have nothing to train on
    limit        use only the first rows (0: all)
    """
    if getattr(current_process(), "_inheriting", False):  # one of our workers, which runs its parent's script again
        raise RuntimeError("this script runs when it is imported; put its code under `if __name__ == '__main__':`")
    if Path(path).suffix.lower() == ".txt":
        if kind != "text":
            raise UserError(f"{path}: plain text is for pretraining; this stage needs JSONL with conversations")
        source, kind = TextFile(path, cache_dir=cache_dir), "plain"
    else:
        source = Jsonl(path, cache_dir=cache_dir)
    rows, limit = (limit, limit) if 0 < limit < len(source) else (len(source), 0)
    columns = mapping and replace(mapping, path="")
    state = f"{FORMAT} {source.content} {tokenizer.hash} {kind} {limit}" + (f" {columns}" if columns else "")

    def build(folder: Path) -> dict:
        reader = Reader(kind) if isinstance(source, TextFile) else find_reader(source, kind, mapping)
        with RowErrors(source.path, source.cache, rows, on_bad_row, max_bad_rows) as errors:
            facts = _Builder(folder, source, tokenizer, reader).build(rows, num_workers, errors)
        _check_empty(source.path, facts, max_empty_rows)
        return facts

    folder, facts = get_or_build(source.cache, entry_name(source.path, kind, state), build)
    if facts["bad"] and on_bad_row != "skip":  # the cache was made under "skip"
        raise UserError(f"{facts['first_bad'][0]} (--on_bad_row skip leaves such rows out)")
    if facts["bad"] > allowed(rows, max_bad_rows):  # likewise, with other limits
        raise too_many_bad(facts["first_bad"], allowed(rows, max_bad_rows), max_bad_rows)
    _check_empty(source.path, facts, max_empty_rows)
    return TokenCache(source.path, folder, facts)


def _check_empty(path: Path, facts: dict, share: float) -> None:
    """UserError if too many of the rows have nothing to train on, or all."""
    rows, empty = facts["rows"], facts["empty"]
    if facts["entries"] and empty <= allowed(rows, share):
        return
    what = "text in them" if KINDS[facts["kind"]].stream else "assistant's turn to train on"
    where = ", ".join(facts["first_empty"]) or path
    more = f" (--max_empty_rows {share:g} allows no more)" if facts["entries"] else ""
    raise UserError(f"{where}: {empty:,} of {rows:,} rows have no {what}; is this the right file?{more}")


class _Builder:
    """Writes the files block after block, so that memory stays bounded."""

    def __init__(self, folder: Path, source: Jsonl | TextFile, tokenizer: Tokenizer, reader: Reader):
        self.source, self.tokenizer, self.reader, self.kind = source, tokenizer, reader, KINDS[reader.kind]
        self.plain = isinstance(source, TextFile)
        self.files = {name: open(folder / name, "wb") for name in ("tokens", "offsets", "lines", *self.kind.columns)}
        self.tokens, self.entries = 0, 0  # written so far
        self.empty, self.first_empty = 0, []  # rows without anything to train on
        np.zeros(1, np.int64).tofile(self.files["offsets"])

    def build(self, rows: int, num_workers: int | None, errors: RowErrors) -> dict:
        """-> the facts that are kept beside the files."""
        progress = Progress(f"tokenising {self.source.path.name}", self.source.size)
        try:
            if self.plain:
                self.write(open_document(self.tokenizer))
            with closing(blocks(self.source, self.tokenizer, self.reader, rows, num_workers)) as found:
                for chunk, block in found:
                    for line, reason, raw in block.bad:
                        if self.plain:  # a document cannot do without a piece of it
                            raise UserError(f"{self.source.path}:{line}: {reason}")
                        errors.add(line, reason, raw)
                    self.write(block)
                    progress.advance(sum(map(len, chunk.rows)) + len(chunk.rows))
        finally:
            progress.close()
            for file in self.files.values():
                file.close()
        return {
            "source": str(self.source.path.resolve()),
            "content": self.source.content,
            "kind": self.reader.kind,
            "tokenizer": self.tokenizer.hash,
            "dtype": token_dtype(self.tokenizer).name,
            "rows": rows,
            "entries": self.entries,
            "documents": 1 if self.plain else self.entries,
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
    source: Jsonl | TextFile, tokenizer: Tokenizer, reader: Reader, rows: int, num_workers: int | None
) -> Generator[tuple[Chunk, Block], None, None]:
    """Every chunk with its block, in order. Small data stays in this process, where `tokenizers` uses threads."""
    chunks = source.chunks(TOKENISED_BYTES, rows)
    workers = num_workers or cores()
    if workers > 1 and source.size >= PROCESSES_FROM:
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
            waiting.append((chunk, pool.submit(_encode_in_worker, chunk)))
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
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    _worker = (loader.load(path), reader)


def _encode_in_worker(chunk: Chunk) -> Block:
    return encode(chunk, *_worker)
