"""What a client may send, field by field, and what it means for the engine. Fields that are not listed are ignored.

Numbers are limited here: a request is refused before anything is computed for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from common.console import UserError
from dataset.read.turns import REASONING, read_message
from inference.sampling import Sampling
from tokenizer.messages import dumps

MESSAGES, CHOICES, STOPS, TOOLS, BIASES, PROMPTS = 1000, 16, 16, 128, 1024, 64  # the most of each
Number = Annotated[float, Field(allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, le=10_000_000)]


class Refused(Exception):
    """A request that cannot be served: an error in OpenAI's form."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorBody


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Common(BaseModel):
    """What /v1/chat/completions and /v1/completions share."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str | None = Field(None, max_length=256)
    max_tokens: int | None = Field(None, ge=0, le=10_000_000)
    temperature: Number | None = Field(None, ge=0, le=100)
    top_p: Number | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=10_000_000)
    min_p: Number | None = Field(None, ge=0, lt=1)
    presence_penalty: Number | None = Field(None, ge=-100, le=100)
    frequency_penalty: Number | None = Field(None, ge=-100, le=100)
    repetition_penalty: Number | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=CHOICES)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, defaults: Sampling, choice: int) -> Sampling:
        """The settings of one of `n` choices; what is not said is as in `defaults`."""
        names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
        said = {name: getattr(self, name) for name in (*names, "repetition_penalty") if getattr(self, name) is not None}
        if "top_k" in said:
            said["top_k"] = max(said["top_k"], 0)  # vLLM's -1 is off, too
        if said.get("top_p") == 0:  # the likeliest token alone
            said["top_p"] = 1e-9
        if self.seed is not None:
            said["seed"] = (self.seed + choice) % 2**63
        if self.logit_bias:
            said["logit_bias"] = self._biases()
        return Sampling(**{**vars(defaults), **said})

    def _biases(self) -> dict[int, float]:
        assert self.logit_bias is not None
        if len(self.logit_bias) > BIASES:
            raise Refused(f"logit_bias: at most {BIASES} tokens", "logit_bias")
        if not all(token.isascii() and token.isdigit() and len(token) < 9 for token in self.logit_bias):
            raise Refused("logit_bias: the keys must be token ids", "logit_bias")
        return {int(token): bias for token, bias in self.logit_bias.items()}

    def stops(self) -> list[str]:
        words = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(words) > STOPS or any(len(word) > 1000 for word in words):
            raise Refused(f"stop: at most {STOPS} words of at most 1000 characters", "stop")
        return words

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ResponseFormat(BaseModel):
    type: str = Field("text", max_length=64)


class ChatRequest(Common):
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=0, le=10_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = Field(None, max_length=TOOLS)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None

    @property
    def thinking(self) -> bool | None:
        """Whether the answer begins with a thought. `open_thinking` is MiniMind's name for it."""
        given = self.chat_template_kwargs or {}
        for value in (self.enable_thinking, given.get("enable_thinking"), given.get("open_thinking")):
            if isinstance(value, bool):
                return value
        return None

    def conversation(self) -> tuple[list[dict], list[dict] | None]:
        """The messages and tools as tokenizer/chat.py wants them."""
        if self.response_format and self.response_format.type != "text":
            found = f"{self.response_format.type!r}: only text is supported"
            raise Refused(f"response_format {found}", "response_format", "unsupported_value")
        messages: list[dict] = []
        for i, message in enumerate(self.messages):
            if message.get("role") == "assistant" and _is_silent(message):
                continue  # an answer that was stopped before it began
            messages.append(read_message({"role": None, **message}, f"messages[{i}]", repair=False))
        if not messages:
            raise Refused("messages: every message is empty", "messages")
        return messages, None if self.tool_choice == "none" else self.tools or None

    def forced_call(self) -> str | None:
        """The beginning of the call that `tool_choice` demands: the answer can only go on with it."""
        if self.tool_choice in (None, "none", "auto"):
            return None
        if not self.tools:
            raise Refused("tool_choice: there are no tools to choose from", "tool_choice")
        if self.tool_choice == "required":
            return '\n{"name":'
        function = self.tool_choice.get("function") if isinstance(self.tool_choice, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        known = [tool["function"].get("name") for tool in self.tools if isinstance(tool.get("function"), dict)]
        if not isinstance(name, str) or name not in known:
            raise Refused("tool_choice: it must name a function among the tools", "tool_choice")
        return f'\n{{"name": {dumps(name)}, "arguments":'


class CompletionRequest(Common):
    prompt: str | list[Token] | list[str | list[Token]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        if self.suffix:
            raise Refused("suffix: is not supported", "suffix", "unsupported_value")
        if self.best_of not in (None, self.n or 1):
            raise Refused("best_of: is not supported beyond n", "best_of", "unsupported_value")
        given = self.prompt
        many = isinstance(given, list) and (not given or not isinstance(given[0], int))
        prompts = given if many else [given]
        if not 0 < len(prompts) <= PROMPTS:
            raise Refused(f"prompt: at least one and at most {PROMPTS}", "prompt")
        if len(prompts) * (self.n or 1) > PROMPTS:
            raise Refused(f"prompt: at most {PROMPTS} answers, these are {len(prompts)} times n = {self.n}", "n")
        return prompts  # pyright: ignore[reportReturnType]


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str | None = Field(None, max_length=256)
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, max_length=MESSAGES)
    tools: list[dict[str, Any]] | None = Field(None, max_length=TOOLS)
    add_generation_prompt: bool = True


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str | None = Field(None, max_length=256)
    tokens: list[Token] = Field(max_length=1_000_000)


class ToolRequest(BaseModel):
    """A call of one of the page's own tools."""

    name: str = Field(max_length=256)
    arguments: str | dict[str, Any] = Field("{}", max_length=10_000)


def words(messages: list[dict], tools: list[dict] | None) -> Iterator[str]:
    """All text of a conversation."""
    for message in messages:
        yield from (text for text in message.values() if isinstance(text, str))
        yield from (dumps(call) for call in message.get("tool_calls", ()))
    yield from map(dumps, tools or ())


def _is_silent(message: dict) -> bool:
    """Whether it has no calls, and no words but blanks. Models answer so, and clients send it back."""
    if any(message.get(key) for key in ("tool_calls", "function_call")):
        return False
    for key in ("content", *REASONING):
        parts = message.get(key)
        for part in parts if isinstance(parts, list) else [parts]:
            said = part.get("text", part) if isinstance(part, dict) else part
            if said.strip() if isinstance(said, str) else said:
                return False
    return True


def refusal(error: UserError) -> Refused:
    """A mistake that was found in the messages, as an error in OpenAI's form."""
    return Refused(str(error).encode("utf-8", "replace").decode(), "messages")
