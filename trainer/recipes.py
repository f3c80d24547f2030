"""Recipes: optimiser, schedule and rates that belong together. A recipe only sets options that the user leaves open.

    python trainer/train_pretrain.py                                    # modern
    python trainer/train_pretrain.py --recipe classic                   # AdamW, cosine, MiniMind's rates
    python trainer/train_pretrain.py --recipe modern --schedule cosine  # what is given always wins

The numbers come from trials on real text: benchmarks/real_data/recipe.py, with the results in docs/benchmarks.md.
"""

from __future__ import annotations

import math
from typing import Any

from model.config import PRESETS

RECIPES: dict[str, dict[str, Any]] = {
    "modern": dict(optimizer="muon", schedule="wsd"),
    "classic": dict(optimizer="adamw", schedule="cosine"),
}
HELP = (
    "defaults that belong together: modern is Muon and wsd, classic AdamW, cosine and MiniMind's rates "
    "(default: that of the stage; classic with --optimizer adamw, an adapter or DeepSpeed; a continued run keeps the "
    "one that it began with)"
)


def default_recipe(config) -> str:
    """The recipe of a run whose user has not named one."""
    adamw = config.optimizer == "adamw" and "optimizer" not in config.by_recipe  # the user has asked for it
    whole = not config.trains_adapter and config.backend != "deepspeed"  # DeepSpeed shards the matrices Muon needs
    return next(iter(config.rates)) if whole and not adamw else "classic"


def recipe_options(recipe: str, rates: dict[str, float]) -> dict[str, Any]:
    """{option: value} of a recipe. rates: the stage's peak learning rate for each of its recipes."""
    return RECIPES[recipe] | dict(learning_rate=rates[recipe])


def rate_for_width(rate: float, hidden_size: int) -> float:
    """The rate of `modern` for a model of this width. rate: what is best for `nano`; wider models need less.

    Muon's updates have entries of one size at every width (arXiv:2502.16982). So their largest singular value, which
    is what should stay the same (arXiv:2310.17813), grows as the square root of the width, and the rate has to fall so.
    Rounded to two digits. Narrower models keep the rate: they were not tried.
    """
    return float(f"{rate * min(math.sqrt(PRESETS['nano']['hidden_size'] / hidden_size), 1.0):.1e}")
