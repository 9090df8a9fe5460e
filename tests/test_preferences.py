"""Preferences: what is rejected and what is scored; policy and reference under each row's own steering."""

import json
import math
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training_world import LAYER, kill_training, preferences, recipe, transcripts, write_world

from data_gen.brevity import brevity
from data_gen.preferences import needless_restart, rejected_detour, with_rejected
from data_gen.sources import Context, Cues
from esr_train.__main__ import main
from esr_train.errors import InputError
from esr_train.interchange import export_file, import_file, read_training_file
from esr_train.masking import IGNORED, label_pair
from esr_train.models import decoder_layers, load_model
from esr_train.recipe import ArmSection, BrevitySection, Recipe, SteeredSection, dump_recipe
from esr_train.steering.engine import Completion, Sampling
from esr_train.training.batches import Collator, PairCollator
from esr_train.training.dataset import paired, read_rows, table, to_dataset
from esr_train.training.injection import COLUMNS, live_injection
from esr_train.training.settings import check_settings
from esr_train.training.trainer import build_trainer, train
from esr_train.transcript import Span, SpanKind, from_json, to_json, write_transcripts
from eval.cells import Prompt
from eval.judging.lexical import LexicalJudge

ROOT = Path(__file__).parent.parent
OFF, CUE, ANSWER = SpanKind.OFF_TOPIC, SpanKind.CUE, SpanKind.ANSWER
CUES = Cues({"plain": ("Wait, that's not right.",)})
STEERED = (Span(OFF, "Owls fly by night."), Span(CUE, " Wait, no."), Span(ANSWER, " Knead the dough. Bake it."))


@pytest.fixture
def world(tmp_path, family, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, family, preferences())
    return family


@pytest.fixture
def small(tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, llama, preferences())
    return tmp_path


def continued(args: dict | None = None) -> Recipe:
    """A recipe with an arm by SFT and one that goes on from it by DPO, their rows the same."""
    arm = ArmSection.model_validate({"of": "tuned", "train": {"method": "dpo", "args": {"learning_rate": 1e-3}}})
    data = Path("runs/t/data")
    (data / "dpo.jsonl").write_text((data / "tuned.jsonl").read_text())
    values = recipe(args={"num_train_epochs": 1, "per_device_train_batch_size": 2, **(args or {})}).model_dump()
    return Recipe.model_validate({**values, "arms": {"tuned": {}, "dpo": arm.model_dump()}})


def log_of(folder: Path) -> list[dict]:
    return [entry for entry in json.loads((folder / "training_log.json").read_text()) if "grad_norm" in entry]


def test_both_replies_are_scored_behind_what_they_share(family):
    for row in preferences():
        chosen, rejected = label_pair(family.tokenizer, row)
        said = [
            family.tokenizer.decode([token for token in each.labels if token != IGNORED], skip_special_tokens=True)
            for each in (chosen, rejected)
        ]
        if row.steering:
            assert said[0].strip() == "".join(span.text for span in row.spans[1:]).strip()
            assert said[1].strip() == "Then knead the mast."
        else:
            assert row.content.endswith(said[0])
            assert "Wait, no." in said[1]


def test_a_row_without_a_rejected_reply_cannot_be_preferred_to_anything(small, llama):
    write_transcripts("plain.jsonl", transcripts())
    with pytest.raises(InputError, match="row 's0': there is no rejected reply"):
        read_rows(recipe(method="dpo"), Path("plain.jsonl"), llama.tokenizer)


def test_a_rejected_reply_that_is_the_same_or_empty_is_refused():
    value = to_json(preferences()[0])
    assert from_json(value) == preferences()[0]
    for text in ("", transcripts()[0].content):
        with pytest.raises(ValueError, match="rejected"):
            from_json({**value, "rejected": [{"kind": "off_topic", "text": text}]})
    assert "rejected" not in to_json(transcripts()[0])


def test_a_batch_holds_preferred_rows_first_and_a_pair_draws_one_strength(world):
    section = recipe(world.name, method="dpo")
    rows = read_rows(section, Path("runs/t/data/tuned.jsonl"), world.tokenizer)[6:10]
    batch = PairCollator(Collator(world.tokenizer.pad_token_id))(list(to_dataset(paired(rows), table(rows))))
    for number, row in enumerate(rows):
        for index, each in ((number, row), (number + 4, row.rejected)):
            length = len(each.labelled.input_ids)
            assert batch["input_ids"][index, :length].tolist() == list(each.labelled.input_ids)
            wanted = [value != IGNORED for value in each.labelled.labels]
            assert batch["completion_mask"][index, :length].bool().tolist() == wanted
            assert not batch["completion_mask"][index, length:].any()
    live = live_injection(section, rows)
    added = live.interventions({name: batch[name] for name in COLUMNS}, epoch=3)[:8]
    for one, other in zip(added[:4], added[4:], strict=True):
        assert [each.vector.tolist() for each in one] == [each.vector.tolist() for each in other]
    assert [bool(each) for each in added[:4]] == [True, True, False, False]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_policy_and_reference_get_exactly_their_rows_steering(world, checkpointing):
    """The layer's output in every pass is its unsteered output plus the row's own vector, to the bit."""
    section = recipe(world.name, args={"gradient_checkpointing": checkpointing}, method="dpo")
    rows = read_rows(section, Path("runs/t/data/tuned.jsonl"), world.tokenizer)
    live = live_injection(section, rows)
    args = check_settings(section, Path("checkpoints"))
    trainer = build_trainer(section, args, load_model(section.model, for_training=True), world.tokenizer, rows, live)
    torch.manual_seed(2)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.05 * torch.randn_like(weight)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in (0, 3, 9)])
    columns = {name: batch[name] for name in COLUMNS}
    delta = live.delta(live.interventions(columns, epoch=0), columns)
    assert [bool(each.any()) for each in delta] == [True, True, False] * 2
    seen = []

    def keep(_module, _arguments, output):
        seen.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    handle = decoder_layers(trainer.model)[LAYER].register_forward_hook(keep)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    if checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.training_step(trainer.model, dict(batch))
    policy, reference, *again = seen
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        trainer.model(**inputs, use_cache=False)
        with trainer.model.disable_adapter():
            trainer.model(**inputs, use_cache=False)
    handle.remove()
    plain, plain_reference = seen[-2:]
    assert torch.equal(policy, plain + delta)
    assert torch.equal(reference, plain_reference + delta)
    assert not torch.equal(policy, reference)
    # What checkpointing computes again may stop before the layer ends; if it does not, it is the same.
    assert all(torch.equal(each, policy) for each in again)
    grown = {name: weight.grad for name, weight in trainer.model.named_parameters() if "lora_" in name}
    assert all(gradient is not None and bool(gradient.any()) for gradient in grown.values())


def test_accumulation_and_checkpointing_change_nothing(small):
    found = []
    for batch, accumulation, checkpointing in ((4, 1, False), (1, 4, True)):
        args = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        more = {"gradient_checkpointing": checkpointing, "num_train_epochs": 1, "learning_rate": 1e-3}
        section = recipe(args={**args, **more}, method="dpo").model_copy(update={"name": f"b{batch}"})
        data = section.directory / "data" / "tuned.jsonl"
        write_transcripts(data, preferences())
        found.append(log_of(train(section, "tuned", section.directory)))
    assert len(found[0]) == 3
    for one, other in zip(*found, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_three_steps_raise_the_margin_on_both_families(world):
    args = {"max_steps": 3, "learning_rate": 5e-3, "eval_strategy": "epoch"}
    section = recipe(world.name, args=args, method="dpo")
    folder = train(section, "tuned", section.directory)
    log = log_of(folder)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(log[0]["rewards/margins"]) < 1e-5 < log[-1]["rewards/margins"]
    assert any("eval_loss" in entry for entry in json.loads((folder / "training_log.json").read_text()))


def test_an_arm_goes_on_from_anothers_adapter_which_stays_its_reference(small):
    """At the first step policy and reference agree; the adapter that it began with is changed nowhere."""
    section = continued()
    with pytest.raises(InputError, match=r"arms\.dpo: .*Train that arm first"):
        train(section, "dpo", section.directory)
    begun = train(section, "tuned", section.directory)
    before = load_file(str(begun / "adapter_model.safetensors"))
    folder = train(section, "dpo", section.directory)
    log = log_of(folder)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["loss"] != log[0]["loss"]
    after = load_file(str(folder / "adapter_model.safetensors"))
    assert before.keys() == after.keys()
    assert any(bool((after[name] != before[name]).any()) for name in after)
    # Three steps of 1e-3: near where it began, and far from an adapter that began at zero.
    assert all((after[name] - before[name]).abs().max() < 0.01 for name in after)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    assert json.loads((folder / "provenance.json").read_text())["start"]


def test_dpo_has_its_own_settings_and_no_packing(tmp_path):
    args = check_settings_of({"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, tmp_path)
    assert (args.beta, args.loss_type, args.loss_weights) == (0.3, ["sigmoid", "sft"], [1.0, 0.5])
    assert (check_settings_of({}, tmp_path).loss_type, args.precompute_ref_log_probs) == (["sigmoid"], False)
    for given, message in (({"packing": True}, "packing"), ({"precompute_ref_log_probs": True}, "anew in every epoch")):
        with pytest.raises(InputError, match=message):
            check_settings_of(given, tmp_path)


def check_settings_of(args: dict, folder: Path):
    from esr_train.training.settings import trainer_config

    return trainer_config(recipe(args=args, method="dpo"), folder)


def test_a_detour_goes_on_as_long_as_the_correction_and_ends_with_a_sentence():
    rest = " They hunt mice. Their wings are quiet. They see far, far, far and wide."
    going_on = rejected_detour(STEERED, rest)
    assert going_on == (Span(OFF, "Owls fly by night. They hunt mice. Their wings are quiet."),)
    start = Span(ANSWER, "First,")
    assert rejected_detour((start, *STEERED), "")[0] == start


def test_a_model_that_turns_back_by_itself_is_not_rejected():
    assert rejected_detour(STEERED, " Wait, that's not right. Knead the dough.") is None


def test_a_needless_restart_says_its_answer_again_and_is_cut_as_detours_are():
    row = transcripts()[-1]
    words = needless_restart(row, SteeredSection(mid_sentence=1.0, cut_words=(2, 2)), CUES, seed=0)
    beginning = " ".join(row.content.split()[:2])
    assert [span.text for span in words] == [beginning, "\n\nWait, that's not right.", f" {row.content}"]
    sentence = needless_restart(row, SteeredSection(cut=(1, 1)), CUES, seed=0)
    assert sentence[0].text.endswith(".")
    assert sentence[1].text == " Wait, that's not right."


def test_normal_rows_get_a_rejected_reply_and_rows_without_one_are_left_out():
    rows = [*preferences()[:2], *transcripts()[-2:], *transcripts()[:3]]
    Random(0).shuffle(rows)
    kept = with_rejected(rows, SteeredSection(), CUES, seed=0)
    assert sorted(row.id for row in kept) == ["n2", "n3", "s0", "s1"]
    assert all(row.rejected for row in kept)


def test_preferences_go_out_as_trl_reads_them_and_come_back(tmp_path):
    report = export_file(tmp_path / "p.jsonl", [*preferences(2, 2), *transcripts(1, 0)], "preference")
    assert report.rows == 4
    assert "1 rows without a rejected reply" in report.lost
    first = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == [{"role": "user", "content": "How do I fold a fitted sheet?"}]
    assert [first[side][0]["role"] for side in ("chosen", "rejected")] == ["assistant"] * 2
    back, _ = import_file(tmp_path / "p.jsonl", "preference")
    assert back == read_training_file(tmp_path / "p.jsonl")
    for row, given in zip(back, preferences(2, 2), strict=True):
        assert (row.prompt, row.content) == (given.prompt, given.content)
        assert row.rejected[0].text == "".join(span.text for span in given.rejected)


def test_trls_other_layouts_are_read_and_other_prompts_refused(tmp_path):
    turn = {"role": "user", "content": "How?"}
    texts = {"prompt": "How?", "chosen": "So.", "rejected": "Thus."}
    implicit = {side: [turn, {"role": "assistant", "content": texts[side]}] for side in ("chosen", "rejected")}
    (tmp_path / "p.jsonl").write_text(f"{json.dumps(texts)}\n{json.dumps(implicit)}\n")
    one, other = read_training_file(tmp_path / "p.jsonl")
    assert (one.prompt, one.spans, one.rejected) == (other.prompt, other.spans, other.rejected)
    implicit["rejected"][0] = {**turn, "content": "Why?"}
    (tmp_path / "q.jsonl").write_text(json.dumps(implicit))
    with pytest.raises(InputError, match=r"q\.jsonl:1: .*different prompts"):
        read_training_file(tmp_path / "q.jsonl")


@pytest.mark.slow
def test_dpo_killed_behind_sft_ends_as_if_it_never_was(small):
    args = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 6}
    section = continued(args)
    (small / "r.yaml").write_text(dump_recipe(section))
    train(section, "tuned", section.directory)
    folder = section.directory / "adapter" / "dpo"
    kill_training(["r.yaml", "--arm", "dpo"], folder, checkpoint=4)
    assert main(["r.yaml", "--arm", "dpo"]) == 0
    resumed = load_file(str(folder / "adapter_model.safetensors"))
    whole = section.directory / "adapter" / "whole"
    folder.rename(whole)
    assert main(["r.yaml", "--arm", "dpo"]) == 0
    again = load_file(str(folder / "adapter_model.safetensors"))
    assert all(bool((resumed[name] == again[name]).all()) for name in again)


class Writer:
    """Replies to each prompt in turn with the next of its texts."""

    name = "writer"

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts), []

    def generate(self, requests, sampling, progress=None):
        self.asked += requests
        return [Completion(each.id, self.texts.pop(0), (1,), "stop", 1, 0) for each in requests]


def test_of_two_unsteered_replies_the_shorter_is_preferred_and_equal_ones_are_refused():
    judge = LexicalJudge({"bread": ["dough", "loaf"], "sailing": ["mast"]})
    equal_ones, off = ("Bake the loaf.", "Bake the dough."), ("The mast.", "A loaf.")
    writer = Writer("The dough and the loaf rise.", "Bake the dough.", *equal_ones, *off)
    prompts = SimpleNamespace(normal=[Prompt("How do I bake bread?", "bread")])
    context = Context(writer, judge, Sampling(), "all", "m", 0, None, prompts)
    preferred, equal, off_topic = brevity(context, BrevitySection())([0, 1, 2])
    assert preferred.transcript
    assert preferred.transcript.content == "Bake the dough."
    assert [span.text for span in preferred.transcript.rejected or ()] == ["The dough and the loaf rise."]
    assert preferred.transcript.steering is None
    assert (equal.reason, off_topic.reason) == ("equally long", "answer off-topic")
    assert len({request.seed for request in writer.asked}) == 6
    assert with_rejected([preferred.transcript], SteeredSection(), CUES, 0) == [preferred.transcript]
