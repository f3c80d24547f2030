"""What is wrong with a data file, and what training on it would be like: read once, in bounded memory.

    examination = examine("sft.jsonl", Tokenizer.load(), max_seq_len=512, val_hashes=hashes_of("val.jsonl"))
    report = examination.report
    report.bad, report.duplicates.count, report.tokens["suggested_max_seq_len"]
    examination.fix(Path("sft.clean.jsonl"), Path("sft.jsonl.rejects.jsonl"))

Rows are read by the reader that training has, so what passes here passes there. Memory: 17 bytes a row (16 of line
index, 1 of verdict), 8 for each row of the validation file, and one chunk. Duplicates are told by 8-byte hashes of the
canonical rows, kept in temporary files (16 bytes a row) that are compared a part at a time: among a billion different
rows the chance that any two have the same hash is 3 %.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.console import Progress, UserError
from dataset.doctor.token_statistics import TokenStatistics
from dataset.read.jsonl import Chunk, Jsonl, TextFile
from dataset.read.mapping import Mapping, Reader, find_reader
from dataset.read.mix import Writer, encode
from tokenizer.text import Tokenizer

READ_BYTES = 2 << 20  # bytes of rows read at a time
HUGE = 1 << 20  # bytes of a row from which it is not tokenised here
PART = 64 << 20  # bytes of hashes compared at once
SHOWN = 5  # lines named for each finding
REASONS = 30  # different findings that are told apart
OK, BAD, EMPTY, OVERLAP, DUPLICATE = range(5)  # verdicts
WORDS = {EMPTY: "nothing to train on", OVERLAP: "stands in the validation file", DUPLICATE: "repeats an earlier row"}


@dataclass
class Finding:
    """Rows that have something in common, and what."""

    what: str = ""
    count: int = 0
    lines: list[int] = field(default_factory=list)  # the first ones

    def add(self, line: int) -> None:
        self.count += 1
        if len(self.lines) < SHOWN:
            self.lines.append(line)


@dataclass
class DataReport:
    path: str
    size: int = 0
    kind: str = ""
    layout: str = ""
    rows: int = 0
    failure: str = ""  # why the file cannot be read at all
    errors: dict[str, Finding] = field(default_factory=dict)
    notes: dict[str, Finding] = field(default_factory=dict)  # what is allowed, and seldom meant
    roles: Counter[str] = field(default_factory=Counter)
    empty: Finding = field(default_factory=Finding)
    duplicates: Finding = field(default_factory=Finding)
    overlap: Finding = field(default_factory=Finding)
    tokens: dict = field(default_factory=dict)

    @property
    def bad(self) -> int:
        return sum(finding.count for finding in self.errors.values())

    def as_dict(self) -> dict:
        found = asdict(self) | {"bad": self.bad, "roles": dict(self.roles)}
        return found | {"errors": list(found["errors"].values()), "notes": list(found["notes"].values())}


def examine(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    max_seq_len: int | None = None,
    batch_size: int | None = None,
    kind: str | None = None,
    mapping: Mapping | None = None,
    val_hashes: np.ndarray | None = None,
    sample: int = 4 << 20,
    cache_dir=None,
) -> Examination:
    """`sample` is how many bytes of rows are tokenised, drawn at random; 0: all. The length and the number of examples
    in a step are by default those of the stage that reads such rows."""
    report = DataReport(str(path))
    try:
        if Path(path).suffix.lower() == ".txt":
            source, read = TextFile(path, cache_dir=cache_dir), Reader("plain")
        else:
            source = Jsonl(path, cache_dir=cache_dir)
            read = find_reader(source, kind, mapping)
    except (ValueError, OSError) as error:
        report.failure = str(error)
        return Examination(report)
    report.size, report.kind, report.layout = source.size, read.kind, read.layout
    if read.unread:
        named(report.notes, f"columns that are not read: {', '.join(read.unread)}").add(read.line)
    if read.kind == "rated":
        what = "no stage trains on rated rows yet; scripts/prepare_data.py --to chat keeps the good ones"
        named(report.notes, what).add(read.line)
    examination = Examination(report, source, read)
    share = min(1.0, sample / source.size) if sample else 1.0
    examination.run(TokenStatistics(read.kind, tokenizer, max_seq_len, batch_size), val_hashes, share)
    return examination


class Row(NamedTuple):
    index: int
    line: int
    row: dict  # canonical
    size: int  # bytes


class Examination:
    """One pass over a file. A verdict for each row stays, for `fix`."""

    def __init__(self, report: DataReport, source: Jsonl | TextFile | None = None, read: Reader | None = None):
        self.report, self.source, self.read = report, source, read

    def run(self, statistics: TokenStatistics, val_hashes: np.ndarray | None, share: float) -> None:
        report, drawing, at = self.report, np.random.default_rng(0), 0
        self.verdicts = np.zeros(0 if self.read.kind == "plain" else len(self.source), np.uint8)
        with closing(Progress(f"reading {self.source.path.name}", self.source.size)) as progress, ExitStack() as stack:
            hashes = _Hashes(stack, self.source)
            for chunk in self.source.chunks(READ_BYTES):
                rows = self._rows(chunk, at)
                if self.read.kind != "plain":
                    own = np.array([content_hash(row.row) for row in rows], np.uint64)
                    hashes.add(own, np.array([row.index for row in rows], np.int64))
                    for n in _found_in(own, val_hashes):
                        self._judge(rows[n].index, rows[n].line, OVERLAP, report.overlap)
                drawn = drawing.random(len(rows)) < share
                drawn[:1] |= not at
                chosen = [(row.line, row.row) for row, taken in zip(rows, drawn) if taken and row.size <= HUGE]
                for line, reason, _ in statistics.add(chosen):  # what the chat template cannot say
                    named(report.errors, reason).add(line)
                at += len(chunk.rows)
                progress.advance(sum(map(len, chunk.rows)) + len(chunk.rows))
            for index in hashes.repeated():
                self._judge(index, self.source.line(index), DUPLICATE, report.duplicates)
        report.rows = 1 if self.read.kind == "plain" else at
        report.tokens = statistics.summary(exact=share == 1.0)

    def _rows(self, chunk: Chunk, at: int) -> list[Row]:
        """Those that can be read and teach something."""
        rows = []
        for index, (raw, line) in enumerate(zip(chunk.rows, chunk.lines.tolist()), start=at):
            row, reason = read_row(self.read, raw)
            if row is None:
                self._judge(index, line, BAD, named(self.report.errors, reason))
                continue
            if len(raw) > HUGE:
                named(self.report.notes, "longer than 1 MB, left out of the token counts").add(line)
            teaches = bool(row["text"].strip()) if "text" in row else self._listen(row, line)
            if teaches or self.read.kind == "plain":
                rows.append(Row(index, line, row, len(raw)))
            else:
                self._judge(index, line, EMPTY, self.report.empty)
        return rows

    def _listen(self, row: dict, line: int) -> bool:
        """Who says what. False: the assistant says nothing that could be learned."""
        messages = row.get("messages") or row["chosen"]
        roles = [message["role"] for message in messages]
        self.report.roles.update(roles)
        for what, found in (
            ("the last turn is not the assistant's and teaches nothing", roles[-1] != "assistant"),
            ("a role speaks twice in a row", any(a == b != "tool" for a, b in zip(roles, roles[1:]))),
            ("a system turn is not the first", "system" in roles[1:]),
        ):
            if found:
                named(self.report.notes, what).add(line)
        return any(m["role"] == "assistant" and (m["content"].strip() or len(m) > 2) for m in messages)

    def _judge(self, index: int, line: int, verdict: int, finding: Finding) -> None:
        if len(self.verdicts) and not self.verdicts[index]:
            self.verdicts[index] = verdict
        finding.add(line)

    def fix(self, clean: Path, rejects: Path) -> tuple[int, int]:
        """Writes the rows that are fine as they stand, and the others with their reasons; how many of each."""
        if self.source is None or self.read.kind == "plain":
            reason = self.report.failure or "it is one text"
            raise UserError(f"{self.report.path}: cannot be fixed row by row: {reason}")
        at = 0
        with Writer(clean) as good, Writer(rejects) as bad:
            for chunk in self.source.chunks(READ_BYTES):
                verdicts = self.verdicts[at : at + len(chunk.rows)].tolist()
                for raw, line, verdict in zip(chunk.rows, chunk.lines.tolist(), verdicts):
                    if verdict == OK:
                        good.write(raw)
                        continue
                    reason = WORDS.get(verdict) or read_row(self.read, raw)[1]
                    bad.write(encode({"line": line, "reason": reason, "row": raw.decode("utf-8", "replace")}).encode())
                at += len(chunk.rows)
            return good.rows, bad.rows


def read_row(read: Reader, raw: bytes) -> tuple[dict | None, str]:
    """(canonical row, "") or (None, the reason)."""
    try:
        return read(raw), ""
    except ValueError as error:
        return None, str(error)[:300]
    except Exception as error:  # a fault of ours; this row is bad all the same, and the others can be looked at
        return None, f"cannot be read: {type(error).__name__} {error}"[:300]


def named(findings: dict[str, Finding], reason: str) -> Finding:
    """The finding for this reason. Reasons that differ in a number or a quotation only are the same."""
    key = re.sub(r"\d+", "N", re.sub(r"\"[^\"]*\"|'[^']*'", "...", reason))[:60]
    if key not in findings and len(findings) >= REASONS:
        key, reason = "other", "other reasons"
    return findings.setdefault(key, Finding(reason))


# ---- the same row twice


def content_hash(row: dict) -> int:
    data = encode(row).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def hashes_of(path: str | Path, *, mapping: Mapping | None = None, cache_dir=None) -> np.ndarray:
    """The sorted hashes of a file's rows, as far as they can be read."""
    source = Jsonl(path, cache_dir=cache_dir)
    read = find_reader(source, mapping=mapping)
    parts = [
        [content_hash(row) for raw in chunk.rows if (row := read_row(read, raw)[0])]
        for chunk in source.chunks(READ_BYTES)
    ]
    return np.sort(np.concatenate([np.array(part, np.uint64) for part in parts]))


def _found_in(own: np.ndarray, known: np.ndarray | None) -> np.ndarray:
    """Which of `own` are in the sorted `known`."""
    if known is None or not len(known):
        return np.empty(0, np.int64)
    return np.flatnonzero(known[np.minimum(np.searchsorted(known, own), len(known) - 1)] == own)


class _Hashes:
    """(hash, row) in as many temporary files as it takes for each to fit into memory: equal hashes share a file."""

    PAIR = np.dtype([("hash", np.uint64), ("row", np.int64)])

    def __init__(self, stack: ExitStack, source: Jsonl | TextFile):
        count = 1 + len(source) * self.PAIR.itemsize // PART
        self.files = [stack.enter_context(tempfile.TemporaryFile(dir=source.cache)) for _ in range(min(count, 200))]

    def add(self, hashes: np.ndarray, rows: np.ndarray) -> None:
        pairs = np.empty(len(rows), self.PAIR)
        pairs["hash"], pairs["row"] = hashes, rows
        which = hashes % np.uint64(len(self.files))
        for i, file in enumerate(self.files):
            file.write(pairs[which == i].tobytes())

    def repeated(self) -> list[int]:
        """Rows whose like has come before, in order."""
        found = [np.empty(0, np.int64)]
        for file in self.files:
            file.seek(0)
            pairs = np.frombuffer(file.read(), self.PAIR)
            order = np.lexsort((pairs["row"], pairs["hash"]))
            later = pairs["hash"][order][1:] == pairs["hash"][order][:-1]
            found.append(pairs["row"][order][1:][later])
        return np.sort(np.concatenate(found)).tolist()
