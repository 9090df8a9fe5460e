"""A dataset card: what transcript files hold and how they were made, as the Hugging Face hub reads it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_gen.description import KEPT, Holdings, text_of
from esr_train.errors import InputError
from esr_train.files import replacing
from esr_train.recipe import Recipe

if TYPE_CHECKING:
    from huggingface_hub import DatasetCardData

TEMPLATE = Path(__file__).with_name("card.jinja")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""The hub's names for numbers of rows."""


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
    asked_for = {name for name, section in recipe.data if getattr(section, "rows", 0)} if recipe else set()
    card = DatasetCard.from_template(
        _header(path, title, holdings, len(rows)),
        template_path=str(TEMPLATE),
        title=title,
        rows=len(rows),
        corrections=sum(row.corrects for row in rows),
        models=_listed(f"`{model}`" for row in rows if (model := row.meta.get("model"))),
        saes=_listed(f"`{each.sae.release}`, `{each.sae.id}`, layer {each.layer}" for each in steerings if each.sae),
        files={file.name: text_of(parts) for file, parts in holdings.parts.items()},
        sources=sorted({str(row.source) for row in rows} | asked_for),
        recipe=recipe,
        code=_code(made),
        funnels={part.name.removeprefix("funnel-"): part.counts for part in holdings.funnels},
        kept=KEPT,
        requests=holdings.requests,
    )
    with replacing(path) as file:
        file.write(str(card).rstrip() + "\n")


def _code(made: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The commits and the versions of libraries that made rows."""
    changed = {stage.get("commit"): " with changes" if stage.get("dirty") else "" for stage in made}
    versions = {f"{name} {number}" for stage in made for name, number in stage.get("versions", {}).items() if number}
    return {
        "commit": [f"`{commit}`{change}" for commit, change in changed.items() if commit],
        "versions": sorted(versions),
    }


def _header(path: Path, title: str, holdings: Holdings, rows: int) -> "DatasetCardData":
    from huggingface_hub import DatasetCardData

    return DatasetCardData(
        license="unknown",
        pretty_name=title,
        task_categories=["text-generation"],
        size_categories=[next((name for most, name in SIZES if rows < most), "n>1M")],
        tags=["activation-steering", "self-correction"],
        configs=[
            {"config_name": file.stem, "data_files": [{"split": "train", "path": _below(file, path)}]}
            for file in holdings.rows
        ],
    )


def _below(file: Path, card: Path) -> str:
    try:
        return file.resolve().relative_to(card.resolve().parent).as_posix()
    except ValueError:
        raise InputError(
            f"the card's folder does not hold {file}", str(card), "Put the card into the files' folder, or above it."
        ) from None


def _listed(names: Iterable[str]) -> str:
    return "; ".join(f"{name} ({count:,} rows)" for name, count in Counter(names).most_common())
