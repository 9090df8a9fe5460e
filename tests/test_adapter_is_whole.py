"""An adapter is whole, finite and made for this model, or it is refused wherever one is read."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from esr_train.adapters import base_weights, check_adapter, load_adapter, merge
from esr_train.errors import InputError
from esr_train.models import load_model, load_tokenizer
from esr_train.recipe import ModelSection
from esr_train.steering.vllm.vllm_engine import VllmEngine
from tests.conftest import make_family

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Models of both families; a Llama with other weights under the first one's name; an adapter of the first."""
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "gemma"):
        family = make_family(name)
        family.model.save_pretrained(root / name)
        family.tokenizer.save_pretrained(root / name)
    shutil.copytree(root / "llama", root / "elsewhere" / "llama")
    shutil.copytree(root / "llama", root / "copied")
    other = load_model(section(root / "elsewhere" / "llama"))
    other.model.layers[0].mlp.up_proj.weight.data += 0.01
    other.save_pretrained(root / "elsewhere" / "llama")
    adapted(root / "llama", LORA, root / "adapter")
    return {path.name: path for path in root.iterdir()}


def section(path: Path) -> ModelSection:
    return ModelSection(path=str(path), dtype="float32", device="cpu")


def adapted(base: Path, config, folder: Path, vocabulary: int | None = None) -> PeftModel:
    """Save an adapter with random weights; the model with it is returned."""
    model = load_model(section(base))
    if vocabulary:
        model.resize_token_embeddings(vocabulary)
    torch.manual_seed(0)
    tuned = get_peft_model(model, copy.deepcopy(config))
    for name, weight in tuned.named_parameters():
        if weight.requires_grad and "lora_A" not in name and "embedding_B" not in name:
            weight.data = weight.data + 0.05 * torch.randn_like(weight)
    tuned.save_pretrained(folder, save_embedding_layers=bool(vocabulary) or "auto")
    return tuned.eval()


def weights(change):
    """A mutation of the saved weights; `change` gets the dictionary and returns another."""

    def mutate(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return mutate


def without(part: str, number: int | None = None):
    """Leave out weights with `part` in their name, all of them or so many."""

    def change(values):
        left_out = [name for name in values if part in name][:number]
        return {name: value for name, value in values.items() if name not in left_out}

    return weights(change)


def fill(part: str, value: float):
    """Set one number in the first weight with `part` in its name."""

    def change(values):
        name = next(name for name in values if part in name)
        values[name].view(-1)[3] = value
        return values

    return weights(change)


def untrained(values):
    return {name: value * ("lora_A" in name) for name, value in values.items()}


def renamed(values):
    return {name.replace("layers.3.", "layers.7."): value for name, value in values.items()}


def emptied(values):
    return {name: torch.empty(0) if "layers.1.self_attn.q_proj.lora_A" in name else v for name, v in values.items()}


def another(values):
    return {**values, "base_model.model.model.layers.0.other.lora_A.weight": torch.ones(4, 64)}


def configured(**values):
    def mutate(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return mutate


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def cut_short(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


BROKEN = {
    "a NaN in one B": (fill("lora_B", float("nan")), r"lora_B.* is not finite"),
    "an infinity in one A": (fill("lora_A", float("inf")), r"lora_A.* is not finite"),
    "an empty weight": (weights(emptied), r"lora_A.* is empty"),
    "every B zero": (weights(untrained), "every B matrix of the adapter is zero"),
    "a weight that is missing": (without("lora_B", 1), "1 weights are missing, such as .*lora_B"),
    "a layer that is missing": (without("layers.3."), r"14 weights are missing, such as .*layers\.3"),
    "a weight too many": (weights(another), "1 belong to nothing in it"),
    "layers that the model does not have": (weights(renamed), r"belong to nothing in it, such as .*layers\.7"),
    "another rank in the configuration": (configured(r=8), r"does not fit the model: .* \[4, 64\] in the adapter"),
    "other modules in the configuration": (configured(target_modules=["q_proj"]), "belong to nothing"),
    "modules that no model has": (configured(target_modules=["w_pack"]), "does not fit the model .*w_pack"),
    "a hub id of another model": (configured(base_model_name_or_path="some/model-8b"), "made for 'some/model-8b'"),
    "a configuration that is no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "config"),
    "a type that peft does not know": (configured(peft_type="LORE"), "no adapter's configuration"),
    "a base that its start has changed": (configured(init_lora_weights="pissa_niter_4"), "changed copy .*pissa"),
    "layers that it repeats": (configured(layer_replication=[[0, 2], [1, 4]]), "changed copy of its base model"),
    "weights in a pickle": (pickled, "adapter_model.bin, a pickle.*save_pretrained"),
    "weights that are cut short": (cut_short, "weights cannot be read"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"\.safetensors is missing"),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "there is no adapter here"),
}


def entries(base: Path, folder: Path, out: Path):
    """Each way in which an adapter is read."""
    return (
        lambda: check_adapter(folder, section(base)),
        lambda: load_adapter(load_model(section(base)), folder),
        lambda: merge(section(base), folder, out),
        lambda: served(base, folder),
    )


def served(base: Path, folder: Path) -> None:
    """An adapter handed to vLLM, which need not run for that."""
    VllmEngine(SimpleNamespace(section=section(base), lora_rank=16), load_tokenizer(base), folder)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused_by_name_at_every_entry(folders, tmp_path, name):
    mutate, message = BROKEN[name]
    shutil.copytree(folders["adapter"], tmp_path / "adapter")
    mutate(tmp_path / "adapter")
    for read in entries(folders["llama"], tmp_path / "adapter", tmp_path / "out"):
        with pytest.raises(InputError, match=message) as error:
            read()
        assert str(error.value).count("\n") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", ["gemma", "elsewhere/llama"])
def test_an_adapter_of_another_model_is_refused_even_under_its_name(folders, tmp_path, base):
    for read in entries(folders["llama"].parent / base, folders["adapter"], tmp_path / "out"):
        with pytest.raises(InputError, match=r"made for '.*/llama', not for '.*'"):
            read()


def test_an_adapter_of_a_model_with_more_tokens_is_told_both_sizes(folders, tmp_path):
    adapted(folders["llama"], LORA, tmp_path / "adapter", vocabulary=512)
    for read in entries(folders["llama"], tmp_path / "adapter", tmp_path / "out"):
        with pytest.raises(InputError, match=r"embed_tokens.weight is \[512, 64\] in the adapter, \[\d+, 64\] in the"):
            read()


def test_an_adapter_with_tokens_of_its_own_is_refused(folders, tmp_path):
    prompted = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted(folders["llama"], prompted, tmp_path / "adapter")
    for read in entries(folders["llama"], tmp_path / "adapter", tmp_path / "out"):
        with pytest.raises(InputError, match="PROMPT_TUNING adapter puts tokens of its own before the prompt"):
            read()


def test_an_adapter_that_overflows_is_refused(folders, tmp_path):
    shutil.copytree(folders["adapter"], tmp_path / "adapter")
    weights(lambda values: {name: value * 1e25 for name, value in values.items()})(tmp_path / "adapter")
    with pytest.raises(InputError, match="logits are not finite"):
        load_adapter(load_model(section(folders["llama"])), tmp_path / "adapter")


def recorded(folder: Path, base: Path) -> None:
    """Note the base model's weights as training does."""
    (folder / "provenance.json").write_text(json.dumps({"base_weights": base_weights(str(base))}))


def test_an_adapter_whose_base_was_changed_in_place_is_refused(folders, tmp_path):
    for name in ("adapter", "llama"):
        shutil.copytree(folders[name], tmp_path / name)
    configured(base_model_name_or_path=str(tmp_path / "llama"))(tmp_path / "adapter")
    recorded(tmp_path / "adapter", tmp_path / "llama")
    for read in entries(tmp_path / "llama", tmp_path / "adapter", tmp_path / "out"):
        read()
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(folders["elsewhere"] / "llama", tmp_path / "llama", dirs_exist_ok=True)
    for read in entries(tmp_path / "llama", tmp_path / "adapter", tmp_path / "out"):
        with pytest.raises(InputError, match=r"made for other weights than those that are now in '.*llama'"):
            read()


def test_an_adapter_whose_base_was_moved_and_renamed_is_known_by_its_weights(folders, tmp_path):
    shutil.copytree(folders["adapter"], tmp_path / "adapter")
    configured(base_model_name_or_path="/nowhere/first-merged")(tmp_path / "adapter")
    with pytest.raises(InputError, match="made for '/nowhere/first-merged'"):
        check_adapter(tmp_path / "adapter", section(folders["llama"]))
    recorded(tmp_path / "adapter", folders["llama"])
    check_adapter(tmp_path / "adapter", section(folders["llama"]))


GOOD = {
    "LoRA": LORA,
    "LoRA on embeddings alone": LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
    "LoRA of some layers": LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM"),
    "DoRA": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "a layer saved whole": LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
}


@pytest.mark.parametrize("kind", ["DoRA", "IA3", "LoRA on embeddings alone", "a layer saved whole"])
def test_vllm_refuses_an_adapter_that_it_would_serve_as_another_model(folders, tmp_path, kind):
    adapted(folders["llama"], GOOD[kind], tmp_path / "adapter")
    with pytest.raises(InputError, match=r"which vLLM is not set up to serve.*take the transformers engine"):
        served(folders["llama"], tmp_path / "adapter")


def test_vllm_refuses_scales_that_differ_between_layers(folders, tmp_path):
    adapted(folders["llama"], LoraConfig(target_modules=["q_proj"], alpha_pattern={"q_proj": 4}), tmp_path / "adapter")
    with pytest.raises(InputError, match="scales that differ between layers"):
        served(folders["llama"], tmp_path / "adapter")


@pytest.mark.parametrize("kind", GOOD)
def test_a_whole_adapter_gives_the_trained_models_logits(folders, tmp_path, kind):
    trained = adapted(folders["llama"], GOOD[kind], tmp_path / "adapter")
    check_adapter(tmp_path / "adapter", section(folders["llama"]))
    loaded = load_adapter(load_model(section(folders["llama"])), tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trained(ids).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("named", ["", "copied", "/nowhere/models/llama", "meta/Llama"])
def test_a_model_that_was_moved_copied_or_not_named_is_the_same_model(folders, tmp_path, named):
    shutil.copytree(folders["adapter"], tmp_path / "adapter")
    base = str(folders["copied"]) if named == "copied" else named
    configured(base_model_name_or_path=base)(tmp_path / "adapter")
    for read in entries(folders["llama"], tmp_path / "adapter", tmp_path / "out"):
        read()
