"""A number is the number that is written, a key stands once, and whatever else a file says is refused by name."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

from esr_train.errors import InputError
from esr_train.files import read_json, read_jsonl
from esr_train.interchange import import_file, read_training_file
from esr_train.recipe import Recipe, load_recipe
from esr_train.steering.latent_labels import read_labels
from esr_train.training.dataset import VectorSource
from esr_train.training.injection import load_vectors
from esr_train.transcript import SaeRef, read_transcripts
from eval.calibration import Threshold, load_thresholds, save_thresholds
from eval.cells import read_prompts
from eval.judging.lexical import LexicalJudge
from eval.paper_results import read_results
from eval.store import read_trials, trial_to_json
from tests.trial_maker import made

HEAD = "name: small\nmodel: {path: some/model}\n"


def recipe(folder: Path, text: str, *overrides: str) -> Recipe:
    (folder / "r.yaml").write_text(HEAD + text)
    return load_recipe(folder / "r.yaml", overrides)


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("seed: 1\nseed: 2\n", 4, "seed"),
        ("eval: {trials: 3}\nsampling: {}\neval: {bootstrap: 10}\n", 5, "eval"),
        ("eval:\n  trials: 3\n  bootstrap: 10\n  trials: 4\n", 6, "trials"),
        ("eval: {trials: 3, trials: 3}\n", 3, "trials"),
        ("train:\n  lora:\n    r: 8\n    r: 16\n", 6, "r"),
        ("train:\n  args: {learning_rate: 1, max_steps: 2, learning_rate: 1}\n", 4, "learning_rate"),
        ("arms:\n  one: {}\n  two: {}\n  one: {}\n", 6, "one"),
        ("arms:\n  one:\n    data: {normal: {rows: 1, rows: 2}}\n", 5, "rows"),
        ("judges: [{kind: lexical, kind: model}]\n", 3, "kind"),
        ('"eval": {}\neval: {}\n', 4, "eval"),
        ("name: again\n", 3, "name"),
        ("eval: &e {trials: 3}\ntrain: {args: {<<: *e, <<: *e}}\n", 4, "<<"),
    ],
)
def test_a_key_that_comes_twice_in_a_recipe_is_refused_with_its_line(tmp_path: Path, text: str, line: int, key: str):
    with pytest.raises(
        InputError, match=rf"r\.yaml:{line}: not valid YAML \(the key '{key}' comes twice, first in line"
    ):
        recipe(tmp_path, text)


def test_a_key_that_comes_twice_in_an_override_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"the override 'eval=.*the key 'trials' comes twice"):
        recipe(tmp_path, "", "eval={trials: 3, trials: 4}")


def test_a_key_may_stand_once_in_each_of_several_sections_and_over_a_merged_one(tmp_path: Path):
    text = "train:\n  lora: &shared {r: 8, lora_alpha: 4}\n  args: {<<: *shared, r: 9}\narms: {a: {}, b: {}}\n"
    assert recipe(tmp_path, text).train.args == {"r": 9, "lora_alpha": 4}


@pytest.mark.parametrize("number", [".inf", "-.inf", "+.Inf", ".INF", ".nan", ".NaN", "1e999", "-1.0e+400"])
@pytest.mark.parametrize(
    "text",
    [
        "calibration: {{bounds: [0.1, {0}]}}",
        "calibration: {{target: {0}}}",
        "sampling:\n  temperature: {0}",
        "train: {{args: {{learning_rate: {0}}}}}",
        "train: {{live: {{strength: [{0}, 1]}}}}",
        "arms: {{a: {{data: {{steered: {{strength: [1, {0}]}}}}}}}}",
        "seed: {0}",
    ],
)
def test_a_number_in_a_recipe_is_finite(tmp_path: Path, text: str, number: str):
    with pytest.raises(InputError, match=r"r\.yaml:\d: not valid YAML \(.* is no finite number\)"):
        recipe(tmp_path, text.format(number) + "\n")


@pytest.mark.parametrize("override", ["calibration.target={}", "train.args.x={}", "calibration.bounds=[0.1, {}]"])
@pytest.mark.parametrize("number", [".inf", ".nan", "1e999"])
def test_so_is_one_in_an_override(tmp_path: Path, override: str, number: str):
    with pytest.raises(InputError, match="finite number"):
        recipe(tmp_path, "", override.format(number))


@pytest.mark.parametrize("word", ["inf", "Infinity", "-inf", "nan", "NaN", "'.inf'", '"1e999"'])
def test_nor_is_a_word_for_infinity_a_number(tmp_path: Path, word: str):
    with pytest.raises(InputError, match=r"calibration\.target: "):
        recipe(tmp_path, f"calibration: {{target: {word}}}\n")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("seed: true", "seed"),
        ("eval: {trials: yes}", "eval.trials"),
        ("eval: {trials: 5.9}", "eval.trials"),
        ("eval: {bootstrap: on}", "eval.bootstrap"),
        ("sampling: {temperature: true}", "sampling.temperature"),
        ("sampling: {top_p: off}", "sampling.top_p"),
        ("calibration: {bounds: [true, 2]}", "calibration.bounds"),
        ("data: {steered: {cut_words: [true, 2]}}", "data.steered.cut_words"),
        ("data: {self_correction: yes}", "data.self_correction"),
        ("seeds: [1, true]", "seeds"),
        ("train: {max_length: 0x10}", "train.max_length"),
        ("train: {max_length: '12.5'}", "train.max_length"),
        ("train: {max_length: 1:30}", "train.max_length"),
        ("eval: {trials: null}", "eval.trials"),
        ("eval: {trials: 2024-01-01}", "eval.trials"),
    ],
)
def test_what_is_no_such_number_is_refused_with_its_key(tmp_path: Path, text: str, key: str):
    with pytest.raises(InputError, match=key.replace(".", r"\.")):
        recipe(tmp_path, f"{text}\n")


@pytest.mark.parametrize(
    ("text", "number"),
    [("010", 10), ("1_000", 1000), ("+5", 5), ("7", 7), ("1e3", 1000), ("5.0", 5), ("0", 0), ("-3", -3)],
)
def test_a_number_is_the_number_that_is_written(tmp_path: Path, text: str, number: int):
    assert recipe(tmp_path, f"seed: {text}\n").seed == number


@pytest.mark.parametrize("word", ["010", "1:30", "2024-01-01", "12e", "0x10"])
def test_what_only_looks_like_a_number_is_text_where_text_is_asked(tmp_path: Path, word: str):
    (tmp_path / "r.yaml").write_text(f"name: {word.replace(':', '-')}\nmodel: {{path: {word}}}\n")
    assert load_recipe(tmp_path / "r.yaml").model.path == word


TRANSCRIPT: dict[str, Any] = {
    "id": "s1",
    "prompt": "How?",
    "system": None,
    "spans": [{"kind": "off_topic", "text": "Webs."}, {"kind": "answer", "text": " So."}],
    "steering": {
        "sae": {"release": "r", "id": "i"},
        "layer": 3,
        "latent": 5,
        "label": "spiders",
        "strength": {"raw": 4.5, "norm": 0.5},
    },
    "source": "steered",
    "meta": {"seed": 7, "threshold": {"raw": 4.0, "norm": 0.4}},
}
HEADER = "<bos><start_of_turn>user\nHow?<end_of_turn>\n<start_of_turn>model\n"
SAID = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
RESULTS = {
    "results_by_feature": [
        {"feature_index_in_sae": 5, "threshold": 4.5, "trials": [{"prompt": "p", "response": "r", "seed": 7}]}
    ]
}

FILES: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "transcripts.jsonl": (TRANSCRIPT, read_transcripts),
    "training.jsonl": (TRANSCRIPT, read_training_file),
    "segments.jsonl": (
        {"segments": [{"label": False, "text": HEADER}, {"label": True, "text": "So.<end_of_turn>"}], "seed": 7},
        lambda path: import_file(path, "segments"),
    ),
    "messages.jsonl": ({"messages": SAID, "meta": {"seed": 7}}, lambda path: import_file(path, "messages")),
    "normal.json": ([{"messages": SAID, "metadata": {"seed": 7}}], lambda path: import_file(path, "normal")),
    "labels.json": ([{"index": 5, "description": "spiders", "seed": 7}], read_labels),
    "labels.jsonl": ({"index": 5, "description": "spiders", "seed": 7}, read_labels),
    "prompts.jsonl": ({"prompt": "How?", "topic": "t", "seed": 7}, read_prompts),
    "trials.jsonl": (trial_to_json(made()) | {"seed": 7}, read_trials),
    "results.json": (RESULTS, lambda path: read_results(path, "base")),
    "vocabulary.json": ({"t": ["a"], "seed": ["b"]}, LexicalJudge.from_file),
}
TEXTS = {name: json.dumps(value) for name, (value, _) in FILES.items()}


@pytest.mark.parametrize("name", FILES)
def test_the_files_of_these_tests_are_sound(tmp_path: Path, name: str):
    (tmp_path / name).write_text(TEXTS[name] + "\n")
    FILES[name][1](tmp_path / name)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e400"])
@pytest.mark.parametrize("name", [name for name in FILES if '"seed": 7' in TEXTS[name]])
def test_a_number_in_json_is_finite(tmp_path: Path, name: str, number: str):
    (tmp_path / name).write_text(TEXTS[name].replace('"seed": 7', f'"seed": {number}') + "\n")
    with pytest.raises(InputError, match=rf"{name}:1: .*seed: {number} is no finite number"):
        FILES[name][1](tmp_path / name)


@pytest.mark.parametrize("name", FILES)
def test_a_key_that_comes_twice_in_json_is_refused_with_its_line(tmp_path: Path, name: str):
    read, text = FILES[name][1], TEXTS[name]
    for key in ('"seed"', '"prompt"', '"messages"', '"index"', '"label"'):
        if f"{key}: " not in text:
            continue
        (tmp_path / name).write_text(text.replace(f"{key}: ", f'{key}: "first", {key}: ', 1) + "\n")
        with pytest.raises(InputError, match=rf"{name}:1: .*the key {key} comes twice"):
            read(tmp_path / name)


def test_the_line_of_a_fault_deep_in_a_json_file_is_named(tmp_path: Path):
    path = tmp_path / "a.json"
    text = json.dumps({"a": [{"b": 1}, {"b": '"{\\'}], "c": {"d": 2}}, indent=1)
    path.write_text(text.replace('"d": 2', '"d": 2,\n  "d": 3'))
    with pytest.raises(InputError, match=r'a\.json:12: not valid JSON \(the key "d" comes twice\)'):
        read_json(path)
    path.write_text(text.replace('"d": 2', '"d": NaN'))
    with pytest.raises(InputError, match=r"a\.json:11: not valid JSON \(d: NaN is no finite number\)"):
        read_json(path)
    path.write_text("9" * 5000)
    with pytest.raises(InputError, match=r"a\.json:1: not valid JSON \(9* is no finite number\)"):
        read_json(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "[" * 101 + "]" * 101])
def test_deep_nesting_is_refused_by_name(tmp_path: Path, text: str):
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "a.jsonl").write_text(f"1\n{text}\n")
    for read, where in ((read_json, "a.json:1"), (lambda path: read_jsonl(f"{path}l", int), "a.jsonl:2")):
        with pytest.raises(InputError, match=rf"{where}: not valid JSON \(nested more than 100 levels deep"):
            read(tmp_path / "a.json")


@pytest.mark.parametrize("deep", ["[" * 150 + "]" * 150, "[" * 3000, "{a: " * 101 + "1" + "}" * 101])
def test_so_it_is_in_a_recipe(tmp_path: Path, deep: str):
    with pytest.raises(InputError, match=r"r\.yaml:3: not valid YAML \(nested more than 100 levels deep\)"):
        recipe(tmp_path, f"train: {{args: {{x: {deep}}}}}\n")


@pytest.mark.parametrize("rest", ["<|eot_id|>", "x", "}", "{", '"', "1", " 1", ""])
@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_fault_before_broken_grammar_is_refused_all_the_same(tmp_path: Path, number: str, rest: str):
    (tmp_path / "a.json").write_text(f'{{"a": {number}{rest}')
    with pytest.raises(InputError, match=r"a\.json:1: not valid JSON"):
        read_json(tmp_path / "a.json")


def test_nesting_and_brackets_in_text_are_fine(tmp_path: Path):
    values = ["[" * 1000, 'a\\"[' * 200, [[]] * 300, json.loads("[" * 90 + "]" * 90)]
    (tmp_path / "a.json").write_text(json.dumps(values))
    assert read_json(tmp_path / "a.json") == values


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    row = json.loads(json.dumps(TRANSCRIPT))
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return row


NO_WHOLE = [5.9, 5.0, True, "5", [5], -1]
NO_NUMBER = ["4.5", True, None, [4.5], {"raw": 4.5}, 10**400]
S = "steering"
CHANGES: list[tuple[tuple[Any, ...], Any, str]] = [
    *(((S, "latent"), value, "latent") for value in [*NO_WHOLE, None]),
    *(((S, "layer"), value, "layer") for value in [*NO_WHOLE, None]),
    *(((S, "strength", unit), value, f"strength.{unit}") for unit in ("raw", "norm") for value in NO_NUMBER),
    *(((S, "label"), value, "label") for value in (5, True, ["spiders"])),
    *(((S, "sae"), value, "sae") for value in ("r/i", ["r", "i"], {"release": "r"}, {"release": 1, "id": "i"}, None)),
    ((S, "vector"), {"file": "v.pt", "sha256": "0"}, "either"),
    *(((S, "vector"), value, "vector") for value in ("v.pt", {"file": "v.pt"}, {"file": 1, "sha256": "0"})),
    *((("meta", "threshold"), value, "threshold") for value in ("4", 4, [4], {"norm": 1}, {"raw": "4"}, {"raw": True})),
    (("meta",), "seven", "meta"),
    (("spans",), {"kind": "answer", "text": "So."}, "spans"),
    (("spans", 0, "text"), 5, r"spans\[0\].text"),
    (("spans", 0, "kind"), True, r"spans\[0\].kind"),
    (("spans", 1, "kind"), "Answer", r"spans\[1\].kind"),
    (("source",), True, "source"),
    (("source",), None, "source"),
    (("id",), 7, "id"),
    (("prompt",), None, "prompt"),
    # A key that nobody would read is not what its writer meant.
    (("steerin",), None, "steerin"),
    (("sytem",), "Be brief.", "sytem"),
    ((S, "strenght"), 4, "strenght"),
    ((S, "strength", "b"), 4, r"strength\.b"),
    (("spans", 0, "label"), True, r"spans\[0\].label"),
]


@pytest.mark.parametrize(("path", "value", "named"), CHANGES, ids=str)
def test_a_value_of_another_kind_in_a_transcript_is_refused_with_line_and_key(
    tmp_path: Path, path: tuple[Any, ...], value: Any, named: str
):
    file = tmp_path / "t.jsonl"
    file.write_text(f"{json.dumps(TRANSCRIPT)}\n{json.dumps(changed(path, value))}\n")
    for read in (read_transcripts, read_training_file):
        with pytest.raises(InputError, match=rf"t\.jsonl:2: .*{named}"):
            read(file)


@pytest.mark.parametrize(
    "span", [{"start": 0.0}, {"end": 3.0}, {"end": "3"}, {"start": False}, {"end": None}, {"x": 1}]
)
def test_the_places_of_spans_are_whole_numbers(tmp_path: Path, span: dict[str, Any]):
    spans = [{"kind": "answer", "start": 0, "end": 3} | span]
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": SAID, "spans": spans}))
    with pytest.raises(InputError, match=r"m\.jsonl:1: .*spans\[0\]"):
        import_file(tmp_path / "m.jsonl", "messages")


THRESHOLD = Threshold(5, "spiders", 0.5, 4.5, 0.4, 0.6, 12, None, 30.0, 4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latent", 5.9), ("latent", True), ("latent", "5"), ("latent", None), ("norm", "0.5"), ("norm", True),
        ("raw", None), ("low", [0.4]), ("high", 10**400), ("n", 12.5), ("n", True), ("bound", "middle"), ("bound", 1),
        ("verified", "30"), ("verified_n", 4.5), ("label", 5), ("extra", 1),
    ],
)  # fmt: skip
def test_frozen_thresholds_are_what_they_say(tmp_path: Path, key: str, value: Any):
    path = tmp_path / "thresholds.json"
    save_thresholds(path, {"model": "m"}, [THRESHOLD, THRESHOLD])
    assert load_thresholds(path, {"model": "m"}) == [THRESHOLD] * 2
    content = json.loads(path.read_text())
    content["thresholds"][1][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"thresholds\.json: .*{key}"):
        load_thresholds(path, {"model": "m"})


@pytest.mark.parametrize("content", [[], {}, {"key": {}}, {"key": [], "thresholds": []}, {"key": {}, "thresholds": {}}])
def test_another_file_is_no_file_of_thresholds(tmp_path: Path, content: Any):
    (tmp_path / "thresholds.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"thresholds\.json: this is not a file of thresholds"):
        load_thresholds(tmp_path / "thresholds.json", {})


def test_rows_steered_at_another_layer_than_their_sae_s_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=6))
    sae.W_dec.data = torch.randn_like(sae.W_dec)
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    sae.save_model(tmp_path / "saes" / "first")
    latent = VectorSource(SaeRef("saes", "first"), 3, 5)
    assert load_vectors([latent]).shape == (1, 8)
    with pytest.raises(InputError, match=r"steered at layer 1 with latents of an SAE of layer 3 \(saes / first\)"):
        load_vectors([latent, replace(latent, layer=1)])


def test_a_half_written_escape_and_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}\n{"a": "\\ude00"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: .*\\ude00 is half of a pair"):
        read_jsonl(tmp_path / "a.jsonl", dict)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}\n'))
    assert read_jsonl(tmp_path / "b.jsonl.gz", dict) == [{"a": "😀"}]
