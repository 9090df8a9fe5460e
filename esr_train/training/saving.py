"""Checkpoints, and the trained adapter: saved whole or not at all, described, uploaded."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from esr_train.adapters import CONFIG, base_weights, check_keys, check_saved, read_weights
from esr_train.errors import InputError, RunError, first_line
from esr_train.files import replacing, write_json
from esr_train.recipe import Recipe

PRIVATE_FILES = ("checkpoints/*", ".saving/*", "tensorboard/*")
"""What lies in an adapter's folder and is not part of the adapter."""


def last_checkpoint(folder: Path, world_size: int) -> Path | None:
    """The newest checkpoint that was written to its end; None if there is none.

    The trainer writes `trainer_state.json` last and every process its random state; a killed run may leave a
    folder without them.
    """
    whole = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _is_whole(path, world_size)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: Path, world_size: int) -> bool:
    try:
        _state(checkpoint)
    except (OSError, ValueError):
        return False
    return len(list(checkpoint.glob("rng_state*.pth"))) == world_size


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def check_checkpoint(checkpoint: Path, model: Any) -> None:
    """Refuse to go on from a checkpoint that is not finite, or not this model's.

    Args:
        checkpoint: from `last_checkpoint`.
        model: with the adapter that is to be trained on.

    Raises:
        InputError: naming the weight, or the step whose loss was not finite.
    """
    fix = f"Remove {checkpoint.parent} to begin anew, with a lower learning rate."
    try:
        check_keys(read_weights(checkpoint), model, str(checkpoint))
    except InputError as error:
        raise InputError(error.what, error.where, fix) from error
    for entry in _state(checkpoint).get("log_history", []):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(entry.get(name, 0.0)):
                raise InputError(f"at step {entry.get('step')} the {name} was {entry[name]}", str(checkpoint), fix)


def save_adapter(trainer: Any, folder: Path, record: dict[str, Any]) -> None:
    """Save the trainer's adapter aside, compare it with the trained one, describe it and move it into place.

    Args:
        trainer: after training; every process must call this (ZeRO-3 gathers the weights from all).

    Raises:
        RunError: an adapter that is not what was trained, or was not trained at all; nothing is moved then.
    """
    aside = folder / ".saving"
    if trainer.is_world_process_zero():
        shutil.rmtree(aside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(aside))
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    check_saved(model, aside, record["recipe"]["model"]["dtype"])
    # The trainer's arguments, pickled; the provenance says the same in words.
    (aside / "training_args.bin").unlink(missing_ok=True)
    model.generation_config.save_pretrained(str(aside))
    write_json(aside / "provenance.json", {**record, "base_weights": base_weights(model.name_or_path)})
    write_json(aside / "training_log.json", [_finite(entry) for entry in trainer.state.log_history])
    with replacing(aside / "README.md") as file:
        file.write(model_card(record, final_metrics(trainer.state.log_history)))
    names = sorted(path.name for path in aside.iterdir())
    for name in [name for name in names if name != CONFIG] + [CONFIG]:
        os.replace(aside / name, folder / name)
    aside.rmdir()


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    """A log entry without numbers that JSON does not have, such as the accuracy where no token was trained."""
    is_gap = {key: isinstance(value, float) and not math.isfinite(value) for key, value in entry.items()}
    return {key: None if is_gap[key] else value for key, value in entry.items()}


def final_metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    """The last value of each figure in a trainer's log."""
    latest: dict[str, float] = {}
    for entry in history:
        latest.update({key: value for key, value in entry.items() if isinstance(value, int | float)})
    return latest


def model_card(record: dict[str, Any], metrics: dict[str, float]) -> str:
    """The adapter's README: what it is for, and everything it takes to make it again."""
    base = record["recipe"]["model"]["path"]
    tags = {"base_model": base, "library_name": "peft", "tags": ["lora", "endogenous-steering-resistance"]}
    figures = "\n".join(f"| {key} | {value:.6g} |" for key, value in metrics.items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    return f"""---
{yaml.safe_dump(tags, sort_keys=False)}---

# {record["arm"]}

A LoRA adapter for `{base}`, trained to notice activation steering that drags its answers off-topic
and to come back to the question. Load it with `peft.PeftModel.from_pretrained(base, folder)`;
`esr train merge` makes a plain model of it; `hf upload REPO FOLDER` publishes it.

- data: {record["data"]["rows"]} rows, sha256 `{record["data"]["sha256"]}`
- processes: {record["world_size"]}
- source: commit `{record["git"]["commit"]}`{" with local changes" if record["git"]["dirty"] else ""}
- versions: {versions}

## Last figures of the training log

| figure | value |
|---|---|
{figures}

## Recipe

```yaml
{yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True)}```
"""


def repository(recipe: Recipe) -> str | None:
    """The hub's repository that `train.args.push_to_hub` asks for, as `user/name` or `name`.

    Raises:
        InputError: if it is not named.
    """
    given = recipe.train.args
    if not given.get("push_to_hub"):
        return None
    if not given.get("hub_model_id"):
        raise InputError("the repository has no name", "train.args.hub_model_id", "Such as user/name.")
    return str(given["hub_model_id"])


def create_repository(name: str, private: bool | None) -> None:
    """Make a repository on the hub, unless it is there; tried before training.

    Args:
        name: from `repository`.
        private: whether only its owner sees it; None for the owner's default. An existing one stays as it is.

    Raises:
        InputError: if the hub cannot be reached or does not let this user write.
    """
    try:
        HfApi().create_repo(name, private=private, exist_ok=True)
    # The hub's client raises the errors of whichever HTTP library it was built on.
    except Exception as error:
        raise InputError(
            f"the hub does not take {name!r} ({first_line(error)})",
            "train.args.push_to_hub",
            "Log in with `hf auth login`, or leave it out and upload the finished folder with `hf upload`.",
        ) from error


def upload(folder: Path, name: str) -> None:
    """Upload a finished adapter with its card; files that are there already are not sent again.

    Raises:
        RunError: if that fails; the adapter itself is safe.
    """
    message = "Upload a trained adapter"
    try:
        HfApi().upload_folder(
            repo_id=name, folder_path=folder, ignore_patterns=list(PRIVATE_FILES), commit_message=message
        )
    except Exception as error:
        raise RunError(
            f"{folder}: the adapter is finished, but was not uploaded to {name!r} ({first_line(error)}). "
            "The same command tries again."
        ) from error
