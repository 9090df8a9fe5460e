"""An adapter that would do nothing is refused; a merged model is the adapter's."""

import shutil

import pytest
import torch
from peft import get_peft_model
from training_world import recipe, write_world
from transformers import AutoTokenizer, GenerationConfig

from esr_train.__main__ import main
from esr_train.adapters import is_complete, load_adapter, merge
from esr_train.errors import InputError
from esr_train.models import load_model
from esr_train.recipe import dump_recipe
from esr_train.template import chat_template
from esr_train.training.saving import final_metrics, model_card
from esr_train.training.settings import lora_config
from esr_train.training.trainer import adapter_folder


@pytest.fixture
def adapter(tmp_path, family, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, family)
    section = recipe(family.name)
    model = get_peft_model(load_model(section.model, for_training=True), lora_config(section))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn_like(weight)
    model.save_pretrained("adapter")
    return section, tmp_path / "adapter"


def test_a_merged_model_gives_the_adapters_logits(adapter, tmp_path):
    section, folder = adapter
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        tuned = load_adapter(load_model(section.model), folder)(input_ids=ids).logits
        plain = load_model(section.model)(input_ids=ids).logits
    result = merge(section.model, folder, tmp_path / "merged")
    moved = section.model.model_copy(update={"path": "merged"})
    with torch.no_grad():
        merged = load_model(moved)(input_ids=ids).logits
    assert result.largest_difference < 1e-4 * result.largest_logit
    torch.testing.assert_close(merged, tuned, rtol=1e-4, atol=1e-4)
    assert (tuned - plain).abs().max() > 1e-2
    with pytest.raises(InputError, match="not empty"):
        merge(section.model, folder, tmp_path / "merged")


def test_the_merge_command_says_what_it_changed_and_the_model_stops_at_the_end_of_turn(adapter, tmp_path, capsys):
    section, folder = adapter
    (tmp_path / "r.yaml").write_text(dump_recipe(section))
    command = ["merge", "r.yaml", "--arm", "tuned", "--out", "merged"]
    assert main(command) == 2
    assert "no finished adapter" in capsys.readouterr().err
    shutil.copytree(folder, adapter_folder("tuned", section.directory))
    assert main(command) == 0
    assert "merged: merged; on probe texts the largest difference of a log-probability is " in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained("merged")
    generation = GenerationConfig.from_pretrained("merged")
    assert chat_template(tokenizer).end_of_turn_id in generation.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.chat_template
    assert not list((tmp_path / "merged").glob("adapter*"))


def test_a_folder_without_its_last_file_is_not_complete(adapter):
    assert is_complete(adapter[1])
    (adapter[1] / "adapter_config.json").unlink()
    assert not is_complete(adapter[1])


def test_the_card_tells_how_to_make_it_again():
    record = {
        "arm": "tuned",
        "recipe": {"model": {"path": "some/model"}},
        "data": {"sha256": "abc", "rows": 7},
        "world_size": 2,
        "versions": {"torch": "2.9", "deepspeed": None},
        "git": {"commit": "f00", "dirty": True},
    }
    card = model_card(record, final_metrics([{"loss": 2.0, "step": 1}, {"loss": 1.5, "step": 2}]))
    for wanted in ("base_model: some/model", "sha256 `abc`", "| loss | 1.5 |", "`f00` with local changes"):
        assert wanted in card
