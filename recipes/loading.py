"""Recipes as every command reads them: with all sources, conditions and judges known, shipped ones and plug-ins'."""

from collections.abc import Sequence
from pathlib import Path

import data_gen.prompted
import data_gen.steered  # noqa: F401 - each registers what a recipe may name
import eval.conditions
import eval.judging.lexical
import eval.judging.model_judge  # noqa: F401
from esr_train.recipe import Recipe, load_recipe


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, import the plug-ins that it names, and apply `key.sub=value` overrides.

    Raises:
        InputError: naming every mistake at once, each with its key.
    """
    return load_recipe(path, list(overrides))
