"""The card that computes nothing (benchmarks/gpu/no_card/): its messages and counts everywhere; the card itself where
torch is a CUDA build and there is no real card."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.no_card import memory, run, summary
from common.console import UserError
from common.files import ROOT

FOLDER = ROOT / "benchmarks" / "gpu" / "no_card"


def fake_torch(folder: Path, monkeypatch, cuda: str | None) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "version.py").write_text(f"__version__ = '2.11.0'\ncuda = {cuda!r}\n")
    monkeypatch.setattr(run, "folders_of", lambda package: [folder / package])


@pytest.mark.parametrize("cuda, message", [(None, "without CUDA"), ("12.8", "for CUDA 12.8")])
def test_refuses_another_build_of_torch(tmp_path, monkeypatch, cuda, message):
    fake_torch(tmp_path, monkeypatch, cuda)
    with pytest.raises(UserError, match=message):
        run.torch_cuda()


def test_refuses_a_machine_with_a_card_and_other_systems(tmp_path, monkeypatch):
    fake_torch(tmp_path, monkeypatch, "13.0")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(run, "real_cards", lambda: 0)
    assert run.check() == "13.0"
    monkeypatch.setattr(run, "real_cards", lambda: 1)
    with pytest.raises(UserError, match="has a real card"):
        run.check()
    monkeypatch.setenv("LD_PRELOAD", "/somewhere/libcuda.so.1")
    with pytest.raises(UserError, match="already runs"):
        run.check()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="needs Linux"):
        run.check()


def test_missing_headers_are_named_with_their_package(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    (second / "crt").mkdir(parents=True)
    first.mkdir()
    with pytest.raises(UserError, match=r"no cuda_runtime_api.h found; pip install nvidia-cuda-runtime==13\.0\.\*"):
        run.header_flags([first, second], "13.0")
    (first / "cuda_runtime_api.h").touch()
    with pytest.raises(UserError, match=r"no crt/host_defines.h found; pip install nvidia-cuda-crt==13\.0\.\*"):
        run.header_flags([first, second], "13.0")
    (second / "crt" / "host_defines.h").touch()
    assert run.header_flags([first, second], "13.0") == [f"-I{first}", "-idirafter", str(second)]


def test_the_capabilities_are_those_of_the_card():
    text = (FOLDER / "device.cpp").read_text(encoding="utf-8")
    assert all(f"    {{{capability.replace('.', ', ')}, " in text for capability in run.CAPABILITIES)


LOG = """\
malloc 0 2097152
copy 0 to-card-pinned 100
copy 0 to-card-pinned 28
kernel 0 cublasGemmEx
kernel 0 triton_per_fused_add_0
kernel 0 _ZN13pytorch_flash16flash_fwd_kernelI23Flash_fwd_kernel_traits
kernel 0 fmha_cutlassF_bf16_aligned_64x64_rf_sm80
kernel 0 _ZN2at6native19cunn_SoftMaxForwardIfffNS1_25LogSoftMaxForwardEpilogueE
kernel 0 _Z20softmax_warp_forwardIfffLi7ELb1ELb0EE
kernel 0 _Z20softmax_warp_forwardIfffLi7ELb0ELb0EE
wait 0 cudaStreamSynchronize
nccl 0 all-reduce 4096
capture 5f end 12
graph 5f 12
broken 5f cudaDeviceSynchronize
"""
COUNTED = {
    "memory: malloc": 1,
    "memory: malloc, bytes": 2097152,
    "copies: to-card-pinned": 2,
    "copies: to-card-pinned, bytes": 128,
    "kernels": 7,
    "kernels: products": 1,
    "kernels: compiled by Triton": 1,
    "attention: flash": 1,
    "attention: mem-efficient": 1,
    "attention: math (softmax)": 1,
    "waits: cudaStreamSynchronize": 1,
    "NCCL: all-reduce": 1,
    "NCCL: all-reduce, bytes": 4096,
    "graphs: captured": 1,
    "graphs: launched": 1,
    "graphs: kernels in them": 12,
    "captures broken by: cudaDeviceSynchronize": 1,
}


def test_a_log_is_counted():
    assert summary.counts(LOG.splitlines(keepends=True)) == COUNTED


def test_two_logs_give_what_a_step_asks(tmp_path, capsys):
    (tmp_path / "one").write_text(LOG)
    (tmp_path / "two").write_text(LOG + 4 * "wait 0 cudaStreamSynchronize\nkernel 0 x\n")
    summary.main([str(tmp_path / "one"), str(tmp_path / "two"), "--steps=2"])
    rows = {line[:46].strip(): line.split()[-3:] for line in capsys.readouterr().out.splitlines()}
    assert rows["waits: cudaStreamSynchronize"] == ["1", "5", "2"] and rows["kernels"] == ["7", "11", "2"]
    assert rows["copies: to-card-pinned, bytes"] == ["128", "128", "0"]


def test_the_largest_batch_that_fits():
    """8 GB less 3 % are 7.23 GiB, less 0.6 of CUDA's 6.63."""
    assert memory.fits(6.62 * 2**30, 8) and not memory.fits(6.63 * 2**30, 8)
    lines = memory.table({"small": {1: 10**9, 2: 9 * 10**9, 4: 10**11}, "full": {1: 10**10}}).splitlines()
    assert lines[2] == "| 8 GB | 1 × 512 | too large |" and lines[3] == "| 12 GB | 2 × 512 | 1 × 1,024 |"


# ---- the card


@functools.cache
def reason() -> str:
    """Why the card cannot be tried here; "": it can."""
    try:
        run.build(run.check())
    except UserError as error:
        return str(error) if "could not be compiled" not in str(error) else ""  # that is a failure
    return ""


@pytest.fixture
def on_card(tmp_path):
    if reason():
        pytest.skip(reason())

    def start(program: str, *flags: str) -> dict:
        """What the program prints last."""
        command = [sys.executable, str(FOLDER / "run.py"), f"--log={tmp_path / 'log'}", *flags, "python", "-c", program]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return start


STEP = """
import json, torch
from model.config import ModelConfig
from model.transformer import CausalLM
before = torch.cuda.is_available()
config = ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=256, intermediate_size=96)
model = CausalLM(config).cuda()
model.compute_dtype = torch.bfloat16
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
tokens = torch.ones(2, 65, dtype=torch.long).pin_memory().cuda(non_blocking=True)
loss = model(tokens[:, :-1], targets=tokens[:, 1:]).loss.mean()
loss.backward()
optimizer.step()
size = torch.cuda.max_memory_allocated()
weights = sum(p.numel() * 4 for p in model.parameters())
print(json.dumps([before, torch.cuda.get_device_capability(), loss.item(), size > 4 * weights, weights > 0,
                  torch.cuda.mem_get_info()[1]]))
"""


def test_a_training_step(on_card, tmp_path):
    assert on_card(STEP, "--capability=8.6", "--gib=24") == [True, [8, 6], 0.0, True, True, 24 << 30]
    found = summary.read(tmp_path / "log")
    assert found["kernels"] > 50 and found["kernels: products"] >= 3 * 2 * 7 and found["attention: flash"] >= 2
    assert found["copies: to-card-pinned, bytes"] == 2 * 65 * 8 and not found["graphs: launched"]


SORT = """
import json, torch
print(json.dumps(torch.rand(4, 6400, device="cuda").sort(descending=True).values.sum().item()))
"""


def test_a_card_that_runs_the_code_of_another(on_card):
    """On the capability 8.9, of which torch has no code of its own, sorting ended in "invalid device function"."""
    assert on_card(SORT, "--capability=8.9") == 0


MESSAGES = """
import json, torch, torch.distributed as dist
card = torch.device("cuda", 1)
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=card)
x = torch.arange(1024, dtype=torch.float32).to(card)
dist.all_reduce(x)
parts = torch.empty(2048, dtype=torch.bfloat16, device=card)
dist.all_gather_into_tensor(parts, torch.ones(2048, dtype=torch.bfloat16).to(card))
dist.all_reduce(x, group=dist.new_group([0]))
print(json.dumps([torch.cuda.device_count(), x.tolist() == list(range(1024)), parts.tolist() == [1.0] * 2048]))
dist.destroy_process_group()
"""


def test_messages_of_several_cards(on_card, tmp_path):
    """What the others send is taken to be what this process sends. A second group, such as DeepSpeed makes, ended in an
    error of NCCL: the real library was asked to split the group of the simulated one."""
    assert on_card(MESSAGES, "--cards=2", "--keep_bytes") == [2, True, True]
    found = summary.read(tmp_path / "log")
    assert found["NCCL: all-reduce"] == 2 and found["NCCL: all-reduce, bytes"] == 2 * 4096
    assert found["NCCL: all-gather, bytes"] == 4096


CAPTURES = """
import json, torch
x = torch.ones(8, device="cuda")
good = torch.cuda.CUDAGraph()
with torch.cuda.graph(good):
    y = x * 2 + 1
good.replay()
def broken(work):
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            work()
    except Exception as error:  # of the end of the capture; before it that of the call inside
        return [str(e).splitlines()[0] for e in (error.__context__, error) if e]
print(json.dumps([y.tolist(), broken(lambda: x.sum().item()), broken(torch.cuda.synchronize), broken(lambda: x + 1)]))
"""


def test_a_capture(on_card, tmp_path):
    """One is replayed; one with a synchronisation inside fails with CUDA's own words."""
    values, item, synchronised, fine = on_card(CAPTURES)
    assert values == [0.0] * 8 and fine is None
    for inside, end in (item, synchronised):
        assert "not permitted when stream is capturing" in inside and "a previous error during capture" in end
    found = summary.read(tmp_path / "log")
    assert found["graphs: captured"] == 4 and found["graphs: launched"] == 1 and found["graphs: kernels in them"] >= 2
    assert found["captures broken by: cudaStreamSynchronize"] == found["captures broken by: cudaDeviceSynchronize"] == 1


RULES = """
import ctypes, json, threading
card = ctypes.CDLL(None)
GLOBAL, THREAD, RELAXED = 0, 1, 2
def stream(flags=1):  # 1: does not wait for the default stream, as torch's
    made = ctypes.c_void_p()
    card.cudaStreamCreateWithPriority(ctypes.byref(made), flags, 0)
    return made
def event():
    made = ctypes.c_void_p()
    card.cudaEventCreateWithFlags(ctypes.byref(made), 2)
    return made
def begin(on, mode=GLOBAL):
    return card.cudaStreamBeginCapture(on, mode)
def end(on):
    return card.cudaStreamEndCapture(on, ctypes.byref(ctypes.c_void_p()))
def malloc():
    return card.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(1))
def work(on):
    return card.cudaLaunchHostFunc(on, ctypes.c_void_p(1), None)  # not run while it is captured
def elsewhere(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start(), thread.join()
    return found[0]
def forked(join, inside=True):
    a, b, fork, back = stream(), stream(), event(), event()
    begin(a)
    card.cudaEventRecord(fork, a), card.cudaStreamWaitEvent(b, fork, 0)
    if inside: work(b)
    card.cudaEventRecord(back, b)
    if join: card.cudaStreamWaitEvent(a, back, 0)
    return [end(a), card.cudaEventQuery(back)]
def malloc_in(mode, run=lambda call: call()):
    a = stream()
    begin(a, mode)
    return [run(malloc), end(a)]
def exchanged(mode, run=lambda call: call()):
    a = stream()
    begin(a)
    def other():
        own = ctypes.c_int(mode)
        card.cudaThreadExchangeStreamCaptureMode(ctypes.byref(own))
        found = malloc()
        card.cudaThreadExchangeStreamCaptureMode(ctypes.byref(own))
        return found
    return [run(other), end(a)]
def asked(call):
    a = stream()
    begin(a, RELAXED)
    return [call(a), end(a)]
def default_stream(flags):
    a = stream(flags)
    begin(a)
    room = ctypes.create_string_buffer(8)
    copied = card.cudaMemcpyAsync(room, ctypes.create_string_buffer(8), ctypes.c_size_t(8), 4, None)
    return [copied, end(a)]
def outside_event():
    a, e = stream(), event()
    card.cudaEventRecord(e, stream())
    begin(a)
    return [card.cudaStreamWaitEvent(a, e, 0), end(a)]
def late():
    a, e = stream(), event()
    begin(a)
    card.cudaEventRecord(e, a)
    return [end(a), card.cudaStreamWaitEvent(stream(), e, 0)]
def merged():
    a, b, e = stream(), stream(), event()
    begin(a), begin(b)
    card.cudaEventRecord(e, a)
    return [card.cudaStreamWaitEvent(b, e, 0), end(a), end(b)]
def ends():
    a, b, e = stream(), stream(), event()
    found = [begin(None), end(a), begin(a), begin(a), elsewhere(lambda: end(a))]
    card.cudaEventRecord(e, a), card.cudaStreamWaitEvent(b, e, 0)
    return found + [end(b), end(a)]
print(json.dumps({
    "joined": forked(True), "not joined": forked(False), "joined without work": forked(False, inside=False),
    "malloc": malloc_in(GLOBAL), "malloc, thread": malloc_in(THREAD), "malloc, relaxed": malloc_in(RELAXED),
    "malloc elsewhere": malloc_in(GLOBAL, elsewhere), "malloc elsewhere, thread": malloc_in(THREAD, elsewhere),
    "exchanged": exchanged(RELAXED), "exchanged, thread": exchanged(THREAD),
    "exchanged elsewhere": exchanged(THREAD, elsewhere), "not exchanged elsewhere": exchanged(GLOBAL, elsewhere),
    "asked": asked(card.cudaStreamQuery), "waited": asked(card.cudaStreamSynchronize),
    "waited for all": asked(lambda stream: elsewhere(card.cudaDeviceSynchronize)),
    "default stream": default_stream(1), "default stream, blocking": default_stream(0),
    "outside event": outside_event(), "late": late(), "merged": merged(), "ends": ends()}))
"""


def test_the_rules_of_captures(on_card):
    """As CUDA's documentation states them: cudaStreamBeginCapture, cudaStreamEndCapture, cudaStreamWaitEvent,
    cudaThreadExchangeStreamCaptureMode, and "Prohibited and Unhandled Operations" in its guide."""
    fine, illegal, unsupported, invalidated, merge, unmatched, unjoined = 0, 401, 900, 901, 902, 903, 904
    isolation, implicit, captured, wrong_thread = 905, 906, 907, 908
    assert on_card(RULES) == {
        "joined": [fine, captured],
        "not joined": [unjoined, captured],
        "joined without work": [fine, captured],
        "malloc": [unsupported, invalidated],
        "malloc, thread": [unsupported, invalidated],
        "malloc, relaxed": [fine, fine],
        "malloc elsewhere": [unsupported, invalidated],
        "malloc elsewhere, thread": [fine, fine],
        "exchanged": [fine, fine],
        "exchanged, thread": [unsupported, invalidated],
        "exchanged elsewhere": [fine, fine],
        "not exchanged elsewhere": [unsupported, invalidated],
        "asked": [unsupported, invalidated],
        "waited": [unsupported, invalidated],
        "waited for all": [unsupported, invalidated],
        "default stream": [fine, fine],
        "default stream, blocking": [implicit, invalidated],
        "outside event": [isolation, invalidated],
        "late": [fine, captured],
        "merged": [merge, invalidated, invalidated],
        "ends": [unsupported, illegal, fine, illegal, wrong_thread, unmatched, invalidated],
    }


LIMITS = """
import ctypes, json, torch
card = ctypes.CDLL(None)
function, big = ctypes.c_void_p(), 227 << 10
card.cuModuleGetFunction(ctypes.byref(function), None, b"mine")
def launch(gx, gy, bx, shared=0):
    return card.cuLaunchKernel(function, gx, gy, 1, bx, 1, 1, shared, None, None, None)
found = [launch(1, 1, 1024), launch(0, 1, 1), launch(1, 65536, 1), launch(1, 1, 1025), launch(1, 1, 1, big)]
allow = lambda size: card.cuFuncSetAttribute(function, 8, size)
found += [allow(big), launch(1, 1, 1, big), allow(big + 1)]
try:
    torch.empty(3 << 30, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    found.append("memory")
print(json.dumps(found))
"""


def test_what_is_too_large_is_refused(on_card):
    assert on_card(LIMITS, "--gib=2") == [0, 9, 9, 9, 1, 0, 0, 1, "memory"]


def test_zeros_are_read_or_the_bytes_that_were_copied(on_card):
    program = "import torch; print(torch.arange(1, 4).cuda().clone().tolist())"
    assert on_card(program) == [0, 0, 0] and on_card(program, "--keep_bytes") == [1, 2, 3]


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs torch without CUDA")
def test_the_command_says_why_it_refuses():
    done = subprocess.run([sys.executable, str(FOLDER / "run.py"), "true"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
