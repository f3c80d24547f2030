"""A conversation in a terminal, or with lines from a pipe: what eval_model.py prints and which commands it knows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TextIO

from common.console import UserError, printable, takes_colour
from inference.conversation import Conversation

COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "/system <text> sets the system prompt, /system alone removes it",
    "/help": "this list; Ctrl-C stops an answer, Ctrl-D leaves",
    "/exit": "leave",
}


@dataclass(frozen=True)
class Screen:
    """Where it is printed: answers to `out`, remarks to `notes`."""

    out: TextIO
    notes: TextIO

    def write(self, text: str, dim: bool = False) -> None:
        self._print(text, dim, self.out)

    def note(self, text: str) -> None:
        self._print(text, True, self.notes)
        self._print("\n", False, self.notes)

    @staticmethod
    def _print(text: str, dim: bool, out: TextIO) -> None:
        text = printable(text)
        out.write(f"\x1b[2m{text}\x1b[0m" if dim and text and takes_colour(out) else text)
        out.flush()


def show(talk: Conversation, text: str, screen: Screen) -> None:
    """Prints one answer as it is made. Ctrl-C raises KeyboardInterrupt after the history is completed."""
    with closing(talk.answer(text)) as pieces:
        for piece, aside in pieces:
            screen.write(piece, dim=aside)


def chat(talk: Conversation, lines: Iterable[str], screen: Screen) -> None:
    """Answers line after line. Ctrl-C stops the answer, not the conversation."""
    for line in map(str.strip, lines):
        word, _, rest = line.partition(" ")
        if word == "/exit":
            return
        if word in COMMANDS or re.fullmatch(r"/[a-z]+", line):
            screen.note(run_command(talk, word, rest.strip()))
        elif line:
            ended = ""
            try:
                show(talk, line, screen)
            except KeyboardInterrupt:
                ended = "(stopped) "
            except ValueError as error:  # a text that cannot be encoded, or is too long
                screen.note(f"error: {error}")
                continue
            screen.write("\n")
            screen.note(ended + talk.session.speed)


def run_command(talk: Conversation, word: str, rest: str) -> str:
    """Runs a /command -> a remark to print."""
    if word == "/reset":
        talk.turns.clear()
        return "the conversation begins anew"
    if word == "/system":
        talk.system = rest
        return f"system prompt: {rest}" if rest else "no system prompt"
    unknown = "" if word == "/help" else f"there is no {word}\n"
    return unknown + "\n".join(f"{name:<9}{meaning}" for name, meaning in COMMANDS.items())


def typed() -> Iterator[str]:
    """Lines typed at the prompt, until Ctrl-D or Ctrl-C."""
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() arrow keys and a history)
    while True:
        try:
            yield input(">>> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


# ---- without a terminal


def read_lines(file: Iterable[str]) -> Iterator[list[dict]]:
    """The prompts on standard input, each as a conversation of one message."""
    try:
        for line in filter(None, map(str.strip, file)):
            yield [{"role": "user", "content": line}]
    except UnicodeDecodeError:
        raise UserError("standard input: not UTF-8; save it as UTF-8") from None


def answer_all(
    talk: Conversation, conversations: Iterable[tuple[list[dict], list[dict] | None]], screen: Screen
) -> None:
    """Answers the last user message of each conversation (messages, tools), without those before. Never waits for
    input.

    A system message of a conversation takes the place of `talk.system`, and its tools that of `talk.tools`. One that is
    too long does not end the others; UserError after all of them.
    """
    answered, unanswered, system, usual = False, 0, talk.system, talk.tools
    for messages, tools in conversations:
        last = max(n for n, message in enumerate(messages) if message["role"] == "user")
        own = messages[0]["role"] == "system"
        talk.system, talk.turns = messages[0]["content"] if own else system, messages[own:last]
        talk.tools = tools or usual
        prompt = messages[last]["content"]
        screen.write(f"> {prompt}\n")
        try:
            show(talk, prompt, screen)
        except UserError as error:
            unanswered += 1
            screen.note(f"not answered: {error}")
        screen.write("\n\n")
        answered = True
    if unanswered:
        raise UserError(f"prompts that were not answered: {unanswered}")
    if not answered:
        raise UserError("there is no prompt to answer; give --prompt or --prompts_file, or run it in a terminal")
