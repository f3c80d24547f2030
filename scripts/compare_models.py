"""Lets models answer the same questions, side by side: in a conversation, or in a report.

    python scripts/compare_models.py --base_model full_sft --finetuned_model rlhf --interactive
    python scripts/compare_models.py --base_model full_sft --finetuned_model rlhf        # 50 questions: a report
    python scripts/compare_models.py --finetuned_model lora_medical                      # without and with an adapter
    python scripts/compare_models.py --base_model full_sft --finetuned_model lora_a lora_b --questions_file mine.txt
    python scripts/compare_models.py --base_model pretrain --finetuned_model full_sft --eval_data val.jsonl
    python scripts/compare_models.py --output out/compare/full_sft-rlhf.json --votes votes.json
    python scripts/compare_models.py --votes votes.json                                 # of the server's page /compare

A report is one .html file that needs no network, and the same as .json. In it: the answers and where they begin to
differ, how surprised each model is by the others' words, figures with error bars, what was forgotten (--eval_data), and
blind voting. The page saves the votes in a file; --votes counts them and puts them into the report.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hashlib
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from common.console import UserError, check_writable, note, run, say
from common.files import ROOT
from common.options import option, parse
from common.values import SEEDS
from inference.options import DeviceOptions, SamplingOptions

QUESTIONS = ROOT / "configs/test_questions.json"


@dataclass(frozen=True)
class CompareConfig(DeviceOptions, SamplingOptions):
    """Options of comparing"""

    needless: ClassVar[dict[str, str]] = {
        "trust_remote_code": "no code of a model's repository is ever run",
        "stream": "answers are always streamed",
    }

    base_model: str | None = option(
        None,
        "the model that the others are compared with: a name in save_dir or out/, a file, a directory, an adapter "
        "(default: the weights of the adapter that --finetuned_model names)",
        aliases=("model_path", "model_name_or_path"),
    )
    finetuned_model: tuple[str, ...] = option(
        (), "one or more others, likewise", aliases=("finetuned_models", "finetuned_model_path", "models", "lora_path")
    )
    interactive: bool = option(False, "type the questions; all models answer at once")
    questions_file: str = option(
        str(QUESTIONS), "the questions: .json, .jsonl in any layout, or .txt with one a line", aliases=("prompts_file",)
    )
    eval_data: tuple[str, ...] = option(
        (), "held-out files whose loss is compared: what has been forgotten?", path=True, aliases=("val_path",)
    )
    votes: tuple[str, ...] = option(
        (), "files that the page of --output, or the server's, has saved: count them", path=True
    )
    output: str | None = option(
        None, "the report, .json or .html; both are written (default: in compare/ of save_dir)", path=True
    )
    data_limit: int = option(0, "use only the first N questions", aliases=("max_samples",), within="[0, inf)")
    system: str = option("", "system prompt")
    max_new_tokens: int = option(256, "longest answer", aliases=("max_length", "max_seq_len"), within="[1, inf)")
    temperature: float = option(0.0, "0 always takes the likeliest token", within="[0, inf)")
    seed: int | None = option(None, "makes drawn answers repeatable", within=SEEDS)
    save_dir: str = option(str(ROOT / "out"), "where names are looked up", aliases=("out_dir",), path=True)
    tokenizer_path: str | None = option(None, "directory of the tokenizer (default: the weights know)", path=True)

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.votes and not self.finetuned_model:
            found.append("--finetuned_model: name the model to compare, for instance --finetuned_model rlhf")
        if self.interactive and (self.eval_data or self.output):
            found.append("--interactive: prints and writes nothing; leave out --output and --eval_data")
        if self.eval_data:  # before a model is loaded
            from dataset.read.jsonl import require_file

            for path in self.eval_data:
                require_file(path)
        return found


def main():
    config = parse(CompareConfig, description=__doc__)
    if config.votes:
        return count_votes(config)
    if config.output:
        check_writable(config.output, "--output", is_file=True)  # now, not after minutes of answering
    questions = None
    if not config.interactive:  # read before the models are loaded, so that a mistake in it shows at once
        from dataset.read.questions import read_questions

        file = Path(config.questions_file)
        bundled = ROOT / "configs" / file  # test_questions.json, say
        questions = read_questions(bundled if not file.exists() and bundled.is_file() else file, config.data_limit)

    from evaluation.models import base_of, open_models

    names = [config.base_model or base_of(config.finetuned_model[0], config.save_dir), *config.finetuned_model]
    places = dict(
        tokenizer_path=config.tokenizer_path, device=config.device, dtype=config.dtype, quantize=config.quantize
    )
    contenders = open_models(names, config.save_dir, **places)
    if questions is None:
        from evaluation.side_by_side import converse

        return converse(contenders, config.sampling(config.seed), config.max_new_tokens, config.system)

    from evaluation.compare import compare, write_report
    from evaluation.measure import Settings

    settings = Settings(
        max_new_tokens=config.max_new_tokens, sampling=config.sampling(config.seed), system=config.system
    )
    called = "-".join(contender.name.replace("/", "_") for contender in contenders)
    if len(called.encode()) > 200:  # a file's name may have 255 bytes
        called = f"{len(contenders)}_models-{hashlib.sha256(called.encode()).hexdigest()[:8]}"
    output = Path(config.output or Path(config.save_dir) / "compare" / f"{called}.json")
    check_writable(str(output), "--output", is_file=True)
    result = compare(contenders, questions, settings, config.eval_data)
    say(summary(result))
    say(f"\nreport: {write_report(output, result)}; open it in a browser")


def summary(result: dict[str, Any]) -> str:
    """For the terminal: each figure of each model, and its change against the first one."""
    lines = [f"{'':<34}" + "".join(f"{model['name'][-22:]:>24}" for model in result["models"])]
    held_out = [
        dict(row, title=f"{row['name']}, {file['file']}") for file in result["held_out"] for row in file["figures"]
    ]
    for row in [*result["figures"], *held_out]:
        form, signed = ("{:.1%}", "{:+.1%}") if row["form"] == "share" else ("{:.4g}", "{:+.3g}")
        cells = [form.format(row["values"][0]["value"])]
        for value, change in zip(row["values"][1:], row["changes"][1:]):
            clear = change["low"] is not None and (change["low"] > 0 or change["high"] < 0)
            cells.append(f"{form.format(value['value'])} ({signed.format(change['value'])}{'*' if clear else ''})")
        lines.append(f"{row['title'][:33]:<34}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join([*lines, "* the 95 % interval of the change does not contain 0"])


def count_votes(config: CompareConfig) -> None:
    from evaluation.compare import FORMAT, report_files, write_report
    from evaluation.votes import as_text, read_page_votes, read_votes, tally

    files = {Path(file).resolve(): file for file in config.votes}.values()  # one that is named twice: once
    if not config.output:  # those of the server's page, which are about no report
        names, votes = read_page_votes(files)
        return say(as_text(tally(votes, len(names)), names))
    path, _ = report_files(config.output)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["format"] != FORMAT:
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a report of this script") from None
    votes = [vote for file in files for vote in read_votes(file, result)]
    result["votes"] = tally(votes, len(result["models"]))
    say(as_text(result["votes"], [model["name"] for model in result["models"]]))
    note(f"report: {write_report(path, result)}")


if __name__ == "__main__":
    run(main)
