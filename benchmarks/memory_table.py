"""Prints the tables of docs/models.md: how much memory the training of which model takes, and what fits on which card.

python benchmarks/memory_table.py
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from model.config import ModelConfig
from model.cost import count_parameters, training_bytes

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


if __name__ == "__main__":
    print(memory_table(), length_table(), sep="\n\n")
