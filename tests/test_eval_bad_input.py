"""What is wrong with the files of `esr eval` commands is told in one paragraph, with line or key; exit code 2."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from esr_train.files import write_json
from eval.__main__ import main as evaluate
from eval.store import trial_to_json
from eval.summary import summarise
from tests.trial_maker import made

TRIAL = json.dumps(trial_to_json(made(key="a", attempts=[{"start": 0, "end": 8, "score": 20}])))
METRICS = json.dumps(summarise({"base": [made()]}, bootstrap=10).to_json())
BROKEN_TRIALS = {
    "{": r"base\.jsonl:1",
    "[]": r"base\.jsonl:1",
    '{"key": "a"}': r"base\.jsonl:1: .*'arm' is missing",
    TRIAL + "\n" + TRIAL: r"base\.jsonl:2: the key 'a' was there before",
    TRIAL + "\n" + TRIAL.replace('"key": "a"', '"key": "b", "key": "c"'): r"base\.jsonl:2: .*\"key\" comes twice",
    TRIAL.replace('"score": 20', '"score": NaN'): r"base\.jsonl:1: .*score.*no finite number",
    TRIAL.replace('"score": 20', '"score": 1e999'): r"base\.jsonl:1: .*score.*no finite number",
    TRIAL.replace('"score": 20', '"score": "20"'): r"base\.jsonl:1: .*attempts\[0\]\.score is not a finite number",
    TRIAL.replace('"seed": 0', '"seed": 0.5'): r"base\.jsonl:1: .*seed is not a whole number: 0\.5",
    TRIAL.replace('"cue"', '"clue"'): r"base\.jsonl:1: .*no key 'clue'",
    TRIAL.replace('"latent": 7', '"latent": true'): r"base\.jsonl:1: .*cell\.latent is not a whole number: true",
    "[" * 100_000: r"base\.jsonl:1",
}
BROKEN_METRICS = {
    "": r"metrics\.json:1: not valid JSON",
    "{": r"metrics\.json:1: not valid JSON",
    "[]": r"this is not a metrics\.json",
    "{}": r"the key 'arms' is missing",
    METRICS.replace('"n": 1', '"n": NaN', 1): r"metrics\.json:1: .*no finite number",
    METRICS.replace('"n": 1', '"n": "1"', 1): r"\.n is not a whole number: \"1\"",
    METRICS.replace('"tests": 0', '"tests": 0, "tests": 1'): r"metrics\.json:1: .*\"tests\" comes twice",
    METRICS.replace('"tests": 0', '"test": 0'): r"no key 'test'",
}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused; returns the paragraph."""

    def run(*words: object) -> str:
        assert evaluate([str(word) for word in words]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert told.count("\n") == 1, told
        assert len(told) < 1_000
        return told

    return run


def matches(told: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(told)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with one trial."""
    (tmp_path / "run" / "trials").mkdir(parents=True)
    (tmp_path / "run" / "trials" / "base.jsonl").write_text(TRIAL + "\n")
    (tmp_path / "run" / "metrics.json").write_text(METRICS)
    return tmp_path / "run"


@pytest.mark.parametrize("command", ["compare", "power"])
@pytest.mark.parametrize(("content", "named"), BROKEN_TRIALS.items(), ids=range(len(BROKEN_TRIALS)))
def test_a_broken_trial_file_is_refused_by_its_line(refused, run, command, content, named):
    (run / "trials" / "base.jsonl").write_text(content + "\n")
    words = ["power", "--run", run] if command == "power" else ["compare", run, run]
    matches(refused(*words), named)


@pytest.mark.parametrize(("content", "named"), BROKEN_METRICS.items(), ids=range(len(BROKEN_METRICS)))
def test_a_broken_metrics_file_is_refused_by_its_key(refused, run, content, named):
    (run / "metrics.json").write_text(content)
    matches(refused("compare", run), named)
    matches(refused("compare", run / "metrics.json"), named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["compare", "{run}/nowhere"], r"nowhere: the file does not exist"),
        (["compare", "{run}/trials"], r"trials/metrics\.json: the file does not exist"),
        (["compare", "{run}", "{run}/nowhere"], r"nowhere/trials: there are no trials here"),
        (["compare", "{run}", "{run}/metrics.json"], r"metrics\.json/trials: there are no trials here"),
        (["power", "--run", "{run}/nowhere"], r"nowhere/trials/base\.jsonl: the trial file does not exist"),
        (["power", "--run", "{run}/metrics.json"], r"the trial file does not exist"),
        (["power", "--run", "{run}", "--condition", "upside_down"], r"--condition.*'upside_down'.*steered"),
        (["power", "--run", "{run}", "--metric", "esr"], r"'esr' is not a rate"),
        (["power", "--base", "nan"], r"--base: nan is not a share"),
        (["power", "--base", "0.1", "--icc", "inf"], r"--icc: inf is not a share"),
        (["power", "--base", "0.1", "--other", "-1"], r"--other -1: -1 is not a share"),
        (["power", "--base", "0.1", "--power", "1"], r"power lies between 0 and 1"),
        (["report", "{run}"], r"recipe\.yaml: the file does not exist"),
        (["report", "{run}/nowhere"], r"nowhere"),
        (["report", "{run}/metrics.json"], r"metrics\.json"),
        (["import", "{run}/nowhere.json", "--out", "{run}/out"], r"nowhere\.json: the file does not exist"),
        (["import", "{run}", "--out", "{run}/out"], r"this is a folder, not a file"),
        (["import", "{run}/metrics.json", "--out", "{run}/out"], r"the key 'results_by_feature' is missing"),
        (["import", "{run}/metrics.json", "--out", "{run}/out", "--arm", "../up"], r"--arm: '\.\./up' cannot be"),
    ],
)
def test_a_wrong_path_or_number_is_refused_by_its_name(refused, run, words, named):
    matches(refused(*(word.format(run=run) for word in words)), named)
    assert not (run / "out").exists()


def test_files_that_are_folders_are_refused(refused, run):
    for path in (run / "metrics.json", run / "trials" / "base.jsonl"):
        path.unlink()
        path.mkdir()
    matches(refused("compare", run), r"metrics\.json: this is a folder, not a file")
    matches(refused("compare", run, run), r"base\.jsonl")
    matches(refused("power", "--run", run), r"base\.jsonl")


def test_an_import_into_a_file_is_refused(refused, run):
    given = {"feature_index_in_sae": 1, "trials": [{"prompt": "a", "response": "b", "threshold": 1.0}]}
    write_json(run / "results.json", {"results_by_feature": [given]})
    matches(refused("import", run / "results.json", "--out", run / "metrics.json"), r"cannot be written")


def test_an_empty_trial_file_has_no_trials(refused, run):
    (run / "trials" / "base.jsonl").write_text("")
    matches(refused("compare", run, run), r"there are no trials here")
    matches(refused("power", "--run", run), r"no trial")
