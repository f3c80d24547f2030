"""Text <-> ids: exact for every text, control tokens out of reach of any text, other people's tokenizer files."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.tokenizers import BEGINS, ENDS, glm_like, llama_like
from tokenizer.text import SHIPPED, Tokenizer

CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    *(f"<|spare_{n}|>" for n in range(5)),
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load()


def shipped_spec() -> dict:
    return json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))


def write(directory, spec: dict, config: dict | None = None, template: str | None = None):
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    return directory


# ---- the shipped vocabulary


def test_ids_that_weights_depend_on(tokenizer):
    assert tokenizer.vocab_size == 6400
    assert list(tokenizer.control) == CONTROL and list(tokenizer.control.values()) == list(range(16))
    assert (tokenizer.end_of_text, tokenizer.im_start, tokenizer.im_end) == (0, 1, 2)
    assert tokenizer.stop_ids == {0, 2}


def test_every_id_stands_for_its_own_bytes(tokenizer):
    assert tokenizer.token_bytes[:16].tolist() == [0] * 16, "control tokens are no text (bits per byte counts text)"
    assert tokenizer.token_bytes[16:272].tolist() == [1] * 256, "any byte can be said, so any text can"
    assert len(set(tokenizer._bytes.values())) == 6400, "two ids for the same bytes would waste one"


def test_digits_are_encoded_one_by_one(tokenizer):
    assert len(tokenizer.encode("20240229")) == 8


# ---- exact, whatever the text


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert sum(tokenizer.token_bytes[ids]) == len(text.encode("utf-8"))


ODD = ["", " ", "\n\n\r\n", "a\0b", "  x", "e\u0301 \u00e9", "\ufffd", "\ufeffBOM", "👩\u200d👧", "\U0010ffff", "ﬁ①Ａ"]


@pytest.mark.parametrize("text", ODD)
def test_nothing_is_normalised(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_gives_what_single_texts_give(tokenizer):
    texts = ["你好", "", "hello <think>", "1\n2"] * 50
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_a_lone_surrogate_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"U\+D83D at character 2"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(ValueError, match=r"U\+DE00 at character 0"):
        tokenizer.encode_batch(["fine", "\ude00"])
    with pytest.raises(TypeError, match="only text can be encoded, not NoneType"):
        tokenizer.encode_batch(["fine", None])


# ---- text never becomes a control token


FRAGMENTS = st.sampled_from([*CONTROL, "<", "|", ">", "im_end", "think", " ", "\n", "好"])


@settings(max_examples=300, deadline=None)
@given(st.lists(FRAGMENTS, max_size=8).map("".join))
def test_no_text_gives_a_control_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.control.values())
    assert tokenizer.decode(ids) == text


def test_why_a_copy_without_added_tokens_is_used(tokenizer):
    """`encode_special_tokens`, the library's own switch, lets through what is not flagged special, such as <think>."""
    import tokenizers

    switched = tokenizers.Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    switched.encode_special_tokens = True
    assert switched.encode("<|im_end|>").ids != [2], "that one is special, and is skipped"
    assert switched.encode("<think>").ids == [3], "this one is not"
    assert tokenizer.encode("<think>") != [3]


def test_control_tokens_are_no_words_of_the_vocabulary_either(tmp_path):
    """With `ignore_merges` (Llama 3) a piece that stands in the vocabulary is taken whole; ours has them in it."""
    spec = shipped_spec()
    spec["model"]["ignore_merges"] = True
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    whole = Tokenizer.load(write(tmp_path, spec))
    assert len(whole.encode("<|im_end|>")) > 1 and whole.decode(whole.encode("<|im_end|>")) == "<|im_end|>"


def test_harmless_text_gives_the_ids_transformers_gives(tokenizer, root):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(SHIPPED)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (2, 0, None)
    files = [*root.glob("tokenizer/*.py"), *root.glob("docs/*.md"), *root.glob("dataset/tiny_world/*.py")]
    texts = [piece for file in files for piece in file.read_text(encoding="utf-8").split("\n\n") if "<" not in piece]
    assert len(texts) > 50
    assert tokenizer.encode_batch(texts) == theirs(texts)["input_ids"]


# ---- decoding


def test_control_tokens_are_shown_or_skipped(tokenizer):
    ids = [1, *tokenizer.encode("user\n好"), 2]
    assert tokenizer.decode(ids) == "<|im_start|>user\n好<|im_end|>"
    assert tokenizer.decode(ids, skip_control=True) == "user\n好"
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(ids)
    import torch

    assert tokenizer.decode(torch.tensor(ids), skip_control=True) == "user\n好"


def test_a_stream_shows_a_character_with_its_last_byte(tokenizer):
    """🐦 byte by byte: three silent pushes, then the whole character."""
    of_byte = {tokenizer._bytes[i]: i for i in range(16, 272)}
    bird = [of_byte[bytes([byte])] for byte in "🐦".encode()]
    stream = tokenizer.stream()
    assert [stream.push(i) for i in bird] == ["", "", "", "🐦"]
    assert stream.flush() == ""
    for i in bird[:2]:
        assert stream.push(i) == ""
    assert stream.flush() == "\ufffd", "a character that was cut off is one U+FFFD"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6399), max_size=40), st.booleans())
def test_what_a_stream_shows_adds_up_to_decode(tokenizer, ids, skip_control):
    """Any ids, as an untrained model says them: broken UTF-8, control tokens inside of characters."""
    stream = tokenizer.stream(skip_control)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_control)
    shown = [i for i in ids if not (skip_control and i < 16)]
    whole = b"".join(CONTROL[i].encode() if i < 16 else tokenizer._bytes[i] for i in shown)
    assert tokenizer.decode(ids, skip_control) == whole.decode("utf-8", "replace")


def test_rows_beyond_the_vocabulary_stand_for_nothing(tokenizer):
    assert tokenizer.decode([6400, 10**6]) == ""


# ---- the hash that ties weights to a tokenizer


def test_hash_depends_on_what_decides_the_ids_alone(tokenizer, tmp_path):
    template = tokenizer.chat_template
    spec = shipped_spec()
    spec["padding"] = {"some": "setting"}
    windows = write(tmp_path / "windows", spec, template=template.replace("\n", "\r\n"))
    assert Tokenizer.load(windows).hash == tokenizer.hash

    spec = shipped_spec()
    spec["model"]["merges"][-2:] = reversed(spec["model"]["merges"][-2:])
    assert Tokenizer.load(write(tmp_path / "merges", spec, template=template)).hash != tokenizer.hash
    assert Tokenizer.load(write(tmp_path / "template", shipped_spec(), template=template + "!")).hash != tokenizer.hash


def test_hash_survives_saving_by_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash


# ---- other people's tokenizers


def test_added_tokens_outside_of_the_vocabulary(tmp_path):
    """Qwen's and Llama's layout: control tokens come after the vocabulary; a BOS is added by a post-processor."""
    spec = shipped_spec()
    spec["model"]["vocab"] = {token: i - 16 for token, i in spec["model"]["vocab"].items() if i >= 16}
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = [{"id": 6384 + n, "content": name, **flags} for n, name in enumerate(names)]
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": names[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {names[0]: {"id": names[0], "ids": [6384], "tokens": [names[0]]}},
    }
    config = {"eos_token": {"content": "<|eot_id|>"}, "chat_template": "x"}
    write(tmp_path / "llama", spec, config)
    (tmp_path / "llama" / "generation_config.json").write_text('{"eos_token_id": [6385, 6386]}', encoding="utf-8")
    llama = Tokenizer.load(tmp_path / "llama")
    ids = llama.encode("hi <|eot_id|>")
    assert max(ids) < 6384 and llama.decode(ids) == "hi <|eot_id|>", "no BOS, no control token"
    assert (llama.vocab_size, llama.end_of_text, llama.stop_ids) == (6387, 6385, {6385, 6386})
    (tmp_path / "llama" / "generation_config.json").unlink()
    assert Tokenizer.load(tmp_path / "llama").stop_ids == {6385, 6386}, "one ends a turn, the other a text"
    base = Tokenizer.load(write(tmp_path / "base", spec, {"eos_token": "<|end_of_text|>"}))
    assert base.stop_ids == {6385, 6386}
    assert llama.chat_template == "x"
    assert llama.start_of_text == [llama.end_of_text], "it is not told which of the names is the BOS"
    named = Tokenizer.load(write(tmp_path / "named", spec, {"bos_token": names[0], "eos_token": names[2]}))
    assert named.start_of_text == [6384]
    with pytest.raises(ValueError, match=r"llama: the tokenizer has no <\|im_start\|> token; take one that has"):
        llama.im_start  # noqa: B018 - asked for only by the ChatML format


def test_sentencepiece_style_bpe(tmp_path):
    mistral = llama_like(tmp_path, "hi")
    assert mistral.encode("hi hi") == [263, 263]
    for text in ["hi hi", "好\n", " hi", "</s>"]:
        assert mistral.decode(mistral.encode(text)) == text
        stream = mistral.stream()
        assert "".join(map(stream.push, mistral.encode(text))) + stream.flush() == text
    assert 2 not in mistral.encode("</s>") and mistral.end_of_text == 2


@pytest.mark.parametrize(
    "config", [{}, {"add_bos_token": True}, {"bos_token": {"__type": "AddedToken", "content": "<s>"}}]
)
def test_a_text_opens_as_the_family_opens_it(tmp_path, config):
    """Llama's texts began with </s>, which it was trained to see at an end: its perplexity doubled without a word."""
    from transformers import AutoTokenizer

    llama = llama_like(tmp_path, "the", "cat", **config)
    assert (llama.start_of_text, llama.end_of_text) == ([BEGINS], ENDS)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the cat").input_ids == [*llama.start_of_text, *llama.encode("the cat")]
    assert llama.encode("<s>the")[0] != BEGINS, "the name in a text stays text"


def test_where_no_bos_is_put_before_a_text_the_end_of_another_opens_it(tokenizer, tmp_path):
    """Ours; Qwen2, which names none; MiniMind, whose bos_token only opens turns."""
    assert tokenizer.start_of_text == [tokenizer.end_of_text]
    assert llama_like(tmp_path / "none", "the", bos_token=None).start_of_text == [ENDS]
    assert llama_like(tmp_path / "off", "the", add_bos_token=False).start_of_text == [ENDS]
    assert llama_like(tmp_path / "missing", "the", bos_token="<bos>").start_of_text == [ENDS]
    minimind = shipped_spec() | dict(post_processor=dict(type="ByteLevel", trim_offsets=False))
    names = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<|im_start|>", eos_token="<|im_end|>")
    assert Tokenizer.load(write(tmp_path / "minimind", minimind, names)).start_of_text == [0]
    both = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]
    ends = shipped_spec() | dict(post_processor=dict(type="TemplateProcessing", single=both))
    names = dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    assert not Tokenizer.load(write(tmp_path / "ends", ends, names)).adds_bos, "the template puts it behind a text"


def test_a_text_for_glm_begins_with_its_two_tokens(tmp_path):
    """It began after <|endoftext|>, where transformers puts [gMASK] and <sop>, as in the models' own training."""
    from transformers import AutoTokenizer

    glm = glm_like(tmp_path)
    assert glm.start_of_text == [glm.control["[gMASK]"], glm.control["<sop>"]] and not glm.adds_bos
    assert AutoTokenizer.from_pretrained(tmp_path)("the cat").input_ids == [*glm.start_of_text, *glm.encode("the cat")]


def test_llamas_class_adds_a_bos_where_the_files_say_nothing(tmp_path):
    """Directories with a tokenizer.model, or from before tokenizer.json had a post-processor."""
    llama_like(tmp_path, "the")
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8")) | dict(post_processor=None)
    config = dict(tokenizer_class="LlamaTokenizerFast", bos_token="<s>")
    assert Tokenizer.load(write(tmp_path, spec, config)).start_of_text == [BEGINS]
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    assert Tokenizer.load(write(tmp_path, spec, config)).start_of_text == [ENDS]


def test_a_text_that_goes_on_keeps_its_first_blank(tmp_path):
    """ "the cat" went on with "sat": the blank that SentencePiece puts before a text was taken off a continuation."""
    llama = llama_like(tmp_path, "the", "cat", "sat")
    ids = [*llama.start_of_text, *llama.encode("the cat sat")]
    for cut in range(len(ids)):
        stream, before = llama.stream(skip_control=True, after=ids[:cut]), llama.decode(ids[:cut], skip_control=True)
        assert before + stream.push_all(ids[cut:]) == "the cat sat"


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"there is no such tokenizer; give a directory that holds a tokenizer\.json"),
        ("{not json", r"tokenizer\.json:1: not JSON"),
        ("[]", "not a tokenizer.json of HF tokenizers"),
        ('{"model": {"type": "Unigram"}, "added_tokens": []}', "a Unigram tokenizer; only BPE"),
        ('{"model": {"type": "BPE", "vocab": {}}, "added_tokens": []}', "tokenizers cannot read this tokenizer.json"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_path_may_be_the_file_itself():
    assert Tokenizer.load(SHIPPED / "tokenizer.json").hash == Tokenizer.load(str(SHIPPED)).hash


def test_tokenizers_survive_pickling(tokenizer):
    """Worker processes get theirs that way."""
    import pickle

    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "".join(random.Random(0).choices("好a<|im_end|>\n", k=50))
    assert copy.encode(text) == tokenizer.encode(text) and copy.hash == tokenizer.hash
