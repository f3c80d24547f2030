"""What the benchmarks share: sides measured in turn within one run, medians with their spread, the machine's own limit.

Machines are shared and noisy, so a figure alone says little. Every comparison here runs both sides in the same process
or one after the other, round by round (A B A B ...), and reports ratios of medians.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from dataset.tokens.examples import TokenDataset


def machine() -> str:
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads{load}"


def seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def spread(values: list[float]) -> str:
    """Median and, in brackets, the least and the greatest."""
    return f"{statistics.median(values):.4g} [{min(values):.4g} .. {max(values):.4g}]"


def hugging_face_llama(model):
    """transformers' Llama with the shape and the weights of our model, and the usual optimiser -> (it, optimiser)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        pad_token_id=0,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        tie_word_embeddings=True,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta,
        rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
        attn_implementation="sdpa",
    )
    theirs = LlamaForCausalLM(config).train()
    theirs.load_state_dict(model.state_dict())
    theirs.to(model.model.embed_tokens.weight.device)
    named = list(theirs.named_parameters())
    groups = [
        dict(params=[p for n, p in named if p.dim() > 1 and "embed" not in n], weight_decay=0.1),
        dict(params=[p for n, p in named if p.dim() == 1 or "embed" in n], weight_decay=0.0),
    ]
    return theirs, torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.95), fused=True)


def hugging_face_step(model, optimizer, batch, bf16: bool) -> torch.Tensor:
    """One step of a plain loop around a model of transformers -> its loss."""
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=bf16):
        logits = model(input_ids=batch.tokens).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def data_flags(path: str | None) -> list[str]:
    """For the configuration of a stage, which without a file of one's own takes the tiny world's."""
    return ["--data_path", path] if path else []


class RandomRows(TokenDataset):
    """Rows of random tokens for the engine, where only the time matters."""

    fingerprint, summary, end_of_text, kind = "random", "random rows", 0, "text"

    def __init__(self, rows: int, max_seq_len: int, vocab_size: int):
        import numpy as np

        self.max_seq_len = max_seq_len
        self.order = np.arange(rows)
        self.lengths = np.full(rows, max_seq_len + 1, np.int32)
        self._ids = np.random.default_rng(0).integers(16, vocab_size, (rows, max_seq_len + 1)).astype(np.uint16)

    def _tokens(self, i):
        return self._ids[i]

    def _trained(self, i):
        return None

    def _source(self, i):
        return f"random:{i}"
