"""Rows -> examples: what is trained on, what is cut, and that tokens are worked out once."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import numpy as np
import pytest

from common.files import ROOT
from dataset.batches.loader import Loader
from dataset.read import text as plain_text
from dataset.read.formats import canonical
from dataset.read.jsonl import Head
from dataset.read.text import TextFile
from dataset.tokens import cache, encode, examples, order
from dataset.tokens import token_cache as tc
from dataset.tokens.examples import PretrainDataset
from dataset.tokens.order import repeated, weighted
from dataset.tokens.stream import Stream, piece
from tests.helpers.datasets import pretrain, sft
from tests.helpers.rows import chat, jsonl
from tests.helpers.tokenizers import BEGINS, ENDS, ByteTokenizer, llama_like, text
from tokenizer.chat import Encoded

# ---- pretraining


def test_documents_make_one_stream_and_every_token_is_a_target_once(tmp_path):
    """E opens a document as an input and ends the one before as a target: "abc", "defg" have 3 + 1 + 4 + 1 targets."""
    ds = pretrain(jsonl(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "defg"}))
    rows = [text(ds.tokens(i)) for i in range(len(ds))]
    assert rows == ["EabcE", "Edefg", "gE"]
    assert "".join(row[1:] for row in rows) == "abcEdefgE"
    assert ds.lengths.tolist() == [5, 5, 2] and ds.trained(0) is None
    assert ds.summary == "2 documents, 9 tokens"


def test_documents_for_llama_begin_with_its_bos(tmp_path, monkeypatch):
    """They began after </s>, so a model trained from nothing was asked to go on after a token it had never seen. What
    was tokenised so is tokenised again."""
    llama = llama_like(tmp_path / "llama", "the", "cat")
    file, plain = jsonl(tmp_path / "a.jsonl", {"text": "the cat"}, {"text": "cat"}), tmp_path / "b.txt"
    plain.write_text("the cat", encoding="utf-8")
    with monkeypatch.context() as before:
        before.setattr(encode, "opening", lambda tokenizer: [ENDS])
        before.setattr(tc, "opening", encode.opening)
        before.setattr(examples, "opening", encode.opening)
        old = PretrainDataset(file, llama, max_seq_len=16)
    ds = PretrainDataset(file, llama, max_seq_len=16)
    a, b = llama.encode("the cat"), llama.encode("cat")
    row = [ENDS, BEGINS, *a, ENDS, BEGINS, *b, ENDS]
    assert old.tokens(0).tolist() == [ENDS, *a, ENDS, *b, ENDS]
    assert ds.tokens(0).tolist() == row and ds.fingerprint != old.fingerprint
    assert PretrainDataset(plain, llama, max_seq_len=16).tokens(0).tolist() == row[: len(a) + 3]
    loader = Loader(ds, packing=False, batch_size=1, accumulation_steps=1, max_seq_len=len(row) - 1)
    (batch,) = loader.batches(0)
    assert batch.documents.tolist() == [[1, *[2] * (len(a) + 2), *[3] * (len(b) + 1)]], "<s> opens a document, not </s>"
    assert batch.positions.tolist() == [[0, *range(len(a) + 2), *range(len(b) + 1)]]


def test_a_stream_goes_on_over_files_and_says_where_rows_come_from(tmp_path):
    a, b = jsonl(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "d"}), jsonl(tmp_path / "b.jsonl", {"text": "efghijk"})
    ds = pretrain([a, b])
    assert [text(ds.tokens(i)) for i in range(len(ds))] == ["EabcE", "EdEef", "fghij", "jkE"]
    assert [ds.source(i) for i in range(len(ds))] == [f"{a}:1", f"{a}:2", f"{b}:1", f"{b}:1"]


def test_a_stream_that_ends_with_a_row_has_no_row_of_nothing(tmp_path):
    ds = pretrain(jsonl(tmp_path / "a.jsonl", {"text": "abcdefg"}))  # E + 7 = two rows of 4
    assert [text(ds.tokens(i)) for i in range(len(ds))] == ["Eabcd", "defgE"]


def test_a_text_file_is_one_document_tokenised_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tc, "TOKENISED_BYTES", 16)
    file = tmp_path / "a.txt"
    file.write_bytes(b"the first line\r\nthe second\nand a third that is longer\n")
    tokenizer = ByteTokenizer()
    ds = pretrain(file, tokenizer, max_seq_len=1000)
    assert text(ds.tokens(0)) == "Ethe first line\nthe second\nand a third that is longer\nE"
    assert len(tokenizer.texts) > 2 and ds.summary.startswith("1 documents")
    assert pretrain(file, tokenizer, max_seq_len=16).source(1) == f"{file}:2"


def test_a_long_text_in_jsonl_is_tokenised_in_pieces_cut_at_line_ends(monkeypatch):
    monkeypatch.setattr(encode, "PIECE", 8)
    assert encode.pieces("ab\ncd\nefghijklmnopqrst") == ["ab\ncd\n", "efghijkl", "mnopqrst"]


# ---- conversations: the mask, spelled out


def test_exactly_the_assistants_words_and_its_end_token_are_trained_on(tmp_path):
    ds = sft(jsonl(tmp_path / "a.jsonl", chat("hi", "yo", "ok?", "no", system="be")))
    ids, trained = ds.tokens(0), ds.trained(0)
    assert text(ids) == "[system\nbe]\n[user\nhi]\n[assistant\nyo]\n[user\nok?]\n[assistant\nno]"
    assert text(ids[trained]) == "yo]no]"
    assert len(ids) == ds.lengths[0], "and nothing after the last trained token: it could teach nothing"


def test_layouts_give_the_same_conversation():
    call = {"name": "add", "arguments": {"a": 1}}
    expected = {
        "messages": [
            {"role": "system", "content": "be"},
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "", "reasoning_content": "easy", "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "2"},
        ],
        "tools": [{"type": "function"}],
    }
    tools = [{"type": "function"}]
    openai = [
        {"role": "user", "content": "1+1?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "easy",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    minimind = [
        {"role": "system", "content": "be", "tools": json.dumps(tools)},
        {"role": "user", "content": "1+1?", "tools": ""},
        {"role": "assistant", "content": "", "reasoning_content": "easy", "tool_calls": json.dumps([call])},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    assert canonical({"messages": openai, "system": "be", "tools": tools}) == expected
    assert canonical({"conversations": minimind}) == expected
    minimind[0] |= {"tools": None, "functions": tools}
    assert canonical({"conversations": minimind}) == expected


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"talk": []}, 'no conversation ("conversations", "messages", "instruction", ...) in this row, it has "talk"'),
        ({"messages": []}, '"messages" must be a list of messages, this is list []'),
        ({"messages": "hi"}, '"messages" must be a list of messages, this is str'),
        ({"messages": ["hi"]}, 'messages[0] must be {"role", "content"} or {"from", "value"}, this is str'),
        ({"conversations": [{"speaker": "human", "text": "hi"}]}, 'conversations[0] must be {"role", "content"}'),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0]: role must be one of system, user"),
        ({"conversations": [{"role": "User", "content": "hi"}]}, "conversations[0]: role must be one of "),
        ({"messages": [{"role": "Assistant", "content": "hi"}]}, "found 'Assistant'; --data_mapping says what roles"),
        ({"messages": None, "title": "hi"}, 'it has "messages" (null), "title" (docs/data.md'),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0] (user): content must be text, found int"),
        ({"messages": [{"role": "user"}]}, "messages[0] (user): content must be text, found nothing"),
        (chat("hi", ""), "conversations[1]: the assistant says nothing"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": "[{"}]}, "messages[0].tool_calls: not JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}, "must be an object"),
        ({"messages": [{"role": "user", "content": "hi"}], "tools": {"a": 1}}, '"tools" must be a list'),
    ],
)
def test_a_bad_conversation_is_named_with_file_line_and_reason(tmp_path, row, reason):
    good = chat("hi", "yo")["conversations"]
    file = jsonl(tmp_path / "a.jsonl", {"messages" if "messages" in row else "conversations": good}, "", row)
    with pytest.raises(ValueError) as error:
        sft(file)
    assert str(error.value).startswith(f"{file}:3: ") and reason in str(error.value)
    assert not (tmp_path / ".cache").exists(), "a file that is refused at its head leaves nothing"


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"txt": "a"}, 'no "text" in this row, it has "txt"'),
        ({}, "it has no keys"),
        ({"text": ["a"]}, '"text" must be text, this is list'),
        ('{"text": "a', "broken JSON"),
    ],
)
def test_a_bad_document_is_named_with_file_line_and_reason(tmp_path, row, reason):
    file = jsonl(tmp_path / "a.jsonl", {"text": "a"}, row)
    with pytest.raises(ValueError) as error:
        pretrain(file)
    assert str(error.value).startswith(f"{file}:2: ") and reason in str(error.value)
    assert canonical({"text": "a", "label": True}, "text") == {"text": "a"}, "other columns are its own business"


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("麻雀\n".encode("gbk"))
    with pytest.raises(ValueError, match=r"a\.txt:1: not UTF-8 at byte 1; it looks like gbk"):
        pretrain(tmp_path / "a.txt")


def test_a_text_of_a_byte_order_mark_alone_is_empty(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ValueError, match=r"a\.txt:1: the file is empty"):
        pretrain(tmp_path / "a.txt")


# ---- too long


def test_a_long_conversation_is_cut_from_the_left_of_its_prompt(tmp_path):
    """12 positions hold 13 ids: the answer, its end token, and what still fits of the prompt before it."""
    ds = sft(jsonl(tmp_path / "a.jsonl", chat("a long question", "yes")), max_seq_len=12)
    assert text(ds.tokens(0)) == "ssistant\nyes]"
    assert text(ds.tokens(0)[ds.trained(0)]) == "yes]"
    assert ds.summary == "1 examples, 13 tokens; too long: 1 cut, 0 left out (the longest needs --max_seq_len 37)"


def test_an_answer_is_trained_on_whole_or_not_at_all(tmp_path):
    """Of two answers the first has lost its beginning: it stays as context only."""
    row = chat("q", "the first answer", "r", "the second")
    ds = sft(jsonl(tmp_path / "a.jsonl", row), max_seq_len=44)
    assert text(ds.tokens(0)) == "first answer]\n[user\nr]\n[assistant\nthe second]"
    assert text(ds.tokens(0)[ds.trained(0)]) == "the second]"


@pytest.mark.parametrize("max_seq_len, kept", [(11, 1), (10, 0)])
def test_a_last_answer_that_does_not_fit_after_a_token_of_its_prompt_is_left_out(tmp_path, max_seq_len, kept):
    """0123456789] is 11 ids; with the one before, which predicts the first of them, 12 ids are 11 positions."""
    file = jsonl(tmp_path / "a.jsonl", chat("q", "0123456789"), chat("q", "a"))
    ds = sft(file, max_seq_len=max_seq_len)
    assert [text(ds.tokens(i)[ds.trained(i)]) for i in range(len(ds))] == ["0123456789]"][:kept] + ["a]"]
    assert f"{1 + kept} cut, {1 - kept} left out" in ds.summary
    assert ds.source(kept) == f"{file}:2"


def test_drop_leaves_long_ones_out_and_none_left_is_an_error(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", chat("q" * 50, "yes"), chat("q", "a"))
    ds = sft(file, max_seq_len=40, on_long="drop")
    assert len(ds) == 1 and "too long: 0 cut, 1 left out" in ds.summary
    with pytest.raises(ValueError, match="--max_seq_len 1: no example fits, the longest needs 72"):
        sft(file, max_seq_len=1)


# ---- nothing to train on


def test_rows_without_an_answer_are_left_out_counted_and_named(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", *[chat("hi", "yo")] * 30, chat("hi"), chat("hi"))
    with pytest.raises(ValueError) as error:  # 2 of 32 are more than 5 %
        sft(file)
    reason = "2 of 32 rows have no assistant's turn to train on; is this the right file?"
    reason += " (--max_empty_rows 0.05 allows no more)"
    assert str(error.value) == f"{file}:31, {file}:32: {reason}"
    ds = sft(jsonl(file, *[chat("hi", "yo")] * 40, chat("hi"), chat("hi")))
    assert len(ds) == 40 and f"; 2 rows with nothing to train on left out ({file}:41, {file}:42)" in ds.summary


def test_the_shares_that_may_be_left_out_are_options(tmp_path):
    """Every third row of some data sets is broken or empty, on purpose or not; that is for their owner to decide."""
    file = jsonl(tmp_path / "a.jsonl", *[chat("hi", "yo"), "{", chat("hi")] * 10)
    cache = dict(cache_dir=tmp_path / "cache")
    with pytest.raises(
        ValueError, match=r"more than 1 bad rows, too many to skip \(--max_bad_rows 0.01 allows no more"
    ):
        sft(file, on_bad_row="skip", **cache)
    most = dict(on_bad_row="skip", max_bad_rows=0.4, max_empty_rows=0.4)
    assert len(sft(file, **most, **cache)) == 10
    for limits, reason in (
        (dict(max_bad_rows=0.3), "more than 9 bad rows"),
        (dict(max_bad_rows=0), "more than 0 bad rows"),
        (dict(max_empty_rows=0.3), "10 of 30 rows have no assistant's turn"),
    ):
        with pytest.raises(ValueError, match=reason):
            sft(file, **most | limits, **cache)  # the cache was made with more


def test_a_conversation_of_which_only_the_first_token_is_trained_on_teaches_nothing(monkeypatch):
    """The first token is never predicted, nor is it counted. (A foreign template may mark it.)"""
    chats = [Encoded([5, 6], [True, False]), Encoded([5, 6], [False, True]), Encoded([5, 6], [True, True])]
    monkeypatch.setattr(encode, "encode_chats", lambda *_: chats)
    block = encode.encode_conversations([(n, {"messages": []}) for n in (1, 2, 3)], ByteTokenizer())
    assert (block.empty, block.lines.tolist(), block.tokens.tolist()) == ([1], [2, 3], [5, 6, 5, 6])
    assert (block.trained_tokens, block.columns["counts"].tolist()) == (2, [1, 1])


def test_empty_texts_are_left_out_and_a_file_of_them_is_refused(tmp_path):
    ds = pretrain(jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": " \n"}))
    assert text(ds.tokens(0)) == "EaE" and "1 rows with nothing to train on left out" in ds.summary
    with pytest.raises(ValueError, match="1 of 1 rows have no text"):
        pretrain(jsonl(tmp_path / "b.jsonl", {"text": ""}))


# ---- bad rows


def test_skipping_counts_writes_down_and_is_not_silently_inherited(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", *[{"text": "a"}] * 3, '{"text": "b', {"text": "c"})
    ds = pretrain(file, on_bad_row="skip", max_seq_len=100)
    assert text(ds.tokens(0)) == "EaEaEaEcE"
    rejects = tmp_path / "a.jsonl.rejects.jsonl"
    assert f"1 bad rows skipped (see {rejects})" in ds.summary
    assert json.loads(rejects.read_text(encoding="utf-8"))["line"] == 4
    assert f"1 bad rows skipped (see {rejects})" in pretrain(file, on_bad_row="skip").summary, "from the cache too"
    with pytest.raises(ValueError, match=r"a\.jsonl:4: broken JSON"):
        pretrain(file)


# ---- the token cache


def test_tokens_are_worked_out_once(tmp_path):
    file, tokenizer = jsonl(tmp_path / "a.jsonl", chat("hi", "yo"), chat("a", "b")), ByteTokenizer()
    first = sft(file, tokenizer)
    assert tokenizer.texts
    tokenizer.texts.clear()
    for options in ({}, dict(max_seq_len=30), dict(on_long="drop"), dict(data_limit=2), dict(num_workers=2)):
        again = sft(file, tokenizer, **options)
        assert not tokenizer.texts
    assert text(again.tokens(1)) == text(first.tokens(1)) and first.tokens(0).dtype == np.uint16


def test_the_cache_is_made_anew_when_data_or_tokenizer_change(tmp_path):
    file, tokenizer = jsonl(tmp_path / "a.jsonl", {"text": "abc"}), ByteTokenizer()
    one = pretrain(file, tokenizer)
    file.write_text('{"text": "abd"}\n', encoding="utf-8")
    two = pretrain(file, tokenizer)
    assert text(two.tokens(0)) == "EabdE" and one.fingerprint != two.fingerprint
    tokenizer.texts.clear()
    tokenizer.hash, tokenizer.vocab_size = "other", 70_000
    three = pretrain(file, tokenizer)
    assert tokenizer.texts == ["abd"] and three.tokens(0).dtype == np.uint32
    assert three.fingerprint != two.fingerprint
    tokenizer.texts.clear()
    os.utime(file, (1, 1))
    assert pretrain(file, tokenizer).fingerprint == three.fingerprint and not tokenizer.texts, "a copy is the same data"


def test_an_interrupted_build_leaves_no_half_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tc, "TOKENISED_BYTES", 20)
    file, tokenizer = jsonl(tmp_path / "a.jsonl", *[{"text": f"text {i}"} for i in range(9)]), ByteTokenizer()
    encode_batch = tokenizer.encode_batch

    def interrupted(texts):
        if "text 5" in texts:
            raise KeyboardInterrupt
        return encode_batch(texts)

    tokenizer.encode_batch = interrupted
    with pytest.raises(KeyboardInterrupt):
        pretrain(file, tokenizer)
    assert not [p for p in (tmp_path / ".cache").iterdir() if "-text-" in p.name and p.is_dir()]
    tokenizer.encode_batch = encode_batch
    assert text(pretrain(file, tokenizer, max_seq_len=100).tokens(0)) == "".join(f"Etext {i}" for i in range(9)) + "E"


@pytest.mark.parametrize("name", ("a.jsonl", "a.txt"))
def test_a_file_that_changes_while_it_is_tokenised_leaves_nothing(tmp_path, monkeypatch, name):
    """The ids of the new text were kept under the hash of the old one."""
    file, encode_it = jsonl(tmp_path / name, {"text": "old"}), tc.encode

    def changed(*args):
        file.write_text(file.read_text().replace("old", "newer"))
        return encode_it(*args)

    monkeypatch.setattr(tc, "encode", changed)
    with pytest.raises(ValueError, match="changed while it was being read"):
        pretrain(file)
    assert not [p for p in (tmp_path / ".cache").iterdir() if "-text-" in p.name or "-plain-" in p.name]


def test_processes_give_what_one_process_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(tc, "TOKENISED_BYTES", 100)
    file = jsonl(tmp_path / "a.jsonl", *[chat(f"question {i} 麻雀", f"answer {i}") for i in range(40)])
    alone = sft(file, cache_dir=tmp_path / "alone")
    monkeypatch.setattr(tc, "PROCESSES_FROM", 0)
    tokenizer = ByteTokenizer()
    together = sft(file, tokenizer, cache_dir=tmp_path / "together", num_workers=2)
    assert not tokenizer.texts, "this process encoded nothing"
    digests = [
        {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in next((tmp_path / d).glob("*-chat-*")).iterdir()}
        for d in ("alone", "together")
    ]
    assert digests[0] == digests[1] and len(together) == len(alone) == 40


class Dies(ByteTokenizer):
    @classmethod
    def load(cls, path):
        os._exit(1)


def test_when_the_processes_die_this_one_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tc, "TOKENISED_BYTES", 20)
    monkeypatch.setattr(tc, "PROCESSES_FROM", 0)
    file = jsonl(tmp_path / "a.jsonl", *[{"text": f"text {i}"} for i in range(30)])
    ds = pretrain(file, Dies(), num_workers=2, max_seq_len=1000)
    assert text(ds.tokens(0)) == "".join(f"Etext {i}" for i in range(30)) + "E"
    assert "a process died" in capfd.readouterr().err


def test_rows_that_a_dead_process_cannot_be_sent_are_not_lost(tmp_path, monkeypatch):
    """They died while this process wrote: it learns that when it sends the next rows, and these were left out."""

    class Pool(ProcessPoolExecutor):
        def submit(self, *args, **kwargs):
            raise BrokenProcessPool

    monkeypatch.setattr(tc, "TOKENISED_BYTES", 20)
    monkeypatch.setattr(tc, "PROCESSES_FROM", 0)
    monkeypatch.setattr(tc, "ProcessPoolExecutor", Pool)
    file = jsonl(tmp_path / "a.jsonl", *[{"text": f"text {i}"} for i in range(9)])
    ds = pretrain(file, num_workers=2, max_seq_len=1000)
    assert text(ds.tokens(0)) == "".join(f"Etext {i}" for i in range(9)) + "E"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_the_processes_end_with_the_one_that_was_killed(tmp_path):
    """They waited for rows for ever, and held its output open: whoever read that waited too."""
    jsonl(tmp_path / "a.jsonl", *[{"text": f"text {i}"} for i in range(30)])
    (tmp_path / "script.py").write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from dataset.tokens import token_cache as tc\n"
        "from tests.helpers.datasets import pretrain\n"
        "def killed(*_):\n"
        "    os.kill(os.getpid(), 9)\n"
        "if __name__ == '__main__':\n"
        "    tc.PROCESSES_FROM, tc.TOKENISED_BYTES = 0, 20\n"
        "    tc._Builder.write = killed  # the first rows have come back from a process\n"
        "    pretrain('a.jsonl', num_workers=2)\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == -9, done.stderr


def test_a_script_without_a_main_guard_is_told_so_and_served(tmp_path):
    """Its processes run the script again as they start: there they must not wait for the cache that is being built."""
    file = jsonl(tmp_path / "a.jsonl", *[{"text": f"text {i}"} for i in range(30)])
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from dataset.tokens import token_cache as tc\n"
        "from tests.helpers.datasets import pretrain\n"
        "tc.PROCESSES_FROM, tc.TOKENISED_BYTES = 0, 20\n"
        f"print(pretrain({str(file)!r}, num_workers=2).summary)\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "30 documents, 230 tokens\n", done.stderr
    assert "put its code under `if __name__ == '__main__':`" in done.stderr


# ---- which examples


def test_data_limit_takes_the_first_rows_of_all_files_together(tmp_path):
    a, b = (jsonl(tmp_path / f"{n}.jsonl", *[chat("q", n * i) for i in range(1, 4)]) for n in "ab")
    ds = sft([a, b], data_limit=4)
    assert [text(ds.tokens(i)[ds.trained(i)]) for i in range(len(ds))] == ["a]", "aa]", "aaa]", "b]"]
    assert len(sft([a, b], data_limit=2)) == 2


def test_a_number_after_a_path_repeats_its_rows_or_takes_a_part(tmp_path):
    a, b = (jsonl(tmp_path / f"{n}.jsonl", *[chat("q", f"{n}{i}") for i in range(10)]) for n in "ab")
    tokenizer = ByteTokenizer()
    ds = sft([f"{a}:2.3", f"{b}:0.5"], tokenizer)
    said = [text(ds.tokens(i)[ds.trained(i)])[:-1] for i in range(len(ds))]
    assert len(said) == 20 + 3 + 5 and len(set(said)) == 10 + 5
    assert all(said.count(s) in ((2, 3) if s[0] == "a" else (1,)) for s in said)
    assert said == [text(ds.tokens(i)[ds.trained(i)])[:-1] for i in range(len(ds))]
    assert ds.order.tolist() == sft([f"{a}:2.3", f"{b}:0.5"]).order.tolist(), "seeded"
    assert ds.order.tolist() != sft([f"{a}:2.3", f"{b}:0.5"], seed=1).order.tolist()
    prints = {sft(p, seed=s).fingerprint for p in (a, f"{a}:2", f"{a}:0.5") for s in (1, 2)}
    assert len(prints) == 4, "a seed changes the data only where it chooses some"
    answers = [t for t in tokenizer.texts if t.startswith("assistant")]
    assert answers == [f"assistant\n{n}{i}" for n in "ab" for i in range(10)], "each tokenised once"


def test_numbers_after_paths(tmp_path):
    assert weighted("a.jsonl:3") == (weighted("a.jsonl")[0], 3.0)
    assert weighted("C:\\data\\a.jsonl")[1] == 1.0
    (tmp_path / "a:3").write_text("")
    assert weighted(tmp_path / "a:3") == (tmp_path / "a:3", 1.0)
    for bad in ("a.jsonl:0", "a.jsonl:-1", "a.jsonl:nan", "a.jsonl:inf", "a.jsonl:1e12"):
        with pytest.raises(ValueError, match="the number after the colon must be above 0"):
            weighted(bad)


def test_a_split_is_seeded_and_keeps_repeats_on_one_side(tmp_path):
    ds = sft(f"{jsonl(tmp_path / 'a.jsonl', *[chat('q', f'{i}') for i in range(50)])}:2")
    train, val = ds.split(0.1, seed=3)
    assert (len(train), len(val)) == (90, 5), "validation asks each once"
    assert not set(train.order.tolist()) & set(val.order.tolist())
    assert sorted({*train.order.tolist(), *val.order.tolist()}) == list(range(50))
    assert val.order.tolist() == ds.split(0.1, seed=3)[1].order.tolist() != ds.split(0.1, seed=4)[1].order.tolist()
    assert len({ds.fingerprint, train.fingerprint, val.fingerprint, ds.split(0.1, seed=4)[0].fingerprint}) == 4
    assert text(val.tokens(0)) == text(ds.tokens(int(val.order[0])))
    for fraction in (0, 1, -0.5, 0.99999):
        with pytest.raises(ValueError, match="--val_fraction"):
            ds.split(fraction, seed=3)


def documents(*sides):
    """The documents of each side, as a set."""
    return [set("".join(text(ds.tokens(i))[1:] for i in range(len(ds))).split("E")) - {""} for ds in sides]


def test_pretraining_holds_out_documents_and_no_document_is_on_both_sides(tmp_path):
    """Rows were held out before: of a novel of many rows most were trained on, and one between them validated."""
    files = [jsonl(tmp_path / f"{n}.jsonl", *[{"text": f"{n}{i} " * 9} for i in range(10)]) for n in "ab"]
    ds = pretrain([files[0], f"{files[1]}:2"], max_seq_len=8)
    train, val = ds.split(0.25, seed=0)
    trained, validated = documents(train, val)
    assert len(validated) == 5 and trained | validated == documents(ds)[0] and not trained & validated
    assert val.summary.startswith("5 of these documents, ")
    tokens = sum(len(train.tokens(i)) - 1 for i in range(len(train)))
    kept_a, kept_b = (sum(len(d) + 1 for d in trained if d[0] == n) for n in "ab")
    assert tokens == kept_a + 2 * kept_b, "the second file twice, and every token is a target"
    assert all(train.source(i).startswith(str(tmp_path)) for i in range(len(train)))
    again, other = ds.split(0.25, seed=0)[1], ds.split(0.25, seed=1)[1]
    assert documents(again) == [validated] != documents(other)
    assert len({ds.fingerprint, train.fingerprint, val.fingerprint, other.fingerprint}) == 4
    with pytest.raises(ValueError, match="2 documents are too few to split"):
        pretrain(jsonl(tmp_path / "c.jsonl", {"text": "a"}, {"text": "b"})).split(0.9, 0)


def test_of_a_text_file_the_end_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 2, encoding="utf-8")
    train, val = pretrain(tmp_path / "a.txt", max_seq_len=100).split(0.25, seed=0)
    assert text(train.tokens(0)) == "E012345678901234E" and text(val.tokens(0)) == "E56789E"  # 5 of 21 ids
    assert val.source(0) == f"{tmp_path / 'a.txt'}:1"


def test_a_hint_about_any_row_is_harmless(tmp_path):
    ds = pretrain(jsonl(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "defg"}))
    for i in range(len(ds)):
        ds.will_read(i)
    assert text(ds.tokens(2)) == "gE"


def test_a_file_that_is_taken_once_is_not_shuffled(monkeypatch):
    """It was, for a part of none of its rows: 2.5 s and 460 MB for 20 million."""
    expected = repeated([3, 4], [1.0, 2.5], seed=1).tolist()
    monkeypatch.setattr(order, "shuffled", None)  # may not be called
    assert repeated([3, 4], [1.0, 2.0], seed=1).tolist() == expected[:11] == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6]
    assert repeated([3], [1.0], seed=1).dtype == np.int32


def test_factors_that_cannot_be_are_one_line():
    """A file a hundred million times ended in numpy's traceback about memory."""
    with pytest.raises(
        ValueError, match="--data_path: the numbers after the colons make 8,400,000,007 examples of 91; "
    ):
        repeated([84, 7], [1e8, 1.0], seed=1)
    with pytest.raises(ValueError, match="--data_path: 0.001 of 84, 0.02 of 7 examples leave none; the number after"):
        repeated([84, 7], [0.001, 0.02], seed=1)


# ---- a file of the wrong kind


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_file_of_the_wrong_kind_is_refused_at_its_head(tmp_path, monkeypatch, on_bad_row):
    """Every row of it was parsed before: ten minutes for 10 GB."""
    file = jsonl(tmp_path / "a.jsonl", *[{"text": "a"}] * 1000)
    read = []
    monkeypatch.setattr(Head, "raw", lambda self, i, raw=Head.raw: read.append(i) or raw(self, i))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no conversation"):
        sft(file, on_bad_row=on_bad_row)
    assert len(read) == 100 and os.listdir(tmp_path) == ["a.jsonl"]
    pretrain(file)  # now there is an index
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no conversation"):
        sft(file, on_bad_row=on_bad_row)


# ---- many files, large files


def test_large_files_are_tokenised_in_parts_that_outlive_a_kill(tmp_path, monkeypatch):
    rows = [{"text": f"text {i} 麻雀"} for i in range(40)]
    file = jsonl(tmp_path / "a.jsonl", *rows)
    whole = pretrain(file, max_seq_len=50, cache_dir=tmp_path / "whole")
    monkeypatch.setattr(tc, "PART_BYTES", 300)
    monkeypatch.setattr(tc, "TOKENISED_BYTES", 100)
    tokenizer = ByteTokenizer()
    encode_batch = tokenizer.encode_batch

    def killed(texts):
        if any(t.startswith("text 30") for t in texts):
            raise KeyboardInterrupt
        return encode_batch(texts)

    tokenizer.encode_batch = killed
    with pytest.raises(KeyboardInterrupt):
        pretrain(file, tokenizer, max_seq_len=50)
    complete = list((tmp_path / ".cache").glob("*-text-*"))
    assert len(complete) == 2 and all(path.is_dir() for path in complete)
    tokenizer.encode_batch = encode_batch
    tokenizer.texts.clear()
    ds = pretrain(file, tokenizer, max_seq_len=50)
    assert tokenizer.texts == [row["text"] for row in rows[27:]], "what was complete is not done again"
    assert [text(ds.tokens(i)) for i in range(len(ds))] == [text(whole.tokens(i)) for i in range(len(whole))]
    assert [ds.source(i) for i in range(len(ds))] == [whole.source(i) for i in range(len(whole))]
    assert ds.fingerprint == whole.fingerprint and ds.summary == whole.summary, "the same data"


def test_parts_of_conversations_are_repeated_as_one_file_is(tmp_path, monkeypatch):
    file = jsonl(tmp_path / "a.jsonl", *[chat("q", f"answer {i}") for i in range(40)])
    whole = sft(f"{file}:1.5", cache_dir=tmp_path / "whole")
    monkeypatch.setattr(tc, "PART_BYTES", 500)
    ds = sft(f"{file}:1.5")
    assert len(list((tmp_path / ".cache").glob("*-chat-*"))) > 3
    assert ds.order.tolist() == whole.order.tolist() and ds.fingerprint == whole.fingerprint
    assert [text(ds.tokens(i)) for i in range(len(ds))] == [text(whole.tokens(i)) for i in range(len(whole))]
    assert [ds.source(i) for i in range(len(ds))] == [whole.source(i) for i in range(len(whole))]


def test_parts_of_a_text_file_are_one_document(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("".join(f"line number {i}, 麻雀\n" for i in range(60)), encoding="utf-8")
    whole = pretrain(file, max_seq_len=64, cache_dir=tmp_path / "whole")
    monkeypatch.setattr(tc, "PART_BYTES", 300)
    monkeypatch.setattr(tc, "TOKENISED_BYTES", 100)
    monkeypatch.setattr(TextFile, "PART", 100)
    monkeypatch.setattr(plain_text, "BLOCK", 50)
    os.utime(file, (1, 1))  # so that where parts may begin is found anew
    ds = pretrain(file, max_seq_len=64)
    assert len(list((tmp_path / ".cache").glob("*-plain-*"))) == 4 and ds.summary == whole.summary
    assert [text(ds.tokens(i)) for i in range(len(ds))] == [text(whole.tokens(i)) for i in range(len(whole))]
    train, val = ds.split(0.1, 0)
    assert documents(train)[0].pop() + documents(val)[0].pop() == documents(whole)[0].pop()
    assert "line number 59" in documents(val)[0].pop()


def test_skipped_rows_of_parts_are_listed_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr(tc, "PART_BYTES", 300)
    rows = [{"text": f"text {i}"} for i in range(60)]
    file = jsonl(tmp_path / "a.jsonl", *rows[:55], '{"text": "b', *rows[55:])
    ds = pretrain(file, on_bad_row="skip")
    rejects = tmp_path / "a.jsonl.4-of-4.rejects.jsonl"
    assert f"1 bad rows skipped (see {rejects})" in ds.summary
    assert json.loads(rejects.read_text(encoding="utf-8"))["line"] == 56


def test_the_space_that_tokens_need_is_said_and_must_be_there(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tc, "ESTIMATED_FROM", 0)
    file = jsonl(tmp_path / "a.jsonl", *[{"text": "a" * 90} for _ in range(100)])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=20_900))
    with pytest.raises(ValueError, match=r"a\.jsonl: the tokens of 0\.0 GB need about .*--cache_dir"):
        pretrain(file)  # 100 entries of 91 ids of 2 bytes, and 16 bytes each: 19,800, and 5 % to be safe
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=20_000_000_000))
    made = tmp_path / ".cache"
    assert pretrain(file) and "(20.0 GB free; --cache_dir names another folder)" in capfd.readouterr().err
    size = sum(f.stat().st_size for f in next(made.glob("*-text-*")).iterdir() if f.name != "facts.json")
    assert size == 100 * 91 * 2 + 8 * (100 + 101)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux")
def test_more_files_train_than_the_system_lets_a_process_have_open_at_first(tmp_path):
    """About 340 files used up 1,024 file descriptors. They are set low here, in another process."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, resource; sys.path.insert(0, {str(ROOT)!r})\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        "from common.console import run\n"
        "from tests.helpers.datasets import pretrain, sft\n"
        "def main():\n"
        "    for kind, load in dict(text=pretrain, chat=sft).items():\n"
        "        ds = load([f'{kind}-{i}.jsonl' for i in range(40)])\n"
        "        print(len({bytes(ds.tokens(i)) for i in range(len(ds))}))\n"
        "run(main)\n",
        encoding="utf-8",
    )
    for i in range(40):
        jsonl(tmp_path / f"text-{i}.jsonl", {"text": f"{i:02}"})
        jsonl(tmp_path / f"chat-{i}.jsonl", chat("q", f"{i}"))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.stdout.split()[1:] == ["40"], done.stderr


def test_a_stream_has_the_dtype_of_its_tokens():
    """<|endoftext|> is between the documents; in a wider dtype it would double the memory of each row."""
    tokens = SimpleNamespace(tokens=np.array([5, 6], np.uint16))
    read = Stream([tokens], [piece(0, 0, 2)], end=0).read(0, 3)
    assert (read.tolist(), read.dtype) == ([5, 6, 0], np.uint16)


def test_equal_files_are_refused(tmp_path):
    """A file named twice, by a glob and by its name, was on both sides of a split: 12 of 16 validation rows were also
    trained on. And rows that are meant to come twice have `file:2`."""
    a = jsonl(tmp_path / "a.jsonl", *(chat(f"ask {i}", f"say {i}") for i in range(20)))
    b = tmp_path / "b.jsonl"
    shutil.copy(a, b)
    with pytest.raises(ValueError, match=r"a\.jsonl is named twice; .*a\.jsonl:2 repeats it"):
        sft([a, f"{a}:2"])
    with pytest.raises(ValueError, match=r"a\.jsonl and .*b\.jsonl have the same content; .*a\.jsonl:2 repeats it"):
        sft([a, b])
    train, val = sft(f"{a}:2").split(0.2, 42)
    assert not {train.source(i) for i in range(len(train))} & {val.source(i) for i in range(len(val))}
