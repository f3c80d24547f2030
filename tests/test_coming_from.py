"""The commands of docs/coming_from.md, in a folder that holds the files those projects speak of, with a tiny model.

Each runs as it stands there; trainings get one step and, where the page relies on our defaults, a few rows and a place
to write. Launchers are left off, since test_backends.py has them; the quickstart without arguments is a soak.
"""

import json
import re
import shlex
import shutil

import pytest

from common.files import ROOT
from tests.helpers.rows import write_dpo, write_pretrain, write_sft
from tests.helpers.runs import SHAPE, run_script

STEP = "--device cpu --compile off --max_steps 1 --num_workers 1 --log_interval 1".split()
DATA = {"train_pretrain": "pretrain", "train_dpo": "dpo", "train_distill_reason": "thoughts"}


def commands(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]


def test_both_languages_show_the_same_commands():
    assert commands("coming_from.md") == commands("coming_from_zh.md") != []


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A clone as a newcomer has it: their data where their pages say, next to our configs."""
    home = tmp_path_factory.mktemp("newcomer") / "sparrow"
    for folder in ("data/mini", "dataset", "trainer", "../dataset/moemuu"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "configs", home / "configs")
    for name in ("mini_tokenizer", "tokenizer"):  # trained there; shipped here
        shutil.copytree(ROOT / "tokenizer", home / name)
    write_pretrain(home / "data/pretrain.jsonl", 60)
    write_dpo(home / "data/dpo.jsonl")
    for name in ("data/mini/sft", "data/lora_medical", "dataset/medical_data_formatted", "dataset/medical_identity"):
        write_sft(home / f"{name}.jsonl", 12)
    rows = [json.loads(line) for line in (home / "data/mini/sft.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [[turn["content"] for turn in row["conversations"]] for row in rows]
    with open(home / "data/thoughts.jsonl", "w", encoding="utf-8") as file:
        for q, a in pairs:
            file.write(json.dumps({"question": q, "reasoning_content": "hello", "answer": a}) + "\n")
    alpaca = [{"instruction": q, "input": "", "output": a} for q, a in pairs]
    (home / "data/chinese_alpaca.json").write_text(json.dumps(alpaca), encoding="utf-8")
    for name in ("train", "test"):
        with open(home / f"../dataset/moemuu/{name}.jsonl", "w", encoding="utf-8") as file:
            for q, a in pairs:
                file.write(json.dumps({"system": "沐雪", "conversation": [{"human": q, "assistant": a}]}) + "\n")
    (home / "questions.txt").write_text("你好\n", encoding="utf-8")
    return home


def completed(script: str, words: list[str], home) -> list[str]:
    """The command with what makes it small, and with our defaults pointed into the newcomer's folder."""
    full_sft = str(home / "out/full_sft_32.pth")
    words = [full_sft if word == "full_sft" else word for word in words]
    if script == "eval_model.py":
        where = [] if {"--weight", "--model_path"} & set(words) else ["--save_dir", str(home / "out")]
        return [*words, *where, *([] if "--max_length" in words else ["--max_new_tokens", "4"])]
    if script == "scripts/lora_quickstart.py":
        where = ["--out_dir", str(home / "q"), "--merged_data", str(home / "merged.jsonl")]
        return [*words, "--max_steps=1", "--device=cpu", "--from_weight", full_sft, *where]
    if script == "scripts/compare_models.py":
        return [*words, "--max_new_tokens", "4", "--device", "cpu"]
    if not script.startswith("trainer/"):
        return words
    stage = script.split("/")[1].removesuffix(".py")
    shape = SHAPE if stage == "train_pretrain" else []
    if not {"--data_file", "--config"} & set(words):
        shape = [*shape, "--data_path", str(home / f"data/{DATA.get(stage, 'mini/sft')}.jsonl")]
        shape += ["--save_dir", str(home / "out"), "--max_seq_len", "64"]
    return [*words, *STEP, *shape]


def test_every_command_of_the_page_runs(home, monkeypatch):
    """In their order: what one leaves, the next one uses."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    here, ran = home, 0
    for command in commands("coming_from.md"):
        words = shlex.split(command)
        while words[0] in ("torchrun", "deepspeed", "accelerate") and not words[1].endswith(".py"):
            del words[1]
        if words[0] == "cd":
            here = (here / words[1]).resolve()
            continue
        if words[0] == "tensorboard" or words == ["python", "scripts/lora_quickstart.py"]:
            continue
        monkeypatch.chdir(here)
        script = (here / words[1]).resolve().relative_to(home.resolve()).as_posix()
        assert (ROOT / script).is_file(), command
        status, out, err = run_script(script, *completed(script, words[2:], home), typed="你好\n")
        assert status == 0, f"{command}\n{out}\n{err}"
        ran += 1
    assert ran >= 17
    for left in (
        "outputs/sft_test/final_model/config.json",
        "outputs/lora_test/lora_model/adapter_config.json",
        "results/my_experiment/lora_model/adapter_config.json",
        "../model/lora_model/adapter_config.json",
        "out/rlhf_32.pth",
        "out/reason_32.pth",
        "out/lora/lora_medical_32.pth",
        "results/checkpoints/runs",
    ):
        assert (home / left).exists(), left


@pytest.mark.soak
def test_the_quickstart_without_arguments():
    status, out, err = run_script("scripts/lora_quickstart.py")
    assert status == 0 and "训练完成" in out, err


def test_every_promise_has_a_row_and_what_shows_it_exists():
    """docs/promises.md names tests and files; a table that names what was renamed shows nothing."""
    page = (ROOT / "docs/promises.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d\.\d+) \| (.+?) \| (.+) \|$", page, re.M)
    counts = dict.fromkeys("01234", 0)
    for number, _, shown in rows:
        counts[number[0]] += 1
        assert number == f"{number[0]}.{counts[number[0]]}", "in order, none left out"
        for name in re.findall(r"`([^`\s]+\.(?:py|yaml)(?:::\w+)?)`", shown):
            file, _, test = name.partition("::")
            path = next((ROOT / "tests").rglob(file), ROOT / file) if file.startswith("test_") else ROOT / file
            if path.is_file():
                assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), f"{number}: {name}"
            else:
                assert "*pending*" in shown, f"{number}: {name} does not exist"
    assert counts == {"0": 17, "1": 20, "2": 12, "3": 9, "4": 14}
