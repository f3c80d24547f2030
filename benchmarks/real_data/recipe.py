"""Which recipe trains a small model with the fewest tokens: trials on real text, held-out bits per byte.

    python benchmarks/real_data/recipe.py pretrain.jsonl --trials rates         # the named trials of this file
    python benchmarks/real_data/recipe.py pretrain.jsonl --trials my_trials.txt --results out/recipe.jsonl
    python benchmarks/real_data/recipe.py pretrain.jsonl --table                # what the results say so far

A line of trials is a few settings and seeds: `optimizer=muon learning_rate=2e-3 steps=175 seed=0,1,2`; the fields of
`Trial` are the settings and have defaults. Each trial trains a fresh model on the same documents and ends with the bits
per byte of 3 % of the documents, which no trial trains on. Results are appended to a file, and a trial that is in it is
not run again: the program can be stopped at any time, and several may work on one file. What a setting is that Sparrow
itself does not have is computed here, so that only what helps gets into the library.
"""

import argparse
import fcntl
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
import torch.nn.functional as F

from common.files import ROOT
from dataset.tokens.examples import PretrainDataset
from model.config import ModelConfig
from model.precision import pick_dtype
from model.transformer import CausalLM
from tokenizer.text import Tokenizer
from trainer.loop import optim

HELD_OUT, SPLIT_SEED = 0.03, 42
# In place of Muon's five quintics: four, each the nearest to 1 wherever those before it take a number from 1/400 to 1
# (arXiv:2505.16932, algorithm 1). All but the last are of s / 1.01, as rounding in bf16 can make s greater than 1.
POLAR = (
    (8.3220, -24.1199, 17.5304),
    (4.0368, -2.9458, 0.5444),
    (3.5701, -2.6202, 0.5081),
    (2.6177, -1.9413, 0.4486),
)


@dataclass(frozen=True)
class Trial:
    """One training. What is not plain from its name is explained where it is used."""

    optimizer: str = "adamw"
    learning_rate: float = 5e-4
    schedule: str = "cosine"
    steps: int = 500
    rows: int = 8
    length: int = 256
    warmup: float = 0.03  # share of the steps
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    decay: float = 0.4  # share of the steps over which wsd falls
    shape: str = "linear"  # of that fall: linear or sqrt
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8  # of AdamW, beside Muon too
    momentum: float = 0.9  # of Muon
    momentum_warmup: float = 0.0  # share of the steps over which it rises from 0.85
    iterations: int = 5  # of Newton and Schulz
    polar: int = 0  # 1: those of POLAR
    normalise: float = 0.0  # NorMuon: beta of the mean square of each row of the update (arXiv:2510.05491)
    others_rate: float = 1.0  # rate of embedding, head and norms, as a multiple
    initial: str = "zero"  # o_proj and down_proj: zero, or scaled: N(0, 0.02 / sqrt(2 L))
    embedding_std: float = 0.0  # 0: 1 / sqrt(d)
    z_loss: float = 0.0
    growth: int = 0  # 1: half the rows in the first quarter of the tokens, twice as many in the last
    documents: str = "masked"  # masked, open (attention crosses documents), aligned (rows begin with a document)
    preset: str = "nano"
    width: int = 0  # 0: the preset's
    layers: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """The settings that differ from the defaults, without the seed: trials of one name are compared over seeds."""
        changed = [f for f in fields(self) if f.name != "seed" and getattr(self, f.name) != f.default]
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in changed) or "optimizer=adamw"


MUON = "optimizer=muon schedule=wsd others_rate=4.0 eps=1e-6"  # as trainer/loop/optim.py has it
BEFORE = "momentum=0.95 momentum_warmup=0.3 eps=1e-8 others_rate=2.0"  # how Muon was set until November 2026
MODERN = f"{MUON} steps=175 learning_rate=2e-3"  # 0.35 of the steps of classic
NAMED = {
    "rates": ["learning_rate=5e-4,1e-3,2e-3,4e-3", f"{MUON} steps=175 learning_rate=5e-4,1e-3,2e-3,4e-3"],
    "seeds": [
        "learning_rate=1e-3,2e-3,4e-3 seed=0,1,2",
        f"{MODERN} seed=0,1,2",
        f"{MUON} {BEFORE} steps=175 learning_rate=2e-3 seed=0,1,2",
        f"{MUON} steps=500 learning_rate=2e-3 seed=0,1",
        f"{MUON} iterations=3 steps=500 learning_rate=2e-3 seed=0,1",
        f"{MUON} polar=1 steps=500 learning_rate=2e-3 seed=0,1",
        f"{MUON} {BEFORE} steps=500 learning_rate=2e-3 seed=0,1",
        f"{MUON} others_rate=2.0,8.0 steps=500 learning_rate=2e-3 seed=0,1",
        f"{MUON} steps=250 rows=16 learning_rate=2e-3,4e-3",
        f"{MUON} steps=100 learning_rate=2e-3,4e-3 seed=0,1,2",
    ],
    "small": [
        "preset=small steps=200 learning_rate=5e-4,1e-3,2e-3",
        f"{MUON} preset=small steps=90 learning_rate=1e-3,1.2e-3,2e-3",
        f"{MUON} others_rate=2.0 preset=small steps=90 learning_rate=1e-3,1.2e-3,2e-3",
    ],
    # each alone, one seed: a gain below the spread of the seeds is none. Logit caps have no line: a plain Llama lacks
    # them, so other programs would compute another model
    "ingredients": [
        f"{MODERN} {setting}"
        for setting in (
            "optimizer=adamw",
            "schedule=cosine,constant",
            "learning_rate=1e-3,4e-3",
            "warmup=0.0,0.1",
            "min_lr_ratio=0.0",
            "decay=0.7",
            "shape=sqrt",
            "weight_decay=0.0",
            "documents=open",
            "documents=aligned",
            "others_rate=1.0,2.0,8.0",
            "beta1=0.8",
            "beta2=0.99",
            "eps=1e-8",
            "momentum=0.8,0.95",
            "momentum_warmup=0.3",
            "iterations=3",
            "polar=1",
            "normalise=0.95",
            "initial=scaled",
            "embedding_std=0.02",
            "growth=1",
            "z_loss=1e-4",
            "grad_clip=0.0",
        )
    ],
    "transfer": [
        f"{MUON} steps=100 width=192,512 layers=2 learning_rate=1e-3,2e-3,4e-3",
        f"{MUON} preset=base steps=60 learning_rate=5e-4,1e-3,2e-3",
    ],
}


def read_trials(lines: list[str]) -> list[Trial]:
    """Lines of `name=value,value ...` -> a trial for each combination, in order."""
    kinds = {f.name: type(f.default) for f in fields(Trial)}
    found = []
    for line in lines:
        words = [word.split("=") for word in line.partition("#")[0].split()]
        values = [[kinds[name](value) for value in text.split(",")] for name, text in words]
        found += [Trial(**dict(zip([name for name, _ in words], chosen))) for chosen in product(*values) if words]
    return found


# ---- data


def rows_of(data: PretrainDataset, end: int, aligned: bool) -> torch.Tensor:
    """(rows, length + 1) ids: the stream, cut; aligned: each row begins with a document, and what the last document of
    a row has too much is left out."""
    whole = [data.tokens(i) for i in range(len(data))]
    length = len(whole[0])
    if not aligned:
        return torch.from_numpy(np.stack([row for row in whole if len(row) == length]).astype(np.int64))
    stream = np.concatenate([row[:-1] for row in whole] + [whole[-1][-1:]])  # rows overlap by a token
    rows, begins, at = [], np.flatnonzero(stream == end), 0
    while at + length <= len(stream):
        rows.append(stream[at : at + length])
        following = np.searchsorted(begins, at + length - 1)
        if following == len(begins):
            break
        at = int(begins[following])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


class Text:
    """The rows of a length, read once for all trials."""

    def __init__(self, path: Path, cache_dir: Path):
        self.path, self.cache_dir, self.tokenizer, self.known = path, cache_dir, Tokenizer.load(), {}

    def rows(self, trial: Trial) -> tuple[torch.Tensor, torch.Tensor]:
        """(for training, held out). The held-out rows do not depend on the trial's treatment of documents."""
        key = trial.length, trial.documents == "aligned"
        if key not in self.known:
            data = PretrainDataset(self.path, self.tokenizer, max_seq_len=trial.length, cache_dir=self.cache_dir)
            train, held_out = data.split(HELD_OUT, SPLIT_SEED)
            end = self.tokenizer.end_of_text
            self.known[key] = rows_of(train, end, key[1]), rows_of(held_out, end, False)
        return self.known[key]


def places(tokens: torch.Tensor, end: int) -> dict[str, torch.Tensor]:
    """documents and positions of rows (B, T), as dataset/batches/loader.py numbers them."""
    opens = tokens == end
    opens[:, 0] = True
    t = torch.arange(tokens.shape[1]).expand_as(tokens)
    positions = t - torch.where(opens, t, 0).cummax(1).values
    return dict(documents=opens.cumsum(1).int(), positions=positions)


# ---- training


def build(trial: Trial, vocab_size: int) -> CausalLM:
    torch.manual_seed(trial.seed)
    changes = dict(hidden_size=trial.width) if trial.width else {}
    changes |= dict(num_hidden_layers=trial.layers) if trial.layers else {}
    model = CausalLM(ModelConfig.preset(trial.preset, vocab_size=vocab_size, **changes))
    model.compute_dtype, _ = pick_dtype("auto", torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name and trial.embedding_std:
            torch.nn.init.normal_(parameter, std=trial.embedding_std)
        elif name.endswith(("o_proj.weight", "down_proj.weight")) and trial.initial == "scaled":
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * model.config.num_hidden_layers))
    return model


def rate_at(trial: Trial, done: float, step: int, steps: int) -> float:
    """The library's schedule; wsd also with other shares and shapes of its fall. done: share of the run, from 0."""
    if trial.schedule == "wsd" and done >= trial.warmup:
        left = min((1 - done - 1 / steps) / trial.decay, 1.0)
        left = 1 - math.sqrt(1 - max(left, 0)) if trial.shape == "sqrt" else max(left, 0)
        return trial.learning_rate * (trial.min_lr_ratio + (1 - trial.min_lr_ratio) * left)
    return optim.learning_rate(
        step,
        steps,
        peak=trial.learning_rate,
        warmup=trial.warmup,
        schedule=trial.schedule,
        floor=trial.min_lr_ratio,
    )


class Orthogonal:
    """In place of the library's function of that name: other iterations, and rows of equal mean square over time."""

    def __init__(self, trial: Trial):
        self.trial, self.squares = trial, {}

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        quintics = POLAR if self.trial.polar else optim.QUINTICS[:1] * self.trial.iterations
        update = optim.orthogonalise(gradient, quintics)
        beta = self.trial.normalise
        if not beta:
            return update
        update = update.float()
        squares = self.squares.setdefault(update.shape, torch.zeros(*update.shape[:2], 1))
        squares.lerp_(update.square().mean(-1, keepdim=True), 1 - beta)
        even = update / (squares.sqrt() + 1e-8)
        return even * (update.norm(dim=(-2, -1), keepdim=True) / even.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-8))


def rows_of_steps(trial: Trial) -> list[int]:
    """Rows of each step; all trials of as many `steps` and `rows` see as many tokens."""
    if not trial.growth:
        return [trial.rows] * trial.steps
    part = trial.steps // 8
    half, full, double = trial.rows // 2, trial.rows, 2 * trial.rows
    return [half] * (4 * part) + [full] * (trial.steps - 4 * part) + [double] * part


def losses(model: CausalLM, rows: torch.Tensor, end: int, masked: bool) -> torch.Tensor:
    """(B, T) of rows (B, T + 1)."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    return model(tokens, targets=targets, **(places(tokens, end) if masked else {})).loss


def train(trial: Trial, text: Text, compiled: bool) -> dict:
    begin = time.perf_counter()
    end = text.tokenizer.end_of_text
    rows, held_out = text.rows(trial)
    model = build(trial, text.tokenizer.vocab_size)
    if compiled:
        for block in model.model.layers:
            block.compile(dynamic=False)
        model.token_loss = torch.compile(model.token_loss, dynamic=False)
    optim.orthogonalise_together = Orthogonal(trial)
    optimizers = optim.build_optimizers(model, trial.optimizer, trial.weight_decay)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    matrices = groups[0]
    for group in groups:
        if "betas" in group:
            group["betas"], group["eps"] = (trial.beta1, trial.beta2), trial.eps
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(trial.seed))
    counts, used, curve, window = rows_of_steps(trial), 0, [], []
    for step, count in enumerate(counts):
        rate = rate_at(trial, used / sum(counts), step, len(counts))
        for group in groups:
            group["lr"] = rate * (1.0 if group is matrices else trial.others_rate)
        if trial.optimizer == "muon":
            risen = min(step / max(trial.momentum_warmup * len(counts), 1e-9), 1.0)
            matrices["momentum"] = trial.momentum - (trial.momentum - 0.85) * (1 - risen)
        chosen = rows[order[torch.arange(used, used + count) % len(order)]]
        used += count
        if trial.z_loss:
            logits = model(chosen[:, :-1], **places(chosen[:, :-1], end)).logits.float()
            loss = F.cross_entropy(logits.flatten(0, 1), chosen[:, 1:].flatten())
            total = loss + trial.z_loss * logits.logsumexp(-1).square().mean()
        else:
            total = loss = losses(model, chosen, end, trial.documents != "open").mean()
        total.backward()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optim.clip_and_check(parameters, trial.grad_clip, 1.0, torch.tensor(True))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        window.append(loss.item())
        if (step + 1) % 25 == 0:
            curve.append(round(statistics.mean(window), 4))
            window = []
    return dict(
        bpb=bits_per_byte(model, held_out, text.tokenizer, trial.documents != "open"),
        curve=curve,  # mean training loss of each 25 steps
        tokens=used * trial.length,
        seconds=round(time.perf_counter() - begin, 1),
    )


@torch.no_grad()
def bits_per_byte(model: CausalLM, rows: torch.Tensor, tokenizer: Tokenizer, masked: bool) -> float:
    rows = rows[: len(rows) // 8 * 8]  # one shape, which is compiled once
    nats = sum(float(losses(model, part, tokenizer.end_of_text, masked).sum()) for part in rows.split(8))
    text_bytes = int(tokenizer.token_bytes[rows[:, 1:].numpy()].sum())
    return nats / math.log(2) / text_bytes


# ---- the queue


def read_results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def work(trials: list[Trial], results: Path, text: Text, compiled: bool) -> bool:
    """Runs the first trial that has no result and that no other process runs -> whether there was one."""
    done = {(row["name"], row["seed"]) for row in read_results(results)}
    folder = results.with_suffix(".running")
    folder.mkdir(parents=True, exist_ok=True)
    for trial in trials:
        if (trial.name, trial.seed) in done:
            continue
        with open(folder / f"{trial.name} {trial.seed}".replace("/", "_"), "w") as mark:
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it when the process ends
            except OSError:
                continue
            if any((row["name"], row["seed"]) == (trial.name, trial.seed) for row in read_results(results)):
                continue
            row = dict(name=trial.name, seed=trial.seed, **train(trial, text, compiled), trial=asdict(trial))
            with open(results, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{row['bpb']:.4f}  {row['seconds']:6.1f} s  {trial.name} seed={trial.seed}", flush=True)
            return True
    return False


def table(results: Path) -> None:
    """Mean and spread over the seeds, best first within one number of tokens."""
    by_name: dict[tuple[int, str], list[float]] = {}
    for row in read_results(results):
        by_name.setdefault((row["tokens"], row["name"]), []).append(row["bpb"])
    print(f"{'tokens':>9}  {'bits per byte':>13}  {'least .. greatest':>19}  seeds  settings")
    for (tokens, name), values in sorted(by_name.items(), key=lambda item: (item[0][0], statistics.mean(item[1]))):
        edges = f"{min(values):.4f} .. {max(values):.4f}"
        print(f"{tokens:9,}  {statistics.mean(values):13.4f}  {edges:>19}  {len(values):5}  {name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help='rows of {"text": ...}')
    parser.add_argument(
        "--trials", default="rates", help=f"{', '.join(NAMED)}, or a file of lines, read again as it grows"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "out" / "recipe.jsonl")
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--table", action="store_true", help="only print the results")
    args = parser.parse_args()
    if not args.table:
        text = Text(args.data, args.results.parent / "cache")
        lines = lambda: NAMED.get(args.trials) or Path(args.trials).read_text().splitlines()
        while work(read_trials(lines()), args.results, text, not args.no_compile):
            pass
    table(args.results)


if __name__ == "__main__":
    main()
