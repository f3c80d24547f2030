"""A conversation with a model: the messages so far, how they become a prompt, and what becomes of the answer.

talk = Conversation(Session(model), tokenizer, Sampling())
for piece, aside in talk.answer("hello"):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.console import UserError
from inference.tools import ROUNDS, TOOLS, run_tool

if TYPE_CHECKING:  # torch takes a second
    from inference.sampling import Sampling
    from inference.session import Session
    from tokenizer.text import Tokenizer

Pieces = Generator[tuple[str, bool], None, dict | None]  # of an answer's text; returns its message


@dataclass
class Conversation:
    """`session` (inference/session.py) computes the answers. tools: what the model is told of; only `TOOLS` are run."""

    session: Session
    tokenizer: Tokenizer
    sampling: Sampling
    max_new_tokens: int = 1024
    completes: bool = False  # continues a text instead of answering a message
    system: str = ""
    enable_thinking: bool | None = None
    tools: list[dict] | None = None
    turns: list[dict] = field(default_factory=list)

    def __post_init__(self):
        if self.tools and not self.tokenizer.takes_tools:
            raise UserError("--tools: the chat template of these weights has no place for tools; leave the flag out")

    def answer(self, text: str) -> Generator[tuple[str, bool], None, None]:
        """Yields (piece of text, whether it is beside the answer: a thought, or a tool's result).

        An answer that calls tools gets their results and goes on. Also an interrupted one is kept in the history.
        """
        new = [{"role": "user", "content": text}]
        for rounds in range(ROUNDS + 1):
            message = yield from self._reply(new)
            calls = message.get("tool_calls") if message else None
            if not calls or self.tools is not TOOLS:
                return
            if rounds == ROUNDS:
                yield f"\n(it may call tools {ROUNDS} times)", True
                return
            new = []
            for call in calls:
                result = run_tool(call["name"], call["arguments"])
                new.append({"role": "tool", "content": result})
                yield f"\n[{call['name']}] {result}\n", True

    def encode(self, new: list[dict]) -> list[int]:
        """The prompt: the history, and `new` messages."""
        if self.completes:
            return [*self.tokenizer.start_of_text, *self.tokenizer.encode(new[-1]["content"])]
        from tokenizer.chat import encode_chat

        system = [{"role": "system", "content": self.system}] if self.system else []
        messages, asked = [*system, *self.turns, *new], dict(enable_thinking=self.enable_thinking)
        return encode_chat(self.tokenizer, messages, self.tools, add_generation_prompt=True, **asked).ids

    def _reply(self, new: list[dict]) -> Pieces:
        """One message of the model's."""
        limit = self.session.model.config.max_position_embeddings
        while len(ids := self.encode(new)) > limit - min(self.max_new_tokens, limit // 4):
            questions = [n for n, turn in enumerate([*self.turns, *new]) if turn["role"] == "user"]
            if len(questions) < 2:
                break
            del self.turns[: questions[1]]  # forget the oldest question and its answer
        if len(ids) >= limit:
            raise UserError(f"a prompt of {len(ids)} tokens fills the model's {limit} positions: shorten it")
        return (yield from self._stream(new, ids, min(self.max_new_tokens, limit - len(ids))))

    def _stream(self, new: list[dict], ids: list[int], room: int) -> Pieces:
        from tokenizer.answer import THOUGHT, opens_thought

        opens, closes = (self.tokenizer.control.get(tag) for tag in THOUGHT)
        begun = thinking = opens_thought(self.tokenizer, ids)
        stream, said = self.tokenizer.stream(after=ids if self.completes else ()), []
        message = None
        reply = self.session.reply(ids, self.sampling, max_new_tokens=room, stop=self.tokenizer.stop_ids)
        try:
            for token in reply:
                said.append(token)
                thought = thinking or token == opens
                thinking = thought and token != closes
                yield stream.push(token), thought
            yield stream.flush(), thinking
        finally:
            if said and not self.completes:
                message = self._message(ids, said, begun)
                self.turns += [*new, message]
        return message

    def _message(self, ids: list[int], said: list[int], begun: bool) -> dict:
        """begun: the prompt has opened the thought already."""
        if self.tools:
            from tokenizer.answer import Answer, join

            answer = Answer(self.tokenizer, ids, tools=True)
            message = join([*(delta for token in said for delta in answer.push(token)), *answer.end()])
            if "tool_calls" in message:
                called = [call["function"] for call in message["tool_calls"]]
                calls = [{"name": call["name"], "arguments": json.loads(call["arguments"])} for call in called]
                return message | {"content": message["content"] or "", "tool_calls": calls}
        content = ("<think>\n" if begun else "") + self.tokenizer.decode(said)
        return {"role": "assistant", "content": content}
