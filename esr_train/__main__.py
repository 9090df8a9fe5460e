"""The trainer's entry point: `accelerate launch -m esr_train RECIPE [key=value ...]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from esr_train.command import add_debug, add_recipe, guarded, prepare
from esr_train.errors import InputError
from esr_train.recipe import Recipe, dump_recipe

if TYPE_CHECKING:
    from esr_train.training.dataset import TrainingRow


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or show what would be trained on; returns the exit code (2: bad input, 1: failed run)."""
    prepare()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["merge"]:
        options = _merge_parser().parse_intermixed_args(words[1:])
        return guarded(lambda: _merge(options), options.debug)
    options = _parser().parse_intermixed_args(words)
    return guarded(lambda: _run(options), options.debug)


def _run(options: argparse.Namespace) -> None:
    recipe, arm = _recipe_and_arm(options)
    if options.dry_run or options.dump_tokens:
        _show(recipe, arm, options)
    else:
        _train(recipe, arm)


def _recipe_and_arm(options: argparse.Namespace) -> tuple[Recipe, str]:
    from recipes.experiment import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    arm = options.arm or next(iter(recipe.trained_arms), None)
    if arm is None or arm not in recipe.trained_arms:
        wanted = f"the recipe trains no arm {arm!r}" if arm else "the recipe trains no arm"
        raise InputError(wanted, "--arm", f"It trains {', '.join(recipe.trained_arms) or 'none'}.")
    return recipe, arm


def _parser() -> argparse.ArgumentParser:
    usage = "esr train RECIPE [key=value ...] [options]\n       esr train merge RECIPE --out FOLDER [options]"
    parser = argparse.ArgumentParser(prog="esr train", usage=usage, description="Train one arm of a recipe.")
    _add_arm(parser)
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained on, and stop")
    parser.add_argument("--rows", type=int, default=3, help="rows to preview with --dry-run")
    parser.add_argument("--dump-tokens", type=Path, metavar="FILE", help="write ids and labels as JSONL")
    add_debug(parser)
    return parser


def _merge_parser() -> argparse.ArgumentParser:
    purpose = "Merge a trained adapter into its base model, freshly loaded, and compare the two."
    parser = argparse.ArgumentParser(prog="esr train merge", description=purpose)
    _add_arm(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be empty or not there")
    add_debug(parser)
    return parser


def _add_arm(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "train.lora.r=16")
    parser.add_argument("--arm", help="which of the recipe's arms; the first one unless given")


def _merge(options: argparse.Namespace) -> None:
    recipe, arm = _recipe_and_arm(options)
    from esr_train.adapters import is_complete, merge
    from esr_train.training.trainer import adapter_folder

    folder = adapter_folder(arm, recipe.directory)
    if not is_complete(folder):
        raise InputError("there is no finished adapter", str(folder), "Train it first.")
    merged = merge(recipe.model, folder, options.out)
    print(
        f"merged: {merged.folder}; on probe texts the largest difference of a log-probability is "
        f"{merged.largest_difference:.3g}, the largest logit {merged.largest_logit:.3g}"
    )


def _train(recipe: Recipe, arm: str) -> None:
    from esr_train.adapters import is_complete
    from esr_train.training.trainer import adapter_folder
    from recipes.planning.preflight import Scope, check
    from recipes.stages.weights import train_from_files

    folder = adapter_folder(arm, recipe.directory)
    if not is_complete(folder):
        check(recipe, Scope((arm,), generates=False, evaluates=False))
    train_from_files(recipe, recipe.directory, arm)
    print(f"adapter: {folder}")


def _show(recipe: Recipe, arm: str, options: argparse.Namespace) -> None:
    from esr_train.models import load_tokenizer
    from esr_train.training.dataset import dump_tokens, read_rows
    from esr_train.training.settings import check_settings
    from esr_train.training.trainer import adapter_folder, data_file

    section = recipe.for_arm(arm)
    check_settings(section, adapter_folder(arm, recipe.directory) / "checkpoints")
    tokenizer = load_tokenizer(section.model)
    file = data_file(recipe, arm, recipe.directory)
    if not section.train.data and not file.is_file():
        command = f"esr data generate {' '.join([options.recipe, *options.overrides])}"
        raise InputError("there are no rows yet", str(file), f"Make them first: {command}.")
    rows = read_rows(section, file, tokenizer)
    if options.dump_tokens:
        print(f"{dump_tokens(rows, options.dump_tokens)} rows: {options.dump_tokens}")
    if options.dry_run:
        _preview(section, rows, options.rows)


def _preview(section: Recipe, rows: "Sequence[TrainingRow]", count: int) -> None:
    """Rows, steps, the share that is trained, and masks; the resolved recipe last, as it is long."""
    from esr_train.masking import counted, marked
    from esr_train.training.dataset import packed, statistics
    from esr_train.training.settings import packs, trainer_arguments

    examples = len(packed(rows, section.train.max_length)) if packs(section) else len(rows)
    arguments = trainer_arguments(section)
    at_once = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    for key, value in statistics(rows).items():
        print(f"{key}: {value}")
    if packs(section):
        print(f"packed sequences: {examples}")
    if section.train.method != "grpo":
        print(f"optimiser steps: {arguments.optimiser_steps(examples)}, of {at_once} rows on one process")
    for row in rows[:count]:
        print(f"\n{row.labelled.id} ({row.source}): {counted(row.labelled)}")
        print(marked(row.labelled, colour=sys.stdout.isatty()))
        if row.rejected:
            print(f"rejected: {counted(row.rejected.labelled)}")
            print(marked(row.rejected.labelled, colour=sys.stdout.isatty()))
    print(f"\nthe recipe, every key:\n\n{dump_recipe(section)}", end="")


if __name__ == "__main__":
    sys.exit(main())
