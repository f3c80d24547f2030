"""docs/models.md: the tables are what the formula gives, and the formula is what a training takes."""

import os
import subprocess
import sys

import pytest

from benchmarks import memory_table
from common.files import ROOT
from model.config import ModelConfig
from model.cost import count_parameters, training_bytes
from tests.helpers.rows import chat, jsonl

PUBLISHED = {  # parameters that their makers state, or that add up from the tensors of their files
    "Qwen2-0.5B": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
    "Llama-3.2-1B": 1_235_814_400,
    "Qwen2-1.5B": 1_543_714_304,
    "Qwen3-4B": 4_022_468_096,
    "ChatGLM3-6B": 6_243_584_000,
    "Llama-2-7B": 6_738_415_616,
    "Mistral-7B": 7_241_732_096,
    "Qwen2-7B": 7_615_616_512,
    "Llama-3.1-8B": 8_030_261_248,
    "GLM-4-9B": 9_400_279_040,
    "Qwen2.5-14B": 14_770_033_664,
}


def test_the_shapes_are_those_of_the_published_models():
    counted = {name: count_parameters(config) for name, config in memory_table.MODELS.items()}
    assert {name: counted[name] for name in PUBLISHED} == PUBLISHED
    assert counted.keys() - PUBLISHED.keys() == {"MiniMind2-Small", "MiniMind2"}, "test_cost.py has these"


def test_the_page_shows_what_the_script_prints():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    for table in (memory_table.memory_table(), memory_table.length_table()):
        assert table in page, "python benchmarks/memory_table.py prints it"


def test_bytes_of_a_training_by_hand():
    """d 8, one layer, 2 heads of 4, 1 key/value head, I 16, V 10: q, o 64 weights each, k, v 32, the feed-forward's
    three 128: 576 in matrices, 80 in the embedding, 24 in norms. A row of 100 keeps 8 x 8 + 2 x 4 + 3 x 16 = 120
    numbers a position for the block that is computed again, their gradients, 8 for its input, and 10 logits twice in
    fp32."""
    shape = ModelConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=16,
        vocab_size=10,
    )
    row = 100 * ((2 * 120 + 8) * 2 + 10 * 2 * 4)
    # weight, gradient and two moments in fp32; the matrices and the head once in bf16 while they are used
    assert training_bytes(shape, 100) == 680 * 16 + (576 + 80) * 2 + row
    # an adapter of rank 2 beside seven matrices: 2 x (4 x 8 + 2 x 4 + 3 x 24 + ...) numbers, trained
    inner = 2 * (2 * (8 + 8) + 2 * (4 + 8) + 3 * (16 + 8))
    lora = row + 100 * 2 * 2 * (8 + 4 + 4 + 8 + 16 + 16 + 8)  # the adapters' outputs, and the sums
    lora += 100 * 10 * (3 * 2 - 2 * 4)  # the frozen head's logits and two gradients in bf16
    others = 80 * 2 + 24 * 4  # the embedding in bf16, norms in fp32
    assert training_bytes(shape, 100, bits=16, lora_rank=2) == 576 * 2 + others + inner * 16 + lora
    # 8 bits: a byte a weight and 4 for each row
    packed = 576 + 4 * (8 + 4 + 4 + 8 + 16 + 16 + 8)
    assert training_bytes(shape, 100, bits=8, lora_rank=2) == packed + others + 576 * 2 + inner * 16 + lora
    # 4 bits, and a byte for 64 weights, 4 for 16,384, and 4 for a matrix: for q and o, k and v, and the feed-forward
    packed = 2 * (32 + 1 + 4 + 4) + 2 * (16 + 1 + 4 + 4) + 3 * (64 + 2 + 4 + 4)
    assert training_bytes(shape, 100, bits=4, lora_rank=2) == packed + others + 576 * 2 + inner * 16 + lora
    three = training_bytes(shape, 100, rows=3) - training_bytes(shape, 100)
    assert three == 2 * row


def measured(folder, name: str, shape: dict, rows: int, *flags: str) -> int:
    """Bytes that one step of fine-tuning such a model takes at its peak, beyond what importing everything takes."""
    import torch

    from model.checkpoint import save_weights
    from model.transformer import CausalLM
    from tests.helpers.models import TOKENIZER

    tokenizer = dict(path=str(TOKENIZER.path), hash=TOKENIZER.hash)
    torch.manual_seed(0)
    weights = save_weights(folder / f"{name}.pth", CausalLM(ModelConfig(**shape)), tokenizer=tokenizer, lineage=[])
    data = jsonl(folder / "rows.jsonl", *[chat(f"question {i}", "hello world " * 160) for i in range(20)])
    words = [f"--from_weight={weights}", f"--data_path={data}", f"--save_dir={folder / name}", f"--batch_size={rows}"]
    words += ["--max_steps=2", "--max_seq_len=512", "--device=cpu", "--dtype=float32", "--compile=off", *flags]
    words += ["--num_workers=1", "--activation_checkpointing"]
    command = [sys.executable, str(ROOT / "tests/helpers/memory_run.py"), *words]
    # glibc gives freed memory back only if it came in pages of its own, as all of at least so many bytes then do
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.soak
def test_a_training_takes_what_the_formula_says(tmp_path):
    """26M parameters, by all weights and by an adapter, in fp32 on the CPU. What every training takes (rows, caches,
    libraries that are loaded on the way) is what that of a tiny model takes, and is subtracted."""
    tiny = dict(vocab_size=6400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    fixed = measured(tmp_path, "tiny_32", tiny, 1) - training_bytes(ModelConfig(**tiny), 512, width=4)
    small = ModelConfig.preset("small")
    for name, flags, method in (
        ("full_512", (), {}),
        ("lora_512", ("--lora_rank=8",), dict(bits=32, lora_rank=8)),
    ):
        taken = measured(tmp_path, name, small.to_dict(), 8, *flags) - fixed
        foretold = training_bytes(small, 512, 8, width=4, **method)
        print(f"{name}: {taken / 1e6:.0f} MB, foretold {foretold / 1e6:.0f} MB")
        assert 0.75 < taken / foretold < 1.35, f"{name}: {taken / 1e6:.0f} MB, foretold {foretold / 1e6:.0f} MB"
