"""Multiple choice in the layouts of C-Eval, CMMLU, MMLU and ARC, and the three ways to choose, one row at a time."""

import json

import numpy as np
import pytest
import torch

from common.console import UserError
from evaluation.choice import Choice, read_choices, score
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


def test_a_label_that_is_a_number_counts_from_one_where_the_labels_do(tmp_path):
    """ARC has some questions with the labels 1 to 4. Taken for a position, "2" would be the third option."""
    (tmp_path / "a.jsonl").write_text(FILES["arc.jsonl"])
    assert read_choices(tmp_path / "a.jsonl")[0].right == 1
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "?", "choices": OPTIONS, "answer": 2}))
    assert read_choices(tmp_path / "b.jsonl")[0].right == 2


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", "id,question,A,B,C,D,answer\n0,1+1?,one,two,three,four,\n", "a.csv:2: the right option is ''"),
        ("a.csv", "id,question,A,B,C,D,answer\n0,1+1?,one,two\n", "a.csv:2: 4 columns, where the first line has 7"),
        ("a.jsonl", '{"question": "a", "answer": "b"}', "a.jsonl:1: no multiple choice"),
        ("a.jsonl", '{"question": "a", "choices": ["b", "c"], "answer": 2}', "a.jsonl:1: the right option is 2"),
        ("a.csv", "", "a.csv: there is no question in it"),
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


def test_a_text_model_scores_what_follows_the_prompt():
    from evaluation.choice import _text_row

    row = _text_row(TOKENIZER, Choice("", "1+1?", ("two",), 0), "1+1?", "two")
    trained = [i for i, label in zip(row.ids, row.trained) if label]
    assert TOKENIZER.decode(row.ids[1:]) == "Question: 1+1?\nAnswer: two" and TOKENIZER.decode(trained) == " two"
    row = _text_row(TOKENIZER, Choice("", "一加一？", ("二",), 0), "一加一？", "二")
    assert TOKENIZER.decode(row.ids[1:]) == "问题：一加一？\n答案：二"
