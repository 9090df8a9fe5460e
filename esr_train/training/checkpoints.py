"""Checkpoints: the last whole one, and their removal."""

import json
import shutil
from pathlib import Path


def last_checkpoint(folder: Path, world_size: int) -> str | None:
    """The newest checkpoint that was written to its end; None if there is none.

    The trainer writes `trainer_state.json` last and every process its random state; a killed run may leave a
    folder without them.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _is_whole(path, world_size)]
    newest = max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


def _is_whole(checkpoint: Path, world_size: int) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return len(list(checkpoint.glob("rng_state*.pth"))) == world_size


def remove_checkpoints(folder: Path) -> None:
    """Remove the folder with all checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)
