"""What the stages of an experiment work with: model, SAE, judges, prompts; each opened once and closed at the end."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from esr_train.adapters import adapter_source, load_adapter
from esr_train.errors import InputError
from esr_train.models import load_model, load_tokenizer, local_path
from esr_train.recipe import JudgeSection, ModelSection, PromptsSection, Recipe, judging_model
from esr_train.steering.direction_files import check_fits, load_sae
from esr_train.steering.directions import DirectionSource, LoadedSae, VectorSet
from esr_train.steering.engine import Engine, Sampling, Tally
from esr_train.steering.latent_labels import read_labels
from esr_train.steering.readout import measure_residual_norm
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.steering.vector_files import open_vectors
from esr_train.template import prompt_text
from esr_train.transcript import SaeRef
from eval.cells import Pools, Prompt, make_pools, read_prompts
from eval.judging.judge import Judge, JudgeContext, open_judge
from recipes.making.neuronpedia import where_labels_are

if TYPE_CHECKING:
    from esr_train.steering.vllm.vllm_server import VllmServer

NORM_TEXTS = 64
"""Training prompts on which the residual norm is measured."""
MEMORY = 0.9
"""Share of an accelerator's memory that several servers divide among them."""
Opened = TypeVar("Opened")
Value = TypeVar("Value")


@dataclass
class Servers:
    """Servers by their model's path; started when they are first needed."""

    recipe: Recipe
    _tested: "dict[str, VllmServer]" = field(default_factory=dict)
    _judging: "dict[str, VllmServer]" = field(default_factory=dict)

    def tested(self, model: ModelSection) -> "VllmServer":
        """The server of the model under test, started; that of any other is stopped: there is room for one."""
        from esr_train.steering.vllm.vllm_server import VllmServer

        for path, server in self._tested.items():
            if path != model.path:
                server.close()
        if model.path not in self._tested:
            engine = self.recipe.engine
            self._tested[model.path] = VllmServer(
                model,
                rows=engine.chunk(),
                tensor_parallel=engine.tensor_parallel,
                lora_rank=self._rank() if model.path == self.recipe.model.path else 0,
                memory=self._memory,
            )
        self._tested[model.path].start()
        return self._tested[model.path]

    def judging(self, model: ModelSection, rows: int) -> "VllmServer":
        """The server of a judge's own model, started."""
        from esr_train.steering.vllm.vllm_server import VllmServer

        if model.path not in self._judging:
            parallel = self.recipe.engine.tensor_parallel
            self._judging[model.path] = VllmServer(model, rows=rows, tensor_parallel=parallel, memory=self._memory)
        self._judging[model.path].start()
        return self._judging[model.path]

    def stop(self) -> None:
        """Stop all of them; what needs one starts it again."""
        for server in (*self._tested.values(), *self._judging.values()):
            server.close()

    @property
    def own(self) -> set[str]:
        """The models of local judges that need a server of their own.

        A judge on the base model shares that one's server, unless an arm's whole model takes its place meanwhile.
        """
        recipe = self.recipe
        models = [judging_model(recipe, section) for section in (recipe.judge, *recipe.judges)]
        named = {model.path for model in models if model}
        replaced = any(arm.model or arm.merged for arm in recipe.arms.values())
        return named if replaced else named - {recipe.model.path}

    @property
    def _memory(self) -> float | None:
        return MEMORY / (1 + len(self.own)) if self.own else None

    def _rank(self) -> int:
        """The highest rank of an adapter that an arm has or is going to have."""
        return max(self._ranks(), default=0)

    def _ranks(self) -> Iterator[int]:
        from peft import PeftConfig

        from esr_train.training.settings import lora_config

        for name, arm in self.recipe.arms.items():
            folder = adapter_source(arm.adapter) if arm.adapter else None
            if folder and (folder / "adapter_config.json").is_file():
                yield int(getattr(PeftConfig.from_pretrained(str(folder)), "r", 0))
            else:
                yield lora_config(self.recipe.for_arm(name)).r


@dataclass
class Resources:
    """A recipe's model, SAE, judges and prompts. Each is opened by the first call that asks for it.

    Args:
        asks: whether judges may be asked anything: a key that is missing is then refused when one is opened.
        tally: of what the engines on the models under test generate and read.
    """

    recipe: Recipe
    asks: bool = True
    tally: Tally = field(default_factory=Tally)
    _opened: dict[str, Any] = field(default_factory=dict)
    _servers: Servers = field(init=False)

    def __post_init__(self) -> None:
        self._servers = Servers(self.recipe)

    def once(self, name: str, open_: Callable[[], Opened]) -> Opened:
        """What `open_` gave the first time that this name was asked for."""
        if name not in self._opened:
            self._opened[name] = open_()
        return self._opened[name]  # type: ignore[no-any-return]

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.once("tokenizer", lambda: load_tokenizer(self.recipe.model))

    def base(self) -> Engine:
        """An engine on the base model."""
        return self.once("base", lambda: self._engine(self.recipe.model, None))

    def engine(self, adapter: Path | None, model: str | None = None) -> Engine:
        """An engine on the base model, on it with an adapter, or on a whole model in its place.

        Memory of the base model is freed for others: an accelerator may hold one, not two.
        """
        if adapter is None and model is None:
            return self.base()
        self.free_base()
        section = self.recipe.model
        if model is not None:
            section = section.model_copy(update={"path": model, "revision": None})
        return self._engine(section, adapter)

    def _engine(self, section: ModelSection, adapter: Path | None) -> Engine:
        is_base = section == self.recipe.model
        tokenizer = self.tokenizer() if is_base else load_tokenizer(section)
        if self.recipe.engine.kind == "transformers":
            model = load_model(section)
            model = load_adapter(model, adapter) if adapter else model
            rows = self.recipe.engine.batch_rows
            return TransformersEngine(model, tokenizer, batch_rows=rows, tally=self.tally)
        from esr_train.steering.vllm.vllm_engine import VllmEngine

        return VllmEngine(self._servers.tested(section), tokenizer, adapter, self.tally)

    def base_model(self) -> Any:
        """The base model as transformers runs it, so that its hidden states can be read.

        vLLM's own copy gives none. It is stopped, as it leaves no room for another one.
        """
        if self.recipe.engine.kind == "transformers":
            engine = self.base()
            assert isinstance(engine, TransformersEngine)
            return engine.model
        self.free_all()
        return load_model(self.recipe.model)

    def free_base(self) -> None:
        """Free the base model's memory; the next call that needs the model loads it again."""
        if self._opened.pop("base", None) is not None:
            gc.collect()
            torch.cuda.empty_cache()

    def free_all(self) -> None:
        """As `free_base`, and stop every vLLM: a training, or another whole model, needs the memory."""
        self.free_base()
        self._servers.stop()

    def judge(self) -> Judge:
        """The judge that scores responses."""
        return self.once("judge", lambda: self._judge(self.recipe.judge, "judge"))

    def further_judges(self) -> list[Judge]:
        """The judges that score the same responses once more."""
        keyed = [(f"judges.{number}", section) for number, section in enumerate(self.recipe.judges)]
        return [self.once(key, partial(self._judge, section, key)) for key, section in keyed]

    def _judge(self, section: JudgeSection, key: str) -> Judge:
        recipe, cache = self.recipe, Path(self.recipe.runs) / "judge-cache"
        run, path = recipe.directory, recipe.model.path
        context = JudgeContext(key, recipe.llm, cache, run, self.asks, self._judging_engine, located, path)
        return open_judge(section, context)

    def _judging_engine(self, path: str) -> Engine:
        """An engine on a judge's own model, opened once; the base model's own if the judge is the same.

        A tuned arm is loaded apart from the base model, so no adapter and no steering reaches a judge.
        """
        beside, rows = self.recipe.model, self.recipe.llm.concurrency
        vllm = self.recipe.engine.kind == "vllm"
        if path == beside.path and not (vllm and path in self._servers.own):
            return self.base()
        model = ModelSection(path=path, dtype=beside.dtype, device=beside.device)
        tokenizer = self.once(f"tokenizer of {path}", lambda: load_tokenizer(model))
        if vllm:
            from esr_train.steering.vllm.vllm_engine import VllmEngine

            return VllmEngine(self._servers.judging(model, rows), tokenizer)
        return self.once(f"judge on {path}", lambda: TransformersEngine(load_model(model), tokenizer, batch_rows=rows))

    def prompts(self) -> Pools:
        """The prompts of every split."""
        section = self.prompt_section()
        source = local_path(section.path) or section.path
        return self.once("prompts", lambda: make_pools(read_prompts(source, section.column), section.splits))

    def prompt_section(self) -> PromptsSection:
        """The recipe's prompts section, which every stage but training needs."""
        return required(self.recipe.prompts, "prompts")

    def sae(self) -> LoadedSae:
        """The recipe's SAE."""
        section = required(self.recipe.sae, "sae")
        return self.once("sae", lambda: load_sae(SaeRef(section.release, section.id)))

    def read_sae(self) -> LoadedSae:
        """The SAE whose latents are read: `read.sae`, or else the recipe's."""
        section = self.recipe.read.sae
        if section is None:
            return self.sae()
        return self.once("read sae", lambda: load_sae(SaeRef(section.release, section.id)))

    def read_labels(self) -> dict[int, str]:
        """Labels of the latents that are read; none if the recipe has none for their SAE."""
        section = self.recipe.read.sae or self.recipe.sae
        if section is None or section.labels is None:
            return {}
        path = located(section.labels)
        return self.once(f"labels {path}", lambda: read_labels(path))

    def source(self) -> DirectionSource:
        """What steers: the recipe's vectors, or else its SAE."""
        return self.vectors() if self.recipe.vectors else self.sae()

    def vectors(self) -> VectorSet:
        """The recipe's vectors."""
        section = required(self.recipe.vectors, "vectors")
        return self.once("vectors", lambda: open_vectors(section.file, section.layer))

    def labels(self) -> dict[int, str]:
        """What the directions stand for, by index: the names of the vectors, or the labels of the SAE's latents."""
        if self.recipe.vectors:
            return self.vectors().labels
        section = required(self.recipe.sae, "sae")
        path = located(required(section.labels, "sae.labels"))
        if not path.exists():
            raise InputError("there are no labels here", str(path), where_labels_are(section.release, section.id))
        return self.once("labels", lambda: read_labels(path))

    def residual_norm(self) -> float:
        """The median residual norm of the steered layer on training prompts.

        Raises:
            InputError: if the SAE, or the vectors, do not fit the model.
        """
        model, source = self.base_model(), self.source()
        check_fits(source, model)
        train = self.prompts().train
        chosen = train[:: max(len(train) // NORM_TEXTS, 1)][:NORM_TEXTS]
        return measure_residual_norm(model, self.tokenizer(), source.layer, self.rendered(chosen))

    def rendered(self, prompts: Sequence[Prompt]) -> list[str]:
        """The prompts as the model reads them, up to where its reply begins."""
        return [prompt_text(self.tokenizer(), prompt.text) for prompt in prompts]

    def sampling(self) -> Sampling:
        """The recipe's sampling, the same for every arm."""
        return Sampling(**self.recipe.sampling.model_dump())

    def close(self) -> None:
        """Free all memory and stop every server."""
        self._servers.stop()
        self._opened.clear()
        gc.collect()


@contextmanager
def open_resources(recipe: Recipe, asks: bool = True) -> Iterator[Resources]:
    """A recipe's resources, closed when the block ends."""
    resources = Resources(recipe, asks)
    try:
        yield resources
    finally:
        resources.close()


def located(path: str) -> Path:
    """A path relative to the current folder, or else to the repository."""
    return local_path(path) or Path(path)


def required(value: Value | None, key: str) -> Value:
    """A section or key of the recipe.

    Raises:
        InputError: naming the key, if the recipe has none.
    """
    if value is None:
        raise InputError("this key is missing from the recipe", key, "Add it; see `esr recipes show`.")
    return value
