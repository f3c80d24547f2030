"""The figures of a comparison, one at a time: what is counted, of which rows, and what is never compared."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.files import ROOT
from dataset.read.questions import Question, read_questions
from evaluation.compare import _figures, _held_out, _identity, _mean_bits, _readings, _strays, compare
from evaluation.lineage import History
from evaluation.measure import Settings
from evaluation.models import Contender
from evaluation.side_by_side import Talk, converse
from evaluation.votes import read_votes
from inference.answers import GREEDY, Answer, prompt_ids
from inference.session import Session
from model.lora import LoRASettings, activate, adapted, add_lora
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.rows import chat, jsonl
from tokenizer.text import Tokenizer


def contender(name: str, std: float = 0.05, tokenizer: Tokenizer = TOKENIZER, stage="full_sft", **shape) -> Contender:
    history = History(name, "", {}, [dict(stage=stage)])
    return Contender(name, small_model(std, **shape).eval(), None, tokenizer, history, 1)


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory) -> Tokenizer:
    """The shipped one with a tenth of its merges, and the ids of its words in reverse: other tokens for a text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for file in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((ROOT / "tokenizer" / file).read_bytes())
    spec = json.loads((ROOT / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["merges"] = spec["model"]["merges"][:600]
    control = {token["content"] for token in spec["added_tokens"]}
    words = {token: id for token, id in spec["model"]["vocab"].items() if token not in control}
    spec["model"]["vocab"] |= dict(zip(words, reversed(words.values())))
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return Tokenizer.load(folder)


def asked(text: str, answer: str | None = None) -> Question:
    known = None if answer is None else dict(role="assistant", content=answer)
    return Question("q:1", [dict(role="user", content=text)], known)


def answered(text: str, full: str = "") -> Answer:
    return Answer(TOKENIZER.encode(full or text), full or text, text, ended=True)


def row_of(figures, name):
    return next((row for row in figures if row["name"] == name), None)


# ---- tokenizers that differ


def test_each_reads_the_others_words_with_its_own_tokenizer(other_tokenizer):
    """-log2 p of the same text, encoded anew by the reader: recomputed with a plain forward pass."""
    text = "The sparrow is small, 麻雀虽小。"
    ours, theirs = contender("a"), contender("b", 0.07, other_tokenizer)
    assert not ours.tokenizer.same_ids(other_tokenizer)
    said = [[answered(text)], [Answer(other_tokenizer.encode(text), text, text, True)]]
    for reader in (ours, theirs):
        readings = _readings(reader, [ours, theirs], [asked("hi")], said, Settings())
        prompt, ids = reader.encode("hi"), reader.tokenizer.encode(text)
        log_p = reader.model(torch.tensor([prompt + ids[:-1]])).logits[0].log_softmax(-1)
        bits = -sum(log_p[len(prompt) - 1 + t, id].item() for t, id in enumerate(ids)) / math.log(2)
        for (reading,) in readings:
            assert "".join(reading["pieces"]) == text
            assert sum(reading["bits"]) == pytest.approx(bits, abs=0.1)
        assert _mean_bits(readings[0]) == pytest.approx(bits / len(text.encode()), abs=0.01)


def test_perplexity_is_compared_only_between_the_same_tokens(other_tokenizer, tmp_path):
    texts = jsonl(tmp_path / "t.jsonl", dict(text="a sparrow is small"), dict(text="麻雀虽小，五脏俱全"))
    models = [contender("a"), contender("b", 0.07), contender("c", 0.05, other_tokenizer)]
    (same,), (mixed,) = (_held_out(some, [texts], Settings()) for some in (models[:2], models))
    assert [row["name"] for row in same["figures"]] == ["ppl", "bpb"]
    assert [row["name"] for row in mixed["figures"]] == ["bpb"]
    assert all(math.isfinite(own["value"]) for own in mixed["figures"][0]["values"])


def test_bits_are_per_byte_not_per_character():
    assert _mean_bits([dict(pieces=["你", "a"], bits=[6.0, 2.0])]) == 2.0  # 3 bytes and 1
    assert _mean_bits([dict(pieces=[], bits=[])]) is None


# ---- which rows, and what of them


def test_the_language_is_that_of_the_reference_or_of_the_question():
    question = asked("翻译: sparrow", answer="It is a sparrow")
    assert _strays("a bird", question) == 0.0 and _strays("麻雀", question) == 1.0
    assert _strays("麻雀", asked("你好")) == 0.0 and _strays("42", asked("你好")) is None


def test_answers_are_graded_without_their_thoughts():
    figures = _figures([asked("1+1?", "2")], [[answered("2", "<think>\n1 and 1</think>2")], [answered("3")]])
    assert [own["value"] for own in row_of(figures, "exact")["values"]] == [1.0, 0.0]


def test_repetition_is_a_figure_of_answers_of_four_words():
    """a b c d a b c d: five groups of four words, of which one comes twice. Three words have no such group."""
    row = row_of(_figures([asked("hi")] * 2, [[answered("a b c"), answered("a b c d a b c d")]]), "rep_4")
    assert row["rows"] == 1 and row["values"][0]["value"] == pytest.approx(1 / 5)


def test_numbers_are_compared_only_where_the_file_marks_them():
    said = [[answered("so it is 4")], [answered("5")]]
    assert row_of(_figures([asked("2+2?", "4")], said), "number") is None
    row = row_of(_figures([asked("2+2?", "two and two\n#### 4")], said), "number")
    assert [own["value"] for own in row["values"]] == [1.0, 0.0] and row["changes"][1]["value"] == -1.0


def test_a_figure_that_cannot_be_said_is_left_out():
    """No reference has a number after its mark. The report said nan%, and its .json was none: it had a NaN in it."""
    found = _figures([asked("how many?", "#### none")], [[answered("3")], [answered("4")]])
    assert row_of(found, "exact") and row_of(found, "number") is None
    json.dumps(found, allow_nan=False)


def test_documents_are_read_in_the_same_windows(tmp_path):
    """The same weights with fewer positions seemed to have forgotten something: each was read in its own windows."""
    long, short = contender("long", 0.2), contender("short", 0.2, max_position_embeddings=64)
    (tmp_path / "a.txt").write_text("once upon a time " * 200, encoding="utf-8")
    (found,) = _held_out([long, short], [tmp_path / "a.txt"], Settings())
    assert abs(row_of(found["figures"], "bpb")["changes"][1]["value"]) < 1e-6


def test_rows_that_one_model_cannot_read_are_left_out_for_all(tmp_path):
    """The second row is longer than the 40 positions of one of them."""
    file = jsonl(tmp_path / "c.jsonl", chat("hi", "yes"), chat("why?", "so " * 60), chat("you?", "me"))
    (found,) = _held_out([contender("a"), contender("b", max_position_embeddings=40)], [file], Settings())
    assert found["figures"] and all(row["rows"] == 2 for row in found["figures"])
    assert any("1 rows without likelihood" in line for line in found["notes"])


def test_a_long_answer_is_read_up_to_the_readers_last_position():
    reader = contender("a", max_position_embeddings=24)
    prompt = reader.encode("hi")
    ((reading,),) = _readings(reader, [reader], [asked("hi")], [[answered("so " * 40)]], Settings())
    ids = TOKENIZER.encode("so " * 40)[: 24 + 1 - len(prompt)]  # the last one is a target only
    assert "".join(reading["pieces"]) == TOKENIZER.decode(ids)


def test_votes_are_about_these_answers():
    rows = [dict(prompt="hi", answers=[dict(text="a"), dict(text="b")])]
    models = [dict(name="x"), dict(name="y")]
    assert _identity(models, rows) == _identity(models, json.loads(json.dumps(rows)))
    rows[0]["answers"][1]["text"] = "c"
    assert _identity(models, rows) != _identity(models, [dict(rows[0], answers=[dict(text="a"), dict(text="b")])])


@pytest.mark.parametrize("wrong", [dict(right=0), dict(question=-1), dict(question=0.5), dict(choice="nobody")])
def test_a_vote_names_a_question_two_models_and_a_choice(tmp_path, wrong):
    vote = dict(question=0, left=0, right=1, choice="left") | wrong
    (tmp_path / "v.json").write_text(json.dumps(dict(format="sparrow-votes-1", report="r", votes=[vote])))
    with pytest.raises(ValueError, match="names a question or a model"):
        read_votes(tmp_path / "v.json", dict(id="r", models=[0, 1], questions=[0]))


# ---- how each model is asked


def test_a_pretrained_model_continues_and_the_others_answer(tmp_path):
    questions = read_questions(jsonl(tmp_path / "q.jsonl", dict(question="Once upon")))
    plain, tuned = contender("p", stage="pretrain"), contender("s")
    tuned.history.stages.insert(0, dict(stage="pretrain"))  # the last one counts
    assert plain.encode("Once upon", "Be brief.") == prompt_ids(TOKENIZER, "Once upon")
    messages = [dict(role="system", content="Be brief."), dict(role="user", content="Once upon")]
    assert tuned.encode("Once upon", "Be brief.") == prompt_ids(TOKENIZER, messages)
    result = compare([plain, tuned], questions, Settings(max_new_tokens=5))
    assert [model["completes"] for model in result["models"]] == [True, False]
    ids = plain.encode("Once upon")
    for _ in range(result["models"][0]["tokens"]):
        ids.append(int(plain.model(torch.tensor([ids])).logits[0, -1].argmax()))
    text = TOKENIZER.decode(ids[len(plain.encode("Once upon")) :])
    assert result["questions"][0]["answers"][0]["text"] == text, "from the text itself, without turns"


def adapters() -> list[Contender]:
    """Two on one base."""
    base = contender("base")
    settings = LoRASettings(rank=2, targets=("attention",))
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        add_lora(base.model, settings, name)
        for layer in adapted(base.model).values():
            torch.nn.init.normal_(layer.adapter(name).B, std=1.5)
    return [replace(base, name=name, adapter=name) for name in "ab"]


def test_two_adapters_on_one_base_answer_at_the_same_time():
    """A token of one, a token of the other: each says what it says alone."""
    both = adapters()
    alone = ["".join(Talk(own, GREEDY, 8, "").answer("hello")) for own in both]
    assert alone[0] != alone[1]
    streams = [Talk(own, GREEDY, 8, "").answer("hello") for own in both]
    together = ["", ""]
    for pieces in zip(*streams):
        together = [text + piece for text, piece in zip(together, pieces)]
    assert together == alone
    activate(both[0].model, None)


def test_reset_forgets_every_models_conversation(monkeypatch):
    """After /reset each model is asked as it was at first; without it, what was said before is in the prompt."""
    asked = {"a": [], "b": []}
    models = {name: contender(name) for name in asked}
    name_of = {id(own.model): name for name, own in models.items()}

    def reply(self, ids, *_, **__):
        asked[name_of[id(self.model)]].append(TOKENIZER.decode(ids))
        yield from TOKENIZER.encode("fine")

    monkeypatch.setattr(Session, "reply", reply)
    converse(list(models.values()), GREEDY, 4, "", ["hi", " hi ", "/reset", "", "hi", "/exit", "hi"])
    for first, second, third in asked.values():
        assert first == third and second.startswith(first + "fine") and second != first


def test_a_change_is_the_second_models_less_the_firsts():
    figures = _figures([asked("hi"), asked("hi")], [[answered("a")] * 2, [answered("a b c")] * 2])
    row = row_of(figures, "words")
    assert row["changes"][1]["value"] == 2.0 and row["rows"] == 2 and np.isfinite(row["changes"][1]["low"])
