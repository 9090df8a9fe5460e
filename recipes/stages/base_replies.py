"""Replies of a run's base model that are kept, so that an interrupted command does not make them again."""

from collections.abc import Mapping
from pathlib import Path

from esr_train.steering.engine import Request
from eval.report.story import progress_bar
from eval.store import RowStore
from recipes.experiment import Experiment


def kept_replies(experiment: Experiment, path: Path, asked: Mapping[str, Request]) -> Mapping[str, tuple[int, ...]]:
    """Key -> token ids of the base model's reply, without the end of turn.

    Args:
        experiment: whose base model and sampling are taken.
        path: file of the replies that are there, by key; others are added.
        asked: requests by their keys.
    """
    store = RowStore(path, lambda row: tuple(map(int, row["ids"])), lambda ids: {"ids": list(ids)})
    known, resources = store.by_key(), experiment.resources
    missing = [key for key in asked if key not in known]
    chunk = experiment.recipe.engine.chunk()
    with progress_bar(len(missing), "replies of the base model") as bar:
        for start in range(0, len(missing), chunk):
            batch = missing[start : start + chunk]
            made = resources.base().generate([asked[key] for key in batch], resources.sampling(), bar)
            kept = [each.token_ids[:-1] if each.finish_reason == "stop" else each.token_ids for each in made]
            store.append(zip(batch, kept, strict=True))
    return store.by_key()
