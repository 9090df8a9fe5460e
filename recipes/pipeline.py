"""A whole experiment: calibrate -> data -> train -> evaluate -> report, every stage resumable."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_gen.collect import Collected, Make, collect
from data_gen.context import Context, SteerableLatent
from data_gen.mixture import mix
from data_gen.normal import normal
from data_gen.prompted import prompted
from data_gen.steered import contrast, steered
from esr_train.files import read_json, replacing, write_json
from esr_train.provenance import provenance_of_run, sha256
from esr_train.recipe import DataSection, Recipe, dump_recipe
from esr_train.transcript import Transcript, read_transcripts, write_transcripts
from recipes.world import World, open_world

STAGES = "stages.json"


def run(recipe: Recipe) -> Path:
    """Run everything that is not done yet; returns the report.

    Several seeds become `seed-<n>/` run directories that share thresholds and rows, under one combined
    `metrics.json` and report.
    """
    top = Experiment(recipe, recipe.directory)
    top.begin()
    if recipe.seeds is None:
        top.measure(recipe.seed)
        return top.report([top])
    parts = []
    for seed in recipe.seeds:
        part = Experiment(recipe, recipe.directory / f"seed-{seed}", shared=top)
        part.begin()
        part.measure(seed)
        parts.append(part)
    return top.report(parts)
