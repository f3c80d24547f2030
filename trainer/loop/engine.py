"""The training loop. Every stage runs this one.

    job = Job(stage="pretrain", config=config, model=model, objective=NextToken(), tokenizer=tokenizer,
              data=open_data(...), packing=False)
    with start(config) as backend:
        Engine(job, backend).run()

One optimiser step: the loader gives this rank's micro-batches; their units (trained tokens, say) are counted and added
up over all ranks; each micro-batch is backpropagated as `sum of losses * ranks / units`; gradients are clipped and
judged; the optimisers move, unless something was not finite. Nothing in it waits for an accelerator except logging and
saving.
"""

from __future__ import annotations

import math
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.console import UserError
from common.files import ROOT, keep_previous
from common.options import describe
from dataset.batches.loader import Loader
from model.checkpoint import Checkpoint, weights_name
from model.precision import lower_frozen, pick_dtype
from model.transformer import CausalLM
from tokenizer.text import Tokenizer
from trainer.inputs import Data, check_start
from trainer.loop.backend import Backend
from trainer.loop.compiling import compile_model
from trainer.loop.interrupts import catch_signals, explained
from trainer.loop.optim import build_optimizers, learning_rate
from trainer.loop.watchdog import Watchdog
from trainer.losses.base import Objective
from trainer.run import resume
from trainer.run.artifacts import Weights
from trainer.run.logger import RunLogger
from trainer.run.meter import Meter
from trainer.run.plan import plan, rehearsal
from trainer.stage import StageConfig


@dataclass
class Job:
    """What a stage hands to the engine."""

    stage: str
    config: StageConfig
    model: CausalLM
    objective: Objective
    tokenizer: Tokenizer
    data: Data
    packing: bool  # whether batch_size counts examples, packed into rows, or rows
    parent: Checkpoint | None = None
    notes: list[str] = field(default_factory=list)  # lines printed when the run starts
    output: Weights = field(default_factory=Weights)  # what is written; trainer/run/artifacts.py
    loader: type[Loader] = Loader


class Engine:
    def __init__(self, job: Job, backend: Backend):
        self.job, self.backend = job, backend
        self.config = config = rehearsal(job.config) if job.config.plan else job.config
        self.dtype, notice = pick_dtype(config.dtype, backend.device)
        self.model = job.model.to(backend.device)
        if job.parent:
            job.parent.release()  # the model has a copy of its own
        self.model.compute_dtype = self.dtype
        self.model.recompute = config.activation_checkpointing
        lower_frozen(self.model, self.dtype)
        self.optimizers = build_optimizers(self.model, config.optimizer, config.weight_decay)
        self.step, self.tokens, self.best = 0, 0, float("inf")
        self.written: set[Path] = set()
        self.losses: dict[str, float] = {}  # the newest figures, for the lineage
        self.name = weights_name(config.save_weight, self.model.config)
        self.save_dir = Path(config.save_dir)
        self.folder = self.save_dir / job.output.folder
        check_start(config, self.model, job.parent, job.output.writes(self.folder / self.name, config))
        states = self.save_dir / "resume" / Path(self.name).stem
        found = self._find(states)
        self.resumed = found is not None
        self.run_id = found.parent.name if found and resume.is_newest(found) else resume.new_run(states)
        self.states = states / self.run_id
        self.loader = self._loader(job.data.train, self._accumulation(found), shuffle=True)
        self.total = config.max_steps or config.epochs * self.loader.steps_per_epoch
        self.meter = Meter(self.model, self.dtype, backend.device, config.measure_peak)
        self.val_loader = self._loader(job.data.val, 1, shuffle=False) if job.data.val is not None else None
        run_dir = self.save_dir / "runs" / f"{Path(self.name).stem}-{self.run_id}"
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.logger = RunLogger.create(
            run_dir, config, enabled=backend.main, parameters=self.model.num_parameters(), trained=trained
        )
        self.watch = Watchdog(
            config, backend, self.loader, self.dtype == torch.float16, run_dir / "bad_batches.jsonl", self.logger.print
        )
        self._announce(notice)
        self.compiled = compile_model(self.model, config, backend.device, self.total, job.packing)
        if self.compiled:
            self.logger.print("compiling the blocks: the first step takes longer")
        self.wrapped = backend.wrap(self.model, self.optimizers)
        if found:
            self._restore(found)

    def _find(self, states: Path) -> Path | None:
        """The state to continue from. The first rank looks, so that all take the same one."""
        found, failure, rank = None, None, self.backend.rank
        if self.backend.main:
            resume.clean(states, self.folder, self.folder / "best")
            try:
                found = resume.find_state(states, self.config.from_resume, self._identity(), self.job.notes.append)
            except ValueError as error:
                failure = error
        found, said = self.backend.broadcast([str(found or ""), str(failure or "")])
        if said:
            raise failure or UserError(said)
        if found and not Path(found).is_dir():
            raise UserError(f"{found}: rank {rank} does not see it; to resume, all machines have to share --save_dir")
        return Path(found) if found else None

    def _loader(self, data, accumulation_steps: int, shuffle: bool) -> Loader:
        return self.job.loader(
            data,
            packing=self.job.packing,
            batch_size=self.config.batch_size,
            accumulation_steps=accumulation_steps,
            max_seq_len=self.config.max_seq_len,
            rank=self.backend.rank,
            world=self.backend.world,
            seed=self.config.seed,
            shuffle=shuffle,
        )

    def _accumulation(self, state: Path | None) -> int:
        """batch_size x accumulation_steps x processes is what a run means by a step: a continued one keeps the product,
        whatever the number of processes is now."""
        c, world = self.config, self.backend.world
        if state is None:
            return c.accumulation_steps
        examples = resume.read_values(state)["examples"]
        if examples % (c.batch_size * world):
            raise UserError(
                f"--batch_size {c.batch_size} x {world} processes does not divide the {examples} examples of a step "
                f"in {state}"
            )
        return examples // (c.batch_size * world)

    def _announce(self, notice: str) -> None:
        say, model = self.logger.print, self.model
        say(describe(self.job.config))
        active = f" ({model.num_parameters(active=True):,} active)" if model.config.num_experts else ""
        trainable = sum(p.numel() for p in self._trained().values())
        total = model.num_parameters()
        say(f"model: {total:,} parameters{active}, {trainable:,} trained ({trainable / total:.2%})")
        for line in (*self.job.notes, *self.job.data.notes, notice):
            if line:
                say(line)
        dtype = str(self.dtype).removeprefix("torch.")
        ranks = f", {self.backend.world} processes" if self.backend.world > 1 else ""
        say(f"device: {self.backend.device}, {dtype}, {torch.get_num_threads()} threads{ranks}")
        say(f"data: {self.loader.describe()}; {self.total:,} steps in all")
        if self.config.warmup_steps >= max(self.total, 1):
            say(
                f"warning: --warmup_steps {self.config.warmup_steps:g} is not over in {self.total:,} steps: the rate "
                f"stays below {self.config.learning_rate:g}"
            )

    # ---- one run ----

    def run(self) -> Path:
        """Trains to the end -> path of the weights. A signal ends the process once everything is saved."""
        config, logger = self.config, self.logger
        if config.plan:
            plan(self)
        every = lambda interval: bool(interval) and self.step % interval == 0 or self.step == self.total
        logger.start(self.step, self.total)
        self.model.train()
        meter, saved, deferred = self.meter, self.step, set()
        meter.go()
        with catch_signals() as received, explained(config, self.model, self.backend.world):
            for step, batches in self.loader.prefetch(self.step, self.total):
                own = [sum(map(self.job.objective.count, batches)), sum(batch.trained_tokens for batch in batches)]
                units, tokens, stop = self.backend.sum(*own, bool(received))
                if stop:
                    break
                rate = self._set_learning_rate()
                alone = self.compiled and self.backend.world == 1
                with resume.rollback_interrupted_step(self.backend.device, received, alone) as failed:
                    metrics, norm, bad = self._update(batches, units)
                if failed:
                    break
                self.step = step + 1
                self.tokens += int(tokens)
                meter.add(metrics, units, tokens, bad, batches)
                self.watch.record_step(self.step, units, norm, bad)
                intervals = dict(log=config.log_interval, save=config.save_interval, val=config.val_interval)
                due = deferred | {name for name, interval in intervals.items() if every(interval)}
                if "save" in due and not config.val_interval:
                    due.add("val")
                # on an accelerator, looking waits for it
                sound = self.watch.check() if due or self.watch.scaled or self.backend.device.type == "cpu" else True
                # nothing is kept after a bad step: that waits for a good one, or the end
                deferred = set() if sound or self.step == self.total else due - {"log"}
                due -= deferred
                if due:
                    meter.pause()
                if "log" in due:
                    figures = dict(meter.read(self.backend), lr=rate, grad_norm=float(norm), tokens=self.tokens)
                    if "val" in due:
                        figures |= self.validate()
                    self._note(figures)
                    meter.restart()
                elif "val" in due:
                    self._note(self.validate())
                if "save" in due:
                    self.save()
                    saved = self.step
                if due:
                    meter.go()
            if self.step < self.total:
                self._leave(received, saved)
        path = self.folder / self.name
        if path not in self.written:  # continued from its last state: killed before these were on the disk, perhaps
            with self.backend.full_weights():
                self._write(path)
        if self.backend.main:
            for line in self.job.output.finish(path, config, self.job.tokenizer):
                logger.print(line)
        self.backend.barrier()
        best = dict(best_val_loss=self.best) if self.best < float("inf") else {}
        logger.close(dict(steps=self.step, tokens=self.tokens, weights=str(path), **self.losses, **best))
        return path

    def _note(self, figures: dict[str, float]) -> None:
        if figures:
            self.losses |= {k: round(v, 6) for k, v in figures.items() if "loss" in k or "bpb" in k}
            self.logger.log(self.step, **figures)

    def _set_learning_rate(self) -> float:
        c = self.config
        rate = learning_rate(
            self.step,
            self.total,
            peak=c.learning_rate,
            warmup=c.warmup_steps,
            schedule=c.schedule,
            floor=c.min_lr_ratio,
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rate

    def _update(self, batches, units: float):
        """One optimiser step -> (summed metrics of this rank, gradient norm, 1.0 where something was not finite)."""
        sums: dict[str, torch.Tensor] = {}
        for i, batch in enumerate(batches):
            with self.backend.accumulate(self.wrapped, last=i == len(batches) - 1):
                loss, metrics = self.job.objective(self.wrapped, batch.to(self.backend.device))
                self.backend.backward(loss * (self.backend.world / units), self.watch.scale)
                self.watch.record_loss(loss)
            for name, value in metrics.items():
                sums[name] = sums[name] + value if name in sums else value
        norm, bad = self.backend.update(self.config.grad_clip, self.watch.scale, torch.isfinite(sums["loss"]))
        return sums, norm, bad

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Means over the validation data; of tokens also the bits per byte, which any tokenizer can be compared in."""
        if self.val_loader is None:
            return {}
        self.model.eval()
        sums, units, size = {}, 0, 0
        for _, batches in self.val_loader.prefetch(0, self.val_loader.steps_per_epoch):
            for batch in batches:
                _, metrics = self.job.objective(self.model, batch.to(self.backend.device))
                sums = {name: sums.get(name, 0.0) + float(value) for name, value in metrics.items()}
                units += self.job.objective.count(batch)
                targets = batch.targets.numpy()
                size += int(self.job.tokenizer.token_bytes[targets[targets >= 0]].sum())
        self.model.train()
        units, size, *totals = self.backend.sum(units, size, *sums.values())
        means = {f"val_{name}": total / max(units, 1) for name, total in zip(sums, totals)}
        if self.job.objective.per_token:
            means["val_bpb"] = means["val_loss"] * units / math.log(2) / max(size, 1)
        if means["val_loss"] < self.best:
            self.best = means["val_loss"]
            with self.backend.full_weights():
                self._write(self.folder / "best" / self.name)
        return means

    # ---- what stays ----

    def save(self) -> None:
        """The weights, and the state to continue from. All ranks take part; the first one writes."""
        every_rank = dict(random=torch.stack(self.backend.gather(resume.random_state(self.backend.device))))
        every_rank["window"] = self.meter.gather(self.backend)
        optimizer = self.backend.optimizer_tensors()
        with self.backend.full_weights():
            if self.backend.main:
                tensors = dict(weights=self._trained(), optimizer=optimizer, ranks=every_rank)
                resume.refuse_infinite(tensors)
                resume.save_state(self.states, self.step, tensors, self._state(), self.config.keep_last)
            self._write(self.folder / self.name)
        self.logger.draw()
        self.backend.barrier()

    def _write(self, path: Path) -> None:
        """Inside `full_weights`. What another run left under this name is kept once."""
        first, self.written = path not in self.written, self.written | {path}
        if self.backend.main:
            if first and not (self.resumed and resume.is_of(self._lineage(), path)) and (line := keep_previous(path)):
                self.logger.print(line)
            lineage = [*(self.job.parent.lineage if self.job.parent else []), self._lineage()]
            tokenizer = dict(path=_relative(self.job.tokenizer.path), hash=self.job.tokenizer.hash)
            self.job.output.save(path, self.model, tokenizer=tokenizer, lineage=lineage)

    def _trained(self) -> dict[str, torch.Tensor]:
        """What is frozen is not saved: `parent` in the identity says what it has to be."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _lineage(self) -> dict:
        parent = self.job.parent
        return dict(
            stage=self.job.stage,
            data=self.job.data.train.fingerprint,
            rows=len(self.job.data.train),
            parent=parent.hash if parent else None,
            steps=self.step,
            tokens=self.tokens,
            seed=self.config.seed,
            losses=self.losses,
            command=" ".join(sys.argv),
        )

    def _identity(self) -> dict:
        """What has to be the same for a state to belong to this run."""
        return dict(
            architecture=self.model.config.to_dict(),
            data=self.job.data.train.fingerprint,
            tokenizer=self.job.tokenizer.hash,
            parent=self.job.parent.hash if self.job.parent else None,
            **self.job.output.identity,
            **{name: getattr(self.config, name) for name in resume.FIXED},
        )

    def _state(self) -> dict:
        machine = dict(torch=torch.__version__, threads=torch.get_num_threads(), world=self.backend.world)
        machine |= dict(device=self.backend.device.type, dtype=str(self.dtype), compiled=self.compiled)
        return dict(
            step=self.step,
            total=self.total,
            tokens=self.tokens,
            examples=self.loader.examples_per_step,
            best=self.best if self.best < float("inf") else None,
            scale=self.watch.scale,
            losses=self.losses,
            window=list(self.meter.sums),
            identity=self._identity(),
            launch=resume.launch(),
            machine=machine,
            config=self.config.as_dict(),
        )

    def _restore(self, path: Path) -> None:
        tensors, state = resume.read_state(path)
        if state["step"] > self.total:
            raise UserError(
                f"{path}: this run has done {state['step']:,} steps, and --max_steps or --epochs ask for "
                f"{self.total:,}; ask for more, or start afresh without --from_resume"
            )
        self.backend.load(tensors["weights"], tensors["optimizer"])
        random = tensors["ranks"]["random"]
        resume.set_random_state(random[self.backend.rank % len(random)], self.backend.device)
        self.step, self.tokens, self.losses = (state[k] for k in ("step", "tokens", "losses"))
        if self.watch.scaled and state["scale"] > 1:  # of a run in fp16; others have none
            self.watch.scale = state["scale"]
        self.meter.restore(state["window"], tensors["ranks"]["window"], self.backend)
        self.best = float("inf") if state["best"] is None else state["best"]
        say, now = self.logger.print, self._state()
        say(f"resumed after step {self.step:,} of {self.total:,} from {path}; {resume.RULE}")
        for part in ("config", "machine"):
            changed = [f"{k} {v} -> {now[part][k]}" for k, v in state[part].items() if str(now[part].get(k)) != str(v)]
            if changed := [line for line in changed if not line.startswith("from_resume ")]:
                say(
                    f"changed since then: {', '.join(changed)}"
                    + ("; so equal within 1e-5, not bit by bit" if part == "machine" else "")
                )

    def _leave(self, received: list[int], saved: int) -> None:
        """After a signal: save what there is and end with the status the signal stands for."""
        if saved != self.step:
            self.save()
        number = received[0] if received else signal.SIGTERM  # another rank's
        self.logger.print(
            f"stopped by {signal.Signals(number).name} after step {self.step:,}; everything is saved. "
            "Continue with --from_resume auto"
        )
        self.logger.close()
        raise SystemExit(128 + number)


def _relative(path: str) -> str:
    """Below the repository: relative to it, so that the weights can move with their clone."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
