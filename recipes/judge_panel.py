"""The recipe's further judges: asked about the finished trials, and compared with the first."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from esr_train.errors import InputError
from esr_train.files import write_json
from eval.judging.agreement import Agreement, agreement, judge_again, judgement_store
from eval.judging.judge import Judge
from eval.progress import progress_bar
from eval.store import Trial
from recipes.pipeline import Experiment

NAME = "agreement.json"


def write_agreement(
    top: Experiment, parts: Sequence[Experiment], rows: Mapping[str, Sequence[Trial]]
) -> Agreement | None:
    """Write `agreement.json` in the top directory if the recipe names further judges, else remove an old one.

    Args:
        parts: their judgements lie in `judgements/<judge>.jsonl` in their own directories.
        rows: arm -> the trials of all parts, as the recipe's first judge scores them.
    """
    path = top.directory / NAME
    if not top.world.other_judges:
        path.unlink(missing_ok=True)
        return None
    panel = {top.world.judge.name: rows}
    for number, judge in enumerate(top.world.other_judges):
        if judge.name in panel:
            raise InputError(
                f"the judge {judge.name} is named twice",
                f"judges.{number}",
                "Remove it; a model is asked a second time (test-retest) under another `repeat`.",
            )
        panel[judge.name] = _judged(judge, parts)
    found = agreement(panel, top.recipe.eval.bootstrap, top.recipe.seed)
    write_json(path, asdict(found))
    return found


def _judged(judge: Judge, parts: Sequence[Experiment]) -> dict[str, list[Trial]]:
    found: dict[str, list[Trial]] = {}
    for part in parts:
        store = judgement_store(part.directory / "judgements" / f"{re.sub(r'[^A-Za-z0-9.#-]+', '_', judge.name)}.jsonl")
        for arm, trials in part.trials().items():
            with progress_bar(len(trials), f"{judge.name} on {arm}") as progress:
                found.setdefault(arm, []).extend(judge_again(judge, trials, store, lambda rows: progress(rows, 0)))
    return found
