"""NVIDIA cards that this build of torch cannot use: why, and what to install."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys

import torch

from common.console import note

# with "+cu130", since pip takes "2.13.0+cpu" for 2.13.0 and would leave it
INDEX = "pip install torch=={0}+{1} --index-url https://download.pytorch.org/whl/{1}"
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def why_no_card() -> str:
    """Why torch finds no NVIDIA card, for a user who asks for one; "": nothing is known."""
    if reason := card_out_of_reach():
        return reason
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda and hidden is not None:
        return f"no card is visible with CUDA_VISIBLE_DEVICES={hidden}"
    if torch.version.cuda:
        return "torch finds no card; if there is one, see with nvidia-smi whether its driver runs"
    return ""


def card_out_of_reach() -> str:
    """Why this build of torch cannot use the cards that the driver sees, and the way out; "": it sees none."""
    cards, newest = _driver()
    if not cards:
        return ""
    if not torch.version.cuda:
        plain = torch.__version__.partition("+")[0]
        way = INDEX.format(plain, "cu130")
        return f"torch {torch.__version__} is built without CUDA and cannot use the NVIDIA card; {way}"
    return (
        f"torch for CUDA {torch.version.cuda} cannot use the NVIDIA card, whose driver knows CUDA up to "
        f"{newest // 1000}.{newest % 1000 // 10}; update the driver, or install a build of torch for that version"
    )


def missing_code(device: torch.device) -> str:
    """Why this build of torch has no kernels for the card, and the way out; "": it has them."""
    if device.type != "cuda" or torch.version.hip:
        return ""
    built = [re.match(r"(sm|compute)_(\d+)(\d)", name) for name in torch.cuda.get_arch_list()]
    built = [(match[1], (int(match[2]), int(match[3]))) for match in built if match]
    if not built:
        return ""
    found = torch.cuda.get_device_capability(device)
    # machine code runs on later cards of the same generation, compute_ is translated for all later ones
    if any(at <= found and (kind == "compute" or at[0] == found[0]) for kind, at in built):
        return ""
    major, minor = found
    old = found < min(at for _, at in built)  # 2.15 has no build for CUDA 12.6, so the version is fixed
    way = INDEX.format("2.13.0", "cu126") + " has it for cards from 5.0 to 9.0" if old else "install a newer build"
    return f"torch {torch.__version__} has no code for cards of capability {major}.{minor}; {way}"


@functools.cache
def note_once(line: str) -> None:
    note(line)


def _driver() -> tuple[int, int]:
    """(cards that NVIDIA's driver sees, newest CUDA it knows, 12040 for 12.4); (0, 0) without a driver."""
    try:
        driver, count, version = ctypes.CDLL(DRIVER), ctypes.c_int(0), ctypes.c_int(0)
        seen = not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(count))
        driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0, 0
    return (count.value, version.value) if seen else (0, 0)
