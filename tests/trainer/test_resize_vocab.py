"""--resize_vocab: weights go on with a tokenizer that has more tokens, on request and only then."""

import json

import pytest

from common.files import ROOT
from model.checkpoint import open_weights
from tests.helpers.rows import chat, jsonl, write_pretrain
from tests.helpers.runs import run_stage
from tokenizer.text import Tokenizer

NEW = ["<|north|>", "<|south|>"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Weights, and chats whose text has the new tokens' names, which stay text."""
    folder = tmp_path_factory.mktemp("resize")
    write_pretrain(folder / "text.jsonl")
    run_stage("pretrain", f"--data_path={folder / 'text.jsonl'}", f"--save_dir={folder}", "--max_steps=2")
    jsonl(folder / "sft.jsonl", *(chat(f"go {n}", "north <|north|>") for n in range(8)))
    larger(folder / "larger", NEW)
    return folder


def larger(folder, names, change=None) -> Tokenizer:
    """The shipped tokenizer with more tokens at its end."""
    folder.mkdir()
    spec = json.loads((ROOT / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"] += [spec["added_tokens"][0] | dict(id=6400 + n, content=name) for n, name in enumerate(names)]
    if change:
        spec["added_tokens"][15]["content"] = change
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return Tokenizer.load(folder)


def tune(world, out, *flags):
    data = f"--data_path={world / 'sft.jsonl'}"
    run_stage(
        "full_sft", data, f"--from_weight={world / 'pretrain_32.pth'}", "--max_steps=2", f"--save_dir={out}", *flags
    )


def test_the_trained_model_has_the_larger_tokenizer(world, tmp_path, capsys):
    tune(world, tmp_path, f"--tokenizer_path={world / 'larger'}", "--resize_vocab")
    assert "with 2 more tokens, whose rows begin at the mean of the others (--resize_vocab)" in capsys.readouterr().out
    checkpoint, tokenizer = open_weights(str(tmp_path / "full_sft_32.pth"))
    assert checkpoint.config.vocab_size == tokenizer.vocab_size == 6402
    assert tokenizer.control["<|south|>"] == 6401 and tokenizer.hash == Tokenizer.load(world / "larger").hash
    # and once more, without new tokens: there is nothing to resize
    again = ("full_sft", f"--from_weight={tmp_path / 'full_sft_32.pth'}", f"--tokenizer_path={world / 'larger'}")
    run_stage(
        *again, f"--data_path={world / 'sft.jsonl'}", "--max_steps=1", f"--save_dir={tmp_path / 'b'}", "--resize_vocab"
    )
    assert open_weights(str(tmp_path / "b" / "full_sft_32.pth"))[0].config.vocab_size == 6402


def test_without_the_flag_it_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="cannot find the tokenizer .* it was trained with"):
        tune(world, tmp_path, f"--tokenizer_path={world / 'larger'}")


def test_tokens_that_the_weights_know_must_stay(world, tmp_path):
    larger(tmp_path / "other", NEW, change="<|spare_9|>")
    with pytest.raises(
        ValueError, match="--resize_vocab: .*other does not continue .*only add tokens, after the last id"
    ):
        tune(world, tmp_path, f"--tokenizer_path={tmp_path / 'other'}", "--resize_vocab")


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--resize_vocab"], "for which tokenizer"),
        (["--resize_vocab", "--use_lora", "--tokenizer_path=x"], "learn nothing"),
    ],
)
def test_what_cannot_work_is_refused_at_once(world, tmp_path, capsys, flags, named):
    with pytest.raises(SystemExit):
        tune(world, tmp_path, *flags)
    assert named in capsys.readouterr().err
