"""JSONL files of any size: direct access to every row, and errors that name file and line.

    rows = Jsonl("dataset/sft_mini_512.jsonl")
    rows[41]          # the 42nd object, parsed now; nothing else was read
    rows.where(41)    # 'dataset/sft_mini_512.jsonl:42'

The file is memory-mapped, and an index holds where each row starts (int64). The index is kept in the cache, under a key
made of the file's size, time and a hash of its first and last 64 KiB: from the second time on, ten gigabytes open at
once. Blank lines are no rows. A file that holds one JSON array, as `.json` files do, is rewritten once as JSONL, into
the cache. Files are UTF-8; a byte order mark at the start is skipped. `Head` reads the first rows alone, without index.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from common.console import Progress, UserError
from common.files import hash_file
from dataset.read.parse import likely_encoding, parse_row, refuse_other_files, refuse_tables
from dataset.tokens.cache import Mapped, cache_root, get_or_build, require_space

BLOCK = 8 << 20  # bytes read at a time
HEAD_ROWS, HEAD_BYTES = 100, 1 << 20  # a file's head: so many rows at most, and no further one after so many bytes
WINDOW = 1 << 20  # characters of an array that are read at once
LONGEST = 64 << 20  # bytes of a line that is read as part of the head
ENDS = 64 << 10  # bytes at the start and at the end, hashed to notice that a file has changed
BOM = b"\xef\xbb\xbf"
SPACE, LINE_END = re.compile(r"\s*"), re.compile(r"[\r\n]\s*")


class Chunk(NamedTuple):
    """Consecutive rows, unparsed."""

    rows: list[bytes]
    lines: np.ndarray  # int64, 1-based


class Rows:
    """Rows of a file: `rows[i]` parses row i, `rows.raw(i)` gives its bytes, `rows.where(i)` its file:line."""

    path: Path

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, row: int) -> dict:
        try:
            return parse_row(self.raw(row))
        except ValueError as error:
            raise UserError(f"{self.where(row)}: {error}") from None

    def raw(self, row: int) -> bytes:
        raise NotImplementedError

    def line(self, row: int) -> int:
        raise NotImplementedError

    def where(self, row: int) -> str:
        return f"{self.path}:{self.line(row)}"


class Head(Rows):
    """The first rows of a file, by which a file of the wrong kind is refused before all of it is read."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._rows: list[tuple[int, bytes]] = []  # line, the row
        with open(path, "rb") as file:
            is_array = _begins_an_array(file.read(ENDS))
            file.seek(0)
            if is_array:
                rows = ((line, text.encode()) for line, text in elements(self.path))
            else:
                rows = ((line, raw) for line, raw in enumerate(_lines(file), start=1) if raw.strip())
            size = 0
            for line, raw in rows:
                self._rows.append((line, raw.strip()))
                size += len(raw)
                if len(self) == HEAD_ROWS or size > HEAD_BYTES:
                    break

    def __len__(self) -> int:
        return len(self._rows)

    def raw(self, row: int) -> bytes:
        return self._rows[row][1]

    def line(self, row: int) -> int:
        return self._rows[row][0]


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The file's lines up to one that is too long to look at."""
    first = True
    while (line := file.readline(LONGEST)) and (len(line) < LONGEST or line.endswith(b"\n")):
        yield line.removeprefix(BOM) if first else line
        first = False


def _begins_an_array(head: bytes) -> bool:
    return head.removeprefix(BOM).lstrip()[:1] == b"["


def state_of(path: Path) -> tuple[int, str, bytes]:
    """(size, what a change of the file would change, its first bytes); reads both ends only."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        head = file.read(ENDS)
        file.seek(max(0, status.st_size - ENDS))
        ends = hashlib.sha256(head + file.read(ENDS)).hexdigest()
    return status.st_size, f"{status.st_size} {status.st_mtime_ns} {ends}", head


def refuse_changes(path: Path, before: os.stat_result) -> None:
    after = os.stat(path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{path}: changed while it was being read; start again when it is complete")


class Jsonl(Rows):
    """A file of rows. UserError if it has none.

    cache_dir  where to keep the index; None: see `cache_root`
    check      is asked about the file's head before the file is read for the first time, and raises an error to refuse
               it. A file that is refused leaves nothing in the cache
    """

    def __init__(
        self,
        path: str | Path,
        *,
        cache_dir: str | Path | None = None,
        check: Callable[[Head], object] | None = None,
    ):
        self.path, self._check = require_file(path), check
        self.before = os.stat(self.path)  # for `refuse_changes`
        self.size, state, head = state_of(self.path)
        refuse_other_files(self.path, head)
        refuse_tables(self.path, head.removeprefix(BOM))
        self.cache = cache_root(self.path, cache_dir)
        self._is_array = _begins_an_array(head)
        name = entry_name(self.path, "index", state)
        folder, facts = get_or_build(self.cache, name, self._build)
        self.content: str = facts["content"]  # SHA-256 of the bytes
        self._starts = Mapped(folder / "starts", np.int64)  # of each row, and the end
        self._lines = Mapped(folder / "lines", np.int64)
        self._data = Mapped(folder / "rows.jsonl" if self._is_array else self.path, np.uint8)
        self._require_rows(facts["rows"])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _require_rows(self, rows: int) -> None:
        if not rows:
            raise UserError(f"{self.path}:1: no rows, the file is empty")

    def raw(self, row: int) -> bytes:
        if not 0 <= row < len(self):
            raise IndexError(row)
        start, stop = self._starts[row : row + 2]
        return self._data[start:stop].tobytes().rstrip()

    def line(self, row: int) -> int:
        return int(self._lines[row])

    def parts(self, size: int, limit: int) -> list[range]:
        """The first `limit` rows in parts of about `size` bytes, no part smaller than that unless it is the only one.
        A part is what `chunks` can be asked for."""
        starts = self._starts.array[: limit + 1]
        count = max(1, int(starts[-1]) // size)
        cuts = np.searchsorted(starts, np.linspace(0, int(starts[-1]), count + 1)).tolist()
        return [range(a, b) for a, b in zip([0, *cuts[1:-1]], [*cuts[1:-1], limit]) if a < b]

    def bytes_of(self, part: range) -> int:
        return int(self._starts[part.stop] - self._starts[part.start])

    def samples(self, count: int, size: int) -> Iterator[Chunk]:
        """Chunks of about `size` bytes from `count` places, evenly spread over the file."""
        for i in range(count):
            row = len(self) * i // count
            yield next(self.chunks(size, range(row, len(self))))

    def chunks(self, size: int, part: range | None = None) -> Iterator[Chunk]:
        """All rows (or those of a part) in order, about `size` bytes at a time, at least one row."""
        row, end = (0, len(self)) if part is None else (part.start, part.stop)
        starts = self._starts.array
        while row < end:
            stop = int(np.searchsorted(starts, starts[row] + size, side="right")) - 1
            stop = min(max(stop, row + 1), end)
            data = self._data[starts[row] : starts[stop]].tobytes()
            cuts = (starts[row : stop + 1] - starts[row]).tolist()
            yield Chunk([data[a:b].rstrip() for a, b in zip(cuts, cuts[1:])], self._lines[row:stop].copy())
            row = stop

    def _build(self, folder: Path) -> dict:
        if self._check and len(head := Head(self.path)):
            self._check(head)
        with open(folder / "starts", "wb") as starts, open(folder / "lines", "wb") as lines:
            if self._is_array:
                require_space(self.cache, self.size, f"{self.path}: the rows of the array")
                rows = array_to_jsonl(self.path, folder / "rows.jsonl", starts, lines)
                content = hash_file(self.path)
            else:
                with (
                    open(self.path, "rb") as file,
                    closing(Progress(f"reading {self.path.name}", self.size)) as progress,
                ):
                    rows, content = index_lines(file, starts, lines, progress)
        refuse_changes(self.path, self.before)
        self._require_rows(rows)
        return {"source": str(self.path.resolve()), "content": content, "rows": rows}


def require_file(path: str | Path) -> Path:
    """The path, if it is a file; else an OSError whose message has the most similar name in its folder."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name the files in it, e.g. {path / '*.jsonl'}")
    if not path.exists():
        files = {p.stem: p.name for p in path.parent.iterdir() if p.is_file()} if path.parent.is_dir() else {}
        near = difflib.get_close_matches(path.stem, files, n=1)  # without endings, which make all files alike
        hint = f"; did you mean {path.with_name(files[near[0]])}?" if near else ""
        if not path.parent.is_dir():
            hint = f"; there is no folder {path.parent}"
        raise FileNotFoundError(f"{path}: no such file{hint}")
    if not path.is_file():
        what = "a pipe" if path.is_fifo() else "not a regular file"
        raise OSError(f"{path}: is {what}; the data is read several times, so write it to a file")
    return path


def entry_name(path: Path, kind: str, state: str) -> str:
    """A name in the cache: the data file's, what it holds, and a hash of all that it depends on."""
    key = hashlib.sha256(state.encode()).hexdigest()[:16]
    return f"{path.name[:48]}-{kind}-{key}"  # a file name may have 255 bytes, a Chinese character takes 3


def index_lines(file, starts: BinaryIO, lines: BinaryIO, progress: Progress | None = None) -> tuple[int, str]:
    """Reads `file` once -> (rows, SHA-256 of the content). Its memory does not grow with the file.

    starts  is written: (rows + 1,) int64, where each row starts, and the end of the file
    lines   is written: (rows,) int64, their line numbers from 1
    """
    digest, buffer, position, at_start, rows, line = hashlib.sha256(), bytearray(BLOCK), 0, True, 0, 1
    while count := file.readinto(buffer):
        digest.update(memoryview(buffer)[:count])
        block = np.frombuffer(buffer, np.uint8, count)
        begins = np.flatnonzero(block == ord("\n")) + 1
        if at_start:
            skip = len(BOM) if position == 0 and buffer.startswith(BOM) else 0
            begins = np.concatenate([[skip], begins]) if skip < count else begins
        at_start = bool(len(begins)) and begins[-1] == count
        begins = begins[:-1] if at_start else begins
        firsts = block[begins]
        blank = firsts == ord("\n")
        for i in np.flatnonzero(np.isin(firsts, (9, 11, 12, 13, 32))):  # starts with a space: is anything else in it?
            blank[i] = _is_blank(file, buffer, begins[i], count, position)
        found = np.flatnonzero(~blank)
        starts.write((begins[found] + position).astype(np.int64).tobytes())
        lines.write((found + line).astype(np.int64).tobytes())
        rows, line, position = rows + len(found), line + len(begins), position + count
        if progress:
            progress.advance(count)
    starts.write(np.int64(position).tobytes())
    return rows, digest.hexdigest()


def _is_blank(file, buffer: bytearray, begin: int, count: int, position: int) -> bool:
    """Whether the line that begins at buffer[begin] is blank. Where it goes on after the buffer, it is read on there:
    at `position + count`, where the file is left."""
    end = buffer.find(b"\n", begin, count)
    if end >= 0 or buffer[begin:count].strip():
        return not buffer[begin : end if end >= 0 else count].strip()
    blank = True
    while blank and (more := file.read(ENDS)):
        line, newline, _ = more.partition(b"\n")
        blank = not line.strip()
        if newline:
            break
    file.seek(position + count)
    return blank


def array_to_jsonl(path: Path, target: Path, starts: BinaryIO, lines: BinaryIO) -> int:
    """Rewrites a JSON array as JSONL, with one element in memory at a time -> how many there are. starts, lines: are
    written as by `index_lines`."""
    count = position = 0
    with open(target, "wb") as rows:
        for line, text in elements(path):
            starts.write(np.int64(position).tobytes())
            lines.write(np.int64(line).tobytes())
            position += rows.write(text.encode() + b"\n")
            count += 1
    starts.write(np.int64(position).tobytes())
    return count


def elements(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text on one line) of each element of the JSON array that a file holds."""
    with open(path, encoding="utf-8-sig") as source:
        reader = _ArrayReader(path, source)
        reader.skip("[")
        end = reader.skip("]")
        while not end:
            yield reader.element()
            separator = reader.skip(",]")
            if not separator:
                reader.fail("expected ',' or ']' after an element")
            end = separator == "]"
        if not reader.at_end():
            reader.fail("something stands after the array's end; a file is one array, or a row a line")


def _after_space(text: str, at: int) -> int:
    """The position of the first character from `at` on that is not white space."""
    found = SPACE.match(text, at)
    return found.end() if found else at


def _may_go_on(error: json.JSONDecodeError) -> bool:
    """Whether more text could make right what the decoder found wrong: it was inside a string, or at the end."""
    return error.msg.startswith("Unterminated string") or error.pos > len(error.doc) - len("\\uD83D\\uDE00")


class _ArrayReader:
    """Reads a JSON array element by element, in a window of text that grows until an element fits."""

    def __init__(self, path: Path, source):
        self.path, self.source, self.decode = path, source, json.JSONDecoder().raw_decode
        self.text, self.at, self.ended = "", 0, False
        self.last_line, self.counted = 1, 0  # the line that text[counted] is in

    def line(self) -> int:
        self.last_line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.last_line

    def fail(self, reason: str) -> None:
        raise UserError(f"{self.path}:{self.line()}: broken JSON: {reason}")

    def more(self) -> None:
        line, rest = self.line(), self.text[self.at :]
        try:
            read = self.source.read(max(WINDOW, len(rest)))  # doubling: a huge element is scanned a few times only
        except UnicodeDecodeError as error:
            where = f"{self.path}:{line}"
            raise UserError(
                f"{where}: not UTF-8 here or below ({error.reason}); {likely_encoding(error.object)}"
            ) from None
        self.text, self.at, self.counted, self.ended = rest + read, 0, 0, not read

    def skip(self, characters: str) -> str:
        """Skips white space and then one of `characters`, if it is next. Returns that character, or ""."""
        while True:
            self.at = _after_space(self.text, self.at)
            found = self.text[self.at : self.at + 1]
            if found or self.ended:
                found = found if found and found in characters else ""
                self.at += len(found)
                return found
            self.more()

    def at_end(self) -> bool:
        """Whether nothing but white space is left."""
        self.skip("")
        return self.at == len(self.text)

    def element(self) -> tuple[int, str]:
        """(line number, text on one line). Line ends in JSON stand between tokens, never inside one."""
        while True:
            try:
                self.at = _after_space(self.text, self.at)
                _, end = self.decode(self.text, self.at)
                line, text, self.at = self.line(), self.text[self.at : end], end
                return line, LINE_END.sub(" ", text) if "\n" in text or "\r" in text else text
            except json.JSONDecodeError as error:
                if self.ended or not _may_go_on(error):
                    self.at = min(error.pos, len(self.text))
                    self.fail(error.msg)
            except RecursionError:
                self.fail("nested too deeply")
            except ValueError as error:  # a number of thousands of digits
                self.fail(str(error))
            self.more()
