"""What an arm kept of other abilities: tasks of EleutherAI's lm-evaluation-harness, on the model in memory."""

import difflib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import eval.statistics as statistics
from esr_train.errors import InputError, first_line
from esr_train.recipe import RetentionSection
from eval.statistics import Estimate

ROWS = 16
"""Texts that are read at once where the recipe gives no number."""
KEY = "eval.retention"


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task.

    Args:
        value: as the harness puts its documents together.
        documents: what each document has, by its number, where that is a number.
    """

    value: float
    documents: Mapping[str, float]


def open_tasks(section: RetentionSection, include: Path | None) -> Any:
    """The harness's TaskManager, which knows its own tasks and those of a folder.

    Args:
        include: folder of task files of one's own; data files that these name are found from it on.

    Raises:
        InputError: if the harness is not installed, or there is no such folder or task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        what = "tasks are run by lm-evaluation-harness, which is not installed"
        raise InputError(what, KEY, "pip install 'endogenous-steering-resistance[retention]'")
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise InputError("there is no such folder of tasks", f"{KEY}.include={include}", "Check the path.")
    manager = TaskManager(include_path=str(include.resolve()) if include else None)
    for name in section.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            fix = f"Did you mean {' or '.join(near)}?" if near else "See `lm-eval ls tasks`."
            raise InputError(f"lm-evaluation-harness has no task {name!r}", f"{KEY}.tasks", fix)
    return manager


def run_tasks(
    model: Any, tokenizer: Any, section: RetentionSection, include: Path | None, rows: int | None
) -> dict[str, TaskResult]:
    """Run tasks on a model that nobody steers, its questions in the model's own chat template.

    Args:
        model: of transformers, alone or with an adapter.
        section: which tasks, and how much of them.
        include: see `open_tasks`.
        rows: texts that are read at once.

    Returns:
        `task/metric` -> its result.

    Raises:
        InputError: see `open_tasks`; or if a task's data cannot be had.
    """
    manager = open_tasks(section, include)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=rows or ROWS)
    try:
        with chdir(include) if include else nullcontext():
            found = simple_evaluate(
                model=wrapped,
                tasks=list(section.tasks),
                task_manager=manager,
                limit=section.limit,
                apply_chat_template=True,
                bootstrap_iters=0,
            )
    except (OSError, ValueError) as error:  # What the data sets library raises where data are out of reach.
        what = f"the tasks cannot be run ({type(error).__name__}: {first_line(error)})"
        raise InputError(what, f"{KEY}.tasks", "Are their data at hand?") from error
    return dict(_results(found))


def _results(found: Any) -> Iterator[tuple[str, TaskResult]]:
    """Every number of every task in what the harness returns."""
    for task, metrics in found["results"].items():
        samples = found.get("samples", {}).get(task, ())
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not _is_number(value):
                continue
            name = f"{task}/{metric}" if chosen == "none" else f"{task}/{metric} ({chosen})"
            own = (sample for sample in samples if sample.get("filter", "none") == chosen)
            documents = {str(each["doc_id"]): float(each[metric]) for each in own if _is_number(each.get(metric))}
            yield name, TaskResult(float(value), documents)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def kept(
    own: Sequence[Mapping[str, TaskResult]],
    base: Sequence[Mapping[str, TaskResult]],
    bootstrap: int = statistics.RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Estimate]]:
    """`task/metric` -> `own`, and `minus_base` on the documents that both have; clustered by document.

    Args:
        own: an arm's results, of each run.
        base: the base model's, of the same runs; the same as `own` for itself.
        bootstrap: resamples.
    """
    return {name: _kept(name, own, base, bootstrap, seed) for name in own[0]} if own else {}


def _kept(
    name: str,
    own: Sequence[Mapping[str, TaskResult]],
    base: Sequence[Mapping[str, TaskResult]],
    bootstrap: int,
    seed: int,
) -> dict[str, Estimate]:
    results = [run[name] for run in own if name in run]
    rows = [row for result in results for row in result.documents.items()]
    if not rows:  # A number of all documents together, such as a perplexity.
        return {"own": Estimate(sum(result.value for result in results) / len(results), None, None, len(results))}
    are_events = all(value in (0, 1) for _, value in rows)
    spread = statistics.rate if are_events else statistics.mean
    found = {"own": spread([value for _, value in rows], [doc for doc, _ in rows], 0, bootstrap, seed)}
    if own is base:
        return found
    both = [(mine, theirs) for mine, theirs in zip(own, base, strict=False) if name in mine and name in theirs]
    pairs = [(mine[name], theirs[name]) for mine, theirs in both]
    changes = [
        (doc, value - theirs.documents[doc])
        for mine, theirs in pairs
        for doc, value in mine.documents.items()
        if doc in theirs.documents
    ]
    given = [change for _, change in changes], [doc for doc, _ in changes]
    return {**found, "minus_base": statistics.paired(*given, 0, bootstrap, seed, of_rates=are_events)}
