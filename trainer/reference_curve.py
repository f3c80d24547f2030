"""Makes a reference curve of good runs, for later runs to be compared with.

    for seed in 1 2 3 4 5; do python trainer/train_pretrain.py --data_path my.jsonl --preset nano --seed $seed; done
    python trainer/reference_curve.py out/runs/pretrain_192-* --output my_curve.json
    python trainer/train_pretrain.py --data_path my.jsonl --preset nano --reference_curve my_curve.json

The runs differ in their seeds and in nothing else. They need not be complete: the curve goes as far as the shortest of
them, so each may be stopped with Ctrl-C. At the end, each run is compared with the curve of the others, to see whether
one more good run would be taken for one.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
from dataclasses import dataclass
from statistics import median
from typing import Any

from common.console import UserError, check_writable, run, say
from common.files import ROOT, atomic_file
from common.options import Options, option, parse
from trainer.run.logger import read_metrics
from trainer.run.reference import RUNS, Curve, Reference, Window, differences, mean_loss


@dataclass(frozen=True)
class CurveConfig(Options):
    """Options of a curve"""

    runs: tuple[str, ...] = option((), f"folders of {RUNS} runs or more; the flag may be left out", path=True)
    output: str = option(str(ROOT / "out" / "reference_curve.json"), "file that is written", path=True)

    def problems(self) -> list[str]:
        found = super().problems()
        if len(self.runs) < RUNS:
            found.append(f"--runs names {len(self.runs)}: at least {RUNS} folders in out/runs are needed")
        return found


@dataclass(frozen=True)
class Run:
    """What a run has logged."""

    folder: Path
    seed: int
    facts: dict[str, Any]
    windows: list[Window]


def read_run(folder: Path) -> Run:
    """UserError if it is not the folder of a run with losses."""
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if {"loss", "tokens"} <= row.keys()]
        seed, facts = info["config"]["seed"], {**info["facts"]}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; name folders like out/runs/pretrain_192-20261128") from None
    except KeyError:
        raise UserError(f"{folder / 'run.json'}: does not say what the run was made of; train again") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / 'run.json'}: cannot be read ({error})") from None
    bad = next((row["step"] for row in rows if row["loss"] is None), None)
    if bad is not None or not rows:
        reason = "has logged nothing" if bad is None else f"its loss was not finite in step {bad}"
        raise UserError(f"{folder / 'metrics.jsonl'}: {reason}; leave this run out")
    ends = [row["tokens"] for row in rows]
    return Run(folder, seed, facts, list(zip([0, *ends], ends, [row["loss"] for row in rows])))


def make_curve(name: str, runs: list[Run]) -> Curve:
    """UserError if the runs differ in more than their seeds. The windows are those of the shortest run."""
    first, seen = runs[0], {}
    for one in runs:
        if one.seed in seen:
            raise UserError(f"{one.folder} and {seen[one.seed]}: both have seed {one.seed}; give each run another")
        seen[one.seed] = one.folder
        if other := differences(first.facts, one.facts):
            raise UserError(
                f"{one.folder}: not the same kind of run as {first.folder}: another {', '.join(other)}"
                + ("; --val_fraction draws by the seed, --val_path does not" if "data" in other else "")
            )
    shortest = min(runs, key=lambda one: one.windows[-1][1])
    losses = [sorted(mean_loss(one.windows, begin, end) for one in runs) for begin, end, _ in shortest.windows]
    rounded = lambda values: [round(value, 4) for value in values]
    return Curve(
        name,
        first.facts,
        seeds=[one.seed for one in runs],
        tokens=[int(end) for _, end, _ in shortest.windows],
        low=rounded(own[0] for own in losses),
        median=rounded(median(own) for own in losses),
        high=rounded(own[-1] for own in losses),
    )


def check(run: Run, curve: Curve) -> str:
    """What a run would be told beside this curve; an empty text if it is inside the band."""
    reference = Reference(curve, run.facts)
    return "; ".join(filter(None, (reference.add(int(end), loss) for _, end, loss in run.windows)))


def main():
    config = parse(CurveConfig, bare="runs", description=__doc__)
    check_writable(config.output, "--output", is_file=True)
    output = Path(config.output)
    runs = [read_run(Path(folder)) for folder in config.runs]
    curve = make_curve(output.stem, runs)
    with atomic_file(output) as temporary:
        temporary.write_text(curve.to_json(), encoding="utf-8")
    say(f"{output}: {len(runs)} runs, {len(curve.tokens)} windows, up to {curve.tokens[-1]:,} tokens")
    for one in runs:
        others = make_curve("the others", [other for other in runs if other is not one])
        say(f"seed {one.seed} beside the others: {check(one, others) or 'inside the band'}")


if __name__ == "__main__":
    run(main)
