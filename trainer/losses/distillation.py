"""Learning from a teacher's next-token distributions: three distances between its distribution and the student's.

    objective = Distill("forward_kl", temperature=2, alpha=0.5, width=tokenizer.vocab_size, teacher=Teacher(...))
    loss, metrics = objective(model, batch)          # summed over the batch's trained tokens

Letters: p the teacher's distribution over the ids of the tokenizer, q the student's, both softmax(logits / T).

    forward_kl   KL(p || q), mass-covering        (Hinton 2015, arXiv:1503.02531, section 2)
    reverse_kl   KL(q || p), mode-seeking         (MiniLLM, arXiv:2306.08543, eq. 1, per token)
    js           KL(p || m) / 2 + KL(q || m) / 2, m = (p + q) / 2   (GKD, arXiv:2306.13649, eq. 1, beta = 1/2)

    loss = alpha * cross-entropy + (1 - alpha) * T^2 * distance         T^2 keeps the size of gradients (Hinton)

A file written by --write_logprobs holds p for the k likeliest ids and the sum of all others. Then p and q are
distributions over k + 1 outcomes. Their distance is at most that of the full distributions, and equal to it for k = V.

N = trained tokens of a batch, d = hidden size, V = ids of the tokenizer
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.console import Progress, UserError, check_writable, note
from common.files import ROOT
from dataset.batches.loader import IGNORED, Batch, Loader
from dataset.tokens.teacher import read_header, writing
from model.checkpoint import Checkpoint, find_tokenizer, find_weights, load_weights
from model.hub import load_tokenizer
from model.precision import prepare_for_inference
from model.transformer import positions_at_once
from tokenizer.text import Tokenizer
from trainer.inputs import Data, check_positions
from trainer.loop.backend import Backend


def distance(kind: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Of two distributions over W outcomes: log-probabilities (N, W), (N, W) -> (N,)"""
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def with_rest(log_q: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (N, V) -> those of the given ids (N, k), and of all others together: (N, k + 1)."""
    chosen = log_q.gather(1, ids)
    rest = -torch.expm1(chosen.logsumexp(1, keepdim=True))  # 1 - their sum
    return torch.cat([chosen, rest.clamp_min(1e-7).log()], 1)


class Teacher:
    """The frozen teacher, in its compute dtype. Its head is called separately, so that logits are made in chunks."""

    def __init__(self, weights: Checkpoint, dtype: torch.dtype, device: torch.device):
        self.model = prepare_for_inference(weights.build(dtype, device=device), dtype)
        self.hash, self.about = weights.hash, f"{weights.path}, {self.model.num_parameters():,} parameters"
        self.head, self.model.lm_head = self.model.lm_head, nn.Identity()

    def __str__(self):
        return self.about

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """(N, d) of the selected positions, or of all."""
        found = self.model(batch.tokens, **(batch.context() | dict(targets=None))).logits
        return found.reshape(-1, found.shape[-1])

    @torch.no_grad()
    def log_probs(self, states: Tensor, width: int, temperature: float) -> Tensor:
        """(N, d) -> (N, width)"""
        return (self.head(states)[:, :width].float() / temperature).log_softmax(-1)


class Distill:
    """An objective whose units are tokens.

    width    ids of the tokenizer; a model may have more rows than that
    teacher  None: the batch brings its log-probabilities, read from a file
    """

    per_token = False

    def __init__(self, kind: str, temperature: float, alpha: float, width: int, teacher: Teacher | None = None):
        self.kind, self.temperature, self.alpha, self.width, self.teacher = kind, temperature, alpha, width, teacher

    def count(self, batch):
        return batch.trained_tokens

    def __call__(self, model, batch):
        criterion = partial(self._compare, self._teacher_targets(batch))
        out = model(batch.tokens, **batch.context(), criterion=criterion)
        cross_entropy, distances = out.loss.sum((0, 1))
        loss = self.alpha * cross_entropy + (1 - self.alpha) * self.temperature**2 * distances
        units = (batch.targets != IGNORED).sum(1)  # (B,): the balancing loss of a row counts as much as the row does
        metrics = dict(loss=loss, cross_entropy=cross_entropy, distance=distances)
        return loss + (out.aux_loss * units).sum(), {name: value.detach() for name, value in metrics.items()}

    def _teacher_targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """What is known of the teacher at the trained tokens: hidden states, or log-probabilities and their ids."""
        if self.teacher is not None:
            return (self.teacher.states(batch),)
        kept = [batch.extras[name].flatten(0, 1) for name in ("teacher_logprobs", "teacher_ids")]
        return tuple(kept if batch.selected is None else (values[batch.selected] for values in kept))

    def _compare(self, seen: tuple[Tensor, ...], logits: Tensor, targets: Tensor, rows: slice) -> Tensor:
        """logits (n, V) and targets (n,) of some of the positions, `rows` -> cross-entropy and distance (n, 2)."""
        first, *ids = (values[rows] for values in seen)
        cross_entropy = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        log_q = (logits[:, : self.width] / self.temperature).log_softmax(-1)
        if ids:
            log_p, log_q = first.float(), with_rest(log_q, ids[0].long())
        else:
            log_p = self.teacher.log_probs(first, self.width, self.temperature)
        distances = torch.where(targets == IGNORED, 0.0, distance(self.kind, log_p, log_q))
        return torch.stack([cross_entropy, distances], dim=1)


# ---- a teacher whose log-probabilities are written to a file


def open_teacher(config) -> tuple[Checkpoint, Tokenizer]:
    """--teacher -> its weights and its tokenizer: that of --tokenizer_path, which may have another chat template."""
    weights = load_weights(find_weights(config.teacher, config.save_dir, ROOT / "out"))
    check_positions(config, weights.config, f"--teacher {config.teacher}")
    own = load_tokenizer(config.tokenizer_path) if config.tokenizer_path else None
    # another project's file does not say which is its own, and one that was moved is found nowhere else
    is_its = own and weights.tokenizer.get("hash") in (None, own.hash)
    tokenizer = find_tokenizer(weights, config.tokenizer_path if is_its else None)
    if own and not own.same_ids(tokenizer):
        raise UserError(
            f"--tokenizer_path {config.tokenizer_path}: its {own.vocab_size:,} ids are not those of --teacher "
            f"{config.teacher} ({tokenizer.path}, {tokenizer.vocab_size:,} ids); distillation needs the same in both"
        )
    return weights, own or tokenizer


def open_logprobs(config) -> dict:
    """--teacher_logprobs -> what the file says of itself, and a line to print."""
    header = read_header(config.teacher_logprobs)
    if header["temperature"] != config.temperature:
        raise UserError(
            f"--temperature {config.temperature:g}: {header['path']} was written at {header['temperature']:g}, the "
            "only temperature it can be used at; give that one, or write the file again"
        )
    about = f"{header['path']}, the {header['top_k']} likeliest ids of {header['tokens']:,} tokens"
    return header | dict(about=f"{about}, {header['bytes_per_token']} bytes each, of {header['weights']}")


@torch.no_grad()
def write_logprobs(config, data: Data, tokenizer: Tokenizer, teacher: Teacher, backend: Backend) -> str:
    """Runs the teacher over every example and writes --write_logprobs -> a line to print."""
    check_writable(config.write_logprobs, "--write_logprobs", is_file=True)
    if backend.world > 1:
        raise UserError("--write_logprobs: a file is written by one process; start it without torchrun")
    dataset, width = data.train, tokenizer.vocab_size
    _, first = np.unique(dataset.order, return_index=True)
    # the longest first: examples of the same length fill rows best
    distinct = dataset.view(first[np.argsort(-dataset.lengths[first], kind="stable")], "")
    loader = Loader(
        distinct,
        packing=True,
        batch_size=config.batch_size,
        accumulation_steps=8,
        max_seq_len=config.max_seq_len,
        shuffle=False,
    )
    top_k, size = min(config.top_k, width), positions_at_once(4 * width)
    facts = dict(temperature=config.temperature, teacher=teacher.hash, weights=str(teacher))
    facts |= dict(batch_size=config.batch_size)  # it decides what a step is: an interrupted file continues after one
    progress = Progress("asking the teacher", len(distinct), " examples")
    with writing(Path(config.write_logprobs), dataset, tokenizer, top_k, facts) as records:
        done = min(records.done, loader.steps_per_epoch)
        if done:
            all_steps = f"{loader.steps_per_epoch:,} steps"
            note(f"{config.write_logprobs}.partial: continues after {done:,} of {all_steps}")
            progress.advance(sum(len(loader.examples(step)) for step in range(done)))
        for step, batches in loader.prefetch(done, loader.steps_per_epoch):
            for batch in batches:
                states = teacher.states(batch.to(backend.device))
                # the selected positions are the trained ones, in order, and then padding
                trained = torch.from_numpy(np.flatnonzero(batch.targets.numpy() != IGNORED)).to(states.device)
                states = states[trained] if batch.selected is None else states[: len(trained)]
                found = [_likeliest(teacher.log_probs(s, width, config.temperature), top_k) for s in states.split(size)]
                ids, logprobs = (torch.cat(parts).cpu().numpy() for parts in zip(*found))
                begin = 0
                for example in distinct.order[list(batch.examples)].tolist():  # in the order of the rows
                    stop = begin + int(records.begins[example + 1] - records.begins[example])
                    records[example] = ids[begin:stop], logprobs[begin:stop]
                    begin = stop
            records.finished(step)
            progress.advance(len(loader.examples(step)))
    progress.close()
    tokens, width = int(records.begins[-1]), records.dtype.itemsize
    return f"{config.write_logprobs}: {tokens:,} trained tokens, {width} bytes each, {tokens * width / 1e6:,.1f} MB"


def _likeliest(log_p: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(N, V) -> (N, k) ids, (N, k + 1) log-probabilities"""
    ids = log_p.topk(top_k, dim=1).indices
    return ids, with_rest(log_p, ids)
