"""Single turns: which are trained on, thoughts that are written in odd ways, and what stands in two places of a row."""

import numpy as np
import pytest

from dataset.batches.preference import PairLoader, PreferenceDataset
from dataset.read.formats import canonical, layout_of, unread
from tests.helpers.datasets import sft
from tests.helpers.models import TOKENIZER
from tests.helpers.rows import jsonl, says, user
from tests.helpers.tokenizers import text
from tokenizer.chat import encode_chat


def read(*turns, **columns) -> list[dict]:
    return canonical({"messages": [*turns], **columns}, "chat")["messages"]


# ---- turns that are not trained on

MARKS = [
    {"training": False},
    {"trainable": False},
    {"train": False},
    {"loss": False},
    {"weight": 0},
    {"weight": "0"},
    {"loss_weight": 0.0},
    {"loss_weight": None, "train": "false"},
]


@pytest.mark.parametrize("mark", MARKS)
def test_a_turn_that_is_marked_is_context_only(tmp_path, mark):
    """The model was trained to count "one, three", which the file says not to learn."""
    wrong = [user("Count."), says("one, three") | mark]
    row = {"messages": [*wrong, user("Again."), says("one, two") | dict.fromkeys(mark, 1)]}
    ds = sft(jsonl(tmp_path / "a.jsonl", row, {"messages": [*row["messages"][2:], *wrong]}))
    said = [text(ds.tokens(i)[ds.trained(i)]) for i in range(2)]
    assert said == ["one, two]", "one, two]"]
    assert "[assistant\none, three]" in text(ds.tokens(0)), "it stays in the context"
    assert text(ds.tokens(1)).endswith("one, two]"), "nothing can be learned from what follows the last trained turn"


def test_a_marked_turn_of_a_paired_dialogue():
    turns = [{"human": "hi", "assistant": "bad", "training": False}, {"human": "ok?", "assistant": "yes"}]
    messages = canonical({"conversation": turns})["messages"]
    assert [m.get("train") for m in messages] == [None, False, None, None]
    ids, trained = encode_chat(TOKENIZER, messages)
    assert TOKENIZER.decode([i for i, yes in zip(ids, trained) if yes]) == "yes<|im_end|>"


@pytest.mark.parametrize(
    "turn, reason",
    [
        (says("yo") | {"weight": 0.5}, 'messages[1]: "weight" must be 0 or 1, this is float 0.5'),
        (says("yo") | {"loss_weight": "low"}, "\"loss_weight\" must be 0 or 1, this is str 'low'"),
        (says("yo") | {"train": True, "weight": 0}, "messages[1]: 'train' and 'weight' contradict each other"),
        (
            says("yo") | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
            '"train_detail" chooses',
        ),
        (user("yo") | {"training": True}, 'messages[1] (user): "training": True asks to train on this turn'),
    ],
)
def test_marks_that_cannot_be_honoured_are_refused(turn, reason):
    with pytest.raises(ValueError) as error:
        read(user("hi"), turn)
    assert reason in str(error.value)
    assert read(user("hi") | {"weight": 0}, says("yo") | {"train_detail": None}) == [user("hi"), says("yo")]


# ---- thoughts


@pytest.mark.parametrize(
    "turn, thought",
    [
        (says("2 and 2.\n</think>\n\n4"), "2 and 2."),  # the prompt of some templates ends with <think>
        (says("2 and 2.</think>\n\n4"), "2 and 2."),
        (says("</think>\n\n4"), ""),
        (says(" <think>\n2 and 2.\n</think>\n\n4"), "2 and 2."),
        (says("<think>\n2 and 2.\n</think>\n\n4", reasoning_content="2 and 2."), "2 and 2."),
        (says("2 and 2.\n</think>\n\n4", reasoning_content="2 and 2."), "2 and 2."),
        (says("<think>\n\n</think>\n\n4", reasoning_content="2 and 2."), "2 and 2."),
        (says("4", reasoning_content="2 and 2.", thinking="2 and 2.\n"), "2 and 2."),
    ],
)
def test_a_thought_however_it_is_written_is_one_thought_once(turn, thought):
    ids, _ = encode_chat(TOKENIZER, read(user("2+2?"), turn))
    plain, _ = encode_chat(TOKENIZER, [user("2+2?"), says(f"<think>\n{thought}\n</think>\n\n4")])
    assert ids == plain
    think, end = TOKENIZER.control["<think>"], TOKENIZER.control["</think>"]
    assert [ids.count(think), ids.count(end)] == [1, 1]


def test_two_thoughts_are_refused_and_words_about_the_tags_are_words():
    for turn, reason in (
        (says("<think>\nA\n</think>\n\n4", reasoning_content="B"), "two different thoughts"),
        (says("4", reasoning="A", thinking="B"), "two different thoughts"),
        (says("2 and 2.</think>4"), '"</think>" without a "<think>"'),
    ):
        with pytest.raises(ValueError, match=reason):
            read(user("2+2?"), turn)
    for words in ("Qwen ends with `</think>`.", "It is <think> and </think>."):
        assert read(user("?"), says(words)) == [user("?"), says(words)]
    asks = user("What is\n</think>\n?")
    assert read(asks, says("A tag."))[0] == asks, "a user does not think aloud"


@pytest.mark.parametrize("answer", ["", " ", "\n\n", "\t　"])
def test_an_answer_of_blanks_says_nothing(answer):
    for row in ({"prompt": "hi", "completion": answer}, {"prompt": "hi", "chosen": "yo", "rejected": answer}):
        with pytest.raises(ValueError, match="the assistant says nothing"):
            canonical(row)


# ---- the same thing in two places

VERSE, KEEPER = "Answer in rhyme.", "You are a keeper."


def test_system_prompts_of_two_places_are_joined_or_once():
    both = {"role": "system", "content": f"{VERSE}\n\n{KEEPER}"}
    sharegpt = [{"from": "system", "value": KEEPER}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    for row in (
        {"system": VERSE, "conversations": sharegpt},
        {"system": VERSE, "system_prompt": KEEPER, "instruction": "hi", "output": "yo"},
        {"system": VERSE, "prompt": [{"role": "system", "content": KEEPER}, user("hi")], "completion": "yo"},
        {"system": VERSE, "conversation": [{"system": KEEPER, "human": "hi", "assistant": "yo"}]},
    ):
        assert canonical(row)["messages"] == [both, user("hi"), says("yo")]
    once = canonical({"system": KEEPER + "\n", "system_prompt": KEEPER, "conversations": sharegpt})["messages"]
    assert [m["content"].strip() for m in once] == [KEEPER, "hi", "yo"]
    side = [{"role": "system", "content": KEEPER}, user("hi")]
    pair = canonical({"system": VERSE, "chosen": [*side, says("yo")], "rejected": [*side, says("no")]})
    assert pair["chosen"][0] == pair["rejected"][0] == both


POLITE = {"role": "system", "content": "Be polite."}


def test_a_prompt_beside_sides_that_hold_their_own():
    """The side's own prompt won, and what the column said more was dropped without a word."""
    asked = [user("1+1?"), says("2"), user("And 2+2?")]
    for prompt, own, whole in (
        (asked, asked, asked),
        ([POLITE, *asked], asked, [POLITE, *asked]),
        (asked, [POLITE, *asked], [POLITE, *asked]),
        (asked, asked[-1:], asked),  # the side repeats the last question only
        (asked[-1:], asked, asked),  # the column has the last question only
        (" And 2+2?", asked, asked),
        ([POLITE], asked, [POLITE, *asked]),
        (asked[:2], asked[2:], asked),  # the side goes on
    ):
        row = {"prompt": prompt, "chosen": [*own, says("4")], "rejected": [*own, says("5")]}
        assert canonical(row) == {"chosen": [*whole, says("4")], "rejected": [*whole, says("5")]}
        row = {"prompt": prompt, "completion": [*own, says("4")]}
        assert canonical(row)["messages"] == [*whole, says("4")]


def test_two_questions_in_one_row_are_refused():
    own = [user("How do I reach the castle?"), says("By the river.")]
    with pytest.raises(ValueError, match=r'"chosen" begins with another question .* \'How do I reach the castle'):
        canonical({"prompt": "How do I reach the harbour?", "chosen": own, "rejected": [own[0], says("?")]})


def test_tools_in_two_places_must_be_the_same():
    turns = [user("hi") | {"tools": [{"name": "add"}]}, says("yo")]
    assert len(canonical({"messages": turns, "tools": '[{"name": "add"}]'})["tools"]) == 1
    with pytest.raises(ValueError, match="two places"):
        canonical({"messages": turns, "tools": [{"name": "sub"}]})


def test_keys_of_a_turn_that_are_not_read_are_named_like_columns(tmp_path):
    rows = [
        {"messages": [user("hi"), says("yo")], "id": 7},
        {"messages": [user("hi") | {"images": ["a.png"]}, says("yo")]},
    ]
    ds = sft(jsonl(tmp_path / "a.jsonl", *rows))
    assert "columns not read: id, messages[].images" in ds.summary
    null = {"messages": [user("hi") | {"images": None}, says("yo") | {"tool_calls": None, "weight": 1}]}
    assert unread(null, layout_of(null)) == [], "nothing is in them"


def test_null_arguments_that_a_tool_does_not_have_are_not_read():
    """Arrow gives the arguments of every call the keys of all other calls. A null that the tool declares stays."""
    call = {"name": "add", "arguments": {"a": 1, "b": None, "city": None}}
    tool = {"name": "add", "parameters": {"type": "object", "properties": {"a": {}, "b": {}, "city": None}}}
    row = {"messages": [user("hi"), says("", tool_calls=[{"function": call}])], "tools": [tool]}
    assert canonical(row)["messages"][1]["tool_calls"] == [{"name": "add", "arguments": {"a": 1, "b": None}}]
    assert unread(row, layout_of(row)) == ["messages[].tool_calls[].city"]
    pair = canonical({"prompt": "hi", "chosen": row["messages"][1:], "rejected": "no", "tools": [tool]})
    assert pair["chosen"][1]["tool_calls"][0]["arguments"] == {"a": 1, "b": None}
    row["tools"] = [{"name": "add"}]
    assert canonical(row)["messages"][1]["tool_calls"] == [call], "what a tool has is not known"
    assert unread(row, layout_of(row)) == []


# ---- ratings


@pytest.mark.parametrize("bad, good", [(0, 1), ("false", "true"), ("False", "True"), (0.0, 1.0), ("0", "1")])
def test_labels_that_mean_yes_or_no_are_ratings(bad, good):
    """A bad answer labelled 0 was trained on as a conversation."""
    for label, expected in ((bad, False), (good, True)):
        row = {"prompt": "hi", "completion": "yo", "label": label}
        assert layout_of(row).kind == "rated" and canonical(row)["label"] is expected
    for label in ("greeting", 3, 0.5):
        row = {"prompt": "hi", "completion": "yo", "label": label}
        assert canonical(row) == {"messages": [user("hi"), says("yo")]}
        assert unread(row, layout_of(row)) == ["label"], "a class is no rating, and not read"


# ---- trees


def test_a_tree_is_read_along_its_best_replies():
    def node(role, words, *replies, **more):
        return {"message_id": words, "role": role, "text": words, "replies": [*replies], **more}

    better = node("assistant", "yo", node("prompter", "ok?", node("assistant", "yes", rank=0), rank=None), rank=0)
    deleted = node("assistant", "spam", rank=-1, deleted=True)
    row = {
        "message_tree_id": "1",
        "tree_state": "ready",
        "prompt": node("prompter", "hi", node("assistant", "go", rank=1), deleted, better),
    }
    assert canonical(row, "chat")["messages"] == [user("hi"), says("yo"), user("ok?"), says("yes")]
    row["prompt"] = node("prompter", "hi", node("assistant", "yo", node("prompter", "bye")))
    assert canonical(row, "chat")["messages"] == [user("hi"), says("yo")], "a last question has no answer"
    row["prompt"] = node("prompter", "hi")
    with pytest.raises(ValueError, match="nobody has replied"):
        canonical(row, "chat")


def test_rows_that_are_single_messages_of_a_tree_say_what_to_do(tmp_path):
    """The advice was to skip them: all of them."""
    row = {"message_id": "2", "parent_id": "1", "text": "yo", "role": "assistant", "lang": "en"}
    with pytest.raises(ValueError, match=r"a.jsonl:1: each row is one message of a tree .* \*.trees.jsonl.gz") as error:
        sft(jsonl(tmp_path / "a.jsonl", row, row))
    assert "skip" not in str(error.value)
    assert canonical(row, "text") == {"text": "yo"}, "for pretraining it is text"


# ---- untrained tokens inside an answer


def test_untrained_tokens_of_an_answer_are_no_targets(tmp_path):
    """-100 was written into an array of uint16 ids, where it is 65436: not in the vocabulary, or 28 targets too many.

    Of the first pair one token holds the end of the header and the beginning of an answer, so the other answer begins
    with the header's untrained newline. In the second pair a tool speaks in the middle of both answers.
    """
    add = lambda b: says("", tool_calls=[{"name": "add", "arguments": {"a": 1, "b": b}}])
    sides = [[user("1+1?"), add(b), {"role": "tool", "content": str(b + 1)}, says(f"It is {b + 1}.")] for b in (1, 2)]
    rows = [
        {
            "chosen": [user("What does it cost?"), says("\n\nSeven coins.")],
            "rejected": [user("What does it cost?"), says("Seven coins.")],
        },
        {"chosen": sides[0], "rejected": sides[1], "tools": [{"name": "add", "parameters": {}}]},
    ]
    for row, untrained in zip(rows, (1, 28)):
        ds = PreferenceDataset(jsonl(tmp_path / "dpo.jsonl", row), TOKENIZER, max_seq_len=512)
        (batch,) = PairLoader(ds, packing=True, batch_size=1, accumulation_steps=1, max_seq_len=512).batches(0)
        _, *answers = ds.pair(0)
        expected = np.concatenate([ids[trained] for ids, trained in answers])
        assert sum(int((~trained).sum()) for _, trained in answers) == untrained, "or nothing is tested"
        assert batch.targets[batch.targets != -100].tolist() == expected.tolist()
        assert batch.trained_tokens == len(expected)
