"""What a client sees of the tokens: whole characters, nothing of a stop word, thoughts and calls in their fields."""

import json
import random
from types import SimpleNamespace

import pytest

from serve.choices import Choice
from tests.helpers.models import TOKENIZER as tokenizer
from tests.helpers.tokenizers import without_tags
from tokenizer.answer import Answer, Scanner, join, token_text

CITY = {"name": "get_weather", "arguments": {"city": "东京", "days": 2}}


def ids_of(*pieces: str) -> list[int]:
    """Control tokens by their names, everything else as text."""
    ids: list[int] = []
    for piece in pieces:
        ids += [tokenizer.control[piece]] if piece in tokenizer.control else tokenizer.encode(piece)
    return ids


def read(ids, **options) -> tuple[dict, list[dict]]:
    """-> (the message, its deltas)"""
    answer = Answer(options.pop("tokenizer", tokenizer), **options)
    deltas = [delta for token in ids for delta in answer.push(token)] + answer.end()
    message = join(deltas)
    for call in message.get("tool_calls", []):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return message, deltas


def test_characters_arrive_whole():
    """Each of these takes 1 to 4 bytes, and more than one token."""
    text = "aé中𝄞👩‍👩‍👧 ok"
    message, deltas = read(tokenizer.encode(text))
    assert message["content"] == text and not any("\ufffd" in delta["content"] for delta in deltas)
    cut = tokenizer.encode("👩")[:-1]  # the length ended in the middle of a character
    assert read(cut)[0]["content"] == "\ufffd"


@pytest.mark.parametrize("seed", range(30))
def test_nothing_of_a_stop_word_leaks_wherever_the_text_is_cut(seed):
    """Words that overlap, over random cuts. The reference looks for the word that is complete first."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
    text = "".join(rng.choices("abc", k=30))
    ends = [(end, -len(word), word) for word in words for end in range(len(text) + 1) if text[:end].endswith(word)]
    expected = text[: min(ends)[0] + min(ends)[1]] if ends else text
    scanner, shown, left = Scanner(words), "", text
    while left:
        size = rng.randint(1, 5)
        for piece, word in scanner.push(left[:size], final=size >= len(left)):
            shown += piece
            if word:
                left = ""
                break
            assert expected.startswith(shown)  # also on the way there
        left = left[size:]
    assert shown == expected


def test_a_stop_word_ends_the_answer():
    answer = Answer(tokenizer, stop=["\n\n", "END"])
    shown = join([d for token in tokenizer.encode("one\ntwo EN\nthree E") for d in answer.push(token)])["content"]
    assert shown == "one\ntwo EN\nthree " and not answer.stopped  # the E may begin a word
    rest = [delta for token in tokenizer.encode("ND four") for delta in answer.push(token)]
    assert answer.stopped and not rest and not answer.end()


def test_a_choice_that_is_stopped_is_not_written_for_while_the_others_go_on():
    sequence = SimpleNamespace(tokens=tokenizer.encode("one two three"), finish_reason=None, cancelled=False)
    sequence.cancel = lambda: setattr(sequence, "cancelled", True)
    choice = Choice(0, sequence, Answer(tokenizer, stop=["two"]), tokenizer)
    assert join(choice.advance())["content"] == "one " and choice.finish_reason == "stop" and sequence.cancelled


def test_thoughts_have_a_field_of_their_own():
    message, _ = read(ids_of("<think>", "\nfirst\nsecond\n", "</think>", "\n\nanswer\n"))
    assert (message["reasoning_content"], message["content"]) == ("first\nsecond", "answer\n")
    opened = tokenizer.encode("hi") + ids_of("<think>", "\n")  # enable_thinking: the prompt has the tag
    message, _ = read(ids_of("deep", "</think>", "\n\nshallow"), prompt=opened)
    assert (message["reasoning_content"], message["content"]) == ("deep", "shallow")
    message, _ = read(ids_of("cut off in the mid\n"), prompt=opened)
    assert (message["reasoning_content"], message["content"]) == ("cut off in the mid", "")
    message, _ = read(tokenizer.encode("<think>words about it</think>"))  # spelled by the model, not its control token
    assert message == {"role": "assistant", "content": "<think>words about it</think>"}


def test_a_tokenizer_without_these_tokens_spells_them(tmp_path):
    """MiniMind2's: "<think>" is text there, in pieces that need not end where the tag does."""
    spells = without_tags(tmp_path / "t", "<think>", "</think>", "<tool_call>", "</tool_call>")
    ids = spells.encode('<think>\nhm\n</think>\n\nso\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
    message, _ = read(ids, tokenizer=spells, tools=True)
    assert (message["reasoning_content"], message["content"]) == ("hm", "so")
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "f", "arguments": {}}]


def test_calls_are_read_from_their_blocks():
    block = ("<tool_call>", "\n" + json.dumps(CITY, ensure_ascii=False) + "\n", "</tool_call>")
    message, deltas = read(ids_of("Let me see.", "\n", *block, "\n", *block), tools=True)
    assert message["content"] == "Let me see." and [c["function"] for c in message["tool_calls"]] == [CITY, CITY]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert [d["tool_calls"][0]["index"] for d in deltas if "tool_calls" in d] == [0, 1]
    message, _ = read(ids_of(*block), tools=True)
    assert message["content"] is None and len(message["tool_calls"]) == 1


@pytest.mark.parametrize("body", ["no JSON", '{"name": 3, "arguments": {}}', '["name"]', '{"name": "f"}'])
def test_what_is_no_call_is_shown_as_it_was_written(body):
    message, _ = read(ids_of("<tool_call>", body, "</tool_call>", " then"), tools=True)
    assert message == {"role": "assistant", "content": f"<tool_call>{body}</tool_call> then"}


def test_a_demanded_call_goes_on_from_the_prompt():
    message, _ = read(ids_of(' "get_weather", "arguments": {}}\n', "</tool_call>"), tools=True, call='\n{"name":')
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "get_weather", "arguments": {}}]


def test_tokens_of_half_characters_have_names():
    first = tokenizer.encode("👩")[0]
    text, data = token_text(tokenizer, first)
    assert text == "bytes:" + "".join(f"\\x{byte:02x}" for byte in data) and bytes(data) == "👩".encode()[: len(data)]
    assert token_text(tokenizer, tokenizer.encode("a")[0]) == ("a", [97])
