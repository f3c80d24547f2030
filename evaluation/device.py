"""Whether a device computes what the CPU does: every path of the model that another device takes, with small random
models. The CPU in fp32 is right, by the tests of this project.

A check returns its error: the largest difference of a tensor, |found - right| / |right| as norms, or for a question of
yes and no 0 or 1. bf16 rounds each number to 8 bits and fp16 to 11, so they have an error of their own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inference.engine import Engine, Request
from inference.sampling import Sampling
from model.config import ModelConfig
from model.fused import fused
from model.moe import grouped_linear
from model.packed import dequantize, mv, quantize
from model.precision import has_bf16, prepare_for_inference
from model.transformer import CausalLM

SHAPE = dict(
    vocab_size=512,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=256,
)
WINDOWS = dict(sliding_window=9, layer_types=("sliding_attention", "full_attention", "sliding_attention"))
LIMITS = {torch.float32: 0.002, torch.float16: 0.02, torch.bfloat16: 0.06}  # a CPU has 0, 0.003 and 0.025
T = 96  # positions in a row


class Outcome(NamedTuple):
    error: float | None  # None: it ended in `message`
    limit: float
    message: str = ""

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.limit  # NaN is not


def dtypes_of(device: torch.device) -> list[torch.dtype]:
    """What --dtype may be there: bf16 also where it is slow, but on NVIDIA's older cards."""
    bf16 = device.type in ("cpu", "mps") or has_bf16(device)
    return [torch.float32, *[torch.bfloat16] * bf16, *[torch.float16] * (device.type != "cpu")]


def rows(kind: str) -> dict[str, Tensor]:
    """Three rows of T: plain, packed documents of 20, 1, 30, 30 and 15 tokens, or pairs: the second and third document
    follow the first one, the fifth the fourth."""
    tokens = torch.randint(512, (3, T), generator=torch.Generator().manual_seed(0))
    given = dict(tokens=tokens, targets=tokens.roll(-1, 1))
    if kind == "plain":
        return given
    lengths = torch.tensor([20, 1, 30, 30, 15])
    documents = torch.arange(1, 6).repeat_interleave(lengths).expand(3, -1).contiguous()
    if kind == "packed":
        return given | dict(documents=documents)
    begins = torch.tensor([0, 20, 20, 0, 30])
    positions = torch.cat([torch.arange(n) + begin for n, begin in zip(lengths.tolist(), begins.tolist())])
    prefixes = torch.tensor([1, 1, 1, 4, 4]).repeat_interleave(lengths)
    more = dict(prefixes=prefixes, positions=positions)
    return given | dict(documents=documents) | {name: t.expand(3, -1).contiguous() for name, t in more.items()}


def random_model(config: ModelConfig, std: float, seed: int = 0) -> CausalLM:
    """The same weights each time, norms around 1. Fresh weights would not do: some start at 0, which makes every block
    the identity, and norms at 1, where a mistake in them does not show."""
    torch.manual_seed(seed)
    model = CausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=std)
    return model


@cache
def build(std: float = 0.08, **changes) -> CausalLM:
    return random_model(ModelConfig(**{**SHAPE, **changes}), std)


def on(device: torch.device, model: CausalLM) -> CausalLM:
    return copy.deepcopy(model).to(device)


def losses_and_gradients(
    model: CausalLM, given: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """{name: losses, or the gradient of a parameter}, on the CPU in fp32."""
    model = on(device, model)
    model.compute_dtype = dtype
    out = model(**{name: tensor.to(device) for name, tensor in given.items()})
    (out.loss.sum() + out.aux_loss.sum()).backward()
    found = dict(losses=out.loss.detach()) | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def error(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert found.keys() == right.keys()
    shares = [(found[name] - tensor).norm() / (tensor.norm() + 1e-12) for name, tensor in right.items()]
    return float(torch.stack(shares).max())  # NaN if one of them is


@cache
def _on_the_cpu(kind: str, **changes) -> dict[str, Tensor]:
    return losses_and_gradients(build(**changes), rows(kind), torch.device("cpu"), torch.float32)


def trained(kind: str, **changes) -> Callable[[torch.device, torch.dtype], float]:
    """The check of losses and gradients for this kind of rows, and this change of the model."""

    def check(device: torch.device, dtype: torch.dtype) -> float:
        found = losses_and_gradients(build(**changes), rows(kind), device, dtype)
        return error(found, _on_the_cpu(kind, **changes))

    return check


def recomputed(device: torch.device, dtype: torch.dtype) -> float:
    model = copy.deepcopy(build())
    model.recompute = True
    return error(losses_and_gradients(model, rows("packed"), device, dtype), _on_the_cpu("packed"))


@torch.no_grad()
def leaks(device: torch.device, dtype: torch.dtype) -> float:
    """Another token at place 30 changes only what follows in its document, 30 to 50 of its row: not what stands before
    it, and no other document."""
    model, given = on(device, build()), {name: t.to(device) for name, t in rows("packed").items()}
    model.compute_dtype = dtype
    logits = lambda tokens: model(tokens, documents=given["documents"]).logits
    before, changed = logits(given["tokens"]), given["tokens"].clone()
    changed[0, 30] = (changed[0, 30] + 1) % 512
    moved = (logits(changed) != before).any(-1).cpu()
    may = torch.zeros_like(moved)
    may[0, 30:51] = True
    return float(not moved[0, 30] or bool((moved & ~may).any()))


def experts(device: torch.device, dtype: torch.dtype) -> float:
    """Tokens in groups of 70, 0, 130 and 56, each with its own weight, against one product for each."""
    generator = torch.Generator().manual_seed(0)
    x, weight, upstream = (torch.randn(shape, generator=generator) for shape in ((256, 64), (4, 96, 64), (256, 96)))
    bounds = [(0, 70), (70, 70), (70, 200), (200, 256)]
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    right = torch.cat([leaves[0][a:b] @ w.T for (a, b), w in zip(bounds, leaves[1])])
    right.backward(upstream)
    mine = [t.clone().to(device).requires_grad_() for t in (x, weight)]
    ends = torch.tensor([b for _, b in bounds], dtype=torch.int32, device=device)
    y = grouped_linear(mine[0].to(dtype), mine[1].to(dtype), ends)
    y.backward(upstream.to(device, dtype))
    named = lambda out, tensors: dict(zip("yxw", (t.detach().float().cpu() for t in (out, *(t.grad for t in tensors)))))
    return error(named(y, mine), named(right, leaves))


def packed_weights(bits: int) -> Callable[[torch.device, torch.dtype], float]:
    """Weights of 4 or 8 bits, packed, unpacked and multiplied there; on CUDA by compiled code, as in large models."""

    def check(device: torch.device, dtype: torch.dtype) -> float:
        generator = torch.Generator().manual_seed(0)
        weight, x = torch.randn(96, 128, generator=generator), torch.randn(128, generator=generator)
        unpacked = dequantize(quantize(weight, bits), weight.shape, torch.float32)
        right = dict(weight=unpacked, compiled=unpacked, product=unpacked @ x)
        packed, how = quantize(weight.to(device), bits), fused if device.type == "cuda" else lambda f: f
        found = dict(
            weight=dequantize(packed, weight.shape, dtype),
            compiled=dequantize(packed, weight.shape, dtype, how),
            product=how(mv)(packed, x.to(device, dtype)),
        )
        return error({name: tensor.float().cpu() for name, tensor in found.items()}, right)

    return check


def answers(changes: dict, most: int = 24) -> Callable[[torch.device, torch.dtype], float]:
    """Six prompts go through four rows, of which two are long. The log-probabilities of what is answered, against those
    that the CPU finds in the whole text."""

    def check(device: torch.device, dtype: torch.dtype) -> float:
        exact = build(std=0.1, **changes)
        prompts = [[n * 7 % 512 for n in range(300)], [5, 6, 7], [9], [8, 3] * 130, [40, 41, 42, 43], [100] * 9]
        engine = Engine(prepare_for_inference(on(device, exact), dtype), rows=4, capacity=512)
        greedy = Sampling(temperature=0)
        sequences = [engine.submit(Request(prompt, greedy, most, logprobs=0)) for prompt in prompts]
        while engine.busy:
            engine.step()
        found, right = [], []
        for sequence in sequences:
            if sequence.error is not None:
                raise sequence.error
            text = torch.tensor([[*sequence.request.prompt, *sequence.tokens]])
            with torch.no_grad():
                log_p = exact(text).logits[0, -1 - most : -1].log_softmax(-1)
            right += log_p.gather(-1, text[0, -most:, None]).flatten().tolist()
            found += [one.value for one in sequence.logprobs]
        if engine.graphs is not None and not engine.graphs.works:
            raise RuntimeError("a CUDA graph could not be captured")
        return error(dict(logprobs=torch.tensor(found)), dict(logprobs=torch.tensor(right)))

    return check


CHECKS: dict[str, Callable[[torch.device, torch.dtype], float]] = {
    "training: plain rows": trained("plain"),
    "training: packed documents": trained("packed"),
    "training: pairs that share a prompt": trained("pairs"),
    "training: sliding windows": trained("packed", **WINDOWS),
    "training: norms of queries and keys": trained("packed", qk_norm=True),
    "training: activations computed again": recomputed,
    "no token sees what it must not": leaks,
    "experts": experts,
    "weights of 8 bits": packed_weights(8),
    "weights of 4 bits": packed_weights(4),
    "generation": answers({}),
    "generation: sliding windows": answers(WINDOWS),
    "generation: a key for each query": answers(dict(num_key_value_heads=4)),
}


def limit(check: str, dtype: torch.dtype) -> float:
    return 0.0 if CHECKS[check] is leaks else LIMITS[dtype]


def run_checks(device: torch.device, dtypes: list[torch.dtype]) -> Iterator[tuple[str, dict[torch.dtype, Outcome]]]:
    """One check after the other: (its name, its outcome in each precision)."""
    for name, check in CHECKS.items():
        outcomes = {}
        for dtype in dtypes:
            most = limit(name, dtype)
            try:
                found = check(device, dtype)
                finite = math.isfinite(found)
                outcomes[dtype] = Outcome(found, most) if finite else Outcome(None, most, "NaN or infinity")
            except Exception as failure:  # whatever a driver or a kernel says: the next check may pass
                message = str(failure).strip() or type(failure).__name__
                outcomes[dtype] = Outcome(None, most, message.splitlines()[0])
        yield name, outcomes
