"""What options of other projects mean here, where that depends on their value: `report_to: wandb` is `use_wandb: true`.

Each function takes the value (text, or what YAML made of it) and returns our options, {name: value}, or raises a
UserError that says what to write instead. Their names are the options' names (`translated` in common/options.py).
"""

from __future__ import annotations

from typing import Any

from common.console import UserError
from common.values import truth


def _words(value: Any) -> list[str]:
    """A word or a list of words, from a command line or YAML -> the words in lower case; none for null and none."""
    words = [str(item).strip().lower() for item in (value if isinstance(value, list) else [value])]
    return [word for word in words if word not in ("none", "null", "no", "false", "")]


def report_to(value: Any) -> dict[str, Any]:
    trackers = ("wandb", "swanlab", "tensorboard")
    if unknown := [word for word in _words(value) if word not in trackers]:
        raise UserError(f"{', '.join(unknown)} is none of {', '.join(trackers)}, none; write use_wandb: true, say")
    return {f"use_{word}": True for word in _words(value)}


def warmup_ratio(value: Any) -> dict[str, Any]:
    try:
        if 0 <= float(value) < 1:
            return {"warmup_steps": value}
    except (TypeError, ValueError):
        pass
    raise UserError("expected a share of the run, in [0, 1); a number of steps is warmup_steps")


def optim(value: Any) -> dict[str, Any]:
    names = dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), "adamw")
    if (name := (names | {"muon": "muon"}).get(str(value).lower())) is None:
        small = "8" in str(value) or "4bit" in str(value)
        why = "moments of 8 bits are not built yet" if small else "there is no such optimiser here"
        raise UserError(f"{why}; write optimizer: adamw or optimizer: muon")
    return {"optimizer": name}


def bias(value: Any) -> dict[str, Any]:
    if _words(value):
        raise UserError("biases are not trained with an adapter; write bias: none, or leave it out")
    return {}


def task_type(value: Any) -> dict[str, Any]:
    if str(value).lower().rpartition(".")[2] not in ("causal_lm", "none"):
        raise UserError("only language models are trained here; write task_type: CAUSAL_LM, or leave it out")
    return {}


def finetuning_type(value: Any) -> dict[str, Any]:
    if str(value).lower() not in ("lora", "full"):
        raise UserError("write use_lora: true for an adapter, use_lora: false for all weights")
    return {"use_lora": str(value).lower() == "lora"}


def trust_remote_code(value: Any) -> dict[str, Any]:
    truth(value)  # true is harmless too: the model families are built in
    return {}


_ALL = (report_to, warmup_ratio, optim, bias, task_type, finetuning_type, trust_remote_code)
TRANSLATED = {function.__name__: function for function in _ALL}
