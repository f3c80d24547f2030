"""A CUDA graph for the CPU: it records the operations of a function with the very tensors that they read and write, and
does them again. Python does not run again, so a number that Python has put in stays as it was when it was recorded."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inference.graphs import Step


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number is read, for which a GPU would wait"
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                if (
                    isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in given
                ):  # neither view nor in place
                    old.copy_(new)


def record(function: Callable[[], Step]) -> tuple[Callable[[], None], Step]:
    """`inference.graphs.CaptureOnCUDA` for the CPU. The results are wiped: only a replay computes them."""
    function()
    with Tape() as tape:
        found = function()
    for part in filter(torch.is_tensor, tree_leaves(found)):
        part.fill_(float("nan") if part.is_floating_point() else 0)
    return tape.replay, found
