"""Generation with stock vLLM: continuous batching, each request under its own interventions.

vLLM runs unmodified, in eager mode; `vllm_worker.SteeringExtension` steers inside its workers and
`vllm_sampling.SeededSampling` draws tokens as the transformers engine does.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from esr_train.adapters import check_adapter
from esr_train.errors import InputError, RunError
from esr_train.models import model_source
from esr_train.recipe import ModelSection
from esr_train.steering.engine import (
    Completion,
    Encoding,
    Progress,
    Request,
    Sampling,
    Tally,
    check_length,
    checked_completion,
    encoded,
    encoded_with,
)
from esr_train.steering.interventions import check_intervention
from esr_train.steering.token_reading import Probe, Reply, check_probe, with_reply
from esr_train.steering.vllm.vllm_server import LORA_MODULES, NOT_SERVED, VllmServer
from esr_train.steering.vllm.vllm_worker import KEY, ReadValues, Report, Wanted, packed
from esr_train.template import stop_ids


@dataclass(frozen=True)
class _Row:
    """A request on its way to vLLM."""

    key: str
    request: Request
    prompt: Encoding


@dataclass(frozen=True)
class _Answer:
    """What has come of a request: what each probe read, and token -> log-probability at each prompt token."""

    completion: Completion
    read: Sequence[ReadValues]
    prompt: list[Any] | None


_ONE_TOKEN = Sampling(temperature=0, max_new_tokens=1)
"""vLLM generates at least one token; it is not fed, so not steered."""


class VllmEngine:
    """Implements `Engine` on vLLM.

    Args:
        adapter: folder of a PEFT adapter that all requests use, or None.

    Raises:
        InputError: an adapter that does not fit the model, has a higher rank than the server allows, changes modules
            that are not served, or nothing.
    """

    name = "vllm"

    def __init__(
        self,
        server: VllmServer,
        tokenizer: PreTrainedTokenizerBase,
        adapter: Path | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.tally = tally or Tally()
        self.server, self.tokenizer, self.adapter = server, tokenizer, adapter
        if adapter is not None:
            _check_adapter(adapter, server)
        self._calls = itertools.count()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        """See `Engine.generate`; a vLLM that died is a RunError, too."""
        rows = self._rows(requests, [encoded(self.tokenizer, request) for request in requests])
        made = [answer.completion for answer in self._answers(rows, sampling, progress)]
        self.tally.count(made)
        return made

    def log_probabilities(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[tuple[float, ...]]:
        """See `Scorer.log_probabilities`."""
        pairs = zip(requests, continuations, strict=True)
        wholes = [encoded_with(self.tokenizer, request, text) for request, text in pairs]
        rows = self._rows(requests, [whole for whole, _ in wholes])
        answers = self._answers(rows, _ONE_TOKEN, scored=True)
        return [_scored(answer, whole.ids[-tail:]) for answer, (whole, tail) in zip(answers, wholes, strict=True)]

    def read(
        self, requests: Sequence[Request], replies: Sequence[Reply], probes: Sequence[Probe]
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """See `Reader.read`; what is read is on the CPU, as many replies at a time as vLLM runs at once."""
        config = self.server.config
        for probe in probes:
            check_probe(probe, int(config.num_hidden_layers), int(config.hidden_size))
        at_once = self.server.rows
        for start in range(0, len(requests), at_once):
            batch = requests[start : start + at_once]
            pairs = zip(batch, replies[start : start + at_once], strict=True)
            texts = [with_reply(self.tokenizer, request, reply) for request, reply in pairs]
            rows = self._rows(batch, [whole for whole, _ in texts])
            answers = self._answers(rows, _ONE_TOKEN, probes=tuple(probes))
            yield from (_read(answer, tail) for answer, (_, tail) in zip(answers, texts, strict=True))

    def _rows(self, requests: Sequence[Request], prompts: Sequence[Encoding]) -> list[_Row]:
        call = next(self._calls)
        return [_Row(f"{call}-{n}", *pair) for n, pair in enumerate(zip(requests, prompts, strict=True))]

    def _answers(
        self,
        rows: Sequence[_Row],
        sampling: Sampling,
        progress: Progress | None = None,
        probes: tuple[Probe, ...] = (),
        scored: bool = False,
    ) -> list[_Answer]:
        """What comes of the rows; `scored`: with the log-probabilities of the prompts' tokens."""
        for row in rows:
            self._check(row, sampling)
        if not rows:
            return []
        wanted = {
            row.key: Wanted(row.prompt.reply_start, row.request.interventions, probes)
            for row in rows
            if row.request.interventions or probes
        }
        with self.server.watched():
            problems = self.server.llm.collective_rpc("esr_expect", args=(packed(wanted),))
            if problem := next(filter(None, problems), None):
                raise InputError(problem)
            stops = _stops(self.server.section, self.tokenizer)
            outputs = self._outputs([(row, _params(row, sampling, stops, scored)) for row in rows], progress)
            reports = self._reports([row.key for row in rows])
        return [self._answer(row, outputs[row.key], reports.get(row.key)) for row in rows]

    def _check(self, row: _Row, sampling: Sampling) -> None:
        config = self.server.config
        for intervention in row.request.interventions:
            check_intervention(intervention, int(config.num_hidden_layers), int(config.hidden_size))
        check_length(row.request, len(row.prompt.ids), sampling, self.server.max_length)

    def _outputs(self, rows: Sequence[tuple[_Row, Any]], progress: Progress | None) -> dict[str, Any]:
        engine = self.server.llm.llm_engine
        lora = None if self.adapter is None else self.server.adapter(self.adapter)
        names = []
        try:
            for row, params in rows:
                prompt = {"type": "token", "prompt_token_ids": row.prompt.ids}
                names.append(engine.add_request(row.key, prompt, params, lora_request=lora))
            return dict(_finished(engine, progress))
        except BaseException:
            # Ctrl-C, too: what is left must not run on in the next call.
            with suppress(Exception):
                engine.abort_request(names, internal=True)
            raise

    def _reports(self, keys: Sequence[str]) -> dict[str, Report]:
        """What the workers report of each request: the first rank's counts, and what went wrong on any.

        Raises:
            RunError: if ranks of one model disagree.
        """
        ranks = self.server.llm.collective_rpc("esr_take", args=(list(keys),))
        # Lists come back as lists or tuples, depending on whether a process border lay between.
        counts = [{report[0]: _counts(report) for report in rank} for rank in ranks]
        errors = {report[0]: report[2] for rank in ranks for report in rank if report[2]}
        if not errors and any(other != counts[0] for other in counts[1:]):
            raise RunError("the ranks of the tensor-parallel model did not steer the same tokens")
        reports = {key: (key, steered, errors.get(key), read) for key, steered, _, read in ranks[0]}
        return {key: (key, [], error, []) for key, error in errors.items()} | reports

    def _answer(self, row: _Row, output: Any, report: Report | None) -> _Answer:
        _, _, error, read = report or (row.key, [], None, [])
        if error:
            raise RunError(f"request {row.request.id!r} {error}. The completion is not a valid trial.")
        reply = output.outputs[0]
        finish: Literal["stop", "length"] = "stop" if reply.finish_reason == "stop" else "length"
        counts = {} if report is None else _counts(report)
        generated = list(reply.token_ids)
        completion = checked_completion(self.tokenizer, row.request, row.prompt, generated, finish, counts)
        return _Answer(completion, read, output.prompt_logprobs)


def _stops(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    generation = None
    with suppress(OSError):
        generation = GenerationConfig.from_pretrained(model_source(section), revision=section.revision or "main")
    return sorted(stop_ids(tokenizer, generation))


def _params(row: _Row, sampling: Sampling, stops: list[int], scored: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    asked: dict[str, Any] = {"key": row.key}
    if sampling.temperature or sampling.repetition_penalty != 1.0:
        asked["sampling"] = {
            "seed": row.request.seed & (2**64 - 1),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "repetition_penalty": sampling.repetition_penalty,
        }
    return SamplingParams(
        temperature=0.0,
        max_tokens=row.request.most(sampling),
        stop_token_ids=stops,
        detokenize=False,
        # 0: of the prompt's own tokens and no others.
        prompt_logprobs=0 if scored else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={KEY: asked},
    )


def _finished(engine: Any, progress: Progress | None) -> Iterator[tuple[str, Any]]:
    while engine.has_unfinished_requests():
        done = [output for output in engine.step() if output.finished]
        if done and progress:
            progress(len(done), sum(len(output.outputs[0].token_ids) for output in done))
        for output in done:
            yield output.request_id, output


def _read(answer: _Answer, tail: int) -> tuple[torch.Tensor, ...]:
    """What every probe read at the last `tail` tokens of a prompt."""
    completion = answer.completion
    found = tuple(torch.frombuffer(bytearray(data), dtype=torch.float32).view(*shape) for shape, data in answer.read)
    if any(len(values) != completion.prompt_tokens for values in found):
        tokens = [len(values) for values in found]
        raise RunError(f"request {completion.id!r}: {tokens} tokens were read, {completion.prompt_tokens} were fed")
    return tuple(values[-tail:] for values in found)


def _scored(answer: _Answer, tokens: Sequence[int]) -> tuple[float, ...]:
    """The log-probabilities of a prompt's last tokens."""
    if answer.prompt is None or len(answer.prompt) != answer.completion.prompt_tokens:
        raise RunError(f"request {answer.completion.id!r}: vLLM returned no log-probabilities of its tokens")
    # The first token has no entry; a continuation never begins there.
    entries = zip(answer.prompt[-len(tokens) :], tokens, strict=True)
    return tuple(float(entry[token].logprob) for entry, token in entries)


def _counts(report: Report) -> dict[int, int]:
    return {int(layer): int(count) for layer, count in report[1]}


def _check_adapter(adapter: Path, server: VllmServer) -> None:
    config, weights = check_adapter(adapter, server.section)
    rank = int(getattr(config, "r", 0))
    if rank > server.lora_rank:
        raise InputError(f"the adapter has rank {rank}; vLLM was started for at most {server.lora_rank}", str(adapter))
    # vLLM reads one rank and one scale, and no weights but A and B; of others it would serve another model.
    if getattr(config, "rank_pattern", None) or getattr(config, "alpha_pattern", None):
        what = "the adapter has ranks or scales that differ between layers, which vLLM does not serve"
        raise InputError(what, str(adapter), NOT_SERVED)
    changed = {re.sub(r"(?:.*\.)?(\w+)\.lora_[AB]\.weight", r"\1", name) for name in weights}
    if not changed <= set(LORA_MODULES):
        others = ", ".join(sorted(changed - set(LORA_MODULES)))
        raise InputError(f"the adapter changes {others}, which vLLM is not set up to serve", str(adapter), NOT_SERVED)
