"""`eval_model.py --eval_data`: what a file allows is measured, the rest is said, and two results are compared."""

import json
import math
import sys

import numpy as np
import pytest
import torch

import eval_model
from common.console import UserError, run
from evaluation.likelihood import log_likelihoods, totals, windows
from evaluation.measure import Settings, kind_of, measure
from evaluation.metrics import METRICS
from evaluation.report import against, draw, read_json, table, write_json
from inference.answers import answers
from model.checkpoint import save_weights
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.rows import jsonl
from tokenizer.chat import encode_chat

CHATS = [{"instruction": f"question {n}", "output": "an answer of some words" + "!" * n} for n in range(5)]
TEXTS = [{"text": "once upon a time " * n} for n in (1, 3, 200)] + [{"text": "  "}]
PAIRS = [{"prompt": f"q {n}", "chosen": "good one", "rejected": "bad " * n} for n in range(1, 5)]
CHOICES = [{"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": n % 4} for n in range(4)]
SHORT = Settings(max_new_tokens=6)


@pytest.fixture(scope="module")
def model():
    return small_model(std=0.2).eval()


@pytest.fixture(scope="module")
def out(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("out")
    known = dict(path="tokenizer", hash=TOKENIZER.hash)
    save_weights(folder / "full_sft_32.pth", model, tokenizer=known, lineage=[dict(stage="full_sft")])
    return folder


@pytest.fixture
def say(out, capsys, monkeypatch):
    def say(*argv):
        flags = [*"--dtype float32 --device cpu --max_new_tokens 6 --save_dir".split(), str(out), *map(str, argv)]
        monkeypatch.setattr(sys, "stdin", None)
        status = 0
        try:
            run(lambda: eval_model.main(flags))
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()

    return say


# ---- what is measured


def test_questions_with_answers(model, tmp_path):
    path = jsonl(tmp_path / "sft.jsonl", *CHATS)
    found = measure(model, TOKENIZER, path, ["ppl", "exact", "f1"], SHORT)
    rows = [
        encode_chat(
            TOKENIZER,
            [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}],
        )
        for row in CHATS
    ]
    sums = totals(TOKENIZER, rows, log_likelihoods(model, rows))
    np.testing.assert_allclose(found.counts["ppl"], sums, rtol=1e-6)
    assert found.labels["ppl"] == ["1", "2", "3", "4", "5"]
    own = found.figure("ppl")
    assert own.value == pytest.approx(math.exp(sums[:, 0].sum() / sums[:, 1].sum())) and own.low < own.value < own.high
    asked = [[{"role": "user", "content": row["instruction"]}] for row in CHATS]
    said = answers(model, TOKENIZER, asked, max_new_tokens=6)
    assert [row["answer"] for row in found.answers] == [answer.full for answer in said]
    assert found.health["answers"] == 5 and found.figure("exact").rows == 5
    assert "5 answers did not end by themselves and were cut off after 6 tokens or less" in found.notes  # never stops


def test_documents_count_in_windows_and_are_drawn_whole(model, tmp_path):
    found = measure(model, TOKENIZER, jsonl(tmp_path / "pre.jsonl", *TEXTS), (), Settings(window=64))
    assert list(found.counts) == ["ppl", "bpb"] and found.labels["bpb"] == ["1", "2", "3"]
    assert found.notes == ["1 empty documents left out"]
    parts = windows(TOKENIZER, TEXTS[2]["text"], 64)
    assert len(parts) > 5
    expected = totals(TOKENIZER, parts, log_likelihoods(model, parts)).sum(0)
    np.testing.assert_allclose(found.counts["bpb"][2], expected, rtol=1e-6)
    assert found.counts["bpb"][:, 2].tolist() == [len(row["text"].encode()) for row in TEXTS[:3]]


def test_documents_in_one_line_are_three(model, tmp_path):
    """An array as json.dump writes it: every document keeps what was counted of it."""
    lines = measure(model, TOKENIZER, jsonl(tmp_path / "a.jsonl", *TEXTS[:3]), ["bpb"], Settings(window=64))
    (tmp_path / "a.json").write_text(json.dumps(TEXTS[:3]), encoding="utf-8")
    found = measure(model, TOKENIZER, tmp_path / "a.json", ["bpb"], Settings(window=64))
    np.testing.assert_allclose(found.counts["bpb"], lines.counts["bpb"], rtol=1e-5)
    assert found.labels["bpb"] == ["1", "1 row 2", "1 row 3"]
    write_json(tmp_path / "r.json", [found])
    assert len(read_json(tmp_path / "r.json")["files"][0]["counts"]["bpb"]) == 3


def test_a_text_file_is_one_document_with_its_parts_for_the_error_bars(model, tmp_path):
    (tmp_path / "a.txt").write_text("once upon a time " * 200, encoding="utf-8")
    found = measure(model, TOKENIZER, tmp_path / "a.txt", ["bpb"], Settings(window=64))
    assert found.rows == 1 and found.labels["bpb"][:2] == ["1 part 1", "1 part 2"]
    assert found.figure("bpb").low is not None


def test_pairs(model, tmp_path):
    found = measure(model, TOKENIZER, jsonl(tmp_path / "dpo.jsonl", *PAIRS), ["preference", "bpb"], SHORT)
    right = []
    for row in PAIRS:
        sums = []
        for side in ("chosen", "rejected"):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            ids, trained = encode_chat(TOKENIZER, turns)
            with torch.no_grad():
                logp = model(torch.tensor([ids[:-1]])).logits.log_softmax(-1)[0]
            logp = logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            sums.append(float(logp[torch.tensor(trained[1:])].sum()))
        right.append(float(sums[0] > sums[1]))
    assert found.counts["preference"].tolist() == [[own, 1] for own in right]


def test_multiple_choice(model, tmp_path):
    found = measure(model, TOKENIZER, jsonl(tmp_path / "mmlu.jsonl", *CHOICES), (), SHORT)
    assert (
        list(found.counts) == ["choice", "choice_norm", "letter"]
        and "guessing would find 25.0% of the right options" in found.notes
    )
    assert found.figure("choice").value == 0.25  # the four rows differ in the right answer only


def test_what_a_file_holds(tmp_path):
    for name, rows, kind in (
        ("a.jsonl", CHATS, "questions"),
        ("b.jsonl", TEXTS, "text"),
        ("c.jsonl", PAIRS, "questions"),
        ("d.jsonl", CHOICES, "choice"),
        ("e.jsonl", [{"prompt": "hi"}], "questions"),
    ):
        assert kind_of(jsonl(tmp_path / name, *rows)) == kind
    (tmp_path / "f.json").write_text(json.dumps(CHATS))
    assert kind_of(tmp_path / "f.json") == "questions"


# ---- what cannot be measured is said


def test_questions_without_references_have_health_only(model, tmp_path):
    path = jsonl(tmp_path / "q.jsonl", *CHATS[:2], {"instruction": "hi"})
    found = measure(model, TOKENIZER, path, ["exact"], SHORT)
    assert found.figure("exact").rows == 2 and found.health["answers"] == 3
    assert "1 of 3 questions have no reference: not in exact" in found.notes


def test_rows_longer_than_the_model_are_counted(tmp_path):
    model = small_model(std=0.2, max_position_embeddings=64).eval()
    rows = [*CHATS, {"instruction": "word " * 100, "output": "hi"}]
    found = measure(model, TOKENIZER, jsonl(tmp_path / "a.jsonl", *rows), ["ppl", "exact"], SHORT)
    assert "1 rows without likelihood: longer than 64 tokens, or nothing to score in them" in found.notes
    assert found.figure("ppl").rows == 5 and found.health["no_room"] == 1
    assert found.answers[5]["answer"] == "" and found.counts["exact"][5].tolist() == [0, 1]


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--metrics", "blue"], "--metrics blue: choose from ppl"),
        (["--metrics", "letter"], "--metrics letter: nothing to compute; a.jsonl: letter: not for questions"),
        (["--metrics", "bleu"], "--metrics bleu: nothing to compute; a.jsonl: 2 of 2 questions have no reference"),
        (["--against", "a.jsonl"], "a.jsonl: not a result that --eval_data --json wrote"),
        (["--prompt", "hi"], "--prompt and --eval_data: each is a task of its own"),
    ],
)
def test_mistakes_are_one_line(say, tmp_path, monkeypatch, flags, complaint):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", {"prompt": "hi"}, {"prompt": "you"})
    status, printed, remarks = say("--eval_data", "a.jsonl", *flags)
    assert status == 2 and not printed and complaint in remarks, remarks
    assert sum("error: " in line for line in remarks.splitlines()) == 1


def test_no_figure_is_computed_before_such_a_mistake_shows(say, tmp_path, monkeypatch):
    """They showed after everything, or the files before, had been measured, and the figures were lost."""
    monkeypatch.setattr("evaluation.run.measure", lambda *_: pytest.fail("measured"))
    path = jsonl(tmp_path / "a.jsonl", *CHATS)
    for flags, complaint in (
        ((path, "--json", tmp_path), f"--json {tmp_path}: is a directory, expected a file"),
        ((path, "--png", path / "a.png"), f"--png {path / 'a.png'}: nothing can be written there"),
        ((path, tmp_path / "b.jsonl"), "b.jsonl: no such file"),
    ):
        status, printed, remarks = say("--eval_data", *flags)
        assert status == 2 and not printed and complaint in remarks, remarks


def test_a_chinese_file_name_does_not_shift_the_table(model, tmp_path):
    found = measure(model, TOKENIZER, jsonl(tmp_path / "数据集.jsonl", *CHATS), ["ppl"], SHORT)
    head, line, *_ = table([found]).splitlines()
    assert line.index("perplexity") + 3 == head.index("metric")  # each of the three takes two places of a terminal


def test_its_flags_are_only_for_it(say):
    status, _, remarks = say("--prompt", "hi", "--metrics", "ppl")
    assert status == 2 and "--metrics: only --eval_data takes it" in remarks


# ---- the program


def test_the_program_prints_and_writes(say, tmp_path, model):
    files = [jsonl(tmp_path / f"{name}.jsonl", *rows) for name, rows in (("a", CHATS), ("c", CHATS[:3]), ("b", TEXTS))]
    status, printed, _ = say("--eval_data", *files, "--metrics", "Perplexity,bpb,f1", "--json", tmp_path / "r.json")
    assert status == 0 and "health of 5 answers to a.jsonl" in printed and "together  bits per byte" in printed, printed
    assert "note: b.jsonl: f1: not for documents" in printed
    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert content["tokenizer"] == TOKENIZER.hash and content["lineage"][-1]["stage"] == "full_sft"
    found = measure(model, TOKENIZER, files[0], ["ppl"], SHORT)
    own = found.figure("ppl")
    assert content["files"][0]["metrics"]["ppl"]["value"] == pytest.approx(own.value, rel=1e-6)
    assert content["files"][0]["metrics"]["ppl"]["low"] == pytest.approx(own.low, rel=1e-6)
    assert content["files"][0]["counts"]["ppl"].keys() == {"1", "2", "3", "4", "5"}
    assert content["together"]["ppl"]["rows"] == 8  # the two files of chats; documents are counted in another way

    status, printed, _ = say("--eval_data", files[0], "--metrics", "ppl", "--against", tmp_path / "r.json")
    assert status == 0 and "a.jsonl  perplexity  +0.000  +0.000 .. +0.000  5" in " ".join(printed.split("\n")), printed


def test_answers_are_greedy_unless_a_temperature_is_given(say, tmp_path):
    """eval_model.py samples at 0.85 when one talks to it. Figures that change with every run compare nothing."""
    path, said = jsonl(tmp_path / "a.jsonl", *CHATS), []
    for n, more in enumerate(([], [], ["--temperature", "2", "--top_p", "1"])):
        say("--eval_data", path, "--metrics", "f1", "--json", tmp_path / f"{n}.json", *more)
        said.append(
            [row["answer"] for row in json.loads((tmp_path / f"{n}.json").read_text("utf-8"))["files"][0]["answers"]]
        )
    assert said[0] == said[1] != said[2]


def test_a_pretrained_model_continues_the_question(model, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *CHATS[:2])
    found = measure(model, TOKENIZER, path, ["f1"], Settings(max_new_tokens=6, chats=False))
    said = answers(model, TOKENIZER, [row["instruction"] for row in CHATS[:2]], max_new_tokens=6)
    assert [row["answer"] for row in found.answers] == [answer.full for answer in said]


def test_the_change_to_an_earlier_result_is_paired_by_row(model, tmp_path):
    """The later file has lost a row and gained one: only the rows of both are compared."""
    path = jsonl(tmp_path / "a.jsonl", *CHATS)
    first = measure(model, TOKENIZER, path, ["ppl", "bpb"], SHORT)
    write_json(tmp_path / "r.json", [first], tokenizer="another")
    later = measure(small_model(std=0.21).eval(), TOKENIZER, path, ["ppl", "bpb"], SHORT)
    later.labels["bpb"] = ["2", "3", "4", "5", "6"]
    later.counts["bpb"] = first.counts["bpb"][[1, 2, 3, 4, 0]] * [1.5, 1, 1]
    lines = against([later], read_json(tmp_path / "r.json"), TOKENIZER.hash).splitlines()
    shared = first.counts["bpb"][1:]
    change = METRICS["bpb"].value(shared.sum(0)) * 0.5
    assert lines[1].split()[:6] == ["a.jsonl", "bits", "per", "byte", f"{change:+.4f}", lines[1].split()[5]]
    assert lines[1].split()[-1] == "4"
    assert lines[-1] == "note: perplexity is not compared: the tokenizers differ; bits per byte can be"


def test_a_picture(model, tmp_path):
    found = measure(model, TOKENIZER, jsonl(tmp_path / "a.jsonl", *CHATS), ["bpb", "f1", "exact"], SHORT)
    draw(tmp_path / "r.png", [found], "full_sft")
    assert (tmp_path / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_table_shows_what_a_model_says_as_text(model, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *CHATS)
    assert "\x1b" not in table([measure(model, TOKENIZER, path, ["f1"], SHORT)])


def test_a_missing_package_is_left_out_unless_it_was_asked_for(model, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.measure.find_spec", lambda name: None)
    path = jsonl(tmp_path / "a.jsonl", *CHATS)
    found = measure(model, TOKENIZER, path, (), SHORT)
    assert "bleu" not in found.counts and "f1" in found.counts
    assert "BLEU or ROUGE left out: pip install rouge-score sacrebleu" in found.notes
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UserError, match="pip install sacrebleu"):
        measure(model, TOKENIZER, path, ["bleu"], SHORT)
