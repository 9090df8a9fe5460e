"""What every engine does: generate for many requests, each under its own interventions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

from esr_train.errors import InputError, RunError
from esr_train.steering.interventions import Intervention, layer_of
from esr_train.template import chat_template, encode_prompt

Finish = Literal["stop", "length", "alarm"]


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
        prefix: text with which the assistant's reply already begins; generation goes on from its end.
        interventions: applied together, in order; empty means unsteered.
        seed: of this row's sampling; two requests that differ only in arm share it.
        max_new_tokens: most tokens of this reply, where it may have fewer than the sampling allows.
        unsteered: of the prefix, how many characters interventions on `generated` positions leave alone.
    """

    id: str
    prompt: str
    system: str | None = None
    prefix: str = ""
    interventions: tuple[Intervention, ...] = ()
    seed: int = 0
    max_new_tokens: int | None = None
    unsteered: int = 0

    def steers(self, completion: "Completion") -> bool:
        """Whether any token was to be steered: where replies alone are, one that ends at once may have none."""
        if any(each.positions == "all" for each in self.interventions):
            return True
        return bool(self.interventions) and (len(self.prefix) > self.unsteered or len(completion.token_ids) > 1)

    def most(self, sampling: Sampling) -> int:
        """Most tokens of the reply."""
        return min(sampling.max_new_tokens, self.max_new_tokens or sampling.max_new_tokens)


@dataclass(frozen=True)
class Completion:
    """What an engine returns for one request.

    Args:
        text: the generated text, without the prefix and without the end-of-turn token.
        token_ids: generated ids, with the one that ended it (the end of turn, or what was drawn behind an alarm).
        finish_reason: "stop" (end of turn), "length", or "alarm" (a monitor stopped it).
        prompt_tokens: tokens of the rendered prompt and prefix.
        steered_tokens: positions (prompt, prefix and generated) at which an intervention was applied; counted
            where it happens, inside the forward pass. 0 for an unsteered request.
        alarms: tokens of the reply, from 0, at which a monitor sounded.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Finish
    prompt_tokens: int
    steered_tokens: int
    alarms: tuple[int, ...] = ()


Progress = Callable[[int, int], None]
"""Called with (rows finished, tokens generated) since the last call."""


@dataclass
class Tally:
    """What engines have generated so far: responses and their tokens."""

    requests: int = 0
    tokens: int = 0

    def count(self, made: Sequence[Completion]) -> None:
        """Add finished responses."""
        self.requests += len(made)
        self.tokens += sum(len(each.token_ids) for each in made)

    def since(self, before: "Tally", processes: int = 1) -> dict[str, int]:
        """What was added, times the processes that all do as much; as JSON values."""
        return {name: (value - getattr(before, name)) * processes for name, value in asdict(self).items()}


@runtime_checkable
class Scorer(Protocol):
    """An engine that also says how likely a text is."""

    def log_probabilities(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[tuple[float, ...]]:
        """Log-probability (nats, temperature 1) of each token of each continuation, right after its request's prefix.

        The request's interventions are at work, as in generation; its seed plays no part. What is raised: see
        `Engine.generate`.
        """
        ...


class Engine(Protocol):
    """Generates under steering."""

    name: str

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        """Generate one completion a request, in the order of the requests.

        Args:
            requests: each under its own interventions.
            sampling: the same for all; each row draws from its own seed.
            progress: called when rows have ended, with their number and generated tokens.

        Raises:
            InputError: an intervention or a prompt that does not fit the model.
            RunError: a row that was not steered at exactly the tokens it asked for, or whose logits are not finite.
        """
        ...


@dataclass(frozen=True)
class Encoding:
    """A request's rendered prompt.

    Args:
        ids: of the prompt and the prefix.
        reply_start: the index in `ids` from which on tokens belong to the reply.
    """

    ids: list[int]
    reply_start: int


def encoded(tokenizer: Any, request: Request) -> Encoding:
    """A request's prompt and prefix as the model reads them."""
    ids, start = encode_prompt(tokenizer, request.prompt, request.system, request.prefix)
    if request.unsteered:
        left, _ = encode_prompt(tokenizer, request.prompt, request.system, request.prefix[: request.unsteered])
        start = _shared(left, ids)
    return Encoding(ids, start)


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids are the same from the first one on."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def check_length(request: Request, prompt_tokens: int, sampling: Sampling, most: int) -> None:
    """Refuse a request whose prompt and reply may be longer together than the model takes.

    Args:
        prompt_tokens: of the rendered prompt and prefix.
        most: tokens that the model, or what runs it, takes.

    Raises:
        InputError: with all three numbers.
    """
    reply = request.most(sampling)
    if prompt_tokens + reply > most:
        raise InputError(
            f"request {request.id!r} may grow to {prompt_tokens + reply} tokens (a prompt of {prompt_tokens}, a reply "
            f"of up to {reply}), and the model takes {most} here",
            None,
            "Shorten the prompt, or allow a shorter reply: sampling.max_new_tokens, or max_tokens of an HTTP request.",
        )


def encoded_with(tokenizer: Any, request: Request, continuation: str) -> tuple[Encoding, int]:
    """A request's prompt, prefix and a continuation, and how many of the last tokens are the continuation's.

    Where the border falls inside a token, that whole token belongs to the continuation.
    """
    whole = encoded(tokenizer, replace(request, prefix=request.prefix + continuation))
    shared = _shared(encoded(tokenizer, request).ids, whole.ids)
    return whole, len(whole.ids) - min(shared, len(whole.ids) - 1)


def check_steered(request: Request, prompt: Encoding, fed: int, counts: Mapping[int, int]) -> int:
    """How many of a request's tokens were steered, if every layer steered exactly those it was asked to.

    All positions contain the reply's, so over several layers the most steered one has every steered position.

    Args:
        fed: tokens that the model was fed: the prompt's, and those behind it.
        counts: layer -> tokens that were steered there.

    Raises:
        RunError: naming the request and the layer.
    """
    expected: dict[int, int] = {}
    for intervention in request.interventions:
        first = 0 if intervention.positions == "all" else prompt.reply_start
        layer = layer_of(intervention)
        expected[layer] = max(expected.get(layer, 0), fed - first)
    for layer in {**expected, **counts}:
        asked, got = expected.get(layer, 0), counts.get(layer, 0)
        if asked != got:
            raise RunError(
                f"request {request.id!r}: layer {layer} steered {got} tokens where {asked} were "
                "asked for. The completion is not a valid trial."
            )
    return max(expected.values(), default=0)


def checked_completion(
    tokenizer: Any,
    request: Request,
    prompt: Encoding,
    generated: Sequence[int],
    finish: Finish,
    counts: Mapping[int, int],
) -> Completion:
    """What an engine returns, if every layer steered exactly the tokens it was asked to.

    The last token is never fed, so it is never steered.

    Args:
        generated: ids, with the one that ended it where there is one.
        finish: why the generation ended.
        counts: layer -> tokens that were steered there.

    Raises:
        RunError: naming the request and the layer.
    """
    steered = check_steered(request, prompt, len(prompt.ids) + len(generated) - 1, counts)
    text = decoded(tokenizer, request, generated if finish == "length" else generated[:-1])
    return Completion(request.id, text, tuple(generated), finish, len(prompt.ids), steered)


def decoded(tokenizer: Any, request: Request, ids: Sequence[int]) -> str:
    """The text of a request's generated ids."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    # White space that the template writes before a reply would be there twice in a transcript.
    return text if request.prefix else text.removeprefix(chat_template(tokenizer).reply_space)


def not_finite(request: Request, tokens: int | None = None) -> RunError:
    """What an engine raises where the model's logits are NaN or infinite, behind so many generated tokens."""
    where = "" if tokens is None else f" behind {tokens} generated tokens"
    return RunError(
        f"request {request.id!r}: the model's logits are not finite{where}, so nothing can be drawn from them. Look "
        "for weights that are not finite (model, adapter), or a strength that the model's dtype cannot hold."
    )
