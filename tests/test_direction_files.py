"""SAEs and vectors of one's own from files: layers, widths, names, and what cannot be read."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from esr_train.errors import InputError
from esr_train.steering.direction_files import check_fits, load_sae
from esr_train.steering.readout import measure_residual_norm
from esr_train.steering.vector_files import load_vectors
from esr_train.transcript import SaeRef
from tests.test_directions import save

VECTORS = torch.arange(1.0, 1 + 3 * 64).reshape(3, 64)


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.2.hook_resid_post", 2),
        ("model.layers.19", 19),
        ("model.layers.3.output", 3),
        ("blocks.0.hook_resid_post", 0),
        ("blocks.1.hook_resid_pre", 0),
        ("blocks.20.hook_resid_pre", 19),
    ],
)
def test_a_local_folder_is_loaded_and_its_layer_parsed(hook, layer, tmp_path):
    saved = save(tmp_path / "saes" / "first", hook=hook)
    sae = load_sae(SaeRef(str(tmp_path / "saes"), "first"))
    assert (sae.layer, sae.d_model, sae.n_latents) == (layer, 64, 96)
    assert torch.equal(sae.row(5), saved.W_dec[5])
    hidden = torch.randn(3, 64)
    torch.testing.assert_close(sae.encode(hidden), saved.encode(hidden))
    torch.testing.assert_close(sae.decoder_norms(), saved.W_dec.detach().norm(dim=1))


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.0.hook_resid_pre",
        "blocks.2.hook_resid_mid",
        "blocks.2.hook_mlp_out",
        "blocks.2.attn.hook_z",
        "blocks.2.ln2.hook_normalized",
        "model.layers.2.mlp",
        "hook_embed",
        "",
    ],
)
def test_an_sae_off_the_outputs_of_layers_is_refused_by_the_name_of_what_it_reads(hook, tmp_path):
    save(tmp_path / "s", hook=hook)
    with pytest.raises(InputError, match=rf"reads '{hook}'"):
        load_sae(SaeRef(str(tmp_path), "s"))


def test_what_enters_a_layer_is_what_leaves_the_one_below(tmp_path, llama):
    save(tmp_path / "s", hook="blocks.2.hook_resid_pre")
    kept: list[torch.Tensor] = []
    handle = llama.model.model.layers[2].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        states = llama.model(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
    handle.remove()
    assert torch.equal(kept[0], states[load_sae(str(tmp_path), "s").layer + 1])


def test_an_sae_is_named_by_a_reference_by_two_texts_or_by_its_own_folder(tmp_path, monkeypatch):
    save(tmp_path / "here" / "first")
    monkeypatch.chdir(tmp_path)
    for sae in (load_sae(SaeRef("here", "first")), load_sae("here", "first"), load_sae("here/first")):
        assert (sae.ref, sae.layer) == (SaeRef("here", "first"), 2)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (SaeRef("gemma-scope-9b-pt-res-canonica", "x"), "Near matches:.*gemma-scope-9b-pt-res-canonical"),
        (
            SaeRef("gemma-scope-9b-pt-res-canonical", "layer_26/width_16k/canonica"),
            "layer_26/width_16k/canonical",
        ),
    ],
)
def test_unknown_names_are_answered_with_near_matches(ref, message):
    with pytest.raises(InputError, match=message):
        load_sae(ref)


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors", "no width", "no architecture", "other shapes"])
def test_a_folder_that_holds_no_whole_sae_is_refused_in_a_sentence(file, tmp_path):
    save(tmp_path / "s")
    path = tmp_path / "s" / "cfg.json"
    config = json.loads(path.read_text())
    if file.startswith("no "):
        del config[{"no width": "d_in", "no architecture": "architecture"}[file]]
        path.write_text(json.dumps(config))
    elif file == "other shapes":
        path.write_text(json.dumps({**config, "d_in": 32}))
    else:
        (tmp_path / "s" / file).write_bytes(b"\x00 not this")
    with pytest.raises(InputError, match="not an SAE in sae-lens format"):
        load_sae(str(tmp_path), "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not an SAE in sae-lens format"):
        load_sae(SaeRef(str(tmp_path), "empty"))


def test_an_sae_must_fit_the_model(tmp_path, llama):
    for name, options, message in [
        ("wide", {"width": 128}, "128 wide, the model's residual stream 64"),
        ("deep", {"hook": "blocks.9.hook_resid_post"}, "there is no layer 9: the model has 4"),
    ]:
        save(tmp_path / name, **options)
        with pytest.raises(InputError, match=message):
            check_fits(load_sae(SaeRef(str(tmp_path), name)), llama.model)
        with pytest.raises(InputError, match=message):
            load_sae(str(tmp_path), name, model=llama.model, tokenizer=llama.tokenizer)
    save(tmp_path / "fits")
    check_fits(load_sae(SaeRef(str(tmp_path), "fits")), llama.model)


def test_loaded_for_a_model_an_sae_knows_the_residual_norm_and_else_says_what_to_do(tmp_path, family):
    save(tmp_path / "s")
    sae = load_sae(str(tmp_path), "s", model=family.model, tokenizer=family.tokenizer)
    assert sae.residual_norm == measure_residual_norm(family.model, family.tokenizer, 2)
    assert float(sae.direction(3).add(0.5).vector.norm()) == pytest.approx(0.5 * sae.residual_norm, rel=1e-5)
    unmeasured = load_sae(str(tmp_path), "s").direction(3, label="baking")
    with pytest.raises(InputError, match=r"baking: the residual norm of layer 2 is not known.*load_sae.*add\(raw=…\)"):
        unmeasured.add(0.5)
    assert torch.allclose(unmeasured.add(raw=2.0).vector, 2 * load_sae(str(tmp_path), "s").row(3))


def written(folder, kind: str):
    """The same three vectors in every format, and the labels that they come with."""
    path = folder / f"v.{kind.partition(' ')[0]}"
    named = dict(zip("abc", VECTORS, strict=True))
    if kind == "npy":
        np.save(path, VECTORS.numpy())
    elif kind == "npy one":
        np.save(path, VECTORS[0].numpy())
    elif kind == "pt":
        torch.save(VECTORS, path)
    elif kind == "pt named":
        torch.save(named, path)
    elif kind == "safetensors":
        save_file({name: row.clone() for name, row in named.items()}, path)
    else:
        save_file({"caa": VECTORS.half()}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("npy", ["0", "1", "2"]),
        ("npy one", [None]),
        ("pt", ["0", "1", "2"]),
        ("pt named", ["a", "b", "c"]),
        ("safetensors", ["a", "b", "c"]),
        ("safetensors table", ["caa.0", "caa.1", "caa.2"]),
    ],
)
def test_vectors_of_ones_own_steer_like_latents(kind, labels, tmp_path, llama):
    path = written(tmp_path, kind)
    vectors = load_vectors(path, 2)
    assert [vector.label for vector in vectors] == labels
    assert all(vector.layer == 2 and vector.residual_norm is None for vector in vectors)
    for vector, row in zip(vectors, VECTORS, strict=False):
        torch.testing.assert_close(vector.add(raw=1.5, positions="generated").vector, 1.5 * row)
    measured = load_vectors(path, 2, labels=["x"] * len(vectors), model=llama.model, tokenizer=llama.tokenizer)
    norm = measure_residual_norm(llama.model, llama.tokenizer, 2)
    assert {vector.label for vector in measured} == {"x"}
    assert float(measured[0].add(0.5).vector.norm()) == pytest.approx(0.5 * norm, rel=1e-5)


def broken(folder, name: str):
    values = {
        "zeros.npy": torch.zeros(64),
        "nan.npy": torch.full((2, 64), float("nan")),
        "whole.npy": torch.arange(64),
        "cube.npy": torch.ones(2, 2, 64),
        "number.npy": torch.tensor(1.0),
        "empty.npy": torch.ones(0, 64),
    }
    path = folder / name
    if name in values:
        np.save(path, values[name].numpy())
    elif name == "objects.npy":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif name == "code.pt":
        torch.save(InputError, path)
    elif name == "widths.pt":
        torch.save({"a": torch.ones(64), "b": torch.ones(32)}, path)
    elif name == "text.pt":
        torch.save({"a": "b"}, path)
    else:
        path.write_bytes(b"\x00\x01")
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zeros.npy", "finite and not zero"),
        ("nan.npy", "finite and not zero"),
        ("whole.npy", "no vector of floating-point numbers"),
        ("cube.npy", "no vector of floating-point numbers"),
        ("number.npy", "no vector of floating-point numbers"),
        ("empty.npy", "vectors of one width are needed"),
        ("objects.npy", "cannot be read"),
        ("code.pt", "cannot be read"),
        ("widths.pt", "vectors of one width are needed"),
        ("text.pt", "no vector of floating-point numbers"),
        ("broken.safetensors", "cannot be read"),
        ("broken.pt", "cannot be read"),
        ("vectors.csv", r"read from \.safetensors, \.pt, \.npy, \.gguf"),
    ],
)
def test_what_holds_no_vectors_is_refused_by_the_name_of_the_file(name, message, tmp_path):
    path = broken(tmp_path, name)
    with pytest.raises(InputError, match=message) as caught:
        load_vectors(path, 2)
    assert str(path) in str(caught.value)


def test_vectors_that_do_not_fit_are_refused(tmp_path, llama):
    path = written(tmp_path, "npy")
    with pytest.raises(InputError, match="the file does not exist"):
        load_vectors(tmp_path / "none.npy", 2)
    with pytest.raises(InputError, match="3 vectors need as many labels, not 1"):
        load_vectors(path, 2, labels=["a"])
    with pytest.raises(InputError, match="there is no layer 4"):
        load_vectors(path, 4, model=llama.model, tokenizer=llama.tokenizer)
    np.save(path, np.ones((3, 32), dtype=np.float32))
    with pytest.raises(InputError, match="32 wide, the model's residual stream 64"):
        load_vectors(path, 2, model=llama.model, tokenizer=llama.tokenizer)
