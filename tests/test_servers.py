"""Which vLLM servers an experiment has: one for the model under test, one for each judge with a model of its own."""

import pytest

from esr_train.files import write_json
from esr_train.recipe import Recipe
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.steering.vllm.vllm_server import VllmServer
from recipes.resources import Resources
from tests.conftest import ASSETS

LLAMA, GEMMA = str(ASSETS / "llama"), str(ASSETS / "gemma")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What happens to servers, none of which runs."""
    made: list[str] = []
    monkeypatch.setattr(VllmServer, "start", lambda self: made.append(f"start {self.section.path}"))
    monkeypatch.setattr(VllmServer, "close", lambda self: made.append(f"stop {self.section.path}"))
    return made


def recipe(judge: dict | None = None, arms: dict | None = None, kind: str = "vllm", concurrency: int = 16) -> Recipe:
    model = {"path": LLAMA, "dtype": "float32", "device": "cpu"}
    return Recipe.model_validate(
        {
            "name": "t",
            "model": model,
            "engine": {"kind": kind, "batch_rows": 8},
            "llm": {"concurrency": concurrency},
            "judge": {"kind": "local", **judge} if judge else {"kind": "lexical"},
            "arms": {"tuned": {}, **(arms or {})},
        }
    )


def test_the_base_model_and_adapters_share_a_server(calls):
    resources = Resources(recipe())
    assert resources.base().server is resources.engine(None).server
    assert resources.base().server.lora_rank == 32
    assert set(calls) == {f"start {LLAMA}"}


def test_a_whole_model_takes_the_place_of_the_one_before(calls):
    resources = Resources(recipe(arms={"whole": {"model": GEMMA}}))
    base = resources.base()
    calls.clear()
    whole = resources.engine(None, GEMMA)
    assert (whole.server.section.path, whole.server.lora_rank) == (GEMMA, 0)
    assert calls == [f"stop {LLAMA}", f"start {GEMMA}"]
    calls.clear()
    assert resources.engine(None).server is base.server
    assert calls == [f"stop {GEMMA}", f"start {LLAMA}"]
    calls.clear()
    resources.free_all()
    assert sorted(calls) == sorted([f"stop {LLAMA}", f"stop {GEMMA}"])


def test_a_judge_on_the_same_model_shares_its_server(calls):
    resources = Resources(recipe({"model": LLAMA}))
    assert resources.judge().asker.llm.open_engine().server is resources.base().server
    assert resources.base().server.memory is None


def test_a_judge_on_another_model_has_a_server_beside_it(calls):
    resources = Resources(recipe({"model": GEMMA}, concurrency=5))
    judge = resources.judge().asker.llm.open_engine()
    assert (judge.server.section.path, judge.server.rows, judge.tokenizer.name_or_path) == (GEMMA, 5, GEMMA)
    assert judge.server.memory == resources.base().server.memory == pytest.approx(0.45)
    assert not any(call.startswith("stop") for call in calls)
    resources.free_all()
    assert f"stop {GEMMA}" in calls


def test_a_judge_on_the_base_model_has_its_own_where_an_arm_takes_the_base_models_place(calls):
    resources = Resources(recipe({"model": LLAMA}, {"merged": {"of": "tuned", "merged": True}}))
    judge = resources.judge().asker.llm.open_engine()
    assert judge.server is not resources.base().server
    calls.clear()
    resources.engine(None, GEMMA)
    assert judge.server.section.path == LLAMA
    assert calls.count(f"stop {LLAMA}") == 1, "that of the model under test alone"


def test_room_is_made_for_an_adapter_that_is_there_already(calls, tmp_path):
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 48, "task_type": "CAUSAL_LM"})
    resources = Resources(recipe(arms={"given": {"adapter": str(tmp_path)}}))
    assert resources.base().server.lora_rank == 48


def test_the_transformers_engine_has_none(calls):
    resources = Resources(recipe({"model": GEMMA}, kind="transformers"))
    assert isinstance(resources.judge().asker.llm.open_engine(), TransformersEngine)
    resources.free_all()
    assert calls == []
