"""Steps -> batches, spelled out on tiny data; they depend on no number of ranks and nothing that was asked before."""

import threading
import time

import numpy as np
import pytest
import torch

from dataset.batches.loader import IGNORED, Batch, Loader, few_sizes, select
from dataset.tokens.examples import TokenDataset
from dataset.tokens.order import shuffled
from tests.helpers.streams import Streams

END = 0


class Examples(TokenDataset):
    """Hand-written sequences; upper case letters are trained on in `chat("abCD")`."""

    end_of_text, start_of_text, summary, fingerprint = END, END, "hand-written", ""

    def __init__(self, sequences, trained=None):
        self.sequences = [np.array(s, np.uint16) for s in sequences]
        self.masks = None if trained is None else [np.array(t, bool) for t in trained]
        self.order = np.arange(len(sequences))
        self.lengths = np.array([len(s) for s in sequences], np.int32)

    def _read(self, i):
        return self.sequences[i], None if self.masks is None else self.masks[i]


def chat(*texts):
    """'abCD' -> ids 1 2 3 4, of which 3 and 4 are trained on."""
    return Examples([[ord(c.lower()) - 96 for c in t] for t in texts], [[c.isupper() for c in t] for t in texts])


def many(n=23, longest=9, seed=1):
    """n conversations of 2 to `longest` tokens; each begins with its own number (from 100)."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, longest + 1, n)
    return Examples(
        [[100 + i, *range(1, size)] for i, size in enumerate(sizes)],
        [[False] + [j % 2 == 1 for j in range(1, size)] for size in sizes],
    )


def loader(ds, **options):
    defaults = dict(packing=True, batch_size=2, accumulation_steps=1, max_seq_len=8, shuffle=False)
    return Loader(ds, **defaults | options)


# ---- spelled out


def test_conversations_packed_into_a_row():
    """abCD is three positions: a predicts b (not trained on), b predicts C, C predicts D. Each example starts anew."""
    (batch,) = loader(chat("xY", "abCD"), max_seq_len=6).batches(0)
    assert batch.tokens.tolist() == [[1, 2, 3, 24, END, END]]
    assert batch.targets.tolist() == [[IGNORED, 3, 4, 25, IGNORED, IGNORED]]
    assert batch.documents.tolist() == [[1, 1, 1, 2, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0, 1]], "the filling is a document of its own"
    assert batch.segments.queries.tolist() == [0, 3, 4, 6, 6], "room for 1, 2, 4 documents"
    assert (batch.trained_tokens, batch.examples) == (3, (1, 0))
    assert (batch.tokens.dtype, batch.targets.dtype, batch.documents.dtype) == (torch.int64, torch.int64, torch.int32)


def test_a_row_that_one_document_fills_needs_no_mask():
    """Plain causal attention is faster in every kernel. The model is not told of documents at all."""
    (alone,) = loader(chat("abCDe"), max_seq_len=4).batches(0)
    (with_filling,) = loader(chat("abCDe"), max_seq_len=5).batches(0)
    assert alone.whole_rows and "documents" not in alone.context() and "segments" not in alone.context()
    assert not with_filling.whole_rows and with_filling.context()["documents"] is with_filling.documents


def test_a_batch_moves_with_all_its_tensors():
    """A tensor that stayed behind would be copied, or be an error, in every layer."""
    (batch,) = loader(chat("xY", "abCD"), max_seq_len=6).batches(0)
    moved = batch.to("meta")
    tensors = [*moved.segments[:2], *(v for v in vars(moved).values() if isinstance(v, torch.Tensor))]
    assert len(tensors) >= 6 and all(tensor.is_meta for tensor in tensors)
    assert moved.examples == batch.examples


@pytest.mark.parametrize("device", ("cuda:1", "cuda"))  # torch's set_device refuses the second: it has no number
def test_the_loaders_thread_copies_to_a_gpu(device, monkeypatch):
    """The loop queued the copies, between two batches' kernels. Now they have a stream of their own. So the loop's
    stream has to wait for each, and the allocator has to know that the loop's stream reads the tensors: else it gives
    their memory to the next copy while they are still read."""
    streams, ds = Streams(monkeypatch), chat("xY", "abCD")
    list(loader(ds, device=torch.device("cpu")).prefetch(0, 2))
    assert not streams.log, "on a CPU nothing is copied"
    cuda = loader(ds, device=torch.device(device))
    cuda.copier.device = torch.device("meta")  # in the place of the card
    for step, (batch,) in cuda.prefetch(0, 2):
        assert not batch.tokens.is_meta, "numbers that the host reads are still there"
        tensors = sum(isinstance(v, torch.Tensor) for v in vars(batch).values()) + 2  # and those of `segments`
        pinned = [(where, thread) for what, where, thread in streams.log if what == "pin"]
        assert len(pinned) >= (step + 1) * tensors and set(pinned) == {(cuda.copier.stream, "loader")}
        assert ("record", batch.copy.done, "loader") in streams.log
        before = len(streams.log)
        there = batch.to(torch.device("meta"))
        mine = [entry for entry in streams.log[before:] if entry[2] == "MainThread"]
        assert mine == [("wait", batch.copy.done, "MainThread")] + [("used on", streams.main, "MainThread")] * tensors
        assert there.tokens.is_meta and there.examples == batch.examples
    first = torch.device("cuda", torch.device(device).index or 0)
    assert streams.log[0] == ("device", first, "loader"), "a thread begins on GPU 0, and takes memory there"


def test_few_shapes_for_compiled_code():
    """The rows of a step vary; each number would be a graph of its own. Filled up with blank rows, four are left, and
    every example is still there once, in a row of its own document numbers."""
    options = dict(batch_size=16, max_seq_len=12)
    free, limited = (loader(many(400, longest=12), **options) for _ in range(2))
    limited.limit_shapes()
    steps = range(free.steps_per_epoch)
    before = {len(batch.tokens) for step in steps for batch in free.batches(step)}
    after = {len(batch.tokens) for step in steps for batch in limited.batches(step)}
    assert len(after) <= 4 and limited.count_shapes() <= 4
    assert all(len(limited.batches(step)) == 1 for step in steps)
    for step in steps:
        trained = [sum(batch.trained_tokens for batch in side.batches(step)) for side in (free, limited)]
        examples = [sorted(i for batch in side.batches(step) for i in batch.examples) for side in (free, limited)]
        assert trained[0] == trained[1] and examples[0] == examples[1]
    assert max(before) <= max(after) <= 16


def test_a_step_with_more_rows_than_any_that_was_looked_at():
    """It gets an eighth more: short chats fill 100 rows where 1,024 are allowed, and were filled up to 1,024."""
    ds = loader(many(), batch_size=1024, max_seq_len=12)
    ds.sizes = [64, 80]
    assert ds._batch_sizes(2) == [64] and ds._batch_sizes(80) == [80] and ds._batch_sizes(0) == []
    assert [ds._batch_sizes(rows) for rows in (81, 90, 91, 103)] == [[90], [90], [102], [115]]
    ds.batch_size = 84
    assert ds._batch_sizes(82) == [84] and ds._batch_sizes(2 * 84 + 1) == [84, 84, 64]
    assert ds._batch_sizes(84 + 81) == [84, 84], "the shape of full batches is there anyway"
    ds.sizes = [3]
    assert ds._batch_sizes(5) == [5], "3, 4, 5"


@pytest.mark.parametrize(("batch_size", "world"), ((32, 1), (64, 1), (64, 2)))
def test_later_epochs_have_no_more_shapes(batch_size, world):
    """Each is shuffled anew. The second one had a step with more rows than any of the first, and that was the fifth
    shape of a run, compiled in the middle of it."""
    side = loader(many(400, longest=12), batch_size=batch_size, max_seq_len=12, world=world, shuffle=True)
    assert side.steps_per_epoch < 16
    side.limit_shapes()
    assert len(side.sizes) == 3, "a fourth one is free"
    assert len({batch.tokens.shape for step in range(200) for batch in side.batches(step)}) <= 4


def test_the_sizes_that_add_the_fewest_blank_rows():
    """2 and 10: 3 for the 7 and 1 for each 9. 7 and 10: 5 for the 2, and 3. 9 and 10: 7 for the 2, and 2."""
    numbers = [9, 2, 9, 10, 9, 7]
    assert few_sizes(numbers, 1) == [10]
    assert few_sizes(numbers, 2) == [2, 10]
    assert few_sizes(numbers, 3) == [2, 9, 10]
    assert few_sizes(numbers, 4) == few_sizes(numbers, 9) == [2, 7, 9, 10]


def test_ranks_still_have_batches_of_the_same_shapes():
    sides = [loader(many(100, longest=12), batch_size=4, max_seq_len=12, rank=rank, world=2) for rank in (0, 1)]
    for side in sides:
        side.limit_shapes()
    for step in range(sides[0].steps_per_epoch):
        shapes = [[batch.tokens.shape for batch in side.batches(step)] for side in sides]
        assert shapes[0] == shapes[1]


def test_shapes_are_counted():
    """23 conversations, 4 a step of rows of 12, at most 2 rows at once: batches of 2 rows and of 1."""
    assert loader(many(), batch_size=2, accumulation_steps=2, max_seq_len=12).count_shapes() == 2
    assert loader(many(), packing=False, batch_size=2, max_seq_len=12).count_shapes() == 1


def test_positions_of_some_steps():
    """Not of the examples that the flags allow: 2 to 4 of them share a row. What compiling saves was overestimated."""
    side = loader(many(), batch_size=2, accumulation_steps=2, max_seq_len=12)
    computed = sum(batch.tokens.numel() for step in range(side.steps_per_epoch) for batch in side.batches(step))
    assert side.count_positions(side.steps_per_epoch) == computed
    assert side.count_positions(2 * side.steps_per_epoch) == 2 * computed


def test_untrained_targets_are_minus_100_in_any_token_type():
    """np.where(trained, uint16 ids, -100) is 65436, not -100: it would train on every prompt."""
    for dtype in (np.uint16, np.uint32):
        ds = chat("abcD")
        ds.sequences = [s.astype(dtype) for s in ds.sequences]
        (batch,) = loader(ds, max_seq_len=3).batches(0)
        assert batch.targets.tolist() == [[-100, -100, 4]]


def test_extras_lie_beside_their_targets():
    """Token i's extra stands where token i is the target, one place before it is the input. Here it is 10 i, so every
    target t has 10 t beside it; `pair` has two numbers a token."""
    ds = chat("xY", "abCD", "eF")
    ds._extras = lambda i: {"tenfold": ds.sequences[i] * np.float32(10), "pair": np.stack([ds.sequences[i]] * 2, 1)}
    (batch,) = loader(ds, max_seq_len=5, batch_size=3, world=2).batches(0)
    assert batch.tokens.tolist() == [[1, 2, 3, 24, 5]]
    assert batch.targets.tolist() == [[IGNORED, 3, 4, 25, 6]]
    tenfold = batch.extras["tenfold"]
    assert tenfold.tolist() == [[20, 30, 40, 250, 60]] and tenfold.dtype == torch.float32
    assert batch.extras["pair"].tolist() == [[[2, 2], [3, 3], [4, 4], [25, 25], [6, 6]]]
    (blank,) = loader(ds, max_seq_len=5, batch_size=3, world=2, rank=1).batches(0)
    assert blank.examples == () and not blank.extras["tenfold"].any() and blank.extras["pair"].shape == (1, 5, 2)
    moved = batch.to("meta")
    assert moved.extras["pair"].device.type == moved.tokens.device.type == "meta" and moved.examples == batch.examples
    assert loader(chat("xY")).batches(0)[0].extras == {}, "nothing where nothing is known"


def test_a_stream_row_holds_several_documents():
    """E opens a document: its number goes up and positions restart there, in the middle of a row too."""
    ds = Examples([[END, 5, 6, END, 7], [7, 8, END, 9, END], [END, 3]])
    (batch, last) = loader(ds, packing=False, max_seq_len=4, batch_size=2, accumulation_steps=2).batches(0)
    assert batch.tokens.tolist() == [[END, 5, 6, END], [7, 8, END, 9]]
    assert batch.targets.tolist() == [[5, 6, END, 7], [8, END, 9, END]]
    assert batch.documents.tolist() == [[1, 1, 1, 2], [1, 1, 2, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert batch.selected is None and batch.trained_tokens == 8
    assert last.tokens.tolist() == [[END, END, END, END]]
    assert last.targets.tolist() == [[3, IGNORED, IGNORED, IGNORED]]
    assert last.documents.tolist() == [[1, 0, 0, 0]]
    assert last.positions.tolist() == [[0, 0, 1, 2]]


def test_a_short_last_step_is_filled_with_blank_rows_that_count_nothing():
    ds = Examples([[END, i, i] for i in range(1, 8)])  # 7 rows of 2
    stream = loader(ds, packing=False, max_seq_len=2, batch_size=2, accumulation_steps=2)
    assert stream.steps_per_epoch == 2
    assert [b.tokens.shape for b in stream.batches(0)] == [(2, 2), (2, 2)]
    full, last = stream.batches(1)
    assert [full.examples, last.examples] == [(4, 5), (6,)]
    assert last.tokens.shape == (2, 2), "of the same shape, so that compiled code is reused"
    assert last.targets[1].tolist() == [IGNORED, IGNORED] and last.documents[1].tolist() == [0, 0]
    assert last.trained_tokens == 2


def test_what_remains_of_a_steps_rows_is_one_batch():
    """It was batches of powers of two once, 4 + 2 + 1 for 7 rows: three passes where one is enough."""
    side = loader(many(), batch_size=8, max_seq_len=12)
    assert side._batch_sizes(21) == [8, 8, 5] and side._batch_sizes(7) == [7]
    assert side._batch_sizes(16) == [8, 8] and side._batch_sizes(0) == []


def test_selected_names_each_trained_position_once_and_fills_up_with_untrained_ones():
    targets = np.full((2, 200), IGNORED)
    targets[0, 3], targets[1, 7] = 11, 12
    selected = select(targets)
    assert selected.tolist() == [3, 207] + [0] * 126
    targets[0, :3] = 1
    assert set(select(targets)[5:].tolist()) == {4}, "the first that has no target"
    assert select(np.full((2, 200), 5)) is None, "nothing to fill up with: use all"
    assert select(np.array([[5, IGNORED]])) is None, "no fewer than all"
    blank = select(np.full((2, 200), IGNORED))
    assert blank.tolist() == [0] * 128, "a blank batch keeps a shape"


# ---- properties


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_example_once_and_the_next_another_order(packing, shuffle):
    ld = loader(many(), packing=packing, batch_size=3, accumulation_steps=2, max_seq_len=9, shuffle=shuffle)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * ld.steps_per_epoch, (epoch + 1) * ld.steps_per_epoch)
        epochs.append([example for step in steps for batch in ld.batches(step) for example in batch.examples])
        assert sorted(epochs[-1]) == list(range(23))
    assert (epochs[0] != epochs[1]) == shuffle


@pytest.mark.parametrize("packing", [True, False])
def test_the_examples_of_a_step_do_not_depend_on_how_it_is_divided(packing):
    """8 examples a step as 1 x 8, 2 x 4, 8 x 1, on 1, 2 and 4 ranks: the same examples, tokens and targets."""

    def content(batch_size, accumulation_steps, world):
        options = dict(packing=packing, batch_size=batch_size, accumulation_steps=accumulation_steps, world=world)
        ranks = [loader(many(), rank=rank, max_seq_len=9, shuffle=True, **options) for rank in range(world)]
        steps = []
        for step in range(ranks[0].steps_per_epoch + 1):
            by_rank = [ld.batches(step) for ld in ranks]
            shapes = [[b.tokens.shape for b in batches] for batches in by_rank]
            assert all(s == shapes[0] for s in shapes), "every rank computes as many batches, of the same sizes"
            assert all(rows <= batch_size for rows, _ in shapes[0])
            batches = [b for batches in by_rank for b in batches]
            rows = [row for b in batches for row in torch.cat([b.tokens, b.targets], dim=1).tolist()]
            rows = sorted(row for row in rows if set(row[9:]) != {IGNORED})  # less the blank ones
            examples = sorted(example for b in batches for example in b.examples)
            steps.append((examples, rows, sum(b.trained_tokens for b in batches)))
        return steps

    reference = content(1, 8, 1)
    for division in [(8, 1, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4)]:
        assert content(*division) == reference


def same(a: list[Batch], b: list[Batch]) -> bool:
    equal = lambda x, y: all(torch.equal(getattr(x, f), getattr(y, f)) for f in ("tokens", "targets", "documents"))
    return len(a) == len(b) and all(x.examples == y.examples and equal(x, y) for x, y in zip(a, b))


def test_a_step_is_the_same_whatever_was_asked_before():
    one, other = (loader(many(), shuffle=True, max_seq_len=9) for _ in range(2))
    forwards = [one.batches(step) for step in range(30)]
    for step in (29, 3, 17, 3, 0, 12, 28):
        assert same(other.batches(step), forwards[step])
    assert not same(forwards[0], loader(many(), shuffle=True, max_seq_len=9, seed=43).batches(0))


def test_the_permutation_is_pinned():
    """Continuing a run elsewhere must give the same order: this may never change."""
    assert shuffled(10, seed=42, stream=0).tolist() == [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]
    assert shuffled(10, seed=42, stream=1).tolist() != [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]
    assert sorted(shuffled(1000, 1, 2)) == list(range(1000))
    assert shuffled(1, 0, 0).tolist() == [0]


def test_the_permutation_is_fair():
    """Every index equally often in every place: 4,000 permutations of 4, each of 16 cells expects 1,000 (sd 27)."""
    counts = np.zeros((4, 4))
    for stream in range(4000):
        counts[np.arange(4), shuffled(4, 7, stream)] += 1
    assert abs(counts - 1000).max() < 150


def test_rows_too_short_for_the_data_are_refused():
    with pytest.raises(ValueError, match="rows of 2 do not hold this data set"):
        loader(chat("abCD"), max_seq_len=2)


def test_describe_counts():
    ds = chat(*["abcdE"] * 7)  # 4 positions each: two fill a row of 8
    assert loader(ds, batch_size=4).describe() == "7 examples -> 4 rows of 8 -> 2 steps an epoch (fill 88%)"
    assert loader(many(1000), packing=False, max_seq_len=9).describe().startswith("1,000 examples -> 1,000 rows of 9")
    ld = loader(many(1000), max_seq_len=9, batch_size=4)
    assert ld.describe() == "1,000 examples -> about 649 rows of 9 -> 250 steps an epoch (fill 78%)"
    assert sum(len(ld.rows(step)) for step in range(250)) == pytest.approx(649, rel=0.01)


# ---- prefetch


def test_prefetch_gives_the_same_batches_in_order():
    ld = loader(many(), shuffle=True, max_seq_len=9)
    got = list(ld.prefetch(2, 9))
    assert [step for step, _ in got] == list(range(2, 9))
    assert all(same(batches, ld.batches(step)) for step, batches in got)
    assert list(ld.prefetch(5, 5)) == []


def test_an_error_while_preparing_surfaces_at_its_step():
    ds = many()
    broken = loader(ds, max_seq_len=9)
    read = ds._read

    def fail(i):
        if i == 10:
            raise OSError("disk gone")
        return read(i)

    ds._read = fail
    seen = []
    with pytest.raises(OSError, match="disk gone"):
        for step, _ in broken.prefetch(0, 10):
            seen.append(step)
    assert seen == [0, 1, 2, 3, 4]  # two examples a step: number 10 is in step 5


def test_an_abandoned_prefetch_leaves_no_thread():
    before = threading.active_count()
    ds, prepared = many(), []
    read = ds._read
    ds._read = lambda i: time.sleep(0.01) or prepared.append(i) or read(i)
    steps = loader(ds, max_seq_len=9).prefetch(0, 10_000)
    next(steps)
    steps.close()
    done = len(prepared)
    time.sleep(0.1)
    assert len(prepared) == done, "once it is closed nothing is prepared any more"
    for _ in loader(many(), max_seq_len=9).prefetch(0, 10_000):
        break
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


# ---- with a model


def test_packing_changes_the_speed_and_not_the_mathematics():
    """The losses of packed rows add up to those of each conversation alone, to 1e-5, and so do the gradients."""
    from model.config import ModelConfig
    from model.transformer import CausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=130)
    model = CausalLM(ModelConfig(**shape))
    ds = many()
    alone = [Loader(ds, packing=False, batch_size=1, accumulation_steps=1, max_seq_len=9, shuffle=False)]
    packed = [loader(ds, batch_size=4, accumulation_steps=3, max_seq_len=40, rank=rank, world=2) for rank in range(2)]
    results = []
    for loaders in (alone, packed):
        model.zero_grad()
        batches = [b for ld in loaders for step in range(ld.steps_per_epoch) for b in ld.batches(step)]
        if loaders is packed:
            assert len(batches) < len(ds) and max(len(b.examples) for b in batches) > 4
        total = 0.0
        for b in batches:
            inputs = dict(targets=b.targets, documents=b.documents, positions=b.positions, selected=b.selected)
            loss = model(b.tokens, **inputs).loss.sum()
            loss.backward()
            total += loss.item()
        results.append((total, sum(b.trained_tokens for b in batches), [p.grad.clone() for p in model.parameters()]))
    (one, count_one, grads_one), (two, count_two, grads_two) = results
    assert count_one == count_two > 0
    assert two == pytest.approx(one, rel=1e-5)
    for a, b in zip(grads_one, grads_two):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
