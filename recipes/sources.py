"""Where an experiment's training rows come from, and what they must not share with its evaluation."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data_gen.prompted import SUBJECTS
from data_gen.sources import CUES, SOURCES, Context, Source, SteerableLatent, read_cues
from esr_train.provenance import sha256
from esr_train.recipe import DataSection, LlmSection, Recipe, SourceSection
from esr_train.steering.engine import Progress
from esr_train.transcript import Transcript
from eval.cells import Side, check_disjoint
from eval.llm import Asker, InspectLlm, Ledger
from recipes.resources import World, located


def asked_for(data: DataSection) -> list[tuple[Source, SourceSection]]:
    """The sources that a `data` section wants rows of, each with its settings."""
    sections = [(source, data.source(name)) for name, source in SOURCES.items()]
    return [(source, section) for source, section in sections if section and section.rows]


def make_context(
    recipe: Recipe,
    data: DataSection,
    world: World,
    latents: Sequence[SteerableLatent],
    held_out: Sequence[str],
    ledger: Path,
    progress: Progress,
) -> Context:
    """What the sources of an arm's rows work with.

    Args:
        recipe: the experiment's.
        data: the arm's own.
        world: its model, judge and prompts.
        latents: that may steer training rows.
        held_out: what the other splits' latents stand for: a writer must not write about it.
        ledger: file of what a writer was asked and what that cost.
        progress: told of every batch that the engine has finished.
    """
    return Context(
        engine=world.base,
        judge=world.judge,
        sampling=world.sampling(),
        positions=recipe.engine.positions,
        model=recipe.model.path,
        seed=recipe.seed,
        tokenizer=world.tokenizer,
        prompts=world.pools,
        latents=latents,
        cues=read_cues(data.cues),
        min_answer_score=data.min_answer_score,
        max_detour_score=data.max_detour_score,
        held_out=held_out,
        splits=world.required_prompts.splits,
        open_writer=partial(open_writer, section=recipe.llm, runs=recipe.runs, ledger=ledger, run=recipe.directory),
        progress=progress,
    )


def writer_of(section: SourceSection) -> str | None:
    """The language model that writes a source's rows; None if the model under test does."""
    writer = getattr(section, "writer", None)
    return writer if isinstance(writer, str) else None


def chunk_rows(recipe: Recipe, section: SourceSection) -> int:
    """How many candidates of a source are made at once; a writer is paid for each, so not many more than wanted."""
    return min(section.rows, 2 * recipe.llm.concurrency) if writer_of(section) else recipe.engine.batch_rows


def open_writer(
    name: str, section: LlmSection, runs: str, ledger: Path, run: Path | None = None, temperature: float = 1.0
) -> Asker:
    """Who asks the language model `name`; its answers are kept for all runs, so that none is paid for twice.

    Args:
        run: folder whose ledgers share the limit in dollars; None: this one has it alone.
    """
    llm = InspectLlm(name, temperature, section.concurrency)
    return Asker(llm, Ledger(name, section, ledger, run), Path(runs) / "writer-cache", label="writer")


def source_files(data: DataSection, section: SourceSection) -> dict[str, str]:
    """Hashes of the files that decide what a source's rows say: its cues, and every file that its settings name."""
    named = {key: located(value) for key, value in section if isinstance(value, str)}
    if writer_of(section):
        named.setdefault("subjects", SUBJECTS)
    named["cues"] = located(data.cues) if data.cues else CUES
    return {key: sha256(path) for key, path in named.items() if path.is_file()}


def check_held_out(rows: Sequence[Transcript], evaluation: Side, where: str | None = None) -> None:
    """Refuse rows that share a prompt, a steering latent or an off-topic subject with the evaluation."""
    steerings = [row.steering for row in rows if row.steering]
    written_about = [row.meta["subject"] for row in rows if isinstance(row.meta.get("subject"), str)]
    training = Side(
        frozenset(row.prompt for row in rows),
        frozenset(steering.latent for steering in steerings if steering.latent is not None),
        frozenset(subject for subject in [*(steering.label for steering in steerings), *written_about] if subject),
    )
    check_disjoint(training, evaluation, where)
