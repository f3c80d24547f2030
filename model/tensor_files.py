"""Tensors that stay in their files until they are needed: a model is never in memory twice.

    tensors = StoredTensors(open_safetensors(path))     # or open_pickled(path)
    tensors["model.norm.weight"]                        # read from the file now
    tensors.read_into("model.norm.weight", parameter)   # converted on the way, a piece at a time

Both formats keep a tensor's numbers as plain bytes, one row after the other, so a few rows can be read alone. A file is
opened for each tensor. If it is no longer the one that was opened first, that is an error.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from common.console import UserError

PIECE = 1 << 20  # numbers read at once: few calls, and small enough to stay in a CPU's cache
DTYPES = dict(  # names in safetensors' headers
    F64=torch.float64,
    F32=torch.float32,
    F16=torch.float16,
    BF16=torch.bfloat16,
    F8_E4M3=torch.float8_e4m3fn,
    F8_E5M2=torch.float8_e5m2,
    I64=torch.int64,
    I32=torch.int32,
    I16=torch.int16,
    I8=torch.int8,
    U8=torch.uint8,
    BOOL=torch.bool,
)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file."""

    path: Path
    file: tuple[int, ...]  # which file that was, see `_identity`
    offset: int  # in bytes
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Place:
        start, stop, _ = rows.indices(self.shape[0])
        row = torch.Size(self.shape[1:]).numel() * self.dtype.itemsize
        return replace(self, offset=self.offset + start * row, shape=(stop - start, *self.shape[1:]))


class StoredTensors(Mapping[str, Tensor]):
    """{name: tensor}, where each access reads the tensor anew."""

    def __init__(self, places: Mapping[str, Place | Tensor]):
        """A tensor in place of a `Place` is in memory already: some old formats can only be read as a whole."""
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        if isinstance(place, Tensor):
            return place
        out = torch.empty(place.shape, dtype=place.dtype)
        for _ in self.pieces(name, out):
            pass
        return out

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def pieces(self, name: str, into: Tensor | None = None) -> Iterator[Tensor]:
        """The numbers of a tensor in order, flat, some at a time. They are written to `into` (contiguous, of the same
        dtype, on the CPU), or else to memory that the next piece uses again."""
        place = self.places[name]
        if isinstance(place, Tensor):
            if into is not None:
                into.copy_(place)
            yield (place if into is None else into).detach().contiguous().view(-1)
            return
        n = torch.Size(place.shape).numel()
        out = torch.empty(min(n, PIECE), dtype=place.dtype) if into is None else into.detach().view(-1)
        with open(place.path, "rb", buffering=0) as file:
            if _identity(file) != place.file:
                raise UserError(f"{place.path}: has changed while it was being read; start again")
            file.seek(place.offset)
            for start in range(0, n, PIECE):
                size = min(PIECE, n - start)
                piece = out[:size] if into is None else out[start : start + size]
                if not _fill(file, piece):
                    raise UserError(f"{place.path}: truncated: it ends within {name}; take another copy")
                yield piece

    def read_into(self, name: str, out: Tensor) -> None:
        """Reads a tensor into another of its shape, converting it to that one's dtype and device. UserError if it holds
        NaN or infinity."""
        place = self.places[name]
        direct = out.is_cpu and out.dtype == place.dtype
        flat, start = out.detach().view(-1), 0
        for piece in self.pieces(name, out if direct else None):
            if not _is_finite(piece):
                where = f"{place.path}: " if isinstance(place, Place) else ""
                raise UserError(f"{where}{name} holds NaN or infinity: these weights are damaged")
            if not direct:
                flat[start : start + len(piece)].copy_(piece)
            start += len(piece)


def _fill(file: BinaryIO, numbers: Tensor) -> bool:
    """Reads numbers from a file; False if it ends before."""
    left = numbers.view(torch.uint8).numpy().data.cast("B")
    while len(left):
        got = file.readinto(left)  # pyright: ignore[reportAttributeAccessIssue] (a raw file has it)
        if not got:
            return False
        left = left[got:]
    return True


def _is_finite(numbers: Tensor) -> bool:
    """Read as integers, infinity and NaN are the largest numbers: with their sign among the signed ones if they are
    positive, else among the unsigned ones. numpy, since torch would divide each small piece among its threads."""
    if numbers.dtype.itemsize == 1:
        numbers = numbers.float()
    size = numbers.dtype.itemsize
    plain = numbers.view(torch.uint8).numpy()
    infinity = torch.tensor([math.inf, -math.inf], dtype=numbers.dtype).view(torch.uint8).numpy()
    return all(plain.view(kind).max() < infinity.view(kind)[sign] for sign, kind in enumerate((f"i{size}", f"u{size}")))


def _identity(file) -> tuple[int, ...]:
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def open_safetensors(path: Path) -> dict[str, Place]:
    """The library checks that the tensors lie one behind the other and fill the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header, identity = json.loads(file.read(size)), _identity(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    header.pop("__metadata__", None)
    places = {}
    for name, about in header.items():
        if (dtype := DTYPES.get(about["dtype"])) is None:
            raise UserError(f"{path}: {name} is of type {about['dtype']}, which is not read")
        places[name] = Place(path, identity, 8 + size + about["data_offsets"][0], dtype, tuple(about["shape"]))
    return places


def open_pickled(path: Path) -> Any:
    """The content of a file of `torch.save` (.pth, .bin), read without running any code that may be in it. Dictionaries
    of tensors become `StoredTensors`."""
    if _holds_plain_bytes(path):
        with open(path, "rb") as file:
            identity = _identity(file)
        try:
            return _stored(_unpickle(path, "meta"), path, identity)
        except _NotPlain:
            pass
    return _stored(_unpickle(path, "cpu"), path, ())


class _NotPlain(Exception):
    pass


def _holds_plain_bytes(path: Path) -> bool:
    """Whether tensors can be read without torch. Not in files of torch before 1.6, compressed ones, nor those of
    machines with another order of bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = archive.infolist()
            order = [archive.read(file) for file in files if file.filename.endswith("/byteorder")]
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
    return all(file.compress_type == zipfile.ZIP_STORED for file in files) and order in (
        [],
        [sys.byteorder.encode()],
    )


def _unpickle(path: Path, device: str) -> Any:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:
            if file.read(4) == b"GGUF":
                reason = "GGUF files are only written, not read; name the weights that this one was made from"
                raise UserError(f"{path}: {reason}") from None
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it holds code ({code[1]}), which was not run" if code else "it is damaged, or a pickle of another kind"
        )
        raise UserError(f"{path}: refused: {reason}; weights are tensors and plain values only") from None
    except Exception as error:  # broken bytes make the reader fail in many ways
        reason = (str(error).splitlines() or ["it is empty"])[0].split(". ")[0]  # torch adds what may be the cause
        raise UserError(f"{path}: truncated or not a weights file ({reason})") from None


def _stored(content: Any, path: Path, identity: tuple[int, ...]) -> Any:
    """Tensors on `meta` -> their places."""
    if isinstance(content, dict):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return StoredTensors({name: _place(tensor, path, identity) for name, tensor in content.items()})
        return {key: _stored(value, path, identity) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_stored(value, path, identity) for value in content)
    return StoredTensors({"it": _place(content, path, identity)})["it"] if isinstance(content, Tensor) else content


def _place(tensor: Tensor, path: Path, identity: tuple[int, ...]) -> Place | Tensor:
    if not tensor.is_meta:
        return tensor
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise _NotPlain
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)  # of torch's reader, see its notes on saving
    if offset is None:
        raise _NotPlain
    offset += tensor.storage_offset() * tensor.itemsize
    return Place(path, identity, offset, tensor.dtype, tuple(tensor.shape))
