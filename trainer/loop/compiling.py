"""torch.compile: whether it can be used, whether it saves time, and what is compiled."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import torch

from common.console import UserError
from dataset.batches.loader import FEW_SHAPES, Loader
from dataset.tokens.cache import compiled_cache
from model.packed import keep_tables
from model.transformer import CausalLM
from trainer.stage import StageConfig

# What compiling is worth, by kind of device: FLOP/s of eager code, share of the time that it saves, seconds for each
# shape. Guesses, so the saving has to be clearly more. A CPU's numbers were measured (docs/benchmarks.md), a GPU's were
# not yet.
WORTH = {"cpu": (1e11, 0.25, 30.0), "cuda": (1e14, 0.4, 12.0)}
MARGIN = 2.0


def compile_model(model: CausalLM, config: StageConfig, device: torch.device, loader: Loader, steps: int) -> bool:
    """Compiles each block (all layers share one small graph), and the head with its loss -> whether it did. Then the
    loader makes batches of few shapes, as each is compiled on its own.

    steps  optimiser steps of the run
    """
    if config.compile == "off" or config.compile == "auto" and not pays(model, device, loader, steps):
        return False
    if not can_compile(device.type):
        if config.compile == "auto":
            return False
        raise UserError(
            "--compile on: torch.compile needs a C++ compiler and Python's headers (on Debian g++ and "
            "python3-dev), on GPUs Triton too; install them, or leave it at auto"
        )
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_cache()))
    warnings.filterwarnings("ignore", "TensorFloat32")  # with --dtype float32, which asks for more than its 10 bits
    logging.getLogger("torch._inductor.utils").addFilter(is_about_this_run)
    keep_tables(device)
    torch._dynamo.config.recompile_limit = 64  # a graph for each number of rows, of which there are few
    for block in model.model.layers:
        block.compile(dynamic=False)
    # one graph for any number of trained positions, which differs from step to step in packed rows
    model.token_loss = torch.compile(model.token_loss, dynamic=loader.packing)
    model.cross_entropy = torch.compile(model.cross_entropy, dynamic=loader.packing)
    loader.limit_shapes()
    return True


def is_about_this_run(record: logging.LogRecord) -> bool:
    """Filter of torch's warnings: on cards of fewer than 68 multiprocessors (T4, 3060) each run is told that
    max_autotune will not do there, which is not used."""
    return "max_autotune" not in record.getMessage()


def can_compile(device: str) -> bool:
    """Whether torch.compile has what it needs: a C or C++ compiler and Python's headers, on GPUs Triton too."""
    cpu = device == "cpu"
    if cpu and sys.platform == "win32":  # torch takes Microsoft's there, which is on the PATH of its own command prompt
        return shutil.which(os.environ.get("CXX", "cl")) is not None
    if cpu and sys.platform == "darwin" and not has_openmp():
        return False
    names = ("g++", "clang++") if cpu else ("gcc", "clang", "cc", os.environ.get("CC") or "cc")
    compiler = next(filter(None, map(shutil.which, names)), None)
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file() or compiler is None or not compiles(compiler, "c++" if cpu else "c"):
        return False
    if cpu:
        return True
    from torch.utils._triton import has_triton  # imports all of torch's compiler, which takes seconds

    return has_triton()


def has_openmp() -> bool:
    """Whether torch's compiler finds OpenMP on macOS, whose own clang has none: conda's, Homebrew's, or torch's own."""
    named = filter(None, (os.environ.get("OMP_PREFIX"), os.environ.get("CONDA_PREFIX")))
    places = (*named, "/opt/homebrew/opt/libomp", "/usr/local/opt/libomp", Path(torch.__file__).parent)
    return any(Path(place, "include", "omp.h").is_file() for place in places)


def compiles(compiler: str, language: str) -> bool:
    """Whether it is more than a name: where the compiler proper or the C library's headers are missing, a run that
    nobody asked to be compiled would end with torch's traceback."""
    command, text = [compiler, "-x", language, "-fsyntax-only", "-"], b"#include <stdlib.h>\n"
    try:
        return subprocess.run(command, input=text, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def pays(model: CausalLM, device: torch.device, loader: Loader, steps: int) -> bool:
    """Whether a run of so many steps is long enough to earn back the time that compiling takes."""
    if device.type not in WORTH:
        return False
    rate, share, seconds = WORTH[device.type]
    saved = share * loader.count_positions(steps) * 6 * model.num_parameters(active=True) / rate
    return saved > MARGIN * seconds * min(loader.count_shapes(), FEW_SHAPES)
