"""What a request says does not depend on who else is served, when it came, or what was read before."""

import random
from pathlib import Path

import pytest
import torch

from inference import engine as engine_file
from inference import graphs, slots
from inference.engine import Engine, Request, follow
from inference.sampling import Sampling
from inference.slots import Reading, Slots
from model.config import ModelConfig
from tests.helpers.models import SPEAKER_SHAPE, SPEAKERS, continuation, random_model
from tests.helpers.tape import record
from tests.helpers.varlen import flash_forward

SHAPE, KINDS = SPEAKER_SHAPE, {kind: SPEAKERS[kind] for kind in ("dense", "moe", "norms", "mixed")}
GREEDY = Sampling(temperature=0)


def model_of(kind: str = "dense"):
    return random_model(ModelConfig(**SHAPE, **KINDS[kind]), std=0.2, seed=1).eval()


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(params=("at once", "late", "graphs", "graphs with flash attention"))
def way(request, monkeypatch):
    """How an engine reads its tokens: at once as on CPUs, or a step late and with graphs as on CUDA, there with a mask
    or without one."""
    begin = Engine.__init__
    if "flash" in request.param:
        monkeypatch.setattr(slots, "has_flash", lambda *_: True)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward)
        for file in ("layers", "transformer"):  # also one product for all heads, which adds to what is there
            monkeypatch.setattr(f"model.{file}.generating_on_gpu", lambda _: torch.is_inference_mode_enabled())

    def begin_so(engine, *arguments, **options):
        begin(engine, *arguments, **dict(late=request.param != "at once") | options)
        if "graphs" in request.param and engine.late:
            engine.graphs = graphs.DecodeGraphs(engine.model, engine.slots, record)

    monkeypatch.setattr(Engine, "__init__", begin_so)
    monkeypatch.setattr(graphs, "COLUMNS", 16)
    return request.param.split()[0]


def serve(engine: Engine, requests: list[Request], arrivals: random.Random | None = None):
    """Runs the requests to their end, submitted at once or, with `arrivals`, a few at a time."""
    waiting, sequences = list(requests), []
    while waiting or engine.busy:
        for _ in range(arrivals.randint(0, 2) if arrivals else len(waiting)):
            if waiting:
                sequences.append(engine.submit(waiting.pop(0)))
        engine.step()
    return sequences


def some_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Of 1 to 50 tokens; every third begins like an earlier one."""
    rng, prompts = random.Random(seed), []
    for n in range(count):
        begin = rng.choice(prompts)[: rng.randint(1, 40)] if n % 3 == 2 else []
        prompts.append(begin + [rng.randrange(97) for _ in range(rng.randint(1, 30))])
    return prompts


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_one_at_a_time(kind, way, monkeypatch):
    """18 requests of different lengths come and go through 4 rows; prompts are read in parts of 7 tokens."""
    monkeypatch.setattr(engine_file, "READ_ALONE", 7)
    monkeypatch.setattr(engine_file, "READ_BESIDE", 7)
    model, rng = model_of(kind), random.Random(3)
    prompts = some_prompts(18)
    lengths = [rng.randint(1, 25) for _ in prompts]
    engine = Engine(model, rows=4, capacity=100)
    stop = frozenset({5})
    requests = [Request(p, GREEDY, n, stop) for p, n in zip(prompts, lengths)]
    for sequence in serve(engine, requests, rng):
        request = sequence.request
        assert sequence.tokens == continuation(model, request.prompt, request.max_new_tokens, stop)
        short = len(sequence.tokens) < request.max_new_tokens
        assert (sequence.finish_reason, sequence.end) == (("stop", 5) if short else ("length", None))
    assert not engine.busy and not any(slot.busy for slot in engine.slots.slots)
    # 1, 2, 4 rows; 16, 32, 64, 100 columns; with tokens drawn, and the logits alone where prompts end beside
    assert way != "graphs" or 6 < len(engine.graphs.graphs) <= 3 * 4 * 2


def test_as_long_as_the_same_sequences_go_on_a_graph_needs_nothing_from_the_host(model, monkeypatch):
    """Tokens and lengths are what it has left itself, settings and sizes are those of before. Copies of them took a
    card's host longer than the rest of the step. There are three sequences in a graph of four rows."""
    settings = [Sampling(1.3, 0.9, seed=1), Sampling(1.0, 1.0, top_k=5, seed=2), GREEDY]
    requests = [Request(p, s, 25, logprobs=n) for p, s, n in zip([[3] * 7, [9, 9], [1]], settings, (None, 2, None))]
    engine = Engine(model, rows=4, capacity=64, late=True)
    engine.graphs = graphs.DecodeGraphs(model, engine.slots, record)
    monkeypatch.setattr(graphs, "COLUMNS", 64)
    sequences = [engine.submit(request) for request in requests]
    for _ in range(4):
        engine.step()
    with monkeypatch.context() as patch:
        for file in ("engine", "graphs", "sampling"):
            patch.delattr(f"inference.{file}.to_device")
        for _ in range(15):
            engine.step()
    while engine.busy:
        engine.step()
    assert [kind is None for *_, kind in engine.graphs.graphs] == [False]
    for sequence in sequences:
        (alone,) = serve(Engine(model, rows=1, capacity=64), [sequence.request])
        assert (alone.tokens, len(alone.logprobs)) == (sequence.tokens, len(sequence.logprobs))


def test_parts_of_many_prompts_are_stored_and_found_at_once_on_gpus():
    """Piece by piece, 64 prompts in 8 layers were a thousand kernels. Three parts, two of them behind what is there."""
    config, new = ModelConfig(**SHAPE), torch.randn(1, 9, 2, 8)
    found = []
    for one_by_one in (True, False):
        slots = Slots(config, 4, 20, torch.float32)
        slots.keys.normal_(generator=torch.Generator().manual_seed(0))
        slots.slots[2].ids, slots.slots[0].ids = [1] * 5, [1]
        reading = Reading(slots, [(slots.slots[2], 4), (slots.slots[3], 2), (slots.slots[0], 3)])
        reading.one_by_one = one_by_one
        assert reading.extend(torch.zeros(1, 9)).tolist() == [[5, 6, 7, 8, 0, 1, 1, 2, 3]]
        keys, values = reading.update(1, new, -new)
        assert torch.equal(slots.keys[1, 2, :, 5:9].mT, new[0, :4].permute(1, 2, 0))
        assert torch.equal(slots.values[1, 0, :, 1:4].mT, -new[0, 6:].permute(1, 2, 0))
        found.append((keys, values, slots.keys, slots.values))
    assert found[0][0].shape == (1, 9 + 2 + 4, 2, 8)
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_prompts_with_a_long_beginning_are_not_all_read_at_once(model, way, monkeypatch):
    """A row of many parts has scores between all of them: with 12 parts of 5 tokens, each behind 100 that are known,
    60 x 1,260 instead of 12 x 5 x 105. Flash attention makes only these, but needs a copy of 1,260 keys."""
    begin = [random.Random(0).randrange(97) for _ in range(100)]
    prompts = [[*begin, n, 1, 2, 3, 4] for n in range(12)]
    engine = Engine(model, rows=12, capacity=120)
    serve(engine, [Request(prompt, GREEDY, 1) for prompt in prompts[:1]])
    sizes, read = [], Engine._read
    monkeypatch.setattr(Engine, "_read", lambda engine, parts: sizes.append(len(parts)) or read(engine, parts))
    monkeypatch.setattr(engine_file, "MOST_SCORES", 4 * 5 * 4 * 105)
    monkeypatch.setattr(engine_file, "MOST_KEYS", 6 * 105)
    sequences = serve(engine, [Request(prompt, GREEDY, 3) for prompt in prompts])
    assert sizes == ([6, 6] if engine.slots.flash else [4, 4, 4])
    assert [s.tokens for s in sequences] == [continuation(model, prompt, 3) for prompt in prompts]


@pytest.mark.parametrize("works", range(4))
def test_a_graph_that_cannot_be_captured_is_done_without(model, works, monkeypatch, capsys):
    """There may be no memory for the second one, after it has run once: tokens that the first had drawn were lost."""
    monkeypatch.setattr(graphs, "COLUMNS", 8)
    captured = []

    def capture(function):
        captured.append(function())
        if len(captured) > works:
            raise RuntimeError("out of memory")
        return record(function)

    requests = [Request(prompt, Sampling(1.3, 1.0, seed=3), 30) for prompt in ([1, 2, 3], [4] * 5)]
    engine = Engine(model, rows=2, capacity=64, late=True)
    engine.graphs = graphs.DecodeGraphs(model, engine.slots, capture)
    together = serve(engine, requests)
    alone = [serve(Engine(model, rows=1, capacity=64), [request])[0] for request in requests]
    assert [sequence.tokens for sequence in together] == [sequence.tokens for sequence in alone]
    assert len(captured) == works + 1 and capsys.readouterr().err.count("no CUDA graph") == 1


def test_settings_without_effect_need_no_graph_of_their_own_and_there_are_not_too_many(model, monkeypatch):
    """Anyone who asks a server may choose settings that nobody had before, and each graph takes memory for ever."""
    monkeypatch.setattr(graphs, "MOST_KINDS", 3)
    engine = Engine(model, rows=1, capacity=64, late=True)
    engine.graphs = graphs.DecodeGraphs(model, engine.slots, record)
    for settings in [dict(), dict(top_p=1.0), dict(top_k=7), dict(min_p=0.1), dict(seed=1)]:
        serve(engine, [Request([1, 2, 3], Sampling(temperature=0, **settings), 4)])
    assert len(engine.graphs.graphs) == 1
    for top_k in range(1, 60, 7):
        request = Request([1, 2, 3], Sampling(1.0, 1.0, top_k=top_k, seed=top_k), 12)
        (alone,) = serve(Engine(model, rows=1, capacity=64), [request])
        assert serve(engine, [request])[0].tokens == alone.tokens
    assert len(engine.graphs.graphs) == 4, "three kinds, and logits from which tokens are drawn outside"


def test_a_seed_says_the_same_in_any_company(model, way):
    """With every setting of sampling, alone and among others that have their own."""
    settings = [
        Sampling(1.3, 1.0, seed=1),
        Sampling(1.0, 0.9, top_k=20, seed=2),
        Sampling(0.8, 1.0, min_p=0.05, presence_penalty=0.5, frequency_penalty=0.3, seed=3),
        Sampling(1.5, 0.95, repetition_penalty=1.3, logit_bias={7: 3.0, 8: -100}, seed=4),
        Sampling(temperature=0, frequency_penalty=5.0),  # the second of two equal tokens shows whether it was applied
        Sampling(temperature=0, repetition_penalty=1.5),
        Sampling(1.0, 1.0),
        GREEDY,
    ]
    requests = [Request(prompt, sampling, 12) for prompt, sampling in zip(some_prompts(8, seed=5), settings)]
    together = serve(Engine(model, rows=8, capacity=100), requests, random.Random(1))
    for sequence, sampling in zip(together, settings):
        if sampling.seed is not None or sampling.temperature == 0:
            (alone,) = serve(Engine(model, rows=1, capacity=100, late=False), [sequence.request])
            assert alone.tokens == sequence.tokens
    assert 8 not in together[3].tokens
    other = Request(requests[0].prompt, Sampling(1.3, 1.0, seed=9), 12)
    assert serve(Engine(model, rows=1, capacity=100), [other])[0].tokens != together[0].tokens


def test_a_beginning_that_was_read_is_not_read_again(model):
    """A long system prompt before eight questions that come at once: it is read once, the questions each."""
    read = []

    def count(module, args, output):
        read.append(args[0].numel())

    system = [random.Random(0).randrange(97) for _ in range(300)]
    prompts = [system + [n, n + 1, n + 2] for n in range(8)]
    hook = model.model.embed_tokens.register_forward_hook(count)
    engine = Engine(model, rows=8, capacity=400)
    sequences = serve(engine, [Request(prompt, GREEDY, 1) for prompt in prompts])
    hook.remove()
    assert sum(read) == 303 + 7 * 3 and [s.cached_tokens for s in sequences] == [0] + [300] * 7
    for sequence in sequences:
        assert sequence.tokens == continuation(model, sequence.request.prompt, 1)


def test_the_next_turn_reads_only_what_is_new(model, way):
    """Also after another conversation was served, and after one that shares a part has taken a row for itself."""
    engine = Engine(model, rows=2, capacity=200)
    first = some_prompts(1)[0] * 3
    (answer,) = serve(engine, [Request(first, GREEDY, 10)])
    serve(engine, [Request([90, 91, 92] * 5, GREEDY, 10)])
    serve(engine, [Request(first[:10] + [1, 2, 3], GREEDY, 10)])  # shares little: must not cost the first its row
    longer = first + answer.tokens + [11, 12]
    (next_turn,) = serve(engine, [Request(longer, GREEDY, 10)])
    assert next_turn.cached_tokens == len(first) + 9  # the tenth token was drawn, and never computed
    assert next_turn.tokens == continuation(model, longer, 10)


def test_a_gpu_reads_more_of_a_small_models_prompts_at_once():
    """26M weights x 8 x 256 positions are little work for it; 7B are as many as it should do beside others."""
    assert [engine_file.times_as_many(int(weights)) for weights in (26e6, 0.5e9, 7e9)] == [8, 4, 1]


def test_a_long_prompt_does_not_hold_up_the_others(model):
    engine = Engine(model, rows=2, capacity=2000)
    running = engine.submit(Request([1, 2, 3], GREEDY, 100))
    engine.step()
    long = engine.submit(Request([random.Random(1).randrange(97) for _ in range(1500)], GREEDY, 2))
    steps = 0
    while not long.tokens:
        before = len(running.tokens)
        engine.step()
        steps += 1
        assert len(running.tokens) == before + 1
    assert steps == -(-1500 // engine_file.READ_BESIDE)


def test_log_probabilities_are_the_models_own(model, way):
    """Of the prompt's tokens, the answer's and the one that ends it; before temperature and penalties. The reference
    is one pass over all of it."""
    prompt = some_prompts(1, seed=2)[0]
    strange = Sampling(2.0, 1.0, repetition_penalty=1.5, seed=1)
    free = serve(Engine(model, rows=1, capacity=100), [Request(prompt, strange, 10)])[0]
    stop = frozenset({free.tokens[6]} - set(free.tokens[:6])) or frozenset({free.tokens[0]})
    asked = Request(prompt, strange, 10, stop, logprobs=3, prompt_logprobs=True)
    plain = Request(prompt[:5], GREEDY, 4)  # a neighbour that asks for none
    engine = Engine(model, rows=2, capacity=100)
    serve(engine, [Request(prompt, GREEDY, 2)])  # what is cached of the prompt must not be left out
    sequence, neighbour = serve(engine, [asked, plain])
    text = prompt + sequence.tokens + [sequence.end]
    with torch.no_grad():
        reference = model(torch.tensor([text])).logits[0].log_softmax(-1)
    given = sequence.prompt_logprobs + sequence.logprobs
    assert len(given) == len(text) - 1 and not neighbour.logprobs
    for place, (value, likeliest) in enumerate(given):
        assert value == pytest.approx(float(reference[place, text[place + 1]]), abs=1e-4)
        best = reference[place].topk(3)
        assert [token for token, _ in likeliest] == best.indices.tolist()
        assert [p for _, p in likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_reading_only(model, way):
    request = Request([1, 2, 3, 4], GREEDY, 0, logprobs=0, prompt_logprobs=True)
    (sequence,) = serve(Engine(model, rows=1, capacity=4), [request])
    assert (sequence.tokens, sequence.finish_reason, len(sequence.prompt_logprobs)) == ([], "length", 3)


def test_who_leaves_gets_no_further_token_and_disturbs_nobody(model, way):
    engine = Engine(model, rows=3, capacity=200)
    prompts = some_prompts(5, seed=8)
    sequences = [engine.submit(Request(prompt, GREEDY, 30)) for prompt in prompts]  # two of them have to wait
    for _ in range(6):
        engine.step()
    written = len(sequences[0].tokens)
    sequences[0].cancel()
    sequences[4].cancel()
    while engine.busy:
        engine.step()
    assert len(sequences[0].tokens) == written and sequences[4].tokens == []
    assert [s.finish_reason for s in sequences] == ["cancelled", "length", "length", "length", "cancelled"]
    for n in (1, 2, 3):
        assert sequences[n].tokens == continuation(model, prompts[n], 30)
    assert not any(slot.busy for slot in engine.slots.slots)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_after_a_step_that_failed_the_cache_is_right(model, way, monkeypatch, call):
    """The failure comes in the second layer, when the first has already stored its keys."""
    engine, calls = Engine(model, rows=2, capacity=100), []
    prompts = some_prompts(2, seed=4)
    second = model.model.layers[1]

    def fails(*args, original=second.forward):
        calls.append(1)
        if len(calls) == call:
            raise MemoryError("no room")
        return original(*args)

    monkeypatch.setattr(second, "forward", fails)
    sequences = [engine.submit(Request(prompt, GREEDY, 8)) for prompt in prompts]
    with pytest.raises(MemoryError):
        while engine.busy:
            engine.step()
    assert engine.fail(MemoryError("no room")) == sequences and not engine.busy
    assert all(s.finish_reason == "error" and isinstance(s.error, MemoryError) for s in sequences)
    for sequence in serve(engine, [Request(prompt, GREEDY, 8) for prompt in prompts]):
        assert sequence.tokens == continuation(model, sequence.request.prompt, 8)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9, top_p=0.8, seed=1)])
def test_nan_ends_its_own_sequence_only(sampling, way):
    """Token 7 has NaN for its embedding, as after an overflow in fp16. Its slot is used again afterwards: what is left
    in it of the NaN, in columns that are read with weight 0, would make the next ones NaN too."""
    model = model_of()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
        model.lm_head.weight = torch.nn.Parameter(torch.randn(97, 32, generator=torch.Generator().manual_seed(0)))
    engine = Engine(model, rows=2, capacity=100)
    healthy = Request([1, 2, 3] * 4, sampling, 12)
    alone = serve(engine, [healthy])[0].tokens
    good = engine.submit(healthy)
    engine.step()
    (bad,) = serve(engine, [Request([4] * 9 + [7] * 20, sampling, 5, prompt_logprobs=True)])
    assert good.tokens == alone and bad.finish_reason == "error" and bad.tokens == []
    assert "NaN" in str(bad.error) and not any(slot.busy for slot in engine.slots.slots)
    assert [s.tokens for s in serve(engine, [healthy, Request([9] * 2, sampling, 30), healthy])][::2] == [alone] * 2
    with pytest.raises(ValueError, match="--dtype float32"):
        list(follow(engine, engine.submit(Request([7], sampling, 5))))


def test_a_prompt_that_is_cancelled_leaves_no_nan(way):
    """Nobody saw its logits, so its slot was not wiped: one answer after the other that got this slot was NaN beside
    a longer one, which reads the columns behind its end with weight 0."""
    model = model_of()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
        model.lm_head.weight = torch.nn.Parameter(torch.randn(97, 32, generator=torch.Generator().manual_seed(0)))
    engine = Engine(model, rows=2, capacity=1000)
    (alone,) = serve(Engine(model, rows=1, capacity=100), [Request([1, 2, 3, 9], GREEDY, 3)])
    bad = engine.submit(Request([1, 2, 3, 7] + [5] * 900, GREEDY, 5))
    engine.step()
    bad.cancel()
    engine.step()
    assert bad.finish_reason == "cancelled" and bad.tokens == []
    for _ in range(2):
        longer, short = serve(engine, [Request([11] * 300, GREEDY, 5), Request([1, 2, 3, 9], GREEDY, 3)])
        assert (longer.finish_reason, short.tokens) == ("length", alone.tokens)


def test_wrong_guesses_are_wiped_too():
    """A slot of two tokens, and three guesses behind them, all NaN: nothing of them is left for the next sequence."""
    cache = Slots(ModelConfig(**SHAPE), rows=2, capacity=10, dtype=torch.float32)
    slot = cache.slots[1]
    slot.ids = [4, 5]
    cache.keys[1:, 1, :, :6] = float("nan")  # a first layer that makes NaN has finite keys itself
    assert not cache.is_finite(slot)
    cache.wipe(slot, behind=4)
    assert not slot.ids and cache.is_finite(slot) and not cache.keys.any()


@pytest.mark.parametrize("temperature", (0, 1.5))
def test_a_token_may_be_forbidden_for_ever(model, way, temperature):
    """The bias is minus infinity, which is not the model's mistake."""
    (free,) = serve(Engine(model, 1, 50), [Request([1, 2], Sampling(temperature, 1.0, seed=1), 5)])
    never = Sampling(temperature, 1.0, seed=1, logit_bias={free.tokens[2]: float("-inf")})
    (sequence,) = serve(Engine(model, 1, 50), [Request([1, 2], never, 30)])
    assert sequence.error is None and len(sequence.tokens) == 30 and free.tokens[2] not in sequence.tokens


def test_a_sequence_for_which_no_slot_can_be_claimed_is_not_lost(model, monkeypatch):
    """It had left the queue already: nobody was told, and who waited for it waited for ever."""
    engine = Engine(model, rows=1, capacity=50)
    monkeypatch.setattr(engine.slots, "claim", lambda *args: [][0])
    sequence = engine.submit(Request([1, 2], GREEDY, 3))
    with pytest.raises(IndexError):
        engine.step()
    assert engine.fail(IndexError()) == [sequence] and sequence.finish_reason == "error"


def test_more_likeliest_tokens_than_there_are(model, way):
    (sequence,) = serve(Engine(model, rows=1, capacity=50), [Request([1, 2], GREEDY, 1, logprobs=500)])
    assert len(sequence.logprobs[0].likeliest) == 97


def test_after_ctrl_c_in_a_graph_the_same_question_is_answered_right(model, monkeypatch):
    """The card had counted the token, the host had not. The next answer began one place too far behind."""
    interrupt = []

    def capture(function):
        replay, found = record(function)

        def interrupted():
            replay()
            if interrupt:
                raise interrupt.pop()

        return interrupted, found

    engine = Engine(model, rows=1, capacity=64, late=True)
    engine.graphs = graphs.DecodeGraphs(model, engine.slots, capture)
    request = Request([1, 2, 3], GREEDY, 12)
    for _ in range(2):
        interrupt.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            list(follow(engine, engine.submit(request)))
    assert serve(engine, [request])[-1].tokens == continuation(model, [1, 2, 3], 12)


def test_one_can_be_followed_while_others_run(model, way):
    engine = Engine(model, rows=2, capacity=100)
    other = engine.submit(Request([4, 5], GREEDY, 40))
    request = Request([1, 2, 3], GREEDY, 6)
    assert list(follow(engine, engine.submit(request))) == continuation(model, [1, 2, 3], 6)
    for token in follow(engine, abandoned := engine.submit(request)):
        assert token == abandoned.tokens[0]
        break
    engine.step()
    assert abandoned.finish_reason == "cancelled" and len(abandoned.tokens) == 1 and not other.finish_reason


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_room_that_nobody_uses_costs_no_memory(model):
    """torch.zeros writes every page: 16 slots of 8,192 tokens of `small` would take 1 GB before the first request."""
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    before = resident()
    engine = Engine(model, rows=64, capacity=32768)
    serve(engine, [Request([1, 2, 3], GREEDY, 4)])
    room = engine.slots.keys.nbytes + engine.slots.values.nbytes
    assert room > 500e6 and resident() - before < room / 10


def test_a_step_names_each_sequence_once(model, way):
    """One that got two tokens was named twice, and a progress bar went to 200 %."""
    engine, named = Engine(model, rows=2, capacity=50), []
    sequences = [engine.submit(Request([1, 2], GREEDY, most)) for most in (1, 4, 6)]
    while engine.busy:
        moved = engine.step()
        assert len(set(moved)) == len(moved)
        named += [sequence for sequence in moved if sequence.finish_reason]
    assert set(named) == set(sequences) and len(named) == 3


def test_what_cannot_be_served_is_refused(model):
    engine = Engine(model, rows=1, capacity=10)
    for request, complaint in [
        (Request([], GREEDY, 1), "at least one token"),
        (Request([1] * 8, GREEDY, 3), "8 tokens and 3 new ones exceed the model's 10 positions"),
        (Request([1], Sampling(logit_bias={97: 1.0}), 1), "logit_bias: 97 is no token"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            engine.submit(request)
    assert not engine.busy


def test_in_bf16_only_near_ties_may_differ():
    """Rounding depends on the number of rows. Where the two best are more than 1e-2 apart, the choice does not."""
    model = model_of().bfloat16()
    requests = [Request(prompt, GREEDY, 12, logprobs=2) for prompt in some_prompts(6, seed=6)]
    together = serve(Engine(model, rows=6, capacity=100), requests, random.Random(2))
    for sequence in together:
        (alone,) = serve(Engine(model, rows=1, capacity=100), [sequence.request])
        for one, many, (_, best) in zip(alone.tokens, sequence.tokens, alone.logprobs):
            if one != many:
                assert best[0][1] - best[1][1] < 1e-2
                break
