"""Labels for a recipe's SAE, made from text."""

from pathlib import Path

from data_gen.latent_naming import label_latents, name_latents
from esr_train.files import read_rows, write_jsonl
from esr_train.recipe import Recipe
from esr_train.steering.direction_files import check_fits
from eval.llm import LEDGER
from recipes.resources import located, open_resources
from recipes.rows import open_writer


def write_labels(
    recipe: Recipe, texts: str, column: str, out: Path, latents: int | None, namer: str | None, least: float
) -> int:
    """Write a file of labels for `sae.labels`; how many there are.

    Args:
        recipe: its model and SAE are read.
        texts: file or data set; see `esr_train.files.read_rows`.
        column: of the texts.
        out: file to write.
        latents: how many to label; None: all that are active.
        namer: a model of inspect_ai's that names them; None: their tokens do.
        least: how concrete a name must be at least.

    Raises:
        InputError: if a file cannot be read, or nothing can be labelled.
    """
    read = [str(row[column]) for _, row in read_rows(located(texts), column)]
    with open_resources(recipe) as resources:
        model, sae, rows = resources.base_model(), resources.sae(), recipe.engine.batch_rows
        check_fits(sae, model)
        labelled = label_latents(model, resources.tokenizer(), sae, read, latents, recipe.seed, rows)
    if namer:
        writer = open_writer(recipe, out.with_suffix(LEDGER), None, namer, temperature=0.0)
        labelled = name_latents(labelled, writer, least)
    return write_jsonl(out, labelled)
