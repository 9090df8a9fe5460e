"""The machine that a recipe runs on: its device, memory, free disk space, and how many processes use its devices."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from esr_train.errors import InputError
from esr_train.models import choose_device
from esr_train.recipe import Recipe
from esr_train.training.callbacks import PEAK_FLOPS

GIB = 2**30
KNOWN = {
    "B200": (180, 8.0e12),
    "H200": (141, 4.8e12),
    "H100": (80, 3.35e12),
    "A100": (80, 2.0e12),
    "L40S": (48, 0.86e12),
    "RTX 4090": (24, 1.01e12),
    "L4": (24, 0.3e12),
}
"""Memory (GB) and its bandwidth (bytes a second), from the makers' data sheets; for operations see `PEAK_FLOPS`."""


@dataclass(frozen=True)
class Device:
    """What computes.

    Args:
        memory: bytes of one.
        count: how many work at once.
        flops: dense bf16 operations a second of one; None: not known.
        bandwidth: of one's memory, in bytes a second; None: not known.
    """

    name: str
    memory: int
    count: int = 1
    flops: float | None = None
    bandwidth: float | None = None


def device_here(recipe: Recipe) -> Device:
    """The device that this process would use.

    Raises:
        InputError: if the recipe's device is not there.
    """
    device = choose_device(recipe.model)
    if device.type != "cuda":
        threads = torch.get_num_threads()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(f"CPU, {threads} thread{'s' * (threads > 1)}", memory)
    facts = torch.cuda.get_device_properties(device)
    part = next((part for part in KNOWN if re.search(rf"\b{part}\b", facts.name)), None)
    flops, bandwidth = (PEAK_FLOPS[part], KNOWN[part][1]) if part else (None, None)
    return Device(facts.name, facts.total_memory, 1, flops, bandwidth)


def stated_device(name: str, count: int) -> Device:
    """A device by a part of its name, such as `h100`.

    Raises:
        InputError: if it is not known.
    """
    part = next((part for part in KNOWN if part.lower().replace(" ", "") == name.lower().replace(" ", "")), None)
    if part is None:
        raise InputError(f"the device {name!r} is not known", "--device", f"Take one of {', '.join(KNOWN)}.")
    memory, bandwidth = KNOWN[part]
    return Device(part, memory * 10**9, count, PEAK_FLOPS[part], bandwidth)


def check_processes() -> str:
    """Compare this machine's accelerators with the processes that were launched on it; what to do, if some are idle.

    Raises:
        InputError: if there are more processes than accelerators.
    """
    seen = torch.cuda.device_count()
    started = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    if not seen:
        return "no accelerator"
    if started > seen:
        what = f"{started} processes were launched on a machine with {seen} GPU{'s' * (seen > 1)}"
        raise InputError(what, "--num_processes", f"Launch {seen}.")
    if started == seen:
        return f"{seen} GPU{'s' * (seen > 1)} seen, {started} used"
    return (
        f"{seen} GPUs seen, {started} {'is' if started == 1 else 'are'} used: launch with `accelerate launch "
        f"--config_file recipes/accelerate/ddp.yaml --num_processes {seen} -m data_gen generate RECIPE` (then "
        "`-m esr_train RECIPE`, `-m eval run RECIPE`)"
    )


def free_disk(folder: Path) -> int:
    """Bytes free where a folder lies, or is going to."""
    there = next(each for each in (folder.resolve(), *folder.resolve().parents) if each.exists())
    return shutil.disk_usage(there).free
