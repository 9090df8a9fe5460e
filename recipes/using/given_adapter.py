"""`esr eval adapter`: the recipe of an adapter that somebody gave you, measured against its base model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.prompted import SUBJECTS
from esr_train.errors import InputError
from esr_train.recipe import JUDGE_SECTIONS, Recipe, apply_overrides, parse_recipe
from recipes.making.neuronpedia import where_labels_are

PROMPTS = SUBJECTS.parent / "how-to.jsonl"
"""Shipped: 306 on 51 topics."""
CALIBRATION = {"rounds": 6, "prompts": 3, "max_new_tokens": 128}
SAMPLING = {"temperature": 0.6, "max_new_tokens": 256}
DIRECTIONS, TRIALS = 32, 256
CALIBRATION_SHARE = 0.2
"""Of the prompts' topics: calibration asks on these, trials on the others."""


@dataclass(frozen=True)
class Given:
    """What is measured, and with what.

    Args:
        model: hub id, folder or fetched model's name of the base model.
        vectors: file of steering vectors; None where an SAE's latents steer.
        layer: whose output the vectors steer; None: as their file says.
        sae: sae-lens release and id, or folder and sub-folder.
        judge: a kind of judge, or a language model as inspect_ai names it.
        prompts: file or data set; None: the shipped ones.
        name: of the run directory; None: the adapter's.
    """

    model: str
    adapter: str
    vectors: str | None = None
    layer: int | None = None
    sae: tuple[str, str] | None = None
    labels: str | None = None
    judge: str = "likelihood"
    prompts: str | None = None
    name: str | None = None


def adapter_recipe(given: Given, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that measures an adapter: nothing is trained, and every direction is measured.

    Raises:
        InputError: unless there are either vectors or an SAE, or for an override that is not valid.
    """
    _check_directions(given)
    values: dict[str, Any] = {
        "name": given.name or f"adapter-{adapter_name(given.adapter)}",
        "model": {"path": given.model},
        "latents": {"limit": DIRECTIONS, "held_out": False},
        "judge": _judge(given.judge),
        "prompts": {
            "path": given.prompts or str(PROMPTS),
            "splits": {"validation": 0.0, "test": 1 - CALIBRATION_SHARE},
        },
        "sampling": SAMPLING,
        "calibration": CALIBRATION,
        "eval": {"trials": TRIALS, "conditions": ["steered", "unsteered"]},
        "arms": {"given": {"adapter": given.adapter}},
    }
    if given.sae:
        values["sae"] = {"release": given.sae[0], "id": given.sae[1], "labels": given.labels}
    else:
        values["vectors"] = {"file": given.vectors, "layer": given.layer}
    return parse_recipe(apply_overrides(values, overrides), "esr eval adapter")


def _check_directions(given: Given) -> None:
    if (given.vectors is None) is (given.sae is None):
        raise InputError(
            "nothing says what steers" if given.vectors is None else "vectors and an SAE exclude each other",
            "--vectors, --sae",
            "Give --vectors FILE (`esr vectors make` makes one), or --sae RELEASE ID --labels FILE.",
        )
    if given.sae and given.labels is None:
        raise InputError("only labelled latents steer", "--labels", where_labels_are(*given.sae))
    if given.sae is None and given.labels is not None:
        raise InputError("the names of vectors are their labels", "--labels", "Leave it out, or give --sae.")
    if given.vectors is None and given.layer is not None:
        raise InputError("an SAE says itself for which layer it is", "--layer", "Leave it out, or give --vectors.")


def _judge(said: str) -> dict[str, str]:
    """A kind of judge that needs no model named, or the language model that is asked."""
    by_itself = [kind for kind, section in JUDGE_SECTIONS.items() if _needs_nothing(section)]
    if said in by_itself:
        return {"kind": said}
    if "/" not in said:
        what = f"{said!r} is neither a judge nor a language model"
        fix = f"Take {' or '.join(by_itself)}, or name a model as inspect_ai does, such as anthropic/claude-haiku-4-5."
        raise InputError(what, "--judge", fix)
    return {"kind": "model", "model": said}


def _needs_nothing(section: Any) -> bool:
    return not any(field.is_required() for name, field in section.model_fields.items() if name != "kind")


def adapter_name(adapter: str) -> str:
    """A run's name from an adapter's folder or hub id."""
    last = Path(adapter.rstrip("/")).resolve().name if Path(adapter).exists() else adapter.rstrip("/").split("/")[-1]
    return re.sub(r"[^A-Za-z0-9._-]", "-", last)
