"""Learning from what a larger model would say: three distances between two next-token distributions.

    objective = Distill("forward_kl", temperature=2, alpha=0.5, width=tokenizer.vocab_size, teacher=Teacher(...))
    loss, metrics = objective(model, batch)          # summed over the batch's trained tokens

Letters: p the teacher's distribution over the ids of the tokenizer, q the student's, both softmax(logits / T).

    forward_kl   KL(p || q), the student covers all the teacher says    (Hinton 2015, arXiv:1503.02531, section 2)
    reverse_kl   KL(q || p), it keeps to what the teacher likes best    (MiniLLM, arXiv:2306.08543, eq. 1, per token)
    js           KL(p || m) / 2 + KL(q || m) / 2, m = (p + q) / 2       (GKD, arXiv:2306.13649, eq. 1, beta = 1/2)

    loss = alpha * cross-entropy + (1 - alpha) * T^2 * distance         T^2 keeps gradients at their size (Hinton)

With a file instead of a teacher, p is known for its k likeliest ids, and for all others only together: then both are
distributions over k + 1 outcomes. That is never more than the whole distance, and equal to it where k = V.

N = trained tokens of a batch, d = width of what the head reads, V = ids
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.console import UserError
from common.files import ROOT, atomic
from dataset.batches.loader import IGNORED, Batch, Loader
from dataset.tokens.teacher import read_header, writing
from dataset.tokens.token_cache import Progress
from model.checkpoint import Checkpoint, find_weights, load_weights
from model.precision import prepare_for_inference
from tokenizer.find import tokenizer_of
from tokenizer.text import Tokenizer
from trainer.inputs import Data, check_positions
from trainer.loop.backend import Backend

LOGITS_AT_ONCE = 1 << 24  # logits that exist at once, of each model


def distance(kind: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """(N, W), (N, W) -> (N,)"""
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def with_rest(log_q: Tensor, ids: Tensor) -> Tensor:
    """log-probabilities (N, V) -> of these ids (N, k) and of all others together: (N, k + 1)."""
    chosen = log_q.gather(1, ids)
    rest = -torch.expm1(chosen.logsumexp(1, keepdim=True))  # 1 - their sum
    return torch.cat([chosen, rest.clamp_min(1e-7).log()], 1)


class Teacher:
    """Frozen, in the dtype it computes in. Its head is kept distance, so that logits are made a chunk at a time."""

    def __init__(self, weights: Checkpoint, dtype: torch.dtype, device: torch.device):
        self.model = prepare_for_inference(weights.build(), dtype).to(device)
        self.hash, self.about = weights.hash, f"{weights.path}, {self.model.num_parameters():,} parameters"
        self.head, self.model.lm_head = self.model.lm_head, nn.Identity()

    def __str__(self):
        return self.about

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """(N, d) of the selected positions, or of all."""
        found = self.model(
            batch.tokens, documents=batch.documents, positions=batch.positions, selected=batch.selected
        ).logits
        return found.reshape(-1, found.shape[-1])

    @torch.no_grad()
    def log_probs(self, states: Tensor, width: int, temperature: float) -> Tensor:
        """(N, d) -> (N, width)"""
        return (self.head(states)[:, :width].float() / temperature).log_softmax(-1)


class Distill:
    """An objective whose units are tokens. width: ids of the tokenizer, which models may have more rows than."""

    per_token = False

    def __init__(self, kind: str, temperature: float, alpha: float, width: int, teacher: Teacher | None = None):
        self.kind, self.temperature, self.alpha, self.width, self.teacher = kind, temperature, alpha, width, teacher

    def count(self, batch):
        return batch.trained_tokens

    def __call__(self, model, batch):
        sums = []
        criterion = partial(self._loss, self._teacher_targets(batch), sums)
        out = model(batch.tokens, **batch.context(), criterion=criterion)
        loss = out.loss.sum()
        units = (batch.targets != IGNORED).sum(1)  # (B,): the balancing loss of a row counts as much as the row does
        cross_entropy, distances = torch.stack(sums).sum(0)
        metrics = {"loss": loss.detach(), "cross_entropy": cross_entropy, "distance": distances}
        return loss + (out.aux_loss * units).sum(), metrics

    def _teacher_targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """What is known of the teacher where a loss is asked for: states, or log-probabilities and ids."""
        if self.teacher is not None:
            return (self.teacher.states(batch),)
        kept = [batch.extras[name].flatten(0, 1) for name in ("teacher_logprobs", "teacher_ids")]
        return tuple(kept if batch.selected is None else (values[batch.selected] for values in kept))

    def _loss(self, seen: tuple[Tensor, ...], sums: list[Tensor], head, x: Tensor, targets: Tensor) -> Tensor:
        """x (N, d), targets (N,) -> (N,). A chunk's logits are dropped after use and made again for its gradient: of
        (N, V) tensors there are never more than a chunk."""
        parts, size = [], max(LOGITS_AT_ONCE // self.width, 128)
        for chunk in zip(x.split(size), targets.split(size), *(values.split(size) for values in seen)):
            losses, both = checkpoint(self._chunk, head, *chunk, use_reentrant=False, preserve_rng_state=False)
            parts.append(losses)
            sums.append(both.detach())
        return torch.cat(parts)

    def _chunk(self, head, x: Tensor, targets: Tensor, seen: Tensor, ids: Tensor | None = None):
        """-> (losses (C,), [sum of cross-entropies, sum of distances] (2,))"""
        logits = head(x).float()
        cross_entropy = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        log_q = (logits[:, : self.width] / self.temperature).log_softmax(-1)
        if ids is None:
            log_p = self.teacher.log_probs(seen, self.width, self.temperature)
        else:
            log_p, log_q = seen.float(), with_rest(log_q, ids.long())
        distances = torch.where(targets == IGNORED, 0.0, distance(self.kind, log_p, log_q))
        losses = self.alpha * cross_entropy + (1 - self.alpha) * self.temperature**2 * distances
        return losses, torch.stack([cross_entropy.sum(), distances.sum()])


# ---- a teacher that is asked once


def open_teacher(config) -> tuple[Checkpoint, Tokenizer, None]:
    """--teacher -> its weights and its tokenizer."""
    weights = load_weights(find_weights(config.teacher, config.save_dir, ROOT / "out"))
    check_positions(config, weights.config, f"--teacher {config.teacher}")
    place = config.tokenizer_path if not weights.tokenizer else None  # of another project's file
    return weights, tokenizer_of(weights.tokenizer, Path(weights.path), weights.config.vocab_size, place), None


def read_views(config) -> dict:
    """--teacher_logprobs -> what the file says of itself, and a line to print."""
    views = read_header(config.teacher_logprobs)
    if views["temperature"] != config.temperature:
        raise UserError(
            f"--temperature {config.temperature:g}: {views['path']} was written at {views['temperature']:g}, and what "
            "lies beyond the k likeliest ids cannot be told for another one; give that, or write it again"
        )
    about = f"{views['path']}, the {views['top_k']} likeliest ids of {views['tokens']:,} tokens"
    return views | dict(about=f"{about}, {views['bytes_per_token']} bytes each, of {views['weights']}")


@torch.no_grad()
def write_views(config, data: Data, tokenizer: Tokenizer, teacher: Teacher, backend: Backend) -> str:
    """Asks about every example and writes --write_logprobs -> a line to print."""
    if backend.world > 1:
        raise UserError("--write_logprobs: a file is written by one process; start it without torchrun")
    dataset, width = data.train, tokenizer.vocab_size
    _, first = np.unique(dataset.order, return_index=True)
    # the longest first, so that rows of neighbours are full rows
    distinct = dataset.view(first[np.argsort(-dataset.lengths[first], kind="stable")], "")
    loader = Loader(
        distinct,
        packing=True,
        batch_size=config.batch_size,
        accumulation_steps=8,
        max_seq_len=config.max_seq_len,
        shuffle=False,
    )
    top_k, size = min(config.top_k, width), max(LOGITS_AT_ONCE // width, 128)
    facts = dict(temperature=config.temperature, teacher=teacher.hash, weights=str(teacher))
    progress = Progress("asking the teacher", len(distinct), " examples")
    with (
        atomic(Path(config.write_logprobs)) as temporary,
        writing(temporary, dataset, tokenizer, top_k, facts) as records,
    ):
        for step, batches in loader.prefetch(0, loader.steps_per_epoch):
            for batch in batches:
                states = teacher.states(batch.to(backend.device))
                # the selected positions are the trained ones, in order, and then filling
                trained = torch.from_numpy(np.flatnonzero(batch.targets.numpy() != IGNORED)).to(states.device)
                states = states[trained] if batch.selected is None else states[: len(trained)]
                found = [_likeliest(teacher.log_probs(s, width, config.temperature), top_k) for s in states.split(size)]
                ids, logprobs = (torch.cat(parts).cpu().numpy() for parts in zip(*found))
                begin = 0
                for example in distinct.order[list(batch.examples)].tolist():  # as they lie in the rows
                    stop = begin + int(records.begins[example + 1] - records.begins[example])
                    records[example] = ids[begin:stop], logprobs[begin:stop]
                    begin = stop
            progress.advance(len(loader.examples(step)))
    progress.close()
    tokens, width = int(records.begins[-1]), records.dtype.itemsize
    return f"{config.write_logprobs}: {tokens:,} trained tokens, {width} bytes each, {tokens * width / 1e6:,.1f} MB"


def _likeliest(log_p: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(N, V) -> (N, k) ids, (N, k + 1) log-probabilities"""
    ids = log_p.topk(top_k, dim=1).indices
    return ids, with_rest(log_p, ids)
