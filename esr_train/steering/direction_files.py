"""SAEs as sae-lens writes and publishes them."""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from esr_train.errors import InputError, first_line
from esr_train.models import check_layer_number, decoder_layers, hidden_size, local_path
from esr_train.steering.directions import DirectionSource, LoadedSae, VectorSet, sae_name
from esr_train.steering.readout import measure_residual_norm
from esr_train.transcript import SaeRef

HOOK_NAMES = re.compile(
    r"blocks\.(?P<into>\d+)\.hook_resid_pre|blocks\.(?P<block>\d+)\.hook_resid_post|"
    r"model\.layers\.(?P<layer>\d+)(?:\.output)?"
)
ENCODERS = ("standard", "gated", "jumprelu", "topk", "abstopk", "matching_pursuit")
"""sae-lens' architectures whose activations belong to a token by itself. Others still steer additively."""
INPUT_SCALES = ("layer_norm", "constant_norm_rescale")
"""Normalisations by each token's own size: a unit of activation adds another vector at every token."""


def load_sae(ref: SaeRef | str, id: str | None = None, *, model: Any = None, tokenizer: Any = None) -> LoadedSae:
    """Load an SAE from a local folder `release/id` if there is one, or else by sae-lens release and id.

    What the SAE was trained on is undone in its weights where that is possible, so that its decoder rows are in the
    units of the residual stream: a constant factor on activations (`expected_average_only_in`), whitening, decoder
    norms that are counted in the activations.

    Args:
        ref: a reference, or a release or folder.
        id: where `ref` is a text: the SAE's id or sub-folder; None: `ref` is the SAE's own folder.
        model: refuse an SAE that does not fit it, and measure the layer's residual norm, in which strengths may then
            be given.
        tokenizer: the model's; needed with `model`.

    Raises:
        InputError: an unknown release or id (near matches are named), a broken folder, a normalisation that is not
            known or cannot be undone, or an SAE that does not read and write the output of a decoder layer.
    """
    if isinstance(ref, str):
        ref = SaeRef(str(Path(ref).parent), Path(ref).name) if id is None else SaeRef(ref, id)
    local = _local(ref)
    module = _from_disk(local) if local else _from_directory(ref)
    _fold(module, local, ref)
    module.requires_grad_(False)
    n_latents, d_model = module.W_dec.shape
    kind, scale = module.cfg.architecture(), module.cfg.normalize_activations
    not_encoded = None if kind in ENCODERS else f"those of its architecture, {kind}, belong to no single token"
    scaled = f"its decoder scales with its input (normalize_activations={scale!r})"
    not_edited = scaled if scale in INPUT_SCALES else None
    size = _layer(module, ref), d_model, n_latents
    loaded = LoadedSae(ref, *size, module.eval(), not_encoded=not_encoded, not_edited=not_edited)
    if model is None:
        return loaded
    check_fits(loaded, model)
    return replace(loaded, residual_norm=measure_residual_norm(model, tokenizer, loaded.layer))


def outline_sae(ref: SaeRef) -> LoadedSae | None:
    """An SAE without its numbers: layer, width and size, from its configuration and the header of its weights.

    Returns:
        None for one that sae-lens publishes and whose configuration the hub does not give now.

    Raises:
        InputError: as `load_sae`, as far as names, configuration and header tell.
    """
    local = _local(ref)
    module = _module_outline(local, ref)
    if module is None:
        return None
    if local and module.cfg.normalize_activations != "covariance_whitening":
        _fold(module, local, ref)
    n_latents, d_model = module.W_dec.shape
    return LoadedSae(ref, _layer(module, ref), d_model, n_latents, module)


def _local(ref: SaeRef) -> Path | None:
    folder = local_path(str(Path(ref.release) / ref.id))
    return folder if folder and folder.is_dir() else None


def _module_outline(folder: Path | None, ref: SaeRef) -> Any:
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from safetensors import safe_open

    if folder is None:
        _known(ref)
    try:
        if folder:
            config = loaders.handle_config_defaulting(loaders.get_sae_lens_config_from_disk(folder))
        else:
            config = loaders.load_sae_config_from_huggingface(ref.release, ref.id)
        module: Any = SAE.from_dict({**config, "device": "meta"})
        module.cfg.device = "cpu"
        if folder:
            with safe_open(str(folder / "sae_weights.safetensors"), "pt") as weights:
                found, said = weights.get_slice("W_dec").get_shape(), list(module.W_dec.shape)
            if found != said:
                raise ValueError(f"W_dec is {found} in sae_weights.safetensors and {said} in cfg.json")
    # As in `_from_disk`: sae-lens has no error of its own.
    except Exception as error:
        if folder:
            raise _broken(folder, error) from error
        return None
    return module


def check_fits(source: DirectionSource, model: Any) -> None:
    """Refuse an SAE or vectors of another width, or for a layer that the model does not have.

    Raises:
        InputError: naming both sizes.
    """
    check_sizes(source, hidden_size(model), len(decoder_layers(model)))


def check_sizes(source: DirectionSource, width: int, layers: int) -> None:
    """As `check_fits`, for a model of which the width of the residual stream and the number of layers are known."""
    if isinstance(source, VectorSet):
        what, where = f"the vectors of {source.ref.file} are", f"vectors {source.ref.file}"
        fix = "Name a file of vectors that were made for this model."
    else:
        what, where = f"the SAE {sae_name(source.ref)} is", f"sae {sae_name(source.ref)}"
        fix = "Name an SAE that was trained on this model."
    if source.d_model != width:
        raise InputError(f"{what} {source.d_model} wide, the model's residual stream {width}", where.split()[0], fix)
    check_layer_number(source.layer, layers, where)


def _from_disk(folder: Path) -> Any:
    from sae_lens import SAE

    try:
        return SAE.load_from_disk(folder, device="cpu", dtype="float32")
    # sae-lens has no error of its own: a broken file shows as whatever it was that failed.
    except Exception as error:
        raise _broken(folder, error) from error


def _broken(folder: Path, error: Exception) -> InputError:
    return InputError(
        f"this is not an SAE in sae-lens format ({first_line(error)})",
        str(folder),
        "It needs cfg.json and sae_weights.safetensors, as SAE.save_model writes them.",
    )


def _from_directory(ref: SaeRef) -> Any:
    from sae_lens import SAE

    _known(ref)
    try:
        return SAE.from_pretrained(ref.release, ref.id, device="cpu", dtype="float32")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{sae_name(ref)} cannot be downloaded ({first_line(error)})",
            "sae",
            "Check the network, or name a local folder.",
        ) from error


def _known(ref: SaeRef) -> None:
    """Refuse a release or id that sae-lens does not know, naming near matches."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    if ref.release not in known:
        raise _unknown(f"no folder {ref.release}/{ref.id} and no sae-lens release", ref.release, known, "sae.release")
    ids = known[ref.release].saes_map
    if ref.id not in ids:
        raise _unknown(f"in the release {ref.release} there is no SAE", ref.id, ids, "sae.id")


def _unknown(what: str, name: str, known: Iterable[str], where: str) -> InputError:
    near = difflib.get_close_matches(name, list(known), n=4, cutoff=0.4)
    fix = (
        f"Near matches: {', '.join(near)}." if near else "See the table of pretrained SAEs in sae-lens' documentation."
    )
    return InputError(f"{what} {name!r}", where, fix)


def _fold(module: Any, folder: Path | None, ref: SaeRef) -> None:
    """Undo in the weights whatever scale the SAE was trained on, so that a unit of activation adds one decoder row.

    Of sae-lens' releases the factor is folded as they are loaded; a training's checkpoint has it, or its whitening,
    in files beside the weights.

    Raises:
        InputError: a scale that is not known, or one of which the files do not say enough.
    """
    scale = module.cfg.normalize_activations
    scaler = _scaler(folder)
    try:
        if scale == "expected_average_only_in" and scaler.scaling_factor:
            module.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        elif scale == "covariance_whitening" and (whitening := scaler.whitening):
            module.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
        elif scale == "constant_scalar_rescale":
            module.W_dec.data /= module.cfg.activation_normalization_factor
        elif scale not in ("none", *INPUT_SCALES):
            raise NotImplementedError
        # TopK SAEs may count activations in decoder norms; folded, activation times row is exact again.
        if getattr(module.cfg, "rescale_acts_by_decoder_norm", False):
            module.fold_W_dec_norm()
    # sae-lens raises it, too, for architectures in which it cannot fold a scale.
    except NotImplementedError:
        raise InputError(
            f"it was trained on rescaled activations (normalize_activations={scale!r}), and how they were rescaled is "
            "not known or cannot be undone in its weights, so strengths and activations would be wrong",
            f"sae {sae_name(ref)}",
            "Put the training's activation_scaler.json (and activation_whitening.safetensors) beside cfg.json, or fold "
            "the scale in sae-lens and save the SAE again.",
        ) from None


def _scaler(folder: Path | None) -> Any:
    """What a checkpoint says of its activations' scale: a factor, a whitening, or neither."""
    from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
    from sae_lens.training.activation_scaler import ActivationScaler

    scaler = ActivationScaler()
    if folder is None or not (file := folder / ACTIVATION_SCALER_CFG_FILENAME).is_file():
        return scaler
    try:
        scaler.load(file)
        factor = scaler.scaling_factor
        if factor is not None and (isinstance(factor, bool) or not 0 < factor < math.inf):
            raise ValueError(f"a factor of {factor}")
    except Exception as error:
        raise InputError(
            f"the scale of the SAE's activations cannot be read ({first_line(error)})", str(file)
        ) from error
    return scaler


def _layer(module: Any, ref: SaeRef) -> int:
    kind, name = module.cfg.architecture(), str(module.cfg.metadata.hook_name)
    match = HOOK_NAMES.fullmatch(name)
    if match and match["into"] != "0" and "transcoder" not in kind:
        # What goes into a layer is what comes out of the one below.
        return int(match["into"]) - 1 if match["into"] else int(match["block"] or match["layer"])
    raise InputError(
        f"the {kind} SAE reads {name!r}; it must read and write the output of a decoder layer",
        f"sae {sae_name(ref)}",
        "Use one trained on blocks.N.hook_resid_post.",
    )
