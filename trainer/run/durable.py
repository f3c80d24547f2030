"""Directories that exist whole or not at all, whenever a process is killed and the power is cut.

    write_folder(Path("step_00000500"), {"weights": {"a": tensor}}, {"step": 500})
    problem(Path("step_00000500"))                  # None, or which of its files is not what was written

    .step_00000500.<host>-<pid>.tmp/    weights.safetensors  state.json      each flushed to the disk,
                                        manifest.json                        then their sizes and SHA-256,
    step_00000500/                                                           then the name, and that is flushed too

Tensors are streamed one by one and hashed on the way, so that a save needs the memory of its largest tensor and the
manifest tells what was meant, not what a failing disk made of it. Nothing is ever overwritten. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from common.files import sync_folder, temporary_name

MANIFEST = "manifest.json"
NAMES = {  # of numbers in a .safetensors header
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_folder(final: Path, tensors: dict[str, dict[str, Tensor]], values: dict) -> None:
    """{"weights": {name: tensor}, ...} as <name>.safetensors and `values` as state.json, in a new directory `final`."""
    _make(final.parent)
    partial = temporary_name(final)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        files = {}
        for name, content in tensors.items():
            files[f"{name}.safetensors"] = _write(partial / f"{name}.safetensors", _safetensors(content))
        files["state.json"] = _write(partial / "state.json", [_json(values)])
        _write(partial / MANIFEST, [_json(files)])
        sync_folder(partial)
        os.rename(partial, final)
        sync_folder(final.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(final)
        raise


def remove(folder: Path) -> None:
    """Its name goes first: a kill in the middle leaves litter, which the next start sweeps, and no broken directory."""
    try:
        doomed = temporary_name(folder)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    except OSError:  # another machine looks into it, say: the next one tries again
        pass


def problem(folder: Path) -> str | None:
    """Why a directory is not whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is damaged ({error})"
    if not isinstance(manifest, dict) or "state.json" not in manifest:
        return f"{MANIFEST} is damaged (it does not list state.json)"
    for name, expected in manifest.items():
        try:
            if Path(name).name != name or _fingerprint(folder / name) != expected:
                return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({error})"
    return None


def _safetensors(tensors: dict[str, Tensor]) -> Iterable[bytes | memoryview]:
    """A .safetensors file in pieces: length of the header, header, numbers (the widest first, so all are aligned)."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=NAMES[tensor.dtype], shape=list(tensor.shape), data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        yield memoryview(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _json(values: dict) -> bytes:
    return json.dumps(values, indent=1, ensure_ascii=False).encode()


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> dict:
    """Its fingerprint, once it is on the disk."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _fingerprint(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _make(folder: Path) -> None:
    """With its parents, each entered durably in the one above."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)
