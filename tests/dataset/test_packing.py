"""Best-fit decreasing by hand, and what must hold for any lengths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.batches.packing import pack


def test_by_hand():
    # the longest first: 5 opens row 0 (3 left), 4 opens row 1 (4 left), the other 4 fills row 1, 3 fills row 0, 2 opens
    # row 2
    assert pack([5, 3, 4, 2, 4], capacity=8) == [[0, 1], [2, 4], [3]]


def test_the_fullest_row_with_room_is_taken_not_the_first():
    # 8 leaves 2, 7 leaves 3, 6 leaves 4; the 3 fits the last two and fills the row of the 7, though the 6 came first
    assert pack([6, 7, 8, 3], capacity=10) == [[2], [1, 3], [0]]


def test_equal_lengths_keep_their_order():
    assert pack([2, 2, 2, 2, 2], capacity=4) == [[0, 1], [2, 3], [4]]


def test_nothing_to_pack():
    assert pack([], capacity=4) == []


@pytest.mark.parametrize("length", [0, 5, -1])
def test_what_no_row_holds_is_refused(length):
    with pytest.raises(ValueError, match=f"an example of {length} tokens in rows of 4"):
        pack([1, length], capacity=4)


@given(st.integers(1, 300).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))))
def test_every_example_once_no_row_overfull_and_few_rows(case):
    capacity, lengths = case
    rows = pack(lengths, capacity)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < fill <= capacity for fill in filled)
    # a row is opened only when nothing else has room: any two together overflow
    assert all(a + b > capacity for a, b in zip(sorted(filled), sorted(filled)[1:]))
    lower_bound = max(-(-sum(lengths) // capacity), sum(2 * length > capacity for length in lengths))
    assert len(rows) <= 1.7 * lower_bound + 1
    assert rows == pack(lengths, capacity)


def test_realistic_lengths_fill_rows():
    """Answers of 20 to 400 tokens, 512 examples a step: nearly nothing is left empty."""
    lengths = [20 + (i * 7919) % 381 for i in range(512)]
    rows = pack(lengths, capacity=512)
    assert sum(lengths) / (len(rows) * 512) > 0.98
