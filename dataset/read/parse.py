"""One row: bytes -> text -> object. What is not JSON in UTF-8 is named, with what makes it so."""

import json
import re
import shlex
from pathlib import Path

from common.console import UserError

# Mode x: a file of that name that is there already is not overwritten.
FROM_TABLE = (
    "python -c \"import csv, json; csv.field_size_limit(1 << 30); open('{0}.jsonl', 'x', encoding='utf-8').writelines("
    "json.dumps(row, ensure_ascii=False) + '\\n' for row in csv.DictReader(open('{0}{1}', encoding='utf-8-sig', "
    "newline=''), delimiter='{2}'))\""
)
TABLES = {".csv": ",", ".tsv": "\\t"}  # how a name ends: what is between two cells
FROM_PARQUET = (
    "python -c \"import json, pyarrow.parquet as p; open('{0}.jsonl', 'x').writelines(json.dumps(row, default=str) + "
    "'\\n' for part in p.ParquetFile('{0}{1}').iter_batches() for row in part.to_pylist())\""
)
OTHER_FILES = {  # how it begins: what it is, and what makes text of it; {0}{1} is its name, {name} the same for a shell
    b"\xff\xfe": ("UTF-16 text", "iconv -f utf-16 -t utf-8 {name} > {target}"),
    b"\xfe\xff": ("UTF-16 text", "iconv -f utf-16 -t utf-8 {name} > {target}"),
    b"\x1f\x8b": ("a gzip file", "gunzip -k {name}"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unzstd {name}"),
    b"\xfd7zXZ": ("an xz file", "unxz -k {name}"),
    b"PK\x03\x04": ("a zip file", "unzip {name}"),
    b"PAR1": ("a Parquet file", FROM_PARQUET),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "git lfs pull"),
}


def refuse_other_files(path: Path, head: bytes) -> None:
    """UserError with the command that converts it, if a file that begins like this is not text in UTF-8."""
    for start, (name, command) in OTHER_FILES.items():
        if head.startswith(start):
            target = path.with_name(f"{path.stem}.utf8{path.suffix}")
            shell = {"name": shlex.quote(str(path)), "target": shlex.quote(str(target))}
            converts = command.format(path.with_suffix(""), path.suffix, **shell)
            raise UserError(f"{path}: is {name}, and JSONL in UTF-8 is needed; convert it: {converts}")


def refuse_tables(path: Path, head: bytes) -> None:
    """Likewise for a table as text, which only its name tells from other text."""
    between = TABLES.get(path.suffix.lower())
    if between and head.lstrip()[:1] not in (b"{", b"["):
        converts = FROM_TABLE.format(path.with_suffix(""), path.suffix, between)
        raise UserError(f"{path}: is a table, and JSONL is needed; convert it: {converts}")


def parse_row(raw: bytes) -> dict:
    """The object that a row holds. UserError says what is wrong with it, without file and line."""
    text = decode(raw)
    if text.strip() in ("{", "["):
        raise UserError(
            "a row has to be on one line, and this one continues on the next; objects over several lines have to "
            "be a .json array"
        )
    try:
        row = loads(text, a_line=True)
    except UserError as error:
        if text.lstrip()[:1] in ("{", "[", ""):
            raise
        raise UserError(
            f"{error}; it begins with {text[:30]!r}, and a row is an object {{...}}; plain text for pretraining has to "
            "be in a .txt file"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"a row must be an object {{...}}, this is {type(row).__name__} {text[:40]!r}")
    return row


def loads(text: str, *, a_line: bool = False) -> object:
    """Parses JSON. Also errors: a key twice in one object (one value would be lost), and half of a surrogate pair.
    a_line: it is a line of a file, which may have been cut off there."""
    try:
        value = _value(text)
        if "\\u" in text and re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at").removesuffix(" starting")  # Python's place, which follows, is of no file
        ends = error.pos >= len(text.rstrip()) or reason == "Unterminated string"
        why = "; it is cut off, or goes on in the next line, and a row has to be on one" if a_line and ends else ""
        raise UserError(f"broken JSON at column {error.colno}: {reason}{why}") from None
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


def read_text(path: Path) -> str:
    """All of a file. UserError with its name."""
    try:
        return decode(path.read_bytes()).removeprefix("\ufeff")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def decode(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start + 1}; {likely_encoding(raw)}") from None
    if "\0" in text:
        column = text.index("\0") + 1
        raise UserError(f"a NUL character at column {column}; was the file cut off while it was written?")
    return text


def likely_encoding(raw: bytes) -> str:
    """What bytes that are not UTF-8 look like, and what to do."""
    for start, (name, _) in OTHER_FILES.items():
        if raw.startswith(start):
            return f"it looks like {name}"
    if b"\0" in raw:  # in no file of gbk
        return "it is no text, or UTF-16 without its mark: convert that with `iconv -f utf-16le -t utf-8`"
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        return "save the file as UTF-8"
    return "it looks like gbk: convert with `iconv -f gb18030 -t utf-8`"
