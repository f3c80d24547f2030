"""A hub on this machine that speaks the paths of Hugging Face and of ModelScope, and can misbehave.

with Hub() as hub:                                       # HF_ENDPOINT=hub.url, MODELSCOPE_ENDPOINT=hub.url
    hub.add("someone/tiny", {"config.json": b"{}"})
    hub.cut["model.safetensors"] = [1000, 0]             # breaks after so many bytes, once for each number
"""

import hashlib
import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"
SMALL = 100  # bytes: files up to this size are in git itself, larger ones in LFS, as on the hubs
PAGE = 50  # entries of a page of Hugging Face's tree


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    def __init__(self):
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.cut: dict[str, list[int]] = {}  # file -> after how many bytes its connections break, the next one first
        self.sends: dict[str, bytes] = {}  # file -> what is sent instead of it
        self.status: dict[str, list[tuple[int, dict]]] = {}  # part of a path -> the next answers: (status, headers)
        self.redirects: dict[str, str] = {}  # file -> where its address leads
        self.ranges = True  # whether Range is understood
        self.asked: list[tuple[str, dict[str, str]]] = []  # paths and headers of all requests

    def add(self, id: str, files: dict[str, bytes], kind: str = "model") -> None:
        self.repositories[kind, id] = files

    def fetched(self) -> list[str]:
        """The files whose content was asked for, a request each."""
        return [path.rpartition("/")[2] for path, _ in self.asked if "/resolve/" in path or "/repo?" in path]

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.asked.append((self.path, dict(self.headers)))
                with suppress(BrokenPipeError, ConnectionResetError):
                    hub.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        for part, answers in self.status.items():
            if part in request.path and answers:
                status, headers = answers.pop(0)
                return self.send(request, b"", status, headers)
        parts, query = urlsplit(request.path).path.strip("/").split("/"), parse_qs(urlsplit(request.path).query)
        if parts[:2] == ["api", "v1"]:
            return self.modelscope(request, parts[2:], query)
        if parts[0] == "api":
            return self.tree(request, parts[1:], query)
        kind = "dataset" if parts[0] == "datasets" else "model"
        owner, name, resolve, commit, *file = parts[kind == "dataset" :]
        files = self.repositories.get((kind, f"{owner}/{name}"), {})
        assert (resolve, commit) == ("resolve", COMMIT), "all files are asked for at the commit that was listed"
        self.content(request, files, unquote("/".join(file)))

    def tree(self, request, parts, query) -> None:
        """Hugging Face: api/models/ID/revision/REV and api/models/ID/tree/REV."""
        kind, owner, name, what, revision = parts
        files = self.repositories.get((kind.removesuffix("s"), f"{owner}/{name}"))
        if files is None:
            return self.send(request, b"", 401, {"X-Error-Code": "RepoNotFound"})
        if unquote(revision) not in ("main", "v1", COMMIT):
            return self.send(request, b"", 404, {"X-Error-Code": "RevisionNotFound"})
        if what == "revision":
            return self.send(request, json.dumps({"sha": COMMIT}).encode())
        entries = [{"type": "directory", "path": "folder", "oid": "0"}]
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if len(content) > SMALL:
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        begin = int(query.get("cursor", ["0"])[0])
        more = f"{self.url}/api/{kind}/{owner}/{name}/tree/{revision}?recursive=true&cursor={begin + PAGE}"
        headers = {"Link": f'<{more}>; rel="next"'} if begin + PAGE < len(entries) else {}
        self.send(request, json.dumps(entries[begin : begin + PAGE]).encode(), headers=headers)

    def modelscope(self, request, parts, query) -> None:
        """api/v1/models/ID/repo/files, api/v1/datasets/ID/repo/tree, and api/v1/.../repo?FilePath=NAME."""
        kind, owner, name, _, *what = parts
        files = self.repositories.get((kind.removesuffix("s"), f"{owner}/{name}"))
        if files is None:
            return self.send(request, b'{"Code": 10010205001, "Success": false, "Data": null}', 404)
        if not what:
            return self.content(request, files, query["FilePath"][0])
        assert what == (["files"] if kind == "models" else ["tree"])
        entries = [{"Path": "folder", "Type": "tree", "Size": 0, "Sha256": ""}]
        for path, content in files.items():
            sha = hashlib.sha256(content).hexdigest()
            entries.append({"Path": path, "Type": "blob", "Size": len(content), "Sha256": sha})
        if kind == "datasets":
            page, size = int(query["PageNumber"][0]), int(query["PageSize"][0])
            entries = entries[(page - 1) * size : page * size]
        self.send(request, json.dumps({"Code": 200, "Success": True, "Data": {"Files": entries}}).encode())

    def content(self, request, files: dict[str, bytes], name: str) -> None:
        if name in self.redirects:
            return self.send(request, b"", 302, {"Location": self.redirects[name]})
        if name not in files:
            return self.send(request, b"", 404, {"X-Error-Code": "EntryNotFound"})
        content, begin = self.sends.get(name, files[name]), 0
        if self.ranges and (wanted := request.headers.get("Range")):
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(content):
                return self.send(request, b"", 416)
        breaks = self.cut.get(name)
        status = 206 if begin else 200
        self.send(request, content[begin:], status, until=breaks.pop(0) if breaks else None)

    def send(self, request, content: bytes, status: int = 200, headers: dict | None = None, until=None) -> None:
        request.send_response(status)
        for key, value in (headers or {}).items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content[:until])
