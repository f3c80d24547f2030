"""The YAML files in configs/: their first line runs them, on a few rows and with a tiny model in place of hub ids."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from common.files import ROOT
from common.options import specs
from model.adapter import load_adapter
from model.checkpoint import load_weights
from model.export import copy_tokenizer, save_hf
from tests.helpers.chatglm import write_chatglm
from tests.helpers.rows import write_dpo, write_pretrain, write_sft
from tests.helpers.runs import run_script, run_stage
from trainer.stage import StageConfig

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
DATA = {"train_pretrain": "text.jsonl", "train_dpo": "pairs.jsonl", "train_distill_reason": "thoughts.jsonl"}
SMALL = "--device cpu --dtype float32 --compile off --max_seq_len 64 --max_steps 1 --num_workers 1".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Rows of every kind, and a model of 240,000 parameters that has seen one step."""
    folder = tmp_path_factory.mktemp("world")
    write_pretrain(folder / "text.jsonl", 60)
    write_sft(folder / "chats.jsonl")
    write_dpo(folder / "pairs.jsonl")
    chats = (folder / "chats.jsonl").read_text(encoding="utf-8")
    thoughts = re.sub(r'("role": "assistant", "content": ")', r"\1<think>hello</think>", chats)
    (folder / "thoughts.jsonl").write_text(thoughts, encoding="utf-8")
    (folder / "questions.txt").write_text("你好\n", encoding="utf-8")
    run_stage("pretrain", f"--data_path={folder / 'text.jsonl'}", f"--save_dir={folder}", "--max_steps=1")
    return folder


def leaves(tree: dict):
    for key, value in tree.items():
        yield from leaves(value) if isinstance(value, dict) else [(key, value)]


def command(path: Path) -> list[str]:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# python "), "the first line says how to run it"
    words = shlex.split(first.removeprefix("# python "))
    assert ["--config", f"configs/{path.name}"] == words[1:3]
    return words


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_as_its_first_line_says(path, world, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *words = command(path)
    if script == "eval_model.py":  # of what training_config.yaml trains
        train = command(ROOT / "configs/training_config.yaml")
        here = ["--train_path", world / "chats.jsonl", "--output_dir", tmp_path, *SMALL]
        assert run_script(*train, "--model_name_or_path", world / "pretrain_32.pth", *here)[0] == 0
        here = ["--lora_path", tmp_path / "lora_model", "--eval_data", world / "chats.jsonl", "--max_length", 4]
        figures = tmp_path / "results.json"
        here += ["--data_limit", 8, "--json", figures, "--png", tmp_path / "results.png"]
        status, out, err = run_script(script, *words, *here)
        assert status == 0 and "BLEU" in out and "ROUGE-L" in out and "on its base" in err, err
        (found,) = json.loads(figures.read_text(encoding="utf-8"))["files"]
        assert set(found["metrics"]) == {"ppl", "bleu", "rouge1", "rouge2", "rougeL"}
        assert (tmp_path / "results.png").stat().st_size > 5000
        return
    data = world / DATA.get(Path(script).stem, "chats.jsonl")
    given = dict(leaves(yaml.safe_load(path.read_text(encoding="utf-8"))))
    where = "--output_dir" if "output_dir" in given else "--save_dir"
    here = ["--data_path", data, where, tmp_path, *SMALL]
    here += ["--val_path", data] if "val_path" in given else []
    if Path(script).stem == "train_pretrain":
        here += ["--preset", "nano", "--hidden_size", 32, "--num_hidden_layers", 1, "--num_attention_heads", 2]
    else:
        here += ["--base_model_path", world / "pretrain_32.pth"]  # as mu_xue's first line spells it
    if "--teacher" in words:  # the same tiny model teaches itself
        words[words.index("--teacher") + 1 :] = [world / "pretrain_32.pth"]
    status, out, err = run_script(script, *words, *here)
    assert status == 0 and "done in" in out, err

    (about,) = (json.loads(p.read_text(encoding="utf-8")) for p in tmp_path.glob("runs/*/run.json"))
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    stages = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, StageConfig)]
    (stage,) = [
        stage for stage in stages if not any(issubclass(other, stage) for other in stages if other is not stage)
    ]
    ours = {spelling: spec for spec in specs(stage).values() for spelling in spec.spellings()}
    overridden = {ours[word[2:]].name for word in map(str, here + words) if word[2:] in ours} | {"dtype"}
    for key, value in given.items():
        if (spec := ours[key]).name not in overridden:
            value = (value if isinstance(value, list) else [value]) if spec.many else spec.kind(value)
            assert about["config"][spec.name] == value, key


def test_the_mu_xue_file_is_theirs_word_for_word(shared):
    theirs = (shared / "seeds/003_acfd2ff0116d6d1d.txt").read_text(encoding="utf-8")
    example = re.findall(r"```yaml\n(.*?)```", theirs, re.S)[-1]
    assert (ROOT / "configs/mu_xue.yaml").read_text(encoding="utf-8").split("\n", 1)[1] == example


def test_the_mu_xue_file_trains_its_chatglm_in_four_bits(world, tmp_path, monkeypatch):
    """The file as it is: its base and its data lie where it says, as a tiny ChatGLM and a few rows. `output_dir:
    ../model` is beside the folder of the file."""
    for folder in ("mine", "dataset/moemuu", "model"):
        (tmp_path / folder).mkdir(parents=True)
    write_chatglm(tmp_path / "mine/THUDM/chatglm3-6b", padded_vocab_size=6400, seq_length=2048)
    copy_tokenizer(tmp_path / "mine/THUDM/chatglm3-6b", ROOT / "tokenizer")
    for name in ("train", "test"):
        shutil.copy(world / "chats.jsonl", tmp_path / f"dataset/moemuu/{name}.jsonl")
    shutil.copy(ROOT / "configs/mu_xue.yaml", tmp_path / "mine/config.yaml")
    monkeypatch.chdir(tmp_path / "mine")
    only = ["--device", "cpu", "--dtype", "float32", "--compile", "off", "--num_workers", 1, "--max_steps", 1]
    status, out, err = run_script("trainer/train_lora.py", "--config", "config.yaml", *only)
    assert status == 0 and "the weights in 4 bits" in out, err
    assert load_adapter(tmp_path / "model").bits == 4
    written = json.loads((tmp_path / "model/lora_model/adapter_config.json").read_text(encoding="utf-8"))
    assert written["base_model_name_or_path"] == str(tmp_path / "mine/THUDM/chatglm3-6b")


def test_a_lora_file_given_to_full_fine_tuning_trains_an_adapter(world, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *words = command(ROOT / "configs/mu_xue.yaml")
    data = ["--data_path", world / "chats.jsonl", "--val_path", world / "chats.jsonl", "--output_dir", tmp_path]
    model = ["--base_model_path", world / "pretrain_32.pth"]
    status, out, err = run_script("trainer/train_full_sft.py", *words, *data, *model, *SMALL)
    assert status == 0 and "adapters beside" in out, err
    assert (tmp_path / "lora/full_sft_32.pth").is_file() and not (tmp_path / "full_sft_32.pth").exists()


@pytest.mark.parametrize("family, base", [("Qwen2", "Qwen2ForCausalLM"), ("Llama", "LlamaForCausalLM")])
def test_a_directory_of_another_family_is_the_base(family, base, world, tmp_path, monkeypatch):
    """The PC project's file, with a tiny Qwen2 as transformers writes it. The pages said that this was not built."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = getattr(transformers, f"{family}Config")(vocab_size=6400, num_key_value_heads=1, **shape)
    getattr(transformers, base)(config).save_pretrained(tmp_path / "base")
    copy_tokenizer(tmp_path / "base", ROOT / "tokenizer")
    words = command(ROOT / "configs/training_config.yaml")
    here = ["--train_path", world / "chats.jsonl", "--output_dir", tmp_path, "--model_name_or_path", tmp_path / "base"]
    here += ["--use_8bit"] if family == "Llama" else ["--use_4bit", "true"]
    status, out, err = run_script(*words, *here, *SMALL)
    assert status == 0 and "done in" in out, err
    written = json.loads((tmp_path / "lora_model/adapter_config.json").read_text(encoding="utf-8"))
    assert written["base_model_name_or_path"] == str(tmp_path / "base"), "a directory, which peft opens itself"


def test_the_quickstart_joins_trains_and_saves(world, tmp_path):
    """The flags of its table; 40 task rows at 8:1 make the 4 identity rows five. The base is as MiniMind writes it: it
    names no tokenizer. One row is broken."""
    base = tmp_path / "full_sft_32.pth"
    torch.save(dict(load_weights(world / "pretrain_32.pth").state), base)
    (tmp_path / "task.jsonl").write_text(
        (world / "chats.jsonl").read_text(encoding="utf-8") + '{"conversations": [\n', encoding="utf-8"
    )
    (tmp_path / "me.jsonl").write_text(
        "".join((world / "chats.jsonl").open(encoding="utf-8").readlines()[:4]), encoding="utf-8"
    )
    flags = dict(
        lora_name="my_chatbot_lora",
        task_data=tmp_path / "task.jsonl",
        identity_data=tmp_path / "me.jsonl",
        merged_data=tmp_path / "all.jsonl",
        out_dir=tmp_path / "out",
        ratio=8,
        epochs=1,
        batch_size=4,
        device="cpu",
        learning_rate="1e-4",
        max_length=32,
        from_weight=base,
        tokenizer_path=ROOT / "tokenizer",
        wandb_project="mine",
    )
    words = [f"--{name}={value}" for name, value in flags.items()]
    status, _, err = run_script("scripts/lora_quickstart.py", *words)
    assert status == 2 and "--on_bad_row skip" in err, "it advised what it did not take"
    words.append("--on_bad_row=skip")
    status, out, err = run_script("scripts/lora_quickstart.py", *words, "--skip_download")
    assert status == 0, err
    counts = [line for line in out.splitlines() if "条" in line and "跳过" not in line]
    assert counts[:2] == ["📊 任务数据: 40 条", "📊 自认知数据: 4 条，重复后 5 条"]
    assert counts[2:] == [f"✅ 数据合并完成: 45 条数据保存到 {tmp_path / 'all.jsonl'}"]
    for line in (
        "🚀 开始LoRA训练...",
        "  - 批次大小: 4",
        "  - 学习率: 0.0001",
        "💻 使用设备: cpu",
        "📊 模型参数数量: 0.2M",
    ):  # noqa: E501
        assert line in out.splitlines(), out
    assert "12 steps" in out and f"✅ 模型保存到: {tmp_path / 'out/my_chatbot_lora'}" in out and "总耗时" in out

    # the line that it prints talks to the model, and peft finds the adapter where the page says
    told = next(line for line in out.splitlines() if "试一试" in line).partition("python ")[2]
    status, _, err = run_script(*shlex.split(told), "--prompt=hi", "--max_new_tokens=2", "--device=cpu")
    assert status == 0 and f"on its base {base}" in err, err
    folder = tmp_path / "out/my_chatbot_lora"
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] is None, "peft cannot open a .pth"
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    save_hf(tmp_path / "theirs", load_weights(base), ROOT / "tokenizer", {2})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(theirs, folder)
    ours = load_adapter(folder / "lora").apply(load_weights(base).build()).eval()
    tokens = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits, atol=1e-5, rtol=1e-5)

    (tmp_path / "me.jsonl").unlink()
    status, out, _ = run_script("scripts/lora_quickstart.py", *words, "--skip_merge", "--max_steps=1")
    assert status == 0 and "合并" not in out, "skip_merge takes what is there"
