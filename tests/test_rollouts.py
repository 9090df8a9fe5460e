"""GRPO: replies under each row's own steering, what they are worth, and what of them is learned."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_world import LAYER, kill_training, recipe, transcripts, write_world

from esr_train.__main__ import main
from esr_train.errors import InputError
from esr_train.models import decoder_layers, load_model
from esr_train.recipe import Recipe, RewardSection, TrainSection, dump_recipe, parse_recipe
from esr_train.training.dataset import read_rows
from esr_train.training.injection import live_injection
from esr_train.training.rollouts import PARTS, STEERING, Merit, Rollout, reward_weights, steering_columns
from esr_train.training.settings import check_settings, trainer_config
from esr_train.training.trainer import build_trainer, train
from esr_train.transcript import write_transcripts
from eval.judging.judge import Attempt, Judgement
from eval.judging.lexical import LexicalJudge
from recipes.stages.training_reward import judged_reward, merit

ROOT = Path(__file__).parent.parent
ARGS = {"num_generations": 4, "max_completion_length": 8}


@pytest.fixture
def world(tmp_path, family, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, family)
    return family


@pytest.fixture
def small(tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, llama)
    return tmp_path


def by_letters(rollouts):
    """A reward that any reply has some of: the share of letters that are an e."""
    return [Merit(each.reply.count("e") / (len(each.reply) + 1), 0.0, 0.0, float(not each.ended)) for each in rollouts]


def section_of(family="llama", args=None, **train):
    return recipe(family, args={"num_train_epochs": 1, **ARGS, **(args or {})}, method="grpo", **train)


def trainer_of(section, tokenizer, reward=by_letters):
    rows = read_rows(section, Path("runs/t/data/tuned.jsonl"), tokenizer)
    live, args = live_injection(section, rows), check_settings(section, Path("checkpoints"))
    model = load_model(section.model, for_training=True)
    trainer = build_trainer(section, args, model, tokenizer, rows, live, reward=reward)
    torch.manual_seed(2)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.05 * torch.randn_like(weight)
    trainer.current_gradient_accumulation_steps = section.train.args.get("gradient_accumulation_steps", 1)
    return trainer


def hidden_of(output):
    return (output[0] if isinstance(output, tuple) else output).detach().clone()


def log_of(folder):
    return [entry for entry in json.loads((folder / "training_log.json").read_text()) if "grad_norm" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_policy_old_policy_and_reference_get_exactly_their_rows_steering(world, monkeypatch, checkpointing):
    """The layer's output in every pass is its unsteered output plus the row's own vector, to the bit."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)
    args = {"num_iterations": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": checkpointing}
    trainer = trainer_of(section_of(world.name, {**args, "num_generations": 2}), world.tokenizer)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model.train()
    rows = [dict(trainer.train_dataset[number]) for number in (0, 0, 9, 9, 3, 3, 10, 10)]
    live = trainer._live
    strengths = [live.strength(row["key"], row["threshold_raw"], 0) for row in rows]
    vectors = torch.stack([live.vectors[row["vector"]] for row in rows])
    delta = vectors * torch.tensor([s * (row["vector"] >= 0) for s, row in zip(strengths, rows, strict=True)])[:, None]
    asked, seen = [], []
    generate = trainer._engine.generate

    def watched(requests, sampling):
        made = generate(requests, sampling)
        asked.extend(requests)
        seen.clear()
        return made

    monkeypatch.setattr(trainer._engine, "generate", watched)
    handle = decoder_layers(trainer.model)[LAYER].register_forward_hook(
        lambda _module, _given, output: seen.append(
            (output[0] if isinstance(output, tuple) else output).detach().clone()
        )
    )
    trainer.training_step(trainer.model, rows)
    passes, halves = list(seen), trainer._buffered_inputs
    seen.clear()
    for half in halves:
        given = [torch.cat([half[f"prompt_{name}"], half[f"completion_{name}"]], dim=1) for name in ("ids", "mask")]
        with torch.no_grad():
            trainer.model(input_ids=given[0], attention_mask=given[1], use_cache=False)
            with trainer.model.disable_adapter():
                trainer.model(input_ids=given[0], attention_mask=given[1], use_cache=False)
    handle.remove()
    policies, references = seen[::2], seen[1::2]
    wanted = []
    for plain in (policies, references, policies[:1]):
        for hidden, half, added in zip(plain, halves, delta.split(4), strict=False):
            real = torch.cat([half["prompt_mask"], half["completion_mask"]], dim=1)[:, :, None].bool()
            wanted.append(torch.where(real, hidden + added[:, None], hidden))
    old, old_2, reference, reference_2, policy, *again = passes
    for got, want in zip((old, old_2, reference, reference_2, policy), wanted, strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(old, reference)
    # What checkpointing computes again may stop before the layer ends; if it does not, it is the same.
    assert all(torch.equal(each, policy) for each in again)
    assert [bool(each.any()) for each in delta] == [True, True, False, False] * 2
    for request, added in zip(asked, delta, strict=True):
        assert torch.equal(sum((each.vector for each in request.interventions), torch.zeros(len(added))), added)
    grown = {name: weight.grad for name, weight in trainer.model.named_parameters() if "lora_" in name}
    assert all(gradient is not None and bool(gradient.any()) for gradient in grown.values())


def test_replies_to_one_prompt_differ_and_share_its_strength(small, llama):
    trainer = trainer_of(section_of(), llama.tokenizer)
    trainer._prompts = [dict(trainer.train_dataset[0])] * 4
    trainer._steered = {
        name: torch.tensor([row[name] for row in trainer._prompts]) for name in ("vector", "threshold_raw", "key")
    }
    requests = trainer._requests()
    assert len({request.seed for request in requests}) == 4
    assert all(torch.equal(each.interventions[0].vector, requests[0].interventions[0].vector) for each in requests)
    assert [request.seed for request in trainer._requests()] == [request.seed for request in requests]


def test_the_policy_that_wrote_the_replies_has_a_ratio_of_one(world):
    """Log-probabilities are those at the temperature at which replies were drawn, without dropout."""
    args = {"num_iterations": 2, "temperature": 0.7, "per_device_train_batch_size": 8}
    trainer = trainer_of(section_of(world.name, args), world.tokenizer)
    rows = [dict(trainer.train_dataset[number]) for number in (0, 0, 0, 0, 9, 9, 9, 9)]
    trainer.training_step(trainer.model, rows)
    batch = dict(trainer._buffered_inputs[0])
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    width = batch["completion_ids"].shape[1]
    columns = steering_columns({name: batch[name] for name in STEERING}, mask, width)
    with torch.no_grad(), trainer._live.steering(trainer.model, columns, 0):
        logits = trainer.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, -width - 1 : -1]
    logs = torch.log_softmax(logits / 0.7, dim=-1).gather(2, batch["completion_ids"][:, :, None])[:, :, 0]
    real = batch["completion_mask"].bool()
    assert torch.allclose(batch["old_per_token_logps"][real], logs[real], atol=1e-5)
    assert trainer._metrics["train"]["clip_ratio/region_mean"] == [0.0]


def test_three_steps_on_both_families(world):
    section = section_of(world.name, {"max_steps": 3, "learning_rate": 1e-3, "gradient_accumulation_steps": 2})
    folder = train(section, "tuned", section.directory, reward=by_letters)
    log = log_of(folder)
    assert len(log) == 3
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert log[-1]["kl"] > 0
    assert all(math.isfinite(entry["rewards/score/mean"]) for entry in log)
    weights = load_file(str(folder / "adapter_model.safetensors"))
    assert any(bool(weight.any()) for name, weight in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("wanted", [1.0, -1.0])
def test_what_is_rewarded_becomes_likelier(small, wanted):
    def by_spaces(rollouts):
        return [Merit(wanted * each.reply.count(" "), 0.0, 0.0, 0.0) for each in rollouts]

    args = {"max_steps": 16, "learning_rate": 3e-2, "per_device_train_batch_size": 48, "num_generations": 16}
    section = section_of(args={**args, "beta": 0.0, "max_completion_length": 16})
    log = log_of(train(section, "tuned", section.directory, reward=by_spaces))
    rewards = [entry["rewards/score/mean"] for entry in log]
    print(rewards)
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 1


def test_accumulation_changes_nothing(small):
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        args = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        section = section_of(args=args).model_copy(update={"name": f"b{batch}"})
        write_transcripts(section.directory / "data" / "tuned.jsonl", transcripts())
        found.append(log_of(train(section, "tuned", section.directory, reward=by_letters)))
    for one, other in zip(*found, strict=True):
        assert one["rewards/score/mean"] == pytest.approx(other["rewards/score/mean"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_an_arm_goes_on_from_anothers_adapter_which_is_its_reference(small):
    values = recipe(args={"num_train_epochs": 1}).model_dump()
    arm = {"of": "tuned", "train": {"method": "grpo", "args": {**ARGS, "max_steps": 2, "learning_rate": 1e-3}}}
    section = Recipe.model_validate({**values, "arms": {"tuned": {}, "grpo": arm}})
    data = section.directory / "data"
    (data / "grpo.jsonl").write_text((data / "tuned.jsonl").read_text())
    before = load_file(str(train(section, "tuned", section.directory) / "adapter_model.safetensors"))
    folder = train(section, "grpo", section.directory, reward=by_letters)
    assert log_of(folder)[0]["kl"] == pytest.approx(0, abs=1e-6)
    after = load_file(str(folder / "adapter_model.safetensors"))
    assert before.keys() == after.keys()
    assert 0 < max(float((after[name] - before[name]).abs().max()) for name in after) < 0.01
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []


OFF, BACK = "The mast holds the sail.", "Wait, that's not right."
ON = "Knead the dough. Bake the loaf."


@pytest.mark.parametrize(
    ("reply", "steered", "ended", "wanted"),
    [
        (ON, True, True, Merit(1.0, 0.0, 0.0, 0.0)),
        (f"{OFF} {BACK} {ON}", True, True, Merit(1.0, 0.0, 0.0, 0.0)),
        (OFF, True, True, Merit(0.0, 0.0, 0.0, 0.0, 1.0)),
        (OFF, False, True, Merit(0.0, 0.0, 0.0, 0.0)),
        (f"{OFF} {BACK} {OFF}", True, True, Merit(0.0, 0.0, 0.0, 0.0)),
        (f"{ON} {BACK} {ON}", False, True, Merit(1.0, 1.0, 0.0, 0.0)),
        (f"{ON} {BACK} {OFF}", True, True, Merit(0.0, 0.0, 1.0, 0.0)),
        (f"{ON} {BACK} {OFF}", False, False, Merit(0.0, 1.0, 1.0, 1.0)),
        (ON, False, False, Merit(1.0, 0.0, 0.0, 1.0)),
    ],
)
def test_the_last_score_counts_less_what_the_reply_did_wrong(reply, steered, ended, wanted):
    judge = LexicalJudge({"bread": ["dough", "loaf"], "sailing": ["mast", "sail"]})
    rollout = Rollout("How do I bake bread?", "sailing" if steered else None, reply, steered, ended)
    assert judged_reward(judge)([rollout]) == [wanted]


def test_weights_of_the_reward_take_off_what_counts_against_a_reply():
    section = RewardSection(needless_restart=0.3, relapse=0.2, length=0.1, unnoticed=0.4)
    assert dict(zip(PARTS, reward_weights(section), strict=True)) == {
        "score": 1.0,
        "needless_restart": -0.3,
        "relapse": -0.2,
        "length": -0.1,
        "unnoticed": -0.4,
    }


def test_a_reply_that_the_judge_cannot_score_is_worth_nothing_that_is_known(small, llama):
    rollout = Rollout("How?", None, "So.", False, True)
    for judgement in (Judgement((), "j", error="out of reach"), Judgement((Attempt(0, 3, None),), "j")):
        assert merit(rollout, judgement) is None
    trainer = trainer_of(section_of(), llama.tokenizer, lambda rollouts: [None, *by_letters(rollouts)[1:]])
    trainer.training_step(trainer.model, [dict(trainer.train_dataset[0]) for _ in range(4)])
    assert trainer._buffered_inputs[0]["advantages"].eq(0).sum() >= 1


def test_grpo_has_its_own_settings(tmp_path):
    args = trainer_config(section_of(args={"beta": 0.0, "temperature": 0.9}), tmp_path)
    assert (args.beta, args.temperature, args.disable_dropout, args.shuffle_dataset) == (0.0, 0.9, True, True)
    assert args.reward_weights == [1.0, -0.5, -1.0, -0.5, 0.0]
    section = recipe(method="grpo", args={"num_generations": 4})
    assert trainer_config(section, tmp_path).max_completion_length == section.sampling.max_new_tokens
    for given, message in (
        ({"packing": True}, "packing"),
        ({"top_p": 0.9}, "whole distribution"),
        ({"eval_strategy": "epoch"}, "eval_strategy"),
        ({"num_generations": 3}, "divisible by num_generations"),
    ):
        with pytest.raises(InputError, match=message):
            trainer_config(section_of(args=given), tmp_path)
    with pytest.raises(ValueError, match=r"live\.answer"):
        TrainSection.model_validate({"method": "grpo", "live": {"answer": 0.5}})


def test_too_few_rows_and_no_reward_are_refused(small):
    section = section_of(args={"per_device_train_batch_size": 64})
    with pytest.raises(InputError, match="nothing says what replies are worth"):
        train(section, "tuned", section.directory)
    with pytest.raises(InputError, match="a step replies to 16 prompts, and there are 12 rows"):
        train(section, "tuned", section.directory, reward=by_letters)


def by_the_judge(args):
    """A recipe whose judge tells any two replies apart."""
    section = section_of(
        args={"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "learning_rate": 1e-3, **args}
    )
    plugin = str(Path(__file__).with_name("letters_judge.py"))
    return parse_recipe({**section.model_dump(), "plugins": [plugin], "judge": {"kind": "letters"}})


@pytest.mark.slow
@pytest.mark.parametrize("args", [{}, {"num_iterations": 2, "gradient_accumulation_steps": 2}])
def test_grpo_killed_ends_as_if_it_never_was(small, args, registered_here):
    """Between two writings replies are written anew, by a later policy: then it ends well, but not the same."""
    section = by_the_judge(args)
    (small / "r.yaml").write_text(dump_recipe(section))
    folder = section.directory / "adapter" / "tuned"
    kill_training(["r.yaml"], folder, checkpoint=3)
    assert main(["r.yaml"]) == 0
    resumed = load_file(str(folder / "adapter_model.safetensors"))
    folder.rename(section.directory / "adapter" / "whole")
    assert main(["r.yaml"]) == 0
    again = load_file(str(folder / "adapter_model.safetensors"))
    assert len(log_of(folder)) == 6
    if not args:
        assert all(bool((resumed[name] == again[name]).all()) for name in again)
