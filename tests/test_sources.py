"""A source of rows is one object in one file, from inside the package or outside, and recipes ask for it by name."""

import importlib.util

import pytest

from data_gen.__main__ import main as data
from data_gen.sources import SOURCES, register_source
from esr_train.errors import InputError
from esr_train.recipe import SOURCE_SECTIONS, NormalSection, SourceSection, dump_recipe, load_recipe
from esr_train.transcript import SpanKind, read_transcripts
from tests.conftest import ROOT

PLUGIN = '''
from data_gen.sources import Outcome, candidate_rng, joined, register_source
from esr_train.recipe import SourceSection
from esr_train.transcript import SpanKind, Transcript


class EchoSection(SourceSection):
    word: str = "echo"


@register_source("echo", EchoSection)
def echo(context, section):
    """Says a word and takes it back."""

    def make(numbers):
        return [one(number) for number in numbers]

    def one(number):
        rng = candidate_rng(context.seed, "echo", number)
        prompt = rng.choice(context.prompts.train)
        if number % 3 == 0:
            return Outcome(None, "third of three")
        parts = ((SpanKind.OFF_TOPIC, f"{section.word} {number}."), (SpanKind.CUE, context.cues.draw(rng, "echoes")))
        spans = joined(*parts, (SpanKind.ANSWER, f"Answer {number}."))
        return Outcome(Transcript(f"echo-{context.seed}-{number}", prompt.text, spans, "prompted"))

    return make
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A source that a file outside the package registers."""
    # Set back to what they hold now when the test ends.
    for registry in (SOURCES, SOURCE_SECTIONS):
        monkeypatch.setitem(registry, "echo", None)
        monkeypatch.delitem(registry, "echo")
    path = tmp_path / "echo.py"
    path.write_text(PLUGIN)
    spec = importlib.util.spec_from_file_location("echo_source", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("name: small\nmodel: {path: some/model}\n")
    return path


def test_the_built_in_sources_are_registered_with_the_sections_that_recipes_have():
    import recipes.experiment  # noqa: F401 - as a command does

    assert {name: source.needs_latents for name, source in SOURCES.items()} == {
        "brevity": False,
        "normal": False,
        "prompted": False,
        "steered": True,
    }


def test_a_source_from_outside_makes_rows_that_a_recipe_asks_for(plugin, assets, tmp_path):
    overrides = [
        "train.live=null",
        "data.steered.rows=0",
        "data.normal.rows=0",
        "data.echo={rows: 5, word: hoot}",
        f"runs={tmp_path}",
    ]
    recipe = ROOT / "recipes" / "tiny" / "quickstart.yaml"
    assert data(["generate", str(recipe), "sae=null", "eval.conditions=[unsteered]", *overrides]) == 0
    rows = read_transcripts(tmp_path / "quickstart" / "data" / "tuned.jsonl")
    assert sorted(row.id for row in rows) == [f"echo-0-{number}" for number in (1, 2, 4, 5, 7)]
    assert all([span.kind for span in row.spans] == list(SpanKind) and "hoot" in row.content for row in rows)
    (funnel,) = (tmp_path / "quickstart" / "data" / "sources").glob("echo-*.funnel.json")
    assert '"third of three": 3' in funnel.read_text()
    assert data(["card", str(tmp_path / "quickstart")]) == 0
    card = (tmp_path / "quickstart" / "data" / "README.md").read_text()
    assert "- echo: made by a source of the recipe's own." in card
    assert "- Seed: 0." in card


def test_its_settings_are_checked_kept_and_overridden_by_arms(plugin, small):
    recipe = load_recipe(small, ["data.echo.rows=3", "arms.loud.data.echo.word=HOOT"])
    assert recipe.for_arm("loud").data.source("echo").model_dump() == {"rows": 3, "word": "HOOT"}
    small.write_text(dump_recipe(recipe))
    assert load_recipe(small) == recipe
    with pytest.raises(
        InputError, match=r"2 mistakes .*data\.echo\.rows: .*data\.echo\.wrod: unknown key \(did you mean data"
    ):
        load_recipe(small, ["data.echo={rows: -1, wrod: x}"])


def test_a_source_that_nobody_registered_is_refused_with_the_key_that_was_meant(small):
    with pytest.raises(InputError, match=r"data\.steerd: unknown key \(did you mean data\.steered\?\)"):
        load_recipe(small, ["data.steerd.rows=3"])
    with pytest.raises(InputError, match=r"data\.echo: unknown key"):
        load_recipe(small, ["data.echo.rows=3"])


@pytest.mark.parametrize(
    ("name", "section"), [("normal", NormalSection), ("cues", SourceSection), ("steered", SourceSection)]
)
def test_a_name_that_is_taken_is_refused(name, section):
    with pytest.raises(ValueError, match=f"{name!r} is taken"):
        register_source(name, section)
