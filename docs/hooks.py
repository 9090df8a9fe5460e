"""What pages take from the code: `<!-- from code: NAME words -->` becomes a table, a text or a picture."""

import contextlib
import importlib
import importlib.util
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
MARK = re.compile(r"^<!-- from code: (\w+) ?(.*?) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page, before it is rendered."""
    return MARK.sub(lambda found: MAKERS[found[1]](*found[2].split()), markdown)


def architecture() -> str:
    """The packages and modules, drawn from their imports."""
    drawing = _neighbour("architecture")
    return f'<div class="architecture">{drawing.picture(drawing.read_modules())}</div>'


def command_help(*words: str) -> str:
    """What `esr … --help` prints."""
    from recipes.cli import main

    os.environ["COLUMNS"] = "100"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return f"```text\n{printed.getvalue().strip()}\n```"


def modules(package: str) -> str:
    """Every module of a package, for mkdocstrings."""
    names = [name for name in _neighbour("architecture").read_modules() if name.startswith(f"{package}.")]
    return "\n\n".join(f"::: {name}" for name in sorted(names) if "__main__" not in name)


def public_names(package: str) -> str:
    """What `import package` gives, as a table: each name with the first sentence of its docstring."""
    exported = importlib.import_module(package)
    rows = [(f"`{name}`", _summary(getattr(exported, name)) or "a type") for name in getattr(exported, "__all__", ())]
    return _table(("name", "what it is"), rows) if rows else ""


def metrics() -> str:
    """Every registered metric with its definition."""
    from eval.metrics import METRICS

    rows = [(f"`{name}`", _summary(getattr(metric, "of", metric))) for name, metric in METRICS.items()]
    return _table(("metric", "what it is of a trial"), rows)


def recipe_keys() -> str:
    """Every recipe key, a table for each section."""
    from esr_train.recipe import explained_keys

    sections: dict[str, list[tuple[str, ...]]] = {}
    for key in explained_keys():
        section = key.name.partition(".")[0] if "." in key.name else "at the top"
        sections.setdefault(section, []).append((f"`{key.name}`", f"`{key.kind}`", f"`{key.default}`", key.meaning))
    head = ("key", "kind", "default", "meaning")
    return "\n\n".join(f"## {name}\n\n{_table(head, rows)}" for name, rows in sections.items())


MAKERS: Mapping[str, Callable[..., str]] = {
    "architecture": architecture,
    "help": command_help,
    "metrics": metrics,
    "modules": modules,
    "public_names": public_names,
    "recipe_keys": recipe_keys,
}


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _summary(thing: Any) -> str:
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def _neighbour(name: str) -> ModuleType:
    """A script of this folder, imported by its path: the folder is no package."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{name}.py is not in {HERE}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
