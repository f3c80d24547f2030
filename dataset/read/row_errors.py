"""Rows that cannot be used: how many of them may be left out, and where they are kept.

with RowErrors(Path("sft.jsonl"), cache, rows=1000, on_bad_row="skip") as errors:
    errors.add(7, "broken JSON", raw)     # into sft.jsonl.rejects.jsonl; the eleventh is a UserError
"""

import json
from contextlib import ExitStack
from pathlib import Path

from common.console import UserError
from common.files import atomic_file
from dataset.tokens.cache import is_writable

# shares of a file's rows, if nothing else is said
MAX_BAD_ROWS = 0.01  # that may be skipped
MAX_EMPTY_ROWS = 0.05  # that may have nothing to train on; above it the data must be wrong


def allowed(rows: int, share: float) -> int:
    """How many of the rows may be left out: at least one, unless the share is 0."""
    return max(1, int(share * rows + 1e-6)) if share else 0  # 0.01 * 2900 is a little below 29


def too_many_empty(rows: int, empty: int, left: int, share: float = MAX_EMPTY_ROWS) -> bool:
    """Whether rows with nothing to train on stop a training: there are too many, or no others are left."""
    return not left or empty > allowed(rows, share)


def too_many_bad(first: list[str], most: int, share: float) -> UserError:
    return UserError(
        f"{'; '.join(first)} ...: more than {most:,} bad rows, too many to skip (--max_bad_rows {share:g} allows no "
        "more)"
    )


class RowErrors:
    """Bad rows: "error" stops at the first one; "skip" leaves out up to a share `most` of the rows.

    Skipped rows are written to `<file>.rejects.jsonl` as {"line", "reason", "row"}: beside the file or, where that
    folder is read-only, in the cache. part: of the file that is read, part of the name
    (`<file>.3-of-9.rejects.jsonl`).
    """

    def __init__(self, path: Path, cache: Path, rows: int, on_bad_row: str, most: float = MAX_BAD_ROWS, part: str = ""):
        self.path, self.on_bad_row, self.most, self.allowed = path, on_bad_row, most, allowed(rows, most)
        self.name = f"{path.name}.{part}.rejects.jsonl" if part else f"{path.name}.rejects.jsonl"
        self.folder = path.parent if is_writable(path.parent) else cache
        self.first: list[str] = []
        self.count = 0

    def __enter__(self) -> "RowErrors":
        self.target = self.folder / self.name
        self.stack = ExitStack()  # closes the file, then renames it
        self.file = None
        return self

    def add(self, line: int, reason: str, raw: bytes) -> None:
        self.count += 1
        self.first = [*self.first, f"{self.path}:{line}: {reason}"][:3]
        if self.on_bad_row != "skip":
            raise UserError(f"{self.first[0]} (--on_bad_row skip leaves such rows out)")
        if self.count > self.allowed:
            raise too_many_bad(self.first, self.allowed, self.most)
        if self.file is None:
            temporary = self.stack.enter_context(atomic_file(self.target))
            self.file = self.stack.enter_context(open(temporary, "w", encoding="utf-8"))
        reject = {"line": line, "reason": reason, "row": raw.decode("utf-8", "replace")}
        self.file.write(json.dumps(reject, ensure_ascii=False) + "\n")

    def __exit__(self, *failure) -> None:
        self.stack.__exit__(*failure)
