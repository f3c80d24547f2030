"""Conversations in which the assistant may think first. The tags around thoughts and answers weigh more than words.

    ds = ReasonDataset("dataset/reason.jsonl", tokenizer, max_seq_len=1024, tag_weight=10)
    ds.extras(7)["weight"]     # (n,) fp32: 10 for <think> </think> <answer> </answer>, 1 for other trained tokens, or 0

A tag is markup at the beginning, in the middle or at the end of an answer (tokenizer/chat.py), never a word that looks
like it. In our tokenizer each tag is one token. A foreign tokenizer may spell it in several tokens, `<` `th` `ink` `>`.
These also occur in ordinary text, so the tag is found by its place in the answer and not by its ids.

As in every conversation, an answer is trained on whole or not at all. So no thought is learned without its end: if
max_seq_len does not hold the last answer, the example is left out and counted in `summary`.
"""

from __future__ import annotations

import re
from itertools import accumulate

import numpy as np

from dataset.tokens.examples import SFTDataset
from tokenizer.text import Tokenizer

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SPELLED = re.compile(rb"\s*(<think>).*?(</think>)(?:\s*(<answer>).*(</answer>))?", re.DOTALL)
SAMPLE = 1000  # examples in which thoughts are looked for


class ReasonDataset(SFTDataset):
    """SFTDataset, with the `weight` of each token as an extra."""

    def __init__(self, paths, tokenizer: Tokenizer, *, tag_weight: float = 10.0, **options):
        super().__init__(paths, tokenizer, **options)
        self.tokenizer, self.tag_weight = tokenizer, tag_weight

    def _extras(self, example: int) -> dict[str, np.ndarray]:
        ids, trained = self._read(example)
        tags = find_tags(self.tokenizer, ids, trained)
        return {"weight": np.where(tags, self.tag_weight, trained).astype(np.float32)}

    def thoughts(self) -> tuple[int, int]:
        """(examples with a thought, examples looked at)"""
        seen = self.order[np.unique(np.linspace(0, len(self) - 1, SAMPLE).astype(int))].tolist()
        return sum(bool(find_tags(self.tokenizer, *self._read(i)).any()) for i in seen), len(seen)


def find_tags(tokenizer: Tokenizer, ids: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """(n,) ids, (n,) bool -> (n,) bool: the trained tokens that are a tag, or a part of one."""
    single = [tokenizer.control[tag] for tag in TAGS if tag in tokenizer.control]
    found = np.isin(ids, single) & trained
    if len(single) == len(TAGS):
        return found
    edges = np.flatnonzero(np.diff(trained, prepend=False, append=False)).tolist()
    for begin, end in zip(edges[::2], edges[1::2]):  # one answer each
        pieces = tokenizer.bytes_of(ids[begin:end])
        stops = list(accumulate(map(len, pieces)))
        match = SPELLED.match(b"".join(pieces))
        if match is None:
            continue
        for group, tag in enumerate(TAGS, start=1):
            if tag in tokenizer.control or match[group] is None:
                continue
            for i, (piece, stop) in enumerate(zip(pieces, stops), start=begin):
                found[i] |= stop > match.start(group) and stop - len(piece) < match.end(group)
    return found
