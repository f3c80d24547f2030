"""Answers to many questions at once, greedy unless asked otherwise.

    found = answers(model, tokenizer, [[{"role": "user", "content": "1+1?"}], ...], max_new_tokens=64)
    found[0].text, found[0].ended                  # "2", True

In fp32 an answer is the one that the model gives alone; in bf16 it is wherever the two best tokens are clearly apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from common.console import Progress
from inference.generate import ROWS, generate
from inference.sampling import Sampling
from model.transformer import CausalLM
from tokenizer.answer import opens_thought
from tokenizer.chat import encode_chat
from tokenizer.text import Tokenizer

GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Answer:
    """What a model said, and whether it ended by itself."""

    ids: list[int]
    full: str  # all of it, with the names of control tokens; <think> also where the prompt has opened it
    text: str  # what follows the last </think>, without control tokens and blanks around; "" while a thought goes on
    ended: bool  # False: cut off at the most tokens allowed
    asked: bool = True  # False: the prompt left no room for an answer


def prompt_ids(
    tokenizer: Tokenizer, question: list[dict] | str, tools: list | None = None, enable_thinking: bool | None = None
) -> list[int]:
    """A conversation up to the assistant's turn; or what opens a text and the text, which is continued."""
    if isinstance(question, str):
        return [*tokenizer.start_of_text, *tokenizer.encode(question)]
    return encode_chat(tokenizer, question, tools, add_generation_prompt=True, enable_thinking=enable_thinking).ids


def answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    questions: Sequence[list[dict] | str],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    rows: int = ROWS,
    enable_thinking: bool | None = None,
    progress: str = "answers",
) -> list[Answer]:
    """One answer to each conversation (messages that end with the user's), or continuation of each text."""
    prompts = [prompt_ids(tokenizer, question, enable_thinking=enable_thinking) for question in questions]
    return answers_to_ids(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling, rows=rows, progress=progress
    )


def answers_to_ids(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    rows: int = ROWS,
    progress: str = "answers",
) -> list[Answer]:
    """As `answers`, for encoded prompts."""
    limit = model.config.max_position_embeddings
    room = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    asked = [i for i in range(len(prompts)) if room[i] > 0]
    found = [Answer([], "", "", ended=False, asked=False)] * len(prompts)
    with closing(Progress(progress, len(asked), " answers")) as bar:
        own, most, stop = [prompts[i] for i in asked], [room[i] for i in asked], tokenizer.stop_ids
        said = generate(model, own, sampling, max_new_tokens=most, stop=stop, rows=rows, ended=bar.advance)
    for i, ids in zip(asked, said):
        begun = "<think>\n" if opens_thought(tokenizer, prompts[i]) else ""
        text = "" if opens_thought(tokenizer, prompts[i] + ids) else final_text(tokenizer, ids)
        found[i] = Answer(ids, begun + tokenizer.decode(ids), text, ended=len(ids) < room[i])
    return found


def final_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The answer in a reply: the text after its last </think>, without control tokens."""
    closes = tokenizer.control.get("</think>")
    after = next((i + 1 for i in reversed(range(len(ids))) if ids[i] == closes), 0)
    return tokenizer.decode(ids[after:], skip_control=True).strip()
