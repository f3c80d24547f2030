"""The training loop. Every stage runs this one.

    job = Job(stage="pretrain", config=config, model=model, objective=NextToken(), tokenizer=tokenizer,
              data=open_data(...), packing=False)
    with start(config) as backend:
        Engine(job, backend).run()

After each step (trainer/loop/step.py) the engine logs, validates and saves what is due. Nothing else in the loop waits
for an accelerator.
"""

from __future__ import annotations

import signal
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from common.console import UserError
from common.files import keep_previous, relative_to_root
from dataset.batches.loader import Batch, Loader
from dataset.tokens.token_cache import FORMAT
from model.checkpoint import weights_name
from model.precision import fast_fp32_training, lower_frozen, pick_dtype
from trainer.inputs import check_start
from trainer.loop.backend import Backend
from trainer.loop.compiling import compile_model
from trainer.loop.health import HealthCheck
from trainer.loop.interrupts import Signals, catch_signals
from trainer.loop.job import Job
from trainer.loop.opening import announce
from trainer.loop.optim import build_optimizers, learning_rate, set_rates
from trainer.loop.periodic import PeriodicTasks
from trainer.loop.profiling import open_profile
from trainer.loop.step import StepResult, optimizer_step
from trainer.loop.validation import NoMemory, validate
from trainer.loop.watchdog import Watchdog
from trainer.run import resume
from trainer.run.logger import RunLogger
from trainer.run.meter import Meter
from trainer.run.plan import STEPS, plan, rehearsal
from trainer.run.reference import facts_of, find_reference
from trainer.run.writer import Writer


class Engine:
    def __init__(self, job: Job, backend: Backend):
        self.job, self.backend = job, backend
        self.config = config = job.config
        self.dtype, notice = pick_dtype(config.dtype, backend.device)
        if backend.device.type == "cpu" and self.dtype == torch.float32:
            fast_fp32_training()
        self.model = job.model.to(backend.device)
        if job.parent:
            job.parent.release()  # the model has its own copy of the tensors
        self.model.compute_dtype = self.dtype
        self.model.recompute = config.activation_checkpointing
        lower_frozen(self.model, self.dtype)
        self.step, self.saved_step, self.tokens, self.best = 0, 0, 0, float("inf")
        self.written: set[Path] = set()
        self.writer, self.received = Writer(background=backend.device.type != "cpu"), Signals()
        self.losses: dict[str, float] = {}  # the newest losses, written into the weights' lineage
        self.name = weights_name(config.save_weight, self.model.config)
        folder = Path(config.save_dir) / job.output.folder
        check_start(config, job.parent, job.output.writes(folder / self.name, config))
        self.health = HealthCheck(config.health_prompts, job.data.train.kind, job.tokenizer, backend.main)
        states = Path(config.save_dir) / "resume" / Path(self.name).stem
        if backend.main and not config.plan:
            resume.clean(states, folder, folder / "best")
        found = self._find(states)
        if found:
            config = resume.with_recipe_of(found, config)
            config = resume.with_batch_of(found, config, backend.world, job.notes.append)
        config = rehearsal(config) if config.plan else config  # only now: what the run refuses, its plan refuses too
        self.config = config = job.config = config.for_width(self.model.config.hidden_size)
        self.save_dir = Path(config.save_dir)
        self.folder = self.save_dir / job.output.folder
        self.resumed = found is not None
        self.optimizers = build_optimizers(self.model, config.optimizer, config.weight_decay)
        self.run_id = found.parent.name if found and resume.is_newest(found) else resume.new_run(states)
        self.states = self.save_dir / "resume" / states.name / self.run_id
        self.loader = self._loader(job.data.train, config.accumulation_steps, shuffle=True)
        self.total = config.max_steps or config.epochs * self.loader.steps_per_epoch
        if found:
            resume.check_steps(found, self.total)
        self.meter = Meter(self.model, self.dtype, backend.device, config.measure_peak)
        self.val_loader = self._loader(job.data.val, 1, shuffle=False) if job.data.val is not None else None
        self.prepare_seconds = self._prepare()
        self._open_logs(self.save_dir / "runs" / f"{Path(self.name).stem}-{self.run_id}")
        announce(self, notice)
        self.compiled = compile_model(self.model, config, backend.device, self.loader, self.total)
        if self.compiled:
            self.logger.print("compiling the blocks: the first step takes longer")
        self.wrapped = backend.wrap(self.model, self.optimizers)
        if found and not config.plan:
            self._restore(found)

    def _find(self, states: Path) -> Path | None:
        """The state to continue from, or None. Rank 0 looks for it, so that all ranks take the same one."""
        found, failure, rank = None, None, self.backend.rank
        if self.backend.main:
            try:
                found = resume.find_state(states, self.config.from_resume, self._wanted(), self.job.notes.append)
            except ValueError as error:
                failure = error
        found, message = self.backend.broadcast([str(found or ""), str(failure or "")])
        if message:
            raise failure or UserError(message)
        if found and not Path(found).is_dir():
            raise UserError(f"{found}: rank {rank} does not see it; to resume, all machines have to share --save_dir")
        return Path(found) if found else None

    def _open_logs(self, folder: Path) -> None:
        """Whoever writes into the folder of the run."""
        config, main, device = self.config, self.backend.main, self.backend.device
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        entries = dict(parameters=self.model.num_parameters(), trained=trained, facts=facts_of(self))
        reference = find_reference(config.reference_curve, entries["facts"])
        self.logger = RunLogger.create(folder, config, main, reference, **entries)
        say, scaled = self.logger.print, self.dtype == torch.float16
        source, reports = self.job.data.train.source, folder / "bad_batches.jsonl"
        self.watch = Watchdog(config, self.backend, source, scaled, reports, say)
        self.profile = open_profile(config.profile and main, folder, device, say)

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
            device=None if self.job.rollout else self.backend.device,  # a rollout makes other batches of them
        )

    def _prepare(self) -> float:
        """Lets the stage compute what it needs before training -> the seconds this takes for the whole run. A plan
        prepares the steps that it makes itself; the seconds of the others are estimated."""
        if self.job.prepare is None:
            return 0.0
        needed = [(self.loader, min(self.total, self.loader.steps_per_epoch))]
        if self.val_loader is not None:
            needed.append((self.val_loader, self.val_loader.steps_per_epoch))
        now = [(loader, min(steps, STEPS)) for loader, steps in needed] if self.config.plan else needed
        begin = time.perf_counter()
        self.job.notes.append(self.job.prepare(now))
        return (time.perf_counter() - begin) * sum(steps for _, steps in needed) / sum(steps for _, steps in now)

    # ---- one run ----

    def run(self) -> Path:
        """Trains to the end -> path of the weights. A signal ends the process once everything is saved."""
        config = self.config
        if config.plan:
            plan(self)
        tasks, self.saved_step = PeriodicTasks(config, self.total), self.step
        self.logger.start(self.step, self.total)
        self.model.train()
        self.meter.go()
        with catch_signals() as received:
            self.received = received
            steps = self.loader.prefetch(self.step, self.total)
            for _, batches in self.profile.steps(steps, self.total - self.step):
                # agreed on before a rollout draws random numbers: a step that has begun is finished
                stop, time_to_save = self.backend.sum(bool(received), self.backend.main and tasks.time_to_save())
                if stop:
                    break
                rate = self._set_learning_rate()
                with resume.rollback_interrupted_step(self.backend.device, received, self._may_roll_back()) as failed:
                    result = self.train_step(batches)
                if failed:
                    break
                self.profile.part("logging, validating, saving")
                self._record(result)
                self.writer.check()
                due = tasks.due(self.step, bool(time_to_save))
                due = tasks.defer_if_bad(due, self.step, sound=self._is_sound(due))
                if due:
                    self._perform(due, rate, result.norm)
                if "save" in due:
                    tasks.saved()
            if self.step < self.total:
                self._leave(received)
        return self._finish()

    def train_step(self, batches: list[Batch]) -> StepResult:
        """One update from this rank's micro-batches, or from what the stage's rollout makes of them."""
        if self.job.rollout:
            self.profile.part("rollout")
            batches = self.job.rollout(self.model, batches, self.step)
        clip, scale, part = self.config.grad_clip, self.watch.scale, self.profile.part
        return optimizer_step(
            self.wrapped, batches, self.job.objective, self.backend, grad_clip=clip, loss_scale=scale, part=part
        )

    def _may_roll_back(self) -> bool:
        """Whether a Ctrl-C can make a step fail: the terminal also sends it to the processes that we have started, a
        compiler or those of a rollout. Of several ranks, one cannot take a step back alone."""
        return self.backend.world == 1 and (self.compiled or self.job.rollout is not None)

    def _record(self, result: StepResult) -> None:
        self.step += 1
        self.logger.advance(self.step)
        self.tokens += result.tokens
        self.meter.add(result.metrics, result.units, result.tokens, result.bad, result.batches)
        self.watch.record(self.step, result)

    def _is_sound(self, due: set[str]) -> bool:
        """Whether the last step was finite. On an accelerator the answer waits for it, so it is asked for only when
        something is due, or when the loss scale depends on it."""
        if due or self.watch.scaled or self.backend.device.type == "cpu":
            return self.watch.check()
        return True

    def _perform(self, due: set[str], rate: float, norm: Tensor) -> None:
        """Logs, validates and saves; the meter's clock stands still meanwhile."""
        self.meter.pause()
        figures = {}
        if "log" in due:
            figures = dict(self.meter.read(self.backend), lr=rate, grad_norm=float(norm), tokens=self.tokens)
        if "validate" in due:
            try:
                figures |= self.validate()
            except NoMemory:  # on all ranks; what is due is not lost
                if "save" in due:
                    self.save()
                    self.writer.wait()
                raise
        if figures:
            self.losses |= {k: round(v, 6) for k, v in figures.items() if "loss" in k or "bpb" in k}
            self.logger.log(self.step, **figures)
        if "log" in due:
            self.meter.restart()
        if "save" in due:
            self.save()
        self.meter.go()

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
        set_rates(self.optimizers, rate)
        return rate

    def _leave(self, received: list[int]) -> NoReturn:
        """After a signal: saves what there is, and ends with the status that the signal stands for."""
        if self.saved_step != self.step:
            self.save()
        self.writer.wait()  # until rank 0 has written everything
        self.backend.barrier()
        number = received[0] if received else signal.SIGTERM  # another rank received it
        self.logger.print(
            f"stopped by {signal.Signals(number).name} after step {self.step:,}; everything is saved. "
            "Continue with --from_resume auto"
        )
        self.logger.close()
        raise SystemExit(128 + number)

    def _finish(self) -> Path:
        path = self.folder / self.name
        self.writer.wait()
        if path not in self.written:  # continued from the state of its last step: killed before it wrote the weights
            with self.backend.full_weights():
                self._write(path)
            self.writer.wait()
        if self.backend.main:
            if self.config.keep_last is None:
                resume.keep_newest(self.states, 1)
            for line in self.job.output.finish(path, self.config, self.job.tokenizer):
                self.logger.print(line)
        self.backend.barrier()
        best = dict(best_val_loss=self.best) if self.best < float("inf") else {}
        self.logger.close(dict(steps=self.step, tokens=self.tokens, weights=str(path), **self.losses, **best))
        return path

    def validate(self) -> dict[str, float]:
        """Means over the validation data, if there is any; keeps the weights whose loss is the best so far. And the
        health of what the model says, if there are prompts for it. {} if it was broken off by a signal."""
        if self.val_loader is None:
            return self.health(self.model)
        bytes_of = self.job.tokenizer.token_bytes
        means = validate(self.model, self.val_loader, self.job.objective, self.backend, bytes_of, self.received)
        if means and means["val_loss"] < self.best:
            self.best = means["val_loss"]
            with self.backend.full_weights():
                self._write(self.folder / "best" / self.name)
        return means and means | self.health(self.model)

    # ---- what a run leaves ----

    def save(self) -> None:
        """Writes the weights and a resume state. All ranks take part; rank 0 writes."""
        every_rank = dict(random=torch.stack(self.backend.gather(resume.random_state(self.backend.device))))
        every_rank["window"] = self.meter.gather(self.backend)
        optimizer = self.backend.optimizer_tensors()
        with self.backend.full_weights():
            if self.backend.main:
                tensors = dict(weights=self._trained(), optimizer=optimizer, ranks=every_rank)
                tensors = {name: self.writer.keep(content) for name, content in tensors.items()}
                last = resume.KEPT if self.config.keep_last is None else self.config.keep_last
                self.writer.write(partial(resume.save_sound, self.states, self.step, tensors, self._state(), last))
            self._write(self.folder / self.name)
        self.writer.write(self.logger.draw)
        self.backend.barrier()
        self.saved_step = self.step

    def _write(self, path: Path) -> None:
        """Writes the weights; only inside `full_weights`. A file that another run left there is kept as a backup."""
        first, self.written = path not in self.written, self.written | {path}
        if self.backend.main:
            replaces = first and not (self.resumed and resume.is_of(self._lineage(), path))
            if replaces and (line := keep_previous(path, every=self.job.output.keeps_all)):
                self.logger.print(line)
            lineage = [*(self.job.parent.lineage if self.job.parent else []), self._lineage()]
            tokenizer = dict(path=relative_to_root(self.job.tokenizer.path), hash=self.job.tokenizer.hash)
            self.job.output.save(path, self.model, tokenizer=tokenizer, lineage=lineage, write=self.writer.write_plain)

    def _trained(self) -> dict[str, torch.Tensor]:
        """Trained parameters by name. Frozen ones are not saved: `parent` in the identity says which they are."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _lineage(self) -> dict:
        return dict(
            **self.job.origin(),
            steps=self.step,
            total=self.total,
            tokens=self.tokens,
            losses=self.losses,
            processes=self.backend.world,
        )

    def _identity(self) -> dict:
        """A state belongs to this run if it has the same identity."""
        return dict(
            stage=self.job.stage,
            architecture=self.model.config.to_dict(),
            data=self.job.data.train.fingerprint,
            token_format=FORMAT,  # part of the fingerprint too; here so that it is said what about the data is another
            tokenizer=self.job.tokenizer.hash,
            parent=self.job.parent.hash if self.job.parent else None,
            **self.job.output.identity,
            **{name: getattr(self.config, name) for name in resume.FIXED},
        )

    def _wanted(self) -> dict:
        """The identity of a state to continue from: of any optimiser, if the recipe of the state has to say which."""
        identity = self._identity()
        if {"recipe", "optimizer"} <= set(self.config.by_recipe):
            del identity["optimizer"]
        return identity

    def _state(self) -> dict:
        machine = dict(torch=torch.__version__, threads=torch.get_num_threads(), world=self.backend.world)
        machine |= dict(device=self.backend.device.type, dtype=str(self.dtype), compiled=self.compiled)
        return dict(
            step=self.step,
            total=self.total,
            tokens=self.tokens,
            examples=self.loader.examples_per_step,
            best=self.best if self.best < float("inf") else None,
            val_data=self.job.data.val.fingerprint if self.job.data.val is not None else None,
            **self.watch.state(),
            losses=self.losses,
            window=list(self.meter.sums),
            identity=self._identity(),
            launch=resume.launch(),
            machine=machine,
            config=self.config.as_dict(),
        )

    def _restore(self, path: Path) -> None:
        """Continues from a state, and prints which options and what about the machine differ from then."""
        tensors, state = resume.read_state(path)
        self.backend.load(tensors["weights"], tensors["optimizer"])
        random = tensors["ranks"]["random"]
        resume.set_random_state(random[self.backend.rank % len(random)], self.backend.device)
        self.step, self.tokens, self.losses = (state[k] for k in ("step", "tokens", "losses"))
        self.watch.restore(state)
        self.meter.restore(state["window"], tensors["ranks"]["window"], self.backend)
        say, now = self.logger.print, self._state()
        if state["best"] is not None and state.get("val_data", now["val_data"]) == now["val_data"]:
            self.best = state["best"]
        elif state["best"] is not None and now["val_data"]:
            say("the validation data is another: the best loss starts anew")
        say(f"resumed after step {self.step:,} of {self.total:,} from {path}; {resume.way_on(self.step, self.total)}")
        for line in resume.changes(state, now):
            say(line)
