"""What the paths of the API share: the table of models, an answer in the making, how a response is written."""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from common.console import UserError, note, ran_out_of_memory
from inference.engine import Request as EngineRequest
from inference.sampling import Sampling
from serve.choices import Choices, answering
from serve.metrics import Metrics
from serve.models import DEFAULTS, Served
from serve.requests import ChatRequest, Common, Refused
from serve.runner import Busy, Runner
from tokenizer.answer import Answer

FINGERPRINT = "sparrow"
LISTED = 2**19  # log-probabilities in an answer: about 300 MB while it is written


@dataclass(frozen=True)
class Limits:
    max_new_tokens: int = 1024  # where the request does not say
    max_waiting: int = 64  # sequences in the queue of a model
    request_seconds: float = 300.0  # an answer that takes longer is ended as it is


Load = Callable[[], tuple[dict[str, Served], list[str]]]  # -> (the table, remarks to print)


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would build one for each call


def to_json(content: Any) -> bytes:
    return _ENCODER.encode(content).encode("utf-8", "replace")


def event(content: Any) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"


class Server:
    """What all paths need."""

    def __init__(self, table: dict[str, Served], limits: Limits, defaults: Sampling, load: Load | None = None):
        self.table, self.limits, self.defaults, self.load = table, limits, defaults, load
        self.runner = Runner(limits.max_waiting)
        self.metrics = Metrics(table)
        self.loading = asyncio.Lock()

    async def reload(self) -> bool:
        """Reads all models again if a file was written since, or if there were none -> whether it did.

        The new ones are complete before they take the place of the old, and while they are read the old ones answer.
        Requests that have begun end on the old ones, which then leave the memory. Refused if the files cannot be read;
        then all stays as it is.
        """
        async with self.loading:  # who waits here finds nothing left to do
            if self.load is None or self.table and not any(served.changed for served in self.table.values()):
                return False
            try:
                table, remarks = await asyncio.to_thread(self.load)
            except (UserError, RuntimeError, MemoryError) as error:
                if not isinstance(error, UserError) and not ran_out_of_memory(error):
                    raise
                full = "out of memory, which would have to hold the old ones and the new; start the server again"
                reason = error if isinstance(error, UserError) else full
                note(f"not loaded again: {reason}")
                what = f"The files cannot be loaded, and the models stay as they were: {reason}"
                raise Refused(what, None, "reload_failed", 409) from None
            for remark in remarks:
                note(remark)
            self.table.clear()
            self.table.update(table)
            return True

    def find(self, name: str | None) -> Served:
        if not self.table:
            raise Refused("No model is served: there were no weights yet", "model", "model_not_found", 404)
        if name in self.table:
            return self.table[name]
        if name in (None, "", *DEFAULTS):
            return next(iter(self.table.values()))
        known = ", ".join(self.table)
        raise Refused(f"The model {name!r} does not exist; there are {known}", "model", "model_not_found", 404)

    def request(
        self, served: Served, body: Common, ids: list[int], choice: int, asked: int | None, **more
    ) -> EngineRequest:
        """asked: the number of new tokens that the client wants; None: it does not say."""
        room = served.engine.capacity - len(ids)
        if room < (1 if asked != 0 else 0):
            raise too_long(served, f"{len(ids)}", "messages" if isinstance(body, ChatRequest) else "prompt")
        new = min(room, self.limits.max_new_tokens if asked is None else asked)
        sampling = body.sampling(self.defaults, choice)
        return EngineRequest(ids, sampling, new, served.tokenizer.stop_ids, **more)

    @asynccontextmanager
    async def answering(self, served: Served, requests: list[EngineRequest], answers: list[Answer], one_call=False):
        try:
            work = answering(
                self.runner,
                served.engine,
                requests,
                answers,
                served.tokenizer,
                seconds=self.limits.request_seconds,
                one_call=one_call,
            )
            async with work as choices:
                try:
                    yield choices
                finally:  # also what nobody waited for
                    self.metrics.count(choices.choices)
        except Busy:
            raise overloaded() from None
        except UserError as error:
            raise Refused(str(error)) from None


async def whole(request: Request, choices: Choices) -> dict[int, list[dict]] | None:
    """All deltas of each choice; None if the client has gone."""
    deltas: dict[int, list[dict]] = {choice.index: [] for choice in choices.choices}

    async def collect() -> None:
        async for choice, new in choices.follow():
            deltas[choice.index] += new

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work()) for work in (collect, left)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return None
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if choices.failed is not None:
        raise failure()
    return deltas


def too_long(served: Served, found: str, param: str) -> Refused:
    limit = served.engine.capacity
    what = f"This model's maximum context length is {limit} tokens, and the prompt has {found}. Please shorten it."
    return Refused(what, param, "context_length_exceeded")


def check_length(served: Served, texts: Iterable[str], param: str) -> None:
    """Refuses what cannot fit, however it is tokenised, before time is spent on tokenising it."""
    characters = sum(len(text) for text in texts)
    least = characters // int(served.tokenizer.token_bytes.max())  # a character is at least a byte
    if least > served.engine.capacity:
        raise too_long(served, f"more than {least}", param)


def check_tools(served: Served, tools: list[dict] | None) -> None:
    if tools and not served.tokenizer.takes_tools:
        what = "tools: this model's chat template has no place for them; ask without tools, or another model"
        raise Refused(what, "tools")


def check_listed(requests: list[EngineRequest]) -> None:
    """Refuses what would list more log-probabilities than LISTED."""
    asked = [r for r in requests if r.logprobs is not None]
    tokens = sum(r.max_new_tokens + (len(r.prompt) if r.prompt_logprobs else 0) for r in asked)
    if (found := tokens * (1 + max((r.logprobs or 0 for r in asked), default=0))) > LISTED:
        what = (
            f"these are up to {found:,} log-probabilities and {LISTED:,} are allowed: ask for fewer tokens or choices"
        )
        raise Refused(f"logprobs: {what}", "logprobs")


def overloaded() -> Refused:
    why, code, kind = (
        "The server has more requests than it can take; try later",
        "rate_limit_exceeded",
        "rate_limit_error",
    )
    return Refused(why, code=code, status=429, kind=kind, headers={"Retry-After": "2"})


def failure() -> Refused:
    return Refused("The model failed on this request; the server's log says why", None, None, 500, "server_error")


class Events(StreamingResponse):
    """Closes what it sends also if it never began, because the client had left."""

    def __init__(self, content: AsyncGenerator[bytes], source: AsyncGenerator[bytes]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self.source = source

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.source.aclose()


async def opened(stream: AsyncGenerator[bytes]) -> Response:
    """A streaming response. What is wrong with the request shows before the stream begins, as an error of its own."""
    first = await anext(stream)

    async def everything() -> AsyncGenerator[bytes]:
        try:
            yield first
            async for chunk in stream:
                yield chunk
        except Exception as error:  # the status is sent already
            if not isinstance(error, Refused):
                traceback.print_exception(error)
                error = failure()
            yield event(error.body)

    return Events(everything(), stream)
