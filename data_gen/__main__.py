"""Entry point of `esr data COMMAND …`, or `python -m data_gen COMMAND …`."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esr_train.command import add_command, add_recipe, guarded, parse_command, prepare
from esr_train.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data_gen.mixture import Mixture
    from esr_train.recipe import Recipe
    from esr_train.segments import Style
    from esr_train.transcript import Transcript

Commands = argparse._SubParsersAction
SWEEP = "10,20,30,40,50,60,70,80,90"
"""The paper's shares of self-correction rows, in percent."""
FORMATS = ("segments", "axolotl", "normal", "messages", "preference")
MOST_LINES = 10
"""Line numbers that are listed for one oddity of an import."""
POLICIES = ("masked", "unmasked", "answer_only")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one data command; returns the exit code (2: bad input, 1: failed run)."""
    prepare()
    parser = argparse.ArgumentParser(prog="esr data", description="Make transcripts and look at them.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_generate, _add_mix, _add_import_and_export, _add_labels, _add_views):
        add(commands)
    options = parse_command(parser, arguments)
    return guarded(lambda: options.act(options), options.debug)


def _add_generate(commands: "Commands[argparse.ArgumentParser]") -> None:
    generate = add_command(commands, "generate", _generate, "calibrate and make the rows of a recipe's arms")
    add_recipe(generate, "data.steered.rows=100")
    generate.add_argument("--arm", help="only this arm's rows; every arm's unless given")


def _add_mix(commands: "Commands[argparse.ArgumentParser]") -> None:
    mix = add_command(commands, "mix", _mix, "mix self-correction and normal rows at a share")
    mix.add_argument("files", nargs="+", type=Path, help="transcript files")
    share = mix.add_mutually_exclusive_group()
    share.add_argument("--self-correction", type=float, metavar="SHARE", help="0 to 1; every row unless given")
    share.add_argument("--sweep", nargs="?", const=SWEEP, metavar="PERCENTS", help=f"one file for each share ({SWEEP})")
    mix.add_argument("--rows", type=int, metavar="N", help="of a mixture, at most; as many as there are unless given")
    mix.add_argument("--repeat", action="store_true", help="with --rows: self-correction rows may come more than once")
    mix.add_argument("--seed", type=int, default=0, help="of the choice of rows and their order")
    mix.add_argument("--out", type=Path, required=True, help="file to write; with --sweep a folder")
    _add_mask(mix, "the share then counts trained tokens")


def _add_import_and_export(commands: "Commands[argparse.ArgumentParser]") -> None:
    import_ = add_command(commands, "import", _import_file, "read another format as transcripts")
    import_.add_argument("file", type=Path)
    import_.add_argument("--format", choices=FORMATS, required=True)
    import_.add_argument("--out", type=Path, required=True, help="transcript file to write")

    export = add_command(commands, "export", _export_file, "write transcripts in another format")
    export.add_argument("file", type=Path, help="transcript file")
    export.add_argument("--format", choices=FORMATS, required=True)
    what = "segments: template text; that of the model that made the rows unless given, or else llama3"
    export.add_argument("--style", choices=("llama3", "gemma", "chatml"), help=what)
    export.add_argument("--out", type=Path, required=True)


def _add_labels(commands: "Commands[argparse.ArgumentParser]") -> None:
    labels = add_command(commands, "labels", _labels, "label an SAE's latents by the text on which they are active")
    add_recipe(labels, "model.device=cuda:0", "recipe file (YAML), or a shipped name, with the model and the SAE")
    labels.add_argument("--texts", required=True, help="txt, jsonl or csv file, or data set; not the recipe's prompts")
    labels.add_argument("--column", default="text", help="of the texts (text)")
    labels.add_argument(
        "--latents",
        type=int,
        metavar="N",
        help="only N of the active latents, drawn by the seed; --steer: the N purest",
    )
    labels.add_argument(
        "--steer",
        action="store_true",
        help="label latents with a `topic` of the texts, those that lead there when they steer; asks no other model",
    )
    labels.add_argument("--namer", metavar="MODEL", help="of inspect_ai's model API: it names what the tokens show")
    labels.add_argument("--concreteness", type=float, default=0, help="with --namer: leave out less (0-100; paper: 65)")
    labels.add_argument("--out", type=Path, required=True, help="label file to write, for sae.labels")


def _add_views(commands: "Commands[argparse.ArgumentParser]") -> None:
    preview = add_command(commands, "preview", _preview, "show transcripts, and what is trained of them")
    preview.add_argument("file", type=Path, help="transcript file")
    preview.add_argument("--rows", type=int, default=5, help="how many")
    preview.add_argument("--html", type=Path, metavar="OUT", help="write a page instead of printing")
    _add_mask(preview, "tokens and masks are then shown, too")

    stats = add_command(commands, "stats", _stats, "count what a transcript file or a run directory holds")
    stats.add_argument("path", type=Path, help="transcript file or run directory")
    stats.add_argument("--html", type=Path, metavar="OUT", help="write a page that draws it instead of printing")
    _add_mask(stats, "tokens are then counted, too")

    card = add_command(commands, "card", _card, "write a dataset card, as the Hugging Face hub reads it")
    card.add_argument("path", type=Path, help="transcript file or run directory")
    card.add_argument("--out", type=Path, help="the card; README.md beside the files unless given")
    _add_mask(card, "tokens are then counted, too")


def _add_mask(parser: argparse.ArgumentParser, effect: str) -> None:
    parser.add_argument("--tokenizer", metavar="PATH", help=f"hub id or folder; {effect}")
    parser.add_argument("--loss", choices=POLICIES, default="masked", help="policy of the mask")


def _generate(options: argparse.Namespace) -> None:
    from recipes.experiment import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    if options.arm not in (None, *recipe.trained_arms):
        trained = ", ".join(recipe.trained_arms) or "none"
        raise InputError(f"the recipe trains no arm {options.arm!r}", "--arm", f"It trains {trained}.")
    from esr_train.ranks import joined
    from recipes.pipeline import generate

    ranks = joined(recipe)
    if ranks.count > 1 and ranks.first:
        print(f"{ranks.count} processes make the rows", flush=True)
    files = generate(recipe, [options.arm] if options.arm else recipe.trained_arms, ranks)
    for file in files if ranks.first else ():
        print(file)


def _mix(options: argparse.Namespace) -> None:
    from data_gen.description import read_file
    from data_gen.mixture import each_once, mix, one
    from esr_train.masking import trained_tokens
    from esr_train.transcript import write_transcripts

    _check_size(options)
    targets = _shares(options)
    files = [read_file(file) for file in options.files]
    rows = each_once(files)
    if doubled := sum(map(len, files)) - len(rows):
        print(f"{doubled} rows left out: an earlier file holds them, too")
    tokenizer = _tokenizer(options.tokenizer)
    weigh = partial(trained_tokens, tokenizer, policy=options.loss) if tokenizer else one

    mixtures = {
        path: mix(rows, share, options.seed, weigh, options.rows, options.repeat) for path, share in targets.items()
    }
    for path, mixed in mixtures.items():
        write_transcripts(path, mixed.rows)
        print(f"{path}: {_counted(mixed)}")


def _check_size(options: argparse.Namespace) -> None:
    if options.rows is None:
        if options.repeat:
            raise InputError("repeating serves to reach a number of rows", "--repeat", "Give --rows, too.")
        return
    _at_least_one("--rows", options.rows)
    if options.sweep is None and options.self_correction is None:
        raise InputError("a number of rows needs a share", "--rows", "Give --self-correction or --sweep, too.")
    if options.tokenizer is not None:
        raise InputError("a number of rows and a share of tokens exclude each other", "--rows", "Leave out one.")


def _at_least_one(flag: str, count: int) -> None:
    if count < 1:
        raise InputError(f"{count} is no number of them", flag, "Give 1 or more.")


def _shares(options: argparse.Namespace) -> dict[Path, float | None]:
    """The files to write, and the share of self-correction rows in each; None: every row."""
    if options.sweep is None:
        share = options.self_correction
        if share is not None and not 0 <= share <= 1:
            raise InputError(f"{share:g} is not a share", "--self-correction", "Give a number from 0 to 1.")
        return {options.out: share}
    try:
        percents = [int(part) for part in options.sweep.split(",")]
    except ValueError:
        percents = []
    if not percents or not all(0 <= percent <= 100 for percent in percents):
        fix = f"Give whole numbers from 0 to 100, such as {SWEEP}."
        raise InputError(f"{options.sweep!r} is not a list of percentages", "--sweep", fix)
    return {options.out / f"{percent:02d}.jsonl": percent / 100 for percent in percents}


def _counted(mixed: "Mixture") -> str:
    total, corrections = len(mixed.rows), sum(row.corrects for row in mixed.rows)
    again = f" ({mixed.repeated} of them repeats)" if mixed.repeated else ""
    fewer = f" ({mixed.missing} fewer than asked for: there are no more)" if mixed.missing else ""
    return f"{total} rows, {corrections} self-correction{again}, {total - corrections} normal{fewer}"


def _import_file(options: argparse.Namespace) -> None:
    from esr_train.interchange import import_file
    from esr_train.transcript import write_transcripts

    rows, report = import_file(options.file, options.format)
    if not rows:
        raise InputError("there is no row in the file", str(options.file), "Name a file with rows.")
    write_transcripts(options.out, rows)
    print(f"{report.rows} rows: {report.with_detour} with a detour, {report.normal} normal: {options.out}")
    for what, lines in report.problems.items():
        more = f" and {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
        print(f"{what}: line {', '.join(map(str, lines[:MOST_LINES]))}{more}")


def _export_file(options: argparse.Namespace) -> None:
    from data_gen.description import read_file
    from esr_train.interchange import export_file

    rows = read_file(options.file)
    style = _style(rows, options.style) if options.format in ("segments", "axolotl") else "llama3"
    report = export_file(options.out, rows, options.format, style)
    print(f"{report.rows} rows: {options.out}")
    for loss in report.lost or ["nothing"]:
        print(f"lost: {loss}")


def _style(rows: "Sequence[Transcript]", asked: "Style | None") -> "Style":
    """The style in which rows are exported: what is asked for, or that of the model that made them.

    Raises:
        InputError: if the model that made rows writes another one.
    """
    from esr_train.models import load_tokenizer
    from esr_train.segments import style_of
    from esr_train.template import chat_template

    for path in sorted({str(row.meta["model"]) for row in rows if "model" in row.meta}):
        try:
            own = style_of(chat_template(load_tokenizer(path)).around[-2])
        except InputError:
            print(f"not checked against the chat template of {path}, which cannot be loaded")
            continue
        if own is None or asked not in (None, own):
            what = f"the rows were made by {path}, whose chat template is not of the style {asked or 'llama3'}"
            fix = f"Take --style {own}." if own else "Take --format messages, which has no template text."
            raise InputError(what, "--style", fix)
        asked = own
    return asked or "llama3"


def _labels(options: argparse.Namespace) -> None:
    _check_labels(options)
    from data_gen.latents.latent_naming import label_latents, name_latents, write_latent_labels
    from esr_train.files import read_rows
    from esr_train.steering.direction_files import check_fits
    from eval.llm import LEDGER
    from recipes.experiment import read_recipe
    from recipes.resources import located, open_resources
    from recipes.stages.rows import open_writer

    recipe = read_recipe(options.recipe, options.overrides)
    if options.steer:
        from recipes.making.sae_making import label_sae

        labels = label_sae(recipe, located(options.texts), options.column, options.latents, options.out)
        print(f"{options.out}: {write_latent_labels(options.out, labels)} latents labelled")
        return
    texts = [str(row[options.column]) for _, row in read_rows(located(options.texts), options.column)]
    with open_resources(recipe) as resources:
        model, tokenizer, sae = resources.base_model(), resources.tokenizer(), resources.sae()
        check_fits(sae, model)
        rows = recipe.engine.chunk()
        labels = label_latents(model, tokenizer, sae, texts, options.latents, recipe.seed, rows)
    if options.namer:
        writer = open_writer(recipe, options.out.with_suffix(LEDGER), None, options.namer, temperature=0.0)
        labels = name_latents(labels, writer, options.concreteness)
    print(f"{options.out}: {write_latent_labels(options.out, labels)} latents labelled")


def _check_labels(options: argparse.Namespace) -> None:
    if options.latents is not None:
        _at_least_one("--latents", options.latents)
    if options.steer and options.namer:
        raise InputError("steering names the latents", "--namer", "Leave out --namer or --steer.")
    if not 0 <= options.concreteness <= 100:
        what = f"{options.concreteness:g} is no concreteness"
        raise InputError(what, "--concreteness", "Give a number from 0 to 100.")
    if not options.out.name.endswith(".jsonl"):
        raise InputError("labels are written as JSON lines", f"--out {options.out}", "Name a .jsonl file.")


def _preview(options: argparse.Namespace) -> None:
    from data_gen.description import read_file, shown
    from data_gen.pages import preview_page

    _at_least_one("--rows", options.rows)
    rows, tokenizer = read_file(options.file), _tokenizer(options.tokenizer)
    if options.html is not None:
        _write(options.html, preview_page(rows[: options.rows], len(rows), tokenizer, options.loss))
        return
    for row in rows[: options.rows]:
        print(shown(row, tokenizer, options.loss, colour=sys.stdout.isatty()) + "\n")


def _stats(options: argparse.Namespace) -> None:
    from data_gen.description import describe_files, text_of

    holdings = describe_files(options.path, _tokenizer(options.tokenizer), options.loss)
    if options.html is not None:
        from data_gen.pages import stats_page

        _write(options.html, stats_page(f"What {options.path.resolve().name} holds", holdings))
        return
    for file, parts in holdings.parts.items():
        print("\n".join([f"{file}:", *(f"  {line}" for line in text_of(parts))]))
    for line in text_of(holdings.funnels):
        print(line)
    for source, spent in holdings.requests.items():
        print(f"{source}: requests to the writer: {spent}")


def _card(options: argparse.Namespace) -> None:
    from data_gen.description import describe_files
    from data_gen.pages import write_card

    holdings = describe_files(options.path, _tokenizer(options.tokenizer), options.loss)
    first = next(iter(holdings.rows))
    out = options.out or first.parent / "README.md"
    write_card(out, holdings, *_run_of(first))
    print(out)


def _run_of(file: Path) -> "tuple[Recipe | None, list[dict[str, Any]]]":
    """The recipe of the run directory in which a file, or its folder, lies; what made each stage of its rows."""
    from esr_train.files import read_json
    from recipes.experiment import read_recipe

    folder = next((parent for parent in file.resolve().parents[:2] if (parent / "recipe.yaml").is_file()), None)
    if folder is None:
        return None, []
    stages = read_json(folder / "stages.json") if (folder / "stages.json").is_file() else {}
    made = [stage["made"] for name, stage in stages.items() if name.startswith("data/") and stage.get("done")]
    return read_recipe(folder / "recipe.yaml"), made


def _write(path: Path, text: str) -> None:
    from esr_train.files import replacing

    with replacing(path) as file:
        file.write(text)
    print(path)


def _tokenizer(path: str | None) -> "PreTrainedTokenizerBase | None":
    if path is None:
        return None
    from esr_train.models import load_tokenizer
    from esr_train.recipe import ModelSection

    try:
        return load_tokenizer(ModelSection(path=path))
    except InputError as error:
        raise InputError(error.what, f"--tokenizer {path}", error.fix) from error


if __name__ == "__main__":
    sys.exit(main())
