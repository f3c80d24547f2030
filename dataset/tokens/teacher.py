"""What a teacher expects at every trained token, in a file: its k most likely ids, and their log-probabilities.

    with writing(Path("teacher.lp"), dataset, tokenizer, top_k=32, facts={...}) as records:
        records[example] = ids, logprobs           # (n, 32), (n, 33) of its n trained tokens
    TaughtDataset("sft.jsonl", tokenizer, max_seq_len=512, header=read_header("teacher.lp"))

The last log-probability is that of all other ids together. So a token takes k * (2 + 2) + 2 bytes (130 for 32), or
k * (4 + 2) + 2 in a vocabulary of more than 65,536 ids. The file is mapped, not held in memory. It belongs to the
examples that it was made from: to their tokens, their order and their cuts.

    4096 bytes    JSON, filled with blanks
    8 * (n + 1)   int64: where each example's records begin
    the rest      records: k ids, k + 1 fp16
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.console import UserError
from common.files import put_in_place, system_errors
from dataset.tokens.examples import SFTDataset
from tokenizer.text import Tokenizer

HEADER = 4096
FORMAT = "sparrow-teacher-1"
LEAST = -30.0  # lowest log-probability in the file: e^-30 is practically 0, and -30 is finite in fp16


def record_type(top_k: int, vocab_size: int) -> np.dtype:
    id_type = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    return np.dtype([("ids", id_type, (top_k,)), ("logprobs", np.float16, (top_k + 1,))])


def read_header(path: str | Path) -> dict:
    """The facts that the file was written with, and its path. UserError if it is another file, or truncated."""
    with open(path, "rb") as file:
        head = file.read(HEADER)
    try:
        facts = json.loads(head.decode())
        size = HEADER + 8 * (facts["examples"] + 1) + facts["tokens"] * facts["bytes_per_token"]
    except (ValueError, KeyError, TypeError):
        facts = {}
    if facts.get("format") != FORMAT:
        raise UserError(f"--teacher_logprobs {path}: not a file that --write_logprobs writes")
    if "done" in facts:
        raise UserError(f"--teacher_logprobs {path}: is not complete; start --write_logprobs again to continue it")
    if Path(path).stat().st_size != size:
        raise UserError(f"--teacher_logprobs {path}: truncated, it should have {size:,} bytes; write it again")
    return facts | {"path": str(path)}


class TaughtDataset(SFTDataset):
    """Conversations with what the teacher expects at each trained token: extras `teacher_ids` (n, k) int32 and
    `teacher_logprobs` (n, k + 1) fp16. header: of a teacher's file; None: plain conversations without extras."""

    def __init__(self, paths, tokenizer: Tokenizer, *, header: dict | None = None, **options):
        super().__init__(paths, tokenizer, **options)
        self.records = None
        if header is None:
            return
        for what, theirs, ours in (
            ("the tokenizer", header["tokenizer"][:12], tokenizer.hash[:12]),
            ("--max_seq_len", header["max_seq_len"], self.max_seq_len),
            ("the data (files, rows, --on_long, token format)", header["data"][:12], self.fingerprint[:12]),
        ):
            if theirs != ours:
                same = "give a fresh student the teacher's (--tokenizer_path), or " if what == "the tokenizer" else ""
                raise UserError(
                    f"--teacher_logprobs {header['path']}: was written for other examples: {what} was {theirs}, is "
                    f"{ours}; {same}write it again with --write_logprobs"
                )
        begin = HEADER + 8 * (header["examples"] + 1)
        dtype = record_type(header["top_k"], header["vocab_size"])
        self._begins = np.memmap(header["path"], np.int64, "r", HEADER, (header["examples"] + 1,))
        self.records = np.memmap(header["path"], dtype, "r", begin, (header["tokens"],))

    def _extras(self, example: int) -> dict[str, np.ndarray]:
        if self.records is None:
            return {}
        trained = targets(self._read(example)[1])
        records = self.records[self._begins[example] : self._begins[example + 1]]
        k = records["ids"].shape[1]
        ids, logprobs = np.zeros((len(trained), k), np.int32), np.zeros((len(trained), k + 1), np.float16)
        ids[trained], logprobs[trained] = records["ids"], records["logprobs"]
        return {"teacher_ids": ids, "teacher_logprobs": logprobs}


def targets(trained: np.ndarray) -> np.ndarray:
    """(n,) bool -> (n,) bool: which tokens of an example are targets, i.e. the trained ones except the first."""
    return np.concatenate([[False], trained[1:]])


class Records:
    """The records of a file that is being written: records[example] = ids, logprobs, in any order of examples.

    done  how many steps of the work are in the file; at least as many as there are if it lacks only its name
    """

    def __init__(self, file: BinaryIO, head: dict, begins: np.ndarray, dtype: np.dtype, done: int):
        self.file, self.head, self.begins, self.dtype, self.done = file, head, begins, dtype, done
        self.start = HEADER + begins.nbytes
        self.saved = time.monotonic()

    def __setitem__(self, example: int, found: tuple[np.ndarray, np.ndarray]) -> None:
        values = np.empty(len(found[0]), self.dtype)
        values["ids"], logprobs = found
        values["logprobs"] = np.maximum(logprobs, LEAST)
        self.file.seek(self.start + int(self.begins[example]) * self.dtype.itemsize)
        values.tofile(self.file)

    def finished(self, step: int) -> None:
        """All records of this step are in the file. Every minute it is said there, so that a kill costs no more."""
        self.done = step + 1
        if time.monotonic() - self.saved > 60:
            self.save()

    def save(self, complete: bool = False) -> None:
        """Writes the header, after all that it speaks of is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.seek(0)
        self.file.write(json.dumps(self.head | ({} if complete else dict(done=self.done))).encode().ljust(HEADER))
        self.file.flush()
        self.saved = time.monotonic()


@contextmanager
def writing(path: Path, dataset: SFTDataset, tokenizer: Tokenizer, top_k: int, facts: dict) -> Iterator[Records]:
    """Creates the file `path` -> Records to fill it with. facts: what else a reader of the file has to know.

    It is written as `path`.partial. If the block does not end, that file stays, and the next call with the same facts
    about the same data continues it.
    """
    counts = [int(targets(dataset._read(example)[1]).sum()) for example in range(dataset.distinct_count)]
    begins = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    dtype = record_type(top_k, tokenizer.vocab_size)
    head = facts | dict(
        format=FORMAT,
        data=dataset.fingerprint,
        tokenizer=tokenizer.hash,
        max_seq_len=dataset.max_seq_len,
        vocab_size=tokenizer.vocab_size,
        top_k=top_k,
        examples=len(counts),
        tokens=int(begins[-1]),
        bytes_per_token=dtype.itemsize,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    done = _steps_done(partial, head)
    with system_errors(path), open(partial, "r+b" if done else "wb") as file:
        records = Records(file, head, begins, dtype, done)
        if not done:
            records.save()
            begins.tofile(file)
            file.truncate(records.start + int(begins[-1]) * dtype.itemsize)
        try:
            yield records
        except BaseException:  # Ctrl-C, too
            records.save()
            raise
        records.save(complete=True)
    put_in_place(partial, path)


def _steps_done(partial: Path, head: dict) -> int:
    """Of an interrupted file with this header; 0 if there is none, or one about something else."""
    try:
        with open(partial, "rb") as file:
            found = json.loads(file.read(HEADER).decode())
        done = found.pop("done", sys.maxsize)  # else a kill came between its last step and its name
        return done if found == json.loads(json.dumps(head)) else 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0
