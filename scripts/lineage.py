"""Shows how weights came about: tokenizer, data, parents, steps, losses, and the commands that repeat it.

    python scripts/lineage.py out/rlhf_512.pth                 # also a name in out/, an adapter, a directory
    python scripts/lineage.py rlhf --check                     # which of the files are still there, unchanged?
    python scripts/lineage.py rlhf --mermaid >> README.md      # a flow chart that GitHub draws

--check compares hashes. The exit status is 1 if something is missing, changed, or was not recorded.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass

from common.console import note, run, say
from common.files import ROOT
from common.options import Options, option, parse


@dataclass(frozen=True)
class LineageConfig(Options):
    """Options of lineage"""

    weight: str = option("", "a name in save_dir or out/, a file or a directory; the flag may be left out")
    save_dir: str = option(str(ROOT / "out"), "where names are looked up", aliases=("out_dir",), path=True)
    check: bool = option(False, "compare the files with their recorded hashes")
    mermaid: bool = option(False, "print a flow chart in Mermaid's language")

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.weight:
            found.append("--weight: name the weights, for instance python scripts/lineage.py full_sft")
        if self.check and self.mermaid:
            found.append("--check and --mermaid: each prints something of its own; give one of them")
        return found


def main():
    config = parse(LineageConfig, bare="weight", description=__doc__)

    from evaluation import lineage
    from evaluation.models import locate

    history = lineage.read_lineage(locate(config.weight, config.save_dir), config.save_dir)
    if config.mermaid:
        return say(lineage.as_mermaid(history))
    parts = lineage.check(history) if config.check else None
    say(lineage.as_text(history, parts))
    if parts is not None:
        bad = [part for part in parts if part.status != lineage.UNCHANGED]
        counts = {part.status: sum(other.status == part.status for other in parts) for part in parts}
        note(f"{len(parts)} parts: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
        if bad:
            raise SystemExit(1)


if __name__ == "__main__":
    run(main)
