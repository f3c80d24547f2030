"""Comparing weights and gradients by parameter name."""

import torch


def state_of(path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file."""
    return torch.load(path, weights_only=True)["model"]


def same(a: dict, b: dict) -> bool:
    """The same names, and the same bits under each."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_gradients(found: dict, expected: dict, tolerance: float):
    """The largest error of each gradient, as a share of its largest element."""
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-12)
        assert error < tolerance, f"{name}: {error}"
