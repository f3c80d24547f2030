"""Everything once, at the smallest size: a world is invented, a tokenizer trained, a model pretrained and fine-tuned,
examined.

    make demo                                   # or: python scripts/demo.py
    python scripts/demo.py --skip_training      # only the exam and the conversation, on what is there

Every step is an ordinary command of this repository; it is printed before it runs, to be typed with other data next.
Results lie in out/: `make chat` talks to the model.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import shlex
import subprocess
import time
from dataclasses import dataclass

from trainer.config import ROOT, Options, option, parse, run

QUESTIONS = ("你好！", "Who are you?")  # the conversation at the end begins with these


@dataclass(frozen=True)
class DemoConfig(Options):
    """Options of the demo"""

    save_dir: str = option(str(ROOT / "out"), "where everything is written", path=True)
    question_seed: int = option(0, "draws other exam questions", within="[0, inf)")
    skip_training: bool = option(False, "use the weights that are there")


def step(title: str, *command: object) -> None:
    """Runs a command of ours, shown as one would type it."""
    words = [str(word) for word in command]
    shown = shlex.join(["python", *(str(Path(w).relative_to(ROOT)) if w.startswith(str(ROOT)) else w for w in words)])
    print(f"\n=== {title}\n$ {shown}\n", flush=True)
    if status := subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        raise SystemExit(status)


# What the two trainings are called with: about two thirds of the demo's time goes into the first.
PRETRAIN = "--preset nano --batch_size 8 --max_seq_len 256 --optimizer muon --learning_rate 4e-3".split()
SFT = "--epochs 2 --batch_size 32 --max_seq_len 256 --optimizer muon --learning_rate 2e-3".split()
COMMON = "--schedule wsd --min_lr_ratio 0.05 --log_interval 100 --compile off".split()


def train(save_dir: Path) -> None:
    world, tokenizer = save_dir / "tiny_world", save_dir / "tokenizer"
    texts, chats = world / "pretrain.jsonl", world / "sft.jsonl"
    common = [*COMMON, "--save_dir", save_dir]
    step("1. Invent a small world, in Chinese and English", ROOT / "dataset/tiny_world.py", "--save_dir", world)
    step(
        "2. Train a tokenizer on its text",
        *(
            ROOT / "trainer/train_tokenizer.py",
            "--vocab_size",
            2000,
            "--save_dir",
            tokenizer,
            "--data_path",
            texts,
            chats,
        ),
    )
    step(
        "3. Pretraining: learn to continue text",
        *(ROOT / "trainer/train_pretrain.py", "--data_path", texts, "--tokenizer_path", tokenizer, *PRETRAIN, *common),
    )
    step(
        "4. Fine-tuning: learn to answer",
        *(ROOT / "trainer/train_full_sft.py", "--data_path", chats, "--from_weight", "pretrain", *SFT, *common),
    )


def examine(save_dir: Path, question_seed: int) -> None:
    from dataset.benchmark import run_benchmark
    from model.checkpoint import find_weights, load_weights
    from model.generate import Sampling, generate
    from tokenizer.chat import encode_chat
    from tokenizer.resolve import tokenizer_of

    checkpoint = load_weights(find_weights("full_sft", save_dir))
    tokenizer = tokenizer_of(checkpoint.tokenizer, checkpoint.path, checkpoint.config.vocab_size)
    model = checkpoint.build().eval()
    print(f"\n=== The exam\n$ python eval_model.py --weight {checkpoint.path} --benchmark tiny_world\n")
    result = run_benchmark(model, tokenizer, question_seed)
    print(result["table"])

    print("\n=== A conversation\n")
    prompts = [*QUESTIONS, *(answer["prompt"] for answer in result["answers"][:: len(result["answers"]) // 4][:4])]
    for prompt in prompts:
        ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True).ids
        (reply,) = generate(model, [ids], Sampling(temperature=0), max_new_tokens=64, stop=tokenizer.stop_ids)
        print(f"> {prompt}\n{tokenizer.decode(reply, skip_control=True)}\n")


def main():
    config = parse(DemoConfig, description=__doc__)
    save_dir, begin = Path(config.save_dir), time.monotonic()
    if not config.skip_training:
        train(save_dir)
    examine(save_dir, config.question_seed)
    minutes = (time.monotonic() - begin) / 60
    print(f"That took {minutes:.1f} minutes. Talk to it: make chat (python eval_model.py --model_mode 1)")


if __name__ == "__main__":
    run(main)
