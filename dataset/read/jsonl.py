"""JSONL files of any size: direct access to every row, and errors that name file and line.

    rows = Jsonl("dataset/sft_mini_512.jsonl")
    rows[41]          # the 42nd object, parsed now; nothing else was read
    rows.where(41)    # 'dataset/sft_mini_512.jsonl:42'

The file is memory-mapped, and an index holds where each row starts (int64). The index is kept in the cache, under a key
made of the file's size, time and a hash of its first and last 64 KiB: from the second time on, ten gigabytes open at
once. Blank lines are no rows. A file that holds one JSON array, as `.json` files do, is rewritten once as JSONL, into
the cache. Files are UTF-8; a byte order mark at the start is skipped.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.console import UserError
from common.files import hash_file
from dataset.tokens.cache import Mapped, cache_root, get_or_build

BLOCK = 8 << 20  # bytes read at a time
ENDS = 64 << 10  # bytes at the start and at the end, hashed to notice that a file has changed
BOM = b"\xef\xbb\xbf"
SPACE, LINE_END = re.compile(r"\s*"), re.compile(r"[\r\n]\s*")
FROM_PARQUET = (
    "python -c \"import json, pyarrow.parquet as p; open('{0}.jsonl', 'w').writelines(json.dumps(row, default=str) + "
    "'\\n' for part in p.ParquetFile('{0}{1}').iter_batches() for row in part.to_pylist())\""
)
OTHER_FILES = {  # how it begins: what it is, and what makes text of it; {0}{1} is its name
    b"\xff\xfe": ("UTF-16 text", "iconv -f utf-16 -t utf-8 {0}{1} > {0}.utf8{1}"),
    b"\xfe\xff": ("UTF-16 text", "iconv -f utf-16 -t utf-8 {0}{1} > {0}.utf8{1}"),
    b"\x1f\x8b": ("a gzip file", "gunzip -k {0}{1}"),
    b"PK\x03\x04": ("a zip file", "unzip {0}{1}"),
    b"PAR1": ("a Parquet file", FROM_PARQUET),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "git lfs pull"),
}


class Chunk(NamedTuple):
    """Consecutive rows, unparsed."""

    rows: list[bytes]
    lines: np.ndarray  # int64, 1-based


class Jsonl:
    """A file of rows: `rows[i]` parses row i, `rows.raw(i)` gives its bytes. UserError if it has no rows.

    cache_dir  where to keep the index; None: see `cache_root`
    """

    def __init__(self, path: str | Path, *, cache_dir: str | Path | None = None):
        self.path = require_file(path)
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            self.size = status.st_size
            head = file.read(ENDS)
            refuse_other_files(self.path, head)
            file.seek(max(0, status.st_size - ENDS))
            state = f"{status.st_size} {status.st_mtime_ns} {hashlib.sha256(head + file.read(ENDS)).hexdigest()}"
        self.cache = cache_root(self.path, cache_dir)
        self._is_array = head.removeprefix(BOM).lstrip()[:1] == b"["
        name = entry_name(self.path, "index", state)
        folder, facts = get_or_build(self.cache, name, self._build)
        self.content: str = facts["content"]  # SHA-256 of the bytes
        self._starts = Mapped(folder / "starts", np.int64)  # of each row, and the end
        self._lines = Mapped(folder / "lines", np.int64)
        self._data = Mapped(folder / "rows.jsonl" if self._is_array else self.path, np.uint8)
        if not len(self):
            raise UserError(f"{self.path}:1: no rows, the file is empty")

    def __len__(self) -> int:
        return len(self._starts.array) - 1

    def __getitem__(self, row: int) -> dict:
        try:
            return parse_row(self.raw(row))
        except ValueError as error:
            raise UserError(f"{self.where(row)}: {error}") from None

    def raw(self, row: int) -> bytes:
        if not 0 <= row < len(self):
            raise IndexError(row)
        start, stop = self._starts[row : row + 2]
        return self._data[start:stop].tobytes().rstrip()

    def line(self, row: int) -> int:
        return int(self._lines[row])

    def where(self, row: int) -> str:
        return f"{self.path}:{self.line(row)}"

    def chunks(self, size: int, limit: int | None = None) -> Iterator[Chunk]:
        """All rows (or the first `limit`) in order, about `size` bytes at a time, at least one row."""
        row, end = 0, len(self) if limit is None else min(limit, len(self))
        starts = self._starts.array
        while row < end:
            stop = int(np.searchsorted(starts, starts[row] + size, side="right")) - 1
            stop = min(max(stop, row + 1), end)
            data = self._data[starts[row] : starts[stop]].tobytes()
            cuts = (starts[row : stop + 1] - starts[row]).tolist()
            yield Chunk([data[a:b].rstrip() for a, b in zip(cuts, cuts[1:])], self._lines[row:stop].copy())
            row = stop

    def _build(self, folder: Path) -> dict:
        with open(self.path, "rb") as file:
            before = os.fstat(file.fileno())
            starts, lines, content = index_lines(file)
            after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise UserError(f"{self.path}: changed while it was being read; start again when it is complete")
        if self._is_array:
            starts, lines = array_to_jsonl(self.path, folder / "rows.jsonl")
        starts.tofile(folder / "starts")
        lines.tofile(folder / "lines")
        return {"source": str(self.path.resolve()), "content": content, "rows": len(lines)}


def require_file(path: str | Path) -> Path:
    """The path, if it is a file; else an OSError whose message has the most similar name in its folder."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name the files in it, e.g. {path / '*.jsonl'}")
    if not path.exists():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        if not path.parent.is_dir():
            hint = f"; there is no folder {path.parent}"
        raise FileNotFoundError(f"{path}: no such file{hint}")
    return path


def refuse_other_files(path: Path, head: bytes) -> None:
    """UserError with the command that converts it, if a file that begins like this is not text in UTF-8."""
    for start, (name, command) in OTHER_FILES.items():
        if head.startswith(start):
            converts = command.format(path.with_suffix(""), path.suffix)
            raise UserError(f"{path}: is {name}, and JSONL in UTF-8 is needed; convert it: {converts}")


def entry_name(path: Path, kind: str, state: str) -> str:
    """A name in the cache: the data file's, what it holds, and a hash of all that it depends on."""
    key = hashlib.sha256(state.encode()).hexdigest()[:16]
    return f"{path.name[:48]}-{kind}-{key}"  # a file name may have 255 bytes, a Chinese character takes 3


def index_lines(file) -> tuple[np.ndarray, np.ndarray, str]:
    """(starts, lines, SHA-256 of the content); reads `file` once.

    starts  (rows + 1,) int64, where each row starts, and the end of the file
    lines   (rows,) int64, their line numbers from 1
    """
    digest, buffer, position, at_start = hashlib.sha256(), bytearray(BLOCK), 0, True
    starts, firsts = [], []  # of every line: its position, its first byte
    while count := file.readinto(buffer):
        digest.update(memoryview(buffer)[:count])
        block = np.frombuffer(buffer, np.uint8, count)
        begins = np.flatnonzero(block == ord("\n")) + 1
        if at_start:
            skip = len(BOM) if position == 0 and buffer.startswith(BOM) else 0
            begins = np.concatenate([[skip], begins]) if skip < count else begins
        at_start = bool(len(begins)) and begins[-1] == count
        begins = begins[:-1] if at_start else begins
        starts.append(begins + position)
        firsts.append(block[begins])
        position += count
    if not starts:
        return np.zeros(1, np.int64), np.empty(0, np.int64), digest.hexdigest()
    starts, firsts = np.concatenate(starts + [[position]]).astype(np.int64), np.concatenate(firsts)
    blank = firsts == ord("\n")
    for line in np.flatnonzero(np.isin(firsts, (9, 11, 12, 13, 32))):  # starts with a space: is anything else in it?
        file.seek(starts[line])
        blank[line] = not file.read(starts[line + 1] - starts[line]).strip()
    rows = np.flatnonzero(~blank)
    return np.append(starts[rows], position), rows + 1, digest.hexdigest()


def array_to_jsonl(path: Path, target: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rewrites a JSON array as JSONL, with one element in memory at a time -> (starts, lines) as of `index_lines`."""
    starts, lines = [0], []
    with open(path, encoding="utf-8-sig") as source, open(target, "wb") as rows:
        reader = _ArrayReader(path, source)
        reader.skip("[")
        end = reader.skip("]")
        while not end:
            line, text = reader.element()
            lines.append(line)
            starts.append(starts[-1] + rows.write(text.encode() + b"\n"))
            separator = reader.skip(",]")
            if not separator:
                reader.fail("expected ',' or ']' after an element")
            end = separator == "]"
        if not reader.at_end():
            reader.fail("something stands after the array's end; a file is one array, or a row a line")
    return np.array(starts, np.int64), np.array(lines, np.int64)


def _after_space(text: str, at: int) -> int:
    """The position of the first character from `at` on that is not white space."""
    found = SPACE.match(text, at)
    return found.end() if found else at


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
            read = self.source.read(max(1 << 20, len(rest)))  # doubling: a huge element is scanned a few times only
        except UnicodeDecodeError as error:
            where = f"{self.path}:{line}"
            raise UserError(f"{where}: not UTF-8 here or below ({error.reason}); {_likely(error.object)}") from None
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
                if self.ended:
                    self.at = min(error.pos, len(self.text))
                    self.fail(error.msg)
            except RecursionError:
                self.fail("nested too deeply")
            except ValueError as error:  # a number of thousands of digits
                self.fail(str(error))
            self.more()


def parse_row(raw: bytes) -> dict:
    """The object that a row holds. UserError says what is wrong with it, without file and line."""
    text = decode(raw)
    if text.strip() in ("{", "["):
        raise UserError(
            "a row has to be on one line, and this one continues on the next; objects over several lines have to "
            "be a .json array"
        )
    row = loads(text)
    if not isinstance(row, dict):
        raise UserError(f"a row must be an object {{...}}, this is {type(row).__name__} {text[:40]!r}")
    return row


def loads(text: str) -> object:
    """Parses JSON. Also errors: a key twice in one object (one value would be lost), and half of a surrogate pair."""
    try:
        value = _value(text)
        if "\\u" in text and re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise UserError(f"broken JSON at column {error.colno}: {error.msg}") from None
    except UnicodeEncodeError as error:  # half of a surrogate pair is valid JSON but no text
        raise UserError(f"half of a surrogate pair, {error.object[error.start]!r}, is no character") from None
    except RecursionError:
        raise UserError("nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):  # json would silently keep the last one
        keys = [key for key, _ in pairs]
        raise UserError(f'the key "{next(key for key in keys if keys.count(key) > 1)}" stands twice in one object')
    return found


_decoder = json.JSONDecoder(object_pairs_hook=_unique)


def _value(text: str) -> object:
    try:  # `decode` without its two searches for white space, which take time
        value, end = _decoder.scan_once(text, 0)  # type: ignore[attr-defined]
        if end == len(text):
            return value
    except StopIteration:
        pass
    return _decoder.decode(text)


def decode(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start + 1}; {_likely(raw)}") from None
    if "\0" in text:
        column = text.index("\0") + 1
        raise UserError(f"a NUL character at column {column}; was the file cut off while it was written?")
    return text


def _likely(raw: bytes) -> str:
    for start, (name, _) in OTHER_FILES.items():
        if raw.startswith(start):
            return f"it looks like {name}"
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        return "save the file as UTF-8"
    return "it looks like gbk: convert with `iconv -f gb18030 -t utf-8`"


class TextFile:
    """A plain text file, with the methods of a `Jsonl` of one row; `chunks` cuts it at line ends."""

    def __init__(self, path: str | Path, *, cache_dir: str | Path | None = None):
        self.path = require_file(path)
        self.cache = cache_root(self.path, cache_dir)
        self.size = self.path.stat().st_size
        if not self.size:
            raise UserError(f"{self.path}:1: the file is empty")
        self.content = hash_file(self.path)

    def __len__(self) -> int:
        return 1

    def chunks(self, size: int, limit: int | None = None) -> Iterator[Chunk]:
        line = 1
        with open(self.path, "rb") as file:
            text = file.read(len(BOM)).removeprefix(BOM)
            while more := file.read(size):
                text += more
                cut = len(text)
                if len(more) == size:  # not the end: cut at a line end or, in a long line, between two characters
                    last = next((i for i in range(cut - 1, max(cut - 4, 0), -1) if text[i] & 0xC0 != 0x80), cut)
                    cut = text.rfind(b"\n") + 1 or last
                yield Chunk([text[:cut]], np.array([line]))
                line, text = line + text.count(b"\n", 0, cut), text[cut:]
        if text:
            yield Chunk([text], np.array([line]))
