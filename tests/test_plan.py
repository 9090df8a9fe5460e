"""What a recipe will cost: the arithmetic of the plan, the speeds it takes, and what a run says while it runs."""

import json
import math
import warnings

import pytest

from esr_train.errors import InputError
from esr_train.files import write_json
from recipes.cli import main
from recipes.experiment import open_experiment, read_recipe
from recipes.planning import plan as planning
from recipes.planning import speeds as measuring
from recipes.planning.machine import Device, stated_device
from recipes.planning.plan import Planner, announcing, duration, make_plan
from recipes.planning.sizes import ModelSize, generating_bytes, model_size, training_bytes
from recipes.planning.speeds import Pace, Speeds, by_figures, recorded
from recipes.planning.workload import Lengths, workload
from recipes.resources import Resources

GIVEN = Speeds("given", generate=0.001, read=0.0001, train=0.0002, reply=30.0)
SMALL = ("engine.batch_rows=4", "sampling.max_new_tokens=8")


def recipe(tmp_path, *overrides: str):
    return read_recipe("tiny/quickstart", [f"runs={tmp_path / 'runs'}", *overrides])


def works(made, reply=30.0, kept=None):
    found = workload(Resources(made, asks=False), Lengths(20.0, reply, kept or {}))
    return {work.name: work for work in found}


@pytest.fixture
def given(monkeypatch):
    """Speeds that are known beforehand: no model is loaded."""
    monkeypatch.setattr(planning, "tried", lambda *_: GIVEN)


def test_every_stage_is_counted_as_the_recipe_asks(tmp_path):
    found = works(recipe(tmp_path), kept={"normal": 0.5})
    assert [*found][:2] == ["latents", "calibrate"]
    assert {*[*found][2:4]} == {"normal rows", "steered rows"}
    assert [*found][4:] == ["trials base", "train tuned", "trials tuned", "report"]
    assert found["calibrate"].responses == 199 * 6 * 3
    assert found["normal rows"].responses == 2800
    [steered] = found["steered rows"].batches
    candidates = 1400 / 0.57
    assert steered.requests == pytest.approx(candidates * (1 + 1 + 0.6))
    assert steered.requests * steered.tokens == pytest.approx(candidates * (4 * 3 + 40 + 0.6 * 30))
    assert [(batch.kind, batch.requests, batch.tokens) for batch in found["trials base"].batches] == [
        ("trials/steered", 256, 128),
        ("trials/unsteered", 256, 30.0),
    ]
    assert found["trials base"].read == 128 * (20 + 30)
    steps_and_rows, normal, start, cue = 300 * 16, 20 + 30, 1.4 * 1.5, 12
    detour = 0.8 * 1.4 * 7.5 + 0.2 * 30
    assert found["train tuned"].trained == pytest.approx(steps_and_rows * (normal + (start + detour + cue) / 2))


def test_replies_that_are_learned_from_are_counted_and_judged(tmp_path):
    arm = "{of: tuned, train: {method: grpo, args: {max_steps: 10, num_iterations: 2, max_completion_length: 40}}}"
    found = works(recipe(tmp_path, f"arms={{tuned: {{}}, grpo: {arm}}}"))["train grpo"]
    assert [(batch.kind, batch.requests, batch.tokens) for batch in found.batches] == [("rollouts", 80, 40)]
    assert found.judged == 80
    assert found.trained == 160 * (20 + 40) * 1.5


def test_directions_that_are_optimised_are_counted_with_the_arm_that_they_attack(tmp_path):
    hardened = "{of: tuned, train: {live: {adaptive: true}, args: {max_steps: 1, per_device_train_batch_size: 1}}}"
    conditions = "eval.conditions=[unsteered, adaptive]"
    found = works(recipe(tmp_path, f"arms={{tuned: {{}}, hardened: {hardened}}}", "eval.control_trials=40", conditions))
    compared = [batch for batch in found["trials tuned"].batches if batch.kind == "attack"]
    tested, trained = 40, math.ceil(199 * 0.6)  # test directions that no trial runs are left alone
    assert [(batch.requests, batch.tokens) for batch in compared] == [(tested * 6 * 2 * 4, 128)]
    a_direction = 2 * 6 * 21 * (20 + 32)  # wanted and unwanted, prompts, passes
    assert found["trials tuned"].trained == tested * 2 * a_direction, "from two starts"
    one_row = found["train hardened"].trained - trained * a_direction
    assert 0 < one_row < 100


def test_the_search_for_detectors_is_counted_where_an_arm_takes_them(tmp_path):
    edited = "arms={tuned: {}, deaf: {of: tuned, edit: {ablate: detectors}}}"
    found = works(recipe(tmp_path, edited))
    assert [*found][:3] == ["latents", "calibrate", "detectors"], "in the order in which they run"
    assert [(batch.requests, batch.tokens) for batch in found["detectors"].batches] == [(200 + 100, 30.0)]
    assert found["detectors"].judged == 0
    assert found["detectors"].read == 3 * 300 * (20 + 30), "behind the own prompt, behind another, and under steering"
    assert found["detectors"].covers("detectors")
    assert "detectors" not in works(recipe(tmp_path))


def test_seeds_repeat_training_and_trials_and_share_the_rest(tmp_path):
    one, three = works(recipe(tmp_path)), works(recipe(tmp_path, "seeds=[1, 2, 3]"))
    assert three["train tuned"].trained == 3 * one["train tuned"].trained
    assert three["trials base"].responses == 3 * one["trials base"].responses
    assert three["calibrate"] == one["calibrate"]


def test_time_is_tokens_by_speed_and_recorded_paces_go_first(tmp_path, given, monkeypatch):
    made = recipe(tmp_path)
    lines = {line.name: line for line in Planner(made).plan().lines}
    assert lines["calibrate"].seconds == pytest.approx(3582 * 72 * 0.001 + 1)
    assert lines["trials base"].seconds == pytest.approx(256 * (128 + 30) * 0.001 + 128 * 50 * 0.0001 + 1, rel=0.05)
    assert lines["train tuned"].seconds == pytest.approx(lines["train tuned"].work.trained * 0.0002 + 5)
    with_pace = measuring.replace(GIVEN, paces={"calibrate": Pace(50.0, 0.002)})
    monkeypatch.setattr(planning, "recorded", lambda *_: with_pace)
    lines = {line.name: line for line in Planner(made).plan().lines}
    assert lines["calibrate"].tokens == 3582 * 50
    assert lines["calibrate"].seconds == pytest.approx(3582 * 50 * 0.002 + 1)


def test_questions_cost_what_the_list_or_the_recipe_says(tmp_path, given):
    judge = "judge={kind: model, model: openai/gpt-4o-mini}"
    listed = {line.name: line for line in Planner(recipe(tmp_path, judge)).plan().lines}
    assert listed["calibrate"].questions == 3582
    read = listed["calibrate"].dollars / 3582 * 1e6 - 150 * 0.6
    assert 500 < read / 0.15 < 1500
    own = "llm={prices: {openai/gpt-4o-mini: [0, 1]}}"
    assert Planner(recipe(tmp_path, judge, own)).plan().lines[1].dollars == pytest.approx(3582 * 150 / 1e6)
    unknown = Planner(recipe(tmp_path, "judge={kind: model, model: openai-api/stub/x}")).plan()
    assert unknown.lines[1].dollars is None
    assert " ? " in unknown.text()


def test_more_dollars_than_the_limit_are_told(tmp_path, given):
    words = ["judge={kind: model, model: openai/gpt-4.1}", "llm={limit_dollars: 1}"]
    assert "MORE than llm.limit_dollars (1)" in Planner(recipe(tmp_path, *words)).plan().text()


def test_a_device_s_figures_give_the_time_of_a_token(tmp_path):
    made = recipe(tmp_path, "engine.batch_rows=10")
    size = ModelSize("llama", 10**9, 20, 2048, 8192, 16, 32000, 0, 2)
    device = Device("x", 2**37, 1, flops=1e15, bandwidth=1e12)
    speeds = by_figures(made, size, device, 20)
    assert speeds.generate == pytest.approx((2e9 / 1e12 + 20 * 0.7e-3) / 10)
    assert speeds.read == pytest.approx(2e9 / 0.29e15)
    assert speeds.train == pytest.approx(4e9 / 0.19e15)
    packed = by_figures(recipe(tmp_path, "train.args.packing=true"), size, device, 20)
    assert packed.train == pytest.approx(4e9 / 0.29e15)
    checkpointed = by_figures(recipe(tmp_path, "train.args.gradient_checkpointing=true"), size, device, 20)
    assert checkpointed.train == pytest.approx(1.5 * speeds.train)
    assert by_figures(made, size, Device("x", 1, 4, 1e15, 1e12), 20).generate == pytest.approx(speeds.generate / 4)
    assert by_figures(recipe(tmp_path, "arms={}"), size, device, 20).train == 0


def test_figures_give_the_measured_speeds_of_an_8b_model_on_an_h200(tmp_path):
    size = ModelSize("llama", 8_030_000_000, 32, 4096, 14336, 32, 128256, 65536, 2)
    for rows, measured in ((32, 1228), (256, 6190), (512, 9283)):
        made = recipe(tmp_path, f"engine.batch_rows={rows}", "sampling.max_new_tokens=32")
        assert 1 / by_figures(made, size, stated_device("h200", 1), 40).generate == pytest.approx(measured, rel=0.1)
    options = ("train.args.gradient_checkpointing=true", "train.args.packing=true")
    for option, measured in zip((None, *options), (5571, 3797, 8985), strict=True):
        made = recipe(tmp_path, *([option] if option else []))
        assert 1 / by_figures(made, size, stated_device("h200", 1), 40).train == pytest.approx(measured, rel=0.1)


def test_tensor_parallel_shares_the_memory_of_generation(tmp_path):
    made = recipe(tmp_path, "engine={kind: vllm, tensor_parallel: 8, batch_rows: 64}")
    size = ModelSize("llama", 70 * 10**9, 80, 8192, 28672, 64, 128256, 0, 2)
    assert generating_bytes(made, size, 20) < 20 * 2**30


def test_named_devices_load_nothing_and_unknown_ones_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "load_model", lambda *_: pytest.fail("a model was loaded"))
    text = make_plan(recipe(tmp_path), "h100", 4).text()
    assert "on 4 × H100" in text
    assert "nothing was tried" in text
    with pytest.raises(InputError, match="--device: the device 'h1000' is not known"):
        stated_device("h1000", 1)


def test_what_stages_have_recorded_is_read_by_kind(tmp_path):
    made = recipe(tmp_path)
    told = {
        "calibrate": (10, 500, 1.0),
        "trials/base/steered": (4, 400, 2.0),
        "trials/tuned/steered": (4, 200, 4.0),
        "data/sources/steered-1a2b": (8, 80, 0.8),
        "report": (0, 0, 9.0),
    }
    records = {
        name: {"done": True, "made": {"seconds": seconds, "generated": {"requests": requests, "tokens": tokens}}}
        for name, (requests, tokens, seconds) in told.items()
    }
    write_json(made.directory / "stages.json", {**records, "latents": {"done": True, "made": {"seconds": 1}}})
    funnel = {"kept": 6, "kept, answer trimmed": 2, "detour on-topic": 8}
    write_json(made.directory / "data/sources/steered-1a2b.funnel.json", funnel)
    write_json(made.directory / "adapter/tuned/training_log.json", [{"tokens_per_second": 4000.0}, {"loss": 1.0}])
    speeds = recorded(made, GIVEN)
    assert speeds.pace("calibrate") == Pace(50.0, 0.002)
    assert speeds.pace("trials/steered") == Pace(75.0, 0.01)
    assert speeds.pace("trials/boost_x2") == Pace(75.0, 0.01), "other trials are the nearest"
    assert speeds.pace("data/steered") == Pace(10.0, 0.01)
    assert speeds.pace("probe") is None
    assert speeds.kept == {"steered": 0.5}
    assert speeds.train == 1 / 4000
    assert speeds.source == "recorded by this run's stages; of others, given"
    assert recorded(recipe(tmp_path, "name=other"), GIVEN) == GIVEN


def test_memory_grows_with_what_is_held(tmp_path):
    made = recipe(tmp_path)
    size = model_size(made)
    assert (size.parameters, size.layers, size.width) == (2_013_120, 6, 160)
    weights = size.parameters * 4
    assert generating_bytes(made, size, 20) > weights
    more = recipe(tmp_path, "engine.batch_rows=384")
    cache = 192 * (20 + 128) * size.cached * 4 + 192 * 3 * size.vocabulary * 4
    assert generating_bytes(more, size, 20) - generating_bytes(made, size, 20) == pytest.approx(cache)
    sparing = recipe(tmp_path, "train.args.gradient_checkpointing=true")
    assert training_bytes(sparing, size, 256) < training_bytes(made, size, 256)
    assert training_bytes(recipe(tmp_path, "train.quantization=nf4"), size, 256) < training_bytes(made, size, 256)


def test_a_trial_run_is_made_once_and_kept_for_all_runs(tmp_path, monkeypatch, capsys):
    assert main(["plan", "tiny/quickstart", f"runs={tmp_path}", *SMALL]) == 0
    assert "speeds: a trial run of 4 replies just now" in capsys.readouterr().out
    assert not (tmp_path / "quickstart").exists(), "a plan makes no run"
    [known] = json.loads((tmp_path / "speeds.json").read_text()).values()
    assert all(known[name] > 0 for name in ("generate", "read", "train"))
    assert 0 < known["reply"] <= 8
    monkeypatch.setattr(measuring, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main(["plan", "tiny/quickstart", f"runs={tmp_path}", "name=other", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "an earlier trial run on this machine" in out
    assert out.splitlines()[2].split() == ["stage", "responses", "tokens", "questions", "dollars", "time", "memory"]
    assert "\n   total " in out


def test_a_line_is_done_when_all_its_stages_are(tmp_path, given):
    made = recipe(tmp_path)
    done = {"done": True, "made": {"seconds": 100.0}}
    write_json(made.directory / "stages.json", {"calibrate": done, "data/tuned": done, "trials/base": done})
    lines = {line.name: line.took for line in Planner(made).plan().lines}
    assert lines["calibrate"] == 100
    assert lines["train tuned"] is None
    assert lines["trials base"] is None
    trials = {"trials/base": done, "trials/base/steered": done, "trials/base/unsteered": done, "retention/base": done}
    write_json(made.directory / "stages.json", trials)
    plan = Planner(made).plan()
    assert {line.name: line.took for line in plan.lines}["trials base"] == 400
    assert "done in 7 min" in plan.text()
    assert "\n   still to do " in plan.text()
    write_json(made.directory / "stages.json", {**trials, "trials/base/unsteered": {"done": False}})
    assert {line.name: line.took for line in Planner(made).plan().lines}["trials base"] is None


def test_each_line_of_the_plan_is_announced_once(tmp_path, given):
    said: list[str] = []
    announce = announcing(Planner(recipe(tmp_path)), said.append)
    for stage in ("latents", "calibrate", "data/sources/normal-1a2b", "trials/base", "trials/base/steered", "report"):
        announce(stage)
    assert [line.partition(",")[0] for line in said] == [
        "stage 1 of 8: latents",
        "stage 2 of 8: calibrate",
        f"stage {said[2].split()[1]} of 8: normal rows",
        "stage 5 of 8: trials base",
        "stage 8 of 8: report",
    ]
    assert said[1].startswith("stage 2 of 8: calibrate, about 4 min; then about ")
    assert said[-1].endswith("; the last one")


def test_what_is_said_and_warned_is_in_the_log_of_the_run(tmp_path):
    made = recipe(tmp_path)

    def work() -> None:
        with open_experiment(made) as experiment:
            experiment.say("calibrated 3 latents")
            warnings.warn("something is odd", stacklevel=1)
            raise RuntimeError("it broke")

    with pytest.raises(RuntimeError):
        work()
    lines = (made.directory / "run.log").read_text().splitlines()
    assert lines[0].endswith(" INFO    calibrated 3 latents")
    assert any("WARNING" in line and "something is odd" in line for line in lines)
    assert lines[-1].endswith(" ERROR   ended with RuntimeError: it broke")


@pytest.mark.parametrize(("seconds", "text"), [(4, "4 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")])
def test_times_are_said_in_the_unit_that_fits(seconds, text):
    assert duration(seconds) == text
