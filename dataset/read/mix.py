"""Files in any layout -> one file in our layout: joined, mixed in a ratio, with a part held out for validation.

    report = prepare(["alpaca.json"], ["identity.jsonl"], target="merged.jsonl", ratio=3, val_fraction=0.01)
    print(report.task, report.identity, report.written, report.held_out)

Rows keep their order; training shuffles. A hash of a row's bytes decides whether it is held out, so that equal rows are
all held out or none. Memory: 8 bytes a row for these hashes, and the identity rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.console import UserError
from common.files import atomic_file
from common.values import MOST_TIMES
from dataset.kinds import KINDS
from dataset.read.jsonl import Jsonl
from dataset.read.mapping import Mapping, Reader, find_reader
from dataset.read.row_errors import MAX_BAD_ROWS, RowErrors

READ_BYTES = 4 << 20  # bytes of rows read at a time
encode = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode  # objects read from JSON have no circles


@dataclass
class MergeReport:
    """How many rows were read, and what was done with them."""

    kind: str
    layouts: dict[str, str]  # file -> its layout
    task: int = 0
    identity: int = 0  # distinct ones
    written: int = 0
    repeated: int = 0  # rows written for the identity ones
    held_out: int = 0
    left_out: int = 0  # answers labelled bad, when conversations are written
    bad: int = 0  # broken rows that were skipped

    @property
    def ratio(self) -> float:
        """Task rows for each identity row, as written."""
        return (self.written - self.repeated) / max(self.repeated, 1)


def to_ours(row: dict) -> dict:
    """A canonical row -> the row as it is written to a file; reading it gives the same canonical row."""
    return {"conversations" if key == "messages" else key: value for key, value in row.items()}


def prepare(
    task: list[str],
    identity: list[str],
    *,
    target: Path,
    val_target: Path | None = None,
    ratio: float = 0,
    val_fraction: float = 0.0,
    data_limit: int = 0,
    to: str | None = None,
    mapping: Mapping | None = None,
    on_bad_row: str = "error",
    max_bad_rows: float = MAX_BAD_ROWS,
    seed: int = 42,
    cache_dir: str | None = None,
) -> MergeReport:
    """Writes `target`, and `val_target` if `val_fraction` is not 0.

    task, identity  files to read: the data, and rows about who the assistant is
    ratio           R repeats the identity rows until there are R task rows for each; 0: each once, never fewer
    data_limit      read so many task rows, of all files together; 0: all
    to              "chat" makes conversations of preferences, with their better answer; None: the kind that was read
    on_bad_row      "error" or "skip", of each file up to the share max_bad_rows: see RowErrors
    """
    files, extra = (
        [_File(path, to, mapping, on_bad_row, max_bad_rows, cache_dir) for path in paths] for paths in (task, identity)
    )
    if not files:
        raise UserError("--data_path: no file given")
    if 0 < ratio < 1 / MOST_TIMES:
        raise UserError(
            f"--ratio {ratio:g}: more than {MOST_TIMES:,} identity rows for each task row; give {1 / MOST_TIMES:g} or "
            "more, or 0 to repeat none"
        )
    kinds = {file.rows.path: file.to for file in files + extra}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{path} holds {kind}" for path, kind in kinds.items())
        raise UserError(f"files of different kinds cannot be joined: {found}")
    read = {file.rows.path.resolve() for file in files + extra}
    for path in (target, val_target if val_fraction else None):
        if path and path.resolve() in read:
            raise UserError(f"{path}: would overwrite a file that is being read; choose another --save_path")
    report = MergeReport(files[0].to, {str(file.rows.path): file.read.layout for file in files + extra})
    left = data_limit or sum(len(file.rows) for file in files)
    for file in files:
        file.limit = min(left, len(file.rows))
        left -= file.limit
    with ExitStack() as stack:
        train = stack.enter_context(Writer(target))
        val = stack.enter_context(Writer(val_target)) if val_target and val_fraction else None
        held_out = _held_out(files + extra, val_fraction, seed)
        for line, side in _lines(files, report, held_out):
            report.task += 1
            (val if val and side else train).write(line)
        task_rows, kept = train.rows, []
        for line, side in _lines(extra, report, held_out):
            report.identity += 1
            val.write(line) if val and side else kept.append(line)
        wanted = max(len(kept), round(task_rows / ratio)) if ratio else len(kept)
        for i in range(wanted if kept else 0):
            train.write(kept[i % len(kept)])
        report.written, report.repeated, report.held_out = train.rows, train.rows - task_rows, val.rows if val else 0
        if not train.rows:
            raise UserError(f"{files[0].rows.path}: no row is left to write")
    return report


class _File:
    """One file to read: its rows, its reader, and the kind of row to make of them."""

    def __init__(
        self,
        path: str,
        to: str | None,
        mapping: Mapping | None,
        on_bad_row: str,
        max_bad_rows: float,
        cache_dir: str | None,
    ):
        if Path(path).suffix.lower() == ".txt":
            raise UserError(f"{path}: plain text needs no preparing; give it to train_pretrain.py as it is")
        self.rows = Jsonl(path, cache_dir=cache_dir, check=lambda head: find_reader(head, mapping=mapping))
        self.read: Reader = find_reader(self.rows, mapping=mapping)
        self.to = to or self.read.kind
        if self.to != self.read.kind and (self.to, self.read.kind) not in (("chat", "preference"), ("chat", "rated")):
            raise UserError(f"{self.rows.where(0)}: {self.read.kind} rows ({self.read.layout}) cannot become {to}")
        self.on_bad_row, self.max_bad_rows, self.limit = on_bad_row, max_bad_rows, len(self.rows)

    def canonical(self, report: MergeReport) -> Iterator[tuple[bytes, dict | None]]:
        """(bytes as read, row of the wanted kind); None instead of a row that is left out."""
        with RowErrors(self.rows.path, self.rows.cache, len(self.rows), self.on_bad_row, self.max_bad_rows) as errors:
            for chunk in self.rows.chunks(READ_BYTES, range(self.limit)):
                for raw, line in zip(chunk.rows, chunk.lines.tolist()):
                    try:
                        row = self.read(raw)
                        row = row if self.to == self.read.kind else _better_answer(row)
                    except ValueError as error:
                        errors.add(line, str(error), raw)
                        report.bad += 1
                        continue
                    yield raw, row


def _better_answer(row: dict) -> dict | None:
    """A preference or rated row -> a conversation; None if its only answer is labelled bad. UserError if it is one that
    training would refuse."""
    if row.get("label") is False:
        return None
    found = {"messages": row.get("chosen") or row["messages"], "tools": row.get("tools")}
    found = {key: value for key, value in found.items() if value}
    KINDS["chat"].check(found)  # it asks for more than the other kinds do
    return found


def _lines(files: list[_File], report: MergeReport, held_out) -> Iterator[tuple[bytes, bool]]:
    """(line to write, whether it is held out)"""
    for file in files:
        for raw, row in file.canonical(report):
            if row is None:
                report.left_out += 1
            else:
                yield encode(to_ours(row)).encode(), held_out(raw)


class Writer:
    """Writes lines to a file that has its name only once it is complete, and counts them."""

    def __init__(self, path: Path):
        self.path, self.rows = path, 0

    def __enter__(self) -> Writer:
        self.stack = ExitStack()
        temporary = self.stack.enter_context(atomic_file(self.path))
        self.file = self.stack.enter_context(open(temporary, "wb", buffering=1 << 20))
        return self

    def write(self, line: bytes) -> None:
        self.file.write(line + b"\n")
        self.rows += 1

    def __exit__(self, *failure) -> None:
        self.stack.__exit__(*failure)


def line_hash(raw: bytes, seed: int = 0) -> int:
    """64 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def shared_lines(path: Path, other: Path) -> int:
    """How many lines of `path` are in `other` too, blank ones left aside. Memory: a number for each line of `other`."""
    with open(path, "rb") as lines, open(other, "rb") as theirs:
        known = {line_hash(line.strip()) for line in theirs if line.strip()}
        return sum(line_hash(line.strip()) in known for line in lines if line.strip())


def _held_out(files: list[_File], fraction: float, seed: int):
    """A function: bytes of a row -> whether it is held out. Rows with the smallest hashes are, in whatever order."""
    if not fraction:
        return lambda raw: False
    hashes = np.fromiter(
        (
            line_hash(raw, seed)
            for file in files
            for chunk in file.rows.chunks(READ_BYTES, range(file.limit))
            for raw in chunk.rows
        ),
        np.uint64,
    )
    count = max(1, round(fraction * len(hashes)))
    if count >= len(np.unique(hashes)):
        raise UserError(f"--val_fraction {fraction}: {len(hashes)} rows are too few to split")
    bound = int(np.partition(hashes, count - 1)[count - 1])
    return lambda raw: line_hash(raw, seed) <= bound
