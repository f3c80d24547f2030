"""Weights files that describe themselves: `<name>_<hidden>[_moe].pth`.

    save_weights("out/pretrain_192.pth", model, tokenizer={"path": ..., "hash": ...}, lineage=[...])
    checkpoint, tokenizer = open_weights("pretrain", "out")
    model = checkpoint.build()                              # fp32, to be trained
    model = checkpoint.build(torch.bfloat16, bits=4)        # frozen, packed while it is read

One dictionary of tensors and plain values, nothing else: {"format", "model", "config", "tokenizer", "lineage",
"sha256"}. It is read with torch's restricted unpickler, so a file can hold numbers but no code. Also read: MiniMind's
bare state dicts, and directories in Hugging Face's layout. Tensors stay in their files until a model is built.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.console import UserError
from common.files import atomic_file
from common.hubs import is_id
from model.config import ModelConfig
from model.hub import find_model, find_path
from model.interop.hf import load_hf
from model.interop.hf_files import weight_files
from model.interop.minimind import config_beside, config_from_state
from model.interop.single import read_single
from model.loading import load_model
from model.quant import quantized
from model.tensor_files import StoredTensors, open_pickled
from model.transformer import CausalLM
from tokenizer.find import tokenizer_of
from tokenizer.text import Tokenizer

FORMAT = "sparrow-weights-1"
MADE_BY = {  # the usual names of weights, for messages: who looks for one has not run that stage yet
    "pretrain": "trainer/train_pretrain.py",
    "full_sft": "trainer/train_full_sft.py",
    "rlhf": "trainer/train_dpo.py",
    "reason": "trainer/train_distill_reason.py",
    "full_dist": "trainer/train_distillation.py",
    "lora_identity": "trainer/train_lora.py",
}
WITHOUT_EFFECT = ("max_position_embeddings", "router_aux_loss_coef")  # settings that no logit depends on


class NoWeights(UserError):
    """There are none of the name that was asked for."""


@dataclass
class Checkpoint:
    path: Path
    state: Mapping[str, Tensor]  # in the files still, and read by each access
    config: ModelConfig
    tokenizer: dict = field(default_factory=dict)  # {"path", "hash"}; empty where the file does not tell
    lineage: list[dict] = field(default_factory=list)  # one entry for each stage the weights went through

    @cached_property
    def hash(self) -> str:
        """Of what the model computes: `<hash of the tensors>.<hash of the config>`. Compare it with `same_weights`."""
        settings = {name: value for name, value in self.config.to_dict().items() if name not in WITHOUT_EFFECT}
        settings = json.loads(json.dumps(settings), parse_int=float)  # files write 10000 and 10000.0
        config = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return f"{hash_of(self.state)}.{config[:16]}"

    def release(self) -> None:
        """Keeps what is known of the weights, their hash too; from now on nothing is read from their files."""
        self.hash  # noqa: B018 (computed while there is something to compute it from)
        self.state = {}

    def build(
        self, dtype: torch.dtype | None = None, bits: int | None = None, device: torch.device | str = "cpu"
    ) -> CausalLM:
        """The model with these weights, see `load_model`: fp32, or with a dtype or bits a frozen one."""
        return load_model(self.config, self.state, self.path, dtype=dtype, bits=bits, device=device)

    def describe(self, model: CausalLM) -> str:
        """A line about the weights, and how `model`, which has them, keeps them."""
        shape, weight = self.config, model.model.embed_tokens.weight
        packed = [f"{layer.bits} bits and " for layer in quantized(model).values()][:1]
        kept = "".join([*packed, str(weight.dtype).removeprefix("torch.")])
        stages = " -> ".join(entry.get("stage", "?") for entry in self.lineage) or "of unknown training"
        experts = f", {shape.num_experts} experts" if shape.num_experts else ""
        return (
            f"{self.path}: {model.num_parameters() / 1e6:.1f}M parameters ({shape.num_hidden_layers} layers of "
            f"{shape.hidden_size}{experts}); {stages}; {kept} on {weight.device}"
        )


def weights_name(name: str, config: ModelConfig) -> str:
    return f"{name}_{config.hidden_size}{'_moe' if config.num_experts else ''}.pth"


def hash_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and numbers: the same for the same weights in whatever file."""
    stored = state if isinstance(state, StoredTensors) else StoredTensors(state)
    digest = hashlib.sha256()
    for name in sorted(stored):
        digest.update(name.encode())
        for piece in stored.pieces(name):
            digest.update(piece.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def same_weights(hash: str | None, other: str | None) -> bool:
    """Whether two values of `Checkpoint.hash` are those of the same model; None: no weights. What older versions
    recorded lacks the config's part. Then the tensors decide."""
    if hash is None or other is None:
        return hash is other
    return all(part == theirs for part, theirs in zip(hash.split("."), other.split(".")))


def save_weights(
    path: Path | str, model: CausalLM, *, tokenizer: dict, lineage: list[dict], write: Callable | None = None
) -> Path:
    """write: what takes the place of `write_plain`, to do it later."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]  # stored once
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    values = dict(config=model.config.to_dict(), tokenizer=tokenizer, lineage=lineage)
    values = json.loads(json.dumps(values))  # a number of numpy's, say, would be a pickled class that nobody could load
    (write or write_plain)(Path(path), dict(format=FORMAT, **values), model=state)
    return Path(path)


def write_plain(path: Path, values: dict, **tensors: dict[str, Tensor]) -> Path:
    """Plain values, tensors and their hashes -> a .pth file, whole or not at all."""
    content = values | tensors | dict(sha256={name: hash_of(state) for name, state in tensors.items()})
    with atomic_file(path) as temporary:
        torch_save(content, temporary)
    return path


def torch_save(content: dict, path: Path) -> None:
    """torch.save, with the error that the system gave (a full disk), which torch's writer hides."""
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        found = error if isinstance(error, OSError) else error.__context__
        if not isinstance(found, OSError):
            raise
        raise OSError(found.errno, found.strerror, str(path)) from None


def load_weights(path: Path | str) -> Checkpoint:
    """A file or directory -> `Checkpoint`. Everything wrong with it is a `ValueError` that names it."""
    path = Path(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            config, state = load_hf(path)
            return Checkpoint(path, state, config, {"path": str(path)} if (path / "tokenizer.json").is_file() else {})
        path = newest(path.glob("*.pth"), f"{path}: neither a config.json nor a .pth file inside{_adapter_in(path)}")
    if path.suffix == ".safetensors":
        values, state = read_single(path)
        return Checkpoint(path, state, ModelConfig.from_dict(values["config"]), values["tokenizer"], values["lineage"])
    content = read_plain(path)
    if content.get("format") == FORMAT:
        config = ModelConfig.from_dict(content["config"])
        return Checkpoint(path, content["model"], config, content["tokenizer"], content["lineage"])
    if "model.embed_tokens.weight" not in content:
        if "lora" in content or any(".lora." in str(name) for name in content):
            base = content.get("base") or {}
            raise UserError(f"{path}: is an adapter (LoRA), which {_adapter_use(path, base.get('path'))}")
        names = ", ".join(map(str, list(content)[:4]))
        raise UserError(f"{path}: not weights of a language model (it begins with {names})")
    return Checkpoint(path, content, config_beside(path) or config_from_state(content))


def _adapter_in(folder: Path) -> str:
    """A hint for who looks for weights where LoRA has written."""
    found = [f for f in (folder, folder / "lora_model") if (f / "adapter_config.json").is_file()]
    return f"; {found[0]} is an adapter, which {_adapter_use(found[0])}" if found else ""


def _adapter_use(path: Path, base: str | None = None, flag: str = "--lora_path") -> str:
    """What to do with an adapter where weights are asked for. base: the path of the weights that it belongs to."""
    merge = f"python scripts/convert.py {shlex.quote(base or 'BASE')} merged.pth --to pth"
    return (
        f"eval_model.py takes as {flag}; to train on or to learn from, merge it first: {merge} --lora_path "
        f"{shlex.quote(str(path))}"
    )


def read_plain(path: Path) -> Mapping[str, Any]:
    """The dictionary in a .pth file, read without running any code that may be in it. See `open_pickled`."""
    content = open_pickled(path)
    if not isinstance(content, (dict, StoredTensors)) or not content:
        raise UserError(f"{path}: not a weights file (it holds a {type(content).__name__})")
    if not _is_intact(content):
        raise UserError(f"{path}: damaged: its numbers are not the ones that were saved; take another copy")
    return content


def _is_intact(content: Mapping[str, Any]) -> bool:
    """Whether the tensors have the hashes that stand beside them; torch's reader notices no bit that has changed."""
    try:
        return all(hash_of(content[name]) == known for name, known in content.get("sha256", {}).items())
    except (AttributeError, KeyError, TypeError):  # something else than tensors and hashes
        return False


def check_stated(checkpoint: Checkpoint, typed: str = "", **stated) -> None:
    """Flags of the architecture only choose among weights: one that contradicts the chosen ones is an error. None: not
    said. typed: the flag that stands for them."""
    shape = checkpoint.config.to_dict() | dict(use_moe=checkpoint.config.num_experts > 0)
    if wrong := [f"--{k} {v} (it has {shape[k]})" for k, v in stated.items() if v not in (None, shape[k])]:
        named = f"{typed}, which is {', '.join(wrong)}," if typed else ", ".join(wrong)
        raise UserError(f"{checkpoint.path}: {named} contradicts the weights; leave it out, or name other weights")


def newest(paths, otherwise: str) -> Path:
    paths = sorted(paths, key=lambda p: (p.stat().st_mtime, p.name))
    if not paths:
        raise UserError(otherwise)
    return paths[-1]


def find_weights(weight: str, *folders: Path | str, hidden_size: int | None = None, moe: bool | None = None) -> Path:
    """A path stays itself; a bare name is the newest `<name>_*.pth` in the first folder that has one. OWNER/NAME, where
    there is no such path, is a model on a hub, which is fetched if there is no copy of it yet.

    A directory of that name in the current one comes first if it holds weights. If it does not, it comes last, as a
    file of that name does: whoever reads it will say what is wrong with it.
    """
    here, is_path = Path(weight), Path(weight).name != weight or weight.endswith(".pth")
    if here.exists() and (is_path or _holds_weights(here)):
        return here
    if is_id(weight):
        return find_model(weight)
    if is_path:
        raise UserError(f"{weight}: no such file or directory{_adapter_in(here.parent)}")
    for folder in map(Path, folders):
        found = []
        for path in folder.glob(f"{glob.escape(weight)}_*.pth"):
            size, _, suffix = path.stem[len(weight) + 1 :].partition("_")
            fits = size.isdigit() and hidden_size in (None, int(size)) and suffix in ("", "moe")
            if fits and moe in (None, suffix == "moe"):
                found.append(path)
        if found:
            return newest(found, "")
    if here.exists():
        return here
    known = sorted({path.name for folder in map(Path, folders) for path in folder.glob("*.pth")})
    wanted = f"{weight}_{hidden_size or '<hidden>'}{'_moe' if moe else ''}.pth"
    searched = " or ".join(dict.fromkeys(str(Path(folder).absolute()) for folder in folders))
    made = f"{MADE_BY[weight]} makes them; " if weight in MADE_BY else ""
    advice = f"{made}of others, downloaded ones for instance, give the file or directory in place of the name"
    if known:
        advice = f"there are {', '.join(known)}; {advice}"
    adapters = [path for folder in map(Path, folders) for path in folder.glob(f"lora/{glob.escape(weight)}_*.pth")]
    if adapters and not any(name.startswith(f"{weight}_") for name in known):
        advice = f"{adapters[0]} is an adapter, which {_adapter_use(adapters[0], flag=f'--lora_name {weight}')}"
    raise NoWeights(f"no weights called {weight!r} ({wanted}) in {searched}; {advice}")


def _holds_weights(folder: Path) -> bool:
    """Whether a folder holds a model: ours, MiniMind's or in Hugging Face's layout."""
    hf = (folder / "config.json").is_file() and weight_files(folder)
    return bool(hf) or any(folder.glob("*.pth"))


def find_tokenizer(checkpoint: Checkpoint, path: str | None = None) -> Tokenizer:
    """The tokenizer that the weights were trained with. path: the directory to look in, or a model on a hub
    (--tokenizer_path)."""
    rows = checkpoint.config.vocab_size
    place = None if path is None else str(find_path(path))
    tokenizer = tokenizer_of(checkpoint.tokenizer, Path(checkpoint.path), rows, place)
    # Without a hash only the size can tell a tokenizer that merely lies near: embeddings are padded a little (Qwen:
    # 151,936 rows for 151,669 tokens). One that is named, or lies among the weights' own files, may have far fewer.
    near = path is None and Path(tokenizer.path).resolve() != Path(checkpoint.path).resolve()
    if near and "hash" not in checkpoint.tokenizer and tokenizer.vocab_size < 0.99 * rows:
        raise UserError(
            f"{checkpoint.path}: has {rows:,} token embeddings, but the tokenizer in {tokenizer.path} only "
            f"{tokenizer.vocab_size:,} tokens; give its own with --tokenizer_path"
        )
    return tokenizer


def open_weights(
    weight: str,
    *folders: Path | str,
    tokenizer_path: str | None = None,
    hidden_size: int | None = None,
    use_moe: bool | None = None,
    **stated,
) -> tuple[Checkpoint, Tokenizer]:
    """Finds weights (a path, or a name in the folders), loads them, and finds their tokenizer.

    hidden_size and use_moe pick among weights of one name. The weights must agree with these and with `stated`, other
    fields of the architecture; None: not stated.
    """
    checkpoint = load_weights(find_weights(weight, *folders, hidden_size=hidden_size, moe=use_moe))
    check_stated(checkpoint, **stated, hidden_size=hidden_size, use_moe=use_moe)
    return checkpoint, find_tokenizer(checkpoint, tokenizer_path)
