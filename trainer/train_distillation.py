"""Distillation: a model learns what a larger one of the same tokenizer would say. Writes
out/full_dist_<hidden>[_moe].pth.

    python trainer/train_distillation.py --teacher out/full_sft_768.pth --hidden_size 512  # full_sft_512.pth learns
    python trainer/train_distillation.py --teacher full_sft --preset nano                   # a fresh student learns
    python trainer/train_distillation.py --teacher full_sft --write_logprobs teacher.lp     # the teacher is asked once,
    python trainer/train_distillation.py --teacher_logprobs teacher.lp --preset nano        # and no longer in memory

Data: chats, as in full fine-tuning. What the losses are: docs/reasoning_and_distillation.md.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass

from common.console import run, say
from common.options import option, parse
from trainer.stage import StageConfig


@dataclass(frozen=True)
class DistillationConfig(StageConfig):
    """Options of distillation"""

    save_weight: str = "full_dist"
    epochs: int = 6
    teacher: str | None = option(None, "weights of the teacher: a name in save_dir or out/, a file, a directory")
    distill_loss: str = option("forward_kl", "distance to the teacher", choices=("forward_kl", "reverse_kl", "js"))
    temperature: float = option(2.0, "flattens both distributions", within="[0.01, 100]")
    alpha: float = option(0.5, "share of the cross-entropy, the teacher has the rest", within="[0, 1]")
    write_logprobs: str | None = option(None, "ask the teacher about all the data, write it there, and stop", path=True)
    top_k: int = option(32, "ids of each token written there", within="[1, inf)")
    teacher_logprobs: str | None = option(None, "such a file, in place of a teacher", path=True)

    def problems(self) -> list[str]:
        found = super().problems()
        if bool(self.teacher) == bool(self.teacher_logprobs):
            found.append("--teacher or --teacher_logprobs: give one of them, weights or a file written from them")
        if self.write_logprobs and not self.teacher:
            found.append(f"--write_logprobs {self.write_logprobs}: needs a --teacher")
        if self.write_logprobs and self.val_fraction:
            found.append("--write_logprobs: asks about all rows; --val_fraction is for training from the file")
        if self.top_k != type(self).top_k and not self.write_logprobs:
            found.append("--top_k: only --write_logprobs takes it; from a file, all ids in it count")
        if self.write_logprobs and self.plan:
            found.append("--write_logprobs: does not train, and --plan is about training; leave one of them out")
        if self.teacher_logprobs and self.val_path:
            found.append("--val_path and --teacher_logprobs: the file knows training rows only; take --val_fraction")
        return found


def main():
    config = parse(DistillationConfig, description=__doc__)

    from dataset.tokens.teacher import TaughtDataset
    from model.checkpoint import same_weights
    from model.precision import pick_dtype
    from trainer.inputs import open_data, open_parent
    from trainer.loop.processes import start
    from trainer.losses.distillation import Distill, Teacher, open_logprobs, open_teacher, write_logprobs
    from trainer.run_stage import start_stage

    weights, tokenizer = open_teacher(config) if config.teacher else (None, None)
    header = open_logprobs(config) if config.teacher_logprobs else None
    options = dict(on_long=config.on_long, header=header)
    if config.write_logprobs:
        if config.from_weight:  # ids are the teacher's, the chat template is the student's
            _, tokenizer, _ = open_parent(config, config.from_weight, tokenizer)
        data = open_data(TaughtDataset, config, "sft", tokenizer, **options)
        with start(config) as backend:
            teacher = Teacher(weights, pick_dtype(config.dtype, backend.device)[0], backend.device)
            say(write_logprobs(config, data, tokenizer, teacher, backend))
        return
    student = None if config.preset else "full_sft"  # with --preset, a fresh one
    with start_stage(
        "distillation", config, TaughtDataset, kind="sft", weights=student, tokenizer=tokenizer, **options
    ) as stage:
        device = stage.backend.device
        teacher = Teacher(weights, pick_dtype(config.dtype, device)[0], device) if weights else None
        teacher_hash = teacher.hash if teacher else header["teacher"]
        if stage.parent and same_weights(teacher_hash, stage.parent.hash):
            stage.notes.append(
                "warning: the student starts as the teacher itself, so there is little to learn; --preset makes "
                "a fresh student, --from_weight names another"
            )
        stage.output.identity["teacher"] = teacher_hash
        stage.notes.append(f"teacher: {teacher or header['about']}")
        stage.train(Distill(config.distill_loss, config.temperature, config.alpha, stage.tokenizer.vocab_size, teacher))


if __name__ == "__main__":
    run(main)
