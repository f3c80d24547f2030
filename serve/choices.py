"""The answers to one request: `n` choices for each prompt, followed together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from inference.engine import LogProb, Request, Sequence
from serve.runner import Runner
from tokenizer.answer import Answer, token_text
from tokenizer.text import Tokenizer

LEAST = -9999.0  # stands for minus infinity, which JSON does not have


class Choice:
    """One answer: a sequence of the engine, and what the client sees of it."""

    def __init__(self, index: int, sequence: Sequence, answer: Answer, tokenizer: Tokenizer, one_call: bool = False):
        self.index, self.sequence, self.answer, self.tokenizer = index, sequence, answer, tokenizer
        self.one_call = one_call  # ends after the first tool call
        self.seen = 0  # tokens that were looked at
        self.finish_reason: str | None = None

    def advance(self) -> list[dict]:
        """What has come since the last time, as deltas (tokenizer/answer.py)."""
        if self.finish_reason:
            return []
        reason, deltas = self.sequence.finish_reason, []  # read before the tokens: none can follow
        for token in self.sequence.tokens[self.seen :]:
            self.seen += 1
            deltas += self.answer.push(token)
            if self.answer.stopped or self.one_call and self.answer.calls:
                reason = "stop"
                break
        if reason:
            deltas += self.answer.end()
            self.sequence.cancel()
            reason = "length" if reason == "cancelled" else reason  # it took too long
            self.finish_reason = "tool_calls" if reason == "stop" and self.answer.calls else reason
        return deltas

    def logprobs(self, start: int) -> list[tuple[int, LogProb]]:
        """(token, its log-probability) from token `start` on, as far as they were looked at."""
        return list(zip(self.sequence.tokens[start : self.seen], self.sequence.logprobs[start : self.seen]))


class Choices:
    """All choices of a request."""

    def __init__(self, runner: Runner, choices: list[Choice], event: asyncio.Event, deadline: float):
        self.runner, self.choices, self.event, self.deadline = runner, choices, event, deadline

    async def follow(self) -> AsyncIterator[tuple[Choice, list[dict]]]:
        """Yields (choice, its new deltas) until all are finished, the time is up, or nobody follows any more."""
        # not asyncio.wait_for: up to Python 3.11 it forgets that it was cancelled if the event is set at that moment
        alarm = asyncio.get_running_loop().call_later(self.deadline - time.monotonic(), self.event.set)
        try:
            while running := [choice for choice in self.choices if not choice.finish_reason]:
                await self.event.wait()
                self.event.clear()
                for choice in running:
                    if time.monotonic() >= self.deadline:
                        choice.sequence.cancel()  # the engine says so in its next step
                    before, deltas = choice.seen, choice.advance()
                    if deltas or choice.finish_reason or choice.seen > before:
                        yield choice, deltas
        finally:
            alarm.cancel()

    @property
    def failed(self) -> BaseException | None:
        return next((c.sequence.error for c in self.choices if c.finish_reason == "error"), None)

    def usage(self) -> dict:
        """Prompts that several choices share count once, as OpenAI counts them: for the first, which has to read it."""
        prompts = {id(choice.sequence.request.prompt): choice.sequence for choice in reversed(self.choices)}
        read = sum(len(sequence.request.prompt) for sequence in prompts.values())
        written = sum(choice.seen for choice in self.choices)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in prompts.values())},
            "completion_tokens_details": {"reasoning_tokens": sum(c.answer.reasoning_tokens for c in self.choices)},
        }


@asynccontextmanager
async def answering(runner: Runner, engine, requests: list[Request], answers: list[Answer], tokenizer, **options):
    """-> Choices. At the end, however it comes, what is still running is stopped."""
    seconds, one_call = options["seconds"], options.get("one_call", False)
    sequences, event = runner.submit(engine, requests)
    pairs = enumerate(zip(sequences, answers))
    choices = [Choice(i, sequence, answer, tokenizer, one_call) for i, (sequence, answer) in pairs]
    try:
        yield Choices(runner, choices, event, time.monotonic() + seconds)
    finally:
        runner.forget(sequences)


# ---- log-probabilities, as OpenAI writes them


def chat_logprobs(tokenizer: Tokenizer, found: list[tuple[int, LogProb]]) -> dict:
    def entry(token: int, value: float) -> dict:
        text, data = token_text(tokenizer, token)
        return {"token": text, "logprob": _finite(value), "bytes": data}

    return {
        "content": [
            entry(token, logprob.value) | {"top_logprobs": [entry(*one) for one in logprob.likeliest]}
            for token, logprob in found
        ],
        "refusal": None,
    }


class TextOffsets:
    """Where the text of each token begins, in characters. A character of several tokens is counted with the last.

    after: the ids that the first of these tokens follows.
    """

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()):
        self.stream, self.next = tokenizer.stream(skip_control=True, after=after), 0

    def push(self, token: int) -> int:
        offset = self.next
        self.next += len(self.stream.push(token))
        return offset


def text_logprobs(tokenizer: Tokenizer, found: list[tuple[int, LogProb | None]], offsets: TextOffsets) -> dict:
    """offsets: after the tokens that were told before."""
    lists: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, logprob in found:
        text, _ = token_text(tokenizer, token)
        top = None
        if logprob is not None:
            top = {token_text(tokenizer, one)[0]: _finite(value) for one, value in reversed(logprob.likeliest)}
            top = dict(reversed(top.items())) | {text: _finite(logprob.value)}
        lists["tokens"].append(text)
        lists["token_logprobs"].append(None if logprob is None else _finite(logprob.value))
        lists["top_logprobs"].append(top)
        lists["text_offset"].append(offsets.push(token))
    return lists


def _finite(value: float) -> float:
    return value if value > LEAST else LEAST  # NaN is not greater either
