"""The layouts people keep their rows in -> one canonical row.

    to_text({"text": "Once upon a time"})
    to_conversation({"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]})

A canonical conversation is (messages, tools or None), as tokenizer/chat.py takes and checks it: a message has "role"
and "content", an assistant's also "reasoning_content" and "tool_calls" ([{"name", "arguments": {}}]) where it has them.
Here layouts are translated, no more. A ValueError gives the reason, its caller knows the place. To read another layout
add a function to CONVERSATIONS: the first that returns something other than None has read the row.
"""
import json

from tokenizer.chat import Conversation


def to_text(row: dict) -> str:
    if "text" not in row:
        raise ValueError(f'no "text" in this row, it has {_keys(row)}')
    return _text(row["text"], '"text"')


def to_conversation(row: dict) -> Conversation:
    for read in CONVERSATIONS:
        if (conversation := read(row)) is not None:
            return conversation
    raise ValueError(f'no "conversations" or "messages" in this row, it has {_keys(row)}')


def _role_content(row: dict) -> Conversation | None:
    """OpenAI's `messages`, MiniMind's `conversations`: {"role", "content"}; tools beside them or in the system turn."""
    key = next((k for k in ("messages", "conversations") if k in row), None)
    if key is None:
        return None
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f'"{key}" must be a list of messages, this is {_short(turns)}')
    messages = [_message(turn, f"{key}[{i}]") for i, turn in enumerate(turns)]
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    # MiniMind keeps the tools in the system message, under either name
    tools = row.get("tools") or turns[0].get("tools") or turns[0].get("functions")
    return messages, _listed(tools, '"tools"') if tools else None


CONVERSATIONS = (_role_content,)


def _message(turn: object, where: str) -> dict:
    if not isinstance(turn, dict) or "role" not in turn:
        raise ValueError(f'{where} must be {{"role", "content"}}, this is {_short(turn)}')
    calls = _listed(turn["tool_calls"], f"{where}.tool_calls") if turn.get("tool_calls") else []
    content = turn.get("content")
    message = {"role": turn["role"], "content": "" if content is None and calls else content}
    if reasoning := turn.get("reasoning_content") or turn.get("reasoning") or turn.get("thinking"):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [_call(call, f"{where}.tool_calls") for call in calls]
    if turn["role"] == "assistant" and not (reasoning or calls) and content == "":
        raise ValueError(f"{where}: the assistant says nothing")
    return message


def _call(call: object, where: str) -> dict:
    """{"name", "arguments"}, bare or in OpenAI's {"type", "function": ...}; the arguments may be a JSON string."""
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError(f'{where}: a call must be {{"name", "arguments"}}, this is {_short(call)}')
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", f"{where}: the arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}: the arguments must be an object, this is {_short(arguments)}")
    return {"name": call["name"], "arguments": arguments}


def _listed(value: object, where: str) -> list:
    value = _parsed(value, where) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list, this is {_short(value)}")
    return value


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{where}: not JSON, {_short(text)}") from None


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, this is {_short(value)}")
    return value


def _keys(row: dict) -> str:
    return ", ".join(f'"{key}"' for key in row) or "no keys"


def _short(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
