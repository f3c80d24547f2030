"""What is wrong with a data file, and what training on it would be like: read once, in bounded memory.

    examination = examine("sft.jsonl", Tokenizer.load(), max_seq_len=512, val_hashes=hashes_of("val.jsonl"))
    report = examination.report
    report.bad, report.duplicates.count, report.tokens["suggested_max_seq_len"]
    examination.fix(Path("sft.clean.jsonl"), Path("sft.jsonl.rejects.jsonl"))

Rows are read by the reader that training uses, so a row that passes here passes there; what only the chat format
refuses is found among the rows that are tokenised. Memory: 17 bytes a row (16 of
line index, 1 of verdict), 8 for each row of the validation file, and one chunk.
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.console import Progress, UserError, explain
from dataset.doctor.duplicates import READ_BYTES, RowHashes, content_hash, found_in
from dataset.doctor.token_statistics import TokenStatistics
from dataset.kinds import KINDS
from dataset.read.jsonl import Chunk, Jsonl
from dataset.read.mapping import Mapping, Reader, find_reader
from dataset.read.mix import Writer, encode
from dataset.read.row_errors import too_many_empty
from dataset.read.text import TextFile
from tokenizer.text import Tokenizer

HUGE = 1 << 20  # bytes of a row from which it is not tokenised here
SHOWN = 5  # lines named for each finding
REASONS = 30  # different reasons that are told apart
OK, BAD, EMPTY, OVERLAP, DUPLICATE = range(5)  # verdicts
WORDS = {EMPTY: "nothing to train on", OVERLAP: "stands in the validation file", DUPLICATE: "repeats an earlier row"}


@dataclass
class Finding:
    """Rows that have something in common, and what."""

    what: str = ""
    count: int = 0  # 0: it is about the file
    lines: list[int] = field(default_factory=list)  # the first ones

    def add(self, line: int) -> None:
        self.count += 1
        if len(self.lines) < SHOWN:
            self.lines.append(line)


class Findings(dict[str, Finding]):
    """One finding for each reason. Reasons that differ in a number or a quotation only are the same."""

    def add(self, reason: str, line: int | None = None) -> None:
        """line: of the row; None: the reason is about the file."""
        key = re.sub(r"\d+", "N", re.sub(r"\"[^\"]*\"|'[^']*'", "...", reason))[:60]
        if key not in self and len(self) >= REASONS:
            key, reason = "other", "other reasons"
        finding = self.setdefault(key, Finding(reason))
        if line is not None:
            finding.add(line)


@dataclass
class DataReport:
    path: str
    size: int = 0  # bytes
    kind: str = ""  # of its rows, a key of KINDS
    layout: str = ""
    rows: int = 0
    failure: str = ""  # why the file cannot be read at all; then nothing else is known
    errors: Findings = field(default_factory=Findings)  # what training would stop at
    notes: Findings = field(default_factory=Findings)  # what is allowed, and seldom meant
    roles: Counter[str] = field(default_factory=Counter)
    empty: Finding = field(default_factory=Finding)  # rows with nothing to train on
    duplicates: Finding = field(default_factory=Finding)  # rows that repeat an earlier one
    overlap: Finding = field(default_factory=Finding)  # rows that are in the validation files too
    untried: int = 0  # good rows that were not tokenised, where it shows what the tokenizer's chat format refuses
    tokens: dict = field(default_factory=dict)  # TokenStatistics.summary

    @property
    def bad(self) -> int:
        return sum(finding.count for finding in self.errors.values())

    @property
    def too_empty(self) -> bool:
        left = self.rows - self.bad - self.empty.count
        return self.empty.count > 0 and too_many_empty(self.rows, self.empty.count, left)

    @property
    def stops(self) -> bool:
        """Whether training would stop."""
        return bool(self.failure or self.bad or self.too_empty)

    def as_dict(self) -> dict:
        lists = {name: [asdict(finding) for finding in getattr(self, name).values()] for name in ("errors", "notes")}
        return asdict(self) | {"bad": self.bad, "stops": self.stops, "roles": dict(self.roles)} | lists


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
    cache_dir: str | Path | None = None,
) -> Examination:
    """Reads the whole file once.

    max_seq_len, batch_size  for the counts of cuts and rows (None: those of the stage that trains on such rows)
    kind                     what the rows must be (None: what the first row is)
    val_hashes               `hashes_of` the validation files
    sample                   bytes of rows that are tokenised, drawn at random (0: all)
    """
    report = DataReport(str(path))
    try:
        if Path(path).suffix.lower() == ".txt":
            source, read = TextFile(path, cache_dir=cache_dir), Reader("plain")
        else:
            source = Jsonl(path, cache_dir=cache_dir, check=lambda head: find_reader(head, kind, mapping))
            read = find_reader(source, kind, mapping)
    except (ValueError, OSError) as error:
        report.failure = explain(error)
        return Examination(report)
    report.size, report.kind, report.layout = source.size, read.kind, read.layout
    if read.unread:
        report.notes.add(f"columns that are not read: {', '.join(read.unread)}")
    if not KINDS[read.kind].trained:
        what = f"no stage trains on {read.kind} rows yet; scripts/prepare_data.py --to chat keeps the good ones"
        report.notes.add(what)
    examination = Examination(report)
    statistics = TokenStatistics(read.kind, tokenizer, max_seq_len, batch_size)
    examination.run(source, read, statistics, val_hashes, share=min(1.0, sample / source.size) if sample else 1.0)
    return examination


class Row(NamedTuple):
    index: int
    line: int
    row: dict  # canonical
    size: int  # bytes


class Examination:
    """One pass over a file. It keeps a verdict for each row, for `fix`."""

    source: Jsonl | None = None  # the file, where it has rows that can be fixed
    read: Reader
    verdicts: np.ndarray  # (rows,) uint8

    def __init__(self, report: DataReport):
        self.report = report
        self.refused: dict[int, str] = {}  # rows that are fine but for the tokenizer's chat template -> why

    def run(
        self,
        source: Jsonl | TextFile,
        read: Reader,
        statistics: TokenStatistics,
        val_hashes: np.ndarray | None,
        share: float,
    ) -> None:
        report, drawing, at = self.report, np.random.default_rng(0), 0
        self.read = read
        if isinstance(source, Jsonl):
            self.source, self.verdicts = source, np.zeros(len(source), np.uint8)
        with closing(Progress(f"reading {source.path.name}", source.size)) as progress, ExitStack() as stack:
            hashes = RowHashes(stack, len(source), source.cache)
            for chunk in source.chunks(READ_BYTES):
                rows = self._rows(chunk, at)
                if self.source:
                    own = np.array([content_hash(row.row) for row in rows], np.uint64)
                    hashes.add(own, [row.index for row in rows])
                    for n in found_in(own, val_hashes):
                        self._judge(rows[n].index, rows[n].line, OVERLAP, report.overlap)
                drawn = drawing.random(len(rows)) < share
                drawn[:1] |= not at  # the first row always
                sample = {row.index: row for row, taken in zip(rows, drawn) if taken and row.size <= HUGE}
                for index, reason, _ in statistics.add([(index, row.row) for index, row in sample.items()]):
                    report.errors.add(reason, sample[index].line)  # refused by the chat template
                    self._judge(index, sample[index].line, BAD)
                    self.refused[index] = reason
                report.untried += len(rows) - len(sample)
                at += len(chunk.rows)
                progress.advance(sum(map(len, chunk.rows)) + len(chunk.rows))
            if self.source:
                for index in hashes.repeated():
                    self._judge(index, self.source.line(index), DUPLICATE, report.duplicates)
        report.rows = at if self.source else 1
        report.tokens = statistics.summary(exact=share == 1.0)

    def _rows(self, chunk: Chunk, at: int) -> list[Row]:
        """The rows that can be read and have something to train on."""
        rows = []
        for index, (raw, line) in enumerate(zip(chunk.rows, chunk.lines.tolist()), start=at):
            row, reason = read_row(self.read, raw)
            if row is None:
                self.report.errors.add(reason, line)
                self._judge(index, line, BAD)
                continue
            if len(raw) > HUGE:
                self.report.notes.add("longer than 1 MB, left out of the token counts", line)
            teaches = bool(row["text"].strip()) if "text" in row else self._note_turns(row, line)
            if teaches or not self.source:
                rows.append(Row(index, line, row, len(raw)))
            else:
                self._judge(index, line, EMPTY, self.report.empty)
        return rows

    def _note_turns(self, row: dict, line: int) -> bool:
        """Counts the roles and notes what is odd about their order -> whether the assistant says anything."""
        messages = row.get("messages") or row["chosen"]
        roles = [message["role"] for message in messages]
        self.report.roles.update(roles)
        for what, found in (
            ("the last turn is not the assistant's and teaches nothing", roles[-1] != "assistant"),
            ("an answer that is not to be trained on", any("train" in message for message in messages)),
            ("a role speaks twice in a row", any(a == b != "tool" for a, b in zip(roles, roles[1:]))),
            ("a system turn is not the first", "system" in roles[1:]),
        ):
            if found:
                self.report.notes.add(what, line)
        taught = [m for m in messages if m["role"] == "assistant" and m.get("train", True)]
        return any(m["content"].strip() or len(m) > 2 for m in taught)

    def _judge(self, index: int, line: int, verdict: int, finding: Finding | None = None) -> None:
        """The first verdict on a row stays."""
        if self.source and not self.verdicts[index]:
            self.verdicts[index] = verdict
        if finding:
            finding.add(line)

    def fix(self, clean: Path, rejects: Path) -> tuple[int, int]:
        """Writes the rows that are fine as they stand, and the others with their reasons; how many of each."""
        if not self.source:
            reason = self.report.failure or "it is one text"
            raise UserError(f"{self.report.path}: cannot be fixed row by row: {reason}")
        at = 0
        with Writer(clean) as good, Writer(rejects) as bad:
            for chunk in self.source.chunks(READ_BYTES):
                verdicts = self.verdicts[at : at + len(chunk.rows)].tolist()
                for index, (raw, line, verdict) in enumerate(zip(chunk.rows, chunk.lines.tolist(), verdicts), at):
                    if verdict == OK:
                        good.write(raw)
                        continue
                    reason = WORDS.get(verdict) or self.refused.get(index) or read_row(self.read, raw)[1]
                    bad.write(encode({"line": line, "reason": reason, "row": raw.decode("utf-8", "replace")}).encode())
                at += len(chunk.rows)
            return good.rows, bad.rows


def read_row(read: Reader, raw: bytes) -> tuple[dict | None, str]:
    """(canonical row, "") or (None, the reason)."""
    try:
        return read(raw), ""
    except ValueError as error:
        return None, str(error)[:300]
    except Exception as error:  # a fault of ours: the row counts as bad, and the others are still looked at
        return None, f"cannot be read: {type(error).__name__} {error}"[:300]
