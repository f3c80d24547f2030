"""torch's `varlen_attn` written out, for machines without its kernel."""

import torch


def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
    """q (N, H, D), k and v (M, K, D). In each segment query i stands at key i + keys - queries, and sees the keys up to
    there, no more than window_size[0] of them before it (-1: all)."""
    assert window_size[1] == 0
    k, v = (_Unused.apply(t, int(cu_seq_k[-1])) for t in (k, v))
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    bounds = zip(*(cu.tolist() for cu in (cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:])))
    for a, b, c, d in bounds:
        assert 0 <= b - a <= max_q and 0 <= d - c <= max_k
        if b == a:
            continue
        keys, values = (t[c:d].repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))  # (H, S, D)
        scores = q[a:b].transpose(0, 1) @ keys.mT / q.shape[-1] ** 0.5  # (H, T, S)
        before = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)  # how far back a key stands
        seen = (before >= 0) & (before <= window_size[0]) if window_size[0] >= 0 else before >= 0
        out[a:b] = (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values).transpose(0, 1)
    return out


class _Unused(torch.autograd.Function):
    """The kernel leaves the gradient of keys outside all segments as the memory was: here NaN."""

    @staticmethod
    def forward(ctx, keys, used):
        ctx.used = used
        return keys.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.used :] = float("nan")
        return grad, None


def flash_forward(q, k, v, queries, keys, max_q, max_k, **options):
    """`torch.ops.aten._flash_attention_forward`, for generation. With `seqused_k`, q (N, G, D), k and v (M, 1, D): the
    query of segment n stands at the last of the first seqused_k[n] keys there. Then no number is read on the host, as a
    graph demands."""
    used, near = options.pop("seqused_k"), options.pop("window_size_left", -1)
    later = dict(window_size_right=0, is_causal=False) if near >= 0 else dict(is_causal=True)
    assert options == dict(dropout_p=0.0, return_debug_mask=False) | later, "no query sees a later key"
    if used is None:
        return (varlen_attn(q, k, v, queries, keys, max_q, max_k, window_size=(near, 0)),)
    assert len(used) == len(q) == len(keys) - 1 and max_q == 1
    assert used.dtype == keys.dtype == queries.dtype == torch.int32 and used.is_contiguous()
    column = torch.arange(max_k)
    before = used[:, None] - 1 - column  # (N, max_k): how far back a key stands
    seen = (before >= 0) & (before <= near) if near >= 0 else before >= 0
    place = keys[:-1, None] + column
    k, v = (torch.where(seen[..., None], t[place, 0], 0) for t in (k, v))  # what is not seen may be NaN
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen[:, None], float("-inf"))
    return (scores.softmax(-1) @ v,)
