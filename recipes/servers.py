"""The vLLM servers of an experiment: the model under test has one, and every local judge with a model of its own."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from esr_train.models import local_path
from esr_train.recipe import LocalJudgeSection, ModelSection, Recipe

if TYPE_CHECKING:
    from esr_train.steering.vllm.vllm_server import VllmServer

MEMORY = 0.9
"""Share of an accelerator's memory that several servers divide among them."""


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
                rows=engine.batch_rows,
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
        named = {each.model for each in (recipe.judge, *recipe.judges) if isinstance(each, LocalJudgeSection)}
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
            folder = local_path(arm.adapter) if arm.adapter else None
            if folder and (folder / "adapter_config.json").is_file():
                yield int(getattr(PeftConfig.from_pretrained(str(folder)), "r", 0))
            else:
                yield lora_config(self.recipe.for_arm(name)).r
