"""Prompt lookup: guesses the next tokens of a text from the text itself (as prompt_lookup_num_tokens in transformers).

    lookup = Lookup([5, 6, 7, 8, 5, 6])
    lookup.guess(3)                                   # [7, 8, 5]: this is what followed 5, 6 before

Where the last three tokens stand earlier in the text, or else the last two, it is taken to go on as it did there. The
engine computes the guessed tokens together with the last one, and keeps those that it would have drawn anyway. So a
guess changes how long an answer takes, not what it is. It pays for answers that repeat what they were asked: summaries,
corrections, code.
"""

from __future__ import annotations

from collections.abc import Iterable

LENGTHS = (3, 2)  # of what has to stand there before, the longest first


class Lookup:
    def __init__(self, ids: Iterable[int]):
        self.ids: list[int] = []
        self.places: dict[tuple[int, ...], int] = {}  # tokens -> the place after them, where they stood last
        self.right = 4  # tokens of the last guess that were right
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        for token in ids:
            for n in LENGTHS:
                self.places[tuple(self.ids[-n:])] = len(self.ids)  # only now is there something that follows them
            self.ids.append(token)

    def guess(self, most: int) -> list[int]:
        """At most `most` tokens, fewer after wrong guesses. What goes on beyond the end of the text repeats itself."""
        most = min(most, 2 * self.right + 1)
        found: list[int] = []
        place = next((p for n in LENGTHS if (p := self.places.get(tuple(self.ids[-n:])))), None)
        while place is not None and len(found) < most:
            next_place = place + len(found)
            found.append(self.ids[next_place] if next_place < len(self.ids) else found[next_place - len(self.ids)])
        return found
