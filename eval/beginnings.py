"""What detectors read in the beginnings that replies go on from: with and without the push, off-topic and on-topic."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from esr_train.steering.directions import LoadedSae
from esr_train.steering.engine import Request
from esr_train.steering.token_reading import Activations, Reader
from esr_train.values import typed
from eval.conditions import PUSHED_OFF_TOPIC, PUSHED_ON_TOPIC, UNPUSHED_OFF_TOPIC, UNPUSHED_ON_TOPIC
from eval.detectors import Detectors
from eval.store import RowStore

SQUARE = {
    PUSHED_OFF_TOPIC: "push on, text off-topic",
    PUSHED_ON_TOPIC: "push on, text on-topic",
    UNPUSHED_OFF_TOPIC: "push off, text off-topic",
    UNPUSHED_ON_TOPIC: "push off, text on-topic",
}
"""The conditions that tell the push from the text."""


@dataclass(frozen=True)
class Noticed:
    """What one beginning excites.

    Args:
        key: of the trial that goes on from it.
        sums: contrast -> the sum over its detectors of each one's strongest activation, as in the search.
    """

    key: str
    condition: str
    latent: int | None
    sums: Mapping[str, float]


def noticed_store(path: Path, writes: bool = True) -> RowStore[Noticed]:
    """Where what beginnings excite is kept, by the trials' keys."""
    return RowStore(path, lambda row: typed(Noticed, row), asdict, writes)


def sums_of(
    reader: Reader, sae: LoadedSae, detectors: Detectors, requests: Sequence[Request], texts: Sequence[str]
) -> list[dict[str, float]]:
    """What each text excites behind its request, contrast -> sum; a contrast without detectors is left out."""
    sets = {each.contrast: Activations(sae, each.chosen) for each in detectors.sets if each.chosen}
    with torch.no_grad():
        read = reader.read(requests, texts, list(sets.values()))
        return [
            {name: float(values.amax(0).sum()) for name, values in zip(sets, activations, strict=True)}
            for activations in read
        ]
