"""Generation with transformers: a different intervention in every batch row, one KV cache, left padding.

The loop is our own rather than `model.generate`: rows that have ended leave the batch (and the cache) at once
instead of being computed to the end of the longest reply, and every token that is fed is known, so that
steered tokens can be held against what was asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from esr_train.models import bare_model
from esr_train.steering.engine import (
    Completion,
    Encoding,
    Progress,
    Request,
    Sampling,
    checked_completion,
    encoded,
    encoded_with,
    not_finite,
)
from esr_train.steering.hook import SteeringHook, steering
from esr_train.steering.sampling import next_tokens, row_seeds
from esr_train.steering.scoring import Text, score_texts
from esr_train.template import stop_ids


@dataclass
class _Row:
    """A request on its way: its index in the caller's list, its rendered prompt, what it has generated."""

    index: int
    request: Request
    prompt: Encoding
    generated: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] = "length"


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
        self._stop_ids = stop_ids(tokenizer, bare_model(model).generation_config)

    @torch.no_grad()
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
            RunError: a row that was not steered at exactly the tokens it asked for, or whose logits are not finite.
        """
        rows = [_Row(index, r, encoded(self.tokenizer, r)) for index, r in enumerate(requests)]
        completions: dict[int, Completion] = {}
        for batch in self._batches(rows):
            with steering(self.model, [row.request.interventions for row in batch]) as hook:
                _decode(_Batch(self.model, batch, sampling), hook, self._stop_ids)
            completions |= self._checked(batch, hook)
            if progress:
                progress(len(batch), sum(len(row.generated) for row in batch))
        return [completions[index] for index in range(len(rows))]

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
        values = score_texts(self.model, texts, self.batch_rows)
        return [values[index] for index in range(len(texts))]

    def _batches(self, rows: list[_Row]) -> list[list[_Row]]:
        # Longest first: the batch that needs most memory fails at once, not at the end.
        rows = sorted(rows, key=lambda row: -len(row.prompt.ids))
        return [rows[start : start + self.batch_rows] for start in range(0, len(rows), self.batch_rows)]

    def _checked(self, batch: Sequence[_Row], hook: SteeringHook) -> dict[int, Completion]:
        """Index -> completion, if every row was steered as it asked."""
        counts = hook.counts()
        return {
            row.index: checked_completion(
                self.tokenizer,
                row.request,
                row.prompt,
                row.generated,
                row.finish,
                {layer: tokens[number] for layer, tokens in counts.items()},
            )
            for number, row in enumerate(batch)
        }


class _Batch:
    """The tensors of the rows that are still generating, left-padded to one width."""

    def __init__(self, model: Any, rows: Sequence[_Row], sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling
        self.rows = list(rows)
        device = next(model.parameters()).device
        self.width = max(len(row.prompt.ids) for row in rows)
        pads = [self.width - len(row.prompt.ids) for row in rows]
        # Padding repeats the row's own first token: attention leaves it out, and a repetition penalty, which
        # reads all ids, then sees no token that the row would not have alone.
        padded = [[row.prompt.ids[0]] * pad + row.prompt.ids for row, pad in zip(rows, pads, strict=True)]
        self.ids = torch.tensor(padded, device=device)
        column = torch.arange(self.width, device=device)
        self.mask = (column >= torch.tensor(pads, device=device)[:, None]).long()
        starts = [pad + row.prompt.reply_start for row, pad in zip(rows, pads, strict=True)]
        self.reply = column >= torch.tensor(starts, device=device)[:, None]
        self.row_index = torch.arange(len(rows), device=device)[:, None]
        self.seeds = row_seeds([row.request.seed for row in rows], device)
        self.cache = DynamicCache(config=bare_model(model).config)

    def set_prompt_rows(self, hook: SteeringHook) -> None:
        """Tell the hook whose the prompts' tokens are; padding is nobody's."""
        hook.set_rows(torch.where(self.mask.bool(), self.row_index, -1), self.reply)

    def next_tokens(self, fed: torch.Tensor) -> torch.Tensor:
        """Feed `fed`, the last positions of `ids`; the next token of every row, [rows], -1: logits not finite."""
        steps = torch.full_like(self.seeds, self.ids.shape[1] - self.width)
        return next_tokens(self.logits(fed, 1)[:, -1], self.ids, self.sampling, self.seeds, steps)

    def logits(self, fed: torch.Tensor, last: int) -> torch.Tensor:
        """Feed `fed`, the last positions of `ids`; logits at its `last` positions, [rows, last, vocabulary]."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        logits: torch.Tensor = self.model(
            input_ids=fed,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last,
        ).logits
        return logits

    def append(self, tokens: torch.Tensor) -> None:
        """Put one token a row behind `ids`."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)

    def keep(self, going: Sequence[int]) -> None:
        """Drop every row whose number is not in `going`, from the cache too."""
        chosen = torch.tensor(going, device=self.ids.device)
        self.rows = [self.rows[number] for number in going]
        self.ids, self.mask = self.ids[chosen], self.mask[chosen]
        self.row_index, self.seeds = self.row_index[chosen], self.seeds[chosen]
        self.cache.batch_select_indices(chosen)


def _decode(batch: _Batch, hook: SteeringHook, stops: frozenset[int]) -> None:
    """Let every row generate to its end."""
    batch.set_prompt_rows(hook)
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
            hook.set_rows(batch.row_index, torch.ones_like(batch.row_index, dtype=torch.bool))
        else:
            hook.next_step()
        fed = batch.ids[:, -1:]


def _take(rows: Sequence[_Row], tokens: Sequence[int], stops: frozenset[int]) -> list[int]:
    """Hand each row its token; the numbers of the rows that go on."""
    going = []
    for number, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if token < 0:
            raise not_finite(row.request, len(row.generated))
        row.generated.append(token)
        if token in stops:
            row.finish = "stop"
        else:
            going.append(number)
    return going
