"""Labels for a recipe's SAE, made from text."""

from pathlib import Path

from data_gen.latent_naming import label_latents, name_latents
from esr_train.files import write_jsonl
from esr_train.recipe import Recipe
from esr_train.steering.direction_files import check_fits
from esr_train.tables import read_rows
from eval.llm import LEDGER
from recipes.resources import World, located
from recipes.sources import open_writer


def write_labels(
    recipe: Recipe, texts: str, column: str, out: Path, latents: int | None, namer: str | None, least: float
) -> int:
    """Write a file of labels for `sae.labels`; how many there are.

    Args:
        recipe: its model and SAE are read.
        texts: file or data set; see `esr_train.tables.read_rows`.
        column: of the texts.
        out: file to write.
        latents: how many to label; None: all that are active.
        namer: a model of inspect_ai's that names them; None: their tokens do.
        least: how concrete a name must be at least.

    Raises:
        InputError: if a file cannot be read, or nothing can be labelled.
    """
    world = World(recipe)
    found = [str(row[column]) for _, row in read_rows(located(texts), column)]
    model = world.open_model()
    check_fits(world.sae, model)
    rows = label_latents(model, world.tokenizer, world.sae, found, latents, recipe.seed, recipe.engine.batch_rows)
    if namer:
        ledger = out.with_suffix(LEDGER)
        rows = name_latents(rows, open_writer(namer, recipe.llm, recipe.runs, ledger, temperature=0.0), least)
    return write_jsonl(out, rows)
