"""Tokenizers for tests: one of bytes, and the shipped one with tokens taken away."""

import json
from types import SimpleNamespace

import numpy as np

from common.files import ROOT
from tokenizer.text import Tokenizer

E, START, STOP = 0, 1, 2  # <|endoftext|> <|im_start|> <|im_end|>


class ByteTokenizer:
    """A byte b is the id b + 3: enough to spell things out, and nothing to load."""

    chat_template, path, vocab_size, hash = None, "", 259, "bytes"
    end_of_text, im_start, im_end = E, START, STOP
    blank_at_start_only = False
    control = {"<|endoftext|>": E, "<|im_start|>": START, "<|im_end|>": STOP}

    def __init__(self):
        self.texts = []  # all it was asked to encode

    @classmethod
    def load(cls, path):
        return cls()

    def encode_batch(self, texts):
        return [encoding.ids for encoding in self.encode_offsets(texts)]

    def encode_offsets(self, texts, inside=False):
        self.texts += texts
        return [
            SimpleNamespace(
                ids=[b + 3 for c in text for b in c.encode()],
                offsets=[(i, i + 1) for i, c in enumerate(text) for _ in c.encode()],
            )
            for text in texts
        ]


def text(ids) -> str:
    """Control tokens as E [ ], bytes as themselves."""
    return "".join("E[]"[i] if i < 3 else chr(i - 3) for i in np.asarray(ids).tolist())


def without_tags(folder, *tags):
    """The shipped tokenizer, less these tokens: as MiniMind2's, which spells them, or Qwen3's without <answer>."""
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((ROOT / "tokenizer" / file).read_bytes())
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in tags]
    spec["model"]["vocab"] = {token: i for token, i in spec["model"]["vocab"].items() if token not in tags}
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return Tokenizer.load(folder)
