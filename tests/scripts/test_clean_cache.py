"""Cleaning caches: only what nobody has used for long, and only if asked."""

import os
import shutil
import sys
import time

import pytest

from common.console import UserError
from dataset.read.jsonl import Jsonl
from dataset.tokens import cache
from model.checkpoint import save_weights
from scripts import clean_cache
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.rows import jsonl, write_dpo
from tests.helpers.runs import run_stage


@pytest.fixture
def clean(monkeypatch, capsys):
    def call(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["clean_cache.py", *map(str, words)])
        clean_cache.main()
        return capsys.readouterr().out

    return call


def test_only_what_was_not_used_for_a_month_is_listed_and_removed_if_asked(tmp_path, clean):
    root, (old, new) = tmp_path / ".cache", (jsonl(tmp_path / f"{name}.jsonl", {"n": 1}) for name in ("old", "new"))
    for file in (old, new):
        Jsonl(file)
    (root / "mine").mkdir()  # what is no entry is none of its business
    then = time.time() - 31 * 86400
    os.utime(next(root.glob("old*")) / "facts.json", (then, then))
    listed = clean(root)
    assert "31 days" in listed and str(old) in listed and str(new) not in listed and "--remove removes them" in listed
    assert len(list(root.iterdir())) == 3, "listing removes nothing"
    assert "gone" not in listed and "0 days" in clean(root, "--older_than=0")
    old.unlink()
    assert "which is gone" in clean(root, "--remove")
    assert sorted(path.name[:3] for path in root.iterdir()) == ["min", "new"]


def test_an_old_entry_that_is_used_again_stays(tmp_path, clean):
    file = jsonl(tmp_path / "a.jsonl", {"n": 1})
    Jsonl(file)
    entry = next((tmp_path / ".cache").iterdir())
    os.utime(entry / "facts.json", (1, 1))
    Jsonl(file)
    assert "0.0 MB were not used" in clean(tmp_path / ".cache", "--remove") and entry.exists()


def test_all_that_is_ours_is_listed_and_nothing_else(tmp_path, clean, monkeypatch):
    """The references of DPO were never listed, nor the kernels of torch.compile and the locks of killed processes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    root, key = tmp_path / "sparrow", "0123456789abcdef"
    (root / "compiled" / "ab").mkdir(parents=True)
    (root / "compiled" / "ab" / "kernel.cpp").write_bytes(bytes(3_000_000))
    ours = [f"dpo.jsonl-reference-{key}.npy", f"dpo.jsonl-preference-{key}.lock"]
    new, mine = f"a.jsonl-text-{key}.lock", ["dpo-reference-2.npy", "poetry.lock", "notes-about-deadbeef.npy"]
    for name in (*ours, new, *mine):
        (root / name).write_bytes(b"x")
    then = time.time() - 31 * 86400
    for path in (*root.rglob("*"),):
        if path.name != new:
            os.utime(path, (then, then))
    listed = clean(root)
    assert all(name in listed for name in (*ours, "compiled  (of torch.compile)", "3.0 MB   "))
    assert not any(name in listed for name in (new, *mine))
    clean(root, "--remove", "--older_than=0")
    assert sorted(path.name for path in root.iterdir()) == sorted([new, *mine])


def test_a_reference_of_dpo_is_an_entry_of_the_cache(tmp_path, clean):
    data = write_dpo(tmp_path / "dpo.jsonl")
    about = dict(path=TOKENIZER.path, hash=TOKENIZER.hash)
    weights = save_weights(tmp_path / "full_sft_32.pth", small_model(), tokenizer=about, lineage=[])
    run_stage("dpo", f"--data_path={data}", f"--save_dir={tmp_path}", f"--from_weight={weights}", "--max_steps=1")
    assert "-reference-" in (listed := clean(tmp_path / ".cache", "--older_than=0")) and f"(of {data})" in listed
    clean(tmp_path / ".cache", "--older_than=0", "--remove")
    assert not list((tmp_path / ".cache").iterdir())


def test_nothing_is_removed_if_one_of_the_folders_is_wrong(tmp_path, clean):
    Jsonl(file := jsonl(tmp_path / "a.jsonl", {"n": 1}))
    for wrong, said in ((file, "is a file, expected a folder"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(UserError, match=said):
            clean(tmp_path / ".cache", wrong, "--remove", "--older_than=0")
        assert len(list((tmp_path / ".cache").iterdir())) == 1


def test_what_vanishes_while_it_is_looked_at_is_left_out(tmp_path, clean, monkeypatch):
    """Another process forgets an entry, or removes a temporary file of the compiler."""
    for name in "ab":
        Jsonl(jsonl(tmp_path / f"{name}.jsonl", {"n": 1}))
    read = cache._facts

    def last_look(path):
        facts = read(path)
        if path.name.startswith("a"):
            shutil.rmtree(path)
        return facts

    monkeypatch.setattr(cache, "_facts", last_look)
    listed = clean(tmp_path / ".cache", "--older_than=0")
    assert "b.jsonl" in listed and "a.jsonl" not in listed
