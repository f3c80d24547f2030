"""How long a file's rows are in tokens, and what follows for training: cuts, packing, a length to choose.

    statistics = TokenStatistics("chat", tokenizer, max_seq_len=512, batch_size=16)
    statistics.add([(1, {"messages": [...]})])          # as often as one likes, with a sample of the rows
    statistics.summary(exact=False, of=10_000_000)

The rules are those of dataset/lm_dataset.py: a conversation of n ids is n - 1 positions, what is too long is cut from
the left as long as its last answer fits, else it is left out. Of a pair each side counts as one conversation.
"""

from __future__ import annotations

import numpy as np

from dataset.packing import pack
from dataset.token_cache import encode_conversations, encode_texts
from tokenizer.text import Tokenizer

STEP = 64  # suggested lengths are multiples of it
SUGGEST_FOR = 0.99  # of the conversations


class TokenStatistics:
    def __init__(self, kind: str, tokenizer: Tokenizer, max_seq_len: int, batch_size: int):
        self.kind, self.tokenizer, self.max_seq_len, self.batch_size = kind, tokenizer, max_seq_len, batch_size
        self.lengths: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []  # trained tokens
        self.answers: list[np.ndarray] = []  # where the last answer starts

    def add(self, rows: list[tuple[int, dict]]) -> list[tuple[int, str, bytes]]:
        """Tokenises these; what the chat template refused: (line, reason, row)."""
        bad: list[tuple[int, str, bytes]] = []
        if self.kind in ("text", "plain"):
            block = encode_texts(rows, bad, self.tokenizer, opens=self.kind == "text")
            self.counts.append(block.lengths)
        else:
            rows = [(line, side) for line, row in rows for side in _sides(row)]
            block = encode_conversations(rows, bad, self.tokenizer)
            self.counts.append(block.counts)
            self.answers.append(block.answers)
        self.lengths.append(block.lengths)
        return bad

    def summary(self, exact: bool, of: int) -> dict:
        lengths = np.concatenate(self.lengths) if self.lengths else np.empty(0, np.int64)
        if not len(lengths):
            return {}
        counts, total = np.concatenate(self.counts), int(lengths.sum())
        found = {
            "exact": exact, "sampled": len(lengths), "total": total, "trained_share": float(counts.sum() / total),
            "median": int(np.median(lengths)), "p90": int(np.quantile(lengths, 0.9)),
            "p99": int(np.quantile(lengths, 0.99)), "max": int(lengths.max()), "histogram": _histogram(lengths),
            "max_seq_len": self.max_seq_len,
        }  # fmt: skip
        return found | (self._stream(lengths) if self.kind in ("text", "plain") else self._packed(lengths))

    def _stream(self, lengths: np.ndarray) -> dict:
        """Pretraining cuts one stream into rows; a row a document, filled up, would take these instead."""
        rows, padded = -(-lengths.sum() // self.max_seq_len), (-(-lengths // self.max_seq_len)).sum()
        return {"rows": int(rows), "rows_padded": int(padded)}

    def _packed(self, lengths: np.ndarray) -> dict:
        """Conversations: packed step by step, against one in a row, filled up."""
        most, answers = self.max_seq_len + 1, np.concatenate(self.answers)
        fits = lengths <= most
        kept = fits | (answers > lengths - most)
        positions = np.minimum(lengths[kept], most) - 1
        steps = [positions[i:i + self.batch_size] for i in range(0, len(positions), self.batch_size)]
        wanted = np.quantile(lengths - 1, SUGGEST_FOR, method="higher")
        return {
            "cut": int((kept & ~fits).sum()), "left_out": int((~kept).sum()), "batch_size": self.batch_size,
            "rows": sum(len(pack(step.tolist(), self.max_seq_len)) for step in steps), "rows_padded": len(positions),
            "suggested_max_seq_len": int(-(-wanted // STEP) * STEP),
        }  # fmt: skip


def _sides(row: dict) -> list[dict]:
    if "chosen" not in row:
        return [row]
    return [{"messages": row[side], "tools": row.get("tools")} for side in ("chosen", "rejected")]


def _histogram(lengths: np.ndarray) -> list[list[int]]:
    """[[at most this many tokens, rows], ...], the bounds doubling."""
    bounds = 16 * 2 ** np.arange(max(1, int(np.ceil(np.log2(max(lengths.max(), 16) / 16))) + 1))
    counts = np.bincount(np.searchsorted(bounds, lengths), minlength=len(bounds))
    first = int(np.flatnonzero(counts)[0])
    return [[int(bound), int(count)] for bound, count in zip(bounds[first:], counts[first:])]
