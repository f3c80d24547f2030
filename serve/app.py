"""The server: OpenAI's paths, and what each of them does. scripts/serve_openai_api.py starts it.

app = build_app(table, Limits(), Sampling())         # an ASGI application; the engines start with it
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from common.console import UserError
from inference.engine import Request as EngineRequest
from inference.sampling import Sampling
from serve.answer import CALL, Answer, join
from serve.choices import Choice, Choices, answering, chat_logprobs, text_logprobs
from serve.metrics import Metrics
from serve.models import DEFAULTS, Served
from serve.requests import ChatRequest, Common, CompletionRequest, DetokenizeRequest, Refused, TokenizeRequest, refusal
from serve.runner import Busy, Runner
from tokenizer.chat import encode_chat

FINGERPRINT = "sparrow"


@dataclass(frozen=True)
class Limits:
    max_new_tokens: int = 1024  # where the request does not say
    max_waiting: int = 64  # sequences in the queue of a model
    request_seconds: float = 300.0  # an answer that takes longer is ended as it is


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(content: Any) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"


class Server:
    """What all paths need."""

    def __init__(self, table: dict[str, Served], limits: Limits, defaults: Sampling):
        self.table, self.limits, self.defaults = table, limits, defaults
        self.runner = Runner((served.engine for served in table.values()), limits.max_waiting)
        self.metrics = Metrics(table)

    def find(self, name: str | None) -> Served:
        first = next(iter(self.table.values()))
        if name in self.table:
            return self.table[name]
        if name in (None, "", *DEFAULTS):
            return first
        known = ", ".join(self.table)
        raise Refused(f"The model {name!r} does not exist; there are {known}", "model", "model_not_found", 404)

    def request(
        self, served: Served, body: Common, ids: list[int], choice: int, asked: int | None, **more
    ) -> EngineRequest:
        """asked: the number of new tokens that the client wants; None: it does not say."""
        room = served.engine.capacity - len(ids)
        if room < (1 if asked != 0 else 0):
            raise Refused(
                f"This model's maximum context length is {served.engine.capacity} tokens, and the prompt has "
                f"{len(ids)}. Please shorten it.",
                "messages" if isinstance(body, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
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
                yield choices
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


def overloaded() -> Refused:
    why, code, kind = (
        "The server has more requests than it can take; try later",
        "rate_limit_exceeded",
        "rate_limit_error",
    )
    return Refused(why, code=code, status=429, kind=kind, headers={"Retry-After": "2"})


def failure() -> Refused:
    return Refused("The model failed on this request; the server's log says why", None, None, 500, "server_error")


async def opened(stream: AsyncIterator[bytes]) -> Response:
    """A streaming response. What is wrong with the request shows before the stream begins, as an error of its own."""
    first = await anext(stream)

    async def everything() -> AsyncIterator[bytes]:
        try:
            yield first
            async for chunk in stream:
                yield chunk
        except Exception as error:  # the status is sent already
            refused = error if isinstance(error, Refused) else failure()
            yield event(refused.body)
        finally:
            await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue] (it is a generator)

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(everything(), media_type="text/event-stream", headers=headers)


# ---- chat


async def chat(server: Server, body: ChatRequest, request: Request) -> Response:
    served = server.find(body.model)
    try:
        messages, tools = body.conversation()
        call = body.forced_call()
        thinking = body.thinking if call is None or body.thinking is None else False  # a call is not a thought
        encoded = await asyncio.to_thread(
            encode_chat, served.tokenizer, messages, tools, add_generation_prompt=True, enable_thinking=thinking
        )
    except UserError as error:
        raise refusal(error) from None
    ids, tokenizer = encoded.ids, served.tokenizer
    if call is not None:
        tag = tokenizer.control.get(CALL[0])
        ids = ids + (tokenizer.encode(CALL[0] + call) if tag is None else [tag, *tokenizer.encode(call)])
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None
    stops, n = body.stops(), body.n or 1
    requests = [server.request(served, body, ids, i, asked, logprobs=top) for i in range(n)]
    answers = [Answer(tokenizer, ids, stops, bool(tools), call) for _ in range(n)]
    about = {"id": f"chatcmpl-{token_hex(12)}", "created": int(time.time()), "model": body.model or served.name}
    about["system_fingerprint"] = FINGERPRINT
    work = server.answering(served, requests, answers, one_call=body.parallel_tool_calls is False)
    if body.stream:
        return await opened(_chat_stream(work, about, body))
    async with work as choices:
        deltas = await whole(request, choices)
        if deltas is None:
            return Response(status_code=499)  # nobody reads it
        listed = [
            {
                "index": choice.index,
                "message": join(deltas[choice.index]) | {"refusal": None},
                "logprobs": chat_logprobs(tokenizer, choice.logprobs(0)) if body.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for choice in choices.choices
        ]
        return Json(about | {"object": "chat.completion", "choices": listed, "usage": choices.usage()})


async def _chat_stream(work, about: dict, body: ChatRequest) -> AsyncIterator[bytes]:
    about = about | {"object": "chat.completion.chunk"}
    usage = {"usage": None} if body.wants_usage else {}

    def chunk(choice: Choice, delta: dict, told: list | None = None, finish_reason: str | None = None) -> bytes:
        logprobs = chat_logprobs(choice.tokenizer, told) if told is not None else None
        one = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return event(about | {"choices": [one]} | usage)

    async with work as choices:
        told = dict.fromkeys(range(len(choices.choices)), 0)  # tokens whose log-probabilities were sent
        for choice in choices.choices:
            yield chunk(choice, {"role": "assistant", "content": ""})
        async for choice, deltas in choices.follow():
            if choices.failed is not None:
                raise failure()
            found = choice.logprobs(told[choice.index]) if body.logprobs else None
            told[choice.index] = choice.seen
            for n, delta in enumerate(merged(deltas) or ([{"content": ""}] if found else [])):
                yield chunk(choice, delta, found if n == 0 else None)
            if choice.finish_reason:
                yield chunk(choice, {}, finish_reason=choice.finish_reason)
        if body.wants_usage:
            yield event(about | {"choices": [], "usage": choices.usage()})
        yield b"data: [DONE]\n\n"


def merged(deltas: list[dict]) -> list[dict]:
    """Neighbouring deltas of the same text as one."""
    out: list[dict] = []
    for delta in deltas:
        (key,) = delta
        if out and key in out[-1] and isinstance(delta[key], str):
            out[-1] = {key: out[-1][key] + delta[key]}
        else:
            out.append(delta)
    return out


# ---- completions


async def complete(server: Server, body: CompletionRequest, request: Request) -> Response:
    served = server.find(body.model)
    tokenizer, n = served.tokenizer, body.n or 1
    stops, asked = body.stops(), 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default
    more = dict(logprobs=body.logprobs, prompt_logprobs=bool(body.echo and body.logprobs is not None))
    requests, answers, prompts = [], [], []
    for prompt in body.prompts():
        ids, hidden = await asyncio.to_thread(_prompt_ids, served, prompt)
        for _ in range(n):
            requests.append(server.request(served, body, ids, len(requests) % n, asked, **more))
            answers.append(Answer(tokenizer, stop=stops, plain=True))
            prompts.append((ids, hidden))
    about = {"id": f"cmpl-{token_hex(12)}", "object": "text_completion", "created": int(time.time())}
    about |= {"model": body.model or served.name, "system_fingerprint": FINGERPRINT}
    work = server.answering(served, requests, answers)

    def begin(choice: Choice) -> str:
        """The text before the answer, if it is asked for."""
        ids, hidden = prompts[choice.index]
        return tokenizer.decode(ids[hidden:], skip_control=True) if body.echo else ""

    def told(choice: Choice, start: int, first: bool) -> dict | None:
        """The log-probabilities of the tokens from `start` on, and first of the prompt's."""
        if body.logprobs is None:
            return None
        found: list = choice.logprobs(start)
        offset = 0 if first else len(begin(choice) + tokenizer.decode(choice.sequence.tokens[:start], True))
        if choice.finish_reason and choice.sequence.end is not None and not choice.answer.stopped:
            found.append((choice.sequence.end, choice.sequence.logprobs[-1]))  # the end token is a token, too
        if first and body.echo:
            ids, hidden = prompts[choice.index]
            found = [*zip(ids, [None, *choice.sequence.prompt_logprobs])][hidden:] + found
        return text_logprobs(tokenizer, found, offset)

    def entry(choice: Choice, text: str, logprobs: dict | None) -> dict:
        about_it = {"index": choice.index, "text": text, "logprobs": logprobs}
        return about_it | {"finish_reason": choice.finish_reason}

    if body.stream:
        return await opened(_text_stream(work, about, body, begin, told, entry))
    async with work as choices:
        deltas = await whole(request, choices)
        if deltas is None:
            return Response(status_code=499)  # nobody reads it
        listed = [
            entry(choice, begin(choice) + (join(deltas[choice.index])["content"]), told(choice, 0, True))
            for choice in choices.choices
        ]
        return Json(about | {"choices": listed, "usage": choices.usage()})


def _prompt_ids(served: Served, prompt: str | list[int]) -> tuple[list[int], int]:
    """(ids, how many of them the client did not write). A text follows the end of another, as in pretraining."""
    if isinstance(prompt, str):
        try:
            return [served.tokenizer.end_of_text, *served.tokenizer.encode(prompt)], 1
        except UserError as error:
            raise Refused(str(error), "prompt") from None
    limit = served.engine.model.config.vocab_size
    if not prompt or any(token >= limit for token in prompt):
        raise Refused(f"prompt: token ids from 0 to {limit - 1}, at least one", "prompt")
    return prompt, 0


async def _text_stream(work, about: dict, body: CompletionRequest, begin: Callable, told: Callable, entry: Callable):
    usage = {"usage": None} if body.wants_usage else {}
    async with work as choices:
        seen = dict.fromkeys(range(len(choices.choices)), 0)
        fresh = set(seen)
        async for choice, deltas in choices.follow():
            if choices.failed is not None:
                raise failure()
            i, first = choice.index, choice.index in fresh
            text = (begin(choice) if first else "") + (join(deltas)["content"])
            logprobs = told(choice, seen[i], first)
            yield event(about | {"choices": [entry(choice, text, logprobs)]} | usage)
            seen[i] = choice.seen
            fresh.discard(i)
        if body.wants_usage:
            yield event(about | {"choices": [], "usage": choices.usage()})
        yield b"data: [DONE]\n\n"


# ---- the rest


async def tokenize(server: Server, body: TokenizeRequest) -> Response:
    served = server.find(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise Refused("give either prompt or messages", "prompt")
    try:
        if body.prompt is not None:
            ids = await asyncio.to_thread(served.tokenizer.encode, body.prompt)
        else:
            messages, tools = ChatRequest.model_validate(
                {"messages": body.messages, "tools": body.tools}
            ).conversation()
            prompt = dict(add_generation_prompt=body.add_generation_prompt)
            ids = (await asyncio.to_thread(encode_chat, served.tokenizer, messages, tools, **prompt)).ids
    except UserError as error:
        raise refusal(error) from None
    return Json({"tokens": ids, "count": len(ids), "max_model_len": served.engine.capacity})


def model_entry(served: Served) -> dict:
    more = {"parent": served.base, "max_model_len": served.engine.capacity}
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "sparrow"} | more


def build_app(table: dict[str, Served], limits: Limits, defaults: Sampling) -> FastAPI:
    server = Server(table, limits, defaults)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        server.runner.start()
        yield
        server.runner.stop()

    # no pages with the API's documentation: FastAPI's load scripts from elsewhere
    app = FastAPI(title="Sparrow", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request):
        return await chat(server, body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request):
        return await complete(server, body, request)

    @app.post("/tokenize")
    async def tokens_of_text(body: TokenizeRequest):
        return await tokenize(server, body)

    @app.post("/detokenize")
    async def text_of_tokens(body: DetokenizeRequest):
        return Json({"prompt": server.find(body.model).tokenizer.decode(body.tokens)})

    @app.get("/v1/models")
    async def models():
        return Json({"object": "list", "data": [model_entry(served) for served in table.values()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        return Json(model_entry(server.find(name)))

    @app.get("/health")
    async def health():
        alive = server.runner.thread.is_alive()
        return Json({"status": "ok" if alive else "the engines have stopped"}, status_code=200 if alive else 503)

    @app.get("/metrics")
    async def metrics():
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    add_errors(app)
    return app


def add_errors(app: FastAPI) -> None:
    """Every error has OpenAI's form."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused):
        return Json(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return Json(Refused(f"{place or 'body'}: {first['msg']}", place or None).body, 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException):
        return Json(Refused(str(error.detail)).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception):
        return Json(Refused("Internal error; the server's log says more", None, None, 500, "server_error").body, 500)

    @app.exception_handler(RecursionError)
    async def deep(request: Request, error: RecursionError):
        return Json(Refused("the request is nested too deeply").body, 400)
