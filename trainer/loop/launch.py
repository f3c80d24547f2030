"""Translates what a launcher has set into our options, and merges a DeepSpeed file with them.

    torchrun            sets WORLD_SIZE and the like: nothing to translate
    deepspeed           appends --local_rank=N, or sets CROSS_SIZE: --backend deepspeed
    accelerate launch   sets ACCELERATE_*: precision and DeepSpeed settings; what we do not support is an error

Where a key of the DeepSpeed file means the same as one of our options, it has to have the same value, or "auto".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from common.console import UserError
from common.options import Options

PRECISION = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}  # accelerate's names
UNSUPPORTED = {  # variable of accelerate -> (what was chosen, what to choose instead)
    "ACCELERATE_USE_FSDP": (
        "FSDP",
        "DeepSpeed's ZeRO-3 shards the same (accelerate launch --use_deepspeed, or "
        "deepspeed --num_gpus N ... --zero_stage 3)",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "choose DeepSpeed or plain multi-GPU"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism config", "choose DeepSpeed or plain multi-GPU"),
}
AUTO = "auto"


def with_launcher_settings(config: Options) -> Options:
    """The options, with what the launcher chose wherever they say `auto`."""
    stated: dict[str, Any] = {}
    env, elastic = os.environ, "TORCHELASTIC_RUN_ID" in os.environ
    by_accelerate = env.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if config.backend == AUTO:
        launched = (config.local_rank >= 0 or "CROSS_SIZE" in env) and not elastic
        asked = config.deepspeed_config or config.zero_stage is not None or config.zero_offload != "none"
        stated["backend"] = "deepspeed" if launched or by_accelerate or asked else AUTO
    if by_accelerate:
        stated |= _accelerate_settings(config)
    precision = env.get("ACCELERATE_MIXED_PRECISION")
    if config.dtype == AUTO and precision in PRECISION:
        stated["dtype"] = PRECISION[precision]
    config = replace(config, **stated)
    if config.backend != "deepspeed":
        return config
    file = _read(config)
    if config.zero_stage is None:
        stage = _get(file, "zero_optimization.stage")
        config = replace(config, zero_stage=2 if stage in (None, AUTO) else stage)
    if config.dtype == AUTO and _get(file, "bf16.enabled") is True:
        config = replace(config, dtype="bfloat16")
    if config.zero_stage == 3 and config.compile == AUTO:
        config = replace(config, compile="off")  # weights are gathered and freed between the blocks' graphs
    return config


def _accelerate_settings(config: Options) -> dict[str, Any]:
    """DeepSpeed settings of accelerate, for the options that the user has not given."""
    env = os.environ
    stated: dict[str, Any] = {}
    if config.zero_stage is None and env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "").isdigit():
        stated["zero_stage"] = int(env["ACCELERATE_DEEPSPEED_ZERO_STAGE"])
    if not config.deepspeed_config and env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "None") != "None":
        stated["deepspeed_config"] = env["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
        stated.pop("zero_stage", None)  # the file says it
    device = "ACCELERATE_DEEPSPEED_OFFLOAD_{}_DEVICE".format
    on_cpu = [kind for kind in ("OPTIMIZER", "PARAM") if env.get(device(kind)) == "cpu"]
    if config.zero_offload == "none" and on_cpu:
        stated["zero_offload"] = "parameters" if "PARAM" in on_cpu else "optimizer"
    return stated


def problems(config: Options) -> Iterator[str]:
    """Messages about what launcher, flags and DeepSpeed file ask for and cannot have."""
    for variable, (name, instead) in UNSUPPORTED.items():
        if os.environ.get(variable) == "true":
            yield f"accelerate launch: {name} is not supported; {instead}"
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in PRECISION:
        yield f"accelerate launch: --mixed_precision {precision} is not supported; choose no, fp16 or bf16"
    if config.backend != "deepspeed":
        for flag in ("deepspeed_config", "zero_stage"):
            if getattr(config, flag) not in (None, ""):
                yield f"--{flag} {getattr(config, flag)}: is for --backend deepspeed, not {config.backend}"
        return
    if config.optimizer != "adamw":
        yield (
            f"--optimizer {config.optimizer}: needs whole matrices, and DeepSpeed shards them; "
            "use --optimizer adamw, or start with torchrun"
        )
    if config.zero_stage == 3 and config.compile == "on":
        yield "--compile on and --zero_stage 3: weights are gathered and freed between the blocks; leave --compile out"
    if config.zero_offload == "parameters" and config.zero_stage != 3:
        yield f"--zero_offload parameters: needs --zero_stage 3, not {config.zero_stage}"
    if config.zero_offload == "optimizer" and not config.zero_stage:
        yield "--zero_offload optimizer: needs --zero_stage 1, 2 or 3"
    try:
        file = _read(config)
    except ValueError as error:
        yield str(error)
        return
    yield from _contradictions(config, file)


def _contradictions(config: Options, file: dict) -> Iterator[str]:
    """Messages about keys of the DeepSpeed file that say something else than our options."""
    name, examples = config.deepspeed_config, config.batch_size * config.accumulation_steps
    world = int(os.environ.get("WORLD_SIZE", 1))
    ours = {  # key -> (our option, its value)
        "train_micro_batch_size_per_gpu": ("--batch_size", config.batch_size),
        "gradient_accumulation_steps": ("--accumulation_steps", config.accumulation_steps),
        "train_batch_size": ("--batch_size x --accumulation_steps x processes", examples * world),
        "gradient_clipping": ("--grad_clip", config.grad_clip),
        "zero_optimization.stage": ("--zero_stage", config.zero_stage),
        "optimizer.params.lr": ("--learning_rate", config.learning_rate),
        "optimizer.params.weight_decay": ("--weight_decay", config.weight_decay),
        "optimizer.params.betas": ("the betas of --optimizer adamw", [0.9, 0.95]),
        "optimizer.params.eps": ("the eps of --optimizer adamw", 1e-8),
    }
    for key, (option, value) in ours.items():
        if (theirs := _get(file, key)) not in (None, AUTO, value):
            yield f'{name}: {key} {theirs} contradicts {option} {value}; change one of them, or write "auto"'
    if (kind := _get(file, "optimizer.type")) not in (None, AUTO) and str(kind).lower() not in ("adamw", "adam"):
        yield f"{name}: optimizer.type {kind}: it is --optimizer adamw here; leave it out"
    values = list((_get(file, "scheduler.params") or {}).values())
    if file.get("scheduler") not in (None, AUTO) and (not values or any(value != AUTO for value in values)):
        yield f"{name}: scheduler: the rate follows --schedule and --warmup_steps; leave it out"
    for key in ("fp16", "amp"):
        if _get(file, f"{key}.enabled") is True:
            yield f"{name}: {key}.enabled: losses are scaled here; leave it out and give --dtype float16"
    if _get(file, "bf16.enabled") is True:
        if config.dtype != "bfloat16":
            yield f"{name}: bf16.enabled contradicts --dtype {config.dtype}; leave one of them out"
        if not config.zero_stage:
            yield f"{name}: bf16.enabled keeps fp32 masters from --zero_stage 1 on, not with 0; leave it out"


def deepspeed_config(config: Options, world: int) -> dict:
    """The configuration for DeepSpeed: the file, completed and overridden by our options."""
    file = _read(config)
    merged = {key: value for key, value in _without_auto(file).items() if key not in ("optimizer", "scheduler")}
    merged |= dict(  # accumulation is 1 for DeepSpeed: `accumulate` tells it which micro-batch ends a step
        train_micro_batch_size_per_gpu=config.batch_size,
        gradient_accumulation_steps=1,
        train_batch_size=config.batch_size * world,
        gradient_clipping=config.grad_clip if config.zero_stage else 0.0,
        zero_allow_untested_optimizer=True,  # it only knows its own optimisers
        zero_force_ds_cpu_optimizer=False,  # torch's fused AdamW runs on CPUs and needs no C++ compiler
    )
    merged.setdefault("steps_per_print", 1 << 40)
    zero = merged.setdefault("zero_optimization", {}) | dict(stage=config.zero_stage)
    zero.setdefault("reduce_bucket_size", 20_000_000)  # its default, 500M, is allocated for any model
    if config.zero_offload != "none":
        zero.setdefault("offload_optimizer", {"device": "cpu"})
    if config.zero_offload == "parameters":
        zero.setdefault("offload_param", {"device": "cpu"})
    merged["zero_optimization"] = zero
    if _get(merged, "bf16.enabled"):
        merged["bf16"] = merged["bf16"] | dict(check_grad_overflow=True)
    return merged


def _read(config: Options) -> dict[str, Any]:
    """The DeepSpeed file; {} if there is none."""
    path = config.deepspeed_config
    if not path:
        return {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(f"--deepspeed_config {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--deepspeed_config {path}:{getattr(error, 'lineno', 1)}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed_config {path}: expected an object, found a {type(content).__name__}")
    return content


def _get(tree: Any, dotted: str) -> Any:
    """Value of "a.b" in nested dictionaries, or None."""
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _without_auto(tree: dict) -> dict:
    """The same without the keys that say "auto": DeepSpeed then takes its defaults."""
    pairs = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {key: value for key, value in pairs.items() if value != AUTO}
