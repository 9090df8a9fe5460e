"""The course of a run's episodes: the detectors' sum at every token of replies that restart, and of others."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from esr_train.errors import InputError
from esr_train.files import replacing, write_json
from esr_train.recipe import Recipe
from esr_train.restarts import attempts, find_cues
from esr_train.steering.directions import LoadedSae
from esr_train.steering.monitored_engine import Monitorable
from esr_train.steering.token_reading import Activations, States, with_reply
from eval.course import Course, Rising, contrasts, matched, region_means, write_token_sums
from eval.detectors import Classes, discovered, separation
from eval.report.course_figures import course_figures, course_table, episodes_page
from eval.report.drawing import save_figures
from eval.statistics import cluster_of
from eval.store import Trial, read_trials
from eval.summary import STEERED
from recipes.experiment import Experiment, open_experiment
from recipes.noticing.latent_search import FOUND, known_detectors
from recipes.noticing.monitor_eval import arms_with_trials, off_topic_sentences, trial_requests
from recipes.noticing.monitors import monitorable

FOLDER = "course"
TOKENS = "tokens.jsonl"
"""The sum at every token of the replies that were read."""
RECENT = 8
"""Tokens before a restart in which a latent's activation may rise."""
MOST_RISING = 12
CERTAIN = 0.05
TAKES_BACK = re.compile(
    r"\b(wait|mistake\w*|wrong|correct(?:ion|ing|s)?|apolog\w+|sorry|off.?topic|restart\w*|backtrack\w*|revis\w+|"
    r"reconsider\w*|contradict\w*|error\w*|digress\w*)\b",
    re.IGNORECASE,
)
"""Labels of latents that may have to do with taking something back."""


@dataclass(frozen=True, eq=False)
class Spot:
    """Where a reply is to be looked at: see `Course`."""

    trial: Trial
    at: int
    regions: dict[str, tuple[int, int]]


def course(recipe: Recipe, directory: Path | None, arm: str | None, latents: Sequence[int]) -> list[str]:
    """Read an arm's steered replies and write `course/<arm>/`; returns lines for a terminal.

    Args:
        recipe: of the run.
        directory: where it lies, if not where the recipe puts it.
        arm: whose replies; None: the first with an adapter, trained here or given.
        latents: that are summed; none: the off-topic detectors that `esr latents search` found.

    Raises:
        InputError: without latents, or with fewer than two replies that restart.
    """
    with open_experiment(recipe, directory) as experiment:
        adapters = dict(arms_with_trials(experiment))
        arm = arm or next((name for name in adapters if name != "base"), "base")
        if arm not in adapters:
            raise InputError(f"there are no trials of the arm {arm!r}", "--arm", f"Take {', '.join(adapters)}.")
        sae = experiment.resources.read_sae()
        chosen = tuple(latents) or _detectors(experiment)
        sae.check_use("read", chosen)
        engine = monitorable(experiment.resources.engine(adapters[arm]))
        restarting, others, paired = _spots(experiment, engine.tokenizer, arm)
        spots = [*restarting, *others]
        courses, rises = _read(experiment, engine, sae, chosen, spots)
        split = len(restarting)
        means, pairs = region_means(courses[:split]), contrasts(courses[:split])
        rising = rising_latents(experiment, rises[split:], rises[paired])
        folder = experiment.directory / FOLDER / arm
        save_figures(folder, course_figures(courses[:split], courses[split:], means))
        with replacing(folder / "episodes.html") as file:
            file.write(episodes_page(f"{recipe.name}: {arm}", courses[:split]))
        write_token_sums(folder / TOKENS, courses)
        found = {"latents": chosen, "regions": means, "contrasts": pairs, "rising": rising}
        write_json(folder / "course.json", {"schema": 1, "arm": arm, **_plain(found)})
        lines = course_table(means, pairs, rising, (split, len(others)))
        return [
            *lines,
            f"{folder}: course.json, {TOKENS}, episode.svg, overlay.svg, regions.svg, episodes.html",
            f"`esr eval report {experiment.directory}` writes a report whose transcripts can be coloured by the sum",
        ]


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    regions = {name: asdict(each) for name, each in found["regions"].items()}
    return {
        "latents": list(found["latents"]),
        "regions": regions,
        "contrasts": [asdict(each) for each in found["contrasts"]],
        "rising": [asdict(each) for each in found["rising"]],
    }


def _detectors(experiment: Experiment) -> tuple[int, ...]:
    found = known_detectors(experiment)
    if found is None:
        raise InputError("nothing says which latents", "--latents", "Name some, or run `esr latents search` first.")
    chosen = found.of("off_topic").chosen
    if not chosen:
        raise InputError("the search found no latent", FOUND, "Name some with --latents.")
    return chosen


def _spots(experiment: Experiment, tokenizer: Any, arm: str) -> tuple[list[Spot], list[Spot], list[int]]:
    """Steered replies that restart behind some text; others, looked at at the same tokens; whose token each has."""
    part = experiment.parts()[0]
    trials = [
        trial
        for trial in read_trials(part.directory / "trials" / f"{arm}.jsonl")
        if trial.condition == STEERED and trial.response.strip() and not trial.prefix
    ]
    restarting = [trial for trial in trials if len(attempts(trial.response)) > 1]
    detours = off_topic_sentences(experiment, restarting, range(len(restarting)))
    spots = [spot_of(tokenizer, trial, detours.get(number)) for number, trial in enumerate(restarting)]
    spots = [spot for spot in spots if spot.at > 1]
    if len(spots) < 2:
        raise InputError(f"{len(spots)} steered replies of the arm {arm!r} restart", str(part.directory / "trials"))
    quiet = [trial for trial in trials if not find_cues(trial.response)]
    lengths = [len(tokenizer.encode(trial.response, add_special_tokens=False)) for trial in quiet]
    pairs = matched([spot.at for spot in spots], lengths)
    others = [Spot(quiet[other], spots[number].at, {}) for number, other in pairs]
    return spots, others, [number for number, _ in pairs]


def spot_of(tokenizer: Any, trial: Trial, detour: tuple[int, int] | None) -> Spot:
    """A reply's regions in tokens: up to the first off-topic sentence, up to the restart, the cue, and the rest."""
    text = trial.response
    restart = attempts(text)[1][0]
    cue = next((end for start, end in find_cues(text) if start <= restart < end), restart)
    begins = min(detour[0], restart) if detour else restart
    borders = [0, begins, restart, cue, attempts(text)[1][1]]
    tokens = [len(tokenizer.encode(text[:border], add_special_tokens=False)) for border in borders]
    names = ("before", "detour", "cue", "answer")
    regions = {name: (tokens[n], tokens[n + 1]) for n, name in enumerate(names) if tokens[n + 1] > tokens[n]}
    return Spot(trial, tokens[2], regions)


def _read(
    experiment: Experiment, engine: Monitorable, sae: LoadedSae, latents: Sequence[int], spots: Sequence[Spot]
) -> tuple[list[Course], NDArray[np.float32]]:
    """The courses, and every latent's rise before each spot, [replies, n_latents]."""
    requests = trial_requests(experiment, [spot.trial for spot in spots])
    texts = [spot.trial.response for spot in spots]
    rises, courses, summed = np.zeros((len(spots), sae.n_latents), np.float32), [], Activations(sae, tuple(latents))
    read = engine.read(requests, texts, [States(sae.layer)])
    for number, ((states,), spot, request) in enumerate(zip(read, spots, requests, strict=True)):
        whole, tail = with_reply(engine.tokenizer, request, spot.trial.response)
        tokens = token_texts(engine.tokenizer, whole.ids[-tail:], spot.trial.response)
        with torch.no_grad():
            activations = summed.of(states)
            border = max(spot.at - RECENT, spot.at // 2)
            recent, earlier = (sae.encode(part).mean(0) for part in (states[border : spot.at], states[:border]))
        rises[number] = (recent - earlier).float().cpu().numpy()
        values = activations.sum(-1).double().cpu().numpy()
        courses.append(Course(spot.trial.key, cluster_of(spot.trial), values, spot.at, spot.regions, tokens))
    return courses, rises


def token_texts(tokenizer: Any, ids: Sequence[int], text: str) -> tuple[str, ...]:
    """A reply's text divided at its tokens: together they are the text, whatever a token looks like alone.

    A token that ends within a character is empty; the character belongs to the one that ends it.
    """
    lead = max(len(tokenizer.decode(ids)) - len(text), 0)  # white space that the template puts before a reply
    ends = [0]
    for count in range(1, len(ids)):
        done = tokenizer.decode(ids[:count])[lead:]
        ends.append(len(done) if text.startswith(done) and len(done) > ends[-1] else ends[-1])
    return tuple(text[start:end] for start, end in zip(ends, [*ends[1:], len(text)], strict=True))


def rising_latents(experiment: Experiment, others: NDArray[np.float32], restarts: NDArray[np.float32]) -> list[Rising]:
    """The latents that rise most certainly, and those whose label speaks of taking something back.

    Args:
        others, restarts: rises, [pairs, n_latents] each; a row of both is one token of two replies.
    """
    if len(others) < 2:
        return []
    found = separation(Classes(others, restarts))
    q, labels = discovered(found), experiment.resources.read_labels()
    certain = [int(latent) for latent in np.argsort(-found.auc, kind="stable") if q[latent] < CERTAIN][:MOST_RISING]
    said = [latent for latent, label in labels.items() if TAKES_BACK.search(label)][:MOST_RISING]
    return [
        Rising(
            latent,
            labels.get(latent, str(latent)),
            float(found.auc[latent]),
            float(q[latent]),
            float(restarts[:, latent].mean()),
            float(others[:, latent].mean()),
            latent in said,
        )
        for latent in dict.fromkeys([*certain, *said])
    ]
