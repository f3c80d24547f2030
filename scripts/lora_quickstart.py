"""LoRA in one command: mixes the rows of a task with rows about the model's identity, trains an adapter and saves it.
Has the flags and the Chinese output of the "MiniMind2-Small LoRA" script, for people who know that one.

    python scripts/lora_quickstart.py                          # a quick test on built-in data, about a minute on a CPU
    python scripts/lora_quickstart.py --task_data medical.jsonl --identity_data me.jsonl --lora_name my_chatbot_lora

It runs scripts/prepare_data.py and trainer/train_lora.py, which have more flags. The base model is --from_weight, by
default the newest out/full_sft_*.pth. Where there is none, MiniMind2-PyTorch is fetched from ModelScope into models/,
as the original did; --skip_download keeps it from that. The quick test fetches nothing.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import re
import shlex
import time
from dataclasses import dataclass, replace

from common.console import UserError, run, say
from common.files import ROOT
from common.options import Options, option, parse
from common.values import EPOCHS, LONGEST, SEEDS, STEPS
from scripts.commands import call

MINIMIND = "MiniMind2-PyTorch"  # in the table of model/hub.py


@dataclass(frozen=True)
class QuickstartConfig(Options):
    """Options of the LoRA quickstart"""

    lora_name: str = option("medical_chatbot_lora", "name of the adapter")
    task_data: str = option(str(ROOT / "dataset/medical_data_formatted.jsonl"), "rows of the task", path=True)
    identity_data: str = option(
        str(ROOT / "dataset/medical_identity.jsonl"), "rows about the model's identity", path=True
    )
    merged_data: str = option(
        str(ROOT / "dataset/merged_training_data.jsonl"), "file that both are merged into", path=True
    )
    ratio: float = option(
        12, "task rows for each identity row (12: 8 % identity); 0: one file after the other", within="[0, inf)"
    )
    out_dir: str = option(str(ROOT / "out"), "results go into a folder of the adapter's name here", path=True)
    from_weight: str = option("full_sft", "the model: a name in out_dir or out/, a file or a directory")
    epochs: int = option(10, "passes over the data", within=EPOCHS)
    max_steps: int = option(0, "stop after N optimiser steps (0: by epochs)", within=STEPS)
    batch_size: int = option(4, "rows of an optimiser step", within="[1, inf)")
    learning_rate: float = option(1e-4, "peak learning rate", within="(0, inf)")
    max_length: int = option(512, "tokens in a row", aliases=("max_seq_len",), within=f"[2, {LONGEST}]")
    lora_r: int = option(8, "rank: inner size of the adapter's matrices", aliases=("lora_rank",), within="[1, inf)")
    lora_alpha: float = option(32.0, "what the adapter adds is multiplied by alpha / r", within="(0, inf)")
    lora_dropout: float = option(0.1, "share of the adapter's inputs left out at random", within="[0, 1)")
    target_modules: tuple[str, ...] = option(("q_proj", "v_proj", "k_proj", "o_proj"), "layers that get an adapter")
    accumulation_steps: int = option(
        1, "batches summed into one step", within="[1, inf)", aliases=("gradient_accumulation_steps",)
    )
    tokenizer_path: str | None = option(
        None, "directory with the model's tokenizer.json, where the weights do not name it", path=True
    )
    dtype: str = option(
        "auto",
        "compute precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        aliases=("bf16=bfloat16|float32", "fp16=float16|float32"),
    )
    seed: int = option(42, "seed of everything random", within=SEEDS)
    from_resume: str = option("0", "continue an interrupted training: 0, 1, auto", switch=("1", "0"))
    use_wandb: bool = option(False, "log to Weights & Biases as well")
    wandb_project: str = option("minimind_medical_chatbot", "the project in Weights & Biases")
    device: str = option("auto", "auto, cpu, cuda, ...")
    on_bad_row: str = option("error", "a row that cannot be read", choices=("error", "skip"))
    skip_download: bool = option(False, "do not fetch MiniMind2-PyTorch where there is no full_sft")
    skip_merge: bool = option(False, "use merged_data as it is, without merging")


def main():
    config = parse(QuickstartConfig, description=__doc__)
    if len(sys.argv) == 1:
        config = quick_test(config)
    from model.adapter import load_adapter
    from model.checkpoint import find_weights
    from model.export import write_peft
    from tokenizer.find import tokenizer_of

    begin = time.perf_counter()
    base = find_base(config)
    say(f"✅ 模型: {base}")
    if not config.skip_merge:
        merge(config)
    folder = train(config, base)
    adapter = load_adapter(find_weights(config.lora_name, folder / "lora"))
    tokenizer = tokenizer_of(adapter.tokenizer, base, adapter.config.vocab_size, config.tokenizer_path)
    write_peft(folder, adapter, tokenizer.path)
    say(f"✅ 模型保存到: {folder}（peft 可直接加载）")
    print(f"⏱️ 训练完成! 总耗时: {(time.perf_counter() - begin) / 60:.1f} 分钟")
    talk = ["python", "eval_model.py", "--lora_name", config.lora_name]
    if Path(config.out_dir) != ROOT / "out":
        talk += ["--save_dir", config.out_dir]
    say(f"💬 试一试: {shlex.join(talk)}")


def find_base(config: QuickstartConfig) -> Path:
    """The weights to start from. MiniMind2-PyTorch stands in for the default ones where there are none."""
    from model import hub
    from model.checkpoint import find_weights

    try:
        return find_weights(config.from_weight, config.out_dir, ROOT / "out")
    except UserError:
        there = (hub.MODELS / MINIMIND).exists()
        if config.from_weight != type(config).from_weight or config.skip_download and not there:
            raise
    if not there:
        print(f"🔄 开始下载{MINIMIND}模型...", flush=True)
    folder = hub.fetch_model(MINIMIND, source="modelscope")
    if not there:
        say(f"✅ 模型下载成功: {folder}")
    return folder / "full_sft_512.pth"


def merge(config: QuickstartConfig) -> None:
    from dataset.read.mix import prepare

    target = Path(config.merged_data)
    print(f"🔄 开始合并数据集 (比例 {config.ratio:g}:1)..." if config.ratio else "🔄 开始合并数据集 (直接相连)...")
    report = prepare(
        (config.task_data,),
        (config.identity_data,),
        target=target,
        val_target=target.with_suffix(".val.jsonl"),
        ratio=config.ratio,
        on_bad_row=config.on_bad_row,
    )
    print(f"📊 任务数据: {report.task} 条")
    repeated = f"，重复后 {report.repeated} 条" if config.ratio else ""
    print(f"📊 自认知数据: {report.identity} 条{repeated}")
    if report.ratio < 0.9 * config.ratio:
        print(f"⚠️ 自认知数据多于 {config.ratio:g}:1 所需，全部保留，实际比例 {report.ratio:.2g}:1")
    if report.bad:
        print(f"⚠️ 跳过无法读取的行: {report.bad} 条，见各数据文件旁边的 <文件>.rejects.jsonl")
    say(f"✅ 数据合并完成: {report.written} 条数据保存到 {target}")


def train(config: QuickstartConfig, base: Path) -> Path:
    """trainer/train_lora.py in a process of its own -> the folder of the adapter."""
    folder = Path(config.out_dir) / config.lora_name
    flags = dict(
        lora_name=config.lora_name,
        from_weight=base,
        data_path=config.merged_data,
        save_dir=folder,
        epochs=config.epochs,
        max_steps=config.max_steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        max_seq_len=config.max_length,
        lora_rank=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        lora_targets=",".join(config.target_modules),
        use_wandb=config.use_wandb,
        wandb_project=config.wandb_project,
        device=config.device,
        dtype=config.dtype,
        accumulation_steps=config.accumulation_steps,
        seed=config.seed,
        from_resume=config.from_resume,
        on_bad_row=config.on_bad_row,
    )
    if config.tokenizer_path:
        flags["tokenizer_path"] = config.tokenizer_path
    print("🚀 开始LoRA训练...\n📋 训练参数:")
    say(f"  - LoRA名称: {config.lora_name}\n  - 训练轮次: {config.epochs}")
    print(f"  - 批次大小: {config.batch_size}\n  - 学习率: {config.learning_rate:g}")
    print("🔄 加载模型和分词器...", flush=True)
    call(
        [ROOT / "trainer/train_lora.py", *(f"--{name}={value}" for name, value in flags.items())],
        lambda line: say(translate(line)),
    )
    return folder


def translate(line: str) -> str:
    """A line of the training's output in the words of the original script; other lines unchanged."""
    if found := re.match(r"model: ([\d,]+) parameters.*?, ([\d,]+) trained", line):
        every, trained = (int(number.replace(",", "")) / 1e6 for number in found.groups())
        share = f"📊 可训练参数: {trained:.2f}M / {every:.1f}M ({trained / every:.2%})"
        return f"✅ 模型加载完成\n📊 模型参数数量: {every:.1f}M\n{share}"
    if found := re.match(r"device: (\w+)", line):
        return f"💻 使用设备: {found[1]}\n🔥 开始训练..."
    return line


def quick_test(config: QuickstartConfig) -> QuickstartConfig:
    """The whole workflow on the tiny world. Trains a base for 20 steps if there is no full_sft in out/."""
    from dataset.tiny_world.files import generate
    from model.checkpoint import find_weights

    print("🧪 快速测试：用内置数据走一遍全流程（自己的数据: --task_data --identity_data，见 --help）")
    folder = ROOT / "out/quickstart"
    files = generate(folder / "data", files=("pretrain", "sft", "lora_identity"))
    task, identity = folder / "data/task.jsonl", folder / "data/identity.jsonl"
    for source, part, count in (("sft", task, 96), ("lora_identity", identity, 24)):
        with open(files[source], encoding="utf-8") as rows:
            part.write_text("".join(row for _, row in zip(range(count), rows)), encoding="utf-8")
    try:
        base = find_weights("full_sft", ROOT / "out")
    except ValueError:
        flags = [f"--data_path={files['pretrain']}", f"--save_dir={folder}", "--preset=nano", "--max_steps=20"]
        call(
            [ROOT / "trainer/train_pretrain.py", *flags, "--data_limit=2000", "--batch_size=8", "--max_seq_len=128"],
            say,
        )
        base = find_weights("pretrain", folder)
    return replace(
        config,
        lora_name="quick_test",
        task_data=str(task),
        identity_data=str(identity),
        merged_data=str(folder / "data/merged.jsonl"),
        out_dir=str(folder),
        from_weight=str(base),
        epochs=1,
        max_steps=20,
        max_length=256,
    )


if __name__ == "__main__":
    run(main)
