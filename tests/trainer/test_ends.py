"""How a run ends that does not end by itself: a second signal, the launcher's echo of the first, no memory, no peer."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from common.files import ROOT
from model.config import ModelConfig
from model.cost import batch_bytes
from model.transformer import CausalLM
from trainer import run_stage
from trainer.inputs import build_parent
from trainer.loop import interrupts, processes
from trainer.loop.interrupts import explained, memory_advice

CONFIG = SimpleNamespace(batch_size=6, accumulation_steps=2, max_seq_len=100, optimizer="adamw", ddp_timeout=30)
CONFIG.zero_stage, CONFIG.zero_offload = None, "none"
TWICE = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from trainer.loop import interrupts as ends
ends.DUPLICATE_SIGNAL_SECONDS = float(sys.argv[2])
with ends.catch_signals() as received:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)
    print(len(received))
"""


def tiny() -> CausalLM:
    return CausalLM(
        ModelConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
        )
    )


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    "launched, echo, status, said",
    [
        (None, 5, -signal.SIGINT, ""),
        ("TORCHELASTIC_RUN_ID", 5, 0, "2"),
        ("TORCHELASTIC_RUN_ID", 0.1, -signal.SIGINT, ""),
        ("CROSS_SIZE", 5, 0, "2"),
    ],
)
def test_a_second_signal_ends_at_once_but_a_launchers_echo_does_not(launched, echo, status, said):
    """On Ctrl-C a terminal signals torchrun and its processes, and torchrun signals them again: half a save was cut.
    DeepSpeed's launcher does the same, and nothing was saved."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")}
    environment |= {launched: "1"} if launched else {}
    done = subprocess.run(
        [sys.executable, "-c", TWICE, str(ROOT), str(echo)], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == said and (done.returncode == status or status and done.returncode == 130)


def test_out_of_memory_says_what_trains_the_same_in_less():
    """6 rows: the largest smaller batch that divides them is 3, twice as often. A row of 100 tokens by hand: 2 layers
    of 8 x 16 + 2 x 1 x 8 + 3 x 32 = 240 numbers, and 50 logits twice, 4 bytes each: 100 x (2 x 240 + 100) x 4."""
    model = tiny()
    assert batch_bytes(model.config, 1, 100, 4) == 100 * (2 * 240 + 100) * 4
    with pytest.raises(ValueError, match="out of memory.*--batch_size 3 --accumulation_steps 4 trains the same"):
        with explained(CONFIG, model, 1):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")
    with pytest.raises(ValueError, match="out of memory"), explained(CONFIG, model, 1):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    one = SimpleNamespace(**{**vars(CONFIG), "batch_size": 1})
    assert "--batch_size" not in memory_advice(one, model) and "--max_seq_len" in memory_advice(one, model)


def test_the_advice_is_one_that_can_help(monkeypatch):
    """On a card of 2 GiB, 32 rows of which 4 fit: the advice was 16, then 8, then 4. A plan that had tried one row
    advised 16, fp16 was to become bf16, and weights that do not fit were to be trained in smaller batches."""
    model = tiny()
    of_one = batch_bytes(model.config, 1, 100, 4)
    fixed = 16 * model.num_parameters()
    config = SimpleNamespace(**{**vars(CONFIG), "batch_size": 32, "accumulation_steps": 1})
    for rows, advice in ((4, "--batch_size 4 --accumulation_steps 8 "), (8, "--batch_size 8 --accumulation_steps 4 ")):
        monkeypatch.setattr(interrupts, "_memory_of", lambda _, rows=rows: fixed + 1.35 * rows * of_one)
        assert advice in memory_advice(config, model)
    said = memory_advice(config, model, tried=1)
    assert "what one row of 100 tokens" in said and "--batch_size" not in said
    assert "--activation_checkpointing" in said and "--dtype" not in said
    monkeypatch.setattr(interrupts, "_memory_of", lambda _: fixed - 1)
    assert "--batch_size" not in memory_advice(config, model) and "--use_lora" in memory_advice(config, model)
    monkeypatch.setattr(interrupts, "_memory_of", lambda _: fixed * 1000)
    model.compute_dtype, model.recompute = torch.float16, True
    assert "--dtype" not in memory_advice(config, model) and "--activation" not in memory_advice(config, model)
    model.compute_dtype = torch.float32
    assert "--dtype bfloat16" in memory_advice(config, model)
    monkeypatch.setattr(interrupts, "_knows_bf16", lambda _: False)
    assert "--dtype float16" in memory_advice(config, model)


def test_under_zero_a_process_needs_its_share(monkeypatch):
    """ZeRO-3's weights have no elements while they are divided: they were said to take 0 MiB. And weights that two
    cards hold together were said to be too large."""
    model, world = tiny(), 2
    size = 4 * model.num_parameters()
    monkeypatch.setattr(interrupts, "_memory_of", lambda _: 4 * size - 1)
    said = memory_advice(CONFIG, model, world=world)
    assert "is more than the device has: --zero_stage 3, which divides it" in said
    muon = SimpleNamespace(**{**vars(CONFIG), "optimizer": "muon"})  # which DeepSpeed cannot divide
    monkeypatch.setattr(interrupts, "_memory_of", lambda _: 0)
    assert "--zero_stage" not in memory_advice(muon, model, world=world)
    config = SimpleNamespace(**{**vars(CONFIG), "zero_stage": 3})
    monkeypatch.setattr(interrupts, "_memory_of", lambda _: 1e12)
    divided = interrupts._gib(5 * size // world)
    assert f"moments take {divided}," in memory_advice(config, model, world=world)
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert f"moments take {divided}," in memory_advice(config, model, world=world)


def test_main_memory_is_not_the_cards(monkeypatch):
    """A save copies weights and moments to main memory. Where that was full, a smaller batch was advised."""
    full = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    for error in (full, MemoryError()):
        with (
            pytest.raises(ValueError, match="the machine's main memory is full"),
            explained(CONFIG, tiny().to("meta"), 1),
        ):
            raise error


def test_a_failure_of_nccl_is_not_blamed_on_the_others():
    """Both processes said that the other one had ended, whose message would say why."""
    text = """NCCL error in: /pytorch/NCCLUtils.cpp:94, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL 2.28
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 5000"""
    with pytest.raises(ValueError, match="NCCL, by which .* failed: Duplicate GPU detected : rank 1 and rank 0 both"):
        with explained(CONFIG, tiny(), 2):
            raise torch.distributed.DistBackendError(text)
    gone = text.replace("ncclInvalidUsage", "ncclRemoteError")
    with pytest.raises(ValueError, match="another process of this run has ended"), explained(CONFIG, tiny(), 2):
        raise torch.distributed.DistBackendError(gone)


def test_weights_that_do_not_fit_are_explained(monkeypatch):
    """They go to the device before anything else, and the run ended in a traceback."""

    def build(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    config = SimpleNamespace(device="cpu", dtype="auto", trains_adapter=False, bits=None)
    with pytest.raises(ValueError, match="out of memory: the weights of a.pth alone do not fit.*--use_lora"):
        build_parent(config, SimpleNamespace(path="a.pth", build=build))


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes do not fit"), explained(CONFIG, tiny(), 2):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(ValueError, match="another process of this run has ended.*--ddp_timeout 30 seconds"):
        with explained(CONFIG, tiny(), 2):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:23942")


def test_a_dead_process_is_explained_before_the_first_step_too(monkeypatch):
    """A process that died while the others started, or after the last step, left them with a traceback."""
    monkeypatch.setattr(run_stage, "open_model", lambda *_: (None, tiny(), None, ""))
    monkeypatch.setattr(run_stage, "open_data", lambda *_: None)
    monkeypatch.setattr(run_stage, "start", lambda _: nullcontext(SimpleNamespace(rank=0, world=2)))
    config = SimpleNamespace(**vars(CONFIG), seed=1, trains_adapter=False)
    with pytest.raises(ValueError, match="another process of this run has ended"):
        with run_stage.start_stage("pretrain", config, None, kind="pretrain", weights=None):
            raise RuntimeError("Read error [127.0.0.1]:45970: Connection reset by peer")


def test_after_a_restart_the_addresses_of_the_dead_are_not_read(monkeypatch):
    """torchrun's store outlives the processes it restarts. On a busy machine a new process read where its neighbour had
    been, called there for --ddp_timeout seconds, and the restarted run failed in half of the trials."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launcher = dict(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        RANK="0",
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    seen = []
    for restart in ("0", "0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        place = processes._rendezvous(timedelta(seconds=5))
        seen.append(place["store"].check(["address of rank 1"]))
        place["store"].set("address of rank 1", "here")
    assert seen == [False, True, False] and (place["rank"], place["world_size"]) == (0, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # two nodes count their restarts apart: torch's own way
    assert processes._rendezvous(timedelta(seconds=5)) == {}
