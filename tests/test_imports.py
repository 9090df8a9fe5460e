"""Rooms import downwards only; doors alone may look up, and a door's help needs no heavy library."""

import ast
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

ROOMS = ("esr_train", "eval", "data_gen", "recipes")
"""From the ground up."""
LEAST_MODULES = 60
"""Fewer mean that the test did not see them all."""


def modules() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported_rooms(source: str) -> set[str]:
    """Rooms imported anywhere in a module, inside functions and type-checking blocks, too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names} & set(ROOMS)


def rooms_above(path: Path) -> set[str]:
    room = path.relative_to(ROOT).parts[0]
    return imported_rooms(path.read_text(encoding="utf-8")) - set(ROOMS[: ROOMS.index(room) + 1])


def test_no_module_but_a_door_imports_from_a_room_above():
    upwards = {str(path.relative_to(ROOT)): rooms_above(path) for path in modules()}
    found = {name: rooms for name, rooms in upwards.items() if rooms and not name.endswith("__main__.py")}
    assert found == {}


def test_the_walk_has_seen_every_room():
    seen = modules()
    assert len(seen) >= LEAST_MODULES
    assert {path.relative_to(ROOT).parts[0] for path in seen} == set(ROOMS)
    assert rooms_above(ROOT / "data_gen" / "__main__.py") == {"recipes"}


def test_an_import_inside_a_function_is_seen():
    assert imported_rooms("def f():\n    from eval.cells import Cell\n    import recipes.cli\n") == {"eval", "recipes"}


def test_nothing_imports_the_tests_or_relatively():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: relative import"
                assert (node.module or "").partition(".")[0] != "tests", path


def test_help_of_every_command_loads_no_heavy_library():
    program = """
import sys
from recipes.cli import main
for words in ([], ["run"], ["data"], ["train"], ["eval"], ["recipes"], ["data", "mix"], ["eval", "compare"]):
    try:
        code = main([*words, "--help"])
    except SystemExit as end:
        code = end.code
    assert code == 0, words
print(sorted({"torch", "transformers", "sae_lens", "trl", "datasets"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "[]"
