"""A second judge of the same kind is asked, or the recipe says what holds; it is not told to do what it has done."""

from pathlib import Path
from typing import Any

import pytest

from esr_train.errors import InputError
from esr_train.files import write_json
from esr_train.recipe import Recipe, dump_recipe, load_recipe
from recipes.resources import Resources

MODEL = {"kind": "model", "model": "anthropic/claude-haiku-4-5"}
LOCAL = {"kind": "local", "model": "no/such-folder"}
WORDS = {"vocabulary": "words.json"}


def recipe(folder: Path, judge: dict[str, Any], *judges: dict[str, Any]) -> Recipe:
    write_json(folder / "words.json", {"linen": ["sheet"], "baking": ["dough"]})
    write_json(folder / "more.json", {"linen": ["sheet"], "baking": ["dough", "oven"]})
    write_json(folder / "r.yaml", {"name": "r", "model": {"path": "m"}, "judge": judge, "judges": judges})
    return load_recipe(folder / "r.yaml")


@pytest.mark.parametrize(
    ("judge", "judges"),
    [
        (WORDS, [{"vocabulary": "more.json"}]),
        (WORDS, [MODEL, LOCAL]),
        (MODEL, [{**MODEL, "repeat": 1}]),
        (MODEL, [{**MODEL, "repeat": 1}, {**MODEL, "repeat": 2}]),
        (MODEL, [{**MODEL, "temperature": 0.7}]),
        (MODEL, [{**MODEL, "temperature": None}]),
        (LOCAL, [{**LOCAL, "temperature": 0.7}]),
        ({**LOCAL, "temperature": 0.7}, [{**LOCAL, "temperature": 0.7, "repeat": 1}]),
    ],
)
def test_judges_that_can_differ_are_judges_of_their_own(tmp_path, monkeypatch, judge, judges):
    monkeypatch.chdir(tmp_path)
    found = recipe(tmp_path, judge, *judges)
    world = Resources(found, asks=False)
    names = {world.judge().name, *(each.name for each in world.further_judges())}
    assert len(names) == 1 + len(judges)
    (tmp_path / "resolved.yaml").write_text(dump_recipe(found))
    assert load_recipe(tmp_path / "resolved.yaml") == found


@pytest.mark.parametrize(
    ("judge", "judges", "message"),
    [
        (WORDS, [{"kind": "lexical", "repeat": 1}], r"judges\.0: .*a judge of kind 'lexical' has no key 'repeat'"),
        (
            WORDS,
            [{**WORDS, "repeat": 1}],
            r"judges\.0: .*'lexical' has no key 'repeat'; one of kind model or local has",
        ),
        (WORDS, [{**WORDS, "repeat": 0}], r"judges\.0: .*has no key 'repeat'"),
        (WORDS, [WORDS], r"judges\.0: this judge is there already; remove it \(it finds the same\)"),
        (WORDS, [{"kind": "lexical", **WORDS}], r"judges\.0: this judge is there already"),
        (WORDS, [MODEL, MODEL], r"judges\.1: this judge is there already; remove it \(give each its own repeat\)"),
        (MODEL, [MODEL], r"judges\.0: this judge is there already; .*its own repeat"),
        (MODEL, [{**MODEL, "repeat": 1}] * 2, r"judges\.1: this judge is there already; .*its own repeat"),
        (MODEL, [{**MODEL, "temperature": 0}], r"judges\.0: this judge is there already"),
        (LOCAL, [{**LOCAL, "repeat": 1}], r"judges\.0: .*at temperature 0 says the same again: remove repeat, or set"),
        (LOCAL, [{**LOCAL, "repeat": 1, "temperature": None}], r"judges\.0: .*says the same again"),
        ({**WORDS, "temperature": 1}, [], r"judge: .*kind 'lexical' has no key 'temperature'"),
        ({**WORDS, "model": "openai/x"}, [], r"judge: .*no key 'model'; one of kind model or local or likelihood has"),
        ({**MODEL, **WORDS}, [], r"judge: .*kind 'model' has no key 'vocabulary'; one of kind lexical has"),
        ({"kind": "model"}, [], r"judge\.model: required"),
        (WORDS, [{"kind": "local"}], r"judges\.0\.model: required"),
        ({"kind": "lexicle"}, [], r"judge: .*'lexicle' is no kind of judge .*did you mean 'lexical'\?"),
        ({"kind": ["model"]}, [], r"judge: .*is no kind of judge"),
        ({**MODEL, "modl": "x"}, [], r"judge\.modl: unknown key \(did you mean judge\.model\?\)"),
        ({**MODEL, "repeat": True}, [], r"judge\.repeat: .*true and false are no numbers"),
        ({**MODEL, "concurrency": 4}, [], r"judge\.concurrency: unknown key \(did you mean llm\.concurrency\?\)"),
    ],
)
def test_judges_that_cannot_differ_are_refused_with_what_holds(tmp_path, judge, judges, message):
    with pytest.raises(InputError, match=message) as refusal:
        recipe(tmp_path, judge, *judges)
    assert "repeat: 1" not in str(refusal.value)
