"""Reasoning: which tokens are tags in any tokenizer, a loss worked by hand, thoughts that never end; the stage."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from common.files import ROOT
from common.options import parse
from dataset.batches.loader import Loader
from dataset.tokens.reason import TAGS, ReasonDataset, find_tags
from model.checkpoint import save_weights
from tests.helpers.compare import assert_same_gradients, same, state_of
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.rows import WORDS, jsonl, says, user, write_reason
from tests.helpers.runs import FLAGS, first_gradients, run_stage, torchrun, train_twice
from tests.helpers.tokenizers import without_tags
from tokenizer.chat import encode_chat
from trainer.inputs import open_data
from trainer.loop.backend import Backend
from trainer.loop.engine import Engine, Job
from trainer.losses.next_token import Weighted
from trainer.train_distill_reason import ReasonConfig


def asks(question, answer, **more):
    return {"conversations": [user(question), says(answer, **more)]}


# ---- which tokens are tags


def tagged(tokenizer, *messages) -> list[str]:
    """What is found, neighbours joined."""
    ids, trained = (np.array(part) for part in encode_chat(tokenizer, list(messages)))
    tags, found = find_tags(tokenizer, ids, trained), []
    for i in np.flatnonzero(tags):
        piece = tokenizer.decode([ids[i]])
        found = [*found[:-1], found[-1] + piece] if found and tags[i - 1] else [*found, piece]
    return found


@pytest.mark.parametrize("spelled", [(), TAGS, ("<answer>", "</answer>")])
def test_tags_are_found_and_words_like_them_are_not(spelled, tmp_path):
    """The trainer people come from looked for the ids of `<`, `th`, `ink`, `user`, ... anywhere, and so trained on
    every role header ("user" is `us` + `er`, and `answer` has an `er`) ten times over."""
    tokenizer = without_tags(tmp_path / "tokenizer", *spelled) if spelled else TOKENIZER
    user = {"role": "user", "content": "<think> I think an answer to <answer> is </think> the user's"}
    says = lambda text, **more: {"role": "assistant", "content": text, **more}
    whole = says("<think>\nI think <answer> & er\n</think>\n<answer>\n<think> of 4</answer>")
    # a token may hold the end of a tag and what follows: it counts as the tag
    bare = [tag.strip() for tag in tagged(tokenizer, user, whole, user, whole)]
    assert bare == [*TAGS, *TAGS]
    assert [tag.strip() for tag in tagged(tokenizer, user, says("4", reasoning_content="2+2"))] == list(TAGS[:2])
    assert tagged(tokenizer, user, says("the answer: <answer>4</answer> </think>")) == []
    assert tagged(tokenizer, user, says("I <think> so </think>")) == []


# ---- the loss


def test_weights_by_hand(tmp_path):
    """One row: `<think>` and three more tags weigh 10, the other trained tokens 1, the prompt nothing. The loss is
    sum(weight * nll) / sum(weight), not / the number of tokens."""
    path = jsonl(tmp_path / "r.jsonl", asks("<think> user", "<think>\nsix\n</think>\n<answer>\n42\n</answer>"))
    dataset = ReasonDataset(path, TOKENIZER, max_seq_len=32, tag_weight=10)
    ids, trained, weight = dataset.tokens(0), dataset.trained(0), dataset.extras(0)["weight"]
    tags = [TOKENIZER.control[tag] for tag in TAGS]
    assert weight.tolist() == [0.0 if not t else 10.0 if i in tags else 1.0 for i, t in zip(ids, trained)]
    assert sorted(set(weight)) == [0, 1, 10] and (weight == 10).sum() == 4
    (batch,) = Loader(dataset, packing=True, batch_size=1, accumulation_steps=1, max_seq_len=32).batches(0)
    assert Weighted().count(batch) == 40 + int(trained[1:].sum()) - 4 == weight[1:].sum()
    assert ((batch.extras["weight"] > 0) == (batch.targets >= 0)).all(), "never on masked positions"

    model = small_model()
    loss, _ = Weighted()(model, batch)
    logp = model(torch.tensor([ids[:-1].tolist()])).logits.log_softmax(-1)[0]
    terms = [(weight[t], -logp[t - 1, int(ids[t])]) for t in range(1, len(ids)) if trained[t]]
    expected = sum(w * nll for w, nll in terms) / sum(w for w, _ in terms)
    torch.testing.assert_close(loss / Weighted().count(batch), expected.float(), rtol=1e-5, atol=1e-5)


def test_equal_weights_are_plain_fine_tuning(tmp_path):
    from dataset.tokens.examples import SFTDataset
    from trainer.losses.next_token import NextToken

    path, model, found = write_reason(tmp_path / "r.jsonl"), small_model(num_experts=4), []
    for dataset, objective in (
        (ReasonDataset(path, TOKENIZER, max_seq_len=64, tag_weight=1), Weighted()),
        (SFTDataset(path, TOKENIZER, max_seq_len=64), NextToken()),
    ):
        batch = Loader(dataset, packing=True, batch_size=8, accumulation_steps=1, max_seq_len=64).batches(0)[0]
        found.append((objective.count(batch), objective(model, batch)[0].item()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def write_weights(folder, experts: int = 4):
    tokenizer = dict(path="tokenizer", hash=TOKENIZER.hash)
    name = f"full_sft_32{'_moe' if experts else ''}.pth"
    return save_weights(folder / name, small_model(num_experts=experts), tokenizer=tokenizer, lineage=[])


def engine(folder, batch_size, accumulation_steps):
    config = parse(
        ReasonConfig,
        [
            *FLAGS,
            "--max_seq_len=64",
            f"--data_path={folder / 'r.jsonl'}",
            "--grad_clip=0",
            f"--save_dir={folder / 'out'}",
            f"--batch_size={batch_size}",
            f"--accumulation_steps={accumulation_steps}",
        ],
    )
    data = open_data(ReasonDataset, config, "reason", TOKENIZER, tag_weight=10)
    model = small_model(num_experts=4)
    job = Job("reason", config, model, Weighted(), TOKENIZER, data, packing=True)
    return Engine(job, Backend(torch.device("cpu")))


def test_accumulation_gives_the_same_gradient(tmp_path):
    """16 examples as 16, 4 x 4, 8 x 2 and 1 x 16: weights are counted over the whole step, experts' balance as well."""
    write_reason(tmp_path / "r.jsonl")
    expected = first_gradients(engine(tmp_path, 16, 1))
    for batch_size, accumulation_steps in ((4, 4), (8, 2), (1, 16)):
        found = first_gradients(engine(tmp_path, batch_size, accumulation_steps))
        assert_same_gradients(found, expected, 1e-5)


# ---- thoughts without an end


@pytest.mark.parametrize(
    "answer, tag",
    [
        ("<think>\nlet me see", "<think>"),
        (" <think>a <answer>4</answer>", "<think>"),
        ("<think>a</think>\n<answer>4", "<answer>"),
    ],
)
def test_a_thought_that_never_ends_is_refused_with_its_line(answer, tag, tmp_path):
    path = jsonl(tmp_path / "r.jsonl", asks("1+1?", "2"), asks("2+2?", answer), asks("3+3?", "6"))
    with pytest.raises(ValueError, match=rf"r\.jsonl:2: messages\[1\] \(assistant\): begins with {tag}, which never"):
        ReasonDataset(path, TOKENIZER, max_seq_len=32)


def test_what_only_looks_like_an_open_thought_is_none(tmp_path):
    rows = [
        asks("?", "I <think> so"),
        asks("<think>", "4"),
        asks("?", "<think> is a tag", reasoning_content="hm"),
        asks("?", "<think>a</think> <answer>4</answer> <answer>"),
    ]
    assert len(ReasonDataset(jsonl(tmp_path / "r.jsonl", *rows), TOKENIZER, max_seq_len=64)) == 4


@pytest.mark.parametrize("on_long", ["truncate", "drop"])
def test_no_length_limit_leaves_a_thought_without_its_end(on_long, tmp_path):
    """At every length from 2 to beyond the longest: whatever is trained on has as many ends as beginnings, in pairs,
    and examples kept + left out are all there are."""
    write_reason(tmp_path / "r.jsonl", 12)
    first = asks("six times seven", "<think>\n6*7=42\n</think>\n<answer>\n42\n</answer>")
    second = asks("hello", "<think>\n你好\n</think>\n<answer>\na sparrow\n</answer>")
    two = {"conversations": first["conversations"] + second["conversations"]}
    path = jsonl(tmp_path / "r.jsonl", two, first, second, asks("hello " * 30, "4", reasoning_content="2+2"))
    opens, closes = (TOKENIZER.control[tag] for tag in TAGS[:2])
    seen = set()
    for length in range(2, 90):
        try:
            dataset = ReasonDataset(path, TOKENIZER, max_seq_len=length, on_long=on_long)
        except ValueError as error:
            assert "no example fits" in str(error)
            continue
        left_out = 4 - len(dataset)
        assert f"{left_out} left out" in dataset.summary or not left_out
        for i in range(len(dataset)):
            ids = dataset.tokens(i)[dataset.trained(i)]
            assert ids[-1] == TOKENIZER.im_end
            assert [t for t in ids.tolist() if t in (opens, closes)] == [opens, closes] * int((ids == opens).sum())
            assert (ids == opens).any()
            # an earlier answer that lost its beginning is context: its tags weigh nothing either
            assert ((dataset.extras(i)["weight"] > 0) == dataset.trained(i)).all()
        seen.add((len(dataset), sum(int((dataset.tokens(i) == opens).sum()) for i in range(len(dataset)))))
    assert len(seen) > 2, "the lengths did cut"


# ---- the stage


def test_a_stopped_run_continues_bit_for_bit(tmp_path, stop_at):  # noqa: F811
    data, weights = write_reason(tmp_path / "r.jsonl"), write_weights(tmp_path)
    flags = [
        f"--data_path={data}",
        f"--from_weight={weights}",
        "--max_steps=8",
        "--batch_size=2",
        "--accumulation_steps=2",
        "--val_fraction=0.1",
        "--save_interval=3",
        "--max_seq_len=64",
    ]
    whole, parts = train_twice("distill_reason", tmp_path, stop_at, [2, 5, 6], *flags)
    assert same(whole, parts)


def test_two_ranks_train_the_same_model_as_one(tmp_path):
    flags = [
        f"--data_path={write_reason(tmp_path / 'r.jsonl')}",
        f"--from_weight={write_weights(tmp_path)}",
        "--max_steps=3",
        "--val_fraction=0.2",
        "--max_seq_len=64",
        "--learning_rate=1e-3",
    ]
    run_stage("distill_reason", *flags, f"--save_dir={tmp_path / 'one'}", "--batch_size=8")
    torchrun(
        "train_distill_reason.py",
        *FLAGS,
        *flags,
        f"--save_dir={tmp_path / 'two'}",
        "--batch_size=4",
        cwd=ROOT / "trainer",
    )
    one, two = (state_of(tmp_path / folder / "reason_32_moe.pth") for folder in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)


def test_tags_are_learned_sooner_with_weight(tmp_path, capsys):
    """After a few steps at the same learning rate, the model that saw tags ten times over says `<think>` first more
    surely. Ordinary chats lie in a second file, half of which is taken."""
    write_weights(tmp_path, 0)
    reason = write_reason(tmp_path / "r.jsonl")
    chats = jsonl(tmp_path / "chats.jsonl", *(asks(f"{word}?", word) for word in WORDS))
    prompt = encode_chat(TOKENIZER, [{"role": "user", "content": "hello"}], add_generation_prompt=True).ids
    surely = {}
    for weight in (1, 10):
        run_stage(
            "distill_reason",
            "--data_path",
            reason,
            f"{chats}:0.5",
            f"--save_dir={tmp_path}",
            "--max_steps=6",
            "--max_seq_len=64",
            "--learning_rate=1e-3",
            f"--tag_weight={weight}",
            "--val_fraction=0.1",
        )
        model = small_model()
        model.load_state_dict(state_of(tmp_path / "reason_32.pth"))
        logp = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        surely[weight] = logp[TOKENIZER.control["<think>"]].item()
    assert surely[10] > surely[1] + math.log(1.1)
    said = capsys.readouterr().out
    assert "thoughts: in " in said and "val_loss" in said and "val_bpb" not in said


@pytest.mark.parametrize(
    "rows, message",
    [
        ([asks("?", "4")], r":1: none of 1 examples has a <think> block or reasoning_content; .*train_full_sft.py"),
        ([asks("?", "<think>"), asks("?", "4")], r":1: messages\[1\] .* <think>, which never ends"),
    ],
)
def test_wrong_data_ends_with_status_2_and_one_line(rows, message, tmp_path):
    import re

    write_weights(tmp_path)
    path = jsonl(tmp_path / "r.jsonl", *rows)
    command = [
        sys.executable,
        ROOT / "trainer/train_distill_reason.py",
        *FLAGS,
        f"--data_path={path}",
        f"--save_dir={tmp_path}",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and re.search(rf"error: {re.escape(str(path))}{message}", done.stderr), done.stderr
    assert done.stderr.count("error:") == 1
