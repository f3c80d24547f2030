"""Rows of every kind and a pretrained model, on which any stage can be run."""

import re

from tests.helpers.rows import write_dpo, write_pretrain, write_sft
from tests.helpers.runs import run_stage

ROWS = {  # script -> file
    "pretrain": "text.jsonl",
    "full_sft": "chats.jsonl",
    "lora": "chats.jsonl",
    "dpo": "pairs.jsonl",
    "distill_reason": "thoughts.jsonl",
    "distillation": "chats.jsonl",
}


def prepare_stages(folder):
    """Writes the files and the model -> folder."""
    write_pretrain(folder / "text.jsonl")
    write_sft(folder / "chats.jsonl")
    write_dpo(folder / "pairs.jsonl")
    chats = (folder / "chats.jsonl").read_text(encoding="utf-8")
    thoughts = re.sub(r'("role": "assistant", "content": ")', r"\1<think>hello</think>", chats)
    (folder / "thoughts.jsonl").write_text(thoughts, encoding="utf-8")
    run_stage("pretrain", f"--data_path={folder / 'text.jsonl'}", f"--save_dir={folder}", "--max_steps=2")
    return folder


def stage_flags(stage, folder) -> list[str]:
    base = folder / "pretrain_32.pth"
    teacher = [f"--teacher={base}"] if stage == "distillation" else []
    return [f"--data_path={folder / ROWS[stage]}", f"--from_weight={base}", "--batch_size=4", *teacher]
