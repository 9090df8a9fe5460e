"""The finished adapter: saved whole or not at all, checked, described, merged."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from esr_train.errors import InputError, RunError
from esr_train.files import read_json, replacing, write_json
from esr_train.models import load_model, load_tokenizer
from esr_train.recipe import ModelSection

WEIGHTS = "adapter_model.safetensors"
LAST = "adapter_config.json"
"""Moved into place last: PEFT loads nothing from a folder without it, so a torn save is never used."""
MERGE_PROBE = "How do you fold a fitted sheet?"


def is_complete(folder: Path) -> bool:
    """Whether a finished adapter lies here."""
    return (folder / LAST).is_file()


def finish(trainer: Any, folder: Path, record: dict[str, Any]) -> None:
    """Save the trainer's adapter aside, check what was written, describe it and move it into place.

    Args:
        trainer: after training; every process must call this (ZeRO-3 gathers the weights from all).
        folder: the adapter's.
        record: its provenance.

    Raises:
        RunError: an adapter with empty, non-finite or untrained weights; nothing is moved then.
    """
    aside = folder / ".saving"
    if trainer.is_world_process_zero():
        shutil.rmtree(aside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(aside))
    if not trainer.is_world_process_zero():
        return
    check_saved(aside)
    # The trainer's arguments, pickled; the provenance says the same in words.
    (aside / "training_args.bin").unlink(missing_ok=True)
    bare = trainer.accelerator.unwrap_model(trainer.model)
    bare.generation_config.save_pretrained(str(aside))
    metrics = final_metrics(trainer.state.log_history)
    write_json(aside / "provenance.json", record)
    write_json(aside / "training_log.json", trainer.state.log_history)
    with replacing(aside / "README.md") as file:
        file.write(model_card(record, metrics))
    _move(aside, folder)


def _move(aside: Path, folder: Path) -> None:
    names = sorted(path.name for path in aside.iterdir())
    for name in [name for name in names if name != LAST] + [LAST]:
        os.replace(aside / name, folder / name)
    aside.rmdir()


def check_saved(folder: Path) -> None:
    """Read an adapter's weights back and refuse one that would do nothing or harm.

    Raises:
        RunError: naming the first weight that is empty or not finite; or if every B matrix is zero.
    """
    where = f"{folder}: "
    weights = load_file(str(folder / WEIGHTS))
    for name, weight in weights.items():
        if weight.numel() == 0:
            raise RunError(f"{where}the weight {name} is empty. It was not gathered before it was saved.")
        if not bool(weight.isfinite().all()):
            raise RunError(f"{where}the weight {name} is not finite. Lower the learning rate.")
    if not any(bool(weight.any()) for name, weight in weights.items() if "lora_B" in name):
        raise RunError(f"{where}every B matrix is zero, so the adapter changes nothing. It was not trained.")


def final_metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    """The last value of each figure in a trainer's log."""
    found: dict[str, float] = {}
    for entry in history:
        found.update({key: value for key, value in entry.items() if isinstance(value, int | float)})
    return found


def model_card(record: dict[str, Any], metrics: dict[str, float]) -> str:
    """The adapter's README: what it is for, and everything it takes to make it again."""
    base = record["recipe"]["model"]["path"]
    head = yaml.safe_dump(
        {"base_model": base, "library_name": "peft", "tags": ["lora", "endogenous-steering-resistance"]},
        sort_keys=False,
    )
    figures = "\n".join(f"| {key} | {value:.6g} |" for key, value in metrics.items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    return f"""---
{head}---

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


@dataclass(frozen=True)
class Merge:
    """What merging changed on a probe prompt.

    Args:
        folder: where the merged model lies.
        largest_difference: largest absolute difference of a logit between adapter and merged model.
        largest_logit: largest absolute logit, to compare with.
    """

    folder: Path
    largest_difference: float
    largest_logit: float


def merge(section: ModelSection, adapter: Path, output: Path) -> Merge:
    """Merge an adapter into a freshly loaded base model and save it.

    The base is always loaded unquantised: 4-bit weights that have run in evaluation mode are repacked and
    would be dequantised to wrong values.

    Raises:
        InputError: if `output` is not empty, or the adapter belongs to another base model.
        RunError: if merging gives weights that are not finite.
    """
    if output.exists() and any(output.iterdir()):
        raise InputError("the folder is not empty", str(output), "Name a new one.")
    _check_base(section, adapter)
    tokenizer = load_tokenizer(section)
    model = load_model(section, adapter)
    ids = torch.tensor([tokenizer.encode(MERGE_PROBE)], device=model.device)
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise RunError(f"{adapter}: {error}") from error
        after = merged(input_ids=ids).logits.float()
    aside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    merged.save_pretrained(str(aside))
    tokenizer.save_pretrained(str(aside))
    if output.exists():
        output.rmdir()
    output.parent.mkdir(parents=True, exist_ok=True)
    os.replace(aside, output)
    return Merge(output, float((before - after).abs().max()), float(before.abs().max()))


def _check_base(section: ModelSection, adapter: Path) -> None:
    record = adapter / "provenance.json"
    if record.is_file():
        trained_on = read_json(record)["recipe"]["model"]["path"]
        if trained_on != section.path:
            raise InputError(
                f"the adapter was trained on {trained_on!r}, not on {section.path!r}",
                str(adapter),
                "Set model.path.",
            )
