"""Devices and precisions, for training and for generation: which to take, and what frozen weights are kept in."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from common.console import UserError
from model.cards import card_out_of_reach, missing_code, note_once, why_no_card
from model.fused import LARGE
from model.layers import FeedForward, Linear, RMSNorm
from model.moe import Experts
from model.quant import QuantLinear
from model.transformer import Attention, CausalLM


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """auto: the accelerator if there is one, else the CPU. local_rank: which of several accelerators.

    Apple's (mps) is only taken by name: that a step which is not finite leaves the weights alone is untested there.
    """
    if name == "npu":
        try:
            importlib.import_module("torch_npu")  # registers the device; untested here
        except ImportError:
            raise UserError("--device npu: needs torch_npu, which is not installed; use --device auto") from None
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    asked, found = name, accelerator.type if accelerator else "cpu"
    if name == "auto":
        name = found if found != "mps" else "cpu"
        if not accelerator and (problem := card_out_of_reach()):
            note_once(f"computing on the CPU: {problem}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use auto, cpu, cuda, cuda:1, mps or npu") from None
    if device.type not in ("cpu", found):
        reason = why_no_card() if device.type == "cuda" and not accelerator else ""
        reason = reason or "this machine or this build of torch has none"
        raise UserError(f"--device {name}: {reason}; use --device {found}")
    if device.type != "cpu" and device.index is None and device.type != "mps":
        device = torch.device(device.type, local_rank)
    if device.index and device.index >= (count := torch.accelerator.device_count()):
        if count == 1 and ":" not in asked:
            raise UserError(
                f"LOCAL_RANK={local_rank}, but this process sees one card: a launcher that shows each process a card "
                "of its own (CUDA_VISIBLE_DEVICES) has to set LOCAL_RANK=0; else start one process for each card"
            )
        raise UserError(
            f"--device {device}: this machine has {count}, counted from 0; of several processes each needs its own"
        )
    if problem := missing_code(device):
        if asked != "auto":
            raise UserError(f"--device {asked}: {problem}; or use --device cpu")
        note_once(f"computing on the CPU: {problem}")
        device = torch.device("cpu")
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether products are faster in bf16 than in fp32."""
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported tells it of the current one
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # An AMD adds up twice as many products in bf16 (AVX512-BF16). An Intel does not: what is faster there is AMX,
        # which some clouds hide. Then a step of `nano` takes 1.4 times as long as in fp32.
        amx, avx512_bf16 = (
            getattr(torch.cpu, check, bool)() for check in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        )
        return amx or avx512_bf16 and cpu_facts().get("cpu_name", "AMD").startswith("AMD")
    return device.type == "npu"


def cpu_facts() -> Mapping[str, Any]:
    """What torch knows of the processor: {"cpu_name": "AMD EPYC 9654", "avx512_f": True, ...}; older torch, nothing."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """name: auto, float32, bfloat16 or float16 -> (compute dtype, why it is not the one asked for, or "")."""
    best = torch.bfloat16 if has_bf16(device) else torch.float16 if device.type == "cuda" else torch.float32
    if name == "auto":
        return best, ""
    wanted = getattr(torch, name)
    if wanted == torch.float16 and device.type == "cpu":
        return best, f"--dtype float16 is for GPUs; computing in {str(best).removeprefix('torch.')} on this CPU"
    if wanted == torch.bfloat16 and not has_bf16(device) and device.type == "cuda":
        return best, f"--dtype bfloat16: this GPU has none; computing in {str(best).removeprefix('torch.')}"
    return wanted, ""


def prepare_for_inference(model: CausalLM, dtype: torch.dtype) -> CausalLM:
    """The model, frozen and in evaluation mode, computing in `dtype` as in training: norms and routing stay in fp32.
    On GPUs the weights of norms are rounded like all others: then a norm of a token is one kernel instead of three."""
    model.requires_grad_(False)
    lower_frozen(model, dtype)
    join_projections(model)
    large = model.num_parameters() >= LARGE
    by_vector = dtype == torch.bfloat16 and has_bf16(torch.device("cpu"))
    for module in model.modules():
        if isinstance(module, Linear):
            module.by_vector = by_vector
        if isinstance(module, QuantLinear):
            module.compiles = large
        if isinstance(module, RMSNorm):
            module.twice = module.weight.repeat(2)
            module.rounded = module.weight.to(dtype) if dtype.itemsize < 4 else None
    model.compute_dtype = dtype
    return model.eval()


def join_projections(model: CausalLM) -> None:
    """Makes one layer of those that read the same input: q, k and v; gate and up. In place, for frozen weights.

    The results are the same. A token that is generated alone takes as long for starting operations as for computing, so
    one product is faster than three. Layers with adapters or in few bits stay as they are. `state_dict` goes on naming
    the single layers.
    """
    together = {
        Attention: ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
        FeedForward: ("gate_up_proj", ("gate_proj", "up_proj")),
    }
    for module in list(model.modules()):
        joined, names = together.get(type(module), ("", ()))
        parts = [part for name in names if type(part := getattr(module, name, None)) is Linear]
        if parts and len(parts) == len(names):
            for name in names:
                delattr(module, name)
            setattr(module, joined, _join(parts))
            widths = {name: part.out_features for name, part in zip(names, parts)}
            module.register_state_dict_post_hook(partial(_split, joined=joined, widths=widths))


def _join(parts: list[Linear]) -> Linear:
    """parts: weights (N_i, K) -> one layer with the weight (sum of N_i, K)"""
    with torch.device("meta"):
        joined = Linear(parts[0].in_features, sum(part.out_features for part in parts), bias=False)
    joined.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if parts[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    return joined.eval()


def _split(module: nn.Module, state: dict, prefix: str, metadata: dict, *, joined: str, widths: dict[str, int]) -> None:
    """Of the state of a joined layer: the tensors of the single ones. widths: {name: N_i}"""
    for kind in ("weight", "bias"):
        if (tensor := state.pop(f"{prefix}{joined}.{kind}", None)) is not None:
            parts = tensor.split(list(widths.values()))
            state.update({f"{prefix}{name}.{kind}": part for name, part in zip(widths, parts)})


def lower_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keeps frozen weights in the dtype they are used in: half the memory, and no cast at every step.

    Norms, routers and RoPE's frequencies are used in fp32 and keep it, so the results are the same to the last bit.
    """
    for module in model.modules():
        if isinstance(module, (Linear, nn.Embedding, Experts)):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def fast_fp32_training() -> bool:
    """Sends fp32 products to oneDNN where that is faster than torch's choice, MKL -> whether it does.

    MKL has no AVX-512 kernels for AMD's processors. On a Zen 5, oneDNN's take less than half the time. A Zen 4 computes
    AVX-512 in halves; it was not measured and stays as it is. torch has no setting that says so; it has one that
    permits bf16 inside fp32 products. That sends them to oneDNN, which rounds nothing on a CPU without AMX (a test).
    Not for generation: a product of one row takes longer to start.
    """
    cpu = cpu_facts()
    zen5 = cpu.get("cpu_name", "").startswith("AMD") and cpu.get("avx512_vp2intersect") and not cpu.get("amx_tile")
    products = getattr(torch.backends.mkldnn, "matmul", None)  # newer torch has it
    if not zen5 or products is None:
        return False
    products.fp32_precision = "bf16"
    return True


def keep_freed_memory() -> None:
    """Keeps freed memory in this process instead of returning it to the system.

    By default glibc returns what is free at the end of its heap. Each training step then gets its activations as new
    pages, which the kernel has to find and clear: 30,000 to 50,000 page faults per step with 26M parameters, 5 to 10 %
    of the time. Blocks of more than 32 MiB are still returned: they are aligned, and of aligned blocks glibc 2.36 can
    hold up to eight copies in its heap before it uses one again.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the most that glibc would choose
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
