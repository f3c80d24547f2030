"""The loop of every stage on the `meta` device, which stands in for a card: its tensors have shapes and no numbers.

Whatever would make a card wait ends here in an error: reading a number (.item(), .tolist(), bool, a mask's shape), and
copying from the processor in the middle of a step. So does a tensor that was left on the processor.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataset.batches.loader import Copier
from model import packed
from model.attention import find_segments
from model.checkpoint import save_weights
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.rows import write_dpo, write_pretrain, write_reason, write_sft
from tests.helpers.runs import run_stage
from tests.helpers.streams import Streams
from trainer.loop import engine as engine_module
from trainer.loop import optim, processes
from trainer.loop.engine import Engine
from trainer.losses import preference

CARD = torch.device("meta")
LORA = ["--use_lora", "--lora_dropout=0.1"]
STAGES = {  # stage, its rows, experts of the weights it starts from, further flags
    "pretrain": ("pretrain", write_pretrain, None, []),
    "pretrain, long rows": ("pretrain", write_pretrain, None, ["--max_seq_len=8"]),
    "moe": ("pretrain", write_pretrain, None, ["--use_moe"]),
    "moe in fp16": ("pretrain", write_pretrain, None, ["--use_moe", "--dtype=float16"]),
    "muon": ("pretrain", write_pretrain, None, ["--optimizer=muon"]),
    "full_sft": ("full_sft", write_sft, 0, ["--accumulation_steps=2"]),
    "recomputed": ("full_sft", write_sft, 4, ["--activation_checkpointing"]),
    "lora": ("lora", write_sft, 0, ["--lora_rank=4"]),
    "lora in 4 bits": ("lora", write_sft, 0, ["--load_in_4bit"]),
    "lora in 8 bits": ("lora", write_sft, 0, ["--load_in_8bit"]),
    "dpo": ("dpo", write_dpo, 0, []),
    "dpo in fp16": ("dpo", write_dpo, 0, ["--dtype=float16"]),
    "dpo with lora": ("dpo", write_dpo, 0, LORA),
    "ipo": ("dpo", write_dpo, 0, ["--loss_type=ipo"]),
    "simpo": ("dpo", write_dpo, 4, ["--loss_type=simpo"]),
    "orpo": ("dpo", write_dpo, 0, ["--loss_type=orpo"]),
    "cpo": ("dpo", write_dpo, 0, ["--loss_type=cpo"]),
    "reasoning": ("distill_reason", write_reason, 0, []),
    "distillation": ("distillation", write_sft, 0, ["--teacher={weights}"]),
    "distillation from a file": ("distillation", write_sft, 0, ["--teacher_logprobs={weights}.lp"]),
}


class Card(TorchDispatchMode):
    """Refuses operations that mix a card's tensors with others, and copies to the card. Batches are not copied in the
    loop: the loader's thread has done it, which this does not see."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [t for t in (*given, *tree_leaves(out)) if isinstance(t, torch.Tensor) and t.device == CARD]
        if there:  # a number may come along with the operation; a tensor may not
            left = [t for t in given if t.device != CARD and t.dim() > 0]
            assert not left, f"{func}: {[tuple(t.shape) for t in left]} is not on the card"
        return out


@contextmanager
def watched(monkeypatch):
    make = torch.tensor

    def from_python(*arguments, **options):
        made = make(*arguments, **options)
        assert made.device != CARD, "numbers of Python's are copied to the card, which waits"
        return made

    with monkeypatch.context() as patch, Card():
        patch.setattr(torch, "tensor", from_python)
        yield


class Foreach(torch.optim.AdamW):
    """Fused AdamW knows no meta device. This one has the same operations one by one, but does not read `found_inf`."""

    def __init__(self, params, *, fused, **options):
        super().__init__(params, **options, foreach=True)

    def step(self, closure=None):
        del self.found_inf
        return super().step(closure)


def on_the_card(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Foreach)
        return optim.build_optimizers(*arguments)


def without_numbers(needed, *_, **__):
    for loader, _ in needed:
        loader.dataset.reference = np.zeros((int(loader.dataset.order.max()) + 1, 2), np.float32)
    return "reference: zeros"


@pytest.fixture
def steps(monkeypatch):
    """Runs an engine's own loop for three steps on the card -> the results. Logging and saving are left out, which wait
    for the card: only the steps after which they are due are checked."""
    results, run, sound, train_step = [], Engine.run, Engine._is_sound, Engine.train_step

    def dry_run(engine):
        assert engine.backend.device == CARD and all(p.device == CARD for p in engine.model.parameters())
        engine.model.attention_kernel = "varlen"
        engine.total, performed = min(3, engine.total), []
        engine.loader.copier = Copier(CARD)
        packed.keep_tables(CARD)  # as a run does once, when they are first used
        with monkeypatch.context() as patch, watched(monkeypatch):
            patch.setattr(Engine, "train_step", lambda *given: results.append(train_step(*given)) or results[-1])
            # in fp16 the next step's loss scale depends on this one: it does wait
            patch.setattr(Engine, "_is_sound", lambda _, due: bool(due) or engine.watch.scaled or sound(engine, due))
            patch.setattr(Engine, "_perform", lambda *_: performed.append(engine.step))
            patch.setattr(Engine, "_finish", lambda _: None)
            run(engine)
        assert performed == [n for n in range(1, engine.total + 1) if n % 2 == 0 or n == engine.total]

    Streams(monkeypatch)
    monkeypatch.setattr(processes, "pick_device", lambda *_: CARD)
    monkeypatch.setattr(engine_module, "build_optimizers", on_the_card)
    monkeypatch.setattr(Engine, "run", dry_run)
    monkeypatch.setattr(preference, "add_reference", without_numbers)
    monkeypatch.setattr("model.moe._has_grouped_mm", lambda _: True)
    return results


def flags(folder, write, experts, more):
    found = [f"--data_path={write(folder / 'data.jsonl', 12)}", f"--save_dir={folder / 'out'}", "--batch_size=4"]
    if experts is not None:
        about = dict(path=TOKENIZER.path, hash=TOKENIZER.hash)
        weights = save_weights(folder / "start.pth", small_model(num_experts=experts), tokenizer=about, lineage=[])
        more = [f"--from_weight={weights}", *(flag.format(weights=weights) for flag in more)]
    return [*found, "--dtype=bfloat16", "--log_interval=2", *more]


@pytest.mark.parametrize("name", STAGES)
def test_nothing_waits_and_nothing_is_left_behind(name, tmp_path, steps, monkeypatch):
    stage, write, experts, more = STAGES[name]
    *others, last = words = flags(tmp_path, write, experts, more)
    if last.startswith("--teacher_logprobs="):
        place = last.partition("=")[2]
        with monkeypatch.context() as patch:  # the file is written where there are numbers
            patch.setattr(processes, "pick_device", lambda *_: torch.device("cpu"))
            asked = [f"--teacher={place.removesuffix('.lp')}", f"--write_logprobs={place}", "--top_k=3"]
            run_stage(stage, *others, *asked)
        assert not steps
    run_stage(stage, *words)
    assert 1 <= len(steps) <= 3
    for result in steps:
        assert all(tensor.device == CARD for tensor in (*result.losses, *result.metrics.values(), result.norm))


@pytest.mark.parametrize("chunked", (True, False))
def test_a_large_vocabulary(chunked, tmp_path, steps, monkeypatch):
    monkeypatch.setattr("model.transformer.LOGITS_AT_ONCE", 1 if chunked else 1 << 26)
    run_stage("full_sft", *flags(tmp_path, write_sft, 0, []))
    assert steps


# ---- the watch itself notices what it is there for


def read_a_number(model, batch):
    float(model(batch.tokens, **batch.context()).loss.sum())


def choose_by_a_mask(model, batch):
    loss = model(batch.tokens, **batch.context()).loss
    return loss[loss > 0]


def leave_something_behind(model, batch):
    return model(batch.tokens, **batch.context()).loss * torch.ones(batch.tokens.shape)


def copy_in_between(model, batch):
    return model(batch.tokens, **batch.context()).loss + torch.tensor([1.0], device=batch.tokens.device)


def ask_where_documents_end(model, batch):
    model(batch.tokens, documents=batch.documents, targets=batch.targets)


MISTAKES = [read_a_number, choose_by_a_mask, leave_something_behind, copy_in_between, ask_where_documents_end]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(mistake, tmp_path, steps, monkeypatch):
    class Wrong:
        per_token = True

        def count(self, batch):
            return batch.trained_tokens

        def __call__(self, model, batch):
            mistake(model, batch)
            loss = model(batch.tokens, **batch.context()).loss.sum()
            return loss, {"loss": loss.detach()}

    monkeypatch.setattr("trainer.losses.next_token.NextToken", Wrong)
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        run_stage("full_sft", *flags(tmp_path, write_sft, 0, []))


# ---- compiled


@pytest.mark.parametrize("experts", (0, 4))
def test_a_block_is_one_graph_on_the_card_too(experts):
    """Segments, gathered keys, experts in blocks: all but the code generator, which wants a card."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch.device(CARD):
        model = small_model(num_experts=experts)
    model.attention_kernel, model.compute_dtype = "varlen", torch.float16
    for block in model.model.layers:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    documents, prefixes = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 0]] * 2), torch.tensor([[1] * 7 + [0]] * 2)
    for given in (dict(documents=documents), dict(documents=documents, prefixes=prefixes)):
        segments = find_segments(*given.values()).to(CARD)
        tokens = torch.zeros(2, 8, dtype=torch.long, device=CARD)
        given = {name: value.to(CARD) for name, value in given.items()}
        model(tokens, targets=tokens, segments=segments, **given).loss.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_tables_of_packed_weights_are_not_copied_at_each_step():
    """They were a part of compiled code: 16 copies a step of eight layers, and each of them waits for the card."""
    weight = packed.NF4(*(torch.zeros(of, device=CARD) for of in ((64,), (2,), (1,), ())))
    weight = weight._replace(codes=weight.codes.byte(), scale_codes=weight.scale_codes.byte())
    packed.keep_tables(CARD)
    seen = []

    def graph(module, inputs):
        seen.extend(value for value in inputs if isinstance(value, torch.Tensor))
        return module.forward

    torch.compile(lambda: packed.dequantize(weight, (2, 64), torch.bfloat16), fullgraph=True, backend=graph)()
    assert len(seen) == 6 and all(value.device == CARD for value in seen), "four of the weight, and two tables"
