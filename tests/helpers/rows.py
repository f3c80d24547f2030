"""Rows of training data: one by one, and files of them with texts of many lengths."""

import json
from pathlib import Path

WORDS = "麻雀 虽小 五脏 俱全 a sparrow is small yet has every organ 你好 hello 42 = six times seven 。".split()


def jsonl(path: Path, *rows) -> Path:
    """One line a row; a string is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def said(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def user(content: str) -> dict:
    return said("user", content)


def says(content: str, **more) -> dict:
    return said("assistant", content, **more)


def chat(*contents: str, system: str | None = None) -> dict:
    """chat("a", "b"): the user says a, the assistant b."""
    turns = [said("system", system)] if system else []
    return {"conversations": turns + [said(("user", "assistant")[i % 2], c) for i, c in enumerate(contents)]}


def write_pretrain(path: Path, rows: int = 40) -> Path:
    texts = (" ".join(WORDS[(i * j) % len(WORDS)] for j in range(3 + i % 17)) for i in range(1, rows + 1))
    return jsonl(path, *({"text": text} for text in texts))


def words(start: int, count: int) -> str:
    return " ".join(WORDS[(start + j) % len(WORDS)] for j in range(count))


def write_sft(path: Path, rows: int = 40) -> Path:
    """Answers of 1 to 12 words: every micro-batch and rank trains on another number of tokens."""
    return jsonl(path, *(chat(words(i % 5, 2 + i % 7), words(i, 1 + i * 5 % 12)) for i in range(rows)))


def write_dpo(path: Path, rows: int = 24) -> Path:
    """Answers of 1 to 12 words to prompts of 2 to 8; the better one is the shorter one in two of three pairs."""
    prompts = [user(words(i % 5, 2 + i % 7)) for i in range(rows)]
    answers = [[says(words(i, 1 + (i * 5 + more) % 12)) for more in (0, 4)] for i in range(rows)]
    return jsonl(path, *({"chosen": [p, a], "rejected": [p, b]} for p, (a, b) in zip(prompts, answers)))


def write_reason(path: Path, rows: int = 40) -> Path:
    """Thoughts and answers of 1 to 6 words in three rows of four; a plain answer in the fourth."""
    found = []
    for i in range(rows):
        thought, answer = words(i, 1 + i * 5 % 6), words(i, 1 + i * 3 % 6)
        markup = f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>"
        found.append(chat(words(i % 5, 2 + i % 4), markup if i % 4 else answer))
    return jsonl(path, *found)
