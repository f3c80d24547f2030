"""Training a tokenizer: which rows count how often, what is measured, and that there is only one chat format."""

import hashlib
import json
import signal

import pytest

from common.console import width_of
from tokenizer.chat import TEMPLATE, encode_chat
from tokenizer.text import SHIPPED, Tokenizer, _from_byte_level
from trainer import train_tokenizer as script
from trainer.train_tokenizer import Corpus, TokenizerConfig, contents, language_of, report, save, train_bpe

TEXTS = ["今天天气很好，我们去公园。", "The weather is nice today, we go to the park.", "，我们，我们，我们"] * 30


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def is_held_out(row, n: int) -> bool:
    """The rule as docs/tokenizer.md states it."""
    line = json.dumps(row, ensure_ascii=False).encode()
    return int(hashlib.sha256(line).hexdigest()[:8], 16) % n == 0


# ---- the tokenizer itself


def test_ctrl_c_ends_the_training_at_once():
    """The trainer is Rust and comes back to Python only when it has finished: Ctrl-C did nothing for 21 seconds."""
    before, during = signal.getsignal(signal.SIGINT), []

    def texts():
        during.append(signal.getsignal(signal.SIGINT))
        yield from TEXTS

    train_bpe(texts(), 400)
    assert during == [signal.SIG_DFL] and signal.getsignal(signal.SIGINT) is before


def test_what_is_saved_is_the_shipped_format(tmp_path):
    """A tokenizer trained again must not change how chats are written; MiniMind's script has a template of its own."""
    save(train_bpe(iter(TEXTS), 400), tmp_path)
    mine, shipped = Tokenizer.load(tmp_path), Tokenizer.load()
    assert mine.control == shipped.control and mine.chat_template == TEMPLATE
    assert (tmp_path / "tokenizer_config.json").read_bytes() == (SHIPPED / "tokenizer_config.json").read_bytes()

    def spec(directory):
        return json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))

    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"):
        assert spec(tmp_path)[key] == spec(SHIPPED)[key], key
    assert spec(SHIPPED)["normalizer"] is None and spec(SHIPPED)["post_processor"] is None
    special = [token["content"] for token in spec(tmp_path)["added_tokens"] if token["special"]]
    assert special == [*script.SPECIAL, *script.SPARE], "markup stays visible to vLLM's and transformers' decode"
    messages = [{"role": "user", "content": "天气"}, {"role": "assistant", "content": "nice"}]
    assert mine.decode(encode_chat(mine, messages).ids) == shipped.decode(encode_chat(shipped, messages).ids)


def test_training_is_deterministic():
    assert train_bpe(iter(TEXTS), 350).to_str() == train_bpe(iter(TEXTS), 350).to_str()


def test_what_is_learned():
    """Words, and the mark before a clause of Chinese; never a token that holds more than one run of 16."""
    tokenizer = train_bpe(iter([*TEXTS, "春" * 200] * 3), 600)
    words = {_from_byte_level(token).decode("utf-8", "replace") for token in tokenizer.get_vocab()}
    assert {" weather", "，我们"} <= words
    assert max(word.count("春") for word in words) == 16


# ---- which rows, how often


def test_every_text_in_a_row_counts():
    row = {
        "system": "a",
        "conversations": [
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c", "tool_calls": [{"name": "d", "arguments": {"e": ["f", 1, None]}}]},
            {"from": "gpt", "value": "g"},
        ],
        "type": "x",
    }
    assert list(contents(row)) == [
        ("text", "a"),
        ("role", "user"),
        ("text", "b"),
        ("role", "assistant"),
        ("answers", "c"),
        ("answers", "d"),
        ("answers", "f"),
        ("answers", "g"),
    ]


@pytest.mark.parametrize("text, language", [("你好", "zh"), ("", "en"), ("用 torch", "en"), ("ab 你", "zh")])
def test_language_is_the_script(text, language):
    assert language_of([("text", text), ("role", "assistant")]) == language


def test_weights(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"text": f"a{n}"} for n in range(400)])
    b = write(tmp_path / "b.jsonl", [{"text": f"b{n}"} for n in range(400)])
    c = write(tmp_path / "c.jsonl", [{"text": f"好{n}"} for n in range(400)])
    texts = list(Corpus(TokenizerConfig((f"{a}:3", f"{b}:0.25", c), chinese_weight=1.5)).training_texts())
    assert [texts.count(f"a{n}") for n in range(400)] == [3] * 400
    assert {texts.count(f"b{n}") for n in range(400)} == {0, 1}
    assert {texts.count(f"好{n}") for n in range(400)} == {1, 2}
    of = [sum(text[0] == first for text in texts) for first in "b好"]
    assert of == pytest.approx([100, 600], rel=0.15), "fractions by the rows' hashes"


def test_a_sample_of_large_files(tmp_path):
    rows = [{"text": f"{n:090}"} for n in range(4000)]  # 0.4 MB
    corpus = Corpus(TokenizerConfig((write(tmp_path / "a.jsonl", rows) + ":3",), sample_mb=0.1))
    assert corpus.share == pytest.approx(0.1 / 0.4, rel=0.1), "a row that counts three times takes memory once"
    assert len(list(corpus.training_texts())) == pytest.approx(3 * 1000, rel=0.1)


def test_what_is_held_out_is_never_trained_on(tmp_path):
    """Decided by the row alone: more rows or another order change nothing, and each copy of a row goes the same way."""
    rows = [{"text": f"row {n}"} for n in range(300)]
    corpus = Corpus(TokenizerConfig((write(tmp_path / "a.jsonl", rows + rows[::-1]) + ":2",), holdout=10))
    wanted = {row["text"] for row in rows if is_held_out(row, 10)}
    assert 10 < len(wanted) < 60
    assert set(corpus.training_texts()) == {row["text"] for row in rows} - wanted
    assert {text for _, text in corpus.measured_texts()} == wanted


def test_text_files_and_json_arrays(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "b.json").write_text('[{"text": "three"}, {"text": "four"}]', encoding="utf-8")
    (tmp_path / "C.TXT").write_text("five\n", encoding="utf-8")  # was read as JSON
    corpus = Corpus(TokenizerConfig(tuple(str(tmp_path / name) for name in ("a.txt", "b.json", "C.TXT"))))
    assert list(corpus.training_texts()) == ["one\ntwo\n", "three", "four", "five\n"]


# ---- figures


def test_report_counts_by_hand(tmp_path):
    """With 272 entries there are no merges: a token is a byte, a Chinese character three."""
    save(train_bpe(iter([]), script.SMALLEST), tmp_path / "bytes")
    messages = [{"role": "user", "content": "天"}, {"role": "assistant", "content": "天气"}]
    rows = [row for n in range(200) for row in ({"id": n, "messages": messages}, {"id": n, "text": "abcd"})]
    corpus = Corpus(TokenizerConfig((write(tmp_path / "a.jsonl", rows),), holdout=10))
    zh, en = (sum(is_held_out(row, 10) for row in rows if key in row) for key in ("messages", "text"))
    name = f"{tmp_path.name}/a.jsonl"
    table = [line.rsplit(maxsplit=3) for line in report(corpus, tmp_path / "bytes").splitlines()[1:]]
    assert table == [
        [f"{name} answers zh"[:46], "0.333", "1.000", f"{zh * 6:,}"],
        [f"{name} text en"[:46], "1.000", "1.000", f"{en * 4:,}"],
        [f"{name} text zh"[:46], "0.333", "1.000", f"{zh * 3:,}"],
    ]


def test_columns_stand_below_each_other(tmp_path):
    """A Chinese name takes two places for each character in a terminal."""
    save(train_bpe(iter([]), script.SMALLEST), tmp_path / "bytes")
    rows = [{"id": n, "text": "abcd"} for n in range(200)]
    files = [write(tmp_path / name, rows) for name in ("a.jsonl", "很长的名字.jsonl")]
    lines = report(Corpus(TokenizerConfig(tuple(files), holdout=10)), tmp_path / "bytes").splitlines()
    assert len({width_of(line) for line in lines}) == 1, lines


def test_the_shipped_tokenizer_is_as_good_as_documented(shared):
    """Characters per token on answers it was not trained on."""
    table = report(Corpus(TokenizerConfig((str(shared / "data" / "sft.jsonl"),), holdout=10)), SHIPPED)
    figures = {line.split()[2]: float(line.split()[3]) for line in table.splitlines() if " answers " in line}
    assert figures == pytest.approx({"en": 3.508, "zh": 1.356}, abs=0.001)


# ---- as a script


def run(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr("sys.argv", ["train_tokenizer.py", *flags])
    script.main()


def test_the_script(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": text + str(n)} for n, text in enumerate(TEXTS)])
    run(monkeypatch, "--data_path", f"{path}:2", "--vocab-size", "300", "--save_dir", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "trained on" in printed and "a.jsonl text zh" in printed and "300 entries" in printed
    assert "warning" not in printed
    assert Tokenizer.load(tmp_path / "out").vocab_size == 300
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_text_too_small_for_the_vocabulary(tmp_path, monkeypatch, capsys):
    """A tiny file with --vocab_size 6400 saved 273 entries without a word."""
    path = write(tmp_path / "a.jsonl", [{"text": "abc"}])
    run(monkeypatch, "--data_path", path, "--vocab_size", "6400", "--save_dir", str(tmp_path / "out"))
    entries = Tokenizer.load(tmp_path / "out").vocab_size
    assert entries < 300
    assert f"--vocab_size 6,400 asks for more entries than this text gives: {entries}." in capsys.readouterr().out


def test_the_default_folder_is_not_the_shipped_one(root):
    assert TokenizerConfig().save_dir == str(root / "out" / "tokenizer")


@pytest.mark.parametrize(
    "content, flags, message",
    [
        ('{"text": "a"}\n{broken\n', [], r"a\.jsonl:2: broken JSON"),
        ('{"text": "a"}\n', ["--holdout", "1"], r"no text to train on: .* --holdout 1"),
        ('{"text": 5}\n{"text": ""}\n', [], "no text to train on: the rows have none"),
        (None, [], "no such file"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, content, flags, message):
    if content:
        (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises((ValueError, OSError), match=message):
        run(monkeypatch, "--data_path", str(tmp_path / "a.jsonl"), "--save_dir", str(tmp_path / "out"), *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["256", "1000000000000"])  # no room for the bytes; more than any memory
def test_a_vocabulary_of_an_impossible_size(size, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--vocab_size", size)
    assert f"--vocab_size {size}: must be" in capsys.readouterr().err
