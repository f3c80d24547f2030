"""torch.compile: whether it can be used, whether it saves time, and what is compiled."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from common.console import UserError
from model.transformer import CausalLM
from trainer.stage import StageConfig


def compile_model(model: CausalLM, config: StageConfig, device: torch.device, steps: int, packing: bool) -> bool:
    """Compiles each block (all layers share one small graph), and the head with its loss -> whether it did.

    steps    optimiser steps of the run
    packing  rows are packed: then each step has a different number of trained positions
    """
    mode = config.compile
    if mode == "off" or mode == "auto" and not (pays(model, config, device, steps) and can_compile(device.type)):
        return False
    if not can_compile(device.type):
        raise UserError(
            "--compile on: torch.compile needs a C++ compiler and Python's headers (on Debian g++ and "
            "python3-dev), on GPUs Triton too; install them, or leave it at auto"
        )
    torch._dynamo.config.recompile_limit = 64  # a graph for each number of rows, of which there are few
    for block in model.model.layers:
        block.compile(dynamic=False)
    model.token_loss = torch.compile(model.token_loss, dynamic=packing)  # one graph for any number of positions
    return True


def can_compile(device: str) -> bool:
    """Whether torch.compile has what it needs: a C or C++ compiler and Python's headers, on GPUs Triton too."""
    compilers = ("g++", "clang++") if device == "cpu" else ("gcc", "clang", "cc", os.environ.get("CC") or "cc")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file() or not any(map(shutil.which, compilers)):
        return False
    if device == "cpu":
        return True
    from torch.utils._triton import has_triton  # imports all of torch's compiler, which takes seconds

    return has_triton()


def pays(model: CausalLM, config: StageConfig, device: torch.device, steps: int) -> bool:
    """Whether a run of this many steps is long enough to earn back the time that compiling takes."""
    if device.type != "cpu":
        return device.type == "cuda" and steps >= 200
    positions = steps * config.batch_size * config.accumulation_steps * config.max_seq_len
    seconds = positions * 6 * model.num_parameters(active=True) / 1e11  # at 100 GFLOP/s
    return seconds > 900  # it saves 25 to 33 %, and takes half a minute for each number of rows
