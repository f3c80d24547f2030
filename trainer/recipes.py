"""Recipes: optimiser, schedule and rates that belong together. A recipe only sets options that the user leaves open.

    python trainer/train_pretrain.py                                    # modern
    python trainer/train_pretrain.py --recipe classic                   # AdamW, cosine, MiniMind's rates
    python trainer/train_pretrain.py --recipe modern --schedule cosine  # what is given always wins

The numbers come from trials on real text: benchmarks/real_data/recipe.py, with the results in docs/benchmarks.md.
"""

from __future__ import annotations

from typing import Any

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
