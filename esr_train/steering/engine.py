"""What every engine does: generate for many requests, each under its own interventions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from esr_train.steering.intervention import Intervention


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the same for every arm of an experiment.

    Args:
        temperature: 0 is greedy.
        top_p: nucleus mass, 1.0 keeps the whole distribution.
        max_new_tokens: most tokens a reply may have.
        repetition_penalty: 1.0 is none.
    """

    temperature: float = 0.6
    top_p: float = 1.0
    max_new_tokens: int = 512
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Request:
    """One generation.

    Args:
        id: returned with the completion.
        prompt: the user's message, plain text (special-token text in it is never a control token).
        system: the system message, or None.
        prefix: text with which the assistant's reply already begins; generation goes on from its end.
        interventions: applied together, in order; empty means unsteered.
        seed: of this row's sampling; two requests that differ only in arm share it.
    """

    id: str
    prompt: str
    system: str | None = None
    prefix: str = ""
    interventions: tuple[Intervention, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What an engine returns for one request.

    Args:
        id: the request's.
        text: the generated text, without the prefix and without the end-of-turn token.
        token_ids: generated ids, end-of-turn token included where there is one.
        finish_reason: "stop" (end of turn) or "length".
        prompt_tokens: tokens of the rendered prompt and prefix.
        steered_tokens: positions (prompt, prefix and generated) at which an intervention was applied; counted
            where it happens, inside the forward pass. 0 for an unsteered request.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    steered_tokens: int


Progress = Callable[[int, int], None]
"""Called with (rows finished, tokens generated) since the last call."""


class Engine(Protocol):
    """Generates under steering. Completions come back in the order of the requests.

    Raises:
        RunError: when a request with interventions was not steered at exactly the positions it asked for.
    """

    name: str

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        """Generate one completion a request."""
        ...
