"""Files of a hub -> this disk, resumable and checked.

    repository = list_files("Qwen/Qwen2-0.5B", "model")
    download(repository, repository.files, Path("models/x"))      # after a kill, the same call continues

Both hubs speak plain HTTP, so one downloader serves them. Their own libraries would be two, and huggingface_hub (2.4)
compares sizes, not checksums, and starts over after a kill: its unfinished files have another name in every process.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common.console import Progress, UserError, note
from common.files import hash_file, lock, put_in_place
from common.hubs import (
    Place,
    RemoteFile,
    Repository,
    check_name,
    check_status,
    client_of,
    place_of,
    unreachable,
)

if TYPE_CHECKING:
    import httpx

BLOCK = 1 << 20  # bytes hashed at a time
RETRIES = 5  # after more failures in a row, none of which brought a byte, the download is given up
PAUSE = 1.0  # seconds before the first retry, doubled before each further one
TEMPORARY = (408, 429, 500, 502, 503, 504)  # answers after which it is worth trying again


def in_words(size: int) -> str:
    """Bytes for people: 988_097_824 -> "988.1 MB"."""
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e6 else (1e3, "kB")
    return f"{size / unit:.1f} {name}"


def announce(repository: Repository, files: Sequence[RemoteFile], where: Path) -> None:
    """Says what will be fetched, how large it is and where it goes, before it begins."""
    size = in_words(sum(file.size for file in files))
    what = f"{len(files)} files" if len(files) > 1 else files[0].name
    host = place_of(repository.id, repository.kind, repository.source).host
    note(f"{repository.id}: fetching {what}, {size}, from {host} to {where}")


@contextmanager
def unfinished(folder: Path, name: str) -> Iterator[Path]:
    """A folder to download into, `folder/.<name>.partial`. It is this process's alone: others wait for the block's end.

    The caller puts what is in it into place when all of it is there. The next block finds what a failed one has left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / f".{name}.lock", f"another process is fetching {name}; waiting for it"):
        partial = folder / f".{name}.partial"
        try:
            yield partial
        finally:
            with suppress(OSError):  # nothing to continue from, on a full disk for instance
                partial.rmdir()
        with suppress(OSError):  # Windows removes no file that is open
            (folder / f".{name}.lock").unlink()


def download(repository: Repository, files: Sequence[RemoteFile], folder: Path) -> None:
    """Fetches these files into `folder`, under their names. Each has its name only once it is whole and checked.

    What is there already is checked and kept. What a killed download left (`<name>.part`) is continued.
    """
    place = place_of(repository.id, repository.kind, repository.source)
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for file in files:
        check_name(place.id, file.name)
        path = folder / file.name
        if not path.resolve().is_relative_to(folder.resolve()) or _part(path).is_symlink():
            raise UserError(f"{path}: is a link that leads out of {folder}; remove it")
        if not _is_whole(path, file):
            missing.append((path, file))
    needed = sum(file.size - _size(_part(path)) for path, file in missing)
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{place.id}: needs {in_words(needed)} in {folder}, where {in_words(free)} are free; make room, or fetch "
            "it to another disk with scripts/download.py --to"
        )
    progress = Progress(f"fetching {place.id}", max(needed, 1))
    try:
        with client_of(place) as client:
            for path, file in missing:
                path.parent.mkdir(parents=True, exist_ok=True)
                _fetch(client, place, file, path, progress)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"{folder}: the disk is full; free some space, then the same command continues") from None
    finally:
        progress.close()


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_whole(path: Path, file: RemoteFile) -> bool:
    """Whether a file on the disk is the one on the hub."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if len(file.checksum) != 40:
        return file.checksum in ("", hash_file(path))
    digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)  # git-scm.com/book, "Git Objects"
    with open(path, "rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
    return digest.hexdigest() == file.checksum


def _fetch(client: httpx.Client, place: Place, file: RemoteFile, path: Path, progress: Progress) -> None:
    """A part may be left of another version of the file. The checksum tells, and all of it is fetched once more."""
    part = _part(path)
    for _ in range(2):
        _receive(client, place, file, part, progress)
        if _is_whole(part, file):
            put_in_place(part, path)
            return
        progress.advance(-_size(part))
        part.unlink()
    raise UserError(
        f"{place.id}: what {place.host} sends of {file.name} is not the file that it lists (another size or checksum, "
        f"twice); try again later. {place.elsewhere}"
    )


def _receive(client: httpx.Client, place: Place, file: RemoteFile, part: Path, progress: Progress) -> None:
    """Appends to `part` until it has as many bytes as the file. A connection that breaks is made again."""
    import httpx

    part.touch()
    failures = 0
    while (have := _size(part)) < file.size:
        error: Exception = httpx.RequestError("it sends nothing")
        try:
            if not _append(client, place, file, part, progress):
                return
        except httpx.RequestError as broken:
            error = broken
        if _size(part) <= have:
            failures += 1
            if failures > RETRIES:
                raise unreachable(place, error) from None
            time.sleep(PAUSE * 2 ** (failures - 1))
        else:
            failures = 0


def _append(client: httpx.Client, place: Place, file: RemoteFile, part: Path, progress: Progress) -> bool:
    """One request for the bytes that `part` lacks. False: there is nothing to be had in this way."""
    import httpx

    have = _size(part)
    with client.stream("GET", file.url, headers={"Range": f"bytes={have}-"} if have else {}) as response:
        if response.status_code in TEMPORARY:
            raise httpx.RequestError(f"it answers {response.status_code}")
        if response.status_code == 416:  # the file there ends before ours
            return False
        check_status(place, response)
        continues = response.status_code == 206
        progress.advance(0 if continues else -have)
        with open(part, "ab" if continues else "wb") as target:
            # blocks as they arrive: larger ones would be lost when the connection breaks
            for block in response.iter_bytes():
                target.write(block)
                progress.advance(len(block))
                if target.tell() > file.size:  # it is not the file, and may never end
                    return False
    return True
