"""Learning from preferences: the objective over pairs of answers, and the reference's view of them.

    objective = Preference("sigmoid", beta=0.1)
    loss, metrics = objective(model, batch)              # summed over the batch's pairs

The formulas are in trainer/losses/pair_losses.py.

P = pairs of a batch, B = its rows, T = their length
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.console import Progress
from dataset.batches.preference import PairBatch, PairLoader, PreferenceDataset
from dataset.read.jsonl import entry_name
from dataset.tokens.cache import cache_root, get_or_build
from model.lora import adapter_disabled
from model.transformer import CausalLM
from trainer.loop.backend import Backend
from trainer.losses.pair_losses import LOSSES
from trainer.stage import StageConfig

LOGPROBS = "logprobs.npy"  # of the answers under the reference, in its entry of the cache


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


def add_reference(
    needed: list[tuple[PairLoader, int]], model: CausalLM, backend: Backend, config: StageConfig, weights: str
) -> str:
    """Gives the loaders' data sets the log-probabilities of their answers under `model` as it is now -> a line to
    print.

    Only the pairs of the steps that are needed are read (trainer/loop/job.py), by all ranks together, in the batches in
    which they are trained on. They are kept as an entry of the cache (dataset/tokens/cache.py), which is filled in as
    they are read, so that whoever stops the run loses at most a step. The entry's name depends on everything they
    follow from: data, tokenizer and lengths (the fingerprint), the hash of the weights, and the precision. The file is
    mapped, not held in memory.
    """
    read = 0
    for loader, steps in needed:
        for makes in (backend.main, True):  # then those ranks that do not see the first one's disk
            if makes:
                path = _reference_file(loader.dataset, config.cache_dir, f"{weights} {model.compute_dtype}")
            backend.barrier()
        read += _read_missing(path, loader, steps, model, backend)
        backend.barrier()
        loader.dataset.reference = np.load(path, mmap_mode="r")
    return f"reference: {read:,} pairs read" if read else "reference: its log-probabilities are in the cache"


def _reference_file(dataset: PreferenceDataset, cache_dir: str | None, state: str) -> Path:
    """The entry's file; made now, with nothing known, where there is none. Of runs that begin at the same time, one
    makes it: else another would replace the file that the first has begun to fill in.

    state  what the reference depends on besides the data
    """
    everything = dataset.distinct

    def build(folder: Path) -> dict:
        np.save(folder / LOGPROBS, np.full((int(everything.order.max()) + 1, 2), np.nan, np.float32))
        return dict(source=str(dataset.path.resolve()), content=dataset.files[0]["sha256"])

    name = entry_name(dataset.path, "reference", f"{everything.fingerprint} {state}")
    return get_or_build(cache_root(dataset.path, cache_dir), name, build)[0] / LOGPROBS


@torch.no_grad()
def _read_missing(path: Path, loader: PairLoader, steps: int, model: CausalLM, backend: Backend) -> int:
    """Fills in what the file lacks of the loader's first `steps` steps -> how many pairs were read.

    The file has a row for each distinct pair, chosen and rejected in fp32, and NaN where it was not read yet. All ranks
    write the same numbers, since several of them may have disks of their own. A value of 4 bytes is on the disk or is
    not, so the file needs no other form while it is incomplete.
    """
    own = torch.from_numpy(~np.isnan(np.load(path, mmap_mode="r")).any(1)).to(torch.uint8)
    known = torch.stack(backend.gather(own)).amin(0).bool().numpy()  # on every rank's disk
    pairs_of = lambda step: loader.dataset.order[loader.examples(step)]
    missing = [step for step in range(steps) if not known[pairs_of(step)].all()]
    if not missing:
        return 0
    values = np.load(path, mmap_mode="r+")
    pairs = np.unique(np.concatenate([pairs_of(step) for step in missing]))
    total = int((~known[pairs]).sum())
    progress = Progress("reference", total, " pairs") if backend.main else None
    training = model.training
    model.eval()
    for step, batches in loader.prefetch(missing[0], missing[-1] + 1):
        pairs = pairs_of(step)
        unknown = np.flatnonzero(~known[pairs])
        if not len(unknown):
            continue
        place = {example: i for i, example in enumerate(loader.examples(step).tolist())}
        found = torch.zeros(len(pairs), 2)
        for batch in batches:
            sums, _, _ = read_answers(model, batch.to(backend.device))
            found[[place[example] for example in batch.examples]] = sums.float().cpu()
        found = torch.stack(backend.gather(found)).sum(0)  # each pair is of one rank, and 0 on the others
        values[pairs[unknown]] = found[unknown].numpy()
        if progress:
            progress.advance(len(np.unique(pairs[unknown])))
        known[pairs] = True
    model.train(training)
    values.flush()
    if progress:
        progress.close()
    return total
