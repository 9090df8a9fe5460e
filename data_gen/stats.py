"""The page that `esr data stats --html` writes: funnels, lengths, coverage and cues of transcript files."""

from collections.abc import Mapping
from pathlib import Path

from data_gen.inventory import Inventory, lines
from data_gen.inventory_figures import funnel_figures, inventory_figures
from eval.llm import Spent
from eval.report.drawing import ARM_COLOURS, inline_svg
from eval.report.material import Figure
from eval.report.template import render


def stats_page(
    title: str,
    inventories: Mapping[Path, Inventory],
    funnels: Mapping[str, Mapping[str, int]],
    requests: Mapping[str, Spent],
) -> str:
    """One HTML file that needs nothing else.

    Args:
        title: heads it.
        inventories: of every file, in order.
        funnels: source -> how many candidates ended how.
        requests: source -> what a writer was asked for it.
    """
    return render(
        "data_gen",
        "stats.html",
        title=title,
        colours=ARM_COLOURS,
        files=[(path.name, lines(each), _drawn(inventory_figures(each))) for path, each in inventories.items()],
        funnels=_drawn(funnel_figures(funnels)),
        requests={source: str(spent) for source, spent in requests.items()},
    )


def _drawn(figures: list[Figure]) -> list[tuple[Figure, str]]:
    palette = {str(place): colour for place, colour in enumerate(ARM_COLOURS)}
    return [(figure, inline_svg(figure.svg, palette)) for figure in figures]
