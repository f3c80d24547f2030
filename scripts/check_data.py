"""The data doctor: what is wrong with data files, and what training on them would be like.

    python scripts/check_data.py dataset/sft.jsonl
    python scripts/check_data.py train.jsonl --val_path val.jsonl --max_seq_len 1024
    python scripts/check_data.py train.jsonl --fix        # writes train.clean.jsonl, train.jsonl.rejects.jsonl
    python scripts/check_data.py *.jsonl --json           # for machines

Training would stop at what is called an error here, and where too many rows have nothing to train on. Then the exit
status is 1, else 0. Every row is read and checked; a random sample of 4 MB of rows is tokenised (--sample_mb 0: all
rows), where it shows what the tokenizer's chat format refuses.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
from dataclasses import dataclass

from common.console import UserError, printable, run, say
from common.options import Options, option, parse
from common.values import LONGEST
from dataset.read.row_errors import MAX_EMPTY_ROWS

BAR = 40  # characters of the longest bar
LABEL = 12


@dataclass(frozen=True)
class CheckConfig(Options):
    """Options of the data doctor"""

    data_path: tuple[str, ...] = option(
        (), "files to check; the flag may be left out", path=True, aliases=("data_file", "train_path")
    )
    val_path: tuple[str, ...] = option(
        (), "validation files: report rows that are in them too", path=True, aliases=("eval_data",)
    )
    max_seq_len: int | None = option(
        None,
        "count cuts and packing at this length (default: that of the stage, 512, for pairs 1024)",
        within=f"[2, {LONGEST}]",
        aliases=("max_length", "cutoff_len"),
    )
    batch_size: int | None = option(
        None, "examples that are packed together (default: those of a step, 16, for pairs 4)", within="[1, inf)"
    )
    kind: str | None = option(None, "what the rows must be", choices=("text", "chat", "preference", "rated"))
    data_mapping: str | None = option(None, "YAML file that says which columns of your files stand for ours", path=True)
    tokenizer_path: str | None = option(None, "directory with a tokenizer.json", path=True)
    sample_mb: float = option(4.0, "MB of rows that are tokenised (0: all)", within="[0, inf)")
    fix: bool = option(False, "write <name>.clean.jsonl and <file>.rejects.jsonl")
    json: bool = option(False, "print JSON")
    cache_dir: str | None = option(None, "where line indexes go (default: beside the data)", path=True)

    def problems(self) -> list[str]:
        return super().problems() + ([] if self.data_path else ["name a file: python scripts/check_data.py FILE ..."])


def main():
    config = parse(CheckConfig, bare="data_path", description=__doc__)

    import numpy as np

    from dataset.doctor.duplicates import hashes_of
    from dataset.doctor.examine import examine
    from dataset.read.mapping import read_mapping
    from dataset.tokens.order import weighted
    from model.hub import load_tokenizer

    targets = [clean_path(weighted(spec)[0]) for spec in config.data_path] if config.fix else []
    if twice := next((path for path in targets if targets.count(path) > 1), None):
        raise UserError(f"--fix: several of the files would be written to {twice}; fix them one by one")
    tokenizer, mapping = load_tokenizer(config.tokenizer_path), read_mapping(config.data_mapping)
    options = dict(mapping=mapping, cache_dir=config.cache_dir)
    known = [hashes_of(weighted(spec)[0], **options) for spec in config.val_path]
    known = np.sort(np.concatenate(known)) if known else None
    reports = []
    for spec in config.data_path:
        path, _ = weighted(spec)
        found = examine(
            path,
            tokenizer,
            max_seq_len=config.max_seq_len,
            batch_size=config.batch_size,
            kind=config.kind,
            val_hashes=known,
            sample=int(config.sample_mb * (1 << 20)),
            **options,
        )
        reports.append(found.report)
        if not config.json:
            say("\n".join(lines(found.report, config)))
        if config.fix and not found.report.failure:
            clean, rejects = clean_path(path), path.with_name(f"{path.name}.rejects.jsonl")
            good, bad = found.fix(clean, rejects)
            if not config.json:
                say(f"{'':<{LABEL}}wrote {rows(good)} to {shown(clean)}, {bad:,} to {shown(rejects)}")
    if config.json:
        say(json.dumps([report.as_dict() for report in reports], ensure_ascii=False, indent=1))
    if any(report.stops for report in reports):
        raise SystemExit(1)


def clean_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.clean.jsonl")


def lines(report, config: CheckConfig) -> list[str]:
    """The report as text."""
    name = shown(report.path)
    if report.failure:
        return [name, f"{'error':<{LABEL}}{report.failure}", ""]
    layout = f"{report.kind}: {report.layout}" if report.layout else "plain text"
    out = [name, f"{'rows':<{LABEL}}{report.rows:,} ({layout}), {report.size / 1e6:,.1f} MB"]

    def say(label: str, text: str) -> None:
        out.append(printable(f"{label:<{LABEL}}{text}", one_line=True))

    say("errors", f"{rows(report.bad)} cannot be read" if report.bad else "none")
    for finding in sorted(report.errors.values(), key=lambda finding: -finding.count):
        say("", f"{finding.count:,} x {finding.what}  ({where(finding)})")
    if report.untried and report.kind != "text":
        why = "only on a sample; --sample_mb 0 tries all" if config.sample_mb else "longer than 1 MB"
        say("chat format", f"not tried on {report.untried:,} of {rows(report.rows)}: {why}")
    if report.roles:
        say("roles", ", ".join(f"{role} {count:,}" for role, count in report.roles.items()))
    for finding in report.notes.values():
        of_rows = f"{rows(finding.count)}: {finding.what}  ({where(finding)})"
        say("note", of_rows if finding.count else finding.what)
    if report.empty.count:
        stops = f"; training stops at more than {MAX_EMPTY_ROWS:.0%} (--max_empty_rows)" if report.too_empty else ""
        say("empty", f"{rows(report.empty.count)} with nothing to train on  ({where(report.empty)}){stops}")
    if report.kind:
        twice = report.duplicates
        say("duplicates", f"{rows(twice.count)}, each like an earlier one  ({where(twice)})" if twice.count else "none")
    if config.val_path:
        shared = report.overlap
        say("validation", f"{rows(shared.count)} of it here too  ({where(shared)})" if shared.count else "none shared")
    return [*out, *token_lines(report), ""]


def token_lines(report) -> list[str]:
    found = report.tokens
    if not found:
        return []
    of = "all of them" if found["exact"] else f"a sample of {found['sampled']:,}"
    out = [
        f"{'tokens':<{LABEL}}median {found['median']:,}, 90 % up to {found['p90']:,}, 99 % up to {found['p99']:,}, "
        f"longest {found['max']:,}; {found['total']:,} in {of}"
    ]
    most = max(count for _, count in found["histogram"])
    for bound, count in found["histogram"]:
        out.append(f"{'':<{LABEL}}{'<= ' + format(bound, ','):>9} {'█' * -(-count * BAR // most)} {count:,}")
    saved = 1 - found["rows"] / max(found["rows_padded"], 1)
    length = found["max_seq_len"]
    if "cut" not in found:
        out.append(
            f"{'rows':<{LABEL}}{found['rows']:,} of {length} tokens in one stream; a document a row would take "
            f"{found['rows_padded']:,}, of which {saved:.0%} are padding"
        )
        return out
    out.append(f"{'trained':<{LABEL}}{found['trained_share']:.0%} of the tokens: what the assistant says")
    what = "pairs" if report.kind == "preference" else "conversations"
    cut, left_out = (100 * found[key] / found["sampled"] for key in ("cut", "left_out"))
    out.append(
        f"{'too long':<{LABEL}}at --max_seq_len {length}: {cut:.1f} % of the {what} lose their "
        f"beginning, {left_out:.1f} % are left out"
    )
    out.append(
        f"{'packing':<{LABEL}}{found['rows']:,} rows instead of {found['rows_padded']:,} padded ones, "
        f"{saved:.0%} less to compute ({found['batch_size']} examples a step)"
    )
    out.append(f"{'suggestion':<{LABEL}}--max_seq_len {found['suggested_max_seq_len']} holds 99 % of them whole")
    return out


def shown(path: str | Path) -> str:
    """The path relative to the current folder where possible: the report has absolute ones."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def where(finding) -> str:
    more = ", ..." if finding.count > len(finding.lines) else ""
    return f"line{'s' * (finding.count > 1)} {', '.join(f'{line:,}' for line in finding.lines)}{more}"


if __name__ == "__main__":
    run(main)
