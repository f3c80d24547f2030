"""The one way to write: what has a name is whole, whenever a process is killed and the power is cut."""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository


@contextmanager
def atomic(path: Path):
    """A name to write to, which becomes `path` only once everything is on the disk: a kill or a full disk never leaves
    half a file, and never costs the one that was there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # what the system says of a full disk does not tell where
        raise
    finally:
        with suppress(OSError):  # gone already, as it should; or the disk is, and the first error is the one to hear of
            temporary.unlink()


def keep_previous(path: Path) -> str:
    """What is about to be replaced gets a second name, `<name>.previous.pth`, which no `--weight` means by chance -> a
    line to print, empty if there was nothing. That it cannot be kept is no reason to end a run."""
    if not path.exists():
        return ""
    kept = path.with_name(f"{path.stem}.previous{path.suffix}")
    temporary = temporary_name(kept)
    try:
        try:
            os.link(path, temporary)  # takes no space
        except OSError:  # a file system without links
            shutil.copy2(path, temporary)
        os.replace(temporary, kept)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        return f"warning: {path} is replaced and could not be kept ({error.strerror})"
    return f"{path} is replaced; what it was is now {kept.name}"


def temporary_name(path: Path) -> Path:
    """Hidden, beside it, and telling whose it is."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def sweep(folder: Path) -> list[Path]:
    """Removes what killed processes left half written: anything of a process of this machine that no longer runs (or
    has this one's number, which is then a former life in the same container), and what is older than a day."""
    swept = []
    for path in folder.glob(".*.tmp"):
        owner = re.search(r"\.([^/]+)-(\d+)\.tmp$", path.name)
        try:
            old = time.time() - path.stat().st_mtime > 86400
            here = owner and owner[1].endswith(socket.gethostname()) and os.name == "posix"
            if old or (here and not _runs_beside_us(int(owner[2]))):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                swept.append(path)
        except OSError:  # gone already, or not ours to remove
            pass
    return swept


def _runs_beside_us(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks only
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return process != os.getpid()


def sync_folder(folder: Path) -> None:
    """Makes the names in it survive a power cut. Only POSIX systems can open directories; others need not."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
