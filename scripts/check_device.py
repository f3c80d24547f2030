"""The device doctor: does this machine's GPU compute what its CPU does?

    python scripts/check_device.py                  # the GPU if there is one, else the CPU
    python scripts/check_device.py --device mps
    python scripts/check_device.py --json           # for machines

Small random models train and answer on the device, in each precision that it has, and on the CPU in fp32. The table
shows the largest error of each part: of losses, gradients, or log-probabilities, as a share of their size. The exit
status is 1 if one is too large, else 0.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.console import note, run, say
from common.options import Options, option, parse

if TYPE_CHECKING:
    import torch

    from evaluation.device import Outcome

LABEL, COLUMN = 38, 14


@dataclass(frozen=True)
class DeviceConfig(Options):
    """Options of the device doctor"""

    device: str = option("auto", "auto (a GPU, else the CPU), cpu, cuda, cuda:1, mps or npu")
    json: bool = option(False, "print JSON")


def main():
    config = parse(DeviceConfig, description=__doc__)

    import torch

    from evaluation.device import dtypes_of, run_checks
    from model.precision import pick_device

    device = pick_device(config.device)
    dtypes = dtypes_of(device)
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    about = dict(name=name_of(device), device=str(device), torch=torch.__version__, platform=platform.platform())
    if not config.json:
        say(f"{about['name']} ({device}), torch {about['torch']}, {about['platform']}\n")
        say(f"{'':<{LABEL}}" + "".join(f" {name:>{COLUMN}}" for name in names))
    found: dict[str, dict[str, Outcome]] = {}
    for check, outcomes in run_checks(device, dtypes):
        found[check] = dict(zip(names, outcomes.values()))
        if not config.json:
            say(f"{check:<{LABEL}}" + "".join(f" {shown(outcome):>{COLUMN}}" for outcome in outcomes.values()))
    all_of_them = [(check, name, outcome) for check, of in found.items() for name, outcome in of.items()]
    failed = [one for one in all_of_them if not one[-1].passed]
    if config.json:
        checks = {c: {n: o._asdict() | dict(passed=o.passed) for n, o in of.items()} for c, of in found.items()}
        say(json.dumps(about | dict(checks=checks, passed=not failed), indent=1))
    for check, name, outcome in failed:
        if outcome.message:
            note(f"{check}, {name}: {outcome.message}")
    if failed:
        bad = [name for name in names if any(name == one for _, one, _ in failed)]
        good = [f"--dtype {name}" for name in names if name not in bad] + ["--device cpu"] * (device.type != "cpu")
        instead = f"; use {' or '.join(good)}" if good else ""
        note(f"{len(failed)} of {len(all_of_them)} checks failed: do not trust {', '.join(bad)} here{instead}")
        raise SystemExit(1)
    if not config.json:
        say(f"\nall {len(all_of_them)} checks passed")


def shown(outcome: Outcome) -> str:
    if outcome.error is None:
        return "FAILED"
    if outcome.limit == 0:
        return "yes" if outcome.passed else "FAILED"
    return f"{outcome.error:.3%}" + ("" if outcome.passed else " FAILED")


def name_of(device: torch.device) -> str:
    import torch

    from model.precision import cpu_facts

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_facts().get("cpu_name", "") or platform.processor() or platform.machine()


if __name__ == "__main__":
    run(main)
