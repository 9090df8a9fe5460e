"""The architecture as a picture, drawn from the imports in the source: `python docs/architecture.py [FILE.svg]`."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("recipes", "data_gen", "eval", "esr_train")
"""From the top down: a floor imports from those below it."""
WIDTH, LEFT, RIGHT = 1080, 20, 150
CHARACTER, BOX, GAP, LINE = 7.1, 22, 6, 32
"""Pixels: the width of a character, a box's height, the gap between boxes, and the height of a row of boxes."""


@dataclass(frozen=True)
class Module:
    """A source file: its dotted name, its line count and the project's modules that it imports."""

    name: str
    lines: int
    imports: frozenset[str]

    @property
    def floor(self) -> str:
        """The top-level package."""
        return self.name.partition(".")[0]

    @property
    def short(self) -> str:
        """The name without the top-level package."""
        return self.name.partition(".")[2] or self.name


def read_modules(root: Path = ROOT) -> dict[str, Module]:
    """Every module of the four packages, by its dotted name."""
    paths = [path for floor in FLOORS for path in sorted((root / floor).rglob("*.py"))]
    sources = {_dotted(path.relative_to(root)): path.read_text(encoding="utf-8") for path in paths}
    return {
        name: Module(name, source.count("\n"), frozenset(_imported(ast.parse(source), set(sources)) - {name}))
        for name, source in sources.items()
    }


def floor_imports(modules: Mapping[str, Module]) -> Counter[tuple[str, str]]:
    """How many imports lead from one floor to another; entry points (`__main__`) left out."""
    return Counter(
        (module.floor, modules[target].floor)
        for module in modules.values()
        if not module.name.endswith("__main__")
        for target in module.imports
        if modules[target].floor != module.floor
    )


def levels(modules: Mapping[str, Module], floor: str) -> list[list[Module]]:
    """A floor's modules in rows: each stands above all that it imports on its own floor."""
    packages = {name.rpartition(".")[0] for name in modules}
    own = {n: m for n, m in modules.items() if m.floor == floor and "__" not in n and n not in packages}
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = 0  # what a circle of imports would find here; tests/test_imports.py allows none
            below = [height(target) for target in sorted(own[name].imports) if target in own]
            heights[name] = 1 + max(below, default=-1)
        return heights[name]

    rows: dict[int, list[Module]] = {}
    for name in sorted(own):
        rows.setdefault(height(name), []).append(own[name])
    return [rows[level] for level in sorted(rows, reverse=True)]


def picture(modules: Mapping[str, Module]) -> str:
    """The four floors as an SVG; a module's title (shown under the mouse) lists what it imports."""
    parts, y, middles = [], 10.0, {}
    for floor in FLOORS:
        drawn, height = _floor(floor, levels(modules, floor), y)
        middles[floor] = y + height / 2
        parts += drawn
        y += height + 14
    parts += _arrows(floor_imports(modules), middles)
    style = (
        "text{font:12px sans-serif;fill:currentColor}.floor{fill:currentColor;fill-opacity:.05}"
        ".box{fill:currentColor;fill-opacity:.09}.name{font-weight:bold;font-size:14px}"
        ".arrow{stroke:currentColor;stroke-opacity:.55;fill:none;stroke-width:1.4}.count{font-size:11px}"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" role="img" '
        'aria-label="The four packages and their modules; arrows are imports and point downwards">'
        f"<style>{style}</style>"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="currentColor"/></marker></defs>'
    )
    return head + "".join(parts) + "</svg>"


def _floor(name: str, rows: list[list[Module]], top: float) -> tuple[list[str], float]:
    """A floor's band with its boxes, and its height."""
    boxes, y = [], top + 32
    for row in rows:
        x = LEFT + 12.0
        for module in row:
            width = CHARACTER * len(module.short) + 14
            if x + width > WIDTH - RIGHT - 10:
                x, y = LEFT + 12.0, y + BOX + GAP
            boxes.append(_box(module, x, y, width))
            x += width + GAP
        y += LINE
    height = y - top
    count = sum(map(len, rows))
    lines = sum(module.lines for row in rows for module in row)
    band = f'<rect class="floor" x="{LEFT}" y="{top:.0f}" width="{WIDTH - LEFT - RIGHT}" height="{height:.0f}" rx="8"/>'
    label = f'<text class="name" x="{LEFT + 12}" y="{top + 21:.0f}">{name}</text>'
    size = f"{count} modules, {lines:,} lines"
    corner = f'<text x="{WIDTH - RIGHT - 12}" y="{top + 21:.0f}" text-anchor="end">{size}</text>'
    return [band, label, corner, *boxes], height


def _box(module: Module, x: float, y: float, width: float) -> str:
    title = escape(f"{module.name}, {module.lines} lines\nimports: {', '.join(sorted(module.imports)) or 'none'}")
    box = f'<rect class="box" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX}" rx="4"/>'
    name = f'<text x="{x + 7:.0f}" y="{y + 15:.0f}">{escape(module.short)}</text>'
    return f"<g><title>{title}</title>{box}{name}</g>"


def _arrows(counts: Counter[tuple[str, str]], middles: Mapping[str, float]) -> Iterator[str]:
    """Curves in the right margin, one for each pair of floors, with the number of imports."""
    edge = WIDTH - RIGHT
    for (upper, lower), count in sorted(counts.items()):
        distance = FLOORS.index(lower) - FLOORS.index(upper)
        start = middles[upper] + 12 * (distance - 2)
        end = middles[lower] + 12 * (2 - distance)
        bend = edge + 36 * distance
        yield (
            f'<path class="arrow" marker-end="url(#head)" '
            f'd="M{edge} {start:.0f}C{bend} {start:.0f} {bend} {end:.0f} {edge + 2} {end:.0f}"/>'
            f'<text class="count" x="{edge + 27 * distance + 4:.0f}" y="{(start + end) / 2:.0f}">{count}</text>'
        )


def _dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _imported(tree: ast.AST, known: set[str]) -> set[str]:
    """The project's modules that a source imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            names |= inner or {node.module}
    return names & known


if __name__ == "__main__":
    svg = picture(read_modules())
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(svg, encoding="utf-8")
    else:
        print(svg)
