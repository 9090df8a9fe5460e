"""Whole experiments, and the `esr` command; the shipped recipes by their names."""

from difflib import get_close_matches
from pathlib import Path

from esr_train.errors import InputError

FOLDER = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """Every recipe file that the package ships, at any depth, by its name, such as `tiny/quickstart`."""
    settings = {"accelerate", "deepspeed", "assets", "tasks"}
    files = (path for path in sorted(FOLDER.rglob("*.yaml")) if not settings & set(path.relative_to(FOLDER).parts))
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in files}


def recipe_file(path: Path | str) -> Path:
    """A recipe's file: what a path names, or else the shipped recipe with that name, or with that path in the package.

    Raises:
        InputError: if there is neither, naming what it may be meant for.
    """
    if Path(path).exists():
        return Path(path)
    name, known = str(path).removeprefix("recipes/").removesuffix(".yaml"), shipped()
    if name in known:
        return known[name]
    near = [each for each in known if each.startswith(f"{name}/")] or get_close_matches(name, known, 3)
    meant = f"Did you mean {' or '.join(near)}?" if near else "Check the path; `esr recipes list` has the shipped ones."
    raise InputError("the file does not exist, nor a shipped recipe of that name", str(path), meant)
