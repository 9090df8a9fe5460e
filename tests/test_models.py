"""Loading models and tokenizers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import esr_train
from esr_train.errors import InputError
from esr_train.models import (
    bare_model,
    decoder_layers,
    hidden_size,
    load_config,
    load_model,
    load_tokenizer,
)
from esr_train.provenance import model_hashes
from esr_train.recipe import ModelSection
from esr_train.template import prompt_text
from tests.chat_templates import KINDS, make_tokenizer
from tests.conftest import Family, make_family


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, str]:
    """Both families, saved as checkpoints are."""
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "gemma"):
        family = make_family(name)
        family.model.save_pretrained(root / name)
        family.tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in ("llama", "gemma")}


def section(path: str, **options) -> ModelSection:
    return ModelSection(**{"path": path, "dtype": "float32", "device": "cpu", **options})


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_model_comes_back_with_its_weights_dtype_and_mode(folders, name):
    original = make_family(name).model
    model = load_model(section(folders[name]))
    assert not model.training
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    half = load_model(section(folders[name], dtype="bfloat16"))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_sdpa_is_refused_for_gemma_and_taken_for_llama(folders):
    with pytest.raises(InputError, match=r"model\.attn_implementation.*soft-capping.*eager"):
        load_model(section(folders["gemma"], attn_implementation="sdpa"))
    llama = load_model(section(folders["llama"], attn_implementation="sdpa"))
    assert llama.config._attn_implementation == "sdpa"


def test_relative_paths_are_taken_from_the_current_directory(folders, monkeypatch):
    monkeypatch.chdir(folders["llama"] + "/..")
    assert load_tokenizer(section("llama")).eos_token == "<|eot_id|>"


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "recipes/tiny/assets/nothing", "not-a-hub-id"])
def test_a_model_that_is_not_there_is_bad_input(path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match=r"model\.path"):
            load(section(path))


def test_a_device_that_is_not_there_is_bad_input(folders):
    with pytest.raises(InputError, match=r"model\.device.*'cuda:0' cannot be used"):
        load_model(section(folders["llama"], device="cuda:0"))


@pytest.mark.parametrize(("name", "end"), [("llama", "<|eot_id|>"), ("gemma", "<end_of_turn>")])
def test_generation_stops_at_the_end_of_the_turn(folders, name, end):
    tokenizer, model = load_tokenizer(section(folders[name])), load_model(section(folders[name]))
    expected = tokenizer.convert_tokens_to_ids(end)
    assert expected in model.generation_config.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != expected


def test_generation_stops_where_training_ends_a_turn_whatever_the_tokenizer_declares(tmp_path):
    """A ChatML tokenizer whose BOS, eos and padding token are other ones; the model lists a token of its own."""
    tokenizer, model = make_tokenizer(KINDS["ChatML as it comes out of GGUF"]), make_family("llama").model
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    model.generation_config.eos_token_id = 7
    model.save_pretrained(tmp_path)
    generation = load_model(section(str(tmp_path))).generation_config
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert generation.eos_token_id == sorted([7, *ids])
    assert (generation.bos_token_id, generation.pad_token_id) == (None, ids[0])


@pytest.mark.parametrize("declared", ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", None])
def test_padding_is_no_token_of_the_template(tmp_path, declared):
    tokenizer = make_family("llama").tokenizer
    tokenizer.pad_token = declared
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(section(str(tmp_path))).pad_token == "<|finetune_right_pad_id|>"


def test_a_padding_token_without_another_meaning_is_kept(tmp_path):
    tokenizer = make_family("llama").tokenizer
    tokenizer.pad_token = "<|end_of_text|>"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(section(str(tmp_path))).pad_token == "<|end_of_text|>"


def test_no_token_is_left_for_padding(tmp_path):
    kind = KINDS["ChatML"]
    make_tokenizer(replace(kind, special=kind.special[:2])).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no padding token apart from"):
        load_tokenizer(section(str(tmp_path)))


def test_from_python_a_path_is_enough(folders):
    model = esr_train.load_model(Path(folders["llama"]), dtype="float32", attn_implementation="sdpa", device="cpu")
    assert (model.dtype, model.config._attn_implementation) == (torch.float32, "sdpa")
    assert esr_train.load_model(folders["llama"], device="cpu").dtype == torch.bfloat16
    tokenizer = esr_train.load_tokenizer(Path(folders["llama"]))
    assert tokenizer.get_vocab() == load_tokenizer(section(folders["llama"])).get_vocab()
    with pytest.raises(InputError, match=r"dtype.*'float16'"):
        esr_train.load_model(folders["llama"], dtype="float16")


def test_a_model_without_a_chat_template_can_be_loaded_but_not_talked_to(folders, tmp_path):
    family = make_family("llama")
    family.tokenizer.chat_template = None
    family.tokenizer.save_pretrained(tmp_path)
    family.model.save_pretrained(tmp_path)
    assert load_model(section(str(tmp_path)))
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(section(str(tmp_path)))


def test_a_chat_template_of_one_s_own_takes_the_place_of_the_tokenizer_s_and_changes_what_stages_depend_on(
    folders, tmp_path
):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    plain, mine = section(folders["llama"]), section(folders["llama"], chat_template=str(file))
    assert prompt_text(load_tokenizer(mine), "Why?") == "<|begin_of_text|>user:Why?<|eot_id|>assistant:"
    switched = mine.model_copy(update={"template_kwargs": {"add_generation_prompt": True}})
    found = [model_hashes(each) for each in (plain, mine, switched)]
    file.write_text(file.read_text() + "\n")
    found.append(model_hashes(mine))
    assert len({each.get("chat template") for each in found}) == 4
    assert all(found[0].items() <= each.items() for each in found)
    with pytest.raises(InputError, match=r"model\.chat_template=nowhere.*file does not exist"):
        load_tokenizer(section(folders["llama"], chat_template="nowhere.jinja"))


def test_layers_are_found_in_every_wrapper(family: Family):
    class Wrapper(torch.nn.Module):
        """As DDP and DeepSpeed wrap."""

        def __init__(self, module):
            super().__init__()
            self.module = module

    layers = family.model.model.layers
    peft = get_peft_model(make_family(family.name).model, LoraConfig(target_modules="all-linear"))
    assert decoder_layers(family.model) is layers
    assert decoder_layers(Wrapper(family.model)) is layers
    assert decoder_layers(Wrapper(peft)) is peft.base_model.model.model.layers
    assert (hidden_size(Wrapper(peft)), bare_model(Wrapper(family.model))) == (64, family.model)
    with pytest.raises(InputError, match="no decoder layers"):
        decoder_layers(torch.nn.Linear(2, 2))


def test_nf4_quantises_the_linear_layers(folders):
    import bitsandbytes

    model = load_model(section(folders["llama"]), quantization="nf4")
    assert isinstance(decoder_layers(model)[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    assert decoder_layers(model)[0].mlp.up_proj.weight.quant_state.quant_type == "nf4"


def test_a_model_that_is_not_here_is_refused_in_whole_sentences():
    with pytest.raises(InputError) as error:
        load_config(ModelSection(path="nobody/nothing"))
    assert "cached files). Name a local folder or a hub id" in str(error.value)
