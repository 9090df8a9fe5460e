"""What a recipe makes: responses, tokens and questions, stage by stage. What nobody knows before it ran is assumed.

The assumptions: responses that are steered run to the most tokens they may have; of steered rows 57 % of the candidates
are kept (measured: 57 % on SmolLM2-135M, 58 % in the tiny world), of others 95 %.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from data_gen.latents.concreteness import LABELS_PER_QUESTION
from data_gen.sources import sources_steer, wanted_sources
from data_gen.steered import START_TOKENS
from esr_train.files import read_json
from esr_train.interchange import read_training_file
from esr_train.masking import label
from esr_train.recipe import Recipe, SourceSection, SteeredSection
from esr_train.training.settings import RolloutArguments, trainer_arguments
from esr_train.training.trainer import data_file
from eval.calibration import response_count
from eval.conditions import GOALS, Measured, measured_conditions
from eval.judging.judge import JudgeItem
from eval.judging.rubric import split_question
from eval.retention import MOST_REPLIES
from recipes.noticing.latent_search import FOLDER as DETECTORS
from recipes.noticing.latent_search import HELD_OUT, SEARCHED
from recipes.resources import Resources
from recipes.stages.goal_steering import PROMPTS as GOAL_PROMPTS
from recipes.stages.steering_latents import LATENTS, first_of_each
from recipes.stages.weights import takes_detectors
from recipes.using.attacks import DRAWS, MOVES, PROMPTS, STARTS, STEPS, TOKENS

KEPT = {"steered": 0.57}
KEPT_ELSE = 0.95
PASSED = 0.6
"""Of steered candidates, the share whose detour passes, so that an answer is asked for."""
CUE = 12
"""Tokens of a cue."""
SENTENCE = 20
"""Tokens of a sentence."""
PAIR = 3
"""What a pair of replies costs in preference training, in replies of SFT: two, each also read by the reference."""
WITH_REFERENCE = 1.5
"""What a reply costs in GRPO, in replies of SFT: the reference reads it, too."""
WORD = 1.4
"""Tokens of a word."""
VERDICT = 150
"""Tokens that a judge writes."""
LETTERS = 4
"""Letters of a token of English."""
RATED = 2
"""Labels that are rated for each that is concrete enough: a guess."""
QUESTIONS = 2
"""Of a trial a judge is asked for its attempts, and of one attempt whether it strays and returns."""
SAMPLE = 64
"""Rows or prompts whose tokens are counted."""


@dataclass(frozen=True)
class Batch:
    """Responses of one kind.

    Args:
        kind: under which their pace is measured, such as `trials/steered`.
        requests: how many are generated.
        tokens: of each, unless measured.
        judged: how many questions a judge is asked about them.
    """

    kind: str
    requests: float
    tokens: float
    judged: float


@dataclass(frozen=True)
class Work:
    """One line of the plan.

    Args:
        stages: how the names of its stages begin (see `stage_cache`).
        read: tokens that an arm reads of others' replies.
        trained: tokens that gradients run through, padding left out.
        arm: that is trained here.
        row: tokens of a row it is trained on.
    """

    name: str
    stages: tuple[str, ...]
    batches: tuple[Batch, ...] = ()
    read: float = 0.0
    trained: float = 0.0
    arm: str | None = None
    row: float = 0.0

    @property
    def responses(self) -> float:
        """Responses that are generated."""
        return sum(batch.requests for batch in self.batches)

    @property
    def judged(self) -> float:
        """Questions to a judge."""
        return sum(batch.judged for batch in self.batches)

    def covers(self, stage: str) -> bool:
        """Whether a stage belongs to this line."""
        return any(stage == each or stage.startswith((f"{each}/", f"{each}-")) for each in self.stages)


@dataclass(frozen=True)
class Lengths:
    """Tokens: of a rendered prompt, of a reply that nobody steers; and the share of candidates kept, by source."""

    prompt: float
    reply: float
    kept: Mapping[str, float]


def prompt_tokens(resources: Resources) -> float:
    """Tokens of a rendered prompt, on average."""
    recipe = resources.recipe
    if not recipe.prompts:
        return 64.0
    chosen = resources.prompts().normal[:SAMPLE]
    counts = [len(resources.tokenizer().encode(text, add_special_tokens=False)) for text in resources.rendered(chosen)]
    return sum(counts) / max(len(counts), 1)


def workload(resources: Resources, lengths: Lengths) -> list[Work]:
    """Every line of a run's plan, in order; what several seeds repeat is counted for all of them."""
    recipe = resources.recipe
    directions = _directions(resources)
    seeds = len(recipe.seeds or (0,))
    works = [Work("latents", ("latents", "frequency"), _ratings(recipe, directions))] if directions else []
    works += list(_calibration(recipe, directions))
    works += [_search(resources, directions, lengths)] if takes_detectors(recipe) else []
    works += [_goals(recipe, lengths)] if GOALS in recipe.eval.conditions else []
    for name, (recipe_of_arm, section) in _sources(recipe).items():
        works.append(Work(f"{name} rows", (f"data/sources/{name}",), (_rows(recipe_of_arm, name, section, lengths),)))
    works.append(_trials(recipe, "base", directions, lengths, seeds))
    for arm in recipe.arms:
        works += [_training(resources, arm, directions, lengths, seeds)] if arm in recipe.trained_arms else []
        works.append(_trials(recipe, arm, directions, lengths, seeds))
    return [*works, Work("report", ("report",))]


def question_tokens(reply: float) -> tuple[float, float]:
    """Tokens that a language model reads and writes to judge one response."""
    empty = split_question(JudgeItem("How do you fold a fitted sheet?", "", "a topic"))
    return len(empty) / LETTERS + reply, float(VERDICT)


def _directions(resources: Resources) -> int:
    """Latents or vectors in play: chosen ones if they are, or else as many as labels and limits leave."""
    recipe = resources.recipe
    if not recipe.vectors and not (recipe.sae and recipe.sae.labels):
        return 0
    chosen = recipe.directory / LATENTS
    if chosen.is_file():
        return sum(map(len, read_json(chosen)["splits"].values()))
    topics = set() if recipe.vectors or not recipe.prompts else set(resources.prompts().topics)
    first, _ = first_of_each(resources.labels(), topics, recipe.latents.per_label)
    return min(len(first), recipe.latents.limit or len(first))


def _ratings(recipe: Recipe, directions: int) -> tuple[Batch, ...]:
    """Questions about how concrete labels are."""
    asked = recipe.latents.concreteness is not None
    questions = math.ceil(RATED * directions / LABELS_PER_QUESTION)
    return (Batch("concreteness", 0, 0, questions),) if asked else ()


def _calibration(recipe: Recipe, directions: int) -> Iterator[Work]:
    steers = any(name != "unsteered" for name in recipe.eval.conditions)
    if directions and (steers or any(sources_steer(recipe.for_arm(arm).data) for arm in recipe.trained_arms)):
        count = response_count(directions, recipe.calibration)
        yield Work("calibrate", ("calibrate",), (Batch("calibrate", count, recipe.calibration.max_new_tokens, count),))


def _search(resources: Resources, directions: int, lengths: Lengths) -> Work:
    """The search for detectors: own replies, read behind the own prompt, behind another, and under steering."""
    pools = resources.prompts()
    replies = min(SEARCHED, len(pools.train)) + min(HELD_OUT, len(pools.test))
    readings = 3 if directions else 2
    read = readings * replies * (lengths.prompt + lengths.reply)
    return Work(DETECTORS, (DETECTORS,), (Batch(DETECTORS, replies, lengths.reply, 0),), read)


def _goals(recipe: Recipe, lengths: Lengths) -> Work:
    """Own replies with and without each instruction, those to test prompts read with it and without; thresholds."""
    goals, section = len(recipe.eval.goals), recipe.calibration
    count = response_count(goals, section)
    read = 2 * 2 * GOAL_PROMPTS * goals * (lengths.prompt + lengths.reply)
    own = Batch(GOALS, 2 * GOAL_PROMPTS * (1 + goals), lengths.reply, 0)
    return Work(GOALS, (GOALS,), (own, Batch("calibrate", count, section.max_new_tokens, count)), read)


def _sources(recipe: Recipe) -> dict[str, tuple[Recipe, SourceSection]]:
    """Every source that an arm asks for, with the largest number of rows that any arm wants of it."""
    found: dict[str, tuple[Recipe, SourceSection]] = {}
    for arm in recipe.trained_arms:
        own = recipe.for_arm(arm)
        for source, section in {} if own.train.data else wanted_sources(own.data).items():
            if source.name not in found or found[source.name][1].rows < section.rows:
                found[source.name] = own, section
    return found


def _rows(recipe: Recipe, name: str, section: SourceSection, lengths: Lengths) -> Batch:
    candidates = section.rows / lengths.kept.get(name, KEPT.get(name, KEPT_ELSE))
    kind = f"data/{name}"
    if isinstance(section, SteeredSection):
        begun = bool(section.start[1])
        parts = [
            (candidates * begun, START_TOKENS * section.start[1]),
            (candidates, section.max_new_tokens or recipe.sampling.max_new_tokens),
            (candidates * PASSED, lengths.reply),
        ]
        requests = sum(count for count, _ in parts)
        tokens = sum(count * tokens for count, tokens in parts) / requests
        return Batch(kind, requests, tokens, candidates * (1 + PASSED))
    if getattr(section, "writer", None):
        return Batch(kind, 0, 0, 2 * candidates)
    each = 2 if name in ("prompted", "brevity") else 1
    return Batch(kind, each * candidates, lengths.reply, each * candidates)


def _training(resources: Resources, arm: str, directions: int, lengths: Lengths, seeds: int) -> Work:
    recipe = resources.recipe.for_arm(arm)
    args = trainer_arguments(recipe)
    rows, tokens = _training_rows(resources, arm, lengths)
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    replies = args.num_generations * args.num_iterations if isinstance(args, RolloutArguments) else 1
    steps = args.optimiser_steps(rows * replies)
    probes = steps // recipe.train.probe.every * 2 * recipe.train.probe.trials if recipe.train.probe else 0
    batches = [Batch("probe", seeds * probes, recipe.sampling.max_new_tokens, seeds * probes)] if probes else []
    cost = {"sft": 1.0, "dpo": PAIR}.get(recipe.train.method, WITH_REFERENCE)
    if isinstance(args, RolloutArguments):
        most = args.max_completion_length or recipe.sampling.max_new_tokens
        count, tokens = seeds * steps * step / args.num_iterations, lengths.prompt + most
        batches.append(Batch("rollouts", count, most, count))
    trained = seeds * steps * step * tokens * cost
    if recipe.train.live and recipe.train.live.adaptive:
        trained += _attack(directions * _train_share(recipe), lengths, seeds)
    return Work(f"train {arm}", (f"train/{arm}", f"data/{arm}"), tuple(batches), 0, trained, arm, tokens)


def _training_rows(resources: Resources, arm: str, lengths: Lengths) -> tuple[float, float]:
    """How many rows an arm is trained on, and how many tokens one has; counted if they are there."""
    recipe = resources.recipe.for_arm(arm)
    file = data_file(resources.recipe, arm, resources.recipe.directory)
    if file.is_file():
        rows = read_training_file(file)
        counted = [len(label(resources.tokenizer(), row, recipe.train.loss).input_ids) for row in islice(rows, SAMPLE)]
        return len(rows), sum(counted) / max(len(counted), 1)
    wanted = {source.name: section for source, section in wanted_sources(recipe.data).items()}
    kinds = [(section.rows, _row_tokens(recipe, section, lengths)) for section in wanted.values()]
    total = sum(count for count, _ in kinds)
    return total, sum(count * tokens for count, tokens in kinds) / max(total, 1)


def _row_tokens(recipe: Recipe, section: SourceSection, lengths: Lengths) -> float:
    answer = lengths.prompt + lengths.reply
    if not isinstance(section, SteeredSection):
        return answer + (lengths.reply + CUE if section is recipe.data.prompted else 0)
    if section.answer_words:
        answer = lengths.prompt + min(lengths.reply, WORD * section.answer_words)
    words = WORD * sum(section.cut_words) / 2
    whole = min(SENTENCE * sum(section.cut) / 2, section.max_new_tokens or recipe.sampling.max_new_tokens)
    detour = section.mid_sentence * words + (1 - section.mid_sentence) * whole
    drift = WORD * sum(section.start) / 2 + (detour + CUE) * (1 + section.second_detour)
    return answer + (1 - section.plain) * drift


def _attack(directions: float, lengths: Lengths, seeds: int) -> float:
    """Tokens that gradients run through to move directions once."""
    passes = seeds * math.ceil(directions) * 2 * PROMPTS * (STEPS + 1)
    return passes * (lengths.prompt + TOKENS)


def _trials(recipe: Recipe, arm: str, directions: int, lengths: Lengths, seeds: int) -> Work:
    section, batches, moved = recipe.eval, [], 0.0
    for measured in measured_conditions(section, None if arm == "base" else recipe.arms[arm].conditions):
        if arm == "base" and not measured.condition.for_plain_base:
            continue
        batches.append(_condition(recipe, measured, lengths, seeds))
        if measured.name == "steered_recalibrated":
            count = seeds * response_count(math.ceil(directions * _test_share(recipe)), recipe.calibration)
            batches.append(Batch("calibrate", count, recipe.calibration.max_new_tokens, count))
        if measured.name == "adaptive":
            attacked = min(directions * _test_share(recipe), section.control_trials or section.trials)
            compared = seeds * math.ceil(attacked) * PROMPTS * DRAWS * MOVES
            batches.append(Batch("attack", compared, recipe.sampling.max_new_tokens, compared))
            moved = STARTS * _attack(attacked, lengths, seeds)
    read = seeds * min(MOST_REPLIES, section.trials) * (lengths.prompt + lengths.reply)
    read = read if "unsteered" in section.conditions else 0.0
    goals = sum(batch.requests for batch in batches if batch.kind == f"trials/{GOALS}")
    read += 2 * goals * (lengths.prompt + recipe.sampling.max_new_tokens)
    kinds = ("trials", "retention", "calibrate", "merge", "scale", "attack", "beginnings", "obedience")
    stages = tuple(f"{kind}/{arm}" for kind in kinds)
    return Work(f"trials {arm}", stages, tuple(batches), read, moved)


def _condition(recipe: Recipe, measured: Measured, lengths: Lengths, seeds: int) -> Batch:
    section = recipe.eval
    every = measured.condition.runs_every_cell
    count = seeds * (section.trials if every else section.control_trials or section.trials)
    steered = measured.name != "switched_off" and not measured.name.startswith("unsteered")
    tokens = recipe.sampling.max_new_tokens if steered else lengths.reply
    return Batch(f"trials/{measured.name}", count, tokens, QUESTIONS * count)


def _test_share(recipe: Recipe) -> float:
    return recipe.prompts.splits.test if recipe.prompts else 1.0


def _train_share(recipe: Recipe) -> float:
    return 1 - recipe.prompts.splits.test - recipe.prompts.splits.validation if recipe.prompts else 1.0
