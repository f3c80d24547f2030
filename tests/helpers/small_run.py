"""A training run small enough for tests: a few rows, a model of some thousand parameters, the shipped tokenizer."""

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

WORDS = "麻雀 虽小 五脏 俱全 a sparrow is small yet has every organ 你好 hello 42 = six times seven 。".split()


def write_pretrain(path: Path, rows: int = 40) -> Path:
    text = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(3 + i % 17)) for i in range(1, rows + 1)]
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in text), encoding="utf-8")
    return path


def write_sft(path: Path, rows: int = 40) -> Path:
    """Answers of 1 to 12 words: every micro-batch and rank trains on another number of tokens."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            question = " ".join(WORDS[i % 5 : i % 5 + 2 + i % 7])
            answer = " ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + i * 5 % 12))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")
    return path


def write_dpo(path: Path, rows: int = 24) -> Path:
    """Answers of 1 to 12 words to prompts of 2 to 8; the better one is the shorter one in two of three pairs."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            prompt = [{"role": "user", "content": " ".join(WORDS[i % 5 : i % 5 + 2 + i % 7])}]
            chosen, rejected = (
                [*prompt, {"role": "assistant", "content": " ".join(WORDS[(i + j) % len(WORDS)] for j in range(size))}]
                for size in (1 + i * 5 % 12, 1 + (i * 5 + 4) % 12)
            )
            file.write(json.dumps({"chosen": chosen, "rejected": rejected}, ensure_ascii=False) + "\n")
    return path


FLAGS = [
    "--device=cpu",
    "--dtype=float32",
    "--compile=off",
    "--max_seq_len=32",
    "--log_interval=2",
    "--save_interval=0",
    "--learning_rate=1e-2",
    "--num_workers=1",
]
SHAPE = ["--hidden_size=32", "--num_hidden_layers=2", "--num_attention_heads=2", "--num_key_value_heads=1"]


def run_stage(stage: str, *flags: str) -> None:
    """`python trainer/train_<stage>.py` in this process."""
    module = __import__(f"trainer.train_{stage}", fromlist=["main"])
    before = sys.argv
    sys.argv = [f"trainer/train_{stage}.py", *FLAGS, *(SHAPE if stage == "pretrain" else []), *map(str, flags)]
    try:
        module.main()
    finally:
        sys.argv = before


def run_script(script: str, *words: object, typed: str = "") -> tuple[int, str, str]:
    """Any script of ours, in this process, from the directory we are in -> exit status, output, errors."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin, list(sys.path)
    sys.argv, sys.stdin = [script, *map(str, words)], io.StringIO(typed)
    sys.path.insert(0, "")  # what the interpreter would put there, for the script to replace
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv, sys.stdin, sys.path[:] = before
    return status, out.getvalue(), err.getvalue()


def sft_engine(folder: Path, batch_size: int, accumulation_steps: int, backend=None, **changes):
    """An engine over `write_sft`'s rows with a fixed random model, ready for one step."""
    import torch

    from common.options import parse
    from dataset.tokens.examples import SFTDataset
    from model.config import ModelConfig
    from model.transformer import CausalLM
    from tokenizer.text import Tokenizer
    from trainer.inputs import open_data
    from trainer.loop.backend import Backend
    from trainer.loop.engine import Engine, Job
    from trainer.losses.next_token import NextToken
    from trainer.train_full_sft import SFTConfig

    flags = [
        *FLAGS,
        f"--data_path={folder / 'sft.jsonl'}",
        f"--save_dir={folder / 'out'}",
        "--grad_clip=0",
        f"--batch_size={batch_size}",
        f"--accumulation_steps={accumulation_steps}",
    ]
    config = parse(SFTConfig, flags + [f"--{k}={v}" for k, v in changes.items()])
    tokenizer = Tokenizer.load()
    data = open_data(SFTDataset, config, "sft", tokenizer, on_long="truncate")
    torch.manual_seed(0)
    model = CausalLM(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=4,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.05)
    job = Job("full_sft", config, model, NextToken(), tokenizer, data, packing=True)
    return Engine(job, backend or Backend(torch.device("cpu")))


def first_gradients(engine) -> dict:
    """What one optimiser step would see, by parameter name."""
    engine.backend.optimizers = []
    engine.train_step(engine.loader.batches(0))
    return {name: parameter.grad.clone() for name, parameter in engine.model.named_parameters()}


if __name__ == "__main__" and os.environ.get("WORLD_SIZE"):  # torchrun tests/helpers/small_run.py FOLDER
    import torch

    from common.options import parse
    from trainer.loop.processes import start
    from trainer.train_full_sft import SFTConfig

    folder = Path(sys.argv[1])
    with start(parse(SFTConfig, FLAGS)) as backend:
        gradients = first_gradients(sft_engine(folder, 4, 2, backend))
        if backend.main:
            torch.save(gradients, folder / "two_ranks.pth")
