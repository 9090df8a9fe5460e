"""A figure: how many tokens each arm's steered responses have.

plugins: [examples/plugins/figure.py]
"""

from functools import partial
from typing import TYPE_CHECKING

from eval.report.drawing import arm_colours, svg_of
from eval.report.figures import Drawn, Material, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@figure("response_lengths", "How long responses are")
def response_lengths(material: Material) -> Drawn:
    """Tokens of every steered response, sorted."""
    lengths = {arm: sorted(row.tokens or 0 for row in material.steered(arm)) for arm in material.rows_by_arm}
    colours = arm_colours(list(lengths))

    def draw(axes: "Axes") -> None:
        for arm, tokens in lengths.items():
            axes.plot(tokens, color=colours[arm])
        axes.set_xlabel("responses, the shortest first")
        axes.set_ylabel("tokens")

    table = [(arm, tokens) for arm, all_tokens in lengths.items() for tokens in all_tokens]
    svg = partial(svg_of, draw, colours)
    return Drawn("Tokens of each steered response.", svg, [("arm", "tokens"), *table])
