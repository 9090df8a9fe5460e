"""Directions, units, labels and residual norms."""

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from esr_train.errors import InputError
from esr_train.steering.direction_files import check_fits, load_sae
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


@pytest.mark.parametrize(
    ("hook", "layer"),
    [("blocks.2.hook_resid_post", 2), ("model.layers.19", 19), ("model.layers.3.output", 3)],
)
def test_a_local_folder_is_loaded_and_its_layer_parsed(tmp_path, hook, layer):
    saved = save(tmp_path / "saes" / "first", hook=hook)
    sae = load_sae(SaeRef(str(tmp_path / "saes"), "first"))
    assert (sae.layer, sae.d_model, sae.n_latents) == (layer, 64, 96)
    assert torch.equal(sae.row(5), saved.W_dec[5])
    hidden = torch.randn(3, 64)
    torch.testing.assert_close(sae.encode(hidden), saved.encode(hidden))
    torch.testing.assert_close(sae.decoder_norms(), saved.W_dec.detach().norm(dim=1))


def test_relative_folders_are_taken_from_the_current_directory(tmp_path, monkeypatch):
    save(tmp_path / "here" / "first")
    monkeypatch.chdir(tmp_path)
    assert load_sae(SaeRef("here", "first")).layer == 2


def test_an_sae_that_counts_in_decoder_norms_is_folded(tmp_path):
    config = TopKSAEConfig(d_in=64, d_sae=96, k=4, rescale_acts_by_decoder_norm=True)
    saved = save(tmp_path / "s", kind=TopKSAE, config=config)
    sae, hidden = load_sae(SaeRef(str(tmp_path), "s")), torch.randn(3, 64)
    torch.testing.assert_close(sae.decoder_norms(), torch.ones(96))
    dense = sae.encode(hidden)
    dense = dense.to_dense() if dense.is_sparse else dense
    rebuilt = dense @ torch.stack([sae.row(k) for k in range(96)]) + saved.b_dec
    torch.testing.assert_close(rebuilt, saved.decode(saved.encode(hidden)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (SaeRef("gemma-scope-9b-pt-res-canonica", "x"), "Near matches:.*gemma-scope-9b-pt-res-canonical"),
        (
            SaeRef("gemma-scope-9b-pt-res-canonical", "layer_26/width_16k/canonica"),
            "layer_26/width_16k/canonical",
        ),
    ],
)
def test_unknown_names_are_answered_with_near_matches(ref, message):
    with pytest.raises(InputError, match=message):
        load_sae(ref)


def test_a_folder_without_an_sae_and_a_hook_off_the_stream_are_bad_input(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not an SAE in sae-lens format"):
        load_sae(SaeRef(str(tmp_path), "empty"))
    save(tmp_path / "mlp", hook="blocks.2.hook_mlp_out")
    with pytest.raises(InputError, match="hook_mlp_out"):
        load_sae(SaeRef(str(tmp_path), "mlp"))


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


def test_an_sae_must_fit_the_model(tmp_path, llama):
    for name, options, message in [
        ("wide", {"width": 128}, "128 wide, the model's residual stream 64"),
        ("deep", {"hook": "blocks.9.hook_resid_post"}, "there is no layer 9: the model has 4"),
    ]:
        save(tmp_path / name, **options)
        with pytest.raises(InputError, match=message):
            check_fits(load_sae(SaeRef(str(tmp_path), name)), llama.model)
    save(tmp_path / "fits")
    check_fits(load_sae(SaeRef(str(tmp_path), "fits")), llama.model)


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
