"""Replies of the model in training, each under its row's own steering, and what they are worth: GRPO."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils.data import Sampler
from trl import GRPOTrainer

from esr_train.recipe import RewardSection
from esr_train.steering.engine import Completion, Request, Sampling, encoded
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.training.callbacks import flops_per_token
from esr_train.training.injection import draw
from esr_train.training.live_trainers import LiveTrainer

STEERING = ("vector", "threshold_raw", "key")
"""Columns that a prompt shares with all replies to it."""

SEEDS = 2**62
"""How many seeds a reply is drawn from."""


@dataclass(frozen=True)
class Rollout:
    """A reply to be judged.

    Args:
        label: what steered it, if that is known; None where nothing did.
        steered: whether anything steered it.
        ended: whether it ended by itself, not at the token limit.
    """

    prompt: str
    label: str | None
    reply: str
    steered: bool
    ended: bool


@dataclass(frozen=True)
class Merit:
    """What a reply is worth, and what is taken off it (see `RewardSection`); 0 to 1 each."""

    score: float
    needless_restart: float
    relapse: float
    length: float
    unnoticed: float = 0.0


Reward = Callable[[Sequence[Rollout]], list[Merit | None]]
"""Says what replies are worth, in order; None where that is not known: such a reply is not learned from."""

PARTS = tuple(each.name for each in fields(Merit))


def reward_weights(section: RewardSection) -> list[float]:
    """What each of a merit's parts adds to the reward, in their order."""
    return [1.0, -section.needless_restart, -section.relapse, -section.length, -section.unnoticed]


class RolloutTrainer(LiveTrainer, GRPOTrainer):
    """Of several replies to one prompt, those above their mean become likelier.

    The replies to a prompt are all written under its row's steering, at one strength that is drawn per row and epoch,
    by our engine, whose sampling depends on no global state. What TRL reads of them again (the policy's
    log-probabilities, those of the policy that wrote them, the reference's) is steered in the same way.

    Args:
        reward: says what replies are worth.
        rows_at_once: most replies that are written at the same time.
        arguments: of `LiveTrainer`; `train_dataset` is from `dataset.to_prompts`.
    """

    def __init__(self, *, reward: Reward, rows_at_once: int, **arguments: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using 'rollout_func'")
            super().__init__(rollout_func=_write_replies, reward_funcs=[_part(name) for name in PARTS], **arguments)
        self._reward = reward
        self._engine = TransformersEngine(self.model, self._tokenizer, batch_rows=rows_at_once)
        self._prompts: list[dict[str, Any]] = []
        self._steered: dict[str, torch.Tensor] = {}
        self._positions = 0

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Write replies, where it is time for that, and learn from a micro-batch of them."""
        model.train()
        if self._buffered_inputs is None:
            # TRL counts from 0 again behind a checkpoint, which may lie between two writings.
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
        batch = self._prepare_inputs(inputs)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        self._positions = mask.numel()
        steering = {name: batch[name] for name in STEERING}
        columns = steering_columns(steering, mask, batch["completion_mask"].shape[1])
        return super().training_step(model, {**batch, **columns}, num_items_in_batch)

    def floating_point_ops(self, inputs: Any) -> int:
        """Operations spent on the last micro-batch, by the formula of `flops_per_token`."""
        return int(flops_per_token(self._parameters) * self._positions)

    def write_replies(self) -> dict[str, Any]:
        """Reply to the prompts at hand, and judge the replies; as TRL wants it of a `rollout_func`."""
        requests = self._requests()
        assert self.max_completion_length
        sampling = Sampling(temperature=self.temperature, max_new_tokens=self.max_completion_length)
        made = self._engine.generate(requests, sampling)
        self._meter.count_generated(sum(len(completion.token_ids) for completion in made))
        merits = self._reward([_rollout(*each) for each in zip(self._prompts, requests, made, strict=True)])
        return {
            "prompt_ids": [encoded(self._tokenizer, request).ids for request in requests],
            "completion_ids": [list(completion.token_ids) for completion in made],
            "logprobs": None,
            **{name: [merit and getattr(merit, name) for merit in merits] for name in PARTS},
        }

    def _requests(self) -> list[Request]:
        epoch, count = int(self.state.epoch or 0), len(self._prompts)
        added = self._live.interventions(self._steered, epoch) if self._live else [()] * count
        first = self.accelerator.process_index * count
        return [
            Request(
                str(number),
                row["prompt"],
                row["system"],
                interventions=added[number],
                seed=self._seed(row["key"], epoch, (first + number) % self.num_generations),
            )
            for number, row in enumerate(self._prompts)
        ]

    def _seed(self, key: int, epoch: int, number: int) -> int:
        """The seed of one of the replies to a prompt, the same in a run that was resumed."""
        return int(draw((self.args.seed << 20) + number + 1, key, epoch)[0] * SEEDS)

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        # Every prompt as often as it is replied to.
        return GRPOTrainer._get_train_sampler(self, dataset)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        # Trainer asks again, for what `training_step` has prepared already.
        if isinstance(generation_batch, dict):
            return generation_batch
        return super()._prepare_inputs(generation_batch)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        device = self.accelerator.device
        self._prompts = inputs
        self._steered = {name: torch.tensor([row[name] for row in inputs], device=device) for name in STEERING}
        return {**super()._generate_and_score_completions(inputs), **self._steered}

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        score = super()._get_per_token_logps_and_entropies
        # With gradient this is the policy's pass, which `training_step` steers to the end of its backward pass.
        if self._live is None or torch.is_grad_enabled():
            return score(model, input_ids, attention_mask, logits_to_keep, batch_size, **options)
        pieces, epoch = [], int(self.state.epoch or 0)
        for start in range(0, len(input_ids), batch_size or len(input_ids)):
            part = slice(start, start + (batch_size or len(input_ids)))
            steering = {name: values[part] for name, values in self._steered.items()}
            columns = steering_columns(steering, attention_mask[part], logits_to_keep)
            with self._live.steering(model, columns, epoch):
                pieces.append(score(model, input_ids[part], attention_mask[part], logits_to_keep, **options)[0])
        return torch.cat(pieces), None, None


def steering_columns(steering: Mapping[str, torch.Tensor], mask: torch.Tensor, reply: int) -> dict[str, torch.Tensor]:
    """The steering columns of a batch of prompts and replies (see `batches.Collator`).

    Args:
        steering: the rows' `vector`, `threshold_raw` and `key`.
        mask: [rows, positions], 0 for padding, which is on both sides.
        reply: the last so many positions are the reply's.
    """
    index = torch.arange(len(mask), device=mask.device)[:, None]
    in_reply = torch.zeros_like(mask, dtype=torch.bool)
    in_reply[:, mask.shape[1] - reply :] = True
    row = torch.where(mask.bool(), index, -1)
    return {**steering, "row": row, "reply": in_reply, "answer": torch.zeros_like(in_reply)}


def _rollout(row: Mapping[str, Any], request: Request, made: Completion) -> Rollout:
    steered = bool(request.interventions)
    return Rollout(row["prompt"], row["label"] if steered else None, made.text, steered, made.finish_reason == "stop")


def _write_replies(_: Any, trainer: RolloutTrainer) -> dict[str, Any]:
    return trainer.write_replies()


def _part(name: str) -> Callable[..., list[float | None]]:
    """A function that TRL calls for a part of the reward, which has come with the replies; TRL logs it by its name."""

    def part(**columns: Any) -> list[float | None]:
        return list(columns[name])

    part.__name__ = name
    return part
