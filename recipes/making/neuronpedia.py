"""`esr latents labels`: what an SAE's latents stand for, as Neuronpedia exports it."""

import gzip
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from itertools import count
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from esr_train.errors import InputError, RunError, first_line
from esr_train.steering.latent_labels import read_labels

EXPORTS = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com/v1"
"""Neuronpedia's public exports, by model and SAE; explanations lie there in numbered batches of latents."""
TIMEOUT = 60
"""Seconds without an answer."""


def export_of(release: str, id: str, host: str = EXPORTS) -> str | None:
    """The address under which Neuronpedia exports the labels of an SAE; None if sae-lens' table names none.

    Args:
        host: where the exports lie.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory().get(release)
    name = known.neuronpedia_id.get(id) if known else None
    return f"{host}/{name}/explanations" if name else None


def where_labels_are(release: str, id: str) -> str:
    """How somebody gets labels of an SAE, as the last sentences of a message."""
    made = "make some with `esr data labels`"
    if export_of(release, id) is None:
        return f"sae-lens' table names no labels of this SAE: {made}, and set sae.labels to the file."
    command = f"esr latents labels --release {release} --id {id} --out labels"
    return f"`{command}` downloads Neuronpedia's, then set sae.labels=labels; or {made}."


def fetch_labels(release: str, id: str, folder: Path, host: str = EXPORTS) -> int:
    """Download an SAE's labels, batch by batch; those that are in the folder already are kept.

    Returns:
        how many latents are labelled.

    Raises:
        InputError: an SAE of which sae-lens' table names no labels, or of which there are none.
        RunError: if an answer fails; it says what to fetch by hand.
    """
    address = export_of(release, id, host)
    if address is None:
        raise InputError(where_labels_are(release, id).rstrip("."), f"{release} / {id}", "Check release and id.")
    by_hand = f"By hand: put every {address}/batch-N.jsonl.gz, N from 0 on, into {folder}."
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, content in _batches(address, folder):
            aside = folder / f".{name}.partial"
            aside.write_bytes(content)
            aside.rename(folder / name)
            print(f"{folder / name}", flush=True)
    except (OSError, HTTPException, EOFError, zlib.error) as error:
        raise RunError(f"{address}: the labels cannot be downloaded ({first_line(error)}). {by_hand}") from error
    if not any(folder.glob("batch-*.jsonl.gz")):
        raise InputError("Neuronpedia has no labels of this SAE", address, "Make some with `esr data labels`.")
    return len(read_labels(folder))


def _batches(address: str, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the batches that the folder does not have, up to the first that is not there."""
    for number in count():
        name = f"batch-{number}.jsonl.gz"
        if (folder / name).is_file():
            continue
        try:
            with urlopen(f"{address}/{name}", timeout=TIMEOUT) as answer:
                content = answer.read()
        except HTTPError as error:
            if error.code in (403, 404):  # What is not there is refused where listing is not allowed.
                return
            raise
        gzip.decompress(content)  # A torn answer is never kept.
        yield name, content
