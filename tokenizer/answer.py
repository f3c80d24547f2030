"""The tokens of an answer -> what the client sees of it: reasoning, content, tool calls.

    answer = Answer(tokenizer, prompt_ids, stop=["\\n\\n"])
    for token in tokens:
        for delta in answer.push(token):        # {"reasoning_content": ...}, {"content": ...} or {"tool_calls": [...]}
            ...
    for delta in answer.end():
        ...

Streamed or not, the same code reads the tokens, so the joined deltas of a stream are the answer that is given whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from secrets import token_hex

from tokenizer.text import Tokenizer

THOUGHT, CALL = ("<think>", "</think>"), ("<tool_call>", "</tool_call>")


class Scanner:
    """Looks for words in a text that arrives in pieces, and holds back what may be the beginning of one.

    Found is the word that is complete first, so it does not matter where the pieces were cut.
    """

    def __init__(self, words: Sequence[str]):
        self.words = [word for word in words if word]
        self.held = ""

    def push(self, text: str, final: bool = False) -> Iterator[tuple[str, str | None]]:
        """Yields (text, the word that follows it, or None)."""
        self.held += text
        while found := [(at + len(word), at, word) for word in self.words if (at := self.held.find(word)) >= 0]:
            end, at, word = min(found)
            before, self.held = self.held[:at], self.held[end:]
            yield before, word
        keep = 0 if final else max((_begun(self.held, word) for word in self.words), default=0)
        shown = self.held[: len(self.held) - keep]
        self.held = self.held[len(shown) :]
        if shown:
            yield shown, None


class Answer:
    """
    prompt    ids that the answer follows: if they end inside a <think> block, so does the answer begin
    stop      words that end the answer; nothing of them is shown
    tools     whether <tool_call> blocks are calls; else what is in them is text
    call      the beginning of a call that the prompt already holds (tool_choice)
    plain     no reasoning and no calls, only text that goes on where the prompt ends: /v1/completions
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        tools: bool = False,
        call: str | None = None,
        plain: bool = False,
    ):
        tags = () if plain else THOUGHT + (CALL if tools or call is not None else ())
        self.reads_calls = CALL[0] in tags
        self.tags = {tokenizer.control[tag]: tag for tag in tags if tag in tokenizer.control}
        self.spelled = Scanner([tag for tag in tags if tag not in tokenizer.control])  # MiniMind2's are text
        self.decoder = tokenizer.stream(skip_control=True, after=prompt if plain else ())
        self.stops = Scanner(stop)
        self.mode = "content"  # | reasoning | call
        self.buffer = ""  # of a call
        self.newlines = ""  # held back at the end of a text: they are shown if more follows
        self.fresh = False  # nothing shown yet of a thought, or of what follows it
        self.calls = 0
        self.stopped = False  # by a stop word
        self.reasoning_tokens = 0
        if call is not None:
            self.mode, self.buffer = "call", call
        elif not plain and opens_thought(tokenizer, prompt):
            self.mode, self.fresh = "reasoning", True

    def push(self, token: int) -> list[dict]:
        """What the token adds. After a stop word nothing is added any more."""
        if self.stopped:
            return []
        if token in self.tags:
            return [*self._text(self.decoder.flush(), final=True), *self._tag(self.tags[token])]
        self.reasoning_tokens += self.mode == "reasoning"
        return list(self._text(self.decoder.push(token)))

    def end(self) -> list[dict]:
        """What was held back."""
        if self.stopped:
            return []
        deltas = list(self._text(self.decoder.flush(), final=True))
        if self.mode == "call":
            deltas += self._close_call(whole=False)
        if self.newlines and self.mode == "content":
            deltas.append({"content": self.newlines})
        return deltas

    def _text(self, text: str, final: bool = False) -> Iterator[dict]:
        if self.mode == "call" and not self.stops.held:  # a stop word does not cut a call
            yield from self._tagged(text, final)
            return
        for piece, word in self.stops.push(text, final):
            yield from self._tagged(piece, final=final or word is not None)
            if word is not None:
                self.stopped = True
                if self.newlines and self.mode == "content":
                    yield {"content": self.newlines}
                return

    def _tagged(self, text: str, final: bool) -> Iterator[dict]:
        for piece, tag in self.spelled.push(text, final):
            yield from self._show(piece)
            if tag is not None:
                yield from self._tag(tag)

    def _tag(self, tag: str) -> Iterator[dict]:
        if self.mode == "call":
            yield from self._close_call(whole=tag == CALL[1])
        if tag == CALL[0]:
            self.mode, self.buffer = "call", ""
            self.newlines = ""
        else:
            self.mode = "reasoning" if tag == THOUGHT[0] else "content"
            self.fresh, self.newlines = tag in THOUGHT, ""

    def _show(self, text: str) -> Iterator[dict]:
        if self.mode == "call":
            self.buffer += text
            return
        if self.fresh:
            text = text.lstrip("\n")
        text = self.newlines + text if text else text
        shown = text.rstrip("\n") if self.mode == "reasoning" or self.reads_calls else text
        if shown:
            self.newlines, self.fresh = text[len(shown) :], False
            yield {"reasoning_content" if self.mode == "reasoning" else "content": shown}
        elif text:
            self.newlines = text

    def _close_call(self, whole: bool) -> Iterator[dict]:
        """The call in the buffer, or its text if it is none."""
        self.mode, text = "content", self.buffer
        try:
            call = json.loads(text)
            name, arguments = call["name"], call["arguments"]
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise TypeError
            arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)  # JSON has no NaN, Python reads it
        except (ValueError, KeyError, TypeError, RecursionError):
            yield {"content": CALL[0] + text + (CALL[1] if whole else "")}
            return
        function = {"name": name, "arguments": arguments}
        identity = {"index": self.calls, "id": f"call_{token_hex(12)}", "type": "function"}
        self.calls += 1
        yield {"tool_calls": [identity | {"function": function}]}


def _begun(text: str, word: str) -> int:
    """How many of the word's characters, but not all, the text ends with."""
    most = min(len(text), len(word) - 1)
    return next((n for n in range(most, 0, -1) if word.startswith(text[-n:])), 0)


def opens_thought(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether these ids end inside a thought, as a prompt does with enable_thinking=True."""
    opens, closes = (tokenizer.control.get(tag) for tag in THOUGHT)
    return next((token == opens for token in reversed(ids) if token in (opens, closes)), False)


def join(deltas: list[dict]) -> dict:
    """The deltas of an answer as one message."""
    message: dict = {"role": "assistant", "content": None}
    for delta in deltas:
        for key, value in delta.items():
            value = (
                [{k: v for k, v in call.items() if k != "index"} for call in value] if key == "tool_calls" else value
            )
            message[key] = value if message.get(key) is None else message[key] + value
    if message["content"] is None and "tool_calls" not in message:
        message["content"] = ""
    return message


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, list[int]]:
    """(text, bytes) of a token. One that is no whole text is written as OpenAI does, e.g. bytes:\\xe4\\xbd."""
    (data,) = tokenizer.bytes_of([token])
    try:
        return data.decode(), list(data)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)
