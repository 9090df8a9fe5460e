"""A file of vectors steers a recipe as an SAE's latents do: chosen, dealt, recorded in rows, and trained under."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_gen.description import describe
from data_gen.sources import SteerableLatent
from esr_train.errors import InputError
from esr_train.files import read_json, write_json, write_jsonl
from esr_train.provenance import sha256
from esr_train.recipe import Recipe, parse_recipe
from esr_train.steering.direction_files import load_sae
from esr_train.steering.directions import Add, SteeringVector
from esr_train.steering.latent_labels import read_labels
from esr_train.steering.vector_files import load_vectors, open_vectors, save_vectors
from esr_train.training.dataset import VectorSource
from esr_train.training.injection import load_vectors as row_vectors
from esr_train.transcript import Span, SpanKind, Transcript, VectorRef, from_json, read_transcripts, to_json
from eval.calibration import Threshold
from eval.cells import SPLITS, read_prompts
from eval.store import read_trials
from recipes.cli import main
from recipes.experiment import Experiment, source_inputs
from recipes.planning.preflight import check, whole
from recipes.resources import Resources
from recipes.stages.stage_cache import StageCache
from recipes.stages.steering_latents import Calibrated, check_steerable, choose_latents, latent_facts, threshold_key
from tests.conftest import Family
from tests.small_run import new_run
from tests.test_sae_kinds import experiment as sae_experiment

LAYER, WIDTH = 2, 64
SUBJECTS = ("owls", "kites", "rain", "tents", "maps", "soap", "jazz", "clay", "tea", "bees", "moss", "rope")


def vectors(names: tuple[str, ...], layer: int = LAYER) -> list[SteeringVector]:
    torch.manual_seed(0)
    rows = torch.randn(len(names), WIDTH)
    return [
        SteeringVector(layer, name, row / row.norm(), float(row.norm()), None)
        for name, row in zip(names, rows, strict=True)
    ]


def world(folder: Path, family: Family, names: tuple[str, ...], **values: Any) -> Experiment:
    """An experiment on a random model that a file of vectors steers."""
    family.model.save_pretrained(folder / "model")
    family.tokenizer.save_pretrained(folder / "model")
    save_vectors(folder / "own.safetensors", vectors(names))
    topics = ("baking", "sailing", "folding", "owls")
    write_jsonl(
        folder / "prompts.jsonl", ({"prompt": f"How does {t} go? ({i})", "topic": t} for t in topics for i in range(4))
    )
    made = as_recipe(values)
    return Experiment(made, made.directory, Resources(made), StageCache(made.directory))


def recipe_values(**values: Any) -> dict[str, Any]:
    return {
        "name": "own",
        "model": {"path": "model", "dtype": "float32", "device": "cpu"},
        "vectors": {"file": "own.safetensors"},
        "judge": {"vocabulary": "vocabulary.json"},
        "prompts": {"path": "prompts.jsonl", "splits": {"validation": 0.2, "test": 0.3}},
        "data": {"steered": {"rows": 4}},
        **values,
    }


def as_recipe(values: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(recipe_values(**values))


def control_vector(path: Path, layers: tuple[int, ...]) -> Path:
    writer = gguf.GGUFWriter(path, "controlvector")
    for layer in layers:
        writer.add_tensor(f"direction.{layer}", np.full(WIDTH, layer, dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def test_a_written_file_gives_the_same_vectors_names_and_layer_and_the_same_bytes_every_time(tmp_path):
    written, path = vectors(SUBJECTS), tmp_path / "own.safetensors"
    facts = {"model": "m", "command": "c", "residual_norm": "191.2"}
    save_vectors(path, written, facts)
    found = {vector.label: vector for vector in load_vectors(path)}
    assert set(found) == set(SUBJECTS)
    for vector in written:
        assert found[vector.label].layer == LAYER
        torch.testing.assert_close(found[vector.label].add(raw=2.0).vector, vector.add(raw=2.0).vector)
    first = path.read_bytes()
    for _ in range(8):
        save_vectors(path, written, facts)
        assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("path", "given", "message"),
    [
        ("v.npy", vectors(("owls",)), "written as safetensors"),
        ("v.safetensors", vectors(("owls", "owls")), "a label of its own"),
        ("v.safetensors", [replace(vectors(("owls",))[0], label=None)], "a label of its own"),
        ("v.safetensors", [*vectors(("owls",)), *vectors(("bees",), 1)], "vectors of one layer"),
    ],
)
def test_vectors_that_could_not_be_read_back_are_not_written(path, given, message, tmp_path):
    with pytest.raises(InputError, match=message):
        save_vectors(tmp_path / path, given)
    assert not (tmp_path / path).exists()


def test_the_layer_comes_from_the_file_or_the_caller_and_a_contradiction_is_refused(tmp_path):
    said, unsaid = tmp_path / "said.safetensors", tmp_path / "unsaid.safetensors"
    save_vectors(said, vectors(("owls",)))
    save_file({"owls": torch.ones(WIDTH)}, unsaid)
    assert open_vectors(said).layer == open_vectors(said, LAYER).layer == open_vectors(unsaid, LAYER).layer == LAYER
    with pytest.raises(InputError, match="for layer 2, and layer 1 is asked for"):
        open_vectors(said, 1)
    with pytest.raises(InputError, match=r"unsaid.safetensors: the file does not say for which layer.*Name the layer"):
        open_vectors(unsaid)
    save_file({"owls": torch.ones(WIDTH)}, unsaid, {"layer": "third"})
    with pytest.raises(InputError, match="cannot be read"):
        open_vectors(unsaid, 2)


def test_of_a_control_vector_the_direction_of_the_layer_is_taken(tmp_path):
    path = control_vector(tmp_path / "honest.gguf", (1, 2, 3))
    found = open_vectors(path, 2)
    assert found.labels == {0: "honest"}
    torch.testing.assert_close(found.direction(0).add(raw=1.0).vector, torch.full((WIDTH,), 2.0))
    for layer, said in ((None, "names no layer"), (0, "names layer 0")):
        with pytest.raises(InputError, match=rf"directions for the layers 1, 2, 3, and what asks for it {said}"):
            open_vectors(path, layer)
    assert open_vectors(control_vector(tmp_path / "one.gguf", (3,))).layer == 3
    with pytest.raises(InputError, match=r"no tensor direction\.N"):
        open_vectors(control_vector(tmp_path / "none.gguf", ()), 2)


def test_a_lone_vector_is_called_as_its_file_and_two_of_one_name_are_refused(tmp_path):
    np.save(tmp_path / "joy.npy", np.ones(WIDTH, dtype=np.float32))
    assert open_vectors(tmp_path / "joy.npy", 1).labels == {0: "joy"}
    save_file({"a": torch.ones(2, WIDTH), "a.1": torch.ones(WIDTH)}, tmp_path / "v.safetensors")
    with pytest.raises(InputError, match="two vectors have the same name"):
        open_vectors(tmp_path / "v.safetensors", 1)
    with pytest.raises(InputError, match="there is no vector 1: the file has 1"):
        open_vectors(tmp_path / "joy.npy", 1).direction(1)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, list])
def test_a_vector_may_be_an_array_and_so_may_what_is_added(kind):
    array = kind(np.arange(1.0, WIDTH + 1))
    (vector,) = load_vectors(array, 1)
    expected = torch.arange(1.0, WIDTH + 1)
    torch.testing.assert_close(vector.add(raw=2.0).vector, 2 * expected)
    torch.testing.assert_close(Add(1, array).vector.float(), expected)
    assert [each.label for each in load_vectors(np.eye(2, WIDTH), 1, labels=["a", "b"])] == ["a", "b"]
    with pytest.raises(InputError, match="does not say for which layer"):
        load_vectors(array)
    with pytest.raises(InputError, match=r"the array .*finite and not zero"):
        load_vectors(np.zeros(WIDTH), 1)


def test_every_vector_is_dealt_to_a_split_whether_its_name_is_a_topic_or_not(tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = world(tmp_path, llama, SUBJECTS)
    chosen = choose_latents(made)
    assert sorted(str(direction.label) for direction in chosen.in_order()) == sorted(SUBJECTS)
    assert all(chosen.splits.values())
    owls = next(split for split, group in chosen.splits.items() if "owls" in {each.label for each in group})
    assert owls == made.resources.prompts().topics["owls"]
    norm = read_json(made.directory / "latents.json")["residual_norm"]
    assert all(each.residual_norm == norm and each.layer == LAYER for each in chosen.in_order())
    facts = latent_facts(made.directory, "vector")
    assert facts == ["vectors of own.safetensors are added to the output of layer 2", "12 of 12 vectors are in play"]


@pytest.mark.parametrize("arms", [{}, {"asked": {"of": "base", "prompt": "Stay on topic. {prompt}"}}])
def test_where_nothing_is_trained_one_vector_is_enough_and_all_are_measured(arms, tmp_path, llama, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for names in (("owls",), SUBJECTS[:5]):
        chosen = choose_latents(world(tmp_path, llama, names, arms=arms))
        assert {split: len(group) for split, group in chosen.splits.items()} == {
            "train": 0,
            "validation": 0,
            "test": len(names),
        }
        assert "nothing is trained here on the vectors, so all of them are measured" in capsys.readouterr().out


def test_vectors_that_a_given_adapter_may_have_been_trained_on_stay_dealt(tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"arms": {"theirs": {"adapter": "somewhere"}}}
    assert all(choose_latents(world(tmp_path, llama, SUBJECTS, **given)).splits.values())
    assert len(choose_latents(world(tmp_path, llama, SUBJECTS[:2], **given)).splits["test"]) == 2


def test_too_few_vectors_to_train_on_and_measure_are_refused_with_the_reason(tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"1 vector cannot be divided .* must not be measured: 3 are needed"):
        choose_latents(world(tmp_path, llama, ("rain",)))
    no_validation = {"prompts": {"path": "prompts.jsonl", "splits": {"validation": 0, "test": 0.5}}}
    chosen = choose_latents(world(tmp_path, llama, ("rain", "bees"), **no_validation))
    assert [len(chosen.splits[split]) for split in ("train", "test")] == [1, 1]
    topics = Resources(as_recipe(no_validation)).prompts().topics
    trained = tuple(topic for topic, split in topics.items() if split == "train")[:2]
    with pytest.raises(InputError, match=r"none of the 2 vectors is left to measure: .* by their labels"):
        choose_latents(world(tmp_path, llama, trained, **no_validation))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sae": {"release": "saes", "id": "one", "labels": "labels.jsonl"}}, r"only one source can: remove vectors"),
        (
            {"arms": {"less": {"of": "base", "edit": {"ablate": [1]}}}},
            r"arms\.less\.edit: latents of an SAE are edited",
        ),
        ({"vectors": {"file": "own.npy", "layer": -1}}, r"vectors\.layer"),
        ({"vectors": {"layer": 1}}, r"vectors\.file: required"),
    ],
)
def test_a_recipe_in_which_vectors_cannot_do_what_is_asked_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        parse_recipe(recipe_values(**values))


def test_an_sae_whose_latents_are_edited_may_stand_beside_vectors():
    sae = {"sae": {"release": "saes", "id": "one"}, "arms": {"less": {"of": "base", "edit": {"ablate": [1]}}}}
    assert parse_recipe(recipe_values(**sae)).sae is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vectors": {"file": "none.npy"}}, r"none\.npy: the file does not exist"),
        ({"vectors": {"file": "deep.npy", "layer": 9}}, r"there is no layer 9: the model has 4"),
        ({"vectors": {"file": "wide.npy", "layer": 1}}, r"vectors: the vectors of wide\.npy are 32 wide, .* 64\. Name"),
        ({"eval": {"conditions": ["random_latents"]}}, r"'random_latents' takes latents of an SAE.*random_direction"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_loaded(values, message, tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world(tmp_path, llama, SUBJECTS)
    np.save("deep.npy", np.ones(WIDTH, dtype=np.float32))
    np.save("wide.npy", np.ones(32, dtype=np.float32))
    monkeypatch.setattr("recipes.resources.load_model", lambda *_: pytest.fail("a model was loaded"))
    made = as_recipe({"arms": {}, **values})
    with pytest.raises(InputError, match=message):
        check(made, whole(made))


def test_results_depend_on_what_is_in_the_file_and_on_the_layer_wherever_it_lies(tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = world(tmp_path, llama, SUBJECTS)
    before, key = source_inputs(made), key_of(made)
    Path("own.safetensors").rename("moved.safetensors")
    moved = replace(
        made,
        recipe=made.recipe.model_copy(
            update={"vectors": made.recipe.vectors.model_copy(update={"file": "moved.safetensors"})}
        ),
    )
    moved = replace(moved, resources=Resources(moved.recipe))
    assert source_inputs(moved) == before
    assert key_of(moved) == key
    changed = world(tmp_path, llama, SUBJECTS[:-1])
    assert source_inputs(changed) != before
    assert key_of(changed) != key


def key_of(made: Experiment) -> Any:
    write_json("vocabulary.json", {"baking": ["dough"]})
    return threshold_key(made.resources)


def test_a_row_names_the_file_and_its_vector_and_is_trained_under_that_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_vectors(Path("own.safetensors"), vectors(SUBJECTS))
    source = open_vectors("own.safetensors")
    place = next(index for index, label in source.labels.items() if label == "tea")
    steering = SteerableLatent(source.direction(place, residual_norm=3.0), 0.5).steering(0.9)
    row = Transcript("r", "Why?", (Span(SpanKind.ANSWER, "So."),), "steered", steering=steering)
    written = to_json(row)["steering"]
    assert set(written) == {"vector", "layer", "label", "strength"}
    assert set(written["vector"]) == {"file", "sha256"}
    assert from_json(to_json(row)) == row
    (counted,) = (part for part in describe([row]) if part.name == "vectors")
    assert counted.counts == {"tea": 1}
    (found,) = row_vectors([VectorSource.of(steering)])
    torch.testing.assert_close(found, vectors(SUBJECTS)[SUBJECTS.index("tea")].add(raw=1.0).vector)
    with pytest.raises(InputError, match=r"none of the 12 here is called 'coffee'"):
        row_vectors([VectorSource.of(replace(steering, label="coffee"))])


def test_latents_of_an_sae_that_cannot_be_read_still_steer_and_the_report_says_what_was_not_asked(
    tmp_path, llama, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    made = sae_experiment(tmp_path, llama, "standard")
    plain = made.resources.sae()
    unread = replace(plain, not_encoded="those of its architecture, new, belong to no single token")
    made.resources._opened["sae"] = unread
    chosen = choose_latents(made)
    assert len(chosen.in_order()) == 9
    assert "active on a prompt" not in read_json(made.directory / "latents.json")["funnel"]
    said = f"latents that are active on a prompt are not left out: {unread.not_encoded}"
    assert said in capsys.readouterr().out
    assert said in latent_facts(made.directory)


@pytest.mark.slow
def test_a_whole_run_is_steered_by_vectors_and_says_so(assets, tmp_path, capsys):
    run = new_run(tmp_path, assets)
    sae, labels = load_sae(str(assets), "llama-sae"), read_labels(assets / "llama-sae" / "labels.jsonl")
    topics = {prompt.topic for prompt in read_prompts(tmp_path / "prompts.jsonl")}
    first = {label: latent for latent, label in reversed(labels.items()) if label in topics}
    file = tmp_path / "vectors.safetensors"
    save_vectors(file, [sae.direction(latent, label=label) for label, latent in first.items()])
    words = [*(word for word in run.words if not word.startswith("sae.")), "sae=null", f"vectors.file={file}"]
    assert main(words) == 0
    assert f"calibrated {len(first)} vectors" in capsys.readouterr().out
    rows = [row for row in read_transcripts(run.folder / "data" / "tuned.jsonl") if row.steering]
    assert {row.steering.vector for row in rows} == {VectorRef(str(file), sha256(file))}
    base, tuned = (read_trials(run.folder / "trials" / f"{arm}.jsonl") for arm in ("base", "tuned"))
    steered = [trial for trial in (*base, *tuned) if trial.condition != "unsteered"]
    assert all(trial.steered_tokens > 0 and trial.cell.label in first for trial in steered)
    assert not {row.steering.label for row in rows} & {trial.cell.label for trial in steered}
    report = (run.folder / "report.html").read_text()
    assert f"vectors of {file} are added to the output of layer {sae.layer}" in report
    assert "clustered by vector" in report
    before = (run.folder / "metrics.json").stat().st_mtime_ns
    assert main(words) == 0
    assert (run.folder / "metrics.json").stat().st_mtime_ns == before


def test_where_every_threshold_lies_at_a_bound_the_bounds_are_named_and_what_they_mean():
    recipe = as_recipe({})
    thresholds = [Threshold(i, "a", 2.0, 3.0, 1.9, 2.0, 20, "high") for i in range(3)]
    calibrated = Calibrated("f", thresholds, {split: () for split in SPLITS})
    said = r"calibration\.bounds=\[0\.1, 2\]: no vector is left .* 0 of 3 at the low one .* 3 at the high one"
    with pytest.raises(InputError, match=said):
        check_steerable(recipe, calibrated)
