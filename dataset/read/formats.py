"""A row in any of the layouts that people use -> one canonical row of its kind.

    canonical({"instruction": "Add.", "input": "1+1", "output": "2"})
    # {"messages": [{"role": "user", "content": "Add.\\n1+1"}, {"role": "assistant", "content": "2"}]}

| kind       | canonical row                                                                     |
|------------|-----------------------------------------------------------------------------------|
| text       | {"text": text}                                                                    |
| chat       | {"messages": [...], "tools": [...]}                                               |
| preference | {"chosen": [...], "rejected": [...], "tools": [...]}, same up to the answer       |
| rated      | a chat row with "label": was this a good answer? (KTO)                            |

A message has "role" and "content", an assistant's may also have "reasoning_content", "tool_calls" ([{"name",
"arguments": {}}]) and "train": False (not trained on); "tools" is there if there are any. This file translates layouts,
dataset/read/turns.py single turns, and the check of a kind (dataset/kinds.py) then tells whether the result can be
used. Errors give the reason only: the caller knows file and line.

The columns of a row tell its layout: it is the first line of LAYOUTS whose columns are all there. To read another
layout, add a line. docs/data.md shows an example of each.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

from common.console import UserError
from dataset.kinds import KINDS
from dataset.read.turns import REASONING, listed, read_turn, said, short, text_of, unread_keys, yes_or_no

OASST_TREES = (
    "each row is one message of a tree (message_id, parent_id), and a conversation is needed; OpenAssistant's files "
    "*.trees.jsonl.gz have a whole tree in a row, which is read: unpack one with gunzip and give that"
)


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
    if _is_message_of_tree(row):
        return None
    rated = yes_or_no(row.get("label")) is not None  # else a class, which is no rating
    rating = "label" if rated else "kto_tag" if row.get("kto_tag") is not None else None
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
    if _is_message_of_tree(row):
        return OASST_TREES
    if layout is None:
        return f"{found} (docs/data.md shows all layouts, --data_mapping names columns of your own)"
    keeps = kind == "chat" and layout.kind in ("preference", "rated")
    way_out = "; `scripts/prepare_data.py --to chat` keeps its better answers" if keeps else ""
    return f"{found}: it is a {KINDS[layout.kind].needs}{way_out}"


def _is_message_of_tree(row: dict) -> bool:
    return "parent_id" in row and "message_id" in row


# ---- what the layouts have in common: who asked what, and the answer


def _document(row: dict, key: str) -> dict:
    return {"text": text_of(row[key], f'"{key}"')}


def _dialogue(row: dict, key: str) -> dict:
    """A list of turns: OpenAI's, MiniMind's, ShareGPT's, pairs of human and assistant."""
    return _with_tools(row, _with_systems(_asked(row, key), row))


def _exchange(row: dict, question: str, answer: str) -> dict:
    """One question and its answer. Alpaca: an `input` below the instruction, earlier turns in `history`. Dolly: the
    passage that is asked about in `context`."""
    reply = said(row[answer], "assistant", answer, {key: row[key] for key in REASONING if key in row})
    return _with_tools(row, _with_systems(_answered(_asked(row, question), reply, answer), row))


def _preference(row: dict, *columns: str) -> dict:
    """Two answers to a question, which is in a column of its own or at the beginning of both."""
    *asked, chosen, rejected = columns
    prompt = _asked(row, asked[0]) if asked else []
    sides, tools = {}, _tools(row)
    for name, key in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(row[key], str) and not prompt:
            raise UserError(f'"{key}" must be messages, or text beside a "prompt", this is {short(row[key])}')
        messages = _answered(prompt, said(row[key], "assistant", key), key)
        sides[name] = _with_systems(_called_as_declared(messages, tools), row)
    return sides | ({"tools": tools} if tools else {})


def _rated(row: dict, *columns: str) -> dict:
    columns, rating = columns[:-1], columns[-1]
    label = yes_or_no(row[rating])
    if label is None:
        raise UserError(f'"{rating}" must be true or false, this is {short(row[rating])}')
    return LAYOUT_OF[columns].read(row, *columns) | {"label": label}


def _tree(row: dict, key: str, _: str) -> dict:
    """OpenAssistant's trees, with all replies to a message inside it: from the question on always the best reply (its
    `rank` is the lowest), up to the last answer."""
    messages, node, where = [], row[key], key
    while node:
        if not isinstance(node, dict) or "text" not in node:
            raise UserError(f'{where} must be {{"role", "text", "replies"}}, this is {short(node)}')
        messages += read_turn({"role": node.get("role"), "content": node["text"]}, where)
        replies = [reply for reply in listed(node.get("replies") or [], f"{where}.replies") if not _is_deleted(reply)]
        node, where = min(replies, key=_rank, default=None), f"{where}.replies"
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise UserError(f'"{key}": nobody has replied')
    return {"messages": messages}


def _is_deleted(reply: object) -> bool:
    return isinstance(reply, dict) and bool(reply.get("deleted"))


def _rank(reply: object) -> float:
    rank = reply.get("rank") if isinstance(reply, dict) else None
    return rank if isinstance(rank, (int, float)) else float("inf")


def _asked(row: dict, key: str) -> list[dict]:
    if key in DIALOGUES:
        turns = row[key]
        if not isinstance(turns, list) or not turns:
            raise UserError(f'"{key}" must be a list of messages, this is {short(turns)}')
        messages = []
        for i, turn in enumerate(turns):
            messages += read_turn(turn, f"{key}[{i}]")
    elif key == "instruction" or isinstance(row[key], str):
        parts = [text_of(row[name], f'"{name}"') for name in (key, *BELOW) if row.get(name) not in NOTHING]
        messages = [{"role": "user", "content": "\n".join(parts)}]
    else:
        messages = said(row[key], "user", key)
    if history := row.get("history"):
        messages = [
            message for i, pair in enumerate(listed(history, '"history"')) for message in _past(pair, f"history[{i}]")
        ] + messages
    return messages


def _answered(asked: list[dict], answer: list[dict], where: str) -> list[dict]:
    """The question and then the answer, which may begin with the question too, with a part of it or with more."""
    if not asked or answer[0]["role"] not in ("user", "system"):
        return asked + answer
    (systems, asked), (more, answer) = _without_systems(asked), _without_systems(answer)
    n, asked_again = len(asked), 0
    if any(_alike(answer[i : i + n], asked) for i in range(len(answer) - n + 1)):
        messages = answer
    else:
        asked_again = next((k for k in range(min(n, len(answer)), 0, -1) if _alike(asked[-k:], answer[:k])), 0)
        if answer and not asked_again and asked[-1]["role"] != "assistant":
            raise UserError(
                f'"{where}" begins with another question than the one asked, {short(answer[0]["content"])}; take one '
                "of them out"
            )
        messages = asked + answer[asked_again:]
    return _joined_systems([*systems, *more], messages)


def _alike(some: list[dict], others: list[dict]) -> bool:
    """Whether these are the same messages, but for blanks around their content."""
    trimmed = ([message | {"content": str(message["content"]).strip()} for message in own] for own in (some, others))
    return next(trimmed) == next(trimmed)


def _with_systems(messages: list[dict], row: dict) -> list[dict]:
    """With what the row's own columns have for the system turn."""
    found = [text_of(row[key], f'"{key}"') for key in SYSTEM if row.get(key)]
    if not found:
        return messages
    systems, rest = _without_systems(messages)
    return _joined_systems([*found, *systems], rest)


def _without_systems(messages: list[dict]) -> tuple[list[str], list[dict]]:
    """(texts of the system turns at the beginning, the other messages)"""
    count = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return [text_of(message["content"], "a system turn") for message in messages[:count]], messages[count:]


def _joined_systems(texts: list[str], messages: list[dict]) -> list[dict]:
    """One system turn with the texts of several places, each once; nothing that somebody wrote is left out."""
    distinct: dict[str, str] = {}
    for text in texts:
        distinct.setdefault(text.strip(), text)
    return [{"role": "system", "content": "\n\n".join(distinct.values())}, *messages] if texts else messages


def _with_tools(row: dict, messages: list[dict]) -> dict:
    tools = _tools(row)
    return {"messages": _called_as_declared(messages, tools), "tools": tools} if tools else {"messages": messages}


def _tools(row: dict) -> list | None:
    """From a column of the row or, as MiniMind has it, from the first turn. Bare functions are wrapped as OpenAI's."""
    holders = [row]
    for key in (*DIALOGUES, "prompt", "chosen"):
        if isinstance(row.get(key), list) and row[key] and isinstance(row[key][0], dict):
            holders.append(row[key][0])
    bare = lambda tool: isinstance(tool, dict) and "name" in tool and "function" not in tool
    found = [
        [{"type": "function", "function": tool} if bare(tool) else tool for tool in listed(holder[key], '"tools"')]
        for holder in holders
        for key in ("tools", "functions")
        if holder.get(key)
    ]
    if any(tools != found[0] for tools in found):
        raise UserError("the tools stand in two places and differ")
    return found[0] if found else None


def _called_as_declared(messages: list[dict], tools: list | None) -> list[dict]:
    """Without the arguments that are null and that the called tool does not have. Arrow (Parquet, `datasets`) gives
    each object of a column the keys of all others; a model that learns these calls every tool with every argument."""
    declared = _parameters(tools)
    if not any(_undeclared(call, declared) for message in messages for call in message.get("tool_calls", ())):
        return messages
    found = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            left_out = _undeclared(call, declared)
            calls.append(call | {"arguments": {k: v for k, v in call["arguments"].items() if k not in left_out}})
        found.append(message | {"tool_calls": calls} if calls else message)
    return found


def _parameters(tools: list | None) -> dict[str, set[str]]:
    """Names of the tools that declare parameters -> the parameters' names."""
    found: dict[str, set[str]] = {}
    for tool in tools or ():
        function = tool.get("function") if isinstance(tool, dict) else None
        parameters = function.get("parameters") if isinstance(function, dict) else None
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        if isinstance(function, dict) and isinstance(properties, dict):
            found[str(function.get("name"))] = {key for key, value in properties.items() if value is not None}
    return found


def _undeclared(call: dict, declared: dict[str, set[str]]) -> list[str]:
    if call["name"] not in declared:
        return []
    return [key for key, value in call["arguments"].items() if value is None and key not in declared[call["name"]]]


def _past(pair: object, where: str) -> list[dict]:
    if not isinstance(pair, list) or len(pair) != 2:
        raise UserError(f"{where} must be [question, answer], this is {short(pair)}")
    return said(pair[0], "user", where) + said(pair[1], "assistant", where)


# ---- the table


DIALOGUES = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "query", "question")
SYSTEM = ("system", "system_prompt")
BELOW = ("input", "context")  # what a question is about; put below it
NOTHING = (None, "", [], {})  # nobody has written 0 by chance

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
    Layout("chat", ("prompt", "message_tree_id"), _tree),
    Layout("text", ("text",), _document),
)
LAYOUT_OF = {layout.columns: layout for layout in LAYOUTS}
BESIDE = (*BELOW, "history", *SYSTEM, "tools", "functions", *REASONING)


def unread(row: dict, layout: Layout) -> list[str]:
    """Columns, and keys of turns, that are not read. None of a document: beside its text is usually metadata."""
    if layout.kind == "text":
        return []
    beside = BESIDE[len(BELOW) :] if layout.columns[0] in (*DIALOGUES, "chosen") else BESIDE
    found = [key for key in row if key not in (*layout.columns, *beside)]
    for column in layout.columns if layout.read != _tree else ():
        turns = row[column] if isinstance(row[column], list) else [row[column]]
        found += dict.fromkeys(f"{column}[].{key}" for turn in turns for key in unread_keys(turn))
        found += dict.fromkeys(f"{column}[].tool_calls[].{key}" for key in _null_arguments(turns, row))
    return found


def _null_arguments(turns: list, row: dict) -> list[str]:
    """The arguments that `_called_as_declared` leaves out of these turns."""
    try:
        declared = _parameters(_tools(row))
        calls = [
            call
            for turn in turns
            if declared and isinstance(turn, dict)
            for message in read_turn(turn, "")
            for call in message.get("tool_calls", ())
        ]
    except UserError:  # reported when the row is read
        return []
    return [key for call in calls for key in _undeclared(call, declared)]


def column_names() -> Iterable[str]:
    """Every name that a layout knows, for --data_mapping."""
    return dict.fromkeys([key for layout in LAYOUTS for key in layout.columns] + [*BESIDE, "label", "kto_tag"])


def _keys(row: dict) -> str:
    return ", ".join(f'"{key}"' + " (null)" * (value is None) for key, value in row.items()) or "no keys"
