"""The options of every training stage.

A stage states what differs; everything else, help and aliases included, is inherited:

    @dataclass(frozen=True)
    class SFTConfig(StageConfig):
        epochs: int = 2                                                              # only another default
        noise: float = option(0.0, "noise on the embeddings", within="[0, inf)")     # an option of its own

    def main():
        config = parse(SFTConfig, description=__doc__)      # python trainer/train_full_sft.py --epochs 3

    if __name__ == "__main__":
        run(main)

Neither this file nor common/options.py imports anything heavier than argparse, so that `--help` is instant. What comes
after the options is in trainer/run_stage.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from common.console import UserError
from common.files import ROOT
from common.options import Options, option
from common.values import EPOCHS, LONGEST, SEEDS, STEPS
from model.config import PRESETS
from trainer.loop import launch
from trainer.recipes import HELP, RECIPES, default_recipe, rate_for_width, recipe_options
from trainer.run.reference import read_curve
from trainer.translated import TRANSLATED


@dataclass(frozen=True)
class LoRAOptions(Options):
    """Options of LoRA, which any stage can train with"""

    use_lora: bool | None = option(None, "freeze the weights and train an adapter beside them; --lora_rank implies it")
    lora_name: str | None = option(None, "name of the adapter (default: that of --save_weight)")
    lora_rank: int | None = option(
        None,
        "inner size of the adapter's matrices (default: 8; 0: no adapter)",
        aliases=("lora_r", "r"),
        within="[0, inf)",
    )
    lora_alpha: float = option(16.0, "what an adapter adds is multiplied by alpha / rank", within="(0, inf)")
    lora_dropout: float = option(0.0, "share of an adapter's inputs left out at random", within="[0, 1)")
    lora_targets: tuple[str, ...] = option(
        ("all",),
        "layers that get an adapter: all, attention, mlp, or names such as q_proj,v_proj",
        aliases=("target_modules", "lora_target"),
    )
    use_rslora: bool = option(False, "multiply by alpha / sqrt(rank) instead, for high ranks")
    save_peft: bool = option(False, "write the adapter as a directory for peft as well")
    merge_lora: bool = option(False, "write the full weights with the adapter in them as well: <name>_merged")
    load_in_4bit: bool = option(
        False, "keep the frozen weights in 4 bits: a third to a half of the memory of bf16", aliases=("use_4bit",)
    )
    load_in_8bit: bool = option(
        False, "the same in 8 bits: a half to two thirds of the memory of bf16", aliases=("use_8bit",)
    )

    def __post_init__(self):
        if self.use_lora and self.lora_rank is None:
            object.__setattr__(self, "lora_rank", 8)

    @property
    def trains_adapter(self) -> bool:
        return bool(self.lora_rank) if self.use_lora is None else self.use_lora

    @property
    def bits(self) -> int | None:
        """Of the frozen weights; None: they are dense."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    def problems(self) -> list[str]:
        found = super().problems()
        if self.use_lora and self.lora_rank == 0:
            found.append("--use_lora and --lora_rank 0: an adapter has a rank of at least 1")
        elif self.use_lora is None and not self.lora_rank:  # `use_lora: false` in a file makes the others idle
            names = ("lora_name", "lora_alpha", "lora_dropout", "lora_targets", "use_rslora", "save_peft", "merge_lora")
            changed = [f"--{name}" for name in names if getattr(self, name) != getattr(LoRAOptions, name)]
            if changed:
                found.append(f"{', '.join(changed)}: all weights are trained; for an adapter give --use_lora as well")
        if self.load_in_4bit and self.load_in_8bit:
            found.append("--load_in_4bit and --load_in_8bit: weights are kept in one of them; give one")
        elif self.bits and not self.trains_adapter:
            found.append(
                f"--load_in_{self.bits}bit: weights of {self.bits} bits cannot be trained, only an adapter beside "
                "them; add --use_lora, or leave it out"
            )
        return found


@dataclass(frozen=True)
class StageConfig(LoRAOptions):
    """Options of every training stage"""

    translated: ClassVar[dict[str, Callable[[Any], dict[str, Any]]]] = TRANSLATED
    needless: ClassVar[dict[str, str]] = {
        "ddp": "torchrun says so by itself",
        "logging_dir": "logs are in runs/ below --save_dir",
        "logging_strategy": "logging follows --log_interval",
        "overwrite_output_dir": "what a run replaces is kept beside it as .previous",
        "remove_unused_columns": "columns that are not read are named and left alone",
        "dataloader_pin_memory": "there are no loader processes",
        "per_device_eval_batch_size": "validation takes --batch_size",
        "evaluation_strategy": "validation comes with every save, or as --val_interval says",
        "eval_strategy": "validation comes with every save, or as --val_interval says",
        "save_strategy": "saving follows --save_interval",
    }

    # recipe -> peak learning rate: the recipes that the stage can use, its default first
    rates: ClassVar[dict[str, float]] = {"classic": 5e-4}

    # model and data
    from_weight: str | None = option(
        None,
        "weights to start from: a name in save_dir or out/, a file, a Hugging Face directory",
        aliases=("model_path", "model_name_or_path", "base_model_path", "base_model"),
    )
    tokenizer_path: str | None = option(None, "directory with a tokenizer.json (default: the weights' own)", path=True)
    resize_vocab: bool = option(
        False, "add rows to the weights' embedding for the tokens that --tokenizer_path has beyond their own"
    )
    preset: str | None = option(None, "size of the model", choices=tuple(PRESETS))
    hidden_size: int | None = option(None, "width; after pretraining it only picks among weights", within="[1, inf)")
    num_hidden_layers: int | None = option(None, "depth; as hidden_size", within="[1, inf)")
    use_moe: bool | None = option(None, "mixture of experts; as hidden_size")
    data_path: tuple[str, ...] = option(
        (),
        "training files; FILE:3 repeats its rows three times, FILE:0.1 takes a tenth",
        path=True,
        aliases=("data_file", "train_path", "train_file", "task_data"),
    )
    val_path: tuple[str, ...] = option((), "validation files", path=True, aliases=("eval_data", "validation_file"))
    data_mapping: str | None = option(None, "YAML file that says which columns of your files stand for ours", path=True)
    val_fraction: float = option(0.0, "share of the training rows kept for validation", within="[0, 1)")
    max_seq_len: int = option(512, "tokens in a row", aliases=("max_length", "cutoff_len"), within=f"[2, {LONGEST}]")
    data_limit: int = option(0, "use only the first N rows (0: all)", aliases=("max_samples",), within="[0, inf)")
    on_bad_row: str = option("error", "a row that cannot be read", choices=("error", "skip"))
    max_bad_rows: float = option(0.01, "share of the rows that skip may leave out", within="[0, 1]")
    max_empty_rows: float = option(0.05, "share of the rows that may have nothing to train on", within="[0, 1]")
    on_long: str = option("truncate", "a sample that is too long", choices=("truncate", "drop"))
    show_labels: int = option(0, "print the first N rows, trained tokens coloured", within="[0, inf)")
    num_workers: int = option(
        0,
        "processes that tokenise (0: one per core)",
        aliases=("dataloader_num_workers", "preprocessing_num_workers"),
        within="[0, inf)",
    )
    cache_dir: str | None = option(None, "where token caches go (default: beside the data)", path=True)
    # optimisation
    epochs: int = option(1, "passes over the data", aliases=("num_epochs", "num_train_epochs"), within=EPOCHS)
    max_steps: int = option(0, "stop after N optimiser steps (0: by epochs)", within=STEPS)
    batch_size: int = option(
        32, "examples at once on each device", aliases=("per_device_train_batch_size",), within="[1, inf)"
    )
    accumulation_steps: int = option(
        1, "batches summed into one optimiser step", within="[1, inf)", aliases=("gradient_accumulation_steps",)
    )
    recipe: str | None = option(None, HELP, choices=tuple(RECIPES))
    learning_rate: float | None = option(None, "peak learning rate (default: the recipe's)", within="(0, inf)")
    optimizer: str | None = option(None, "update rule (default: the recipe's)", choices=("adamw", "muon"))
    weight_decay: float = option(0.1, "decay of the matrices", within="[0, inf)")
    schedule: str | None = option(
        None,
        "learning rate after the warm-up (default: the recipe's)",
        choices=("cosine", "wsd", "constant"),
        aliases=("lr_scheduler_type",),
    )
    warmup_steps: float = option(
        0.03, "steps of warm-up; below 1: share of the run", aliases=("warmup_iters",), within="[0, inf)"
    )
    min_lr_ratio: float = option(0.1, "last learning rate / peak", within="[0, 1]")
    grad_clip: float = option(1.0, "largest gradient norm (0: no limit)", aliases=("max_grad_norm",), within="[0, inf)")
    # steps that go wrong
    on_nan: str = option(
        "stop", "a loss or gradient that is not finite: end, or leave the step out", choices=("stop", "skip")
    )
    max_bad_steps: int = option(10, "with --on_nan skip: end after more than N of them in a row", within="[0, inf)")
    spike_sigma: float = option(
        6.0, "report a loss of X standard deviations above the last 100 (0: never)", within="[0, inf)"
    )
    # saving and logs
    save_dir: str = option(str(ROOT / "out"), "where everything is written", aliases=("out_dir",), path=True)
    output_dir: str | None = option(
        None, "as save_dir, and the result in Hugging Face's layout beside it: final_model/ or lora_model/", path=True
    )
    save_weight: str = option("", "name of the file of weights, or of the adapter")
    save_interval: int | None = option(
        None,
        "save every N steps (0: at the end only; default: 500, but not within 10 minutes of the last save)",
        aliases=("save_steps",),
        within="[0, inf)",
    )
    save_minutes: float | None = option(None, "save every X minutes", within="(0, inf)")
    keep_last: int | None = option(
        None,
        "checkpoints kept to resume from (default: 2, and 1 once the run is finished)",
        within="[1, inf)",
        aliases=("save_total_limit",),
    )
    from_resume: str = option(
        "0",
        "continue an interrupted run: auto or 1 (the newest that fits), or its path; 0: a new run",
        aliases=("resume_from_checkpoint",),
        switch=("1", "0"),
    )
    val_limit: int = option(
        0, "validate on N of the validation rows (0: all)", within="[0, inf)", aliases=("max_eval_samples",)
    )
    val_interval: int = option(
        0, "validate every N steps (0: at every save)", within="[0, inf)", aliases=("eval_steps",)
    )
    health_prompts: str | None = option(
        None, "prompts to answer at each validation, for figures that a loss hides (any layout)", path=True
    )
    log_interval: int = option(10, "log every N steps", aliases=("logging_steps",), within="[1, inf)")
    reference_curve: str | None = option(
        None,
        "curve of other runs to compare with, from reference_curve.py (default: ours, if there is one of such runs)",
        path=True,
    )
    use_wandb: bool = option(False, "log to Weights & Biases as well (WANDB_MODE=offline: on this disk)")
    use_swanlab: bool = option(False, "log to SwanLab as well")
    wandb_project: str = option("sparrow", "the project in wandb or SwanLab", aliases=("swanlab_project",))
    wandb_run_name: str | None = option(None, "the run's name there", aliases=("run_name",))
    use_tensorboard: bool = option(False, "write TensorBoard files into the run's directory as well")
    measure_peak: bool = option(False, "measure what the device can do, and log the share of it that is used (MFU)")
    price_per_hour: float = option(0.0, "what an hour of the machine costs, for the cost of the run", within="[0, inf)")
    plan: bool = option(False, "run ten steps, say what the whole run would take, and save nothing")
    profile: bool = option(False, "print where the time of a step goes, and write a trace of two into the run's folder")
    # machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, npu")
    dtype: str = option(
        "auto",
        "compute precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        aliases=("bf16=bfloat16|float32", "fp16=float16|float32", "torch_dtype"),
    )
    compile: str = option(
        "auto", "torch.compile", choices=("auto", "on", "off"), switch=("on", "off"), aliases=("use_compile",)
    )
    activation_checkpointing: bool = option(
        False, "compute each block twice instead of keeping what is inside it", aliases=("gradient_checkpointing",)
    )
    backend: str = option("auto", "auto: what the launcher is for", choices=("auto", "ddp", "deepspeed"))
    zero_stage: int | None = option(
        None, "DeepSpeed shards moments (1), gradients too (2), weights too (3); default 2", within="[0, 3]"
    )
    zero_offload: str = option(
        "none", "what DeepSpeed keeps in main memory", choices=("none", "optimizer", "parameters")
    )
    deepspeed_config: str | None = option(None, "a DeepSpeed file with more", path=True, aliases=("deepspeed",))
    ddp_timeout: float = option(
        1800, "seconds after which a process that does not answer is given up", within="(0, 1000000000]"
    )
    seed: int = option(42, "seed of everything random", within=SEEDS)
    local_rank: int = option(-1, argparse.SUPPRESS)  # the deepspeed launcher appends --local_rank=N
    by_recipe: tuple[str, ...] = option((), argparse.SUPPRESS)  # options that the user left open

    def __post_init__(self):
        super().__post_init__()
        named = self.lora_name and self.trains_adapter
        if named and self.save_weight == type(self).save_weight:
            object.__setattr__(self, "save_weight", self.lora_name)
        if self.output_dir and self.save_dir == StageConfig.save_dir:
            object.__setattr__(self, "save_dir", self.output_dir)
        self._take_recipe()

    def _take_recipe(self) -> None:
        recipe = self.recipe or default_recipe(self)
        left_open = dict.fromkeys(self.by_recipe)  # an ordered set
        values = recipe_options(recipe, self.rates) if recipe in self.rates else {}
        for name, value in dict(recipe=recipe, **values).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
                left_open[name] = None
        object.__setattr__(self, "by_recipe", tuple(left_open))

    def with_recipe(self, recipe: str) -> StageConfig:
        """The same with another recipe, if the user has not named one. What the user has given stays."""
        if "recipe" not in self.by_recipe:
            return self
        return replace(self, **dict.fromkeys(self.by_recipe) | dict(recipe=recipe))

    def for_width(self, hidden_size: int) -> StageConfig:
        """The same with the recipe's learning rate for models of this width; a rate that the user has given stays."""
        if self.recipe != "modern" or "learning_rate" not in self.by_recipe:
            return self
        return replace(self, learning_rate=rate_for_width(self.rates["modern"], hidden_size))

    def with_launcher_settings(self) -> StageConfig:
        config = launch.with_launcher_settings(self)
        return config.with_recipe(default_recipe(config))

    def problems(self) -> list[str]:
        found = super().problems()
        if self.recipe in RECIPES and self.recipe not in self.rates:
            found.append(f"--recipe {self.recipe}: this stage has only {', '.join(self.rates)}; leave it out")
        found += [] if found else launch.problems(self)
        if self.resize_vocab and not self.tokenizer_path:
            found.append("--resize_vocab: for which tokenizer? --tokenizer_path names the larger one")
        if self.resize_vocab and self.trains_adapter:
            found.append("--resize_vocab: an adapter leaves the embedding as it is, so new tokens would learn nothing")
        if self.reference_curve:
            try:
                read_curve(Path(self.reference_curve))
            except UserError as error:
                found.append(f"--reference_curve: {error}")
        if self.health_prompts and self.zero_stage == 3:
            found.append(
                "--health_prompts: with --zero_stage 3 no process has the whole model; use stage 2 or leave it"
            )
        if self.output_dir and self.output_dir != self.save_dir:
            found.append("--save_dir and --output_dir: both say where results go; give one of them")
        if self.val_path and self.val_fraction:
            found.append("--val_path and --val_fraction: both name the validation data; give one of them")
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            found.append(f"--warmup_steps {self.warmup_steps:g}: a whole number of steps, or a share below 1")
        if self.trains_adapter and self.lora_name not in (None, self.save_weight):
            found.append("--save_weight and --lora_name: both name what is written; give one of them")
        if not self.save_weight or Path(self.save_weight).name != self.save_weight:
            name = "--lora_name" if self.lora_name else "--save_weight"
            found.append(f"{name} '{self.save_weight}': a plain name; --save_dir says where it is written")
        return found
