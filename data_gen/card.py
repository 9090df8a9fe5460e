"""A dataset card: what transcript files hold and how they were made, as the Hugging Face hub reads it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_gen.description import KEPT, Holdings, Part, text_of
from esr_train.errors import InputError
from esr_train.files import replacing
from esr_train.recipe import AskingJudgeSection, Recipe, SourceSection
from esr_train.transcript import Transcript

if TYPE_CHECKING:
    from huggingface_hub import DatasetCardData

TEMPLATE = Path(__file__).with_name("card.jinja")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""The hub's names for numbers of rows."""
SOURCES = {
    "steered": "steered: the model answers under steering, its text is cut, a cue follows, and the same model answers.",
    "prompted": "prompted: a detour about another subject, written on request, with an acknowledgement and an answer.",
    "normal": "normal: the model's own answers, unsteered.",
    "imported": "imported: rows of other projects' files.",
}
NO_RECIPE = "No recipe lies beside the files: the rest is not known."


def write_card(path: Path, holdings: Holdings, recipe: Recipe | None, made: Sequence[Mapping[str, Any]]) -> None:
    """Write the card of transcript files. The licence is left to whoever publishes them.

    Args:
        path: of the card; the hub wants it to be a `README.md` in or above the files' folder.
        holdings: the files and what is said of them.
        recipe: that made the files, if it is known.
        made: commit and versions of every stage that made rows, as `stages.json` has them.

    Raises:
        InputError: if there is a file already: what somebody wrote into a card is not overwritten; if a file is not
            below the card's folder.
    """
    from huggingface_hub import DatasetCard

    if path.exists():
        raise InputError("there is a card already", str(path), "Remove it, or name another file with --out.")
    rows = [row for transcripts in holdings.rows.values() for row in transcripts]
    title = f"Self-correction transcripts: {recipe.name if recipe else next(iter(holdings.rows)).stem}"
    steerings = [row.steering for row in rows if row.steering]
    card = DatasetCard.from_template(
        _header(path, title, holdings.rows, len(rows)),
        template_path=str(TEMPLATE),
        title=title,
        rows=f"{len(rows):,}",
        corrections=f"{sum(row.corrects for row in rows):,}",
        models=_listed(f"`{model}`" for row in rows if (model := row.meta.get("model"))),
        saes=_listed(f"`{each.sae.release}`, `{each.sae.id}`, layer {each.layer}" for each in steerings if each.sae),
        files={file.name: text_of(parts) for file, parts in holdings.parts.items()},
        made=[*_sources(rows, recipe), *(_made(recipe, made) if recipe else [NO_RECIPE])],
        funnels=[_funnel(part) for part in holdings.funnels],
        requests=holdings.requests,
        splits=_splits(recipe),
    )
    with replacing(path) as file:
        file.write(str(card).rstrip() + "\n")


def _header(path: Path, title: str, files: Iterable[Path], rows: int) -> "DatasetCardData":
    from huggingface_hub import DatasetCardData

    return DatasetCardData(
        license="unknown",
        pretty_name=title,
        task_categories=["text-generation"],
        size_categories=[next((name for most, name in SIZES if rows < most), "n>1M")],
        tags=["activation-steering", "self-correction"],
        configs=[
            {"config_name": file.stem, "data_files": [{"split": "train", "path": _below(file, path)}]} for file in files
        ],
    )


def _below(file: Path, card: Path) -> str:
    try:
        return file.resolve().relative_to(card.resolve().parent).as_posix()
    except ValueError:
        raise InputError(
            f"the card's folder does not hold {file}", str(card), "Put the card into the files' folder, or above it."
        ) from None


def _sources(rows: Sequence[Transcript], recipe: Recipe | None) -> list[str]:
    """What the rows' sources mean; those that a recipe asks for may be finer than what a row says."""
    names = {str(row.source) for row in rows}
    if recipe:
        names |= {name for name, section in recipe.data if isinstance(section, SourceSection) and section.rows}
    ordered = [name for name in SOURCES if name in names] + sorted(names - SOURCES.keys())
    return [SOURCES.get(name, f"{name}: made by a source of the recipe's own.") for name in ordered]


def _made(recipe: Recipe, made: Sequence[Mapping[str, Any]]) -> list[str]:
    """What decided about the rows, from the recipe and from what made each stage."""
    judge = recipe.judge
    commits = {
        f"`{stage['commit']}`{' with changes' * bool(stage.get('dirty'))}" for stage in made if stage.get("commit")
    }
    versions = {f"{name} {version}" for stage in made for name, version in stage.get("versions", {}).items() if version}
    said = [
        f"Model: `{recipe.model.path}`" + (f" at `{recipe.model.revision}`" if recipe.model.revision else ""),
        f"SAE: `{recipe.sae.release}`, `{recipe.sae.id}`" if recipe.sae else "",
        f"Judge: {judge.kind}" + (f", `{judge.model}`" if isinstance(judge, AskingJudgeSection) else ""),
        f"Writer of prompted rows: `{recipe.data.prompted.writer}`" if recipe.data.prompted.writer else "",
        f"Prompts: `{recipe.prompts.path}`" if recipe.prompts else "",
        f"Seed: {recipe.seed}",
        f"Code: commit {', '.join(sorted(commits))}" if commits else "",
        f"Versions: {', '.join(sorted(versions))}" if versions else "",
    ]
    return [f"{line}." for line in said if line]


def _funnel(part: Part) -> tuple[str, str, str]:
    kept, total = part.counts.get(KEPT, 0), sum(part.counts.values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in part.counts.items() if reason != KEPT)
    return part.name.removeprefix("funnel-"), f"{kept:,} of {total:,}", reasons or "none"


def _splits(recipe: Recipe | None) -> str | None:
    if recipe is None or recipe.prompts is None:
        return None
    splits = recipe.prompts.splits
    dealt = f"{splits.validation:.0%} of the topics to validation and {splits.test:.0%} to test"
    return (
        f"All rows are for training. Prompts, latents and off-topic subjects were dealt by topic (seed {splits.seed}), "
        f"{dealt}. Rows that shared a prompt, a steering latent or an off-topic subject with the recipe's evaluation "
        "would have been refused. Normal rows may be about a held-out topic, never with a prompt that is evaluated."
    )


def _listed(names: Iterable[str]) -> str:
    return "; ".join(f"{name} ({count:,} rows)" for name, count in Counter(names).most_common())
