"""An SAE's scale is understood or refused: one unit of activation adds one decoder row, whatever it was trained on."""

import json
from pathlib import Path

import pytest
import torch
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TemporalSAE,
    TemporalSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.training.activation_scaler import ActivationScaler

from esr_train.errors import InputError
from esr_train.steering.direction_files import load_sae
from esr_train.steering.directions import Add, LoadedSae
from esr_train.steering.hook import SteeringHook
from esr_train.steering.interventions import Ablate, Clamp
from esr_train.steering.readout import active_latents

WIDTH, LATENTS, FACTOR = 64, 96, 1.47
SIZES = {"d_in": WIDTH, "d_sae": LATENTS}
KINDS = {
    "standard": lambda **more: StandardSAE(StandardSAEConfig(**SIZES, **more)),
    "standard, input not centred": lambda **more: StandardSAE(
        StandardSAEConfig(**SIZES, apply_b_dec_to_input=False, **more)
    ),
    "gated": lambda **more: GatedSAE(GatedSAEConfig(**SIZES, **more)),
    "gated, input not centred": lambda **more: GatedSAE(GatedSAEConfig(**SIZES, apply_b_dec_to_input=False, **more)),
    "jumprelu": lambda **more: JumpReLUSAE(JumpReLUSAEConfig(**SIZES, **more)),
    "topk": lambda **more: TopKSAE(TopKSAEConfig(**SIZES, k=7, **more)),
    "topk, in decoder norms": lambda **more: TopKSAE(
        TopKSAEConfig(**SIZES, k=7, rescale_acts_by_decoder_norm=True, **more)
    ),
}
TEMPORAL = {**SIZES, "n_heads": 2, "bottleneck_factor": 4, "activation_normalization_factor": FACTOR, "kval_topk": 4}


def made(kind: str, normalisation: str, **more) -> SAE:
    torch.manual_seed(0)
    sae = KINDS[kind](normalize_activations=normalisation, **more)
    for name, parameter in sae.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
        if name == "threshold":
            parameter.data = parameter.data.abs()
    return sae


def save(sae: SAE, folder: Path, scaler: ActivationScaler | None = None) -> str:
    """The SAE as a checkpoint of sae-lens' trainer holds it."""
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(folder)
    if scaler:
        scaler.save(str(folder / "activation_scaler.json"))
    return str(folder)


def whitening() -> ActivationScaler:
    made = ActivationScaler()
    states = torch.randn(4, 500, WIDTH, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.5, 3, WIDTH) + 1
    made.estimate_whitening(WIDTH, iter(states), n_batches_for_norm_estimate=4)
    return made


def states() -> torch.Tensor:
    return torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(2)) * 2 + 1


def assert_one_unit_adds_one_row(loaded: LoadedSae, trained: SAE, scaler: ActivationScaler) -> None:
    """Against what sae-lens does while it trains: scale, encode, decode, scale back.

    What TopK calls an activation counts in decoder norms there; what it adds to the stream is the same.
    """
    hidden = states()
    with torch.no_grad():
        active = trained.encode(scaler.scale(hidden))
        active = active.to_dense() if active.is_sparse else active
        rebuilt = scaler.unscale(trained.decode(active))
    activations = loaded.encode(hidden)
    assert torch.equal(activations != 0, active != 0)
    assert 0 < int((activations != 0).sum()) < activations.numel()
    rows = torch.stack([loaded.row(k) for k in range(LATENTS)])
    constant = (rebuilt - activations @ rows).mean(dim=0)
    torch.testing.assert_close(activations @ rows + constant, rebuilt, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_factor_on_activations_is_folded(kind, tmp_path):
    sae = made(kind, "expected_average_only_in")
    scaler = ActivationScaler(scaling_factor=FACTOR)
    loaded = load_sae(save(sae, tmp_path / "s", scaler))
    assert_one_unit_adds_one_row(loaded, sae, scaler)
    if kind != "topk, in decoder norms":
        torch.testing.assert_close(loaded.row(5), sae.W_dec[5] / FACTOR)
        torch.testing.assert_close(loaded.direction(5).add(raw=2.0).vector, 2 * sae.W_dec[5].detach() / FACTOR)


@pytest.mark.parametrize("kind", KINDS)
def test_whitening_is_folded(kind, tmp_path):
    sae, scaler = made(kind, "covariance_whitening"), whitening()
    assert_one_unit_adds_one_row(load_sae(save(sae, tmp_path / "s", scaler)), sae, scaler)


@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_without_normalisation_stays_what_it_is(kind, tmp_path):
    sae = made(kind, "none")
    assert_one_unit_adds_one_row(load_sae(save(sae, tmp_path / "s")), sae, ActivationScaler())


def test_as_many_latents_are_active_on_a_text_as_in_training(tmp_path, llama):
    sae, scaler = made("standard", "expected_average_only_in"), ActivationScaler(scaling_factor=FACTOR)
    loaded = load_sae(save(sae, tmp_path / "s", scaler))
    found = active_latents(llama.model, llama.tokenizer, loaded, ["Knead the dough."])
    ids = [llama.tokenizer.bos_token_id, *llama.tokenizer.encode("Knead the dough.", add_special_tokens=False)]
    with torch.no_grad():
        hidden = llama.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0, 1:]
        wanted = (sae.encode(scaler.scale(hidden)) != 0).any(dim=0)
        unscaled = (sae.encode(hidden) != 0).any(dim=0)
    assert torch.equal(found, wanted)
    assert not torch.equal(wanted, unscaled), "the factor must matter for this test to say anything"


@pytest.mark.parametrize("normalisation", ["expected_average_only_in", "covariance_whitening"])
def test_a_scale_of_which_the_folder_does_not_say_enough_is_refused(normalisation, tmp_path):
    folder = save(made("standard", normalisation), tmp_path / "s")
    with pytest.raises(InputError, match=rf"normalize_activations='{normalisation}'.*activation_scaler\.json"):
        load_sae(folder)
    ActivationScaler().save(f"{folder}/activation_scaler.json")
    with pytest.raises(InputError, match="not known or cannot be undone"):
        load_sae(folder)


@pytest.mark.parametrize("factor", ["0", "-1.47", "NaN", "Infinity", '"1.47"', "[1.47]", "{", "true"])
def test_a_factor_that_is_no_positive_number_is_refused(factor, tmp_path):
    folder = save(made("standard", "expected_average_only_in"), tmp_path / "s")
    (tmp_path / "s" / "activation_scaler.json").write_text(f'{{"scaling_factor": {factor}}}')
    with pytest.raises(InputError, match=r"activation_scaler\.json: the scale of the SAE's activations cannot be read"):
        load_sae(folder)


def test_a_switch_of_old_configurations_is_understood(tmp_path):
    """Before sae-lens 6, `true` meant a constant factor."""
    folder = save(made("standard", "none"), tmp_path / "s")
    config = {"architecture": "standard", **SIZES, "dtype": "float32", "hook_point": "blocks.1.hook_resid_post"}
    for value in (True, False):
        written = {**config, "normalize_activations": value}
        (tmp_path / "s" / "cfg.json").write_text(json.dumps(written))
        if value:
            with pytest.raises(InputError, match="expected_average_only_in"):
                load_sae(folder)
        else:
            assert load_sae(folder).layer == 1


@pytest.mark.parametrize("name", ["rms_norm", "constant_scalar_rescale", 3])
def test_a_normalisation_that_is_not_known_is_refused(name, tmp_path):
    folder = save(made("standard", "none"), tmp_path / "s")
    path = tmp_path / "s" / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalize_activations": name}))
    with pytest.raises(InputError, match="normalize_activations"):
        load_sae(folder)


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_an_sae_that_scales_with_its_input_selects_and_adds_and_is_not_edited(normalisation, tmp_path, llama):
    sae = made("standard", normalisation)
    loaded = load_sae(save(sae, tmp_path / "s"))
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(states()), sae.encode(states()))
    assert bool(active_latents(llama.model, llama.tokenizer, loaded, ["Knead the dough."]).any())
    torch.testing.assert_close(loaded.direction(5).add(raw=2.0).vector, 2 * sae.W_dec[5].detach())
    for how, edit in (("clamped", lambda: Clamp(loaded, 5, 1.0)), ("ablated", lambda: Ablate(loaded, (5,)))):
        with pytest.raises(InputError, match=rf"cannot be {how}: its decoder scales with its input.*{normalisation}"):
            edit()


def test_a_temporal_sae_adds_and_is_neither_read_nor_edited(tmp_path):
    torch.manual_seed(0)
    sae = TemporalSAE(TemporalSAEConfig(**TEMPORAL, normalize_activations="constant_scalar_rescale"))
    loaded = load_sae(save(sae, tmp_path / "s"))
    torch.testing.assert_close(loaded.row(5), sae.W_dec[5].detach() / FACTOR)
    reading, clamping, ablating = (
        lambda: loaded.encode(states()),
        lambda: Clamp(loaded, 5, 1.0),
        lambda: Ablate(loaded, (5,)),
    )
    for how, use in (("read", reading), ("clamped", clamping), ("ablated", ablating)):
        with pytest.raises(InputError, match=rf"latents cannot be {how}: .*temporal, belong to no single token"):
            use()


def test_matching_pursuit_is_scaled_back_and_its_whitening_refused(tmp_path):
    torch.manual_seed(0)
    config = MatchingPursuitSAEConfig(**SIZES, residual_threshold=8.0, normalize_activations="expected_average_only_in")
    sae, scaler = MatchingPursuitSAE(config), ActivationScaler(scaling_factor=FACTOR)
    sae.W_dec.data = torch.nn.functional.normalize(torch.randn(LATENTS, WIDTH), dim=1)
    loaded = load_sae(save(sae, tmp_path / "s", scaler))
    with torch.no_grad():
        active = sae.encode(scaler.scale(states()))
    torch.testing.assert_close(loaded.encode(states()), active / FACTOR, atol=1e-4, rtol=1e-3)
    sae.cfg.normalize_activations = "covariance_whitening"
    with pytest.raises(InputError, match="not known or cannot be undone"):
        load_sae(save(sae, tmp_path / "w", whitening()))


def test_a_transcoder_is_no_sae_of_the_stream_it_reads(tmp_path):
    transcoder = Transcoder(TranscoderConfig(**SIZES, d_out=WIDTH, apply_b_dec_to_input=False))
    with pytest.raises(InputError, match=r"the transcoder SAE reads .* it must read and write the output"):
        load_sae(save(transcoder, tmp_path / "s"))


def test_a_clamp_after_folding_sets_what_training_called_that_activation(tmp_path, llama):
    """The whole way: hook, encoder and rows in the residual stream's own units."""
    sae, scaler = made("jumprelu", "expected_average_only_in"), ActivationScaler(scaling_factor=FACTOR)
    loaded = load_sae(save(sae, tmp_path / "s", scaler))
    kept: list[torch.Tensor] = []
    layer = llama.model.model.layers[1]
    ids = torch.tensor([[5, 6, 7, 8]])
    for edit in (Add(1, torch.zeros(WIDTH)), Clamp(loaded, 5, 3.0)):
        with SteeringHook(llama.model, [[edit]]) as hook, torch.no_grad():
            hook.set_rows(torch.zeros_like(ids))
            handle = layer.register_forward_hook(lambda _, __, out: kept.append(out[0]))
            llama.model(ids)
            handle.remove()
    before, after = kept
    with torch.no_grad():
        active = sae.encode(scaler.scale(before))
        change = (3.0 - active[:, 5:6]) * sae.W_dec[5] / FACTOR
    torch.testing.assert_close(after, before + change, atol=1e-4, rtol=1e-4)
