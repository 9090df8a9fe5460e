"""Questions to a language model, asked until the answer can be used, and never twice once it could.

Sending, waiting, trying again and structured output are inspect_ai's. The ledger of requests and dollars is ours, and
so are the kept answers: inspect_ai's own cache keeps unusable answers as well, in one place for all runs, and as
pickles, which nobody should load from a folder that was passed on.
"""

import asyncio
import hashlib
import json
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from pydantic import BaseModel

from esr_train.errors import InputError, RunError
from esr_train.files import read_json, replacing, write_json
from esr_train.recipe import LlmSection
from esr_train.steering.engine import Engine, Request, Sampling

if TYPE_CHECKING:
    from inspect_ai.model import Model

Value = TypeVar("Value")
ROUNDS = 6  # times that a question is asked in all, if its answers cannot be used
RETRIES = 5  # times that a request is sent again each time, if the API refuses, fails or does not answer
TIMEOUT = 120  # seconds until an open request is given up and sent again
MAX_TOKENS = 2048  # of a reply, reasoning included
OUTAGE = 8  # so many questions of which none is answered mean that the model is out of reach
LEDGER = ".requests.json"  # how the name of a ledger's file ends
ENGINE_QUESTIONS = 128  # that a local model is asked at once: its replies are on disk after so many
HOPELESS = {401: "the key is refused", 403: "the key has no access", 404: "there is no such model"}
BUSY = (408, 409, 429, *range(500, 600))
"""Status codes of an API that may answer later."""
TEST_QUESTION, TEST_TIMEOUT = "Reply with the word yes.", 30
STRUCTURED = ("anthropic/", "google/", "grok/", "mistral/", "openai/")
"""Providers that are told the form of an answer; one whose API refuses that is asked without."""
PRICES = Path(__file__).with_name("prices.json")
"""Dollars per million tokens read and written of common judges, and when; `llm.prices` in a recipe overrules them."""


@dataclass(frozen=True)
class Reply:
    """What came back for a question: a text or why there is none, tokens, and requests lost since the last reply."""

    text: str | None
    error: str | None = None
    read: int = 0
    written: int = 0
    lost: int = 0


Answered = Callable[[int, Reply], bool]
"""Told of a question's index and its reply as soon as that comes; False: send no further question."""


class Llm(Protocol):
    """A language model that answers single messages; `settings` (JSON values) decide with its name what it answers."""

    name: str
    settings: dict[str, Any]

    def ask(self, questions: Sequence[str], answered: Answered, form: type[BaseModel] | None = None) -> None:
        """Ask for a reply to each question, in the given form if the model can be held to one.

        Raises:
            InputError: if no question can ever be answered, such as for want of a key.
        """
        ...


@dataclass
class Spent:
    """What questions have cost so far.

    Args:
        lost: requests that got no reply: refused for their rate, timed out, cut off.
        cached: answers taken from the disk instead.
        refused: replies that could not be used, so that the question was asked again.
        failed: questions that stayed without an answer.
        read, written: tokens of questions and of replies.
        dollars: None where no price is known.
    """

    asked: int = 0
    lost: int = 0
    cached: int = 0
    refused: int = 0
    failed: int = 0
    read: int = 0
    written: int = 0
    dollars: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.asked:,} asked", f"{self.cached:,} from the cache"]
        told = ((self.lost, "without reply"), (self.refused, "replies refused"), (self.failed, "failed"))
        parts += [f"{count:,} {words}" for count, words in told if count]
        parts.append(f"{self.read:,} tokens read, {self.written:,} written")
        return "; ".join(parts if self.dollars is None else [*parts, f"${self.dollars:,.2f}"])


def price(model: str, section: LlmSection) -> tuple[float, float] | None:
    """Dollars per million tokens that a model reads and writes, by the recipe or the shipped list; None: not known."""
    if given := section.prices.get(model):
        return given
    listed = read_json(PRICES)["dollars_per_million_tokens"].get(re.sub(r"-\d{4}-?\d\d-?\d\d$", "", model))
    return tuple(listed) if listed else None


class Ledger:
    """What a model was asked and what that cost; a later run goes on counting.

    Args:
        model: its name in inspect_ai's model API.
        section: prices and limit.
        file: kept up to date with every reply, its name ends in `LEDGER`; None counts in memory.
        folder: all ledgers below it share the limit; None: this one has it alone.

    Raises:
        InputError: if dollars are limited and nobody knows the model's price.
    """

    def __init__(
        self, model: str, section: LlmSection | None = None, file: Path | None = None, folder: Path | None = None
    ) -> None:
        section = section or LlmSection()
        self.limit, self.file, self.folder = section.limit_dollars, file, folder
        self.spent = Spent(**read_json(file)) if file and file.is_file() else Spent()
        self._price = price(model, section)
        if self.limit is not None and not self._price:
            raise InputError(
                f"dollars are limited, but what {model} costs is not known",
                "llm.limit_dollars",
                f"Set llm.prices: {{{model}: [READ, WRITTEN]}}, in dollars per million tokens, or remove the limit.",
            )

    def count(self, reply: Reply) -> None:
        """Enter a reply."""
        spent = self.spent
        spent.asked += reply.text is not None
        spent.lost += reply.lost
        spent.read += reply.read
        spent.written += reply.written
        if self._price:
            spent.dollars = (spent.read * self._price[0] + spent.written * self._price[1]) / 1e6

    def write(self) -> None:
        """Bring the file up to date."""
        if self.file:
            write_json(self.file, asdict(self.spent))

    def others(self) -> float:
        """Dollars in the other ledgers that share the limit."""
        files = set(self.folder.rglob(f"*{LEDGER}")) - {self.file} if self.folder and self.limit else ()
        return sum(read_json(file)["dollars"] or 0.0 for file in files)

    def is_exhausted(self, others: float) -> bool:
        """Whether the limit is reached, given what the other ledgers hold."""
        return self.limit is not None and others + (self.spent.dollars or 0.0) >= self.limit


@dataclass(frozen=True)
class Answer(Generic[Value]):
    """A question's parsed answer, the text it was read from, or why there is none; whether there was a reply at all."""

    value: Value | None
    text: str = ""
    error: str | None = None
    replied: bool = True


@dataclass
class Asker:
    """Asks a model until each answer can be parsed; usable answers are kept on disk.

    Args:
        ledger: of requests and costs.
        folder: of kept answers, which any number of processes may share; None keeps none.
        repeat: another number asks anew what is kept already.
        label: shown with the progress.
    """

    llm: Llm
    ledger: Ledger
    folder: Path | None = None
    repeat: int = 0
    label: str = "asking"

    def ask(
        self, questions: Sequence[str], parse: Callable[[int, str], Value], form: type[BaseModel] | None = None
    ) -> list[Answer[Value]]:
        """The parsed answer of each question, in order.

        A reply that `parse` refuses is asked for again, with the reason put behind the question. What was seen
        last stands in the `error` of a question that never got a usable one.

        Args:
            questions: whole messages.
            parse: takes a question's index and a reply's text; raises ValueError for a reply it cannot use.
            form: what the replies are to look like; see `Llm.ask`.

        Raises:
            RunError: if the limit is reached, or none of many questions was answered; what came until then is kept.
        """
        answers = [_parsed(index, self._kept(question), parse) for index, question in enumerate(questions)]
        texts, spent = list(questions), self.ledger.spent
        spent.cached += sum(answer.value is not None for answer in answers)

        def take(index: int, reply: Reply) -> None:
            answer = answers[index] = _parsed(index, reply, parse)
            if answer.value is not None:
                self._keep(questions[index], answer.text)
            elif answer.replied:
                spent.refused += 1
                why = f"An earlier reply could not be used: {answer.error}. Reply anew, in exactly the form asked for."
                texts[index] = f"{questions[index]}\n\n{why}"

        for _ in range(ROUNDS):
            if pending := [index for index, answer in enumerate(answers) if answer.value is None]:
                self._round({index: texts[index] for index in pending}, take, form)
        spent.failed += sum(answer.value is None for answer in answers)
        self.ledger.write()
        return answers

    def _round(self, texts: dict[int, str], take: Callable[[int, Reply], None], form: type[BaseModel] | None) -> None:
        """Ask once. A reply is taken when it comes, so that an interruption loses those alone that are open."""
        from tqdm import tqdm

        indices, ledger, others, replies = list(texts), self.ledger, self.ledger.others(), list[Reply]()
        with tqdm(total=len(texts), desc=self.label, unit="answer", leave=False, delay=1, dynamic_ncols=True) as bar:

            def answered(number: int, reply: Reply) -> bool:
                replies.append(reply)
                ledger.count(reply)
                take(indices[number], reply)
                ledger.write()
                bar.set_postfix_str(str(ledger.spent), refresh=False)
                bar.update()
                return not ledger.is_exhausted(others)

            if not ledger.is_exhausted(others):
                self.llm.ask(list(texts.values()), answered, form)
        if len(replies) < len(texts):
            raise RunError(
                f"{self.llm.name}: the limit of ${ledger.limit:g} is reached ({ledger.spent}). What is finished is "
                "kept; raise llm.limit_dollars and run the same command again to go on."
            )
        if len(replies) >= OUTAGE and all(reply.text is None for reply in replies):
            raise RunError(
                f"{self.llm.name} answered none of {len(replies)} questions, the last time with: {replies[-1].error}. "
                "What is finished is kept; run the same command again when it can be reached."
            )

    def _file(self, question: str) -> Path | None:
        told = [self.llm.name, self.llm.settings, self.repeat, question]
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.json" if self.folder else None

    def _kept(self, question: str) -> Reply:
        """The kept answer; an unreadable file counts as none."""
        file = self._file(question)
        try:
            text = json.loads(file.read_text(encoding="utf-8"))["answer"] if file else None
        except (OSError, ValueError, KeyError, TypeError):
            text = None
        return Reply(text if isinstance(text, str) else None)

    def _keep(self, question: str, text: str) -> None:
        """Keep an answer; its file is there whole or not at all."""
        if file := self._file(question):
            with replacing(file) as opened:
                json.dump({"model": self.llm.name, "answer": text}, opened, ensure_ascii=True)


def _parsed(index: int, reply: Reply, parse: Callable[[int, str], Value]) -> Answer[Value]:
    if reply.text is None:
        return Answer(None, "", reply.error, replied=False)
    try:
        return Answer(parse(index, reply.text), reply.text)
    except ValueError as error:
        return Answer(None, reply.text, str(error).rstrip("."))


RUNS_HERE = ("hf/", "vllm/", "sglang/", "transformer_lens/", "nnterp/")
"""Providers of inspect_ai that load the model on this machine when they are opened."""


class InspectLlm:
    """Asks through inspect_ai's model API; keys and addresses come from the environment, as it documents.

    Args:
        name: such as `anthropic/claude-haiku-4-5`, `openai/…`, `google/…`, `openrouter/…`, `vllm/…`, `hf/…`,
            `ollama/…`, or `openai-api/NAME/…` for any compatible server.
        temperature: 0 is greedy; None leaves it to the model (some take none).
        concurrency: questions that are open at once.
    """

    def __init__(self, name: str, temperature: float | None = 0.0, concurrency: int = 16) -> None:
        self.name, self.concurrency = name, concurrency
        self.settings: dict[str, Any] = {"temperature": temperature, "max_tokens": MAX_TOKENS}
        self._structured = name.startswith(STRUCTURED)
        self._lost = 0
        self._lock = threading.Lock()
        self._runner: asyncio.Runner | None = None
        self._model: Model | None = None

    def ask(self, questions: Sequence[str], answered: Answered, form: type[BaseModel] | None = None) -> None:
        """See `Llm.ask`."""
        with self._lock:
            # One event loop for the client's whole life: its connections belong to the loop they were opened in.
            self._runner = self._runner or asyncio.Runner()
            _run(self._runner, self._ask_all(deque(enumerate(questions)), answered, form))

    async def _ask_all(self, pending: deque[tuple[int, str]], answered: Answered, form: type[BaseModel] | None) -> None:
        model = self._model = self._model or self._open()

        async def work() -> None:
            while pending:
                index, question = pending.popleft()
                if not answered(index, await self._ask(model, question, form if self._structured else None)):
                    pending.clear()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.concurrency, len(pending))):
                    group.create_task(work())
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _ask(self, model: "Model", question: str, form: type[BaseModel] | None) -> Reply:
        from inspect_ai.model import GenerateConfig, ModelUsage, ResponseSchema
        from inspect_ai.util import json_schema

        schema = ResponseSchema(name=form.__name__.lower(), json_schema=json_schema(form)) if form else None
        try:
            output = await model.generate(question, config=GenerateConfig(response_schema=schema))
        except Exception as failure:
            status, error = _told(failure)
            if status in HOPELESS:
                raise InputError(f"{HOPELESS[status]} ({error})", self.name, "Check the key and the name.") from None
            if form and status in (400, 422):
                self._structured = False
                return await self._ask(model, question, None)
            return Reply(None, error, lost=self._lost_since())
        usage = output.usage or ModelUsage()
        read = usage.input_tokens + (usage.input_tokens_cache_read or 0) + (usage.input_tokens_cache_write or 0)
        return Reply(output.completion, None, read, usage.output_tokens, self._lost_since())

    def _lost_since(self) -> int:
        lost, self._lost = self._lost, 0
        return lost

    def check(self) -> None:
        """Refuse a missing key, package or provider before anything is asked; models that run here are not loaded.

        Raises:
            InputError: saying what is missing.
        """
        if not self.name.startswith(RUNS_HERE):
            self._open()

    def try_out(self) -> None:
        """Ask one short question, once: is the key taken, is there such a model, can it be reached?

        Raises:
            InputError: if not. A model that is only busy (429, 5xx) passes.
        """
        if self.name.startswith(RUNS_HERE):
            return
        with asyncio.Runner() as runner:
            _run(runner, self._try_out())

    async def _try_out(self) -> None:
        from inspect_ai.model import GenerateConfig

        once = GenerateConfig(max_retries=0, attempt_timeout=TEST_TIMEOUT)
        try:
            await self._open().generate(TEST_QUESTION, config=once)
        except InputError:
            raise
        except Exception as failure:
            status, error = _told(failure)
            if status in BUSY and "quota" not in error.lower():
                return
            what = f"{HOPELESS.get(status or 0, 'a test question was not answered')} ({error})"
            raise InputError(what, self.name, "Check the key, the name and the network.") from None

    def _open(self) -> "Model":
        try:
            from inspect_ai.model import GenerateConfig, get_model

            config = GenerateConfig(
                **self.settings, max_retries=RETRIES, max_connections=self.concurrency, attempt_timeout=TIMEOUT
            )
            model = get_model(self.name, config=config, memoize=False)
        except Exception as error:
            raise InputError(
                _plain(str(getattr(error, "message", error))),
                self.name,
                "It needs inspect_ai (pip install '.[llm]'), the provider's package, its key, and one of its models.",
            ) from None
        should_retry = model.should_retry

        def counted(failure: BaseException) -> bool:
            self._lost += 1
            return should_retry(failure)

        model.should_retry = counted  # type: ignore[method-assign, assignment]
        # The vendors' own clients would send a failed request again by themselves, where nobody counts it.
        client: Any = getattr(model.api, "client", None)
        if hasattr(client, "max_retries"):
            client.max_retries = 0
        return model


class EngineLlm:
    """Asks a model on this machine through our own engine.

    Args:
        open_engine: loads it when the first question is asked.
        temperature: 0 is greedy.
        repeat: another number draws other replies.
    """

    def __init__(self, name: str, open_engine: Callable[[], Engine], temperature: float = 0.0, repeat: int = 0) -> None:
        self.name, self.open_engine, self._repeat = name, open_engine, repeat
        self.settings: dict[str, Any] = {"engine": "local", "temperature": temperature, "max_tokens": MAX_TOKENS}
        self._sampling = Sampling(temperature, max_new_tokens=MAX_TOKENS)
        self._engine: Engine | None = None

    def ask(self, questions: Sequence[str], answered: Answered, form: type[BaseModel] | None = None) -> None:
        """See `Llm.ask`; a question's seed is drawn from its text, so that neighbours change nothing."""
        engine = self._engine = self._engine or self.open_engine()
        for start in range(0, len(questions), ENGINE_QUESTIONS):
            texts = questions[start : start + ENGINE_QUESTIONS]
            requests = [Request(str(index), text, seed=self._seed(text)) for index, text in enumerate(texts, start)]
            for index, made in enumerate(engine.generate(requests, self._sampling), start):
                answered(index, Reply(made.text, None, made.prompt_tokens, len(made.token_ids)))

    def _seed(self, text: str) -> int:
        drawn = f"{text}#{self._repeat}" if self._repeat else text
        return int(hashlib.sha256(drawn.encode("utf-8", "backslashreplace")).hexdigest()[:8], 16) >> 1


def _run(runner: asyncio.Runner, work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end; in another thread if this one has an event loop at work, as a notebook does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return runner.run(work)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(runner.run, work)
        try:
            future.result()
        except KeyboardInterrupt:
            for task in asyncio.all_tasks(runner.get_loop()):
                runner.get_loop().call_soon_threadsafe(task.cancel)
            raise


def _told(failure: Exception) -> tuple[int | None, str]:
    """The status code and the message of an API's error."""
    from tenacity import RetryError

    cause = (failure.last_attempt.exception() if isinstance(failure, RetryError) else None) or failure
    error = _plain(getattr(cause, "provider_message", None) or str(cause) or type(cause).__name__)
    return getattr(cause, "status_code", None), error


def without_secrets(text: str) -> str:
    """A text in which every key and token of the environment is blotted out; for messages of model APIs."""
    for name, value in os.environ.items():
        if len(value) >= 8 and name.upper().endswith(("KEY", "TOKEN", "SECRET", "PASSWORD")):
            text = text.replace(value, "***")
    return text


def _plain(text: str) -> str:
    """A message of an API as one line without markup, secrets and its tail."""
    text = re.sub(r"\[/?(?:bold|blue|red|italic)\]", "", without_secrets(text))
    text = " ".join(text.split()).removeprefix("ERROR: ").rstrip(".")
    return text if len(text) <= 300 else text[:300] + " …"
