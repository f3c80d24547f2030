"""Lists the checkpoints that runs keep to continue from, and removes those that are no longer needed.

    python scripts/clean_runs.py                                  # lists what is in out/resume
    python scripts/clean_runs.py --remove                         # of each run, removes all but the newest checkpoint
    python scripts/clean_runs.py --finished --remove              # and all of finished runs: their weights stay
    python scripts/clean_runs.py --older_than 30 --remove         # and all of runs that were last saved a month ago

A checkpoint has the weights, the optimiser's moments and the random states: three times the size of the weights. The
weights themselves, in the .pth files, are never touched, nor are the logs.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import time
from dataclasses import dataclass

from common.console import UserError, run, say
from common.files import ROOT, remove_folder, sweep
from common.manifest import number_of, problem, states_in
from common.options import Options, option, parse


@dataclass(frozen=True)
class CleanConfig(Options):
    """Options of cleaning"""

    save_dir: str = option(str(ROOT / "out"), "where the runs were written", aliases=("output_dir",), path=True)
    keep_last: int = option(1, "whole checkpoints kept of each run", within="[1, inf)")
    finished: bool = option(False, "keep none of runs that have done all their steps")
    older_than: float | None = option(None, "keep none of runs last saved more than N days ago", within="[0, inf)")
    remove: bool = option(False, "remove what is listed as such")


@dataclass(frozen=True)
class Run:
    """The checkpoints of one run, <save_dir>/resume/<name>/<run>, the oldest first."""

    folder: Path
    states: list[Path]
    step: int
    total: int
    days: float  # since the newest was written

    def unneeded(self, config: CleanConfig) -> list[Path]:
        """What can go."""
        done, old = self.step >= self.total, config.older_than is not None and self.days > config.older_than
        if config.finished and done or old:
            return self.states
        whole = 0  # a damaged state is nothing to continue from: it must not push out one that is whole
        for i in range(len(self.states) - 1, 0, -1):
            whole += problem(self.states[i]) is None
            if whole == config.keep_last:
                return self.states[:i]
        return []


def find_runs(save_dir: Path) -> list[Run]:
    """Those with at least one checkpoint, whole or damaged."""
    found = []
    for folder in sorted((save_dir / "resume").glob("*/*")):
        if not (states := states_in(folder)):
            continue
        try:
            facts = json.loads((states[-1] / "state.json").read_text(encoding="utf-8"))
            step, total = int(facts["step"]), int(facts["total"])
        except (OSError, ValueError, KeyError, TypeError):
            step, total = number_of(states[-1])[0], sys.maxsize  # nobody knows whether it was finished
        found.append(Run(folder, states, step, total, (time.time() - states[-1].stat().st_mtime) / 86400))
    return found


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main():
    config = parse(CleanConfig, description=__doc__)
    save_dir = Path(config.save_dir)
    if not save_dir.is_dir():
        raise UserError(f"--save_dir {save_dir}: there is no such folder")
    total = freed = 0
    for found in find_runs(save_dir):
        gone = found.unneeded(config)
        sizes = {state: size(state) for state in found.states}
        of = "?" if found.total == sys.maxsize else f"{found.total:,}"
        say(f"{found.folder}: step {found.step:,} of {of}, {found.days:.0f} days ago")
        for state in found.states:
            say(f"{sizes[state] / 1e6:12,.1f} MB  {state.name}{'  not needed' if state in gone else ''}")
        total, freed = total + sum(sizes.values()), freed + sum(sizes[state] for state in gone)
        if config.remove:
            for state in gone:
                remove_folder(state)
            sweep(found.folder)  # what killed saves left
    of = f"of {total / 1e6:,.1f} MB in checkpoints, {freed / 1e6:,.1f} MB are not needed"
    say(f"{of} and are removed" if config.remove else of + ("; --remove removes them" if freed else ""))


if __name__ == "__main__":
    run(main)
