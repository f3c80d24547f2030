"""Distillation: distances against plain formulas and trl, chunks, the teacher's file; the stage, with either."""

import errno
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.files import ROOT
from common.options import parse, specs
from dataset.batches.loader import Loader
from dataset.tokens.examples import SFTDataset
from dataset.tokens.teacher import Records, TaughtDataset, read_header
from model import transformer
from model.checkpoint import load_weights, save_weights
from tests.helpers.compare import assert_same_gradients, same, state_of
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.rows import write_sft
from tests.helpers.runs import FLAGS, first_gradients, run_stage, torchrun, train_twice
from tests.helpers.tokenizers import without_tags
from trainer.inputs import open_data
from trainer.loop.backend import Backend
from trainer.loop.engine import Engine, Job
from trainer.losses.distillation import Distill, Teacher, distance, with_rest
from trainer.train_distillation import DistillationConfig

KINDS = specs(DistillationConfig)["distill_loss"].choices
V = TOKENIZER.vocab_size


def test_distances_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4); the middle of both is (3/8, 5/8)."""
    log_p, log_q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    js = (
        0.5 * math.log(0.5 / 0.375)
        + 0.5 * math.log(0.5 / 0.625)
        + 0.25 * math.log(0.25 / 0.375)
        + 0.75 * math.log(0.75 / 0.625)
    ) / 2
    for kind, expected in (("forward_kl", forward), ("reverse_kl", reverse), ("js", js)):
        assert distance(kind, log_p, log_q).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind, beta", [("forward_kl", 0), ("reverse_kl", 1), ("js", 0.5)])
def test_distances_and_gradients_equal_trls(kind, beta):
    pytest.importorskip("trl")
    gkd = pytest.importorskip("trl.experimental.gkd")
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 40, requires_grad=True), torch.randn(5, 40)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, temperature=1.7, reduction="sum"
    )
    (expected,) = torch.autograd.grad(theirs, student)
    ours = distance(kind, (teacher / 1.7).log_softmax(-1), (student / 1.7).log_softmax(-1)).sum()
    (found,) = torch.autograd.grad(ours, student)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found, expected)


def test_gradients_by_hand():
    """Of logits z at temperature T: forward KL (q - p) / T; reverse KL q (log q - log p - KL) / T. So T^2 times either
    stays as large as cross-entropy's q - onehot while T grows."""
    torch.manual_seed(0)
    z, teacher, T = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9), 3.0
    log_p, log_q = (teacher / T).log_softmax(-1), (z / T).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp().detach()
    (forward,) = torch.autograd.grad(distance("forward_kl", log_p, log_q).sum(), z, retain_graph=True)
    torch.testing.assert_close(forward, (q - p) / T)
    kl = distance("reverse_kl", log_p, log_q)
    (reverse,) = torch.autograd.grad(kl.sum(), z)
    torch.testing.assert_close(reverse, q * (log_q - log_p - kl[:, None]).detach() / T)


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_ids_and_all_others_together(kind):
    """k = V is the whole distance and gradient, to rounding; fewer never tell more, since joining outcomes cannot set
    two distributions further apart."""
    torch.manual_seed(0)
    log_p, z = (torch.randn(6, 50) * 3).log_softmax(-1), torch.randn(6, 50, requires_grad=True)
    whole = distance(kind, log_p, z.log_softmax(-1))
    (expected,) = torch.autograd.grad(whole.sum(), z)
    before = torch.zeros(6)
    for k in (1, 5, 20, 50):
        ids = log_p.topk(k).indices
        found = distance(kind, with_rest(log_p, ids).clamp_min(-30), with_rest(z.log_softmax(-1), ids))
        assert (found > before - 1e-5).all() and (found < whole + 1e-4).all()
        before = found.detach()
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=2e-5)
    (gradient,) = torch.autograd.grad(found.sum(), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-5)
    rest = with_rest(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[1]])).exp()
    assert rest.tolist() == [pytest.approx([0.3, 0.7])]


# ---- the objective


def write_weights(folder, name: str, seed: int, tokenizer=TOKENIZER, **changes):
    torch.manual_seed(seed)
    model = small_model(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    about = dict(path=tokenizer.path, hash=tokenizer.hash)
    return save_weights(
        folder / f"{name}_32{'_moe' if 'num_experts' in changes else ''}.pth", model, tokenizer=about, lineage=[]
    )


def teacher_of(path):
    return Teacher(load_weights(path), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [transformer.LOGITS_AT_ONCE, 1])
def test_loss_and_gradient_equal_a_plain_reference(kind, chunk, tmp_path, monkeypatch):
    """Whole (tokens, V) logits of both models, one conversation at a time; the objective packs, selects, and with the
    least chunk goes through 128 positions at a time."""
    monkeypatch.setattr(transformer, "LOGITS_AT_ONCE", chunk)
    dataset = SFTDataset(write_sft(tmp_path / "sft.jsonl"), TOKENIZER, max_seq_len=32)
    path, alpha, T = write_weights(tmp_path, "teacher", 1), 0.3, 2.5
    student, plain = small_model(), load_weights(path).build()
    total, apart, count = 0.0, 0.0, 0
    (batch, *_) = Loader(dataset, packing=True, batch_size=16, accumulation_steps=1, max_seq_len=32).batches(0)
    for example in batch.examples:
        ids, trained = torch.tensor(dataset.tokens(example).tolist()), torch.tensor(dataset.trained(example)[1:])
        z, t = (model(ids[None, :-1]).logits[0][trained] for model in (student, plain))
        p, q = (t / T).softmax(-1).detach(), (z / T).softmax(-1)
        m = (p + q) / 2
        kl = lambda a, b: (a * (a.log() - b.log())).sum()
        far = kl(p, q) if kind == "forward_kl" else kl(q, p) if kind == "reverse_kl" else (kl(p, m) + kl(q, m)) / 2
        total = total + alpha * F.cross_entropy(z, ids[1:][trained], reduction="sum") + (1 - alpha) * T * T * far
        apart, count = apart + far.item(), count + int(trained.sum())
    total.backward()
    expected = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    objective = Distill(kind, T, alpha, V, teacher_of(path))
    loss, metrics = objective(student, batch)
    loss.backward()
    assert objective.count(batch) == count and metrics["distance"].item() == pytest.approx(apart, rel=1e-4)
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-4)
    assert_same_gradients({n: p.grad for n, p in student.named_parameters()}, expected, 1e-4)


def test_no_logits_of_all_positions_pile_up(tmp_path, monkeypatch):
    """With chunks of 128 positions both heads make 128 x V numbers at a time, and none of them waits for the backward
    pass, where a plain loss over the same positions keeps all of them."""
    monkeypatch.setattr(transformer, "LOGITS_AT_ONCE", 1)
    dataset = SFTDataset(write_sft(tmp_path / "sft.jsonl"), TOKENIZER, max_seq_len=32)
    (batch, *_) = Loader(dataset, packing=True, batch_size=16, accumulation_steps=1, max_seq_len=32).batches(0)
    batch = replace(batch, selected=None)
    objective, student = Distill("js", 2.0, 0.5, V, teacher_of(write_weights(tmp_path, "teacher", 1))), small_model()
    kept, made, compare = [], [], objective._compare
    objective._compare = lambda seen, logits, *rest: made.append(len(logits)) or compare(seen, logits, *rest)
    objective.teacher.head.register_forward_hook(lambda module, given, out: made.append(len(out)))
    wide = lambda x: kept.append(x.numel() // V) if x.shape[-1:] == (V,) else None
    with torch.autograd.graph.saved_tensors_hooks(lambda x: wide(x) or x, lambda x: x):
        loss, _ = objective(student, batch)
        assert sum(made) == 2 * batch.tokens.numel() > 600 and max(made) == 128 and not kept
        monkeypatch.undo()
        student(batch.tokens, targets=batch.targets)
        assert max(kept) == batch.tokens.numel()
    loss.backward()


def engine(folder, batch_size, accumulation_steps):
    config = parse(
        DistillationConfig,
        [
            *FLAGS,
            f"--data_path={folder / 'sft.jsonl'}",
            "--teacher=teacher",
            f"--save_dir={folder / 'out'}",
            f"--batch_size={batch_size}",
            "--grad_clip=0",
            f"--accumulation_steps={accumulation_steps}",
        ],
    )
    data = open_data(TaughtDataset, config, "sft", TOKENIZER)
    teacher = teacher_of(folder / "teacher_32.pth")
    objective = Distill("forward_kl", 2.0, 0.5, V, teacher)
    job = Job("distillation", config, small_model(num_experts=4), objective, TOKENIZER, data, packing=True)
    return Engine(job, Backend(torch.device("cpu")))


def test_accumulation_gives_the_same_gradient(tmp_path):
    """16 examples as 16, 4 x 4 and 1 x 16, the balancing loss of a student with experts included."""
    write_sft(tmp_path / "sft.jsonl")
    write_weights(tmp_path, "teacher", 1)
    expected = first_gradients(engine(tmp_path, 16, 1))
    for batch_size, accumulation_steps in ((4, 4), (1, 16)):
        assert_same_gradients(first_gradients(engine(tmp_path, batch_size, accumulation_steps)), expected, 1e-5)


# ---- the teacher's file


def flags_of(folder, *more):
    return ["--data_path", f"{folder / 'sft.jsonl'}", f"--save_dir={folder}", "--batch_size=4", *more]


@pytest.fixture
def world(tmp_path):
    """Rows, a student full_sft_32.pth, a teacher of 32 ids and one file of everything it says."""
    write_sft(tmp_path / "sft.jsonl")
    write_weights(tmp_path, "full_sft", 0)
    write_weights(tmp_path, "teacher", 1)
    return tmp_path


def test_the_file_says_what_the_teacher_does(world, capsys):
    """Every record against the teacher alone with its conversation: ids, log-probabilities to fp16's precision, the
    rest together. And 2 bytes an id, 2 a probability: (4 + 4) + 2 for k = 2."""
    path = world / "t.lp"
    run_stage("distillation", *flags_of(world, "--teacher=teacher", f"--write_logprobs={path}", "--top_k=2"))
    said, header = capsys.readouterr().out, read_header(path)
    assert f"{header['tokens']:,} trained tokens, 10 bytes each" in said and header["bytes_per_token"] == 10
    dataset = TaughtDataset([world / "sft.jsonl"], TOKENIZER, max_seq_len=32, on_long="truncate", header=header)
    plain, seen = load_weights(world / "teacher_32.pth").build(), 0
    for i in range(0, len(dataset), 7):
        ids, trained, extras = dataset.tokens(i), dataset.trained(i), dataset.extras(i)
        log_p = (plain(torch.tensor([ids[:-1].tolist()])).logits[0] / 2).log_softmax(-1).detach()
        for t in np.flatnonzero(trained[1:]):  # log_p[t] is about token t + 1
            best = log_p[t].topk(2)
            assert extras["teacher_ids"][t + 1].tolist() == best.indices.tolist()
            rest = math.log(1 - best.values.exp().sum().item())
            assert extras["teacher_logprobs"][t + 1].tolist() == pytest.approx([*best.values.tolist(), rest], abs=5e-3)
            seen += 1
    assert seen > 20
    assert not extras["teacher_logprobs"][~trained].any()


def test_asking_a_teacher_needs_no_student(world):
    """A teacher from elsewhere, and no full_sft in out/: the command ended with "no weights called 'full_sft'"."""
    flags = flags_of(world, f"--teacher={world / 'teacher_32.pth'}", f"--save_dir={world / 'empty'}", "--top_k=2")
    run_stage("distillation", *flags, f"--write_logprobs={world / 'alone.lp'}")
    run_stage(
        "distillation", *flags, f"--write_logprobs={world / 't.lp'}", f"--from_weight={world / 'full_sft_32.pth'}"
    )
    assert (world / "alone.lp").read_bytes() == (world / "t.lp").read_bytes()


def test_a_file_of_all_ids_trains_as_the_teacher_itself(world):
    path = world / "all.lp"
    run_stage("distillation", *flags_of(world, "--teacher=teacher", f"--write_logprobs={path}", f"--top_k={V + 5}"))
    assert read_header(path)["top_k"] == V
    learn = ["--max_steps=3", "--distill_loss=js", "--learning_rate=1e-3", "--val_fraction=0.2", "--alpha=0"]
    found = []
    for number, source in enumerate(("--teacher=teacher", f"--teacher_logprobs={path}")):
        out = world / str(number)
        run_stage(
            "distillation",
            *flags_of(world, f"--from_weight={world / 'full_sft_32.pth'}", *learn),
            f"--save_dir={out}",
            source if number else f"--teacher={world / 'teacher_32.pth'}",
        )
        found.append(state_of(out / "full_dist_32.pth"))
    start = state_of(world / "full_sft_32.pth")
    for name, expected in found[0].items():  # Adam's first steps blow up fp16's rounding where gradients are small
        assert (found[1][name] - expected).norm() < 0.1 * (expected - start[name]).norm() + 1e-6, name


@pytest.mark.parametrize(
    "more, message",
    [
        (["--max_seq_len=31"], r"was written for other examples: --max_seq_len was 32, is 31"),
        (["--on_long=drop"], r"was written for other examples: the data \(files, rows, --on_long, token format\) was"),
        (["--temperature=1"], r"--temperature 1: .*t\.lp was written at 2"),
        ([], r"t\.lp: truncated, it should have"),
    ],
)
def test_a_file_for_something_else_is_refused(more, message, world):
    path = world / "t.lp"
    run_stage("distillation", *flags_of(world, "--teacher=teacher", f"--write_logprobs={path}", "--top_k=2"))
    if not more:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=message):
        run_stage("distillation", *flags_of(world, f"--teacher_logprobs={path}", *more))


def test_a_fresh_student_of_another_tokenizer_is_told_the_flag(world, tmp_path):
    """The advice was to write the file again, which made the same file."""
    path = world / "t.lp"
    run_stage("distillation", *flags_of(world, "--teacher=teacher", f"--write_logprobs={path}", "--top_k=2"))
    without_tags(tmp_path / "other", "<answer>", "</answer>")
    with pytest.raises(ValueError, match=r"the tokenizer was \w+, is \w+; give a fresh student .*--tokenizer_path"):
        run_stage(
            "distillation",
            *flags_of(world, f"--teacher_logprobs={path}", "--preset=nano", f"--tokenizer_path={tmp_path / 'other'}"),
        )


def test_an_interrupted_file_is_continued(world, monkeypatch, capsys):
    """Ctrl-C in the third step. What was asked before is not asked again, and the file is the same."""
    flags = flags_of(world, "--teacher=teacher", "--top_k=2", "--batch_size=1")
    run_stage("distillation", *flags, f"--write_logprobs={world / 'whole.lp'}")
    asked, states = [], Teacher.states

    def interrupted(teacher, batch):
        asked.append(batch.examples)
        if len(asked) == 17:  # a step has 8 batches
            raise KeyboardInterrupt
        return states(teacher, batch)

    monkeypatch.setattr(Teacher, "states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage("distillation", *flags, f"--write_logprobs={world / 'parts.lp'}")
    assert not (world / "parts.lp").exists()
    with pytest.raises(ValueError, match="parts.lp.partial: is not complete"):
        read_header(world / "parts.lp.partial")
    run_stage("distillation", *flags, f"--write_logprobs={world / 'parts.lp'}")
    assert "continues after 2 of" in capsys.readouterr().err
    assert not set(asked[:16]) & set(asked[17:]) and asked[16] in asked[17:]
    assert (world / "parts.lp").read_bytes() == (world / "whole.lp").read_bytes()
    assert not (world / "parts.lp.partial").exists()
    # an interrupted file of another teacher is not continued
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        run_stage("distillation", *flags, f"--write_logprobs={world / 'other.lp'}")
    monkeypatch.setattr(Teacher, "states", states)
    flags[flags.index("--teacher=teacher")] = "--teacher=full_sft"
    run_stage("distillation", *flags, f"--write_logprobs={world / 'other.lp'}")
    assert "continues" not in capsys.readouterr().err


def test_a_file_that_lacks_only_its_name_gets_it(world, monkeypatch, capsys):
    """A kill while the whole file was flushed to the disk: the teacher was asked about everything again."""
    flags = flags_of(world, "--teacher=teacher", f"--write_logprobs={world / 'late.lp'}")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dataset.tokens.teacher.put_in_place", killed)
        run_stage("distillation", *flags)
    monkeypatch.setattr(Teacher, "states", None)  # it is not asked
    run_stage("distillation", *flags)
    found = re.search(r"continues after (\d+) of (\d+) steps", capsys.readouterr().err)
    assert found and found[1] == found[2]
    assert read_header(world / "late.lp")["tokens"] and not (world / "late.lp.partial").exists()


def test_a_place_that_no_file_can_have_is_refused_before_the_teacher_is_asked(world, monkeypatch):
    monkeypatch.setattr(Teacher, "states", None)
    with pytest.raises(ValueError, match=r"--write_logprobs .*: is a directory, expected a file"):
        run_stage("distillation", *flags_of(world, "--teacher=teacher", f"--write_logprobs={world}"))


def test_a_full_disk_is_said_with_the_name_of_the_file(world, monkeypatch):
    def full(*_):
        raise OSError("3 requested and 2 written")  # numpy's words

    monkeypatch.setattr(Records, "__setitem__", full)
    with pytest.raises(OSError) as caught:
        run_stage("distillation", *flags_of(world, "--teacher=teacher"), f"--write_logprobs={world / 'full.lp'}")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(world / "full.lp"))


def test_what_is_no_such_file_is_refused(world):
    with pytest.raises(ValueError, match="not a file that --write_logprobs writes"):
        run_stage("distillation", *flags_of(world, f"--teacher_logprobs={world / 'sft.jsonl'}"))


# ---- the stage


@pytest.mark.parametrize("source", ("teacher", "teacher_logprobs"))
def test_a_stopped_run_continues_bit_for_bit(source, world, stop_at):  # noqa: F811
    given = world / "teacher_32.pth"
    if source == "teacher_logprobs":
        given = world / "t.lp"
        run_stage("distillation", *flags_of(world, "--teacher=teacher", f"--write_logprobs={given}"))
    flags = [
        f"--data_path={world / 'sft.jsonl'}",
        f"--from_weight={world / 'full_sft_32.pth'}",
        f"--{source}={given}",
        "--max_steps=8",
        "--batch_size=2",
        "--accumulation_steps=2",
        "--val_fraction=0.1",
        "--save_interval=3",
    ]
    whole, parts = train_twice("distillation", world, stop_at, [2, 5], *flags)
    assert same(whole, parts)


@pytest.mark.parametrize("source", ("teacher", "teacher_logprobs"))
def test_a_student_that_is_its_own_teacher_is_warned_of(source, world, capsys):
    """As the documentation once said: --teacher full_sft writes the file, and full_sft learns from it. At distance 0
    from the teacher, it learned nothing of it. In 4 bits, or with an adapter, it may be meant: so it is a warning."""
    given = "full_sft"
    if source == "teacher_logprobs":
        given = world / "t.lp"
        run_stage("distillation", *flags_of(world, "--teacher=full_sft", f"--write_logprobs={given}"))
    flags = flags_of(world, f"--{source}={given}", "--max_steps=1")
    for more, warned in (
        ([], True),
        (["--preset=nano", "--hidden_size=32", "--num_hidden_layers=1"], False),
        (["--from_weight=teacher", "--save_weight=other"], False),
    ):
        capsys.readouterr()
        run_stage("distillation", *flags, *more)
        assert ("the student starts as the teacher itself" in capsys.readouterr().out) == warned


def test_another_teacher_is_another_run(world):
    other = write_weights(world, "other", 2)
    run_stage("distillation", *flags_of(world, "--teacher=teacher", "--max_steps=1"))
    with pytest.raises(ValueError, match="teacher was"):
        run_stage("distillation", *flags_of(world, f"--teacher={other}", "--max_steps=2", "--from_resume=auto"))


def test_two_ranks_train_the_same_model_as_one(world):
    student = write_weights(world, "experts", 0, num_experts=4)
    flags = [
        f"--data_path={world / 'sft.jsonl'}",
        f"--from_weight={student}",
        "--max_steps=3",
        "--val_fraction=0.2",
        f"--teacher={world / 'teacher_32.pth'}",
        "--learning_rate=1e-3",
    ]
    run_stage("distillation", *flags, f"--save_dir={world / 'one'}", "--batch_size=8")
    torchrun(
        "train_distillation.py", *FLAGS, *flags, f"--save_dir={world / 'two'}", "--batch_size=4", cwd=ROOT / "trainer"
    )
    one, two = (state_of(world / folder / "full_dist_32_moe.pth") for folder in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)


def test_a_student_comes_closer_to_its_teacher(world, capsys):
    """Only the distance is trained (--alpha 0), from scratch: a preset with the teacher's tokenizer."""
    run_stage(
        "distillation",
        *flags_of(world, "--teacher=teacher", "--preset=nano", "--hidden_size=32", "--alpha=0"),
        "--num_hidden_layers=1",
        "--max_steps=12",
        "--learning_rate=3e-3",
        "--val_fraction=0.2",
    )
    said = capsys.readouterr().out
    assert "from: a fresh nano" in said and "teacher: " in said and "parameters" in said
    distances = [
        float(line.split("distance ")[1].split()[0].strip(","))
        for line in said.splitlines()
        if line.startswith("step ") and "distance" in line
    ]
    assert distances[-1] < 0.9 * distances[0]
    assert load_weights(world / "full_dist_32.pth").lineage[-1]["stage"] == "distillation"


def test_tokenizer_path_names_the_teachers_or_is_refused(world):
    """It was not read: a teacher whose tokenizer was moved could not be used, and a fresh student took the teacher's
    without a word where another was named."""
    smaller = without_tags(world / "small", "<answer>", "</answer>")
    teacher = write_weights(world, "foreign", 1, tokenizer=smaller)
    moved = (world / "small").rename(world / "moved")
    flags = flags_of(world, f"--teacher={teacher}", "--preset=nano", "--max_steps=1", f"--save_dir={world / 'out'}")
    with pytest.raises(ValueError, match="cannot find the tokenizer .*Say where it is with --tokenizer_path"):
        run_stage("distillation", *flags)
    run_stage("distillation", *flags, f"--tokenizer_path={moved}")
    assert load_weights(world / "out/full_dist_192.pth").tokenizer["hash"] == smaller.hash
    with pytest.raises(ValueError, match="--tokenizer_path .*: its [0-9,]+ ids are not those of --teacher"):
        run_stage("distillation", *flags_of(world, "--teacher=teacher", "--preset=nano", f"--tokenizer_path={moved}"))


def test_a_teacher_of_another_vocabulary_is_refused_in_one_line(world):
    other = without_tags(world / "tokenizer", "<answer>", "</answer>")
    teacher = write_weights(world, "foreign", 1, tokenizer=other)
    command = [sys.executable, ROOT / "trainer/train_distillation.py", *FLAGS, *flags_of(world, f"--teacher={teacher}")]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(other.path) in done.stderr and str(ROOT / "tokenizer") in done.stderr and "6,400 ids" in done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--teacher or --teacher_logprobs: give one of them"),
        (["--teacher=a", "--teacher_logprobs=b"], "--teacher or --teacher_logprobs: give one of them"),
        (["--teacher_logprobs=b", "--write_logprobs=c"], "needs a --teacher"),
        (["--teacher_logprobs=b", "--val_path=c"], "--val_path and --teacher_logprobs"),
        (["--teacher=a", "--write_logprobs=c", "--val_fraction=0.1"], "--write_logprobs: asks about all rows"),
        (["--teacher=a", "--write_logprobs=c", "--plan"], "--write_logprobs: does not train, and --plan is about"),
        (["--teacher=a", "--alpha=2"], "--alpha 2: must be in [0, 1]"),
    ],
)
def test_flags_that_cannot_be_meant(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(DistillationConfig, flags)
    assert end.value.code == 2 and message in capsys.readouterr().err
