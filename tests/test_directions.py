"""Directions, both units of strength, and residual norms."""

import math

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from esr_train.errors import InputError
from esr_train.steering.direction_files import load_sae
from esr_train.steering.directions import SteeringVector
from esr_train.steering.readout import measure_residual_norm
from esr_train.transcript import SaeRef


def save(folder, *, width: int = 64, hook: str = "blocks.2.hook_resid_post", kind=JumpReLUSAE, config=None):
    torch.manual_seed(0)
    sae = kind(config or JumpReLUSAEConfig(d_in=width, d_sae=96))
    for parameter in sae.parameters():
        parameter.data = torch.randn_like(parameter)
    sae.cfg.metadata.hook_name = hook
    sae.save_model(folder)
    return sae


def test_an_sae_that_counts_in_decoder_norms_is_folded(tmp_path):
    config = TopKSAEConfig(d_in=64, d_sae=96, k=4, rescale_acts_by_decoder_norm=True)
    saved = save(tmp_path / "s", kind=TopKSAE, config=config)
    sae, hidden = load_sae(SaeRef(str(tmp_path), "s")), torch.randn(3, 64)
    torch.testing.assert_close(sae.decoder_norms(), torch.ones(96))
    dense = sae.encode(hidden)
    dense = dense.to_dense() if dense.is_sparse else dense
    rebuilt = dense @ torch.stack([sae.row(k) for k in range(96)]) + saved.b_dec
    torch.testing.assert_close(rebuilt, saved.decode(saved.encode(hidden)), atol=1e-4, rtol=1e-4)


def test_both_units_of_a_strength_are_the_same_vector(tmp_path):
    save(tmp_path / "s")
    sae = load_sae(SaeRef(str(tmp_path), "s"))
    direction = sae.direction(7, residual_norm=40.0, label="baking")
    strength = direction.strength(0.9)
    torch.testing.assert_close(direction.add(0.9).vector, sae.row(7) * strength.raw)
    assert direction.add(0.9).vector.norm().item() == pytest.approx(36.0, rel=1e-5)
    torch.testing.assert_close(direction.add(raw=strength.raw).vector, direction.add(0.9).vector)
    assert (direction.layer, direction.label, direction.add(1.0, "generated").positions) == (
        2,
        "baking",
        "generated",
    )


def test_latents_that_are_not_there_or_zero_are_bad_input(tmp_path):
    sae = save(tmp_path / "s")
    with torch.no_grad():
        sae.W_dec[3] = 0
    sae.save_model(tmp_path / "s")
    loaded = load_sae(SaeRef(str(tmp_path), "s"))
    for latent, message in [
        (96, "there is no latent 96: the SAE has 96"),
        (-1, "no latent -1"),
        (3, "zeros"),
    ]:
        with pytest.raises(InputError, match=message):
            loaded.direction(latent, 1.0)


def test_the_residual_norm_is_the_median_without_bos(family):
    texts = ["Knead the dough.", "Wait, raise the mast and trim the jib before the gale.", ""]
    norms = []
    for text in texts[:2]:
        ids = [family.tokenizer.bos_token_id, *family.tokenizer.encode(text, add_special_tokens=False)]
        with torch.no_grad():
            states = family.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        norms.append(states[2][0, 1:].norm(dim=-1))
    assert measure_residual_norm(family.model, family.tokenizer, 1, texts) == pytest.approx(
        float(torch.cat(norms).median())
    )


def test_a_rendered_text_does_not_get_a_second_bos(family):
    text, bos = "Knead the dough.", family.tokenizer.bos_token
    plain = measure_residual_norm(family.model, family.tokenizer, 1, [text])
    assert measure_residual_norm(family.model, family.tokenizer, 1, [bos + text]) == plain


def test_measuring_without_text_or_on_a_missing_layer_is_bad_input(family):
    with pytest.raises(InputError, match="no text"):
        measure_residual_norm(family.model, family.tokenizer, 1, [""])
    with pytest.raises(InputError, match="no layer 4"):
        measure_residual_norm(family.model, family.tokenizer, 4, ["a"])


@pytest.mark.parametrize("strength", [{"raw": math.nan}, {"raw": math.inf}, {"norm": -math.inf}, {"norm": "0.9"}])
def test_a_strength_that_is_no_finite_number_is_refused(strength):
    direction = SteeringVector(0, "v", torch.ones(4) / 2, 2.0, 1.0)
    with pytest.raises(InputError, match="cannot be added"):
        direction.add(**strength)
