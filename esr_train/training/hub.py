"""The optional way to the model hub: tried before training, uploaded when the adapter has been checked."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from esr_train.errors import InputError, RunError
from esr_train.recipe import Recipe

PRIVATE_FILES = ("checkpoints/*", ".saving/*", "tensorboard/*")
"""What lies in an adapter's folder and is not part of the adapter."""


@dataclass(frozen=True)
class Repository:
    """Where a finished adapter is uploaded.

    Args:
        name: `user/name` or `name`.
        private: whether only its owner sees it; None for the owner's default. An existing one stays as it is.
    """

    name: str
    private: bool | None

    def create(self) -> None:
        """Make the repository, unless it is there.

        Raises:
            InputError: if the hub cannot be reached or does not let this user write.
        """
        try:
            HfApi().create_repo(self.name, private=self.private, exist_ok=True)
        # The hub's client raises the errors of whichever HTTP library it was built on.
        except Exception as error:
            raise InputError(
                f"the hub does not take {self.name!r} ({_first_line(error)})",
                "train.args.push_to_hub",
                "Log in with `hf auth login`, or leave it out and upload the finished folder with `hf upload`.",
            ) from error

    def upload(self, folder: Path) -> None:
        """Upload a finished adapter with its card; files that are there already are not sent again.

        Raises:
            RunError: if that fails; the adapter itself is safe.
        """
        try:
            HfApi().upload_folder(
                repo_id=self.name,
                folder_path=folder,
                ignore_patterns=list(PRIVATE_FILES),
                commit_message="Upload a trained adapter",
            )
        except Exception as error:
            raise RunError(
                f"{folder}: the adapter is finished, but was not uploaded to {self.name!r} ({_first_line(error)}). "
                "The same command tries again."
            ) from error


def repository(recipe: Recipe) -> Repository | None:
    """The repository that `train.args.push_to_hub` asks for.

    Raises:
        InputError: if it is not named.
    """
    given = recipe.train.args
    if not given.get("push_to_hub"):
        return None
    name = given.get("hub_model_id")
    if not name:
        raise InputError("the repository has no name", "train.args.hub_model_id", "Such as user/name.")
    return Repository(str(name), given.get("hub_private_repo"))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
