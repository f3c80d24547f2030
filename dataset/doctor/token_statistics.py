"""How long a file's rows are in tokens, and what follows for training: cuts, packing, a length to choose.

    statistics = TokenStatistics("chat", tokenizer, max_seq_len=512, batch_size=16)
    statistics.add([(1, {"messages": [...]})])          # as often as one likes, with a sample of the rows
    statistics.summary(exact=False, of=10_000_000)

The rules are those of dataset/tokens/examples.py: a conversation of n ids is n - 1 positions, what is too long is cut
from the left as long as its last answer fits, else it is left out; and of dataset/batches/preference.py: a pair is as
long as its prompt with the longer answer, and takes the room of its prompt and both.
"""

from __future__ import annotations

import numpy as np

from dataset.batches.packing import pack, pair_row_length
from dataset.tokens.token_cache import encode_conversations, encode_preferences, encode_texts
from tokenizer.text import Tokenizer

STEP = 64  # suggested lengths are multiples of it
SUGGEST_FOR = 0.99  # of the conversations
DEFAULTS = {"preference": (1024, 4)}  # max_seq_len and batch_size of the stage that reads them


class TokenStatistics:
    def __init__(self, kind: str, tokenizer: Tokenizer, max_seq_len: int | None, batch_size: int | None):
        length, examples = DEFAULTS.get(kind, (512, 16))
        self.kind, self.tokenizer = kind, tokenizer
        self.max_seq_len, self.batch_size = max_seq_len or length, batch_size or examples
        self.lengths: list[np.ndarray] = []  # of what has to fit into max_seq_len + 1
        self.sizes: list[np.ndarray] = []  # of what is computed
        self.answers: list[np.ndarray] = []  # where the last answer starts
        self.trained = 0

    def add(self, rows: list[tuple[int, dict]]) -> list[tuple[int, str, bytes]]:
        """Tokenises these; what the chat template refused: (line, reason, row)."""
        bad: list[tuple[int, str, bytes]] = []
        if self.kind in ("text", "plain"):
            block = encode_texts(rows, bad, self.tokenizer, opens=self.kind == "text")
            lengths, trained = block.lengths, block.lengths
        elif self.kind == "preference":
            block = encode_preferences(rows, bad, self.tokenizer)
            lengths = block.prompts + np.maximum(block.chosen, block.lengths - block.prompts - block.chosen)
            trained = block.trained
            self.answers.append(block.prompts)
        else:
            block = encode_conversations(rows, bad, self.tokenizer)
            lengths, trained = block.lengths, block.counts
            self.answers.append(block.answers)
        self.lengths.append(lengths)
        self.sizes.append(block.lengths)
        self.trained += int(trained.sum(dtype=np.int64))
        return bad

    def summary(self, exact: bool, of: int) -> dict:
        lengths = np.concatenate(self.lengths) if self.lengths else np.empty(0, np.int64)
        if not len(lengths):
            return {}
        total = sum(int(sizes.sum()) for sizes in self.sizes)
        found = {
            "exact": exact,
            "sampled": len(lengths),
            "total": total,
            "trained_share": self.trained / total,
            "median": int(np.median(lengths)),
            "p90": int(np.quantile(lengths, 0.9)),
            "p99": int(np.quantile(lengths, 0.99)),
            "max": int(lengths.max()),
            "histogram": _histogram(lengths),
            "max_seq_len": self.max_seq_len,
        }
        return found | (self._stream(lengths) if self.kind in ("text", "plain") else self._packed(lengths))

    def _stream(self, lengths: np.ndarray) -> dict:
        """Pretraining cuts one stream into rows; a row a document, filled up, would take these instead."""
        rows, padded = -(-lengths.sum() // self.max_seq_len), (-(-lengths // self.max_seq_len)).sum()
        return {"rows": int(rows), "rows_padded": int(padded)}

    def _packed(self, lengths: np.ndarray) -> dict:
        """Conversations and pairs: packed step by step as they come when shuffled, against one in a row (of a pair each
        side), filled up. Rows of max_seq_len."""
        most, answers = self.max_seq_len + 1, np.concatenate(self.answers)
        fits = lengths <= most
        kept = fits | (answers > lengths - most)
        cut_off = lengths - np.minimum(lengths, most)
        positions = (np.concatenate(self.sizes) - cut_off - 1)[kept]
        shuffled = np.random.default_rng(0).permutation(positions)
        steps = [shuffled[i : i + self.batch_size].tolist() for i in range(0, len(shuffled), self.batch_size)]
        wanted = np.quantile(lengths - 1, SUGGEST_FOR, method="higher")
        return {
            "cut": int((kept & ~fits).sum()),
            "left_out": int((~kept).sum()),
            "batch_size": self.batch_size,
            "rows": round(sum(map(self._rows, steps))),
            "rows_padded": len(positions) * (2 if self.kind == "preference" else 1),
            "suggested_max_seq_len": int(-(-wanted // STEP) * STEP),
        }

    def _rows(self, lengths: list[int]) -> float:
        """That a step of these positions takes."""
        if self.kind != "preference":
            return len(pack(lengths, self.max_seq_len))
        length = pair_row_length(lengths, self.max_seq_len)
        return len(pack(lengths, length)) * length / self.max_seq_len


def _histogram(lengths: np.ndarray) -> list[list[int]]:
    """[[at most this many tokens, rows], ...], the bounds doubling."""
    bounds = 16 * 2 ** np.arange(max(1, int(np.ceil(np.log2(max(lengths.max(), 16) / 16))) + 1))
    counts = np.bincount(np.searchsorted(bounds, lengths), minlength=len(bounds))
    first = int(np.flatnonzero(counts)[0])
    return [[int(bound), int(count)] for bound, count in zip(bounds[first:], counts[first:])]
