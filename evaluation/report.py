"""What was measured, for people and programs: a table, JSON, a picture, and the difference to an earlier model.

    print(table(results))
    write_json(Path("results.json"), results, weights="out/full_sft_512.pth", tokenizer=tokenizer.hash)
    print(against(results, read_json("before.json"), tokenizer.hash))
    draw(Path("results.png"), results, "full_sft_512.pth")

`results` come from evaluation/measure.py, one for each file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.console import UserError, width_of
from common.files import atomic_file, hash_file
from common.picture import readable
from evaluation.measure import Figure, Measured, figure
from evaluation.metrics import METRICS
from evaluation.statistics import paired_difference
from inference.health import MEANING

COUNTS = ("answers", "no_room")  # figures of health that are no shares


def require_figures(results: Sequence[Measured], asked: Sequence[str]) -> None:
    """UserError if none of the metrics that were asked for could be computed, with the reason."""
    if asked and not any(found.counts for found in results):
        reasons = dict.fromkeys(f"{Path(found.path).name}: {line}" for found in results for line in found.notes)
        raise UserError(f"--metrics {','.join(asked)}: nothing to compute; {'; '.join(reasons)}")


# ---- a table


def table(results: Sequence[Measured]) -> str:
    """A line for each metric of each file, with its 95 % interval; and one for all files that it was counted in."""
    lines = [("file", "metric", "value", "95 % interval", "rows", "how")]
    for found in results:
        for name in found.counts:
            lines.append((Path(found.path).name, *_line(name, found.figure(name)), found.how[name]))
    for name, counts in _of_all(results).items():
        lines.append(("together", *_line(name, figure(name, counts)), ""))
    text = _aligned(lines) if len(lines) > 1 else ""  # questions without answers have no figures but health
    for found in results:
        if found.health:
            text += f"\n\nhealth of {found.health['answers']:,} answers to {Path(found.path).name}\n"
            text += _aligned([health_line(name, value) for name, value in found.health.items() if name != "answers"])
        text += "".join(f"\nnote: {Path(found.path).name}: {line}" for line in found.notes)
    return text.lstrip("\n")


def _line(name: str, own: Figure) -> tuple[str, str, str, str]:
    form = METRICS[name].form
    spread = f"{form.format(own.low)} .. {form.format(own.high)}" if own.low is not None else "-"
    value = "-" if math.isnan(own.value) else form.format(own.value)
    return METRICS[name].title, value, spread, f"{own.rows:,}"


def health_line(name: str, value: float) -> tuple[str, str, str]:
    shown = f"{value:.0f}" if name in COUNTS else f"{value:.2f}" if name == "length_ratio" else f"{value:.1%}"
    return f"  {name}", shown, MEANING[name]


def _of_all(results: Sequence[Measured]) -> dict[str, np.ndarray]:
    """Metrics that several files have, counted in one way -> their counts together: a row is a row in any file."""
    together: dict[tuple[str, str], list[np.ndarray]] = {}
    for found in results:
        for name, counts in found.counts.items():
            together.setdefault((name, found.how[name]), []).append(counts)
    alike = {key: counts for key, counts in sorted(together.items(), key=lambda item: len(item[1])) if len(counts) > 1}
    return {name: np.concatenate(alike[name, how]) for name, how in alike}


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(width_of, column)) for column in zip(*lines)]
    padded = [[cell + " " * (width - width_of(cell)) for cell, width in zip(line, widths)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


# ---- JSON, and what two of them say about two models


def write_json(path: Path, results: Sequence[Measured], **facts: object) -> None:
    """facts: about the model, such as its weights' path. `against` reads it back."""
    files = [
        dict(
            path=found.path,
            sha256=hash_file(found.path),
            holds=found.kind,
            rows=found.rows,
            metrics={name: dict(_finite(found.figure(name)), how=found.how[name]) for name in found.counts},
            health=found.health,
            notes=found.notes,
            answers=found.answers,
            counts={name: dict(zip(found.labels[name], found.counts[name].tolist())) for name in found.counts},
        )
        for found in results
    ]
    everything = {name: _finite(figure(name, counts)) for name, counts in _of_all(results).items()}
    with atomic_file(path) as temporary:
        content = {**facts, "files": files, "together": everything}
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _finite(own: Figure) -> dict[str, float | int | None]:
    """JSON has no nan."""
    return {key: None if value is None or value != value else value for key, value in own._asdict().items()}


def read_json(path: str | Path) -> dict:
    """An earlier result, as `write_json` wrote it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        [[file["path"], file["counts"]] for file in content["files"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a result that --eval_data --json wrote") from None
    return content


def against(results: Sequence[Measured], earlier: dict, tokenizer: str) -> str:
    """The differences to an earlier result, on the rows that both have, with paired error bars. tokenizer: its hash."""
    lines, notes = [("file", "metric", "change", "95 % interval", "rows")], []
    for found in results:
        file, now = Path(found.path).name, hash_file(found.path)
        named = [old for old in earlier["files"] if Path(old["path"]).name == file]
        before = next((old for old in earlier["files"] if old.get("sha256") == now), named[-1] if named else None)
        if before and before.get("sha256", now) != now:
            notes.append(f"{file} has changed since: lines of the same number are compared, whatever is in them")
        for name, counts in found.counts.items():
            others = before["counts"].get(name, {}) if before else {}
            shared = [n for n, label in enumerate(found.labels[name]) if label in others]
            if not shared:
                continue
            if name == "ppl" and earlier.get("tokenizer") != tokenizer:
                notes.append("perplexity is not compared: the tokenizers differ; bits per byte can be")
                continue
            how = before["metrics"][name]["how"] if before and "metrics" in before else found.how[name]
            if how.partition(";")[0] != found.how[name].partition(";")[0]:
                notes.append(f"{METRICS[name].title} of {file}: now {found.how[name]}, before {how}")
            theirs = np.array([others[found.labels[name][n]] for n in shared])
            delta, spread = paired_difference(METRICS[name].value, theirs, counts[shared])
            form = METRICS[name].form.replace("{:", "{:+")
            between = " .. ".join(map(form.format, spread)) if spread else "-"
            lines.append((file, METRICS[name].title, form.format(delta), between, f"{len(shared):,}"))
    if len(lines) == 1 and not notes:
        return "nothing to compare: the earlier result has none of these rows"
    return _aligned(lines) + "".join(f"\nnote: {line}" for line in dict.fromkeys(notes))


# ---- a picture


@readable()
def draw(path: Path, results: Sequence[Measured], title: str) -> None:
    """A panel for each file: its shares with their error bars; perplexity and bits per byte above them."""
    from matplotlib.figure import Figure as Picture  # not pyplot: no window system, no global state

    panels = [_shares(found) for found in results]
    heights = [len(rows) + 2.5 if rows else 1.5 for rows in panels]
    picture = Picture(figsize=(8, 0.5 + 0.27 * sum(heights)), dpi=120, layout="constrained")
    picture.suptitle(title, fontsize=11)
    axes = picture.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for found, rows, axis in zip(results, panels, axes):
        for y, (_, own) in enumerate(rows):
            axis.plot(own.value, y, "o", color="#1f5f99" if own.rows else "#8a8a8a", clip_on=False)
            if own.low is not None:
                axis.plot([own.low, own.high], [y, y], color="#1f5f99", linewidth=2)
        likelihood = [" ".join(_line(name, found.figure(name))[:2]) for name in ("ppl", "bpb") if name in found.counts]
        axis.set_title(" · ".join([Path(found.path).name, *likelihood]), fontsize=9, loc="left")
        axis.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
        axis.set(xlim=(0, 1), ylim=(max(len(rows), 1) - 0.5, -0.5))
        axis.tick_params(axis="x", labelsize=8)
        axis.set_axis_on() if rows else axis.set_axis_off()
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as temporary:
        picture.savefig(temporary, format="png")


def _shares(found: Measured) -> list[tuple[str, Figure]]:
    """What lies between 0 and 1, with its name; BLEU as a hundredth of itself."""
    rows = []
    for name in found.counts:
        own = found.figure(name)
        if name == "bleu":
            own = Figure(*(part and part / 100 for part in own[:3]), own.rows)
        if METRICS[name].of != "likelihood" and own.value == own.value:
            rows.append((METRICS[name].title + " / 100" * (name == "bleu"), own))
    sick = ("ended", "rep_4", "wrong_language", "tags_closed")
    return rows + [(name, Figure(found.health[name], None, None, 0)) for name in sick if name in found.health]
