"""What a hub (Hugging Face or ModelScope) says: the files of a repository, and the way to them.

    repository = list_files("Qwen/Qwen2-0.5B", "model")      # names, sizes, checksums; common/fetch.py fetches them

HF_ENDPOINT and MODELSCOPE_ENDPOINT name mirrors, HF_TOKEN and MODELSCOPE_API_TOKEN open what is not public,
HF_HUB_OFFLINE=1 forbids all of it, USE_MODELSCOPE_HUB=1 makes ModelScope the default.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from common.console import UserError
from common.values import YES

if TYPE_CHECKING:
    import httpx

OUR_FOLDERS = ("out", "models", "dataset")  # need not exist yet: out/full_sft is no name on a hub
ENDINGS = (".bin", ".csv", ".gz", ".json", ".jsonl", ".parquet", ".pth", ".safetensors", ".txt", ".yaml", ".yml")


class Hub(NamedTuple):
    endpoint: str
    endpoint_variable: str  # of the environment
    token_variable: str
    token_page: str  # where people get one
    header: tuple[str, str]  # that carries it
    pages: dict[str, str]  # kind of repository -> what its page's path begins with
    instead: str  # the other hub, for messages


HUBS = {
    "huggingface": Hub(
        "https://huggingface.co",
        "HF_ENDPOINT",
        "HF_TOKEN",
        "huggingface.co/settings/tokens",
        ("Authorization", "Bearer {}"),
        {"model": "", "dataset": "datasets/"},
        "USE_MODELSCOPE_HUB=1 takes modelscope.cn",
    ),
    "modelscope": Hub(
        "https://modelscope.cn",
        "MODELSCOPE_ENDPOINT",
        "MODELSCOPE_API_TOKEN",
        "modelscope.cn/my/myaccesstoken",
        ("Cookie", "m_session_id={}"),
        {"model": "models/", "dataset": "datasets/"},
        "scripts/download.py --source huggingface takes huggingface.co",
    ),
}
SOURCES = tuple(HUBS)


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


class Place(NamedTuple):
    """A repository's place on a hub, and how to say who is asking."""

    id: str
    host: str  # for messages
    endpoint: str
    page: str  # for people
    headers: dict[str, str]
    token: str  # how to get at what is not public
    elsewhere: str  # where else to look


def offline() -> bool:
    """Whether the environment forbids to fetch anything."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in YES


def default_source() -> str:
    return SOURCES[os.environ.get("USE_MODELSCOPE_HUB", "").lower() in YES]


def typed_name(path: str | Path) -> str:
    """What was typed, of a path that the options have made absolute."""
    path, here = Path(path), Path.cwd()
    return (path.relative_to(here) if path.is_relative_to(here) else path).as_posix()


def check_id(id: str) -> None:
    owner, _, name = id.partition("/")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", id) or {owner, name} & {".", ".."}:
        raise UserError(f"{id}: no name on a hub, which is OWNER/NAME, as in Qwen/Qwen2-0.5B")


def is_id(name: str) -> bool:
    """Whether this may be a name on a hub and no path: nothing here is called OWNER."""
    try:
        check_id(name)
    except UserError:
        return False
    owner = name.partition("/")[0]
    return owner not in OUR_FOLDERS and not name.endswith(ENDINGS) and not Path(owner).exists()


def pick(repository: Repository, patterns: Sequence[str]) -> list[RemoteFile]:
    """The files whose names match one of the patterns (`*.jsonl`). UserError, with what there is, if none does."""
    found = [file for file in repository.files if any(fnmatchcase(file.name, pattern) for pattern in patterns)]
    if not found:
        raise UserError(f"{repository.id}: has no file called {' or '.join(patterns)}; there is {listed(repository)}")
    return found


def listed(repository: Repository) -> str:
    """The names of its first files, for a message."""
    return ", ".join(file.name for file in repository.files[:20]) or "no file at all"


def list_files(id: str, kind: str, *, source: str | None = None, revision: str | None = None) -> Repository:
    """The files of a repository, at one commit.

    kind      "model" or "dataset"
    source    of SOURCES; None: `default_source`
    revision  a branch, tag or commit; None: the main branch
    """
    check_id(id)
    source = source or default_source()
    if offline():
        raise UserError(f"{id}: HF_HUB_OFFLINE forbids to fetch it")
    place = place_of(id, kind, source)
    with client_of(place) as client:
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
        check_name(id, file.name)
    return Repository(id, kind, source, commit, files)


def place_of(id: str, kind: str, source: str) -> Place:
    hub = HUBS[source]
    endpoint = (os.environ.get(hub.endpoint_variable) or hub.endpoint).rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise UserError(f"{hub.endpoint_variable}={endpoint}: write https://{endpoint}")
    name, value = hub.header
    secret = os.environ.get(hub.token_variable)
    return Place(
        id,
        host=endpoint.partition("://")[2],
        endpoint=endpoint,
        page=f"{endpoint}/{hub.pages[kind]}{id}",
        headers={name: value.format(secret)} if secret else {},
        token=f"set {hub.token_variable} to a token from {hub.token_page}",
        elsewhere=f"{hub.endpoint_variable}=https://... names a mirror, {hub.instead} instead",
    )


def _huggingface_tree(
    client: httpx.Client, place: Place, kind: str, revision: str | None
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
    client: httpx.Client, place: Place, kind: str, revision: str | None
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
def client_of(place: Place) -> Iterator[httpx.Client]:
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


def _get(client: httpx.Client, place: Place, url: str) -> httpx.Response:
    import httpx

    try:
        response = client.get(url)
    except httpx.RequestError as error:
        raise unreachable(place, error) from None
    check_status(place, response)
    return response


def unreachable(place: Place, error: Exception) -> UserError:
    reason = str(error) or type(error).__name__
    return UserError(
        f"{place.id}: cannot be fetched from {place.host} ({reason}). Is there a network? {place.elsewhere}"
    )


def check_status(place: Place, response: httpx.Response) -> None:
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
    raise UserError(
        f"{place.id}: {place.host} answers {status} {response.reason_phrase}; try again later. {place.elsewhere}"
    )


def check_name(id: str, name: str) -> None:
    """A name that would lead out of the folder it is written to, here or on Windows, is refused."""
    path = PureWindowsPath(name)
    if not path.parts or path.drive or path.root or ".." in path.parts or not name.isprintable():
        raise UserError(f"{id}: has a file called {name!r}, which would be written outside of its folder; refused")
