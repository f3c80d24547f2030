"""DPO on real pairs: how often a held-out chosen answer is preferred, and by how much, before and after.

    python benchmarks/real_data/dpo.py --data_path ../shared/data/dpo.jsonl --from_weight out/real_data/full_sft_192.pth

Every fifth pair is held out, the others are trained on with trainer/train_dpo.py. Three ways to ask what a model
prefers:

    reward            beta x how much likelier an answer has become than it was to the SFT model: what DPO is about, and
                      what train_dpo.py logs. The SFT model has no preference by it: margin 0, accuracy at chance
    log-probability   of the whole answer. A shorter answer has the advantage, so this is mostly about length
    per token         its mean. This is what somebody sees who reads both

Exits with status 1 where the reward margin is not above 0 or its accuracy not above one half.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks.real_data.common import hold_out, stage
from common.files import ROOT
from dataset.batches.preference import PairLoader, PreferenceDataset
from model.checkpoint import find_weights, open_weights
from model.precision import pick_dtype
from trainer.losses.preference import read_answers


@torch.no_grad()
def read_pairs(weights: Path, path: Path, length: int, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(pairs, 2) summed log-probabilities of the file's answers, and how many tokens they have."""
    checkpoint, tokenizer = open_weights(str(weights))
    model = checkpoint.build().eval()
    model.compute_dtype, _ = pick_dtype("auto", torch.device("cpu"))
    data = PreferenceDataset(path, tokenizer, max_seq_len=length, cache_dir=folder)
    loader = PairLoader(data, packing=True, batch_size=4, accumulation_steps=1, max_seq_len=length, shuffle=False)
    sums, tokens = torch.zeros(2, len(data), 2)
    for step in range(loader.steps_per_epoch):
        for batch in loader.batches(step):
            found, sizes, _ = read_answers(model, batch)
            sums[list(batch.examples)], tokens[list(batch.examples)] = found, sizes.float()
    return sums, tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--from_weight", type=Path, required=True, help="the SFT model's weights")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "out" / "real_data")
    parser.add_argument("--learning_rate", default="2e-5")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--data_limit", type=int, default=0, help="pairs to train on (0: all)")
    args = parser.parse_args()

    folder = args.work_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = hold_out(args.data_path, folder, lambda i: i % 5 == 0)
    stage(
        "dpo",
        "--data_path",
        train,
        "--val_path",
        held_out,
        "--from_weight",
        args.from_weight,
        "--save_dir",
        folder,
        "--cache_dir",
        folder / "cache",
        "--max_seq_len",
        args.length,
        "--learning_rate",
        args.learning_rate,
        "--epochs",
        args.epochs,
        "--batch_size",
        args.batch_size,
        "--beta",
        args.beta,
        "--data_limit",
        args.data_limit,
    )

    where = dict(path=held_out, length=args.length, folder=folder / "cache")
    before, tokens = read_pairs(args.from_weight, **where)
    after, _ = read_pairs(find_weights("rlhf", folder), **where)
    prefers = lambda scores: (scores[:, 0] > scores[:, 1]).float().mean().item()
    rewards = args.beta * (after - before)
    margins = rewards[:, 0] - rewards[:, 1]
    print(f"\n{len(before)} held-out pairs                     before    after")
    print(f"chosen preferred, log-probability     {prefers(before):7.1%}  {prefers(after):7.1%}")
    print(f"chosen preferred, per token           {prefers(before / tokens):7.1%}  {prefers(after / tokens):7.1%}")
    gap = [(scores[:, 0] - scores[:, 1]).mean().item() for scores in (before / tokens, after / tokens)]
    print(f"chosen - rejected, nats per token     {gap[0]:+7.3f}  {gap[1]:+7.3f}")
    print(
        f"reward margin                         {0:+7.3f}  {margins.mean():+7.3f}  "
        f"(rewards of chosen {rewards[:, 0].mean():+.3f}, of rejected {rewards[:, 1].mean():+.3f})"
    )
    print(f"reward accuracy                       {0.5:7.1%}  {(margins > 0).float().mean():7.1%}")
    risen = (margins > 0).float().mean() > 0.5 and margins.mean() > 0
    print("as it should be" if risen else "not as it should be: reward margin and accuracy must rise")
    sys.exit(0 if risen else 1)


if __name__ == "__main__":
    main()
