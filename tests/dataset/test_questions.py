"""Questions in the layouts that people keep them in; the last answer is the reference."""

import json

import pytest

from common.console import UserError
from dataset.read.questions import question, read_questions

HI = [{"role": "user", "content": "hi"}]
ROWS = {
    "text": "hi",
    "prompt": {"prompt": "hi", "id": 3},
    "question": {"question": "hi"},
    "alpaca without an answer": {"instruction": "hi", "input": ""},
    "messages": {"messages": HI},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}]},
}
ANSWERED = {
    "alpaca": {"instruction": "hi", "output": "hello"},
    "question and answer": {"question": "hi", "answer": "hello"},
    "messages": {"messages": [*HI, {"role": "assistant", "content": "hello"}]},
    "with reasoning": {"messages": [*HI, {"role": "assistant", "content": "<think>a</think><answer>hello</answer>"}]},
    "preference": {"prompt": "hi", "chosen": "hello", "rejected": "go away"},
    "rated good": {"prompt": "hi", "completion": "hello", "label": True},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_question_without_an_answer(name):
    found = question(ROWS[name])
    assert (found.messages, found.references, found.asked) == (HI, (), "hi")


@pytest.mark.parametrize("name", ANSWERED)
def test_the_answer_is_the_reference(name):
    found = question(ANSWERED[name])
    assert (found.messages, found.references) == (HI, ("hello",))


def test_the_last_answer_is_asked_for_and_what_comes_before_is_context():
    turns = [*HI, {"role": "assistant", "content": "hello"}, *HI, {"role": "assistant", "content": "again"}]
    found = question({"messages": turns})
    assert found.messages == turns[:3] and found.references == ("again",) and found.conversation == turns


def test_an_answer_labelled_bad_is_no_reference():
    found = question({"prompt": "hi", "completion": "go away", "label": False})
    assert (found.messages, found.references) == (HI, ())


def test_the_worse_answer_of_a_pair_is_kept():
    assert question(ANSWERED["preference"]).rejected == [*HI, {"role": "assistant", "content": "go away"}]


FILES = {
    "a.txt": "\ufeffhi\n\n hi \n",
    "a.jsonl": '{"prompt": "hi"}\n\n{"question": "hi", "answer": "hello"}\n',
    "a.json": json.dumps(["hi", {"prompt": "hi"}], indent=1),
    "b.json": json.dumps({"questions": [{"prompt": "hi"}, "hi"], "version": 1}),
    "c.json": '{"prompt": "hi"}\n{"prompt": "hi"}\n',  # lines, whatever the file is called
    "d.json": '{"note": "a\u2028b", "prompt": "hi"}\n{"prompt": "hi"}\n',  # this is no line end in JSON
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8")
    found = read_questions(path)
    assert [q.messages for q in found] == [HI, HI] and found[0].where.startswith(str(path))
    assert len(read_questions(path, limit=1)) == 1


def test_rows_in_one_line_have_names_of_their_own(tmp_path):
    """What json.dump writes. Results are kept by the name of the row, so two rows of one name were one row."""
    (tmp_path / "a.json").write_text('["a", "b",\n"c", "d"]', encoding="utf-8")
    names = [q.where.rpartition(":")[2] for q in read_questions(tmp_path / "a.json")]
    assert names == ["1", "1 row 2", "2", "2 row 4"]


def test_kinds_as_a_column_and_as_a_section(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"maths": ["1+1?"], "poems": [{"prompt": "spring"}]}))
    assert [(q.kind, q.asked) for q in read_questions(tmp_path / "a.json")] == [("maths", "1+1?"), ("poems", "spring")]
    assert question({"prompt": "hi", "category": "greeting"}).kind == "greeting"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt" "b"}\n', "a.jsonl:2: broken JSON at column 11"),
        ("a.jsonl", '{"ask": "a"}\n', "a.jsonl:1: no question in this row, it has ask; expected one of instruction"),
        ("a.jsonl", '{"text": "a"}\n', 'a.jsonl:1: "text" is a document'),
        ("a.jsonl", "7\n", "a.jsonl:1: a question is text or an object, this is int"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt":\n"b"}\n', "column 11: Expecting value; it is cut off, or goes on"),
        ("a.json", '{"prompt": "a"}\n{"prompt" "b"}\n', "a.json:2: broken JSON at column 11"),
        ("a.json", '{"prompt": 7}', "a.json"),
        ("a.json", "{}", "a.json: expected a list of questions"),
        ("a.txt", "\n \n", "a.txt: there is no question in it"),
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.txt", "早上好\n".encode("gbk"), "a.txt:1: not UTF-8 at byte 1; it looks like gbk"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_questions(tmp_path / name)
    assert complaint in str(error.value)
