"""The whole library at its smallest size: generate a world, train a tokenizer, pretrain a model, fine-tune it, and
teach it a name (LoRA), a manner (DPO) and to think first (reasoning). The model sits an exam after each stage.

    make demo                                   # or: python scripts/demo.py
    python scripts/demo.py --skip_training      # only the exam and the conversation, with the weights in out/

Every step is an ordinary command of this repository. It is printed before it runs, to be tried with other data next.
Results are in out/; `make chat` talks to the model.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import shlex
import subprocess
import time
from dataclasses import dataclass

from common.console import run, say
from common.files import ROOT
from common.options import Options, option, parse

QUESTIONS = ("你好！", "Who are you?")  # the conversation at the end begins with these


@dataclass(frozen=True)
class DemoConfig(Options):
    """Options of the demo"""

    save_dir: str = option(str(ROOT / "out"), "where everything is written", path=True)
    question_seed: int = option(0, "draws other exam questions", within="[0, inf)")
    skip_training: bool = option(False, "use the weights in save_dir")


def step(title: str, *command: object) -> None:
    """Prints a command of this repository as one would type it, and runs it."""
    words = [str(word) for word in command]
    shown = shlex.join(["python", *(str(Path(w).relative_to(ROOT)) if w.startswith(str(ROOT)) else w for w in words)])
    print(f"\n=== {title}\n$ {shown}\n", flush=True)
    if status := subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        raise SystemExit(status)


# Flags of the trainings. Most of the demo's time goes into the first.
PRETRAIN = "--preset nano --epochs 2 --batch_size 8 --max_seq_len 256 --optimizer muon --learning_rate 2e-3".split()
SFT = "--epochs 2 --batch_size 32 --max_seq_len 256 --optimizer muon --learning_rate 1e-3".split()
LORA = "--epochs 9 --batch_size 16 --max_seq_len 256 --lora_rank 8 --learning_rate 6e-4".split()
DPO = "--epochs 1 --batch_size 16 --max_seq_len 256 --learning_rate 6e-5".split()
REASON = "--epochs 2 --batch_size 32 --max_seq_len 256 --optimizer muon --learning_rate 1e-3".split()
COMMON = "--schedule wsd --min_lr_ratio 0.05 --log_interval 100 --compile off".split()


def train(save_dir: Path) -> None:
    world, tokenizer = save_dir / "tiny_world", save_dir / "tokenizer"
    texts, chats = world / "pretrain.jsonl", world / "sft.jsonl"
    learn = lambda title, script, data, *flags: step(
        title, ROOT / f"trainer/{script}.py", "--data_path", data, *flags, *COMMON, "--save_dir", save_dir
    )
    step("1. Invent a small world, in Chinese and English", ROOT / "dataset/tiny_world", "--save_dir", world)
    flags = ["--vocab_size", 2000, "--save_dir", tokenizer, "--data_path", texts, chats]
    step("2. Train a tokenizer on its text", ROOT / "trainer/train_tokenizer.py", *flags)
    begin = ["--tokenizer_path", tokenizer, *PRETRAIN]
    learn("3. Pretraining: learn to continue text", "train_pretrain", texts, *begin)
    learn("4. Fine-tuning: learn to answer", "train_full_sft", chats, "--from_weight", "pretrain", *SFT)
    after = ("--from_weight", "full_sft")
    learn("5. LoRA: learn who one is", "train_lora", world / "lora_identity.jsonl", *after, *LORA)
    pairs = ["--val_path", world / "dpo_val.jsonl", *after, *DPO]
    learn("6. DPO: learn which of two answers people prefer", "train_dpo", world / "dpo.jsonl", *pairs)
    thoughts = world / "reason.jsonl"
    learn("7. Reasoning: learn to write the steps first", "train_distill_reason", thoughts, *after, *REASON)


class Trained:
    """A trained model with its tokenizer and its figures in the exam."""

    def __init__(self, weight: str, save_dir: Path, question_seed: int, adapter: str = ""):
        from evaluation.benchmark import preference_accuracy, run_benchmark
        from model.adapter import load_adapter
        from model.checkpoint import find_weights, open_weights

        checkpoint, self.tokenizer = open_weights(weight, save_dir)
        self.name, self.path = adapter or weight, checkpoint.path
        self.model = checkpoint.build().eval()
        if adapter:
            load_adapter(find_weights(adapter, save_dir / "lora")).apply(self.model).eval()
        self.result = run_benchmark(self.model, self.tokenizer, question_seed)
        scores = self.result["scores"]["model"]
        self.figures = {
            "the exam, asked in Chinese": scores["all zh"],
            "the exam, asked in English": scores["all en"],
            "identity in unseen wordings": self.result["later"]["identity"],
            "held-out pairs: prefers the kind one": preference_accuracy(
                self.model, self.tokenizer, save_dir / "tiny_world/dpo_val.jsonl"
            ),
            "speaks in the kind manner": self.result["later"]["manner"],
            "problems of several steps": self.result["later"]["steps"],
        }

    def say(self, prompt: str) -> str:
        from inference.decode import generate
        from inference.sampling import Sampling
        from tokenizer.chat import encode_chat

        ids = encode_chat(self.tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True).ids
        (reply,) = generate(self.model, [ids], Sampling(temperature=0), max_new_tokens=96, stop=self.tokenizer.stop_ids)
        return self.tokenizer.decode([i for i in reply if i not in self.tokenizer.stop_ids])


def examine(save_dir: Path, question_seed: int) -> None:
    sft = Trained("full_sft", save_dir, question_seed)
    print(f"\n=== The exam after fine-tuning\n$ python eval_model.py --weight {sft.path} --benchmark tiny_world\n")
    print(sft.result["table"])
    lora = Trained("full_sft", save_dir, question_seed, adapter="lora_identity")
    stages = [sft, lora, *(Trained(name, save_dir, question_seed) for name in ("rlhf", "reason"))]
    print("\n=== What each stage changed\n\n" + " " * 38 + "".join(f"{stage.name:>15}" for stage in stages))
    for figure in sft.figures:
        print(f"{figure:<38}" + "".join(f"{stage.figures[figure]:>15.1%}" for stage in stages))

    print("\n=== A conversation\n")
    answers = sft.result["answers"]
    for model, prompt in [
        *((sft, prompt) for prompt in (*QUESTIONS, *(answers[i]["prompt"] for i in (0, 150, 250, 500)))),
        (lora, QUESTIONS[1]),
        (sft, "Tell me about Lucy."),
        (stages[2], "Tell me about Lucy."),
        (sft, "What is 19+7-5+12?"),
        (stages[3], "What is 19+7-5+12?"),
    ]:
        say(f"[{model.name}] > {prompt}\n{model.say(prompt)}\n")


def report(save_dir: Path, question_seed: int) -> Path:
    """Fine-tuning against LoRA and against DPO, on questions of the exam -> the page that shows it."""
    from dataset.read.questions import Question
    from dataset.tiny_world.exam import draw_questions
    from dataset.tiny_world.world import KINDS
    from evaluation.compare import compare, write_report
    from evaluation.measure import Settings
    from evaluation.models import open_models

    kinds = (*KINDS, "identity", "manner")
    questions = []
    for number, asked in enumerate(draw_questions(question_seed=question_seed, kinds=kinds)):
        if number % 20 == 0:
            # of "manner" only the beginning and the end are given: nothing to compare an answer with
            answer = None if asked.kind == "manner" else {"role": "assistant", "content": asked.answer}
            messages = [{"role": "user", "content": asked.prompt}]
            questions.append(Question(f"exam:{number + 1}", messages, answer, kind=asked.kind))
    models = open_models(["full_sft", "lora_identity", "rlhf"], save_dir)
    held_out = [save_dir / "tiny_world/dpo_val.jsonl"]
    result = compare(models, questions, Settings(max_new_tokens=64), held_out)
    return write_report(save_dir / "compare/demo.json", result)


def main():
    config = parse(DemoConfig, description=__doc__)
    save_dir, begin = Path(config.save_dir), time.monotonic()
    if not config.skip_training:
        train(save_dir)
    examine(save_dir, config.question_seed)
    page = report(save_dir, config.question_seed)
    print(f"=== What LoRA and DPO changed, answer by answer: open {page} in a browser\n")
    minutes = (time.monotonic() - begin) / 60
    print(f"That took {minutes:.1f} minutes. Talk to it: make chat (python eval_model.py --model_mode 1)")


if __name__ == "__main__":
    run(main)
