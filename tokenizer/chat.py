"""Chat messages -> token ids, and in the same pass the mask of the ids that are trained on.

    from tokenizer.chat import encode_chat, show_labels
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    ids, trained = encode_chat(tokenizer, messages)
    print(show_labels(tokenizer, ids, trained))

A conversation becomes segments. A segment is a control id or plain text, and is trained on or not. Neighbouring texts
are joined and encoded by a tokenizer that knows no control tokens. So what somebody wrote stays text, labels do not
depend on finding a pattern of ids, and for text without control tokens the ids equal those of transformers'
`apply_chat_template`.

The format is ChatML, the same as in chat_template.jinja. Trained on are an assistant's content and the <|im_end|> after
it, but not the newline that follows. A token that holds the end of a header and the beginning of a content is trained
on. An assistant's message with `"train": False` is context only.

In an assistant's turn these are markup: its `reasoning_content`, or one <think>...</think> at the beginning of its
content; after that, one <answer>...</answer> up to the end of its content; its `tool_calls`. The same words anywhere
else are text. Newlines around the reasoning are made uniform. Nothing else is changed, left out or added: reasoning in
earlier turns stays, and a turn without reasoning gets no think block.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from common.console import Coloured, UserError, printable
from tokenizer.messages import Conversation, Segment, check_messages, dumps, markup, split_reasoning
from tokenizer.text import Tokenizer

TEMPLATE = (Path(__file__).resolve().parent / "chat_template.jinja").read_text(encoding="utf-8")

TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
ANSWER = re.compile(r"<answer>(.*)</answer>(\s*)", re.DOTALL)


class Encoded(NamedTuple):
    ids: list[int]
    trained: list[bool]  # ids[i] is something the model should learn to say


def encode_chat(
    tokenizer: Tokenizer,
    messages: list[dict],
    tools: list[dict] | None = None,
    *,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
) -> Encoded:
    """One conversation. UserError if it is not well-formed, or if a foreign template refuses it.

    add_generation_prompt  the header of an assistant's turn follows, for a model to go on from
    enable_thinking        the prompt then ends with <think> (True), with an empty think block (False) or neither (None)
    """
    check_messages(messages, tools)
    return _encode(tokenizer, [_render(tokenizer, messages, tools, add_generation_prompt, enable_thinking)])[0]


def encode_chats(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> list[Encoded | UserError]:
    """Many conversations, with one call of the tokenizer. They must have passed `check_messages` already. One that a
    foreign template refuses gives the error instead."""
    rendered: list[list[Segment] | UserError] = []
    for messages, tools in conversations:
        try:
            rendered.append(_render(tokenizer, messages, tools))
        except UserError as error:
            rendered.append(error)
    encoded = iter(_encode(tokenizer, [segments for segments in rendered if not isinstance(segments, UserError)]))
    return [segments if isinstance(segments, UserError) else next(encoded) for segments in rendered]


def _render(
    tokenizer: Tokenizer,
    messages: list[dict],
    tools: list[dict] | None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
) -> list[Segment]:
    render = _chatml if tokenizer.chat_template in (None, TEMPLATE) else _foreign(tokenizer)
    try:
        return render(tokenizer, messages, tools, add_generation_prompt, enable_thinking)
    except RecursionError:  # the parser takes deeper nesting, in tools and arguments, than Python can walk through
        raise UserError("nested too deeply") from None


@functools.lru_cache(maxsize=4)
def _foreign(tokenizer: Tokenizer):
    from tokenizer.foreign import ForeignTemplate

    return ForeignTemplate(tokenizer)


def _encode(tokenizer: Tokenizer, rows: list[list[Segment]]) -> list[Encoded]:
    plans: list[list[tuple]] = []
    runs: dict[tuple[str, bool], None] = {}  # each distinct text once; many repeat, like the "\n" between two turns
    for segments in rows:
        plan: list[tuple] = []
        for is_text, group in groupby(segments, key=lambda segment: isinstance(segment[0], str)):
            if is_text:
                text, spans = _join(group)
                run = text, bool(plan) and tokenizer.blank_at_start_only
                runs[run] = None
                plan.append((run, spans))
            else:
                plan += group
        plans.append(plan)

    encodings = {}
    for inside in (False, True):
        some = [run for run in runs if run[1] is inside]
        encodings |= zip(some, tokenizer.encode_offsets([text for text, _ in some], inside))
    encoded = []
    for plan in plans:
        ids: list[int] = []
        trained: list[bool] = []
        for piece, label in plan:
            if isinstance(piece, tuple):
                encoding = encodings[piece]
                ids += encoding.ids
                trained += _overlap(encoding, label, len(piece[0]))
            else:
                ids.append(piece)
                trained.append(label)
        encoded.append(Encoded(ids, trained))
    return encoded


def _join(group: Iterator[Segment]) -> tuple[str, list[tuple[int, int]]]:
    """Neighbouring texts as one, because tokens may form across them, and the spans of it that are trained on."""
    text, spans = "", []
    for piece, trained in group:
        assert isinstance(piece, str)
        if trained and piece:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


def _overlap(encoding, spans: list[tuple[int, int]], length: int) -> list[bool]:
    """For each token: is any of its characters in one of the spans?"""
    if not spans or spans == [(0, length)]:
        return [bool(spans)] * len(encoding.ids)
    if len(spans) == 1 and spans[0][1] == length:  # a header and then a content: nearly always, so this is fast
        return [end > spans[0][0] for _, end in encoding.offsets]
    return [any(begin < stop and end > start for start, stop in spans) for begin, end in encoding.offsets]


# ---- ChatML


def _chatml(
    tokenizer: Tokenizer,
    messages: list[dict],
    tools: list[dict] | None,
    add_generation_prompt: bool,
    enable_thinking: bool | None,
) -> list[Segment]:
    start, end = (tokenizer.im_start, False), (tokenizer.im_end, False)
    tag = functools.partial(markup, tokenizer)
    out: list[Segment] = []
    if tools:
        out += [start, ("system\n", False)]
        if messages[0]["role"] == "system":
            out.append((messages[0]["content"] + "\n\n", False))
            messages = messages[1:]
        out.append((TOOLS_BEFORE + "".join("\n" + dumps(tool) for tool in tools), False))
        out += [(tag(piece), False) for piece in re.split("(</?tool_call>)", TOOLS_AFTER)]
        out += [end, ("\n", False)]

    for role, turns in groupby(messages, key=lambda message: message["role"]):
        if role == "tool":  # consecutive results share a turn
            out += [start, ("user", False)]
            for message in turns:
                pieces = ("\n", tag("<tool_response>"), f"\n{message['content']}\n", tag("</tool_response>"))
                out += [(piece, False) for piece in pieces]
            out += [end, ("\n", False)]
            continue
        for message in turns:
            out += [start, (role + "\n", False)]
            if role == "assistant":
                trained = message.get("train", True)
                out += [(piece, trained) for piece in _assistant(tag, message)]
                out += [(tokenizer.im_end, trained), ("\n", False)]
            else:
                out += [(message["content"], False), end, ("\n", False)]

    if add_generation_prompt:
        out += [start, ("assistant\n", False)]
        if enable_thinking is not None:
            out += [(tag("<think>"), False), ("\n" if enable_thinking else "\n\n", False)]
        if enable_thinking is False:
            out += [(tag("</think>"), False), ("\n\n", False)]
    return out


def _assistant(tag, message: dict) -> Iterator[int | str]:
    reasoning, content = split_reasoning(message)
    if reasoning is not None:
        content = content.lstrip("\n")
        yield from (tag("<think>"), "\n" + reasoning.strip("\n") + "\n", tag("</think>"), "\n\n")
    answer = ANSWER.fullmatch(content) if reasoning is not None else None
    if answer:
        yield from (tag("<answer>"), answer[1], tag("</answer>"), answer[2])
    else:
        yield content
    for n, call in enumerate(message.get("tool_calls") or ()):
        if content or n:
            yield "\n"
        body = f'\n{{"name": {dumps(call["name"])}, "arguments": {dumps(call["arguments"])}}}\n'
        yield from (tag("<tool_call>"), body, tag("</tool_call>"))


# ---- for people

DIM, GREEN, BOLD, RESET = "\x1b[2m", "\x1b[32m", "\x1b[1m", "\x1b[0m"


def show_labels(tokenizer: Tokenizer, ids: Sequence[int], trained: Sequence[bool], *, colours: bool = True) -> str:
    """The row as text for a terminal: what is trained on in green, the rest dim, control tokens bold. Without colours,
    what is trained on stands between ⟦ and ⟧."""
    control = set(tokenizer.control.values())
    kinds = [(bool(label), int(i) in control) for i, label in zip(ids, trained)]
    shown = []
    for (label, is_control), group in groupby(zip(ids, kinds), key=lambda pair: pair[1]):
        text = printable(tokenizer.decode([i for i, _ in group]))
        if colours:
            shown.append((GREEN if label else DIM) + (BOLD if is_control else "") + text + RESET)
        else:
            shown.append(f"⟦{text}⟧" if label else text)
    return Coloured("".join(shown)) if colours else "".join(shown).replace("⟧⟦", "")
