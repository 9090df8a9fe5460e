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
from data_gen.subjects import SUBJECTS, read_subjects, training_subjects
from data_gen.written import written
from esr_train.provenance import sha256
from esr_train.recipe import FilterSection, Recipe, WriterSection
from esr_train.steering.engine import Progress
from esr_train.transcript import Transcript
from eval.cells import Side, check_disjoint
from eval.llm import Asker, Cache, Limit
from eval.llm_clients import InspectLlm
from recipes.resources import World, located

UNSTEERED = ("prompted", "normal")
"""Sources whose rows nobody steers: they need no latents."""

HOW_ASKED = {"concurrency", "timeout", "price", "limit_tokens", "limit_dollars"}
"""Settings of a writer that change nothing about what it writes."""


def maker(
    name: str,
    section: Any,
    filters: FilterSection,
    recipe: Recipe,
    world: World,
    latents: Sequence[SteerableLatent],
    ledger: Path,
    held_out: Sequence[str],
    progress: Progress,
) -> Make:
    """What makes the rows of one source.

    Args:
        name: of the source.
        section: of the recipe, such as `data.steered`.
        filters: of the arm's `data`.
        recipe: the experiment's.
        world: its model, judge and prompts.
        latents: that may steer training rows.
        ledger: file of what a writer was asked and what that cost.
        held_out: subjects that a writer must not write about: what the other splits' latents stand for.
        progress: told of every batch that the engine has finished.
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
        progress,
    )
    if name == "normal":
        return normal(context, section, pools.normal)
    if name == "prompted" and section.writer:
        subjects = training_subjects(
            read_subjects(section.subjects), pools.topics, held_out, world.required_prompts.splits
        )
        return written(context, section, pools.train, subjects, asker(section.writer, recipe.runs, ledger))
    if name == "prompted":
        return prompted(context, section, pools.train)
    if name == "contrast":
        return contrast(context, section, pools.train, latents)
    return steered(context, section, filters, pools.train, latents, name)


def chunk_rows(recipe: Recipe, section: Any) -> int:
    """How many candidates of a source are made at once; a writer is paid for each, so not many more than wanted."""
    writer = getattr(section, "writer", None)
    return min(section.rows, 2 * writer.concurrency) if writer else recipe.engine.batch_rows


def asker(section: WriterSection, runs: str, ledger: Path) -> Asker:
    """Who asks a recipe's writer; its answers are kept for all runs, so that none is paid for twice."""
    llm = InspectLlm(
        section.model,
        temperature=section.temperature,
        max_tokens=section.max_tokens,
        concurrency=section.concurrency,
        timeout=section.timeout,
        price=section.price,
        limit=Limit(section.limit_tokens, section.limit_dollars),
    )
    return Asker(llm, Cache(Path(runs) / "writer-cache"), label="writer", ledger=ledger)


def source_files(name: str, section: Any) -> dict[str, str]:
    """Hashes of the files from which a source draws cues and subjects."""
    if name in ("normal", "contrast"):
        return {}
    named = {"cues": located(section.cues) if section.cues else CUES}
    if name == "prompted" and section.writer:
        named["subjects"] = located(section.subjects) if section.subjects else SUBJECTS
    return {key: sha256(path) for key, path in named.items() if path.is_file()}


def check_held_out(rows: Sequence[Transcript], evaluation: Side, where: str | None = None) -> None:
    """Refuse rows that share a prompt, a steering latent or an off-topic subject with the evaluation."""
    steerings = [row.steering for row in rows if row.steering]
    written_about = [row.meta["subject"] for row in rows if isinstance(row.meta.get("subject"), str)]
    detours = [row.meta["detour"] for row in rows if isinstance(row.meta.get("detour"), dict)]
    latents = [each.latent for each in steerings] + [each.get("latent") for each in detours]
    subjects = [each.label for each in steerings] + [each.get("label") for each in detours] + written_about
    training = Side(
        frozenset(row.prompt for row in rows),
        frozenset(latent for latent in latents if latent is not None),
        frozenset(subject for subject in subjects if subject),
    )
    check_disjoint(training, evaluation, where)
