"""Adapters against peft's arithmetic and gradients, and what must not change: the base, to the last bit."""

import json
import shutil

import pytest
import torch

from common.console import UserError
from model.adapter import AdapterFile, find_base, load_adapter, save_adapter
from model.checkpoint import load_weights, same_weights, save_weights
from model.export import write_peft
from model.interop.minimind import config_from_minimind
from model.lora import (
    LoRALinear,
    LoRASettings,
    activate,
    adapted,
    adapter_disabled,
    add_lora,
    find_targets,
    freeze,
    lora_state,
    merge,
    remove_lora,
    unmerge,
)
from model.precision import lower_frozen
from model.transformer import CausalLM
from tests.helpers.models import TINY_TOKENS as TOKENS
from tests.helpers.models import tiny_model


def base(**changes) -> CausalLM:
    model = tiny_model(**changes)
    freeze(model)
    return model


RANK4 = LoRASettings(rank=4)


def with_adapter(settings=RANK4, **changes) -> CausalLM:
    """A model whose adapter has already learned something: B is not zero."""
    model = base(**changes)
    add_lora(model, settings)
    stir(model)
    return model


def stir(model, name="default"):
    for layer in adapted(model).values():
        if name in layer.adapters:
            torch.nn.init.normal_(layer.adapters[name].B, std=0.3)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


def test_the_base_is_the_same_tensors_with_the_same_config(tmp_path):
    """A base with another rope_theta was accepted, and every answer was a little off."""
    about = dict(tokenizer={}, lineage=[])
    path, other = tmp_path / "base_24.pth", tmp_path / "other_24.pth"
    parent = load_weights(save_weights(path, base(), **about))
    save_weights(other, base(rope_theta=500.0), **about)
    settings = LoRASettings(rank=2)
    for hash in (parent.hash, parent.hash.partition(".")[0]):  # the second is what version 0.1.0 recorded
        file = save_adapter(
            tmp_path / f"lora_{len(hash)}.pth",
            with_adapter(settings),
            settings,
            base=dict(path="gone", hash=hash),
            **about,
        )
        adapter = load_adapter(file)
        assert find_base(adapter, path).path == path and find_base(adapter, None, tmp_path).hash == parent.hash
        if "." in hash:
            with pytest.raises(ValueError, match="the same numbers with another config: rope_theta was .*is 500.0"):
                find_base(adapter, other)
    with pytest.raises(ValueError, match=r"was trained on gone \(\w{12}\), not on .*_24.pth \(\w{12}\)"):
        save_weights(other, base(vocab_size=90), **about)
        find_base(adapter, other)


def test_only_the_right_file_is_read_as_a_whole(tmp_path, monkeypatch):
    """The base was renamed. Among ten other weights it is found by the hashes that stand in the files."""
    about, settings = dict(tokenizer={}, lineage=[]), LoRASettings(rank=2)
    for n in range(10):
        other = base()
        torch.nn.init.constant_(other.model.norm.weight, n)
        save_weights(tmp_path / f"other{n}_24.pth", other, **about)
    parent = load_weights(save_weights(tmp_path / "renamed_24.pth", base(), **about))
    adapter = load_adapter(
        save_adapter(
            tmp_path / "lora/a_24.pth",
            with_adapter(settings),
            settings,
            base=dict(path="gone", hash=parent.hash),
            **about,
        )
    )
    read = []
    monkeypatch.setattr("model.adapter.load_weights", lambda path: read.append(path.name) or load_weights(path))
    assert find_base(adapter, None, tmp_path).path.name == "renamed_24.pth" and read == ["renamed_24.pth"]


def test_the_base_is_found_under_any_name(tmp_path, monkeypatch):
    """Only names with the width in them were looked at. Those still come first; what lies beside is no trouble."""
    about, settings = dict(tokenizer={}, lineage=[]), LoRASettings(rank=2)
    parent = load_weights(save_weights(tmp_path / "best" / "base.pth", base(), **about))
    recorded = dict(path=str(tmp_path / "gone_24.pth"), hash=parent.hash)
    adapter = load_adapter(save_adapter(tmp_path / "a.pth", with_adapter(settings), settings, base=recorded, **about))
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"sha256": "ab", "x": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "damaged.pth").write_bytes(b"PK")
    torch.save(base(hidden_size=48).state_dict(), tmp_path / "bare.pth")  # has no hash: its width tells
    hashed = []
    monkeypatch.setattr("model.adapter.same_weights", lambda *two: hashed.append(two[0]) or same_weights(*two))
    assert find_base(adapter, None, tmp_path).path == tmp_path / "best" / "base.pth" and hashed == [parent.hash]
    shutil.copyfile(tmp_path / "best" / "base.pth", tmp_path / "best" / "zoo_24.pth")
    assert find_base(adapter, None, tmp_path).path.name == "zoo_24.pth"


# ---- the same as peft


SETTINGS = [
    LoRASettings(rank=4, alpha=12, targets=("all",)),
    LoRASettings(rank=4, alpha=12, targets=("attention",)),
    LoRASettings(rank=9, alpha=12, targets=("q_proj", "down_proj"), rslora=True),
    LoRASettings(rank=2, alpha=3, targets=("model.layers.1.self_attn.v_proj",)),
]


def hf_model(model, folder):
    """transformers' model of the same weights."""
    transformers = pytest.importorskip("transformers")
    from model.export import save_hf

    path = save_weights(folder / "base.pth", model, tokenizer={}, lineage=[])
    save_hf(folder / "hf", load_weights(path), folder, stop_ids={2})
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.targets}{s.rslora}")
def test_logits_and_gradients_equal_pefts(settings, tmp_path):
    """Written as a directory, read by peft, and there again trained on: the same logits, the same gradients of A, B."""
    peft = pytest.importorskip("peft")
    from model.interop.peft import save_peft

    theirs = hf_model(base(), tmp_path)
    model = with_adapter(settings)
    save_peft(tmp_path / "peft", settings.to_dict(), lora_state(model), dict(path="base", hash=None), layers=2)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft", is_trainable=True)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)

    for side in (model, theirs):
        torch.nn.functional.cross_entropy(side(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(expected) == len(lora_state(model))
    for name, gradient in found.items():
        layer, _, matrix = name.partition(".adapters.default.")
        torch.testing.assert_close(gradient, expected[f"base_model.model.{layer}.lora_{matrix}.default.weight"])


def test_a_directory_of_pefts_own_is_read(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = hf_model(base(), tmp_path)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", use_rslora=True, init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config)
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    assert (adapter.settings.rank, adapter.settings.alpha, adapter.settings.rslora) == (3, 7, True)
    torch.testing.assert_close(logits(adapter.apply(base())), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ("pissa", "pissa_niter_4", "olora"))
def test_adapters_that_changed_their_base_are_refused(tmp_path, how):
    """They were added to the base as it was before: other logits by 4."""
    values = dict(peft_type="LORA", r=2, lora_alpha=2, init_lora_weights=how)
    (tmp_path / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=f"init_lora_weights='{how}' changed the base too"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("rslora", (False, True))
def test_ranks_and_alphas_that_differ_between_layers(tmp_path, rslora):
    """They are made equal by zeros, which training leaves zero."""
    peft = pytest.importorskip("peft")
    patterns = dict(rank_pattern={"q_proj": 5, "layers.1.mlp.up_proj": 2}, alpha_pattern={"down_proj": 11, "q_proj": 2})
    shape = dict(r=3, lora_alpha=7, target_modules="all-linear", use_rslora=rslora, init_lora_weights=False)
    theirs = peft.get_peft_model(hf_model(base(), tmp_path), peft.LoraConfig(**shape, **patterns))
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    model = adapter.apply(base())
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    assert adapter.settings.rank == 5
    model(TOKENS).logits.square().mean().backward()
    for layer in adapted(model).values():
        A, B = layer.adapter("default").A, layer.adapter("default").B
        assert all(A.grad[i].any() == A[i].any() == B[:, i].any() == B.grad[:, i].any() for i in range(5))


@pytest.mark.parametrize("rslora", (False, True))
@pytest.mark.parametrize("rank", (2, 5))
def test_ranks_that_differ_without_alphas(tmp_path, rank, rslora):
    """The factor of a layer with the largest rank was that of the others."""
    peft = pytest.importorskip("peft")
    shape = dict(r=3, lora_alpha=7, target_modules="all-linear", use_rslora=rslora, init_lora_weights=False)
    config = peft.LoraConfig(**shape, rank_pattern={"q_proj": rank})
    theirs = peft.get_peft_model(hf_model(base(), tmp_path), config)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_adapter(tmp_path / "adapter").apply(base())
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)


def test_a_rank_for_layers_that_we_do_not_find_is_refused(tmp_path):
    """peft's keys are regular expressions."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules="all-linear", rank_pattern={"q_.*": 5})
    peft.get_peft_model(hf_model(base(), tmp_path), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter_config.json: not supported: a rank or an alpha for 'q_\.\*'"):
        load_adapter(tmp_path / "adapter")


GLM = dict(
    head_dim=8,
    attention_bias=True,
    rotary_fraction=0.5,
    rope_interleaved=True,
    post_norms=True,
    tie_word_embeddings=False,
)


def test_pefts_adapter_beside_fused_layers_is_taken_apart(tmp_path):
    """GLM's gate_up_proj is two layers here."""
    peft = pytest.importorskip("peft")
    theirs = hf_model(base(**GLM), tmp_path)
    assert theirs.config.model_type == "glm4"
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_adapter(tmp_path / "adapter").apply(base(**GLM))
    assert sorted(name.rpartition(".")[2] for name in adapted(model))[-2:] == ["v_proj", "v_proj"]
    assert len(adapted(model)) == 14
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    wider = base(**GLM, intermediate_size=48)
    with pytest.raises(UserError, match=r"belongs to another model: .*gate_up_proj.B: has 80 rows.*48 \+ 48"):
        load_adapter(tmp_path / "adapter").apply(wider)


@pytest.mark.parametrize("rslora", (False, True))
@pytest.mark.parametrize("targets", ("all", "gate_proj", "attention"))
def test_pefts_reads_ours_beside_fused_layers(tmp_path, targets, rslora):
    """Without gate_proj and up_proj in its model, peft left these matrices out, with a warning."""
    peft = pytest.importorskip("peft")
    theirs, model = hf_model(base(**GLM), tmp_path), base(**GLM)
    settings = LoRASettings(rank=4, alpha=12, targets=(targets,), rslora=rslora)
    add_lora(model, settings)
    stir(model)
    about = dict(base=dict(path=None, hash=None), tokenizer={}, lineage=[])
    adapter = load_adapter(save_adapter(tmp_path / "a.pth", model, settings, **about))
    write_peft(tmp_path / "peft", adapter, None)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    again = load_adapter(tmp_path / "peft").apply(base(**GLM))
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", ("all", "attention"))
@pytest.mark.parametrize(
    "shape", (dict(qk_norm=True), dict(attention_bias=True, shared_expert_intermediate_size=40)), ids=("qwen3", "qwen2")
)
def test_peft_reads_ours_on_a_mixture_of_experts(tmp_path, shape, targets, capsys):
    """The names of the shared expert's layers must not match those of the routed ones."""
    peft = pytest.importorskip("peft")
    model = base(num_experts=4, **shape)
    theirs = hf_model(model, tmp_path)
    add_lora(model, settings := LoRASettings(rank=4, targets=(targets,)))
    stir(model)
    about = dict(base=dict(path=None, hash=None), tokenizer={}, lineage=[])
    write_peft(tmp_path / "peft", load_adapter(save_adapter(tmp_path / "a.pth", model, settings, **about)), None)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
    assert len(adapted(model)) == sum("lora_A" in name for name in theirs.state_dict())
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    assert "no family" not in capsys.readouterr().err


def test_a_base_that_transformers_does_not_know_is_named_beside_pefts_directory(tmp_path, capsys):
    """The `moe` preset: peft has nothing to put the directory on, which was not said."""
    model = base(num_experts=4, num_shared_experts=1)
    add_lora(model, RANK4)
    about = dict(base=dict(path=None, hash=None), tokenizer={}, lineage=[])
    adapter = load_adapter(save_adapter(tmp_path / "a.pth", model, RANK4, **about))
    write_peft(tmp_path / "peft", adapter, None)
    assert "for peft: transformers has no family for this model" in capsys.readouterr().err
    assert load_adapter(tmp_path / "peft").state.keys() == adapter.state.keys()


@pytest.mark.parametrize("key, value", [("use_dora", True), ("bias", "all"), ("layer_replication", [[1, 2], [0, 1]])])
def test_what_would_compute_something_else_is_refused(tmp_path, key, value):
    values = dict(peft_type="LORA", r=2, lora_alpha=2) | {key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=f"adapter_config.json: not supported: {key}="):
        load_adapter(tmp_path)


@pytest.mark.parametrize("generation", (2, 3))
def test_minimind_adapters_give_minimind_logits(generation, shared):
    from safetensors.torch import load_file

    folder = shared / "fixtures"
    values = json.loads((folder / f"minimind{generation}_dense.json").read_text(encoding="utf-8"))
    checkpoint = load_weights(folder / f"minimind{generation}_dense.pth")
    checkpoint.config = config_from_minimind(values)
    adapter = load_adapter(folder / f"minimind{generation}_lora.pth")
    assert adapter.settings.scale == 1
    expected = load_file(folder / f"minimind{generation}_lora.logits.safetensors")
    plain, model = checkpoint.build(), adapter.apply(checkpoint.build())
    assert (logits(plain, expected["input_ids"]) - expected["logits"]).abs().max() > 0.01  # it does something
    found = logits(model, expected["input_ids"])
    # MiniMind 3 stores fp16: one such rounding of A and B moves these logits by 5e-4
    torch.testing.assert_close(found, expected["logits"].float(), atol=1e-4 if generation == 2 else 1e-3, rtol=1e-4)


# ---- by hand


def test_a_layer_by_hand():
    """W = [[1, 2]], A = [[1, 0]], B = [[3]], alpha 4, rank 1: x = (5, 7) -> 5 + 14 + 4 * 3 * 5 = 79."""
    model = base()
    layer = LoRALinear(torch.nn.Linear(2, 1, bias=False))
    model.model.layers[0].self_attn.q_proj = layer
    add_lora(model, LoRASettings(rank=1, alpha=4), layers=["model.layers.0.self_attn.q_proj"])
    for parameter, value in (
        (layer.weight, [[1.0, 2.0]]),
        (layer.adapters.default.A, [[1.0, 0.0]]),
        (layer.adapters.default.B, [[3.0]]),
    ):
        parameter.data = torch.tensor(value)
    assert layer(torch.tensor([5.0, 7.0])).item() == 79
    assert LoRASettings(rank=16, alpha=8).scale == 0.5 and LoRASettings(rank=16, alpha=8, rslora=True).scale == 2


def test_a_new_adapter_changes_nothing_and_only_it_learns():
    model, plain = base(), logits(base())
    names = add_lora(model, LoRASettings(rank=4, targets=("attention",)))
    assert torch.equal(logits(model), plain)
    assert len(names) == 2 * 4 and all(".self_attn." in name for name in names)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.adapters.default.{matrix}" for name in names for matrix in "AB"}
    assert set(base().state_dict()) == {name for name in model.state_dict() if ".adapters." not in name}


def test_nothing_is_computed_below_the_first_adapter(monkeypatch):
    """With adapters in the last block only, no gradient goes through the first, nor into any frozen weight."""
    model = base()
    add_lora(model, LoRASettings(targets=("model.layers.1.mlp.down_proj",)))
    seen = {}
    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out[0].requires_grad}))
    model(TOKENS).logits.sum().backward()
    assert seen == {0: False, 1: True}
    assert all(p.grad is None for n, p in model.named_parameters() if ".adapters." not in n)


def test_dropout_leaves_out_inputs_in_training_only():
    model = with_adapter(LoRASettings(rank=4, dropout=0.5))
    assert not torch.equal(logits(model.train()), logits(model))
    assert torch.equal(logits(model.eval()), logits(model))
    layer = adapted(model)["model.layers.0.self_attn.q_proj"].adapters.default.train()
    layer.A.data.fill_(1.0), layer.B.data.fill_(1.0)
    out = layer.add_to(torch.zeros(4000, 24), torch.ones(4000, 24))[:, 0] / (4 * layer.scale)
    # 24 ones, half of them dropped, the others doubled
    assert out.mean().item() == pytest.approx(24, rel=0.02) and out.std().item() == pytest.approx(24**0.5, rel=0.1)


# ---- exact


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_merging_is_the_same_model_and_unmerging_gives_every_bit_back(dtype):
    """Subtracting what was added would not: (w + d) - d differs from w in bf16 nearly everywhere."""
    model = with_adapter()
    lower_frozen(model, dtype)
    model.compute_dtype = dtype
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = logits(model)
    merge(model)
    merge(model)  # twice is once
    found = logits(model)
    torch.testing.assert_close(
        found, expected, **(dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.25, rtol=0.1))
    )
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), expected)


def test_merged_weights_stand_alone():
    model = with_adapter()
    expected = logits(model)
    merge(model)
    remove_lora(model)
    plain = CausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)


def test_disabled_is_the_base_and_ends_also_after_an_error():
    model, plain = with_adapter(), logits(base())
    expected = logits(model)
    with pytest.raises(KeyError), adapter_disabled(model):
        assert torch.equal(logits(model), plain)
        raise KeyError
    assert torch.equal(logits(model), expected) and not torch.equal(expected, plain)
    merge(model)
    with pytest.raises(ValueError, match="unmerge it first"), adapter_disabled(model):
        pass


def test_several_adapters_on_one_base():
    model = with_adapter(LoRASettings(rank=4, targets=("attention",)))
    first = logits(model)
    add_lora(model, LoRASettings(rank=2, targets=("mlp",)), name="second")
    stir(model, "second")
    second = logits(model)
    activate(model, "default")
    assert torch.equal(logits(model), first) and not torch.equal(first, second)
    activate(model, None)
    assert torch.equal(logits(model), logits(base()))
    with pytest.raises(ValueError, match="no adapter called 'third'; there are default, second"):
        activate(model, "third")
    with pytest.raises(ValueError, match="there is an adapter called 'second' already"):
        add_lora(model, LoRASettings(targets=("mlp",)), name="second")


def test_a_frozen_model_in_bf16_computes_the_same_bits():
    """Weights are rounded once instead of at every step; norms and the router stay as they are."""
    model, lowered = base(num_experts=4, num_shared_experts=1, qk_norm=True), None
    model.compute_dtype = torch.bfloat16
    expected = logits(model)
    lowered = base(num_experts=4, num_shared_experts=1, qk_norm=True)
    lowered.compute_dtype = torch.bfloat16
    lower_frozen(lowered, torch.bfloat16)
    assert torch.equal(logits(lowered), expected)
    kept = {name for name, p in lowered.named_parameters() if p.dtype == torch.float32}
    assert all("norm" in name or name.endswith("mlp.gate.weight") for name in kept) and len(kept) == 2 * 5 + 1


# ---- which layers


def test_names_of_layers():
    model = base()
    last = lambda *targets: sorted({name.rpartition(".")[2] for name in find_targets(model, targets)})
    assert last("query_key_value") == ["k_proj", "q_proj", "v_proj"]  # ChatGLM's
    assert last("dense", "dense_h_to_4h", "dense_4h_to_h") == ["down_proj", "gate_proj", "o_proj", "up_proj"]
    assert len(find_targets(model, ("all",))) == 2 * 7
    with pytest.raises(ValueError, match="--lora_targets c_attn: no such linear layer; this model has down_proj, gate"):
        find_targets(model, ("q_proj", "c_attn"))
    with pytest.raises(ValueError, match="lm_head: no such linear layer.*may be the embedding too"):
        find_targets(model, ("lm_head",))


def test_experts_are_left_as_they_are_and_that_is_said():
    moe = base(num_experts=4, num_shared_experts=1)
    names = find_targets(moe, ("all",))
    assert len(names) == 2 * (4 + 3) and all("self_attn" in name or "shared_experts" in name for name in names)
    with pytest.raises(ValueError, match="mlp: no such linear layer.*experts are stacked parameters"):
        find_targets(base(num_experts=4), ("mlp",))


# ---- files


def test_an_adapter_file_knows_everything(tmp_path):
    settings = LoRASettings(rank=4, alpha=3, dropout=0.1, targets=("attention",), rslora=True)
    model = with_adapter(settings)
    known = dict(base=dict(path="x.pth", hash="1f"), tokenizer={"hash": "2e"}, lineage=[{"stage": "lora"}])
    adapter = load_adapter(save_adapter(tmp_path / "a_24.pth", model, settings, **known))
    assert adapter.settings == settings and adapter.config == model.config
    assert dict(base=adapter.base, tokenizer=adapter.tokenizer, lineage=adapter.lineage) == known
    assert torch.equal(logits(adapter.apply(base()).eval()), logits(model.eval()))
    assert load_adapter(tmp_path).path == adapter.path  # a directory that training left
    with pytest.raises(ValueError, match=r"a_24.pth: is an adapter \(LoRA\), .*--lora_path"):
        load_weights(adapter.path)


def test_an_adapter_of_another_architecture_is_refused(tmp_path):
    state = lora_state(with_adapter())
    adapter = AdapterFile(tmp_path / "a.pth", LoRASettings(rank=4), state)
    with pytest.raises(ValueError, match=r"a.pth: belongs to another model: .*0.mlp.gate_proj is \(56, 24\)"):
        adapter.apply(base(intermediate_size=56))
    with pytest.raises(ValueError, match="this one has no linear layer model.layers.1"):
        adapter.apply(base(num_hidden_layers=1))
    save_weights(tmp_path / "full.pth", base(), tokenizer={}, lineage=[])
    with pytest.raises(ValueError, match="full.pth: not an adapter"):
        load_adapter(tmp_path / "full.pth")
