"""`esr vectors make`: steering vectors from the activations of a recipe's model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_gen.prompted import SUBJECTS
from esr_train.errors import InputError
from esr_train.files import read_lines
from esr_train.models import check_layer_number, load_config
from esr_train.recipe import Recipe
from esr_train.steering.directions import SteeringVector
from esr_train.steering.vector_files import check_is_safetensors, save_vectors
from esr_train.steering.vector_making import (
    MadeVectors,
    Method,
    cosines,
    difference_of_means,
    own_replies,
    vectors_of_replies,
)
from recipes.resources import Resources, located, open_resources, required


@dataclass(frozen=True)
class Wanted:
    """What vectors are made from, and where they go.

    Args:
        command: that asks for them; it is kept in the file.
        out: the file; None: the recipe's `vectors.file`.
        layer: whose output is read; None: the recipe's `vectors.layer`.
        subjects: file of subjects, one a line; None: the shipped ones.
        positive, negative: files of texts, one a line, between which one vector is made instead.
    """

    command: str
    out: Path | None = None
    layer: int | None = None
    subjects: Path | None = None
    positive: Path | None = None
    negative: Path | None = None
    method: Method = "mean"


def make(recipe: Recipe, wanted: Wanted) -> list[str]:
    """Make vectors and write them; returns a table of them, a line each.

    Raises:
        InputError: if the file exists, or texts, subjects or layer are missing or do not work.
    """
    section = recipe.vectors
    layer = required(section.layer if wanted.layer is None and section else wanted.layer, "--layer")
    out = wanted.out or Path(required(section.file if section else None, "--out"))
    check_is_safetensors(out)
    if out.exists():
        raise InputError("the file exists", str(out), "Remove it, or name another with --out.")
    check_layer_number(layer, load_config(recipe.model).get_text_config().num_hidden_layers, "--layer")
    with open_resources(recipe) as resources:
        if wanted.positive or wanted.negative:
            made = _between(resources, wanted, layer)
        else:
            made = _of_subjects(resources, _lines(wanted.subjects or SUBJECTS, "--subjects"), layer)
    facts = {"model": recipe.model.path, "command": wanted.command}
    save_vectors(out, made.vectors, {**facts, "residual_norm": f"{made.vectors[0].residual_norm:.6g}"})
    count = len(made.vectors)
    said = f"{out}: {count} vector{'s' * (count != 1)} for the output of layer {layer}"
    return [*_table(made.vectors), *_twins(made), said]


def _of_subjects(resources: Resources, subjects: Sequence[str], layer: int) -> MadeVectors:
    recipe, tokenizer = resources.recipe, resources.tokenizer()
    replies = own_replies(resources.base(), tokenizer, subjects, resources.sampling(), recipe.seed)
    return vectors_of_replies(resources.base_model(), tokenizer, replies, layer, recipe.engine.chunk())


def _between(resources: Resources, wanted: Wanted, layer: int) -> MadeVectors:
    positive, negative = required(wanted.positive, "--positive"), required(wanted.negative, "--negative")
    texts = _lines(positive, "--positive"), _lines(negative, "--negative")
    model, rows = resources.base_model(), resources.recipe.engine.chunk()
    vector = difference_of_means(
        model, resources.tokenizer(), *texts, layer, label=positive.stem, method=wanted.method, rows=rows
    )
    return MadeVectors((vector,))


def _lines(path: Path, flag: str) -> list[str]:
    """The lines of a file, each once.

    Raises:
        InputError: for a file without any, or a line that comes twice.
    """
    lines = [text for _, text in read_lines(located(str(path)))]
    if not lines:
        raise InputError("there is no line in the file", f"{flag} {path}", "Write one subject or text a line.")
    if twice := [text for text in dict.fromkeys(lines) if lines.count(text) > 1]:
        raise InputError(f"the line {twice[0]!r} comes twice", f"{flag} {path}", "Remove one.")
    return lines


def _table(vectors: Sequence[SteeringVector]) -> list[str]:
    """Of every vector its label, its length in residual norms, and which other one is nearest."""
    width = max(len(str(vector.label)) for vector in vectors)
    if len(vectors) == 1:
        return [f"{vectors[0].label}  length {_relative(vectors[0])}"]
    alike = cosines(vectors)
    lines = [f"{'label':{width}}  length  nearest"]
    for vector, row in zip(vectors, alike, strict=True):
        value, near = row.max(dim=0)
        lines.append(f"{vector.label!s:{width}}  {_relative(vector):>6}  {vectors[int(near)].label} ({value:.2f})")
    return [*lines, "length: in median residual norms of the layer; nearest: the largest cosine to another vector"]


def _relative(vector: SteeringVector) -> str:
    return f"{vector.length / required(vector.residual_norm, 'residual_norm'):.2f}"


def _twins(made: MadeVectors) -> list[str]:
    if not made.twins:
        return []
    pairs = ", ".join(f"{left_out} ({kept})" for left_out, kept in made.twins.items())
    return [f"{len(made.twins)} left out as too like an earlier one: {pairs}"]
