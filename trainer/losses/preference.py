"""Learning from preferences: the objective over pairs of answers, and the reference's view of them.

    objective = Preference("sigmoid", beta=0.1)
    loss, metrics = objective(model, batch)              # summed over the batch's pairs

The formulas are in trainer/losses/pair_losses.py.

P = pairs of a batch, B = its rows, T = their length
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from common.console import Progress
from common.files import atomic_file
from dataset.batches.preference import PairBatch, PairLoader, PreferenceDataset
from dataset.tokens.cache import cache_root
from model.lora import adapter_disabled
from model.precision import pick_dtype
from model.transformer import CausalLM
from trainer.loop.backend import Backend
from trainer.losses.pair_losses import LOSSES


def read_answers(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(P, 2) summed log-probabilities of chosen and rejected, (P, 2) how many tokens, (B,) balancing losses."""
    out = model(batch.tokens, **batch.context())
    numbers = torch.arange(1, 2 * len(batch.examples) + 1, device=out.loss.device)
    own = batch.answers.flatten() == numbers[:, None]  # (2P, B*T); index_add is not deterministic on a GPU
    sums = -torch.where(own, out.loss.flatten(), 0.0).sum(1)
    tokens = (own & (batch.targets.flatten() >= 0)).sum(1)
    return sums.view(-1, 2), tokens.view(-1, 2), out.aux_loss


class Preference:
    """An objective whose units are pairs.

    kind     a row of LOSSES
    beta     None: the loss's own default
    options  the others that this loss has

    The reference's log-probabilities come with the batch; without them, the reference is the model with its adapter
    off.
    """

    per_token = False

    def __init__(self, kind: str, beta: float | None = None, **options: float):
        self.loss = LOSSES[kind]
        self.beta = self.loss.beta if beta is None else beta
        self.options = options

    def count(self, batch: PairBatch) -> float:
        return len(batch.examples)

    def __call__(self, model, batch):
        """Metrics: a reward is beta times what the loss compares (sums or means), `margin` the difference of the two
        rewards, `accuracy` how often it is above 0. `kl` is the mean of log p_ref(y) - log p(y) over both answers, in
        nats an answer. It estimates KL(p_ref || p) where the answers are typical of the reference, and it can be
        negative, since they were not drawn from it."""
        extra, reference = {}, batch.reference
        if reference is None and self.loss.reference:
            with torch.no_grad(), adapter_disabled(model):
                reference, _, _ = read_answers(model, batch)
        sums, tokens, aux_loss = read_answers(model, batch)
        if self.loss.reference:
            sums = sums - reference
            extra["kl"] = -sums.detach().mean(1).sum()
        scores = {"sums": sums, "means": sums / tokens}
        scores = {name: scores[name] for name in self.loss.scores}
        loss = self.loss.function(**scores, beta=self.beta, **self.options).sum()
        rewards = self.beta * scores[self.loss.scores[0]].detach()
        metrics = {
            "loss": loss.detach(),
            "accuracy": (rewards[:, 0] > rewards[:, 1]).float().sum(),
            "margin": (rewards[:, 0] - rewards[:, 1]).sum(),
            "reward_chosen": rewards[:, 0].sum(),
            "reward_rejected": rewards[:, 1].sum(),
        }
        pairs = batch.documents.amax(1) // 3  # (B,): a row's balancing loss counts as much as its pairs do
        return loss + (aux_loss * pairs).sum(), metrics | extra


# ---- the reference ----


def add_reference(datasets: list[PreferenceDataset], model: CausalLM, backend: Backend, config, weights: str) -> str:
    """Gives each data set the log-probabilities of its answers under `model` as it is now -> a line to print.

    They are computed once, by all ranks, and kept beside the token cache. The file's name depends on everything they
    follow from: data, tokenizer and lengths (the fingerprint), the hash of the weights, and the precision. The file is
    mapped, not held in memory.
    """
    model.to(backend.device)
    model.compute_dtype, _ = pick_dtype(config.dtype, backend.device)
    made = []
    for dataset in datasets:
        everything = dataset.distinct
        key = hashlib.sha256(f"1 {everything.fingerprint} {weights} {model.compute_dtype}".encode()).hexdigest()[:16]
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
    by_length = dataset.view(np.argsort(-dataset.lengths, kind="stable"), "")  # the same lengths fill rows best
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
