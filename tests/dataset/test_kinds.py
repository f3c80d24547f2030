"""The table of kinds, and what is cut of a row that is too long."""

import dataclasses

import numpy as np
import pytest

from common.console import UserError
from dataset.batches.preference import PreferenceDataset
from dataset.kinds import KINDS
from dataset.read.formats import LAYOUTS
from dataset.read.jsonl import Jsonl
from dataset.tokens import token_cache
from dataset.tokens.examples import PretrainDataset, SFTDataset
from dataset.tokens.lengths import Lengths, conversation_lengths, fit, pair_lengths
from scripts.check_data import CheckConfig
from scripts.prepare_data import PrepareConfig
from tokenizer import chat
from tokenizer.text import Tokenizer

TOKENIZER = Tokenizer.load()
QUESTION = {"role": "user", "content": "1+1?"}
ROWS = {
    "text": {"text": "Once upon a time"},
    "plain": {"text": "Once upon a time"},
    "chat": {"messages": [QUESTION, {"role": "assistant", "content": "2"}]},
    "preference": {
        "chosen": [QUESTION, {"role": "assistant", "content": "2"}],
        "rejected": [QUESTION, {"role": "assistant", "content": "3"}],
    },
    "rated": {"messages": [QUESTION, {"role": "assistant", "content": "2"}], "label": True},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_row_of_the_table_agrees_with_itself(name):
    """What `encode` gives is what the cache is told to keep: the same columns of the same types, as many ids of each
    entry as `lengths` counts."""
    kind = KINDS[name]
    kind.check(ROWS[name])
    block = kind.encode([(7, ROWS[name])], TOKENIZER)
    assert {column: array.dtype for column, array in block.columns.items()} == kind.columns
    assert block.lines.tolist() == [7] and block.lengths.tolist() == [len(block.tokens)] and not block.bad
    lengths = kind.lengths(block.lengths, block.columns)
    assert lengths.total.tolist() == [len(block.tokens)]
    assert 0 < block.trained_tokens <= len(block.tokens)
    assert all(len(array) == 0 for array in kind.encode([], TOKENIZER).columns.values()), "and of no rows, nothing"


def test_every_kind_that_is_trained_on_has_one_data_set_and_every_layout_a_kind():
    kinds = {dataset.kind for dataset in (PretrainDataset, SFTDataset, PreferenceDataset)}
    assert kinds == {name for name, kind in KINDS.items() if kind.trained} - {"plain"}
    assert {layout.kind for layout in LAYOUTS} <= KINDS.keys()


def test_the_scripts_offer_the_kinds_of_the_table():
    """They state the names once more, because `--help` must not wait for numpy."""
    offered = [KINDS.keys() - {"plain"}] * 2
    fields = [{f.name: f for f in dataclasses.fields(config)} for config in (CheckConfig, PrepareConfig)]
    assert [set(fields[0]["kind"].metadata["choices"]), set(fields[1]["to"].metadata["choices"])] == offered


def test_what_is_cut_by_hand():
    """--max_seq_len 6 holds 7 ids. Prompts and answers of (3, 4) fit, (6, 4) loses 3 ids of its prompt, (5, 6) keeps
    one of them, (5, 7) could keep none and is left out; (0, 7), an answer without a prompt, fits."""
    lengths = Lengths(np.array([3, 6, 5, 5, 0]), np.array([4, 4, 6, 7, 7]), np.array([7, 10, 11, 12, 7]))
    kept, cut = fit(lengths, 6)
    assert kept.tolist() == [True, True, True, False, True] and cut[kept].tolist() == [0, 3, 4, 0]
    kept, cut = fit(lengths, 6, on_long="drop")
    assert kept.tolist() == [True, False, False, False, True] and not cut[kept].any()
    kept, cut = fit(lengths, 100, max_prompt_length=4)
    assert kept.all() and cut.tolist() == [0, 2, 1, 1, 0]


def test_the_last_answer_of_a_conversation_and_the_longer_one_of_a_pair_must_stay_whole():
    ids = np.array([20])
    assert conversation_lengths(ids, {"answers": np.array([15])}) == ([15], [5], [20])
    # a prompt of 9, a chosen answer of 4, so that the rejected one has 7
    assert pair_lengths(ids, {"prompts": np.array([9]), "chosen": np.array([4])}) == ([9], [7], [20])


def test_a_row_is_checked_once(tmp_path, monkeypatch):
    """The reader does it; encoding once did it again. Conversations that nobody else has checked still are."""
    calls = []
    monkeypatch.setattr("dataset.kinds.check_messages", lambda *given: calls.append("reader"))
    monkeypatch.setattr(chat, "check_messages", lambda *given: calls.append("encode_chat"))
    file = tmp_path / "a.jsonl"
    file.write_text('{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    Jsonl(file)  # without the index, the file's head would be looked at first
    [cache] = token_cache.token_caches(file, TOKENIZER, "chat")
    assert len(cache) == 1 and calls == ["reader"]
    chat.encode_chat(TOKENIZER, [QUESTION])
    assert calls == ["reader", "encode_chat"]


def test_a_template_that_refuses_one_row_of_many_says_which(tmp_path):
    """The others are encoded as ever, in their order."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source := chat.Path(chat.__file__).with_name(name)).is_file():
            (tmp_path / name).write_bytes(source.read_bytes())
    template = (
        "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('not that') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.load(tmp_path)
    chats = [([QUESTION, {"role": "assistant", "content": said}], None) for said in ("a", "no", "b")]
    first, refused, last = chat.encode_chats(tokenizer, chats)
    assert isinstance(refused, UserError) and "not that" in str(refused)
    assert [first, last] == [chat.encode_chat(tokenizer, *chats[i]) for i in (0, 2)]
    rows = [(i, {"messages": messages}) for i, (messages, _) in enumerate(chats, start=1)]
    block = KINDS["chat"].encode(rows, tokenizer)
    assert block.lines.tolist() == [1, 3] and [line for line, _, _ in block.bad] == [2]
