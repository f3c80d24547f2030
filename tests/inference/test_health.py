"""What each figure of health says, on answers written by hand."""

import pytest

from inference.answers import Answer
from inference.health import MEANING, health, language, ngrams, repetition, tags_closed, words


def answer(text, ended=True, full=None, asked=True):
    return Answer([], full if full is not None else text, text, ended, asked)


def test_words_are_words_or_chinese_characters():
    assert words("Hello, World2! 你好，吗") == ["hello", "world2", "你", "好", "吗"]


def test_repetition_by_hand():
    """a b c a b c a b: five windows of four words, abca bcab cabc abca bcab, of which two were there before."""
    assert repetition("a b c a b c a b".split(), 4) == pytest.approx(2 / 5)
    assert repetition("a b c d e".split(), 4) == 0
    assert ngrams("abc", 2) == [("a", "b"), ("b", "c")]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("你好", "zh"),
        ("hello", "en"),
        ("用 Python 写一个函数", "zh"),
        ("What does 你好 mean?", "en"),
        ("42 + 1 = 43", None),
        ("", None),
    ],
)
def test_language(text, expected):
    assert language(text) == expected


@pytest.mark.parametrize(
    "text, closed",
    [
        ("<think>a</think>b", True),
        ("<think>a", False),
        ("a</think>", False),
        ("<think>a</think><answer>b", False),
        ("<think><think>a</think></think>", True),
        ("</think><think>", False),
        ("1 < 2", True),
    ],
)
def test_tags(text, closed):
    assert tags_closed(text) is closed


def test_a_sick_model():
    """Four answers: one loops and does not end, one is in the wrong language, one is empty, one is fine."""
    said = [
        answer("a b c a b c a b", ended=False),
        answer("I do not know"),
        answer(""),
        answer("好", full="<think>\n嗯"),
    ]
    asked = ["spell a b c", "你好吗?", "why?", "好吗？"]
    found = health(said, asked)
    assert found["answers"] == 4 and found["ended"] == 0.75 and found["empty"] == 0.25
    assert found["rep_4"] == pytest.approx((2 / 5 + 0) / 2)  # the other two have fewer than four words
    assert found["distinct_1"] == pytest.approx((3 + 4 + 1) / (8 + 4 + 1), abs=1e-6)
    assert found["wrong_language"] == pytest.approx(1 / 3, abs=1e-6)  # the empty one is in no language
    assert found["tags_closed"] == 0 and "length_ratio" not in found and "no_room" not in found
    assert set(found) <= set(MEANING)


def test_references_say_the_language_and_the_length():
    """A translation is asked for in Chinese and answered in English: no leak."""
    found = health([answer("good morning all")], ["翻译：早上好"], ["good morning"])
    assert found["wrong_language"] == 0 and found["length_ratio"] == 1.5


def test_nothing_said_is_no_figure_and_no_error():
    assert health([]) == {"answers": 0}
    found = health([answer("", ended=False, asked=False)], ["too long"])
    assert found == {"answers": 1, "no_room": 1}
