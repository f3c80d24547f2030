"""Reasoning on GSM8K: does a model that was tuned on thoughts write well-formed ones about questions it never saw?

    python benchmarks/real_data/reason.py --data ../shared/data/reason_gsm8k.jsonl --work_dir out/real_data

Holds 200 questions out, tunes the weights given (benchmarks/real_data/lora.py makes some) on the other rows, and lets
them answer greedily. Well-formed is: one thought, then one answer, nothing else, and then the end token. Exits with
status 1 where less than 90 % of the answers are. About 8 minutes on 2 cores with nano.
"""

import argparse
import json
import sys
import time
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.real_data.common import hold_out, stage
from common.files import ROOT
from inference.generate import generate
from inference.sampling import Sampling
from model.checkpoint import find_weights, open_weights
from model.precision import pick_device, pick_dtype
from tokenizer.chat import encode_chat
from tokenizer.text import Tokenizer

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
LEAST = 0.9


def well_formed(tokenizer: Tokenizer, reply: list[int]) -> bool:
    """<think> words </think> blanks <answer> words </answer>, with no other control token anywhere."""
    control = [(i, token) for i, token in enumerate(reply) if token in tokenizer.control.values()]
    if [token for _, token in control] != [tokenizer.control[tag] for tag in TAGS]:
        return False
    opens, closes, begins, ends = (i for i, _ in control)
    said = lambda start, stop: tokenizer.decode(reply[start + 1 : stop]).strip()
    outside = tokenizer.decode(reply[:opens]) + said(closes, begins) + tokenizer.decode(reply[ends + 1 :])
    return bool(said(opens, closes) and said(begins, ends)) and not outside.strip()


def last_part(text: str) -> str:
    """Between <answer> and </answer>."""
    return text.partition("<answer>")[2].partition("</answer>")[0].strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--from_weight", default="full_sft")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "out" / "real_data")
    parser.add_argument("--epochs", default="1")
    parser.add_argument("--learning_rate", default="5e-4")
    parser.add_argument("--tag_weight", default="10")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--max_new_tokens", type=int, default=400)
    parser.add_argument("--data_limit", default="0", help="rows to train on (0: all)")
    args = parser.parse_args()

    folder = args.work_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with open(args.data, "rb") as file:
        every = max(sum(1 for _ in file) // args.questions, 1)
    train, held_out = hold_out(args.data, folder, lambda i: i % every == 0)
    with open(held_out, encoding="utf-8") as file:
        asked = [json.loads(line)["conversations"] for line in file][: args.questions]
    begin = time.perf_counter()
    stage(
        "distill_reason",
        "--data_path",
        train,
        "--save_dir",
        folder,
        "--from_weight",
        find_weights(args.from_weight, folder),
        "--cache_dir",
        folder / "cache",
        "--max_seq_len",
        512,
        "--batch_size",
        16,
        "--epochs",
        args.epochs,
        "--data_limit",
        args.data_limit,
        "--learning_rate",
        args.learning_rate,
        "--tag_weight",
        args.tag_weight,
    )
    trained = time.perf_counter()

    checkpoint, tokenizer = open_weights("reason", folder)
    model, device = checkpoint.build().eval(), pick_device("auto")
    model.to(device).compute_dtype = pick_dtype("auto", device)[0]
    fine, right, ended, shown = 0, 0, 0, []
    prompts = [encode_chat(tokenizer, chat[:-1], add_generation_prompt=True).ids for chat in asked]
    replies = generate(
        model, prompts, Sampling(temperature=0), max_new_tokens=args.max_new_tokens, stop=tokenizer.stop_ids
    )
    for chat, reply in zip(asked, replies):
        done = len(reply) < args.max_new_tokens  # by the end token, not by the limit
        ended += done
        fine += done and well_formed(tokenizer, reply)
        right += last_part(tokenizer.decode(reply)) == last_part(chat[-1]["content"])
        shown.append(f"{chat[0]['content']}\n-> {tokenizer.decode(reply)}\n")
    share = fine / len(asked)
    print("\n".join(["", *shown[:2]]))
    print(
        f"{len(asked)} held-out questions: {share:.1%} well-formed, {ended / len(asked):.1%} ended, "
        f"{right / len(asked):.1%} right; training {trained - begin:.0f} s, "
        f"answering {time.perf_counter() - trained:.0f} s"
    )
    print("as it should be" if share >= LEAST else f"not as it should be: at least {LEAST:.0%} well-formed")
    sys.exit(0 if share >= LEAST else 1)


if __name__ == "__main__":
    main()
