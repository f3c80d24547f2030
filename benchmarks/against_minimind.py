"""Held-out bits per byte over wall time: MiniMind as it is shipped, its loop in bf16, and ours, on the same rows.

    git clone https://github.com/jingyaogong/minimind ../minimind
    python benchmarks/against_minimind.py ../minimind --pretrain pretrain.jsonl --sft sft.jsonl    # about 15 minutes
    python benchmarks/against_minimind.py ../minimind --phases pretrain --pretrain pretrain.jsonl --minutes 20 --out a
    python benchmarks/against_minimind.py ../minimind --phases sft --sft sft.jsonl --start a/start.pth --out b

All sides have a model of the same shape. MiniMind's side is `train_epoch` of its own script, with its dataset, model
and optimiser. It needs `pip install transformers datasets`. As it is shipped, it computes in fp32 on a CPU. Ours is the
stage as a user starts it. MiniMind's learning rates, batch sizes and lengths of a row are its defaults (MiniMind 3; for
a later one, see PHASES). Only --accumulation_steps is 1 in pretraining, where it has 8: with 8 it makes an eighth of
the steps, too few to learn in minutes.

The sides train in turns of some seconds, each in a process of its own that is stopped (SIGSTOP) while another trains.
So the machine's noise meets all of them. The time of a side begins before it reads its data. It contains everything but
the imports, and the judging: after each turn, the weights are saved and judged, all by the same code. First, every side
trains for a moment, to see how many steps fit into its time; its schedule ends with the last of them. Ours gets --share
of MiniMind's time.

A row that ours cannot read (an empty answer, say) is left out on our side only. Fine-tuning starts, on all sides, from
the weights that MiniMind has pretrained in fp32, with its tokenizer. Its bits per byte are those of the answers and
their ends. What the template writes before each answer (MiniMind's empty think block, say) is part of the prompt, as it
is when the models are used.

Before the first step, MiniMind's model is nearly uniform, and ours is further off, because its embedding starts larger.
In pretraining, each has its own vocabulary of 6,400, and a byte costs each of them as many tokens as that takes.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import machine
from benchmarks.real_data.common import hold_out
from common.console import UserError
from common.files import ROOT, atomic_file
from evaluation.likelihood import log_likelihoods, windows
from model.checkpoint import load_weights
from model.config import ModelConfig
from model.interop.minimind import config_to_minimind
from tokenizer.chat import Encoded, encode_chat
from tokenizer.text import Tokenizer

SIDES = {"sparrow": "Sparrow", "fp32": "MiniMind as shipped (fp32)", "bf16": "MiniMind's loop in bf16"}
PHASES = {  # its defaults
    "pretrain": dict(
        stage="train_pretrain",
        dataset="PretrainDataset",
        batch_size=32,
        accumulation_steps=8,
        learning_rate=5e-4,
        max_seq_len=340,
    ),
    "sft": dict(
        stage="train_full_sft",
        dataset="SFTDataset",
        batch_size=16,
        accumulation_steps=1,
        learning_rate=1e-5,
        max_seq_len=768,
    ),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("minimind", nargs="?", help="directory of a checkout of github.com/jingyaogong/minimind")
    parser.add_argument("--pretrain", help='file of {"text"} rows (default: the tiny world\'s)')
    parser.add_argument("--sft", help='file of {"conversations"} rows (default: the tiny world\'s)')
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument(
        "--start",
        help="weights that fine-tuning starts from (default: those that MiniMind has pretrained in fp32; "
        "they are also written to --out, as start.pth)",
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="of training, on each side of MiniMind's")
    parser.add_argument("--share", type=float, default=0.2, help="of this time that ours gets")
    parser.add_argument("--slice", type=float, default=10.0, help="seconds of a turn")
    parser.add_argument("--preset", default="nano", help="shape of all models: nano, small (MiniMind's 512 x 8)")
    parser.add_argument("--max_seq_len", type=int, help="of all sides (default: MiniMind's, of the phase)")
    parser.add_argument("--held_out", type=int, default=100, help="rows of each file that no side trains on")
    parser.add_argument("--accumulation_steps", type=int, default=1, help="of MiniMind's pretraining; its default is 8")
    parser.add_argument("--num_workers", type=int, default=8, help="of MiniMind's data loader")
    parser.add_argument(
        "--ours",
        default="--batch_size 8",
        help="flags of our pretraining",
    )
    parser.add_argument("--ours_sft", default="", help="flags of our fine-tuning")
    parser.add_argument("--out", default=str(ROOT / "out/benchmarks/against_minimind"), help="folder of the results")
    return parser.parse_args()


@dataclass
class Side:
    """A process that trains in turns."""

    command: list[str]
    folder: Path
    process: subprocess.Popen | None = None
    curve: list[dict] = field(default_factory=list)  # {"seconds", "steps", "bpb"} after each turn

    def turn(self, seconds: float) -> dict:
        """Lets it train -> its answer. Its weights are in `weights`."""
        if self.process is None:
            self.folder.mkdir(parents=True)
            self.log = open(self.folder / "log.txt", "w", encoding="utf-8")
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)
            once = {**os.environ, "HF_DATASETS_CACHE": str(self.folder / "datasets")}  # MiniMind's rows: read anew
            self.process = subprocess.Popen(self.command, cwd=self.folder, start_new_session=True, env=once, **pipes)
        self._signal("SIGCONT")
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(dict(seconds=seconds, weights=str(self.weights))) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{' '.join(self.command)[:200]} has failed:\n" + (self.folder / "log.txt").read_text()[-3000:])
        self._signal("SIGSTOP")
        return json.loads(answer)

    @property
    def weights(self) -> Path:
        return self.folder / "weights.pth"

    def close(self) -> None:
        if self.process:
            self._signal("SIGKILL")
            self.process.wait()
            self.process.stdin.close()  # type: ignore[union-attr]
            self.log.close()

    def _signal(self, name: str) -> None:
        """To it and to the processes that read its data."""
        try:
            os.killpg(self.process.pid, getattr(signal, name))  # type: ignore[union-attr]
        except ProcessLookupError:  # it has ended already
            pass


class Judge:
    """Bits per byte of held-out rows: of the whole texts, or of the answers and their ends."""

    def __init__(self, held_out: Path, phase: str, length: int):
        self.rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
        self.phase, self.length = phase, length
        self.encoded: dict[str, tuple[list[Encoded], int]] = {}  # by tokenizer

    def bpb(self, weights: Path, tokenizer: Tokenizer) -> float:
        if tokenizer.hash not in self.encoded:
            self.encoded[tokenizer.hash] = self._encode(tokenizer)
        rows, size = self.encoded[tokenizer.hash]
        logp = log_likelihoods(load_weights(weights).build().eval(), rows)
        return -sum(float(row.sum()) for row in logp) / math.log(2) / size

    def _encode(self, tokenizer: Tokenizer) -> tuple[list[Encoded], int]:
        if self.phase == "pretrain":
            texts = [row["text"] for row in self.rows]
            rows = [part for text in texts for part in self._windows(tokenizer, text)]
            return rows, sum(len(text.encode()) for text in texts)
        answers, size = [], 0
        for turns in (row["conversations"] for row in self.rows):
            for i in (i for i, turn in enumerate(turns) if turn["role"] == "assistant"):
                with suppress(UserError):  # an empty answer, say
                    answer = _answer(tokenizer, turns[: i + 1])
                    if len(answer.ids) <= self.length:
                        answers.append(answer)
                        size += len(turns[i]["content"].encode())
        return answers, size

    def _windows(self, tokenizer: Tokenizer, text: str) -> list[Encoded]:
        """As each side writes a document: between <|endoftext|>, or MiniMind's between its bos and eos tokens."""
        begin, end = (tokenizer.control.get(str(tokenizer.config.get(f"{name}_token"))) for name in ("bos", "eos"))
        if begin is None or end is None or begin == tokenizer.end_of_text:
            return windows(tokenizer, text, self.length)
        ids = [begin, *tokenizer.encode(text), end]
        parts = [ids[i : i + self.length + 1] for i in range(0, len(ids) - 1, self.length)]
        return [Encoded(part, [True] * len(part)) for part in parts]


def _answer(tokenizer: Tokenizer, turns: list[dict]) -> Encoded:
    """The last turn and its end are what counts: all that is not yet in the prompt for it."""
    row, prompt = encode_chat(tokenizer, turns), encode_chat(tokenizer, turns[:-1], add_generation_prompt=True)
    known = next(i for i, ids in enumerate(zip_longest(row.ids, prompt.ids)) if ids[0] != ids[1])
    return Encoded(row.ids, [trained and i >= known for i, trained in enumerate(row.trained)])


class Race:
    """One phase: a command for each side, the calibration, the turns."""

    def __init__(self, args: argparse.Namespace, phase: str, folder: Path, start: Path | None):
        self.args, self.phase, self.folder, self.start = args, phase, folder, start
        self.minimind = Path(args.minimind).resolve()
        source = Path(getattr(args, phase) or _tiny_world(phase))
        count = sum(1 for _ in open(source, "rb"))
        every = max(count // args.held_out, 2)
        self.data, held_out = hold_out(source, folder, lambda row: row % every == every // 2)
        self.length = args.max_seq_len or PHASES[phase]["max_seq_len"]
        self.judge = Judge(held_out, phase, self.length)
        self.theirs = Tokenizer.load(self.minimind / "model")
        self.ours = Tokenizer.load() if phase == "pretrain" else self.theirs

    def command(self, name: str, steps: int) -> list[str]:
        args = self.args
        if name == "sparrow":
            flags = ["--data_path", self.data, "--max_steps", steps, "--max_seq_len", self.length]
            flags += ["--save_dir", "out", "--cache_dir", "cache", "--device", "cpu", "--on_bad_row", "skip"]
            flags += (
                ["--preset", args.preset, *args.ours.split()]
                if self.phase == "pretrain"
                else ["--from_weight", self.start, "--tokenizer_path", self.minimind / "model", *args.ours_sft.split()]
            )
            words = [ROOT / "benchmarks/sides/sparrow.py", PHASES[self.phase]["stage"], *flags]
            return [sys.executable, *map(str, words)]
        shape = ModelConfig.preset(args.preset, vocab_size=self.theirs.vocab_size, qk_norm=True)
        wanted = dict(
            PHASES[self.phase],
            directory=str(self.minimind),
            data=str(self.data),
            config=config_to_minimind(shape),
            max_seq_len=self.length,
            num_workers=args.num_workers,
            steps=steps,
            bf16=name == "bf16",
        )
        wanted["from"] = str(self.start) if self.phase == "sft" else ""
        if self.phase == "pretrain":
            wanted["accumulation_steps"] = args.accumulation_steps
        return [sys.executable, str(ROOT / "benchmarks/sides/minimind.py"), json.dumps(wanted)]

    def steps(self, name: str) -> int:
        """So many steps fit into the side's time, as a short training of it tells."""
        side = Side(self.command(name, 200), self.folder / f"calibrate_{name}")
        try:
            answer = side.turn(self.args.slice)
            while answer["seconds"] - answer["setup"] < self.args.slice / 2 and not answer["done"]:
                answer = side.turn(self.args.slice)
        finally:
            side.close()
        seconds = 60 * self.args.minutes * (self.args.share if name == "sparrow" else 1) - answer["setup"]
        return max(2, round(seconds * answer["steps"] / (answer["seconds"] - answer["setup"])))

    def run(self) -> dict[str, Side]:
        sides = {}
        for name in self.args.sides:
            steps = self.steps(name)
            print(f"{self.phase}: {SIDES[name]}: {steps} steps", flush=True)
            sides[name] = Side(self.command(name, steps), self.folder / name)
        running = dict(sides)
        try:
            while running:
                for name, side in list(running.items()):
                    answer = side.turn(self.args.slice)
                    bpb = self.judge.bpb(side.weights, self.ours if name == "sparrow" else self.theirs)
                    side.curve.append(dict(seconds=round(answer["seconds"], 2), steps=answer["steps"], bpb=bpb))
                    progress = f"{answer['seconds']:7.1f} s  {answer['steps']:6} steps  {bpb:.4f}"
                    print(f"{self.phase}: {name:8} {progress}", flush=True)
                    if answer["done"]:
                        side.close()
                        del running[name]
        finally:
            for side in running.values():
                side.close()
        return sides


def _tiny_world(phase: str) -> Path:
    from dataset.tiny_world.files import generate

    return generate(ROOT / "out/tiny_world")[phase]


def summary(curves: dict[str, list[dict]]) -> list[str]:
    """The lines of a table: where each side ends, and how long ours needs to get there."""
    lines = ["| | bits per byte at the end | s | Sparrow is there after | times as fast |", "|---|---|---|---|---|"]
    for name, curve in curves.items():
        end = curve[-1]
        reached = next((p["seconds"] for p in curves.get("sparrow", []) if p["bpb"] <= end["bpb"]), None)
        there = "not reached" if reached is None else f"{reached:.0f} s"
        faster = "" if reached is None else f"{end['seconds'] / reached:.1f}"
        own = name == "sparrow"
        lines.append(
            f"| {SIDES[name]} | {end['bpb']:.4f} | {end['seconds']:.0f} | {'' if own else there} | "
            f"{'' if own else faster} |"
        )
    return lines


def draw(results: dict[str, dict[str, list[dict]]], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(results), 4.2), dpi=120, layout="constrained")
    for axes, (phase, curves) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
        for name, curve in curves.items():
            seconds, bpb = [p["seconds"] for p in curve], [p["bpb"] for p in curve]
            axes.plot(seconds, bpb, ".-", label=SIDES[name])
        axes.set(title=phase, xlabel="seconds of training", ylabel="held-out bits per byte")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False)
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, format="png")


def main():
    args = arguments()
    if not args.minimind:
        print("left out: give the directory of a checkout of github.com/jingyaogong/minimind")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no stopped process is left behind
    results, out = {}, Path(args.out).resolve()
    start = Path(args.start).resolve() if args.start else None
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for phase in args.phases:
            here = Path(folder, phase)
            here.mkdir()
            if phase == "sft" and start is None:
                sys.exit(
                    "--phases sft: name pretrain before it, with fp32; or give the weights it starts from, --start"
                )
            sides = Race(args, phase, here, start).run()
            results[phase] = {name: side.curve for name, side in sides.items()}
            if phase == "pretrain" and "fp32" in sides and not args.start:
                start = out / "start.pth"
                for suffix in (".pth", ".json"):
                    shutil.copyfile(sides["fp32"].weights.with_suffix(suffix), start.with_suffix(suffix))
    environment = dict(machine=machine(), command=" ".join(["python", *sys.argv]), preset=args.preset)
    text = [f"`{environment['command']}`", "", environment["machine"]]
    for phase, curves in results.items():
        text += ["", f"## {phase}", "", *summary(curves)]
    (out / "results.json").write_text(json.dumps(dict(environment, results=results), indent=1), encoding="utf-8")
    (out / "results.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    draw(results, out / "results.png")
    print("\n".join(text), f"\n{out}/results.json, .md, .png")


if __name__ == "__main__":
    main()
