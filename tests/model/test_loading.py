"""From files to a model: the same bits as ever, in little more memory than the model, and nothing in part."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.files import ROOT
from model.checkpoint import Checkpoint, hash_of, load_weights, save_weights
from model.config import ModelConfig
from model.export import save_hf
from model.precision import lower_frozen
from model.quant import quantize_model
from model.tensor_files import PIECE, StoredTensors, open_pickled, open_safetensors
from model.transformer import CausalLM
from tests.helpers.models import TINY_TOKENS, tiny_model

KINDS = dict(
    dense={},
    untied=dict(tie_word_embeddings=False, attention_bias=True),
    mixture=dict(num_experts=3, num_shared_experts=1, moe_intermediate_size=16),
)


def hf_directory(folder, model):
    """config.json and model.safetensors of a model."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    save_hf(folder, Checkpoint(folder, state, model.config), folder, stop_ids={2})
    return folder


def assert_same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in other.parameters()]
    with torch.no_grad():
        assert torch.equal(model(TINY_TOKENS).logits, other(TINY_TOKENS).logits)


def test_each_tensor_is_read_once(tmp_path, monkeypatch):
    """Asking whether a name was there read its tensor too: a model was read twice."""
    folder, read = hf_directory(tmp_path / "hf", tiny_model()), []
    pieces = StoredTensors.pieces
    monkeypatch.setattr(StoredTensors, "pieces", lambda self, name, *own: read.append(name) or pieces(self, name, *own))
    model = load_weights(folder).build()
    assert sorted(read) == sorted(name for name in model.state_dict() if name != "lm_head.weight")


# ---- the same bits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", (None, torch.bfloat16, torch.float16, 4, 8), ids=str)
def test_read_into_place_is_the_same_as_converted_afterwards(how, kind, tmp_path):
    plain = tiny_model(**KINDS[kind])
    bits, dtype = (how, torch.bfloat16) if isinstance(how, int) else (None, how)
    path = save_weights(tmp_path / "a.pth", plain, tokenizer={}, lineage=[])
    if dtype:
        plain.requires_grad_(False)
        if bits:
            quantize_model(plain, bits)
        lower_frozen(plain, dtype)
    assert_same(load_weights(path).build(dtype, bits), plain)
    if kind == "dense":
        assert_same(load_weights(hf_directory(tmp_path / "hf", tiny_model())).build(dtype, bits), plain)


def test_trained_weights_are_fp32_whatever_the_file_has(tmp_path):
    folder = hf_directory(tmp_path, tiny_model().bfloat16())
    assert open_safetensors(folder / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    model = load_weights(folder).build()
    assert {p.dtype for p in model.parameters()} == {torch.float32} and all(p.requires_grad for p in model.parameters())
    expected = tiny_model().bfloat16().float()
    expected.reset_rope()
    assert_same(model, expected)


def test_tensors_larger_than_a_piece(tmp_path):
    """Numbers are read and converted a piece at a time; the last piece is shorter."""
    numbers = torch.arange(2 * PIECE + 3, dtype=torch.float32)
    save_file({"x": numbers, "y": numbers[:5].double()}, tmp_path / "a.safetensors")
    torch.save({"x": numbers, "y": numbers[:5].double()}, tmp_path / "a.pth")
    for stored in (StoredTensors(open_safetensors(tmp_path / "a.safetensors")), open_pickled(tmp_path / "a.pth")):
        assert [len(piece) for piece in stored.pieces("x")] == [PIECE, PIECE, 3]
        assert torch.equal(stored["x"], numbers) and torch.equal(stored["y"], numbers[:5].double())
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(2 * PIECE + 3, dtype=dtype)
            stored.read_into("x", out)
            assert torch.equal(out, numbers.to(dtype))
        assert hash_of(stored) == hash_of(dict(x=numbers, y=numbers[:5].double()))
    rows = open_pickled(tmp_path / "a.pth").places["x"][PIECE : PIECE + 4]
    assert StoredTensors({"x": rows})["x"].tolist() == [PIECE, PIECE + 1, PIECE + 2, PIECE + 3]


# ---- memory

MEASURE = """
import ctypes, sys, torch
from model.checkpoint import load_weights

def memory(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))

torch.set_num_threads(1)
load_weights(sys.argv[1] + "/small").build(torch.bfloat16, 4)  # brings the code into memory
assert "sympy" not in sys.modules, "some operations on meta import torch's compiler: 2 to 5 seconds at each start"
for dtype, bits in (torch.bfloat16, 4), (torch.bfloat16, 8), (torch.bfloat16, None), (torch.float32, None):
    ctypes.CDLL(None).malloc_trim(0)  # returns what is free to the system
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = memory("VmRSS")
    load_weights(sys.argv[1]).build(dtype, bits)
    print(memory("VmHWM") - before)
"""
WIDE = dict(vocab_size=1024, hidden_size=1024, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2816)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_the_model_and_one_layer(tmp_path):
    """Before, the tensors of the file, a random model in fp32 and a copy in bf16 were in memory at the same time: 4
    times the model. The model has 46M parameters."""
    with torch.device("meta"):
        model = CausalLM(ModelConfig(**WIDE, num_key_value_heads=2)).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    hf_directory(tmp_path, model)
    hf_directory(tmp_path / "small", tiny_model())
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    four, eight, bf16, fp32 = map(int, run.stdout.split())
    n = model.num_parameters()
    print(bf16 / n, fp32 / n, four / n, eight / n, n)


# ---- nothing in part


def broken(tmp_path, **changes):
    """Weights of the tiny model, where some tensors are others, or left out (None)."""
    state = {name: tensor.clone() for name, tensor in tiny_model().state_dict().items()} | changes
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    return Checkpoint(tmp_path / "a.pth", state, tiny_model().config)


def test_what_does_not_fit_is_named(tmp_path):
    norm, up = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
    every = "a.pth: these weights do not fit the architecture: "
    for changes, message in (
        ({norm: None, up: None}, f"missing: {up}, {norm}"),
        ({"model.norm.bias": torch.zeros(24), "step": torch.zeros(1)}, "unknown: model.norm.bias, step"),
        ({norm: torch.zeros(23)}, rf"{norm} is \(23,\), not \(24,\)"),
        ({up: torch.zeros(24, 40)}, rf"{up} is \(24, 40\), not \(40, 24\)"),
        ({norm: torch.zeros(24, dtype=torch.int8)}, f"{norm} is of type int8"),
        ({"lm_head.weight": torch.zeros(67, 24)}, "lm_head.weight differs from model.embed_tokens.weight, though"),
        ({"lm_head.weight": None, "model.embed_tokens.weight": None}, "missing: model.embed_tokens.weight, lm_head.w"),
    ):
        with pytest.raises(ValueError, match=every + message):
            broken(tmp_path, **changes).build()
    names = {name: None for name in tiny_model().state_dict() if "mlp" in name}
    with pytest.raises(ValueError, match="missing: .*down_proj.weight and 3 more"):
        broken(tmp_path, **names).build()
    for one in ("lm_head.weight", "model.embed_tokens.weight"):  # the other one is enough
        assert_same(broken(tmp_path, **{one: None}).build(), tiny_model())


@pytest.mark.parametrize("value", (float("nan"), -float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("bits", (None, 8))
def test_nan_is_refused_and_named(value, bits, tmp_path):
    """Every answer would be NaN, after minutes of loading and without a word of which tensor it is."""
    model, name = tiny_model(), "model.layers.1.mlp.up_proj.weight"
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    path = save_weights(tmp_path / "a.pth", model, tokenizer={}, lineage=[])
    for source, where in ((path, "a.pth"), (hf_directory(tmp_path, model), "model.safetensors")):
        with pytest.raises(ValueError, match=f"{where}: {name} holds NaN or infinity"):
            load_weights(source).build(torch.bfloat16, bits)
    model.model.layers[1].mlp.up_proj.weight.data[:] = 3e38  # finite, though their sum is not
    load_weights(save_weights(path, model, tokenizer={}, lineage=[])).build()


def test_a_file_that_changes_or_ends_while_it_is_read(tmp_path):
    """A download that goes on, or weights that another run replaces: they would be half of one, half of another."""
    path = hf_directory(tmp_path, tiny_model()) / "model.safetensors"
    checkpoint = load_weights(tmp_path)
    hf_directory(tmp_path, tiny_model())  # the same numbers, but who would know
    with pytest.raises(ValueError, match="model.safetensors: has changed while it was being read"):
        checkpoint.build()
    checkpoint, before = load_weights(tmp_path), path.stat()
    os.truncate(path, before.st_size - 8)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match="model.safetensors: has changed"):
        checkpoint.build()
    with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
        load_weights(tmp_path)


# ---- files of torch.save


class Code:
    def __reduce__(self):
        return (os.mkdir, ("it-was-run",))


def bin_directory(folder, model, shards):
    """A directory as transformers wrote it until 2023, its weights in pickles."""
    state = load_file(hf_directory(folder, model) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names = [f"pytorch_model-{n:05}-of-{shards:05}.bin" for n in range(1, shards + 1)]
    places = {tensor: names[i % shards] for i, tensor in enumerate(sorted(state))}
    for name in names:
        torch.save({tensor: state[tensor] for tensor in state if places[tensor] == name}, folder / name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.mark.parametrize("shards", (1, 3))
def test_bin_files_are_the_same_weights(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model(tie_word_embeddings=False)
    same = load_weights(hf_directory(tmp_path / "safetensors", model))
    folder = bin_directory(tmp_path / "bin", model, shards)
    checkpoint = load_weights(folder)
    assert checkpoint.hash == same.hash
    assert_same(checkpoint.build(), model)
    if shards > 1:
        second = folder / "pytorch_model-00002-of-00003.bin"
        second.rename(tmp_path / "second")
        with pytest.raises(ValueError, match=f"{second.name}: missing, though pytorch_model.bin.index.json names it"):
            load_weights(folder)
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(index.read_text(encoding="utf-8").replace(second.name, "../second"), encoding="utf-8")
        with pytest.raises(ValueError, match="'../second' is not the name of a file beside it"):
            load_weights(folder)
        index.unlink()
        with pytest.raises(ValueError, match=f"{second.name} is missing"):
            load_weights(folder)
    for path in folder.glob("*.bin"):
        torch.save({"model.norm.weight": torch.zeros(24), "x": Code()}, path)
    with pytest.raises(ValueError, match=".bin is missing|refused: it holds code .*mkdir"):
        load_weights(folder)
    assert not (tmp_path / "it-was-run").exists()


def test_old_and_strange_layouts_of_pth_files_are_read_as_a_whole(tmp_path):
    """Their tensors do not lie in the file as plain bytes: read at an offset, they would be other numbers."""
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(6.0).view(2, 3).T, "c": torch.arange(9.0)[3:5]}
    torch.save(state, tmp_path / "new.pth")
    torch.save({**state, "b": state["b"].contiguous()}, tmp_path / "plain.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name, change in (("packed", None), ("turned", b"big")):
        with zipfile.ZipFile(tmp_path / "plain.pth") as source:
            with zipfile.ZipFile(tmp_path / f"{name}.pth", "w") as target:
                for entry in source.infolist():
                    content = source.read(entry)
                    if change and entry.filename.endswith("byteorder"):
                        content = change
                    if change and "/data/" in entry.filename:
                        content = content[::-1]  # of each storage: its bytes and its numbers, too
                    kind = zipfile.ZIP_STORED if change else zipfile.ZIP_DEFLATED
                    target.writestr(entry.filename, content, compress_type=kind)
    for name in ("new", "plain", "old", "packed", "turned"):
        stored = open_pickled(tmp_path / f"{name}.pth")
        in_memory = [isinstance(place, torch.Tensor) for place in stored.places.values()]
        assert all(in_memory) == any(in_memory) == (name != "plain"), name
        for key, tensor in state.items():
            if name != "turned":
                assert torch.equal(stored[key], tensor), (name, key)
    assert open_pickled(tmp_path / "turned.pth")["a"].flatten().tolist() == [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]


def test_other_values_may_stand_beside_tensors(tmp_path):
    content = dict(step=3, model={"a": torch.ones(2)}, loose=torch.full((2,), 7.0), list=[torch.zeros(1), "x"])
    torch.save(content, tmp_path / "a.pth")
    found = open_pickled(tmp_path / "a.pth")
    assert found["step"] == 3 and isinstance(found["model"], StoredTensors) and found["list"][1] == "x"
    assert found["loose"].tolist() == [7.0, 7.0] and found["list"][0].tolist() == [0.0]
    assert found["model"]["a"].tolist() == [1.0, 1.0]
