"""Monitors in the engines: what sounds is the same while a reply is written and afterwards; what each action does."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from esr_train.errors import InputError
from esr_train.models import load_model, load_tokenizer
from esr_train.recipe import ModelSection, parse_recipe
from esr_train.steering.direction_files import load_sae
from esr_train.steering.directions import Add
from esr_train.steering.engine import Completion, Request, Sampling
from esr_train.steering.interventions import Ablate
from esr_train.steering.monitor import MEMORY, Monitor, first_alarm, load_monitor, save_monitor, smoothed, watching
from esr_train.steering.monitored_engine import RESTARTS, MonitoredEngine, watched_afterwards
from esr_train.steering.token_reading import Activations, Projections
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.template import encode_prompt
from esr_train.transcript import SaeRef
from eval.arms import Arm, Variant
from eval.cells import unsteered
from eval.metrics import METRICS, Gap
from eval.store import TrialStore, read_trials
from eval.trials import Plan, run_trials
from recipes.experiment import open_experiment, read_recipe
from recipes.noticing import monitor_eval
from recipes.stages.steering_latents import LATENTS
from tests import trial_maker
from tests.conftest import ASSETS
from tests.test_trials import CELLS, JUDGE, STEERER

SAMPLED = Sampling(temperature=0.8, max_new_tokens=24)
CUE = "Wait, that is wrong."
PROMPTS = ("How do I fold a fitted sheet?", "Which rope holds best?", "How do I bake bread?", "Explain the mast.")


class World:
    """The tiny Llama, requests of which some are steered, and a probe along what steers them."""

    def __init__(self) -> None:
        section = ModelSection(path=str(ASSETS / "llama"), dtype="float32", device="cpu")
        self.model, self.tokenizer = load_model(section), load_tokenizer(section)
        self.sae = load_sae(SaeRef(str(ASSETS), "llama-sae"))
        self.engine = TransformersEngine(self.model, self.tokenizer, batch_rows=3)
        self.direction = self.sae.direction(7, 20.0)
        steerings = ((self.direction.add(0.8),), (), (self.direction.add(0.3, "generated"),), ())
        self.requests = [
            Request(str(n), prompt, interventions=steering, seed=n)
            for n, (prompt, steering) in enumerate(zip(PROMPTS, steerings, strict=True))
        ]
        self.probe = Projections(self.sae.layer, self.direction.unit[None])

    def monitor(self, threshold: float = 0.0) -> Monitor:
        return Monitor("probe", self.probe, centre=0.0, scale=1.0, threshold=threshold, false_alarms=0.01)

    def between(self) -> Monitor:
        """A monitor that sounds late in some replies and never in others."""
        plain = self.engine.generate(self.requests, SAMPLED)
        read = self.engine.read(self.requests, [each.token_ids[:-1] for each in plain], [self.probe])
        peaks = sorted(float(smoothed(self.monitor().of_read(each)).max()) for (each,) in read)
        return self.monitor((peaks[1] + peaks[2]) / 2)


@pytest.fixture(scope="module")
def world(assets):
    return World()


@pytest.mark.parametrize("stops", [False, True])
def test_an_engine_that_is_followed_says_what_one_that_is_read_afterwards_says(world, stops):
    monitor = world.between()
    followed = world.engine.generate_watched(world.requests, SAMPLED, monitor, stops)
    afterwards = watched_afterwards(world.engine, world.requests, SAMPLED, monitor, stops)
    assert followed == afterwards
    assert sorted(len(each.alarms) for each in followed) == [0, 0, 1, 1]
    assert any(each.alarms and each.alarms[0] > 0 for each in followed)
    for each in followed:
        assert (each.finish_reason == "alarm") == (stops and bool(each.alarms))
        if each.finish_reason == "alarm":
            assert len(each.token_ids) == each.alarms[0] + 2
            assert each.text == world.tokenizer.decode(each.token_ids[:-1], skip_special_tokens=True)


def test_a_monitor_that_logs_changes_nothing_else(world):
    monitored = MonitoredEngine(world.engine, world.between(), "log")
    made, plain = monitored.generate(world.requests, SAMPLED), world.engine.generate(world.requests, SAMPLED)
    assert [replace(each, alarms=()) for each in made] == plain
    assert any(each.alarms for each in made)


def test_the_score_is_a_running_mean_of_the_reading_that_begins_at_nothing(world):
    monitor, reply = world.monitor(), " Start by smoothing the sheet."
    ids, start = encode_prompt(world.tokenizer, PROMPTS[0], None, reply)
    begun = len(encode_prompt(world.tokenizer, PROMPTS[0])[0])
    with torch.no_grad():
        states = world.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[world.sae.layer + 1][0]
    wanted, score = [], 0.0
    for value in (states @ world.direction.unit)[begun:].tolist():
        score += (value - score) / MEMORY
        wanted.append(score)
    np.testing.assert_allclose(monitor.score(world.model, world.tokenizer, PROMPTS[0], reply), wanted, atol=1e-4)
    assert start <= begun


def test_plain_generate_stops_where_the_engine_stops(world):
    request, monitor = world.requests[1], world.between()
    plain = world.engine.generate([request], replace(SAMPLED, temperature=0))[0]
    scores = monitor.score(world.model, world.tokenizer, request.prompt, plain.text)
    monitor = replace(monitor, threshold=float(scores[3]) - 1e-3)
    wanted = first_alarm(scores, monitor.threshold)
    ids = torch.tensor([encode_prompt(world.tokenizer, request.prompt)[0]])
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24}
    with watching(world.model, monitor) as watch:
        output = world.model.generate(ids, stopping_criteria=[watch], **given)
        again = world.model.generate(ids, stopping_criteria=[watch], **given)
    assert watch.alarms == [wanted]
    assert output.shape[1] - ids.shape[1] == wanted + 2
    assert torch.equal(output, again)


@pytest.mark.parametrize("kind", ["probe", "latents"])
def test_a_monitor_is_written_and_read_again(world, tmp_path, kind):
    reads = world.probe if kind == "probe" else Activations(world.sae, (7, 3))
    monitor = Monitor(kind, reads, 0.5, 2.0, 1.25, 0.02)
    save_monitor(monitor, tmp_path / "monitor.json")
    again, states = load_monitor(tmp_path / "monitor.json"), torch.randn(5, world.sae.d_model)
    torch.testing.assert_close(again.values(states), monitor.values(states))
    assert (again.name, again.threshold, again.false_alarms, again.layer) == (kind, 1.25, 0.02, world.sae.layer)


def test_a_file_that_is_no_monitor_and_a_model_that_does_not_fit_are_refused(world, tmp_path):
    path = tmp_path / "monitor.json"
    for text in ("{}", '{"schema": 1, "name": "probe"}', "[]"):
        path.write_text(text)
        with pytest.raises(InputError, match="no monitor"):
            load_monitor(path)
    narrow = replace(world.monitor(), reads=Projections(0, torch.ones(1, 3)))
    with pytest.raises(InputError, match="does not fit"):
        world.engine.generate_watched(world.requests, SAMPLED, narrow, True)


class Words:
    """A tokenizer whose tokens are words."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        self.words += [word for word in text.split() if word not in self.words]
        return [self.words.index(word) for word in text.split()]


@dataclass
class Scripted:
    """An engine that writes what it is told, call by call; a `*` ends a text where the monitor sounds."""

    script: list[str]
    name: str = "scripted"
    tokenizer: Words = field(default_factory=Words)
    asked: list[Request] = field(default_factory=list)

    def generate(self, requests, sampling, progress=None) -> list[Completion]:
        return [self._next(each, sampling) for each in requests]

    def generate_watched(self, requests, sampling, monitor, stops, progress=None) -> list[Completion]:
        return self.generate(requests, sampling)

    def _next(self, request: Request, sampling: Sampling) -> Completion:
        self.asked.append(request)
        text = self.script.pop(0)
        ids = tuple(self.tokenizer.encode(text.removesuffix("*")))[: request.most(sampling)]
        alarms = (len(ids) - 1,) if text.endswith("*") else ()
        finish, steered = "alarm" if alarms else "stop", 9 * bool(request.interventions)
        return Completion(request.id, text.removesuffix("*"), ids, finish, 3, steered, alarms)  # type: ignore[arg-type]

    def log_probabilities(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[tuple[float, ...]]:
        return []

    def read(self, requests, replies, probes) -> Iterator[tuple[torch.Tensor, ...]]:
        yield from ()


PUSHED = Request("a", "How?", prefix="Well, ", interventions=(Add(0, torch.ones(2)),), seed=5)


def acted(action: str, *script: str, request: Request = PUSHED, most: int = 40) -> tuple[Completion, list[Request]]:
    engine = Scripted(list(script))
    monitored = MonitoredEngine(engine, None, action, [CUE])  # type: ignore[arg-type]
    (made,) = monitored.generate([request], Sampling(max_new_tokens=most))
    assert not engine.script
    return made, engine.asked


def test_a_restart_cuts_the_sentence_of_the_alarm_and_goes_on_behind_a_cue():
    made, asked = acted("restart", "Fold it. Knead the dough*", " Press it.")
    assert asked[1].prefix == f"Well, Fold it. {CUE}"
    assert (asked[1].interventions, asked[1].seed != asked[0].seed) == (asked[0].interventions, True)
    assert made.text == f"Fold it. {CUE} Press it."
    assert (made.finish_reason, made.steered_tokens, made.alarms) == ("stop", 9, (4,))
    assert len(made.token_ids) == len(made.text.split())


def test_an_alarm_in_the_first_sentence_leaves_the_given_beginning_alone():
    made, asked = acted("restart", "Knead the dough*", " Press it.")
    assert asked[1].prefix == f"Well, {CUE}"
    assert made.text.split() == [*CUE.split(), "Press", "it."]


def test_an_alarm_right_behind_a_cue_writes_the_sentence_again_without_another_cue():
    made, asked = acted("restart", "Fold it. Knead*", " Bake*", " Press it. Bake*", " Iron it.")
    assert [each.prefix for each in asked[1:]] == [
        f"Well, Fold it. {CUE}", f"Well, Fold it. {CUE}", f"Well, Fold it. {CUE} Press it. {CUE}",
    ]  # fmt: skip
    assert len({each.seed for each in asked}) == 4
    assert made.text == f"Fold it. {CUE} Press it. {CUE} Iron it."
    assert len(made.alarms) == 3


def test_a_reply_is_begun_again_three_times_at_most_and_keeps_its_budget():
    script = ["Fold it. Knead*", *[" Press it. Bake*"] * (RESTARTS - 1), " Bake on and on."]
    _, asked = acted("restart", *script)
    assert len(asked) == RESTARTS + 1
    begun = len(f"Fold it. {CUE}".split())
    assert [each.max_new_tokens for each in asked[:2]] == [None, 40 - begun]
    made, asked = acted("restart", "Fold it. Knead the dough*", most=6)
    assert (len(asked), made.text, made.finish_reason) == (1, "Fold it. Knead the dough", "alarm")


def test_stop_ends_the_reply_and_unsteer_begins_again_without_steering_but_with_the_arms_edits(world):
    made, asked = acted("stop", "Fold it. Knead the dough*")
    assert (len(asked), made.text, made.alarms) == (1, "Fold it. Knead the dough", (4,))
    edit = Ablate(world.sae, (3,))
    request = replace(PUSHED, interventions=(*PUSHED.interventions, edit))
    made, asked = acted("unsteer", "Fold it. Knead the dough*", " Press it.", request=request)
    assert (asked[1].prefix, asked[1].interventions) == (f"Well, Fold it. {CUE}", (edit,))
    assert (made.text, made.steered_tokens) == (f"Fold it. {CUE} Press it.", 9)
    made, _ = acted("unsteer", "Fold it. Knead*", " Press it.")
    assert made.steered_tokens == 9, "a trial that was steered until the alarm counts as steered"


def test_trials_of_a_monitored_arm_say_where_it_sounded_and_others_have_no_alarm_rate(tmp_path):
    texts = ["Knead the dough*", "Raise the mast."] * (len(CELLS) // 2)
    arms = {"stop": MonitoredEngine(Scripted(list(texts)), None, "stop"), None: Scripted(["Raise it."] * len(CELLS))}  # type: ignore[arg-type]
    rates = {}
    for action, engine in arms.items():
        store = TrialStore(tmp_path / f"{action}.jsonl")
        arm = Arm(engine, JUDGE, Sampling(), str(action), Variant(monitor=action))  # type: ignore[arg-type]
        run_trials(arm, "steered", Plan(tuple(CELLS), STEERER), store)
        trials = read_trials(store.path)
        assert all((trial.variant.monitor if trial.variant else None) == action for trial in trials)
        rates[action] = [METRICS["alarm_rate"].of(trial) for trial in trials]
    assert rates == {"stop": [1.0, 0.0] * (len(CELLS) // 2), None: [Gap.UNDEFINED] * len(CELLS)}
    assert unsteered(CELLS)


def test_a_recipe_names_a_monitor_for_an_arm_and_no_other_action():
    values = {"name": "a", "model": {"path": "m"}}
    arm = {"of": "base", "monitor": {"file": "monitor/probe.json"}}
    assert parse_recipe({**values, "arms": {"guarded": arm}}).arms["guarded"].monitor.action == "restart"
    with pytest.raises(InputError, match=r"arms\.guarded\.monitor\.action"):
        parse_recipe({**values, "arms": {"guarded": {**arm, "monitor": {"file": "f", "action": "shout"}}}})


def test_trials_of_a_run_that_stopped_behind_another_choice_of_latents_are_refused(tmp_path):
    recipe = read_recipe("tiny/quickstart", [f"runs={tmp_path}"])
    recipe.directory.mkdir()
    splits = {"train": [], "validation": [], "test": [3]}
    (recipe.directory / LATENTS).write_text(json.dumps({"residual_norm": 20.0, "splits": splits}))
    with open_experiment(recipe) as experiment:
        steered = trial_maker.made()
        (known,) = monitor_eval.trial_requests(experiment, [replace(steered, cell=replace(steered.cell, latent=3))])
        assert known.interventions
        with pytest.raises(InputError, match="a trial was steered by 7, which is not among the latents"):
            monitor_eval.trial_requests(experiment, [steered])


def test_arms_with_an_adapter_are_read_whether_it_was_trained_here_or_given(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor_eval, "adapter_folder", lambda path, *_: Path(path))
    edited = "edited: {adapter: theirs, edit: {ablate: [1]}}, alike: {of: given}, unmeasured: {adapter: others}"
    made = read_recipe(
        "tiny/quickstart", [f"runs={tmp_path}", f"arms={{tuned: {{}}, given: {{adapter: theirs}}, {edited}}}"]
    )
    (made.directory / "trials").mkdir(parents=True)
    for arm in ("base", "tuned", "given", "edited", "alike"):
        (made.directory / "trials" / f"{arm}.jsonl").touch()
    (made.directory / "adapter" / "tuned").mkdir(parents=True)
    with open_experiment(made) as experiment:
        found = dict(monitor_eval.arms_with_trials(experiment))
    assert found == {"base": None, "tuned": made.directory / "adapter" / "tuned", "given": Path("theirs")}
