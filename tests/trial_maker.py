"""Trials made up for tests."""

from typing import Any

from eval.store import Trial, trial_from_json


def made(**changes: Any) -> Trial:
    """A trial in which nothing happened, with these keys of its JSON form changed."""
    plain = {
        "key": "a", "arm": "base", "condition": "steered", "seed": 0,
        "cell": {
            "prompt": "How do you fold a sheet?", "topic": "linen", "latent": 7, "label": "baking",
            "strength": {"raw": 200.0, "norm": 0.6}, "seed": 0,
        },
        "engine": "e", "sampling": {}, "response": "Fold it.", "finish_reason": "stop", "tokens": 20,
        "steered_tokens": 40, "attempts": [], "cue": False, "judge": "lexical", "judge_raw": "", "flags": {},
        "error": None,
    }  # fmt: skip
    return trial_from_json(plain | changes)
