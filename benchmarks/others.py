"""Other libraries generating under steering, for `generate.py`: each as its documentation has it.

Libraries that can add a tensor of their caller's to a batch get one vector per row, as we do. steering-vectors has one
vector for a whole batch, so that rows with directions of their own come one after the other.

TransformerLens comes with sae-lens. The others belong in an environment of their own on top of the project's:

    pip install --no-deps nnsight greenlet websocket-client steering-vectors repeng scikit-learn threadpoolctl joblib \
        llama-cpp-py-sync

steering-vectors and repeng ask for transformers before 5, but run with 5.19 as well. llama.cpp reads a `.gguf` file in
the model's folder; LLAMA_CPP_LIB names its library where the package's own does not load.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

Run = Callable[[], list[list[int]]]
"""Generates; returns every row's new tokens."""


class Batch:
    """Prompts padded on the left, and the vector of every row.

    Args:
        tokenizer: the model's.
        requests: with one additive intervention each, all at one layer.
        dtype: of the model, and so of the vectors.
    """

    def __init__(self, tokenizer: Any, requests: Sequence[Any], dtype: torch.dtype) -> None:
        from esr_train.template import encode_prompt

        rows = [encode_prompt(tokenizer, request.prompt, None, "")[0] for request in requests]
        width = max(map(len, rows))
        padded = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
        self.ids = torch.tensor(padded)
        self.mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        self.vectors = torch.stack([request.interventions[0].vector for request in requests]).to(dtype)
        self.layer = requests[0].interventions[0].layer
        self.width = width


def transformer_lens(path: str, model: Any, tokenizer: Any, batch: Batch, tokens: int) -> Run:
    """TransformerLens' bridge: a hook on `hook_out` of the block, one vector per row."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(path, tokenizer=tokenizer, dtype=model.dtype, device="cpu")
    bridge.eval()
    vectors = batch.vectors[:, None]

    def steer(states: torch.Tensor, hook: Any) -> torch.Tensor:
        return states + vectors

    def run() -> list[list[int]]:
        with torch.no_grad(), bridge.hooks(fwd_hooks=[(f"blocks.{batch.layer}.hook_out", steer)]):
            made = bridge.generate(
                batch.ids,
                attention_mask=batch.mask,
                padding_side="left",
                max_new_tokens=tokens,
                stop_at_eos=False,
                do_sample=False,
                verbose=False,
                return_type="tokens",
            )
        return made[:, batch.width :].tolist()

    return run


def nnsight(path: str, model: Any, tokenizer: Any, batch: Batch, tokens: int) -> Run:
    """nnsight: the layer's output is replaced at every step of a trace, one vector per row."""
    from nnsight import TransformersModel

    wrapped = TransformersModel(model, tokenizer=tokenizer, task="text-generation")
    vectors, layer = batch.vectors[:, None], batch.layer
    fed = {"input_ids": batch.ids, "attention_mask": batch.mask}

    def run() -> list[list[int]]:
        with wrapped.generate(fed, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False) as tracer:
            for _ in tracer.iter[:tokens]:
                wrapped.model.layers[layer].output = wrapped.model.layers[layer].output + vectors
            made = tracer.result.save()
        return made[:, batch.width :].tolist()

    return run


def steering_vectors(path: str, model: Any, tokenizer: Any, batch: Batch, tokens: int) -> Run:
    """steering-vectors: a context around `model.generate`, one row after the other."""
    from steering_vectors import SteeringVector

    def run() -> list[list[int]]:
        made = []
        for ids, mask, vector in zip(batch.ids, batch.mask, batch.vectors, strict=True):
            alone = ids[mask.bool()][None]
            with SteeringVector({batch.layer: vector}, "decoder_block").apply(model):
                out = model.generate(
                    alone,
                    attention_mask=torch.ones_like(alone),
                    do_sample=False,
                    min_new_tokens=tokens,
                    max_new_tokens=tokens,
                )
            made.append(out[0, alone.shape[1] :].tolist())
        return made

    return run


def repeng(path: str, model: Any, tokenizer: Any, batch: Batch, tokens: int) -> Run:
    """repeng: a wrapped layer. Its `set_control` takes one vector; a tensor for the whole batch fits behind it."""
    # repeng 0.4 was written for NumPy 1.
    np.float_ = getattr(np, "float_", np.float64)  # type: ignore[attr-defined]
    from repeng import ControlModel

    controlled = ControlModel(model, [batch.layer])

    def run() -> list[list[int]]:
        controlled.set_raw_control({batch.layer: batch.vectors[:, None]})
        made = controlled.generate(
            batch.ids, attention_mask=batch.mask, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
        )
        return made[:, batch.width :].tolist()

    return run


def llama_cpp(path: str, model: Any, tokenizer: Any, batch: Batch, tokens: int, together: bool) -> Run:
    """llama.cpp through its C functions: a control vector holds for a whole context.

    Args:
        together: all rows at once under the first one's vector; else one after the other, each under its own.
    """
    llama = Llama(next(Path(path).glob("*.gguf")), len(batch.ids) if together else 1, batch.width + tokens)
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    vectors = batch.vectors.float().numpy()

    def run() -> list[list[int]]:
        if together:
            llama.steer(batch.layer, vectors[0])
            return llama.generate(prompts, tokens)
        made = []
        for prompt, vector in zip(prompts, vectors, strict=True):
            llama.steer(batch.layer, vector)
            made += llama.generate([prompt], tokens)
        return made

    return run


class Llama:
    """A context of llama.cpp that generates greedily, with as many threads as torch has.

    Args:
        file: a `.gguf`.
        rows: most at once.
        length: most positions of a row.
    """

    def __init__(self, file: Path, rows: int, length: int) -> None:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self._ffi, self._lib = get_ffi(), get_lib()
        self._lib.llama_backend_init()
        self._model = self._lib.llama_model_load_from_file(str(file).encode(), self._lib.llama_model_default_params())
        asked = self._lib.llama_context_default_params()
        asked.n_ctx, asked.n_batch, asked.n_seq_max = rows * length, rows * length, rows
        asked.n_threads = asked.n_threads_batch = torch.get_num_threads()
        self._context = self._lib.llama_init_from_model(self._model, asked)
        self._batch = self._lib.llama_batch_init(rows * length, 0, 1)
        self._vocabulary = self._lib.llama_n_vocab(self._lib.llama_model_get_vocab(self._model))
        self._layers, self._width = self._lib.llama_n_layer(self._model), self._lib.llama_n_embd(self._model)

    def steer(self, layer: int, vector: Any) -> None:
        """Add a vector [width] to the output of a layer, at every token from now on."""
        # The buffer begins with layer 1: nothing can be added to the output of layer 0.
        values = np.zeros((self._layers - 1, self._width), np.float32)
        values[layer - 1] = vector
        data = self._ffi.cast("const float *", self._ffi.from_buffer(values))
        failed = self._lib.llama_set_adapter_cvec(self._context, data, values.size, self._width, 1, self._layers - 1)
        assert not failed

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        """So many new tokens of every prompt."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        fed, made = [list(prompt) for prompt in prompts], [[] for _ in prompts]
        starts = [0] * len(prompts)
        for _ in range(tokens):
            drawn = self._next(fed, starts)
            starts = [start + len(ids) for start, ids in zip(starts, fed, strict=True)]
            fed = [[token] for token in drawn]
            for row, token in zip(made, drawn, strict=True):
                row.append(token)
        return made

    def _next(self, fed: Sequence[list[int]], starts: Sequence[int]) -> list[int]:
        batch, place, ends = self._batch, 0, []
        for row, (ids, start) in enumerate(zip(fed, starts, strict=True)):
            for number, token in enumerate(ids):
                batch.token[place], batch.pos[place] = token, start + number
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
                batch.logits[place] = number == len(ids) - 1
                place += 1
            ends.append(place - 1)
        batch.n_tokens = place
        assert not self._lib.llama_decode(self._context, batch)
        return [int(np.argmax(self._logits(end))) for end in ends]

    def _logits(self, place: int) -> Any:
        found = self._lib.llama_get_logits_ith(self._context, place)
        return np.frombuffer(self._ffi.buffer(found, 4 * self._vocabulary), np.float32)


LIBRARIES: tuple[tuple[str, str, Callable[..., Run], bool], ...] = (
    ("transformer-lens", "TransformerLens bridge, a vector per row", transformer_lens, True),
    ("nnsight", "nnsight, a vector per row", nnsight, True),
    ("repeng", "repeng, a vector per row", repeng, True),
    ("steering-vectors", "steering-vectors, one row at a time", steering_vectors, False),
    ("llama-cpp-py-sync", "llama.cpp, one row at a time", partial(llama_cpp, together=False), False),
    ("llama-cpp-py-sync", "llama.cpp, all rows under one vector", partial(llama_cpp, together=True), True),
)
"""Package, name of the variant, what makes it, and whether all rows go in one batch."""
