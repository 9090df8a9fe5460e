"""How likely texts are under a transformers model: a beginning that several of them share is read once.

A text is a *beginning* (prompt and prefix) and a *tail*, the tokens asked about. Beginnings are read into a cache,
left-padded; then the tails, right-padded and in batches of like lengths, each on its own copy of its beginning.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from esr_train.models import bare_model
from esr_train.steering.decoding import rows_at_once
from esr_train.steering.engine import Encoding, Request, check_steered, not_finite
from esr_train.steering.hook import steering

LOGITS = 1 << 27
"""Most logits computed at once: rows x positions x vocabulary."""


@dataclass(frozen=True)
class Text:
    """A text to score.

    Args:
        index: in the caller's list.
        request: whose interventions are at work.
        whole: the rendered prompt, prefix and tail.
        tail: how many of the last tokens are the tail's; at least one, and fewer than all.
    """

    index: int
    request: Request
    whole: Encoding
    tail: int

    @property
    def beginning(self) -> tuple[int, ...]:
        """The ids in front of the tail."""
        return tuple(self.whole.ids[: -self.tail])

    @property
    def tail_ids(self) -> list[int]:
        """The tail's ids."""
        return self.whole.ids[-self.tail :]


@dataclass(frozen=True)
class _Beginnings:
    """What the model has read of a batch's beginnings.

    Args:
        mask: [beginnings, width], 0 at padding.
        following: log-probabilities [beginnings, vocabulary] of the token behind each.
        counts: layer -> tokens steered in each.
    """

    cache: DynamicCache
    mask: torch.Tensor
    following: torch.Tensor
    counts: dict[int, list[int]]


def score_texts(model: Any, texts: Sequence[Text], batch_rows: int) -> dict[int, tuple[float, ...]]:
    """Index -> log-probability (nats, temperature 1) of each of the tail's tokens.

    Args:
        model: as transformers runs it, in any wrapper.
        texts: each under its own request's interventions.
        batch_rows: most beginnings, and most tails, at once.

    Raises:
        InputError: an intervention that does not fit the model.
        RunError: a text that was not steered at exactly the tokens it asked for, or whose logits are not finite.
    """
    groups: dict[tuple[Any, ...], list[Text]] = {}
    for text in texts:
        # Interventions hold tensors, which have no hash.
        steered = text.request.unsteered, *map(id, text.request.interventions)
        groups.setdefault((text.beginning, *steered), []).append(text)
    # Longest first: the batch that needs most memory fails at once, not at the end.
    ordered = sorted(groups.values(), key=lambda group: -len(group[0].beginning))
    found: dict[int, tuple[float, ...]] = {}
    while ordered:
        count = min(batch_rows, rows_at_once(model, len(ordered[0][0].beginning)))
        those, ordered = ordered[:count], ordered[count:]
        read = _read_beginnings(model, [group[0] for group in those])
        rows = [(number, text) for number, group in enumerate(those) for text in group]
        for batch in _batches(rows, batch_rows, model, read.following.shape[-1]):
            found |= _score_tails(model, read, batch)
    return found


def _batches(
    rows: Sequence[tuple[int, Text]], most: int, model: Any, vocabulary: int
) -> Iterator[list[tuple[int, Text]]]:
    """Batches of tails of like lengths, each within `most` rows and what may be read and computed at once."""
    left = sorted(rows, key=lambda row: -row[1].tail)
    while left:
        tail = left[0][1].tail
        count = max(1, min(most, rows_at_once(model, tail), LOGITS // (tail * vocabulary)))
        yield left[:count]
        left = left[count:]


def _read_beginnings(model: Any, texts: Sequence[Text]) -> _Beginnings:
    device = next(model.parameters()).device
    width = max(len(text.beginning) for text in texts)
    pads = torch.tensor([width - len(text.beginning) for text in texts])[:, None]
    padded = [[text.beginning[0]] * (width - len(text.beginning)) + [*text.beginning] for text in texts]
    ids, column = torch.tensor(padded), torch.arange(width)
    mask = (column >= pads).long()
    starts = pads + torch.tensor([text.whole.reply_start for text in texts])[:, None]
    cache = DynamicCache(config=bare_model(model).config)
    with steering(model, [text.request.interventions for text in texts]) as hook:
        index = torch.where(mask.bool(), torch.arange(len(texts))[:, None], -1)
        hook.set_rows(index.to(device), (column >= starts).to(device))
        logits = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
    return _Beginnings(cache, mask, logits.float().log_softmax(-1), hook.counts())


def _score_tails(model: Any, read: _Beginnings, batch: Sequence[tuple[int, Text]]) -> dict[int, tuple[float, ...]]:
    """Index -> log-probabilities of a batch's tails; `batch` holds each text with its beginning's number."""
    logits, counts = _feed_tails(model, read, batch)
    found = {}
    for row, (number, text) in enumerate(batch):
        tokens = torch.tensor(text.tail_ids, device=read.following.device)
        mine = logits[row, : text.tail - 1].float()
        behind = mine.gather(1, tokens[1:, None])[:, 0] - mine.logsumexp(-1)
        values = torch.cat([read.following[number, tokens[:1]], behind])
        if not values.isfinite().all():
            raise not_finite(text.request)
        found[text.index] = tuple(values.tolist())
        steered = Counter({layer: tokens[number] for layer, tokens in read.counts.items()})
        steered.update({layer: tokens[row] for layer, tokens in counts.items()})
        check_steered(text.request, text.whole, len(text.whole.ids) - 1, steered)
    return found


def _feed_tails(
    model: Any, read: _Beginnings, batch: Sequence[tuple[int, Text]]
) -> tuple[torch.Tensor, dict[int, list[int]]]:
    """Logits [tails, longest - 1, vocabulary] behind every token of the tails but the last, and steered tokens."""
    numbers, texts = torch.tensor([number for number, _ in batch]), [text for _, text in batch]
    # The last token predicts nothing that is asked, so it is not fed.
    width = max(text.tail for text in texts) - 1
    device = read.following.device
    if width == 0:
        return read.following.new_empty(len(texts), 0, read.following.shape[-1]), {}
    lengths = torch.tensor([text.tail - 1 for text in texts])[:, None]
    ids = torch.tensor([text.tail_ids[:-1] + [text.whole.ids[0]] * (width + 1 - text.tail) for text in texts])
    column = torch.arange(width)
    real = column < lengths
    mask = torch.cat([read.mask[numbers], real.long()], dim=1)
    begins = torch.tensor([len(text.whole.ids) - text.tail - text.whole.reply_start for text in texts])[:, None]
    cache = deepcopy(read.cache)
    cache.batch_select_indices(numbers.to(device))
    with steering(model, [text.request.interventions for text in texts]) as hook:
        index = torch.where(real, torch.arange(len(texts))[:, None], -1)
        hook.set_rows(index.to(device), (column + begins >= 0).to(device))
        logits: torch.Tensor = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(1) - 1)[:, -width:].to(device),
            past_key_values=cache,
            use_cache=True,
        ).logits
    return logits, hook.counts()
