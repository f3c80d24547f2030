"""Converts weights and adapters to the formats of other programs, and from theirs to ours.

    python scripts/convert.py out/full_sft_512.pth out/hf --to hf                   # transformers, vLLM
    python scripts/convert.py out/full_sft_512.pth out/small.gguf --to gguf --dtype q8_0       # llama.cpp, ollama
    python scripts/convert.py out/full_sft_512.pth out/hf --to hf --lora_path out/lora/lora_identity_512.pth
    python scripts/convert.py Qwen3-0.6B out/qwen3_1024.pth --to pth --dtype bfloat16
    python scripts/convert.py out/lora/lora_identity_512.pth out/lora_peft --to peft

SRC: our .pth or .safetensors, a directory in Hugging Face's layout, MiniMind's .pth, or an adapter (ours, peft's or
MiniMind's). The result is read back and its logits are compared before it is moved to DST, which is complete or
not there. docs/export.md says which program takes what.
"""

import sys
from contextlib import suppress
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.console import UserError, note, run, say
from common.files import ROOT, relative_to_root, staged
from common.options import Options, option, parse

if TYPE_CHECKING:
    from torch import Tensor

    from model.adapter import AdapterFile
    from model.checkpoint import Checkpoint
    from tokenizer.text import Tokenizer

ENDINGS = {"hf": "", "minimind": ".pth", "gguf": ".gguf", "safetensors": ".safetensors", "peft": "", "pth": ".pth"}
OF_ADAPTERS = ("peft", "minimind", "pth")
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # llama.cpp's words -> ours
# How far rounding may move logits, on average, as a share of their spread. Wrong weights move them by the whole spread.
TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1, "q8_0": 0.1}

LARGE = 2e9  # parameters; larger models are compared in bfloat16, because of the memory


@dataclass(frozen=True)
class ConvertConfig(Options):
    """Options of converting"""

    source: str | None = option(None, "what to convert; `SRC DST` in front of the flags do without --source, --target")
    target: str | None = option(None, "where to: a file, or a folder for hf and peft", path=True)
    to: str | None = option(None, "format", choices=tuple(ENDINGS))
    dtype: str | None = option(
        None,
        "numbers of the result (default: those of the weights; gguf and minimind: float16); q8_0 for gguf only",
        choices=(*TOLERANCE, *DTYPES),
        aliases=("outtype", "torch_dtype"),
    )
    lora_path: str | None = option(None, "adapter to merge into the weights")
    weight: str | None = option(None, "of an adapter: the weights it belongs to, where it does not say which")
    tokenizer_path: str | None = option(None, "directory with a tokenizer.json (default: the weights' own)", path=True)
    save_dir: str = option(str(ROOT / "out"), "where a name without a path is looked for", path=True)
    shard_size: float = option(5.0, "hf: GB of one *.safetensors", within="(0, inf)")
    overwrite: bool = option(False, "replace what an earlier conversion has written there")
    no_verify: bool = option(False, "do not read the result and compare")

    def problems(self) -> list[str]:
        found = super().problems()
        missing = [name for name, value in (("SRC", self.source), ("DST", self.target), ("--to", self.to)) if not value]
        if missing:
            return [*found, f"{', '.join(missing)} missing: convert.py SRC DST --to {'|'.join(ENDINGS)}"]
        if self.dtype == "q8_0" and self.to != "gguf":
            found.append(f"--dtype q8_0: only gguf has it, not {self.to}")
        if self.shard_size != type(self).shard_size and self.to != "hf":
            found.append(f"--shard_size: only hf is written in parts, not {self.to}; leave it out")
        ending = ENDINGS.get(self.to or "", "")
        if ending and Path(self.target or "").suffix != ending:
            found.append(f"{self.target}: --to {self.to} writes one file, whose name must end with {ending}")
        return found

    @property
    def kind(self) -> str | None:
        """The dtype in our words; None: that of the weights."""
        default = "float16" if self.to in ("gguf", "minimind") else None
        return DTYPES.get(self.dtype or "", self.dtype) or default


def main(argv: list[str] | None = None):
    words = sys.argv[1:] if argv is None else argv
    bare = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    places = [word for pair in zip(("--source", "--target"), words[:bare]) for word in pair]
    config: ConvertConfig = parse(ConvertConfig, [*places, *words[min(bare, 2) :]], description=__doc__)
    target = Path(config.target or "")
    check_target(target, config)
    adapter = find_adapter(config)
    if adapter:
        convert_adapter(adapter, target, config)
    else:
        convert_weights(target, config)


def check_target(target: Path, config: ConvertConfig) -> None:
    """UserError if something is there that must not be replaced."""
    beside = {"gguf": [".Modelfile"], "minimind": [".json"]}.get(config.to or "", [])
    for path in (target, *(target.with_suffix(ending) for ending in beside)):
        if not path.exists() or path.is_dir() and not any(path.iterdir()):
            continue
        if path.is_dir() == bool(ENDINGS[config.to or ""]):
            raise UserError(f"{path}: is {'a directory' if path.is_dir() else 'a file'}; choose another name")
        if not config.overwrite:
            raise UserError(f"{path}: is there already; choose another name, or replace it with --overwrite")
        if path.is_dir() and (others := [item.name for item in path.iterdir() if not _is_ours(item)]):
            raise UserError(f"{path}: holds {sorted(others)[0]}, which no conversion writes; choose another name")
        if Path(config.source or "").resolve() == path.resolve():
            raise UserError(f"{path}: is what is converted; choose another name")


def _is_ours(path: Path) -> bool:
    """Whether a conversion may have written it, in a folder."""
    from model.export import GENERATION, TOKENIZER
    from model.interop.hf_files import INDEX

    known = (*TOKENIZER, GENERATION, INDEX, "config.json", "adapter_config.json")
    return path.is_file() and (path.name in known or path.suffix == ".safetensors")


# ---- weights


def convert_weights(target: Path, config: ConvertConfig) -> None:
    import torch

    from model.adapter import load_adapter
    from model.checkpoint import open_weights
    from model.export import merged, save_gguf, save_hf, save_minimind, save_pth, save_safetensors

    folders = (Path(config.save_dir), ROOT / "out")
    checkpoint, tokenizer = open_weights(config.source or "", *folders, tokenizer_path=config.tokenizer_path)
    checkpoint.tokenizer = dict(path=relative_to_root(tokenizer.path), hash=tokenizer.hash)
    if config.lora_path:
        adapter = load_adapter(config.lora_path)
        check_base(adapter, checkpoint)
        kept = f", unpacked from the {adapter.bits} bits that it was trained beside" if adapter.bits else ""
        note(f"merged: {adapter.path} into {checkpoint.path}{kept}")
        checkpoint = merged(checkpoint, adapter, as_stored=config.kind is None)
    dtype = None if config.kind in (None, "q8_0") else getattr(torch, config.kind)
    before = None if config.no_verify else logits(checkpoint)
    with staged(target) as path:
        lines: list[str] = []
        if config.to == "hf":
            size = int(config.shard_size * 1e9)
            save_hf(path, checkpoint, tokenizer.path, tokenizer.stop_ids, dtype=dtype, shard_bytes=size)
        elif config.to == "gguf":
            lines = save_gguf(path, checkpoint, tokenizer, config.kind or "float16")
        else:
            save = dict(minimind=save_minimind, safetensors=save_safetensors, pth=save_pth)[config.to or ""]
            save(path, checkpoint, dtype)
            if config.to == "minimind":  # where its scripts look; the file says nothing about it
                lines = [f"tokenizer: copy {tokenizer.path}/ into MiniMind's model/; here, --tokenizer_path names it"]
        if before is not None:
            lines.append(verify(path, before, checkpoint, tokenizer, config))
    for line in lines:
        note(line)
    say(f"written: {target}")


def check_base(adapter: "AdapterFile", checkpoint: "Checkpoint") -> None:
    """UserError if the adapter names other weights as its own."""
    from model.checkpoint import same_weights

    wanted = adapter.base["hash"]
    if wanted and not same_weights(wanted, checkpoint.hash):
        raise UserError(
            f"{adapter.path}: was trained on {adapter.base['path']} ({wanted[:12]}), not on {checkpoint.path} "
            f"({checkpoint.hash[:12]})"
        )


def logits(checkpoint: "Checkpoint") -> "Tensor":
    """Of a few rows of tokens, always the same ones. UserError if they are no numbers."""
    import torch

    from model.cost import count_parameters

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(checkpoint.config.vocab_size, (2, 48), generator=generator)
    large = count_parameters(checkpoint.config) > LARGE
    with torch.no_grad():
        found = checkpoint.build(torch.bfloat16 if large else None)(rows).logits.float()
    if not found.isfinite().all():
        raise UserError(f"{checkpoint.path}: its logits are NaN or infinite; nothing is written")
    return found


def verify(
    path: Path, before: "Tensor", checkpoint: "Checkpoint", tokenizer: "Tokenizer", config: ConvertConfig
) -> str:
    """Reads what was written -> a line to print. UserError if it is another model."""
    from dataclasses import replace

    from model.checkpoint import load_weights
    from model.export import stored_once
    from model.interop.gguf import read_gguf
    from tokenizer.text import Tokenizer

    if config.to == "gguf":
        names = list(stored_once(checkpoint.config, checkpoint.state))
        found = replace(checkpoint, state=read_gguf(path, checkpoint.config, names))
    else:
        found = load_weights(path)
    difference = (logits(found) - before).abs()
    moved = (difference.mean() / before.std().clamp_min(1e-6)).item()
    rounded = config.kind or "float32"
    if moved > TOLERANCE[rounded]:
        raise UserError(
            f"{config.target}: not written: read again, the logits differ by {moved:.1%} of their spread, more than "
            f"{rounded} explains; please report this"
        )
    if config.to == "hf" and not Tokenizer.load(path).same_ids(tokenizer):
        raise UserError(f"{config.target}: not written: read again, the tokenizer gives other ids; please report this")
    return f"verified: logits differ by at most {difference.max().item():.2g} ({moved:.2%} of their spread on average)"


# ---- adapters


def find_adapter(config: ConvertConfig) -> "AdapterFile | None":
    """What SRC is, if it is an adapter."""
    from model.adapter import load_adapter
    from model.interop.peft import CONFIG

    source = Path(config.source or "")
    if not source.exists() and len(source.parts) == 1:  # a name, as of weights
        from evaluation.models import locate

        with suppress(UserError):  # `convert_weights` says what is wrong with it
            source = locate(source.name, config.save_dir)
    if source.is_dir():
        is_adapter = (source / CONFIG).is_file() and not (source / "config.json").is_file()
    elif is_adapter := source.is_file() and source.suffix == ".pth":
        from model.checkpoint import read_plain

        content = read_plain(source)
        is_adapter = "lora" in content or any(".lora." in str(name) for name in content)
    if not is_adapter:
        if config.to == "peft":
            raise UserError(f"{config.source}: whole weights, but --to peft is for adapters; write --to hf")
        return None
    if config.to not in OF_ADAPTERS:
        raise UserError(
            f"{config.source}: an adapter, and --to {config.to} is for whole weights: convert.py WEIGHTS DST --to "
            f"{config.to} --lora_path {config.source}"
        )
    if config.lora_path:
        raise UserError("--lora_path: SRC is an adapter itself; give the weights as SRC to merge into them")
    return load_adapter(source)


def convert_adapter(adapter: "AdapterFile", target: Path, config: ConvertConfig) -> None:
    from model.adapter import find_base, load_adapter
    from model.checkpoint import find_tokenizer, find_weights
    from model.export import save_adapter_minimind, save_adapter_pth, write_peft
    from model.hub import load_tokenizer

    folders = (Path(config.save_dir), ROOT / "out")
    named = find_weights(config.weight, *folders) if config.weight else None
    base = find_base(adapter, named, *folders) if named or adapter.knows_base else None
    if base is None and config.to == "pth":
        raise UserError(f"{adapter.path}: does not say which weights it belongs to; name them with --weight")
    tokenizer = load_tokenizer(config.tokenizer_path).path if config.tokenizer_path else None
    if base and not tokenizer:
        tokenizer = find_tokenizer(base).path
    if base:
        adapter.config = base.config
        adapter.use_our_names(base.config)
    with staged(target) as path:
        if config.to == "peft":
            write_peft(path, adapter, tokenizer)
        elif config.to == "minimind":
            save_adapter_minimind(path, adapter)
        else:
            assert base
            save_adapter_pth(path, adapter, base)
        if not config.no_verify:
            found = load_adapter(path)
            if adapter.config:
                found.use_our_names(adapter.config)
            if not adds_the_same(found, adapter):
                raise UserError(f"{target}: not written: read again, it is another adapter; please report this")
    if tokenizer is None and config.to == "peft":
        note("no tokenizer beside it: the adapter does not say which weights it belongs to; --weight names them")
    say(f"written: {target}")


def adds_the_same(one: "AdapterFile", other: "AdapterFile") -> bool:
    """Whether two adapters add the same to the same weights. Their matrices may differ: a format may have no factor."""
    import torch

    def added(adapter: "AdapterFile", layer: str) -> "Tensor":
        A, B = (adapter.state[f"{layer}.{matrix}"].float() for matrix in "AB")
        return adapter.settings.scale * (B @ A)

    layers = [name.removesuffix(".A") for name in one.state if name.endswith(".A")]
    return one.state.keys() == other.state.keys() and all(
        torch.allclose(added(other, layer), added(one, layer), rtol=1e-4, atol=1e-6) for layer in layers
    )


if __name__ == "__main__":
    run(main)
