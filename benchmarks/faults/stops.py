"""Stop at a random step and resume: is what comes out the same, bit for bit?

    python benchmarks/faults/stops.py                          # every stage, 50 stops each, accumulation 1 and 4
    python benchmarks/faults/stops.py --stages dpo --stops 6

A stopped run gets SIGTERM while it computes the step, saves, ends with 143, and is started again with --from_resume
auto. Compared are weights, moments, random states and losses after the last step with those of an undisturbed run.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from tests.helpers.rows import write_dpo, write_pretrain, write_sft
from tests.helpers.runs import run_stage
from trainer.loop import engine
from trainer.run import resume

STEPS = 10


def write_reason(path: Path) -> Path:
    """write_sft's answers, each after a thought."""
    rows = write_sft(path).read_text(encoding="utf-8").splitlines()
    chats = [json.loads(row)["conversations"] for row in rows]
    for turns in chats:
        turns[-1]["content"] = f"<think>\n{turns[0]['content']}\n</think>\n\n{turns[-1]['content']}"
    lines = [json.dumps({"conversations": turns}, ensure_ascii=False) + "\n" for turns in chats]
    path.write_text("".join(lines), encoding="utf-8")
    return path


STAGES: dict[str, tuple[Callable, list[str]]] = {  # how the data is written, and flags of its own
    "pretrain": (write_pretrain, []),
    "full_sft": (write_sft, []),
    "lora": (write_sft, ["--lora_dropout=0.1"]),  # its masks come from the random state
    "dpo": (write_dpo, []),
    "distill_reason": (write_reason, ["--max_seq_len=64"]),
}


def train(stage: str, folder: Path, flags: list[str], stop: int | None) -> int:
    """One start of a stage, with SIGTERM while it computes step `stop` -> exit status."""
    update = engine.Engine.train_step

    def counted(self, *arguments):
        if self.step == stop:
            signal.raise_signal(signal.SIGTERM)
        return update(self, *arguments)

    engine.Engine.train_step = counted
    try:
        run_stage(stage, *flags, f"--save_dir={folder}", "--from_resume=auto")
    except SystemExit as end:
        return int(end.code)
    finally:
        engine.Engine.train_step = update
    return 0


def result(folder: Path) -> dict:
    (state,) = folder.glob(f"resume/*/*/step_{STEPS:08d}")
    tensors, values = resume.read_state(state)
    flat = {f"{kind}/{name}": tensor for kind, content in tensors.items() for name, tensor in content.items()}
    return flat | {name: values[name] for name in ("losses", "tokens", "best", "scale")}


def same(a: dict, b: dict) -> bool:
    equal = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


def trials(stage: str, accumulation_steps: int, stops: list[int], root: Path) -> list[bool]:
    """Whether each run that was stopped there came out like the undisturbed one."""
    write, own = STAGES[stage]
    data, parent = write(root / f"{stage}.jsonl"), root / "parent"
    flags = [
        f"--data_path={data}",
        f"--max_steps={STEPS}",
        "--batch_size=2",
        "--val_fraction=0.1",
        "--save_interval=4",
        f"--accumulation_steps={accumulation_steps}",
        *own,
    ]
    if stage != "pretrain":
        if not parent.exists():
            write_pretrain(root / "parent.jsonl")
            run_stage("pretrain", f"--data_path={root / 'parent.jsonl'}", f"--save_dir={parent}", "--max_steps=2")
        flags.append(f"--from_weight={parent / 'pretrain_32.pth'}")
    shutil.rmtree(root / "whole", ignore_errors=True)
    train(stage, root / "whole", flags, None)
    undisturbed, found = result(root / "whole"), []
    for stop in stops:
        shutil.rmtree(root / "parts", ignore_errors=True)
        status = train(stage, root / "parts", flags, stop)
        train(stage, root / "parts", flags, None)
        found.append(status == 128 + signal.SIGTERM and same(undisturbed, result(root / "parts")))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--stops", type=int, default=50, help="of each stage, half of them with accumulation 4")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine.RunLogger.draw = lambda self: None
    failed, chooser = 0, random.Random(0)
    for stage in arguments.stages:
        found = []
        with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
            for accumulation_steps, count in ((1, arguments.stops // 2), (4, arguments.stops - arguments.stops // 2)):
                stops = [chooser.randrange(STEPS - 1) for _ in range(count)]
                found += trials(stage, accumulation_steps, stops, Path(root))
        print(f"stop and resume, {stage}: {sum(found)}/{len(found)} bit-identical", flush=True)
        failed += len(found) - sum(found)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
