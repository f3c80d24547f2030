"""How long an example is, what is cut of one that is too long, and which examples are left out.

    ids       p p p p p p | a a a a      a prompt of 6 ids and an answer of 4
    inputs    p p p p p   p a a a        10 ids are 9 positions: every id but the last is an input,
    targets   p p p p p   a a a a        every id but the first is a target

So rows of `max_seq_len` positions hold examples of at most max_seq_len + 1 ids. A longer one loses the beginning of its
prompt. Its answer is never cut: where that does not fit with at least one id of the prompt before it, the example is
left out. With max_seq_len 6, `p p p a a a a` stays of the one above.

In a conversation of several turns the last answer counts, and everything before it is its prompt. A pair of answers is
as long as its prompt with the longer answer; both lose the same part of their prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Columns = Mapping[str, np.ndarray]  # of a token cache, by name: dataset/kinds.py


class Lengths(NamedTuple):
    """Of n entries, in ids; integers (n,)."""

    prompt: np.ndarray  # what may be cut
    answer: np.ndarray  # what must stay whole: the last answer, of a pair the longer one
    total: np.ndarray  # the entry; of a pair its prompt and both answers


class Fit(NamedTuple):
    kept: np.ndarray  # (n,) bool: the entry is trained on
    cut: np.ndarray  # (n,) ids that its prompt loses, 0 where it is short enough


def document_lengths(ids: np.ndarray, columns: Columns) -> Lengths:
    return Lengths(np.zeros_like(ids), ids, ids)


def conversation_lengths(ids: np.ndarray, columns: Columns) -> Lengths:
    return Lengths(columns["answers"], ids - columns["answers"], ids)


def pair_lengths(ids: np.ndarray, columns: Columns) -> Lengths:
    prompt, chosen = columns["prompts"], columns["chosen"]
    return Lengths(prompt, np.maximum(chosen, ids - prompt - chosen), ids)


def fit(lengths: Lengths, max_seq_len: int, *, max_prompt_length: int = 0, on_long: str = "truncate") -> Fit:
    """max_prompt_length: cut longer prompts in any case (0: only what does not fit). on_long "drop": cut nothing and
    leave out every entry that is too long."""
    room = np.minimum(max_seq_len + 1 - lengths.answer, max_prompt_length or max_seq_len)  # ids left for the prompt
    cut = np.maximum(lengths.prompt - room, 0)
    kept = (cut == 0) | (room >= 1) if on_long == "truncate" else cut == 0
    return Fit(kept, cut)
