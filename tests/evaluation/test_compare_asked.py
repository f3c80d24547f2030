"""What each model is asked, and what of its answers gets into the result: a report is only as right as its parts."""

from io import BytesIO, TextIOWrapper
from itertools import count
from types import SimpleNamespace

import pytest

from common.console import UserError
from dataset.read.questions import Question
from evaluation import compare as comparing
from evaluation.compare import _held_out, compare, write_report
from evaluation.lineage import History
from evaluation.measure import Settings
from evaluation.models import Contender, open_models
from evaluation.side_by_side import Talk, converse, show
from inference.answers import GREEDY, Answer, prompt_ids
from inference.session import Session
from model.adapter import save_adapter
from model.checkpoint import load_weights, save_weights
from model.lora import LoRASettings, add_lora
from scripts.compare_models import CompareConfig
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.rows import jsonl


def contender(name: str, std: float = 0.05, stage: str = "full_sft", **shape) -> Contender:
    return Contender(
        name, small_model(std, **shape).eval(), None, TOKENIZER, History(name, "", {}, [dict(stage=stage)]), 1
    )


def user(text: str) -> dict:
    return dict(role="user", content=text)


def assistant(text: str) -> dict:
    return dict(role="assistant", content=text)


def row_of(figures: list[dict], name: str) -> dict:
    return next(row for row in figures if row["name"] == name)


def test_the_report_has_all_that_was_said(monkeypatch):
    """Two models' answers are given here: thoughts and all, one cut off, one for which there was no room."""
    turns = [user("1+1?"), assistant("2"), user("and 2+2?")]
    questions = [Question("q:1", turns, assistant("4")), Question("q:2", [user("why?")], None)]
    thinking = Answer([5, 6, 7], "<think>\ntwo and two\n</think>\n\n4", "4", ended=True)
    cut = Answer([8, 9], "because of", "because of", ended=False)
    unasked = Answer([], "", "", ended=False, asked=False)
    given = {"a": [thinking, cut], "b": [thinking, unasked]}
    models = [contender("a"), contender("b", 0.07)]
    name_of = {id(own.model): own.name for own in models}
    monkeypatch.setattr(
        comparing, "answer_questions", lambda model, tokenizer, asked, settings: given[name_of[id(model)]][: len(asked)]
    )
    monkeypatch.setattr(comparing, "time", SimpleNamespace(perf_counter=count(0, 2).__next__))  # all takes two seconds
    result = compare(models, questions)
    first, second = result["questions"]
    assert first["prompt"] == "user: 1+1?\nassistant: 2\nuser: and 2+2?" and second["prompt"] == "why?"
    assert first["answers"][0] == dict(text=thinking.full, ended=True, tokens=3)
    assert second["answers"][0] == dict(text="because of", ended=False, tokens=2)
    ended = row_of(result["figures"], "ended")
    assert ended["rows"] == 1, "b was not asked the second question, so it says nothing about either"
    assert row_of(result["figures"], "exact")["values"][0]["value"] == 1.0, "graded without the thoughts"
    own = result["models"][0]
    assert (own["tokens"], own["seconds"], own["tokens_per_second"]) == (5, 2.0, 2.5)
    assert "length_ratio" not in own["health"], "only one of the two questions has a reference"
    assert own["health"]["ended"] == 0.5 and result["models"][1]["health"]["no_room"] == 1


def test_a_dot_in_the_name_of_a_report_is_kept(tmp_path):
    """run_v1.1 was written over run_v1.0, as run_v1.json and run_v1.html."""
    result = compare([contender("a"), contender("b")], [Question("q:1", [user("why?")], None)], Settings(2))
    for name, stem in (("run_v1.0", "run_v1.0"), ("run_v1.1", "run_v1.1"), ("a.json", "a"), ("b.html", "b")):
        assert write_report(tmp_path / name, result) == tmp_path / f"{stem}.html"
        assert (tmp_path / f"{stem}.html").is_file() and (tmp_path / f"{stem}.json").is_file()
    assert len(list(tmp_path.iterdir())) == 8


def test_better_is_less_of_what_is_a_fault():
    found = {name: better for name, (_, _, _, better) in comparing.OF_AN_ANSWER.items()}
    assert found == dict(ended=1, rep_4=-1, wrong_language=-1, words=0)


def test_a_pretrained_model_is_measured_as_one_that_continues(tmp_path, monkeypatch):
    """Multiple choice has two forms: a text that goes on, and a turn of a conversation. Each model gets its own."""
    rows = [dict(question=f"{n}+1?", choices=["yes", "no no no"], answer=n % 2) for n in range(6)]
    file = jsonl(tmp_path / "c.jsonl", *rows)
    seen, measure = [], comparing.measure

    def watched(model, tokenizer, path, names, settings):
        seen.append(settings.chats)
        return measure(model, tokenizer, path, names, settings)

    monkeypatch.setattr(comparing, "measure", watched)
    (found,) = _held_out([contender("p", stage="pretrain"), contender("s")], [file], Settings())
    assert seen == [False, True]
    assert {row["name"] for row in found["figures"]} == {"choice", "choice_norm", "letter"}


def test_a_pretrained_model_gets_the_last_message_of_a_conversation():
    turns = [user("Once upon a time"), assistant("there was"), user("a sparrow")]
    assert contender("p", stage="pretrain").encode(turns) == prompt_ids(TOKENIZER, "a sparrow")


def test_no_question_is_answered_before_a_mistake_in_a_file_shows(tmp_path, monkeypatch):
    """It showed after all answers, and they were lost."""
    monkeypatch.setattr(comparing, "answer_questions", lambda *_: pytest.fail("answered"))
    models, questions = [contender("a"), contender("b")], [Question("q:1", [user("why?")], None)]
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="empty.jsonl: the file is empty"):
        compare(models, questions, eval_data=[tmp_path / "empty.jsonl"])
    with pytest.raises(FileNotFoundError, match="val.jsonl: no such file"):  # not even a model is loaded
        CompareConfig(finetuned_model=("x",), eval_data=(str(tmp_path / "val.jsonl"),)).problems()


# ---- opening


def test_an_adapter_without_a_base_of_its_own_goes_on_the_first_weights(tmp_path):
    """MiniMind's adapters do not say what they belong to, and its weights not which tokenizer they have."""
    save_weights(tmp_path / "full_sft_32.pth", small_model(), tokenizer={}, lineage=[dict(stage="full_sft")])
    base = load_weights(tmp_path / "full_sft_32.pth")
    model, settings = base.build(), LoRASettings(rank=2, targets=("attention",))
    add_lora(model, settings)
    recorded = dict(path=TOKENIZER.path, hash=TOKENIZER.hash)
    parent = dict(path="", hash="")
    save_adapter(tmp_path / "lora/mine_32.pth", model, settings, base=parent, tokenizer=recorded, lineage=[])
    mine, plain = open_models(["mine", "full_sft"], tmp_path, device="cpu", dtype="float32")
    assert plain.model is mine.model and mine.adapter and not plain.adapter
    assert mine.history.base == str(base.path), "the report says on what it was put"
    sizes = [(tmp_path / name).stat().st_size for name in ("full_sft_32.pth", "lora/mine_32.pth")]
    assert [plain.bytes, mine.bytes] == [sizes[0], sum(sizes)], "to use an adapter one needs both files"
    assert plain.tokenizer.hash == TOKENIZER.hash
    save_weights(tmp_path / "full_sft_32.pth", small_model(), tokenizer=recorded, lineage=[dict(stage="full_sft")])
    plain, mine = open_models(["full_sft", "mine"], tmp_path, device="cpu", dtype="float32")
    assert plain.model is mine.model, "the base is in memory once"


def test_an_adapter_of_the_quickstart_is_found_by_its_folder(tmp_path):
    """scripts/lora_quickstart.py --lora_name identity writes <save_dir>/identity/lora/identity_32.pth."""
    save_weights(tmp_path / "full_sft_32.pth", small_model(), tokenizer={}, lineage=[dict(stage="full_sft")])
    base = load_weights(tmp_path / "full_sft_32.pth")
    model, settings = base.build(), LoRASettings(rank=2, targets=("attention",))
    add_lora(model, settings)
    recorded, parent = dict(path=TOKENIZER.path, hash=TOKENIZER.hash), dict(path=str(base.path), hash=base.hash)
    file = tmp_path / "identity/lora/identity_32.pth"
    save_adapter(file, model, settings, base=parent, tokenizer=recorded, lineage=[])
    (mine,) = open_models(["identity"], tmp_path, device="cpu", dtype="float32")
    assert mine.history.path == str(file)


# ---- a conversation


def test_a_pipe_is_utf_8_whatever_the_locale(monkeypatch):
    """Other bytes ended in a traceback; with a locale of GBK, those of UTF-8 were read as other characters."""
    asked = []
    monkeypatch.setattr("evaluation.side_by_side.show", lambda talks, line: asked.append(line))
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO("早上好\n".encode() + b"\xff\n"), encoding="gbk"))
    with pytest.raises(UserError, match="standard input: not UTF-8"):
        converse([contender("a")], GREEDY, 4, "")
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO("早上好\n\n/reset\nhi".encode()), encoding="gbk"))
    converse([contender("a")], GREEDY, 4, "")
    assert asked == ["早上好", "hi"]


def answer(talk: Talk, text: str) -> str:
    return "".join(talk.answer(text))


def test_an_answer_may_refer_to_the_one_before(monkeypatch):
    """The second prompt holds the first question and its answer; a model that only continues texts has no memory."""
    prompts = []

    def reply(self, ids, sampling, *, max_new_tokens, stop):
        assert stop == TOKENIZER.stop_ids and sampling == GREEDY and max_new_tokens == 6
        prompts.append(TOKENIZER.decode(ids))
        yield from TOKENIZER.encode("fine, thanks")

    monkeypatch.setattr(Session, "reply", reply)
    talk = Talk(contender("s"), GREEDY, 6, "Be brief.")
    said = answer(talk, "hello")
    answer(talk, "why?")
    assert said == "fine, thanks" and prompts[1].startswith(prompts[0] + said) and "Be brief." in prompts[1]
    assert prompts[1].count("<|im_start|>user") == 2
    plain = Talk(contender("p", stage="pretrain"), GREEDY, 6, "")
    answer(plain, "hello")
    answer(plain, "why?")
    assert prompts[3] == TOKENIZER.decode(prompt_ids(TOKENIZER, "why?")) and not plain.turns


@pytest.mark.parametrize("most", [16, 1000])
def test_the_oldest_turn_is_forgotten_first(most):
    """64 positions, of which 16 are kept for an answer: three turns of ten tokens do not fit with a fourth. An answer
    may be longer than what is kept for it, and takes what is left."""
    talk = Talk(contender("s", max_position_embeddings=64), GREEDY, most, "")
    talk.turns = [turn for n in range(3) for turn in (user(f"question {n}"), assistant(f"answer {n}"))]
    answer(talk, "and now?")
    asked = [turn["content"] for turn in talk.turns if turn["role"] == "user"]
    assert asked and "question 0" not in asked and "question 2" in asked


def test_a_question_that_fills_the_model_gets_a_remark():
    """Of 32 positions the question takes all: no room even for one token."""
    talk = Talk(contender("s", max_position_embeddings=32), GREEDY, 16, "")
    question = "a" * 200
    assert len(talk.contender.encode(question)) >= 32
    assert "leaves no room in 32 positions" in answer(talk, question) and not talk.turns
    exact = next("hi" + " a" * n for n in range(40) if len(talk.contender.encode("hi" + " a" * n)) == 32)
    assert "leaves no room" in answer(talk, exact)


def test_ctrl_c_stops_the_answer_and_not_the_conversation(monkeypatch, capsys):
    """Of all models: the second one's answer is not continued either."""
    said = []

    def reply(self, ids, *_, **__):
        said.append(TOKENIZER.decode(ids))
        yield from TOKENIZER.encode("well")
        if len(said) == 2:
            raise KeyboardInterrupt
        yield from TOKENIZER.encode(" then")

    monkeypatch.setattr(Session, "reply", reply)
    converse([contender("a"), contender("b")], GREEDY, 6, "", ["one", "two"])
    printed, remarks = capsys.readouterr()
    assert remarks.count("(stopped)") == 1 and len(said) == 4
    assert printed.count("well then") == 2, "both answer the next line"


def test_the_last_character_of_an_answer_is_printed(monkeypatch):
    """An answer that is cut off within a Chinese character ends with the mark of half a character, not with nothing."""
    ids = TOKENIZER.encode("龘")  # rare: more than one token
    assert len(ids) > 1
    monkeypatch.setattr(Session, "reply", lambda self, *_, **__: iter_of(ids[:-1]))
    assert answer(Talk(contender("s"), GREEDY, 6, ""), "hello") == "\ufffd"


def iter_of(ids: list[int]):
    yield from ids


@pytest.mark.parametrize("columns", ["30", "100"])
def test_escape_codes_are_shown_in_a_narrow_and_in_a_wide_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(Session, "reply", lambda self, *_, **__: iter_of(TOKENIZER.encode("\x1b[2J gone")))
    show([Talk(contender(name), GREEDY, 6, "") for name in ("first", "second")], "hello")
    out = capsys.readouterr().out
    assert out.count("␛[2J gone") == 2 and "\x1b" not in out
    assert ("[first]" in out) == (columns == "30")
