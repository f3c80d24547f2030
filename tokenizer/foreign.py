"""Chat templates of other tokenizers. They run in a sandbox (sandbox.py), and what they print is read back as segments.

    tokenizer = Tokenizer.load("path/to/Qwen3-0.6B")     # its chat_template is not ours, so
    encode_chat(tokenizer, messages)                     # calls this file

A template is a program that prints one text. Afterwards it must be known which parts of that text are content and which
are the template's own. So the template is given changed texts:

- after each letter that could begin a control token stands a *guard* character. So a control token in the printed text
  is always the template's own.
- at both ends of a message stands a *mark*, another character for each message. It tells where the message was printed.

Guard and marks are private-use characters that do not occur in the row. They are removed at the end.

Trained on is everything from the end of the turn's header, which a generation prompt supplies, to the turn's end token.
If a template prints no such header, the trained part begins at the first letter of the message.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from itertools import accumulate, pairwise

from common.console import UserError
from tokenizer.messages import Segment, dumps, markup, split_reasoning
from tokenizer.text import Tokenizer

# Keys that templates read by name. They keep their spelling: ChatGLM3's control tokens "sop" and "eop" begin with a
# letter, and the guard after each s and e changed "name".
KEYS = frozenset(
    "type function name description parameters properties required enum items default arguments id strict".split()
)


class ForeignTemplate:
    """Renders like tokenizer/chat.py's own ChatML: called with a conversation, returns its segments."""

    def __init__(self, tokenizer: Tokenizer):
        import jinja2

        from tokenizer.sandbox import Bounded

        assert tokenizer.chat_template is not None
        self.environment = Bounded()
        try:
            self.template = self.environment.from_string(tokenizer.chat_template)
        except jinja2.TemplateError as error:
            raise UserError(f"{tokenizer.path}: chat template: {error}") from None
        self.path = tokenizer.path
        self.names = {name: tokenizer.special(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.splits_reasoning = "reasoning_content" in tokenizer.chat_template
        longest_first = sorted(tokenizer.control, key=len, reverse=True)
        self.controls = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.first_letters = {name[0] for name in tokenizer.control}
        self.header = self._header()

    def _print(self, messages, tools=None, prompt=False, enable_thinking=None) -> str:
        given = {"messages": messages, "tools": tools or None, "add_generation_prompt": prompt, **self.names}
        if enable_thinking is not None:
            given |= {"enable_thinking": enable_thinking, "open_thinking": enable_thinking}  # Qwen's name, MiniMind's
        try:
            return self.environment.render_bounded(self.template, given)
        except Exception as error:  # a template is a program and may fail in any way
            raise UserError(f"{self.path}: the chat template refuses this conversation: {error}") from None

    def _header(self) -> str:
        """What every generation prompt begins with, with thinking and without."""
        question, headers = [{"role": "user", "content": "?"}], []
        for thinking in (True, False):
            without, with_prompt = (self._print(question, None, prompt, thinking) for prompt in (False, True))
            headers.append(with_prompt.removeprefix(without))
        return os.path.commonprefix(headers)

    def __call__(
        self,
        tokenizer: Tokenizer,
        messages: list[dict],
        tools: list[dict] | None,
        add_generation_prompt: bool,
        enable_thinking: bool | None,
    ) -> list[Segment]:
        used = set(dumps([messages, tools]))
        private = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
        guard = next(private)
        marks = [next(private) for _ in messages]
        guarded = functools.partial(_map_text, {ord(letter): letter + guard for letter in self.first_letters})
        shown = [self._marked(message, guarded, mark) for message, mark in zip(messages, marks)]
        text = self._print(shown, guarded(tools), add_generation_prompt, enable_thinking)

        trained = []  # [begin, end) in text
        first, last = {}, {}  # mark -> where it begins that stands first, where it ends that stands last
        for match in re.finditer(f"[{marks[0]}-{marks[-1]}]", text):
            first.setdefault(match[0], match.start())
            last[match[0]] = match.end()
        # of each message: where all before it have ended, and where the next one after it begins
        before = [0, *accumulate((last.get(mark, 0) for mark in marks), max)]
        after = [*accumulate((first.get(mark, len(text)) for mark in reversed(marks)), min, initial=len(text))][-2::-1]
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant" and marks[i] in first]
        for i in spoken:
            begin, stop = first[marks[i]], last[marks[i]]
            header = text.rfind(self.header, before[i], begin)
            ends = list(self.controls.finditer(text, stop, after[i]))
            end = next((match for match in ends if match[0] == self.names["eos_token"]), ends[0] if ends else None)
            if messages[i].get("train", True):
                trained.append((header + len(self.header) if header >= 0 else begin, end.end() if end else stop))

        edges = {0, len(text), *(edge for span in trained for edge in span)}
        inside = Counter(begin for begin, _ in trained)  # at each edge: how many trained parts begin there, less ends
        inside.subtract(stop for _, stop in trained)
        for match in self.controls.finditer(text):
            edges |= {match.start(), match.end()}
        erase = dict.fromkeys(map(ord, [guard, *marks]))
        segments: list[Segment] = []
        depth = 0
        for begin, end in pairwise(sorted(edges)):
            piece = markup(tokenizer, text[begin:end])
            depth += inside[begin]
            segments.append((piece if isinstance(piece, int) else piece.translate(erase), depth > 0))
        if spoken and spoken[-1] == len(messages) - 1 and not ends and not add_generation_prompt:
            # GLM ends a turn with the header of the next one; the last turn needs an end that can be learned too
            segments.append((tokenizer.end_of_text, messages[-1].get("train", True)))
        return [segment for segment in segments if segment[0] != ""]

    def _marked(self, message: dict, guarded, mark: str) -> dict:
        shown = {key: guarded(value) for key, value in message.items()}
        shown |= {"role": message["role"], "content": _wrap(guarded(message["content"]), mark)}
        if message["role"] != "assistant":
            return shown
        reasoning, content = split_reasoning(message)
        apart = bool(message.get("reasoning_content"))  # as the message has it, and as the template expects it
        if reasoning is not None and self.splits_reasoning:
            if not apart:
                reasoning, content = reasoning.strip("\n"), content.lstrip("\n")
            shown["reasoning_content"] = _wrap(guarded(reasoning), mark)
            shown["content"] = _wrap(guarded(content), mark)
        elif reasoning is not None:
            if apart:
                reasoning, content = "\n" + reasoning.strip("\n") + "\n", "\n\n" + content.lstrip("\n")
            shown["content"] = _wrap(f"<think>{guarded(reasoning)}</think>{guarded(content)}", mark)
        if message.get("tool_calls"):
            calls = guarded(message["tool_calls"])
            functions = [{"name": _wrap(call["name"], mark), "arguments": call["arguments"]} for call in calls]
            shown["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        return shown


def _map_text(table: dict[int, str], value):
    """str.translate on every text in a tree of lists and dicts, keys included but for KEYS."""
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, dict):
        return {key if key in KEYS else _map_text(table, key): _map_text(table, item) for key, item in value.items()}
    return [_map_text(table, item) for item in value] if isinstance(value, list) else value


def _wrap(text: str, mark: str) -> str:
    """Marks inside the outer blanks, because templates trim."""
    core = text.strip()
    return text.replace(core, mark + core + mark, 1) if core else text
