"""Adapters: loaded onto the model they were made for, whole and finite; merged into it without a change."""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from esr_train.errors import InputError, RunError, first_line
from esr_train.files import read_json
from esr_train.models import load_config, load_model, load_tokenizer, local_path, model_source, without_dropout
from esr_train.provenance import sha256
from esr_train.recipe import ModelSection

if TYPE_CHECKING:
    from peft import PeftConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
"""Moved into place last: PEFT loads nothing from a folder without it, so a torn save is never used."""

PROBES = (
    "How do you fold a fitted sheet?",
    "Wait, that's not right. The question was about sailing.",
    "First, knead the dough and dust the board with flour. Then let it rise.",
    "1. Open with the knight.\n2. Castle early.\n\n3. Keep the bishops.",
    "def area(radius):\n    return 3.14159 * radius**2\n",
)
"""Texts on which an adapter and its merged model are compared."""

ROUNDING = {"float32": 1e-4, "bfloat16": 0.04}
"""Differences of log-probabilities that rounding explains, as a share of the largest logit.

Measured: 1e-6 in float32; in bfloat16 0.02 on a model of 135 million parameters.
"""


def is_complete(folder: Path) -> bool:
    """Whether a finished adapter lies here."""
    return (folder / CONFIG).is_file()


def adapter_source(path: str) -> Path | None:
    """The folder of an adapter: a local one, or what the hub has under this id; None if it is neither.

    Raises:
        InputError: if the hub cannot be asked, or has no adapter under that id.
    """
    if (folder := local_path(path)) is not None:
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["adapter_*", "provenance.json"]))
    except Exception as error:  # The hub's client raises the errors of whichever HTTP library it was built on.
        raise InputError(
            f"this is neither a folder nor an adapter that the hub gives ({first_line(error)})",
            path,
            "Check the path or id; for a private one run `hf auth login`.",
        ) from error


def check_adapter(folder: Path, section: ModelSection) -> tuple["PeftConfig", dict[str, torch.Tensor]]:
    """Refuse an adapter that cannot be used on a model, before that model is loaded.

    Args:
        section: names the base model.

    Returns:
        its configuration and its weights, on the CPU.

    Raises:
        InputError: no adapter, one for another base model, or weights that are unreadable, not finite or do not fit.
    """
    from peft import PeftModel

    config, weights = _read(folder, model_source(section))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(section))
    try:
        check_keys(weights, PeftModel(model, config, low_cpu_mem_usage=True), str(folder))
    except ValueError as error:
        raise InputError(f"the adapter does not fit the model ({first_line(error)})", str(folder)) from error
    return config, weights


def _read(folder: Path, base: str) -> tuple["PeftConfig", dict[str, torch.Tensor]]:
    """An adapter's configuration and weights, if they are whole, finite and meant for `base`, a folder or hub id."""
    from peft import PeftConfig

    if not is_complete(folder):
        raise InputError("there is no adapter here", str(folder), "Train one first, or check the path.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"no adapter's configuration ({first_line(error)})", str(folder / CONFIG)) from error
    if config.is_prompt_learning:
        what = f"a {config.peft_type.value} adapter puts tokens of its own before the prompt, which shifts the steering"
        raise InputError(what, str(folder), "Use LoRA.")
    changed = getattr(config, "layer_replication", None) or str(getattr(config, "init_lora_weights", True)).lower()
    if changed not in ("true", "false", "gaussian", "orthogonal", "eva"):
        what = f"the adapter belongs to a changed copy of its base model ({changed}), which may not be made again"
        fix = "Convert it with peft's path_initial_model_for_weight_conversion."
        raise InputError(what, str(folder / CONFIG), fix)
    recorded = _recorded_base(folder)
    weights_now = base_weights(base) if recorded else {}
    if recorded and weights_now and recorded != weights_now:
        what = f"the adapter was made for other weights than those that are now in {base!r}"
        raise InputError(what, str(folder), "Put the old model back, or train the adapter again.")
    named = config.base_model_name_or_path
    is_moved = bool(recorded and recorded == weights_now and named and Path(named).is_absolute())
    if named and not is_moved and not _same_model(named, base):
        fix = f"Set model.path; if they are the same, correct base_model_name_or_path in {CONFIG}."
        raise InputError(f"the adapter was made for {named!r}, not for {base!r}", str(folder), fix)
    weights = read_weights(folder)
    _check_trained(weights, str(folder))
    return config, weights


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's weights, on the CPU.

    Raises:
        InputError: if they are missing, unreadable, empty or not finite.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        old = (folder / "adapter_model.bin").is_file()
        what = "its weights are in adapter_model.bin, a pickle, which is not read" if old else f"{WEIGHTS} is missing"
        fix = "Load it with peft and save it again with save_pretrained." if old else "Copy or train it again."
        raise InputError(what, str(folder), fix)
    try:
        weights = load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise InputError(f"the adapter's weights cannot be read ({first_line(error)})", str(file)) from error
    for name, weight in weights.items():
        if weight.numel() == 0:
            raise InputError(f"the adapter's weight {name} is empty", str(file), "It was not gathered: save it again.")
        if not bool(weight.isfinite().all()):
            raise InputError(f"the adapter's weight {name} is not finite", str(file), "Train it again.")
    return weights


def _check_trained(weights: Mapping[str, torch.Tensor], where: str) -> None:
    # PEFT begins with B = 0, but on embeddings with A = 0.
    up = [weight for name, weight in weights.items() if "lora_B" in name or "lora_embedding_A" in name]
    only_lora = all("lora_" in name or "base_layer" in name for name in weights)
    if up and only_lora and not any(bool(weight.any()) for weight in up):
        what = "every B matrix of the adapter is zero, so it changes nothing: it was not trained"
        raise InputError(what, where, "Train it again.")


def load_adapter(model: Any, folder: Path) -> Any:
    """Put an adapter on a model.

    Args:
        model: as `load_model` returns it, in evaluation mode.
        folder: the adapter's.

    Returns:
        a `PeftModel` in evaluation mode, nothing in it trainable.

    Raises:
        InputError: as `check_adapter`, or an adapter that changes nothing or gives logits that are not finite.
    """
    tuned = _on(model, folder, *_read(folder, model.name_or_path)).eval()
    logits = _small_logits(tuned)
    with tuned.disable_adapter():
        plain = _small_logits(tuned)
    if torch.equal(logits, plain):
        raise InputError("the adapter changes nothing: it was not trained", str(folder), "Train it again.")
    if bool(plain.isfinite().all()) and not bool(logits.isfinite().all()):
        raise InputError("with the adapter the model's logits are not finite", str(folder), "Train it again.")
    # PEFT makes an adapter trainable whenever it is switched on again.
    return tuned.requires_grad_(False)


def trainable_adapter(model: Any, folder: Path) -> Any:
    """Put an adapter on a model to train it on.

    Args:
        model: as `load_model` returns it for training.

    Returns:
        a `PeftModel` whose adapter is trainable.

    Raises:
        InputError: as `check_adapter`, or an adapter that is no LoRA.
    """
    from peft import LoraConfig
    from transformers.integrations import is_deepspeed_zero3_enabled

    config, weights = _read(folder, model.name_or_path)
    if not isinstance(config, LoraConfig):
        raise InputError(f"training goes on with LoRA, and this is {config.peft_type}", str(folder))
    # ZeRO-3 gathers weights of one dtype only (as in trl).
    return _on(model, folder, config, weights, is_trainable=True, upcast=not is_deepspeed_zero3_enabled())


def _on(
    model: Any,
    folder: Path,
    config: "PeftConfig",
    weights: Mapping[str, torch.Tensor],
    is_trainable: bool = False,
    upcast: bool = True,
) -> Any:
    from peft import PeftModel

    options: dict[str, Any] = {"is_trainable": is_trainable, "autocast_adapter_dtype": upcast}
    try:
        tuned = PeftModel.from_pretrained(model, str(folder), config=config, ignore_mismatched_sizes=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"the adapter does not fit the model ({first_line(error)})", str(folder)) from error
    check_keys(weights, tuned, str(folder))
    return tuned


def check_keys(weights: Mapping[str, torch.Tensor], model: Any, where: str) -> None:
    """Refuse an adapter whose weights are not those that the model expects.

    Args:
        weights: as saved.
        model: with an adapter of the same configuration.

    Raises:
        InputError: naming a weight that is missing, too many, or of another shape.
    """
    from peft import get_peft_model_state_dict

    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    # PEFT saves a targeted or resized embedding's own weights beside the adapter's.
    beside = {key: value for key, value in model.state_dict().items() if key in weights and key not in wanted}
    wanted = {**wanted, **beside}
    # Where ZeRO-3 shards the model, its own shapes are empty.
    for name in (name for name in wanted if name in weights and wanted[name].numel()):
        if weights[name].shape != wanted[name].shape:
            sizes = f"{list(weights[name].shape)} in the adapter, {list(wanted[name].shape)} in the model"
            what = f"the adapter does not fit the model: {name} is {sizes}"
            raise InputError(what, where, "Name the model that it was made for.")
    missing, unexpected = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or unexpected:
        parts = [f"{len(missing)} weights are missing, such as {missing[0]}"] if missing else []
        parts += [f"{len(unexpected)} belong to nothing in it, such as {unexpected[0]}"] if unexpected else []
        raise InputError(f"the adapter does not fit the model: {' and '.join(parts)}", where, "Train or copy it again.")


def check_saved(model: Any, folder: Path, dtype: str) -> None:
    """Read a trained adapter back and compare it with the model in memory: weight by weight, and what it says.

    Args:
        model: as trained, out of its wrappers; under ZeRO-3, where it is in pieces, only the names are compared.
        folder: where it was saved.
        dtype: the base model's.

    Raises:
        RunError: if anything differs, or the adapter was not trained.
    """
    from peft import get_peft_model_state_dict

    try:
        weights = read_weights(folder)
        _check_trained(weights, str(folder))
        check_keys(weights, model, str(folder))
    except InputError as error:
        raise RunError(f"what was trained cannot be used: {error}") from error
    trained = get_peft_model_state_dict(model, save_embedding_layers=False)
    if any(weight.numel() == 0 for weight in trained.values()):
        return
    changed = next((name for name, weight in trained.items() if not torch.equal(weight.cpu(), weights[name])), None)
    if changed:
        raise RunError(f"{folder}: the weight {changed} was not saved as it was trained.")
    model.load_adapter(str(folder), "saved")
    with without_dropout(model):
        live = _small_logits(model)
        model.set_adapter("saved")
        saved = _small_logits(model)
    if not (saved - live).abs().max() <= ROUNDING[dtype] * live.abs().max():
        raise RunError(f"{folder}: read back, the adapter does not say what the trained model says.")


@torch.no_grad()
def _small_logits(model: Any) -> torch.Tensor:
    ids = torch.arange(min(32, model.config.get_text_config().vocab_size), device=model.device)[None]
    return model(input_ids=ids).logits.float()


def base_weights(base: str) -> dict[str, str]:
    """Hashes of a model's files of weights by name; empty where `base` is not a folder."""
    folder = local_path(base)
    if folder is None or not folder.is_dir():
        return {}
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {file.name: sha256(file) for file in files}


def _recorded_base(folder: Path) -> dict[str, str]:
    """What `base_weights` gave when the adapter was trained; empty for an adapter from elsewhere."""
    file = folder / "provenance.json"
    return dict(read_json(file).get("base_weights", {})) if file.is_file() else {}


def _same_model(named: str, base: str) -> bool:
    """Whether two folders or hub ids may be the same model; where both can be read, their weights decide."""
    one, other = local_path(named), local_path(base)
    if named == base or (one and other and one.samefile(other)):
        return True
    if one and other:
        return base_weights(named) == base_weights(base)
    return _model_name(named) == _model_name(base)


def _model_name(path: str) -> str:
    """The last part of a path or hub id; of a folder in the hub's cache, the model's name."""
    cached = re.search(r"models--(?:[^/]+--)?([^/]+)/snapshots/", path)
    return (cached[1] if cached else path.rstrip("/").rpartition("/")[2]).lower()


@dataclass(frozen=True)
class Merge:
    """What merging changed on the probe texts.

    Args:
        folder: where the merged model lies.
        largest_difference: largest absolute difference of a log-probability between adapter and merged model.
        largest_logit: largest absolute logit, to compare with.
    """

    folder: Path
    largest_difference: float
    largest_logit: float


def merge(section: ModelSection, adapter: Path, output: Path) -> Merge:
    """Merge an adapter into a freshly loaded base model, save it, read it back and compare the two.

    The base is always loaded unquantised: 4-bit weights that have run in evaluation mode are repacked and
    would be dequantised to wrong values.

    Raises:
        InputError: if `output` is not empty, the adapter cannot be loaded, or the merged model differs from it by
            more than rounding explains; nothing is left in `output` then.
    """
    if output.is_file() or (output.exists() and any(output.iterdir())):
        raise InputError("the folder is not empty", str(output), "Name a new one.")
    aside = output.absolute().with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        logits = _save_merged(section, adapter, aside)
        merged = section.model_copy(update={"path": str(aside), "revision": None})
        difference, largest_logit = _compared(logits, _probe_logits(merged, load_model(merged)))
        allowed = ROUNDING[section.dtype] * largest_logit
        # Written so that a difference that is not a number is refused as well.
        if not difference <= allowed:
            raise InputError(
                f"the merged model is not the adapter's: log-probabilities differ by up to {difference:.3g}, of which "
                f"rounding explains {allowed:.2g}",
                str(adapter),
                "Use the adapter unmerged. Embeddings that are tied to the output layer cannot take an adapter of "
                "their own along: leave embed_tokens and lm_head out of train.lora.",
            )
        if output.exists():
            output.rmdir()
        os.replace(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Merge(output, difference, largest_logit)


def _save_merged(section: ModelSection, adapter: Path, folder: Path) -> torch.Tensor:
    """Write the merged model, and free its memory; returns the probe logits with the adapter beside the weights."""
    model = load_adapter(load_model(section), adapter)
    logits = _probe_logits(section, model)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise InputError(f"the adapter cannot be merged ({first_line(error)})", str(adapter)) from error
    merged.save_pretrained(str(folder))
    load_tokenizer(section).save_pretrained(str(folder))
    return logits


@torch.no_grad()
def _probe_logits(section: ModelSection, model: Any) -> torch.Tensor:
    """[tokens of all probe texts, vocabulary] float32 on the CPU."""
    tokenizer = load_tokenizer(section)
    texts = (torch.tensor([tokenizer.encode(text)], device=model.device) for text in PROBES)
    return torch.cat([model(input_ids=ids).logits[0].float().cpu() for ids in texts])


def _compared(logits: torch.Tensor, merged: torch.Tensor) -> tuple[float, float]:
    """Largest difference of a log-probability, and largest logit.

    A most likely token that is another one counts as twice the difference in its log-probability: greedy replies
    would go apart there.
    """
    before, after = logits.log_softmax(-1), merged.log_softmax(-1)
    lost = before.amax(-1) - before.gather(-1, after.argmax(-1, keepdim=True))[:, 0]
    return max(float((before - after).abs().max()), 2 * float(lost.max())), float(logits.abs().max())
