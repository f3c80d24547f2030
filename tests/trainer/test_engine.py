"""The loop: the same gradient however a step is divided, the same weights after a stop, no harm from a bad step."""

import json
import math
import os
import platform
import signal
import subprocess
import sys

import pytest
import torch

from common.files import ROOT
from tests.helpers.compare import assert_same_gradients, same, state_of
from tests.helpers.rows import write_pretrain, write_sft
from tests.helpers.runs import FLAGS, SHAPE, first_gradients, run_stage, sft_engine, torchrun, train_twice
from trainer.loop import engine as engine_module
from trainer.loop import interrupts
from trainer.loop.optim import Muon, build_optimizers, clip_and_check, learning_rate, orthogonalise, set_rates
from trainer.losses.next_token import NextToken

# ---- one step, divided in different ways


def test_accumulation_gives_the_same_gradient(tmp_path):
    """16 examples of 1 to 12 trained words, as 16, 4 x 4, 8 x 2 and 1 x 16, on a mixture of experts with its balancing
    loss."""
    write_sft(tmp_path / "sft.jsonl")
    expected = first_gradients(sft_engine(tmp_path, 16, 1))
    for batch_size, accumulation_steps in ((4, 4), (8, 2), (1, 16)):
        found = first_gradients(sft_engine(tmp_path, batch_size, accumulation_steps))
        assert_same_gradients(found, expected, 1e-5 if batch_size == 1 else 5e-6)


def test_the_figures_of_a_step_are_of_all_its_micro_batches(tmp_path):
    """The logged loss of a step in 4 parts is that of the same step in one, and not that of its last part."""
    write_sft(tmp_path / "sft.jsonl")
    found = []
    for batch_size, accumulation_steps in ((16, 1), (4, 4)):
        engine = sft_engine(tmp_path, batch_size, accumulation_steps)
        result = engine.train_step(engine.loader.batches(0))
        found.append((result.units, result.tokens, result.metrics["loss"].item()))
    (units, tokens, loss), divided = found
    assert divided == (units, tokens, pytest.approx(loss, rel=1e-5)) and units == tokens > 16


def test_two_ranks_give_the_same_gradient(tmp_path):
    write_sft(tmp_path / "sft.jsonl")
    expected = first_gradients(sft_engine(tmp_path, 16, 1))
    torchrun(ROOT / "tests" / "helpers" / "gradients_run.py", tmp_path)
    assert_same_gradients(torch.load(tmp_path / "two_ranks.pth", weights_only=True), expected, 5e-6)
    assert_same_gradients(torch.load(tmp_path / "two_ranks_compiled.pth", weights_only=True), expected, 5e-6)
    # a loss that is infinite on rank 1 only: rank 0, where everything is finite, has to leave the step out as well
    found = json.loads((tmp_path / "rank_0.json").read_text())
    assert found.pop("buckets") == 1, "of a step with two micro-batches: only after the last one"
    trained = sum(batch.trained_tokens for batch in sft_engine(tmp_path, 16, 1).loader.batches(0))
    assert found.pop("units") == found.pop("tokens") == trained, "of both ranks"
    assert found == dict(bad=1.0, moved=False, own_gradient_is_finite=True, own=[True, True])


def test_one_process_and_torchrun_train_the_same_model(tmp_path):
    """`cd trainer && torchrun ... train_full_sft.py` after `python trainer/train_pretrain.py`, against one process."""
    write_pretrain(tmp_path / "text.jsonl")
    write_sft(tmp_path / "sft.jsonl")
    run_stage(
        "pretrain",
        f"--data_path={tmp_path / 'text.jsonl'}",
        f"--save_dir={tmp_path}",
        "--max_steps=3",
        "--batch_size=4",
    )
    common = [f"--data_path={tmp_path / 'sft.jsonl'}", f"--from_weight={tmp_path / 'pretrain_32.pth'}", "--max_steps=4"]
    run_stage("full_sft", *common, f"--save_dir={tmp_path / 'one'}", "--batch_size=8")
    done = torchrun(
        "train_full_sft.py", *FLAGS, *common, f"--save_dir={tmp_path / 'two'}", "--batch_size=4", cwd=ROOT / "trainer"
    )
    assert done.stdout.count("done in") == 1  # only the first rank speaks
    one, two = (state_of(tmp_path / folder / "full_sft_32.pth") for folder in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)


# ---- stop and resume


def test_ctrl_c_that_also_hits_the_compiler_saves_all_the_same(tmp_path, monkeypatch):
    """The terminal sends Ctrl-C to g++ as well, which torch.compile had started at step 3: the run ended with 1,500
    lines of its complaints, and nothing was saved."""
    write_sft(tmp_path / "sft.jsonl")
    engine = sft_engine(tmp_path, 8, 1, max_steps=5)
    engine.compiled, update = True, engine.train_step

    def interrupted(batches):
        if engine.step == 2:
            torch.rand(3)  # dropout had begun
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("CppCompileError: g++ was killed")
        return update(batches)

    engine.train_step = interrupted
    random = torch.get_rng_state()
    with pytest.raises(SystemExit) as end:
        engine.run()
    assert end.value.code == 130 and torch.equal(torch.get_rng_state(), random), "as before the step"
    assert [path.name for path in tmp_path.glob("out/resume/*/*/step_*")] == ["step_00000002"]

    engine = sft_engine(tmp_path, 8, 1, max_steps=5)
    engine.compiled = True
    engine.train_step = lambda *_: (_ for _ in ()).throw(RuntimeError("a fault of ours"))
    with pytest.raises(RuntimeError, match="a fault of ours"):  # without a Ctrl-C it is what it is
        engine.run()


@pytest.mark.parametrize("stage, optimizer", [("pretrain", "muon"), ("pretrain", "adamw"), ("full_sft", "adamw")])
def test_a_stopped_run_continues_bit_for_bit(stage, optimizer, tmp_path, stop_at):
    data = tmp_path / "data.jsonl"
    flags = [f"--data_path={data}", "--max_steps=8", "--batch_size=4", "--accumulation_steps=2"]
    flags += [f"--optimizer={optimizer}", "--val_fraction=0.1", "--save_interval=3"]
    if stage == "pretrain":
        write_pretrain(data)
    else:
        write_pretrain(tmp_path / "text.jsonl")
        run_stage("pretrain", f"--data_path={tmp_path / 'text.jsonl'}", f"--save_dir={tmp_path}", "--max_steps=2")
        write_sft(data)
        flags.append(f"--from_weight={tmp_path / 'pretrain_32.pth'}")
    whole, parts = train_twice(stage, tmp_path, stop_at, [2, 5, 6], *flags)
    assert same(whole, parts)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler")
def test_compiled_runs_continue_bit_for_bit(tmp_path, stop_at):
    write_pretrain(tmp_path / "data.jsonl")
    flags = [f"--data_path={tmp_path / 'data.jsonl'}", "--max_steps=8", "--batch_size=4", "--compile=on"]
    whole, parts = train_twice("pretrain", tmp_path, stop_at, [3], *flags)
    assert same(whole, parts)


def test_a_broken_state_is_named_and_the_one_before_is_taken(tmp_path, capsys):
    write_pretrain(tmp_path / "data.jsonl")
    flags = [
        f"--data_path={tmp_path / 'data.jsonl'}",
        "--max_steps=6",
        "--batch_size=4",
        "--save_interval=2",
        "--keep_last=2",
        f"--save_dir={tmp_path}",
    ]
    run_stage("pretrain", *flags)
    (newest,) = tmp_path.glob("resume/*/*/step_00000006")
    with open(newest / "weights.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    run_stage("pretrain", *flags, "--from_resume=1")
    said = capsys.readouterr().out
    assert "weights.safetensors is not what was written; trying the one before" in said
    assert "resumed after step 4 of 6" in said


def test_what_a_continued_run_keeps(tmp_path):
    """The lowest validation loss so far, or best/ would get worse weights after every stop; and the examples of a step:
    8 as 4 x 2 before, as 8 x 1 afterwards, whatever --accumulation_steps says."""
    write_sft(tmp_path / "sft.jsonl")
    first = sft_engine(tmp_path, 4, 2, max_steps=4, val_fraction=0.2)
    first.best = 0.25
    first.save()
    second = sft_engine(tmp_path, 8, 2, max_steps=4, val_fraction=0.2, from_resume="auto")
    assert second.best == 0.25 and second.loader.examples_per_step == 8 and len(second.loader.examples(0)) == 8
    with pytest.raises(ValueError, match="--batch_size 3 x 1 processes does not divide the 8 examples of a step") as no:
        sft_engine(tmp_path, 3, 1, max_steps=4, val_fraction=0.2, from_resume="auto")
    assert "; give --batch_size 1 or 2 or 4 or 8, or begin afresh without --from_resume" in str(no.value)


def test_losses_of_two_validation_files_are_not_compared(tmp_path, capsys):
    """A run continued with another --val_path kept best/ at the old file's loss, which the new one may never reach.
    States from before carry no fingerprint, and keep their best loss."""
    write_sft(tmp_path / "sft.jsonl")
    write_sft(tmp_path / "a.jsonl", 8)
    write_sft(tmp_path / "b.jsonl", 9)
    first = sft_engine(tmp_path, 4, 2, max_steps=4, val_path=tmp_path / "a.jsonl")
    first.best = 0.25
    first.save()
    options = dict(max_steps=4, from_resume="auto")
    assert sft_engine(tmp_path, 4, 2, val_path=tmp_path / "a.jsonl", **options).best == 0.25
    said = "the validation data is another: the best loss starts anew"
    assert said not in capsys.readouterr().out
    assert sft_engine(tmp_path, 4, 2, val_path=tmp_path / "b.jsonl", **options).best == float("inf")
    assert said in capsys.readouterr().out
    state = first._state()
    del state["val_data"]
    first._state = lambda: state
    first.save()
    assert sft_engine(tmp_path, 4, 2, val_path=tmp_path / "b.jsonl", **options).best == 0.25


def test_resuming_another_model_is_refused(tmp_path):
    write_pretrain(tmp_path / "data.jsonl")
    flags = [f"--data_path={tmp_path / 'data.jsonl'}", "--max_steps=2", f"--save_dir={tmp_path}"]
    run_stage("pretrain", *flags)
    for changed, said in {
        "--seed=7": "seed was 42, is 7",
        "--optimizer=muon": 'optimizer was "adamw", is "muon"',
        "--val_fraction=0.3": "val_fraction was 0.0, is 0.3",
        "--data_limit=3": "data_limit was 0, is 3",
        "--max_seq_len=20": "max_seq_len was 32, is 20",
    }.items():
        with pytest.raises(ValueError, match=said):
            run_stage("pretrain", *flags, "--from_resume=auto", changed)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_long_validation_does_not_keep_a_signal_waiting(tmp_path, monkeypatch):
    """torchrun kills its processes 30 seconds after it has passed on SIGTERM. A validation that went on for longer lost
    all that was done since the last save."""

    class Signalled(NextToken):
        def __call__(self, model, batch):
            if not engine.model.training:
                validated.append(engine.step)
                if len(validated) == 1:
                    signal.raise_signal(signal.SIGTERM)
            return super().__call__(model, batch)

    monkeypatch.setattr(interrupts, "PATIENCE_SECONDS", 0.0)
    write_sft(tmp_path / "sft.jsonl")
    engine, validated = sft_engine(tmp_path, 2, 1, val_fraction=0.5, max_steps=8, val_interval=2), []
    engine.job.objective = Signalled()
    assert engine.val_loader.steps_per_epoch > 1
    with pytest.raises(SystemExit) as end:
        engine.run()
    assert end.value.code == 143 and validated == [2] and engine.saved_step == 2


def test_a_validation_without_memory_loses_no_save(tmp_path):
    """It comes before the save that is due after the same step, by default always: nothing had ever been saved."""

    class Full(NextToken):
        def __call__(self, model, batch):
            if not engine.model.training and engine.step == 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().__call__(model, batch)

    write_sft(tmp_path / "sft.jsonl")
    for flags, saved in ((dict(save_interval=4), 4), (dict(save_interval=3, val_interval=2), 3)):
        folder = tmp_path / str(saved)
        engine = sft_engine(tmp_path, 2, 1, val_fraction=0.5, max_steps=8, save_dir=folder, **flags)
        engine.job.objective = Full()
        with pytest.raises(ValueError, match="out of memory in the validation.*--accumulation_steps"):
            engine.run()
        (state,) = folder.glob("resume/*/*/step_*")
        assert state.name == f"step_{saved:08d}" and engine.model.training


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_plain_run_with_their_status(number, status, tmp_path):
    write_pretrain(tmp_path / "data.jsonl")
    command = [
        sys.executable,
        "-u",
        ROOT / "trainer" / "train_pretrain.py",
        *FLAGS,
        *SHAPE,
        "--max_steps=100000",
        f"--data_path={tmp_path / 'data.jsonl'}",
        f"--save_dir={tmp_path}",
    ]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for line in process.stdout:
        if line.startswith("step 4/"):
            process.send_signal(number)
            break
    said = process.stdout.read()
    assert process.wait(60) == status
    assert "everything is saved" in said
    assert (tmp_path / "pretrain_32.pth").is_file() and list(tmp_path.glob("resume/*/*/step_*/manifest.json"))


# ---- a step that is not finite


@pytest.mark.parametrize("where", ("loss", "gradient"))
@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_a_bad_step_changes_nothing(where, optimizer, tmp_path, monkeypatch):
    write_sft(tmp_path / "sft.jsonl")
    engine = sft_engine(tmp_path, 8, 1, optimizer=optimizer, max_steps=4, save_interval=1)
    objective = engine.job.objective
    before = {}

    class Bad:
        count = objective.count

        def __call__(self, model, batch):
            loss, metrics = objective(model, batch)
            if engine.step == 2:
                before.update({n: p.detach().clone() for n, p in engine.model.named_parameters()})
                if where == "loss":
                    return loss, {"loss": metrics["loss"] * float("inf")}
                loss = loss + engine.model.model.norm.weight.sum() * float("nan")
            return loss, metrics

    engine.job.objective = Bad()
    with pytest.raises(ValueError, match="not finite at step 3"):
        engine.run()
    assert same(before, dict(engine.model.named_parameters()))
    states = engine_module.resume.optimizer_tensors(engine.model, engine.optimizers)
    assert all(torch.isfinite(tensor).all() for tensor in states.values())
    saved = sorted(path.name for path in tmp_path.glob("out/resume/*/*/step_*"))
    assert saved == ["step_00000001", "step_00000002"]


# ---- optimisers and schedules


def test_learning_rate_by_hand():
    """10 steps, 2 of warm-up, peak 1, floor 0.1. wsd falls over the last 40 %: steps 6..9 are at 1 - 0.9 * (1, 2, 3,
    4)/4. cosine: after step 5 half of the fall is done (4 of 8), 0.1 + 0.9 * 0.5."""
    rates = lambda schedule: [learning_rate(s, 10, peak=1, warmup=2, schedule=schedule, floor=0.1) for s in range(10)]
    assert rates("wsd") == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1])
    assert rates("constant") == [0.5] + [1] * 9
    cosine = rates("cosine")
    assert cosine[:2] == [0.5, 1] and cosine[5] == pytest.approx(0.55) and cosine[9] == pytest.approx(0.1)
    assert learning_rate(2, 100, peak=1, warmup=0.03, schedule="cosine", floor=0) == 1  # a share: 3 steps


def test_muon_equals_torchs():
    torch.manual_seed(0)
    start = [torch.randn(24, 40), torch.randn(40, 24), torch.randn(24, 40)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(3)]
    results = []
    for make in (
        lambda ps: Muon(ps, weight_decay=0.1),
        lambda ps: torch.optim.Muon(ps, weight_decay=0.1, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"),
    ):
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = make(parameters)
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        for step in gradients:
            for p, g in zip(parameters, step):
                p.grad = g.clone()
            optimizer.step()
        results.append(parameters)
    for p, ours, theirs in zip(start, *results):
        moved = (theirs - p).norm()
        assert (ours - theirs).norm() / moved < 0.05  # both iterate in bf16, in another order


def test_muons_momentum_where_the_host_does_not_wait_for_the_check():
    """A GPU computes on, whatever the check says. A bad step leaves the buffer as it was, also where the gradient is
    NaN; a good one adds as if there were no check: 0.5 * 2 + 4 = 5, and 4 + 0.5 * 5 = 6.5 is the update."""
    p = torch.nn.Parameter(torch.zeros(1, 2))
    muon = Muon([p])
    for bad, gradient, buffer in ((1.0, float("nan"), 2.0), (0.0, 4.0, 5.0), (None, 4.0, 5.0)):
        muon.state[p]["momentum_buffer"] = torch.full((1, 2), 2.0)
        p.grad = torch.full((1, 2), gradient)
        (update,) = muon._momentum([p], 0.5, None if bad is None else torch.tensor(bad))
        assert muon.state[p]["momentum_buffer"].tolist() == [[buffer] * 2]
        if not bad:
            assert update.tolist() == [[6.5] * 2]


def test_orthogonalised_matrices_have_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalise(torch.randn(2, 20, 50)).float())
    assert 0.6 < values.min() and values.max() < 1.3


def test_what_decays_and_what_muon_moves():
    from model.config import ModelConfig
    from model.transformer import CausalLM

    model = CausalLM(
        ModelConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_bias=True,
        )
    )
    names = {p: n for n, p in model.named_parameters()}
    (adamw,) = build_optimizers(model, "adamw", 0.1)
    decayed, free = ([names[p] for p in group["params"]] for group in adamw.param_groups)
    assert len(decayed) == 7 and all(name.endswith("proj.weight") for name in decayed)
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"} <= set(free)
    muon, rest = build_optimizers(model, "muon", 0.1)
    assert [names[p] for p in muon.param_groups[0]["params"]] == decayed
    assert [names[p] for p in rest.param_groups[0]["params"]] == free


def test_rates_beside_muon_by_hand():
    """The rest learns at four times the rate. AdamW alone has one rate."""
    layer = torch.nn.Linear(2, 2)
    muon, rest = build_optimizers(layer, "muon", 0.1)
    set_rates([muon, rest], 0.01)
    assert (muon.param_groups[0]["lr"], rest.param_groups[0]["lr"]) == (0.01, 0.04)
    (adamw,) = build_optimizers(layer, "adamw", 0.1)
    set_rates([adamw], 0.01)
    assert [group["lr"] for group in adamw.param_groups] == [0.01, 0.01]


def test_small_gradients_beside_muon_by_hand():
    """AdamW's first step is g / (|g| + eps). A gradient of 1e-7, of a token that the text lacks, moves its embedding by
    1/11 of the rate beside Muon, and by 10/11 under AdamW alone."""
    for name, share in (("muon", 1 / 11), ("adamw", 10 / 11)):
        layer = torch.nn.Linear(2, 2)
        before, optimizers = layer.bias.detach().clone(), build_optimizers(layer, name, 0.0)
        set_rates(optimizers, 0.1)
        layer.bias.grad = torch.full((2,), 1e-7)
        optimizers[-1].step()
        rate = optimizers[-1].param_groups[-1]["lr"]
        torch.testing.assert_close(before - layer.bias, torch.full((2,), share * rate))


def test_clipping_by_hand():
    """Gradients (3, 0) and (0, 4), scaled by 2: the norm is 5 after unscaling to (1.5, 2) ... 2.5; limit 1 leaves 0.6,
    0.8."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    norm, bad = clip_and_check(parameters, 1.0, 2.0, torch.tensor(True))
    assert norm.item() == pytest.approx(2.5) and bad.item() == 0
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.0, 0.8]))
    assert clip_and_check(parameters, 1.0, 1.0, torch.tensor(False))[1].item() == 1  # the loss was not finite
    # a norm of 1 under a limit of 9, or without a limit: only the scale of 2 is taken out
    for limit in (9.0, 0.0):
        parameters[0].grad, parameters[1].grad = torch.tensor([1.2, 0.0]), torch.tensor([0.0, 1.6])
        clip_and_check(parameters, limit, 2.0, torch.tensor(True))
        torch.testing.assert_close(parameters[1].grad, torch.tensor([0.0, 0.8]))


# ---- what a run leaves behind


def test_weights_know_where_they_come_from(tmp_path):
    from model.checkpoint import load_weights

    write_pretrain(tmp_path / "text.jsonl")
    write_sft(tmp_path / "sft.jsonl")
    out = [f"--save_dir={tmp_path}", "--max_steps=4", "--val_fraction=0.1", "--save_interval=2"]
    run_stage("pretrain", f"--data_path={tmp_path / 'text.jsonl'}", *out)
    run_stage("full_sft", f"--data_path={tmp_path / 'sft.jsonl'}", *out)
    parent, child = (load_weights(tmp_path / f"{name}_32.pth") for name in ("pretrain", "full_sft"))
    assert [entry["stage"] for entry in child.lineage] == ["pretrain", "full_sft"]
    assert child.lineage[1]["parent"] == parent.hash
    assert child.lineage[1]["steps"] == 4 and {"loss", "val_loss", "val_bpb"} <= child.lineage[1]["losses"].keys()
    assert child.tokenizer["path"] == "tokenizer"  # relative: a clone can be moved
    assert (tmp_path / "best" / "full_sft_32.pth").is_file()
    (run,) = tmp_path.glob("runs/full_sft*")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and (run / "loss.png").is_file()


def test_bits_per_byte_by_hand(tmp_path):
    """Every logit 0: each target costs ln V, so bits per byte = targets * log2(V) / their bytes."""
    write_sft(tmp_path / "sft.jsonl")
    engine = sft_engine(tmp_path, 8, 1, val_fraction=0.2)
    torch.nn.init.zeros_(engine.model.model.norm.weight)
    figures = engine.validate()
    data, table = engine.job.data.val, engine.job.tokenizer.token_bytes
    targets = [t for i in range(len(data)) for t, yes in zip(data.tokens(i)[1:], data.trained(i)[1:]) if yes]
    assert figures["val_loss"] == pytest.approx(math.log(len(table)), rel=1e-4)
    assert figures["val_bpb"] == pytest.approx(len(targets) * math.log2(len(table)) / table[targets].sum(), rel=1e-4)


FAULTS = """
import resource, sys
sys.path[0] = sys.argv[1]
import torch
from model.precision import keep_freed_memory
def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(megabytes << 20, dtype=torch.uint8).fill_(1)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * 4096 / 20 / (megabytes << 20)
without = faults(20)
keep_freed_memory()
faults(20)
print(without > 0.05, faults(20) < 0.1, faults(100) > 0.9)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's way of giving memory back")
def test_freed_memory_is_used_again_but_not_that_of_large_blocks():
    """Shares of a block's pages that are new each time. Of large blocks glibc would keep eight copies: they go back."""
    done = subprocess.run([sys.executable, "-c", FAULTS, str(ROOT)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 3
