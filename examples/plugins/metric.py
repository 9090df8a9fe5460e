"""A metric: how many responses begin again within their first four tokens.

plugins: [examples/plugins/metric.py]
"""

from eval.metrics import Gap, Value, metric
from eval.store import Trial


@metric("early_restart_rate", "Early restart")
def early_restart_rate(trial: Trial) -> Value:
    """Whether the second attempt begins within four tokens."""
    if trial.error:
        return Gap.UNSCORED
    return float(trial.restart_token is not None and trial.restart_token <= 4)
