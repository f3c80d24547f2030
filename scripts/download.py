"""Fetches models and data sets from Hugging Face or ModelScope.

    python scripts/download.py                                    # lists the short names
    python scripts/download.py pretrain_hq sft_mini_512           # MiniMind's files, into dataset/
    python scripts/download.py Qwen/Qwen2-0.5B --source modelscope
    python scripts/download.py OpenAssistant/oasst1 alpaca-cleaned                 # known data sets, by any name
    python scripts/download.py someone/rows --repo_type dataset --include 'zh/*'   # any other

Models go to models/NAME, data sets to dataset/NAME.jsonl, where the trainings find them. The same command continues
after a kill, and fetches nothing twice. A file is checked against the hub's checksum before it is moved into place.

HF_ENDPOINT=https://hf-mirror.com: a mirror. HF_TOKEN, MODELSCOPE_API_TOKEN: for what is not public.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import os
from dataclasses import dataclass

from common.console import UserError, run, say
from common.hubs import SOURCES, default_source
from common.options import Options, option, parse


@dataclass(frozen=True)
class DownloadConfig(Options):
    """Options of fetching"""

    names: tuple[str, ...] = option((), "short names, or OWNER/NAME; the flag may be left out")
    source: str = option(default_source(), "the hub", choices=SOURCES)
    repo_type: str | None = option(None, "what OWNER/NAME is (default: a model)", choices=("model", "dataset"))
    revision: str | None = option(None, "branch, tag or commit (default: the main branch)")
    to: str | None = option(None, "folder that gets them (default: models/ and dataset/)", path=True)
    include: tuple[str, ...] = option((), "only the files with such names, e.g. *.gguf (default: what is needed)")
    offline: bool = option(False, "fetch nothing, only say what is here; as HF_HUB_OFFLINE=1")


def main():
    config = parse(DownloadConfig, bare="names", description=__doc__)
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from dataset.read import hub as data
    from model import hub as models

    if not config.names:
        say(f"data sets: {', '.join(data.KNOWN)}\nmodels: {', '.join(models.KNOWN)}")
        say("all others by their name on the hub, OWNER/NAME (data sets with --repo_type dataset)")
        return
    where = dict(source=config.source, revision=config.revision, to=Path(config.to) if config.to else None)
    for name in config.names:
        if config.repo_type == "dataset" or config.repo_type is None and data.known_name(name):
            path = data.fetch_data(name, **where, patterns=config.include)
            say(f"{path}: to train on it, --data_path {path}")
        elif name in models.KNOWN or "/" in name:
            path = models.fetch_model(name, **where, patterns=config.include)
            path = next(path.glob("full_sft*.pth"), path)  # MiniMind's folder holds the weights of all its stages
            say(f"{path}: to talk to it, python eval_model.py --weight {path}; to train it, --from_weight {path}")
        else:
            known = ", ".join([*data.KNOWN, *models.KNOWN])
            raise UserError(f"{name}: neither OWNER/NAME nor one of the short names: {known}")


if __name__ == "__main__":
    run(main)
