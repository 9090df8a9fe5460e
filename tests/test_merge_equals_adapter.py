"""A merged model says what its adapter said, also when it is read back; otherwise nothing is left of it."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from test_adapter_is_whole import LORA, adapted
from training_world import recipe

from esr_train.__main__ import main
from esr_train.adapters import load_adapter, merge
from esr_train.errors import InputError
from esr_train.models import load_model
from esr_train.recipe import ModelSection, dump_recipe


@pytest.fixture
def base(tmp_path, family) -> Path:
    family.model.save_pretrained(tmp_path / "model")
    family.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def section(path: Path, dtype: str = "float32") -> ModelSection:
    return ModelSection(path=str(path), dtype=dtype, device="cpu")


def lora(modules: list[str], **more) -> LoraConfig:
    return LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM", **more)


SAME = {
    "all linear layers": LORA,
    "some layers and another scale": lora(["q_proj"], layers_to_transform=[0, 2], use_rslora=True, lora_alpha=3),
    "DoRA": lora(["v_proj", "o_proj"], use_dora=True),
    "embeddings saved whole, which are no longer tied then": lora(["q_proj"], modules_to_save=["embed_tokens"]),
    "an output layer saved whole": lora(["q_proj"], modules_to_save=["lm_head"]),
}
OTHER = {
    "an adapter on tied embeddings": lora(["q_proj", "embed_tokens"]),
    "on nothing but tied embeddings": lora(["embed_tokens"]),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SAME)
def test_a_merge_that_differs_by_rounding_is_kept(base, tmp_path, kind, dtype):
    adapted(base, SAME[kind], tmp_path / "adapter")
    merged = merge(section(base, dtype), tmp_path / "adapter", tmp_path / "out")
    assert merged.largest_difference < {"float32": 1e-4, "bfloat16": 0.04}[dtype] * merged.largest_logit
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        tuned = load_adapter(load_model(section(base)), tmp_path / "adapter")(ids).logits
        again, plain = (load_model(section(path))(ids).logits for path in (tmp_path / "out", base))
    assert (again - tuned).abs().max() < {"float32": 1e-3, "bfloat16": 0.2}[dtype] * (plain - tuned).abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", OTHER)
def test_a_merge_that_is_another_model_is_refused_and_leaves_nothing(base, tmp_path, kind, dtype):
    adapted(base, OTHER[kind], tmp_path / "adapter")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"is not the adapter's: log-probabilities differ by up to .* rounding"):
        merge(section(base, dtype), tmp_path / "adapter", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_small_fault_in_merging_is_found(base, tmp_path, monkeypatch):
    """Of the size of the adapter's own rounding in bfloat16: only a strict bound in float32 finds it."""
    adapted(base, LORA, tmp_path / "adapter")
    given = "peft.tuners.lora.layer.Linear.get_delta_weight"
    monkeypatch.setattr(given, lambda self, name: 0.99 * (self.lora_B[name].weight @ self.lora_A[name].weight) * 2.0)
    with pytest.raises(InputError, match="is not the adapter's"):
        merge(section(base), tmp_path / "adapter", tmp_path / "out")


def test_a_fault_in_what_was_written_is_found(base, tmp_path, monkeypatch):
    adapted(base, LORA, tmp_path / "adapter")
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def spoiled(self, folder, **options):
        self.model.layers[0].mlp.down_proj.weight.data[3, 5] += 1.0
        save(self, folder, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoiled)
    with pytest.raises(InputError, match="is not the adapter's"):
        merge(section(base), tmp_path / "adapter", tmp_path / "out")


def test_weights_that_merging_makes_infinite_are_refused(base, tmp_path, monkeypatch):
    adapted(base, LORA, tmp_path / "adapter")
    given = "peft.tuners.lora.layer.Linear.get_delta_weight"
    monkeypatch.setattr(given, lambda self, name: self.weight * float("inf"))
    with pytest.raises(InputError, match="cannot be merged"):
        merge(section(base), tmp_path / "adapter", tmp_path / "out")


def test_a_file_is_no_folder_to_write_to(base, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="the folder is not empty"):
        merge(section(base), tmp_path / "adapter", tmp_path / "out")


def test_the_command_ends_with_exit_code_two(base, tmp_path, family, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapted(base, OTHER["an adapter on tied embeddings"], tmp_path / "runs" / "t" / "adapter" / "tuned")
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe(family.name)))
    assert main(["merge", "r.yaml", "--out", "out"]) == 2
    assert "tied to the output layer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
