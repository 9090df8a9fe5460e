"""Random latents that are like given ones: as often active, and with a decoder row about as long."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from esr_train.errors import InputError
from eval.cells import derived_seed

NEAREST = 8
"""A stand-in is drawn from this many nearest candidates: more would match worse, one would not be random."""


def matched_latents(
    wanted: Sequence[int],
    frequency: NDArray[np.float64],
    norms: NDArray[np.float64],
    excluded: Collection[int],
    seed: int,
) -> dict[int, int]:
    """For each wanted latent another one, drawn from the nearest in log frequency and log decoder norm.

    Distances are in standard deviations over all active latents. No latent stands in twice.

    Args:
        wanted: latents to be matched.
        frequency, norms: [n_latents] of the whole SAE.
        excluded: latents that must not stand in; the wanted ones never do.
        seed: of the draw.

    Raises:
        InputError: if too few other latents are ever active.
    """
    rng = np.random.default_rng(derived_seed("matched", seed))
    free = {int(latent) for latent in np.flatnonzero(frequency > 0)} - set(excluded) - set(wanted)
    if len(free) < len(wanted):
        raise InputError(
            f"{len(wanted)} latents are to be matched, but only {len(free)} others are ever active",
            "sae",
            "Take a wider SAE, or leave this control out.",
        )
    # A wanted latent that was never seen active counts as one that was nearly never.
    seen = np.log(np.maximum(frequency, frequency[frequency > 0].min(initial=1.0)))
    place = np.stack([_standardised(seen), _standardised(np.log(np.maximum(norms, 1e-12)))], axis=1)
    found = {}
    for latent in wanted:
        candidates = np.array(sorted(free))
        distance = np.linalg.norm(place[candidates] - place[latent], axis=1)
        found[latent] = int(rng.choice(candidates[np.argsort(distance, kind="stable")[:NEAREST]]))
        free.remove(found[latent])
    return found


def _standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    spread = float(values.std())
    # Decoder rows of equal norm differ by rounding alone, which must not decide anything.
    return (values - values.mean()) / spread if spread > 1e-3 else np.zeros_like(values)
