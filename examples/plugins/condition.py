"""An evaluation condition: steered the other way, away from what the direction stands for.

plugins: [examples/plugins/condition.py]
eval: {conditions: [steered, unsteered, opposite]}
"""

from dataclasses import replace

from eval.conditions import Condition, Setting, register_condition
from eval.trials import Plan


def opposite(setting: Setting) -> Plan:
    """The same cells at minus the threshold; they have no label, for nothing can be said to be about it."""
    cells = tuple(replace(cell, multiple=-1.0, label=None) for cell in setting.cells)
    return Plan(cells, setting.steerer)


register_condition(Condition("opposite", "Steered the other way", opposite))
