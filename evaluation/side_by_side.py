"""A conversation with several models at once: all answer what is typed, in columns, token by token.

Each model has its own history, so that a question may refer to its answer. /reset forgets all of them.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from io import TextIOWrapper

from common.console import cut, note, printable, width_of
from evaluation.columns import GAP, Columns
from evaluation.models import Contender
from inference.sampling import Sampling
from inference.session import Session
from inference.terminal import read_lines, typed

NARROWEST = 24  # characters of a column; below that, the answers are printed one after the other


class Talk:
    """One model's side of the conversation."""

    def __init__(self, contender: Contender, sampling: Sampling, max_new_tokens: int, system: str):
        self.contender, self.sampling, self.system = contender, sampling, system
        self.session, self.turns, self.max_new_tokens = Session(contender.model), [], max_new_tokens

    def answer(self, text: str) -> Iterator[str]:
        """Pieces of the answer. Between two of them another model may compute with the same weights."""
        contender, limit = self.contender, self.contender.model.config.max_position_embeddings
        while True:
            ids = contender.encode([*self.turns, {"role": "user", "content": text}], self.system)
            if len(ids) <= limit - min(self.max_new_tokens, limit // 4) or not self.turns:
                break
            del self.turns[:2]  # forget the oldest question and its answer
        room = min(self.max_new_tokens, limit - len(ids))
        if room < 1:
            yield f"(a question of {len(ids)} tokens leaves no room in {limit} positions)"
            return
        stream, said = contender.tokenizer.stream(after=ids if contender.completes else ()), []
        with contender.active():
            reply = self.session.reply(ids, self.sampling, max_new_tokens=room, stop=contender.tokenizer.stop_ids)
        with closing(reply):
            while True:
                with contender.active():
                    token = next(reply, None)
                if token is None:
                    break
                said.append(token)
                yield stream.push(token)
        yield stream.flush()
        content = contender.tokenizer.decode(said)
        if content.strip() and not contender.completes:
            self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": content}]


def converse(
    contenders: Sequence[Contender],
    sampling: Sampling,
    max_new_tokens: int,
    system: str,
    lines: Iterable[str] | None = None,
) -> None:
    """Answers line after line of `lines`, or of what is typed, until its end."""
    talks = [Talk(contender, sampling, max_new_tokens, system) for contender in contenders]
    if lines is None:
        lines = _typed()
    note("all models answer each line; /reset forgets the conversation, Ctrl-C stops an answer, Ctrl-D leaves")
    for line in map(str.strip, lines):
        if line == "/exit":
            return
        if line == "/reset":
            for talk in talks:
                talk.turns.clear()
            note("the conversation begins anew")
        elif line:
            try:
                show(talks, line)
            except KeyboardInterrupt:
                note("(stopped)")
            except ValueError as error:  # a text that cannot be encoded
                note(f"error: {error}")


def show(talks: Sequence[Talk], line: str) -> None:
    names = [printable(talk.contender.name, one_line=True) for talk in talks]
    width = (shutil.get_terminal_size((100, 24)).columns - 1 - len(GAP) * (len(talks) - 1)) // len(talks)
    if width < NARROWEST:
        for name, talk in zip(names, talks):
            print(f"[{name}]")
            for piece in talk.answer(line):
                print(printable(piece), end="", flush=True)
            print("\n")
        return

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    heads = [cut(name, width) for name in names]
    write(GAP.join(head + " " * (width - width_of(head)) for head in heads).rstrip() + "\n")
    write(GAP.join("─" * width for _ in heads) + "\n")
    columns = Columns(write, [width] * len(talks), live=sys.stdout.isatty())
    answers = dict(enumerate(talk.answer(line) for talk in talks))
    try:
        while answers:
            for column, answer in list(answers.items()):
                piece = next(answer, None)
                if piece is None:
                    del answers[column]
                    columns.end(column)
                else:
                    columns.push(column, piece)
    finally:
        for answer in answers.values():
            answer.close()
        columns.close()
        write("\n")


def _typed() -> Iterator[str]:
    """Lines of standard input; at a terminal, with a prompt. Pipes are UTF-8, as for eval_model.py."""
    terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(**{"errors": "replace"} if terminal else {"encoding": "utf-8"})
    yield from typed() if terminal else (messages[-1]["content"] for messages in read_lines(sys.stdin))
