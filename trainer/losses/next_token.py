"""Cross-entropy of the next token: pretraining, fine-tuning, and reasoning with weighted tags.

B = rows of a batch, T = their length
"""

from __future__ import annotations

import torch

from dataset.batches.loader import IGNORED


class NextToken:
    """Cross-entropy of every trained token: pretraining and SFT. Its units are tokens."""

    per_token = True

    def count(self, batch):
        return batch.trained_tokens

    def __call__(self, model, batch):
        out = model(batch.tokens, **batch.context())
        loss = out.loss.sum()
        units = (batch.targets != IGNORED).sum(1)  # (B,): a row's balancing loss counts as much as its tokens do
        return loss + (out.aux_loss * units).sum(), {"loss": loss.detach()}


class Weighted:
    """Cross-entropy in which each token has a weight, `batch.extras["weight"]` (B, T), 0 where nothing is trained. Its
    units are the weights: 91 tokens of weight 1 and a tag of weight 9 sum to 100, so the tag gets 9 % of the gradient.
    """

    per_token = False

    def count(self, batch):
        return float(batch.extras["weight"].sum(dtype=torch.float64))

    def __call__(self, model, batch):
        out = model(batch.tokens, **batch.context())
        weight = batch.extras["weight"]  # (B, T)
        loss = (out.loss * weight).sum()
        return loss + (out.aux_loss * weight.sum(1)).sum(), {"loss": loss.detach()}
