"""Wandb, trackio and tensorboard, where a recipe asks for them: installed, one run an arm, kept beside the adapter."""

from importlib.util import find_spec
from pathlib import Path

from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from trl import SFTConfig

from esr_train.errors import InputError

PACKAGES = {"wandb": ("wandb",), "trackio": ("trackio",), "tensorboard": ("tensorboard", "tensorboardX")}
"""What each logger needs one of."""


def check_installed(args: SFTConfig) -> None:
    """Refuse a logger that is not installed.

    Raises:
        InputError: naming it.
    """
    for name, packages in PACKAGES.items():
        if name in (args.report_to or []) and not any(find_spec(package) for package in packages):
            raise InputError(
                f"{name} is not installed", "train.args.report_to", f"`pip install {name}`, or take another."
            )


def keep_events(trainer: Trainer, folder: Path) -> None:
    """Let tensorboard write to a folder of its own; by default it is among the checkpoints, which are removed."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = callback.logging_dir or str(folder)


def end_runs(args: TrainingArguments) -> None:
    """Close wandb's run, which would otherwise take the next arm's figures as its own."""
    if "wandb" in (args.report_to or []):
        import wandb

        wandb.finish()
