"""A data file's tokens, worked out once: rows are tokenised in parallel into flat files that are mapped ever after.

    cache = token_cache("dataset/pretrain.jsonl", tokenizer, "text")
    cache.tokens[cache.offsets[7]:cache.offsets[8]]     # the eighth entry, uint16 (uint32 from 65,537 ids on)

An entry is a document with <|endoftext|> in front ("text"), a conversation with the mask of its trained tokens
("chat"), or a prompt and its two answers, one after the other, with that mask ("preference"). The key is made of the
data's content, the tokenizer's hash (which covers its chat template) and the options; nothing about rows or batches
goes in, so another --max_seq_len or --batch_size reads the same cache. A text longer than PIECE is tokenised in pieces
cut at line ends, which bounds memory; a plain .txt file is one document.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from multiprocessing import current_process, get_context
from pathlib import Path

import numpy as np

from common.console import Progress, UserError
from dataset.read.jsonl import Chunk, Jsonl, RowErrors, TextFile, entry_name
from dataset.read.mapping import Mapping, Reader, find_reader
from dataset.read.pairs import encode_pairs
from dataset.tokens.cache import Mapped, get_or_build
from tokenizer.chat import encode_chat, encode_chats
from tokenizer.text import Tokenizer

FORMAT = 4
TOKENISED_BYTES = 1 << 20  # bytes of rows that are tokenised together
PIECE = 1 << 18  # characters of one text that are tokenised together
PROCESSES_FROM = 32 << 20  # bytes of data from which starting processes pays
# what is kept of each kind beside tokens, offsets and lines: file -> type
COLUMNS = {
    "text": {},
    "plain": {},
    "chat": {"trained": np.uint8, "counts": np.int32, "answers": np.int32},
    "preference": {"trained": np.uint8, "prompts": np.int32, "chosen": np.int32},
}
EMPTY_ALLOWED = 0.05  # share of rows without anything to train on from which something must be wrong with the data


@dataclass
class Block:
    """A chunk's entries, tokenised. The second group is for conversations and preferences."""

    tokens: np.ndarray
    lengths: np.ndarray  # int64, of each entry
    lines: np.ndarray  # int64, of each entry
    empty: list[int]  # lines without anything to train on
    bad: list[tuple[int, str, bytes]]  # line, reason, row

    trained: np.ndarray | None = None  # uint8, of each token: is it trained on?
    counts: np.ndarray | None = None  # int32, trained tokens of each entry
    answers: np.ndarray | None = None  # int32, where each entry's last trained run starts
    prompts: np.ndarray | None = None  # int32, ids of each prompt
    chosen: np.ndarray | None = None  # int32, ids of each chosen answer; the rejected one is the rest


class TokenCache:
    """The mapped files. offsets has one more element than there are entries."""

    def __init__(self, path: Path, folder: Path, facts: dict):
        self.path, self.facts = path, facts
        self.tokens = Mapped(folder / "tokens", np.dtype(facts["dtype"]).type)
        self.offsets = Mapped(folder / "offsets", np.int64)
        self.lines = Mapped(folder / "lines", np.int64)
        for name, dtype in COLUMNS[facts["kind"]].items():
            setattr(self, name, Mapped(folder / name, dtype))

    def __len__(self) -> int:
        return len(self.lines.array)


def token_cache(
    path: str | Path,
    tokenizer: Tokenizer,
    kind: str,
    *,
    cache_dir: str | Path | None = None,
    num_workers: int | None = None,
    on_bad_row: str = "error",
    limit: int = 0,
    mapping: Mapping | None = None,
) -> TokenCache:
    """The cache of one file (its first `limit` rows, 0 = all), made now if it is not there. kind: a key of COLUMNS."""
    if getattr(current_process(), "_inheriting", False):  # one of our workers, made to run its parent's script
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
        reader = Reader(kind) if kind == "plain" else find_reader(source, kind, mapping)
        with RowErrors(source.path, source.cache, rows, on_bad_row) as errors:
            return _Builder(folder, source, tokenizer, reader).build(rows, num_workers, errors)

    folder, facts = get_or_build(source.cache, entry_name(source.path, kind, state), build)
    if facts["bad"] and on_bad_row != "skip":  # it was made under `skip`
        raise UserError(f"{facts['first_bad'][0]} (--on_bad_row skip leaves such rows out)")
    return TokenCache(source.path, folder, facts)


class _Builder:
    """Writes the flat files as the blocks come, in order, so that memory stays bounded."""

    def __init__(self, folder: Path, source: Jsonl | TextFile, tokenizer: Tokenizer, reader: Reader):
        self.source, self.tokenizer, self.reader, self.kind = source, tokenizer, reader, reader.kind
        names = ("tokens", "lines", *COLUMNS[self.kind])
        self.files = {name: open(folder / name, "wb") for name in names}
        self.offsets = open(folder / "offsets", "wb")
        self.total, self.entries, self.empty, self.first_empty = 0, 0, 0, []
        np.zeros(1, np.int64).tofile(self.offsets)

    def build(self, rows: int, num_workers: int | None, errors: RowErrors) -> dict:
        progress = Progress(f"tokenising {self.source.path.name}", self.source.size)
        try:
            if self.kind == "plain":
                self.write(open_document(self.tokenizer))
            with closing(blocks(self.source, self.tokenizer, self.reader, rows, num_workers)) as found:
                for chunk, block in found:
                    for line, reason, raw in block.bad:
                        if self.kind == "plain":  # half a document is none
                            raise UserError(f"{self.source.path}:{line}: {reason}")
                        errors.add(line, reason, raw)
                    self.write(block)
                    progress.advance(sum(map(len, chunk.rows)) + len(chunk.rows))
        finally:
            progress.close()
            for file in (*self.files.values(), self.offsets):
                file.close()
        self.refuse_empty(rows)
        documents = 1 if self.kind == "plain" else self.entries
        return {
            "source": str(self.source.path.resolve()),
            "content": self.source.content,
            "kind": self.kind,
            "tokenizer": self.tokenizer.hash,
            "dtype": token_dtype(self.tokenizer).name,
            "rows": rows,
            "entries": self.entries,
            "documents": documents,
            "tokens": self.total,
            "empty": self.empty,
            "first_empty": self.first_empty,
            "unread": list(self.reader.unread),
            "bad": errors.count,
            "first_bad": errors.first,
            "rejects": str(errors.target),
        }

    def write(self, block: Block) -> None:
        self.empty += len(block.empty)
        self.first_empty = [*self.first_empty, *(f"{self.source.path}:{line}" for line in block.empty)][:3]
        for name, file in self.files.items():
            getattr(block, name).tofile(file)
        (self.total + np.cumsum(block.lengths)).tofile(self.offsets)
        self.total += len(block.tokens)
        self.entries += len(block.lengths)

    def refuse_empty(self, rows: int) -> None:
        if self.entries and self.empty <= max(1, EMPTY_ALLOWED * rows):
            return
        what = "text in them" if self.kind in ("text", "plain") else "assistant's turn to train on"
        where = ", ".join(self.first_empty) or self.source.path
        raise UserError(f"{where}: {self.empty:,} of {rows:,} rows have no {what}; is this the right file?")


# ---- tokenising: the same function here and in the worker processes


def encode(chunk: Chunk, tokenizer: Tokenizer, reader: Reader) -> Block:
    rows, bad = [], []  # (line, canonical row), (line, reason, row)
    for raw, line in zip(chunk.rows, chunk.lines.tolist()):
        try:
            rows.append((line, reader(raw)))
        except ValueError as error:
            bad.append((line, str(error), raw))
    if reader.kind == "chat":
        return encode_conversations(rows, bad, tokenizer)
    if reader.kind == "preference":
        return encode_preferences(rows, bad, tokenizer)
    return encode_texts(rows, bad, tokenizer, opens=reader.kind == "text")


def encode_texts(rows: list[tuple[int, dict]], bad: list, tokenizer: Tokenizer, opens: bool) -> Block:
    """Each text's ids; `opens`: <|endoftext|> in front of each."""
    rows = [(line, row["text"]) for line, row in rows]
    empty = [line for line, text in rows if not text.strip()] if opens else []
    rows = [(line, text) for line, text in rows if text.strip()] if opens else rows
    cut = [pieces(text) for _, text in rows]
    found = iter(tokenizer.encode_batch([piece for text in cut for piece in text]))
    ids = [[tokenizer.end_of_text] if opens else [] for _ in rows]
    for own, text in zip(ids, cut):
        for _ in text:
            own += next(found)
    return Block(_flat(ids, tokenizer), _lengths(ids), _lines(rows), empty, bad)


def open_document(tokenizer: Tokenizer) -> Block:
    """What a plain file begins with; the pieces of it that follow open nothing."""
    return Block(_flat([[tokenizer.end_of_text]], tokenizer), np.array([1]), np.array([1]), [], [])


def pieces(text: str) -> list[str]:
    """The text in parts of at most PIECE characters, cut at line ends if there are any."""
    parts = []
    while len(text) > PIECE:
        cut = text.rfind("\n", 0, PIECE) + 1 or PIECE
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]


def encode_conversations(rows: list[tuple[int, dict]], bad: list, tokenizer: Tokenizer) -> Block:
    """Each conversation's ids up to the last one that is trained on: what follows can teach nothing."""
    try:
        found = encode_chats(tokenizer, [(row["messages"], row.get("tools")) for _, row in rows])
    except ValueError:
        found = []
        for line, row in rows:
            try:
                found.append(encode_chat(tokenizer, row["messages"], row.get("tools")))
            except ValueError as error:
                found.append(None)
                bad.append((line, str(error), json.dumps(row, ensure_ascii=False).encode()))
    empty, kept, ids, masks, answers = [], [], [], [], []
    for row, encoded in zip(rows, found):
        if encoded is None:
            continue
        mask = np.array(encoded.trained, np.uint8)
        # of x1 x2 x3 the first is never predicted
        last = len(mask) - int(mask[::-1].argmax()) if mask[1:].any() else 0
        if not last:
            empty.append(row[0])
            continue
        untrained = np.flatnonzero(mask[:last] == 0)
        answers.append(int(untrained[-1]) + 1 if len(untrained) else 0)
        kept.append(row)
        ids.append(encoded.ids[:last])
        masks.append(mask[:last])
    counts = np.array([mask[1:].sum() for mask in masks], np.int32)
    trained = np.concatenate(masks) if masks else np.empty(0, np.uint8)
    block = Block(_flat(ids, tokenizer), _lengths(ids), _lines(kept), empty, bad)
    return replace(block, trained=trained, counts=counts, answers=np.array(answers, np.int32))


def encode_preferences(rows: list[tuple[int, dict]], bad: list, tokenizer: Tokenizer) -> Block:
    """Each pair's prompt, chosen and rejected answer, one after the other."""
    kept, pairs = [], []
    for row, pair in zip(rows, encode_pairs(tokenizer, [preference for _, preference in rows])):
        if isinstance(pair, str):
            bad.append((row[0], pair, json.dumps(row[1], ensure_ascii=False).encode()))
            continue
        kept.append(row)
        pairs.append(pair)
    ids = [pair.ids for pair in pairs]
    block = Block(_flat(ids, tokenizer), _lengths(ids), _lines(kept), [], bad)
    trained = np.fromiter(chain.from_iterable(pair.trained for pair in pairs), np.uint8, len(block.tokens))
    sizes = np.array([(pair.prompt, pair.chosen) for pair in pairs], np.int32).reshape(-1, 2)
    return replace(block, trained=trained, prompts=sizes[:, 0].copy(), chosen=sizes[:, 1].copy())


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def _flat(ids: list[list[int]], tokenizer: Tokenizer) -> np.ndarray:
    return np.fromiter(chain.from_iterable(ids), token_dtype(tokenizer), sum(map(len, ids)))


def _lengths(ids: list[list[int]]) -> np.ndarray:
    return np.array([len(own) for own in ids], np.int64)


def _lines(rows: list[tuple[int, object]]) -> np.ndarray:
    return np.array([line for line, _ in rows], np.int64)


# ---- in parallel


def blocks(
    source: Jsonl | TextFile, tokenizer: Tokenizer, reader: Reader, rows: int, num_workers: int | None
) -> Iterator[tuple[Chunk, Block]]:
    """Every chunk with its block, in order. Small data stays in this process: `tokenizers` has threads of its own."""
    chunks = source.chunks(TOKENISED_BYTES, rows)
    workers = num_workers or cores()
    if workers > 1 and source.size >= PROCESSES_FROM:
        yield from _blocks_from_processes(chunks, tokenizer, reader, workers)
    for chunk in chunks:  # all of them, or what is left
        yield chunk, encode(chunk, tokenizer, reader)


def _blocks_from_processes(chunks: Iterator[Chunk], tokenizer: Tokenizer, reader: Reader, workers: int):
    """Ends before the last chunk if the processes die, and leaves the rest to the caller."""
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
        print(message, file=sys.stderr, flush=True)
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
