"""What a model of a given architecture costs: parameters, floating-point operations, bytes. Nothing is built for it.

>>> count_parameters(ModelConfig.preset("small"))
25829888

Letters: d hidden size, L layers, H query heads, K key/value heads, D head size, I width of the feed-forward, E experts,
V vocabulary, T positions in a row.
"""

from __future__ import annotations

from model.config import ModelConfig

# Logits in memory at once: 256 MiB in fp32, and about 1 GiB with what the backward pass makes of them. Heads with up to
# twice as many are computed in one piece, which saves a product: 32 rows of 512 with 6,400 words are 2^26.6.
LOGITS_AT_ONCE = 1 << 26


def _attention_weights(config: ModelConfig) -> int:
    """Numbers in the four projections of one layer: q and o are (H D, d), k and v (K D, d)."""
    heads = config.num_attention_heads + config.num_key_value_heads
    return 2 * config.hidden_size * heads * config.head_dim


def _active_width(config: ModelConfig) -> int:
    """Hidden units of the feed-forward that one token passes through, in one layer."""
    if not config.num_experts:
        return config.intermediate_size
    width = config.moe_intermediate_size * (config.num_experts_per_tok + config.num_shared_experts)
    return width + (config.shared_expert_intermediate_size or 0)


def idle_parameters(config: ModelConfig) -> int:
    """Parameters of the experts that a token is not sent to: E - k in each layer, of three matrices (d, I)."""
    idle = config.num_experts - config.num_experts_per_tok if config.num_experts else 0
    return config.num_hidden_layers * idle * 3 * config.hidden_size * config.moe_intermediate_size


def count_parameters(config: ModelConfig, active: bool = False) -> int:
    """All parameters, tied weights once. active: without the experts that a token does not pass through."""
    d, D = config.hidden_size, config.head_dim
    attention = _attention_weights(config)
    if config.attention_bias:  # of q, k and v
        attention += (config.num_attention_heads + 2 * config.num_key_value_heads) * D
    if config.qk_norm:
        attention += 2 * D
    if config.num_experts:
        experts = config.num_experts + config.num_shared_experts
        feed_forward = 3 * d * config.moe_intermediate_size * experts + d * config.num_experts  # and the router
        if config.shared_expert_intermediate_size:
            feed_forward += 3 * d * config.shared_expert_intermediate_size + d  # and its gate
    else:
        feed_forward = 3 * d * config.intermediate_size
    embeddings = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    norms = (4 if config.post_norms else 2) * d  # of a layer
    total = embeddings + config.num_hidden_layers * (attention + feed_forward + norms) + d  # and the last norm
    return total - idle_parameters(config) if active else total


def step_flops(config: ModelConfig, positions: int, length: int, heads: int | None = None, trained: float = 1) -> float:
    """Operations of forward and backward over `positions` in rows of `length`.

    heads: how many positions the head is applied to; None: all. trained: share of the weights that have a gradient.

    A weight of a matrix costs 2 operations per position forward (multiply, add), 2 for the gradient of its input, and 2
    for its own gradient if it is trained: the 6 N of arXiv:2001.08361, section 2.1. Attention multiplies every query
    with the keys it sees and the weights with the values: 4 H D per pair of query and key forward, three times that in
    all. A causal row of T has T^2/2 such pairs; with a window of W < T it has W^2/2 + (T - W) W.
    """
    d, L = config.hidden_size, config.num_hidden_layers
    layer = _attention_weights(config) + 3 * d * _active_width(config) + d * config.num_experts  # the router's weights
    products = positions * L * layer + (positions if heads is None else heads) * config.vocab_size * d
    pairs = 0.0  # of query and key per position, doubled, over all layers
    for window in config.windows:
        seen = length if window is None else min(window, length)
        pairs += seen * (2 * length - seen) / length
    return (4 + 2 * trained) * products + positions * 6 * config.num_attention_heads * config.head_dim * pairs


def state_bytes(
    trained: int, frozen: int, moments: int, zero_stage: int = 0, processes: int = 1, offloaded: bool = False
) -> int:
    """Of `trained` weights with their gradients and the optimiser's moments, all fp32, and `frozen` bytes of others,
    which have neither: see `frozen_bytes`.

    DeepSpeed's ZeRO divides the moments and a copy of the weights by the number of processes (stage 1), also the
    gradients (2), also the weights (3). offloaded: moments and copy are in main memory.
    """
    share = lambda size, stage: size // (processes if zero_stage >= stage else 1)
    kept = share(4 * trained + frozen, 3) + share(4 * trained, 2)
    if offloaded:
        return kept
    return kept + share(4 * trained * (moments + (zero_stage > 0)), 1)


def frozen_bytes(config: ModelConfig, width: int, bits: int | None = None) -> int:
    """Of a model that is not trained, its weights in `width` bytes each, or the matrices of its blocks in 4 or 8 bits
    (model/quant.py). Then embedding, head, routers and routed experts keep their width. Norms and routers are fp32.

    4 bits: 1/2 byte a weight, 1 for 64 weights, 4 for 64*256, and 4 a matrix. 8 bits: 1 byte a weight and 4 a row.
    """
    d, L, matrices = config.hidden_size, config.num_hidden_layers, _layer_matrices(config)
    norms = d + L * ((4 if config.post_norms else 2) * d + (2 * config.head_dim if config.qk_norm else 0))
    routers = L * d * (config.num_experts + bool(config.shared_expert_intermediate_size)) if config.num_experts else 0
    packed = L * sum(rows * columns for rows, columns in matrices)
    total = (count_parameters(config) - packed - norms - routers) * width + 4 * (norms + routers)
    if bits is None:
        return total + packed * width
    for rows, columns in matrices:
        blocks = -(-rows * columns // 64)
        four = -(-rows * columns // 2) + blocks + 4 * -(-blocks // 256) + 4
        total += L * (four if bits == 4 else rows * columns + 4 * rows)
    return total


def batch_bytes(
    config: ModelConfig, rows: int, length: int, width: int, checkpointed: bool = False, frozen_head: bool = False
) -> int:
    """What `rows` rows of `length` keep for the backward pass, an estimate. width: bytes of a number.

    Per position and layer: eight vectors of the hidden size (norms, queries, attention, residuals), keys and values,
    and three vectors of the feed-forward (gate, up, their product). Then the logits and their gradient; of more than
    2 x LOGITS_AT_ONCE logits, or in front of a frozen head, a chunk of them and two of its gradients (model/head.py).
    Uncompiled code on a GPU keeps up to 30 % more, with experts up to 50 % (docs/gpu.md).
    checkpointed: of each layer only the input; and the logits, or after these the layer that is computed again, with
    its gradients, whichever is more.
    """
    d, L, bytes_of_one = config.hidden_size, config.num_hidden_layers, rows * length * width
    layer = bytes_of_one * (8 * d + 2 * config.num_key_value_heads * config.head_dim + 3 * _active_width(config))
    logits = rows * length * config.vocab_size
    chunk = -(-logits // -(-logits // LOGITS_AT_ONCE))  # all of about one size
    of_logits = 3 * width * chunk if frozen_head or logits > 2 * LOGITS_AT_ONCE else 2 * width * logits
    return L * bytes_of_one * d + max(of_logits, 2 * layer) if checkpointed else L * layer + of_logits


def cache_bytes(config: ModelConfig, rows: int, length: int, width: int) -> int:
    """Keys and values of `rows` texts of `length` positions. width: bytes of a number."""
    return 2 * config.num_hidden_layers * rows * length * config.num_key_value_heads * config.head_dim * width


def training_bytes(
    config: ModelConfig, length: int, rows: int = 1, *, bits: int = 32, lora_rank: int = 0, width: int = 2
) -> int:
    """What training takes at its peak, an estimate: on one device, by AdamW, with activation checkpointing.

    bits       of the weights: 32, all of them trained; fewer, frozen beside an adapter: 16, or those of the blocks'
               matrices packed into 8 or 4 (model/quant.py), and the others in 16
    lora_rank  of the adapter beside all matrices of the blocks; 0: all weights are trained
    width      bytes of a number that is computed with

    A weight that is kept in another format than it is used in is converted for as long as its block is computed. Where
    head and embedding are one matrix, the gradients of both exist before they are added.
    """
    d, per_layer = config.hidden_size, _layer_matrices(config)
    converted = 0 if bits == 8 * width else width * sum(out * inside for out, inside in per_layer)
    rows_bytes = batch_bytes(config, rows, length, width, checkpointed=True, frozen_head=lora_rank > 0)
    if lora_rank:
        adapter = lora_rank * config.num_hidden_layers * sum(out + inside for out, inside in per_layer)
        weights = state_bytes(adapter, frozen_bytes(config, width, bits if bits < 16 else None), moments=2)
    else:
        weights = state_bytes(count_parameters(config), 0, moments=2)
        converted += width * config.vocab_size * d if width < 4 else 0
        rows_bytes = max(rows_bytes, 4 * config.vocab_size * d if config.tie_word_embeddings else 0)
    return weights + converted + rows_bytes


def _layer_matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """(out, in) of the matrices of one layer; routed experts are not among them."""
    d, widths = config.hidden_size, [config.intermediate_size]
    heads, groups = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    if config.num_experts:
        widths = [config.moe_intermediate_size] * config.num_shared_experts
        widths += [config.shared_expert_intermediate_size] if config.shared_expert_intermediate_size else []
    feed_forward = [shape for I in widths for shape in ((I, d), (I, d), (d, I))]
    return [(heads, d), (groups, d), (groups, d), (d, heads), *feed_forward]
