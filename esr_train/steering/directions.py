"""SAEs as sources of directions: loading, residual norms, and both units of strength."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esr_train.errors import InputError
from esr_train.models import check_layer, decoder_layers, hidden_size, local_path
from esr_train.steering.interventions import Add, Positions
from esr_train.transcript import SaeRef, Strength

HOOK_NAMES = re.compile(r"(?:blocks\.(\d+)\.hook_resid_post|model\.layers\.(\d+)(?:\.output)?)")
INPUT_DEPENDENT_SCALES = ("constant_norm_rescale", "layer_norm")


@dataclass(frozen=True, eq=False)
class LoadedSae:
    """An SAE on the output of one decoder layer.

    Args:
        ref: where it came from.
        layer: the decoder layer whose output it reads.
        d_model: width of the residual stream it was trained on.
        n_latents: size of its dictionary.
        module: the sae-lens SAE, frozen, float32. It stays where it was loaded until `encode` meets an
            activation on another device; additive steering needs only rows and never moves it.
    """

    ref: SaeRef
    layer: int
    d_model: int
    n_latents: int
    module: Any

    def row(self, latent: int) -> torch.Tensor:
        """W_dec[latent], [d_model] float32: what one unit of activation adds to the residual stream.

        Raises:
            InputError: if the SAE has no such latent.
        """
        if not 0 <= latent < self.n_latents:
            raise InputError(
                f"there is no latent {latent}: the SAE has {self.n_latents}, counted from 0", _name(self.ref)
            )
        return self.module.W_dec[latent].detach().float()

    def encode(self, hidden: torch.Tensor) -> torch.Tensor:
        """Activations [..., n_latents] of hidden states [..., d_model], both float32.

        Raises:
            InputError: for an SAE whose decoder scales with its input, where a latent's share of the
                residual stream is not activation times decoder row.
        """
        scale = self.module.cfg.normalize_activations
        if scale in INPUT_DEPENDENT_SCALES:
            raise InputError(
                f"clamping and ablating are not defined for normalize_activations={scale!r}",
                _name(self.ref),
                "Use additive steering, or an SAE without input normalisation.",
            )
        if self.module.W_dec.device != hidden.device:
            self.module.to(hidden.device)
        found = self.module.encode(hidden.float())
        # TopK SAEs may answer in sparse tensors, which neither index nor gather.
        return found.to_dense() if found.is_sparse else found

    @cached_property
    def decoder_norms(self) -> torch.Tensor:
        """Norms of the decoder rows, [n_latents] float32 on the CPU."""
        return self.module.W_dec.detach().float().norm(dim=-1).cpu()

    def direction(self, latent: int, residual_norm: float, label: str | None = None) -> "Direction":
        """The unit vector of a latent's decoder row.

        Raises:
            InputError: if there is no such latent, or its decoder row is zero.
        """
        row = self.row(latent).cpu()
        norm = float(row.norm())
        if norm == 0:
            raise InputError(f"latent {latent} has a decoder row of zeros", _name(self.ref), "Take another latent.")
        return Direction(self.ref, self.layer, latent, label, row / norm, norm, residual_norm)


@dataclass(frozen=True, eq=False)
class Direction:
    """Where a latent steers, and how long a step is in either unit.

    Args:
        sae: the SAE it belongs to.
        layer: the decoder layer whose output is steered.
        latent: index in the SAE's dictionary.
        label: what the latent stands for, if known.
        unit: [d_model] float32 on the CPU, of norm 1.
        decoder_norm: norm of the latent's decoder row.
        residual_norm: the layer's median residual norm without BOS.
    """

    sae: SaeRef
    layer: int
    latent: int
    label: str | None
    unit: torch.Tensor
    decoder_norm: float
    residual_norm: float

    def strength(self, norm: float) -> Strength:
        """Both units of a strength given in residual norms."""
        return Strength(raw=norm * self.residual_norm / self.decoder_norm, norm=norm)

    def strength_from_raw(self, raw: float) -> Strength:
        """Both units of a strength given in decoder rows (the paper's b)."""
        return Strength(raw=raw, norm=raw * self.decoder_norm / self.residual_norm)

    def add(self, norm: float, positions: Positions = "all") -> Add:
        """Steer by `norm` median residual norms along the direction."""
        length = norm * self.residual_norm
        return Add(self.layer, self.unit * length, positions, along=(self.unit, length))


def load_sae(ref: SaeRef, device: str = "cpu") -> LoadedSae:
    """Load an SAE from a local folder `release/id` if there is one, or else by sae-lens release and id.

    Raises:
        InputError: an unknown release or id (near matches are named), a broken folder, or an SAE that does
            not read the output of a decoder layer.
    """
    folder = local_path(str(Path(ref.release) / ref.id))
    module = _from_disk(folder, device) if folder and folder.is_dir() else _from_directory(ref, device)
    # TopK SAEs may count activations in decoder norms; folded, activation times row is exact again.
    if getattr(module.cfg, "rescale_acts_by_decoder_norm", False):
        module.fold_W_dec_norm()
    module.requires_grad_(False)
    n_latents, d_model = module.W_dec.shape
    return LoadedSae(ref, _layer(module, ref), d_model, n_latents, module.eval())


def check_fits(sae: LoadedSae, model: Any) -> None:
    """Refuse an SAE of another width or for a layer that the model does not have.

    Raises:
        InputError: naming both sizes.
    """
    width = hidden_size(model)
    if sae.d_model != width:
        raise InputError(
            f"the SAE {_name(sae.ref)} is {sae.d_model} wide, the model's residual stream {width}",
            "sae",
            "Name an SAE that was trained on this model.",
        )
    check_layer(model, sae.layer, f"sae {_name(sae.ref)}")


def residual_norm(model: Any, tokenizer: Any, texts: Sequence[str], layer: int) -> float:
    """Median over tokens of ||h|| at the output of decoder layer `layer`; BOS and padding are left out.

    Args:
        model: in any wrapper; its training mode is left as it is found.
        tokenizer: its BOS is put in front of texts that do not begin with it.
        texts: plain or rendered.
        layer: counted from 0.

    Raises:
        InputError: if the layer does not exist, or there is no token besides BOS.
    """
    norms = [hidden.float().norm(dim=-1).cpu() for hidden in hidden_states(model, tokenizer, texts, layer)]
    if not norms:
        raise InputError("there is no text to measure the residual norm on")
    return float(torch.cat(norms).median())


def hidden_states(
    model: Any, tokenizer: Any, texts: Sequence[str], layer: int, rows: int = 1
) -> Iterator[torch.Tensor]:
    """The output of decoder layer `layer` for every text in turn, [tokens, d_model], without BOS and empty texts.

    Args:
        model: in any wrapper; its training mode is left as it is found.
        tokenizer: its BOS is put in front of texts that do not begin with it.
        texts: plain or rendered.
        layer: counted from 0.
        rows: texts of one forward pass.

    Raises:
        InputError: if the layer does not exist.
    """
    check_layer(model, layer, "layer")
    kept: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    training = model.training
    handle = decoder_layers(model)[layer].register_forward_hook(keep)
    try:
        model.eval()
        tokens = [ids for text in texts if len(ids := with_bos(tokenizer, text)) > 1]
        for batch in (tokens[start : start + rows] for start in range(0, len(tokens), rows)):
            with torch.no_grad():
                model(**_padded(batch, model.device), use_cache=False, logits_to_keep=1)
            states = kept.pop()
            for place, ids in enumerate(batch):
                yield states[place, 1 : len(ids)]
    finally:
        handle.remove()
        model.train(training)


def _name(ref: SaeRef) -> str:
    return f"{ref.release} / {ref.id}"


def _from_disk(folder: Path, device: str) -> Any:
    from sae_lens import SAE

    try:
        return SAE.load_from_disk(folder, device=device, dtype="float32")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(
            f"this is not an SAE in sae-lens format ({reason})",
            str(folder),
            "It needs cfg.json and sae_weights.safetensors, as SAE.save_model writes them.",
        ) from error


def _from_directory(ref: SaeRef, device: str) -> Any:
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    if ref.release not in known:
        raise _unknown(f"no folder {ref.release}/{ref.id} and no sae-lens release", ref.release, known, "sae.release")
    ids = known[ref.release].saes_map
    if ref.id not in ids:
        raise _unknown(f"in the release {ref.release} there is no SAE", ref.id, ids, "sae.id")
    try:
        return SAE.from_pretrained(ref.release, ref.id, device=device, dtype="float32")
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(
            f"{_name(ref)} cannot be downloaded ({reason})",
            "sae",
            "Check the network, or name a local folder.",
        ) from error


def _unknown(what: str, name: str, known: Iterable[str], where: str) -> InputError:
    near = difflib.get_close_matches(name, list(known), n=4, cutoff=0.4)
    fix = (
        f"Near matches: {', '.join(near)}." if near else "See the table of pretrained SAEs in sae-lens' documentation."
    )
    return InputError(f"{what} {name!r}", where, fix)


def _layer(module: Any, ref: SaeRef) -> int:
    name = str(module.cfg.metadata.hook_name)
    found = HOOK_NAMES.fullmatch(name)
    if not found:
        raise InputError(
            f"the SAE reads {name!r}, which is not the output of a decoder layer",
            f"sae {_name(ref)}",
            "Use one trained on blocks.N.hook_resid_post.",
        )
    return int(found[1] or found[2])


def _padded(batch: Sequence[Sequence[int]], device: Any) -> dict[str, torch.Tensor]:
    """Token ids padded on the right; no token before the padding sees it."""
    width = max(map(len, batch))
    ids = torch.tensor([[*each, *[0] * (width - len(each))] for each in batch], device=device)
    if len(batch) == 1:
        return {"input_ids": ids}
    mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in batch], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def with_bos(tokenizer: Any, text: str) -> list[int]:
    """A text's token ids with exactly one BOS in front, if the tokenizer has one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
