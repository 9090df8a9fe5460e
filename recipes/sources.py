"""Where an experiment's training rows come from, and what they must not share with its evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_gen.collect import Make
from data_gen.context import Context, SteerableLatent
from data_gen.cues import CUES
from data_gen.normal import normal
from data_gen.prompted import prompted
from data_gen.steered import contrast, steered
from esr_train.errors import InputError
from esr_train.models import local_path
from esr_train.provenance import sha256
from esr_train.recipe import Recipe
from esr_train.transcript import Transcript
from eval.cells import Cell, Side, check_disjoint
from recipes.world import World

UNSTEERED = ("prompted", "normal")
"""Sources whose rows nobody steers: they need no latents."""


def maker(name: str, section: Any, recipe: Recipe, world: World, latents: Sequence[SteerableLatent]) -> Make:
    """What makes the rows of one source.

    Args:
        name: of the source.
        section: of the recipe, such as `data.steered`.
        recipe: the experiment's.
        world: its model, judge and prompts.
        latents: that may steer training rows.
    """
    pools = world.pools
    context = Context(
        world.base,
        world.judge,
        world.sampling(),
        recipe.engine.positions,
        recipe.model.path,
        recipe.seed,
        world.tokenizer,
    )
    if name == "normal":
        return normal(context, section, pools.normal)
    if name == "prompted" and section.writer:
        raise InputError(
            "detours cannot be written by another model yet",
            "data.prompted.writer",
            "Leave it out (the model's own answers to other questions are the detours), or import rows.",
        )
    if name == "prompted":
        return prompted(context, section, pools.train)
    if name == "contrast":
        return contrast(context, section, pools.train, latents)
    return steered(context, section, pools.train, latents, name)


def source_files(name: str, section: Any) -> dict[str, str]:
    """Hashes of the files from which a source draws cues."""
    if name in ("normal", "contrast"):
        return {}
    path = (local_path(section.cues) or Path(section.cues)) if section.cues else CUES
    return {"cues": sha256(path)} if path.is_file() else {}


def check_held_out(rows: Sequence[Transcript], cells: Sequence[Cell]) -> None:
    """Refuse rows that share a prompt, a steering latent or an off-topic subject with the evaluation's cells."""
    steerings = [row.steering for row in rows if row.steering]
    detours = [row.meta["detour"] for row in rows if isinstance(row.meta.get("detour"), dict)]
    latents = [each.latent for each in steerings] + [each.get("latent") for each in detours]
    subjects = [each.label for each in steerings] + [each.get("label") for each in detours]
    training = Side(
        frozenset(row.prompt for row in rows),
        frozenset(latent for latent in latents if latent is not None),
        frozenset(subject for subject in subjects if subject),
    )
    labels = frozenset(cell.label for cell in cells if cell.label)
    check_disjoint(training, Side(frozenset(c.prompt for c in cells), frozenset(c.latent for c in cells), labels))
