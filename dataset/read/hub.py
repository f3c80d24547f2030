"""Data sets of a hub: which of a repository's files are fetched, and the one file that becomes of them in dataset/.

find_data("OpenAssistant/oasst1")       # dataset/oasst1.jsonl, fetched if it is not there
find_data("mine.jsonl:3")               # itself
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.console import UserError
from common.fetch import announce, download, unfinished
from common.files import ROOT, atomic_file, put_in_place
from common.hubs import RemoteFile, Repository, default_source, is_id, list_files, pick, typed_name
from dataset.tokens.order import weighted

FOLDER = ROOT / "dataset"
SUFFIXES = (".jsonl", ".json")  # of what comes out of a download


class Known(NamedTuple):
    ids: dict[str, str]  # source -> the repository's id there
    file: str  # pattern of its files' names


MINIMIND = {"huggingface": "jingyaogong/minimind_dataset", "modelscope": "gongjy/minimind_dataset"}
MINIMIND_FILES = (
    *("pretrain_hq", "sft_mini_512", "sft_512", "sft_1024", "sft_2048"),
    *("dpo", "r1_mix_1024", "lora_identity", "lora_medical"),
)
KNOWN = {name: Known(MINIMIND, f"{name}.jsonl") for name in MINIMIND_FILES} | {
    "chinese_alpaca": Known({"huggingface": "hfl/alpaca_zh_51k"}, "*.json"),
    "alpaca_gpt4_data": Known({"huggingface": "llamafactory/alpaca_gpt4_en"}, "alpaca_gpt4_data*.json"),
    "oasst1": Known({"huggingface": "OpenAssistant/oasst1"}, "*_ready.trees.jsonl.gz"),
    "alpaca": Known({"huggingface": "tatsu-lab/alpaca"}, "data/train-*.parquet"),
    "alpaca-cleaned": Known(
        {"huggingface": "yahma/alpaca-cleaned", "modelscope": "AI-ModelScope/alpaca-cleaned"},
        "alpaca_data_cleaned.json",
    ),
}


def known_name(name: str) -> str | None:
    """The short name of a data set that is called so, by it or by an id; None: it has none."""
    if name in KNOWN:
        return name
    return next((short for short, known in KNOWN.items() if name in known.ids.values() and known.ids != MINIMIND), None)


def find_data(spec: str) -> str:
    """What was typed as a data file -> the file. `:3` behind it, for repetitions, stays.

    The name of a data set, short or OWNER/NAME, is its file in dataset/, which is fetched if it is not there. Every
    other path is itself: whoever reads it says whether it exists.
    """
    path, weight = weighted(spec)
    name = typed_name(path)
    if path.exists():
        return spec
    if not (known_name(name) or is_id(name)):
        if name.isidentifier():  # no ending and no folder: hardly a file
            raise UserError(f"{name}: no such file, and none of the data sets with a short name: {', '.join(KNOWN)}")
        return spec
    try:
        found = fetch_data(name)
    except UserError as error:
        reason = str(error).removeprefix(f"{name}: ")
        raise UserError(f"{name}: no such file; as a data set on a hub: {reason}") from None
    return f"{found}:{weight:g}" if weight != 1 else str(found)


def fetch_data(
    name: str,
    *,
    source: str | None = None,
    revision: str | None = None,
    to: Path | None = None,
    patterns: Sequence[str] = (),
) -> Path:
    """Fetches a data set, a key of KNOWN or an id -> its file in `to` (default: dataset/).

    One .jsonl or .json stays as it is. Several files, compressed ones (.gz) and Parquet become one .jsonl. A file that
    is there already is left as it is.

    patterns  of the names of files; of none, `data_files` chooses
    """
    short, source, to = known_name(name), source or default_source(), to or FOLDER
    stem = short or name.replace("/", "--")
    if there := [path for suffix in SUFFIXES if (path := to / f"{stem}{suffix}").exists()]:
        if revision or patterns:
            raise UserError(f"{name}: {there[0]} is there already; remove it, or choose another folder with --to")
        return there[0]
    id = name
    if short:
        ids = KNOWN[short].ids
        if not (id := ids.get(source, "")):
            raise UserError(f"{name}: is not known to be on {source}; take --source {next(iter(ids))}, or give its id")
        patterns = patterns or (KNOWN[short].file,)
    repository = list_files(id, "dataset", source=source, revision=revision)
    files = pick(repository, patterns) if patterns else data_files(repository)
    suffix = Path(files[0].name).suffix
    target = to / f"{stem}{suffix if len(files) == 1 and suffix in SUFFIXES else '.jsonl'}"
    with unfinished(to, stem) as partial:
        if target.exists():  # now, made by the process that this one has waited for
            return target
        announce(repository, files, target)
        download(repository, files, partial)
        paths = [partial / file.name for file in files]
        if target.suffix == paths[0].suffix and len(paths) == 1:
            put_in_place(paths[0], target)
        else:
            with atomic_file(target) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as out:
                for path in paths:
                    out.writelines(f"{line}\n" for line in _rows(path))
        shutil.rmtree(partial, ignore_errors=True)
    return target


def data_files(repository: Repository) -> list[RemoteFile]:
    """The files with rows to train on: of one format, and those of the split called train, if one is."""
    for endings in ((".jsonl", ".jsonl.gz"), (".json",), (".parquet",)):
        found = [file for file in repository.files if file.name.endswith(endings)]
        found = [file for file in found if not re.search(r"(^|/)(dataset_infos?|state|config)\.json$", file.name)]
        if train := [file for file in found if re.search(r"(^|[^a-z])train([^a-z]|$)", file.name)]:
            return train
        if found:
            return found
    return pick(repository, ("*.jsonl", "*.json", "*.parquet"))  # there is none, which this says


def _rows(path: Path) -> Iterator[str]:
    """The rows of a file, each as a line of JSON."""
    dump = lambda row: json.dumps(row, ensure_ascii=False, default=str)  # default: dates
    try:
        if path.suffix == ".parquet":
            try:
                from pyarrow.parquet import ParquetFile
            except ImportError:
                raise UserError(f"{path.name}: reading Parquet needs a package: pip install pyarrow") from None
            for batch in ParquetFile(path).iter_batches():
                yield from map(dump, batch.to_pylist())
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            yield from map(dump, rows if isinstance(rows, list) else [rows])
        else:
            opened = gzip.open if path.suffix == ".gz" else open
            with opened(path, "rt", encoding="utf-8") as lines:
                yield from (line.strip() for line in lines if line.strip())
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, UserError) or isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{path.name}: cannot be unpacked ({error})") from None
