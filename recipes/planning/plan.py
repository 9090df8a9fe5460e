"""What a recipe will cost, stage by stage: responses, tokens, questions, dollars, time and memory."""

from collections.abc import Callable
from dataclasses import dataclass

from esr_train.files import read_json
from esr_train.recipe import (
    JudgeSection,
    LikelihoodJudgeSection,
    LocalJudgeSection,
    ModelJudgeSection,
    Recipe,
    dump_recipe,
)
from eval.llm import PRICES, price
from recipes.planning.machine import GIB, Device, device_here, stated_device
from recipes.planning.sizes import generating_bytes, model_size, training_bytes
from recipes.planning.speeds import Speeds, by_figures, recorded, tried
from recipes.planning.workload import Batch, Lengths, Work, prompt_tokens, question_tokens, workload
from recipes.resources import Resources
from recipes.stages.stage_cache import FILE as STAGES

READ_TWICE = 2.5
"""Tokens that the likelihood judge reads of each that was written: with the question and without, prompts included."""
ANSWER = 3.0
"""Seconds until a language model behind an API has answered."""
REPORT = 5.0
"""Seconds that a report takes."""
START, START_TRAINING = 1.0, 5.0
"""Seconds that another stage takes beside its work: a model and libraries are loaded."""
LONGEST = 2.0
"""The longest row of a batch, to which others are padded, in mean rows."""
WRITTEN = (500.0, 300.0)
"""Tokens that a writer reads and writes for one question."""


@dataclass(frozen=True)
class Line:
    """One line of a plan; `took`: seconds, if its stages are done."""

    name: str
    work: Work
    tokens: float
    questions: float
    dollars: float | None
    seconds: float
    memory: float
    took: float | None


@dataclass(frozen=True)
class Plan:
    """What a run will cost.

    Args:
        heading: of which recipe, on what, by which speeds.
        lines: one for each stage or group of stages, in order.
        notes: what else should be known, a sentence each.
    """

    heading: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """What is still to be done."""
        return sum(line.seconds for line in self.lines if line.took is None)

    def text(self) -> str:
        """As a table."""
        head = ("", "stage", "responses", "tokens", "questions", "dollars", "time", "memory")
        rows = [head, *(_row(number, line) for number, line in enumerate(self.lines, start=1)), _total(self)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        shown = [
            "  ".join(
                f"{text:<{width}}" if column == 1 else f"{text:>{width}}"
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self.heading, *shown, *self.notes])


def make_plan(recipe: Recipe, device: str | None = None, count: int = 1) -> Plan:
    """The plan of a recipe on this machine, or on devices that are named.

    Speeds come from the run's own stages where there are some; else a small trial run of the model is made (once: what
    it showed is kept in the folder of runs). Named devices, and vLLM, are estimated from their makers' figures.

    Args:
        device: such as `h100`; None: what is here.

    Raises:
        InputError: for a device that is not known, or where a file of the recipe cannot be read.
    """
    return Planner(recipe, device, count).plan()


class Planner:
    """Plans a recipe, and does so again as its stages record how fast they are."""

    def __init__(self, recipe: Recipe, device: str | None = None, count: int = 1) -> None:
        self.recipe, self.is_stated = recipe, device is not None
        self.resources, self.size = Resources(recipe, asks=False), model_size(recipe)
        self.device = stated_device(device, count) if device else device_here(recipe)
        self.prompt = prompt_tokens(self.resources)
        self._first = self._first_speeds()

    def _first_speeds(self) -> Speeds:
        figures = self.is_stated or (self.recipe.engine.kind == "vllm" and self.device.flops)
        if figures:
            return by_figures(self.recipe, self.size, self.device, self.prompt)
        return tried(self.resources, self.device)

    def plan(self) -> Plan:
        """The plan as things stand now."""
        recipe = self.recipe
        speeds = self._first if self.is_stated else recorded(recipe, self._first)
        works = workload(self.resources, Lengths(self.prompt, speeds.reply, speeds.kept))
        lines = tuple(self._line(work, speeds) for work in works)
        count = f"{self.device.count} × " if self.device.count > 1 else ""
        heading = f"plan of {recipe.name} on {count}{self.device.name}\nspeeds: {speeds.source}"
        return Plan(heading, lines, tuple(_notes(recipe, lines, self.device)))

    def _line(self, work: Work, speeds: Speeds) -> Line:
        recipe, again = self.recipe, work.name.startswith("trials")
        written = {batch: (p.tokens if (p := speeds.pace(batch.kind)) else batch.tokens) for batch in work.batches}
        judges = [recipe.judge, *(recipe.judges if again else ())]
        asking = [each for each in judges if isinstance(each, ModelJudgeSection | LocalJudgeSection)]
        costs = [_dollars(recipe, section, written) for section in judges]
        writer = _writer(recipe, work)
        if writer:
            costs.append(_priced(recipe, writer, work.judged, WRITTEN))
        return Line(
            work.name,
            work,
            sum(batch.requests * tokens for batch, tokens in written.items()) + work.trained,
            work.judged * (len(asking) + bool(writer)),
            None if None in costs else sum(cost for cost in costs if cost),
            sum(_batch_seconds(recipe, b, t, speeds) for b, t in written.items())
            + work.read * speeds.read
            + work.trained * speeds.train
            + (REPORT if work.name == "report" else START_TRAINING if work.arm else START),
            self._memory(work),
            _took(recipe, work),
        )

    def _memory(self, work: Work) -> float:
        if work.arm:
            return training_bytes(self.recipe.for_arm(work.arm), self.size, LONGEST * work.row)
        return generating_bytes(self.recipe, self.size, self.prompt) if work.batches else 0.0


def _batch_seconds(recipe: Recipe, batch: Batch, tokens: float, speeds: Speeds) -> float:
    """Generating and judging; what was recorded includes both."""
    if pace := speeds.pace(batch.kind):
        return batch.requests * tokens * pace.seconds
    seconds = batch.requests * tokens * speeds.generate
    read, written = question_tokens(tokens)
    if isinstance(recipe.judge, LikelihoodJudgeSection):
        seconds += min(batch.judged, batch.requests) * tokens * READ_TWICE * speeds.read
    elif isinstance(recipe.judge, LocalJudgeSection):
        seconds += batch.judged * (read * speeds.read + written * speeds.generate)
    elif isinstance(recipe.judge, ModelJudgeSection):
        seconds += batch.judged * ANSWER / recipe.llm.concurrency
    return seconds


def _dollars(recipe: Recipe, section: JudgeSection, written: dict[Batch, float]) -> float | None:
    """What a judge costs on responses of so many tokens; None where its price is not known."""
    if not isinstance(section, ModelJudgeSection):
        return 0.0
    costs = [_priced(recipe, section.model, b.judged, question_tokens(tokens)) for b, tokens in written.items()]
    return None if None in costs else sum(cost for cost in costs if cost)


def _priced(recipe: Recipe, model: str, questions: float, tokens: tuple[float, float]) -> float | None:
    known = price(model, recipe.llm)
    if known is None:
        return None if questions else 0.0
    return questions * (tokens[0] * known[0] + tokens[1] * known[1]) / 1e6


def _writer(recipe: Recipe, work: Work) -> str | None:
    if not work.name.endswith(" rows"):
        return None
    sections = (recipe.for_arm(arm).data.source(work.name.removesuffix(" rows")) for arm in recipe.trained_arms)
    return next((str(writer) for section in sections if (writer := getattr(section, "writer", None))), None)


def _took(recipe: Recipe, work: Work) -> float | None:
    """Seconds that a line's stages took, if they are done."""
    seeds = [recipe.directory / f"seed-{seed}" for seed in recipe.seeds or ()]
    seconds = done = 0
    for folder in (recipe.directory, *seeds):
        file = folder / STAGES
        begun = {name: each for name, each in (read_json(file) if file.is_file() else {}).items() if work.covers(name)}
        if any(not record.get("done") for record in begun.values()):
            return None
        seconds += sum(record.get("made", {}).get("seconds", 0.0) for record in begun.values())
        done += sum(name.startswith(work.stages[0]) for name in begun)
    conditions = sum(batch.kind.startswith("trials/") for batch in work.batches)
    return seconds if done >= max(len(seeds), 1) * (conditions + 1) or (done and not conditions) else None


def _notes(recipe: Recipe, lines: tuple[Line, ...], device: Device) -> list[str]:
    notes = []
    written = recipe.directory / "recipe.yaml"
    if written.is_file() and written.read_text(encoding="utf-8") != dump_recipe(recipe):
        notes.append("the recipe is not the one that ran here: stages that are done may be made anew")
    if any(line.questions for line in lines):
        notes.append(f"dollars: list prices of {read_json(PRICES)['as_of']}, or llm.prices; `?`: not known")
    dollars = sum(line.dollars or 0.0 for line in lines if line.took is None)
    if recipe.llm.limit_dollars and dollars > recipe.llm.limit_dollars:
        notes.append(f"MORE than llm.limit_dollars ({recipe.llm.limit_dollars:g}): the run will stop there")
    if max(line.memory for line in lines) > device.memory:
        notes.append(f"MORE memory than the {device.memory / GIB:,.0f} GiB of {device.name}")
    return notes


def _row(number: int, line: Line) -> tuple[str, ...]:
    done = f"done in {duration(line.took)}" if line.took is not None else duration(line.seconds)
    memory = f"{line.memory / GIB:.1f} GiB" if line.memory else ""
    return (
        str(number),
        line.name,
        *_amounts(line.work.responses, line.tokens, line.questions, line.dollars),
        done,
        memory,
    )


def _total(plan: Plan) -> tuple[str, ...]:
    left = [line for line in plan.lines if line.took is None]
    dollars = None if any(line.dollars is None for line in left) else sum(line.dollars or 0.0 for line in left)
    sums = (sum(line.work.responses for line in left), sum(line.tokens for line in left))
    most = max((line.memory for line in left), default=0.0)
    name = "total" if len(left) == len(plan.lines) else "still to do"
    amounts = _amounts(*sums, sum(line.questions for line in left), dollars)
    return "", name, *amounts, duration(plan.seconds), f"{most / GIB:.1f} GiB" if most else ""


def _amounts(responses: float, tokens: float, questions: float, dollars: float | None) -> tuple[str, str, str, str]:
    cost = "?" if dollars is None else f"{dollars:,.2f}" if dollars else ""
    return _count(responses), _count(tokens), _count(questions), cost


def _count(value: float) -> str:
    if not value:
        return ""
    return f"{value:,.0f}" if value < 1e5 else f"{value / 1e3:,.0f} k" if value < 1e7 else f"{value / 1e6:,.0f} M"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a reader wants them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def announcing(planner: Planner, say: Callable[[str], None]) -> Callable[[str], None]:
    """Given a stage that begins, says which of the plan's lines that is, and how long it and the rest will take."""
    said: set[str] = set()
    names = planner.plan().lines

    def announce(stage: str) -> None:
        number = next((number for number, line in enumerate(names, start=1) if line.work.covers(stage)), 0)
        if not number or names[number - 1].name in said:
            return
        said.add(names[number - 1].name)
        lines = planner.plan().lines
        line, rest = lines[number - 1], sum(each.seconds for each in lines[number:])
        left = f"then about {duration(rest)} more" if number < len(lines) else "the last one"
        say(f"stage {number} of {len(lines)}: {line.name}, about {duration(line.seconds)}; {left}")

    return announce
