"""On a real card: every path that only CUDA takes, against the same computation on the CPU in fp32.

python -m pytest -m gpu tests/gpu          # about a minute; skipped where there is no card
"""

from functools import partial

import pytest
import torch

from inference.engine import Engine, Request
from inference.generate import generate
from inference.sampling import Sampling
from inference.slots import Decoding
from model import attention, moe, transformer
from model.checkpoint import load_weights, save_weights
from model.config import ModelConfig
from model.moe import grouped_linear
from model.precision import has_bf16, prepare_for_inference
from model.quant import dequantize, quantize
from tests.helpers.models import TOKENIZER, random_model, small_model
from tests.helpers.rows import write_dpo, write_pretrain, write_reason, write_sft
from tests.helpers.runs import run_stage, sft_engine
from trainer.loop import engine as training
from trainer.loop.backend import Backend
from trainer.run import resume

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda", 0)
SHAPE = dict(
    vocab_size=512, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64
)
WINDOWS = dict(sliding_window=9, layer_types=("sliding_attention", "full_attention", "sliding_attention"))


def has_flash() -> bool:
    return attention.has_flash(CUDA, torch.float16, 64) and attention.load_varlen()


def half_types() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16] if has_bf16(CUDA) else [torch.float16]


def rows(kind: str) -> dict[str, torch.Tensor]:
    """Three rows of 96: plain, packed documents, or pairs whose answers share a prompt."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(512, (3, 96), generator=generator)
    given = dict(tokens=tokens, targets=tokens.roll(-1, 1))
    if kind == "plain":
        return given
    lengths = torch.tensor([20, 1, 30, 30, 15])
    documents = torch.repeat_interleave(torch.arange(1, 6), lengths).expand(3, -1).contiguous()
    if kind == "packed":
        return given | dict(documents=documents)
    prefixes = torch.where(documents <= 3, 1, torch.where(documents <= 4, 4, 4))
    positions = torch.cat([torch.arange(20), torch.arange(20, 21), torch.arange(20, 50), torch.arange(30)])
    positions = torch.cat([positions, torch.arange(30, 45)]).expand(3, -1).contiguous()
    return given | dict(documents=documents, prefixes=prefixes, positions=positions)


def losses_and_gradients(model, given, device, dtype):
    model = model.to(device)
    model.zero_grad()
    model.compute_dtype = dtype
    out = model(**{name: tensor.to(device) for name, tensor in given.items()})
    out.loss.mean().backward()
    gradients = {name: p.grad.float().cpu().clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach().float().cpu(), gradients


def assert_close(found, expected, share):
    """Losses and gradients whose difference is at most this share of their size."""
    (losses, gradients), (right, exact) = found, expected
    assert (losses - right).norm() < share * right.norm()
    for name, gradient in gradients.items():
        assert (gradient - exact[name]).norm() <= share * exact[name].norm() + 1e-6, name


# ---- attention


@pytest.mark.parametrize("changes", ({}, WINDOWS), ids=("plain", "windows"))
@pytest.mark.parametrize("kind", ("plain", "packed", "pairs"))
def test_attention_equals_the_cpus(kind, changes, monkeypatch):
    model, given = random_model(ModelConfig(**SHAPE, **changes), std=0.08), rows(kind)
    expected = losses_and_gradients(model, given, "cpu", torch.float32)
    assert_close(losses_and_gradients(model, given, CUDA, torch.float32), expected, 2e-3)
    used = []
    kernel = attention.varlen_attention
    monkeypatch.setattr(attention, "varlen_attention", lambda *a: used.append(1) or kernel(*a))
    for dtype in half_types():
        # a CPU in bf16 is 0.028 off, the gradient of k's weights most; a wrong mask would be far more
        assert_close(losses_and_gradients(model, given, CUDA, dtype), expected, 0.06)
    assert bool(used) == (has_flash() and (kind != "plain" or bool(changes))), "the kernel that was meant"


def test_every_document_is_alone_and_no_token_sees_the_future():
    model = random_model(ModelConfig(**SHAPE), std=0.08).to(CUDA)
    given = {name: tensor.to(CUDA) for name, tensor in rows("packed").items()}
    for dtype in half_types():
        model.compute_dtype = dtype
        logits = partial(model, documents=given["documents"])
        before = logits(given["tokens"]).logits
        changed = given["tokens"].clone()
        changed[0, 30] = (changed[0, 30] + 1) % 512
        moved = (logits(changed).logits != before).any(-1)
        assert not moved[1:].any() and not moved[0, :30].any() and not moved[0, 51:].any() and moved[0, 30:51].any()


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
    model = random_model(ModelConfig(**{**SHAPE, "vocab_size": 40_000}), std=0.08)
    given = rows("packed")
    for dtype in half_types():
        plain = losses_and_gradients(model, given, CUDA, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(transformer, "LOGITS_AT_ONCE", 1)  # 128 positions at a time
            assert_close(losses_and_gradients(model, given, CUDA, dtype), plain, 0.02)


@pytest.mark.parametrize("fast", (True, False), ids=("", "blocks"))
def test_experts_equal_a_loop(fast, monkeypatch):
    """torch's grouped product where the card has it, and blocks everywhere."""
    if not fast:
        monkeypatch.setattr(moe, "_has_grouped_mm", lambda _: False)
    ends = torch.tensor([70, 70, 200, 256], dtype=torch.int32, device=CUDA)
    bounds = zip([0, 70, 70, 200], ends.tolist())
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(256, 64), torch.randn(4, 96, 64), torch.randn(256, 96)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    expected = torch.cat([leaves[0][a:b] @ w.T for (a, b), w in zip(bounds, leaves[1])])
    expected.backward(upstream)
    for dtype in (*half_types(), torch.float32):
        mine = [t.clone().to(CUDA).requires_grad_() for t in (x, weight)]
        y = grouped_linear(mine[0].to(dtype), mine[1].to(dtype), ends)
        y.backward(upstream.to(CUDA, dtype))
        for found, right in zip((y, *(t.grad for t in mine)), (expected, *(t.grad for t in leaves))):
            assert (found.float().cpu() - right).norm() < 0.01 * right.norm(), dtype


@pytest.mark.parametrize("bits", (4, 8))
def test_quantised_weights_are_the_cpus(bits):
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    on_cpu, on_card = (quantize(weight.to(device), bits) for device in ("cpu", CUDA))
    there = dequantize(on_card, (96, 128), torch.float32).cpu()
    torch.testing.assert_close(there, dequantize(on_cpu, (96, 128), torch.float32), atol=1e-4, rtol=1e-4)


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
