"""What the X-ray shows adds up to what the model computes, and the page shows it without asking anyone."""

import base64
import json
import math
from types import SimpleNamespace

import pytest
import torch

from common.console import printable
from evaluation.lineage import History
from evaluation.models import Contender, open_models
from evaluation.page import write_page
from evaluation.trace import change_of, changes, lens, trace
from evaluation.xray import _experts, _packed, _predictions, text_of, xray
from inference.answers import prompt_ids
from model.adapter import load_adapter, save_adapter
from model.checkpoint import load_weights, save_weights
from model.export import write_peft
from model.lora import LoRASettings, adapted, add_lora
from tests.helpers.models import TINY_TOKENS, TOKENIZER, small_model, tiny_model
from tests.helpers.runs import run_script

IDS = TINY_TOKENS[0].tolist()
SHAPES = {
    "llama": {},
    "qwen3": dict(qk_norm=True),
    "qwen2, untied": dict(attention_bias=True, tie_word_embeddings=False),
    "glm4": dict(post_norms=True, rope_interleaved=True, rotary_fraction=0.5, head_dim=8),
    "window": dict(sliding_window=4, layer_types=("full_attention", "sliding_attention")),
    "experts": dict(num_experts=4, num_shared_experts=1, num_experts_per_tok=2),
}


@pytest.fixture(params=SHAPES, ids=list(SHAPES))
def model(request):
    return tiny_model(**SHAPES[request.param]).eval().requires_grad_(False)


def test_all_that_is_added_to_the_stream_gives_the_models_logits(model):
    seen = trace(model, IDS)
    expected = model(torch.tensor([IDS])).logits[0]
    assert torch.equal(seen.logits, expected)
    total = seen.stream[0] + seen.attention_added.sum(0) + seen.mlp_added.sum(0)
    torch.testing.assert_close(total, seen.stream[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.lm_head(model.model.norm(total)), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lens(model, seen)[-1], expected, atol=1e-6, rtol=1e-5)


def test_the_probabilities_are_those_inside_the_kernel(model):
    """With the values (v) they give what the layer adds to the stream, for every head at once."""
    seen = trace(model, IDS)
    torch.testing.assert_close(seen.attention.sum(-1), torch.ones(seen.attention.shape[:-1]))
    for layer, (block, probabilities) in enumerate(zip(model.model.layers, seen.attention)):
        own = block.self_attn
        v = own.v_proj(block.input_layernorm(seen.stream[layer])).view(len(IDS), -1, own.head_dim)
        v = v.repeat_interleave(probabilities.shape[0] // v.shape[1], dim=1)  # (T, H, D)
        y = torch.einsum("hqk,khd->qhd", probabilities, v).reshape(len(IDS), -1)
        added = block.post_self_attn_layernorm(own.o_proj(y))
        torch.testing.assert_close(added, seen.attention_added[layer], atol=1e-5, rtol=1e-4)


def test_looking_leaves_no_trace(model):
    before = model(torch.tensor([IDS])).logits
    trace(model, IDS)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(torch.tensor([IDS])).logits, before)


def test_predictions_by_hand():
    """Three tokens a, b, c = 0, 1, 2. After the first come p = 1/2, 1/4, 1/4: entropy 1.5 bits, b costs 2 bits."""
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]).log()
    found = _predictions(logits, [0, 1])
    assert found["top"][0][0] == [0, 0.5]
    assert found["entropy"][0] == pytest.approx(1.5, abs=1e-3)
    assert found["surprise"] == pytest.approx([2.0], abs=1e-3) and found["probability"] == [0.25]
    assert found["rank"] == [2]


def unpacked(packed) -> torch.Tensor:
    """What the page makes of `_packed`: (L, H, T, T)."""
    L, H = packed["layers"], packed["heads"]
    values = torch.frombuffer(bytearray(base64.b64decode(packed["data"])), dtype=torch.uint8).view(L, H, -1)
    T = int((math.isqrt(8 * values.shape[-1] + 1) - 1) / 2)
    rows, columns = torch.tril_indices(T, T)
    attention = torch.zeros(L, H, T, T)
    attention[:, :, rows, columns] = (values.float() / 255) ** 2
    return attention


def test_a_byte_for_each_probability():
    attention = torch.randn(2, 3, 9, 9).masked_fill(~torch.ones(9, 9).tril().bool(), -math.inf).softmax(-1)
    restored = unpacked(_packed(attention))
    assert (restored - attention).abs().max() < 0.005  # of p = (b/255)^2, a step is at most 2/255, half of it is lost
    assert restored[0, 0, 0, 1] == 0


def test_the_size_of_a_change_without_its_matrix():
    model = tiny_model()
    add_lora(model, LoRASettings(rank=3, alpha=6.0, targets=("q_proj",)))
    layer = next(iter(adapted(model).values()))
    own = layer.adapter("default")
    assert change_of(layer, "default")["change"] == 0  # B is zero at first
    torch.nn.init.normal_(own.B)
    found, product = change_of(layer, "default"), own.product().detach()
    assert found["change"] == pytest.approx(product.norm().item(), rel=1e-4)
    assert found["ratio"] == pytest.approx((product.norm() / layer.weight.norm()).item(), rel=1e-4)
    with torch.no_grad():  # three directions of the same strength, then one alone
        own.A.copy_(torch.eye(3, own.A.shape[1]))
        own.B.copy_(torch.eye(own.B.shape[0], 3))
        assert change_of(layer, "default")["rank"] == pytest.approx(3, abs=1e-3)
        own.B[:, 1:] = 0
    assert change_of(layer, "default")["rank"] == pytest.approx(1, abs=1e-3)


def test_the_changes_of_one_of_two_adapters():
    model = tiny_model()
    for name, target in (("a", "q_proj"), ("b", "k_proj")):
        add_lora(model, LoRASettings(rank=2, targets=(target,)), name)
    assert {path.rpartition(".")[2] for path in changes(model, "a")} == {"q_proj"}


def test_the_routing_is_what_the_layer_computes_with():
    """Each token's experts, weighted with what was seen, give what the layer adds to the stream."""
    model = tiny_model(**SHAPES["experts"]).eval().requires_grad_(False)
    seen = trace(model, IDS)
    for layer, block in enumerate(model.model.layers):
        x = block.post_attention_layernorm(seen.stream[layer] + seen.attention_added[layer])  # (T, d)
        weights, chosen = seen.routing[layer].topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        own, F = block.mlp.experts, torch.nn.functional
        for t, (share, experts) in enumerate(zip(weights, chosen.tolist())):
            y = sum(expert(x[t]) for expert in block.mlp.shared_experts)
            for w, e in zip(share, experts):
                y = y + w * (own.down_proj[e] @ (F.silu(own.gate_proj[e] @ x[t]) * (own.up_proj[e] @ x[t])))
            torch.testing.assert_close(y, seen.mlp_added[layer, t], atol=1e-5, rtol=1e-4)


def test_an_expert_that_no_token_reaches_has_a_count_of_0():
    """Three tokens, three experts, one each: the third expert is never the likeliest."""
    routing = {1: torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.1, 0.4]])}
    contender = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(num_experts_per_tok=1)))
    (found,) = _experts(contender, SimpleNamespace(routing=routing))
    assert found["layer"] == 1 and found["counts"] == [2, 1, 0] and found["chosen"] == [[0], [1], [0]]
    assert found["mean"] == pytest.approx([1.3 / 3, 0.3, 0.8 / 3], abs=1e-4) and found["weights"] == [
        [0.6],
        [0.5],
        [0.5],
    ]
    contender.model.config.num_experts_per_tok = 2
    (found,) = _experts(contender, SimpleNamespace(routing=routing))
    assert found["counts"] == [2, 2, 2] and found["chosen"] == [[0, 1], [1, 2], [0, 2]]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Weights and an adapter on them, random, with the shipped tokenizer."""
    home = tmp_path_factory.mktemp("xray")
    recorded = dict(path=TOKENIZER.path, hash=TOKENIZER.hash)
    stages = [dict(stage="full_sft", steps=3, losses=dict(loss=2.5), seed=42)]
    save_weights(home / "full_sft_32.pth", small_model(num_experts=4), tokenizer=recorded, lineage=stages)
    base = load_weights(home / "full_sft_32.pth")
    model, settings = base.build(), LoRASettings(rank=2, targets=("attention",))
    add_lora(model, settings)
    for layer in adapted(model).values():
        torch.nn.init.normal_(layer.adapter("default").B, std=0.3)
    parent = dict(path=str(base.path), hash=base.hash)
    stages = [*stages, dict(stage="lora_mine", steps=2, losses={}, seed=1)]
    save_adapter(home / "lora/mine_32.pth", model, settings, base=parent, tokenizer=recorded, lineage=stages)
    return home


def test_an_adapters_effect_is_with_against_without(home):
    (mine,) = open_models(["mine"], home, device="cpu", dtype="float32")
    figures = xray(mine, "hello", max_new_tokens=3)
    lora = figures["lora"]
    assert set(lora["weights"]) == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkvo"
    }
    assert max(lora["divergence"]) > 0 and lora["moved"][0] == [0.0] * len(figures["ids"])  # the embedding is the same
    (plain,) = open_models(["full_sft"], home, device="cpu", dtype="float32")
    with plain.active() as model:
        log_q = model(torch.tensor([figures["ids"]])).logits[0].log_softmax(-1)
    with mine.active() as model:
        log_p = model(torch.tensor([figures["ids"]])).logits[0].log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) / math.log(2)
    torch.testing.assert_close(torch.tensor(lora["divergence"]), expected, atol=1e-3, rtol=1e-2)
    assert xray(plain, "hello")["lora"] is None


def test_a_directory_of_pefts_is_called_by_its_own_names(home, tmp_path):
    """Its whole path was the name: the page was written beside the adapter, and reports showed home directories."""
    folder, save_dir = tmp_path / "medical/lora_model", tmp_path / "out"
    write_peft(folder, load_adapter(home / "lora/mine_32.pth"), None)
    words = ["--weight", folder, "--save_dir", save_dir, "--tokenizer_path", TOKENIZER.path]
    status, _, err = run_script("scripts/xray.py", *words, "--prompt", "hello", "--max_new_tokens", "2")
    assert status == 0 and [page.name for page in (save_dir / "xray").iterdir()] == ["medical_lora_model.html"], err
    assert [own.name for own in folder.parent.iterdir()] == ["lora_model"]
    names = [own.name for own in open_models(["full_sft", str(folder)], home, tokenizer_path=TOKENIZER.path)]
    assert names == ["full_sft_32", "medical/lora_model"]


def test_mistakes_are_one_line(home):
    status, _, err = run_script("scripts/xray.py", "--weight", "full_sft", "--save_dir", home)
    assert status == 2 and "--prompt: give a text" in err
    words = ["--prompt", "a " * 600, "--weight", "full_sft", "--save_dir", home]
    status, _, err = run_script("scripts/xray.py", *words)
    assert status == 2 and "more than the 512" in err and len(err.splitlines()) == 1


def test_the_page_works_by_keyboard_and_asks_nobody(home, browser, tmp_path):
    words = ["--weight", "mine", "--save_dir", home, "--prompt", "</script><b>hi</b> {{DATA}} \x1b[31m"]
    page = tmp_path / "page.html"
    status, out, err = run_script("scripts/xray.py", *words, "--max_new_tokens", "4", "--output", page)
    assert status == 0, err
    browser.open(page)
    assert browser.requests == [page.as_uri()] and browser.errors == []
    text = browser.text("#page")
    for panel in ("Tokens", "The next token", "Logit lens", "Attention", "The residual stream", "Experts", "adapter"):
        assert panel in text
    assert "␛" in text, "an escape code is shown, not sent"
    assert browser.evaluate("document.querySelectorAll('#page b').length") == 2, "the two names of the stages"
    before = browser.text(".sticky .chosen")
    browser.press("ArrowLeft")
    assert browser.text(".sticky .chosen") != before
    browser.evaluate("document.querySelector('.heads button').focus()")
    assert "layer 1, head 1" in browser.text("#page")
    browser.open(page, language="zh-CN", dark=True, width=360)
    assert "下一个词元" in browser.text("#page")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360, "wider than a phone"


def test_the_script_reads_in_fp32_and_prints_the_answer_alone(home, tmp_path):
    words = ["--weight", "full_sft", "--save_dir", home, "--prompt", "hello there", "--system", "Be brief."]
    page = tmp_path / "page.html"
    status, out, err = run_script("scripts/xray.py", *words, "--max_new_tokens", "4", "--output", page)
    assert status == 0, err
    found = json.loads(page.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0])
    prompt = [dict(role="system", content="Be brief."), dict(role="user", content="hello there")]
    ids = prompt_ids(TOKENIZER, prompt)
    assert found["ids"][: found["prompt_tokens"]] == ids and found["model"]["dtype"] == "float32"
    said = TOKENIZER.decode(found["ids"][len(ids) :])
    assert said and out == f"{printable(said)}\n{page}: {len(found['ids'])} tokens, {out.rpartition('tokens, ')[2]}"


def test_half_a_character_is_shown_by_its_bytes():
    first, *_ = TOKENIZER.encode("龘")  # rare: more than one token
    assert text_of(TOKENIZER, first).startswith("\\xe9")


def test_a_model_of_fewer_positions_than_a_page_can_show():
    history = History("a", "", {}, [dict(stage="full_sft")])
    own = Contender("a", small_model(max_position_embeddings=32).eval(), None, TOKENIZER, history, 1)
    with pytest.raises(ValueError, match="more than the 32 that a page can show"):
        xray(own, "a " * 40)


def test_128_tokens_of_small_stay_below_3_megabytes(tmp_path):
    recorded = dict(path=TOKENIZER.path, hash=TOKENIZER.hash)
    model = small_model(hidden_size=64, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2)
    save_weights(tmp_path / "small_64.pth", model, tokenizer=recorded, lineage=[dict(stage="pretrain")])
    (small,) = open_models(["small"], tmp_path, device="cpu", dtype="float32")
    figures = xray(small, " ".join(f"{i * 37 % 100}" for i in range(45)))  # layers and heads as `small` has
    assert len(figures["ids"]) >= 128
    page = write_page(tmp_path / "page.html", "xray", "x", figures)
    assert page.stat().st_size < 3e6


def test_every_layer_has_a_guess_of_its_own():
    """The lens by hand: the last norm and the head on what each layer leaves, from the embedding on."""
    model = tiny_model().eval().requires_grad_(False)
    seen = trace(model, IDS)
    found = lens(model, seen)
    assert len(found) == 3 and not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    embedded = model.model.embed_tokens(torch.tensor(IDS))
    torch.testing.assert_close(found[0], model.lm_head(model.model.norm(embedded)), atol=1e-6, rtol=1e-5)
    after = embedded + seen.attention_added[0] + seen.mlp_added[0]
    torch.testing.assert_close(found[1], model.lm_head(model.model.norm(after)), atol=1e-5, rtol=1e-4)


def test_the_figures_are_of_what_they_say(home):
    """An adapter large enough that each figure differs from its neighbour."""
    (mine,) = open_models(["mine"], home, device="cpu", dtype="float32")
    torch.manual_seed(0)
    for layer in adapted(mine.model).values():
        torch.nn.init.normal_(layer.adapter(mine.adapter).B, std=3.0)
    figures = xray(mine, "hello", max_new_tokens=3)
    ids, lora = figures["ids"], figures["lora"]
    assert figures["prompt_tokens"] == len(mine.encode("hello")) < len(ids)
    with mine.active() as model:
        seen = trace(model, ids)
    (plain,) = open_models(["full_sft"], home, device="cpu", dtype="float32")
    without = trace(plain.model, ids)
    close = lambda found, expected: torch.testing.assert_close(torch.tensor(found), expected, atol=1e-6, rtol=2e-3)
    close(figures["norms"]["attention"], seen.attention_added.norm(dim=-1))
    close(figures["norms"]["mlp"], seen.mlp_added.norm(dim=-1))
    close(lora["moved"], (seen.stream - without.stream).norm(dim=-1) / without.stream.norm(dim=-1))
    p, q = seen.logits.double().softmax(-1), without.logits.double().softmax(-1)
    close(lora["divergence"], ((p * (p / q).log2()).sum(-1)).float())
    assert ((q * (q / p).log2()).sum(-1).float() - torch.tensor(lora["divergence"])).abs().max() > 5e-4, "not reversed"
    assert lora["without"] == _predictions(without.logits, ids) != figures["next"]
    used = {str(id) for position in lora["without"]["top"] for id, _ in position}
    assert used <= figures["vocabulary"].keys(), "the page shows their texts"


def test_the_answer_counts_for_what_a_page_can_show(home):
    (plain,) = open_models(["full_sft"], home, device="cpu", dtype="float32")
    xray(plain, "a " * 200, max_new_tokens=1)
    with pytest.raises(ValueError, match="500 new ones are more than the 512"):
        xray(plain, "a " * 200, max_new_tokens=500)
