"""Likelihoods of many packed rows are those of each row alone, and perplexity is transformers' on the same weights."""

import math

import numpy as np
import pytest
import torch

from common.console import UserError
from dataset.batches.loader import Loader
from dataset.tokens.examples import SFTDataset
from evaluation import likelihood
from evaluation.likelihood import log_likelihoods, totals, windows
from evaluation.metrics import METRICS
from inference.answers import prompt_ids
from model.checkpoint import Checkpoint
from model.export import save_hf
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.rows import write_sft
from tests.helpers.tokenizers import BEGINS, ENDS, glm_like, llama_like
from tokenizer.chat import Encoded, encode_chat


def chat(*turns):
    roles = ("user", "assistant")
    return encode_chat(TOKENIZER, [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)])


ROWS = [
    *(chat("hi " * n, "你好 there " * (n * 7 % 5 + 1)) for n in range(1, 12)),
    chat("one", "two", "three", "four " * 90),
    *windows(TOKENIZER, "once upon a time " * 300),
    Encoded([1, 2, 3], [True, False, False]),  # nothing to score: the first id is never predicted
]


@pytest.fixture(scope="module")
def model():
    return small_model(std=0.2, num_attention_heads=4, num_key_value_heads=2).eval()


def alone(model, row):
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        logp = model(ids[:, :-1]).logits.float().log_softmax(-1)[0].gather(1, ids[0, 1:, None])[:, 0]
    return logp[torch.tensor(row.trained[1:])].numpy()


@pytest.mark.parametrize("at_once", [512, 3])
def test_a_row_among_others_has_the_likelihood_that_it_has_alone(model, monkeypatch, at_once):
    monkeypatch.setattr(likelihood, "AT_ONCE", at_once)
    monkeypatch.setattr("model.transformer.LOGITS_AT_ONCE", 1)  # the head in chunks, which are put together
    for row, found in zip(ROWS, log_likelihoods(model, ROWS), strict=True):
        np.testing.assert_allclose(found, alone(model, row), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [64, 16])
def test_a_prompt_that_rows_share_is_computed_once(model, monkeypatch, window):
    """Six answers to one question, two rows with a prompt of their own, and one too short to share: each as alone. In
    the batches the question stands once for every bundle that fits into a row, also if it is longer than the window."""
    monkeypatch.setattr(likelihood, "WINDOW", window)
    question = "what does the sparrow say when it rains and nobody listens?"
    rows = [chat(question, "tweet " * n) for n in (1, 2, 40, 3, 4, 5)]
    rows += [
        chat("hello, who are you and what can you do?", "me"),
        chat("a", "b", "c", "d"),
        Encoded([5, 6, 7], [True] * 3),
    ]
    computed = []
    inner = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, **more: (computed.append(tokens), inner(tokens, **more))[1])
    found = log_likelihoods(model, rows)
    monkeypatch.undo()
    for row, own in zip(rows, found, strict=True):
        np.testing.assert_allclose(own, alone(model, row), rtol=1e-4, atol=1e-4)
    text = TOKENIZER.decode([int(id) for batch in computed for id in batch.flatten()])
    assert 1 < text.count("nobody listens") < 6


def test_a_mixture_of_experts_too():
    model = small_model(std=0.2, num_experts=4).eval()
    for row, found in zip(ROWS[:5], log_likelihoods(model, ROWS[:5])):
        np.testing.assert_allclose(found, alone(model, row), rtol=1e-4, atol=1e-4)


def test_rows_longer_than_the_model_are_refused():
    with pytest.raises(UserError, match="a row of 66 tokens exceeds the model's 64 positions"):
        log_likelihoods(small_model(max_position_embeddings=64), [Encoded(list(range(66)), [True] * 66)])


def test_a_row_may_fill_the_model():
    """65 ids are 64 targets: the last one needs no position."""
    model = small_model(max_position_embeddings=64).eval()
    (found,) = log_likelihoods(model, [Encoded(list(range(65)), [True] * 65)])
    assert len(found) == 64


def test_each_token_of_a_document_is_a_target_once():
    """E t1 .. t9 E in windows of 4 targets; each window opens with the last target of the one before."""
    ids = TOKENIZER.encode("one two three four five")
    E = TOKENIZER.end_of_text
    parts = windows(TOKENIZER, "one two three four five", length=4)
    assert [target for part in parts for target in part.ids[1:]] == [*ids, E]
    assert parts[0].ids[0] == E and parts[1].ids[0] == parts[0].ids[-1]
    assert all(len(part.ids) <= 5 for part in parts)


def test_a_document_for_llama_stands_between_its_bos_and_eos(tmp_path):
    """It began with </s>: a model of texts like <s> the cat </s> had a perplexity of 2.43 instead of 1.11."""
    llama = llama_like(tmp_path, "the", "cat")
    (row,) = windows(llama, "the cat")
    assert row.ids == [BEGINS, *llama.encode("the cat"), ENDS]


def test_a_document_for_glm_begins_with_two_tokens_that_are_no_targets(tmp_path):
    glm = glm_like(tmp_path)
    first, second = windows(glm, "one two three", length=3)
    two, text = glm.start_of_text, glm.encode("one two three")
    assert len(two) == 2 and prompt_ids(glm, "one two three") == [*two, *text]
    assert [*first.ids, *second.ids[1:]] == [*two, *text, glm.end_of_text] and second.ids[0] == first.ids[-1]
    assert [*first.trained, *second.trained[1:]] == [False, False] + [True] * (len(text) + 1)


def test_perplexity_and_bits_per_byte_by_hand():
    """Two tokens with probabilities 1/2 and 1/8, of a text of 4 bytes: 4 bits. Perplexity 4, 1 bit per byte."""
    a, b = TOKENIZER.encode("ab"), TOKENIZER.encode("er")
    assert len(a) == len(b) == 1
    row = Encoded([TOKENIZER.im_start, *a, *b], [False, True, True])
    sums = totals(TOKENIZER, [row], [np.log([1 / 2, 1 / 8])])
    np.testing.assert_allclose(sums, [[math.log(16), 2, 4]])
    assert METRICS["ppl"].value(sums.sum(0)) == pytest.approx(4)
    assert METRICS["bpb"].value(sums.sum(0)) == pytest.approx(1)
    end = Encoded([*a, TOKENIZER.im_end], [False, True])  # a control token has a loss, and is no text
    assert totals(TOKENIZER, [end], [np.log([0.5])])[0].tolist() == [math.log(2), 1, 0]


def test_the_same_as_the_validation_of_training(model, tmp_path):
    """val_loss and val_bpb of a run and the figures here are about the same thing."""
    from trainer.loop.backend import Backend
    from trainer.loop.validation import validate
    from trainer.losses.next_token import NextToken

    write_sft(tmp_path / "sft.jsonl", 20)
    data = SFTDataset(tmp_path / "sft.jsonl", TOKENIZER, max_seq_len=256)
    options = dict(batch_size=4, accumulation_steps=1, max_seq_len=256, shuffle=False)
    loader = Loader(data, packing=True, **options)
    there = validate(model, loader, NextToken(), Backend(torch.device("cpu")), TOKENIZER.token_bytes)
    model.eval()
    rows = [Encoded(data.tokens(i).tolist(), data.trained(i).tolist()) for i in range(len(data))]
    sums = totals(TOKENIZER, rows, log_likelihoods(model, rows)).sum(0)
    assert math.log(METRICS["ppl"].value(sums)) == pytest.approx(there["val_loss"], rel=1e-5)
    assert METRICS["bpb"].value(sums) == pytest.approx(there["val_bpb"], rel=1e-5)


def test_perplexity_equals_transformers(tmp_path, model):
    """The weights are exported, and transformers computes the mean loss of the same targets from its own logits."""
    transformers = pytest.importorskip("transformers")
    checkpoint = Checkpoint(tmp_path / "w.pth", model.state_dict(), model.config, {}, [])
    save_hf(tmp_path / "hf", checkpoint, TOKENIZER.path, TOKENIZER.stop_ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    nats = count = 0.0
    for row in ROWS[:-1]:
        ids = torch.tensor([row.ids])
        labels = ids.masked_fill(~torch.tensor([row.trained]), -100)
        n = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            nats, count = nats + float(theirs(ids, labels=labels).loss) * n, count + n
    ours = METRICS["ppl"].value(totals(TOKENIZER, ROWS, log_likelihoods(model, ROWS)).sum(0))
    assert ours == pytest.approx(math.exp(nats / count), rel=1e-5)
