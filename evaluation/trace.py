"""What happens inside the model while it reads a text, seen from outside by forward hooks. The model is not changed.

    seen = trace(model, ids)
    seen.attention[3, 0]                # (T, T): whom the tokens look at, in the first head of the fourth layer

Letters: L layers, T positions, d hidden size, H query heads, E experts, V vocabulary, D head size, K key/value heads.

Attention kernels do not return their probabilities, so those are computed a second time, in fp32, from what each layer
was given. tests/evaluation/test_xray.py checks that everything here adds up to what the model itself computes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import AttentionMask
from model.lora import LoRALinear, adapted
from model.moe import MoE
from model.rope import Rope
from model.transformer import Attention, Block, CausalLM


@dataclass
class Trace:
    logits: Tensor  # (T, V)
    stream: Tensor  # (L + 1, T, d) the residual stream: the embedding, then what each layer leaves
    attention_added: Tensor  # (L, T, d) what the attention of each layer adds to it
    mlp_added: Tensor  # (L, T, d)
    attention: Tensor  # (L, H, T, T) probabilities: row = who looks, column = at whom
    routing: dict[int, Tensor]  # layer -> (T, E) probabilities of its experts; empty for dense models


@torch.no_grad()
def trace(model: CausalLM, ids: list[int]) -> Trace:
    """Reads the text once. All results are fp32 on the CPU."""
    layers: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    routing: dict[int, Tensor] = {}
    device = model.model.embed_tokens.weight.device

    def keep(at: dict, name: str | int, tensor: Tensor) -> None:
        at[name] = tensor[0].float().cpu()

    with ExitStack() as stack:

        def watch(module: nn.Module, see: Callable[[tuple, Any], None]) -> None:
            """Calls see(inputs, output); what it returns is dropped, since a hook's result would replace the output."""

            def hook(_module, given, out):
                see(given, out)

            stack.callback(module.register_forward_hook(hook).remove)

        def watch_layer(number: int, block: Block, at: dict[str, Tensor]) -> None:
            def of_block(given, out):
                keep(at, "before", given[0])
                keep(at, "after", out[0])

            watch(block, of_block)
            attention, mlp = block.self_attn, block.mlp
            watch(attention, lambda given, out: keep(at, "attention", attention_probabilities(attention, *given[:3])))
            # these two see what is added to the stream, with or without a norm of their own
            watch(block.post_self_attn_layernorm, lambda given, out: keep(at, "attention_added", out))
            watch(block.post_mlp_layernorm, lambda given, out: keep(at, "mlp_added", out))
            if isinstance(mlp, MoE):
                watch(mlp, lambda given, out: keep(routing, number, route(mlp, given[0])))

        for number, (block, at) in enumerate(zip(model.model.layers, layers)):
            assert isinstance(block, Block)
            watch_layer(number, block, at)
        logits = model(torch.tensor([ids], device=device)).logits
    return Trace(
        logits=logits[0].float().cpu(),
        stream=torch.stack([layers[0]["before"], *(at["after"] for at in layers)]),
        attention_added=torch.stack([at["attention_added"] for at in layers]),
        mlp_added=torch.stack([at["mlp_added"] for at in layers]),
        attention=torch.stack([at["attention"] for at in layers]),
        routing=routing,
    )


def attention_probabilities(module: Attention, x: Tensor, rope: Rope, mask: AttentionMask) -> Tensor:
    """What softmax gives inside the kernel: (B, H, T, T) of the layer's input x (B, T, d)."""
    T = x.shape[1]
    q, k = (heads.float().transpose(1, 2) for heads in module.heads(x, rope)[:2])  # (B, H or K, T, D)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) * module.head_dim**-0.5
    if mask.tensor is None:
        visible = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    else:
        visible = mask.tensor == 0  # the others are -inf
    return scores.masked_fill(~visible, float("-inf")).softmax(-1)


def route(module: MoE, x: Tensor) -> Tensor:
    """The router's probabilities (B, T, E), as MoE.forward computes them."""
    return F.linear(x.float(), module.gate.weight.float()).softmax(-1)


@torch.no_grad()
def lens(model: CausalLM, seen: Trace) -> Tensor:
    """The logit lens (nostalgebraist, 2020): the model's last norm and head applied to every layer's residual stream.
    (L + 1, T, V) logits; the last are the model's own."""
    weight = model.model.embed_tokens.weight
    stream = seen.stream.to(weight.device, model.compute_dtype or weight.dtype)
    return torch.stack([model.lm_head(model.model.norm(x)).float().cpu() for x in stream])


def change_of(layer: LoRALinear, name: str) -> dict[str, float]:
    """How much an adapter changes the weight W of one layer: Frobenius norms of scale B A and of W, and how many
    directions it uses (effective rank, Roy & Vetterli 2007: the exponential of the entropy of its singular values).

    The singular values of B A are those of the r x r product of the two triangles of their QR decompositions.
    """
    adapter = layer.adapter(name)
    B, A = adapter.B.detach().float().cpu(), adapter.A.detach().float().cpu()
    values = torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T) * abs(adapter.scale)
    norm, weight = values.norm().item(), layer.weight.detach().float().norm().item()
    share = values / values.sum() if norm > 0 else torch.zeros_like(values)
    rank = torch.exp(-(share * share.clamp_min(1e-12).log()).sum()).item() if norm > 0 else 0.0
    return dict(change=norm, weight=weight, ratio=norm / weight if weight else 0.0, rank=rank)


def changes(model: CausalLM, name: str) -> dict[str, dict[str, float]]:
    """`change_of` for every layer that the adapter is beside, by the layer's name."""
    return {path: change_of(layer, name) for path, layer in adapted(model).items() if name in layer.adapters}
