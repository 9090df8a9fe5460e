"""The trainer's door: `accelerate launch -m esr_train RECIPE [key=value ...]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from esr_train.command import add_debug, guarded, prepare
from esr_train.errors import InputError
from esr_train.recipe import Recipe, dump_recipe, load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or show what would be trained on; returns the exit code (2: bad input, 1: failed run)."""
    prepare()
    options = _parser().parse_args(arguments)
    return guarded(lambda: _run(options), options.debug)


def _run(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    arm = options.arm or next(iter(recipe.arms))
    if arm not in recipe.arms:
        raise InputError(f"the recipe has no arm {arm!r}", "--arm", f"It has {', '.join(recipe.arms)}.")
    if options.dry_run or options.dump_tokens:
        _show(recipe, arm, options)
    else:
        _train(recipe, arm)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="esr train", description="Train one arm of a recipe.")
    parser.add_argument("recipe", help="recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.lora.r=16")
    parser.add_argument("--arm", help="which of the recipe's arms; the first one unless given")
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained on, and stop")
    parser.add_argument("--rows", type=int, default=3, help="rows to preview with --dry-run")
    parser.add_argument("--dump-tokens", type=Path, metavar="FILE", help="write ids and labels as JSONL")
    add_debug(parser)
    return parser


def _train(recipe: Recipe, arm: str) -> None:
    from esr_train.training.trainer import train

    folder = train(recipe, arm, recipe.directory)
    print(f"adapter: {folder}")


def _show(recipe: Recipe, arm: str, options: argparse.Namespace) -> None:
    from esr_train.models import load_tokenizer
    from esr_train.training.dataset import dump_tokens, read_rows, statistics
    from esr_train.training.preview import preview
    from esr_train.training.settings import lora_config, sft_config
    from esr_train.training.trainer import adapter_folder, data_file

    section = recipe.for_arm(arm)
    sft_config(section, adapter_folder(arm, recipe.directory) / "checkpoints")
    lora_config(section)
    tokenizer = load_tokenizer(section.model)
    rows = read_rows(section, data_file(recipe, arm, recipe.directory), tokenizer)
    if options.dump_tokens:
        print(f"{dump_tokens(rows, options.dump_tokens)} rows: {options.dump_tokens}")
    if options.dry_run:
        print(dump_recipe(section))
        for key, value in statistics(rows).items():
            print(f"{key}: {value}")
        for row in rows[: options.rows]:
            print("\n" + preview(row, colour=sys.stdout.isatty()))


if __name__ == "__main__":
    sys.exit(main())
