"""Learning from preferences: five losses over pairs of answers, and where the reference's view of them comes from.

    objective = Preference("sigmoid", beta=0.1)
    loss, metrics = objective(model, batch)              # summed over the batch's pairs

Letters: y_c, y_r the chosen and the rejected answer to x; log p the sum over an answer's tokens, /|y| their mean.

    sigmoid  DPO (arXiv:2305.18290, eq. 7), with label smoothing e (cDPO, https://ericmitchell.ai/cdpo.pdf, eq. 3)
                 -(1 - e) log s(b h) - e log s(-b h),   h = log p(y_c)/p_ref(y_c) - log p(y_r)/p_ref(y_r)
    hinge    SLiC-HF's (arXiv:2305.10425)    max(0, 1 - b h)
    ipo      (arXiv:2310.12036, eq. 17)      (h - 1/(2b))^2,  h of means: sums would make the target one of length
    simpo    (arXiv:2405.14734, eq. 6)       sigmoid's with h = log p(y_c)/|y_c| - log p(y_r)/|y_r| - g/b, no reference
    orpo     (arXiv:2403.07691, eq. 6, 7)    -log p(y_c)/|y_c| - b log s(log odds(y_c)/odds(y_r)), no reference,
                 odds = q / (1 - q) of q = p(y)^(1/|y|)

P = pairs of a batch, B = its rows, T = their length
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.console import Progress
from common.files import atomic_file
from dataset.batches.preference import PairBatch, PairLoader, PreferenceDataset
from dataset.tokens.cache import cache_root
from model.lora import adapter_disabled
from trainer.loop.backend import Backend

WITHOUT_REFERENCE = ("simpo", "orpo")


def read_answers(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(P, 2) summed log-probabilities of chosen and rejected, (P, 2) how many tokens, (B,) balancing losses."""
    out = model(batch.tokens, **batch.context())
    numbers = torch.arange(1, 2 * len(batch.examples) + 1, device=out.loss.device)
    own = batch.answers.flatten() == numbers[:, None]  # (2P, B*T); not index_add: its order on a GPU is left to chance
    sums = -torch.where(own, out.loss.flatten(), 0.0).sum(1)
    tokens = (own & (batch.targets.flatten() >= 0)).sum(1)
    return sums.view(-1, 2), tokens.view(-1, 2), out.aux_loss


def pair_losses(kind: str, scores: Tensor, beta: float, smoothing: float = 0.0, gamma: float = 0.0) -> Tensor:
    """scores (P, 2): log p/p_ref of both answers, for ipo its mean over tokens; for simpo, orpo mean log p -> (P,)."""
    chosen, rejected = scores.unbind(1)
    h = chosen - rejected
    if kind == "hinge":
        return F.relu(1 - beta * h)
    if kind == "ipo":
        return (h - 1 / (2 * beta)).square()
    if kind == "orpo":
        log_odds = h - (_log1mexp(chosen) - _log1mexp(rejected))
        return -chosen - beta * F.logsigmoid(log_odds)
    h = beta * h - (gamma if kind == "simpo" else 0.0)
    return -(1 - smoothing) * F.logsigmoid(h) - smoothing * F.logsigmoid(-h)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of x < 0; an answer that is certain (x = 0) has odds of 10^7, not of infinity."""
    return torch.log(-torch.expm1(x.clamp(max=-1e-7)))


class Preference:
    """An objective whose units are pairs. Where a batch brings no reference, that is the model with its adapter off."""

    per_token = False

    def __init__(self, kind: str, beta: float, smoothing: float = 0.0, gamma: float = 0.0):
        self.kind, self.beta, self.smoothing, self.gamma = kind, beta, smoothing, gamma

    def count(self, batch: PairBatch) -> float:
        return len(batch.examples)

    def __call__(self, model, batch):
        """Metrics: rewards are beta x score, the margin is their difference, and accuracy how often it is above 0. `kl`
        is the mean of log p_ref(y) - log p(y) over both answers, in nats an answer: an estimate of KL(p_ref || p)
        where the answers are typical of the reference; it may be negative, since they were not drawn from it."""
        extra, reference = {}, batch.reference
        if reference is None and self.kind not in WITHOUT_REFERENCE:
            with torch.no_grad(), adapter_disabled(model):
                reference, _, _ = read_answers(model, batch)
        scores, tokens, aux_loss = read_answers(model, batch)
        if self.kind not in WITHOUT_REFERENCE:
            scores = scores - reference
            extra["kl"] = -scores.detach().mean(1).sum()
        if self.kind in ("ipo", *WITHOUT_REFERENCE):
            scores = scores / tokens
        loss = pair_losses(self.kind, scores, self.beta, self.smoothing, self.gamma).sum()
        rewards = self.beta * scores.detach()
        metrics = {
            "loss": loss.detach(),
            "accuracy": (rewards[:, 0] > rewards[:, 1]).float().sum(),
            "margin": (rewards[:, 0] - rewards[:, 1]).sum(),
            "reward_chosen": rewards[:, 0].sum(),
            "reward_rejected": rewards[:, 1].sum(),
        }
        pairs = batch.documents.amax(1) // 3  # (B,): the balancing loss of a row counts as much as its pairs do
        return loss + (aux_loss * pairs).sum(), metrics | extra


# ---- the reference ----


def add_reference(datasets: list[PreferenceDataset], model: nn.Module, backend: Backend, config, about: str) -> str:
    """Gives each data set the log-probabilities of its answers under `model` as it is now -> a line to print.

    They are computed once, by all ranks, and kept beside the token cache, named by everything they follow from: data,
    tokenizer and lengths (the fingerprint), and `about`, the weights and the precision. Mapped, not held in memory.
    """
    made = []
    for dataset in datasets:
        everything = dataset.distinct
        key = hashlib.sha256(f"1 {everything.fingerprint} {about}".encode()).hexdigest()[:16]
        path = cache_root(dataset.path, config.cache_dir) / f"{dataset.path.name}-reference-{key}.npy"
        (missing,) = backend.sum(not path.is_file())
        if missing:
            values = _reference(everything, model, backend, config)
            made.append(len(everything))
            if backend.main:
                _save(path, values)
            backend.barrier()
            if not path.is_file():  # another host's disk
                _save(path, values)
        dataset.reference = np.load(path, mmap_mode="r")
    return f"reference: {sum(made):,} pairs read" if made else "reference: its log-probabilities are in the cache"


@torch.no_grad()
def _reference(dataset: PreferenceDataset, model: nn.Module, backend: Backend, config) -> np.ndarray:
    """(distinct examples, 2) fp32"""
    by_length = dataset.view(np.argsort(-dataset.lengths, kind="stable"), "")  # rows of neighbours are full rows
    loader = PairLoader(
        by_length,
        packing=True,
        batch_size=config.batch_size,
        accumulation_steps=8,
        max_seq_len=config.max_seq_len,
        rank=backend.rank,
        world=backend.world,
        shuffle=False,
    )
    values = torch.zeros(int(dataset.order.max()) + 1, 2)
    progress = Progress("reference", len(dataset), " pairs") if backend.main else None
    training = model.training
    model.eval()
    for step, batches in loader.prefetch(0, loader.steps_per_epoch):
        for batch in batches:
            found, _, _ = read_answers(model, batch.to(backend.device))
            values[by_length.order[list(batch.examples)]] = found.float().cpu()
        if progress:
            progress.advance(len(loader.examples(step)))
    model.train(training)
    if progress:
        progress.close()
    return torch.stack(backend.gather(values)).sum(0).numpy()


def _save(path, values: np.ndarray) -> None:
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values)
