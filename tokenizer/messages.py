"""Chat messages in their canonical form: what is well-formed, and where an answer's reasoning is.

check_messages([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}])
split_reasoning({"role": "assistant", "content": "<think>easy</think>2"})      # ("easy", "2")
"""

from __future__ import annotations

import json
import re

from common.console import UserError
from tokenizer.text import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
THINKING = re.compile(r"\n*<think>(.*?)</think>(.*)", re.DOTALL)

Conversation = tuple[list[dict], list[dict] | None]  # messages, tools
Segment = tuple[int | str, bool]  # a control id or plain text; whether it is trained on


def markup(tokenizer: Tokenizer, text: str) -> int | str:
    """The control id of a piece of markup. Other text, and markup for which the tokenizer has no token, stays text."""
    return tokenizer.control.get(text, text)


def split_reasoning(message: dict) -> tuple[str | None, str]:
    """An assistant message's (reasoning, rest of the content); None where there is no reasoning."""
    if message.get("reasoning_content"):
        return message["reasoning_content"], message["content"]
    block = THINKING.fullmatch(message["content"])
    return (block[1], block[2]) if block else (None, message["content"])


def never_closed(message: dict) -> str | None:
    """The tag that an assistant's message begins with and never closes, as an answer does that was cut off; or None."""
    reasoning, rest = split_reasoning(message)
    tag = "<think>" if reasoning is None else "<answer>"
    return tag if rest.lstrip().startswith(tag) and tag.replace("<", "</") not in rest else None


def dumps(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def check_messages(messages: list[dict], tools: list[dict] | None = None) -> None:
    """UserError for the first thing that is not as a canonical conversation has it. The caller adds file and line."""
    if not isinstance(messages, list) or not messages:
        raise UserError("messages: expected a list of at least one message")
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise UserError(f"messages[{i}]: role must be one of {', '.join(ROLES)}, found {role!r}")
        if not isinstance(message.get("content"), str):
            found = "nothing" if message.get("content") is None else type(message["content"]).__name__
            raise UserError(f"messages[{i}] ({role}): content must be text, found {found}")
        if len(message) == 2:
            continue
        if not isinstance(message.get("train", True), bool):
            raise UserError(f"messages[{i}] ({role}): train must be true or false, found {message['train']!r:.80}")
        for key in ("reasoning_content", "tool_calls"):
            if message.get(key) and role != "assistant":
                raise UserError(f"messages[{i}] ({role}): only an assistant can have {key}")
        if not isinstance(message.get("reasoning_content") or "", str):
            raise UserError(f"messages[{i}] (assistant): reasoning_content must be text")
        calls = message.get("tool_calls") or []
        for call in calls if isinstance(calls, list) else [calls]:
            well_formed = isinstance(call, dict) and isinstance(call.get("name"), str)
            if not isinstance(calls, list) or not well_formed or not isinstance(call.get("arguments"), dict):
                expected = 'a list of {"name": text, "arguments": object}'
                raise UserError(f"messages[{i}] (assistant): tool_calls must be {expected}, found {call!r:.80}")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError("tools: expected a list of function schemas (objects)")
