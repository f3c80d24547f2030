"""A row in any of the layouts that people use -> one canonical row of its kind.

    canonical({"instruction": "Add.", "input": "1+1", "output": "2"})
    # {"messages": [{"role": "user", "content": "Add.\\n1+1"}, {"role": "assistant", "content": "2"}]}

| kind       | canonical row                                                                     |
|------------|-----------------------------------------------------------------------------------|
| text       | {"text": text}                                                                    |
| chat       | {"messages": [...], "tools": [...]}                                               |
| preference | {"chosen": [...], "rejected": [...], "tools": [...]}, same up to the answer       |
| rated      | a chat row with "label": was this a good answer? (KTO)                            |

A message has "role" and "content", an assistant's may also have "reasoning_content" and "tool_calls" ([{"name",
"arguments": {}}]); "tools" is there if there are any. This file translates layouts, and the check of a kind
(dataset/kinds.py) then tells whether the result can be used. Its errors give the reason only: the caller knows file and
line.

The columns of a row tell its layout: it is the first line of LAYOUTS whose columns are all there. To read another
layout, add a line. docs/data.md shows an example of each.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

from common.console import UserError
from dataset.kinds import KINDS
from dataset.read.jsonl import loads

ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "developer": "system",
    "observation": "tool",
    "tool_response": "tool",
    "function": "tool",
}
PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "reasoning": "reasoning",
    "thinking": "reasoning",
    "tool_call": "tool_call",
}
CALLS = ("function_call", "tool_call")  # as roles: a turn of the assistant that consists of calls
REASONING = ("reasoning_content", "reasoning", "thinking")


class Layout(NamedTuple):
    kind: str
    columns: tuple[str, ...]
    read: Callable[..., dict]  # (row, *columns) -> canonical row
    turns: str = ""  # how the turns are written, for the name, where two layouts have the same columns

    @property
    def name(self) -> str:
        return " + ".join(self.columns) + self.turns


def layout_of(row: dict, kind: str | None = None) -> Layout | None:
    """The layout of a row, None if it has none. With `kind` "text" only its column "text" counts."""
    if kind == "text" and "text" in row:
        return LAYOUTS[-1]
    rating = "label" if isinstance(row.get("label"), bool) else "kto_tag" if row.get("kto_tag") is not None else None
    turns = row.get("conversations")
    sharegpt = isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]
    return _by_columns(tuple([key for key, value in row.items() if value is not None]), rating, sharegpt)


@lru_cache(maxsize=1024)
def _by_columns(columns: tuple[str, ...], rating: str | None, sharegpt: bool) -> Layout | None:
    found = next((layout for layout in LAYOUTS if set(layout.columns) <= set(columns)), None)
    if found and sharegpt and "conversations" in found.columns:
        found = found._replace(turns=" (from, value)")
    if found and rating and found.kind == "chat":
        found = found._replace(kind="rated", columns=(*found.columns, rating), read=_rated)
    return found


def canonical(row: dict, kind: str | None = None) -> dict:
    """One row in any layout, without the check of its kind. UserError if it is not of this kind (None: of any)."""
    layout = layout_of(row, kind)
    if layout is None or kind not in (None, layout.kind):
        raise UserError(not_that_kind(row, layout, kind))
    return layout.read(row, *layout.columns)


def not_that_kind(row: dict, layout: Layout | None, kind: str | None) -> str:
    """Why a row is not of `kind` (None: of any), and what can be done about it."""
    found = f"no {KINDS[kind].needs if kind else 'known layout'} in this row, it has {_keys(row)}"
    if layout is None:
        return f"{found} (docs/data.md shows all layouts, --data_mapping names columns of your own)"
    keeps = kind == "chat" and layout.kind in ("preference", "rated")
    way_out = "; `scripts/prepare_data.py --to chat` keeps its better answers" if keeps else ""
    return f"{found}: it is a {KINDS[layout.kind].needs}{way_out}"


# ---- what the layouts have in common: who asked what, and the answer


def _document(row: dict, key: str) -> dict:
    return {"text": _text(row[key], f'"{key}"')}


def _dialogue(row: dict, key: str) -> dict:
    """A list of turns: OpenAI's, MiniMind's, ShareGPT's, pairs of human and assistant."""
    return _with_tools(row, _asked(row, key))


def _exchange(row: dict, question: str, answer: str) -> dict:
    """One question and its answer. Alpaca: an `input` below the instruction, earlier turns in `history`. Dolly: the
    passage that is asked about in `context`."""
    reply = {key: row[key] for key in REASONING if key in row}
    return _with_tools(row, _asked(row, question) + _said(row[answer], "assistant", answer, reply))


def _preference(row: dict, *columns: str) -> dict:
    """Two answers to a question, which is in a column of its own or at the beginning of both."""
    *asked, chosen, rejected = columns
    prompt = _asked(row, asked[0]) if asked else []
    sides = {}
    for name, key in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(row[key], str) and not prompt:
            raise UserError(f'"{key}" must be messages, or text beside a "prompt", this is {_short(row[key])}')
        answer = _said(row[key], "assistant", key)
        # some files have the prompt in its own column and also before both answers
        sides[name] = _with_system(row, prompt + answer if answer[0]["role"] == "assistant" else answer)
    tools = _tools(row)
    return sides | ({"tools": tools} if tools else {})


def _rated(row: dict, *columns: str) -> dict:
    columns, rating = columns[:-1], columns[-1]
    if not isinstance(row[rating], bool):
        raise UserError(f'"{rating}" must be true or false, this is {_short(row[rating])}')
    return LAYOUT_OF[columns].read(row, *columns) | {"label": row[rating]}


def _asked(row: dict, key: str) -> list[dict]:
    if key in DIALOGUES:
        turns = row[key]
        if not isinstance(turns, list) or not turns:
            raise UserError(f'"{key}" must be a list of messages, this is {_short(turns)}')
        messages = []
        for i, turn in enumerate(turns):
            messages += _turn(turn, f"{key}[{i}]")
    elif key == "instruction" or isinstance(row[key], str):
        parts = [_text(row[name], f'"{name}"') for name in (key, *BELOW) if row.get(name)]
        messages = [{"role": "user", "content": "\n".join(parts)}]
    else:
        messages = _said(row[key], "user", key)
    if history := row.get("history"):
        messages = [
            message for i, pair in enumerate(_listed(history, '"history"')) for message in _past(pair, f"history[{i}]")
        ] + messages
    return _with_system(row, messages)


def _with_system(row: dict, messages: list[dict]) -> list[dict]:
    system = row.get("system") or row.get("system_prompt")
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _with_tools(row: dict, messages: list[dict]) -> dict:
    tools = _tools(row)
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def _tools(row: dict) -> list | None:
    """From a column of the row or, as MiniMind has it, from the first turn. Bare functions are wrapped as OpenAI's."""
    tools = row.get("tools") or row.get("functions")
    if not tools:
        turns = row.get("conversations") or row.get("messages") or row.get("chosen")
        first = turns[0] if isinstance(turns, list) and turns else None
        tools = isinstance(first, dict) and (first.get("tools") or first.get("functions"))
    if not tools:
        return None
    bare = lambda tool: isinstance(tool, dict) and "name" in tool and "function" not in tool
    return [{"type": "function", "function": tool} if bare(tool) else tool for tool in _listed(tools, '"tools"')]


def _past(pair: object, where: str) -> list[dict]:
    if not isinstance(pair, list) or len(pair) != 2:
        raise UserError(f"{where} must be [question, answer], this is {_short(pair)}")
    return _said(pair[0], "user", where) + _said(pair[1], "assistant", where)


def _said(value: object, role: str, where: str, more: dict | None = None) -> list[dict]:
    """Text, one message or a list of them."""
    if isinstance(value, str):
        return [_message({"role": role, "content": value} | (more or {}), where)]
    if isinstance(value, dict):
        return _turn(value, where)
    if not isinstance(value, list) or not value:
        raise UserError(f'"{where}" must be text or a list of messages, this is {_short(value)}')
    return [message for i, turn in enumerate(value) for message in _turn(turn, f"{where}[{i}]")]


# ---- one turn


def _turn(turn: object, where: str) -> list[dict]:
    if isinstance(turn, dict):
        if "role" in turn or "from" in turn:
            return [_message(turn, where)]
        for asked, answered in PAIRED:
            if asked in turn and answered in turn:
                system = [{"role": "system", "content": turn["system"]}] if turn.get("system") else []
                return system + _said(turn[asked], "user", where) + _said(turn[answered], "assistant", where)
    raise UserError(f'{where} must be {{"role", "content"}} or {{"from", "value"}}, this is {_short(turn)}')


def _message(turn: dict, where: str) -> dict:
    role = turn["role"] if "role" in turn else turn["from"]
    content = turn["content"] if "content" in turn else turn.get("value")
    if len(turn) == 2 and content and isinstance(content, str) and isinstance(role, str) and role not in CALLS:
        return {"role": ROLES.get(role, role), "content": content}  # nearly every turn ends here
    calls, reasoning = turn.get("tool_calls") or turn.get("function_call"), None
    for key in ("weight", "loss", "train"):
        if turn.get(key) in (0, False) and ROLES.get(role, role) == "assistant":
            raise UserError(
                f'{where}: "{key}": {turn[key]!r} asks not to train on this answer, which is not possible for single '
                "turns yet; end the row before it, or take the key out to train on it"
            )
    for key in REASONING:
        reasoning = reasoning or turn.get(key)
    if isinstance(content, list):
        content, thought, called = _parts(content, where)
        reasoning, calls = reasoning or thought, calls or called
    if role in CALLS:
        role, content, calls = "assistant", "", content
    message = {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": content}
    if calls:
        calls = _parsed(calls, f"{where}.tool_calls") if isinstance(calls, str) else calls
        calls = calls if isinstance(calls, list) else [calls]
        message["tool_calls"] = [_call(call, f"{where}.tool_calls") for call in calls]
        if content is None:
            message["content"] = ""
    if reasoning:
        message["reasoning_content"] = reasoning
    if content == "" and not (reasoning or calls) and message["role"] == "assistant":
        raise UserError(f"{where}: the assistant says nothing")
    return message


def _parts(parts: list, where: str) -> tuple[str, str, list]:
    """Content in parts -> (text, reasoning, calls). A part has its words in "value", in "text" or under its type."""
    found = {"text": [], "reasoning": [], "tool_call": []}
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in PARTS:
            raise UserError(f"{where}: only text can be read, this part is {_short(part)}")
        name = PARTS[kind]
        words = next((part[key] for key in ("value", kind, "text") if key in part), None)
        if name == "tool_call":
            words = _parsed(words, f"{where}: the call") if isinstance(words, str) else words
        found[name].append(words if name == "tool_call" else _text(words, f"{where}: a part"))
    return "".join(found["text"]), "\n".join(found["reasoning"]), found["tool_call"]


def _call(call: object, where: str) -> dict:
    """{"name", "arguments"}, bare or in OpenAI's {"type", "function": ...}; the arguments may be a JSON string."""
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(f'{where}: a call must be {{"name", "arguments"}}, this is {_short(call)}')
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", f"{where}: the arguments")
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: the arguments must be an object, this is {_short(arguments)}")
    return {"name": call["name"], "arguments": arguments}


# ---- the table


DIALOGUES = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "query", "question")
BELOW = ("input", "context")  # what a question is about; put below it
PAIRED = (("human", "assistant"), ("user", "assistant"), ("input", "output"))  # inside one turn of a dialogue

LAYOUTS: tuple[Layout, ...] = (
    *(Layout("preference", (asked, "chosen", "rejected"), _preference) for asked in QUESTIONS + DIALOGUES),
    *(Layout("preference", (asked, "response_chosen", "response_rejected"), _preference) for asked in QUESTIONS),
    Layout("preference", ("chosen", "rejected"), _preference),
    *(Layout("chat", (turns,), _dialogue) for turns in DIALOGUES),
    Layout("chat", ("instruction", "output"), _exchange),
    Layout("chat", ("instruction", "response"), _exchange),
    Layout("chat", ("prompt", "completion"), _exchange),
    Layout("chat", ("prompt", "response"), _exchange),
    Layout("chat", ("query", "response"), _exchange),
    Layout("chat", ("question", "response"), _exchange),
    Layout("chat", ("question", "answer"), _exchange),
    Layout("text", ("text",), _document),
)
LAYOUT_OF = {layout.columns: layout for layout in LAYOUTS}
BESIDE = (*BELOW, "history", "system", "system_prompt", "tools", "functions", *REASONING, "label", "kto_tag")


def unread(row: dict, layout: Layout) -> list[str]:
    """Columns that are not read. None of a document: what stands beside its text is usually metadata."""
    if layout.kind == "text":
        return []
    beside = BESIDE[len(BELOW) :] if layout.columns[0] in (*DIALOGUES, "chosen") else BESIDE
    return [key for key in row if key not in (*layout.columns, *beside)]


def column_names() -> Iterable[str]:
    """Every name that a layout knows, for --data_mapping."""
    return dict.fromkeys([key for layout in LAYOUTS for key in layout.columns] + list(BESIDE))


# ---- values, or the error that says what was found instead


def _listed(value: object, where: str) -> list:
    value = _parsed(value, where) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise UserError(f"{where} must be a list, this is {_short(value)}")
    return value


def _parsed(text: str, where: str) -> object:
    try:
        return loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON, {_short(text)} ({error})") from None


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be text, this is {_short(value)}")
    return value


def _keys(row: dict) -> str:
    return ", ".join(f'"{key}"' for key in row) or "no keys"


def _short(value: object) -> str:
    text = repr(value)[:61]
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
