"""Several judges on the same trials: their agreement, and the rates under each."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esr_train.errors import InputError
from esr_train.files import read_json, write_json
from esr_train.recipe import Recipe
from eval.judging.agreement import Alpha, Kappa, agreement, judge_again, judgement_store
from eval.judging.judge import Attempt, JudgeItem, Judgement
from eval.judging.model_judge import ModelJudge
from eval.store import Trial, TrialStore, read_trials
from recipes.experiment import Experiment
from recipes.resources import Resources
from recipes.stages.results import judge_panel, write_agreement
from recipes.stages.stage_cache import StageCache
from tests.test_metrics import trial


class Strict:
    """Scores by the response's length; fails where it is empty; counts what it is asked."""

    name = "strict"

    def __init__(self, dies_at: int | None = None) -> None:
        self.items: list[JudgeItem] = []
        self.dies_at = dies_at

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        if self.dies_at is not None and len(self.items) >= self.dies_at:
            raise KeyboardInterrupt
        self.items += items
        return [self._one(item) for item in items]

    def _one(self, item: JudgeItem) -> Judgement:
        if not item.response:
            return Judgement((), self.name, "?", error="nothing to say")
        score = float(min(len(item.response), 100))
        return Judgement((Attempt(0, len(item.response), score),), self.name, "fine", {"degenerate": False})


def trials(count: int, **changes: Any) -> list[Trial]:
    return [trial(10, 90, latent=number, response="x" * number, **changes) for number in range(count)]


def test_a_trial_judged_again_keeps_all_but_the_judgement(tmp_path: Path):
    before = trials(3)
    after = judge_again(Strict(), before, judgement_store(tmp_path / "strict.jsonl"))
    assert [row.key for row in after] == [row.key for row in before]
    assert after[2].attempts == (Attempt(0, 2, 2.0),)
    assert (after[2].judge, after[2].flags) == ("strict", {"degenerate": False})
    assert after[0].error == "nothing to say"
    assert all(new.cell == old.cell and new.cue == old.cue for new, old in zip(after, before, strict=True))
    assert before[2].judge == "lexical"


def test_a_killed_panel_goes_on_where_it_stopped_and_judges_nothing_twice(tmp_path: Path):
    rows, path = trials(150), tmp_path / "strict.jsonl"
    dying, living = Strict(dies_at=64), Strict()
    with pytest.raises(KeyboardInterrupt):
        judge_again(dying, rows, judgement_store(path))
    seen: list[int] = []
    again = judge_again(living, rows, judgement_store(path), seen.append)
    assert len(dying.items) + len(living.items) == 150
    assert (sum(seen), seen[0]) == (150, 64)
    assert again == judge_again(Strict(), rows, judgement_store(tmp_path / "whole.jsonl"))


def test_a_response_that_changed_is_judged_anew(tmp_path: Path):
    path, [row] = tmp_path / "strict.jsonl", [trial(50, response="short")]
    judge_again(Strict(), [row], judgement_store(path))
    [found] = judge_again(Strict(), [replace(row, response="a longer one")], judgement_store(path))
    assert found.attempts[0].score == 12.0


def test_a_judge_agrees_with_itself_completely():
    rows = [trial(10, 90, latent=1), trial(40, latent=2), trial(70, latent=3)]
    found = agreement({"a": {"base": rows}, "a#1": {"base": rows}}, bootstrap=50, seed=0)
    [pair] = found.pairs
    assert pair.retest is True
    assert pair.scores["first_score"] == Alpha(1.0, 3)
    assert pair.events["multi_attempt_rate"] == Kappa(1.0, 1.0, pytest.approx(1 / 3), 3)
    assert found.alpha["last_score"] == 1.0


def test_disagreement_gaps_and_each_judges_rates_are_shown():
    one = [trial(10, 90, latent=1), trial(40, latent=2), trial(70, latent=3), trial(20, latent=4)]
    other = [
        trial(10, latent=1),
        trial(40, latent=2),
        trial(70, latent=3),
        trial(error="no answer", latent=4, flags={}),
    ]
    found = agreement({"a": {"base": one}, "b": {"base": other}}, bootstrap=50, seed=0)
    [pair] = found.pairs
    assert (found.trials, found.unscored) == (4, {"a": 0, "b": 1})
    assert pair.retest is False
    assert pair.events["multi_attempt_rate"].agreement == pytest.approx(2 / 3)
    assert pair.events["multi_attempt_rate"].kappa == pytest.approx(0)
    assert pair.scores["last_score"].n == 3
    assert pair.scores["first_score"].alpha == 1.0 > pair.scores["last_score"].alpha
    rates = {judge: each.arms["base"]["steered"]["multi_attempt_rate"] for judge, each in found.rates.items()}
    assert [(rates[judge].value, rates[judge].n) for judge in ("a", "b")] == [(0.25, 4), (0.0, 3)]


def experiment(folder: Path, judges: list[dict[str, Any]]) -> Experiment:
    """A run with base trials on disk, whose first judge is lexical."""
    write_json(folder / "words.json", {"linen": ["sheet"], "baking": ["dough"]})
    write_json(folder / "others.json", {"linen": ["sheet"], "baking": ["dough", "knead"]})
    values = {
        "name": "run",
        "runs": str(folder),
        "model": {"path": "none"},
        "judge": {"vocabulary": str(folder / "words.json")},
        "judges": judges,
        "arms": {},
        "eval": {"bootstrap": 20},
    }
    recipe = Recipe.model_validate(values)
    path = recipe.directory / "trials" / "base.jsonl"
    path.unlink(missing_ok=True)
    TrialStore(path).add([trial(0, 100, latent=number) for number in range(3)])
    return Experiment(recipe, recipe.directory, Resources(recipe, asks=False), StageCache(recipe.directory))


def rows(top: Experiment) -> dict[str, list[Trial]]:
    return {"base": read_trials(top.directory / "trials" / "base.jsonl")}


def test_a_recipes_further_judges_are_asked_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    top = experiment(tmp_path, [{"vocabulary": str(tmp_path / "others.json")}])
    monkeypatch.setattr("recipes.stages.results.finished_trials", lambda part: rows(top))
    write_agreement(top, judge_panel(top, [top], rows(top)))
    found = read_json(top.directory / "agreement.json")
    assert found["judges"] == [top.resources.judge().name, top.resources.further_judges()[0].name]
    assert found["trials"] == 3
    assert len(list((top.directory / "judgements").iterdir())) == 1
    write_agreement(alone := experiment(tmp_path, []), judge_panel(alone, [top], rows(top)))
    assert not (top.directory / "agreement.json").exists()


def test_two_files_of_the_same_words_are_the_same_judge(tmp_path: Path):
    top = experiment(tmp_path, [{"vocabulary": str(tmp_path / "copy.json")}])
    (tmp_path / "copy.json").write_text((tmp_path / "words.json").read_text())
    with pytest.raises(InputError, match=r"judges.0: the judge lexical-\w+ is named twice. Remove it; a model"):
        write_agreement(top, judge_panel(top, [top], rows(top)))


def test_a_recipe_names_model_judges_and_none_is_loaded_before_it_is_asked(tmp_path: Path):
    asked = {"kind": "model", "model": "anthropic/claude-haiku-4-5"}
    others = [{**asked, "repeat": 1}, {**asked, "temperature": 1}, {"kind": "local", "model": "no/such-folder"}]
    top = experiment(tmp_path, [asked, *others])
    found = top.resources.further_judges()
    assert all(isinstance(judge, ModelJudge) for judge in found)
    assert found[1].name == f"{found[0].name}#1"
    assert len({judge.name for judge in found}) == 4
    assert found[3].name.startswith("no/such-folder-")
