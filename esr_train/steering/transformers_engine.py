"""Generation with transformers: a different intervention in every batch row, one KV cache, left padding.

The loop is our own rather than `model.generate`: rows that have ended leave the batch (and the cache) at once and
others take their places, instead of being computed to the end of the longest reply; and every token that is fed is
known, so that steered tokens can be held against what was asked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from esr_train.models import bare_model
from esr_train.steering.batch_size import SIZES, choose_rows
from esr_train.steering.decoding import KeyValueCache, one_token_each, rows_at_once
from esr_train.steering.engine import (
    Completion,
    Encoding,
    Finish,
    Progress,
    Request,
    Sampling,
    Tally,
    checked_completion,
    encoded,
    encoded_with,
    not_finite,
)
from esr_train.steering.hook import SteeringHook, steering
from esr_train.steering.monitor import Monitor, followed
from esr_train.steering.sampling import filled_up, next_tokens, row_seeds
from esr_train.steering.scoring import Text, score_texts
from esr_train.steering.token_reading import Probe, Reply, kept_outputs, read_with_hooks
from esr_train.template import stop_ids

READ_AT_ONCE = 32
"""Texts that are scored or read at once where the number of rows is not given."""


@dataclass
class _Row:
    """A request on its way: its index in the caller's list, its rendered prompt, what it has generated."""

    index: int
    request: Request
    prompt: Encoding
    generated: list[int] = field(default_factory=list)
    finish: Finish = "length"
    alarm: int | None = None


class TransformersEngine:
    """Implements `Engine` on a transformers model.

    Args:
        model: a causal language model, a PEFT model of one, in any wrapper that lets `model(...)` run alone.
        batch_rows: most rows that run at once. The longest prompts come first; others follow as rows end. None: as
            many as memory and measured speed allow (see `batch_size`).
    """

    name = "transformers"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_rows: int | None = 32,
        tally: Tally | None = None,
    ) -> None:
        self.model, self.tokenizer, self.batch_rows = model, tokenizer, batch_rows
        self.tally = tally or Tally()
        self._chosen: dict[int, int] = {}
        self._stop_ids = stop_ids(tokenizer, bare_model(model).generation_config)

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        """See `Engine.generate`."""
        return self._generated(requests, sampling, progress, None)

    @torch.no_grad()
    def generate_watched(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        monitor: Monitor,
        stops: bool,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """See `Follower.generate_watched`."""
        monitor.check(self.model)
        with kept_outputs(self.model, [monitor.layer]) as outputs:
            return self._generated(requests, sampling, progress, _Follower(monitor, outputs, stops))

    def _generated(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        progress: Progress | None,
        follower: "_Follower | None",
    ) -> list[Completion]:
        rows = [_Row(index, r, encoded(self.tokenizer, r)) for index, r in enumerate(requests)]
        # Longest first: what needs most memory fails at once, not at the end; and no later prompt is wider than a row.
        rows.sort(key=lambda row: -len(row.prompt.ids))
        at_once = self._rows_at_once(rows, sampling.max_new_tokens)
        with steering(self.model, [row.request.interventions for row in rows]) as hook:
            _run(rows, _Decoder(self.model, sampling, hook, self._stop_ids, follower), at_once, progress)
            counts = hook.counts()
        completions = {
            row.index: checked_completion(
                self.tokenizer,
                row.request,
                row.prompt,
                row.generated,
                row.finish,
                {layer: tokens[number] for layer, tokens in counts.items()},
            )
            for number, row in enumerate(rows)
        }
        alarms = {row.index: () if row.alarm is None else (row.alarm,) for row in rows}
        made = [replace(completions[index], alarms=alarms[index]) for index in range(len(rows))]
        self.tally.count(made)
        return made

    @torch.no_grad()
    def log_probabilities(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[tuple[float, ...]]:
        """Log-probability (nats, temperature 1) of each token of each continuation, right after its request's prefix.

        What several requests have in front of their continuations is read once.

        Raises:
            InputError: an intervention that does not fit the model.
            RunError: a row that was not steered at exactly the tokens it asked for, or whose logits are not finite.
        """
        pairs = enumerate(zip(requests, continuations, strict=True))
        texts = [Text(index, each, *encoded_with(self.tokenizer, each, text)) for index, (each, text) in pairs]
        values = score_texts(self.model, texts, self.batch_rows or READ_AT_ONCE)
        return [values[index] for index in range(len(texts))]

    def read(
        self, requests: Sequence[Request], replies: Sequence[Reply], probes: Sequence[Probe]
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """See `Reader.read`; what is read stays on the model's device, `batch_rows` replies at a time."""
        return read_with_hooks(self.model, self.tokenizer, requests, replies, probes, self.batch_rows or READ_AT_ONCE)

    def _rows_at_once(self, rows: Sequence[_Row], max_new_tokens: int) -> int:
        if self.batch_rows or len(rows) <= SIZES[0]:
            return self.batch_rows or len(rows)
        # Up to a power of two: requests of about the same length are measured once.
        positions = 1 << (len(rows[0].prompt.ids) + max_new_tokens - 1).bit_length()
        if positions not in self._chosen:
            with steering(self.model, []):  # in evaluation mode, nothing steered
                self._chosen[positions] = choose_rows(self.model, positions)
        return self._chosen[positions]


def _run(rows: Sequence[_Row], decoder: "_Decoder", batch_rows: int, progress: Progress | None) -> None:
    """Let every row generate to its end; others take the places of those that have ended, some at a time."""
    waiting, running = list(enumerate(rows)), None
    at_once = max(1, batch_rows // 8)
    while waiting or running:
        free = min(batch_rows - len(running.rows) if running else batch_rows, len(waiting))
        if free and (running is None or free >= min(at_once, len(waiting))):
            # The cache that others join has room for all.
            ended, running = decoder.read(waiting[:free], running, batch_rows)
            waiting = waiting[free:]
        else:
            assert running is not None
            decoder.step(running)
            ended, running = decoder.take(running)
        if ended and progress:
            progress(len(ended), sum(len(row.generated) for row in ended))


@dataclass(frozen=True)
class _Tensors:
    """What is known of running rows: [rows] int64 each, but for the score."""

    number: torch.Tensor
    """In the hook."""
    seed: torch.Tensor
    step: torch.Tensor
    """Tokens drawn so far."""
    position: torch.Tensor
    """Of the next token to be fed, from 0."""
    pad: torch.Tensor
    """Positions in the cache before the row's first token."""
    token: torch.Tensor
    """The last one drawn, not yet fed."""
    score: torch.Tensor
    """A monitor's, at the last token that was fed; float32."""

    def of(self, rows: torch.Tensor) -> "_Tensors":
        return _Tensors(*(getattr(self, each.name)[rows] for each in fields(self)))

    def and_those(self, other: "_Tensors") -> "_Tensors":
        return _Tensors(*(torch.cat([getattr(self, each.name), getattr(other, each.name)]) for each in fields(self)))


@dataclass
class _Running:
    """Rows that are generating, and their cache, in which they all end at the same position."""

    rows: list[_Row]
    now: _Tensors
    cache: KeyValueCache
    changed: bool = True
    """Whether the hook has yet to know these rows."""

    def keep(self, going: Sequence[int]) -> None:
        """Drop every row whose number is not in `going`, which rises; the last ones move to the places of others."""
        count = len(going)
        holes = sorted(set(range(count)) - set(going))
        movers = [number for number in going if number >= count]
        order = list(range(count))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        self.rows = [self.rows[number] for number in order]
        self.now = self.now.of(torch.tensor(order, device=self.now.pad.device))
        first = int(self.now.pad.min())
        self.now = replace(self.now, pad=self.now.pad - first)
        self.cache.keep(holes, movers, count, first)
        self.changed = True

    def joined(self, other: "_Running | None") -> "_Running":
        """With other rows behind these."""
        if other is None:
            return self
        more = self.cache.get_seq_length() - other.cache.get_seq_length()
        now = self.now.and_those(replace(other.now, pad=other.now.pad + more))
        self.cache.add(other.cache)
        return _Running(self.rows + other.rows, now, self.cache)


@dataclass(frozen=True)
class _Follower:
    """A monitor, what the layer that it reads returned last, and whether rows end where it sounds."""

    monitor: Monitor
    outputs: dict[int, torch.Tensor]
    stops: bool

    def next(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows] at the tokens that were just fed."""
        return followed(scores, self.monitor.values(self.outputs[self.monitor.layer][:, -1]))

    def sounding(self, running: _Running) -> set[int]:
        """The numbers of the rows whose last fed token is of their replies, and above the threshold."""
        above = (running.now.score > self.monitor.threshold).nonzero().flatten().tolist()
        return {number for number in above if running.rows[number].generated}


@dataclass(frozen=True)
class _Decoder:
    """Feeds a model, and draws tokens."""

    model: Any
    sampling: Sampling
    hook: SteeringHook
    stops: frozenset[int]
    follower: _Follower | None = None

    def read(
        self, numbered: Sequence[tuple[int, _Row]], running: _Running | None, most: int
    ) -> tuple[list[_Row], _Running | None]:
        """Read the prompts of rows, given with their numbers in the hook, and draw their first tokens.

        Args:
            numbered: the rows, longest prompts first.
            running: those that are generating already; the others come behind them.
            most: rows there will ever be at once.

        Returns:
            Rows that have ended with their first token, and what is running.
        """
        ended: list[_Row] = []
        pieces = rows_at_once(self.model, len(numbered[0][1].prompt.ids))
        for start in range(0, len(numbered), pieces):
            short, going = self.take(self._read(numbered[start : start + pieces], 0 if running else most))
            ended += short
            running = going if running is None else running.joined(going)
        return ended, running

    def _read(self, numbered: Sequence[tuple[int, _Row]], most: int) -> _Running:
        rows, device = [row for _, row in numbered], next(self.model.parameters()).device
        width = max(len(row.prompt.ids) for row in rows)
        pads = [width - len(row.prompt.ids) for row in rows]
        # Attention leaves padding out: any token will do.
        padded = [[row.prompt.ids[0]] * pad + row.prompt.ids for row, pad in zip(rows, pads, strict=True)]
        table = [[number, pad, pad + row.prompt.reply_start] for (number, row), pad in zip(numbered, pads, strict=True)]
        number, pad, start = torch.tensor(table, device=device).unbind(1)
        column = torch.arange(width, device=device)
        real, position = column >= pad[:, None], (column - pad[:, None]).clamp(min=0)
        self.hook.set_rows(torch.where(real, number[:, None], -1), column >= start[:, None])
        seed, cache = row_seeds([row.request.seed for row in rows], device), KeyValueCache(self.model, most)
        zero = torch.zeros_like(seed)
        score = torch.zeros(len(rows), device=device)
        running = _Running(rows, _Tensors(number, seed, zero, position[:, -1] + 1, pad, zero, score), cache)
        self._feed(running, torch.tensor(padded, device=device), real.long(), position)
        return running

    def step(self, running: _Running) -> None:
        """Feed every row its last token and draw the next one."""
        now = running.now
        if running.changed:
            self.hook.set_rows(now.number[:, None], torch.ones_like(now.number[:, None], dtype=torch.bool))
        else:
            self.hook.next_step()
        running.changed = False
        running.now = replace(now, position=now.position + 1)
        with one_token_each(self.model, now.pad, running.cache.get_seq_length() + 1) as mask:
            self._feed(running, now.token[:, None], mask, now.position[:, None])
        if self.follower:
            running.now = replace(running.now, score=self.follower.next(running.now.score))

    def take(self, running: _Running) -> tuple[list[_Row], _Running | None]:
        """Hand rows the tokens drawn: those that have ended, and what is left."""
        going = []
        sounding = self.follower.sounding(running) if self.follower else frozenset()
        for number, (row, token) in enumerate(zip(running.rows, running.now.token.tolist(), strict=True)):
            if token < 0:
                raise not_finite(row.request, len(row.generated))
            if number in sounding and row.alarm is None:
                row.alarm = len(row.generated) - 1
            row.generated.append(token)
            if self.follower and self.follower.stops and row.alarm is not None:
                row.finish = "alarm"
            elif token in self.stops:
                row.finish = "stop"
            elif len(row.generated) < row.request.most(self.sampling):
                going.append(number)
        left = set(going)
        ended = [row for number, row in enumerate(running.rows) if number not in left]
        if ended and going:
            running.keep(going)
        return ended, running if going else None

    def _feed(self, running: _Running, ids: torch.Tensor, mask: Any, positions: torch.Tensor) -> None:
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=running.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        now = running.now
        given = ids[:, :0]
        if self.sampling.repetition_penalty != 1.0:
            given = filled_up([[*row.prompt.ids, *row.generated] for row in running.rows], ids.device)
        token = next_tokens(logits, given, self.sampling, now.seed, now.step)
        running.now = replace(now, step=now.step + 1, token=token)
