"""Best-fit decreasing: which examples share a row.

    pack([5, 3, 4, 2, 4], capacity=8)        # [[0, 1], [2, 4], [3]]

The longest example comes first. Each goes into the row with the least free space that is enough, or into a new row.
Nothing is split. This takes at most 11/9 of the fewest possible rows, plus a constant (Johnson et al. 1974, "Worst-case
performance bounds for simple one-dimensional packing algorithms"); usually it takes the fewest.
"""

from collections.abc import Sequence

from common.console import UserError


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`. The lengths in a row add up to at most `capacity`. O(n log n), deterministic."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free space -> rows that have exactly that much
    spaces = 0  # bit s is set if with_room[s] has a row, so the lowest bit from `length` on is the best fit
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = int(lengths[index])
        if not 0 < length <= capacity:
            raise UserError(f"an example of {length} tokens in rows of {capacity}")
        enough = spaces >> length
        if enough:
            space = length + (enough & -enough).bit_length() - 1
            row = with_room[space].pop()
            if not with_room[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if left := space - length:
            with_room.setdefault(left, []).append(row)
            spaces |= 1 << left
    return rows


def pair_row_length(lengths: list[int], max_seq_len: int) -> int:
    """The length of rows for a step of pairs of these lengths: the cheapest multiple of max_seq_len / 4 that holds the
    longest pair. Unfilled positions cost time, and so do long rows: in a `small` model, attention over 800 positions
    takes about as much time as everything else."""
    unit = -(-max_seq_len // 4)
    candidates = range(-(-max(lengths) // unit) * unit, 8 * unit + 1, unit)
    return min(candidates, key=lambda length: len(pack(lengths, length)) * length * (1 + length / 800))
