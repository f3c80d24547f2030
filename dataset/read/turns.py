"""One turn of a conversation, as people write it -> canonical messages. Also values, or the error about them.

    read_turn({"from": "gpt", "value": "2", "weight": 0}, "conversations[1]")
    # [{"role": "assistant", "content": "2", "train": False}]

`where` names the place in the row, for errors.
"""

from __future__ import annotations

from common.console import UserError
from dataset.read.parse import loads
from tokenizer.messages import ROLES as CANONICAL

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
MARKS = ("train", "training", "trainable", "weight", "loss_weight", "loss")  # 0: do not train on this turn
DETAILS = ("train_detail", "training_detail")  # axolotl's: which characters of a turn to train on
PAIRED = (("human", "assistant"), ("user", "assistant"), ("input", "output"))  # inside one turn of a dialogue
READ = (
    *("role", "from", "content", "value", "tool_calls", "function_call", "tools", "functions"),
    *(*REASONING, *MARKS, *DETAILS),
)
YES_OR_NO = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def said(value: object, role: str, where: str, more: dict | None = None) -> list[dict]:
    """Text, one message or a list of them -> messages. more: keys of the message, where the value is text."""
    if isinstance(value, str):
        return [read_message({"role": role, "content": value} | (more or {}), where)]
    if isinstance(value, dict):
        return read_turn(value, where)
    if not isinstance(value, list) or not value:
        raise UserError(f'"{where}" must be text or a list of messages, this is {short(value)}')
    return [message for i, turn in enumerate(value) for message in read_turn(turn, f"{where}[{i}]")]


def read_turn(turn: object, where: str) -> list[dict]:
    """One message, or a question and its answer."""
    if isinstance(turn, dict):
        if "role" in turn or "from" in turn:
            message = read_message(turn, where)
            if message["role"] not in CANONICAL:
                raise UserError(
                    f"{where}: role must be one of {', '.join(CANONICAL)}, found {message['role']!r}; --data_mapping "
                    "says what roles of yours mean"
                )
            return [message]
        if paired := _paired(turn):
            asked, answered = paired
            system = [{"role": "system", "content": turn["system"]}] if turn.get("system") else []
            about = {key: turn[key] for key in (*REASONING, *MARKS, *DETAILS) if key in turn}
            return system + said(turn[asked], "user", where) + said(turn[answered], "assistant", where, about)
    raise UserError(f'{where} must be {{"role", "content"}} or {{"from", "value"}}, this is {short(turn)}')


def _paired(turn: dict) -> tuple[str, str] | None:
    return next(((asked, answered) for asked, answered in PAIRED if asked in turn and answered in turn), None)


def unread_keys(turn: object) -> list[str]:
    """Keys of a turn that have a value and are not read."""
    if not isinstance(turn, dict):
        return []
    paired = () if "role" in turn or "from" in turn else (*(_paired(turn) or ()), "system")
    return [key for key, value in turn.items() if value is not None and key not in READ and key not in paired]


def read_message(turn: dict, where: str, *, repair: bool = True) -> dict:
    """A turn that says its role. repair: a </think> that nothing opens ends a thought, as templates leave it in
    training data; without, it is text."""
    role = turn["role"] if "role" in turn else turn["from"]
    content = turn["content"] if "content" in turn else turn.get("value")
    if len(turn) == 2 and isinstance(content, str) and isinstance(role, str) and role not in CALLS:
        role = ROLES.get(role, role)
        if role != "assistant" or not (content.isspace() or not content or "</think>" in content):
            return {"role": role, "content": content}  # nearly every turn ends here
    calls, thoughts = turn.get("tool_calls") or turn.get("function_call"), []
    for key in REASONING:
        if turn.get(key):
            thoughts.append(text_of(turn[key], f'{where}: "{key}"'))
    if isinstance(content, list):
        content, thought, called = _parts(content, where)
        thoughts.append(thought)
        calls = calls or called
    thoughts = [thought for thought in thoughts if thought.strip()]
    if isinstance(role, str) and role in CALLS:
        role, content, calls = "assistant", "", content
    message = {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": content}
    if calls:
        calls = parsed(calls, f"{where}.tool_calls") if isinstance(calls, str) else calls
        calls = calls if isinstance(calls, list) else [calls]
        message["tool_calls"] = [_call(call, f"{where}.tool_calls") for call in calls]
        if content is None:
            message["content"] = ""
    if message["role"] == "assistant" and isinstance(content, str):
        message["content"], thoughts = _one_thought(content, thoughts, where, repair)
    if len({thought.strip() for thought in thoughts}) > 1:
        raise UserError(f"{where}: two different thoughts, {short(thoughts[0])} and {short(thoughts[1])}; keep one")
    if thoughts:
        message["reasoning_content"] = thoughts[0]
    if message["role"] == "assistant" and isinstance(content, str) and not (content.strip() or thoughts or calls):
        raise UserError(f"{where}: the assistant says nothing")
    trained = _trained(turn, message["role"], where)
    return message if trained or message["role"] != "assistant" else message | {"train": False}


def _one_thought(content: str, thoughts: list[str], where: str, repair: bool) -> tuple[str, list[str]]:
    """(content, thoughts) of an assistant's turn: the content begins with its thought, or `thoughts` has it.

    Templates that end a prompt with <think> leave only </think> in the answer. And servers that put the thought into a
    field of its own may leave it in the content too.
    """
    before, end, answer = content.partition("</think>")
    opened = before.lstrip().startswith("<think>")
    if not end or (not opened and (not repair or "<think>" in before or before[-1:] in ("`", "'", '"'))):
        return content, thoughts  # no thought, or words about the tags
    thought = before.lstrip().removeprefix("<think>")
    if thoughts and (opened or thought.strip() == thoughts[0].strip()):
        return answer.lstrip("\n"), [*thoughts, thought] if thought.strip() else thoughts
    if thoughts or opened:
        return content.lstrip() if opened else content, thoughts
    if before and before[-1] != "\n" and answer[:1] != "\n":
        raise UserError(
            f'{where}: "</think>" without a "<think>" before it; add the "<think>", or put the thought into '
            '"reasoning_content"'
        )
    return "<think>\n" + content, thoughts


def _trained(turn: dict, role: object, where: str) -> bool:
    """What the turn's own marks say about training on it; True without any."""
    marks = {}
    for key in MARKS:
        if turn.get(key) is None:
            continue
        marks[key] = yes_or_no(turn[key])
        if marks[key] is None:
            raise UserError(f'{where}: "{key}" must be 0 or 1, this is {short(turn[key])}: a turn is trained on or not')
        if marks[key] and role != "assistant":
            raise UserError(
                f'{where} ({role}): "{key}": {turn[key]!r} asks to train on this turn; only an assistant\'s can be: '
                "take the key out"
            )
    if len(set(marks.values())) > 1:
        raise UserError(f"{where}: {' and '.join(map(repr, marks))} contradict each other")
    for key in DETAILS:
        if turn.get(key):
            raise UserError(f'{where}: "{key}" chooses parts of a turn; a turn is trained on whole or not at all')
    return all(marks.values())


def _parts(parts: list, where: str) -> tuple[str, str, list]:
    """Content in parts -> (text, reasoning, calls). A part has its words in "value", in "text" or under its type."""
    found = {"text": [], "reasoning": [], "tool_call": []}
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else None
        name = PARTS.get(kind) if isinstance(kind, str) else None
        if name is None:
            raise UserError(f"{where}: only text can be read, this part is {short(part)}")
        words = next((part[key] for key in ("value", str(kind), "text") if key in part), None)
        if name == "tool_call":
            words = parsed(words, f"{where}: the call") if isinstance(words, str) else words
        found[name].append(words if name == "tool_call" else text_of(words, f"{where}: a part"))
    return "".join(found["text"]), "\n".join(found["reasoning"]), found["tool_call"]


def _call(call: object, where: str) -> dict:
    """{"name", "arguments"}, bare or in OpenAI's {"type", "function": ...}; the arguments may be a JSON string."""
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(f'{where}: a call must be {{"name", "arguments"}}, this is {short(call)}')
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parsed(arguments or "{}", f"{where}: the arguments")
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: the arguments must be an object, this is {short(arguments)}")
    return {"name": call["name"], "arguments": arguments}


# ---- values, or the error that says what was found instead


def yes_or_no(value: object) -> bool | None:
    """True or False where the value means that: a bool, 0 or 1, or one of these in text. Else None."""
    return YES_OR_NO.get(str(value).strip().lower()) if isinstance(value, (bool, int, float, str)) else None


def listed(value: object, where: str) -> list:
    value = parsed(value, where) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise UserError(f"{where} must be a list, this is {short(value)}")
    return value


def parsed(text: str, where: str) -> object:
    try:
        return loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON, {short(text)} ({error})") from None


def text_of(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be text, this is {short(value)}")
    return value


def short(value: object) -> str:
    text = repr(value)[:61]
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
