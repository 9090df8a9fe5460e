"""Generation with transformers: a different intervention in every batch row, one KV cache, left padding.

The loop is our own rather than `model.generate`: rows that have ended leave the batch (and the cache) at once
instead of being computed to the end of the longest reply, and every token that is fed is known, so that
steered tokens can be held against what was asked.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from esr_train.models import bare_model, stop_ids
from esr_train.steering.engine import (
    Completion,
    Encoding,
    Progress,
    Request,
    Sampling,
    checked_completion,
    encoded,
    encoded_with,
)
from esr_train.steering.hook import SteeringHook
from esr_train.steering.sampling import processors, row_seeds


@dataclass
class _Row:
    """A request on its way: its place in the caller's list, its rendered ids, what it has generated."""

    place: int
    request: Request
    prompt: Encoding
    generated: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] = "length"

    @property
    def ids(self) -> list[int]:
        return self.prompt.ids


class TransformersEngine:
    """Implements `Engine` on a transformers model.

    Args:
        model: Llama or Gemma-2, a PEFT model of one, in any wrapper that lets `model(...)` run alone.
        tokenizer: the model's.
        batch_rows: rows per batch. Requests are sorted by prompt length into batches.
    """

    name = "transformers"

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, batch_rows: int = 32) -> None:
        self.model, self.tokenizer, self.batch_rows = model, tokenizer, batch_rows
        self._stop_ids = stop_ids(bare_model(model), tokenizer)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        """Generate one completion a request, in the order of the requests.

        Args:
            requests: each under its own interventions.
            sampling: the same for all; each row draws from its own seed.
            progress: called after each batch with its rows and generated tokens.

        Raises:
            InputError: an intervention that does not fit the model.
            RunError: a row that was not steered at exactly the tokens it asked for.
        """
        rows = [_Row(place, r, encoded(self.tokenizer, r)) for place, r in enumerate(requests)]
        # Longest first: the batch that needs most memory fails at once, not at the end.
        rows.sort(key=lambda row: -len(row.ids))
        completions: dict[int, Completion] = {}
        for start in range(0, len(rows), self.batch_rows):
            batch = rows[start : start + self.batch_rows]
            for row, completion in zip(batch, self._run(batch, sampling), strict=True):
                completions[row.place] = completion
            if progress:
                progress(len(batch), sum(len(row.generated) for row in batch))
        return [completions[place] for place in range(len(rows))]

    @torch.no_grad()
    def log_probabilities(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[float]:
        """Log-probability (nats, temperature 1) of each continuation right after its request's prefix.

        Raises:
            InputError: an intervention that does not fit the model.
            RunError: a row that was not steered at exactly the tokens it asked for.
        """
        scored = []
        for place, (request, text) in enumerate(zip(requests, continuations, strict=True)):
            whole, tail = encoded_with(self.tokenizer, request, text)
            # As if one token had been generated behind it and not fed: every token of the row is steered as asked.
            scored.append((_Row(place, request, whole, whole.ids[-1:]), tail))
        scored.sort(key=lambda each: -len(each[0].ids))
        found: dict[int, float] = {}
        for start in range(0, len(scored), self.batch_rows):
            batch = scored[start : start + self.batch_rows]
            values = self._scored([row for row, _ in batch], [tail for _, tail in batch])
            found.update({row.place: value for (row, _), value in zip(batch, values, strict=True)})
        return [found[place] for place in range(len(scored))]

    def _scored(self, rows: Sequence[_Row], tails: Sequence[int]) -> list[float]:
        """Summed log-probabilities of each row's last tokens, as many as `tails` says."""
        with (
            _evaluating(self.model),
            SteeringHook(self.model, [r.request.interventions for r in rows]) as hook,
        ):
            batch = _Batch(self.model, rows, Sampling())
            hook.place(batch.prompt_owner(), batch.reply)
            logits = batch.logits(batch.ids, max(tails) + 1)
            counts = hook.counts()
        values = []
        for number, (row, tail) in enumerate(zip(rows, tails, strict=True)):
            self._completion(row, {at: c[number] for at, c in counts.items()})
            tokens = batch.ids[number, -tail:, None]
            values.append(float(logits[number, -tail - 1 : -1].float().log_softmax(-1).gather(1, tokens).sum()))
        return values

    def _run(self, rows: Sequence[_Row], sampling: Sampling) -> list[Completion]:
        with (
            _evaluating(self.model),
            SteeringHook(self.model, [r.request.interventions for r in rows]) as hook,
        ):
            _decode(_Batch(self.model, rows, sampling), hook, self._stop_ids)
            counts = hook.counts()
        return [self._completion(row, {at: c[number] for at, c in counts.items()}) for number, row in enumerate(rows)]

    def _completion(self, row: _Row, counts: dict[int, int]) -> Completion:
        return checked_completion(self.tokenizer, row.request, row.prompt, row.generated, row.finish, counts)


class _Batch:
    """The tensors of the rows that are still generating, left-padded to one width."""

    def __init__(self, model: Any, rows: Sequence[_Row], sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling
        self.rows = list(rows)
        device = next(model.parameters()).device
        self.width = max(len(row.ids) for row in rows)
        pads = [self.width - len(row.ids) for row in rows]
        # Padding repeats the row's own first token: attention leaves it out, and a repetition penalty, which
        # reads all ids, then sees no token that the row would not have alone.
        padded = [[row.ids[0]] * pad + row.ids for row, pad in zip(rows, pads, strict=True)]
        self.ids = torch.tensor(padded, device=device)
        column = torch.arange(self.width, device=device)
        self.mask = (column >= torch.tensor(pads, device=device)[:, None]).long()
        starts = torch.tensor(
            [pad + row.prompt.reply_start for row, pad in zip(rows, pads, strict=True)], device=device
        )
        self.reply = column >= starts[:, None]
        self.owner = torch.arange(len(rows), device=device)
        self.seeds = row_seeds([row.request.seed for row in rows], device)
        self.cache = DynamicCache(config=bare_model(model).config)
        self._chain = processors(sampling, self.seeds, self.width)

    def prompt_owner(self) -> torch.Tensor:
        """[rows, width]: each token's row, -1 for padding."""
        return torch.where(self.mask.bool(), self.owner[:, None], -1)

    def next_tokens(self, fed: torch.Tensor) -> torch.Tensor:
        """Feed `fed` [rows, positions], the last positions of `ids`; the next token of every row, [rows]."""
        logits = self.logits(fed, 1)
        scores = self._chain(cast(torch.LongTensor, self.ids), cast(torch.FloatTensor, logits[:, -1].float()))
        return scores.argmax(-1)

    def logits(self, fed: torch.Tensor, last: int) -> torch.Tensor:
        """Feed `fed`, the last positions of `ids`; logits at its `last` positions, [rows, last, vocabulary]."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        found: torch.Tensor = self.model(
            input_ids=fed,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last,
        ).logits
        return found

    def append(self, tokens: torch.Tensor) -> None:
        """Put one token a row behind `ids`."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)

    def keep(self, going: Sequence[int]) -> None:
        """Drop every row whose place is not in `going`, from the cache too."""
        chosen = torch.tensor(going, device=self.ids.device)
        self.rows = [self.rows[place] for place in going]
        self.ids, self.mask = self.ids[chosen], self.mask[chosen]
        self.owner, self.seeds = self.owner[chosen], self.seeds[chosen]
        self.cache.batch_select_indices(chosen)
        self._chain = processors(self.sampling, self.seeds, self.width)


@torch.no_grad()
def _decode(batch: _Batch, hook: SteeringHook, stops: frozenset[int]) -> None:
    hook.place(batch.prompt_owner(), batch.reply)
    fed = batch.ids
    for step in range(batch.sampling.max_new_tokens):
        tokens = batch.next_tokens(fed)
        going = _take(batch.rows, tokens.tolist(), stops)
        if not going or step + 1 == batch.sampling.max_new_tokens:
            return
        batch.append(tokens)
        shrinks = len(going) < len(batch.rows)
        if shrinks:
            batch.keep(going)
        if shrinks or step == 0:
            owner = batch.owner[:, None]
            hook.place(owner, torch.ones_like(owner, dtype=torch.bool))
        else:
            hook.again()
        fed = batch.ids[:, -1:]


def _take(rows: Sequence[_Row], tokens: Sequence[int], stops: frozenset[int]) -> list[int]:
    """Hand each row its token; the places of the rows that go on."""
    going = []
    for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        row.generated.append(token)
        if token in stops:
            row.finish = "stop"
        else:
            going.append(place)
    return going


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, as long as the block lasts: no dropout, no gradient checkpointing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
