"""Thresholds by probabilistic bisection: the strength at which a latent's first attempts score the target."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from esr_train.errors import InputError, RunError
from esr_train.files import read_json, write_json
from esr_train.recipe import CalibrationSection
from esr_train.steering.directions import Positions
from esr_train.steering.engine import Progress, Request, Sampling
from esr_train.transcript import SaeRef, VectorRef
from esr_train.values import typed
from eval.arms import Arm
from eval.cells import Prompt, derived_seed, fingerprint
from eval.judging.judge import JudgeItem, first_scores
from eval.store import RowStore

if TYPE_CHECKING:
    from esr_train.steering.directions import Direction

GRID_POINTS = 2_000
"""Strengths on which a posterior lives. The paper takes 10,000; its width is far above the step of either."""
PRIOR_WIDTH = 0.5
"""Standard deviation of the Gaussian prior, as a share of the bounds' distance: nearly flat between them."""
BOUND_MARGIN = 0.05
"""A threshold nearer to a bound than this share of their distance is flagged."""
LEAST_PROBABILITY = 1e-6
POOLED_FROM = 8
"""Latents from which on they share a prior that is fitted to all of them."""
APART = 0.1
"""Weight of the prior that is not fitted, for latents that are unlike the others."""
LEAST_SPREAD = 0.05
"""Least standard deviation of the fitted prior, in log strength."""
FITTINGS = 50
"""Steps of expectation maximisation after each round."""


Scores = tuple[float, ...]
"""First-attempt scores (0-100) of one latent's responses in one round, without the unscored."""


def score_store(path: Path) -> RowStore[Scores]:
    """Where `calibrate` keeps its rounds' scores."""
    return RowStore(path, lambda row: typed(Scores, row.get("scores"), "scores"), lambda scores: {"scores": scores})


@dataclass(frozen=True)
class FrozenThresholds:
    """What a file of thresholds holds.

    Args:
        key: what the thresholds depend on.
        thresholds: those at a bound included.
    """

    key: dict[str, Any]
    thresholds: tuple["Threshold", ...]


@dataclass(frozen=True)
class Threshold:
    """A latent's threshold.

    Args:
        latent, label: which latent, and what it stands for.
        norm: the threshold in median residual norms (the posterior's median).
        raw: the same in multiples of the decoder row.
        low, high: the posterior's central 90 % interval, in `norm` units.
        n: scored responses that the posterior has seen.
        bound: the bound that the threshold lies at, None within the bounds; a latent with one is left out.
        verified: mean first-attempt score at the threshold on prompts that calibration did not see; None if
            there was no scored response.
        verified_n: scored responses behind `verified`.
    """

    latent: int
    label: str | None
    norm: float
    raw: float
    low: float
    high: float
    n: int
    bound: Literal["low", "high"] | None
    verified: float | None = None
    verified_n: int = 0

    @property
    def spread(self) -> float:
        """The posterior's standard deviation in `norm` units, read off its 90 % interval as if it were Gaussian."""
        return (self.high - self.low) / 3.29


@dataclass(frozen=True)
class CalibrationPrompts:
    """The prompts of a calibration.

    Args:
        search: asked while bisecting; a latent is never asked about its own topic.
        verify: other prompts, on which the thresholds are checked.
    """

    search: Sequence[Prompt]
    verify: Sequence[Prompt]


def calibrate(
    arm: Arm,
    latents: Sequence["Direction"],
    prompts: CalibrationPrompts,
    section: CalibrationSection,
    *,
    positions: Positions = "all",
    seed: int = 0,
    store: RowStore[Scores] | None = None,
    progress: Progress | None = None,
) -> list[Threshold]:
    """Thresholds of all latents in lockstep: every round is one call of the engine with a query for each.

    Probabilistic bisection (Waeber, Frazier & Henderson 2011): the posterior of each threshold lives on a
    grid over `section.bounds`, its prior is Gaussian around their middle, and each round asks at the posterior's
    median. From eight latents on, a prior is fitted to all of them after each round (`pooled_prior`), which saves
    about half of the responses (benchmarks/results/calibration.md). With `section.stop_width` a round leaves out the
    latents whose posterior is already that narrow.

    Args:
        arm: the model (to recalibrate, the tuned one); its sampling is taken with `section.max_new_tokens`.
        seed: of prompts and sampling.
        store: the rounds' scores are kept here, so that a killed calibration goes on where it stopped; rows
            of other settings are ignored. One file a model: an engine does not tell models apart.
        progress: told of `response_count(len(latents), section)` responses in all.

    Raises:
        InputError: if the bounds do not increase from above 0, or a latent has no prompt of another topic.
        RunError: if a response was not steered.
    """
    low, high = section.bounds
    if not 0 < low < high:
        raise InputError(f"the bounds {low} and {high} do not increase from above 0", "calibration.bounds")
    if not latents:
        return []
    grid = np.linspace(low, high, GRID_POINTS)
    lockstep = _Lockstep(arm, tuple(latents), section, positions, seed, store, progress)
    posterior, seen = _bisected(lockstep, grid, prompts.search)
    thresholds = _thresholds(latents, posterior, grid, seen)
    return _verified(lockstep, thresholds, prompts.verify) if section.verify else thresholds


def _verified(lockstep: "_Lockstep", thresholds: Sequence[Threshold], prompts: Sequence[Prompt]) -> list[Threshold]:
    norms = [threshold.norm for threshold in thresholds]
    checked = lockstep.scores("verify", range(len(norms)), norms, prompts, lockstep.section.verify)
    return [
        replace(threshold, verified=float(np.mean(scores)) if scores else None, verified_n=len(scores))
        for threshold, scores in zip(thresholds, checked, strict=True)
    ]


def _bisected(lockstep: "_Lockstep", grid: np.ndarray, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Posteriors [latents, points] after all rounds, and how many scored responses each has seen, [latents]."""
    section, count, flat = lockstep.section, len(lockstep.latents), flat_prior(grid)
    evidence, seen = np.ones((count, GRID_POINTS)), np.zeros(count, dtype=int)
    posterior = weighted(flat, evidence)
    for number in range(section.rounds):
        asked_at = quantile(posterior, grid, 0.5)
        open_indices = still_wide(posterior, grid, section.stop_width)
        if lockstep.progress and len(open_indices) < count:
            lockstep.progress((count - len(open_indices)) * section.prompts, 0)
        scores = lockstep.scores(f"round {number}", open_indices, asked_at, prompts, section.prompts)
        for index, new in zip(open_indices, scores, strict=True):
            evidence[index] = updated(evidence[index], grid, asked_at[index], new, section.target)
            seen[index] += len(new)
        posterior = weighted(pooled_prior(evidence, grid, flat), evidence)
    return posterior, seen


def flat_prior(grid: np.ndarray) -> np.ndarray:
    """A nearly flat prior [points] around the middle of the bounds."""
    low, high = grid[0], grid[-1]
    prior: np.ndarray = np.exp(-0.5 * ((grid - (low + high) / 2) / (PRIOR_WIDTH * (high - low))) ** 2)
    return prior / prior.sum()


def weighted(prior: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """Posteriors [latents, points] of a prior [points] and each latent's evidence [latents, points]."""
    posterior: np.ndarray = prior * evidence
    return posterior / posterior.sum(axis=1, keepdims=True)


def pooled_prior(evidence: np.ndarray, grid: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """The prior [points] that thresholds of one model share: a Gaussian in log strength, and a tenth of `flat`.

    Mean and spread are those under which the evidence of all latents is likeliest (empirical Bayes by expectation
    maximisation). Where few latents are calibrated it is `flat`.

    Args:
        evidence: [latents, points], how likely each latent's scores are for each threshold.
        grid: [points], in `norm` units.
        flat: [points], a prior that is not fitted.
    """
    if len(evidence) < POOLED_FROM:
        return flat
    place = np.log(grid)
    mean = float(flat @ place)
    spread = float(np.sqrt(flat @ (place - mean) ** 2))
    for _ in range(FITTINGS):
        fitted = np.exp(-0.5 * ((place - mean) / spread) ** 2) / grid
        fitted *= (1 - APART) / fitted.sum()
        shares = fitted * evidence / ((fitted + APART * flat) @ evidence.T)[:, None]
        mass = shares.sum()
        mean = float((shares @ place).sum() / mass)
        spread = max(LEAST_SPREAD, float(np.sqrt((shares @ (place - mean) ** 2).sum() / mass)))
    return fitted + APART * flat


def still_wide(posterior: np.ndarray, grid: np.ndarray, stop_width: float | None) -> list[int]:
    """The indices of the latents whose posterior [latents, points] is not narrower than `stop_width` medians yet."""
    if stop_width is None:
        return list(range(len(posterior)))
    low, median, high = (quantile(posterior, grid, share) for share in (0.05, 0.5, 0.95))
    return np.flatnonzero(high - low > stop_width * median).tolist()


def response_count(latents: int, section: CalibrationSection) -> int:
    """How many responses a calibration takes at most."""
    return latents * (section.rounds * section.prompts + section.verify)


def updated(density: np.ndarray, grid: np.ndarray, at: float, scores: Sequence[float], target: float) -> np.ndarray:
    """The posterior [points] after `scores` (0-100) were seen at the strength `at`.

    With s the scores' mean (0-1) and m their number, the mean score at `at` is above the target with
    probability p = P(X > target), X ~ Beta(0.5 + m s, 0.5 + m (1 - s)): each score counts as one draw, under
    Jeffreys' prior. The paper's Beta(.5+5s, .5+5(1-s)) is the case m = 5. Scores fall with strength, so the
    threshold lies above `at` with probability p and below with 1 - p (the paper's flip of the sign where
    p < .5).
    """
    from scipy.special import betainc

    if not scores:
        return density
    count, mean = len(scores), float(np.mean(scores)) / 100
    above = 1 - betainc(0.5 + count * mean, 0.5 + count * (1 - mean), target / 100)
    above = min(max(float(above), LEAST_PROBABILITY), 1 - LEAST_PROBABILITY)
    result = density * np.where(grid > at, above, 1 - above)
    return result / result.sum()


def quantile(posterior: np.ndarray, grid: np.ndarray, share: float) -> np.ndarray:
    """Quantiles [latents] of posteriors [latents, points]."""
    return grid[(np.cumsum(posterior, axis=1) < share).sum(axis=1).clip(max=len(grid) - 1)]


def _thresholds(
    latents: Sequence["Direction"], posterior: np.ndarray, grid: np.ndarray, seen: np.ndarray
) -> list[Threshold]:
    low, median, high = (quantile(posterior, grid, share) for share in (0.05, 0.5, 0.95))
    margin = BOUND_MARGIN * (grid[-1] - grid[0])
    result = []
    for place, latent in enumerate(latents):
        norm = float(median[place])
        bound: Literal["low", "high"] | None = None
        if norm < grid[0] + margin:
            bound = "low"
        elif norm > grid[-1] - margin:
            bound = "high"
        strength = latent.strength(norm)
        ends = float(low[place]), float(high[place])
        result.append(
            Threshold(latent.latent, latent.label, strength.norm, strength.raw, *ends, int(seen[place]), bound)
        )
    return result


@dataclass(frozen=True)
class _Lockstep:
    """Asks for responses of all latents at once, each at its own strength."""

    arm: Arm
    latents: tuple["Direction", ...]
    section: CalibrationSection
    positions: Positions
    seed: int
    store: RowStore[Scores] | None
    progress: Progress | None

    def scores(
        self,
        name: str,
        indices: Sequence[int],
        norms: Sequence[float] | np.ndarray,
        prompts: Sequence[Prompt],
        count: int,
    ) -> list[list[float]]:
        """First-attempt scores of `count` responses for each latent at `indices`, without the unscored; one call."""
        keys = {index: self._key(name, self.latents[index], float(norms[index]), prompts, count) for index in indices}
        kept = self.store.by_key() if self.store else {}
        missing = [index for index, key in keys.items() if key not in kept]
        queries = [(self.latents[index], float(norms[index])) for index in missing]
        measured = self._measure(name, queries, prompts, count)
        rows = [(keys[index], tuple(scores)) for index, scores in zip(missing, measured, strict=True)]
        if self.store:
            self.store.append(rows)
        if self.progress and len(rows) < len(keys):
            self.progress((len(keys) - len(rows)) * count, 0)
        kept.update(rows)
        return [list(kept[key]) for key in keys.values()]

    def _measure(
        self, name: str, queries: Sequence[tuple["Direction", float]], prompts: Sequence[Prompt], count: int
    ) -> list[list[float]]:
        asked = [
            (latent, norm, prompt, number)
            for latent, norm in queries
            for number, prompt in enumerate(self._draw(name, latent, prompts, count))
        ]
        if not asked:
            return []
        requests = [
            self.arm.variant.apply(
                Request(
                    id=f"{name} / latent {latent.latent} / {number}",
                    prompt=prompt.text,
                    interventions=(latent.add(norm, self.positions),),
                    seed=derived_seed(self.seed, name, latent.latent, number),
                ),
                latent.label,
            )
            for latent, norm, prompt, number in asked
        ]
        sampling = replace(self.arm.sampling, max_new_tokens=self.section.max_new_tokens)
        completions = self.arm.engine.generate(requests, sampling, self.progress)
        for request, completion in zip(requests, completions, strict=True):
            if completion.steered_tokens == 0 and request.steers(completion):
                raise RunError(f"calibration: the response to {completion.id} was not steered.")
        items = [
            JudgeItem(prompt.text, completion.text, latent.label)
            for (latent, _, prompt, _), completion in zip(asked, completions, strict=True)
        ]
        first = first_scores(self.arm.judge, items)
        groups = [first[start : start + count] for start in range(0, len(first), count)]
        return [[score for score in group if score is not None] for group in groups]

    def _draw(self, name: str, latent: "Direction", prompts: Sequence[Prompt], count: int) -> list[Prompt]:
        others = [prompt for prompt in prompts if prompt.topic != latent.label]
        if not others:
            raise InputError(
                f"latent {latent.latent} ({latent.label}) has no prompt of another topic to calibrate on",
                "prompts.path",
                "Add prompts of other topics.",
            )
        Random(derived_seed(self.seed, "order", name, latent.latent)).shuffle(others)
        return [others[number % len(others)] for number in range(count)]

    def _key(self, name: str, latent: "Direction", norm: float, prompts: Sequence[Prompt], count: int) -> str:
        made = self.arm.engine.name, self.arm.judge.name, asdict(self.arm.sampling), self.positions, self.seed
        asked = self.section.model_dump(), prompts_digest(prompts), str(latent.source), norm, count
        return f"{name} / latent {latent.latent} / {hashlib.sha256(repr((made, asked)).encode()).hexdigest()[:16]}"


def calibration_key(
    model: str,
    source: SaeRef | VectorRef,
    judge: str,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    section: CalibrationSection,
    positions: Positions = "all",
) -> dict[str, Any]:
    """What thresholds depend on; frozen thresholds are valid for this key alone."""
    return {
        "model": model,
        # A file of vectors is what is in it, wherever it lies.
        **({"sae": asdict(source)} if isinstance(source, SaeRef) else {"vectors": source.sha256}),
        "judge": judge,
        "prompts": prompts_digest(prompts),
        "sampler": {**asdict(sampling), "positions": positions},
        "calibration": section.model_dump(mode="json"),
    }


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Hash of a set of prompts, whatever their order."""
    prints = sorted((fingerprint(prompt.text), prompt.topic) for prompt in prompts)
    return hashlib.sha256(json.dumps(prints).encode()).hexdigest()[:16]


def save_thresholds(path: Path | str, key: Mapping[str, Any], thresholds: Sequence[Threshold]) -> None:
    """Freeze thresholds under their key."""
    write_json(path, {"key": dict(key), "thresholds": [asdict(each) for each in thresholds]})


def load_thresholds(path: Path | str, key: Mapping[str, Any]) -> list[Threshold]:
    """Read frozen thresholds, those at a bound included.

    Raises:
        InputError: if they were frozen under another key (naming what differs), or the file is malformed.
    """
    frozen = read_thresholds(path)
    wanted = json.loads(json.dumps(key))
    differing = [name for name in {**wanted, **frozen.key} if wanted.get(name) != frozen.key.get(name)]
    if differing:
        changes = "; ".join(f"{name}: {frozen.key.get(name)!r}, now {wanted.get(name)!r}" for name in differing)
        raise InputError(
            f"the thresholds were frozen for another {', '.join(differing)} ({changes})",
            str(path),
            "Calibrate again in another run directory, or restore the setting.",
        )
    return list(frozen.thresholds)


def read_thresholds(path: Path | str) -> FrozenThresholds:
    """A file of frozen thresholds, whatever their key.

    Raises:
        InputError: if there is none, or it is malformed.
    """
    try:
        return typed(FrozenThresholds, read_json(path))
    except ValueError as error:
        raise InputError(f"this is not a file of thresholds ({error})", str(path), "Calibrate again.") from None
