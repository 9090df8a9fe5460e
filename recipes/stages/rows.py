"""An arm's training rows: generated source by source, mixed, and held against what the evaluation uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_gen.collect import Meter, collect
from data_gen.mixture import mix
from data_gen.preferences import with_rejected
from data_gen.prompted import SUBJECTS
from data_gen.sources import CUES, Context, Source, read_cues, wanted_sources
from esr_train.errors import InputError
from esr_train.files import write_json
from esr_train.interchange import read_training_file
from esr_train.provenance import digest, sha256
from esr_train.ranks import ALONE
from esr_train.recipe import DataSection, Recipe, SourceSection
from esr_train.transcript import Transcript, read_transcripts, write_transcripts
from eval.cells import Side, check_disjoint
from eval.llm import LEDGER, Asker, InspectLlm, Ledger
from recipes.experiment import Experiment, base_inputs, judge_inputs, write_recipe
from recipes.resources import located
from recipes.stages.stage_cache import Stage
from recipes.stages.steering_latents import Latents, Shared, held_out
from recipes.using.attacks import MovedDirections


@dataclass(frozen=True)
class Rows:
    """A file of transcripts, and the fingerprint of everything that made it."""

    path: Path
    fingerprint: str


def generate_sources(experiment: Experiment, arm: str, shared: Shared) -> dict[str, Rows]:
    """Generate the rows of every source that an arm asks for, unless that is done; none if it names a file."""
    recipe = experiment.recipe.for_arm(arm)
    if recipe.train.data:
        return {}
    return {
        source.name: _generate(experiment, recipe.data, source, section, shared)
        for source, section in wanted_sources(recipe.data).items()
    }


def _generate(
    experiment: Experiment, data: DataSection, source: Source, section: SourceSection, shared: Shared
) -> Rows:
    writer = getattr(section, "writer", None)
    others = _held_out_labels(shared.latents)
    inputs = {
        "source": source.name,
        "section": section.model_dump(mode="json"),
        "limits": [data.min_answer_score, data.max_detour_score, data.trim_answers],
        "files": _files(data, source, section),
        "base": base_inputs(experiment),
        "judge": judge_inputs(experiment),
        "calibration": shared.calibrated.fingerprint if source.needs_latents else None,
        "held out": others if writer else None,
        "seed": experiment.recipe.seed,
    }
    stem = f"data/sources/{source.name}-{digest(inputs)}"
    path = experiment.directory / f"{stem}.jsonl"
    # A writer is paid for each answer, so one process asks it, and not for many more rows than wanted.
    ranks = ALONE if writer else experiment.ranks
    chunk = min(section.rows, 2 * experiment.recipe.llm.concurrency) if writer else experiment.recipe.engine.chunk()

    def work() -> None:
        meter = Meter()
        context = _context(experiment, data, shared, path, meter)
        make = source.make(context, section)
        candidates = path.with_suffix(".candidates.jsonl")
        collected = collect(source.name, section.rows, make, candidates, chunk, ranks, meter)
        if experiment.ranks.first:
            unused = sum(collected.surplus.values()) if writer else 0
            funnel = collected.funnel | ({"not needed": unused} if unused else {})
            write_json(path.with_suffix(".funnel.json"), funnel)
            write_transcripts(path, collected.transcripts)

    outputs = (f"{stem}.jsonl", f"{stem}.candidates.jsonl", f"{stem}.funnel.json")
    modules = ("data_gen.collect", source.make.__module__)
    stage = Stage(stem, inputs, outputs, modules, collective=not writer)
    return Rows(path, experiment.cache.do(stage, work))


def _context(experiment: Experiment, data: DataSection, shared: Shared, path: Path, meter: Meter) -> Context:
    recipe, resources = experiment.recipe, experiment.resources
    return Context(
        resources.base(),
        resources.judge(),
        resources.sampling(),
        recipe.engine.positions,
        recipe.model.path,
        recipe.seed,
        resources.tokenizer(),
        prompts=resources.prompts(),
        latents=shared.calibrated.steerable["train"],
        cues=read_cues(data.cues),
        trim_answers=data.trim_answers,
        min_answer_score=data.min_answer_score,
        max_detour_score=data.max_detour_score,
        held_out=_held_out_labels(shared.latents),
        splits=resources.prompt_section().splits,
        open_writer=partial(open_writer, experiment.recipe, path.with_suffix(LEDGER), experiment.directory),
        progress=meter,
    )


def open_writer(recipe: Recipe, ledger: Path, run: Path | None, model: str, temperature: float = 1.0) -> Asker:
    """Asks the language model that writes rows; its answers are kept for all runs, so that none is paid for twice.

    Args:
        recipe: its `llm` says how it is asked.
        ledger: file of what was asked and what that cost.
        run: folder whose ledgers share the limit in dollars; None: this one has it alone.
        temperature: of its answers.
    """
    llm = InspectLlm(model, temperature, recipe.llm.concurrency)
    return Asker(llm, Ledger(model, recipe.llm, ledger, run), Path(recipe.runs) / "writer-cache", label="writer")


def _held_out_labels(latents: Latents) -> list[str]:
    """What the chosen latents stand for that are not dealt to training."""
    others = (group for split, group in latents.splits.items() if split != "train")
    return sorted({direction.label for group in others for direction in group if direction.label})


def _files(data: DataSection, source: Source, section: SourceSection) -> dict[str, str]:
    """Hashes of the files that decide what a source's rows say: its cues, and every file that its settings name."""
    files = {key: located(value) for key, value in section if isinstance(value, str)}
    if getattr(section, "writer", None):
        files.setdefault("subjects", SUBJECTS)
    if source.uses_cues:
        files["cues"] = located(data.cues) if data.cues else CUES
    return {name: sha256(path) for name, path in files.items() if path.is_file()}


def mix_rows(
    experiment: Experiment, arm: str, sources: Mapping[str, Rows], shared: Shared, moved: MovedDirections | None = None
) -> Rows:
    """Mix an arm's training file from its sources, or check the one it names; `moved` steers its rows in the end.

    Raises:
        InputError: if it shares a prompt, a latent or an off-topic subject with the evaluation.
    """
    recipe = experiment.recipe.for_arm(arm)
    evaluation = held_out(experiment.resources, shared.latents)
    if recipe.train.data:
        path = located(recipe.train.data)
        check_held_out(read_training_file(path), evaluation, recipe.train.data)
        return Rows(path, sha256(path))
    path = experiment.directory / "data" / f"{arm}.jsonl"
    prefers = recipe.train.method == "dpo"

    def work() -> None:
        rows = [row for source in sources.values() for row in read_transcripts(source.path)]
        if not rows:
            raise InputError(f"the arm {arm!r} asks for no rows", "data", "Set rows under one of its sources.")
        if prefers:
            rows = _preferred(experiment, arm, rows)
        mixed = mix(rows, recipe.data.self_correction, experiment.recipe.seed).rows
        check_held_out(mixed, evaluation)
        write_transcripts(path, moved.steered(mixed) if moved else mixed)
        write_recipe(experiment)

    inputs = {
        "sources": {name: rows.fingerprint for name, rows in sources.items()},
        "self_correction": recipe.data.self_correction,
        "seed": experiment.recipe.seed,
        "held_out": evaluation.fingerprint,
        **(_preference_inputs(recipe) if prefers else {}),
        **({"moved": moved.fingerprint} if moved else {}),
    }
    made_by = ("data_gen.mixture", "data_gen.preferences")[: 1 + prefers]
    stage = Stage(f"data/{arm}", inputs, (f"data/{arm}.jsonl",), made_by)
    return Rows(path, experiment.cache.do(stage, work))


def _preferred(experiment: Experiment, arm: str, rows: Sequence[Transcript]) -> list[Transcript]:
    """The rows that have a rejected reply, or get one; says how many have none."""
    data = experiment.recipe.for_arm(arm).data
    kept = with_rejected(rows, data.steered, read_cues(data.cues), experiment.recipe.seed)
    if left_out := len(rows) - len(kept):
        experiment.say(f"{arm}: {left_out} of {len(rows)} rows have no rejected reply and are left out")
    if any(row.source == "steered" for row in rows) and not any(row.steering for row in kept):
        what = "steered rows of an older version have no rejected reply"
        raise InputError(what, f"arms.{arm}", "Make them anew with --redo data/sources.")
    return kept


def _preference_inputs(recipe: Recipe) -> dict[str, Any]:
    """What decides the rejected replies that are made when rows are mixed."""
    steered = recipe.data.steered.model_dump(mode="json", include={"cut", "cut_words", "mid_sentence"})
    return {"rejected": steered, "cues": sha256(located(recipe.data.cues) if recipe.data.cues else CUES)}


def check_held_out(rows: Sequence[Transcript], evaluation: Side, where: str | None = None) -> None:
    """Refuse rows that share a prompt, a steering latent or an off-topic subject with the evaluation."""
    steerings = [row.steering for row in rows if row.steering]
    written_about = [row.meta["subject"] for row in rows if isinstance(row.meta.get("subject"), str)]
    training = Side(
        frozenset(row.prompt for row in rows),
        frozenset(steering.latent for steering in steerings if steering.latent is not None),
        frozenset([*(steering.label for steering in steerings if steering.label), *written_about]),
    )
    check_disjoint(training, evaluation, where)
