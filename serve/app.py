"""The server: OpenAI's paths, and what each of them does. scripts/serve_openai_api.py starts it.

app = build_app(table, Limits(), Sampling())         # an ASGI application; the engines start with it
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from common.console import UserError
from inference.sampling import Sampling
from inference.tools import ROUNDS, TOOLS, run_tool
from serve.chat import chat
from serve.completions import complete
from serve.models import Served
from serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Error,
    Refused,
    TokenizeRequest,
    ToolRequest,
    refusal,
    words,
)
from serve.runs import Runs
from serve.server import Json, Limits, Load, Server, check_length, check_tools, too_long
from serve.static import PAGES, page
from tokenizer.chat import encode_chat


async def tokenize(server: Server, body: TokenizeRequest) -> Response:
    served = server.find(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise Refused("give either prompt or messages", "prompt")
    try:
        if body.prompt is not None:
            check_length(served, [body.prompt], "prompt")
            ids = await asyncio.to_thread(served.tokenizer.encode, body.prompt)
        else:
            messages, tools = ChatRequest.model_validate(
                {"messages": body.messages, "tools": body.tools}
            ).conversation()
            check_length(served, words(messages, tools), "messages")
            check_tools(served, tools)
            prompt = dict(add_generation_prompt=body.add_generation_prompt)
            ids = (await asyncio.to_thread(encode_chat, served.tokenizer, messages, tools, **prompt)).ids
    except UserError as error:
        raise refusal(error) from None
    return Json({"tokens": ids, "count": len(ids), "max_model_len": served.engine.capacity})


def model_entry(served: Served) -> dict:
    more = {"parent": served.base, "max_model_len": served.engine.capacity, "changed": served.changed}
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "sparrow"} | more


def build_app(
    table: dict[str, Served],
    limits: Limits,
    defaults: Sampling,
    runs: Runs = Runs(()),  # noqa: B008
    load: Load | None = None,
) -> FastAPI:
    """table may be empty: then only the runs can be looked at. load: makes the table anew, for /reload."""
    server = Server(table, limits, defaults, load)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        server.runner.start()
        yield
        server.runner.stop()

    # no pages with the API's documentation: FastAPI's load scripts from elsewhere
    errors: dict = {"4XX": {"model": Error}, "5XX": {"model": Error}}
    app = FastAPI(title="Sparrow", lifespan=lifespan, docs_url=None, redoc_url=None, responses=errors)
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
        served = server.find(body.model)
        if len(body.tokens) > served.engine.capacity:
            raise too_long(served, f"{len(body.tokens)}", "tokens")
        if (limit := served.engine.model.config.vocab_size) <= max(body.tokens, default=0):
            raise Refused(f"tokens: ids from 0 to {limit - 1}, there is no {max(body.tokens)}", "tokens")
        return Json({"prompt": await asyncio.to_thread(served.tokenizer.decode, body.tokens)})

    @app.get("/v1/models")
    async def models():
        return Json({"object": "list", "data": [model_entry(served) for served in table.values()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        return Json(model_entry(server.find(name)))

    @app.post("/reload")
    async def reload():
        return Json({"reloaded": await server.reload(), "models": list(table)})

    @app.get("/health")
    async def health():
        alive = server.runner.thread.is_alive()
        return Json({"status": "ok" if alive else "the engines have stopped"}, status_code=200 if alive else 503)

    app.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)  # how proxies ask

    @app.get("/metrics")
    async def metrics():
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/tools/demo")
    async def demo_tools():
        return Json({"tools": TOOLS, "rounds": ROUNDS})

    @app.post("/tools/demo")
    async def use_demo_tool(body: ToolRequest):
        return Json({"content": run_tool(body.name, body.arguments)})

    @app.get("/runs/data")
    async def list_of_runs():
        return Json({"data": await asyncio.to_thread(runs.overview)})

    @app.get("/runs/data/{name}")
    async def series_of_run(name: str):
        found = await asyncio.to_thread(runs.read, name)
        if found is None:
            raise Refused("There is no such run", "name", "run_not_found", 404)
        return Json(found)

    for path in PAGES:
        app.add_api_route(path, partial(page, path), methods=["GET", "HEAD"], include_in_schema=False)

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
        if not place and "json" not in request.headers.get("content-type", ""):  # what curl -d sends by itself
            said = "body: expected JSON with the header Content-Type: application/json"
            return Json(Refused(said).body, 400)
        if first["type"] == "json_invalid":  # its place is a character's, not a field's
            said = f"body: not JSON: {first['ctx']['error']}, at character {place}"
            return Json(Refused(said).body, 400)
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
