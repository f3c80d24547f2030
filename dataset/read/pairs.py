"""A preference -> ids: the prompt that both answers share, once, and the two answers with their trained positions.

    row = {"chosen": [user, assistant], "rejected": [user, other_assistant]}   # canonical, from dataset/read/formats.py
    check_pair(row)
    (pair,) = encode_pairs(tokenizer, [row])
    prompt, chosen = pair.ids[:pair.prompt], pair.ids[pair.prompt:pair.prompt + pair.chosen]

Both conversations are encoded like any other (tokenizer/chat.py). The answers begin with the first assistant's turn
that differs. The turns before it are context: they are the same on both sides, so nothing can be learned from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common.console import UserError
from tokenizer.chat import Encoded, encode_chats
from tokenizer.messages import check_messages
from tokenizer.text import Tokenizer


class Pair(NamedTuple):
    ids: np.ndarray  # (n,) prompt, chosen answer, rejected answer
    trained: np.ndarray  # (n,) bool; False in the whole prompt
    prompt: int  # ids of the prompt
    chosen: int  # ids of the chosen answer


def check_pair(row: dict) -> None:
    """UserError unless the two conversations are well-formed and end with different answers to the same prompt."""
    chosen, rejected, tools = row["chosen"], row["rejected"], row.get("tools")
    check_messages(chosen, tools)
    check_messages(rejected, tools)
    if chosen == rejected:
        raise UserError("chosen equals rejected: there is nothing to prefer")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise UserError(f"{name} must end with an assistant's answer, it ends with {_short(messages[-1])}")
        if same == len(messages):
            raise UserError(f"{name} has no answer of its own: the other side begins with all of it and goes on")
        for i, message in enumerate(messages[same:], start=same):
            if message["role"] in ("user", "system"):
                raise UserError(f"the prompts differ: {name}[{i}] is {_short(message)}, which the other side lacks")
        if not any(message["role"] == "assistant" and message.get("train", True) for message in messages[same:]):
            raise UserError(f"{name}: its answer is marked as one that is not trained on")


def encode_pairs(tokenizer: Tokenizer, rows: Sequence[dict]) -> list[Pair | UserError]:
    """Checked rows -> pairs. A row that is no pair in this tokenizer's chat format gives the error instead."""
    sides = [(row[side], row.get("tools")) for row in rows for side in ("chosen", "rejected")]
    found = encode_chats(tokenizer, sides)
    return [_pair(chosen, rejected) for chosen, rejected in zip(found[::2], found[1::2])]


def _pair(chosen: Encoded | UserError, rejected: Encoded | UserError) -> Pair | UserError:
    if isinstance(chosen, UserError):
        return chosen
    if isinstance(rejected, UserError):
        return rejected
    sides = [(np.array(ids), np.array(trained, bool)) for ids, trained in (chosen, rejected)]
    (a, _), (b, _) = sides
    if np.array_equal(a, b):
        return UserError("chosen and rejected are the same in this tokenizer's chat format: there is nothing to prefer")
    n = min(len(a), len(b))
    differ = int(np.append(np.flatnonzero(a[:n] != b[:n]), n)[0])  # the first place where the sides differ
    # The answers begin after the last untrained id, looked for up to where the sides differ. On one side a single token
    # may hold the end of the header and the beginning of the answer. So the earlier of the two places ends the prompt.
    prompt = min(differ, *(_after_last(~trained[: differ + 1]) for _, trained in sides))
    ids, masks = [a[:prompt]], [np.zeros(prompt, bool)]
    for own, trained in sides:
        stop = _after_last(trained)  # nothing can be learned from what follows
        if not prompt or stop <= prompt:
            return UserError("an answer has nothing to train on in this tokenizer's chat format")
        ids.append(own[prompt:stop])
        masks.append(trained[prompt:stop])
    return Pair(np.concatenate(ids), np.concatenate(masks), prompt, len(ids[1]))


def _after_last(mask: np.ndarray) -> int:
    """The index after the last True, 0 where there is none."""
    return int(np.append(0, np.flatnonzero(mask) + 1)[-1])


def _short(message: dict) -> str:
    text = f"{message['role']}: {message['content']!r}"
    return text[:60] + "..." * (len(text) > 60)
