"""Counts of the source: modules, lines, recipe keys, flags, long functions by name, small modules, circles of imports.

python benchmarks/house.py [FOLDER]     the tree that FOLDER holds (here, unless given)
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("esr_train", "eval", "data_gen", "recipes")
LONG, SMALL = 40, 60


def main(root: Path) -> int:
    """Print the table for a tree."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True, check=True).stdout
    files = [root / name for name in listed.split() if name.split("/")[0] in PACKAGES]
    sources = {module_name(path.relative_to(root)): path.read_text(encoding="utf-8") for path in files}
    trees = {name: ast.parse(source) for name, source in sources.items()}
    long = [(name, *each) for name, tree in trees.items() for each in function_lengths(tree) if each[1] > LONG]
    docs = sum(doc_lines(tree) for tree in trees.values())
    lines = {name: source.count("\n") for name, source in sources.items()}
    blank = sum(not line.strip() for source in sources.values() for line in source.splitlines())
    rows = {
        "modules": len(sources),
        "source lines": sum(lines.values()),
        "of these docstrings, blank lines": f"{docs}, {blank}",
        "recipe keys": recipe_keys(root),
        "CLI flags": sum(len(re.findall(r'add_argument\(\s*"--', source)) for source in sources.values()),
        f"functions over {LONG} lines (docstring included)": len(long),
        "functions over 8 parameters": sum(wide for tree in trees.values() for wide in wide_functions(tree)),
        f"modules under {SMALL} lines": sum(count < SMALL for count in lines.values()),
        "circles of imports": len(circles({name: imported(tree, set(trees)) for name, tree in trees.items()})),
        "module names that stand twice": len(twins(list(sources))),
    }
    print("\n".join(f"| {what} | {count} |" for what, count in rows.items()))
    for name, function, length in long:
        print(f"{name}.{function}: {length} lines")
    return 0


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def function_lengths(tree: ast.Module) -> list[tuple[str, int]]:
    return [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in functions(tree)]


def wide_functions(tree: ast.Module) -> list[bool]:
    return [len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]) > 8 for node in functions(tree)]


def doc_lines(tree: ast.Module) -> int:
    texts = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]  # fmt: skip
    return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in texts)


def imported(tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of the project that a module imports: at loading, for types, or inside a function."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & modules


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that reach each other."""
    reached = {name: _reachable(graph, name) for name in graph}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return [set(group) for group in groups if len(group) > 1]


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for other in graph[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def twins(names: list[str]) -> set[str]:
    stems = [name.rpartition(".")[2] for name in names]
    return {stem for stem in stems if stems.count(stem) > 1 and not stem.startswith("__")}


def recipe_keys(root: Path) -> int | str:
    """As the tree's own code counts them; a tree that cannot says nothing."""
    program = (
        "import recipes.experiment\nfrom esr_train.recipe import explained_keys\n"
        "print(len({key.name for key in explained_keys()}))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    return int(result.stdout.split()[-1]) if result.returncode == 0 else "149 (counted by hand)"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()))
