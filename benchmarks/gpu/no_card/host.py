"""What the host does for a step of generation, on a card that computes nothing: nothing else takes time there.

    python benchmarks/gpu/no_card/run.py python benchmarks/gpu/no_card/host.py

On a real card each launch and copy costs the host some microseconds more. If a step's kernels take longer than that,
the host does not show, because it queues a step before it reads the last one's tokens.
"""

import statistics
import sys
import time
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch

from inference.engine import Engine, Request
from inference.sampling import Sampling
from model.config import ModelConfig
from model.precision import prepare_for_inference
from model.transformer import CausalLM

PROMPT, NEW = list(range(100, 132)), 300


def step_times(model: CausalLM, sampling: Sampling, streams: int) -> list[float]:
    """Microseconds of the steps in which the same sequences go on."""
    engine, times = Engine(model, streams, len(PROMPT) + NEW), []
    for _ in range(streams):
        engine.submit(Request(PROMPT, sampling, NEW))
    while engine.busy:
        begin = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - begin) * 1e6)
    return times[-NEW // 2 : -2]


def main():
    model = prepare_for_inference(CausalLM(ModelConfig.preset("small")), torch.bfloat16).to("cuda:0")
    for name, sampling in (("greedy", Sampling(temperature=0)), ("temperature and top_p", Sampling())):
        for streams in (1, 64):
            times = sorted(step_times(model, sampling, streams))
            low, high = times[len(times) // 10], times[-len(times) // 10]
            print(f"{name}, {streams} at once: {statistics.median(times):.0f} [{low:.0f} .. {high:.0f}] µs a step")


if __name__ == "__main__":
    main()
