"""Tokenizers for tests: one of bytes, one like Llama 2's, and the shipped one with tokens taken away."""

import json
from types import SimpleNamespace

import numpy as np

from common.files import ROOT
from tokenizer.text import Tokenizer

E, START, STOP = 0, 1, 2  # <|endoftext|> <|im_start|> <|im_end|>


class ByteTokenizer:
    """A byte b is the id b + 3: enough to spell things out, and nothing to load."""

    chat_template, path, vocab_size, hash = None, "", 259, "bytes"
    start_of_text, end_of_text, im_start, im_end = [E], E, START, STOP
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


BEGINS, ENDS = 1, 2  # <s> and </s> of `llama_like`


def llama_like(folder, *words, **config):
    """Llama 2's and Mistral's first: ▁ for a space and one before any text; bytes as <0x0A> where no piece fits; <s>
    before a text. Each of `words` is one token. config: tokenizer_config.json, beside the names of <s> and </s>."""
    letters = dict.fromkeys("".join(words))
    begun = dict.fromkeys(word[:n] for word in words for n in range(1, len(word) + 1))
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, *("▁" + word for word in begun)]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    replaced = lambda old, new: dict(type="Replace", pattern=dict(String=old), content=new)
    text = [dict(Sequence=dict(id=part, type_id=0)) for part in "AB"]
    spec = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[dict(id=i, content=name, **flags) for i, name in enumerate(special)],
        normalizer=dict(type="Sequence", normalizers=[dict(type="Prepend", prepend="▁"), replaced(" ", "▁")]),
        pre_tokenizer=None,
        post_processor=dict(
            type="TemplateProcessing",
            single=[dict(SpecialToken=dict(id="<s>", type_id=0)), text[0]],
            pair=text,
            special_tokens={"<s>": dict(id="<s>", ids=[BEGINS], tokens=["<s>"])},
        ),
        decoder=dict(
            type="Sequence",
            decoders=[
                replaced("▁", " "),
                dict(type="ByteFallback"),
                dict(type="Fuse"),
                dict(type="Strip", content=" ", start=1, stop=0),
            ],
        ),
        model=dict(
            type="BPE",
            dropout=None,
            unk_token="<unk>",
            continuing_subword_prefix=None,
            end_of_word_suffix=None,
            fuse_unk=True,
            byte_fallback=True,
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[f"▁{own[:-1]} {own[-1]}" for own in begun],
        ),
    )
    names = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>")
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config), encoding="utf-8")
    return Tokenizer.load(folder)


def glm_like(folder):
    """The shipped vocabulary, with GLM's [gMASK] and <sop> before a text, put there as its tokenizer.json does."""
    spec, names = json.loads((ROOT / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")), ["[gMASK]", "<sop>"]
    ids = {name: len(spec["model"]["vocab"]) + n for n, name in enumerate(names)}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    spec["added_tokens"] += [dict(id=i, content=name, **flags) for name, i in ids.items()]
    put = [dict(SpecialToken=dict(id=name, type_id=0)) for name in names]
    text = [dict(Sequence=dict(id=part, type_id=0)) for part in "AB"]
    special = {name: dict(id=name, ids=[i], tokens=[name]) for name, i in ids.items()}
    template = dict(type="TemplateProcessing", single=[*put, text[0]], pair=[*put, *text], special_tokens=special)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=True)
    spec["post_processor"] = dict(type="Sequence", processors=[level, template])
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>")
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.load(folder)


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
