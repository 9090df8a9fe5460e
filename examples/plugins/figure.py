"""A figure: how many tokens each arm's steered responses have.

plugins: [examples/plugins/figure.py]
"""

from typing import TYPE_CHECKING

from eval.report.drawing import arm_colours, svg_of
from eval.report.figures import Drawn, Material, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@figure("response_lengths", "How long responses are")
def response_lengths(material: Material) -> Drawn | None:
    """Tokens of every steered response, sorted; None where no arm was steered."""
    lengths = {arm: sorted(row.tokens or 0 for row in material.steered(arm)) for arm in material.rows_by_arm}
    colours = arm_colours(list(lengths))
    if not any(lengths.values()):
        return None

    def draw(axes: "Axes") -> None:
        for arm, tokens in lengths.items():
            axes.plot(tokens, color=colours[arm])
        axes.set_xlabel("responses, the shortest first")
        axes.set_ylabel("tokens")

    table = [(arm, tokens) for arm, all_tokens in lengths.items() for tokens in all_tokens]
    return Drawn("Tokens of each steered response.", svg_of(draw, colours), [("arm", "tokens"), *table])
