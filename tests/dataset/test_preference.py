"""Preferences: rows -> pairs that share their prompt -> batches in which each answer reads exactly what it should."""

import numpy as np
import pytest
import torch

from dataset.batches.preference import PairLoader, PreferenceDataset
from dataset.read.formats import canonical
from tests.helpers.models import TOKENIZER, answer_logp, small_model
from tests.helpers.rows import jsonl, says, user, words, write_dpo
from tests.helpers.varlen import varlen_attn
from tokenizer.chat import encode_chat
from trainer.losses.preference import read_answers

# ---- rows


@pytest.mark.parametrize(
    "row",
    (
        {"chosen": [user("1+1?"), says("2")], "rejected": [user("1+1?"), says("3")]},
        {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
        {"prompt": [user("1+1?")], "chosen": [says("2")], "rejected": [says("3")]},
        {"prompt": "1+1?", "chosen": [user("1+1?"), says("2")], "rejected": [user("1+1?"), says("3")]},
    ),
)
def test_layouts_mean_the_same(row):
    expected = {"chosen": [user("1+1?"), says("2")], "rejected": [user("1+1?"), says("3")]}
    assert canonical(row, "preference") == expected
    be_short = {"role": "system", "content": "Be short."}
    assert canonical({**row, "system": "Be short."}, "preference") == {k: [be_short, *v] for k, v in expected.items()}


BAD = {
    "chosen equals rejected": {"chosen": [user("1+1?"), says("2")], "rejected": [user("1+1?"), says("2")]},
    "the prompts differ: chosen[0] is user: '1+1?'": {
        "chosen": [user("1+1?"), says("2")],
        "rejected": [user("1+2?"), says("3")],
    },
    "the prompts differ: chosen[2] is user: 'Sure?'": {
        "chosen": [user("1+1?"), says("2"), user("Sure?"), says("Yes")],
        "rejected": [user("1+1?"), says("3"), user("Sure?"), says("No")],
    },
    "chosen must end with an assistant's answer": {"chosen": [user("1+1?")], "rejected": [user("1+1?"), says("3")]},
    "rejected[1]: the assistant says nothing": {
        "chosen": [user("1+1?"), says("2")],
        "rejected": [user("1+1?"), says("")],
    },
    "chosen: its answer is marked": {
        "chosen": [user("1+1?"), says("2") | {"weight": 0}],
        "rejected": [user("1+1?"), says("3")],
    },
    '"chosen" must be messages, or text beside a "prompt"': {"chosen": "2", "rejected": "3"},
    'no pair of "chosen" and "rejected" in this row': {"conversations": [user("1+1?"), says("2")]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rows_are_named_and_can_be_skipped(message, tmp_path):
    asked = [[user(f"{i}+1?")] for i in range(3)]
    good = [{"chosen": [*prompt, says("yes")], "rejected": [*prompt, says("no")]} for prompt in asked]
    path = jsonl(tmp_path / "dpo.jsonl", good[0], BAD[message], *good[1:])
    with pytest.raises(ValueError, match="on_bad_row skip") as error:
        PreferenceDataset(path, TOKENIZER, max_seq_len=64)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
    kept = PreferenceDataset(path, TOKENIZER, max_seq_len=64, on_bad_row="skip")
    assert [kept.source(i) for i in range(len(kept))] == [f"{path}:{line}" for line in (1, 3, 4)]
    assert "1 bad rows skipped" in kept.summary


def test_a_pair_is_its_prompt_and_two_answers(tmp_path):
    """The labels are encode_chat's; of a conversation only the answers that differ are trained on, with the calls of
    tools in them, but not what the tools said."""
    first = [user("1+1?"), says("2"), user("And 2+2?")]
    call = says("", tool_calls=[{"name": "add", "arguments": {"a": 2, "b": 2}}])
    row = {
        "chosen": [*first, call, {"role": "tool", "content": "4"}, says("It is 4.")],
        "rejected": [*first, says("2 + 2 = 5")],
    }
    ds = PreferenceDataset(jsonl(tmp_path / "dpo.jsonl", row), TOKENIZER, max_seq_len=256)
    prompt, (chosen, trained), (rejected, all_trained) = ds.pair(0)
    assert list(prompt) == encode_chat(TOKENIZER, first, add_generation_prompt=True).ids
    whole, labels = encode_chat(TOKENIZER, row["chosen"])
    assert [*prompt, *chosen] == whole[:-1], "all but the newline after the last turn"
    assert list(trained) == labels[len(prompt) : -1] and not trained.all()
    said = TOKENIZER.decode(chosen[trained])
    assert '{"name": "add"' in said and "It is 4.<|im_end|>" in said and "tool_response" not in said
    assert TOKENIZER.decode(rejected) == "2 + 2 = 5<|im_end|>" and all_trained.all()
    assert [len(ids) for ids, _ in ds.sequences(0)] == [len(prompt) + len(chosen), len(prompt) + len(rejected)]


def test_what_is_too_long_by_hand(tmp_path):
    """A prompt of 10 ids and answers of 5, 10 and 18 (and 2); --max_seq_len 16 holds 17 ids of prompt and answer."""
    rows = [{"prompt": "a b", "chosen": " ".join("x" * size), "rejected": "x"} for size in (4, 9, 17)]
    path = jsonl(tmp_path / "dpo.jsonl", *rows)
    everything = PreferenceDataset(path, TOKENIZER, max_seq_len=64)
    P, ends = len(everything.pair(0)[0]), [len(everything.pair(i)[1][0]) for i in range(3)]
    assert (P, ends) == (10, [5, 10, 18]), "an id a letter, and <|im_end|>"

    ds = PreferenceDataset(path, TOKENIZER, max_seq_len=16)
    assert [len(ds.pair(i)[0]) for i in range(len(ds))] == [10, 7], "10 + 5 fit into 17, of 10 + 10 the prompt keeps 7"
    np.testing.assert_array_equal(ds.pair(1)[0], everything.pair(1)[0][-7:])
    assert len(ds.pair(1)[1][0]) == 10, "no answer is cut"
    assert "1 cut, 1 left out (the longest needs --max_seq_len 27)" in ds.summary

    shorter = PreferenceDataset(path, TOKENIZER, max_seq_len=64, max_prompt_length=3)
    assert [len(shorter.pair(i)[0]) for i in range(3)] == [3, 3, 3]
    assert "3 cut, 0 left out" in shorter.summary
    assert len(PreferenceDataset(path, TOKENIZER, max_seq_len=16, on_long="drop")) == 1
    with pytest.raises(ValueError, match="no pair fits, the longest needs 27"):
        PreferenceDataset(path, TOKENIZER, max_seq_len=4)
    assert len({everything.fingerprint, ds.fingerprint, shorter.fingerprint}) == 3


# ---- batches


def loader_of(ds, batch_size, accumulation_steps, **rank):
    sizes = dict(batch_size=batch_size, accumulation_steps=accumulation_steps, max_seq_len=ds.max_seq_len)
    return PairLoader(ds, packing=True, **sizes, **rank)


@pytest.mark.parametrize("kernel", ("sdpa", "varlen", "blocked"))
def test_shared_prompts_change_nothing(kernel, tmp_path, monkeypatch):
    """Each answer's log-probability and its gradient, against the plain way: one sequence a row, prompt and all."""
    monkeypatch.setattr("model.attention.VARLEN", varlen_attn)
    ds = PreferenceDataset(write_dpo(tmp_path / "dpo.jsonl"), TOKENIZER, max_seq_len=48)
    batches = loader_of(ds, 8, 1).batches(0)
    assert any(int(batch.documents.max()) > 3 for batch in batches), "several pairs in a row, or nothing is tested"
    model = small_model(std=0.2)
    weights = torch.randn(8, 2)
    begin, sums = 0, 0.0
    for batch in batches:
        model.attention_kernel = kernel
        found, tokens, _ = read_answers(model, batch)
        model.attention_kernel = "sdpa"
        for n, example in enumerate(batch.examples):
            prompt, *answers = ds.pair(example)
            assert tokens[n].tolist() == [int(trained.sum()) for _, trained in answers]
            expected = torch.stack([answer_logp(model, prompt, answer) for answer in answers])
            torch.testing.assert_close(found[n], expected, atol=1e-4, rtol=1e-5)
            sums = sums + ((found[n] - expected) * weights[begin + n]).sum()
        begin += len(batch.examples)
    sums.backward()  # of packed minus alone: nothing is left
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() < 2e-4, name


def test_an_answer_never_sees_the_other(tmp_path):
    """Another word in a rejected answer moves nothing in the chosen one, nor in the next pair of the row."""
    rows = [{"prompt": f"{i} words?", "chosen": "a b c", "rejected": "d e f"} for i in range(2)]
    ds = PreferenceDataset(jsonl(tmp_path / "dpo.jsonl", *rows), TOKENIZER, max_seq_len=64)
    (batch,) = loader_of(ds, 2, 1).batches(0)
    model = small_model(std=0.2)
    before, _, _ = read_answers(model, batch)
    (r, t) = (batch.answers == 2).nonzero()[1].tolist()  # an input of the first pair's rejected answer
    batch.tokens[r, t] += 1
    after, _, _ = read_answers(model, batch)
    changed = (before != after).tolist()
    assert changed[0][1] and not changed[0][0] and changed[1] == [False, False]


def test_every_pair_once_an_epoch_however_it_is_divided(tmp_path):
    ds = PreferenceDataset(write_dpo(tmp_path / "dpo.jsonl", 30), TOKENIZER, max_seq_len=32)
    whole, loaders = loader_of(ds, 8, 1), [loader_of(ds, 2, 2, rank=rank, world=2) for rank in range(2)]
    seen = []
    for step in range(whole.steps_per_epoch):
        expected = sorted(e for batch in whole.batches(step) for e in batch.examples)
        parts = [loader.batches(step) for loader in loaders]
        assert [b.tokens.shape for b in parts[0]] == [b.tokens.shape for b in parts[1]], "ranks march in step"
        assert sorted(e for batches in parts for batch in batches for e in batch.examples) == expected
        assert all(len(batch.tokens) <= 2 for batches in parts for batch in batches)
        seen += expected
    assert sorted(seen) == list(range(30))
    assert "30 examples -> " in whole.describe()


def test_split_keeps_pairs_and_reference_together(tmp_path):
    ds = PreferenceDataset(write_dpo(tmp_path / "dpo.jsonl"), TOKENIZER, max_seq_len=48)
    train, val = ds.split(0.25, seed=1)
    reference = np.arange(2 * len(ds), dtype=np.float32).reshape(-1, 2)
    for view in (train, val):
        view.reference = reference
        for batch in loader_of(view, 4, 1).batches(0):
            lines = [int(view.source(e).rpartition(":")[2]) - 1 for e in batch.examples]
            assert batch.reference.tolist() == [[2.0 * line, 2.0 * line + 1] for line in lines]
    assert len(train) == 18 and len(val) == 6


def test_few_shapes_for_compiled_code(tmp_path):
    """Each step chooses the cheapest length of rows, and has its own number of them. Limited, there are two lengths,
    and with two sizes each four shapes; the same pairs in the same steps."""
    ds = PreferenceDataset(write_dpo(tmp_path / "dpo.jsonl", rows=96), TOKENIZER, max_seq_len=48)
    free, limited = (loader_of(ds, 8, 1) for _ in range(2))
    limited.limit_shapes()
    shapes = lambda side: {tuple(b.tokens.shape) for step in range(side.steps_per_epoch) for b in side.batches(step)}
    assert len(shapes(limited)) <= 4 and limited.count_shapes() <= 4 <= len(shapes(free)) + 2
    for step in range(free.steps_per_epoch):
        pairs = [sorted(i for batch in side.batches(step) for i in batch.examples) for side in (free, limited)]
        assert pairs[0] == pairs[1]


def test_the_keys_of_segments_are_part_of_a_shape(tmp_path):
    """On a GPU, prompts are copied in front of their answers: of long prompts there are more keys than of short ones,
    in rows of the same length. Code was once compiled for each number of them."""
    rows = [
        {"prompt": words(i, size), "chosen": words(i, 22 - size), "rejected": words(i + 1, 22 - size)}
        for i, size in enumerate((2, 11, 20) * 8)
    ]
    loader = loader_of(PreferenceDataset(jsonl(tmp_path / "dpo.jsonl", *rows), TOKENIZER, max_seq_len=96), 1, 1)
    loader.limit_shapes()
    batches = [batch for step in range(loader.steps_per_epoch) for batch in loader.batches(step)]
    shapes = {(tuple(batch.tokens.shape), len(batch.segments.gather)) for batch in batches}
    assert len(shapes) == len({rows for rows, _ in shapes}) <= 4
