"""The device doctor passes a CPU, and finds what a device gets wrong. Here the device is the CPU too, with a fault that
came after the right results were computed."""

import pytest
import torch

from evaluation import device as doctor
from evaluation.device import CHECKS, Outcome, error, run_checks
from model import attention

CPU, FP32 = torch.device("cpu"), torch.float32


def failed(dtype: torch.dtype = FP32) -> list[str]:
    return [name for name, outcomes in run_checks(CPU, [dtype]) if not outcomes[dtype].passed]


@pytest.fixture
def right():
    """What the CPU computes, before a test breaks something."""
    for kind, changes in (("plain", {}), ("packed", {}), ("pairs", {}), ("packed", doctor.WINDOWS)):
        doctor._on_the_cpu(kind, **changes)
    doctor._on_the_cpu("packed", qk_norm=True)


@pytest.mark.parametrize("dtype", doctor.dtypes_of(CPU), ids=str)
def test_a_cpu_passes(dtype):
    assert not failed(dtype)


def test_documents_that_see_each_other_are_found(right, monkeypatch):
    """The mask lets through all that stands before a token, and forgets windows and documents."""
    build = attention.build_mask
    monkeypatch.setattr("model.transformer.build_mask", lambda p, documents, *a, **k: build(p[:1], None, *a[:2]))
    assert [name.removeprefix("training: ") for name in failed()] == [
        "packed documents",
        "pairs that share a prompt",
        "sliding windows",
        "norms of queries and keys",  # and so are the next two: packed rows
        "activations computed again",
        "no token sees what it must not",
        "generation: sliding windows",  # the text as a whole, with which it is compared
    ]


def test_keys_that_are_not_there_are_found(right, monkeypatch):
    """Generation reads one key too many, behind the end of a row."""
    monkeypatch.setattr("inference.slots.additive", lambda seen, dtype: attention.additive(seen | True, dtype))
    assert failed() == [name for name in CHECKS if name.startswith("generation")]


def test_a_kernel_that_is_missing_does_not_end_the_others(right, monkeypatch):
    def missing(*_):
        raise NotImplementedError("no kernel for this device\nmore about it")

    monkeypatch.setattr("evaluation.device.grouped_linear", missing)
    outcomes = {name: of[FP32] for name, of in run_checks(CPU, [FP32])}
    assert outcomes["experts"] == Outcome(None, 0.002, "no kernel for this device")
    assert [name for name, outcome in outcomes.items() if not outcome.passed] == ["experts"]


def test_the_error_is_that_of_the_worst_tensor():
    """(3, 4) has the norm 5, and (3.3, 4.4) is 0.5 away from it."""
    right = dict(one=torch.tensor([3.0, 4.0]), two=torch.ones(4))
    assert error(dict(one=torch.tensor([3.3, 4.4]), two=torch.ones(4)), right) == pytest.approx(0.1)
    assert not Outcome(error(dict(one=right["one"] * float("nan"), two=torch.ones(4)), right), 0.5).passed
