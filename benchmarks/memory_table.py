"""Prints the tables of docs/models.md: how much memory the training of which model takes, and what fits on which card.

python benchmarks/memory_table.py            # by the formula of model/cost.py
python benchmarks/memory_table.py --count    # and what tensors of real steps of `small` take, beside it; two minutes
"""

import argparse
import sys
import weakref
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import ModelConfig
from model.cost import count_parameters, training_bytes
from model.lora import LoRASettings, add_lora
from model.precision import lower_frozen
from model.quant import quantize_model
from model.transformer import CausalLM

QWEN = dict(num_key_value_heads=2, attention_bias=True, vocab_size=151936)
MODELS = {  # published shapes; tests/model/test_cost.py compares their parameters with the published numbers
    "MiniMind2-Small": ModelConfig.preset("small"),
    "MiniMind2": ModelConfig.preset("base"),
    "Qwen2-0.5B": ModelConfig(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, intermediate_size=4864, **QWEN
    ),
    "Qwen3-0.6B": ModelConfig(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=151936,
        qk_norm=True,
    ),
    "Llama-3.2-1B": ModelConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        vocab_size=128256,
    ),
    "Qwen2-1.5B": ModelConfig(
        hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, intermediate_size=8960, **QWEN
    ),
    "Qwen3-4B": ModelConfig(
        hidden_size=2560,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9728,
        vocab_size=151936,
        qk_norm=True,
    ),
    "ChatGLM3-6B": ModelConfig(
        hidden_size=4096,
        num_hidden_layers=28,
        num_attention_heads=32,
        num_key_value_heads=2,
        intermediate_size=13696,
        vocab_size=65024,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "Llama-2-7B": ModelConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=11008,
        vocab_size=32000,
        tie_word_embeddings=False,
    ),
    "Mistral-7B": ModelConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=32000,
        tie_word_embeddings=False,
    ),
    "Qwen2-7B": ModelConfig(
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "Llama-3.1-8B": ModelConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
        tie_word_embeddings=False,
    ),
    "GLM-4-9B": ModelConfig(
        hidden_size=4096,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=2,
        intermediate_size=13696,
        vocab_size=151552,
        attention_bias=True,
        post_norms=True,
        tie_word_embeddings=False,
    ),
    "Qwen2.5-14B": ModelConfig(
        hidden_size=5120,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        intermediate_size=13824,
        vocab_size=152064,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
}
METHODS = {  # bits of the weights and rank of the adapter
    "full": dict(bits=32, lora_rank=0),
    "LoRA": dict(bits=16, lora_rank=8),
    "8-bit LoRA": dict(bits=8, lora_rank=8),
    "4-bit LoRA": dict(bits=4, lora_rank=8),
}
CARDS = (8, 12, 16, 24, 80)  # GB
LENGTHS = (8192, 4096, 2048, 1024, 512)


def memory_table() -> str:
    """GB at a length of 1,024 tokens, one row at a time."""
    lines = [f"| model | parameters | {' | '.join(METHODS)} |", f"|---|--:|{'--:|' * len(METHODS)}"]
    for name, config in MODELS.items():
        sizes = (f"{training_bytes(config, 1024, **method) / 1e9:.1f}" for method in METHODS.values())
        lines.append(f"| {name} | {count_parameters(config) / 1e9:.2f}B | {' | '.join(sizes)} |")
    return "\n".join(lines)


def longest_row(config: ModelConfig, method: dict, card: int) -> str:
    """The longest of LENGTHS of which one row fits into a card's memory; "–": none."""
    fitting = (f"{length:,}" for length in LENGTHS if training_bytes(config, length, **method) <= card * 1e9)
    return next(fitting, "–")


def length_table() -> str:
    """The longest row that fits, for each model, method and card, where the smallest card does not take the longest."""
    lines = [
        f"| model | method | {' | '.join(f'{card} GB' for card in CARDS)} |",
        f"|---|---|{'--:|' * len(CARDS)}",
    ]
    for name, config in MODELS.items():
        for label, method in METHODS.items():
            cells = [longest_row(config, method, card) for card in CARDS]
            if cells[0] != f"{LENGTHS[0]:,}":  # else everything fits everywhere
                lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- counted


class LiveBytes(TorchDispatchMode):
    """In a `with`: `now` and `peak` are the bytes of all tensors made inside that have not been freed, without what an
    allocator adds. The inside of a compiled function is not seen."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._counted:
            self._counted.add(id(storage))
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, id(storage), storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.now -= size


def kept_as_used(method: dict, width: int) -> dict:
    """The method of METHODS; its frozen weights are kept in numbers of `width` bytes, if not in 4 or 8 bits."""
    return method | {"bits": 8 * width} if method["bits"] == 16 else method


def step_bytes(config: ModelConfig, rows: int, length: int, width: int, method: dict) -> int:
    """What all tensors take at the peak of an optimiser step of two batches, as `training_bytes` foretells it."""
    with LiveBytes() as live:
        model = CausalLM(config)
        if method["bits"] < 16:
            quantize_model(model, method["bits"])
        if method["lora_rank"]:
            model.requires_grad_(False)
            add_lora(model, LoRASettings(rank=method["lora_rank"]))
            if width == 2:
                lower_frozen(model, torch.bfloat16)
        model.compute_dtype, model.recompute = {2: torch.bfloat16, 4: torch.float32}[width], True
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        tokens = torch.zeros(rows, length + 1, dtype=torch.long)
        for _ in range(2):  # AdamW has its moments after the first
            live.peak = live.now
            for _ in range(2):
                model(tokens[:, :-1], targets=tokens[:, 1:]).loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return live.peak


def counted_table() -> str:
    """GB of `small`, 8 rows of 512 tokens: what the tensors take, and what the formula says."""
    config = ModelConfig.preset("small")
    lines = ["| method | bf16 | formula | fp32 | formula |", "|---|--:|--:|--:|--:|"]
    for name, method in METHODS.items():
        cells = []
        for width in (2, 4):
            chosen = kept_as_used(method, width)
            taken = step_bytes(config, 8, 512, width, chosen)
            cells += [f"{taken / 1e9:.2f}", f"{training_bytes(config, 512, 8, width=width, **chosen) / 1e9:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="also count the tensors of real steps")
    count = parser.parse_args().count
    print(memory_table(), length_table(), *([counted_table()] if count else []), sep="\n\n")
