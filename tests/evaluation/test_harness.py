"""lm-evaluation-harness on our weights gives the numbers of its own adapter for transformers on the exported ones."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from common.files import ROOT
from evaluation.harness import encode_with_control
from inference.answers import Answer
from model.adapter import save_adapter
from model.checkpoint import load_weights, save_weights
from model.export import save_hf
from model.lora import LoRASettings, adapted, add_lora
from tests.helpers.harness import check_same_numbers, evaluate, write_tasks
from tests.helpers.models import TOKENIZER, small_model, tiny_model
from tests.helpers.runs import run_script
from tests.helpers.tokenizers import BEGINS, ENDS, llama_like


@pytest.fixture(scope="module")
def lm_eval():
    pytest.importorskip("datasets")
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    model = small_model(std=0.2, num_attention_heads=4, num_key_value_heads=2)
    known = dict(path="tokenizer", hash=TOKENIZER.hash)
    return save_weights(folder / "full_sft_32.pth", model, tokenizer=known, lineage=[])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_the_numbers_of_transformers_own_adapter(lm_eval, weights, tasks, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.models.huggingface import HFLM

    from evaluation.harness import register

    checkpoint = load_weights(weights)
    save_hf(tmp_path / "hf", checkpoint, TOKENIZER.path, TOKENIZER.stop_ids)
    ours = evaluate(register()(weight=str(weights), dtype="float32", device="cpu"), tasks)
    # its default prefix would be <|im_end|>, the exported tokenizer's eos; our documents begin with <|endoftext|>
    prefix = TOKENIZER.end_of_text
    options = dict(dtype="float32", device="cpu", batch_size=4, prefix_token_id=prefix)
    theirs = evaluate(HFLM(pretrained=str(tmp_path / "hf"), **options), tasks)
    check_same_numbers(ours, theirs)


def test_longer_than_the_model_as_transformers_own_adapter(lm_eval, weights, tmp_path):
    """24 positions: of a question the beginning is cut, of a text every token is predicted in some window, and an
    answer needs room of its own. Two kinds of answers are asked for, in turns."""
    pytest.importorskip("transformers")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from evaluation.harness import register

    save_hf(tmp_path / "hf", load_weights(weights), TOKENIZER.path, TOKENIZER.stop_ids)
    options = dict(dtype="float32", device="cpu", max_length=24)
    ours = register()(weight=str(weights), **options)
    theirs = HFLM(pretrained=str(tmp_path / "hf"), batch_size=2, prefix_token_id=TOKENIZER.end_of_text, **options)
    texts = [" ".join(f"{word} {n}" for n in range(30)) for word in ("once", "twice", "thrice")]
    kinds = {"until": ["o", "a", "e"], "max_gen_toks": 12}, {"until": [], "max_gen_toks": 5}
    asked = [(text, kind) for text in texts for kind in kinds]
    requests = lambda what, arguments: [Instance(what, {}, own, n) for n, own in enumerate(arguments)]
    found = [
        (
            lm.loglikelihood(requests("loglikelihood", [(text, f" and {text[:20]}") for text in texts])),
            lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts])),
            lm.generate_until(requests("generate_until", asked)),
        )
        for lm in (ours, theirs)
    ]
    (scores, rolling, said), (their_scores, their_rolling, their_said) = found
    for own, other in zip(scores, their_scores, strict=True):
        assert own == (pytest.approx(other[0], rel=1e-4), other[1])
    assert rolling == pytest.approx(their_rolling, rel=1e-4)
    assert said == their_said and len(set(said)) > 3
    with pytest.raises(ValueError, match="max_gen_toks 24 leaves none of 24 positions for the question"):
        ours.generate_until(requests("generate_until", [(texts[0], {"until": [], "max_gen_toks": 24})]))


def test_a_text_that_stands_alone_opens_as_transformers_own_adapter_opens_it(lm_eval, tmp_path):
    """For Llama both take its BOS."""
    from evaluation.harness import register

    llama = llama_like(tmp_path / "llama", "the", "cat")
    model, known = tiny_model(vocab_size=llama.vocab_size), dict(path=llama.path, hash=llama.hash)
    weights = save_weights(tmp_path / "pretrain_24.pth", model, tokenizer=known, lineage=[])
    lm = register()(weight=str(weights), dtype="float32", device="cpu")
    assert (lm.prefix_token_id, lm.eot_token_id) == (BEGINS, ENDS)


def test_answers_are_drawn_only_if_the_task_says_so(lm_eval, weights):
    """Many tasks give a temperature and do_sample: false. Control tokens are no part of an answer."""
    from lm_eval.api.instance import Instance

    from evaluation.harness import register

    lm = register()(weight=str(weights), dtype="float32", device="cpu")
    ask = lambda **more: lm.generate_until([Instance("generate_until", {}, ("once", {"max_gen_toks": 8} | more), 0)])
    assert ask(do_sample=False, temperature=5.0) == ask() != ask(do_sample=True, temperature=5.0)
    ids = [*TOKENIZER.encode("yes"), TOKENIZER.end_of_text, *TOKENIZER.encode(" no")]
    said = Answer(ids, "", "", ended=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.harness.answers_to_ids", lambda *_, **__: [said])
        assert ask(until="?") == ["yes no"] and ask(until=["no", "s"]) == ["ye"] and ask(until="") == ["yes no"]


def test_an_adapter_on_its_base(lm_eval, weights, tmp_path):
    """--model_args lora_path=...: the numbers of the base with the adapter beside it."""
    from evaluation.harness import register

    base = load_weights(weights)
    model, settings = base.build().eval(), LoRASettings(rank=2, targets=("attention",))
    add_lora(model, settings)
    for layer in adapted(model).values():
        torch.nn.init.normal_(layer.adapter("default").B, std=0.5)
    parent, recorded = dict(path=str(base.path), hash=base.hash), base.tokenizer
    path = tmp_path / "mine_32.pth"
    save_adapter(path, model, settings, base=parent, tokenizer=recorded, lineage=[])
    ids = TOKENIZER.encode("once upon a time there was")
    ask = lambda **more: register()(dtype="float32", device="cpu", **more)._loglikelihood_tokens(
        [(None, ids[:2], ids[2:])]
    )
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits.log_softmax(-1)[0, 1:-1].gather(1, torch.tensor(ids[2:])[:, None])
    assert ask(lora_path=str(path))[0][0] == pytest.approx(float(logp.sum()), rel=1e-4)
    assert ask(weight=str(weights))[0][0] != pytest.approx(float(logp.sum()), rel=1e-3)
    with pytest.raises(ValueError, match="name the weights, such as full_sft or a file"):
        ask()


def test_names_of_control_tokens_of_which_one_begins_another():
    tokenizer = SimpleNamespace(control={"<a>": 1, "<a>b": 2}, encode=lambda text: list(text.encode()))
    assert encode_with_control(tokenizer, "x<a>b<a>y") == [ord("x"), 2, 1, ord("y")]  # type: ignore[arg-type]


def test_greedy_is_known_for_each_continuation(lm_eval, weights):
    """The harness asks of each continuation whether the model would say it."""
    from evaluation.harness import register
    from inference.answers import answers_to_ids

    lm = register()(weight=str(weights), dtype="float32", device="cpu")
    prompt = TOKENIZER.encode("once upon a time")
    (said,) = answers_to_ids(lm.model, TOKENIZER, [prompt], max_new_tokens=5)
    other = [*said.ids[:4], (said.ids[4] + 1) % 6000]
    found = lm._loglikelihood_tokens([(None, prompt, said.ids), (None, prompt, other)])
    assert [greedy for _, greedy in found] == [True, False]
    with torch.no_grad():
        logp = lm.model(torch.tensor([prompt + other])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    expected = logp.gather(1, torch.tensor(other)[:, None]).sum()
    assert found[1][0] == pytest.approx(float(expected), rel=1e-4)


def test_a_chat_template_goes_through_the_harness_as_text(lm_eval, weights):
    from evaluation.harness import register
    from tokenizer.chat import encode_chat

    lm = register()(weight=str(weights), dtype="float32", device="cpu")
    messages = [{"role": "user", "content": "你好 there"}]
    ids = encode_chat(TOKENIZER, messages, add_generation_prompt=True).ids
    assert lm.tok_encode("<|im_end|>") == TOKENIZER.encode("<|im_end|>")  # text, as long as there is no template
    assert lm.tok_encode(lm.apply_chat_template(messages)) == ids
    begun = [*messages, {"role": "assistant", "content": "I am"}]  # an answer that the model goes on with
    found = lm.tok_encode(lm.apply_chat_template(begun, add_generation_prompt=False))
    assert found == [*ids, *TOKENIZER.encode("I am")]


@pytest.mark.parametrize(
    ("words", "added"),
    [
        (["--tasks", "arc_easy"], ["--model", "sparrow"]),
        (["--model=hf", "--tasks", "arc_easy"], []),
        (["--model", "hf"], []),
        (["ls", "tasks"], []),
    ],
)
def test_the_script_fills_in_the_model(lm_eval, monkeypatch, words, added):
    import lm_eval.__main__ as harness

    seen = []
    monkeypatch.setattr(harness, "cli_evaluate", lambda: seen.extend(sys.argv[1:]))
    assert run_script("scripts/lm_eval_sparrow.py", *words)[0] == 0 and seen == [*words, *added]


def test_without_the_harness_it_says_what_to_install(tmp_path):
    """In a process of its own, in which the package cannot be imported."""
    block = "import sys, runpy; sys.modules['lm_eval'] = None; sys.argv = ['s', '--tasks', 'arc_easy'];"
    script = ROOT / "scripts/lm_eval_sparrow.py"
    done = subprocess.run(
        [sys.executable, "-c", f"{block} runpy.run_path({str(script)!r}, run_name='__main__')"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and "pip install lm-eval" in done.stderr and done.stderr.count("\n") == 1
