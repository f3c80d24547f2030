"""Functions of many operations, compiled to one kernel while a GPU generates.

Unpacking a weight of 4 bits is eight operations, which write and read some twenty bytes for each number: most of the
time of a token. Compiled it reads half a byte and writes two, or nothing as a part of the product. Compiling takes
seconds, so it is for large models.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from common.console import note
from model.layers import generating

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as always so far; Triton 3.9 warns that it will be 0
LARGE = 200_000_000  # parameters of a model from which it is worth the wait


def may_compile(x: Tensor) -> bool:
    """Not on Apple's GPUs: nobody has seen what torch's young compiler for them makes of this."""
    return x.is_cuda and generating()


class Fused:
    """Calls a function compiled, for any shapes, or as it is where it cannot be compiled (Windows has no Triton)."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.compiled = function, torch.compile(function, dynamic=True)

    def __call__(self, *given):
        if self.compiled is not self.function:
            try:
                return self.compiled(*given)
            except Exception as error:  # whatever the compiler says; a mistake of ours is raised again below
                self.compiled = self.function
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
                note(f"warning: packed weights are unpacked without the compiler, so generation is slower: {why}")
        return self.function(*given)


fused = cache(Fused)
