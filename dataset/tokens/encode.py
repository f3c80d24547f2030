"""Canonical rows -> token ids, and what is kept of each row beside its ids.

    block = encode_conversations([(1, {"messages": [...]})], tokenizer)     # (line in the file, row)
    block.tokens, block.lengths, block.columns["trained"]

There is one function for each kind of data; dataset/kinds.py names them. They expect rows that have passed the check of
their kind. n = entries of a block, N = ids of all of them together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from common.console import UserError
from dataset.read.pairs import encode_pairs
from tokenizer.chat import encode_chats
from tokenizer.text import Tokenizer

Rows = Sequence[tuple[int, dict]]  # (line, canonical row)
BadRow = tuple[int, str, bytes]  # line, reason, the row
PIECE = 1 << 18  # characters of one text that are tokenised together


@dataclass
class Block:
    """The entries that some consecutive rows of a file become."""

    tokens: np.ndarray  # (N,) ids of all entries, one entry after the other
    lengths: np.ndarray  # (n,) int64, ids of each entry
    lines: np.ndarray  # (n,) int64, where each entry's row begins in the file
    trained_tokens: int  # how many of the ids are trained on
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # more of each id or entry: dataset/kinds.py
    empty: list[int] = field(default_factory=list)  # lines of rows that have nothing to train on
    bad: list[BadRow] = field(default_factory=list)  # rows that cannot be encoded, or could not be read


def encode_texts(rows: Rows, tokenizer: Tokenizer) -> Block:
    """Documents: each is what opens it and then the ids of its text."""
    kept = [(line, row["text"]) for line, row in rows if row["text"].strip()]
    opens = opening(tokenizer)
    ids = [[*opens, *own] for own in _encode_long([text for _, text in kept], tokenizer)]
    block = _block(ids, [line for line, _ in kept], tokenizer)
    block.empty = [line for line, row in rows if not row["text"].strip()]
    return block


def encode_pieces(rows: Rows, tokenizer: Tokenizer) -> Block:
    """Consecutive pieces of one document: ids of text only. `open_document` is written before the first piece."""
    return _block(_encode_long([row["text"] for _, row in rows], tokenizer), [line for line, _ in rows], tokenizer)


def open_document(tokenizer: Tokenizer) -> Block:
    return _block([opening(tokenizer)], [1], tokenizer)


def opening(tokenizer: Tokenizer) -> list[int]:
    """What stands before each document: <|endoftext|>, which ends the one before, and what the tokenizer puts before a
    text, if it puts something there (Llama, GLM): with that, too, a text begins that the model shall continue."""
    return list(dict.fromkeys([tokenizer.end_of_text, *tokenizer.start_of_text]))


def encode_conversations(rows: Rows, tokenizer: Tokenizer) -> Block:
    """Conversations: ids up to the last one that is trained on, since nothing can be learned from what follows it."""
    lines, ids, masks, answers, empty, bad = [], [], [], [], [], []
    chats = encode_chats(tokenizer, [(row["messages"], row.get("tools")) for _, row in rows])
    for (line, row), encoded in zip(rows, chats):
        if isinstance(encoded, UserError):
            bad.append(_bad(line, row, encoded))
            continue
        trained = np.array(encoded.trained, np.uint8)
        if not trained[1:].any():  # the first id of a sequence is never predicted
            empty.append(line)
            continue
        end = _after_last(trained)
        lines.append(line)
        ids.append(encoded.ids[:end])
        masks.append(trained[:end])
        answers.append(_after_last(trained[:end] == 0))
    counts = np.array([mask[1:].sum() for mask in masks], np.int32)
    block = _block(ids, lines, tokenizer)
    block.trained_tokens, block.empty, block.bad = int(counts.sum()), empty, bad
    block.columns = {"trained": _concatenated(masks), "counts": counts, "answers": np.array(answers, np.int32)}
    return block


def encode_preferences(rows: Rows, tokenizer: Tokenizer) -> Block:
    """Pairs: the prompt, the chosen answer and the rejected answer of each, one after the other."""
    lines, pairs, bad = [], [], []
    for (line, row), pair in zip(rows, encode_pairs(tokenizer, [row for _, row in rows])):
        if isinstance(pair, UserError):
            bad.append(_bad(line, row, pair))
            continue
        lines.append(line)
        pairs.append(pair)
    block = _block([pair.ids for pair in pairs], lines, tokenizer)
    trained = _concatenated([pair.trained.astype(np.uint8) for pair in pairs])
    block.trained_tokens, block.bad = int(trained.sum(dtype=np.int64)), bad
    prompts, chosen = (np.array([getattr(pair, name) for pair in pairs], np.int32) for name in ("prompt", "chosen"))
    block.columns = {"trained": trained, "prompts": prompts, "chosen": chosen}
    return block


def pieces(text: str) -> list[str]:
    """The text in parts of at most PIECE characters, cut at line ends where there are any. This bounds the memory."""
    parts = []
    while len(text) > PIECE:
        cut = text.rfind("\n", 0, PIECE) + 1 or PIECE
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def _encode_long(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    parts = [pieces(text) for text in texts]
    encoded = iter(tokenizer.encode_batch(list(chain.from_iterable(parts))))
    return [list(chain.from_iterable(next(encoded) for _ in own)) for own in parts]


def _block(ids: Sequence[Sequence[int]], lines: list[int], tokenizer: Tokenizer) -> Block:
    """A block of entries whose every id is trained on."""
    lengths = np.array([len(own) for own in ids], np.int64)
    total = int(lengths.sum())
    tokens = np.fromiter(chain.from_iterable(ids), token_dtype(tokenizer), total)
    return Block(tokens, lengths, np.array(lines, np.int64), trained_tokens=total)


def _bad(line: int, row: dict, error: UserError) -> BadRow:
    return line, str(error), json.dumps(row, ensure_ascii=False).encode()


def _after_last(mask: np.ndarray) -> int:
    """The index after the last element that is set, 0 where there is none."""
    found = np.flatnonzero(mask)
    return int(found[-1]) + 1 if len(found) else 0


def _concatenated(masks: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(masks) if masks else np.empty(0, np.uint8)
