"""The way that led to a weights file: tokenizer, data, parents, steps, losses, commands. All of it is in the file.

    history = read_lineage("out/rlhf_512.pth", "out")
    print(as_text(history))
    for part in check(history): print(part.status, part.what, part.path)

Training records an entry for every stage: `Job.origin` in trainer/loop/job.py, and `_lineage` in engine.py beside it.
Files written by older versions lack the paths of the data and of the parents; what is missing is called "not recorded".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from common.console import UserError
from common.files import ROOT, code_version, hash_file, relative_to_root
from model.adapter import AdapterFile, find_by_hash, open_model_file
from model.checkpoint import Checkpoint
from tokenizer.find import tokenizer_of

UNCHANGED, CHANGED, MISSING, UNKNOWN = "unchanged", "changed", "missing", "not recorded"


@dataclass(frozen=True)
class Part:
    """Something that the weights were made of."""

    what: str  # "tokenizer", "data", "parent"
    path: str
    hash: str
    status: str = UNKNOWN
    where: str = ""  # the place where it was found, if that is another one


@dataclass
class History:
    """What is known about how a file was made. Plain values (`dataclasses.asdict`)."""

    path: str
    hash: str  # of the weights; of an adapter, of the weights it belongs to
    tokenizer: dict
    stages: list[dict] = field(default_factory=list)  # oldest first
    base: str = ""  # of an adapter: the path of its weights
    places: tuple[str, ...] = ()  # folders in which parents are looked for

    @property
    def known(self) -> bool:
        return bool(self.stages)


def read_lineage(path: Path | str, *folders: Path | str) -> History:
    """Of weights, of an adapter (LoRA), or of a directory that holds either. folders: where else parents may lie."""
    found = open_model_file(path)
    return history_of(found, *folders)


def history_of(found: Checkpoint | AdapterFile, *folders: Path | str) -> History:
    """The same, of a file that is open already."""
    beside = [found.path if found.path.is_dir() else found.path.parent]
    if beside[0].name in ("best", "lora", "lora_model"):
        beside.append(beside[0].parent)
    places = tuple(dict.fromkeys(str(place) for place in (*beside, *folders)))
    if isinstance(found, AdapterFile):
        base, hash = str(found.base["path"] or ""), found.base["hash"] or ""
        return History(str(found.path), hash, found.tokenizer, found.lineage, base and relative_to_root(base), places)
    return History(str(found.path), found.hash, found.tokenizer, found.lineage, places=places)


def check(history: History) -> list[Part]:
    """Looks for everything the weights were made of, in order, and compares the hashes."""
    parts = [_tokenizer(history)]
    for entry in history.stages:
        if entry.get("parent"):
            parts.append(_parent(entry, history.places))
        if "files" not in entry:
            parts.append(Part("data", f"of {entry.get('stage', '?')}", entry.get("data", "")))
        parts += [_data(file, history.places) for file in entry.get("files", [])]
    return parts


def _tokenizer(history: History) -> Part:
    recorded = history.tokenizer
    path, hash = recorded.get("path", ""), recorded.get("hash", "")
    if not hash:
        return Part("tokenizer", path, hash)
    try:
        found = tokenizer_of(recorded, Path(history.path), 1 << 62)
    except UserError:
        there = any((ROOT / path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        return Part("tokenizer", path, hash, CHANGED if path and there else MISSING)
    return Part("tokenizer", path, hash, UNCHANGED, _elsewhere(path, found.path))


def _data(file: dict, places: tuple[str, ...]) -> Part:
    """A file at its recorded path, or at the same path beside the weights: then all of out/ was moved."""
    path, hash = file["path"], file["sha256"]
    candidates = [ROOT / path, *(Path(place).parent / path for place in places)]
    found = [place for place in candidates if place.is_file()]
    same = next((place for place in found if hash_file(place) == hash), None)
    if same is not None:
        return Part("data", path, hash, UNCHANGED, _elsewhere(path, str(same)))
    return Part("data", path, hash, CHANGED if found else MISSING, _elsewhere(path, str(found[0])) if found else "")


def _parent(entry: dict, places: tuple[str, ...]) -> Part:
    path, hash = entry.get("parent_path") or "", entry["parent"]
    found = find_by_hash(hash, path or None, *places)
    if found:
        return Part("parent", path, hash, UNCHANGED, _elsewhere(path, str(found.path)))
    return Part("parent", path, hash, CHANGED if path and (ROOT / path).exists() else MISSING)


def _elsewhere(recorded: str, found: str) -> str:
    """The place where something was found, if it is not the recorded one."""
    same = bool(recorded) and (ROOT / recorded).resolve() == Path(found).resolve()
    return "" if same else relative_to_root(found)


RESUMING = " --from_resume auto"  # at the end of a command: it makes no other weights


def is_complete(entry: dict) -> bool:
    """Whether a stage took all its steps. Of weights from older versions, which lack `total`, nobody knows."""
    return "total" in entry and entry.get("steps") == entry["total"]


def reasons_to_repeat(history: History, typed: str) -> list[str]:
    """What has changed since the last stage ran, so that `typed` would make other weights now. Empty: nothing has.

    typed: script and flags, as they are recorded, relative paths from the repository's root
    """
    last = history.stages[-1] if history.known else {}
    found = [] if last.get("command", "").removesuffix(RESUMING) == typed else ["the command"]
    found += [] if last.get("code") == code_version() else ["the code"]
    # a parent that is found elsewhere only is a backup: at its own place there is another one now
    return found + [f"{part.what} {part.path}" for part in check(history) if part.status != UNCHANGED or part.where]


# ---- shown


def facts(entry: dict) -> list[str]:
    """What a stage did, in short phrases."""
    losses = [f"{name} {value:.4f}" for name, value in entry.get("losses", {}).items()]
    said = [
        f"{entry['rows']:,} rows" if "rows" in entry else "",
        _steps(entry),
        f"{entry['tokens']:,} tokens" if "tokens" in entry else "",
        *losses,
        f"seed {entry['seed']}" if "seed" in entry else "",
        f"{entry['processes']} processes" if entry.get("processes", 1) > 1 else "",
    ]
    return [phrase for phrase in said if phrase]


def _steps(entry: dict) -> str:
    if "total" in entry and not is_complete(entry):
        return f"{entry['steps']:,} of {entry['total']:,} steps"
    return f"{entry['steps']:,} steps" if "steps" in entry else ""


def as_text(history: History, parts: list[Part] | None = None) -> str:
    """For a terminal. parts: what `check` found, to be said beside each file."""
    status = {(part.what, part.path, part.hash): part for part in parts or []}

    def verdict(what: str, path: str, hash: str) -> str:
        part = status.get((what, path, hash))
        return "" if part is None else f"  {part.status}" + (f", found as {part.where}" if part.where else "")

    def line(what: str, path: str, hash: str) -> str:
        return f"   {what:<10}{path or '?'}  {short(hash)}{verdict(what, path, hash)}"

    recorded = history.tokenizer
    path = relative_to_root(history.path)
    lines = [
        f"{path}  {short(history.hash)}" if not history.base else f"{path}, an adapter",
        line("tokenizer", recorded.get("path", ""), recorded.get("hash", "")),
    ]
    for number, entry in enumerate(history.stages, 1):
        lines += ["", f"{number}. {entry.get('stage', '?')}: {', '.join(facts(entry))}"]
        if entry.get("parent"):
            lines.append(line("parent", entry.get("parent_path") or "", entry["parent"]))
        if "files" not in entry:
            lines.append(line("data", f"of {entry.get('stage', '?')}", entry.get("data", "")))
        lines += [line("data", file["path"], file["sha256"]) for file in entry.get("files", [])]
        lines.append(f"   {'command':<10}{command(entry)}")
    if not history.known:
        lines += ["", "no stages are recorded: another project, or a hub, wrote these weights"]
    return "\n".join(lines)


def command(entry: dict) -> str:
    """What to type to repeat a stage."""
    typed = entry.get("command", "")
    if not typed:
        return "?"
    many, (script, _, flags) = entry.get("processes", 1), typed.partition(" ")
    if folder := next((name for name in ("trainer", "scripts") if f"/{name}/" in script), None):
        script = f"{folder}/{script.rpartition(f'/{folder}/')[2]}"  # wherever the repository was
    typed = f"{script} {flags}"
    return f"torchrun --nproc_per_node {many} {typed}" if many > 1 else f"python {typed}"


def as_mermaid(history: History) -> str:
    """A flow chart for a README: GitHub and GitLab draw it."""
    recorded = history.tokenizer
    lines = ["flowchart LR", f"  tokenizer([{_label('tokenizer', short(recorded.get('hash', '')))}])"]
    before = "tokenizer"
    if not history.known:
        lines.append(f"  {before} --> weights[{_label(Path(history.path).name, 'stages not recorded')}]")
    for number, entry in enumerate(history.stages, 1):
        name = f"stage{number}"
        losses = [f"{key} {value:.3f}" for key, value in entry.get("losses", {}).items()]
        steps = f"{entry['steps']:,} steps" if "steps" in entry else ""
        if number == 1 and entry.get("parent"):
            lines.append(
                f"  parent[{_label(Path(entry.get('parent_path') or 'weights').name, short(entry['parent']))}]"
            )
            before = "parent"
        lines.append(f"  {before} --> {name}[{_label(entry.get('stage', '?'), steps, *losses)}]")
        files = entry.get("files") or [dict(path=f"data of {entry.get('stage', '?')}", sha256=entry.get("data", ""))]
        for i, file in enumerate(files, 1):
            lines.append(f"  data{number}_{i}[({_label(Path(file['path']).name, short(file['sha256']))})]")
            lines.append(f"  data{number}_{i} --> {name}")
        before = name
    return "\n".join(["```mermaid", *lines, "```"])


def _label(*texts: str) -> str:
    """A node's text. Mermaid knows entities; a quotation mark or a bracket would end the text."""
    entities = {ord(c): f"#{ord(c)};" for c in '"<>[](){}|`#&\\'}
    return '"' + "<br>".join(text.translate(entities) for text in texts if text) + '"'


def short(hash: str) -> str:
    return hash[:12]
