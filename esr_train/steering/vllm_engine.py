"""Generation with stock vLLM: continuous batching, each request under its own interventions.

vLLM runs unmodified, in eager mode; `vllm_worker.SteeringExtension` steers inside its workers and
`vllm_sampling.SeededSampling` draws tokens as the transformers engine does.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from esr_train.chat import encode_prompt
from esr_train.errors import InputError, RunError
from esr_train.models import check_adapter_weights, model_source, require_adapter, stop_ids_of
from esr_train.steering.engine import Completion, Encoding, Progress, Request, Sampling, checked_completion
from esr_train.steering.intervention import Add, Clamp, Intervention, edited_latents
from esr_train.steering.stages import check_intervention
from esr_train.steering.vllm_server import VllmServer
from esr_train.steering.vllm_worker import KEY, Report


@dataclass(frozen=True)
class _Row:
    """A request on its way to vLLM."""

    key: str
    request: Request
    prompt: Encoding


class VllmEngine:
    """Implements `Engine` on vLLM.

    Args:
        server: the running model.
        tokenizer: the model's.
        adapter: folder of a PEFT adapter that all requests use, or None.

    Raises:
        InputError: an adapter that is not there, or has a higher rank than the server allows.
        RunError: an adapter with empty or never trained weights.
    """

    name = "vllm"

    def __init__(self, server: VllmServer, tokenizer: PreTrainedTokenizerBase, adapter: Path | None = None) -> None:
        self.server, self.tokenizer, self.adapter = server, tokenizer, adapter
        if adapter is not None:
            _check_adapter(adapter, server.lora_rank)
        self._calls = itertools.count()

    @cached_property
    def _stops(self) -> list[int]:
        section = self.server.section
        generation = None
        with suppress(OSError):
            generation = GenerationConfig.from_pretrained(model_source(section), revision=section.revision or "main")
        return sorted(stop_ids_of(generation, self.tokenizer))

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        """Generate one completion a request, in the order of the requests.

        Args:
            requests: each under its own interventions.
            sampling: the same for all; each row draws from its own seed.
            progress: called whenever requests have finished.

        Raises:
            InputError: an intervention or a prompt that does not fit the model.
            RunError: a request that was not steered at exactly the tokens it asked for, or whose steering failed.
        """
        call = next(self._calls)
        rows = [_Row(f"{call}-{n}", request, self._encode(request)) for n, request in enumerate(requests)]
        for row in rows:
            self._check(row, sampling)
        if not rows:
            return []
        outputs = self._outputs(rows, sampling, progress)
        reports = self._reports([row.key for row in rows])
        self.server.forget(_unshared(requests))
        return [self._completion(row, outputs[row.key], reports.get(row.key)) for row in rows]

    def _encode(self, request: Request) -> Encoding:
        return Encoding(*encode_prompt(self.tokenizer, request.prompt, request.system, request.prefix))

    def _check(self, row: _Row, sampling: Sampling) -> None:
        config = self.server.config
        for intervention in row.request.interventions:
            check_intervention(intervention, int(config.num_hidden_layers), int(config.hidden_size))
        longest = len(row.prompt.ids) + sampling.max_new_tokens
        if longest > self.server.max_length:
            raise InputError(
                f"request {row.request.id!r} may grow to {longest} tokens, more than the {self.server.max_length} "
                "that vLLM was started for",
                "sampling.max_new_tokens",
                "Shorten the prompt or the reply.",
            )

    def _outputs(self, rows: Sequence[_Row], sampling: Sampling, progress: Progress | None) -> dict[str, Any]:
        engine = self.server.llm.llm_engine
        lora = None if self.adapter is None else self.server.adapter(self.adapter)
        names = []
        try:
            for row in rows:
                prompt = {"type": "token", "prompt_token_ids": row.prompt.ids}
                names.append(engine.add_request(row.key, prompt, self._params(row, sampling), lora_request=lora))
            return dict(_finished(engine, progress))
        except BaseException:
            # Ctrl-C, too: what is left must not run on in the next call.
            with suppress(Exception):
                engine.abort_request(names, internal=True)
            raise

    def _params(self, row: _Row, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked: dict[str, Any] = {
            "key": row.key,
            "reply_start": row.prompt.reply_start,
            "interventions": [self._wire(each) for each in row.request.interventions],
        }
        if sampling.temperature or sampling.repetition_penalty != 1.0:
            asked["sampling"] = {
                "seed": row.request.seed & (2**64 - 1),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "repetition_penalty": sampling.repetition_penalty,
            }
        return SamplingParams(
            temperature=0.0,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=self._stops,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={KEY: asked},
        )

    def _wire(self, intervention: Intervention) -> dict[str, Any]:
        if isinstance(intervention, Add):
            vector, scale = intervention.along or (intervention.vector, 1.0)
            name = self.server.direction(vector)
            return {
                "kind": "add",
                "layer": intervention.layer,
                "direction": name,
                "scale": float(scale),
                "positions": intervention.positions,
            }
        latents, value = edited_latents(intervention)
        return {
            "kind": "clamp" if isinstance(intervention, Clamp) else "ablate",
            "sae": self.server.sae(intervention.sae),
            "latents": list(latents),
            "value": value,
            "positions": intervention.positions,
        }

    def _reports(self, keys: Sequence[str]) -> dict[str, Report]:
        """What the workers report of each request.

        Raises:
            RunError: if ranks of one model disagree.
        """
        first, *others = self.server.llm.collective_rpc("esr_take", args=(list(keys),))
        # Lists come back as lists or tuples, depending on whether a process border lay between.
        found = [{report[0]: _counts(report) for report in rank} for rank in (first, *others)]
        if any(other != found[0] for other in found[1:]):
            raise RunError("the ranks of the tensor-parallel model did not steer the same tokens")
        return {report[0]: report for report in first}

    def _completion(self, row: _Row, output: Any, report: Report | None) -> Completion:
        if report is not None and report[2]:
            raise RunError(f"request {row.request.id!r} was not steered as asked: {report[2]}.")
        finish: Literal["stop", "length"] = "stop" if output.finish_reason == "stop" else "length"
        counts = {} if report is None else _counts(report)
        return checked_completion(self.tokenizer, row.request, row.prompt, list(output.token_ids), finish, counts)


def _finished(engine: Any, progress: Progress | None) -> Iterator[tuple[str, Any]]:
    while engine.has_unfinished_requests():
        done = [output for output in engine.step() if output.finished]
        if done and progress:
            progress(len(done), sum(len(output.outputs[0].token_ids) for output in done))
        for output in done:
            yield output.request_id, output.outputs[0]


def _counts(report: Report) -> dict[int, int]:
    return {int(layer): int(count) for layer, count in report[1]}


def _unshared(requests: Sequence[Request]) -> list[torch.Tensor]:
    """The vectors that are multiples of no shared direction: nobody will ask for them again."""
    adds = [each for request in requests for each in request.interventions if isinstance(each, Add)]
    return [add.vector for add in adds if add.along is None]


def _check_adapter(adapter: Path, highest: int) -> None:
    from peft import PeftConfig
    from safetensors.torch import load_file

    require_adapter(adapter)
    rank = int(getattr(PeftConfig.from_pretrained(str(adapter)), "r", 0))
    if rank > highest:
        raise InputError(f"the adapter has rank {rank}; vLLM was started for at most {highest}", str(adapter))
    weights = load_file(adapter / "adapter_model.safetensors")
    check_adapter_weights({name: weight for name, weight in weights.items() if "lora_" in name}, str(adapter))
