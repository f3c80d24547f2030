"""Layouts: each gives the canonical row spelled out here, and the tokens and labels that follow from it.

The reading of a file (head, mapping, two layouts in one) is below, after the layouts themselves.
"""

import json
import re
from pathlib import Path

import pytest

from dataset.read.formats import DIALOGUES, LAYOUTS, QUESTIONS, canonical, layout_of
from dataset.read.jsonl import Head, Jsonl
from dataset.read.mapping import find_reader, read_mapping
from tests.helpers.datasets import pretrain, sft
from tests.helpers.layouts import ADD, ANSWER, BAD, CHATS, GPT_TURNS, ONE, PAIRS, SYSTEM, TOOLS, USER
from tests.helpers.rows import jsonl
from tests.helpers.tokenizers import text


def to_conversation(row):
    """(messages, tools)"""
    found = canonical(row, "chat")
    return found["messages"], found.get("tools")


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_in_any_layout_is_the_same_row(tmp_path, name):
    row, messages = CHATS[name]
    assert canonical(row, "chat") == {"messages": messages}
    ours = sft(jsonl(tmp_path / "ours.jsonl", {"conversations": messages}), max_seq_len=200)
    theirs = sft(jsonl(tmp_path / "theirs.jsonl", row), max_seq_len=200)
    assert theirs.tokens(0).tolist() == ours.tokens(0).tolist()
    assert theirs.trained(0).tolist() == ours.trained(0).tolist()


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "1+1?", "input": "", "output": "2", "system": "be"},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}], "system": "be"},
        {"system": "be", "conversation": [{"human": "1+1?", "assistant": "2"}]},
        {"prompt": "1+1?", "completion": "2", "system": "be"},
    ],
)
def test_labels_token_by_token(tmp_path, row):
    """A byte is a token here. Trained on, marked ^: the answer and the token that ends it, nothing else."""
    ds = sft(jsonl(tmp_path / "a.jsonl", row))
    assert text(ds.tokens(0)) == "[system\nbe]\n[user\n1+1?]\n[assistant\n2]"
    assert "".join(".^"[int(t)] for t in ds.trained(0)) == "." * 12 + "." * 12 + "." * 11 + "^^"


def test_calls_and_their_results():
    """ShareGPT's function_call and observation, OpenAI's tool_calls, and parts, are one conversation."""
    calls = [USER, {"role": "assistant", "content": "", "tool_calls": [ADD]}, {"role": "tool", "content": "2"}, ANSWER]
    sharegpt = [
        GPT_TURNS[0],
        {"from": "function_call", "value": json.dumps(ADD)},
        {"from": "observation", "value": "2"},
        GPT_TURNS[1],
    ]
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    openai = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ANSWER,
    ]
    parts = [
        USER,
        {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(ADD)}]},
        {"role": "tool", "content": [{"type": "text", "value": "2"}]},
        ANSWER,
    ]
    minimind = [{"role": "system", "content": "be", "tools": json.dumps(TOOLS)}, *calls]
    minimind[2] = minimind[2] | {"tool_calls": json.dumps([ADD])}
    assert to_conversation({"conversations": sharegpt, "tools": json.dumps([{"name": "add"}])}) == (calls, TOOLS)
    assert to_conversation({"messages": openai, "tools": TOOLS}) == (calls, TOOLS)
    assert to_conversation({"messages": parts, "tools": json.dumps(TOOLS)}) == (calls, TOOLS)
    assert to_conversation({"conversations": minimind}) == ([SYSTEM, *calls], TOOLS)
    two = to_conversation({"conversations": [GPT_TURNS[0], {"from": "function_call", "value": json.dumps([ADD, ADD])}]})
    assert two[0][1]["tool_calls"] == [ADD, ADD], "several calls at once, as a list"


@pytest.mark.parametrize("name", PAIRS)
def test_a_preference_in_any_layout_is_the_same_row(name):
    assert canonical(PAIRS[name], "preference") == {"chosen": ONE, "rejected": [USER, BAD]}
    with_system = canonical(PAIRS[name] | {"system": "be", "tools": '[{"name": "add"}]'}, "preference")
    assert with_system == {"chosen": [SYSTEM, *ONE], "rejected": [SYSTEM, USER, BAD], "tools": TOOLS}


def test_rated_answers():
    for row in (
        {"prompt": "hi", "completion": "yo", "label": False},
        {"messages": ONE, "label": False},
        {"instruction": "hi", "output": "yo", "kto_tag": False},
    ):
        assert canonical(row) == {"messages": ONE, "label": False}
    # a class is no rating
    assert canonical({"prompt": "hi", "completion": "yo", "label": "greeting"}) == {"messages": ONE}


def test_every_layout_in_the_table_can_be_read():
    asked = dict.fromkeys(QUESTIONS, "hi") | dict.fromkeys(DIALOGUES, [USER, ANSWER])
    for kind, columns, *_ in LAYOUTS:
        row = dict.fromkeys(columns, "yo") | {key: asked[key] for key in columns if key in asked}
        if columns == ("chosen", "rejected"):
            row = dict.fromkeys(columns, ONE)
        if "message_tree_id" in columns:
            row["prompt"] = {"role": "prompter", "text": "hi", "replies": [{"role": "assistant", "text": "yo"}]}
        found = canonical(row)
        last = {"text": "yo"} if kind == "text" else (found.get("rejected") or found["messages"])[-1]
        assert last in (found, ANSWER), columns
        assert canonical(row | {"note": 1, "label": "a"}) == found, "other columns do not matter"


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"conversation": [{"human": "hi"}]}, 'conversation[0] must be {"role", "content"} or {"from", "value"}'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]: only text can be read"),
        ({"instruction": "hi", "output": 42}, '"output" must be text or a list of messages, this is int 42'),
        ({"instruction": ["hi"], "output": "yo"}, '"instruction" must be text'),
        ({"instruction": "Even?", "input": 0, "output": "yes"}, '"input" must be text, this is int 0'),
        ({"instruction": "hi", "output": ""}, "output: the assistant says nothing"),
        ({"instruction": "hi", "output": "yo", "history": [["hi"]]}, "history[0] must be [question, answer]"),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "conversations[0].tool_calls: not JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, 'a call must be {"name", "arguments"}'),
        ({"chosen": "yo", "rejected": "go"}, '"chosen" must be messages, or text beside a "prompt"'),
        ({"prompt": "hi", "chosen": "yo", "rejected": 1}, '"rejected" must be text or a list of messages'),
        ({"chosen": [], "rejected": []}, '"chosen" must be text or a list of messages'),
        ({"labels": 1}, 'no known layout in this row, it has "labels"'),
    ],
)
def test_what_is_wrong_with_a_row(row, reason):
    with pytest.raises(ValueError) as error:
        canonical(row)
    assert reason in str(error.value)


def test_calls_that_are_cut_off_do_not_go_on_in_the_next_line():
    """They are text within a row, which is whole."""
    with pytest.raises(ValueError) as error:
        canonical({"conversations": [{"from": "function_call", "value": '[{"name": "f"'}]})
    assert str(error.value).endswith("(broken JSON at column 14: Expecting ',' delimiter)")


def test_the_examples_of_the_page_are_read():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    kinds = []
    for block in re.findall(r"```json\n(.*?)```", page, re.S):
        rows = [json.loads(line) for line in block.splitlines()]
        kinds.append({layout_of(row).kind for row in rows})
        for row in rows:
            canonical(row)
    assert kinds == [{"text"}, *[{"chat"}] * 4, {"preference"}, {"rated"}, {"chat"}]


def test_real_files(shared, tmp_path):
    """What people keep, as it is: every row can be read, and the layouts agree where they hold the same rows."""
    folder = shared / "data" / "formats"
    found = {}
    for path in sorted(folder.iterdir()):
        rows = Jsonl(path, cache_dir=tmp_path)
        read = find_reader(rows)
        found[path.name] = [read(rows.raw(i)) for i in range(len(rows))]
        layout = f"{read.kind}: {read.layout}"
        assert (
            layout
            == {
                "alpaca.json": "chat: instruction + output",
                "alpaca.jsonl": "chat: instruction + output",
                "kto.json": "rated: messages + label",
                "openai_messages.jsonl": "chat: messages",
                "prompt_completion.jsonl": "chat: prompt + completion",
                "reason_tool_use.jsonl": "chat: messages",
                "sharegpt_dpo.json": "preference: conversations + chosen + rejected (from, value)",
                "sharegpt_tools.json": "chat: conversations (from, value)",
                "system_human_assistant.jsonl": "chat: conversation",
            }[path.name]
        )
    assert found["alpaca.json"] == found["alpaca.jsonl"]
    assert found["openai_messages.jsonl"] == found["prompt_completion.jsonl"] == found["alpaca.jsonl"][:20]
    assert [row["messages"][1:3] for row in found["system_human_assistant.jsonl"]] == [
        row["messages"] for row in found["openai_messages.jsonl"]
    ]
    calls = [m for row in found["reason_tool_use.jsonl"] for m in row["messages"] if m.get("tool_calls")]
    assert len(calls) == 29 and all(m["reasoning_content"] for m in calls)
    assert all(len(row["chosen"]) == 2 for row in found["sharegpt_dpo.json"][:1])


# ---- one file


def test_two_layouts_in_one_file_are_named_with_both_lines(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", {"instruction": "hi", "output": "yo"}, "", {"conversations": ONE})
    with pytest.raises(ValueError) as error:
        sft(file)
    assert str(error.value).startswith(f"{file}:3: laid out as conversations, while line 1 is instruction + output")
    jsonl(file, {"conversations": ONE}, {"conversations": GPT_TURNS})
    with pytest.raises(ValueError, match=r":2: laid out as conversations \(from, value\), while line 1 is conver"):
        sft(file)
    ds = sft(file, on_bad_row="skip")
    assert len(ds) == 1 and "1 bad rows skipped" in ds.summary


def test_data_of_another_kind_says_what_it_is(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", PAIRS["a prompt and text"])
    with pytest.raises(ValueError, match=r'a.jsonl:1: no conversation .* has "prompt", "chosen", .*: it is a pair'):
        sft(file)
    jsonl(file, {"prompt": "hi", "completion": "yo"})
    with pytest.raises(ValueError, match='a.jsonl:1: no "text" in this row, it has .*: it is a conversation'):
        pretrain(file)


def test_a_file_of_another_kind_is_known_by_its_first_rows(tmp_path, monkeypatch):
    """Every row of a file of the wrong kind was parsed before the error, which then advised to skip them all."""
    file = jsonl(tmp_path / "a.jsonl", *["{"] * 3, *[PAIRS["a prompt and text"]] * 200)
    read = []
    monkeypatch.setattr(Head, "raw", lambda self, i, raw=Head.raw: read.append(i) or raw(self, i))
    with pytest.raises(ValueError, match=r"a.jsonl:4: no conversation .*: it is a pair") as error:
        sft(file, on_bad_row="skip")
    assert len(read) == 100 and "on_bad_row" not in str(error.value)


def test_a_mapping_reads_anyones_columns(tmp_path):
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(
        """
columns: {conversations: 对话, system: persona}
turns: {role: speaker, content: words}
roles: {user: [customer, guest], assistant: agent}
""",
        encoding="utf-8",
    )
    turns = [{"speaker": "guest", "words": "hi"}, {"speaker": "agent", "words": "yo"}]
    row = {"对话": turns, "persona": "be", "text": "is not asked for"}
    ds = sft(jsonl(tmp_path / "a.jsonl", row), mapping=read_mapping(mapping))
    assert text(ds.tokens(0)) == "[system\nbe]\n[user\nhi]\n[assistant\nyo]"

    mapping.write_text("columns: {messages: turns}\nroles: {user: [0, guest], assistant: 1}", encoding="utf-8")
    numbered = {"turns": [{"role": 0, "content": "hi"}, {"role": 1, "content": "yo"}]}
    ds = sft(jsonl(tmp_path / "c.jsonl", numbered), mapping=read_mapping(mapping))
    assert text(ds.tokens(0)) == "[user\nhi]\n[assistant\nyo]"

    mapping.write_text("columns: {instruction: input, input: output, output: instruction}", encoding="utf-8")
    swapped = jsonl(tmp_path / "b.jsonl", {"input": "Add.", "output": "1+1", "instruction": "2"})
    ds = sft(swapped, mapping=read_mapping(mapping))
    assert text(ds.tokens(0)) == "[user\nAdd.\n1+1]\n[assistant\n2]"
    # the mapping is part of what the cache is of
    mapping.write_text("columns: {instruction: instruction, output: output}", encoding="utf-8")
    assert text(sft(swapped, mapping=read_mapping(mapping)).tokens(0)) == "[user\n2]\n[assistant\n1+1]"


def test_a_mapping_that_names_missing_columns_lists_those_there_are(tmp_path):
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text("columns: {instruction: question_text, output: reply}", encoding="utf-8")
    file = jsonl(tmp_path / "a.jsonl", {"question": "hi", "reply": "yo"}, {"question": "hi", "id": 3})
    with pytest.raises(ValueError) as error:
        sft(file, mapping=read_mapping(mapping))
    assert str(error.value) == (
        f'{file}:1: --data_mapping {mapping}: no column "question_text"; the file has "question", "reply", "id"'
    )


@pytest.mark.parametrize(
    "content, reason",
    [
        ("instruction: a", "expected `columns: {"),
        ("columns: {instructon: a}", "columns: instructon is none of our names; did you mean instruction?"),
        ("columns: {instruction: [a]}", "columns: instruction: ['a'] is no name of yours"),
        ("columns: {text: a}\nrole: {user: b}", "role: expected the sections columns, turns, roles"),
        ("columns: {text: a", ":1: "),
    ],
)
def test_what_is_wrong_with_a_mapping(tmp_path, content, reason):
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        read_mapping(mapping)
    assert f"--data_mapping {mapping}" in str(error.value) and reason in str(error.value)
    with pytest.raises(ValueError, match="No such file"):
        read_mapping(tmp_path / "none.yaml")


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    """JSON readers keep the last one and say nothing: the answer one sees is not the one that is trained on."""
    row = '{"prompt": "hi", "completion": "yo", "completion": "no"}'
    for data in (row, f"[{row}]"):
        (tmp_path / "a.jsonl").write_text(data, encoding="utf-8")
        with pytest.raises(ValueError, match='a.jsonl:1: the key "completion" stands twice in one object'):
            sft(tmp_path / "a.jsonl")


def test_a_json_array_says_the_line_of_its_bad_row(tmp_path):
    file = tmp_path / "a.json"
    rows = [{"instruction": "a\nb", "output": "yo"}, {"instruction": "hi", "output": ""}]
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    with pytest.raises(ValueError, match="a.json:6: output: the assistant says nothing"):
        sft(file)
    file.write_text(json.dumps(rows[:1], indent=1), encoding="utf-8")
    assert "a\nb" in text(sft(file).tokens(0))


@pytest.mark.parametrize(
    "row, asked",
    (
        (
            {"instruction": "Who?", "context": "Lucy lives here.", "response": "Lucy", "category": "qa"},
            "Who?\nLucy lives here.",
        ),
        ({"prompt": "Add.", "input": "1+1", "completion": "2"}, "Add.\n1+1"),
        ({"question": "Who?", "context": "", "answer": "Lucy"}, "Who?"),
    ),
)
def test_what_a_question_is_about_stands_below_it(row, asked):
    """Dolly's passages were dropped, and the model learned to answer about texts that it had not seen."""
    messages, _ = to_conversation(row)
    assert messages[0] == {"role": "user", "content": asked} and len(messages) == 2


def test_a_system_prompt_by_its_other_name():
    row = {"system_prompt": "Be brief.", "question": "hi", "response": "yo"}  # OpenOrca
    assert to_conversation(row)[0][0] == {"role": "system", "content": "Be brief."}
    pair = canonical({"system_prompt": "Be brief.", "prompt": "hi", "chosen": "yo", "rejected": "no"}, "preference")
    assert pair["chosen"][0]["role"] == pair["rejected"][0]["role"] == "system"


def test_a_call_beside_text_is_kept():
    turns = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "Let me see.", "function_call": {"name": "add", "arguments": '{"a": 1}'}},
    ]
    assert to_conversation({"messages": turns})[0][1]["tool_calls"] == [{"name": "add", "arguments": {"a": 1}}]
