"""A switch between the base model (0) and the tuned one (1): the same adapter, its change to the weights scaled."""

import os
import shutil
from pathlib import Path

from safetensors.torch import save_file

from esr_train.adapters import CONFIG, WEIGHTS, read_weights
from esr_train.errors import InputError
from esr_train.files import read_json


def scale_adapter(adapter: Path, factor: float, output: Path) -> None:
    """Write an adapter whose change to every weight is `factor` times another's; any engine can load it.

    LoRA adds (lora_alpha / r) B A to a weight, which is linear in B: B is scaled and the rest is copied. In a process
    of your own `peft.helpers.rescale_adapter_scale` does the same to a loaded model, for the length of a block.

    Args:
        adapter: folder of a finished LoRA adapter.
        factor: above 0; 1 is the adapter as it is.
        output: a folder that does not exist yet.

    Raises:
        InputError: for an adapter that holds more than LoRA's A and B, such as DoRA's magnitudes, trained biases or
            whole modules: those are no part that could be scaled.
    """
    config, weights = read_json(adapter / CONFIG), read_weights(adapter)
    others = sorted(name for name in weights if ".lora_A." not in name and ".lora_B." not in name)
    others = [name for name in others if ".lora_embedding_" not in name]
    if others or config.get("use_dora"):
        kind = others[0] if others else "use_dora"
        raise InputError(f"the adapter holds more than LoRA's two matrices ({kind}) and cannot be scaled", str(adapter))
    aside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(adapter, aside, ignore=shutil.ignore_patterns("checkpoint*", "checkpoints", WEIGHTS))
    scaled = {
        name: each * factor if ".lora_B" in name or "_embedding_B" in name else each for name, each in weights.items()
    }
    save_file({name: each.contiguous() for name, each in scaled.items()}, aside / WEIGHTS, metadata={"format": "pt"})
    os.replace(aside, output)
