"""Text <-> token ids: a BPE read from tokenizer.json, in which text can never become a control token.

    from tokenizer.text import Tokenizer
    tokenizer = Tokenizer.load()                         # the shipped one; or any directory with a tokenizer.json
    ids = tokenizer.encode("你好 <|im_end|>")            # ids of text; none of them is the id of <|im_end|>
    assert tokenizer.decode(ids) == "你好 <|im_end|>"

HF `tokenizers` does the merging. It gets a copy of the tokenizer *without any added token*. Its own switch
(`encode_special_tokens`) would not do, because it skips only tokens that are flagged special, and `<think>` or
`<tool_call>` usually are not. Control ids are put in by the code that builds a sequence (tokenizer/chat.py, the data
sets), and are never found in text.

A directory with SentencePiece's tokenizer.model instead (ChatGLM3) is read as if it had a tokenizer.json.

Decoding uses a table id -> bytes. So it is exact, also for tokens that hold a part of a character.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers

from common.console import UserError
from common.json_file import read_json
from tokenizer.sentencepiece import CHATGLM_ENDS, CHATGLM_OPENS, CHATGLM_TEMPLATE, is_chatglm, read_sentencepiece

FILES = ("tokenizer.json", "tokenizer.model")  # a directory with one of them holds a tokenizer
SHIPPED = Path(__file__).resolve().parent
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEXT_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>")  # ours, Llama 3's, Llama 2's and Mistral's
TURN_ENDS = (IM_END, "<|eot_id|>", "<end_of_turn>")  # ours and Qwen's, Llama 3's, Gemma's


class Tokenizer:
    """Made by `Tokenizer.load`.

    control      control token -> id
    token_bytes  (vocab_size,) int64: bytes of text that each id stands for, 0 for control tokens
    adds_bos     whether bos_token, and nothing else, stands before a text
    hash         SHA-256 of everything that decides the ids, the chat template included
    """

    def __init__(self, spec: dict, *, path: str, chat_template: str | None = None, config: dict | None = None):
        self.path = path
        self.chat_template = chat_template
        self.config = config or {}  # tokenizer_config.json: foreign chat templates ask it for bos_token and the like
        self.control: dict[str, int] = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.hash = _hash(spec, chat_template, self.config)
        bos = self.special("bos_token")
        self._opens = _opening(spec, self.config, bos if bos in self.control else "")
        self.adds_bos = self._opens == [bos]
        self._plain = self._inside = _without_added_tokens(spec, path)
        self.blank_at_start_only = _blank_at_start_only(spec)
        if self.blank_at_start_only:
            self._inside = _without_added_tokens(spec | dict(pre_tokenizer=_without_blank(spec["pre_tokenizer"])), path)
        self._bytes, self._drops_first_space = _bytes_of_ids(spec)
        self.vocab_size: int = max(self._bytes) + 1
        self.token_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        for i, piece in self._bytes.items():
            self.token_bytes[i] = len(piece)
        self.token_bytes[list(self.control.values())] = 0
        self._control_ids = frozenset(self.control.values())

    @classmethod
    def load(cls, path: str | Path | None = None) -> Tokenizer:
        """From a directory with a tokenizer.json or a tokenizer.model, or from the former; None: the shipped one."""
        spec, template, config, folder = read_files(path)
        return cls(spec, path=folder, chat_template=template, config=config)

    # ---- text -> ids

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts. Much faster than one by one; on all cores, unless TOKENIZERS_PARALLELISM=false."""
        return [encoding.ids for encoding in self.encode_offsets(texts)]

    def encode_offsets(self, texts: list[str], inside: bool = False) -> list[tokenizers.Encoding]:
        """As encode_batch, with the characters of each token (`Encoding.offsets`).

        inside  control tokens stand before these texts in their rows. Only with `blank_at_start_only` are the ids
                others then: such a tokenizer puts its blank before the first text of a row alone.
        """
        try:
            return (self._inside if inside else self._plain).encode_batch(texts)
        except TypeError:
            raise _explain_not_text(texts) from None

    # ---- ids -> text

    def decode(self, ids: Iterable[int], skip_control: bool = False) -> str:
        """The exact text. Bytes that are not UTF-8 become U+FFFD. Control tokens become their names, unless skipped."""
        stream = self.stream(skip_control)
        return stream.push_all(ids) + stream.flush()

    def bytes_of(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes that each id stands for; of control tokens, their names."""
        return [self._bytes.get(i, b"") for i in map(int, ids)]

    def stream(self, skip_control: bool = False, after: Iterable[int] = ()) -> StreamDecoder:
        """after: ids that a text of the same row continues. It keeps its first blank, unless none of them is text."""
        return StreamDecoder(self, skip_control, inside=any(i not in self._control_ids for i in after))

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same in both. Chat templates may differ."""
        return self._bytes == other._bytes and self.control == other.control

    def continues(self, other: Tokenizer) -> bool:
        """Whether every id of `other` stands for the same here. There may be more."""
        return other._bytes.items() <= self._bytes.items() and other.control.items() <= self.control.items()

    # ---- tokens by name

    @property
    def end_of_text(self) -> int:
        """Ends a document and fills rows: <|endoftext|>, or what takes its place in a foreign tokenizer."""
        return self._named(*TEXT_ENDS, self.special("eos_token"))

    @property
    def start_of_text(self) -> list[int]:
        """Opens a text: what the tokenizer puts there, bos_token (Llama, Mistral) or [gMASK] and <sop> (GLM). Else
        end_of_text (ours, Qwen), as in pretraining, where a document follows the end of another."""
        return [self.control[name] for name in self._opens] or [self.end_of_text]

    @property
    def im_start(self) -> int:
        return self._named(IM_START)

    @property
    def im_end(self) -> int:
        return self._named(IM_END)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer or a text: <|im_end|>, <|endoftext|>, what takes their place in a foreign tokenizer,
        and those that its own files name."""
        names = {*TEXT_ENDS, *TURN_ENDS, self.special("eos_token")}
        more = self.config.get("eos_token_id") or []
        numbers = [number for number in (more if isinstance(more, list) else [more]) if isinstance(number, int)]
        return frozenset(self.control[name] for name in names if name in self.control).union(numbers)

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template writes tools into the prompt. Others leave them out without a word."""
        return self.chat_template is None or re.search(r"\btools\b", self.chat_template) is not None

    def special(self, role: str) -> str:
        """tokenizer_config.json's `bos_token`, `eos_token`, ... as text; empty if it names none."""
        token = self.config.get(role) or ""
        return token["content"] if isinstance(token, dict) else token

    def _named(self, *names: str) -> int:
        for name in names:
            if name in self.control:
                return self.control[name]
        raise UserError(f"{self.path}: the tokenizer has no {names[0]} token; take one that has, or the shipped one")


class StreamDecoder:
    """The text of tokens as they arrive. A character appears when its last byte has arrived, so shown text is final.

    inside  text stands before it, so the blank it begins with is its own and not the one that SentencePiece adds.
    """

    def __init__(self, tokenizer: Tokenizer, skip_control: bool = False, inside: bool = False):
        self._bytes = tokenizer._bytes
        self._hidden = tokenizer._control_ids if skip_control else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer._drops_first_space and not inside

    def push(self, id: int) -> str:
        return self.push_all((id,))

    def push_all(self, ids: Iterable[int]) -> str:
        # a model may have more embeddings than its tokenizer has ids (Qwen: 151,936 and 151,669); they have no text
        text = self._utf8.decode(b"".join(self._bytes.get(i, b"") for i in map(int, ids) if i not in self._hidden))
        if self._drop_space and text:
            self._drop_space = False
            text = text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """The rest at the end: nothing, or U+FFFD for an incomplete character."""
        return self._utf8.decode(b"", final=True)


def read_files(path: str | Path | None = None) -> tuple[dict, str | None, dict, str]:
    """What `Tokenizer.load` reads -> (content of tokenizer.json, chat template, tokenizer_config.json, directory).

    A tokenizer.model comes as the content that a tokenizer.json would have.
    """
    file = SHIPPED if path is None else Path(path)
    if file.is_dir() or file.suffix != ".json":
        file = file / "tokenizer.json"
    config, template = _read_config(file.parent)
    model = file.with_name("tokenizer.model")
    if not file.is_file() and model.is_file():
        spec = read_sentencepiece(model, config)
        if is_chatglm(config):
            template = template or CHATGLM_TEMPLATE
            ends = [token["id"] for token in spec["added_tokens"] if token["content"] in CHATGLM_ENDS]
            config |= dict(eos_token="</s>", eos_token_id=ends)
        return spec, template, config, str(file.parent)
    if not file.is_file():
        raise UserError(
            f"{file}: there is no such tokenizer; give a directory that holds a tokenizer.json "
            "(scripts/download.py fetches one from a hub)"
        )
    spec = read_json(file)
    try:
        kind = spec["model"]["type"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: not a tokenizer.json of HF tokenizers ({error})") from None
    if kind != "BPE":
        raise UserError(f"{file}: a {kind} tokenizer; only BPE (Qwen, Llama, GLM, MiniMind, ...) can be read")
    return spec, template, config, str(file.parent)


def _read_config(directory: Path) -> tuple[dict, str | None]:
    """tokenizer_config.json, with generation_config.json's stop ids; and the chat template beside it or inside it."""
    config = _read_json(directory / "tokenizer_config.json")
    config["eos_token_id"] = _read_json(directory / "generation_config.json").get("eos_token_id")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones (Hermes, Command R): "default" is the one for chatting
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, (str, type(None))):
        raise UserError(f"{directory / 'tokenizer_config.json'}: chat_template must be text, found {template!r:.40}")
    file = directory / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > 10_000_000:
            raise UserError(f"{file}: {file.stat().st_size:,} bytes, too much for a chat template")
        try:
            template = file.read_text(encoding="utf-8")  # universal newlines: the same template on Windows
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not a text ({error})") from None
    return config, template


def _read_json(file: Path) -> dict:
    values = read_json(file) if file.is_file() else {}
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected an object, found {str(values):.40}")
    return values


def _without_added_tokens(spec: dict, path: str) -> tokenizers.Tokenizer:
    """The copy that encodes plain text: without added tokens, also in its vocabulary."""
    added = {token["content"] for token in spec["added_tokens"]}
    vocab = {token: i for token, i in spec["model"]["vocab"].items() if token not in added}
    model = dict(spec["model"], vocab=vocab)
    plain = dict(spec, model=model, added_tokens=[], post_processor=None, truncation=None, padding=None)
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path}: tokenizers cannot read this tokenizer.json ({error})") from None


def _blank_at_start_only(spec: dict) -> bool:
    """Mistral's newer files. Llama 2's puts a blank before the text after each control token too."""
    return '"prepend_scheme": "first"' in json.dumps(spec.get("pre_tokenizer"))


def _without_blank(pre_tokenizer: dict) -> dict:
    return json.loads(json.dumps(pre_tokenizer).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"'))


def _opening(spec: dict, config: dict, bos: str) -> list[str]:
    """Control tokens that stand before a text: what the files state, or else what their post-processor does. With
    neither, as old files and tokenizer.model have it, Llama's class adds a BOS (transformers 4, LlamaTokenizer's
    add_bos_token), and ChatGLM's its two (tokenization_chatglm.py, get_prefix_tokens).

    bos  the name of bos_token, "" if there is none
    """
    stated, processor = config.get("add_bos_token"), spec.get("post_processor")
    control = {token["content"] for token in spec["added_tokens"]}
    if is_chatglm(config) and control.issuperset(CHATGLM_OPENS):
        return CHATGLM_OPENS
    if bos and (stated is not None or not processor):
        return [bos] if stated or not processor and "LlamaTokenizer" in str(config.get("tokenizer_class")) else []
    before = re.search(r'"single": \[((?:\{"SpecialToken": \{[^}]*\}\}, )*)', json.dumps(processor))
    names = [json.loads(name) for name in re.findall(r'"id": ("(?:[^"\\]|\\.)*")', before[1])] if before else []
    said = names == [bos] or len(names) > 1  # one alone that is no bos_token: nobody says what it is
    return names if said and control.issuperset(names) else []


def _bytes_of_ids(spec: dict) -> tuple[dict[int, bytes], bool]:
    """The bytes of each id, and whether decoding drops a leading space (SentencePiece puts one before every text)."""
    decoder = json.dumps(spec.get("decoder"))
    to_bytes = _from_byte_level if "ByteLevel" in decoder else _from_sentencepiece
    table = {i: to_bytes(token) for token, i in spec["model"]["vocab"].items()}
    table.update((token["id"], token["content"].encode()) for token in spec["added_tokens"])
    return table, "Strip" in decoder or "Metaspace" in decoder


def _stand_ins() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte (`bytes_to_unicode` in openai/gpt-2, src/encoder.py), reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE = _stand_ins()


def _from_byte_level(token: str) -> bytes:
    return bytes(map(_BYTE.__getitem__, token)) if all(c in _BYTE for c in token) else token.encode()


def _from_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("\u2581", " ").encode()


def _hash(spec: dict, chat_template: str | None, config: dict) -> str:
    """Of everything that decides the ids and of nothing else, so that other tools may reformat the file."""
    defining = {key: spec.get(key) for key in ("normalizer", "pre_tokenizer", "model")}
    defining["added_tokens"] = sorted((token["id"], token["content"]) for token in spec["added_tokens"])
    defining["chat_template"] = chat_template
    if not {END_OF_TEXT, IM_START, IM_END} <= {token["content"] for token in spec["added_tokens"]} or (
        chat_template and "_token" in chat_template
    ):  # then names in tokenizer_config.json matter too, because a template writes {{ eos_token }}
        defining["names"] = [config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")]
    return hashlib.sha256(json.dumps(defining, sort_keys=True).encode()).hexdigest()


def _explain_not_text(texts: list[str]) -> Exception:
    """The error for texts that `tokenizers` refused. Of a lone surrogate it says only that it "must be str"."""
    for text in texts:
        if not isinstance(text, str):
            return TypeError(f"only text can be encoded, not {type(text).__name__}: {text!r:.80}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(text[error.start]):04X}"
            return UserError(
                f"the text holds a lone surrogate, {code} at character {error.start}: half of a character that was cut "
                "apart, often by an unpaired \\u escape in JSON; remove it"
            )
    raise AssertionError("tokenizers refused text that is Unicode")
