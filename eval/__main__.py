"""Entry point of the evaluation: `esr eval COMMAND …`, or `python -m eval COMMAND …`."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from esr_train.command import add_command, add_recipe, guarded, parse_command, prepare
from esr_train.errors import InputError

if TYPE_CHECKING:
    from esr_train.recipe import Recipe
    from eval.store import Trial
    from eval.summary import Summary

Commands = argparse._SubParsersAction


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one evaluation command; returns the exit code (2: bad input, 1: failed run)."""
    prepare()
    options = parse_command(_parser(), arguments)
    return guarded(lambda: options.act(options), options.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="esr eval", description="Calibrate, run trials, compare, report.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_runs, _add_adapter, _add_results, _add_power):
        add(commands)
    return parser


def _add_runs(commands: "Commands[argparse.ArgumentParser]") -> None:
    calibrate = add_command(commands, "calibrate", _calibrate, "find each latent's threshold on the base model")
    add_recipe(calibrate, "calibration.rounds=8")

    run = add_command(commands, "run", _run, "run trials, after whatever they need and is not there yet")
    add_recipe(run, "eval.trials=512")
    run.add_argument("--arm", help="base, or one of the recipe's arms; unless given all of them, and a report")
    run.add_argument("--redo", action="append", default=[], metavar="STAGE", help="stage to do anew, as trials/tuned")


def _add_adapter(commands: "Commands[argparse.ArgumentParser]") -> None:
    what = "measure an adapter that somebody gave you against its base model, and write a report"
    adapter = add_command(commands, "adapter", _adapter, what)
    adapter.add_argument("model", help="the base model: hub id, folder, or a name of `esr models fetch`")
    adapter.add_argument("adapter", help="of that model: hub id or folder")
    adapter.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, such as model.dtype=float32")
    adapter.add_argument("--vectors", metavar="FILE", help="that steer: safetensors, pt, npy or gguf")
    adapter.add_argument("--layer", type=int, metavar="N", help="whose output they steer; as their file says")
    adapter.add_argument("--sae", nargs=2, metavar=("RELEASE", "ID"), help="whose latents steer, in place of vectors")
    adapter.add_argument("--labels", metavar="FILE", help="of the SAE's latents: only labelled ones steer")
    adapter.add_argument(
        "--judge", default="likelihood", help="likelihood, lexical or a model, as anthropic/claude-haiku-4-5"
    )
    adapter.add_argument("--prompts", metavar="FILE", help="txt, jsonl or csv; 306 how-to questions unless given")
    adapter.add_argument("--name", help="of the run directory; `adapter-` and the adapter's unless given")


def _add_results(commands: "Commands[argparse.ArgumentParser]") -> None:
    compare = add_command(commands, "compare", _compare, "print the arms of one run, or of several, beside each other")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    compare.add_argument("--all", action="store_true", help="every metric, not only the headline's")
    compare.add_argument("--latex", action="store_true", help="the headline's tables for LaTeX (booktabs) instead")
    compare.add_argument("--html", type=Path, metavar="FILE", help="write them as a report page, too")
    compare.add_argument("--anyway", action="store_true", help="though cells, judge or sampling differ between runs")

    imported = add_command(commands, "import", _import, "the paper's results as trials, with metrics and a report")
    imported.add_argument("file", type=Path, metavar="FILE", help="experiment_results_*.json")
    imported.add_argument("--out", type=Path, required=True, metavar="RUN", help="run directory; arms there stay")
    imported.add_argument("--arm", default="base", help="what the measured model is called (base)")

    report = add_command(commands, "report", _report, "write metrics.json and report.html anew from the trials")
    report.add_argument("run", type=Path, metavar="RUN|RECIPE", help="run directory, or recipe")
    report.add_argument("overrides", nargs="*", metavar="key=value", help="such as eval.bootstrap=10000")
    report.add_argument("--width", type=float, metavar="INCHES", help="also write figures/print/*.{pdf,svg,png}")
    report.add_argument("--font", type=float, metavar="POINTS", help="the same; text of so many points (8)")


def _add_power(commands: "Commands[argparse.ArgumentParser]") -> None:
    power = add_command(commands, "power", _power, "trials that telling two rates apart takes")
    power.add_argument("--run", type=Path, metavar="RUN", help="take rate and clustering from this run's base arm")
    power.add_argument("--metric", default="multi_attempt_rate", help="with --run: which rate (multi_attempt_rate)")
    power.add_argument("--condition", default="steered", help="with --run: which condition (steered)")
    power.add_argument("--base", type=float, help="rate without the effect, 0 to 1; that of the run unless given")
    power.add_argument("--other", type=float, action="append", default=[], help="rate to tell from it; may be repeated")
    power.add_argument("--icc", type=float, help="intra-latent correlation; that of the run, or 0.05")
    power.add_argument("--per-latent", type=int, action="append", help="trials per latent; may be repeated")
    power.add_argument("--power", type=float, default=0.8, help="chance of seeing the difference (0.8)")


def _calibrate(options: argparse.Namespace) -> None:
    recipe = _recipe(options.recipe, options.overrides)
    from recipes.pipeline import calibrate

    print(calibrate(recipe))


def _run(options: argparse.Namespace) -> None:
    recipe = _recipe(options.recipe, options.overrides)
    arms = ("base", *recipe.arms)
    if options.arm not in (None, *arms):
        raise InputError(f"the recipe has no arm {options.arm!r}", "--arm", f"It has {', '.join(arms)}.")
    from esr_train.ranks import joined
    from recipes.pipeline import evaluate

    ranks = joined(recipe)
    if ranks.count > 1 and ranks.first:
        print(f"{ranks.count} processes share the cells", flush=True)
    evaluate(recipe, options.arm, ranks, options.redo)


def _adapter(options: argparse.Namespace) -> None:
    from recipes.pipeline import evaluate
    from recipes.using.given_adapter import Given, adapter_recipe

    given = Given(
        options.model,
        options.adapter,
        options.vectors,
        options.layer,
        tuple(options.sae) if options.sae else None,
        options.labels,
        options.judge,
        options.prompts,
        options.name,
    )
    evaluate(adapter_recipe(given, options.overrides))


def _compare(options: argparse.Namespace) -> None:
    from eval.report.story import tables
    from eval.report.tables import paper_tables
    from eval.runs import read_runs
    from eval.summary import read_summary, summarise

    first, *others = options.runs
    trials = read_runs(options.runs, options.anyway) if others or options.html else {}
    summary = summarise(trials) if others else read_summary(first / "metrics.json" if first.is_dir() else first)
    if options.latex:
        print("\n".join(table.to_latex() for table in paper_tables(summary)[:2]))
    else:
        print("\n".join(tables(summary, options.all)))
    if options.html:
        _write_page(options.html, " and ".join(run.name for run in options.runs), summary, trials)


def _write_page(path: Path, heading: str, summary: "Summary", trials: "Mapping[str, Sequence[Trial]]") -> None:
    from esr_train.files import replacing
    from eval.report.figures import Material, draw_figures
    from eval.report.page import report_page

    material = Material(summary, trials)
    with replacing(path) as file:
        file.write(report_page(heading, material, {}, draw_figures(material)))
    print(f"page: {path}")


def _import(options: argparse.Namespace) -> None:
    from esr_train.files import write_json, write_jsonl
    from esr_train.recipe import RUN_NAME
    from eval.paper_results import read_results
    from eval.report.figures import Material
    from eval.report.page import write_report
    from eval.report.story import tables
    from eval.runs import read_run
    from eval.store import trial_to_json
    from eval.summary import summarise

    if not re.fullmatch(RUN_NAME, options.arm):
        raise InputError(f"{options.arm!r} cannot be a file's name", "--arm", "Take letters, digits, '.', '_', '-'.")
    if (options.out / "recipe.yaml").exists():
        raise InputError("the run of a recipe lies here", f"--out {options.out}", "Name a folder of its own.")
    imported = read_results(options.file, options.arm)
    write_jsonl(options.out / "trials" / f"{options.arm}.jsonl", map(trial_to_json, imported.trials))
    rows = read_run(options.out)
    summary = summarise(rows)
    write_json(options.out / "metrics.json", summary.to_json())
    notes = {"source": options.file.name, **{name: str(value) for name, value in imported.config.items()}}
    if imported.failed:
        notes["latents_that_failed"] = f"{len(imported.failed)}: {', '.join(imported.failed)}"
    page = write_report(options.out, options.file.stem, Material(summary, rows), notes)
    print("\n".join([*tables(summary), "", f"{len(imported.trials)} trials imported; report: {page}"]))


def _report(options: argparse.Namespace) -> None:
    folder = options.run if options.run.is_dir() else None
    recipe = _recipe(options.run / "recipe.yaml" if folder else options.run, options.overrides)
    from recipes.pipeline import report_again

    for name in ("width", "font"):
        if (value := getattr(options, name)) is not None and not 1 <= value <= 72:
            raise InputError(f"{value:g} is no size for a figure", f"--{name}", "Take 1 to 72, such as 3.3 and 8.")
    for_print = (options.width or 3.3, options.font or 8.0) if options.width or options.font else None
    report_again(recipe, folder, for_print)


def _power(options: argparse.Namespace) -> None:
    from eval.power import PER_LATENT, planned_from, table
    from eval.statistics import PRIOR_ICC
    from eval.store import read_trials

    base, icc = options.base, options.icc
    if options.run:
        trials = read_trials(options.run / "trials" / "base.jsonl")
        measured_rate, measured_icc = planned_from(trials, options.condition, options.metric)
        base, icc = measured_rate if base is None else base, measured_icc if icc is None else icc
    if base is None:
        raise InputError("there is no rate to start from", "--base", "Give --base, or --run RUN to take it from a run.")
    icc = PRIOR_ICC if icc is None else icc
    print("\n".join(table(base, icc, options.other, options.per_latent or PER_LATENT, options.power)))


def _recipe(path: Path | str, overrides: Sequence[str]) -> "Recipe":
    from recipes.experiment import read_recipe

    return read_recipe(path, list(overrides))


if __name__ == "__main__":
    sys.exit(main())
