"""The one way to write. A file or folder has its name only once all of it is on the disk.

    with atomic_file(path) as temporary:          # or atomic_folder(path)
        temporary.write_text("...")               # a kill, a full disk or a power cut: `path` is as it was before

Everything is written under a hidden name beside the target, flushed to the disk (fsync), then renamed; then the parent
folder is flushed, which makes the new name survive a power cut.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
WAITS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # seconds, between tries to move what another program holds open


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yields a name to write to; at the end of the block, that file replaces `path`.

    If the block or the system fails, `path` is untouched and the temporary file is removed.
    """
    path = Path(path)
    with system_errors(path):
        _make_folder(path.parent)
        sweep(path.parent, path.name)
        temporary = temporary_name(path)
        try:
            with open(temporary, "wb"):
                mode = os.stat(temporary).st_mode
            yield temporary
            put_in_place(temporary, path, mode)
        finally:
            with suppress(OSError):  # renamed already; or the disk is gone, and the first error is the one to report
                temporary.unlink()


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yields an empty folder to fill; at the end of the block, it becomes `path`, with all that is in it.

    If the block or the system fails, the temporary folder is removed. A folder that is there already is never replaced:
    that is an OSError.
    """
    with _folder_beside(Path(path)) as temporary:
        yield temporary
        put_in_place(temporary, Path(path))


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """Yields a new hidden folder beside `path`, which is gone after the block. Removes those of killed programs."""
    with system_errors(path):
        _make_folder(path.parent)
        sweep(path.parent, path.name)
        temporary = temporary_name(path)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(written: Path, path: Path, mode: int | None = None) -> None:
    """Gives a finished file or folder its name, with all of it on the disk first. A file that has the name is replaced;
    a folder that has it is an OSError.

    `atomic_file` and `atomic_folder` end with it. Called directly, it is for what takes several runs of a program to
    write, as a download may. mode: the file's permissions; None: those that it has.
    """
    if written.is_dir():
        _flush_tree(written)
    else:
        _flush(written, written.stat().st_mode if mode is None else mode)
    move(written, path)
    flush_folder(path.parent)


def move(source: Path, target: Path) -> None:
    """Gives a file or folder another name. A file that has the name is replaced.

    Windows refuses while any program has either of them open: a virus scanner that looks at what was just written, or a
    server that reads what is replaced. They close it soon, so it is tried again for some seconds.
    """
    for wait in WAITS if sys.platform == "win32" else ():
        try:
            return os.replace(source, target)
        except PermissionError:
            if target.is_dir():  # no waiting helps
                raise
            time.sleep(wait)
    os.replace(source, target)


@contextmanager
def staged(path: Path | str) -> Iterator[Path]:
    """Yields `path`'s name in a hidden folder beside it; at the end of the block, everything in that folder moves to
    where `path` is, and replaces what has its name there.

    For results that are read again before they count, and may be a folder, or several files. If the block or the system
    fails, nothing has changed. An old folder is moved away first: a kill just then leaves neither.
    """
    path = Path(path)
    with _folder_beside(path) as temporary:
        yield temporary / path.name
        _flush_tree(temporary)
        for inside in sorted(temporary.iterdir(), key=lambda inside: inside.name == path.name):  # `path` last
            target = path.parent / inside.name
            if target.is_dir():  # no system call replaces a folder that is not empty
                move(target, temporary / f"{inside.name}.old")
            move(inside, target)
        flush_folder(path.parent)


@contextmanager
def lock(path: Path | str, message: str) -> Iterator[None]:
    """Holds the lock file `path` inside the block; prints `message` to stderr if another process holds it.

    The system frees the lock when its holder dies, so a killed process blocks nobody. On drives without locks (some
    network drives) the block runs without one: at worst, two processes do the same work.
    """
    from filelock import FileLock, Timeout

    # its substitute for missing locks is a file that a killed process leaves behind, for others to wait for
    held = FileLock(path, fallback_to_soft=False)
    try:
        try:
            held.acquire(timeout=0)
        except Timeout:
            print(message, file=sys.stderr, flush=True)
            held.acquire()
    except (OSError, NotImplementedError):
        pass  # there are no locks here
    try:
        yield
    finally:
        held.release()


def hash_file(path: Path | str) -> str:
    """SHA-256 of its bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@cache
def code_version() -> str:
    """A hash of the sources that decide what a training computes. Any edit to them changes it, in a clone without git,
    too."""
    digest = hashlib.sha256()
    for folder in ("common", "tokenizer", "model", "dataset", "inference", "trainer"):
        for source in sorted((ROOT / folder).rglob("*.py"), key=Path.as_posix):
            digest.update(source.relative_to(ROOT).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def allow_many_files() -> None:
    """Raises the number of files that this process may have open, as far as the system lets it.

    The usual limit, 1024, is too low for data in thousands of files: each is mapped, and Python's `mmap` keeps a file
    descriptor for each map. So it is for a server, whose connections are files: idle ones would keep others out.
    """
    try:
        import resource
    except ImportError:  # Windows, where there is no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (1 << 16, 10240):  # macOS: at most 10240 where the hard limit is "unlimited"
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return


def previous_name(path: Path, number: int | str = "") -> Path:
    """Of the file that `path` replaces."""
    return path.with_name(f"{path.stem}.previous{number}{path.suffix}")


def keep_previous(path: Path, every: bool = False) -> str:
    """Gives a file that will be replaced a second name, `<name>.previous.pth`, which no `--weight` finds.

    every  also keep what has that name already: the next ones are `<name>.previous2.pth`, `<name>.previous3.pth`, ...

    Returns a line to print, empty if there is no such file. That it cannot be kept is a warning and no error.
    """
    if not path.exists():
        return ""
    names = (previous_name(path, number) for number in ("", *range(2, 10_000)))
    kept = next(name for name in names if not (every and name.exists()))
    temporary = temporary_name(kept)
    try:
        try:
            os.link(path, temporary)  # takes no space
        except OSError:  # a file system without links
            shutil.copy2(path, temporary)
        move(temporary, kept)
        flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        return f"warning: {path} is replaced and could not be kept ({error.strerror})"
    return f"{path} is replaced; what it was is now {kept.name}"


def remove_folder(folder: Path) -> None:
    """Removes a folder under a temporary name, so that a kill never leaves half of it under its own name.

    An error is ignored (another process reads it, say): whoever tries again removes it.
    """
    with suppress(OSError):
        doomed = temporary_name(folder)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """A hidden name in the same folder, with the machine and process that it belongs to: `.<name>.<host>-<pid>.tmp`."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")


def _host() -> str:
    """This machine's name without dots, which separate the parts of a temporary name: `gpu.vm` is not `vm`."""
    return socket.gethostname().replace(".", "%2E")


def sweep(folder: Path, name: str | None = None) -> list[Path]:
    """Removes temporary files and folders that killed processes left: all in `folder`, or those of one name.

    A process counts as killed if it is of this machine and no longer runs. So does one with our own number: before a
    restart, the same container had it. What is older than a day is removed in any case. Returns what was removed.
    """
    swept, host = [], _host()
    begin, whose = f".{name}." if name else ".", re.compile(r"\..+\.([^.]+)-(\d+)\.tmp")
    try:
        found = [own for own in os.listdir(folder) if own.startswith(begin) and own.endswith(".tmp")]
    except OSError:  # no such folder, or not ours to read
        return swept
    for path in (folder / own for own in found):
        owner = whose.fullmatch(path.name)
        if name and not (owner and path.name == f".{name}.{owner[1]}-{owner[2]}.tmp"):
            continue
        try:
            old = time.time() - path.stat().st_mtime > 86400
            killed = owner is not None and owner[1] == host and not _another_runs(int(owner[2]))
            if old or killed:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                swept.append(path)
        except OSError:  # gone already, or not ours to remove
            pass
    return swept


def flush_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut. Only POSIX systems can open folders; others need not."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _another_runs(process: int) -> bool:
    """Whether another process than this one has that number; where nobody can ask (not POSIX): True."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return process != os.getpid()


def _flush_tree(folder: Path) -> None:
    """Flushes a folder and all that is in it."""
    mode = folder.stat().st_mode & 0o666
    for inside in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        flush_folder(inside) if inside.is_dir() else _flush(inside, mode)
    flush_folder(folder)


def _flush(file: Path, mode: int) -> None:
    """Flushes a file's bytes to the disk. `mode`: its permissions, since safetensors makes files that only their owner
    can read."""
    if os.name == "posix" and file.stat().st_mode & 0o777 != mode & 0o777:
        with suppress(OSError):  # a file system without permissions
            os.chmod(file, mode & 0o777)
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def _make_folder(folder: Path) -> None:
    """Makes a folder and its parents, each of which survives a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # "file exists" says nothing to who has named a file in place of a folder
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    for path in missing:
        flush_folder(path.parent)


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """An error of the system inside the block names a file: `path`, if it names no other or the temporary one, which
    nobody knows.

    safetensors' writer, which is in Rust, raises an error of its own, with the system's number in its text: it becomes
    the OSError that Python's own functions raise. So does numpy's where the disk is full, which has no number.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None and re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # numpy's `tofile`
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if error.errno is not None:  # else its text is ours, and says everything
            names = [str(name) for name in (error.filename, error.filename2) if name is not None]
            hidden = str(temporary_name(path))
            if not names or any(name.startswith(hidden) for name in names):  # copying and renaming name two
                error.filename, error.filename2 = str(path), None
        raise
    except Exception as error:
        from safetensors import SafetensorError

        found = re.search(r"\(os error (\d+)\)", str(error))
        if not found or not isinstance(error, SafetensorError):
            raise
        number = int(found[1])
        # on Windows it is a winerror, the fourth argument, from which Python works out errno
        raise OSError(number, os.strerror(number), str(path), number) from error


def relative_to_root(path: str) -> str:
    """A path inside the repository, relative to its root: then a clone can be moved together with its weights."""
    found = Path(path).resolve()
    return found.relative_to(ROOT).as_posix() if found.is_relative_to(ROOT) else str(found)
