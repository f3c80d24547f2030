"""The demo's last step, with tiny weights in place of trained ones."""

import json
from pathlib import Path

import torch

from model.adapter import save_adapter
from model.checkpoint import load_weights, save_weights
from model.lora import LoRASettings, add_lora
from scripts.demo import report
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.rows import write_dpo


def test_the_demo_ends_with_a_report(tmp_path: Path):
    recorded = dict(path=TOKENIZER.path, hash=TOKENIZER.hash)
    stages = [dict(stage="pretrain"), dict(stage="full_sft")]
    save_weights(tmp_path / "full_sft_32.pth", small_model(), tokenizer=recorded, lineage=stages)
    save_weights(tmp_path / "rlhf_32.pth", small_model(0.07), tokenizer=recorded, lineage=[*stages, dict(stage="dpo")])
    base = load_weights(tmp_path / "full_sft_32.pth")
    model, settings = base.build(), LoRASettings(rank=1)
    torch.manual_seed(0)
    add_lora(model, settings)
    parent = dict(path=str(base.path), hash=base.hash)
    path = tmp_path / "lora/lora_identity_32.pth"
    save_adapter(path, model, settings, base=parent, tokenizer=recorded, lineage=stages)
    (tmp_path / "tiny_world").mkdir()
    write_dpo(tmp_path / "tiny_world/dpo_val.jsonl", 4)

    page = report(tmp_path, 0)
    assert page.is_file() and page.suffix == ".html"
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert [model["name"] for model in found["models"]] == ["full_sft_32", "lora_identity_32", "rlhf_32"]
    assert {"fact", "identity", "manner"} <= {row["kind"] for row in found["questions"]}
    assert len(found["questions"]) > 30 and found["held_out"][0]["file"] == "dpo_val.jsonl"
    # B of a fresh adapter is zero: whatever it is asked, it answers as its base does
    assert all(row["answers"][0] == row["answers"][1] for row in found["questions"])
