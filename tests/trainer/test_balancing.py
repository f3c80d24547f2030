"""How the balancing loss of a mixture of experts enters each objective: a row counts as much as the units in it do.

The stages' accumulation tests compare one split with another. A balancing loss that is left out, or weighted by
something else that splits as well, passes them.
"""

from dataclasses import replace

import pytest
import torch

from dataset.batches.loader import Batch
from dataset.batches.preference import PairBatch
from model.transformer import Output
from trainer.losses.next_token import NextToken, Weighted
from trainer.losses.preference import Preference

N = -100  # no target
TARGETS = torch.tensor([[N, 5, 5, 5, N, N], [N, N, N, 5, N, N]])


def model(tokens, targets, **_):
    """A loss of 1 a target, a balancing loss of 10 for the first row and 100 for the second."""
    return Output(logits=None, loss=(targets != N).float(), aux_loss=torch.tensor([10.0, 100.0]))


def batch(kind=Batch, targets=TARGETS, **more):
    zeros = torch.zeros_like(targets)
    documents = more.pop("documents", zeros)
    return kind(zeros, targets, documents, zeros, None, int((targets != N).sum()), (0, 1, 2), **more)


def test_of_tokens():
    loss, metrics = NextToken()(model, batch())
    assert metrics["loss"] == 4 and loss == 4 + 3 * 10 + 1 * 100


def test_of_weights():
    weight = torch.tensor([[0, 1.0, 1, 0.5, 0, 0], [0, 0, 0, 9, 0, 0]])
    loss, metrics = Weighted()(model, batch(extras={"weight": weight}))
    assert metrics["loss"] == 11.5 and loss == 11.5 + 2.5 * 10 + 9 * 100


def test_of_pairs():
    """Two pairs in the first row and one in the second. Each answer has two tokens, the first without a target."""
    documents = torch.tensor([[1, 2, 2, 3, 3, 4, 5, 5, 6, 6], [1, 2, 2, 3, 3, 0, 0, 0, 0, 0]])
    answers = torch.tensor([[0, 1, 1, 2, 2, 0, 3, 3, 4, 4], [0, 5, 5, 6, 6, 0, 0, 0, 0, 0]])
    targets = torch.tensor([[N, N, 5, N, 5, N, N, 5, N, 5], [N, N, 5, N, 5, N, N, N, N, N]])
    pairs = batch(PairBatch, targets, documents=documents, prefixes=documents, answers=answers, reference=None)
    loss, metrics = Preference("simpo", beta=2.0, label_smoothing=0.0, simpo_gamma=0.5)(model, pairs)
    assert loss - metrics["loss"] == pytest.approx(2 * 10 + 1 * 100)
    # SimPO compares means: log-probability -1 a token, times beta, of three pairs
    assert metrics["reward_chosen"] == metrics["reward_rejected"] == 3 * 2.0 * -1
    # log p_ref(y) - log p(y) = -3 - -1 for both answers: the mean over the answers, summed over three pairs
    pairs = replace(pairs, reference=torch.full((3, 2), -3.0))
    _, metrics = Preference("sigmoid", label_smoothing=0.0)(model, pairs)
    assert metrics["kl"] == 3 * -2
