"""What is prepared for generation computes what it computed before."""

import copy
import re
import sys

import pytest
import torch

from common.console import UserError
from model import cards
from model.layers import RMSNorm
from model.lora import LoRASettings, add_lora
from model.precision import fast_fp32_training, has_bf16, pick_device, pick_dtype, prepare_for_inference
from tests.helpers.models import TINY_TOKENS, tiny_model


@pytest.mark.parametrize(
    "changes", [{}, dict(attention_bias=True), dict(qk_norm=True), dict(num_key_value_heads=1), dict(num_experts=4)]
)
def test_joined_projections_change_nothing(changes):
    """One product with the stacked weights of q, k and v is three products; the numbers of heads say where they end.
    Biases are random here, as all parameters are."""
    model = tiny_model(**changes)
    expected = model(TINY_TOKENS).logits
    joined = prepare_for_inference(copy.deepcopy(model), torch.float32)
    assert joined.num_parameters() == model.num_parameters()
    block = joined.model.layers[1]
    assert block.self_attn.qkv_proj is not None and ("num_experts" in changes or block.mlp.gate_up_proj is not None)
    before, after = model.state_dict(), joined.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    with torch.inference_mode():
        torch.testing.assert_close(joined(TINY_TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
        alone = model(TINY_TOKENS[:1, :1]).logits  # one token: q and k are turned at once, and a norm is one operation
        torch.testing.assert_close(joined(TINY_TOKENS[:1, :1]).logits, alone, rtol=1e-5, atol=1e-5)


def test_on_gpus_a_norm_of_generation_is_one_operation_in_half_precision(monkeypatch):
    """`meta` stands in for the card. In training, whose weights are fp32, nothing is rounded."""
    asked, rms_norm = [], torch.nn.functional.rms_norm
    note = lambda x, shape, weight, eps: asked.append((x.dtype, weight.dtype)) or rms_norm(x, shape, weight, eps)
    monkeypatch.setattr(torch.nn.functional, "rms_norm", note)
    norm = prepare_for_inference(tiny_model(), torch.bfloat16).model.norm
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(rms_norm(x, norm.rounded.shape, norm.rounded, norm.eps), norm(x), rtol=2e-2, atol=0)
    norm, x = norm.to("meta"), x.to("meta")
    with torch.inference_mode():
        norm(x)
    with torch.no_grad():
        norm(x)
    assert asked == [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_norm_of_one_token_by_hand(dtype):
    """The mean square of (3, 4) is 12.5; with 12.5 added, x is divided by 5, and the weights are 1 and 2. Two tokens,
    which torch's rms_norm computes, get the same."""
    norm = RMSNorm(2, eps=12.5)
    norm.weight.data = torch.tensor([1.0, 2.0])
    norm.twice = norm.weight.detach().repeat(2)
    x = torch.tensor([[3.0, 4.0]], dtype=dtype)
    with torch.inference_mode():
        expected = torch.tensor([[0.6, 1.6]]).to(dtype)
        torch.testing.assert_close(norm(x), expected)
        torch.testing.assert_close(norm(x.repeat(2, 1)), expected.repeat(2, 1))


def test_layers_with_adapters_stay_single():
    """Only q has an adapter here: then k and v stay single too. Gate and up are joined."""
    model = tiny_model()
    add_lora(model, LoRASettings(targets=("q_proj",)))
    prepare_for_inference(model, torch.float32)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert attention.qkv_proj is None and attention.k_proj is not None and mlp.gate_up_proj is not None


@pytest.mark.parametrize(
    ("name", "amx", "avx512_bf16", "faster"),
    [
        ("Intel Xeon", True, True, True),
        ("Intel Xeon", False, True, False),  # a cloud that hides AMX: 172 GFLOP/s in bf16, 240 to 310 in fp32
        ("AMD EPYC 9654", False, True, True),  # Zen 4: 411 and 194
        ("AMD EPYC 7763", False, False, False),
        (None, False, True, True),  # older torch does not say
    ],
)
def test_bf16_is_taken_where_it_is_faster(name, amx, avx512_bf16, faster, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name} if name else {}, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    cpu, dtype = torch.device("cpu"), torch.bfloat16 if faster else torch.float32
    assert has_bf16(cpu) == faster and pick_dtype("auto", cpu) == (dtype, "")
    assert pick_dtype("bfloat16", cpu) == (torch.bfloat16, ""), "for its memory"
    model = prepare_for_inference(tiny_model(), torch.bfloat16)
    assert model.lm_head.by_vector == faster, "where F.linear is slow, so is torch.mv"
    x = torch.randn(1, 1, 24).bfloat16()
    torch.testing.assert_close(model.lm_head(x), torch.nn.functional.linear(x, model.lm_head.weight))


@pytest.mark.parametrize(
    "cpu",
    (
        dict(cpu_name="AMD EPYC 9654", avx512_f=True),  # Zen 4: not measured
        dict(cpu_name="Intel Xeon", avx512_f=True, avx512_vp2intersect=True),  # MKL's home
        dict(cpu_name="AMD of the future", avx512_vp2intersect=True, amx_tile=True),  # there oneDNN would round to bf16
    ),
)
def test_other_processors_keep_torchs_products(cpu, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert not fast_fp32_training() and torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("rows", (1, 64, 2048))
def test_fast_fp32_training_rounds_nothing(rows):
    """The setting behind it permits bf16, whose products of 512 terms are off by 0.1. Where it is made, no processor
    may make use of that: forward, backward and batched products stay as exact as fp32 is."""
    torch.manual_seed(0)
    x, w, g = torch.randn(rows, 512), torch.randn(512, 384), torch.randn(rows, 384)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        fast_fp32_training()
        found = [x @ w, g @ w.mT, x.mT @ g, torch.bmm(x.expand(4, rows, 512), w.expand(4, 512, 384))[3]]
    finally:
        matmul.fp32_precision = before
    X, W, G = x.double(), w.double(), g.double()
    for product, exact in zip(found, (X @ W, G @ W.mT, X.mT @ G, X @ W)):
        assert (product - exact).abs().max() < 1e-3
    assert (x.bfloat16() @ w.bfloat16() - X @ W).abs().max() > 1e-2, "what would be noticed"


def test_the_card_itself_is_asked_for_bf16(monkeypatch):
    """A T4 beside a 3060: `--device cuda:1` took what the first card has, the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(7, 5), (8, 6)][device.index])
    t4, rtx3060 = torch.device("cuda", 0), torch.device("cuda", 1)
    assert pick_dtype("auto", t4) == (torch.float16, "") and pick_dtype("auto", rtx3060) == (torch.bfloat16, "")


@pytest.mark.parametrize(
    ("name", "rank", "cards", "said"),
    (
        ("cuda:1", 0, 1, "cuda:1: this machine has 1, counted from 0"),
        ("auto", 2, 2, "cuda:2: this machine has 2, counted from 0"),
        ("cuda", 1, 1, "LOCAL_RANK=1, but this process sees one card: .* has to set LOCAL_RANK=0"),  # srun's may
        ("auto", 1, 1, "LOCAL_RANK=1, but this process sees one card"),
    ),
)
def test_a_card_that_is_not_there(name, rank, cards, said, monkeypatch):
    """It ended in torch's traceback. A launcher starts as many processes as it is told, whatever the machine has."""
    for what, value in dict(is_available=True, current_accelerator=torch.device("cuda"), device_count=cards).items():
        monkeypatch.setattr(torch.accelerator, what, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])  # a build for CUDA would ask the missing card
    assert pick_device("cuda") == pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(UserError, match=said):
        pick_device(name, rank)


def machine(monkeypatch, *, cuda, driver, capability=None, kernels=()):
    """cuda: of the build of torch. driver: its (cards, version). capability: of the one card that torch sees."""
    there = capability is not None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda") if there else None)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: int(there))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu" if cuda is None else "2.13.0+cu130")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(kernels))
    monkeypatch.setattr(cards, "_driver", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cards.note_once.cache_clear()


@pytest.mark.parametrize(
    ("cuda", "driver", "message"),
    (
        (None, (1, 13000), r"torch 2.13.0\+cpu is built without CUDA.*pip install torch==2.13.0\+cu130 --index-url"),
        ("13.0", (1, 12040), r"torch for CUDA 13.0 cannot use the NVIDIA card, whose driver knows CUDA up to 12.4"),
    ),
)
def test_a_card_that_torch_cannot_use_is_said(cuda, driver, message, monkeypatch, capsys):
    """A run trained on the CPU without a word, and --device cuda said that the machine or the build has none."""
    machine(monkeypatch, cuda=cuda, driver=driver)
    assert pick_device("auto") == pick_device("auto") == torch.device("cpu")
    said = capsys.readouterr().err
    assert re.match("computing on the CPU: " + message, said) and said.count("\n") == 1, "once"
    with pytest.raises(UserError, match="--device cuda: " + message + ".*; use --device cpu"):
        pick_device("cuda")


def test_why_no_card_is_found(monkeypatch, capsys):
    machine(monkeypatch, cuda="13.0", driver=(0, 0))
    with pytest.raises(UserError, match="torch finds no card; if there is one, see with nvidia-smi"):
        pick_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="no card is visible with CUDA_VISIBLE_DEVICES=; use --device cpu"):
        pick_device("cuda:0")
    assert pick_device("auto") == torch.device("cpu") and capsys.readouterr().err == "", "a laptop without a card"
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(UserError, match="--device npu: needs torch_npu"):
        pick_device("npu")


CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize(
    ("capability", "kernels", "message"),
    (
        ((6, 1), CU130, r"capability 6.1; pip install torch==2.13.0\+cu126 .*/cu126 has it for cards from 5.0"),
        ((12, 0), ("sm_80", "sm_90"), "capability 12.0; install a newer build"),
        ((12, 0), ("sm_80", "compute_90"), ""),  # translated when it is loaded
        ((8, 9), CU130, ""),  # runs the code of 8.6
        ((7, 5), CU130, ""),
        ((9, 0), ("sm_90a",), ""),
        ((8, 0), ("sm_86",), "capability 8.0"),
    ),
)
def test_a_card_that_this_torch_has_no_code_for(capability, kernels, message, monkeypatch, capsys):
    """A GTX 1080 Ti under a build for CUDA 13 ended in "no kernel image is available", with a traceback."""
    machine(monkeypatch, cuda="13.0", driver=(1, 13000), capability=capability, kernels=kernels)
    if not message:
        assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:0")
        return
    with pytest.raises(UserError, match="--device cuda: torch .* has no code for cards of " + message):
        pick_device("cuda")
    assert pick_device("auto") == torch.device("cpu")
    assert re.match("computing on the CPU: torch .* has no code for cards of " + message, capsys.readouterr().err)
