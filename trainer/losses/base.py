"""What is minimised. An objective sums over its units; the engine counts the units of a whole optimiser step first and
divides once, so that any split into micro-batches and ranks gives the same gradient."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from dataset.batches.loader import Batch


class Objective(Protocol):
    per_token: bool  # `loss` is the negative log-likelihood of the units, which are tokens: bits per byte can be told

    def count(self, batch: Batch) -> float:
        """Units the loss is summed over (trained tokens, weights, pairs), from the loader's numbers alone."""

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What is differentiated, and metrics (`loss` among them), all summed over those units."""


class NextToken:
    """Cross-entropy of every trained token: pretraining and SFT."""

    per_token = True

    def count(self, batch):
        return batch.trained_tokens

    def __call__(self, model, batch):
        out = model(batch.tokens, **batch.context())
        loss = out.loss.sum()
        units = (batch.targets != -100).sum(1)  # (B,): the balancing loss of a row counts as much as the row does
        return loss + (out.aux_loss * units).sum(), {"loss": loss.detach()}


class Weighted:
    """Cross-entropy in which each target has a weight (batch.extras["weight"], 0 where nothing is trained on), divided
    by the weights' sum: of 91 words and 1 tag of weight 9, the tag has 9/100 of the gradient and the words the rest."""

    per_token = False

    def count(self, batch):
        return float(batch.extras["weight"].sum(dtype=torch.float64))

    def __call__(self, model, batch):
        out = model(batch.tokens, **batch.context())
        weight = batch.extras["weight"]  # (B, T)
        loss = (out.loss * weight).sum()
        return loss + (out.aux_loss * weight.sum(1)).sum(), {"loss": loss.detach()}
