"""The kinds of data. Everything that depends on the kind of a row is in this table.

    kind = KINDS["chat"]
    kind.check(row)                         # a canonical row, dataset/read/formats.py; UserError if it cannot be used
    block = kind.encode([(1, row)], tokenizer)
    kind.lengths(block.lengths, block.columns)

A new kind of data is a row here, the layouts it comes in (dataset/read/formats.py), and a data set, which states the
kind it reads: `class SFTDataset(EntryDataset): kind = "chat"`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from common.console import UserError
from dataset.read.pairs import check_pair
from dataset.tokens.encode import Block, Rows, encode_conversations, encode_pieces, encode_preferences, encode_texts
from dataset.tokens.lengths import Columns, Lengths, conversation_lengths, document_lengths, pair_lengths
from tokenizer.messages import check_messages, never_closed
from tokenizer.text import Tokenizer


def check_text(row: dict) -> None:
    """The reader has made sure that it is text."""


def check_rated(row: dict) -> None:
    check_messages(row["messages"], row.get("tools"))


def check_chat(row: dict) -> None:
    check_messages(row["messages"], row.get("tools"))
    for i, message in enumerate(row["messages"]):
        if message["role"] == "assistant" and (tag := never_closed(message)):
            raise UserError(
                f"messages[{i}] (assistant): begins with {tag}, which never ends; a model that learns from it would "
                "not end it either: complete the row or take it out"
            )


@dataclass(frozen=True)
class Kind:
    needs: str  # what a row must have, in words
    check: Callable[[dict], None]  # canonical row -> UserError with the reason, if it cannot be used
    encode: Callable[[Rows, Tokenizer], Block]  # checked rows -> ids
    lengths: Callable[[np.ndarray, Columns], Lengths]  # ids of each entry, columns -> what has to fit into max_seq_len
    columns: dict[str, type] = field(default_factory=dict)  # in the token cache, beside the ids: name -> type
    stream: bool = False  # training cuts one stream into rows; else each entry is an example
    sequences: int = 1  # that a model reads of each entry
    trained: bool = True  # whether there is a stage that trains on it
    max_seq_len: int = 512  # of that stage by default
    batch_size: int = 16  # likewise


CONVERSATION = {
    "trained": np.uint8,  # of each id: is it trained on?
    "counts": np.int32,  # of each entry: how many ids are trained on
    "answers": np.int32,  # of each entry: where its last answer begins
}
PAIR = {
    "trained": np.uint8,  # of each id: is it trained on?
    "prompts": np.int32,  # of each entry: ids of the prompt
    "chosen": np.int32,  # of each entry: ids of the chosen answer; the rejected one is the rest
}
CONVERSATION_NEEDS = 'conversation ("conversations", "messages", "instruction", ...)'

KINDS = {
    "text": Kind('"text"', check_text, encode_texts, document_lengths, stream=True),
    # a .txt file: one document, read in pieces
    "plain": Kind("text", check_text, encode_pieces, document_lengths, stream=True),
    "chat": Kind(CONVERSATION_NEEDS, check_chat, encode_conversations, conversation_lengths, CONVERSATION),
    "preference": Kind(
        'pair of "chosen" and "rejected"',
        check_pair,
        encode_preferences,
        pair_lengths,
        PAIR,
        sequences=2,
        max_seq_len=1024,
        batch_size=4,
    ),
    "rated": Kind(
        'rated answer ("label", true or false)',
        check_rated,
        encode_conversations,
        conversation_lengths,
        CONVERSATION,
        trained=False,
    ),
}
