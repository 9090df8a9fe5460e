"""The steering hook against arithmetic written out by hand."""

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from torch import nn

from esr_train.errors import InputError, RunError
from esr_train.models import decoder_layers
from esr_train.steering.directions import Add, LoadedSae
from esr_train.steering.hook import SteeringHook
from esr_train.steering.interventions import Ablate, Amplify, Clamp
from esr_train.transcript import SaeRef

LAYER = 2
WIDTH = 64


def vector(seed: int, size: float = 3.0) -> torch.Tensor:
    return size * torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sae() -> LoadedSae:
    torch.manual_seed(3)
    module = JumpReLUSAE(JumpReLUSAEConfig(d_in=WIDTH, d_sae=96))
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    module.threshold.data = torch.full_like(module.threshold, 0.2)
    return LoadedSae(SaeRef("test", "random"), LAYER, WIDTH, 96, module.requires_grad_(False))


def outputs(model: nn.Module, layer: int, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What leaves `layer`, hooks included."""
    kept: list[torch.Tensor] = []
    handle = decoder_layers(model)[layer].register_forward_hook(
        lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
    finally:
        handle.remove()
    return kept[0]


def ids_of(family, rows: int = 3, positions: int = 5) -> torch.Tensor:
    return torch.randint(10, len(family.tokenizer), (rows, positions), generator=torch.Generator().manual_seed(1))


def rows_of(rows: int, positions: int) -> torch.Tensor:
    return torch.arange(rows)[:, None].expand(rows, positions).contiguous()


def test_every_row_moves_by_exactly_its_own_vector(family):
    ids = ids_of(family)
    before = outputs(family.model, LAYER, ids)
    with SteeringHook(family.model, [[Add(LAYER, vector(0))], [], [Add(LAYER, vector(2))]]) as hook:
        hook.set_rows(rows_of(3, 5))
        after = outputs(family.model, LAYER, ids)
    assert torch.equal(after[0], before[0] + vector(0))
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2] + vector(2))
    assert hook.counts() == {LAYER: [5, 0, 5]}


def test_a_layer_that_returns_a_tuple_is_steered_the_same_way():
    class Layer(nn.Module):
        def forward(self, hidden):
            return (hidden, "cache")

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer()])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Inner()
            text = type("Config", (), {"hidden_size": WIDTH})
            self.config = type("Outer", (), {"get_text_config": lambda self: text})()

        def forward(self, hidden):
            return self.model.layers[0](hidden)

    hidden = torch.randn(2, 3, WIDTH)
    model = Model()
    with SteeringHook(model, [[Add(0, vector(0))], [Add(0, vector(1))]]) as hook:
        hook.set_rows(rows_of(2, 3))
        out, cache = model(hidden)
    assert cache == "cache"
    assert torch.equal(out, hidden + torch.stack([vector(0), vector(1)])[:, None])


def test_strength_zero_leaves_every_bit_of_the_logits(family):
    ids = ids_of(family)
    with torch.no_grad():
        plain = family.model(ids).logits
        with SteeringHook(family.model, [[Add(LAYER, torch.zeros(WIDTH))]] * 3) as hook:
            hook.set_rows(rows_of(3, 5))
            steered = family.model(ids).logits
    assert torch.equal(plain, steered)
    assert hook.counts() == {LAYER: [5, 5, 5]}


def test_padding_is_neither_steered_nor_counted(family):
    ids, index = ids_of(family, 2, 5), rows_of(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    index = torch.where(mask.bool(), index, -1)
    before = outputs(family.model, LAYER, ids, mask)
    with SteeringHook(family.model, [[Add(LAYER, vector(0))], [Add(LAYER, vector(1))]]) as hook:
        hook.set_rows(index)
        after = outputs(family.model, LAYER, ids, mask)
    assert torch.equal(after[0, :2], before[0, :2])
    assert torch.equal(after[0, 2:], before[0, 2:] + vector(0))
    assert hook.counts() == {LAYER: [3, 5]}


def test_generated_positions_begin_at_the_reply(family):
    ids = ids_of(family, 1, 5)
    reply = torch.tensor([[False, False, False, True, True]])
    interventions = [Add(LAYER, vector(0), "generated"), Add(LAYER, vector(1), "all")]
    before = outputs(family.model, LAYER, ids)
    with SteeringHook(family.model, [interventions]) as hook:
        hook.set_rows(rows_of(1, 5), reply)
        after = outputs(family.model, LAYER, ids)
    torch.testing.assert_close(after[0, :3], before[0, :3] + vector(1))
    torch.testing.assert_close(after[0, 3:], before[0, 3:] + vector(0) + vector(1))
    with SteeringHook(family.model, [interventions[:1]]) as hook:
        hook.set_rows(rows_of(1, 5), reply)
        outputs(family.model, LAYER, ids)
    assert hook.counts() == {LAYER: [2]}


def test_several_documents_in_one_row_keep_their_own_vectors(family):
    ids = ids_of(family, 1, 6)
    before = outputs(family.model, LAYER, ids)
    with SteeringHook(family.model, [[Add(LAYER, vector(0))], [], [Add(LAYER, vector(2))]]) as hook:
        hook.set_rows(torch.tensor([[0, 0, 1, 2, 2, 2]]))
        after = outputs(family.model, LAYER, ids)
    assert torch.equal(after - before != 0, torch.tensor([1, 1, 0, 1, 1, 1])[None, :, None].bool().expand(1, 6, WIDTH))
    assert hook.counts() == {LAYER: [2, 0, 3]}


def test_several_layers_are_steered_and_counted_apart(family):
    ids = ids_of(family, 2, 4)
    with SteeringHook(family.model, [[Add(0, vector(0)), Add(3, vector(1))], [Add(3, vector(1))]]) as hook:
        hook.set_rows(rows_of(2, 4))
        outputs(family.model, 0, ids)
    assert hook.counts() == {0: [4, 0], 3: [4, 4]}


def reference(sae: LoadedSae, hidden: torch.Tensor, latents: list[int], value: float) -> torch.Tensor:
    """Decode with the latents set, the reconstruction error kept; sae-lens alone."""
    module = sae.module
    activations = module.encode(hidden)
    error = hidden - module.decode(activations)
    changed = activations.clone()
    changed[..., latents] = value
    return module.decode(changed) + error


def test_clamp_and_ablate_equal_decoding_with_the_reconstruction_error_kept(family, sae):
    ids = ids_of(family, 4, 5)
    before = outputs(family.model, LAYER, ids)
    active = sae.module.encode(before).sum(dim=(0, 1)).topk(3).indices.tolist()
    row_interventions = [
        [Clamp(sae, active[0], 7.5)],
        [Ablate(sae, tuple(active))],
        [],
        [Add(LAYER, vector(1))],
    ]
    with SteeringHook(family.model, row_interventions) as hook:
        hook.set_rows(rows_of(4, 5))
        after = outputs(family.model, LAYER, ids)
    for row, (latents, value) in enumerate([(active[:1], 7.5), (active, 0.0)]):
        expected = reference(sae, before[row], latents, value)
        assert not torch.allclose(expected, before[row], atol=1e-2)
        torch.testing.assert_close(after[row], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(after[2], before[2])
    assert torch.equal(after[3], before[3] + vector(1))
    assert hook.counts() == {LAYER: [5, 5, 0, 5]}


def test_amplify_multiplies_activations_and_keeps_the_reconstruction_error(family, sae):
    ids = ids_of(family, 2, 5)
    before = outputs(family.model, LAYER, ids)
    activations = sae.module.encode(before)
    active = activations.sum(dim=(0, 1)).topk(2).indices.tolist()
    with SteeringHook(family.model, [[Amplify(sae, tuple(active), 3.0)], [Amplify(sae, tuple(active), 1.0)]]) as hook:
        hook.set_rows(rows_of(2, 5))
        after = outputs(family.model, LAYER, ids)
    added = 2 * activations[0][:, active] @ sae.module.W_dec[active]
    torch.testing.assert_close(after[0], before[0] + added, atol=1e-4, rtol=1e-4)
    assert torch.equal(after[1], before[1])
    assert added.norm() > 0.1


def test_interventions_of_a_row_follow_one_another(family, sae):
    ids = ids_of(family, 3, 5)
    before = outputs(family.model, LAYER, ids)
    add, clamp, ablate = Add(LAYER, vector(4)), Clamp(sae, 5, 4.0), Ablate(sae, (5, 6))
    again = Clamp(sae, 7, 2.0)
    with SteeringHook(family.model, [[add, clamp], [clamp, add, ablate], [clamp, again]]) as hook:
        hook.set_rows(rows_of(3, 5))
        after = outputs(family.model, LAYER, ids)
    torch.testing.assert_close(after[0], reference(sae, before[0] + vector(4), [5], 4.0), atol=1e-4, rtol=1e-4)
    moved = reference(sae, before[1], [5], 4.0) + vector(4)
    torch.testing.assert_close(after[1], reference(sae, moved, [5, 6], 0.0), atol=1e-4, rtol=1e-4)
    twice = reference(sae, reference(sae, before[2], [5], 4.0), [7], 2.0)
    torch.testing.assert_close(after[2], twice, atol=1e-4, rtol=1e-4)


def test_clamping_generated_positions_leaves_the_prompt_alone(family, sae):
    ids, reply = ids_of(family, 1, 5), torch.tensor([[False, False, True, True, True]])
    before = outputs(family.model, LAYER, ids)
    with SteeringHook(family.model, [[Clamp(sae, 5, 4.0, "generated")]]) as hook:
        hook.set_rows(rows_of(1, 5), reply)
        after = outputs(family.model, LAYER, ids)
    assert torch.equal(after[0, :2], before[0, :2])
    assert (after[0, 2:] != before[0, 2:]).any(dim=-1).all()
    assert hook.counts() == {LAYER: [3]}


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_in_the_backward_pass_steers_again_and_counts_once(family, reentrant):
    from copy import deepcopy

    def gradient(checkpointing: bool) -> tuple[torch.Tensor, dict[int, list[int]]]:
        model = deepcopy(family.model).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with SteeringHook(model, [[Add(LAYER, vector(0))], []]) as hook:
            hook.set_rows(rows_of(2, 5))
            ids = ids_of(family, 2, 5)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return decoder_layers(model)[0].mlp.up_proj.weight.grad, hook.counts()

    plain, counts = gradient(False)
    again, counts_again = gradient(True)
    torch.testing.assert_close(plain, again)
    assert counts == counts_again == {LAYER: [5, 0]}


def test_the_hidden_states_keep_their_dtype(family, sae):
    from copy import deepcopy

    model = deepcopy(family.model).to(torch.bfloat16)
    with SteeringHook(model, [[Add(LAYER, vector(0))], [Clamp(sae, 5, 4.0)]]) as hook:
        hook.set_rows(rows_of(2, 5))
        after = outputs(model, LAYER, ids_of(family, 2, 5))
    assert after.dtype == torch.bfloat16


def test_rows_of_another_shape_are_refused_rather_than_applied_to_wrong_tokens(family):
    with SteeringHook(family.model, [[Add(LAYER, vector(0))]] * 2) as hook:
        with pytest.raises(RunError, match="set for None"):
            family.model(ids_of(family, 2, 5))
        hook.set_rows(rows_of(2, 4))
        with pytest.raises(RunError, match=r"\(2, 5\).*\(2, 4\)"):
            family.model(ids_of(family, 2, 5))


def test_hooks_are_gone_after_an_error(family):
    hooks = decoder_layers(family.model)[LAYER]._forward_hooks
    before = len(hooks)
    with SteeringHook(family.model, [[Add(LAYER, vector(0))]]):
        assert len(hooks) == before + 1
    with pytest.raises(KeyError), SteeringHook(family.model, [[Add(LAYER, vector(0))]]):
        raise KeyError
    assert len(hooks) == before


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (Add(9, torch.zeros(WIDTH)), "there is no layer 9: the model has 4"),
        (Add(0, torch.zeros(32)), "64 wide"),
    ],
)
def test_what_does_not_fit_the_model_is_bad_input(family, intervention, message):
    with pytest.raises(InputError, match=message):
        SteeringHook(family.model, [[intervention]])
