"""Steering vectors of one's own: read from the files in which people keep them, and written."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike

from esr_train.errors import InputError, first_line
from esr_train.files import replacing
from esr_train.models import check_layer, hidden_size, local_path
from esr_train.provenance import sha256
from esr_train.steering.directions import SteeringVector, VectorSet
from esr_train.steering.readout import measure_residual_norm
from esr_train.transcript import VectorRef

ENDINGS = (".safetensors", ".pt", ".npy", ".gguf")
CONTROL = re.compile(r"direction\.(\d+)")
"""A tensor of a control vector, as repeng and llama.cpp keep it: one for each decoder layer whose output it steers."""


def load_vectors(
    path: Path | str | ArrayLike,
    layer: int | None = None,
    *,
    labels: Sequence[str] | None = None,
    model: Any = None,
    tokenizer: Any = None,
) -> list[SteeringVector]:
    """Vectors of one's own from a file, or an array.

    Args:
        path: an array or tensor, [d_model] or [vectors, d_model]; or a file: `.npy` or `.pt` with one vector or
            several of these shapes, `.pt` or `.safetensors` with named ones, or a `.gguf` control vector, of which the
            layer's is taken. Of a `.pt` only tensors are read, never code.
        layer: the decoder layer whose output they steer, counted from 0; None: as the file says.
        labels: what they stand for, in order; None: their names in the file.
        model: refuse vectors that do not fit it, and measure the layer's residual norm, in which strengths may then
            be given.
        tokenizer: the model's; needed with `model`.

    Raises:
        InputError: what cannot be read, is no vector, is zero or not finite, says another layer or none, or does not
            fit the model.
    """
    if isinstance(path, Path | str):
        where, (layer, named) = str(path), _read(_existing(path), layer)
    else:
        where, (layer, named) = "the array", _of_array(path, layer)
    if labels is not None and len(labels) != len(named):
        raise InputError(f"{len(named)} vectors need as many labels, not {len(labels)}", where)
    if model is not None:
        check_layer(model, layer, "layer")
        if (width := hidden_size(model)) != (size := len(named[0][1])):
            raise InputError(f"the vectors are {size} wide, the model's residual stream {width}", where)
    norm = None if model is None else measure_residual_norm(model, tokenizer, layer)
    names = labels or [name for name, _ in named]
    return [
        SteeringVector(layer, name or None, row / row.norm(), float(row.norm()), norm)
        for name, (_, row) in zip(names, named, strict=True)
    ]


def open_vectors(path: Path | str, layer: int | None = None) -> VectorSet:
    """The vectors of a file, as a recipe steers with them; one without a name is called as its file.

    Args:
        path: as in `load_vectors`.
        layer: as in `load_vectors`.

    Raises:
        InputError: as `load_vectors`.
    """
    file = _existing(path)
    vectors = load_vectors(file, layer)
    if vectors[0].label is None:
        vectors = load_vectors(file, layer, labels=[file.stem])
    return VectorSet(VectorRef(str(path), sha256(file)), vectors[0].layer, tuple(vectors))


def unchanged_vectors(reference: VectorRef, layer: int) -> list[SteeringVector]:
    """The vectors of the file that a transcript's row names, with one of which it was steered.

    Args:
        reference: the row's file, with its hash.

    Raises:
        InputError: if the file is not there, or has changed.
    """
    file = local_path(reference.file)
    if file is None:
        raise InputError("the file of a row's steering vector does not exist", reference.file, "Put it back.")
    if sha256(file) != reference.sha256:
        raise InputError("this is not the vector that the rows were steered with", str(file), "Put the old file back.")
    return load_vectors(file, layer)


def one_called(name: str | None, vectors: Sequence[SteeringVector], file: str) -> SteeringVector:
    """Of the vectors of a file the one with a name; the only one there is, whatever it is called.

    Raises:
        InputError: if there are several, and none has that name.
    """
    named = vectors if len(vectors) == 1 else [vector for vector in vectors if vector.label == name]
    if not named:
        raise InputError(
            f"a row is steered by one vector, and none of the {len(vectors)} here is called {name!r}",
            file,
            "Let `steering.label` of the row be the vector's name in the file.",
        )
    return named[0]


def save_vectors(path: Path, vectors: Sequence[SteeringVector], facts: Mapping[str, str] | None = None) -> None:
    """Write vectors to a `.safetensors` file, by their labels and in their length, with their layer.

    Args:
        path: the file, written whole or not at all; the same vectors and facts give the same bytes.
        vectors: of one layer, each with a label of its own.
        facts: what else the file's metadata say.

    Raises:
        InputError: for another kind of file, labels that are missing or come twice, or several layers.
    """
    check_is_safetensors(path)
    names, layers = {vector.label for vector in vectors}, {vector.layer for vector in vectors}
    if len(names) < len(vectors) or not all(names) or len(layers) != 1:
        raise InputError("vectors of one layer are written, each with a label of its own", str(path))
    rows = {str(vector.label): vector.unit * vector.length for vector in vectors}
    data = _with_metadata(rows, {"layer": str(vectors[0].layer), **(facts or {})})
    with replacing(path) as file:
        file.buffer.write(data)


def check_is_safetensors(path: Path) -> None:
    """Refuse a name under which vectors are not written.

    Raises:
        InputError: naming it.
    """
    if path.suffix != ".safetensors":
        raise InputError("vectors are written as safetensors", str(path), "Name a .safetensors file.")


def _with_metadata(rows: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Tensors and metadata in safetensors format: length of the header, header, data.

    The library writes metadata in an order that changes from call to call, and with it the file's hash.
    """
    from safetensors.torch import save

    plain = save(dict(rows))
    begin = 8 + int.from_bytes(plain[:8], "little")
    header = json.dumps({"__metadata__": dict(metadata), **json.loads(plain[8:begin])}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + plain[begin:]


def _existing(path: Path | str) -> Path:
    file = local_path(str(path))
    if file is None:
        raise InputError("the file does not exist", str(path), "Check the path; `esr vectors make` makes one.")
    return file


def _read(path: Path, layer: int | None) -> tuple[int, list[tuple[str, torch.Tensor]]]:
    """The layer that the vectors of a file steer, and each of them by its name."""
    if path.suffix not in ENDINGS:
        raise InputError(f"vectors are read from {', '.join(ENDINGS)}", str(path), "Convert the file.")
    try:
        tensors, said = _tensors(path)
    # Whatever these libraries say of a broken file.
    except Exception as error:
        raise InputError(f"the vectors cannot be read ({first_line(error)})", str(path)) from error
    if path.suffix == ".gguf":
        return _of_layer(tensors, layer, path)
    if said is not None and layer not in (None, said):
        what = f"the file's vectors are for layer {said}, and layer {layer} is asked for"
        raise InputError(what, str(path), "Leave the layer out, or name another file.")
    found = said if layer is None else layer
    if found is None:
        raise InputError("the file does not say for which layer its vectors are", str(path), "Name the layer.")
    return found, _named_rows(tensors, path)


def _tensors(path: Path) -> tuple[Mapping[str, torch.Tensor], int | None]:
    """What is in a file, and the layer that its metadata names."""
    import numpy
    from safetensors import safe_open

    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get("layer")
            return {name: file.get_tensor(name) for name in file.keys()}, None if said is None else int(said)  # noqa: SIM118
    if path.suffix == ".npy":
        return {"": torch.from_numpy(numpy.load(path, allow_pickle=False))}, None
    if path.suffix == ".gguf":
        from gguf import GGUFReader

        return {str(each.name): torch.from_numpy(numpy.array(each.data)) for each in GGUFReader(path).tensors}, None
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return {str(name): value for name, value in loaded.items()} if isinstance(loaded, dict) else {"": loaded}, None


def _of_layer(
    tensors: Mapping[str, torch.Tensor], layer: int | None, path: Path
) -> tuple[int, list[tuple[str, torch.Tensor]]]:
    """The one vector of a control vector that steers a layer; `direction.N` is added to the output of layer N."""
    by_layer = {int(found[1]): row for name, row in tensors.items() if (found := CONTROL.fullmatch(name))}
    if not by_layer:
        raise InputError("this is not a control vector: it has no tensor direction.N", str(path))
    if layer is None and len(by_layer) == 1:
        layer = next(iter(by_layer))
    if layer is None or layer not in by_layer:
        what = "names no layer" if layer is None else f"names layer {layer}"
        layers = ", ".join(map(str, sorted(by_layer)))
        raise InputError(
            f"the control vector has directions for the layers {layers}, and what asks for it {what}",
            str(path),
            "Name one of them.",
        )
    return layer, _named_rows({"": by_layer[layer]}, path)


def _of_array(array: ArrayLike, layer: int | None) -> tuple[int, list[tuple[str, torch.Tensor]]]:
    """The layer that an array of vectors is given for, and each of them, without a name where it is the only one."""
    if layer is None:
        raise InputError("an array does not say for which layer its vectors are", "layer", "Name the layer.")
    try:
        tensor = torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"this is no array of numbers ({first_line(error)})", "load_vectors") from error
    return layer, _named_rows({"": tensor}, "the array")


def _named_rows(tensors: Mapping[str, torch.Tensor], path: Path | str) -> list[tuple[str, torch.Tensor]]:
    rows: list[tuple[str, torch.Tensor]] = []
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() not in (1, 2):
            raise InputError("this is no vector of floating-point numbers, nor a table of them", f"{path} {name}")
        table = value.detach().float().reshape(-1, value.shape[-1])
        numbers = [f"{name}.{number}".lstrip(".") for number in range(len(table))]
        rows += zip([name] if value.dim() == 1 else numbers, table, strict=True)
    if not rows or len({len(row) for _, row in rows}) > 1:
        raise InputError("vectors of one width are needed", str(path))
    if len({name for name, _ in rows}) < len(rows):
        raise InputError("two vectors have the same name", str(path), "Rename one of them.")
    for name, row in rows:
        if not bool(row.any()) or not bool(row.isfinite().all()):
            raise InputError("a vector must be finite and not zero", f"{path} {name}")
    return rows
