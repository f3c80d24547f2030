"""Files of a hub (Hugging Face or ModelScope) -> this disk, resumable and checked. Nothing here knows what is in them.

    repository = list_files("Qwen/Qwen2-0.5B", "model")           # names, sizes, checksums; nothing is fetched yet
    download(repository, repository.files, Path("models/x"))      # after a kill, the same call continues

HF_ENDPOINT and MODELSCOPE_ENDPOINT name mirrors, HF_TOKEN and MODELSCOPE_API_TOKEN open what is not public,
HF_HUB_OFFLINE=1 forbids all of it, USE_MODELSCOPE_HUB=1 makes ModelScope the default.

Both hubs speak plain HTTP, so one downloader serves them. Their own libraries would be two, and huggingface_hub (2.4)
compares sizes, not checksums, and starts over after a kill: its unfinished files have another name in every process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from common.console import Progress, UserError
from common.files import hash_file, put_in_place
from common.values import YES

if TYPE_CHECKING:
    import httpx

SOURCES = ("huggingface", "modelscope")
BLOCK = 1 << 20  # bytes hashed at a time
RETRIES = 5  # after more failures in a row, none of which brought a byte, the download is given up
PAUSE = 1.0  # seconds before the first retry, doubled before each further one
TEMPORARY = (408, 429, 500, 502, 503, 504)  # answers after which it is worth trying again
MIRRORS = "HF_ENDPOINT=https://... names a mirror, USE_MODELSCOPE_HUB=1 takes modelscope.cn instead"


class RemoteFile(NamedTuple):
    name: str  # its path in the repository
    size: int  # bytes
    checksum: str  # hexadecimal: SHA-256 (64 digits), or the SHA-1 that git gives a blob (40); "": the hub tells none
    url: str


class Repository(NamedTuple):
    id: str
    kind: str  # "model" or "dataset"
    source: str  # of SOURCES
    revision: str  # the commit, where the hub tells it
    files: list[RemoteFile]


class _Place(NamedTuple):
    """A repository's place on a hub, and how to say who is asking."""

    id: str
    host: str  # for messages
    endpoint: str
    page: str  # for people
    headers: dict[str, str]
    token: str  # how to get at what is not public


def offline() -> bool:
    """Whether the environment forbids to fetch anything."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in YES


def default_source() -> str:
    return SOURCES[os.environ.get("USE_MODELSCOPE_HUB", "").lower() in YES]


def in_words(size: int) -> str:
    """Bytes for people: 988_097_824 -> "988.1 MB"."""
    unit, name = next(
        (unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= unit or unit < 1e4
    )
    return f"{size / unit:.1f} {name}"


def list_files(id: str, kind: str, *, source: str | None = None, revision: str | None = None) -> Repository:
    """The files of a repository, at one commit.

    kind      "model" or "dataset"
    source    of SOURCES; None: `default_source`
    revision  a branch, tag or commit; None: the main branch
    """
    source = source or default_source()
    if offline():
        raise UserError(f"{id}: is not on this disk, and HF_HUB_OFFLINE forbids to fetch it")
    place = _place(id, kind, source)
    with _client(place) as client:
        list_tree = _huggingface_tree if source == "huggingface" else _modelscope_tree
        try:
            commit, files = list_tree(client, place, kind, revision)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{id}: {place.host} answers, but not with a list of files; is it the page of a proxy? Open "
                f"{place.page} in a browser"
            ) from None
    for file in files:
        _check_name(id, file.name)
    return Repository(id, kind, source, commit, files)


def _place(id: str, kind: str, source: str) -> _Place:
    variable, endpoint, secret, page, middle = {
        "huggingface": (
            "HF_ENDPOINT",
            "https://huggingface.co",
            "HF_TOKEN",
            "huggingface.co/settings/tokens",
            "datasets/" if kind == "dataset" else "",
        ),
        "modelscope": (
            "MODELSCOPE_ENDPOINT",
            "https://modelscope.cn",
            "MODELSCOPE_API_TOKEN",
            "modelscope.cn/my/myaccesstoken",
            f"{kind}s/",
        ),
    }[source]
    endpoint = (os.environ.get(variable) or endpoint).rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise UserError(f"{variable}={endpoint}: write https://{endpoint}")
    headers = {}
    if token := os.environ.get(secret):
        headers = (
            {"Authorization": f"Bearer {token}"} if source == "huggingface" else {"Cookie": f"m_session_id={token}"}
        )
    host = endpoint.partition("://")[2]
    return _Place(id, host, endpoint, f"{endpoint}/{middle}{id}", headers, f"set {secret} to a token from {page}")


def _huggingface_tree(
    client: httpx.Client, place: _Place, kind: str, revision: str | None
) -> tuple[str, list[RemoteFile]]:
    """huggingface.co/docs/hub/api. The commit comes first, so that all files are of the same one."""
    api = f"{place.endpoint}/api/{kind}s/{place.id}"
    commit = str(_get(client, place, f"{api}/revision/{quote(revision or 'main', safe='')}").json()["sha"])
    files, page = [], f"{api}/tree/{commit}?recursive=true"
    while page:
        answer = _get(client, place, page)
        for entry in answer.json():
            if entry["type"] == "file":
                checksum = (entry.get("lfs") or entry)["oid"]
                url = f"{place.page}/resolve/{commit}/{quote(entry['path'])}"
                files.append(RemoteFile(entry["path"], int(entry["size"]), checksum, url))
        page = answer.links.get("next", {}).get("url")
    return commit, files


def _modelscope_tree(
    client: httpx.Client, place: _Place, kind: str, revision: str | None
) -> tuple[str, list[RemoteFile]]:
    """As the package modelscope-hub asks: a model's `repo/files` come at once, a data set's `repo/tree` in pages."""
    revision, most = revision or "master", 200
    root, at = f"{place.endpoint}/api/v1/{kind}s/{place.id}/repo", f"Revision={quote(revision, safe='')}"
    files, page = [], 1
    while True:
        listing = f"tree?{at}&Recursive=True&PageNumber={page}&PageSize={most}"
        listing = listing if kind == "dataset" else f"files?{at}&Recursive=True"
        data = _get(client, place, f"{root}/{listing}").json()["Data"]
        entries = data["Files"] if isinstance(data, dict) else data
        for entry in entries:
            if entry["Type"] != "tree":
                url = f"{root}?{at}&FilePath={quote(entry['Path'], safe='')}"
                files.append(RemoteFile(entry["Path"], int(entry["Size"]), entry.get("Sha256") or "", url))
        if kind == "model" or len(entries) < most:
            return revision, files
        page += 1


# ---- talking to the hub


@contextmanager
def _client(place: _Place) -> Iterator[httpx.Client]:
    """A client that tells no other host than the hub who is asking. It follows no redirect to something less safe than
    what it asked for: a file of this machine, or http after https."""
    try:
        import httpx
    except ImportError:
        raise UserError("fetching needs the package httpx: pip install httpx") from None
    home = httpx.URL(place.endpoint)

    def check(request: httpx.Request) -> None:
        url = request.url
        if url.scheme not in ("https", "http") or home.scheme == "https" != url.scheme:
            raise UserError(f"{place.id}: {place.host} redirects to {url.scheme}://{url.host}, which is not followed")
        if (url.scheme, url.host, url.port) != (home.scheme, home.host, home.port):
            for name in place.headers:
                request.headers.pop(name, None)

    headers = {"User-Agent": "sparrow", "Accept-Encoding": "identity"} | place.headers
    with httpx.Client(
        headers=headers,
        timeout=httpx.Timeout(30, connect=10),
        follow_redirects=True,
        max_redirects=10,
        event_hooks={"request": [check]},
    ) as client:
        yield client


def _get(client: httpx.Client, place: _Place, url: str) -> httpx.Response:
    import httpx

    try:
        response = client.get(url)
    except httpx.RequestError as error:
        raise _unreachable(place, error) from None
    _check_status(place, response)
    return response


def _unreachable(place: _Place, error: Exception) -> UserError:
    reason = str(error) or type(error).__name__
    return UserError(f"{place.id}: cannot be fetched from {place.host} ({reason}). Is there a network? {MIRRORS}")


def _check_status(place: _Place, response: httpx.Response) -> None:
    status, said = response.status_code, response.headers.get("X-Error-Code", "")
    if status < 400:
        return
    if said in ("RevisionNotFound", "EntryNotFound"):
        what = "revision" if said == "RevisionNotFound" else "file"
        raise UserError(f"{place.id}: has no such {what} on {place.host}; see {place.page}")
    if status == 404 or said == "RepoNotFound":  # 401 and RepoNotFound: Hugging Face does not say which
        private = "" if place.headers else f"; if it is private, {place.token}"
        raise UserError(f"{place.id}: there is nothing of that name on {place.host}; check the spelling{private}")
    if status in (401, 403):
        raise UserError(
            f"{place.id}: {place.host} does not give it to everybody ({status}): accept its conditions at {place.page} "
            f"and {place.token}"
        )
    raise UserError(f"{place.id}: {place.host} answers {status} {response.reason_phrase}; try again later. {MIRRORS}")


# ---- onto the disk


def download(repository: Repository, files: Sequence[RemoteFile], folder: Path) -> None:
    """Fetches these files into `folder`, under their names. Each has its name only once it is whole and checked.

    What is there already is checked and kept. What a killed download left (`<name>.part`) is continued.
    """
    place = _place(repository.id, repository.kind, repository.source)
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for file in files:
        _check_name(place.id, file.name)
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
        with _client(place) as client:
            for path, file in missing:
                path.parent.mkdir(parents=True, exist_ok=True)
                _fetch(client, place, file, path, progress)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"{folder}: the disk is full; free some space, then the same command continues") from None
    finally:
        progress.close()


def _check_name(id: str, name: str) -> None:
    """A name that would lead out of the folder it is written to, here or on Windows, is refused."""
    path = PureWindowsPath(name)
    if not path.parts or path.drive or path.root or ".." in path.parts or not name.isprintable():
        raise UserError(f"{id}: has a file called {name!r}, which would be written outside of its folder; refused")


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


def _fetch(client: httpx.Client, place: _Place, file: RemoteFile, path: Path, progress: Progress) -> None:
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
        f"twice); try again later. {MIRRORS}"
    )


def _receive(client: httpx.Client, place: _Place, file: RemoteFile, part: Path, progress: Progress) -> None:
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
                raise _unreachable(place, error) from None
            time.sleep(PAUSE * 2 ** (failures - 1))
        else:
            failures = 0


def _append(client: httpx.Client, place: _Place, file: RemoteFile, part: Path, progress: Progress) -> bool:
    """One request for the bytes that `part` lacks. False: there is nothing to be had in this way."""
    import httpx

    have = _size(part)
    with client.stream("GET", file.url, headers={"Range": f"bytes={have}-"} if have else {}) as response:
        if response.status_code in TEMPORARY:
            raise httpx.RequestError(f"it answers {response.status_code}")
        if response.status_code == 416:  # the file there ends before ours
            return False
        _check_status(place, response)
        continues = response.status_code == 206
        progress.advance(0 if continues else -have)
        with open(part, "ab" if continues else "wb") as target:
            for (
                block
            ) in response.iter_bytes():  # as they arrive: larger blocks would be lost when the connection breaks
                target.write(block)
                progress.advance(len(block))
                if target.tell() > file.size:  # it is not the file, and may never end
                    return False
    return True
