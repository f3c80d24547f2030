"""What fewer bits cost: bits per byte of text, of the weights, of each kind of GGUF file, and of --quantize.

    python benchmarks/real_data/quantised_quality.py --weight out/pretrain_512.pth --data_path pretrain.jsonl
    ... --rows 20      # to see that it runs

The text must be held out: rows that the weights were not trained on. The target is at most 0.5 % more for q8_0 of a
trained `small`; for --quantize 0.5 % (int8) and 3 % (int4) more than bf16. Random weights say nothing.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from tqdm import tqdm

from benchmarks.common import machine
from common.files import ROOT
from model.checkpoint import open_weights
from model.export import stored_once
from model.interop.gguf import DTYPES, read_gguf, write_gguf
from model.loading import load_model
from model.precision import prepare_for_inference
from model.quant_cpu import quantize_for_cpu
from tokenizer.text import Tokenizer

LENGTH = 512


def texts(path: str, count: int) -> list[str]:
    """Of {"text"} rows; of chats, what is said."""
    found = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            turns = row.get("conversations") or row.get("messages") or ()
            found.append(row.get("text") or "\n".join(turn["content"] for turn in turns))
            if len(found) == count:
                break
    return found


@torch.no_grad()
def bits_per_byte(model, tokenizer: Tokenizer, rows: list[str]) -> float:
    """Every token of each text is predicted once, from at most LENGTH before it; a text begins after what opens it."""
    nats = size = 0.0
    for text in tqdm(rows, leave=False, disable=None):
        ids = [*tokenizer.start_of_text, *tokenizer.encode(text)]
        size += len(text.encode())
        for start in range(0, len(ids) - 1, LENGTH):
            piece = torch.tensor([ids[start : start + LENGTH + 1]])
            nats += model(piece[:, :-1], targets=piece[:, 1:]).loss.double().sum().item()
    return nats / math.log(2) / size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", required=True, help="a name in out/, a file or a directory")
    parser.add_argument("--data_path", required=True, help="held-out rows, .jsonl")
    parser.add_argument("--rows", type=int, default=300)
    args = parser.parse_args()
    checkpoint, tokenizer = open_weights(args.weight, ROOT / "out")
    rows, model = texts(args.data_path, args.rows), checkpoint.build().eval()
    state = stored_once(checkpoint.config, checkpoint.state)
    print(machine())
    whole = bits_per_byte(model, tokenizer, rows)
    print(f"{checkpoint.path}: {len(rows)} rows of {args.data_path}\n{'weights':<10} {whole:.5f} bits per byte")
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            path = Path(folder) / f"{dtype}.gguf"
            write_gguf(path, checkpoint.config, state, tokenizer, dtype=dtype)
            again = load_model(checkpoint.config, read_gguf(path, checkpoint.config, list(state)), path)
            found = bits_per_byte(again, tokenizer, rows)
            print(f"{dtype:<10} {found:.5f} ({found / whole - 1:+.3%}), {path.stat().st_size / 1e6:.1f} MB")
    half = bits_per_byte(prepare_for_inference(checkpoint.build(), torch.bfloat16), tokenizer, rows)
    print(f"{'bfloat16':<10} {half:.5f} ({half / whole - 1:+.3%})")
    for kind in ("int8", "int4"):
        for packs_head in (True, False):
            model = prepare_for_inference(checkpoint.build(), torch.bfloat16)
            head = model.lm_head
            said = quantize_for_cpu(model, kind)
            if not packs_head:
                model.lm_head, said = head, f"{kind}, the head in bfloat16"
            found = bits_per_byte(model, tokenizer, rows)
            print(f"{kind:<10} {found:.5f} ({found / half - 1:+.3%} of bfloat16): {said}")


if __name__ == "__main__":
    main()
