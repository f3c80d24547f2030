"""How long a file's rows are in tokens, and what follows for training: cuts, packing, a length to choose.

    statistics = TokenStatistics("chat", tokenizer, max_seq_len=512, batch_size=16)
    statistics.add([(1, {"messages": [...]})])          # as often as needed, with a sample of the rows
    statistics.summary(exact=False)

Rows are encoded and measured by the same functions as in training (dataset/kinds.py, dataset/tokens/lengths.py).
"""

from __future__ import annotations

import numpy as np

from dataset.batches.packing import pack, pair_row_length
from dataset.kinds import KINDS
from dataset.tokens.encode import BadRow, Rows
from dataset.tokens.lengths import Lengths, fit
from tokenizer.text import Tokenizer

STEP = 64  # suggested lengths are multiples of it
SUGGEST_FOR = 0.99  # share of the rows that the suggested length holds whole


class TokenStatistics:
    """max_seq_len, batch_size: None takes those of the stage that trains on such rows."""

    def __init__(self, kind: str, tokenizer: Tokenizer, max_seq_len: int | None, batch_size: int | None):
        self.kind, self.tokenizer = KINDS[kind], tokenizer
        self.max_seq_len, self.batch_size = max_seq_len or self.kind.max_seq_len, batch_size or self.kind.batch_size
        self.lengths: list[Lengths] = []
        self.trained = 0

    def add(self, rows: Rows) -> list[BadRow]:
        """Tokenises these rows -> those that the chat template refused."""
        block = self.kind.encode(rows, self.tokenizer)
        self.lengths.append(self.kind.lengths(block.lengths, block.columns))
        self.trained += block.trained_tokens
        return block.bad

    def summary(self, exact: bool) -> dict:
        """Figures for the report; `exact` if `add` was given every row."""
        lengths = Lengths(*map(np.concatenate, zip(*self.lengths))) if self.lengths else None
        if lengths is None or not len(lengths.total):
            return {}
        needed, total = lengths.prompt + lengths.answer, int(lengths.total.sum())
        found = {
            "exact": exact,
            "sampled": len(needed),
            "total": total,
            "trained_share": self.trained / total,
            "median": int(np.median(needed)),
            "p90": int(np.quantile(needed, 0.9)),
            "p99": int(np.quantile(needed, 0.99)),
            "max": int(needed.max()),
            "histogram": _histogram(needed),
            "max_seq_len": self.max_seq_len,
        }
        return found | (self._stream(needed) if self.kind.stream else self._packed(lengths))

    def _stream(self, lengths: np.ndarray) -> dict:
        """Rows that one stream takes, and rows that it would take with a document in each, padded."""
        rows, padded = -(-lengths.sum() // self.max_seq_len), (-(-lengths // self.max_seq_len)).sum()
        return {"rows": int(rows), "rows_padded": int(padded)}

    def _packed(self, lengths: Lengths) -> dict:
        """Rows that packing takes, step by step in a shuffled order, and rows with one padded sequence in each."""
        kept, cut = fit(lengths, self.max_seq_len)
        positions = (lengths.total - cut - 1)[kept]
        shuffled = np.random.default_rng(0).permutation(positions)
        steps = [shuffled[i : i + self.batch_size].tolist() for i in range(0, len(shuffled), self.batch_size)]
        wanted = np.quantile(lengths.prompt + lengths.answer - 1, SUGGEST_FOR, method="higher")
        return {
            "cut": int((kept & (cut > 0)).sum()),
            "left_out": int((~kept).sum()),
            "batch_size": self.batch_size,
            "rows": round(sum(map(self._rows, steps))),
            "rows_padded": len(positions) * self.kind.sequences,
            "suggested_max_seq_len": int(-(-wanted // STEP) * STEP),
        }

    def _rows(self, positions: list[int]) -> float:
        """Rows of max_seq_len that a step of examples with so many positions takes."""
        if self.kind.sequences == 1:
            return len(pack(positions, self.max_seq_len))
        length = pair_row_length(positions, self.max_seq_len)
        return len(pack(positions, length)) * length / self.max_seq_len


def _histogram(lengths: np.ndarray) -> list[list[int]]:
    """[[at most this many tokens, rows], ...], the bounds doubling."""
    bounds = 16 * 2 ** np.arange(max(1, int(np.ceil(np.log2(max(lengths.max(), 16) / 16))) + 1))
    counts = np.bincount(np.searchsorted(bounds, lengths), minlength=len(bounds))
    first = int(np.flatnonzero(counts)[0])
    return [[int(bound), int(count)] for bound, count in zip(bounds[first:], counts[first:])]
