"""Texts that grow at the same time, side by side in a terminal.

    columns = Columns(sys.stdout.write, [38, 38])
    columns.push(0, "The answer "); columns.push(1, "Another "); ...; columns.close()

A line is printed for good once it is complete in all columns. So nothing has to be erased, and the output may be longer
than the screen or go into a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from common.console import printable, width_of

GAP = " │ "


class Columns:
    """write: prints text as it is. widths: of the columns, in characters of a terminal. live: also show the line that
    is not complete yet, and overwrite it (a terminal)."""

    def __init__(self, write: Callable[[str], object], widths: Sequence[int], live: bool = False):
        self.write, self.widths, self.live = write, widths, live
        self._lines: list[list[str]] = [[""] for _ in widths]  # of each column, not printed yet; the last one grows
        self._ended = [False] * len(widths)

    def push(self, column: int, text: str) -> None:
        """More of a column's text."""
        lines, width = self._lines[column], self.widths[column]
        for char in printable(text).replace("\t", "    "):
            if char == "\n":
                lines.append("")
                continue
            if width_of(lines[-1] + char) > width:
                kept, space, word = lines[-1].rpartition(" ")
                if space and width_of(word) < width // 2 and not char.isspace():  # break between words
                    lines[-1] = kept
                    lines.append(word)
                else:
                    lines.append("")
                if char == " ":
                    continue
            lines[-1] += char
        self._print()

    def end(self, column: int) -> None:
        """Nothing more comes in this column."""
        self._ended[column] = True
        self._print()

    def close(self) -> None:
        for column in range(len(self.widths)):
            self._ended[column] = True
        self._print()

    def _print(self) -> None:
        while all(len(lines) > 1 or ended for lines, ended in zip(self._lines, self._ended)) and any(
            line for lines in self._lines for line in lines
        ):
            self.write(("\r" if self.live else "") + self._row([lines[0] for lines in self._lines]) + "\n")
            for lines in self._lines:
                lines.pop(0)
                lines.extend([] if lines else [""])
        if self.live and any(lines[0] for lines in self._lines):
            self.write("\r" + self._row([lines[0] for lines in self._lines]))

    def _row(self, cells: list[str]) -> str:
        return GAP.join(cell + " " * (width - width_of(cell)) for cell, width in zip(cells, self.widths)).rstrip()
