"""Observes every file operation of a save: to record it, to exit or fail at the i-th one, to simulate a power cut.

    with Operations(root) as log: save()            log.done: what it did, in order
    with Operations(root, before=f): save()         f(i, operation) may raise or end the process; a write is half done
    for disk in after_power_cut(base, root, log.done[:i], random): ...    what the disk may hold after a power cut

Operation = (kind, path, extra): create, write (its bytes), fsync, mkdir, rename (the new path), unlink, rmdir.
"""

from __future__ import annotations

import builtins
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch


class Operation(NamedTuple):
    kind: str
    path: str
    extra: bytes | str = b""


class Operations:
    """Replaces Python's file functions while the block runs, for everything below `root`."""

    def __init__(self, root: Path, before: Callable[[int, Operation], None] = lambda i, operation: None):
        self.root, self.before, self.done, self.asked = str(root), before, [], -1
        self.paths: dict[int, str] = {}  # of open descriptors

    def __enter__(self):
        names = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open", "close")
        self.real = {name: getattr(os, name) for name in names}
        self.real_open, self.real_rmtree = builtins.open, shutil.rmtree
        self.real_serialize = safetensors.torch.serialize_file
        for name in ("mkdir", "unlink", "rmdir"):
            setattr(os, name, self._simple(name))
        os.rename = os.replace = lambda a, b: self._do(Operation("rename", str(a), str(b)), self.real["replace"], a, b)
        os.fsync = self._fsync
        os.open, os.close = self._os_open, self._os_close
        builtins.open = self._open
        shutil.rmtree = self._rmtree
        safetensors.torch.serialize_file = self._serialize
        return self

    def __exit__(self, *_):
        for name, function in self.real.items():
            setattr(os, name, function)
        builtins.open, shutil.rmtree = self.real_open, self.real_rmtree
        safetensors.torch.serialize_file = self.real_serialize

    def _do(self, operation: Operation, action: Callable, *arguments):
        if not operation.path.startswith(self.root):
            return action(*arguments)
        self.asked += 1
        self.before(self.asked, operation)
        result = action(*arguments)
        self.done.append(operation)
        return result

    def _simple(self, name: str):
        real = self.real[name]
        return lambda path, *more, **named: self._do(Operation(name, str(path)), lambda: real(path, *more, **named))

    def _fsync(self, descriptor):
        return self._do(Operation("fsync", self.paths.get(descriptor, "?")), self.real["fsync"], descriptor)

    def _os_open(self, path, *more, **named):
        descriptor = self.real["open"](path, *more, **named)
        self.paths[descriptor] = str(path)
        return descriptor

    def _os_close(self, descriptor):
        self.paths.pop(descriptor, None)  # its number will be another file's
        self.real["close"](descriptor)

    def _open(self, path, mode="r", *more, **named):
        if not str(path).startswith(self.root) or not set(mode) & set("wa+"):
            return self.real_open(path, mode, *more, **named)
        opening = lambda: self.real_open(path, mode, buffering=0)
        raw = self._do(Operation("create", str(path)), opening) if "w" in mode else opening()
        self.paths[raw.fileno()] = str(path)
        return _File(self, raw, str(path))

    def _serialize(self, tensors, path, metadata=None):
        """Writes the same bytes as safetensors' own writer, whose operations cannot be observed: it is in Rust."""
        with open(path, "wb") as file:
            file.write(safetensors.serialize(tensors, metadata))

    def _rmtree(self, path, ignore_errors=False):
        """Does the same as shutil's, in operations that can be observed."""
        try:
            for folder, folders, files in os.walk(path, topdown=False):
                for name in files:
                    os.unlink(os.path.join(folder, name))
                for name in folders:
                    os.rmdir(os.path.join(folder, name))
            os.rmdir(path)
        except OSError:
            if not ignore_errors:
                raise


class _File:
    def __init__(self, log: Operations, raw, path: str):
        self.log, self.raw, self.path = log, raw, path
        self.flush, self.fileno = raw.flush, raw.fileno

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.log.paths.pop(self.fileno(), None)
        self.raw.close()

    def write(self, data) -> int:
        data = bytes(data)

        def both_halves():
            self.raw.write(data[len(data) // 2 :])

        self.raw.write(data[: len(data) // 2])  # what a kill or a full disk leaves of a write
        self.log._do(Operation("write", self.path, data), both_halves)
        return len(data)


# ---- a disk whose power was cut ----


class Disk:
    """Files and directories as they are on the disk: a directory is {name: node}, a file is bytes."""

    def __init__(self, folder: Path):
        self.root = {}
        for path in folder.iterdir():
            self.root[path.name] = Disk(path).root if path.is_dir() else _Node(path.read_bytes())

    def write_to(self, folder: Path) -> None:
        _materialise(self.root, folder)


class _Node:
    def __init__(self, data: bytes = b""):
        self.data, self.durable = data, data


def _materialise(tree: dict, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, node in tree.items():
        if isinstance(node, dict):
            _materialise(node, folder / name)
        else:
            (folder / name).write_bytes(node.durable)


def after_power_cut(base: Path, root: Path, operations: list[Operation], chooser: random.Random) -> Iterator[Disk]:
    """What the disk may hold: everything that an fsync covered, of the rest nothing, only the names, or any part.

    base  a copy of `root` from before the operations
    A name (create, mkdir, rename, unlink, rmdir) is covered by a later fsync of the directory it is in, bytes by a
    later fsync of their file. POSIX promises no order among what is not covered.
    """
    for names, data in (
        (lambda: False, lambda: 0.0),
        (lambda: True, lambda: 0.0),
        (lambda: True, lambda: 1.0),
        (lambda: chooser.random() < 0.5, lambda: chooser.random()),
    ):
        yield _replay(Disk(base), root, operations, names, data)


def _replay(disk: Disk, root: Path, operations: list[Operation], names: Callable, data: Callable) -> Disk:
    live = disk.root
    kept: dict[int, dict] = {}  # id of a live directory -> what the disk has of it

    def mirror(tree: dict) -> dict:
        copy = kept.setdefault(id(tree), {})
        copy |= {name: mirror(node) if isinstance(node, dict) else node for name, node in tree.items()}
        return copy

    durable, pending, alive = mirror(live), {}, [live]

    def parent(path: str) -> tuple[dict, str]:
        *folders, name = Path(path).relative_to(root).parts
        tree = live
        for folder in folders:
            tree = tree[folder]
        return tree, name

    def entry(tree: dict, name: str, node) -> None:
        """Notes a changed name, which the disk has after the next fsync of its directory."""
        pending.setdefault(id(tree), []).append((name, node))

    for kind, path, extra in operations:
        if kind == "fsync":
            tree, name = parent(path) if Path(path) != root else (None, "")
            node = live if tree is None else tree[name]
            if isinstance(node, dict):
                for name, value in pending.pop(id(node), []):
                    _enter(kept[id(node)], name, value)
            else:
                node.durable = node.data
            continue
        tree, name = parent(path)
        if kind == "write":
            tree[name].data += extra
        elif kind in ("create", "mkdir"):
            node = tree[name] = _Node() if kind == "create" else {}
            if kind == "mkdir":
                kept[id(node)] = {}
                alive.append(node)  # so that no other takes its id
            entry(tree, name, kept[id(node)] if kind == "mkdir" else node)
        elif kind == "rename":
            node = tree.pop(name)
            target, new = parent(extra)
            target[new] = node
            entry(tree, name, None)
            entry(target, new, kept[id(node)] if isinstance(node, dict) else node)
        else:
            alive.append(tree.pop(name))
            entry(tree, name, None)
    for folder, changes in pending.items():
        for name, node in changes:
            if names():
                _enter(kept[folder], name, node)
    for node in _files(durable):
        node.durable = max(node.durable, node.data[: round(data() * len(node.data))], key=len)
    disk.root = durable
    return disk


def _enter(folder: dict, name: str, node) -> None:
    if node is None:
        folder.pop(name, None)
    else:
        folder[name] = node


def _files(tree: dict) -> Iterator[_Node]:
    for node in tree.values():
        if isinstance(node, dict):
            yield from _files(node)
        else:
            yield node
