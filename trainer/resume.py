"""States that a killed run continues from, bit for bit.

    <save_dir>/resume/<name>_<hidden>[_moe]/<run_id>/step_00000500/
        weights.safetensors  optimizer.safetensors  random.safetensors  state.json  manifest.json

Tensors are full, fp32 and filed by parameter name. Everything is written into a hidden directory beside, fsynced, the
manifest (sizes and SHA-256 of the other files) last, and then renamed: a state exists whole or not at all. On reading,
the newest that its manifest confirms is taken. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MANIFEST = "manifest.json"


def save_state(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, keep_last: int) -> Path:
    """Writes <folder>/step_<n> from {"weights": {name: tensor}, ...} and plain values; then drops the oldest states."""
    final = folder / f"step_{step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, content in tensors.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in content.items()}, partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1, ensure_ascii=False), encoding="utf-8")
        files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
        _sync(*partial.iterdir(), partial)
        shutil.rmtree(final, ignore_errors=True)  # the same step again, after a resume
        os.replace(partial, final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in _states(folder)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest_state(folder: Path, say=print) -> Path | None:
    """The newest whole state below a run's folder; broken ones are named and passed over."""
    for path in reversed(_states(folder)):
        problem = _problem(path)
        if problem is None:
            return path
        say(f"{path}: {problem}; trying the one before")
    return None


def read_state(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """The inverse of `save_state`."""
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return tensors, read_values(path)


def read_values(path: Path) -> dict:
    """Only the plain values of a state."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def find_state(states: Path, wanted: str, identity: dict, say) -> Path | None:
    """The state that --from_resume means: 0 none, 1 or auto the newest run of this identity below `states`, or a path.

    A process that torchrun has restarted resumes in any case. ValueError where runs exist, but none of this identity.
    """
    if wanted in ("0", "") and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
        return None
    if wanted in ("0", "", "1", "auto"):
        runs = sorted(path for path in states.glob("*") if path.is_dir())
        candidates = [state for run in reversed(runs) if (state := newest_state(run, say))]
        if not candidates:
            say(f"nothing to resume in {states}: starting afresh")
            return None
    else:
        path = Path(wanted)
        state = path if path.name.startswith("step_") and _problem(path) is None else newest_state(path, say)
        if state is None:
            raise ValueError(
                f"--from_resume {wanted}: no whole state there; give the directory of a run or of a step_*"
            )
        candidates = [state]
    reasons = []
    for path in candidates:
        theirs = read_values(path)["identity"]
        different = [
            f"{k} was {_short(theirs.get(k))}, is {_short(v)}" for k, v in identity.items() if theirs.get(k) != v
        ]
        if not different:
            return path
        reasons.append(f"{path}: {', '.join(different)}")
    raise ValueError(f"--from_resume {wanted}: no state of the same model and data; {' | '.join(reasons[:3])}")


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else "#" + hashlib.sha256(text.encode()).hexdigest()[:12]


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def _problem(path: Path) -> str | None:
    """Why a state is not whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if _fingerprint(path / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"not a whole state ({error})"
    return None


def _fingerprint(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and os.name != "posix":
            continue  # directories can be opened, and so flushed, on POSIX systems only
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """{"<parameter>/<kind>": tensor}, whichever optimiser holds the parameter."""
    found = {}
    for optimizer in optimizers:
        for name, parameter in model.named_parameters():
            for kind, tensor in optimizer.state.get(parameter, {}).items():
                found[f"{name}/{kind}"] = tensor
    return found


def restore_optimizers(model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for key, tensor in tensors.items():
        name, kind = key.rsplit("/", 1)
        parameter = parameters[name]
        owner[parameter].state[parameter][kind] = tensor.to(parameter.device)
