"""/v1/completions"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from secrets import token_hex

from fastapi import Request
from starlette.responses import Response

from common.console import UserError
from serve.choices import Choice, TextOffsets, text_logprobs
from serve.models import Served
from serve.requests import CompletionRequest, Refused
from serve.server import FINGERPRINT, Json, Server, check_length, check_listed, event, failure, opened, whole
from tokenizer.answer import Answer, join


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
            answers.append(Answer(tokenizer, ids, stop=stops, plain=True))
            prompts.append((ids, hidden))
    about = {"id": f"cmpl-{token_hex(12)}", "object": "text_completion", "created": int(time.time())}
    about |= {"model": body.model or served.name, "system_fingerprint": FINGERPRINT}
    work = server.answering(served, requests, answers)

    def begin(choice: Choice) -> str:
        """The text before the answer, if it is asked for."""
        ids, hidden = prompts[choice.index]
        return tokenizer.decode(ids[hidden:], skip_control=True) if body.echo else ""

    offsets = [TextOffsets(tokenizer, after=() if body.echo else ids) for ids, _ in prompts]

    def told(choice: Choice, start: int, first: bool) -> dict | None:
        """The log-probabilities of the tokens from `start` on, and first of the prompt's."""
        if body.logprobs is None:
            return None
        found: list = choice.logprobs(start)
        if choice.finish_reason and choice.sequence.end is not None and not choice.answer.stopped:
            found.append((choice.sequence.end, choice.sequence.logprobs[-1]))  # the end token is a token, too
        if first and body.echo:
            ids, hidden = prompts[choice.index]
            found = [*zip(ids, [None, *choice.sequence.prompt_logprobs])][hidden:] + found
        return text_logprobs(tokenizer, found, offsets[choice.index])

    def entry(choice: Choice, text: str, logprobs: dict | None) -> dict:
        about_it = {"index": choice.index, "text": text, "logprobs": logprobs}
        return about_it | {"finish_reason": choice.finish_reason}

    check_listed(requests)
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
    """(ids, how many of them the client did not write): of a text, what opens it; token ids are complete."""
    if isinstance(prompt, str):
        check_length(served, [prompt], "prompt")
        try:
            start = served.tokenizer.start_of_text
            return [*start, *served.tokenizer.encode(prompt)], len(start)
        except UserError as error:
            raise Refused(str(error), "prompt") from None
    limit = served.engine.model.config.vocab_size
    if not prompt or any(token >= limit for token in prompt):
        raise Refused(f"prompt: token ids from 0 to {limit - 1}, at least one", "prompt")
    return prompt, 0


async def _text_stream(work, about: dict, body: CompletionRequest, begin: Callable, told: Callable, entry: Callable):
    usage = {"usage": None} if body.wants_usage else {}
    async with work as choices:
        yield b""  # it is accepted; its first token may come much later
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
