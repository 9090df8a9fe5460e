"""An adapter at a share of its strength: a switch between the base model and the tuned one."""

import pytest
import torch
from peft.helpers import rescale_adapter_scale
from test_adapter_is_whole import LORA, adapted
from test_merge_equals_adapter import SAME, base, section  # noqa: F401

from esr_train.adapter_scale import scale_adapter
from esr_train.adapters import load_adapter
from esr_train.errors import InputError
from esr_train.models import load_model
from esr_train.recipe import ArmSection

IDS = torch.tensor([[1, 20, 30, 40]])


@pytest.mark.parametrize("kind", ["all linear layers", "some layers and another scale"])
@torch.no_grad()
def test_a_scaled_adapter_is_peft_s_own_scaling_and_one_is_the_adapter(base, tmp_path, kind):  # noqa: F811
    adapted(base, SAME[kind], tmp_path / "adapter")
    model = load_adapter(load_model(section(base)), tmp_path / "adapter")
    whole = model(IDS).logits
    for factor in (0.5, 1.0):
        scale_adapter(tmp_path / "adapter", factor, tmp_path / f"at {factor}")
        scaled = load_adapter(load_model(section(base)), tmp_path / f"at {factor}")(IDS).logits
        with rescale_adapter_scale(model, factor):
            assert torch.allclose(scaled, model(IDS).logits, atol=1e-5)
        assert torch.equal(scaled, whole) == (factor == 1)


@pytest.mark.parametrize("kind", ["DoRA", "an output layer saved whole"])
def test_what_is_more_than_lora_is_refused_and_nothing_is_left(base, tmp_path, kind):  # noqa: F811
    adapted(base, SAME[kind], tmp_path / "adapter")
    with pytest.raises(InputError, match="cannot be scaled"):
        scale_adapter(tmp_path / "adapter", 0.5, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_an_interrupted_copy_is_made_anew(base, tmp_path):  # noqa: F811
    adapted(base, LORA, tmp_path / "adapter")
    (tmp_path / ".out.partial").mkdir()
    scale_adapter(tmp_path / "adapter", 0.5, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()
    load_adapter(load_model(section(base)), tmp_path / "out")


@pytest.mark.parametrize("weights", [{"of": "base"}, {"model": "elsewhere"}])
def test_there_must_be_an_adapter_to_scale(weights):
    with pytest.raises(ValueError, match="no adapter to scale"):
        ArmSection(scale=0.5, **weights)
