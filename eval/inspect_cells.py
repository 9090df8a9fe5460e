"""Cells as an inspect_ai task: our engine as its model, our judge as its scorer, our statistics as its metrics.

An extra: nothing else imports this module, and inspect_ai is needed by nothing else but a model judge.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict

import anyio
from inspect_ai import Task
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageUser,
    GenerateConfig,
    Model,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import TaskState, generate
from inspect_ai.tool import ToolChoice, ToolInfo

from esr_train.errors import RunError
from eval.arms import Arm
from eval.metrics import METRICS, Gap
from eval.store import Trial, trial_from_json, trial_to_json
from eval.summary import estimate
from eval.trials import ConditionRun, Observer, Plan, Readings, cell_request, described, trial_key

TRIAL = "trial"
"""Key of a score's metadata under which the trial's row stands."""
GetTrial = Callable[[str], Awaitable[Trial]]
"""The trial of a cell, by the cell's key."""


def batches(keys: Sequence[str], run: Callable[[Sequence[str]], list[Trial]], rows: int) -> GetTrial:
    """Trials for concurrent callers. The first caller of a batch of neighbours has it run, in a thread; one at a time.

    Args:
        keys: of all cells, in order.
        run: a batch's keys -> their trials, in order; what it raises is raised for the batch's callers.
        rows: most cells of a batch.
    """
    batch_of = {key: keys[index // rows * rows :][:rows] for index, key in enumerate(keys)}
    trials: dict[str, Trial] = {}
    lock = anyio.Lock()

    async def get(key: str) -> Trial:
        async with lock:
            if key not in trials:
                trials.update(zip(batch_of[key], await anyio.to_thread.run_sync(run, batch_of[key]), strict=True))
        return trials[key]

    return get


@modelapi(name="esr")
class SteeredApi(ModelAPI):
    """Our engine as a model of inspect's. A message says by its metadata's `cell` which cell it is to be steered as.

    Args:
        get: gives trials.
        rows: requests that may be open at once.
    """

    def __init__(self, model_name: str, get: GetTrial, rows: int) -> None:
        super().__init__(model_name)
        self._get, self._rows = get, rows

    def max_connections(self) -> int:
        """As many as fit a batch."""
        return self._rows

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """One reply. Sampling is the recipe's; inspect's own settings are not applied."""
        cell = next((each.metadata["cell"] for each in input if each.metadata and "cell" in each.metadata), None)
        if cell is None:
            raise RunError("a message names no cell: this model answers the samples of its own task alone.")
        trial = await self._get(cell)
        stop = "stop" if trial.finish_reason == "stop" else "max_tokens"
        output = ModelOutput.from_content(self.model_name, trial.response[trial.prefix :], stop)  # type: ignore[arg-type]
        output.usage = ModelUsage(output_tokens=trial.tokens or 0, total_tokens=trial.tokens or 0)
        output.metadata = {"tokens": trial.tokens, "steered_tokens": trial.steered_tokens}
        return output


def cells_task(arm: Arm, condition: str, plan: Plan, rows: int) -> Task:
    """An arm under one condition, as a task that brings its own model.

    Args:
        rows: most requests of a batch.
    """
    cells = {cell.key: cell for cell in plan.cells}
    run = ConditionRun(arm, condition, plan, Readings())

    def trials(keys: Sequence[str]) -> list[Trial]:
        return run.trials([(trial_key(arm.name, condition, cells[key]), cells[key]) for key in keys], Observer())

    samples = []
    for key, cell in cells.items():
        prefix = plan.prefixes.get(key, "")
        request = cell_request(cell, key, plan.steerer, arm.variant, prefix)
        asked: list[ChatMessage] = [ChatMessageUser(content=request.prompt, metadata={"cell": key})]
        begun: list[ChatMessage] = [ChatMessageAssistant(content=prefix)] if prefix else []
        known = asdict(described(cell, plan.steerer.strength(cell)))
        samples.append(Sample(input=[*asked, *begun], id=key, metadata={"cell": known}))
    get = batches(list(cells), trials, rows)
    return Task(
        dataset=samples,
        solver=generate(),
        scorer=judged(get),
        model=Model(SteeredApi(arm.name, get, rows), GenerateConfig()),
        name=f"{condition}_{arm.name}",
        metadata={"arm": arm.name, "condition": condition, "judge": arm.judge.name, "sampling": asdict(arm.sampling)},
    )


def judged(get: GetTrial) -> Scorer:
    """The judge as a scorer: a score holds every metric of the response, and its trial's row as metadata."""

    async def score(state: TaskState, target: Target) -> Score:
        trial = await get(str(state.sample_id))
        values = {name: each.of(trial) for name, each in METRICS.items()}
        return Score(
            value={name: float("nan") if isinstance(value, Gap) else value for name, value in values.items()},
            explanation=trial.error or trial.judge_raw or None,
            metadata={TRIAL: trial_to_json(trial)},
        )

    @scorer(metrics=[clustered()], name="attempts")
    def attempts() -> Scorer:
        return score

    return attempts()


@metric
def clustered() -> Metric:
    """Every metric with its 95 % interval, clustered by latent (unsteered: by prompt), its n and its unscored."""

    def compute(scores: list[SampleScore]) -> dict[str, float]:
        trials = [trial_from_json(each.score.metadata[TRIAL]) for each in scores if each.score.metadata]
        found: dict[str, float] = {}
        for name in METRICS:
            numbers = estimate(trials, name)
            parts = {"": numbers.value, "_low": numbers.low, "_high": numbers.high}
            found |= {f"{name}{part}": value for part, value in parts.items() if value is not None}
            found |= {f"{name}_n": numbers.n, f"{name}_unscored": numbers.unscored}
        return found

    return compute  # type: ignore[return-value]
