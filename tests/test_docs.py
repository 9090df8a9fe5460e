"""What the documentation says exists: links, recipe keys, files."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from esr_train.recipe import explained_keys
from tests.conftest import ROOT

PACKAGES = ("esr_train", "eval", "data_gen", "recipes")
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*.md"),
        *(path for package in PACKAGES for path in (ROOT / package).rglob("README.md")),
    ]
)
LINK = re.compile(r"\]\(([^)\s]+)\)|--8<-- \"([^\"]+)\"")
SECTIONS = "model|sae|latents|judge|llm|prompts|engine|sampling|calibration|data|train|eval"
KEY = re.compile(rf"(?<![\w./-])(?:{SECTIONS})(?:\.[a-z_]+)+(?![\w(/])")
SUFFIXES = (".md", ".md", ".generate", ".json", ".jsonl", ".py", ".safetensors")
"""Of files, and of the method of a model."""
HISTORY = ROOT / "CHANGELOG.md"
"""It names keys that are gone."""
OPEN_ENDED = ("train.args.", "train.lora.")
"""Their keys are TRL's and PEFT's."""


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        named = re.search(r"\{#([\w-]+)\}", heading)
        words = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        found.add(named[1] if named else re.sub(r"[\s-]+", "-", words))
    return found


def unknown_keys(text: str) -> set[str]:
    """What looks like a recipe's key and is none; names of modules of `eval` and of files are not meant."""
    known = {key.name for key in explained_keys()}
    known |= {name.rpartition(".")[0] for name in known}
    modules = {f"eval.{path.stem}" for path in (ROOT / "eval").iterdir()}
    named = {key for key in KEY.findall(text) if not key.startswith(OPEN_ENDED) and not key.endswith(SUFFIXES)}
    return {key for key in named - known if ".".join(key.split(".")[:2]) not in modules}


def tree() -> list[tuple[int, str]]:
    """The README's file tree: each name with its indentation."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Files")[2].split("```")[1]
    lines = [line for line in block.splitlines() if line.strip()]
    return [
        (len(line) - len(line.lstrip()), name)
        for line in lines
        for name in re.split(r"\s{2,}", line.strip())[0].split()
    ]


def listed() -> list[str]:
    """The paths that the README's tree lists."""
    parents: list[tuple[int, str]] = []
    paths = []
    for indent, name in tree():
        parents = [each for each in parents if each[0] < indent]
        paths.append("".join(parent for _, parent in parents) + name)
        if name.endswith("/"):
            parents.append((indent, name))
    return paths


def test_there_are_pages_and_every_one_is_read():
    assert len(PAGES) >= 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    for link, snippet in LINK.findall(page.read_text(encoding="utf-8")):
        if snippet:
            assert (ROOT / snippet.partition(":")[0]).is_file(), f"{page}: {snippet}"
            continue
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_no_page_has_a_word_where_output_was_to_be_filled_in():
    places = [(page.name, line) for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    assert [(page, line) for page, line in places if re.fullmatch(r"[A-Z]{4,}|@\w+@?", line.strip())] == []


def test_every_guide_can_be_reached_from_the_first_page():
    first = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    guides = [path.name for path in (ROOT / "docs" / "how-to").glob("*.md")]
    assert len(guides) >= 15
    assert [name for name in guides if f"how-to/{name}" not in first] == []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != HISTORY], ids=lambda page: str(page.relative_to(ROOT))
)
def test_recipe_keys_that_a_page_names_exist(page):
    assert unknown_keys(page.read_text(encoding="utf-8")) == set()


def test_keys_are_told_from_names_of_modules_and_files():
    wrong = "`data.steered.row=3`, eval.trial. train.arg.optim"
    assert unknown_keys(wrong) == {"data.steered.row", "eval.trial", "train.arg.optim"}
    assert unknown_keys("`data.steered.rows=3`, eval.trials. train.args.optim judge.model llm.py") == set()
    assert unknown_keys("`from eval.store import x` my/data.steere eval/trial.py model.safetensors data.jsonl") == set()


def test_the_tree_of_the_readme_lists_what_exists():
    paths = listed()
    assert len(paths) >= 60
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_module_is_in_the_tree_of_the_readme_by_its_name_or_its_folder():
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True).stdout.split()
    modules = [path for path in tracked if path.endswith(".py") and (ROOT / path).exists()]
    assert len(modules) >= 60
    paths = set(listed()) - {f"{package}/" for package in PACKAGES}
    folders = tuple(path for path in paths if path.endswith("/"))
    missing = [path for path in modules if path not in paths and not path.startswith(folders)]
    assert [path for path in missing if not path.endswith("__init__.py")] == []


def test_every_recipe_key_is_explained_in_words_of_yaml():
    keys = explained_keys()
    assert len(keys) >= 60
    assert [key.name for key in keys if not key.meaning or re.search(r"None|Field|Annotated|typing", str(key))] == []
    by_name = {key.name: (key.kind, key.default) for key in keys}
    assert by_name["judge.kind"] == ("lexical | model | local | likelihood", "lexical")
    assert by_name["data.steered.strength"] == ("[float, float]", "[0.9, 1.3]")
    assert by_name["calibration.stop_width"] == ("float | null", "null")


def test_the_picture_of_the_architecture_shows_every_module_and_arrows_that_point_down():
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
    drawing = importlib.util.module_from_spec(spec)
    sys.modules["architecture"] = drawing
    spec.loader.exec_module(drawing)
    modules = drawing.read_modules()
    packages = {name.rpartition(".")[0] for name in modules}
    shown = set(re.findall(r"<title>([\w.]+), ", drawing.picture(modules)))
    assert len(shown) >= 60
    assert {name for name in modules if "__main__" not in name and name not in packages} == shown
    floors = drawing.FLOORS
    assert all(floors.index(upper) < floors.index(lower) for upper, lower in drawing.floor_imports(modules))
