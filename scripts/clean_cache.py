"""Lists the caches that nobody has used for a month, and removes them.

    python scripts/clean_cache.py                                 # lists those of dataset/, out/ and the user's cache
    python scripts/clean_cache.py --remove                        # removes them
    python scripts/clean_cache.py /data/.cache --older_than 7

Training keeps line indexes and tokens of data files in a cache, and DPO its reference: `.cache` beside the data,
~/.cache/sparrow if the data is read-only, or --cache_dir. What torch.compile makes is in ~/.cache/sparrow, too. All of
it can be made again, which takes time but loses nothing. Files of your own in such a folder are left alone.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import time
from dataclasses import dataclass

from common.console import UserError, run, say
from common.files import ROOT
from common.options import Options, option, parse


@dataclass(frozen=True)
class CleanConfig(Options):
    """Options of cleaning"""

    cache_dir: tuple[str, ...] = option(
        (), "caches to look into; the flag may be left out (default: those of dataset/, out/ and the user)", path=True
    )
    older_than: float = option(30.0, "days since it was last used", within="[0, inf)")
    remove: bool = option(False, "remove what is listed")


def caches() -> list[Path]:
    """Where caches are without --cache_dir, if the data is where it usually is."""
    from dataset.tokens.cache import user_cache

    beside = [ROOT / "dataset" / ".cache", *sorted((ROOT / "out").glob("*/.cache"))]
    return [folder for folder in (*beside, user_cache()) if folder.is_dir()]


def main():
    config = parse(CleanConfig, bare="cache_dir", description=__doc__)

    from common.files import sweep
    from dataset.tokens.cache import entries

    folders = [Path(path) for path in config.cache_dir] or caches()
    if wrong := next((folder for folder in folders if not folder.is_dir()), None):  # before anything is removed
        raise UserError(f"{wrong}: {'is a file, expected a folder' if wrong.exists() else 'there is no such folder'}")
    total = freed = 0
    for folder in folders:
        for entry in entries(folder):
            total += entry.size
            days = (time.time() - entry.used) / 86400
            if days < config.older_than:
                continue
            freed += entry.size
            say(f"{entry.size / 1e6:12,.1f} MB  {days:4.0f} days  {entry.path}  ({entry.about})")
            if config.remove:
                entry.remove()
        if config.remove:
            sweep(folder)  # what killed processes left
    of = f"of {total / 1e6:,.1f} MB in caches, {freed / 1e6:,.1f} MB were not used for {config.older_than:g} days"
    say(f"{of} and are removed" if config.remove else f"{of}" + ("; --remove removes them" if freed else ""))


if __name__ == "__main__":
    run(main)
