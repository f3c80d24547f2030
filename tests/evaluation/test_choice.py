"""Multiple choice in the layouts of C-Eval, CMMLU, MMLU and ARC, and the three ways to choose, one row at a time."""

import json

import numpy as np
import pytest
import torch

from common.console import UserError
from evaluation.choice import Choice, _chat_row, _text_row, as_choice, read_choices, read_examples, score
from tests.helpers.models import TOKENIZER, small_model
from tokenizer.chat import encode_chat

OPTIONS = ("one", "two", "three", "four")
FILES = {
    "ceval_val.csv": "id,question,A,B,C,D,answer\n0,1+1?,one,two,three,four,B\n",
    "cmmlu_test.csv": ",Question,A,B,C,D,Answer\n0,1+1?,one,two,three,four,B\n",
    "mmlu_test.csv": '"1+1?",one,two,three,four,B\n',
    "mmlu.jsonl": json.dumps({"question": "1+1?", "subject": "maths", "choices": OPTIONS, "answer": 1}),
    "letters.jsonl": json.dumps({"question": "1+1?", **dict(zip("ABCD", OPTIONS)), "answer": "B"}),
    "text.jsonl": json.dumps({"question": "1+1?", "options": OPTIONS, "answer": "two"}),
    "arc.jsonl": json.dumps(
        {
            "id": "x",
            "question": {"stem": "1+1?", "choices": [{"text": t, "label": str(n + 1)} for n, t in enumerate(OPTIONS)]},
            "answerKey": "2",
        }
    ),
    "arc_hub.jsonl": json.dumps(
        {"question": "1+1?", "choices": {"text": OPTIONS, "label": list("ABCD")}, "answerKey": "B"}
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_layouts(tmp_path, name):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8-sig")
    (found,) = read_choices(tmp_path / name)
    assert (found.question, found.options, found.right) == ("1+1?", OPTIONS, 1)
    assert found.listed == "1+1?\nA. one\nB. two\nC. three\nD. four"


def test_a_table_with_tabs_and_blank_lines(tmp_path):
    (tmp_path / "a.tsv").write_text("question\tA\tB\tanswer\n1+1?\t1\t2\tb\n\t\t\t\n2+2, or?\t4\t5\tA\n3?\t3\t1\tA\n")
    found = read_choices(tmp_path / "a.tsv", limit=2)
    assert [(q.where[-1], q.question, q.options, q.right) for q in found] == [
        ("2", "1+1?", ("1", "2"), 1),
        ("4", "2+2, or?", ("4", "5"), 0),
    ]
    assert len(read_choices(tmp_path / "a.tsv")) == 3


def test_labels_of_the_hub_that_are_numbers(tmp_path):
    """In whatever order: the label says which option is meant."""
    row = {"question": "1+1?", "choices": {"text": OPTIONS, "label": list("4321")}, "answerKey": "3"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert read_choices(tmp_path / "a.jsonl")[0].right == 1


def test_labels_may_be_small_letters_or_words(tmp_path):
    """They were not found: "b" was the second option, whatever its label, and "yes" an error."""
    for labels, answer, right in ((list("dcba"), "b", 2), (["yes", "no", "both", "none"], "both", 2)):
        row = {"question": "1+1?", "choices": {"text": OPTIONS, "label": labels}, "answerKey": answer}
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        assert read_choices(tmp_path / "a.jsonl")[0].right == right


def test_a_label_that_is_a_number_counts_from_one_where_the_labels_do(tmp_path):
    """ARC has some questions with the labels 1 to 4. Taken for a position, "2" would be the third option."""
    (tmp_path / "a.jsonl").write_text(FILES["arc.jsonl"])
    assert read_choices(tmp_path / "a.jsonl")[0].right == 1
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "?", "choices": OPTIONS, "answer": 2}))
    assert read_choices(tmp_path / "b.jsonl")[0].right == 2


def test_an_option_that_is_a_number_may_be_named_by_its_text(tmp_path):
    """ "3" among 2, 3, 4 and 5 was taken for a position: the answer 5 counted as right."""

    def right(answer, *options, name="a.jsonl"):
        text = json.dumps(dict(question="1+2?", choices=options, answer=answer))
        if name == "a.csv":
            text = "\n".join([",".join(("question", *"ABCD", "answer")), ",".join(("1+2?", *options, answer))])
        (tmp_path / name).write_text(text, encoding="utf-8")
        (found,) = read_choices(tmp_path / name)
        return found.options[found.right]

    for name in ("a.jsonl", "a.csv"):
        assert right("3", "2", "3", "4", "5", name=name) == "3"
        assert right("0", "2", "3", "4", "5", name=name) == "2", "no option is called 0: a position"
        assert right("1", "1", "3", "1", "5", name=name) == "3", "two are called 1: a position"
        assert right("²", "1", "2", "²", "5", name=name) == "²"  # a digit that int() does not read
        assert right("B", "C", "D", "B", "A", name=name) == "D", "a letter is a letter"
    assert right(3, "2", "3", "4", "5") == "5", "a number in JSON is a position"
    assert right("3", 2, 3, 4, 5) == "3"


def test_an_empty_option_does_not_shift_the_letters(tmp_path):
    """C is the second of the three that are there, and is shown as B. The third option was taken for right."""
    (tmp_path / "a.csv").write_text("question,A,B,C,D,answer\n1+1?,one,,two,four,C\n")
    (found,) = read_choices(tmp_path / "a.csv")
    assert found.options == ("one", "two", "four") and found.options[found.right] == "two"
    assert found.listed == "1+1?\nA. one\nB. two\nC. four"


def test_eleven_options():
    """More than the ten of MMLU-Pro: as many letters as options are read."""
    model = small_model().eval()
    question = as_choice(dict(question="which?", choices=[f"word {n}" for n in range(11)], answer="K"), "a:1")
    assert question and question.right == 10 and question.listed.endswith("K. word 10")
    assert {way: rows.shape for way, rows in score(model, TOKENIZER, [question]).items()} == dict.fromkeys(
        ("choice", "choice_norm", "letter"), (1, 2)
    )


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", "id,question,A,B,C,D,answer\n0,1+1?,one,two,three,four,\n", "a.csv:2: the right option is ''"),
        ("a.csv", "id,question,A,B,C,D,answer\n0,1+1?,one,two\n", "a.csv:2: 4 columns, where the first line has 7"),
        ("a.jsonl", '{"question": "a", "answer": "b"}', "a.jsonl:1: no multiple choice"),
        ("a.jsonl", '{"question": "a", "choices": ["b", "c"], "answer": 2}', "a.jsonl:1: the right option is 2"),
        ("a.csv", "", "a.csv: there is no question in it"),
        ("a.csv", '"1+1?,1,2,A\n' + "1+1?,1,2,A\n" * 12000, "a.csv:11916: field larger than field limit"),
        ("a.csv", '"1+1?",one,two,three,four,BC\n', "a.csv:1: the right option is 'BC'"),  # not B: two are right
        ("a.jsonl", json.dumps(dict(question="?", choices=["x"] * 27, answer=0)), "a.jsonl:1: 27 options"),
    ],
)
def test_bad_rows(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_choices(tmp_path / name)
    assert complaint in str(error.value)


@torch.no_grad()
def test_the_three_ways_to_choose():
    """Each option alone in its row, with plain logits: the sum over the answer's tokens and its end."""
    model = small_model(std=0.2).eval()
    questions = [
        Choice("", f"question {n}?", ("yes", "perhaps, or perhaps not", "no", "大概"), n % 4) for n in range(12)
    ]

    def likelihood(question, answer):
        ids, trained = encode_chat(
            TOKENIZER, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        )
        logp = model(torch.tensor([ids[:-1]])).logits.log_softmax(-1)[0].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        return float(logp[torch.tensor(trained[1:])].sum())

    found, norm = score(model, TOKENIZER, questions), []
    for n, q in enumerate(questions):
        sums = np.array([likelihood(q.question, option) for option in q.options])
        letters = np.array([likelihood(q.listed, letter) for letter in "ABCD"])
        norm.append((sums / [len(option.encode()) for option in q.options]).argmax())
        assert found["choice"][n].tolist() == [sums.argmax() == q.right, 1]
        assert found["choice_norm"][n].tolist() == [norm[-1] == q.right, 1]
        assert found["letter"][n].tolist() == [letters.argmax() == q.right, 1]
    assert {q.options[i] for q, i in zip(questions, norm)} != {"yes"}  # else the lengths would not have mattered


def test_what_is_summed_and_divided(monkeypatch):
    """Given likelihoods: 你好 has 6 bytes and yes! 4, so -6 for each is -1 and -1.5 a byte; by characters yes! would
    win. The example is solved by its text before a text, and by its letter before a letter."""
    rows = []

    def likelihoods(model, encoded, **_):
        rows.extend(TOKENIZER.decode(row.ids) for row in encoded)
        return [np.array([own]) for own in (-6.5, -6, -2, -1)]

    monkeypatch.setattr("evaluation.choice.log_likelihoods", likelihoods)
    question, example = Choice("", "which?", ("你好", "yes!"), 0), Choice("", "1+1?", OPTIONS, 1)
    found = score(small_model(), TOKENIZER, [question], examples=[example])
    assert {way: own.tolist() for way, own in found.items()} == dict(
        choice=[[0, 1]], choice_norm=[[1, 1]], letter=[[0, 1]]
    )
    assert all("1+1?<|im_end|>" in row and "assistant\ntwo<|im_end|>" in row for row in rows[:2])
    assert all("D. four<|im_end|>" in row and "assistant\nB<|im_end|>" in row for row in rows[2:])


def test_a_text_model_scores_what_follows_the_prompt():
    row = _text_row(TOKENIZER, [("1+1?", "two")])
    trained = [i for i, label in zip(row.ids, row.trained) if label]
    assert TOKENIZER.decode(row.ids[1:]) == "Question: 1+1?\nAnswer: two" and TOKENIZER.decode(trained) == " two"
    row = _text_row(TOKENIZER, [("1+1?", "two or three")])
    assert TOKENIZER.decode([i for i, label in zip(row.ids, row.trained) if label]) == " two or three"
    row = _text_row(TOKENIZER, [("一加一？", "二")])
    assert TOKENIZER.decode(row.ids[1:]) == "问题：一加一？\n答案：二"
    row = _text_row(TOKENIZER, [("1+1?", "two"), ("2+2?", "four")])
    assert TOKENIZER.decode(row.ids[1:]) == "Question: 1+1?\nAnswer: two\n\nQuestion: 2+2?\nAnswer: four"
    assert TOKENIZER.decode([i for i, label in zip(row.ids, row.trained) if label]) == " four"
    row = _text_row(TOKENIZER, [("1+1?", "two"), ("二加二？", "四")])  # the words are those of what is asked
    assert TOKENIZER.decode(row.ids[1:]).endswith("问题：二加二？\n答案：四")


# ---- with examples


@torch.no_grad()
def test_examples_stand_before_the_question_and_do_not_count():
    """Two of them, as turns: the sum over the last answer and its end only, given all that is before."""
    model = small_model(std=0.2).eval()
    examples = [Choice("", "1+1?", OPTIONS, 1), Choice("", "2+2?", OPTIONS, 3)]
    questions = [Choice("", f"question {n}?", ("yes", "no"), n % 2) for n in range(8)]
    turn = lambda role, content: {"role": role, "content": content}

    def likelihood(shown, question, answer):
        before = [turn(*pair) for q, a in shown for pair in (("user", q), ("assistant", a))]
        prompt = encode_chat(TOKENIZER, [*before, turn("user", question)], add_generation_prompt=True).ids
        ids = [*prompt, *TOKENIZER.encode(answer), TOKENIZER.im_end]
        logp = model(torch.tensor([ids[:-1]])).logits.log_softmax(-1)[0]
        return sum(float(logp[t - 1, ids[t]]) for t in range(len(prompt), len(ids)))

    found = score(model, TOKENIZER, questions, examples=examples)
    listed = "1+1?\nA. one\nB. two\nC. three\nD. four"
    for n, q in enumerate(questions):
        sums = [likelihood([("1+1?", "two"), ("2+2?", "four")], q.question, option) for option in q.options]
        assert found["choice"][n, 0] == (np.argmax(sums) == q.right)
        shown = [(listed, "B"), (listed.replace("1+1", "2+2"), "D")]
        letters = [likelihood(shown, q.listed, letter) for letter in "AB"]
        assert found["letter"][n, 0] == (np.argmax(letters) == q.right)
    row = _chat_row(TOKENIZER, [("1+1?", "two"), ("2+2?", "four")])
    assert "two<|im_end|>" in TOKENIZER.decode(row.ids)
    assert TOKENIZER.decode([i for i, label in zip(row.ids, row.trained) if label]) == "four<|im_end|>"


def test_where_the_examples_of_a_file_are(tmp_path):
    """C-Eval's val/x_val.csv has dev/x_dev.csv, CMMLU's test/y.csv has dev/y.csv; or the file lies beside."""
    for folder in ("val", "test", "dev"):
        (tmp_path / folder).mkdir()
    question = FILES["ceval_val.csv"]
    for name in ("val/x_val.csv", "dev/x_dev.csv", "test/y.csv", "dev/y.csv", "z_test.csv", "z_dev.csv", "alone.csv"):
        (tmp_path / name).write_text(question.replace("1+1", name))
    for name, expected in (
        ("val/x_val.csv", "dev/x_dev.csv"),
        ("test/y.csv", "dev/y.csv"),
        ("z_test.csv", "z_dev.csv"),
    ):
        (example,) = read_examples(tmp_path / name, 1)
        assert example.question == f"{expected}?"
    with pytest.raises(UserError, match="x_dev.csv has only 1 questions"):
        read_examples(tmp_path / "val/x_val.csv", 5)
    with pytest.raises(UserError, match="--num_fewshot 5: .*alone.csv has no examples; put them into .*alone_dev.csv"):
        read_examples(tmp_path / "alone.csv", 5)
