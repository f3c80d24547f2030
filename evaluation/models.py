"""Models to compare or to look into, by what people call them: a name, a file, a directory, or an adapter on its base.

    models = open_models(["full_sft", "out/lora/lora_medical_512.pth"], "out")
    with models[1].active() as model: ...

Adapters on the same weights share them: the base is in memory once, and `active()` switches to the one that is asked.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from common.console import UserError
from common.files import ROOT
from model.checkpoint import find_weights


def locate(weight: str, save_dir: str) -> Path:
    """The file or directory of weights or of an adapter; a bare name is looked up in save_dir and out/, and below."""
    folders = (Path(save_dir), ROOT / "out")
    try:
        return find_weights(weight, *folders)
    except UserError:
        with suppress(UserError):  # scripts/lora_quickstart.py writes into a folder of the adapter's name
            return find_weights(weight, *(folder / "lora" for folder in (*folders, *(f / weight for f in folders))))
        raise  # what there is among the weights is the thing to say
