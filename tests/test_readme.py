"""The commands of the README run as they stand there, in a fresh copy of the repository.

Each gets a few words that make it small. `make soak` runs `make demo` itself, whose result is judged.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from common.files import ROOT
from tests.helpers.hub import Hub
from tests.helpers.rows import write_pretrain, write_sft

IN_GIT = shutil.which("git") and (ROOT / ".git").exists()


def commands(readme: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.S)
    lines = [line.split(" # ")[0].split("    #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("python trainer", "python eval", "python scripts", "torchrun"))]


def test_both_readmes_show_the_same_commands():
    assert commands("README.md") == commands("README_zh.md") != []


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What git tracks, elsewhere, with the data files that the README speaks of."""
    if not IN_GIT:
        pytest.skip("needs a git checkout")
    folder = tmp_path_factory.mktemp("clone")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    write_pretrain(folder / "my.jsonl", rows=400)
    write_sft(folder / "chats.jsonl")
    write_sft(folder / "val.jsonl", 8)
    (folder / "questions.txt").write_text("你好\nWho are you?\n", encoding="utf-8")
    return folder


def made_small(command: str) -> list[str]:
    """The command's words, made cheap: one step of the smallest model, short answers."""
    words = [word.strip('"') for word in command.split()]
    if "train_tokenizer" in command:  # forty rows of one sentence do not make 6,400 words
        words[words.index("6400")] = "300"
    elif "trainer/train_" in command:
        words += ["--max_steps", "1", "--compile", "off", "--batch_size", "2"]
        if "small" in words:
            words[words.index("small")] = "nano"
        elif "train_pretrain" in command:
            words += ["--preset", "nano"]
    elif ("eval_model" in command and "--benchmark" not in command) or "compare_models" in command:
        words += ["--max_new_tokens", "8"]
    return words


def test_commands_run(clone):
    """In their order, since each works on what the ones before have left. They run in the clone, with its files."""
    wanted = [made_small(command) for command in commands("README.md")]
    (clone / "commands.json").write_text(json.dumps(wanted), encoding="utf-8")
    # torchrun takes a free port, beside other tests that use its usual one
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PET_STANDALONE": "1"}
    with Hub() as hub:  # MiniMind's data, as far as this command is concerned
        files = {"pretrain_hq.jsonl": "my.jsonl", "sft_mini_512.jsonl": "chats.jsonl"}
        files = {name: (clone / ours).read_bytes() for name, ours in files.items()}
        hub.add("jingyaogong/minimind_dataset", files, "dataset")
        done = subprocess.run(
            [sys.executable, "tests/helpers/commands_run.py", "commands.json"],
            cwd=clone,
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=environment | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"},
            timeout=1200,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(wanted) >= 20


@pytest.mark.soak
def test_the_demo_teaches_a_model(clone):
    """The aim is 80 % of the exam in each language, the bar 60 %; SFT alone must be 20 points below."""
    done = subprocess.run(["make", "demo"], cwd=clone, text=True, timeout=3600, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr

    def score(weight: str) -> dict:
        command = ["eval_model.py", "--weight", weight, "--benchmark", "tiny_world", "--json", "score.json"]
        subprocess.run([sys.executable, *command], cwd=clone, check=True, capture_output=True)
        return json.loads((clone / "score.json").read_text(encoding="utf-8"))["scores"]["model"]

    whole = score("full_sft")
    assert min(whole["all zh"], whole["all en"]) >= 0.8
    data, tokenizer = clone / "out/tiny_world", clone / "out/tokenizer"
    fresh = [f"--data_path={data / 'pretrain.jsonl'}", f"--tokenizer_path={tokenizer}", "--preset=nano"]
    fresh += ["--max_steps=1", "--learning_rate=1e-9", "--save_weight=untrained"]
    subprocess.run([sys.executable, "trainer/train_pretrain.py", *fresh], cwd=clone, check=True)
    from scripts.demo import SFT

    alone = [f"--data_path={data / 'sft.jsonl'}", "--from_weight=untrained", "--save_weight=alone", *map(str, SFT)]
    subprocess.run([sys.executable, "trainer/train_full_sft.py", *alone], cwd=clone, check=True)
    alone = score("alone")
    assert (alone["all zh"] + alone["all en"]) / 2 <= (whole["all zh"] + whole["all en"]) / 2 - 0.2
