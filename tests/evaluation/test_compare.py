"""Models side by side: what is compared, how the report shows it, and the votes that come back from it."""

import json
import math
import re

import numpy as np
import pytest
import torch

from common.files import ROOT
from dataset.read.questions import read_questions
from evaluation.columns import Columns
from evaluation.compare import _mean_bits, compare
from evaluation.measure import Settings, answer_questions
from evaluation.models import open_models
from evaluation.page import render, write_page
from evaluation.votes import as_text, tally
from inference.sampling import Sampling
from model.adapter import save_adapter
from model.checkpoint import load_weights, save_weights
from model.lora import LoRASettings, adapted, add_lora
from scripts.compare_models import summary
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.rows import jsonl, write_dpo, write_pretrain
from tests.helpers.runs import run_script

EVIL = "</script><img src=http://127.0.0.1:9/x onerror='document.title=1'><script>document.title='hacked'</script>"


def add_adapter(home, base_name: str, name: str, seed: int) -> None:
    base = load_weights(home / base_name)
    model, settings = base.build(), LoRASettings(rank=2, targets=("attention",))
    torch.manual_seed(seed)
    add_lora(model, settings)
    for layer in adapted(model).values():
        torch.nn.init.normal_(layer.adapter("default").B, std=0.5)
    parent = dict(path=str(base.path), hash=base.hash)
    save_adapter(home / f"lora/{name}_32.pth", model, settings, base=parent, tokenizer=base.tokenizer, lineage=[])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two models, and two adapters on the first."""
    home = tmp_path_factory.mktemp("compare")
    recorded = dict(path=TOKENIZER.path, hash=TOKENIZER.hash)
    for name, std in (("full_sft", 0.05), ("rlhf", 0.07)):
        stages = [dict(stage=name, steps=3, losses=dict(loss=2.5), seed=42)]
        save_weights(home / f"{name}_32.pth", small_model(std), tokenizer=recorded, lineage=stages)
    add_adapter(home, "full_sft_32.pth", "lora_a", 1)
    add_adapter(home, "full_sft_32.pth", "lora_b", 2)
    rows = [dict(kind="sums", question="1+1?", answer="2"), dict(kind="talk", question="你好"), dict(question="why?")]
    jsonl(home / "questions.jsonl", *rows)
    write_pretrain(home / "texts.jsonl", 8)
    write_dpo(home / "pairs.jsonl", 6)
    return home


@pytest.fixture(scope="module")
def result(home):
    models = open_models(["full_sft", "rlhf"], home, device="cpu", dtype="float32")
    settings = Settings(max_new_tokens=6)
    questions = read_questions(home / "questions.jsonl")
    return compare(models, questions, settings, [home / "texts.jsonl", home / "pairs.jsonl"])


def test_adapters_share_their_base(home):
    models = open_models(["full_sft", "lora_a", "lora_b"], home, device="cpu", dtype="float32")
    assert len({id(contender.model) for contender in models}) == 1, "the base is in memory once"
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = []
    for contender in models:
        with contender.active() as model:
            logits.append(model(ids).logits)
    alone = open_models(["lora_b"], home, device="cpu", dtype="float32")[0]
    with alone.active() as model:
        torch.testing.assert_close(logits[2], model(ids).logits, atol=1e-5, rtol=1e-4)
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[1], logits[2])
    plain = load_weights(home / "full_sft_32.pth").build().eval()
    torch.testing.assert_close(logits[0], plain(ids).logits, atol=1e-5, rtol=1e-4)
    sizes = [contender.facts()["parameters"] for contender in models]
    assert sizes[0] == plain.num_parameters() and sizes[1] - sizes[0] == models[1].facts()["adapter_parameters"] > 0


def test_surprise_is_the_log_likelihood_of_the_others_words(home, result):
    """Recomputed row by row, without packing: -log2 p of each token of the other's answer after the prompt."""
    models = open_models(["full_sft", "rlhf"], home, device="cpu", dtype="float32")
    for r, reader in enumerate(models):
        for n, q in enumerate(read_questions(home / "questions.jsonl")):
            for author in range(2):
                text = result["questions"][n]["answers"][author]["text"]
                reading = result["questions"][n]["read"][r][author]
                assert "".join(reading["pieces"]) == text
                prompt = reader.encode(q.messages)
                with models[author].active() as model:  # the author's ids: greedy again
                    ids = list(prompt)
                    for _ in range(result["questions"][n]["answers"][author]["tokens"]):
                        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                with reader.active() as model:
                    log_p = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
                expected = -sum(log_p[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))) / math.log(2)
                assert sum(reading["bits"]) == pytest.approx(expected, abs=0.1)
    means = [[_mean_bits([row["read"][r][a] for row in result["questions"]]) for a in range(2)] for r in range(2)]
    assert result["surprise"] == means and means[0][1] != means[1][0], "[reader][author]"


def test_the_first_model_is_what_the_others_are_compared_with(result):
    rows = {row["name"]: row for row in result["figures"]}
    assert rows["exact"]["rows"] == 1, "one of the three questions has a reference"
    assert rows["ended"]["rows"] == 3
    for row in rows.values():
        a, b = (own["value"] for own in row["values"])
        assert row["changes"][0] is None and row["changes"][1]["value"] == pytest.approx(b - a)
    texts, pairs = result["held_out"]
    assert {"bpb", "ppl"} == {row["name"] for row in texts["figures"]}
    assert {"bpb", "ppl", "preference"} == {row["name"] for row in pairs["figures"]}
    assert all(
        row["changes"][1]["low"] <= row["changes"][1]["value"] <= row["changes"][1]["high"] for row in texts["figures"]
    )


def test_a_model_against_itself_changes_nothing(home):
    models = open_models(["full_sft", str(home / "full_sft_32.pth")], home, device="cpu", dtype="float32")
    assert models[0].name != models[1].name, "names tell them apart"
    found = compare(
        models, read_questions(home / "questions.jsonl"), Settings(max_new_tokens=4), [home / "texts.jsonl"]
    )
    for row in [*found["figures"], *found["held_out"][0]["figures"]]:
        own = 0.0 if row["rows"] > 1 else None  # one row has no spread
        assert row["changes"][1] == dict(value=0.0, low=own, high=own)
    (a, b), (c, d) = found["surprise"]
    assert a == b == c == d


def test_the_shipped_questions():
    """50 in 10 kinds, in both languages."""
    questions = read_questions(ROOT / "configs/test_questions.json")
    kinds = [q.kind for q in questions]
    assert len(questions) == 50 and len(set(kinds)) == 10 and all(kinds.count(kind) == 5 for kind in kinds)
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", q.asked)) for q in questions)
    assert 20 <= chinese <= 30
    assert sum(bool(q.references) for q in questions) >= 15


# ---- the script


def test_a_report_from_the_command_line(home, tmp_path):
    words = ["--base-model", "full_sft", "--finetuned-model", "rlhf", "lora_a", "--save_dir", home, "--device=cpu"]
    words += ["--questions-file", home / "questions.jsonl", "--max_new_tokens=4", "--dtype=float32"]
    status, out, err = run_script("scripts/compare_models.py", *words, "--output", tmp_path / "comparison_results.json")
    assert status == 0, err
    found = json.loads((tmp_path / "comparison_results.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in found["models"]] == ["full_sft_32", "rlhf_32", "lora_a_32"]
    assert len(found["questions"]) == 3 and all(len(row["answers"]) == 3 for row in found["questions"])
    assert (tmp_path / "comparison_results.html").is_file() and "ends by itself" in out


def test_without_a_base_an_adapter_is_compared_with_its_own(home, tmp_path):
    words = ["--finetuned_model", "lora_a", "--save_dir", home, "--questions_file", home / "questions.jsonl"]
    words += ["--max_new_tokens=3", "--device=cpu", "--output", tmp_path / "x.html"]
    status, _, err = run_script("scripts/compare_models.py", *words)
    assert status == 0, err
    names = [model["name"] for model in json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["models"]]
    assert names == ["full_sft_32", "lora_a_32"]
    status, _, err = run_script("scripts/compare_models.py", "--finetuned_model", "rlhf", "--save_dir", home)
    assert status == 2 and "say with --base_model what to compare them with" in err


def test_a_conversation_with_both(home):
    words = ["--base_model", "full_sft", "--finetuned_model", "lora_a", "--interactive", "--save_dir", home]
    words += ["--max_new_tokens=4", "--device=cpu"]
    status, out, err = run_script("scripts/compare_models.py", *words, typed="你好\n/reset\nhello\n")
    assert status == 0, err
    assert out.count("full_sft_32") == 2 and out.count("lora_a_32") == 2 and "│" in out


def test_mistakes_are_one_line(home, tmp_path):
    for words, expected in [
        ([], "--finetuned_model: name the model"),
        (["--finetuned_model", "rlhf", "--base_model", "nobody"], "no weights called 'nobody'"),
        (["--base_model", "full_sft", "--finetuned_model", "rlhf", "--questions_file", "gone.json"], "gone.json"),
        (["--votes", tmp_path / "v.json"], "v.json: no such file"),
        (["--finetuned_model", "lora_a", "--output", tmp_path], "is a directory, expected a file"),
        (["--finetuned_model", "lora_a", "--interactive", "--output", "x"], "--interactive: prints and writes nothing"),
    ]:
        status, _, err = run_script("scripts/compare_models.py", "--save_dir", home, *words)
        assert status == 2 and expected in err and len(err.splitlines()) == 1, err


def test_every_flag_reaches_the_comparison(home, tmp_path, monkeypatch):
    """And the questions are those of configs/, if there is no such file here."""
    seen, whole = [], answer_questions

    def answered(model, tokenizer, asked, settings):
        seen.append(settings)
        return whole(model, tokenizer, asked, settings)

    monkeypatch.setattr("evaluation.compare.answer_questions", answered)
    monkeypatch.chdir(tmp_path)
    flags = "--base_model full_sft --finetuned_model rlhf --questions_file test_questions.json --data_limit 2"
    flags += " --system short --max_new_tokens 3 --temperature 0.5 --min_p 0.1 --seed 4 --device cpu"
    status, out, err = run_script("scripts/compare_models.py", *flags.split(), "--save_dir", home)
    assert status == 0, err
    assert seen[1] == Settings(3, Sampling(0.5, seed=4, min_p=0.1), system="short")
    found = json.loads((home / "compare/full_sft_32-rlhf_32.json").read_text(encoding="utf-8"))
    shipped = read_questions(ROOT / "configs/test_questions.json", 2)
    assert [row["prompt"] for row in found["questions"]] == [q.asked for q in shipped]


def test_the_summary_marks_what_is_clear():
    changes = [(0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3), (None, None)]
    rows = [
        dict(
            name="f1",
            title=f"f{n}",
            form="number",
            values=[dict(value=1.0)] * 2,
            changes=[None, dict(value=0.25, low=low, high=high)],
        )
        for n, (low, high) in enumerate(changes)
    ]
    result = dict(
        models=[dict(name="a"), dict(name="b")], figures=rows, held_out=[dict(file="t.txt", figures=rows[:1])]
    )
    head, *lines, _ = summary(result).splitlines()
    assert head.split() == ["a", "b"]
    assert [line.split("  ")[-1].strip() for line in lines] == [
        "1 (+0.25*)",
        "1 (+0.25*)",
        "1 (+0.25)",
        "1 (+0.25)",
        "1 (+0.25*)",
    ]
    assert lines[-1].startswith("f1, t.txt ")


# ---- votes


def test_votes_are_counted_by_model_not_by_side():
    """Five votes for model 1, wherever it stood, none for model 0, a tie: p = 2 / 2^5 of the sign test."""
    votes = [dict(question=0, left=0, right=1, choice="right")] * 3 + [
        dict(question=0, left=1, right=0, choice="left")
    ] * 2
    (row,) = tally([*votes, dict(question=0, left=0, right=1, choice="tie")], 2)
    assert (row["wins_a"], row["wins_b"], row["ties"]) == (0, 5, 1) and row["p"] == pytest.approx(2 / 32)


def test_what_the_sign_test_says_in_words():
    """6 : 0 has p = 2/64; 5 : 1 has p = 14/64. If all are ties, that is a result too, and no test."""
    vote = dict(question=0, left=0, right=1)
    lines = []
    for wins, losses, ties in ((6, 0, 1), (5, 1, 0), (0, 0, 3)):
        votes = [vote | dict(choice=choice) for choice in ["left"] * wins + ["right"] * losses + ["tie"] * ties]
        lines.append(as_text(tally(votes, 2), ["a", "b"]))
    assert lines == [
        "a preferred 6 times, b 0 times, 1 ties: more than chance explains (sign test of 6, p = 0.0312)",
        "a preferred 5 times, b 1 times, 0 ties: chance alone explains as much (sign test of 6, p = 0.219)",
        "a preferred 0 times, b 0 times, 3 ties: no side was preferred",
    ]
    assert as_text(tally([], 2), ["a", "b"]) == "no votes"


def test_votes_come_back_into_the_report(result, tmp_path):
    report = tmp_path / "r.json"
    report.write_text(json.dumps(result), encoding="utf-8")
    content = dict(format="sparrow-votes-1", report=result["id"], models=[], votes=[])
    content["votes"] = [dict(question=0, left=1, right=0, choice="left")] * 6
    (tmp_path / "v.json").write_text(json.dumps(content), encoding="utf-8")
    status, out, err = run_script("scripts/compare_models.py", "--output", report, "--votes", tmp_path / "v.json")
    assert status == 0 and "rlhf_32 6 times" in out and "p = 0.0312" in out, err
    more = dict(content, votes=[dict(question=1, left=0, right=1, choice="tie")])
    (tmp_path / "w.json").write_text(json.dumps(more), encoding="utf-8")
    (tmp_path / "link.json").symlink_to(tmp_path / "v.json")  # the same votes are counted once
    words = ["--output", report, "--votes", tmp_path / "v.json", tmp_path / "w.json", tmp_path / "link.json"]
    assert "rlhf_32 6 times, 1 ties" in run_script("scripts/compare_models.py", *words)[1], "of both files"
    assert json.loads(report.read_text(encoding="utf-8"))["votes"][0]["wins_b"] == 6
    for change, expected in [
        (dict(report="another"), "about other answers"),
        (dict(format="x"), "not votes"),
        (
            dict(votes=[dict(question=len(result["questions"]), left=0, right=1, choice="left")]),
            "names a question or a model",
        ),
    ]:
        (tmp_path / "v.json").write_text(json.dumps(content | change), encoding="utf-8")
        status, _, err = run_script("scripts/compare_models.py", "--output", report, "--votes", tmp_path / "v.json")
        assert status == 2 and expected in err


def test_votes_of_the_servers_page_name_their_models_themselves(tmp_path):
    """Two files, in which the same two models have other numbers."""
    content = dict(format="sparrow-votes-1", report="page", models=["a", "b"], questions=[{}, {}])
    votes = [dict(question=0, left=0, right=1, choice="right"), dict(question=1, left=1, right=0, choice="left")]
    turned = [dict(question=0, left=0, right=1, choice="left")] * 4 + [dict(question=1, left=0, right=1, choice="tie")]
    files = [tmp_path / "1.json", tmp_path / "2.json"]
    files[0].write_text(json.dumps(content | dict(votes=votes)), encoding="utf-8")
    files[1].write_text(json.dumps(content | dict(models=["b", "a"], votes=turned)), encoding="utf-8")
    status, out, err = run_script("scripts/compare_models.py", "--votes", *files, files[0])
    assert status == 0 and "a preferred 0 times, b 6 times, 1 ties" in out and "p = 0.0312" in out, err
    third = tmp_path / "3.json"  # another model, which is number 0 there
    third.write_text(json.dumps(content | dict(models=["c", "b"], votes=votes[:1])), encoding="utf-8")
    status, out, err = run_script("scripts/compare_models.py", "--votes", files[0], third)
    assert "a preferred 0 times, b 2 times, 0 ties" in out and "b preferred 1 times, c 0 times" in out, out + err
    for change, expected in [
        (dict(report="1234"), "about a comparison; name it with --output"),
        (dict(models=[1, 2]), "does not say which models"),
        (dict(models=None), "does not say which models"),
        (dict(votes=[dict(question=0, left=0, right=2, choice="left")]), "names a question or a model"),
        (dict(votes=[dict(question=0, left=0, right=1.0, choice="left")]), "names a question or a model"),
        (dict(votes=[dict(question=0, left=0)]), "not votes"),
        (dict(votes=7), "not votes"),
    ]:
        files[0].write_text(json.dumps(content | dict(votes=votes) | change), encoding="utf-8")
        status, _, err = run_script("scripts/compare_models.py", "--votes", files[0])
        assert status == 2 and expected in err and len(err.splitlines()) == 1, err


def test_a_report_that_cannot_be_written_shows_before_the_answers(home, tmp_path, monkeypatch):
    """The names of many models are longer than a file's name may be. All was answered, and nothing written."""
    flags = f"--base_model full_sft --save_dir {home} --max_new_tokens 2 --data_limit 1 --device cpu --finetuned_model"
    status, out, err = run_script("scripts/compare_models.py", *flags.split(), *["rlhf"] * 25)
    assert status == 0 and list((home / "compare").glob("26_models-*.html")), err
    monkeypatch.setattr("evaluation.compare.compare", lambda *_: pytest.fail("answered"))
    (tmp_path / "compare").touch()
    words = ["--base_model", home / "full_sft_32.pth", "--finetuned_model", home / "rlhf_32.pth"]
    status, _, err = run_script("scripts/compare_models.py", *words, "--save_dir", tmp_path)
    assert status == 2 and "nothing can be written there" in err, err


# ---- the page


def test_no_text_can_leave_its_place(result):
    found = json.loads(json.dumps(result))
    found["questions"][0]["answers"][0]["text"] = EVIL + "\u2028\x1b[2J\u202e"
    page = render("compare", EVIL, found)
    assert page.count("<script") == 2 and page.count("</script>") == 2, "the data and our script, nothing else"
    assert "<img" not in page and "\x1b" not in page and "\u2028" not in page and "\u202e" not in page
    assert "default-src 'none'" in page and "unsafe" not in page


def test_the_page_runs_nothing_that_a_model_said(result, browser, tmp_path):
    found = json.loads(json.dumps(result))
    for row in found["questions"]:
        row["prompt"] = row["answers"][0]["text"] = EVIL
        row["read"][1][0]["pieces"] = [EVIL] * len(row["read"][1][0]["bits"])
        row["answers"][1]["text"] = "\x1b[31mred"
    page = write_page(tmp_path / "page.html", "compare", "two models", found)
    browser.open(page)
    browser.evaluate("[...document.querySelectorAll('button')].find((b) => b.innerText.includes('rlhf_32 is')).click()")
    assert browser.evaluate("document.title") == "two models"
    assert browser.requests == [page.as_uri()] and browser.errors == []
    assert browser.evaluate("document.querySelectorAll('main img, main script').length") == 0
    assert EVIL in browser.text("#page")
    browser.evaluate("[...document.querySelectorAll('button')].find((b) => b.innerText.startsWith('where')).click()")
    assert "␛[31mred" in browser.text("#page")
    browser.evaluate(
        "const s = document.createElement('script'); s.textContent = 'document.title=1'; document.body.append(s)"
    )
    assert browser.evaluate("document.title") == "two models", "the policy stops a script even if one got in"


def test_voting_by_keyboard(result, browser, tmp_path):
    found = json.loads(json.dumps(result))
    for n, row in enumerate(found["questions"]):
        row["answers"][0]["text"], row["answers"][1]["text"] = f"ours {n}", f"theirs {n}"
    page = write_page(tmp_path / "page.html", "compare", "two models", found)
    browser.open(page, width=390, language="zh-CN", dark=True)
    assert "盲评" in browser.text("#page")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390, "wider than a phone"
    browser.evaluate("[...document.querySelectorAll('button')].find((b) => b.innerText === '开始盲评').click()")
    panel = "[...document.querySelectorAll('section')].find((s) => s.innerText.includes('盲评')).innerText"
    assert browser.text("#page").count("full_sft") == 1, "in the heading; nobody sees who said what"
    for key in "1=2":
        browser.press(key)
    assert "3 / 3" in browser.evaluate(panel)
    browser.press("Backspace")
    assert "2 / 3" in browser.evaluate(panel)
    browser.press("2")
    # what the button saves: caught where the page hands it to the browser
    browser.evaluate("URL.createObjectURL = (blob) => { blob.text().then((t) => { window.kept = t; }); return '#'; }")
    browser.evaluate("[...document.querySelectorAll('button')].find((b) => b.innerText.startsWith('保存')).click()")
    saved = json.loads(browser.evaluate("new Promise((done) => setTimeout(() => done(window.kept), 50))"))
    (tmp_path / "votes.json").write_text(json.dumps(saved), encoding="utf-8")
    (tmp_path / "r.json").write_text(json.dumps(found), encoding="utf-8")
    words = ["--output", tmp_path / "r.json", "--votes", tmp_path / "votes.json"]
    status, out, err = run_script("scripts/compare_models.py", *words)
    assert status == 0 and "1 ties" in out, err


# ---- columns


def written(widths, *pushes, live=False) -> str:
    texts = []
    columns = Columns(texts.append, widths, live)
    for column, text in pushes:
        columns.push(column, text)
    columns.close()
    return "".join(texts)


def test_lines_are_printed_when_all_columns_have_them():
    out = written([8, 8], (0, "one two three"), (1, "你好世界啊"), (0, " four"))
    assert out.splitlines() == ["one two  │ 你好世界", "three    │ 啊", "four     │"]
    assert np.all([len(line) <= 19 for line in out.splitlines()])


def test_where_a_line_is_broken():
    """Between words, but a word that takes half of the line is cut; the blank at the break is gone; a tab is four."""
    assert written([8], (0, "ab longword")).splitlines() == ["ab longw", "ord"]
    assert written([8], (0, "one two-up")).splitlines() == ["one two-", "up"]
    assert written([8], (0, "one tw two")).splitlines() == ["one tw", "two"]
    assert written([4], (0, "abcd efgh")).splitlines() == ["abcd", "efgh"]
    assert written([9], (0, "a\tb")).splitlines() == ["a    b"]


def test_a_column_that_has_ended_stays_empty():
    assert written([4, 4], (0, "a\nb"), (1, "c")).splitlines() == ["a    │ c", "b    │"]


def test_a_terminal_sees_the_line_that_grows():
    out = written([4, 4], (0, "ab"), (1, "c"), live=True)
    assert out == "\rab   │\rab   │ c\rab   │ c\n", "each time over the line that is there"
    assert "␛" in written([9, 4], (0, "\x1b[2J"))
