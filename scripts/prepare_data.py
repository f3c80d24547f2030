"""Converts files in any layout to ours, joins them, and sets a validation part aside.

    python scripts/prepare_data.py --data_path alpaca.json --save_path train.jsonl
    python scripts/prepare_data.py --task_data a.jsonl b.json --identity_data me.jsonl --ratio 3 --merged_data all.jsonl
    python scripts/prepare_data.py --data_path all.jsonl --val_fraction 0.01 --output_dir data     # train, val .jsonl
    python scripts/prepare_data.py --data_path dpo.jsonl --to chat        # the chosen answers, for fine-tuning
    python scripts/prepare_data.py --data_path mine.jsonl --data_mapping columns.yaml --max_seq_len 1024

--ratio R repeats the identity rows until there are R task rows for each of them. Without it every row is written once.
docs/data.md shows the layouts. A name in place of a file is that of a data set (`scripts/download.py` lists some): its
file in dataset/, fetched if it is not there.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass

from common.console import UserError, run, say
from common.files import ROOT
from common.options import Options, option, parse
from common.values import LONGEST, SEEDS


@dataclass(frozen=True)
class PrepareConfig(Options):
    """Options of preparing data"""

    data_path: tuple[str, ...] = option(
        (),
        "files to convert and join: .jsonl or .json arrays in any layout, or names of data sets on a hub",
        path=True,
        aliases=("task_data", "data_file", "train_path", "dataset_name"),
    )
    identity_data: tuple[str, ...] = option((), "files about who the model is; --ratio repeats them", path=True)
    ratio: float = option(0.0, "task rows for each identity row (0: no repeating)", within="[0, inf)")
    save_path: str = option(
        str(ROOT / "dataset" / "merged_training_data.jsonl"),
        "file to write, or a folder for train.jsonl (and val.jsonl)",
        path=True,
        aliases=("merged_data", "output_dir", "save_dir"),
    )
    val_fraction: float = option(0.0, "share of the rows set aside in <name>.val.jsonl", within="[0, 1)")
    data_limit: int = option(0, "use only the first N task rows (0: all)", aliases=("max_samples",), within="[0, inf)")
    to: str | None = option(
        None,
        "kind of rows to make; chat keeps the better answers of other kinds",
        choices=("text", "chat", "preference", "rated"),
    )
    data_mapping: str | None = option(None, "YAML file that says which columns of your files stand for ours", path=True)
    on_bad_row: str = option("error", "a row that cannot be read", choices=("error", "skip"))
    max_bad_rows: float = option(0.01, "share of the rows that skip may leave out", within="[0, 1]")
    max_seq_len: int = option(
        0,
        "also tokenise, and print what would be cut at this length",
        within=f"[0, {LONGEST}]",
        aliases=("max_length", "cutoff_len"),
    )
    tokenizer_path: str | None = option(
        None,
        "for tokenising: directory with a tokenizer.json, or a model's name on a hub",
        path=True,
        aliases=("tokenizer_name",),
    )
    seed: int = option(42, "seed of the validation part", within=SEEDS)
    cache_dir: str | None = option(None, "where line indexes go (default: beside the data)", path=True)

    def problems(self) -> list[str]:
        alone = [f"--ratio {self.ratio:g}: of what? --identity_data is missing"]
        return super().problems() + (alone if self.ratio and not self.identity_data else [])


def main():
    config = parse(PrepareConfig, description=__doc__)

    from dataset.read.hub import find_data
    from dataset.read.mapping import read_mapping
    from dataset.read.mix import prepare, shared_lines

    target = Path(config.save_path)
    if target.suffix != ".jsonl":
        if target.suffix in (".json", ".txt", ".csv", ".parquet", ".gz"):
            raise UserError(f"--save_path {target}: what is written is .jsonl; name it so, or give a folder")
        target = target / "train.jsonl"
    val_target = target.with_name("val.jsonl" if target.name == "train.jsonl" else f"{target.stem}.val.jsonl")
    tokenizer = None
    if config.max_seq_len:  # loaded first, so that nothing is written if it cannot be loaded
        from model.hub import load_tokenizer

        tokenizer = load_tokenizer(config.tokenizer_path)
    report = prepare(
        [find_data(path) for path in config.data_path],
        [find_data(path) for path in config.identity_data],
        target=target,
        val_target=val_target,
        ratio=config.ratio,
        val_fraction=config.val_fraction,
        data_limit=config.data_limit,
        to=config.to,
        mapping=read_mapping(config.data_mapping),
        on_bad_row=config.on_bad_row,
        max_bad_rows=config.max_bad_rows,
        seed=config.seed,
        cache_dir=config.cache_dir,
    )
    for path, layout in report.layouts.items():
        say(f"read: {path} ({layout})")
    say(f"task data: {report.task:,} rows")
    if config.identity_data:
        times = f", written {report.repeated:,} times in all (ratio {report.ratio:.3g}:1)" if config.ratio else ""
        say(f"identity data: {report.identity:,} rows{times}")
        if report.ratio < 0.9 * config.ratio:
            say(f"warning: --ratio {config.ratio:g} asks for fewer of them than there are, and none is left out")
    if report.bad:
        say(f"left out: {report.bad:,} bad rows, see <file>.rejects.jsonl beside each file")
    if report.left_out:
        say(f"left out: {report.left_out:,} answers that were labelled bad")
    say(f"written: {report.written:,} rows to {target}")
    if config.val_fraction:
        say(f"written: {report.held_out:,} rows to {val_target}")
    elif val_target.is_file() and (both := shared_lines(target, val_target)):  # from an earlier run, perhaps
        say(
            f"warning: {both:,} rows of {target} are in {val_target} too, which this run has not written; remove it, "
            "or write it anew with --val_fraction"
        )
    if config.max_seq_len:
        tokenise(target, report.kind, tokenizer, config)


def tokenise(path: Path, kind: str, tokenizer, config: PrepareConfig) -> None:
    """Builds the token cache that training will find, and prints what fits."""
    from dataset.batches.preference import PreferenceDataset
    from dataset.tokens.examples import PretrainDataset, SFTDataset

    datasets = {dataset.kind: dataset for dataset in (PretrainDataset, SFTDataset, PreferenceDataset)}
    if kind not in datasets:
        raise UserError(f"--max_seq_len: no stage trains on {kind} rows yet; leave it out")
    dataset = datasets[kind](path, tokenizer, max_seq_len=config.max_seq_len, cache_dir=config.cache_dir)
    say(f"tokenised: {dataset.summary}")


if __name__ == "__main__":
    run(main)
