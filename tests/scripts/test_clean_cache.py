"""Cleaning caches: only what nobody has used for long, and only if asked."""

import os
import sys
import time

import pytest

from dataset.read.jsonl import Jsonl
from scripts import clean_cache
from tests.helpers.rows import jsonl


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
