"""On a real card: every path that only CUDA takes, against the same computation on the CPU in fp32.

python -m pytest -m gpu tests/gpu          # about a minute; skipped where there is no card
"""

import gc

import pytest
import torch

from evaluation.device import CHECKS, SHAPE, WINDOWS, build, dtypes_of, error, limit, losses_and_gradients, rows
from inference.engine import Engine, Request
from inference.generate import generate
from inference.sampling import Sampling
from inference.slots import Decoding
from model import attention, moe, transformer
from model.checkpoint import load_weights, save_weights
from model.config import ModelConfig
from model.precision import prepare_for_inference
from tests.helpers.models import TOKENIZER, random_model, small_model
from tests.helpers.rows import write_dpo, write_pretrain, write_reason, write_sft
from tests.helpers.runs import run_stage, sft_engine
from trainer.loop import engine as training
from trainer.loop.backend import Backend
from trainer.run import resume

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda", 0)


def has_flash() -> bool:
    return attention.has_flash(CUDA, torch.float16, 64) and attention.load_varlen()


def half_types() -> list[torch.dtype]:
    return [dtype for dtype in dtypes_of(CUDA) if dtype != torch.float32]


# ---- what the device doctor checks


@pytest.mark.parametrize("dtype", dtypes_of(CUDA) if torch.cuda.is_available() else [], ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_the_card_computes_what_the_cpu_does(name, dtype):
    assert CHECKS[name](CUDA, dtype) <= limit(name, dtype)


@pytest.mark.parametrize("changes", ({}, WINDOWS), ids=("plain", "windows"))
@pytest.mark.parametrize("kind", ("plain", "packed", "pairs"))
def test_the_kernel_is_the_one_that_was_meant(kind, changes, monkeypatch):
    used, kernel = [], attention.varlen_attention
    monkeypatch.setattr(attention, "varlen_attention", lambda *a: used.append(1) or kernel(*a))
    for dtype in half_types():
        losses_and_gradients(build(**changes), rows(kind), CUDA, dtype)
    assert bool(used) == (has_flash() and (kind != "plain" or bool(changes)))


# ---- attention


@pytest.mark.skipif(not torch.cuda.is_available() or not has_flash(), reason="needs flash attention")
def test_memory_of_a_long_row_is_linear():
    """A mask of 16,384 x 16,384 would be half a gigabyte in bf16, and scores in fp32 a gigabyte a head."""
    model = random_model(ModelConfig(**SHAPE, max_position_embeddings=1 << 15), std=0.08).to(CUDA)
    model.compute_dtype, peaks = half_types()[0], []
    for length in (8192, 16384):
        tokens = torch.zeros(1, length, dtype=torch.long, device=CUDA)
        documents = (torch.arange(length, device=CUDA) // 1000)[None]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(tokens, targets=tokens, documents=documents).loss.sum().backward()
        model.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.3 * peaks[0]


# ---- head, experts, quantised weights, generation


def test_the_head_in_chunks(monkeypatch):
    model, given = build(vocab_size=40_000), rows("packed")
    for dtype in half_types():
        plain = losses_and_gradients(model, given, CUDA, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(transformer, "LOGITS_AT_ONCE", 1)  # 128 positions at a time
            assert error(losses_and_gradients(model, given, CUDA, dtype), plain) < 0.02


def test_experts_in_blocks(monkeypatch):
    """For cards without torch's grouped product."""
    monkeypatch.setattr(moe, "_has_grouped_mm", lambda _: False)
    for dtype in dtypes_of(CUDA):
        assert CHECKS["experts"](CUDA, dtype) < 0.01


def test_greedy_answers_are_the_cpus():
    model = prepare_for_inference(random_model(ModelConfig(**SHAPE), std=0.2), torch.float32)
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13], [3]]
    options = dict(sampling=Sampling(temperature=0), max_new_tokens=20)
    assert generate(model.to(CUDA), prompts, **options) == generate(model.to("cpu"), prompts, **options)


def test_graphs_say_what_the_cpu_says_and_nothing_waits_for_them():
    """Seven answers go through four rows. Then, while three are written, torch's watch for synchronisation is on: the
    tokens of the step before are waited for by an event, which it allows."""
    model = prepare_for_inference(random_model(ModelConfig(**SHAPE), std=0.2), torch.float32)
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13], [3], [8, 8], [7, 6, 5, 4], [40], [100, 3]]
    greedy = Sampling(temperature=0)
    expected = [generate(model, [prompt], greedy, max_new_tokens=20)[0] for prompt in prompts]
    engine = Engine(model.to(CUDA), rows=4, capacity=128)
    sequences = [engine.submit(Request(prompt, greedy, 20)) for prompt in prompts]
    while engine.busy:
        engine.step()
    assert [sequence.tokens for sequence in sequences] == expected
    assert engine.late and engine.graphs.works and engine.graphs.graphs, "and not by the way round"
    sampled = [engine.submit(Request(prompt, Sampling(1.0, 0.9, top_k=20, seed=1), 40)) for prompt in prompts[:3]]
    for step in range(20):
        torch.cuda.set_sync_debug_mode("error" if step > 5 else "default")
        try:
            engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(len(sequence.tokens) == 19 for sequence in sampled), "the 20th is not read yet"
    plain = Engine(model, rows=4, capacity=128)
    plain.graphs = None
    again = [plain.submit(sequence.request) for sequence in sampled]
    while plain.busy:
        plain.step()
    assert [sequence.tokens for sequence in sampled] == [sequence.tokens[:19] for sequence in again]


@pytest.mark.parametrize("heads", (4, 2, 1))
@pytest.mark.parametrize("changes", ({}, WINDOWS), ids=("plain", "windows"))
def test_a_graphs_logits_are_those_of_a_mask(changes, heads):
    """Without a mask, flash attention is told how many keys there are, and divides 600 among several processors."""
    config, exact = ModelConfig(**{**SHAPE, "num_key_value_heads": heads}, **changes), None
    prompts = [[n % 512 for n in range(600)], [5, 6, 7], [9], [8] * 300]
    for dtype in (torch.float32, *half_types()):
        model = prepare_for_inference(random_model(config, std=0.1), dtype).to(CUDA)
        engine = Engine(model, rows=4, capacity=1024)
        for prompt in prompts:
            engine.submit(Request(prompt, Sampling(temperature=0), 8))
        engine.step()  # reads all prompts
        tokens = torch.tensor([[3], [4], [5], [6]], device=CUDA)
        with torch.inference_mode():
            masked = model(tokens, cache=Decoding(engine.slots, 4)).logits[:, 0].float()
            found = engine.graphs.step(tokens).logits.float()
        exact = found if exact is None else exact
        assert len(engine.running) == 4
        assert (found - masked).norm() < (1e-4 if dtype == torch.float32 else 0.02) * masked.norm()
        assert (found - exact).norm() < 0.1 * exact.norm()


# ---- training

STAGES = {
    "pretrain": ("pretrain", write_pretrain, None, []),
    "moe": ("pretrain", write_pretrain, None, ["--use_moe"]),
    "muon": ("pretrain", write_pretrain, None, ["--optimizer=muon"]),
    "full_sft": ("full_sft", write_sft, 0, ["--accumulation_steps=2"]),
    "recomputed": ("full_sft", write_sft, 4, ["--activation_checkpointing"]),
    "lora": ("lora", write_sft, 0, ["--lora_rank=4", "--lora_dropout=0.1"]),
    "dpo": ("dpo", write_dpo, 0, []),
    "dpo with lora": ("dpo", write_dpo, 0, ["--use_lora"]),
    "reasoning": ("distill_reason", write_reason, 0, []),
    "distillation": ("distillation", write_sft, 0, ["--teacher={weights}"]),
}


def train(folder, name: str, out: str, *flags: str, watch: bool = False) -> list[float]:
    """-> the losses of four steps. watch: torch's own watch for synchronisation is on, but for the first step, which
    sets things up."""
    stage, write, experts, more = STAGES[name]
    if experts is not None:
        about = dict(path=TOKENIZER.path, hash=TOKENIZER.hash)
        weights = save_weights(folder / "start.pth", small_model(num_experts=experts), tokenizer=about, lineage=[])
        more = [f"--from_weight={weights}", *(flag.format(weights=weights) for flag in more)]
    data = write(folder / "data.jsonl", 24)
    update, results = training.Engine.train_step, []

    def kept(engine, batches):
        torch.cuda.set_sync_debug_mode("error" if watch and results else "default")
        try:
            results.append(update(engine, batches))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Engine, "train_step", kept)
        steps = ["--max_steps=4", "--batch_size=4", "--learning_rate=1e-3"]
        run_stage(stage, f"--data_path={data}", f"--save_dir={folder / out}", *steps, *more, *flags)
    return [float(result.metrics["loss"]) / result.units for result in results]


def half() -> str:
    return f"--dtype={str(half_types()[0]).removeprefix('torch.')}"


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_follows_the_cpus_losses_and_waits_for_nothing(name, tmp_path):
    expected = train(tmp_path, name, "cpu")
    found = train(tmp_path, name, "cuda", "--device=cuda", half(), watch=True)
    assert len(found) == 4 and found == pytest.approx(expected, rel=0.03, abs=0.02)


@pytest.mark.parametrize("name", ("moe", "full_sft", "dpo", "lora", "distillation"))
def test_compiled_stages_follow_the_same_losses(name, tmp_path):
    torch.compiler.reset()
    eager, compiled = (
        train(tmp_path, name, mode, "--device=cuda", half(), f"--compile={mode}") for mode in ("off", "on")
    )
    assert compiled == pytest.approx(eager, rel=0.03, abs=0.02)


def test_fp16_scales_the_loss_and_survives_an_overflow(tmp_path):
    """At 2^14 the run learns; a gradient that overflows leaves every weight as it was, and halves the scale."""
    write_sft(tmp_path / "sft.jsonl")
    engine = sft_engine(tmp_path, 8, 1, Backend(CUDA), dtype="float16", max_steps=8, warmup_steps=0)
    assert engine.watch.scale == 2.0**14
    losses = []
    for step in range(5):
        engine._set_learning_rate()
        result = engine.train_step(engine.loader.batches(step))
        engine._record(result)
        assert engine.watch.check()
        losses.append(float(result.metrics["loss"]) / result.units)
    assert losses[-1] < losses[0]
    before = [p.detach().clone() for p in engine.model.parameters()]
    engine.watch.scale = 2.0**40
    engine._record(engine.train_step(engine.loader.batches(5)))
    engine.watch.check()
    assert engine.watch.scale == 2.0**39
    assert all(torch.equal(p, old) for p, old in zip(engine.model.parameters(), before))


def test_a_run_continues_and_its_files_are_those_of_their_step(tmp_path):
    """Saving happens in a thread. The kernels' sums have no fixed order on a card, so losses are near, not equal."""
    write_sft(tmp_path / "sft.jsonl")
    options = dict(dtype=half().removeprefix("--dtype="), save_interval=2, max_steps=4, keep_last=9)
    engine = sft_engine(tmp_path, 8, 1, Backend(CUDA), **options)
    assert engine.writer.pool is not None
    weights = engine.run()
    state, _ = resume.read_state(engine.states / "step_00000004")
    saved = load_weights(weights).build()
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter.cpu(), state["weights"][name])
        assert torch.equal(parameter.cpu(), dict(saved.named_parameters())[name])
    again = sft_engine(tmp_path, 8, 1, Backend(CUDA), **options, from_resume=engine.states / "step_00000002")
    assert again.step == 2
    again.run()
    for one, two in zip(engine.model.parameters(), again.model.parameters()):
        assert (one - two).norm() < 0.02 * one.norm() + 1e-3


# ---- last, because an illegal address would fail all tests behind it


def test_graphs_outlive_those_of_another_engine():
    """torch 2.13 frees cuBLAS's workspace of a stream with any graph that was captured there; ours do not use it."""
    model = prepare_for_inference(random_model(ModelConfig(**SHAPE), std=0.2), half_types()[0]).to(CUDA)
    engines = [Engine(model, rows=1, capacity=128) for _ in range(2)]

    def answer(engine: Engine) -> list[int]:
        sequence = engine.submit(Request([5, 6, 7], Sampling(temperature=0), 20))
        while engine.busy:
            engine.step()
        return sequence.tokens

    for engine in engines:
        answer(engine)
    expected = answer(engine)  # from here on the prompt's first tokens are in the cache each time
    del engines[0]
    gc.collect()
    torch.cuda.empty_cache()
    room = torch.full((1 << 28,), float("nan"), device=CUDA)  # where the workspace may have been
    assert answer(engine) == expected and engine.graphs.works and engine.graphs.graphs
    assert room.isnan().all(), "nor is anything written there"
