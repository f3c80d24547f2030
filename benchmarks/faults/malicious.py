"""Files that want to run code, or to reach outside their directory: is anything executed, read or written there?

    python benchmarks/faults/malicious.py

Weights and adapters (.pth) with code in every pickle protocol and in torch's own container, an archive that unpacks to
much more than it is; .safetensors with lying headers; Hugging Face directories whose index names files elsewhere; a
resume state whose manifest does. Each is opened as a user would open it. (Links are followed: the hub's cache, which
people point us to, is made of them, and what they lead to is read as tensors or not at all.)
"""

import json
import os
import pickle
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import save_file

from model.adapter import load_adapter
from model.checkpoint import load_weights
from trainer.run import resume

SECRET = "secret.safetensors"
HF = dict(
    model_type="llama",
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=16,
)


class Code:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


class Shell(Code):
    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


class Evaluated(Code):
    def __reduce__(self):
        return (eval, (f"open({str(self.mark)!r}, 'w')",))


def pickles(folder: Path, mark: Path) -> Iterator[Path]:
    for kind in (Code, Shell, Evaluated):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            path = folder / f"{kind.__name__}{protocol}.pth"
            path.write_bytes(pickle.dumps({"format": "sparrow-weights-1", "model": kind(mark)}, protocol=protocol))
            yield path
        for legacy in (False, True):
            path = folder / f"{kind.__name__}-{'old' if legacy else 'new'}.pth"
            content = {"model.embed_tokens.weight": torch.zeros(2), "x": kind(mark)}
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)
            yield path
    bomb = folder / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps({"a": 1}) + b"\0" * (1 << 28))
        archive.writestr("../../outside", "x")
    yield bomb


def header(text: bytes, size: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensors(folder: Path) -> Iterator[Path]:
    """Each in a directory of its own, beside a config.json."""
    entry = lambda begin, end, shape: json.dumps(
        {"model.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}}
    ).encode()
    two = json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}).encode()
    files = {
        "huge-header": header(b"{}", 1 << 62),
        "long-header": header(b"{}", 1 << 27),
        "no-json": header(b"\xff" * 8),
        "beyond-the-end": header(entry(0, 1 << 40, [1 << 38])),
        "backwards": header(entry(8, 0, [2]), None, bytes(8)),
        "wrong-size": header(entry(0, 8, [1 << 20]), None, bytes(8)),
        "overlap": header(two, None, bytes(8)),
        "overflow": header(entry(0, 8, [1 << 32, 1 << 32]), None, bytes(8)),
        "empty": b"",
        "nested": header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    }
    for name, content in files.items():
        directory = folder / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(HF), encoding="utf-8")
        (directory / "model.safetensors").write_bytes(content)
        yield directory


def elsewhere(folder: Path) -> Iterator[Path]:
    """Directories that name a file outside of them. It holds a tensor that must not turn up."""
    secret = folder / SECRET
    save_file({"model.norm.weight": torch.full((8,), 7.0)}, secret)
    for name, target in (("index-up", f"../{SECRET}"), ("index-absolute", str(secret))):
        directory = folder / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(HF), encoding="utf-8")
        index = {"weight_map": {"model.norm.weight": target}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        yield directory


def state(folder: Path) -> Iterator[Path]:
    """A state whose manifest would have other files hashed, and then believed."""
    run = folder / "run"
    kept = resume.save_state(run, 1, {"weights": {"a": torch.ones(2)}}, {"identity": {}}, keep_last=1)
    manifest = json.loads((kept / "manifest.json").read_text(encoding="utf-8"))
    (kept / "manifest.json").write_text(json.dumps({**manifest, f"../../{SECRET}": {}}), encoding="utf-8")
    yield kept


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        mark = root / "executed"
        opened: list[str] = []

        def audit(event, arguments):
            if event == "open" and isinstance(arguments[0], (str, bytes, Path)):
                opened.append(os.path.realpath(os.fsdecode(arguments[0])))

        sys.addaudithook(audit)
        groups: list[tuple[str, Iterator[Path], Callable]] = [
            (".pth", pickles(root, mark), load_weights),
            ("adapter .pth", pickles(root, mark), load_adapter),
            (".safetensors", tensors(root), load_weights),
            ("index and links", elsewhere(root), load_weights),
            ("resume state", state(root), lambda path: resume.find_state(root, str(path), {}, print)),
        ]
        executed, outside, accepted, count = 0, 0, [], 0
        for kind, paths, load in groups:
            for path in paths:
                opened.clear()
                count += 1
                try:
                    load(path)
                    accepted.append(f"{kind}: {path.name}")
                except ValueError:
                    pass
                executed += mark.exists()
                mark.unlink(missing_ok=True)
                here, inside = (os.path.realpath(p) for p in (root, path if path.is_dir() else path.parent))
                reached = [p for p in opened if p.startswith(here) and not p.startswith(inside)]
                outside += bool(reached) or (root.parent / "outside").exists()
        print(
            f"malicious files: {count} opened, {executed} executed, {outside} reached a file outside their directory, "
            f"{len(accepted)} accepted"
        )
        print("".join(f"    {line}\n" for line in accepted), end="")
        return int(bool(executed or outside or accepted))


if __name__ == "__main__":
    sys.exit(main())
