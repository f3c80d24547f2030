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
from evaluation.measure import Measured, Settings, kind_of, measure
from evaluation.metrics import METRICS
from evaluation.report import against, draw, read_json, table, write_json
from inference.answers import Answer, answers
from inference.sampling import Sampling
from model.adapter import save_adapter
from model.checkpoint import load_weights, save_weights
from model.lora import LoRASettings, add_lora
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
    assert found.rows == 1 and found.labels["bpb"] == ["1 from byte 0", "1 from byte 2048"]
    assert found.figure("bpb").low is not None and found.counts["bpb"][:, 2].sum() == 3400
    parts = windows(TOKENIZER, "once upon a time " * 200, 64)
    expected = totals(TOKENIZER, parts, log_likelihoods(model, parts)).sum(0)
    np.testing.assert_allclose(found.counts["bpb"].sum(0), expected, rtol=1e-6)


def test_the_parts_of_a_text_file_do_not_depend_on_how_it_is_read(model, tmp_path):
    """Windows were the parts. The first ones of 64 tokens were compared with all of 128, silently."""
    (tmp_path / "a.txt").write_text("从前 once upon a time " * 200, encoding="utf-8")
    wide, narrow = (measure(model, TOKENIZER, tmp_path / "a.txt", ["bpb"], Settings(window=n)) for n in (128, 64))
    assert wide.labels == narrow.labels
    write_json(tmp_path / "r.json", [wide])
    said = against([narrow], read_json(tmp_path / "r.json"), TOKENIZER.hash)
    assert f"{narrow.figure('bpb').value - wide.figure('bpb').value:+.4f}" in said
    assert "note: bits per byte of a.txt: now windows of 64, before windows of 128" in said


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
        ("g.jsonl", [{"question": "hi", "answer": "you", "choices": None, "A": None}], "questions"),  # of joined tables
    ):
        assert kind_of(jsonl(tmp_path / name, *rows)) == kind
    (tmp_path / "f.json").write_text(json.dumps(CHATS))
    assert kind_of(tmp_path / "f.json") == "questions"


def test_what_is_longer_than_the_model_is_read_in_shorter_windows(tmp_path):
    """Windows of 512 tokens, and a model of 64 positions."""
    model = small_model(std=0.2, max_position_embeddings=64).eval()
    found = measure(model, TOKENIZER, jsonl(tmp_path / "a.jsonl", *TEXTS), ["bpb"])
    assert found.how["bpb"] == "windows of 64" and len(found.counts["bpb"]) == 3


def test_the_first_rows_only(model, tmp_path):
    two = Settings(max_new_tokens=6, limit=2)
    for rows, name in ((CHATS, "bpb"), (TEXTS, "bpb"), (CHOICES, "choice")):
        found = measure(model, TOKENIZER, jsonl(tmp_path / "a.jsonl", *rows), [name], two)
        assert found.rows == len(found.counts[name]) == 2


def test_a_text_file_of_windows(model, tmp_path):
    """Line ends of another system, and a mark of its encoding: the same text."""
    found = []
    for name, content in (("a.txt", b"one\ntwo\n"), ("b.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")):
        (tmp_path / name).write_bytes(content)
        found.append(measure(model, TOKENIZER, tmp_path / name, ["bpb"]).counts["bpb"].tolist())
    assert found[0] == found[1] and found[0][0][2] == len("one\ntwo\n")


def test_guessing_among_different_numbers_of_options(model, tmp_path):
    """One of 2 and one of 4: 1/2 and 1/4, on the average 37.5 %."""
    rows = [{"question": "?", "choices": ["a", "b", "c", "d"][:n], "answer": 0} for n in (2, 4)]
    found = measure(model, TOKENIZER, jsonl(tmp_path / "a.jsonl", *rows))
    assert "guessing would find 37.5% of the right options" in found.notes


def test_multiple_choice_longer_than_the_model_is_counted(tmp_path):
    """64 positions: one question is too long, and another with its options listed. The run went on for none of them."""
    model = small_model(std=0.2, max_position_embeddings=64).eval()
    rows = [*CHOICES, CHOICES[0] | {"question": "word " * 70}, CHOICES[0] | {"choices": ["word " * 40, "2", "3", "4"]}]
    found = measure(model, TOKENIZER, jsonl(tmp_path / "a.jsonl", *rows), (), SHORT)
    assert found.labels["choice"] == ["1", "2", "3", "4", "6"] and found.labels["letter"] == ["1", "2", "3", "4"]
    assert found.counts["letter"][:, 1].tolist() == [1] * 4
    assert "choice: 1 questions left out: with all that is shown, above 64 tokens" in found.notes
    assert "letter: 2 questions left out: with all that is shown, above 64 tokens" in found.notes


def test_what_the_questions_are_asked_with(model, tmp_path, monkeypatch):
    """System prompt, tools and --enable_thinking for a model that chats; for one that continues, the question alone. A
    row's own system prompt stays. Answers are graded without their thoughts, and kept with them."""
    prompts = []

    def answered(model, tokenizer, asked, **_):
        prompts.extend(map(TOKENIZER.decode, asked))
        return [Answer([5, 6], "<think>\nso\n</think>\n\nan answer", "an answer", ended=True)] * len(asked)

    monkeypatch.setattr("evaluation.measure.answers_to_ids", answered)
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    own = {"messages": [{"role": "system", "content": "mine"}, {"role": "user", "content": "hi"}], "tools": tools}
    path = jsonl(tmp_path / "a.jsonl", {"instruction": "why?", "output": "an answer"}, own)
    found = measure(model, TOKENIZER, path, ["exact"], Settings(system="short", enable_thinking=False))
    assert "<|im_start|>system\nshort<|im_end|>" in prompts[0] and prompts[0].endswith("</think>\n\n")
    assert "mine" in prompts[1] and "short" not in prompts[1] and '"name": "clock"' in prompts[1]
    assert found.counts["exact"].tolist() == [[1, 1]] and found.answers[0]["answer"].startswith("<think>")
    measure(model, TOKENIZER, path, ["exact"], Settings(system="short", enable_thinking=False, chats=False))
    assert prompts[2:] == ["<|endoftext|>why?", "<|endoftext|>hi"]


def test_likelihoods_are_read_after_the_system_prompt(model, tmp_path, monkeypatch):
    """--system was ignored where nothing is generated. A row's own stays; a text that is continued has none."""
    rows = []

    def read(model, encoded, **_):
        rows.extend(TOKENIZER.decode(row.ids) for row in encoded)
        return [np.zeros(sum(row.trained[1:]), np.float32) for row in encoded]

    monkeypatch.setattr("evaluation.measure.log_likelihoods", read)
    monkeypatch.setattr("evaluation.choice.log_likelihoods", read)
    own = {"messages": [dict(role=role, content="mine") for role in ("system", "user", "assistant")]}
    pairs, chats = jsonl(tmp_path / "dpo.jsonl", *PAIRS), jsonl(tmp_path / "a.jsonl", own)
    choices = jsonl(tmp_path / "mmlu.jsonl", *CHOICES)
    measure(model, TOKENIZER, pairs, ["preference"], Settings(system="short"))
    assert len(rows) == 2 * len(PAIRS) and all(row.startswith("<|im_start|>system\nshort<|im_end|>") for row in rows)
    measure(model, TOKENIZER, choices, ["choice"], Settings(system="short"))
    assert all(row.startswith("<|im_start|>system\nshort<|im_end|>") for row in rows)
    rows.clear()
    measure(model, TOKENIZER, chats, ["ppl"], Settings(system="short"))
    measure(model, TOKENIZER, choices, ["choice"], Settings(system="short", chats=False))
    assert "mine" in rows[0] and not any("short" in row for row in rows)


def test_tools_of_a_row_are_read_before_its_answer(model, tmp_path):
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]
    found = measure(model, TOKENIZER, jsonl(tmp_path / "a.jsonl", {"messages": turns, "tools": tools}), ["ppl"])
    row = encode_chat(TOKENIZER, turns, tools)
    np.testing.assert_allclose(found.counts["ppl"], totals(TOKENIZER, [row], log_likelihoods(model, [row])), rtol=1e-5)


def test_numbers_are_usual_only_where_the_file_marks_them(model, tmp_path):
    rows = {"instruction": "2+2?", "output": "4"}, {"instruction": "2+2?", "output": "two and two\n#### 4"}
    found = [measure(model, TOKENIZER, jsonl(tmp_path / "a.jsonl", row), (), SHORT) for row in rows]
    assert ["number" in own.counts for own in found] == [False, True]


# ---- what cannot be measured is said


def test_bytes_that_are_no_text_are_said_with_the_file(model, tmp_path):
    """Of several files nobody knew which one."""
    for name in ("a.txt", "a.csv", "a.json", "a.jsonl"):
        (tmp_path / name).write_bytes(b'{"text": "\xff"}')
        with pytest.raises(UserError, match=rf"{name}.*: not UTF-8 at byte 11"):
            measure(model, TOKENIZER, tmp_path / name)


def test_questions_without_references_have_health_only(model, tmp_path):
    path = jsonl(tmp_path / "q.jsonl", *CHATS[:2], {"instruction": "hi"})
    found = measure(model, TOKENIZER, path, ["exact"], SHORT)
    assert found.figure("exact").rows == 2 and found.health["answers"] == 3
    assert "1 of 3 questions have no reference: not in exact" in found.notes
    alone = measure(model, TOKENIZER, jsonl(tmp_path / "alone.jsonl", {"instruction": "hi"}), ["exact"], SHORT)
    assert table([alone]).startswith("health of 1 answers"), "the head of a table without lines stood above"


def test_rows_longer_than_the_model_are_counted(tmp_path):
    model = small_model(std=0.2, max_position_embeddings=64).eval()
    rows = [*CHATS, {"instruction": "word " * 100, "output": "hi"}]
    found = measure(model, TOKENIZER, jsonl(tmp_path / "a.jsonl", *rows), ["ppl", "exact"], SHORT)
    assert "1 rows without likelihood: longer than 64 tokens, or nothing to score in them" in found.notes
    assert found.figure("ppl").rows == 5 and found.health["no_room"] == 1
    assert found.answers[5]["answer"] == "" and found.counts["exact"][5].tolist() == [0, 1]
    assert any(line.startswith("5 answers did not end") for line in found.notes), "the sixth was never asked"


def test_a_row_that_just_fits_is_measured(tmp_path):
    """As many targets as the model has positions; with one position less, the row is left out. A pair needs both."""
    row, pair = {"instruction": "hi", "output": "you"}, {"prompt": "hi", "chosen": "you", "rejected": "you and me"}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]
    size = len(encode_chat(TOKENIZER, turns).ids)
    for positions in (size - 1, size - 2):
        model = small_model(std=0.2, max_position_embeddings=positions).eval()
        found = measure(model, TOKENIZER, jsonl(tmp_path / "a.jsonl", row, row, pair), ["ppl", "preference"])
        assert ("ppl" in found.counts) == (positions == size - 1) and "preference" not in found.counts


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
    assert eval_model.EvalConfig(prompt="hi", window=64).problems() == ["--window: only --eval_data takes it"]
    assert not eval_model.EvalConfig(prompt="hi").problems()


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


def test_the_result_of_an_adapter_has_its_name(say, out, tmp_path):
    """It had the name of the weights, as if those had been measured."""
    base = load_weights(out / "full_sft_32.pth")
    adapted, settings = base.build(), LoRASettings(rank=2, targets=("attention",))
    add_lora(adapted, settings)
    parent, file = dict(path=str(base.path), hash=base.hash), tmp_path / "lora_mine_32.pth"
    save_adapter(file, adapted, settings, base=parent, tokenizer=base.tokenizer, lineage=[])
    path, results = jsonl(tmp_path / "a.jsonl", *CHATS), tmp_path / "r.json"
    flags = ["--eval_data", path, "--metrics", "bpb", "--lora_path", file, "--json", results]
    assert say(*flags)[0] == 0 and json.loads(results.read_text("utf-8"))["weights"] == str(file)
    assert f"change since {results} ({file})" in say("--eval_data", path, "--metrics", "bpb", "--against", results)[1]


def test_every_flag_reaches_the_measuring(say, tmp_path, monkeypatch):
    """--min_p was dropped on the way."""
    seen = []

    def measured(model, tokenizer, path, names, settings):
        seen.append(settings)
        return Measured(str(path), "questions", counts={"f1": np.ones((1, 2))}, labels={"f1": ["1"]}, how={"f1": ""})

    monkeypatch.setattr("evaluation.run.measure", measured)
    path = jsonl(tmp_path / "a.jsonl", *CHATS)
    flags = "--window 32 --data_limit 2 --num_fewshot 3 --system short --enable_thinking false --temperature 0.5"
    flags += " --top_p 0.9 --top_k 7 --min_p 0.1 --repetition_penalty 1.2 --seed 4"
    assert say("--eval_data", path, "--metrics", "f1", *flags.split(), "--png", tmp_path / "r.png")[0] == 0
    drawn = Sampling(0.5, top_p=0.9, top_k=7, repetition_penalty=1.2, seed=4, min_p=0.1)
    assert seen == [Settings(6, drawn, 32, limit=2, num_fewshot=3, system="short", enable_thinking=False)]
    assert (tmp_path / "r.png").is_file()


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
    later.labels["bpb"] = ["6", "2", "3", "4", "5"]
    later.counts["bpb"] = first.counts["bpb"] * [1.5, 1, 1]
    lines = against([later], read_json(tmp_path / "r.json"), TOKENIZER.hash).splitlines()
    shared = first.counts["bpb"][1:]
    change = METRICS["bpb"].value(shared.sum(0)) * 0.5
    assert lines[1].split()[:6] == ["a.jsonl", "bits", "per", "byte", f"{change:+.4f}", lines[1].split()[5]]
    assert lines[1].split()[-1] == "4"
    assert lines[-1] == "note: perplexity is not compared: the tokenizers differ; bits per byte can be"


def test_a_file_that_has_changed_is_said(model, tmp_path):
    """Rows are known by their lines: one that is gone moves all that follow. The same file elsewhere is the same."""
    path = jsonl(tmp_path / "a.jsonl", *CHATS)
    write_json(tmp_path / "r.json", [measure(model, TOKENIZER, path, ["bpb"], SHORT)])
    jsonl(tmp_path / "b.jsonl", *CHATS)
    for name, rows in (("b.jsonl", CHATS), ("a.jsonl", CHATS[1:])):
        later = measure(model, TOKENIZER, jsonl(tmp_path / name, *rows), ["bpb"], SHORT)
        lines = against([later], read_json(tmp_path / "r.json"), TOKENIZER.hash).splitlines()
        assert lines[1].split()[-1] == str(len(rows))
        assert (lines[-1].startswith("note: a.jsonl has changed since")) == (name == "a.jsonl")
    jsonl(tmp_path / "c.jsonl", *CHATS[:2])
    later = measure(model, TOKENIZER, tmp_path / "c.jsonl", ["bpb"], SHORT)
    assert "nothing to compare" in against([later], read_json(tmp_path / "r.json"), TOKENIZER.hash)


def test_files_counted_in_one_way_are_put_together(tmp_path):
    """Two files in one way and three in another: the way that more files share. Three rows of 1 and two of 0."""
    ones = [Measured("a", "questions", counts={"f1": np.ones((1, 2))}, how={"f1": "one way"}) for _ in range(3)]
    nothing = np.array([[0.0, 1.0]])
    others = [Measured("b", "questions", counts={"f1": nothing}, how={"f1": "another"}) for _ in range(2)]
    alone = [Measured("c", "questions", counts={"bleu": np.zeros((1, 10))}, how={"bleu": ""})]
    lines = [line.split() for line in table([*others, *ones, *alone]).splitlines() if line.startswith("together")]
    assert lines == ["together F1 of words 100.0% 100.0% .. 100.0% 3".split()]


def test_what_cannot_be_said_is_a_dash_and_null(tmp_path):
    """BLEU of empty answers to empty references: 0 of 0."""
    found = Measured(str(jsonl(tmp_path / "a.jsonl", *CHATS)), "questions", health=dict(answers=1, length_ratio=1.234))
    found.add("bleu", np.zeros((1, 10)), ["a:1"])
    head, line, *rest = table([found]).splitlines()
    assert line.split() == ["a.jsonl", "BLEU", "-", "-", "1"] and "  length_ratio  1.23  words" in rest[-1]
    write_json(tmp_path / "r.json", [found])
    assert read_json(tmp_path / "r.json")["files"][0]["metrics"]["bleu"]["value"] is None


@pytest.mark.filterwarnings("error:Glyph")
def test_a_picture(model, tmp_path, monkeypatch):
    """A point for each share and a line for its interval, on one scale; of perplexity only the number, above."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    found = measure(model, TOKENIZER, jsonl(tmp_path / "题.jsonl", *CHATS), ["bpb"], SHORT)
    found.add("f1", np.array([[0.0, 1], [1, 1], [1, 1], [1, 1]]), ["1", "2", "3", "4"])
    found.counts["bleu"] = np.zeros((1, 10)) + [4, 3, 2, 1, 4, 3, 2, 1, 4, 4]  # all is right
    found.health["rep_4"] = 0.25
    seen, save = [], figure.savefig
    monkeypatch.setattr(
        figure, "savefig", lambda self, *more, **options: (seen.append(self), save(self, *more, **options))
    )
    draw(tmp_path / "r.png", [found], "full_sft")
    assert (tmp_path / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (axis,) = seen[0].axes
    low, high = found.figure("f1")[1:3]
    drawn = [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in axis.lines]
    assert drawn == [([0.75], [0]), ([low, high], [0, 0]), ([pytest.approx(1)], [1]), ([0.25], [2])]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["F1 of words", "BLEU / 100", "rep_4"] and "题.jsonl · bits per byte" in axis.get_title("left")


def test_a_table_shows_what_a_model_says_as_text(model, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *CHATS)
    assert "\x1b" not in table([measure(model, TOKENIZER, path, ["f1"], SHORT)])


def test_a_missing_package_is_left_out_unless_it_was_asked_for(model, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.metrics.find_spec", lambda name: None)
    path = jsonl(tmp_path / "a.jsonl", *CHATS)
    found = measure(model, TOKENIZER, path, (), SHORT)
    assert "bleu" not in found.counts and "f1" in found.counts
    assert "BLEU or ROUGE left out: pip install rouge-score sacrebleu" in found.notes


def test_a_bad_file_does_not_lose_the_figures_of_the_one_before(say, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"prompt": "hi"}\n{"prompt": \n', encoding="utf-8")
    files = jsonl(tmp_path / "a.jsonl", *CHATS), tmp_path / "b.jsonl"
    status, printed, remarks = say("--eval_data", *files, "--metrics", "f1")
    assert status == 2 and "b.jsonl:2: " in remarks and "a.jsonl  F1 of words" in printed
