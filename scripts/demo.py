"""The whole library at its smallest size: generate a world, train a tokenizer, pretrain a model, fine-tune it, and
teach it a name (LoRA), a manner (DPO) and to think first (reasoning). The model speaks after each stage, and at the end
it sits an exam.

    make demo                                   # or: python scripts/demo.py
    python scripts/demo.py --verbose            # with everything that the stages print
    python scripts/demo.py --skip_training      # only the exam and the conversation, with the weights in out/

Every step is an ordinary command of this repository. It is printed before it runs, to be tried with other data next.
Results are in out/; `make chat` talks to the model. A second `make demo` trains only what has changed since, and goes
on with what was interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import shlex
import time
from dataclasses import dataclass

from common.console import run, say
from common.files import ROOT, relative_to_root
from common.options import Options, option, parse
from common.values import SEEDS
from model.config import PRESETS
from scripts.commands import call
from scripts.demo_progress import Forecast, Watch

QUESTIONS = ("你好！", "Who are you?")
PERSON, PROBLEM = "Tell me about Lucy.", "What is 19+7-5+12?"
VOCABULARY = 2000

# About the seconds of each part on one machine. Only their ratios count: they forecast the whole.
SECONDS = {
    "world": 6,
    "tokenizer": 20,
    "pretrain": 430,
    "full_sft": 135,
    "lora_identity": 70,
    "rlhf": 20,
    "reason": 135,
    "exam": 30,
}

# Flags of the trainings. Most of the demo's time goes into the first.
PRETRAIN = "--preset nano --epochs 1 --batch_size 8 --max_seq_len 256".split()
SFT = "--epochs 1 --batch_size 32 --max_seq_len 256 --recipe modern".split()
LORA = "--epochs 7 --batch_size 16 --max_seq_len 256 --lora_rank 8 --learning_rate 6e-4".split()
DPO = "--epochs 1 --batch_size 16 --max_seq_len 256 --learning_rate 1e-4 --rpo_alpha 1".split()
REASON = "--epochs 3 --batch_size 32 --max_seq_len 256 --learning_rate 3e-4".split()
COMMON = "--schedule wsd --min_lr_ratio 0.05 --log_interval 20".split()
QUICK = "--max_steps 6 --data_limit 400 --warmup_steps 1".split()


@dataclass(frozen=True)
class DemoConfig(Options):
    """Options of the demo"""

    save_dir: str = option("", "where everything is written (default: out; with --quick out/quick)", path=True)
    world_seed: int = option(0, "another one invents another world", within=SEEDS)
    seed: int = option(42, "of the trainings", within=SEEDS)
    question_seed: int = option(0, "draws other exam questions", within=SEEDS)
    skip_training: bool = option(False, "use the weights in save_dir")
    fresh: bool = option(False, "train everything anew, also what is up to date")
    verbose: bool = option(False, "show all that the stages print")
    quick: bool = option(False, "six steps of each stage, and no exam: to see that everything runs")

    def __post_init__(self):
        if not self.save_dir:
            object.__setattr__(self, "save_dir", str(ROOT / "out" / "quick" if self.quick else ROOT / "out"))

    def problems(self) -> list[str]:
        found = super().problems()
        for name, what in (("fresh", "trains everything anew"), ("quick", "does nothing but train")):
            if self.skip_training and getattr(self, name):
                found.append(f"--skip_training and --{name}: the second one {what}; give one of them")
        if self.quick and self.question_seed:
            found.append("--question_seed: --quick asks no exam questions; leave it out")
        return found


@dataclass(frozen=True)
class Stage:
    """A training of the demo."""

    name: str  # of what it writes
    title: str
    script: str
    data: str  # file of the tiny world
    flags: list[str]
    prompts: tuple[str, ...]  # what the model is asked afterwards

    def file(self, save_dir: Path) -> Path:
        folder = save_dir / "lora" if self.name.startswith("lora_") else save_dir
        return folder / f"{self.name}_{PRESETS['nano']['hidden_size']}.pth"


STAGES = (
    Stage("pretrain", "Pretraining: learn to continue text", "train_pretrain", "pretrain", PRETRAIN, ("露西", "Mira")),
    Stage("full_sft", "Fine-tuning: learn to answer", "train_full_sft", "sft", SFT, (*QUESTIONS, PERSON)),
    Stage("lora_identity", "LoRA: learn who one is", "train_lora", "lora_identity", LORA, QUESTIONS[1:]),
    Stage("rlhf", "DPO: learn which of two answers people prefer", "train_dpo", "dpo", DPO, (PERSON,)),
    Stage("reason", "Reasoning: learn to write the steps first", "train_distill_reason", "reason", REASON, (PROBLEM,)),
)


class Demo:
    """Runs the commands one after the other, says how far it is, and lets the model speak in between."""

    def __init__(self, config: DemoConfig):
        self.config, self.save_dir = config, Path(config.save_dir)
        self.world, self.tokenizer = self.save_dir / "tiny_world", self.save_dir / "tokenizer"
        self.files = {stage.name: stage.file(self.save_dir) for stage in STAGES}
        self.forecast, self.number = Forecast(SECONDS), 0

    def train(self) -> None:
        words = [
            "dataset/tiny_world",
            *given("--seed", self.config.world_seed, DemoConfig.world_seed),
            "--save_dir",
            self.world,
        ]
        self.command("world", "Invent a small world, in Chinese and English", words)
        words = ["trainer/train_tokenizer.py", "--vocab_size", VOCABULARY, "--save_dir", self.tokenizer]
        words += ["--data_path", *(self.world / f"{name}.jsonl" for name in ("pretrain", "sft"))]
        words += ["--sample_mb", 1] if self.config.quick else []
        done = not self.config.fresh and tokenizer_is_current(self.tokenizer, self.files["pretrain"])
        self.command("tokenizer", "Train a tokenizer on its text", words, self.tokenizer if done else None)
        for stage in STAGES:
            self.train_stage(stage)
            if not self.config.quick:  # six steps teach nothing
                self.speak(stage)

    def train_stage(self, stage: Stage) -> None:
        """Trains it or goes on with it, unless that would only give the weights that are there already."""
        words = [f"trainer/{stage.script}.py", "--data_path", self.world / f"{stage.data}.jsonl"]
        if stage.name == "pretrain":
            words += ["--tokenizer_path", self.tokenizer]
        else:
            words += ["--from_weight", self.files["pretrain" if stage.name == "full_sft" else "full_sft"]]
        if stage.name == "rlhf":
            words += ["--val_path", self.world / "dpo_val.jsonl"]
        words += [
            *stage.flags,
            *COMMON,
            *(QUICK if self.config.quick else []),
            *given("--seed", self.config.seed, DemoConfig.seed),
        ]
        words += ["--save_dir", self.save_dir]
        if self.config.fresh or not self.files[stage.name].is_file():
            return self.command(stage.name, stage.title, words)

        from evaluation.lineage import RESUMING, is_complete, read_lineage, reasons_to_repeat

        history = read_lineage(self.files[stage.name], self.save_dir)
        if changed := reasons_to_repeat(history, shlex.join(as_typed(words))):
            note = f"again, because of what has changed since: {', '.join(changed)}"
            return self.command(stage.name, stage.title, words, note=note)
        if is_complete(history.stages[-1]):
            return self.command(stage.name, stage.title, words, self.files[stage.name])
        self.command(stage.name, stage.title, [*words, *RESUMING.split()])

    def command(self, part: str, title: str, words: list, done: Path | None = None, note: str = "") -> None:
        """Shows a command of this repository as one would type it, and runs it. done: its result, if up to date."""
        self.number += 1
        say(f"\n=== {self.number}/{len(SECONDS)} {title}\n$ python {shlex.join(as_typed(words))}\n")
        if done:
            say(f"up to date: {relative_to_root(str(done))}")
            return self.forecast.leave_out(part)
        if note:
            say(note)
        watch = Watch(self.forecast, part, self.config.verbose)
        try:
            call(as_typed(words), watch.line, cwd=ROOT, with_stderr=True)
        except SystemExit as end:
            watch.fail(int(end.code or 0))
            say(f"\nthe demo has stopped in part {self.number}; the same command goes on from there")
            raise
        watch.close()

    def speak(self, stage: Stage) -> None:
        """Lets the model answer what it could not answer before this stage; after pretraining it continues a text."""
        model = Speaker(self.files[stage.name], self.save_dir)
        for prompt in stage.prompts:
            say(f"\n[{stage.name}] > {prompt}\n{model.say(prompt)}")


def given(flag: str, value: int, default: int) -> list[str]:
    """The flag, unless that is the default anyway."""
    return [flag, str(value)] if value != default else []


def as_typed(words: list) -> list[str]:
    """The words of a command, with paths as they are seen from the repository's root."""
    return [relative_to_root(str(word)) if isinstance(word, Path) else str(word) for word in words]


def tokenizer_is_current(folder: Path, pretrained: Path) -> bool:
    """Whether the tokenizer is the one that training it again would give.

    Its text follows from the code that writes the world. So it is current if the pretrained weights were made with it,
    by the code as it is now.
    """
    if not pretrained.is_file() or not (folder / "tokenizer.json").is_file():
        return False

    from common.files import code_version
    from evaluation.lineage import read_lineage
    from tokenizer.text import Tokenizer

    history, tokenizer = read_lineage(pretrained), Tokenizer.load(folder)
    same_code = history.known and history.stages[-1].get("code") == code_version()
    return same_code and history.tokenizer["hash"] == tokenizer.hash and tokenizer.vocab_size == VOCABULARY


class Speaker:
    """A trained model that is asked questions."""

    def __init__(self, file: Path, save_dir: Path):
        from evaluation.models import open_models

        (self.contender,) = open_models([str(file)], save_dir, dtype="float32")
        self.name = file.stem.rpartition("_")[0]

    def say(self, prompt: str) -> str:
        from inference.generate import generate
        from inference.sampling import Sampling

        tokenizer = self.contender.tokenizer
        with self.contender.active() as model:
            ids, greedy = self.contender.encode(prompt), Sampling(temperature=0)
            (reply,) = generate(model, [ids], greedy, max_new_tokens=96, stop=tokenizer.stop_ids)
        return tokenizer.decode([i for i in reply if i not in tokenizer.stop_ids]).strip()


class Examined(Speaker):
    """The same with its figures in the exam."""

    def __init__(self, file: Path, config: DemoConfig):
        from evaluation.benchmark import preference_accuracy, run_benchmark

        save_dir = Path(config.save_dir)
        super().__init__(file, save_dir)
        with self.contender.active() as model:
            self.result = run_benchmark(model, self.contender.tokenizer, config.question_seed, config.world_seed)
            kind = preference_accuracy(model, self.contender.tokenizer, save_dir / "tiny_world/dpo_val.jsonl")
        scores, later = self.result["scores"]["model"], self.result["later"]
        self.figures = {
            "the exam, asked in Chinese": scores["all zh"],
            "the exam, asked in English": scores["all en"],
            "identity in unseen wordings": later["identity"],
            "held-out pairs: prefers the kind one": kind,
            "speaks in the kind manner": later["manner"],
            "problems of several steps": later["steps"],
        }


def examine(config: DemoConfig) -> dict[str, dict[str, float]]:
    """The exam of every stage after pretraining, and a conversation -> {stage: its figures}."""
    save_dir = Path(config.save_dir)
    say(f"\n=== {len(SECONDS)}/{len(SECONDS)} The exam, taken by the model as each stage has left it")
    tuned = [stage for stage in STAGES if stage.name != "pretrain"]
    sft, lora, dpo, reason = (Examined(stage.file(save_dir), config) for stage in tuned)
    weights = relative_to_root(str(sft.contender.history.path))
    say(f"$ python eval_model.py --weight {weights} --benchmark tiny_world\n\n{sft.result['table']}")
    say("\n=== What each stage changed\n\n" + " " * 38 + "".join(f"{m.name:>15}" for m in (sft, lora, dpo, reason)))
    for figure in sft.figures:
        say(f"{figure:<38}" + "".join(f"{m.figures[figure]:>15.1%}" for m in (sft, lora, dpo, reason)))

    say("\n=== A conversation\n")
    answers = sft.result["answers"]
    for model, prompt in [
        *((sft, prompt) for prompt in (*QUESTIONS, *(answers[i]["prompt"] for i in (0, 150, 250, 500)))),
        (lora, QUESTIONS[1]),
        (sft, PERSON),
        (dpo, PERSON),
        (sft, PROBLEM),
        (reason, PROBLEM),
    ]:
        say(f"[{model.name}] > {prompt}\n{model.say(prompt)}\n")
    return {model.name: model.figures for model in (sft, lora, dpo, reason)}


def report(weights: list[str], config: DemoConfig) -> Path:
    """Fine-tuning against LoRA and against DPO, on questions of the exam -> the page that shows it."""
    from dataset.read.questions import Question
    from dataset.tiny_world.exam import draw_questions
    from dataset.tiny_world.world import KINDS
    from evaluation.compare import compare, write_report
    from evaluation.measure import Settings
    from evaluation.models import open_models

    save_dir, kinds = Path(config.save_dir), (*KINDS, "identity", "manner")
    questions = []
    for number, asked in enumerate(draw_questions(config.world_seed, config.question_seed, kinds)):
        if number % 20 == 0:
            # of "manner" only the beginning and the end are given: nothing to compare an answer with
            answer = None if asked.kind == "manner" else {"role": "assistant", "content": asked.answer}
            messages = [{"role": "user", "content": asked.prompt}]
            questions.append(Question(f"exam:{number + 1}", messages, answer, kind=asked.kind))
    models = open_models(weights, save_dir)
    held_out = [save_dir / "tiny_world/dpo_val.jsonl"]
    result = compare(models, questions, Settings(max_new_tokens=64), held_out)
    return write_report(save_dir / "compare/demo.json", result)


def main():
    config = parse(DemoConfig, description=__doc__)
    save_dir, begin = Path(config.save_dir), time.monotonic()
    if not config.skip_training:
        Demo(config).train()
    if config.quick:
        return say("\nEverything runs. These models have learned nothing yet: make demo trains them.")
    examine(config)
    compared = [str(stage.file(save_dir)) for stage in STAGES if stage.name in ("full_sft", "lora_identity", "rlhf")]
    page = report(compared, config)
    say(f"=== What LoRA and DPO changed, answer by answer: open {page} in a browser\n")
    minutes = (time.monotonic() - begin) / 60
    say(f"That took {minutes:.1f} minutes. Talk to it: make chat (python eval_model.py --model_mode 1)")


if __name__ == "__main__":
    run(main)
