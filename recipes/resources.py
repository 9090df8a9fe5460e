"""What every stage of an experiment works with, loaded when it is first needed."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from esr_train.adapters import load_adapter
from esr_train.errors import InputError
from esr_train.models import load_model, load_tokenizer, local_path
from esr_train.provenance import sha256
from esr_train.recipe import EngineSection, JudgeSection, ModelSection, PromptsSection, Recipe, SaeSection
from esr_train.steering.direction_files import check_fits, load_sae
from esr_train.steering.directions import Direction, LoadedSae
from esr_train.steering.engine import Engine, Sampling
from esr_train.steering.latent_labels import label_files, read_labels
from esr_train.steering.readout import measure_residual_norm
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.template import prompt_text
from esr_train.transcript import SaeRef
from eval.cells import Pools, Prompt, make_pools, read_prompts
from eval.judging.judge import Judge, JudgeContext, open_judge
from recipes.servers import Servers

NORM_TEXTS = 64


@dataclass(frozen=True)
class World:
    """A recipe's model, SAE, judge and prompts."""

    recipe: Recipe

    @cached_property
    def tokenizer(self):  # type: ignore[no-untyped-def]
        """The model's tokenizer."""
        return load_tokenizer(self.recipe.model)

    @cached_property
    def base(self) -> Engine:
        """The base model's engine."""
        return self.engine(None)

    def release(self) -> None:
        """Forget the base model until it is asked for again: an accelerator may hold one model, not two."""
        if self.__dict__.pop("base", None) is not None:
            gc.collect()
            torch.cuda.empty_cache()

    def stop(self) -> None:
        """As `release`, and stop every vLLM, which adapters share with the base model: a training needs its memory."""
        self.release()
        self._servers.stop()

    def engine(self, adapter: Path | None, instead: str | None = None) -> Engine:
        """An engine on the model, with an adapter or without, or on a whole model that takes its place."""
        section: EngineSection = self.recipe.engine
        model, tokenizer = self.recipe.model, self.tokenizer
        if instead:
            model = model.model_copy(update={"path": instead, "revision": None})
            tokenizer = load_tokenizer(model)
        if section.kind == "transformers":
            loaded = load_model(model)
            loaded = load_adapter(loaded, adapter) if adapter else loaded
            return TransformersEngine(loaded, tokenizer, batch_rows=section.batch_rows)
        from esr_train.steering.vllm.vllm_engine import VllmEngine

        return VllmEngine(self._servers.tested(model), tokenizer, adapter)

    @cached_property
    def _servers(self) -> Servers:
        return Servers(self.recipe)

    @cached_property
    def judge(self) -> Judge:
        """Who scores responses."""
        return self._judge(self.recipe.judge, "judge")

    @cached_property
    def other_judges(self) -> list[Judge]:
        """Who scores the same responses once more."""
        return [self._judge(section, f"judges.{number}") for number, section in enumerate(self.recipe.judges)]

    def _judge(self, section: JudgeSection, key: str) -> Judge:
        recipe = self.recipe
        cache = Path(recipe.runs) / "judge-cache"
        return open_judge(section, JudgeContext(key, recipe.llm, cache, recipe.directory, self._engine_on, located))

    def _engine_on(self, path: str) -> Engine:
        """An engine on a judge's own model, beside the one under test; on that one itself if the judge is the same."""
        beside, rows = self.recipe.model, self.recipe.llm.concurrency
        vllm = self.recipe.engine.kind == "vllm"
        if path == beside.path and not (vllm and path in self._servers.own):
            return self.base
        model = ModelSection(path=path, dtype=beside.dtype, device=beside.device)
        if vllm:
            from esr_train.steering.vllm.vllm_engine import VllmEngine

            return VllmEngine(self._servers.judging(model, rows), load_tokenizer(model))
        return TransformersEngine(load_model(model), load_tokenizer(model), batch_rows=rows)

    @property
    def sae_ref(self) -> SaeRef:
        """The recipe's SAE."""
        section: SaeSection = present(self.recipe.sae, "sae")
        return SaeRef(section.release, section.id)

    @cached_property
    def files(self) -> dict[str, str]:
        """Hashes of the local files that the recipe names."""
        return self.base_files | _hashes(self.recipe.data.cues)

    @cached_property
    def base_files(self) -> dict[str, str]:
        """Hashes of those among them on which the base model's responses and scores depend."""
        recipe, sae = self.recipe, self.recipe.sae
        return _hashes(
            recipe.prompts.path if recipe.prompts else None,
            getattr(recipe.judge, "vocabulary", None),
            sae.labels if sae else None,
            f"{recipe.model.path}/model.safetensors",
            f"{sae.release}/{sae.id}/sae_weights.safetensors" if sae else None,
        )

    @cached_property
    def pools(self) -> Pools:
        """The prompts of every split."""
        section: PromptsSection = self.required_prompts
        source = local_path(section.path) or section.path
        prompts = read_prompts(source, section.column, section.topic_column, section.split)
        return make_pools(prompts, section.splits)

    @property
    def required_prompts(self) -> PromptsSection:
        """The recipe's prompts section, which every stage but training needs."""
        return present(self.recipe.prompts, "prompts")

    def direction(self, latent: int) -> Direction:
        """The direction of a labelled latent, in units of the layer's residual norm."""
        return self.sae.direction(latent, self.residual_norm, self.labels[latent])

    @cached_property
    def residual_norm(self) -> float:
        """The median residual norm of the SAE's layer on training prompts.

        Raises:
            InputError: if the SAE does not fit the model.
        """
        model = self.open_model()
        check_fits(self.sae, model)
        prompts = self.pools.train[:: max(len(self.pools.train) // NORM_TEXTS, 1)][:NORM_TEXTS]
        return measure_residual_norm(model, self.tokenizer, self.sae.layer, self.rendered(prompts))

    def open_model(self) -> Any:
        """The base model as transformers runs it: its hidden states can be read.

        vLLM's own copy gives none. It is stopped, as it leaves no room for another one.
        """
        if self.recipe.engine.kind == "transformers":
            return getattr(self.base, "model")  # noqa: B009 - an engine need not have one
        self.stop()
        return load_model(self.recipe.model)

    @cached_property
    def sae(self) -> LoadedSae:
        """The recipe's SAE."""
        return load_sae(self.sae_ref)

    @cached_property
    def labels(self) -> dict[int, str]:
        """What the SAE's latents stand for."""
        section: SaeSection = present(self.recipe.sae, "sae")
        return read_labels(located(required(section.labels, "sae.labels")))

    def rendered(self, prompts: Sequence[Prompt]) -> list[str]:
        """The prompts as the model reads them, up to where its reply begins."""
        return [prompt_text(self.tokenizer, prompt.text) for prompt in prompts]

    def sampling(self, max_new_tokens: int | None = None) -> Sampling:
        """The recipe's sampling, the same for every arm."""
        values = self.recipe.sampling.model_dump()
        return Sampling(**{**values, **({"max_new_tokens": max_new_tokens} if max_new_tokens else {})})


def _hashes(*paths: str | None) -> dict[str, str]:
    """Hashes of the files among the paths, and of the batches in a folder of labels."""
    found: dict[str, str] = {}
    for path in paths:
        here = local_path(path) if path else None
        if path and here and here.is_file():
            found[path] = sha256(here)
        elif path and here and any(here.glob("*.jsonl*")):
            found[path] = ", ".join(sha256(file) for file in label_files(here))
    return found


def located(path: str) -> Path:
    """A path relative to the current folder, or else to the repository."""
    return local_path(path) or Path(path)


def present(section, key: str):  # type: ignore[no-untyped-def]
    """The section, or an `InputError` that names its key."""
    if section is None:
        raise InputError("this section is missing from the recipe", key, "Add it; see `esr recipes show`.")
    return section


def required(value: str | None, key: str) -> str:
    """The value, or an `InputError` that names its key."""
    if value is None:
        raise InputError("this key is missing from the recipe", key, "Add it; see `esr recipes show`.")
    return value
