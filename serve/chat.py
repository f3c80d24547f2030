"""/v1/chat/completions"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from secrets import token_hex

from fastapi import Request
from starlette.responses import Response

from common.console import UserError
from serve.choices import Choice, chat_logprobs
from serve.requests import ChatRequest, refusal, words
from serve.server import (
    FINGERPRINT,
    Json,
    Server,
    check_length,
    check_listed,
    check_tools,
    event,
    failure,
    opened,
    whole,
)
from tokenizer.answer import CALL, Answer, join
from tokenizer.chat import encode_chat


async def chat(server: Server, body: ChatRequest, request: Request) -> Response:
    served = server.find(body.model)
    try:
        messages, tools = body.conversation()
        check_length(served, words(messages, tools), "messages")
        check_tools(served, tools)
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
    check_listed(requests)
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


async def _chat_stream(work, about: dict, body: ChatRequest) -> AsyncGenerator[bytes]:
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
