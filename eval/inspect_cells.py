"""Cells as an inspect_ai task: our engine as its model, our judge as its scorer, our statistics as its metrics.

An extra: nothing else imports this module, and inspect_ai is needed by nothing else but a model judge.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

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
from esr_train.restarts import find_cues
from esr_train.steering.engine import Completion, Request
from eval.arms import Arm
from eval.cells import Cell
from eval.judging.judge import JudgeItem, Judgement
from eval.metrics import METRICS, Gap
from eval.store import Trial, trial_from_json, trial_to_json
from eval.summary import estimate
from eval.trials import Plan, Steerer, cell_request, check_steering, described

TRIAL = "trial"
"""Key of a score's metadata under which the trial's row stands."""
WAIT = 0.05
"""Seconds for which a batch waits for others to join."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class Asked(Generic[Item, Result]):
    """An item on its way through a batch."""

    item: Item
    result: Result | None = None
    error: Exception | None = None


class Batcher(Generic[Item, Result]):
    """Gathers what concurrent callers ask for, and works on it in batches, one at a time, in a thread.

    Args:
        work: items -> results, in order.
        rows: most items of a batch.
    """

    def __init__(self, work: Callable[[list[Item]], Sequence[Result]], rows: int) -> None:
        self._work, self._rows = work, rows
        self._waiting: list[Asked[Item, Result]] = []
        self._lock: anyio.Lock | None = None

    async def __call__(self, item: Item) -> Result:
        """The item's result; what goes wrong with a batch is raised for each of its items."""
        self._lock = self._lock or anyio.Lock()
        asked: Asked[Item, Result] = Asked(item)
        self._waiting.append(asked)
        await anyio.sleep(WAIT)
        async with self._lock:
            while asked in self._waiting:
                batch, self._waiting = self._waiting[: self._rows], self._waiting[self._rows :]
                # The thread fills the batch in, so that a caller who is cancelled meanwhile takes nobody's result away.
                await anyio.to_thread.run_sync(self._fill, batch)
        if asked.error:
            raise asked.error
        assert asked.result is not None
        return asked.result

    def _fill(self, batch: list[Asked[Item, Result]]) -> None:
        try:
            for asked, result in zip(batch, self._work([each.item for each in batch]), strict=True):
                asked.result = result
        except Exception as error:
            for asked in batch:
                asked.error = error


@modelapi(name="esr")
class SteeredApi(ModelAPI):
    """Our engine as a model of inspect's. A message says by its metadata's `cell` which cell it is to be steered as.

    Args:
        model_name: the arm's name.
        complete: cell key -> completion.
        rows: requests that may be open at once.
    """

    def __init__(self, model_name: str, complete: Callable[[str], Any], rows: int) -> None:
        super().__init__(model_name)
        self._complete, self._rows = complete, rows

    def max_connections(self) -> int:
        """As many as fit a batch."""
        return self._rows

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """One completion. Sampling is the recipe's; inspect's own settings are not applied."""
        cell = next((each.metadata["cell"] for each in input if each.metadata and "cell" in each.metadata), None)
        if cell is None:
            raise RunError("a message names no cell: this model answers the samples of its own task alone.")
        made: Completion = await self._complete(cell)
        stop = "stop" if made.finish_reason == "stop" else "max_tokens"
        output = ModelOutput.from_content(self.model_name, made.text, stop)  # type: ignore[arg-type]
        tokens = len(made.token_ids)
        output.usage = ModelUsage(
            input_tokens=made.prompt_tokens, output_tokens=tokens, total_tokens=made.prompt_tokens + tokens
        )
        output.metadata = {"tokens": tokens, "steered_tokens": made.steered_tokens}
        return output


def cells_task(arm: Arm, condition: str, plan: Plan, rows: int) -> Task:
    """An arm under one condition, as a task that brings its own model.

    Args:
        arm: the model under test.
        condition: its name.
        plan: what is run.
        rows: most requests of a batch.
    """
    cells = {cell.key: cell for cell in plan.cells}
    requests = {
        key: cell_request(cell, key, plan.steerer, arm.variant, plan.prefixes.get(key, ""))
        for key, cell in cells.items()
    }

    def work(keys: list[str]) -> list[Completion]:
        batch = [requests[key] for key in keys]
        completions = arm.engine.generate(batch, arm.sampling)
        check_steering(arm.name, batch, completions)
        return completions

    completions: Batcher[str, Completion] = Batcher(work, rows)

    async def complete(key: str) -> Completion:
        return await completions(key)

    return Task(
        dataset=[_sample(cell, requests[key], plan.steerer) for key, cell in cells.items()],
        solver=generate(),
        scorer=judged(arm, condition, plan, rows),
        model=Model(SteeredApi(arm.name, complete, rows), GenerateConfig()),
        name=f"{condition}_{arm.name}",
        metadata={"arm": arm.name, "condition": condition, "judge": arm.judge.name, "sampling": asdict(arm.sampling)},
    )


def _sample(cell: Cell, request: Request, steerer: Steerer) -> Sample:
    asked: list[ChatMessage] = [ChatMessageUser(content=request.prompt, metadata={"cell": cell.key})]
    begun: list[ChatMessage] = [ChatMessageAssistant(content=request.prefix)] if request.prefix else []
    return Sample(
        input=[*asked, *begun], id=cell.key, metadata={"cell": asdict(described(cell, steerer.strength(cell)))}
    )


def judged(arm: Arm, condition: str, plan: Plan, rows: int) -> Scorer:
    """The judge as a scorer: a score holds every metric of the response, and its trial's row as metadata."""
    cells = {cell.key: cell for cell in plan.cells}
    verdicts: Batcher[JudgeItem, Judgement] = Batcher(arm.judge.judge, rows)

    async def score(state: TaskState, target: Target) -> Score:
        cell = cells[str(state.sample_id)]
        prefix = plan.prefixes.get(cell.key, "")
        response = prefix + state.output.completion
        found = await verdicts(JudgeItem(cell.prompt, response, cell.label, recovery=True))
        made = state.output.metadata or {}
        trial = Trial(
            key=cell.key,
            arm=arm.name,
            condition=condition,
            seed=cell.seed,
            cell=described(cell, plan.steerer.strength(cell)),
            engine=arm.engine.name,
            sampling=arm.sampling,
            prefix=len(prefix),
            response=response,
            finish_reason=None,
            tokens=made.get("tokens"),
            steered_tokens=made.get("steered_tokens"),
            attempts=found.attempts,
            cue=bool(find_cues(response)),
            judge=found.judge,
            judge_raw=found.raw,
            flags=found.flags,
            error=found.error,
        )
        values = {name: each.of(trial) for name, each in METRICS.items()}
        return Score(
            value={name: float("nan") if isinstance(value, Gap) else value for name, value in values.items()},
            explanation=found.error or found.raw or None,
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
