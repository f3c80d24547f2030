"""The way that led to a weights file is in the file; what it was made of can be checked."""

import shutil
from dataclasses import replace

import pytest
import torch

from common.files import ROOT, hash_file
from evaluation.lineage import (
    CHANGED,
    MISSING,
    UNCHANGED,
    UNKNOWN,
    as_mermaid,
    as_text,
    check,
    command,
    facts,
    read_lineage,
    reasons_to_repeat,
)
from model.checkpoint import load_weights, save_weights
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.rows import write_pretrain, write_sft
from tests.helpers.runs import run_script, run_stage


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Pretraining, fine-tuning, an adapter: two steps each."""
    home = tmp_path_factory.mktemp("lineage")
    write_pretrain(home / "texts.jsonl", 40)
    write_sft(home / "chats.jsonl", 12)
    flags = ["--max_steps=2", f"--save_dir={home / 'out'}", "--data_path"]
    run_stage("pretrain", *flags, home / "texts.jsonl")
    run_stage("full_sft", *flags, home / "chats.jsonl", "--from_weight=pretrain")
    run_stage("lora", *flags, home / "chats.jsonl", "--from_weight=full_sft", "--lora_name=mine")
    return home


@pytest.fixture
def home(trained, tmp_path):
    """A copy to damage. What is recorded are paths in the original, so those are put back afterwards."""
    shutil.copytree(trained, tmp_path / "kept")
    yield trained
    shutil.rmtree(trained)
    shutil.copytree(tmp_path / "kept", trained)


def found(path) -> dict[str, str]:
    return {f"{part.what} {part.path.rpartition('/')[2]}": part.status for part in check(read_lineage(path))}


def test_every_stage_and_what_it_was_made_of(trained):
    history = read_lineage(trained / "out/full_sft_32.pth")
    first, second = history.stages
    assert [first["stage"], second["stage"]] == ["pretrain", "full_sft"]
    assert first["files"] == [dict(path=str(trained / "texts.jsonl"), sha256=hash_file(trained / "texts.jsonl"))]
    assert second["parent"] == load_weights(trained / "out/pretrain_32.pth").hash
    assert second["parent_path"] == str(trained / "out/pretrain_32.pth")
    text = as_text(history)
    assert "1. pretrain: " in text and "2 steps" in text and "loss" in text and "seed 42" in text
    assert "python trainer/train_full_sft.py --device=cpu" in text
    inside = as_text(replace(history, path=str(ROOT / "out/x_32.pth")))
    assert inside.startswith("out/x_32.pth  "), "as its parents are shown"


def test_all_is_unchanged_and_the_status_says_so(trained):
    assert set(found(trained / "out/full_sft_32.pth").values()) == {UNCHANGED}
    status, out, err = run_script("scripts/lineage.py", trained / "out/full_sft_32.pth", "--check")
    assert status == 0 and "4 unchanged" in err, err  # the tokenizer, two data files, a parent
    assert run_script("scripts/lineage.py", "--check", trained / "out/full_sft_32.pth") == (0, out, err)


def test_an_adapter_has_its_bases_history(trained):
    parts = found(trained / "out/lora/mine_32.pth")
    assert parts == dict.fromkeys(
        ["tokenizer tokenizer", "data texts.jsonl", "parent pretrain_32.pth", "data chats.jsonl"]
        + ["parent full_sft_32.pth"],
        UNCHANGED,
    )


def test_one_byte_of_the_data_is_noticed(home):
    data = (home / "texts.jsonl").read_bytes()
    (home / "texts.jsonl").write_bytes(data.replace(b"a", b"b", 1))
    (home / "chats.jsonl").unlink()
    parts = found(home / "out/full_sft_32.pth")
    assert parts["data texts.jsonl"] == CHANGED and parts["data chats.jsonl"] == MISSING
    status, out, err = run_script("scripts/lineage.py", home / "out/full_sft_32.pth", "--check")
    assert status == 1 and "1 changed" in err and "1 missing" in err
    (home / "texts.jsonl").write_bytes(data)
    status, out, err = run_script("scripts/lineage.py", home / "out/full_sft_32.pth", "--check")
    assert status == 1 and "1 missing" in err and "changed" not in err.replace("unchanged", "")


def test_a_parent_is_known_by_its_weights_not_by_its_name(home):
    out = home / "out"
    (out / "pretrain_32.pth").rename(out / "kept_32.pth")  # found by its hash
    part = next(part for part in check(read_lineage(out / "full_sft_32.pth")) if part.what == "parent")
    assert part.status == UNCHANGED and part.where.endswith("kept_32.pth")
    again = reasons_to_repeat(read_lineage(out / "full_sft_32.pth"), "")
    assert f"parent {out / 'pretrain_32.pth'}" in again, "a run would begin with what lies at its own place now"
    model = load_weights(out / "kept_32.pth").build()
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    save_weights(out / "pretrain_32.pth", model, tokenizer={}, lineage=[])
    (out / "kept_32.pth").unlink()
    assert found(out / "full_sft_32.pth")["parent pretrain_32.pth"] == CHANGED
    (out / "pretrain_32.pth").unlink()
    assert found(out / "full_sft_32.pth")["parent pretrain_32.pth"] == MISSING


def test_a_chart_for_a_readme(trained, tmp_path):
    chart = as_mermaid(read_lineage(trained / "out/full_sft_32.pth"))
    assert chart.startswith("```mermaid\nflowchart LR") and chart.endswith("```")
    assert "stage1 --> stage2" in chart and "texts.jsonl<br>" in chart and "pretrain_32.pth" not in chart
    for words in (["--weight", trained / "out/full_sft_32.pth"], ["full_sft", "--save_dir", trained / "out"]):
        assert run_script("scripts/lineage.py", *words, "--mermaid")[:2] == (0, chart + "\n")
    entry = dict(stage='a "b" <script>', data="12", rows=3, steps=1, losses={})
    save_weights(tmp_path / "x_32.pth", small_model(), tokenizer={"hash": TOKENIZER.hash}, lineage=[entry])
    chart = as_mermaid(read_lineage(tmp_path / "x_32.pth"))
    assert "<script>" not in chart and 'a "b"' not in chart, "a name could end the label and write chart of its own"


def test_weights_of_another_project_have_no_history(tmp_path):
    save_weights(tmp_path / "x_32.pth", small_model(), tokenizer={}, lineage=[])
    status, out, _ = run_script("scripts/lineage.py", tmp_path / "x_32.pth", "--check")
    assert status == 1 and "no stages are recorded" in out
    status, _, err = run_script("scripts/lineage.py", "nothing_of_that_name", "--save_dir", tmp_path)
    assert status == 2 and "no weights called 'nothing_of_that_name'" in err


def entry(stage: str, **more) -> dict:
    return dict(stage=stage, steps=1, losses={}) | more


def test_a_parent_beside_the_folder_of_the_best_weights(tmp_path):
    """best/full_sft_32.pth was copied to another machine with the folder that it is in: its parent is one level up."""
    save_weights(tmp_path / "pretrain_32.pth", small_model(), tokenizer={}, lineage=[])
    parent = load_weights(tmp_path / "pretrain_32.pth").hash
    stages = [entry("full_sft", parent=parent, parent_path="/elsewhere/out/pretrain_32.pth", files=[])]
    save_weights(tmp_path / "best/full_sft_32.pth", small_model(0.07), tokenizer={}, lineage=stages)
    _, part = check(read_lineage(tmp_path / "best/full_sft_32.pth"))  # the tokenizer, and no data: none was read
    assert part.what == "parent" and part.status == UNCHANGED and part.where == str(tmp_path / "pretrain_32.pth")


def test_data_that_was_moved_with_the_folder_of_the_weights(tmp_path):
    """All of out/ lies in another repository now, or on another disk: its data is looked for there too."""
    data = tmp_path / "out/tiny_world/sft.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("{}\n", encoding="utf-8")
    files = [dict(path=f"out/tiny_world/{name}.jsonl", sha256=hash_file(data)) for name in ("sft", "gone")]
    save_weights(tmp_path / "out/x_32.pth", small_model(), tokenizer={}, lineage=[entry("full_sft", files=files)])
    moved, gone = (part for part in check(read_lineage(tmp_path / "out/x_32.pth")) if part.what == "data")
    assert (moved.status, moved.where, gone.status) == (UNCHANGED, str(data), MISSING)
    data.write_text("{ }\n", encoding="utf-8")
    assert check(read_lineage(tmp_path / "out/x_32.pth"))[1].status == CHANGED


def test_a_command_can_be_typed_anywhere():
    typed = "/home/anna/sparrow/trainer/train_full_sft.py --data_path 'my chats.jsonl'"
    assert command(entry("x", command=typed)) == "python trainer/train_full_sft.py --data_path 'my chats.jsonl'"
    two = entry("x", command=typed, processes=2, rows=3)
    assert command(two).startswith("torchrun --nproc_per_node 2 trainer/train_full_sft.py ")
    assert facts(two) == ["3 rows", "1 steps", "2 processes"] and facts(entry("x")) == ["1 steps"]
    assert command(entry("x")) == "?"
    assert facts(entry("x", steps=1000, total=3000)) == ["1,000 of 3,000 steps"]


def test_a_tokenizer_that_is_there_and_differs_has_changed(tmp_path):
    for folder, expected in (("other", CHANGED), ("gone", MISSING)):
        if expected == CHANGED:
            shutil.copytree(TOKENIZER.path, tmp_path / folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        recorded = dict(path=str(tmp_path / folder), hash="0" * 64)
        save_weights(tmp_path / f"{folder}_32.pth", small_model(), tokenizer=recorded, lineage=[entry("pretrain")])
        assert check(read_lineage(tmp_path / f"{folder}_32.pth"))[0].status == expected


def test_what_older_versions_did_not_record_is_said(tmp_path):
    save_weights(tmp_path / "x_32.pth", small_model(), tokenizer={}, lineage=[entry("pretrain", data="ab" * 32)])
    history = read_lineage(tmp_path / "x_32.pth")
    assert [(part.what, part.status) for part in check(history)] == [("tokenizer", UNKNOWN), ("data", UNKNOWN)]
    assert "of pretrain  abababababab  not recorded" in as_text(history, check(history))


def test_a_chart_begins_with_weights_from_elsewhere(tmp_path):
    stages = [entry("lora", parent="12" * 32, parent_path="models/Qwen2-0.5B", files=[])]
    save_weights(tmp_path / "x_32.pth", small_model(), tokenizer={}, lineage=stages)
    chart = as_mermaid(read_lineage(tmp_path / "x_32.pth"))
    assert 'parent["Qwen2-0.5B<br>121212121212"]' in chart and "parent --> stage1" in chart
