"""What stands before every path: who may ask, how much, and how long. Requests that fail here cost next to nothing.

- Host: a page in the user's browser can make its own name point to this machine (DNS rebinding). The name in the Host
  header tells.
- Origin: a browser says which page a request comes from. Only pages of this server and those allowed may ask.
- key: compared in a time that does not depend on how much of it is right.
- body: read here, up to a size and within a time; all that are in progress together have a limit, too.
- answer: a connection whose client does not read is broken off.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.metrics import Metrics
from serve.requests import Refused
from serve.server import overloaded
from serve.static import PAGES

LOCAL = ("localhost", "127.0.0.1", "::1")
OPEN = ("/health", *PAGES)  # paths that need no key
SMALL = 64 << 10  # bytes: what a request has beyond counts towards a limit for all together
BODIES = 16  # of the largest size that may be in progress at a time. As Python's objects they take up to 20 times more
LINGER_SECONDS, LINGER_BYTES = 2.0, 16 << 20


@dataclass(frozen=True)
class Rules:
    hosts: tuple[str, ...] = LOCAL  # the names this server may be called by; empty: any
    origins: tuple[str, ...] = ()  # pages of other servers that may ask; "*": all
    key: str | None = None
    body_bytes: int = 2 << 20
    body_seconds: float = 30.0
    total_seconds: float = 600.0  # a request that is not over then is broken off: its client does not read


def guarded(app: FastAPI, rules: Rules):
    """The application (serve/app.py) behind its guard."""
    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    inner = Guard(app, rules, app.state.server.metrics, paths)
    if not rules.origins:
        return inner
    return CORSMiddleware(inner, allow_origins=rules.origins, allow_methods=["GET", "POST"], allow_headers=["*"])


class Guard:
    """ASGI middleware."""

    def __init__(self, app, rules: Rules, metrics: Metrics, paths: frozenset[str]):
        self.app, self.rules, self.metrics, self.paths = app, rules, metrics, paths
        self.held = 0  # bytes of the requests in progress, each without its first SMALL

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return  # there are no websockets here; the server closes the connection
        status = 0
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def noted(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        body = bytearray()
        try:
            self.check(scope)
            await self.read(scope, receive, body)
            await asyncio.wait_for(self.app(scope, replay(bytes(body), receive), noted), self.rules.total_seconds)
        except Refused as refused:
            await refuse(refused, noted, receive)
        except asyncio.TimeoutError:
            if status:
                raise ConnectionAbortedError("the client did not read its answer") from None
            await refuse(Refused("The answer took too long", code="timeout", status=504, kind="server_error"), noted)
        finally:
            self.held -= max(len(body) - SMALL, 0)
            self.metrics.respond(path, status)

    def check(self, scope) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self.rules.hosts and name_of(host) not in self.rules.hosts:
            known = "--allowed_hosts names those that are"
            raise Refused(f"Host {host[:100]!r} is not served here; {known}", code="bad_host", status=403)
        origin = headers.get("origin")
        if origin and not {origin, "*"} & set(self.rules.origins) and authority(origin) != host:
            known = "--cors_origins names those that may"
            raise Refused(f"Pages of {origin[:100]!r} may not ask; {known}", code="bad_origin", status=403)
        if self.rules.key and scope["path"] not in OPEN and scope["method"] != "OPTIONS":
            given, wanted = headers.get("authorization", ""), f"Bearer {self.rules.key}"
            if not hmac.compare_digest(given.encode(), wanted.encode()):
                how = {"WWW-Authenticate": "Bearer"}
                raise Refused("Incorrect API key provided", code="invalid_api_key", status=401, headers=how)

    async def read(self, scope, receive, body: bytearray) -> None:
        """Reads the request's body into `body`."""
        limit = self.rules.body_bytes
        too_large = Refused(f"The body is larger than {limit:,} bytes", code="body_too_large", status=413)
        for name, value in scope["headers"]:
            if name == b"content-length" and (not value.isdigit() or int(value[:20]) > limit):
                raise too_large
        try:
            await asyncio.wait_for(self._collect(receive, body, too_large), self.rules.body_seconds)
        except asyncio.TimeoutError:
            raise Refused("The body did not arrive in time", code="timeout", status=408) from None

    async def _collect(self, receive, body: bytearray, too_large: Refused) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused("The client left", status=499)
            before = max(len(body) - SMALL, 0)
            body += message.get("body", b"")
            self.held += (large := max(len(body) - SMALL, 0)) - before
            if len(body) > self.rules.body_bytes:
                raise too_large
            if large and self.held > BODIES * self.rules.body_bytes:
                raise overloaded()
            if not message.get("more_body"):
                return


def name_of(host: str) -> str:
    """`localhost:8998` -> `localhost`, `[::1]:80` -> `::1`"""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and ":" in host else host


def authority(origin: str) -> str:
    """`http://localhost:8998` -> `localhost:8998`"""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def replay(body: bytes, receive: Callable[[], Awaitable[dict]]) -> Callable[[], Awaitable[dict]]:
    """A `receive` that gives the body once, and then what comes from the connection: that the client has left."""
    given = False

    async def again() -> dict:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def refuse(refused: Refused, send, receive=None) -> None:
    """Sends the error and closes the connection. With `receive`, what may still come of the body is thrown away for a
    while first: a connection that is closed while data arrives takes the answer with it."""
    body = json.dumps(refused.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    pairs = [(name.lower().encode(), value.encode()) for name, value in (headers | (refused.headers or {})).items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if receive is not None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_throw_away(receive), LINGER_SECONDS)
    await send({"type": "http.response.body", "body": b""})


async def _throw_away(receive) -> None:
    size, more = 0, True
    while more and size < LINGER_BYTES:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)


class PatientProtocol(H11Protocol):
    """uvicorn's, which lets a client take as long as it likes for its headers, and to read its answer. Here it has
    PATIENCE_SECONDS to twice that."""

    PATIENCE_SECONDS = 20

    def connection_made(self, transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        # asyncio does this only for sockets that know their protocol's number. Without it, the system holds a small
        # message back until the client has confirmed the one before, which may take 40 ms
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pauses = 0  # of writing, since its buffer was full
        self.loop.call_later(self.PATIENCE_SECONDS, self._look, None, None)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.pauses += 1

    def _look(self, cycle_before, unread_before) -> None:
        """Closes the connection if since the last look no request has begun and none is being answered, or if nothing
        was read of an answer that waits to be read."""
        if self not in self.connections:
            return
        cycle, waits = self.cycle, self.flow.write_paused or self.transport.is_closing()
        unread = (self.transport.get_write_buffer_size(), self.pauses) if waits else None  # nothing is added to it
        if unread is not None and unread == unread_before:
            self.transport.abort()
        elif cycle is cycle_before and (cycle is None or cycle.response_complete):
            self.transport.close()
        self.loop.call_later(self.PATIENCE_SECONDS, self._look, cycle, unread)

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets an error in the same form as all others."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the middle of an answer
            return self.transport.abort()
        body = json.dumps(Refused(msg).body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
