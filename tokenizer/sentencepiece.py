"""SentencePiece's `tokenizer.model` (ChatGLM3, Llama 2) as the content of a tokenizer.json. Its package is not needed.

    spec = read_sentencepiece(Path("chatglm3-6b/tokenizer.model"), config)      # config: tokenizer_config.json

Read are BPE models with byte fallback. Pieces that SentencePiece marks as unknown, control or user-defined become
control tokens, so no text gives their ids. The file is a protocol buffer; the numbers of its fields stand in
github.com/google/sentencepiece, src/sentencepiece_model.proto.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.console import UserError

BPE = 2  # TrainerSpec.model_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # SentencePiece.type
SPACE = "\u2581"

# ChatGLM3's tokens after those of its file, in this order, and its way of writing a conversation
# (huggingface.co/THUDM/chatglm3-6b, tokenization_chatglm.py; github.com/THUDM/ChatGLM3, PROMPT.md). The blank after a
# header stands for the one that SentencePiece puts before every text: the definition encodes header and content apart.
CHATGLM = "[MASK] [gMASK] [sMASK] sop eop <|system|> <|user|> <|assistant|> <|observation|>".split()
CHATGLM_OPENS = ["[gMASK]", "sop"]  # what stands before a text
CHATGLM_ENDS = ("</s>", "<|user|>", "<|observation|>")
CHATGLM_TEMPLATE = """[gMASK]sop
{%- set tool_text = '\\n' + tools | tojson(indent=4) if tools else '' %}
{%- if tools and messages[0].role != 'system' %}
    {{- '<|system|>\\n Answer the following questions as best as you can. You have access to the following tools:' }}
    {{- tool_text }}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'observation' if message.role == 'tool' else message.role %}
    {%- if message.content or not message.tool_calls %}
        {{- '<|' + role + '|>\\n' + (' ' + message.content if message.content else '') }}
        {%- if loop.first and role == 'system' %}{{- tool_text }}{% endif %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '<|assistant|>' + call.function.name + '\\n ```python\\ntool_call(' }}
        {%- for name, value in call.function.arguments.items() %}
            {{- name + '=' }}{{ value if value is boolean or value is none else value | tojson }}
            {{- '' if loop.last else ', ' }}
        {%- endfor %}
        {{- ')\\n```' }}
    {%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""


def is_chatglm(config: dict) -> bool:
    return config.get("tokenizer_class") == "ChatGLMTokenizer"


def read_sentencepiece(file: Path, config: dict) -> dict[str, Any]:
    """UserError if the file is damaged, or a model of another kind. `config` may name tokens after those of the file
    (`added_tokens_decoder`)."""
    try:
        model = list(_fields(file.read_bytes()))
        trainer = dict(_fields(b"".join(value for number, value in model if number == 2)))
        rules = dict(_fields(b"".join(value for number, value in model if number == 3)))
        pieces = [_piece(value) for number, value in model if number == 1]
    except (IndexError, struct.error, TypeError, ValueError):
        raise UserError(f"{file}: not a model of SentencePiece, or damaged") from None
    if not pieces or trainer.get(3) != BPE or not trainer.get(35):
        raise UserError(f"{file}: only SentencePiece's BPE with byte fallback can be read (ChatGLM3, Llama 2)")
    if not rules.get(5, 1) or trainer.get(24):
        raise UserError(f"{file}: SentencePiece's escape_whitespaces=false and whitespace as suffix cannot be read")

    special = {i: text for i, (text, _, kind) in enumerate(pieces) if kind in (UNKNOWN, CONTROL, USER_DEFINED)}
    if is_chatglm(config):
        special |= {len(pieces) + n: text for n, text in enumerate(CHATGLM)}
    special |= {int(i): token["content"] for i, token in config.get("added_tokens_decoder", {}).items()}
    return dict(
        added_tokens=[dict(id=i, content=text, special=True) for i, text in sorted(special.items())],
        normalizer=dict(type="Sequence", normalizers=_normalizers(rules)),
        pre_tokenizer=None,
        model=dict(
            type="BPE",
            vocab={text: i for i, (text, _, _) in enumerate(pieces)},
            merges=_merges(pieces),
            byte_fallback=True,
            fuse_unk=True,
        ),
        # the blank in front of every text is dropped again
        decoder=dict(type="Strip", content=" ", start=1, stop=0) if rules.get(3, 1) else None,
    )


def _normalizers(rules: dict[int, Any]) -> list[dict]:
    """What happens to a text first, by NormalizerSpec: characters are replaced, blanks removed, one put in front."""
    steps: list[dict] = []
    if characters := rules.get(2):
        steps.append(dict(type="Precompiled", precompiled_charsmap=base64.b64encode(characters).decode()))
    if rules.get(4, 1):
        steps.append(dict(type="Replace", pattern=dict(Regex="^ +| +$"), content=""))
        steps.append(dict(type="Replace", pattern=dict(Regex=" {2,}"), content=" "))
    if rules.get(3, 1):
        steps.append(dict(type="Prepend", prepend=SPACE))
    return [*steps, dict(type="Replace", pattern=dict(String=" "), content=SPACE)]


def _merges(pieces: list[tuple[str, float, int]]) -> list[list[str]]:
    """SentencePiece merges the pair whose result has the highest score; a tokenizer.json lists pairs in that order."""
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    found = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                found.append((-score, len(left), left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _piece(data: bytes) -> tuple[str, float, int]:
    """(text, score, kind)"""
    values = dict(_fields(data))
    return values[1].decode(), struct.unpack("<f", values.get(2, bytes(4)))[0], values.get(3, NORMAL)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of every field of a protocol buffer: an int, or bytes."""
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        number, kind = divmod(integer(), 8)
        if kind == 0:
            yield number, integer()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(kind)
        size = integer() if kind == 2 else 8 if kind == 1 else 4
        if at + size > len(data):
            raise ValueError("cut off")
        yield number, data[at : at + size]
        at += size
