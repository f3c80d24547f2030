"""A tokenizer for GGUF: its tokens, how text is cut before merging, and the chat template.

llama.cpp does not read the regular expression of a tokenizer.json. It has a list of known ones, which a file chooses
from by name (`tokenizer.ggml.pre`). With a wrong name, text would become other ids without a word: so a tokenizer that
is not in PRE_TOKENIZERS is refused. Its byte-level BPE is "gpt2", SentencePiece's BPE is "llama" there
(github.com/ggml-org/llama.cpp, src/llama-vocab.cpp).

All added tokens are written as control tokens, `<think>` too. Then text never becomes one, as here; the price is that
programs which hide control tokens hide these.
"""

from __future__ import annotations

import re
from typing import Any

from common.console import UserError
from tokenizer.chat import TEMPLATE
from tokenizer.sentencepiece import SPACE
from tokenizer.text import IM_START, Tokenizer, read_files

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {  # (pattern, whether a word that is a token is not merged from its letters) -> llama.cpp's name
    (WORDS + r"\p{N}" + REST, False): "qwen2",
    (WORDS + r"\p{N}{1,3}" + REST, True): "llama-bpe",
    (WORDS + r"\p{N}{1,3}" + REST, False): "dbrx",
    (GPT2, False): "gpt-2",  # also MiniMind's
}
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6  # TokenType of the format


def add_tokenizer(writer: Any, tokenizer: Tokenizer, rows: int) -> list[str]:
    """Writes it with a GGUFWriter -> lines to print. rows: of the embedding, which are all filled."""
    spec, _, _, folder = read_files(tokenizer.path)
    model, notes = spec["model"], []
    tokens = {i: token for token, i in model["vocab"].items()} | {i: name for name, i in tokenizer.control.items()}
    kinds = {i: BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL for i, token in tokens.items()}
    kinds |= dict.fromkeys(tokenizer.control.values(), CONTROL)
    names = [tokens.get(i, f"[PAD{i}]") for i in range(rows)]
    if len(set(names)) < rows:
        raise UserError(f"{folder}: two ids have the same token, which llama.cpp does not take")
    if _is_sentencepiece(spec):
        _add_sentencepiece(writer, tokenizer, spec, folder, names, kinds)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(spec, folder))
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        if pairs:
            writer.add_token_merges(pairs)
        if spec.get("normalizer"):
            notes.append("text that is not in Unicode's NFC form gets other ids in llama.cpp, which does not normalise")
    writer.add_token_list(names)
    writer.add_token_types([kinds.get(i, UNUSED) for i in range(rows)])
    for role, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
        ("unk", writer.add_unk_token_id),
    ):
        named = tokenizer.control.get(tokenizer.special(f"{role}_token"))
        if named is not None:
            add(named)
    if tokenizer.special("eos_token") not in tokenizer.control:
        writer.add_eos_token_id(min(tokenizer.stop_ids))
    writer.add_add_bos_token(tokenizer.adds_bos)
    if template := tokenizer.chat_template or (TEMPLATE if IM_START in tokenizer.control else ""):
        writer.add_chat_template(template)
    return notes


def _is_sentencepiece(spec: dict) -> bool:
    return bool(spec["model"].get("byte_fallback"))


def _refused(folder: str) -> UserError:
    return UserError(
        f"{folder}: llama.cpp would cut text in another way than this tokenizer; write --to hf, and convert that with "
        "llama.cpp's own convert_hf_to_gguf.py, which may know the model"
    )


def _pre_tokenizer(spec: dict, folder: str) -> str:
    """llama.cpp's name of how this tokenizer cuts text. UserError: it has none."""
    steps = spec.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    if not patterns and levels and levels[-1].get("use_regex", True):
        patterns = [GPT2]  # ByteLevel's own
    name = PRE_TOKENIZERS.get((patterns[0] if len(patterns) == 1 else "", bool(spec["model"].get("ignore_merges"))))
    normalizer = (spec.get("normalizer") or {}).get("type")
    others = [step["type"] for step in steps if step.get("type") not in ("Split", "ByteLevel")]
    if name is None or others or not levels or levels[-1].get("add_prefix_space") or normalizer not in (None, "NFC"):
        raise _refused(folder)
    return name


def _add_sentencepiece(
    writer: Any, tokenizer: Tokenizer, spec: dict, folder: str, names: list[str], kinds: dict[int, int]
) -> None:
    """llama.cpp merges the pair whose result has the highest score: the pair that stands first in a tokenizer.json."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(spec["model"]["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        scores.setdefault(left + right, -float(rank))
    steps = spec.get("normalizer") or {}
    steps = steps.get("normalizers", [steps] if steps else [])
    space = dict(type="Replace", pattern=dict(String=" "), content=SPACE)
    before = spec.get("pre_tokenizer") or {}
    if [step for step in steps if step["type"] != "Prepend" and step != space] or before.get("type") not in (
        None,
        "Metaspace",
    ):
        raise _refused(folder)
    prefix = any(step["type"] == "Prepend" for step in steps) or before.get("prepend_scheme", "never") != "never"
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([scores.get(name, -float(len(scores))) for name in names])
    writer.add_add_space_prefix(prefix)
    unknown = spec["model"].get("unk_token") or tokenizer.special("unk_token")
    if unknown in names:
        kinds[names.index(unknown)] = UNKNOWN
