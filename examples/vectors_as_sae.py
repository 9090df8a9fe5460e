"""Vectors of your own in a recipe: pack them as an SAE folder, and every stage takes them as it takes latents.

`python examples/vectors_as_sae.py VECTORS LAYER OUT`, then `sae: {release: PARENT, id: NAME, labels: OUT/labels.jsonl}`.
VECTORS is a file that `esr_train.load_vectors` reads; names in it become labels.
"""

import json
import sys
from pathlib import Path

import torch
from sae_lens import StandardSAE, StandardSAEConfig

from esr_train import load_vectors


def pack(vectors: Path, layer: int, folder: Path) -> None:
    """Write the vectors as decoder rows. None is ever active: a vector has no activation by which prompts could clash."""
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


if __name__ == "__main__":
    pack(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
