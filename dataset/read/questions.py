"""Questions and, where the file has them, their right answers: for evaluation, in whatever layout people keep them.

    questions = read_questions("test_questions.json")     # .jsonl; an array in .json; .txt with a question a line
    questions[0].messages                                 # [{"role": "user", "content": "..."}]
    questions[0].references                               # ("...",), or () if nobody has written an answer

A row is text, a row of any layout that is trained on (dataset/read/formats.py), of which the last answer is the
reference, or the same without an answer: {"prompt": "..."}, {"question": "..."}, {"messages": [... the user's turn]}.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.console import UserError
from dataset.kinds import KINDS
from dataset.read.formats import QUESTIONS, canonical, layout_of
from dataset.read.jsonl import elements, require_file
from dataset.read.parse import decode, loads, read_text, refuse_other_files
from tokenizer.messages import check_messages, split_reasoning

ANSWER = {"instruction": "output", "prompt": "completion", "query": "response", "question": "answer"}
KIND = ("kind", "category", "type", "subject", "task")  # columns that group questions
LISTS = ("questions", "prompts", "data", "rows", "examples", "test_questions")  # of an object that holds all rows


@dataclass(frozen=True)
class Question:
    """What a model is asked, and what is known of the answer."""

    where: str  # file:line
    messages: list[dict]  # canonical, up to the turn that is to be answered
    answer: dict | None = None  # the assistant's message that the file has for it
    rejected: list[dict] | None = None  # of a preference, the conversation with the worse answer
    tools: list[dict] | None = None
    kind: str = ""  # what the row says it is about

    @property
    def asked(self) -> str:
        """The user's last words."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")

    @property
    def references(self) -> tuple[str, ...]:
        """The right answer, without its reasoning and its <answer> tags."""
        if self.answer is None:
            return ()
        text = re.sub("</?answer>", "", split_reasoning(self.answer)[1]).strip()
        return (text,) if text else ()

    @property
    def conversation(self) -> list[dict]:
        """With the answer, as it is trained on."""
        return [*self.messages, self.answer] if self.answer else self.messages


def read_questions(path: str | Path, limit: int = 0) -> list[Question]:
    """limit: of the first rows only (0: all). UserError with file:line for a row that asks nothing."""
    found = []
    for where, row in read_rows(path):
        try:
            found.append(asked := question(row, where))
            if not any(message["role"] == "user" for message in asked.messages):
                raise UserError("this row asks nothing: none of its messages is the user's")
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        if len(found) == limit:
            break
    if not found:
        empty = Path(path).stat().st_size == 0
        raise UserError(f"{path}: {'the file is empty' if empty else 'there is no question in it'}")
    return found


def references_of(questions: Sequence[Question]) -> list[str] | None:
    """The reference of each question; None: not all have one."""
    found = [question.references[0] for question in questions if question.references]
    return found if len(found) == len(questions) else None


def read_rows(path: str | Path) -> Iterator[tuple[str, object]]:
    """(file:line, what is there) of each row, parsed. A file that is neither .json nor .jsonl has text in its lines."""
    path = require_file(path)
    with open(path, "rb") as file:
        head = file.read(4096)
    refuse_other_files(path, head)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl") and start.startswith(b"["):
        before = 0
        for number, (line, text) in enumerate(elements(path), 1):  # an array may stand in one line: each row has a name
            yield f"{path}:{line}" + (f" row {number}" if line == before else ""), loads(text)
            before = line
    elif suffix == ".json":
        yield from _object(path)
    else:
        yield from _lines(path, suffix == ".jsonl")


def _lines(path: Path, are_json: bool) -> Iterator[tuple[str, object]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if raw := (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip():
                try:
                    yield where, loads(decode(raw), a_line=True) if are_json else decode(raw)
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None


def _object(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of an object that holds them in a list or, by their kind, in several; or the rows of a .jsonl that is
    called .json."""
    text = read_text(path)
    try:
        tree = loads(text)
    except UserError as error:
        lines = [line for line in text.split("\n") if line.strip()]  # not at U+2028, which may stand in a text
        if len(lines) < 2 or not lines[0].rstrip().endswith("}"):
            raise UserError(f"{path}: {error}") from None
        yield from _lines(path, True)
        return
    lists = {key: value for key, value in tree.items() if isinstance(value, list)} if isinstance(tree, dict) else {}
    named = next((key for key in LISTS if key in lists), None)
    if layout_of(tree) if isinstance(tree, dict) else False:
        lists = {"": [tree]}
    elif named:
        lists = {"": lists[named]}
    if not lists:
        raise UserError(f"{path}: expected a list of questions, or an object with one")
    for key, rows in lists.items():
        for number, row in enumerate(rows, 1):
            if key and isinstance(row, str):
                row = {"prompt": row, "kind": key}
            elif key and isinstance(row, dict):
                row = {"kind": key} | row
            yield f"{path}: {key or named or 'row'}[{number - 1}]", row


def question(row: object, where: str = "") -> Question:
    """One row -> the question. UserError if it asks nothing."""
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise UserError(f"a question is text or an object, this is {type(row).__name__}")
    kind = next((str(row[key]) for key in KIND if isinstance(row.get(key), str)), "")
    layout = layout_of(row)
    if layout is None:
        asked = next((key for key in QUESTIONS if row.get(key) is not None), None)
        if asked is None:
            raise UserError(
                f"no question in this row, it has {', '.join(row) or 'no keys'}; expected one of "
                f"{', '.join((*QUESTIONS, 'messages', 'conversations'))}"
            )
        found = canonical({key: value for key, value in row.items() if key != "label"} | {ANSWER[asked]: "?"})
        return Question(where, _checked(found["messages"][:-1], found), None, None, found.get("tools"), kind)
    if layout.kind == "text":
        raise UserError('"text" is a document, and asks nothing')
    found = canonical(row)
    rejected = found.get("rejected")
    messages = found["chosen"] if layout.kind == "preference" else found["messages"]
    last = next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "assistant"), None)
    answered = last is not None and not any(m["role"] == "user" for m in messages[last:])
    if not answered:
        return Question(where, _checked(messages, found), None, None, found.get("tools"), kind)
    KINDS[layout.kind].check(found)
    good = layout.kind != "rated" or found["label"]
    return Question(where, messages[:last], messages[last] if good else None, rejected, found.get("tools"), kind)


def _checked(messages: list[dict], found: dict) -> list[dict]:
    check_messages(messages, found.get("tools"))
    return messages
