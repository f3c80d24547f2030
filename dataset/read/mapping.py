"""The rows of one file -> canonical rows. The first rows tell the file's layout, which all of its rows must have.

    rows = Jsonl("alpaca.jsonl")
    read = find_reader(rows, "chat")                   # layout "instruction + output", seen in line 1
    read(rows.raw(7))                                  # {"messages": [...]}, or a UserError with the reason

Other columns are named by `--data_mapping mapping.yaml`, our name first. Only the columns that it names are read:

    columns: {conversations: dialogue, system: persona}    # or {instruction: 问题, output: 回答}
    turns: {role: speaker, content: words}                 # if the turns have names of their own
    roles: {user: [customer, guest], assistant: agent}     # if the roles have
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.console import UserError
from common.yaml_file import read_yaml
from dataset.kinds import KINDS
from dataset.read.formats import DIALOGUES, column_names, layout_of, not_that_kind, unread
from dataset.read.jsonl import HEAD_ROWS, Rows
from dataset.read.parse import decode, parse_row


@dataclass(frozen=True)
class Mapping:
    """Which of a file's columns stand for ours."""

    path: str
    columns: dict[str, str]  # ours -> theirs
    turns: dict[str, str] = field(default_factory=dict)  # ours -> theirs, inside a turn
    roles: dict[str, str] = field(default_factory=dict)  # theirs -> ours

    def __call__(self, row: dict) -> dict:
        found = {ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}
        for name in DIALOGUES if self.turns or self.roles else ():
            if isinstance(found.get(name), list):
                found[name] = [self._turn(turn) for turn in found[name]]
        return found

    def _turn(self, turn: object) -> object:
        if not isinstance(turn, dict):
            return turn
        turn = turn | {ours: turn[theirs] for ours, theirs in self.turns.items() if theirs in turn}
        for name in ("role", "from"):
            if isinstance(turn.get(name), (str, int)):
                turn[name] = self.roles.get(str(turn[name]), turn[name])
        return turn


def read_mapping(path: str | Path | None) -> Mapping | None:
    """The mapping that a YAML file describes; None for None."""
    if path is None:
        return None
    try:
        tree = read_yaml(str(path))
    except UserError as error:
        raise UserError(f"--data_mapping {error}") from None
    example = "`columns: {instruction: question, output: reply}`, our name first"
    if not isinstance(tree, dict) or not isinstance(tree.get("columns"), dict) or not tree["columns"]:
        raise UserError(f"--data_mapping {path}: expected {example}")
    known = {
        "columns": column_names(),
        "turns": ("role", "content", "reasoning_content", "tool_calls"),
        "roles": ("system", "user", "assistant", "tool"),
    }
    for section, names in tree.items():
        if section not in known or not isinstance(names, dict):
            raise UserError(f"--data_mapping {path}: {section}: expected the sections {', '.join(known)}")
        for name, theirs in names.items():
            if name not in known[section]:
                near = difflib.get_close_matches(str(name), known[section], 1)
                hint = f"did you mean {near[0]}?" if near else f"ours are {', '.join(known[section])}"
                raise UserError(f"--data_mapping {path}: {section}: {name} is none of our names; {hint}")
            if not isinstance(theirs, str) and not (section == "roles" and isinstance(theirs, (list, int))):
                raise UserError(f"--data_mapping {path}: {section}: {name}: {theirs!r} is no name of yours")
    pairs = [(ours, theirs) for ours, theirs in tree.get("roles", {}).items()]
    roles = {str(t): ours for ours, theirs in pairs for t in (theirs if isinstance(theirs, list) else [theirs])}
    return Mapping(str(path), tree["columns"], tree.get("turns", {}), roles)


@dataclass(frozen=True)
class Reader:
    """Reads the rows of one file, all of one layout. It is pickled for worker processes."""

    kind: str  # a key of KINDS
    layout: str = ""  # its name; empty: none of the first rows can be read
    line: int = 1  # where the layout was seen first
    unread: tuple[str, ...] = ()  # columns of the first lines that are not read, and keys in their turns
    mapping: Mapping | None = None

    def __call__(self, raw: bytes) -> dict:
        """A row as it stands in the file -> its canonical row, checked. UserError gives the reason, not the place."""
        try:
            return self._read(raw)
        except RecursionError:  # the parser takes deeper nesting than Python can walk through
            raise UserError("nested too deeply") from None

    def _read(self, raw: bytes) -> dict:
        if self.kind == "plain":
            return {"text": decode(raw).replace("\r\n", "\n")}
        row = parse_row(raw)
        if self.mapping:
            row = self.mapping(row)
        layout = layout_of(row, self.kind)
        if layout is None or layout.kind != self.kind:
            raise UserError(not_that_kind(row, layout, self.kind))
        if layout.name != self.layout:
            raise UserError(
                f"laid out as {layout.name}, while line {self.line} is {self.layout}; "
                "one layout a file (scripts/prepare_data.py joins files)"
            )
        found = layout.read(row, *layout.columns)
        KINDS[self.kind].check(found)
        return found


def require_reader(source: Rows, kind: str, mapping: Mapping | None, *, on_bad_row: str, limit: int = 0) -> Reader:
    """`find_reader` for training. UserError if none of the first rows is of this kind or, unless bad rows are skipped,
    if one of them cannot be read. limit: look at no more rows than so many (0: at all of the head)."""
    reader = find_reader(source, kind, mapping)
    for i in range(min(len(source), limit or HEAD_ROWS, HEAD_ROWS)):
        try:
            reader(source.raw(i))
        except ValueError as error:
            if not reader.layout:
                raise UserError(f"{source.where(i)}: {error}") from None
            if on_bad_row == "error":
                raise UserError(f"{source.where(i)}: {error} (--on_bad_row skip leaves such rows out)") from None
    return reader


def find_reader(source: Rows, kind: str | None = None, mapping: Mapping | None = None) -> Reader:
    """The reader for the layout of the first row that is of this kind. kind None: of any; the reader has its kind.

    Only a file's first rows are looked at (HEAD_ROWS; more while none of them can be read). Each column that a mapping
    names must occur in one of them. UserError if none of the first rows is of this kind, or if a column is missing.
    """
    found, columns, not_read, another = None, {}, {}, ""
    for i in range(len(source)):
        if i >= HEAD_ROWS and (columns or i >= 100 * HEAD_ROWS):  # goes on only while no row can be read
            break
        try:
            row = source[i]
        except ValueError:
            continue  # reported when the row is read
        columns |= dict.fromkeys(row)
        row = mapping(row) if mapping else row
        layout = layout_of(row, kind)
        if layout is None or kind not in (None, layout.kind):
            another = another or f"{source.where(i)}: {not_that_kind(row, layout, kind)}"
            continue
        found = found or Reader(layout.kind, layout.name, source.line(i), mapping=mapping)
        if not mapping and layout.name == found.layout:  # a mapping names what is read
            not_read |= dict.fromkeys(unread(row, layout))
    missing = [name for name in mapping.columns.values() if name not in columns] if mapping else []
    if mapping and missing:
        missing, there = (", ".join(f'"{name}"' for name in names) for names in (missing, columns))
        raise UserError(f"{source.where(0)}: --data_mapping {mapping.path}: no column {missing}; the file has {there}")
    if found:
        return replace(found, unread=tuple(not_read))
    if another:
        raise UserError(another)  # skipping such rows would leave none
    if not kind:
        source[0]  # raises: no row can be read at all
    return Reader(kind or "text", mapping=mapping)  # the error of each row says why it cannot be read
