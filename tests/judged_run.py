"""A whole evaluation in one function, small enough to be killed often: a made-up engine, a real judge client.

Two arms, steered and unsteered, their trials and `metrics.json`. `tests/test_judge_faults.py` runs it in a process
of its own.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esr_train.files import write_json
from esr_train.steering.engine import Completion, Progress, Request, Sampling
from eval import llm
from eval.arms import Arm
from eval.cells import Prompt, make_cells, unsteered
from eval.judging.lexical import LexicalJudge
from eval.judging.model_judge import ModelJudge
from eval.store import TrialStore
from eval.summary import summarise
from eval.trials import Plan, run_trials
from tests.llm_stub import LlmStub, without_waiting
from tests.test_trials import STEERER, FakeDirection

LEXICAL = LexicalJudge({"sailing": ["mast", "jib", "rope"], "baking": ["dough", "oven", "flour"]})
LATENTS = [FakeDirection(5, "baking"), FakeDirection(6, "baking")]
PROMPTS = [Prompt(f"How do I raise mast number {number}?", "sailing") for number in range(5)]
CELLS = make_cells(PROMPTS, LATENTS, 12, seed=3)  # type: ignore[arg-type]
CHUNK = 6
STEERED = (
    "Knead the dough {}. Wait, that's not right. Raise the mast with the rope.",
    "Knead the dough. Heat oven {}. Dust the flour. Hold the rope. Raise the mast. Trim the jib.",
    "Heat the oven. Dust the flour {} times.",
    "Knead the dough. Oops, wrong topic. Heat oven {}. Scratch that. Trim the jib.",
    "",
)


class WordyEngine:
    """Answers from a short list, by the row's seed and the arm's luck."""

    name = "wordy"

    def __init__(self, arm: str) -> None:
        self.arm = arm

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        return [self._complete(each) for each in requests]

    def _complete(self, request: Request) -> Completion:
        text = f"Raise the mast by {request.seed % 97} feet. Trim the jib."
        if request.interventions:
            text = STEERED[(request.seed + len(self.arm)) % len(STEERED)].format(request.seed % 97)
        return Completion(request.id, text, (1, 2, 3, 4), "stop", 3, 7 if request.interventions else 0)


def evaluate(folder: Path) -> None:
    """Run or go on with the evaluation in a folder; the stub's address and key are in the environment."""
    without_waiting()
    llm.TIMEOUT = 5
    judge = ModelJudge(llm.InspectLlm(LlmStub.model, concurrency=4), folder / "cache")
    rows = {}
    for arm in ("base", "tuned"):
        store = TrialStore(folder / "trials" / f"{arm}.jsonl")
        for condition, cells in (("steered", CELLS), ("unsteered", unsteered(CELLS))):
            under_test = Arm(WordyEngine(arm), judge, Sampling(), arm)
            run_trials(under_test, condition, Plan(tuple(cells), STEERER), store, chunk_rows=CHUNK)
        rows[arm] = store.rows()
    write_json(folder / "metrics.json", summarise(rows, 50, 0).to_json())


def evaluate_dying(folder: Path, environment: dict[str, str], moment: int) -> None:
    """`evaluate` in a process that kills itself when it opens or renames its `moment`th file (0: never)."""
    os.environ.update(environment)
    left = moment

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if (writes or event == "os.rename") and str(folder) in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    evaluate(folder)
