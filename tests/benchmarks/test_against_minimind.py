"""Sides that train in turns, and the table of who is where when. All of it runs on a stand-in of MiniMind."""

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks.against_minimind import Judge, Side, summary
from common.files import ROOT
from tests.helpers.rows import write_pretrain, write_sft
from tokenizer.text import Tokenizer

COUNTS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from slices import Slices
slices = Slices()
print("what others print is no answer")
slices.begin()
time.sleep(0.1)
for step in range(int(sys.argv[2])):
    slices.before_step(lambda path: path.write_text(f"after {step}"))
    time.sleep(0.02)
slices.end(lambda path: path.write_text("at the end"))
"""


@pytest.mark.skipif(os.name != "posix", reason="stops processes by signals")
def test_only_the_side_whose_turn_it_is_spends_time(tmp_path):
    """Between two turns a side neither trains nor spends time, however long the other one takes."""
    (tmp_path / "counts.py").write_text(COUNTS, encoding="utf-8")
    side = Side([sys.executable, str(tmp_path / "counts.py"), str(ROOT / "benchmarks/sides"), "40"], tmp_path / "side")
    try:
        first = side.turn(0.4)
        assert 0.1 <= first["setup"] < 0.4 and not first["done"]
        assert side.weights.read_text() == f"after {first['steps']}"
        time.sleep(1)
        second = side.turn(0.2)
        assert 0 < second["steps"] - first["steps"] <= 11 and second["seconds"] - first["seconds"] < 0.9
        last = side.turn(60)
        assert last["done"] and last["steps"] == 40 and side.weights.read_text() == "at the end"
    finally:
        side.close()


def test_the_table_says_when_ours_is_where_the_others_end():
    """Ours is below 2.5 at 20 s, and MiniMind at 100 s: five times as fast. Its end in bf16, 2.3, is not reached."""
    point = lambda seconds, bpb: dict(seconds=seconds, steps=1, bpb=bpb)
    curves = dict(
        sparrow=[point(10.0, 3.0), point(20.0, 2.4)],
        fp32=[point(50.0, 3.0), point(100.0, 2.5)],
        bf16=[point(100.0, 2.3)],
    )
    *_, ours, shipped, bf16 = summary(curves)
    assert ours == "| Sparrow | 2.4000 | 20 |  |  |"
    assert shipped == "| MiniMind as shipped (fp32) | 2.5000 | 100 | 20 s | 5.0 |"
    assert bf16.endswith("| 2.3000 | 100 | not reached |  |")


THINKS = (  # as MiniMind 3's: an empty think block before each answer, and in the prompt for one
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


def test_what_the_template_writes_before_an_answer_does_not_count(tmp_path):
    """Each answer and its end count once, after the turns before it."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((ROOT / "tokenizer" / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(THINKS, encoding="utf-8")
    roles, said = ("user", "assistant") * 2, ("Name a fruit.", "Pear", "Another?", "Fig")
    turns = [dict(role=role, content=content) for role, content in zip(roles, said)]
    (tmp_path / "held_out.jsonl").write_text(json.dumps(dict(conversations=turns)), encoding="utf-8")
    for tokenizer, block in ((Tokenizer.load(tmp_path), "<think>\n\n</think>\n\n"), (Tokenizer.load(), "")):
        answers, size = Judge(tmp_path / "held_out.jsonl", "sft", 100)._encode(tokenizer)
        counted = [tokenizer.decode([i for i, t in zip(row.ids, row.trained) if t]) for row in answers]
        assert counted == ["Pear<|im_end|>", "Fig<|im_end|>"] and size == len("PearFig")
        assert all(f"assistant\n{block}Pear" in tokenizer.decode(row.ids) for row in answers)


# ---- a stand-in of MiniMind: its files and names, and a model that only looks at the last token

MODEL = """
import torch
from torch import nn

class MiniMindConfig:
    def __init__(self, **values):
        vars(self).update(values)

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        heads, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        for name, shape in dict(q=(c.hidden_size, heads), k=(c.hidden_size, groups), v=(c.hidden_size, groups)).items():
            setattr(self, f"{name}_proj", nn.Linear(*shape, bias=False))
        self.o_proj = nn.Linear(heads, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(c.head_dim), nn.RMSNorm(c.head_dim)

class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), nn.Module()
        for name in ("gate", "up"):
            setattr(self.mlp, f"{name}_proj", nn.Linear(c.hidden_size, c.intermediate_size, bias=False))
        self.mlp.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(c.hidden_size), nn.RMSNorm(c.hidden_size)

class MiniMindForCausalLM(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.model.norm = nn.RMSNorm(c.hidden_size)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids, labels):
        logits = self.lm_head(self.model.norm(self.model.embed_tokens(ids)))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
"""

DATASET = """
import json
import torch

class PretrainDataset(torch.utils.data.Dataset):
    def __init__(self, path, tokenizer, max_length):
        self.rows = [json.loads(line) for line in open(path, encoding="utf-8")]
        self.tokenizer, self.length = tokenizer, max_length

    def __len__(self):
        return len(self.rows)

    def text(self, row):
        return row["text"]

    def __getitem__(self, i):
        ids = self.tokenizer(self.text(self.rows[i])).input_ids[: self.length]
        ids = torch.tensor(ids + [0] * (self.length - len(ids)))
        return ids, ids.where(ids > 0, -100)

class SFTDataset(PretrainDataset):
    def text(self, row):
        return self.tokenizer.apply_chat_template(row["conversations"], tokenize=False)
"""

STAGE = """
import torch

def train_epoch(epoch, loader, iters, start_step=0, wandb=None):
    for step, (ids, labels) in enumerate(loader, start=1):
        with autocast_ctx:
            loss = model(ids.to(args.device), labels.to(args.device)) / args.accumulation_steps
        scaler.scale(loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
"""


@pytest.fixture
def minimind(tmp_path):
    files = {
        "model/model_minimind.py": MODEL,
        "dataset/lm_dataset.py": DATASET,
        "trainer/train_pretrain.py": STAGE,
        "trainer/train_full_sft.py": STAGE,
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        files[f"model/{name}"] = (ROOT / "tokenizer" / name).read_text(encoding="utf-8")
    for name, text in files.items():
        (tmp_path / "minimind" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "minimind" / name).write_text(text, encoding="utf-8")
    return tmp_path / "minimind"


@pytest.mark.soak
@pytest.mark.skipif(os.name != "posix", reason="stops processes by signals")
def test_the_whole_comparison(minimind, tmp_path):
    """Both phases in one go; then fine-tuning alone, from the weights that the first run has left."""
    texts, chats = write_pretrain(tmp_path / "texts.jsonl", 200), write_sft(tmp_path / "chats.jsonl", 60)
    size = "--minutes 0.05 --share 1 --slice 1 --max_seq_len 64 --held_out 10 --num_workers 0".split()

    def compare(out, *flags):
        command = [sys.executable, ROOT / "benchmarks/against_minimind.py", minimind, *size, "--out", out, *flags]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((out / "results.json").read_text(encoding="utf-8"))["results"]

    first = compare(tmp_path / "out", "--pretrain", texts, "--sft", chats)
    start = tmp_path / "out/start.pth"
    second = compare(tmp_path / "again", "--phases", "sft", "--sft", chats, "--start", start, "--sides", "fp32")
    assert first.keys() == {"pretrain", "sft"} and second.keys() == {"sft"}
    for curves in first.values():
        assert curves.keys() == {"sparrow", "fp32", "bf16"}
        for curve in curves.values():
            assert [p["steps"] for p in curve] == sorted({p["steps"] for p in curve})
            assert all(p["bpb"] > 0 for p in curve)
    assert second["sft"]["fp32"][-1]["bpb"] == pytest.approx(first["sft"]["fp32"][-1]["bpb"], abs=0.2)
    assert "| MiniMind as shipped (fp32) |" in (tmp_path / "out/results.md").read_text(encoding="utf-8")
    assert (tmp_path / "out/results.png").stat().st_size > 10_000
