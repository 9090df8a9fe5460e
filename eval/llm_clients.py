"""Who can be asked: any model of inspect_ai's model API by its name, or a local one through our own engine."""

import asyncio
import hashlib
import random
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from esr_train.errors import InputError, RunError
from esr_train.steering.engine import Engine, Request, Sampling
from eval.llm import Answered, Limit, Reply, Spent, ignored, without_secrets

if TYPE_CHECKING:
    from inspect_ai.model import Model

TRIES = 6
"""How often a question is sent at most if the API refuses, fails or does not answer."""
OUTAGE = 8
"""If none of this many questions is answered, the model is out of reach, and asking on would waste the run."""
HOPELESS = {401: "the key is refused", 403: "the key has no access", 404: "there is no such model"}
_LONGEST_WAIT = 60.0
_SLICE = 128
"""Questions that a local model is asked at once: its replies are on disk after so many."""
_LIMIT = "not asked: the limit is reached"


class InspectLlm:
    """Asks through inspect_ai's model API; keys and addresses come from the environment, as it documents.

    Args:
        model: such as `anthropic/claude-haiku-4-5`, `openai/…`, `google/…`, `openrouter/…`, `vllm/…`, `hf/…`,
            `ollama/…`, or `openai-api/NAME/…` for any compatible server.
        temperature: 0 is greedy; None leaves it to the model (some take none).
        max_tokens: of a reply, reasoning included.
        concurrency: questions that are open at once.
        timeout: seconds until an open question is given up and sent again.
        price: dollars per million tokens read and written.
        wait: seconds before a question is sent again; doubled each time, up to a minute.
        limit: of what may be spent.
    """

    def __init__(
        self,
        model: str,
        *,
        temperature: float | None = 0.0,
        max_tokens: int = 2048,
        concurrency: int = 16,
        timeout: int = 120,
        price: tuple[float, float] | None = None,
        wait: float = 1.0,
        limit: Limit | None = None,
    ) -> None:
        self.name, self.price, self.wait, self.limit = model, price, wait, limit or Limit()
        self.settings: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
        self.spent = Spent(dollars=0.0 if price else None)
        self._concurrency, self._timeout = concurrency, timeout
        self._lock = threading.Lock()
        self._runner: asyncio.Runner | None = None
        self._model: Model | None = None

    def ask(self, questions: Sequence[str], answered: Answered = ignored) -> list[Reply]:
        """See `Llm.ask`."""
        if not questions:
            return []
        # One event loop for the client's whole life: its connections belong to the loop they were opened in.
        with self._lock:
            if self._runner is None:
                self._runner = asyncio.Runner()
            replies = self._runner.run(self._ask_all(questions, answered))
        if any(reply.error == _LIMIT for reply in replies):
            raise RunError(
                f"{self.name}: the limit is reached ({self.spent}). What is finished is kept; raise the limit and run "
                "the same command again to go on."
            )
        if len(replies) >= OUTAGE and all(reply.text is None for reply in replies):
            raise RunError(
                f"{self.name} answered none of {len(replies)} questions, the last time with: {replies[-1].error}. "
                "What is finished is kept; run the same command again when it can be reached."
            )
        return replies

    async def _ask_all(self, questions: Sequence[str], answered: Answered) -> list[Reply]:
        model = self._model = self._model or self._open()
        free = asyncio.Semaphore(self._concurrency)

        async def one(place: int, question: str) -> Reply:
            async with free:
                reply = await self._ask(model, question)
            answered(place, reply)
            return reply

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(place, question)) for place, question in enumerate(questions)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    def _open(self) -> "Model":
        try:
            from inspect_ai._util.error import PrerequisiteError
            from inspect_ai.model import GenerateConfig, get_model
        except ImportError:
            raise InputError(
                "asking a language model needs inspect_ai, which is not installed",
                self.name,
                "pip install inspect_ai openai anthropic",
            ) from None
        config = GenerateConfig(
            **self.settings, max_retries=0, max_connections=self._concurrency, attempt_timeout=self._timeout
        )
        try:
            model = get_model(self.name, config=config, memoize=False)
        except PrerequisiteError as error:
            raise InputError(_plain(str(error.message)), self.name) from None
        except (ValueError, ImportError, OSError) as error:
            raise InputError(_plain(str(error)), self.name, "Name a model of inspect_ai's model API.") from None
        # The vendors' own clients would send a failed request again by themselves, where nobody counts it.
        client = getattr(model.api, "client", None)
        if client is not None and hasattr(client, "max_retries"):
            client.max_retries = 0
        return model

    async def _ask(self, model: "Model", question: str) -> Reply:
        error = ""
        for number in range(TRIES):
            if self.limit.reached(self.spent):
                return Reply(None, _LIMIT)
            if number:
                pause = min(self.wait * 2 ** (number - 1), _LONGEST_WAIT)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            try:
                output = await model.generate(question)
            except Exception as failure:
                self.spent.lost += 1
                cause = _cause(failure)
                error = _plain(getattr(cause, "provider_message", None) or str(cause) or type(cause).__name__)
                status = getattr(cause, "status_code", None)
                if status in HOPELESS:
                    raise InputError(
                        f"{HOPELESS[status]} ({error})", self.name, "Check the key and the name."
                    ) from None
                if status is not None and 400 <= status < 500 and status not in (408, 409, 425, 429):
                    return Reply(None, error)
            else:
                self._count(output.usage)
                return Reply(output.completion)
        return Reply(None, f"no reply in {TRIES} tries, the last time: {error}")

    def _count(self, usage: Any) -> None:
        self.spent.asked += 1
        if usage is None:
            return
        read = usage.input_tokens + (usage.input_tokens_cache_read or 0) + (usage.input_tokens_cache_write or 0)
        self.spent.read += read
        self.spent.written += usage.output_tokens
        cost = usage.total_cost
        if self.price:
            cost = (read * self.price[0] + usage.output_tokens * self.price[1]) / 1e6
        if cost is not None:
            self.spent.dollars = (self.spent.dollars or 0.0) + cost


@dataclass
class EngineLlm:
    """Asks a model on this machine through our own engine.

    Args:
        name: the model's.
        open: loads the engine when the first question is asked.
        temperature: 0 is greedy.
        max_tokens: of a reply.
    """

    name: str
    open: Callable[[], Engine]
    temperature: float = 0.0
    max_tokens: int = 512
    spent: Spent = field(default_factory=Spent)
    _engine: Engine | None = field(default=None, init=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What else decides the replies."""
        return {"engine": "local", "temperature": self.temperature, "max_tokens": self.max_tokens}

    def ask(self, questions: Sequence[str], answered: Answered = ignored) -> list[Reply]:
        """See `Llm.ask`; a question's seed is drawn from its text, so that neighbours change nothing."""
        if not questions:
            return []
        self._engine = self._engine or self.open()

        sampling = Sampling(self.temperature, max_new_tokens=self.max_tokens)
        replies: list[Reply] = []
        for start in range(0, len(questions), _SLICE):
            slice_ = questions[start : start + _SLICE]
            requests = [Request(str(place), text, seed=_seed(text)) for place, text in enumerate(slice_, start)]
            for completion in self._engine.generate(requests, sampling):
                self.spent.asked += 1
                self.spent.read += completion.prompt_tokens
                self.spent.written += len(completion.token_ids)
                replies.append(Reply(completion.text))
                answered(len(replies) - 1, replies[-1])
        return replies


def _seed(text: str) -> int:
    return int(hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:8], 16) >> 1


def _cause(failure: BaseException) -> BaseException:
    """What lies under the retrying library's wrapper."""
    from tenacity import RetryError

    if isinstance(failure, RetryError):
        return failure.last_attempt.exception() or failure
    return failure


def _plain(text: str) -> str:
    """A message of an API as one line without markup, secrets and its tail."""
    text = re.sub(r"\[/?(?:bold|blue|red|italic)\]", "", without_secrets(text))
    text = " ".join(text.split()).removeprefix("ERROR: ").rstrip(".")
    return text if len(text) <= 300 else text[:300] + " …"
