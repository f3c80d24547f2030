"""A larger file, tokenised by several processes, killed and started again."""

import json
import os
import subprocess
import sys
import time

import pytest

from common.files import ROOT
from tests.helpers.rows import words

SCRIPT = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from dataset.tokens import token_cache as tc
from dataset.tokens.examples import PretrainDataset
from tokenizer.text import Tokenizer
if __name__ == "__main__":
    tc.PART_BYTES = int(sys.argv[1])
    tc.PROCESSES_FROM = 8 << 20
    tc.ESTIMATED_FROM = 32 << 20
    ds = PretrainDataset("a.jsonl", Tokenizer.load(), max_seq_len=512, num_workers=2)
    train, val = ds.split(0.01, 42)
    assert len(train) + len(val) - len(ds) in (0, 1)
    print(ds.fingerprint, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.soak
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("mb", [int(os.environ.get("SPARROW_SOAK_MB", 100))])
def test_tokenising_continues_after_a_kill(tmp_path, mb):
    """SPARROW_SOAK_MB=20000 tries it with 20 GB, in parts of 1 GB."""
    part = max(24, mb // 20) << 20
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as file:
        for i in range(mb << 10):  # rows of about 1 KB
            file.write(json.dumps({"text": f"{i} {words(i, 90)} {words(i * i, 90)}"}, ensure_ascii=False) + "\n")

    def start():
        command = [sys.executable, "script.py", str(part)]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def complete() -> list[str]:
        return sorted(path.name for path in tmp_path.glob(".cache/a*-text-*") if path.is_dir())

    process = start()
    while not complete() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    _, said = process.communicate()
    first = {name: (tmp_path / ".cache" / name / "tokens").stat().st_mtime_ns for name in complete()}
    assert first and "GB become about" in said, said
    process = start()
    printed, said = process.communicate()
    assert process.returncode == 0, said
    assert len(complete()) == max(1, (tmp_path / "a.jsonl").stat().st_size // part) > len(first)
    for name, made in first.items():
        assert (tmp_path / ".cache" / name / "tokens").stat().st_mtime_ns == made, "what was complete is not done again"
    assert int(printed.split()[1]) < 1000, f"{printed.split()[1]} MB of memory"
