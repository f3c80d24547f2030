"""A preference -> ids: the prompt that both answers share, once, and the two answers with their trained positions.

    row = {"chosen": [user, assistant], "rejected": [user, other_assistant]}   # canonical, from dataset/read/formats.py
    check_pair(row)
    (pair,) = encode_pairs(tokenizer, [row])
    prompt, chosen = pair.ids[:pair.prompt], pair.ids[pair.prompt:pair.prompt + pair.chosen]

Both conversations are encoded as ever (tokenizer/chat.py); the answers begin where the first assistant's turn that
differs begins. Turns before it are context: they say the same on both sides, so nothing can be learned from them.
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
    ids: np.ndarray  # prompt, chosen, rejected
    trained: np.ndarray  # bool, of each id; never in the prompt
    prompt: int  # ids of the prompt
    chosen: int  # ids of the chosen answer


def check_pair(row: dict) -> None:
    """ValueError for two conversations that are no choice between two answers to the same prompt."""
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
            raise UserError(f"{name} has no answer of its own: the other side goes on where it ends")
        for i, message in enumerate(messages[same:], start=same):
            if message["role"] in ("user", "system"):
                raise UserError(f"the prompts differ: {name}[{i}] is {_short(message)}, after the sides have parted")


def encode_pairs(tokenizer: Tokenizer, rows: Sequence[dict]) -> list[Pair | str]:
    """Checked rows -> pairs, or the reason why a row is none."""
    try:
        sides = [(row[side], row.get("tools")) for row in rows for side in ("chosen", "rejected")]
        found = encode_chats(tokenizer, sides)
    except ValueError as error:  # of a foreign template: find out whose it is
        return [str(error)] if len(rows) == 1 else [encode_pairs(tokenizer, [row])[0] for row in rows]
    return [_pair(*both) for both in zip(found[::2], found[1::2])]


def _pair(chosen: Encoded, rejected: Encoded) -> Pair | str:
    sides = [(np.array(ids), np.array(trained, bool)) for ids, trained in (chosen, rejected)]
    (a, _), (b, _) = sides
    if np.array_equal(a, b):
        return "chosen and rejected are the same in this tokenizer's chat format: there is nothing to prefer"
    n = min(len(a), len(b))
    parted = int(np.append(np.flatnonzero(a[:n] != b[:n]), n)[0])
    # An answer begins after the last id up to the parting that is not trained on. Where a header and its answer share a
    # token, that may be one side's only, and what follows the parting is no prompt for both.
    prompt = min(parted, *(_after_last(~trained[: parted + 1]) for _, trained in sides))
    ids, masks = [a[:prompt]], [np.zeros(prompt, bool)]
    for own, trained in sides:
        stop = _after_last(trained)  # what follows can teach nothing
        if not prompt or stop <= prompt:
            return "an answer has nothing to train on in this tokenizer's chat format"
        ids.append(own[prompt:stop])
        masks.append(trained[prompt:stop])
    return Pair(np.concatenate(ids), np.concatenate(masks), prompt, len(ids[1]))


def _after_last(mask: np.ndarray) -> int:
    """The index after the last True, 0 where there is none."""
    return int(np.append(0, np.flatnonzero(mask) + 1)[-1])


def _short(message: dict) -> str:
    text = f"{message['role']}: {message['content']!r}"
    return text[:60] + "..." * (len(text) > 60)
