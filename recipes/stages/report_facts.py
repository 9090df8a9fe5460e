"""What a report says about its run beside the numbers: model, steering, judge, sampling, data, dates, code, losses."""

from collections.abc import Collection, Mapping, Sequence

from data_gen.collect import KEPT, TRIMMED
from esr_train.files import read_json
from eval.conditions import GOALS
from eval.store import Trial
from recipes.experiment import Experiment
from recipes.stages.steering_latents import LATENTS

MOST_LABELS = 24
"""Labels of held-out directions that the report names."""


def losses(parts: Sequence[Experiment]) -> dict[str, list[list[tuple[float, float]]]]:
    """(step, loss) of every arm that was trained here, for each seed."""
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for part in parts:
        for arm in part.recipe.trained_arms:
            path = part.directory / "adapter" / arm / "training_log.json"
            log = read_json(path) if path.is_file() else []
            if run := [(float(row["step"]), float(row["loss"])) for row in log if "loss" in row]:
                found.setdefault(arm, []).append(run)
    return found


def held_out(experiment: Experiment, trials: Sequence[Trial], noun: str) -> dict[str, str]:
    """What training never saw."""
    topics = experiment.resources.prompts().topics
    unseen = sorted(topic for topic, split in topics.items() if split == "test")
    cells = [trial.cell for trial in trials if trial.cell.latent is not None and trial.condition != GOALS]
    labels = {cell.label for cell in cells if cell.label}
    named = "these topics" if labels <= {*unseen} else _some(labels)
    stand_for = f" that stand for {named}" if labels else ""
    return {
        "topics": f"{len(unseen)} of {len(topics)}: {', '.join(unseen)}",
        f"{noun}s": f"{len({cell.latent for cell in cells})} {noun}s{stand_for}",
        "prompts": f"{len({cell.prompt for cell in cells})} prompts on these topics",
    }


def facts(experiment: Experiment, parts: Sequence[Experiment], rows: Mapping[str, Sequence[Trial]]) -> dict[str, str]:
    """What was run, for the top of the report: a name and a text each."""
    recipe, sampling = experiment.recipe, experiment.recipe.sampling
    made = [record["made"] for part in (experiment, *parts) for record in part.cache.records().values()]
    commits = {f"{(each.get('commit') or 'unknown')[:12]}{' with changes' * bool(each.get('dirty'))}" for each in made}
    days = sorted(each["at"][:10] for each in made if each.get("at"))
    return {
        "model": f"{recipe.model.path}, {recipe.model.dtype}",
        "steering": _steering(experiment),
        "judge": experiment.resources.judge().name,
        "sampling": f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, at most "
        f"{sampling.max_new_tokens} tokens, the same for every arm",
        "trials": ", ".join(f"{arm} {len(trials)}" for arm, trials in rows.items()),
        **_funnels(experiment),
        "date": " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "unknown",
        "made by": f"commit {', '.join(sorted(commits))}",
    }


def _steering(experiment: Experiment) -> str:
    """SAE or vectors, and the layer, as the run's chosen latents know it."""
    recipe, chosen = experiment.recipe, experiment.directory / LATENTS
    layer = read_json(chosen).get("layer") if chosen.is_file() else None
    where = "" if layer is None else f", added to the output of layer {layer}"
    if recipe.vectors:
        return f"vectors of {recipe.vectors.file}{where}"
    return f"latents of the SAE {recipe.sae.release}, {recipe.sae.id}{where}" if recipe.sae else "nothing steers"


def _funnels(experiment: Experiment) -> dict[str, str]:
    """What became of the training data's candidates: a line for each kind of source."""
    found: dict[str, list[str]] = {}
    for path in sorted((experiment.directory / "data" / "sources").glob("*.funnel.json")):
        funnel = read_json(path)
        lost = ", ".join(f"{reason}: {n}" for reason, n in funnel.items() if reason not in (KEPT, TRIMMED))
        kept = funnel.get(KEPT, 0) + funnel.get(TRIMMED, 0)
        text = f"{kept} of {sum(funnel.values())} kept" + (f" (left out: {lost})" if lost else "")
        found.setdefault(f"{path.name.partition('-')[0]} rows", []).append(text)
    return {name: "; ".join(texts) for name, texts in found.items()}


def _some(labels: Collection[str]) -> str:
    names = sorted(labels)
    more = len(names) - MOST_LABELS
    return ", ".join(names[:MOST_LABELS]) + (f" and {more} other subjects" if more > 0 else "")
