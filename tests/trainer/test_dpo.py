"""Preference losses against hand-worked numbers, a plain reference and trl; the stage: stops, ranks, its reference."""

import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.files import ROOT
from common.options import describe, parse
from dataset.batches.preference import PairLoader, PreferenceDataset
from dataset.tokens import token_cache
from model.checkpoint import save_weights
from model.config import ModelConfig
from model.lora import LoRASettings, add_lora, freeze
from model.transformer import CausalLM
from tests.helpers.compare import assert_same_gradients, same, state_of
from tests.helpers.models import TOKENIZER, answer_logp, small_model
from tests.helpers.rows import jsonl, says, user, words, write_dpo
from tests.helpers.runs import FLAGS, first_gradients, run_stage, torchrun, train_twice
from trainer.inputs import open_data
from trainer.loop.backend import Backend
from trainer.loop.engine import Engine, Job
from trainer.losses import preference
from trainer.losses.pair_losses import LOSSES, cpo, hinge, ipo, orpo, sigmoid, simpo
from trainer.losses.preference import Preference, add_reference
from trainer.train_dpo import DPOConfig

CPU = Backend(torch.device("cpu"))


def test_losses_by_hand():
    """Log-ratios +4 and -1 (h = 5) with beta 0.2, and mean log-probabilities log 1/2 and log 1/4."""
    ratios = torch.tensor([[4.0, -1.0]])
    s = lambda x: 1 / (1 + math.exp(-x))
    assert sigmoid(ratios, ratios / 2, 0.2).item() == pytest.approx(-math.log(s(1.0)))
    smooth = -0.9 * math.log(s(1.0)) - 0.1 * math.log(s(-1.0))
    assert sigmoid(ratios, ratios / 2, 0.2, label_smoothing=0.1).item() == pytest.approx(smooth)
    # the chosen answer has two tokens: its mean log-ratio is 2, and 0.7 of it counts
    assert sigmoid(ratios, ratios / 2, 0.2, rpo_alpha=0.7).item() == pytest.approx(-math.log(s(1.0)) - 1.4)
    assert hinge(ratios, 0.1).item() == pytest.approx(0.5)
    assert hinge(ratios, 0.3).item() == 0
    assert ipo(ratios, 0.2).item() == pytest.approx((5 - 2.5) ** 2)
    means = torch.tensor([[0.5, 0.25]]).log()
    assert simpo(means, 2.0, label_smoothing=0.0, simpo_gamma=0.5).item() == pytest.approx(
        -math.log(s(2 * math.log(2) - 0.5))
    )
    # odds 1 and 1/3: the odds ratio is 3, and s(log 3) = 3/4
    assert orpo(means, 0.1).item() == pytest.approx(math.log(2) - 0.1 * math.log(0.75))
    # h = 5 and beta 0.2 as above, beside half the mean negative log-likelihood of the chosen answer
    assert cpo(ratios, means, 0.2, cpo_alpha=0.5).item() == pytest.approx(-math.log(s(1.0)) + 0.5 * math.log(2))
    certain = torch.tensor([[0.0, -1.0]], requires_grad=True)
    orpo(certain, 0.1).backward()
    assert certain.grad.isfinite().all()


@pytest.fixture
def pairs(tmp_path):
    return PreferenceDataset(write_dpo(tmp_path / "dpo.jsonl", 6), TOKENIZER, max_seq_len=48)


@torch.no_grad()
def moved_on(model):
    """The model after some steps, so to speak, so that ratios are not all 1."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def one_batch(dataset):
    loader = PairLoader(dataset, packing=True, batch_size=6, accumulation_steps=1, max_seq_len=48)
    return loader._batch(loader.rows(0), loader.row_length(0))


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradient_equal_a_plain_reference(kind, pairs):
    """One sequence at a time through the model and a frozen copy that has moved on a little, formulas spelled out."""
    model, frozen = small_model(std=0.2), moved_on(small_model(std=0.2))
    values = dict(label_smoothing=(e := 0.1), simpo_gamma=(gamma := 0.4), cpo_alpha=(alpha := 0.7), rpo_alpha=alpha)
    batch, beta, own = one_batch(pairs), 0.3, {name: values[name] for name in LOSSES[kind].options}
    reference, total = [], 0.0
    for example in batch.examples:
        prompt, *answers = pairs.pair(example)
        (w, l), (nw, nl) = (answer_logp(model, prompt, a) for a in answers), (int(t.sum()) for _, t in answers)
        rw, rl = (answer_logp(frozen, prompt, a).detach() for a in answers)
        reference.append([rw, rl])
        h = (w - rw) - (l - rl)
        if kind == "sigmoid":
            total = total - (1 - e) * F.logsigmoid(beta * h) - e * F.logsigmoid(-beta * h) - alpha * (w - rw) / nw
        elif kind == "hinge":
            total = total + max(0, 1 - beta * h)
        elif kind == "ipo":
            total = total + ((w - rw) / nw - (l - rl) / nl - 1 / (2 * beta)) ** 2
        elif kind == "simpo":
            h = beta * (w / nw - l / nl) - gamma
            total = total - (1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)
        elif kind == "cpo":
            h = beta * (w - l)
            total = total - (1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h) - alpha * w / nw
        else:
            pw, pl = torch.exp(w / nw), torch.exp(l / nl)
            total = total - w / nw - beta * F.logsigmoid(torch.log(pw / (1 - pw)) - torch.log(pl / (1 - pl)))
    total.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    loss, metrics = Preference(kind, beta, **own)(model, replace(batch, reference=torch.tensor(reference)))
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, expected, 1e-4)
    assert ("kl" in metrics) == (kind in ("sigmoid", "hinge", "ipo"))


def test_losses_equal_trls(tmp_path, pairs):
    """DPOTrainer's own batch, model and loss; CPO's and ORPO's formulas with our log-probabilities."""
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    from datasets import Dataset
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    model = small_model(std=0.2)
    c = model.config
    theirs = [
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=c.vocab_size,
                hidden_size=c.hidden_size,
                intermediate_size=c.intermediate_size,
                num_hidden_layers=c.num_hidden_layers,
                num_attention_heads=c.num_attention_heads,
                head_dim=c.head_dim,
                num_key_value_heads=c.num_key_value_heads,
                rms_norm_eps=c.rms_norm_eps,
                rope_theta=c.rope_theta,
                tie_word_embeddings=c.tie_word_embeddings,
            )
        )
        for _ in range(2)
    ]
    frozen = moved_on(small_model(std=0.2))
    for ours, other in zip((model, frozen), theirs):
        other.load_state_dict(ours.state_dict())
    file = str(ROOT / "tokenizer" / "tokenizer.json")
    names = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, **names)
    config = trl.DPOConfig(str(tmp_path), bf16=False, use_cpu=True, gradient_checkpointing=False, beta=0.3)
    rows = Dataset.from_list([dict(prompt="a", chosen="b", rejected="c")])
    trainer = trl.DPOTrainer(theirs[0], theirs[1], config, train_dataset=rows, processing_class=tokenizer)

    batch = one_batch(pairs)
    examples = [pairs.pair(example) for example in batch.examples]
    inputs = trainer.data_collator(
        [dict(prompt_ids=p.tolist(), chosen_ids=a.tolist(), rejected_ids=b.tolist()) for p, (a, _), (b, _) in examples]
    )
    reference = torch.stack([torch.stack([answer_logp(frozen, p, a) for a in both]) for p, *both in examples]).detach()
    batch = replace(batch, reference=reference)
    for kind in ("sigmoid", "ipo", "hinge"):
        trainer.loss_types = [kind]
        expected = trainer._compute_loss(theirs[0], inputs, False).item()
        assert Preference(kind, 0.3)(model, batch)[0].item() / 6 == pytest.approx(expected, abs=1e-4, rel=1e-5), kind

    means = torch.stack([torch.stack([answer_logp(model, p, a) / len(a[0]) for a in both]) for p, *both in examples])
    me = SimpleNamespace(alpha=0.0, loss_type="simpo", beta=2.0, simpo_gamma=0.5, label_smoothing=0.1, accelerator=CPU)
    losses, _, _ = CPOTrainer.cpo_loss(me, *means.unbind(1))
    found = Preference("simpo", label_smoothing=0.1, simpo_gamma=0.5)(model, batch)[0]  # 2 is its own beta
    torch.testing.assert_close(found, losses.sum(), atol=1e-4, rtol=1e-5)
    sums = torch.stack([torch.stack([answer_logp(model, p, a) for a in both]) for p, *both in examples])
    me.loss_type, me.beta = "sigmoid", 0.3
    losses, rewards, _ = CPOTrainer.cpo_loss(me, *sums.unbind(1))
    found, metrics = Preference("cpo", 0.3, cpo_alpha=0.5, label_smoothing=0.1)(model, batch)
    torch.testing.assert_close(found, (losses - 0.5 * means[:, 0]).sum(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(metrics["reward_chosen"], rewards.sum(), atol=1e-4, rtol=1e-5)
    me.beta = 2.0
    odds, *_ = ORPOTrainer.odds_ratio_loss(me, *means.unbind(1))  # trl subtracts it from the likelihood term
    found = Preference("orpo", 2.0)(model, batch)[0]
    torch.testing.assert_close(found, (-means[:, 0] - odds).sum(), atol=1e-4, rtol=1e-5)


# ---- the stage


def write_weights(folder, experts=4):
    torch.manual_seed(0)
    model = CausalLM(
        ModelConfig(
            vocab_size=TOKENIZER.vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=experts,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.05)
    about = dict(path=TOKENIZER.path, hash=TOKENIZER.hash)
    return save_weights(folder / "full_sft_32.pth", model, tokenizer=about, lineage=[])


def engine(folder, batch_size, accumulation_steps, move=True):
    """Ready for one step, with a reference that the weights have left."""
    from model.checkpoint import load_weights

    flags = [
        *FLAGS,
        f"--data_path={write_dpo(folder / 'dpo.jsonl')}",
        f"--save_dir={folder / 'out'}",
        "--grad_clip=0",
        f"--batch_size={batch_size}",
        f"--accumulation_steps={accumulation_steps}",
    ]
    config = parse(DPOConfig, flags)
    data = open_data(PreferenceDataset, config, "dpo", TOKENIZER)
    model = load_weights(write_weights(folder)).build()

    def prepare(needed):
        return add_reference(needed, model, CPU, config, "these weights")

    job = Job("dpo", config, model, Preference("sigmoid", 0.5), TOKENIZER, data, True, loader=PairLoader)
    job.prepare = prepare
    ready = Engine(job, CPU)
    if move:
        moved_on(model)
    return ready


def test_the_first_loss_is_ln_2(tmp_path):
    """Nothing has moved: all ratios are 1. (The balancing loss is apart.)"""
    first = engine(tmp_path, 16, 1, move=False)
    loss, kl, n = 0.0, 0.0, 0
    for batch in first.loader.batches(0):
        _, metrics = first.job.objective(first.model, batch)
        loss, kl, n = loss + metrics["loss"].item(), kl + metrics["kl"].item(), n + len(batch.examples)
    assert n == 16 and loss / n == pytest.approx(math.log(2), abs=1e-6) and kl / n == pytest.approx(0, abs=1e-5)


def test_an_adapter_has_the_model_below_it_as_reference(tmp_path):
    """No reference in the batch: the first loss is ln 2 exactly, even in bf16, and later ones are those of a reference
    that was read beforehand. What is written is the adapter."""
    model, frozen = small_model(std=0.2), small_model(std=0.2)
    ds = PreferenceDataset(write_dpo(tmp_path / "dpo.jsonl", 6), TOKENIZER, max_seq_len=48)
    batch, objective = one_batch(ds), Preference("sigmoid", 0.5)
    freeze(model)
    add_lora(model, LoRASettings(rank=4))
    model.compute_dtype = torch.bfloat16
    loss, metrics = objective(model, batch)
    assert loss.item() / 6 == pytest.approx(math.log(2), abs=1e-7) and metrics["kl"] == 0
    model.compute_dtype = torch.float32
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.1)
    pairs = [ds.pair(example) for example in batch.examples]
    reference = torch.stack([torch.stack([answer_logp(frozen, p, a) for a in both]) for p, *both in pairs])
    found, _ = objective(model, batch)
    expected, _ = objective(model, replace(batch, reference=reference.detach()))
    assert abs(found.item() / 6 - math.log(2)) > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    found.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())

    write_weights(tmp_path, 0)
    flags = [f"--data_path={tmp_path / 'dpo.jsonl'}", f"--save_dir={tmp_path}", "--max_steps=1", "--lora_rank=4"]
    run_stage("dpo", *flags)
    assert (tmp_path / "lora" / "rlhf_32.pth").is_file() and not (tmp_path / "rlhf_32.pth").exists()


def test_accumulation_gives_the_same_gradient(tmp_path):
    """16 pairs as 16, 4 x 4, 8 x 2 and 1 x 16, on a mixture of experts with its balancing loss."""
    expected = first_gradients(engine(tmp_path, 16, 1))
    for batch_size, accumulation_steps in ((4, 4), (8, 2), (1, 16)):
        found = first_gradients(engine(tmp_path, batch_size, accumulation_steps))
        assert_same_gradients(found, expected, 1e-5)


def test_two_ranks_train_the_same_model_as_one(tmp_path):
    flags = [
        f"--data_path={write_dpo(tmp_path / 'dpo.jsonl')}",
        f"--from_weight={write_weights(tmp_path, 0)}",
        "--max_steps=3",
        "--val_fraction=0.2",
        "--learning_rate=1e-3",
    ]
    run_stage("dpo", *flags, f"--save_dir={tmp_path / 'one'}", "--batch_size=8", f"--cache_dir={tmp_path / 'a'}")
    done = torchrun(
        "train_dpo.py",
        *FLAGS,
        *flags,
        f"--save_dir={tmp_path / 'two'}",
        "--batch_size=4",
        f"--cache_dir={tmp_path / 'b'}",
        cwd=ROOT / "trainer",
    )
    assert done.stdout.count("done in") == 1 and "reference: 24 pairs read" in done.stdout
    one, two = (state_of(tmp_path / folder / "rlhf_32.pth") for folder in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)


def test_a_stopped_run_continues_bit_for_bit(tmp_path, stop_at):  # noqa: F811
    data, weights = write_dpo(tmp_path / "dpo.jsonl"), write_weights(tmp_path)
    flags = [
        f"--data_path={data}",
        f"--from_weight={weights}",
        "--max_steps=8",
        "--batch_size=2",
        "--accumulation_steps=2",
        "--val_fraction=0.1",
        "--save_interval=3",
    ]
    whole, parts = train_twice("dpo", tmp_path, stop_at, [2, 5, 6], *flags)
    assert same(whole, parts)


def test_the_reference_is_read_once(tmp_path, capsys):
    """Another run finds it, also with another share of validation; other weights and other lengths have their own."""
    flags = [f"--data_path={write_dpo(tmp_path / 'dpo.jsonl')}", f"--save_dir={tmp_path}", "--epochs=1"]
    write_weights(tmp_path)
    read = []
    for more in ([], ["--val_fraction=0.2", "--beta=0.5"], ["--max_prompt_length=5"], ["--loss_type=orpo"]):
        run_stage("dpo", *flags, *more)
        read.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("reference:")])
    write_weights(tmp_path, experts=0)
    run_stage("dpo", *flags)
    read.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("reference:")])
    fresh, found = ["reference: 24 pairs read"], ["reference: its log-probabilities are in the cache"]
    assert read == [fresh, found, fresh, [], fresh]
    assert len(list((tmp_path / ".cache").glob("dpo.jsonl-reference-*/logprobs.npy"))) == 3


def read_lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("reference:")]


def test_other_columns_or_another_token_format_have_a_reference_of_their_own(tmp_path, capsys, monkeypatch):
    """The file's content is the same: with the two answers swapped, each had the log-probability of the other."""
    rows = [dict(ask=words(i, 3), a=words(i, 2 + i % 4), b=words(i + 1, 6)) for i in range(12)]
    flags = [f"--data_path={jsonl(tmp_path / 'mine.jsonl', *rows)}", f"--save_dir={tmp_path}", "--epochs=1"]
    write_weights(tmp_path)
    fresh, found = ["reference: 12 pairs read"], ["reference: its log-probabilities are in the cache"]
    for chosen, rejected, expected in (("a", "b", fresh), ("b", "a", fresh), ("a", "b", found)):
        columns = f"columns: {{prompt: ask, chosen: {chosen}, rejected: {rejected}}}"
        (tmp_path / f"{chosen}.yaml").write_text(columns, encoding="utf-8")
        mapped = [*flags, f"--data_mapping={tmp_path / f'{chosen}.yaml'}"]
        run_stage("dpo", *mapped)
        assert read_lines(capsys) == expected
    monkeypatch.setattr(token_cache, "FORMAT", 7)
    run_stage("dpo", *mapped)
    assert read_lines(capsys) == fresh


def test_only_the_reference_of_the_steps_of_the_run_is_read(tmp_path, capsys):
    """`--max_steps 1` read the reference of the whole file first, for 90 seconds. 24 pairs in steps of 4: one step, two
    more, and the other three. A pair that is repeated is read once. A plan makes ten steps."""
    data = write_dpo(tmp_path / "dpo.jsonl")
    flags = [f"--save_dir={tmp_path}", "--batch_size=4"]
    write_weights(tmp_path)
    for path, more in ((data, "--max_steps=1"), (data, "--max_steps=3"), (data, "--epochs=2"), (data, "--epochs=3")):
        run_stage("dpo", *flags, f"--data_path={path}", more)
    assert read_lines(capsys) == [
        "reference: 4 pairs read",
        "reference: 8 pairs read",
        "reference: 12 pairs read",
        "reference: its log-probabilities are in the cache",
    ]
    run_stage("dpo", *flags, f"--data_path={data}:3", "--epochs=1")  # other data, and so another file
    assert read_lines(capsys) == ["reference: 24 pairs read"]
    with pytest.raises(SystemExit):
        run_stage("dpo", f"--save_dir={tmp_path}", "--batch_size=1", f"--data_path={data}:2", "--epochs=1", "--plan")
    (line,) = read_lines(capsys)
    assert 5 <= int(line.split()[1]) <= 10, "of 10 steps of a pair each, some of which may be equal"


def test_what_was_read_of_the_reference_is_kept_when_the_run_is_stopped(tmp_path, capsys, monkeypatch):
    """24 pairs in steps of 4: Ctrl-C while the third step is read. The next run reads the other 16, and the file is bit
    for bit that of an undisturbed run."""
    flags = [f"--data_path={write_dpo(tmp_path / 'dpo.jsonl')}", "--batch_size=4", "--epochs=1"]
    flags.append(f"--from_weight={write_weights(tmp_path)}")
    read, seen = preference.read_answers, []

    def interrupted(model, batch):
        seen.extend(batch.examples)
        if len(seen) > 8:
            raise KeyboardInterrupt
        return read(model, batch)

    monkeypatch.setattr(preference, "read_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage("dpo", *flags, f"--save_dir={tmp_path}")
    (path,) = tmp_path.glob(".cache/dpo.jsonl-reference-*/logprobs.npy")
    assert np.isnan(np.load(path)).sum() == 2 * 16
    monkeypatch.undo()
    run_stage("dpo", *flags, f"--save_dir={tmp_path}")
    run_stage("dpo", *flags, f"--save_dir={tmp_path}", f"--cache_dir={tmp_path / 'other'}")
    assert read_lines(capsys) == ["reference: 16 pairs read", "reference: 24 pairs read"]
    assert np.array_equal(np.load(path), np.load(tmp_path / "other" / path.relative_to(tmp_path / ".cache")))


def test_two_runs_that_begin_at_the_same_time_share_one_reference(tmp_path, monkeypatch):
    """Each found no file and made one: the later replaced what the earlier had begun to fill in, and its pairs had NaN
    as reference."""
    data = write_dpo(tmp_path / "dpo.jsonl")
    config, made = parse(DPOConfig, [*FLAGS, f"--data_path={data}"]), []
    loaders = [
        PairLoader(ds, packing=True, batch_size=4, accumulation_steps=1, max_seq_len=32)
        for ds in (PreferenceDataset(data, TOKENIZER, max_seq_len=32) for _ in range(2))
    ]
    save = np.save

    def slow(*arguments):
        made.append(arguments[0])
        time.sleep(0.5)  # the other run asks in the meantime
        save(*arguments)

    monkeypatch.setattr(np, "save", slow)
    with ThreadPoolExecutor(2) as pool:
        lines = pool.map(lambda one: add_reference([(one, 2)], small_model(std=0.2), CPU, config, "these"), loaders)
        assert all("pairs read" in line or "in the cache" in line for line in lines)
    assert len(made) == 1
    first, second = (loader.dataset.reference for loader in loaders)
    assert np.array_equal(first, second, equal_nan=True) and np.isnan(first).sum() == 2 * (24 - 8)


def test_ranks_that_know_different_parts_read_the_same_pairs(tmp_path):
    """Two machines with disks of their own: the first knows steps 0 and 1, the second step 1 only. Both have to read
    the same batches, or they wait for each other for ever."""
    data = write_dpo(tmp_path / "dpo.jsonl")
    ds = PreferenceDataset(data, TOKENIZER, max_seq_len=32)
    loader = PairLoader(ds, packing=True, batch_size=4, accumulation_steps=1, max_seq_len=32)
    asked, flag = [], torch.ones(len(ds), dtype=torch.uint8)
    flag[ds.order[loader.examples(0)]] = 0  # what the other machine does not know

    class OneOfTwo(Backend):
        def gather(self, tensor):
            asked.append(len(tensor))
            return [tensor, flag if tensor.dtype == torch.uint8 else torch.zeros_like(tensor)]

    backend, model = OneOfTwo(torch.device("cpu")), small_model(std=0.2)
    config = parse(DPOConfig, [*FLAGS, f"--data_path={data}"])
    first = add_reference([(loader, 2)], model, CPU, config, "these weights")
    assert first == "reference: 8 pairs read" and not asked
    again = add_reference([(loader, 2)], model, backend, config, "these weights")
    assert again == "reference: 4 pairs read" and asked == [24, 4]


def test_preferences_are_learned_and_logged(tmp_path):
    """24 pairs by heart: the figures of the log are those of the model."""
    import json

    flags = [f"--data_path={write_dpo(tmp_path / 'dpo.jsonl')}", f"--save_dir={tmp_path}", "--epochs=12"]
    write_weights(tmp_path, 0)
    run_stage("dpo", *flags, "--learning_rate=3e-3", "--batch_size=8", f"--val_path={tmp_path / 'dpo.jsonl'}")
    (log,) = tmp_path.glob("runs/*/metrics.jsonl")
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    first, last = rows[0], rows[-1]
    assert last["loss"] < 0.3 < math.log(2) < 0.8 and last["val_accuracy"] == 1 and last["val_margin"] > 1
    assert last["margin"] == pytest.approx(last["reward_chosen"] - last["reward_rejected"], abs=1e-4)
    assert last["margin"] > first["margin"] and "val_bpb" not in last


@pytest.mark.parametrize(
    "flags, message",
    (
        (
            ["--loss_type=ipo", "--label_smoothing=0.1"],
            "--label_smoothing 0.1: belongs to --loss_type sigmoid, simpo, cpo, not to ipo",
        ),
        (["--simpo_gamma=1"], "--simpo_gamma 1: belongs to --loss_type simpo, not to sigmoid"),
        (["--beta=0"], "--beta 0: must be above 0"),
        (["--dpo_beta=0.1", "--beta=0.2"], "both set beta"),
    ),
)
def test_flags_that_cannot_be_meant(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(DPOConfig, flags)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_beta_is_the_losss_own_where_none_is_given(capsys):
    """SimPO was silently trained with DPO's 0.1, a twentieth of its paper's. What is printed is what is used."""
    assert parse(DPOConfig, []).beta == parse(DPOConfig, ["--loss_type=orpo"]).beta == 0.1
    assert "*beta" not in describe(parse(DPOConfig, []))
    config = parse(DPOConfig, ["--loss_type=simpo"])
    assert config.as_dict()["beta"] == 2 and "*beta=2" in describe(config)
    assert parse(DPOConfig, ["--loss_type=simpo", "--beta=0.5"]).beta == 0.5


def test_a_bad_row_ends_with_status_2_and_one_line(tmp_path):
    write_weights(tmp_path)
    same_twice = [user("1+1?"), says("2")]
    path = jsonl(tmp_path / "dpo.jsonl", {"chosen": same_twice, "rejected": same_twice})
    command = [sys.executable, ROOT / "trainer/train_dpo.py", *FLAGS, f"--data_path={path}", f"--save_dir={tmp_path}"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {path}:1: chosen equals rejected")
    assert done.stderr.count("\n") == 1
