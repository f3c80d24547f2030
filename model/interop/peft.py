"""peft's directories: `adapter_config.json` and `adapter_model.safetensors`. The arithmetic is ours; names differ.

settings, state, base = load_peft("out/lora_model")
save_peft("out/lora_model", settings, state, ...)
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from common.console import UserError
from common.files import staged
from common.json_file import read_json
from model.lora import LoRASettings

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# What changes the arithmetic in ways we do not know, and the values that leave it alone
UNSUPPORTED = dict(
    use_dora=(None, False),
    bias=(None, "none"),
    fan_in_fan_out=(None, False),
    lora_bias=(None, False),
    modules_to_save=(None, []),
    use_qalora=(None, False),
    alora_invocation_tokens=(None, []),
    trainable_token_indices=(None, []),
    layer_replication=(None, []),  # another order of layers, or some of them twice
    target_parameters=(None, []),
)
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva")  # ways to begin that move weights around


def load_peft(directory: Path) -> tuple[dict, dict[str, Tensor], dict]:
    """(settings, {"<layer>.A": tensor, "<layer>.B": tensor}, {"path", "hash"} of the base as far as known)."""
    from safetensors import safe_open

    values = read_json(directory / CONFIG)
    if not isinstance(values, dict):
        raise UserError(f"{directory / CONFIG}: holds a {type(values).__name__}, not the settings of an adapter")
    if values.get("peft_type") != "LORA":
        raise UserError(f"{directory / CONFIG}: peft_type {values.get('peft_type')!r} is not supported, only LORA")
    start = str(values.get("init_lora_weights")).lower()
    if start.startswith(CHANGE_THE_BASE):
        raise UserError(
            f"{directory / CONFIG}: init_lora_weights={start!r} changed the base too, which is not in this directory; "
            "save it with peft's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    if strange := [f"{k}={values[k]!r}" for k, plain in UNSUPPORTED.items() if values.get(k) not in plain]:
        raise UserError(f"{directory / CONFIG}: not supported: {', '.join(strange)}")
    try:
        with safe_open(directory / TENSORS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{directory}: no {TENSORS} beside {CONFIG}") from None
    except Exception as error:  # safetensors has its own exception type
        raise UserError(f"{directory / TENSORS}: not a readable safetensors file ({error})") from None
    pattern = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.\w+)?\.weight")
    state = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if not match:
            raise UserError(f"{directory / TENSORS}: {name} belongs to no linear layer's LoRA")
        state[f"{match[1]}.{match[2]}"] = tensor.float()
    settings: dict[str, Any] = dict(
        rank=values.get("r"),
        alpha=values.get("lora_alpha"),
        dropout=values.get("lora_dropout", 0.0),
        rslora=bool(values.get("use_rslora")),
    )
    try:
        LoRASettings(**settings)  # says what is wrong with them
        _make_ranks_equal(settings, state, *(_pattern(values, kind) for kind in ("rank", "alpha")))
    except UserError as error:
        raise UserError(f"{directory / CONFIG}: {error}") from None
    path = metadata.get("base_path") or values.get("base_model_name_or_path")
    bits = {"bits": int(known)} if (known := metadata.get("base_bits")) in ("4", "8") else {}
    return settings, state, dict(path=path, hash=metadata.get("base_hash"), **bits)


def _pattern(values: dict, kind: str) -> dict:
    pattern, kinds = values.get(f"{kind}_pattern") or {}, (int,) if kind == "rank" else (int, float)
    if not isinstance(pattern, dict) or any(type(own) not in kinds or own <= 0 for own in pattern.values()):
        raise UserError(f"{kind}_pattern must be a dictionary of positive numbers, not {pattern!r:.40}")
    return pattern


def _make_ranks_equal(
    settings: dict, state: dict[str, Tensor], ranks: dict[str, int], alphas: dict[str, float]
) -> None:
    """peft may give a layer a rank and an alpha of its own; ours are the same for all layers. Smaller matrices are
    filled up with zeros, which training leaves zero, and B takes what is different in the factor. In place.

    ranks, alphas: the end of a layer's name -> its own.
    """
    layers = [name.removesuffix(".A") for name in state if name.endswith(".A")]

    def own(values: dict, layer: str, otherwise: float) -> float:
        return next((value for end, value in values.items() if f".{layer}".endswith(f".{end}")), otherwise)

    for end in ranks | alphas:  # peft reads them as regular expressions
        if not any(f".{layer}".endswith(f".{end}") for layer in layers):
            raise UserError(f"not supported: a rank or an alpha for {end!r}, the end of no adapted layer's name")
    rank = max((int(own(ranks, layer, settings["rank"])) for layer in layers), default=settings["rank"])
    power = 0.5 if settings["rslora"] else 1.0
    alpha = settings["alpha"] * (rank / settings["rank"]) ** power
    for layer in layers:
        A, B, here = state[f"{layer}.A"], state.get(f"{layer}.B"), int(own(ranks, layer, settings["rank"]))
        if A.dim() != 2 or len(A) != here:
            raise UserError(f"says rank {here}, but {layer}.A is {tuple(A.shape)}")
        if B is None or here == rank == settings["rank"] and not alphas:
            continue
        factor = own(alphas, layer, settings["alpha"]) / alpha * (rank / here) ** power
        state[f"{layer}.A"] = F.pad(A, (0, 0, 0, rank - here))
        state[f"{layer}.B"] = F.pad(B * factor, (0, rank - here))
    settings |= dict(rank=rank, alpha=alpha)


def save_peft(directory: Path, settings: dict, state: dict[str, Tensor], base: dict, layers: int) -> None:
    """`layers`: how many blocks the model has; a name that is adapted in all of them is written once. A layer may have
    a larger rank than the settings; its factor is the same."""
    from safetensors.torch import save_file

    adapted = [name.removesuffix(".A") for name in state if name.endswith(".A")]
    last = sorted({name.rpartition(".")[2] for name in adapted})
    rank = settings["rank"]
    wider = {name: len(state[f"{name}.A"]) for name in adapted if len(state[f"{name}.A"]) != rank}
    wider = {name.rpartition(".")[2]: own for name, own in wider.items()}  # fused layers, see `hf_adapter`
    power = 0.5 if settings["rslora"] else 1.0
    values = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base["path"] if Path(base["path"] or "").is_dir() else None,  # theirs are directories
        r=rank,
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        use_rslora=settings["rslora"],
        rank_pattern=wider,
        alpha_pattern={name: settings["alpha"] * (own / rank) ** power for name, own in wider.items()},
        target_modules=last if len(adapted) == len(last) * layers else adapted,
        bias="none",
        fan_in_fan_out=False,
        inference_mode=True,
        modules_to_save=None,
    )
    tensors = {}
    for name, tensor in state.items():
        layer, matrix = name.rsplit(".", 1)
        tensors[f"base_model.model.{layer}.lora_{matrix}.weight"] = tensor.contiguous()
    with staged(directory / CONFIG) as temporary:  # both files or none: one says what the other is multiplied by
        ours = {f"base_{key}": str(value or "") for key, value in base.items()}  # for `load_peft`
        save_file(tensors, temporary.with_name(TENSORS), metadata={"format": "pt", **ours})
        temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
