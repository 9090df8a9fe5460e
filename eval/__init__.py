"""Measuring: cells, calibration, judging, statistics, the report.

    from eval import LexicalJudge, cluster_interval, esr_rate, judge_responses

    judged = judge_responses("anthropic/claude-haiku-4-5", prompts, responses)
    print(esr_rate(judged))
    print(cluster_interval([len(each.attempts) > 1 for each in judged if not each.error], latents))

The names below are loaded when they are first used: importing this package loads nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval.calibration import calibrate
    from eval.judging.judge import judge_responses, register_judge
    from eval.judging.lexical import LexicalJudge
    from eval.metrics import esr_rate, metric
    from eval.report.figures import figure
    from eval.statistics import cluster_interval
    from eval.store import read_trials
    from eval.summary import summarise

__all__ = [
    "LexicalJudge",
    "calibrate",
    "cluster_interval",
    "esr_rate",
    "figure",
    "judge_responses",
    "metric",
    "read_trials",
    "register_judge",
    "summarise",
]

_MODULES = {
    "LexicalJudge": "eval.judging.lexical",
    "calibrate": "eval.calibration",
    "cluster_interval": "eval.statistics",
    "esr_rate": "eval.metrics",
    "figure": "eval.report.figures",
    "judge_responses": "eval.judging.judge",
    "metric": "eval.metrics",
    "read_trials": "eval.store",
    "register_judge": "eval.judging.judge",
    "summarise": "eval.summary",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
