"""Vectors of your own in a recipe: pack them as an SAE folder, and every stage takes them as it takes latents.

    python examples/vectors_as_sae.py VECTORS LAYER PARENT/NAME

VECTORS is a file that `esr_train.load_vectors` reads; names in it become labels. The recipe then says
`sae: {release: PARENT, id: NAME, labels: PARENT/NAME/labels.jsonl}`. Without arguments, random vectors are packed
and read.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from safetensors.torch import save_file

from esr_train import load_sae, load_vectors, read_labels


def pack(vectors: Path, layer: int, folder: Path) -> None:
    """Write the vectors as decoder rows; none is ever active: no prompt has an activation of a vector."""
    loaded = load_vectors(vectors, layer)
    rows = torch.stack([vector.unit * vector.length for vector in loaded])
    sae = StandardSAE(StandardSAEConfig(d_in=rows.shape[1], d_sae=len(rows), apply_b_dec_to_input=False))
    sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    sae.load_state_dict(
        {
            "W_enc": torch.zeros_like(rows).T.contiguous(),
            "b_enc": torch.full((len(rows),), -1.0),
            "W_dec": rows,
            "b_dec": torch.zeros(rows.shape[1]),
        }
    )
    sae.save_model(folder)
    labels = [{"index": index, "description": vector.label or str(index)} for index, vector in enumerate(loaded)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(label) + "\n" for label in labels), encoding="utf-8")


def demonstrate() -> None:
    """Pack two random vectors for the tiny Llama and read them as a recipe does."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "vectors.safetensors"
        save_file({"joy": torch.randn(160), "spiders": torch.randn(160)}, file)
        pack(file, 3, Path(folder) / "mine")
        sae = load_sae(folder, "mine")
        print(f"{sae.n_latents} vectors for layer {sae.layer}: {read_labels(Path(folder) / 'mine' / 'labels.jsonl')}")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        pack(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    else:
        demonstrate()
