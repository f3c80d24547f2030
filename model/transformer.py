"""The decoder: token ids in, next-token logits or losses out.

    model = CausalLM(ModelConfig.preset("nano"))
    logits = model(torch.randint(6400, (1, 16))).logits                       # (1, 16, 6400)

Letters: B rows, T positions, d hidden size, H query heads, K key/value heads, D head size, V vocabulary.
Parameter names are those of Hugging Face's Llama / Qwen, so weights move between the two unchanged.

Precision: weights may be fp32 masters while `compute_dtype` is bf16 (model/layers.py). Routing and losses are computed
in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import (
    LONG,
    AttentionMask,
    Segments,
    build_mask,
    causal_attention,
    choose_kernels,
    has_flash,
    load_varlen,
)
from model.config import ModelConfig
from model.cost import LOGITS_AT_ONCE, idle_parameters
from model.head import cross_entropy
from model.layers import Embedding, FeedForward, Head, Linear, RMSNorm, add, generating_on_gpu
from model.moe import MoE
from model.rope import Rope, apply_rope, as_matrix, count_positions, rope_frequencies, rope_table


class Cache(Protocol):
    """What the model needs of a key/value cache (inference/slots.py)."""

    def extend(self, tokens: Tensor) -> Tensor:
        """Makes room for tokens (B, T) -> their positions (B or 1, T)."""
        ...

    def mask(self, window: int | None) -> AttentionMask:
        """Which of all keys the new tokens see in a layer with this window."""
        ...

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, T, K, D) of the new positions -> those of all positions (B, S, K, D)."""
        ...


class Output(NamedTuple):
    logits: Tensor | None  # (B, T, V), or (K, V) at the `selected` positions; None with targets
    loss: Tensor | None  # (B, T) fp32 negative log-likelihood of each target, 0 where there is none; see `criterion`
    aux_loss: Tensor  # (B,) fp32 balancing loss of each row, summed over layers; 0 for dense models


class Attention(nn.Module):
    """H query heads share K key/value heads (GQA, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        H, K, D, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.layer, self.head_dim, self.interleaved = layer, D, config.rope_interleaved
        self.sizes = [H, K, K]
        self.q_proj = Linear(d, H * D, bias=config.attention_bias)
        self.k_proj = Linear(d, K * D, bias=config.attention_bias)
        self.v_proj = Linear(d, K * D, bias=config.attention_bias)
        self.o_proj = Linear(H * D, d, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.qkv_proj: Linear | None = None  # all three in one (model/precision.py)

    def heads(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d) -> q (B, T, H, D), k and v (B, T, K, D), normed and turned."""
        B, T, _ = x.shape
        if self.qkv_proj is None:
            q, k, v = (proj(x).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
            q, k = (apply_rope(y, rope, self.interleaved) for y in (self.q_norm(q), self.k_norm(k)))
            return q, k, v
        y = self.qkv_proj(x).view(B, T, -1, self.head_dim)
        both, v = y.split([sum(self.sizes[:2]), self.sizes[2]], dim=2)
        if not isinstance(self.q_norm, nn.Identity):
            q, k = both.split(self.sizes[:2], dim=2)
            both = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        q, k = apply_rope(both, rope, self.interleaved).split(self.sizes[:2], dim=2)  # turned at once
        return q, k, v

    def forward(
        self, x: Tensor, rope: Rope, mask: AttentionMask, cache: Cache | None = None, onto: Tensor | None = None
    ) -> Tensor:
        """x (B, T, d) -> the same shape, added to `onto` if it is given."""
        B, T, _ = x.shape
        q, k, v = self.heads(x, rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, S, K, D), perhaps in a wider dtype
        y = causal_attention(q.to(k.dtype), k, v, mask).to(x.dtype)  # (B, T, H, D)
        y = y.reshape(B, T, -1)
        return self.o_proj(y) if onto is None else add(onto, self.o_proj, y)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_self_attn_layernorm, self.post_mlp_layernorm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps) if config.post_norms else nn.Identity() for _ in range(2)
        )
        sparse = config.num_experts > 0
        self.direct = not sparse and not config.post_norms  # nothing comes between a product and its sum with x
        self.mlp = MoE(config) if sparse else FeedForward(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, rope: Rope, mask: AttentionMask, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, d) -> the same shape, and the balancing loss (B,) of a mixture of experts. With a cache, x may be
        overwritten."""
        if cache is not None and self.direct:
            x = self.self_attn(self.input_layernorm(x), rope, mask, cache, onto=x)
            return self.mlp(self.post_attention_layernorm(x), onto=x), None
        x = x + self.post_self_attn_layernorm(self.self_attn(self.input_layernorm(x), rope, mask, cache))
        y = self.mlp(self.post_attention_layernorm(x))
        y, aux_loss = y if isinstance(y, tuple) else (y, None)
        return x + self.post_mlp_layernorm(y), aux_loss


class Transformer(nn.Module):
    """Embedding, blocks and final norm: everything but the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """A decoder-only language model. The attributes below are set from outside."""

    compute_dtype: torch.dtype | None = None  # None: that of the weights
    attention_kernel: str | None = None  # "sdpa" | "varlen" | "apart" | "blocked"; None: see `_kernel`
    recompute = False  # activation checkpointing: keep only each block's input, and compute the rest again
    rope_frequencies: Tensor  # (R,) of each number that is turned
    local_rope_frequencies: Tensor | None  # (R,), of the layers with a window; None: the same

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.reset_rope()
        self.register_load_state_dict_pre_hook(_retie)
        if not self.lm_head.weight.is_meta:  # see Embedding
            initialise(self)

    def reset_rope(self) -> None:
        """Computes the buffers, which no file holds: they follow from the config."""
        with torch.device("cpu"):  # not on `meta`, where a number cannot depend on another
            each, self.rope_temperature, local = rope_frequencies(self.config)
        here = torch.get_default_device()
        self.register_buffer("rope_frequencies", each.to(here), persistent=False)
        self.register_buffer("local_rope_frequencies", None if local is None else local.to(here), persistent=False)

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        selected: Tensor | None = None,
        prefixes: Tensor | None = None,
        segments: Segments | None = None,
        criterion: Callable[[Tensor, Tensor, slice], Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """tokens (B, T) -> logits, or with `targets` (B, T) the loss of each of them (-100: none).

        documents (B, T) numbers the documents packed into a row: attention stays within each.
        positions (B, T) for RoPE; by default 0, 1, ..., restarting in each document, and after what `cache` holds.
        selected (K,) flat indices b*T+t of the positions the head is applied to; None: all. With targets, every target
            outside must be -100, and an index may be repeated only where the target is -100.
        prefixes (B, T) number of another document in the row that a position sees too: a prompt that answers share.
        segments  where the documents begin and end, as a loader knows it; without it, kernels may ask the device.
        criterion what to return instead of cross-entropy: (logits (n, V) fp32, targets (n,), which n of the positions
            they are) -> (n, ...) fp32, for some positions at a time and again in the backward pass. `loss` is then
            (B, T, ...).
        cache     keys and values of what was read before; it is read and extended. It knows the documents itself.
        """
        B, T = tokens.shape
        if cache is not None:
            positions = cache.extend(tokens)
        elif positions is None and documents is not None:
            positions = count_positions(documents)
        elif positions is None:
            positions = torch.arange(T, device=tokens.device)[None]

        x = self.model.embed_tokens(tokens)  # (B, T, d)
        x = x.to(self.compute_dtype or x.dtype)
        table = lambda *of: rope_table(positions, *of, dtype=x.dtype)
        if T == 1 and generating_on_gpu(x):
            table = lambda *of: as_matrix(rope_table(positions, *of, dtype=x.dtype), self.config)
        rope = local_rope = table(self.rope_frequencies, self.rope_temperature)
        if self.local_rope_frequencies is not None:
            local_rope = table(self.local_rope_frequencies)
        windows = self.config.windows
        if cache is not None:
            masks = {window: cache.mask(window) for window in set(windows)}
        else:
            kernel = self._kernel(x, documents is not None or any(windows))
            masks = {w: build_mask(positions, documents, x, kernel, prefixes, w, segments) for w in set(windows)}
        aux_loss = torch.zeros(B, device=tokens.device)
        kernels = partial(choose_kernels, x.device, masks.values())
        again = lambda: (nullcontext(), kernels())  # recomputed layers have to choose as they did before
        with kernels():
            for block, window in zip(self.model.layers, windows):
                more = rope if window is None else local_rope, masks[window]
                if self.recompute and torch.is_grad_enabled() and cache is None:
                    x, aux = checkpoint(block, x, *more, use_reentrant=False, context_fn=again)
                else:
                    x, aux = block(x, *more, cache)
                aux_loss = aux_loss if aux is None else aux_loss + aux
        x = self.model.norm(x)

        if selected is not None:
            x = x.reshape(B * T, -1)[selected]  # (K, d)
        if targets is None:
            return Output(self.lm_head(x), None, aux_loss)
        x, flat = x.reshape(-1, x.shape[-1]), targets.reshape(B * T)
        flat = flat if selected is None else flat[selected]
        loss = self._losses(x, flat, criterion)
        if selected is not None:
            loss = torch.zeros(B * T, *loss.shape[1:], device=loss.device).index_add(0, selected, loss)
        return Output(None, loss.view(B, T, *loss.shape[1:]), aux_loss)

    def _losses(
        self, x: Tensor, targets: Tensor, criterion: Callable[[Tensor, Tensor, slice], Tensor] | None
    ) -> Tensor:
        """x (N, d), targets (N,) -> (N,), or (N, ...) of the criterion."""
        words, frozen = self.config.vocab_size, not any(p.requires_grad for p in self.lm_head.parameters())
        if criterion is None:
            if len(x) * words <= 2 * LOGITS_AT_ONCE and not frozen:
                return self.token_loss(x, targets)
            return self.lm_head(
                x, lambda logits, rows: self.cross_entropy(logits, targets[rows]), positions_at_once(words)
            )
        # a criterion may need several more tensors of the logits' size: another model's, distances between the two
        return self.lm_head(
            x, lambda logits, rows: criterion(logits.float(), targets[rows], rows), positions_at_once(4 * words)
        )

    def token_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """x (N, d), targets (N,) -> (N,) fp32. A function of its own, so that it can be compiled."""
        return self.cross_entropy(self.lm_head(x), targets)

    cross_entropy = staticmethod(cross_entropy)  # an attribute, so that it can be compiled

    def _kernel(self, x: Tensor, masked: bool) -> str:
        """x (B, T, d). masked: a query does not see all that stands before it."""
        if self.attention_kernel:
            return self.attention_kernel
        if masked and has_flash(x.device, x.dtype, self.config.head_dim) and load_varlen():
            return "varlen"
        if masked and x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[1] >= LONG:
            return "apart"
        # on CPUs in bf16 sdpa is faster where it needs neither gradients nor a mask, and half as fast with either
        slow = torch.is_grad_enabled() or masked
        return "blocked" if x.device.type == "cpu" and x.dtype == torch.bfloat16 and slow else "sdpa"

    def num_parameters(self, active: bool = False) -> int:
        """Tied weights count once. active: only the experts that one token passes through."""
        total = sum(p.numel() for p in self.parameters())
        # model/quant.py and quant_cpu.py keep these in buffers; a tied head was counted as the embedding
        counted = self.lm_head if self.config.tie_word_embeddings else None
        packed = (m for m in self.modules() if isinstance(m, Linear) and getattr(m, "weight", None) is None)
        total += sum(m.in_features * m.out_features for m in packed if m is not counted)
        return total - idle_parameters(self.config) if active else total


def initialise(model: CausalLM) -> None:
    """Sets all weights of a new model:

    embeddings (and with them a tied head)       N(0, 1/d): vectors of length 1. At 0.02 the first updates of the blocks
                                                 drown the token itself, and copying from the context is learned late
    untied head, router, q k v, gate, up         N(0, 0.02)
    o_proj, down_proj                            0: every block starts as the identity (arXiv:2203.03466, table 3)
    norms                                        1
    biases                                       0
    """
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        elif name.endswith("bias") or "o_proj" in name or "down_proj" in name:
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=model.config.hidden_size**-0.5 if "embed_tokens" in name else 0.02)


def positions_at_once(numbers: int) -> int:
    """Positions in a chunk, if there are so many numbers at each. Products of fewer than 128 rows would be slow."""
    return max(LOGITS_AT_ONCE // numbers, 128)


def _retie(model: CausalLM, state: dict, prefix: str, *rest) -> None:
    """Files of tied models hold the shared weight once or twice, under either name. If two different ones are there,
    the second would overwrite the first."""
    if model.config.tie_word_embeddings:
        names = (prefix + "model.embed_tokens.weight", prefix + "lm_head.weight")
        for here, there in (names, names[::-1]):
            if here not in state and there in state:
                state[here] = state[there]
        head, embedding = (state.get(name) for name in names[::-1])
        if head is not None and embedding is not None and not equal_weights(head, embedding):
            *_, errors = rest  # load_state_dict raises them
            errors.append("lm_head.weight differs from model.embed_tokens.weight, though tie_word_embeddings is true")


def equal_weights(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, perhaps of different dtypes, hold the same numbers."""
    return a is b or a.shape == b.shape and torch.equal(a, b.to(a.dtype))
