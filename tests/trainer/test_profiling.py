"""--profile: the parts of a step add up to it, the run is the same as without, and a trace is left."""

import gzip
import json
import time
from collections import Counter

import pytest
import torch

from tests.helpers.compare import same, state_of
from tests.helpers.rows import write_pretrain, write_sft
from tests.helpers.runs import run_stage
from trainer.loop.profiling import Profile, kind_of, steps_of_each, table


def test_where_the_time_goes_and_a_trace(tmp_path, capsys):
    """Seven steps of two micro-batches: three warm up, two are timed, two are traced."""
    write_sft(tmp_path / "sft.jsonl")
    write_pretrain(tmp_path / "text.jsonl")
    run_stage("pretrain", f"--data_path={tmp_path / 'text.jsonl'}", f"--save_dir={tmp_path}", "--max_steps=1")
    flags = [f"--data_path={tmp_path / 'sft.jsonl'}", f"--from_weight={tmp_path / 'pretrain_32.pth'}", "--max_steps=7"]
    flags += ["--batch_size=4", "--accumulation_steps=2", "--epochs=9"]
    run_stage("full_sft", *flags, f"--save_dir={tmp_path / 'plain'}")
    assert "where the time" not in capsys.readouterr().out and not list(tmp_path.rglob("trace.json.gz"))
    run_stage("full_sft", *flags, f"--save_dir={tmp_path / 'profiled'}", "--profile")
    out = capsys.readouterr().out
    for part in ("waiting for the loader", "data to the device", "forward", "backward", "optimiser", "matrix products"):
        assert f"\n  {part}" in out
    assert "the median of 2" in out and "in 2 further steps" in out
    (trace,) = tmp_path.rglob("trace.json.gz")
    names = Counter(event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"])
    assert trace.parent.parent == tmp_path / "profiled/runs" and names["forward"] == names["backward"] == 4
    assert names["optimiser"] == 2 and names["aten::mm"] > 4
    one, two = (state_of(tmp_path / folder / "full_sft_32.pth") for folder in ("plain", "profiled"))
    assert same(one, two), "looking changes nothing"


class Slept(Profile):
    """Keeps what it would print."""

    def __init__(self, folder):
        self.said = []
        super().__init__(folder, torch.device("cpu"), self.said.append)


def test_each_part_has_its_own_time(tmp_path):
    """Steps of 10 ms for the loader and 30 ms forward, and in one of them 300 ms that the median does not show."""
    profile = Slept(tmp_path)

    def loader():
        for number in range(12):
            time.sleep(0.01)
            yield number

    seen = []
    for number in profile.steps(loader(), 12):
        profile.part("forward")
        time.sleep(0.33 if number == 6 else 0.03)
        seen.append(number)
    assert seen == list(range(12)) and len(profile.timed) == 4, "5 of 12 would be more than a third"
    assert len(profile.said) == 2 and (tmp_path / "trace.json.gz").is_file()
    for parts in profile.timed:
        assert list(parts) == ["waiting for the loader", "counting, waiting for ranks", "forward"]
        assert 0.01 <= parts["waiting for the loader"] < parts["forward"]
    assert max(parts["forward"] for parts in profile.timed) > 0.3
    assert float(profile.said[0].split(" ms")[0].rpartition(" ")[2]) < 300


def test_a_run_that_stops_in_the_middle_leaves_no_profiler_running(tmp_path):
    profile = Slept(tmp_path)
    for number in (steps := profile.steps(iter(range(9)), 9)):
        if number == 7:  # the first of the two that are traced
            break
    steps.close()
    assert not profile.said and not torch.autograd._profiler_enabled()


def test_the_table_by_hand():
    steps = [dict(forward=0.9), dict(forward=0.1, backward=0.3), dict(forward=0.05)]
    kinds = {"matrix products": (0.6, Counter({"mm": 0.4, "bmm": 0.2})), "the optimiser": (0.2, Counter(adamw=0.2))}
    assert table(steps, kinds, 2).splitlines() == [
        "where the time of a step goes: 400.0 ms, the median of 3",
        "  forward                              100.0 ms  25.0%",
        "  backward                             300.0 ms  75.0%",
        "and what it computes, by torch's profiler in 2 further steps",
        "  matrix products                      300.0 ms  75.0%  mm, bmm",
        "  the optimiser                        100.0 ms  25.0%  adamw",
    ]


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("aten::mul", "element by element"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_fused_adamw_", "the optimiser"),
        ("aten::_log_softmax", "softmax and loss"),
        ("## Call CompiledFxGraph fn7mno", "fused by the compiler"),
        ("aten::copy_", "copies and casts"),
        ("gloo:all_reduce", "exchange between processes"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("triton_poi_fused_mul_silu_1", "fused by the compiler"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::MulFunctor<float>>", "element by element"),
        ("aten::transpose", "Python and launching"),
    ],
)
def test_names_in_plain_words(operator, kind):
    assert kind_of(operator) == kind


def test_short_runs():
    assert steps_of_each(100) == (10, 5, 2) and steps_of_each(17) == (10, 5, 2)
    assert steps_of_each(7) == (3, 2, 2) and steps_of_each(3) == (1, 1, 1)


def test_a_run_with_too_few_steps_left_goes_on_without(tmp_path):
    """The end of a continued run, 2 steps of 12, was an error that said "this run has 2"; a finished one had "0"."""
    for left in (2, 0):
        profile = Slept(tmp_path)
        assert list(profile.steps(iter(range(left)), left)) == list(range(left))
        (said,) = profile.said
        assert f"needs at least 3 steps, and {left} are left" in said
    assert not torch.autograd._profiler_enabled() and not list(tmp_path.iterdir())
