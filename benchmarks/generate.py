"""What steering costs in generation: both engines, and the plain way of one hook and one row at a time.

    python benchmarks/generate.py                     writes results/generate.md
    python benchmarks/generate.py --rounds 3          shorter

Every variant generates the same number of tokens from the same prompts on the recipes' tiny Llama, greedily, and none
may stop early. Rounds are interleaved: each runs every variant once, so that a busy machine slows all of them alike.
vLLM takes part where it can be imported.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "generate.md"
STRENGTH = 0.8
"""In median residual norms."""


@dataclass(frozen=True)
class Variant:
    """One way to generate; `run` returns the tokens it has made, `base` is what its speed is held against."""

    name: str
    run: Callable[[], int]
    base: str


def main() -> None:
    """Run every variant in every round and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="requests in a batch")
    parser.add_argument("--alone", type=int, default=8, help="of them, how many are run one at a time")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of every request")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    load = os.getloadavg()[0]
    variants, shape = prepared(options)
    seconds = measured(variants, options.rounds)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(page(variants, seconds, shape, options, load), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def prepared(options: argparse.Namespace) -> tuple[list[Variant], str]:
    """The variants, model loaded, and the model's shape in words."""
    import torch

    import recipes.tiny
    from esr_train.models import load_model, load_tokenizer
    from esr_train.sections.world import ModelSection
    from esr_train.steering.engine import Request, Sampling
    from esr_train.steering.sae import load_sae, residual_norm
    from esr_train.steering.transformers_engine import TransformersEngine
    from esr_train.transcript import SaeRef

    assets = Path(recipes.tiny.__file__).parent / "assets"
    section = ModelSection(path=str(assets / "llama"), dtype="float32", attn_implementation="eager", device="cpu")
    tokenizer, model = load_tokenizer(section), load_model(section)
    texts = [json.loads(line)["prompt"] for line in (assets / "prompts.jsonl").read_text("utf-8").splitlines()]
    texts = texts[: options.rows]
    sae = load_sae(SaeRef(str(assets), "llama-sae"))
    norm = residual_norm(model, tokenizer, texts[:32], sae.layer)
    directions = [sae.direction(number % sae.n_latents, norm) for number in range(len(texts))]
    plain = [Request(str(number), text) for number, text in enumerate(texts)]
    steered = [
        replace(each, interventions=(direction.add(STRENGTH),))
        for each, direction in zip(plain, directions, strict=True)
    ]
    sampling = Sampling(temperature=0, max_new_tokens=options.tokens)
    engine = TransformersEngine(model, tokenizer, batch_rows=options.rows)
    engine._stop_ids = frozenset()
    variants = [
        Variant("transformers, unsteered", lambda: made(engine.generate(plain, sampling)), "transformers, unsteered"),
        Variant(
            "transformers, steered, a direction per row",
            lambda: made(engine.generate(steered, sampling)),
            "transformers, unsteered",
        ),
        Variant(
            "transformers, steered, one row at a time (plain hook, `model.generate`)",
            lambda: one_at_a_time(model, tokenizer, steered[: options.alone], options.tokens),
            "transformers, steered, a direction per row",
        ),
    ]
    if importlib.util.find_spec("vllm"):
        variants += of_vllm(section, tokenizer, plain, steered, sampling)
    config, parameters = model.config, sum(each.numel() for each in model.parameters())
    shape = (
        f"{parameters / 1e6:.1f} M parameters, {config.num_hidden_layers} layers, {config.hidden_size} wide, float32, "
        f"torch on {torch.get_num_threads()} thread(s)"
    )
    return variants, shape


def of_vllm(section: Any, tokenizer: Any, plain: Sequence[Any], steered: Sequence[Any], sampling: Any) -> list[Variant]:
    """The variants on vLLM, which is started here."""
    from esr_train.steering.vllm_engine import VllmEngine
    from esr_train.steering.vllm_server import VllmServer

    class Endless(VllmEngine):
        """Goes on behind an end of turn."""

        def _params(self, *arguments: Any) -> Any:
            params = super()._params(*arguments)
            params.ignore_eos, params.stop_token_ids = True, []
            return params

    engine = Endless(VllmServer(section, rows=len(plain)), tokenizer)
    return [
        Variant("vLLM, unsteered", lambda: made(engine.generate(plain, sampling)), "vLLM, unsteered"),
        Variant(
            "vLLM, steered, a direction per row", lambda: made(engine.generate(steered, sampling)), "vLLM, unsteered"
        ),
    ]


def made(completions: Sequence[Any]) -> int:
    """Generated tokens."""
    return sum(len(completion.token_ids) for completion in completions)


def one_at_a_time(model: Any, tokenizer: Any, requests: Sequence[Any], tokens: int) -> int:
    """What is usually done: a hook that adds one vector, and `model.generate` for one prompt after the other."""
    import torch

    from esr_train.chat import encode_prompt
    from esr_train.models import decoder_layers

    total = 0
    for request in requests:
        (add,) = request.interventions
        ids = torch.tensor([encode_prompt(tokenizer, request.prompt, None, "")[0]])
        hook = decoder_layers(model)[add.layer].register_forward_hook(adding(add.vector))
        try:
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
            )
        finally:
            hook.remove()
        total += out.shape[1] - ids.shape[1]
    return total


def adding(vector: Any) -> Callable[..., Any]:
    """A forward hook that adds a vector to a decoder layer's output."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    return hook


Seconds = dict[str, list[tuple[float, float]]]
"""For each variant and round: seconds and processor seconds for one token."""


def measured(variants: Sequence[Variant], rounds: int) -> Seconds:
    """One round to warm up, then `rounds` of them, every other one in reverse order."""
    found: Seconds = {variant.name: [] for variant in variants}
    for number in range(rounds + 1):
        for variant in variants if number % 2 else reversed(variants):
            clock, processor = time.perf_counter(), time.process_time()
            tokens = variant.run()
            spent = (time.perf_counter() - clock) / tokens, (time.process_time() - processor) / tokens
            if number:
                found[variant.name].append(spent)
            print(f"round {number}: {variant.name}: {1 / spent[0]:,.0f} tok/s", file=sys.stderr)
    return found


def ratio(seconds: Seconds, variant: Variant, clock: int) -> float:
    """Median over the rounds of the variant's speed as a share of its base's in the same round."""
    pairs = zip(seconds[variant.base], seconds[variant.name], strict=True)
    return statistics.median(base[clock] / own[clock] for base, own in pairs)


def page(variants: Sequence[Variant], seconds: Seconds, shape: str, options: argparse.Namespace, load: float) -> str:
    """The result as Markdown."""
    from esr_train.provenance import versions

    lines = [
        "# Generation speed, steered and not",
        "",
        f"`python benchmarks/generate.py --rows {options.rows} --alone {options.alone} --tokens {options.tokens} "
        f"--rounds {options.rounds}`",
        "",
        f"{options.rows} prompts x {options.tokens} new tokens, greedy, in one batch; one at a time: the first "
        f"{options.alone} of them. recipes/tiny/assets/llama: {shape}. Medians of {options.rounds} interleaved rounds; "
        "a ratio is the median of the rounds' own ratios. Processor time is what the process itself computed: other "
        "load on the machine is not in it.",
        "",
        "| variant | tok/s | speed as a share of | ratio | ratio in processor time |",
        "|---|---|---|---|---|",
    ]
    for variant in variants:
        rate = 1 / statistics.median(clock for clock, _ in seconds[variant.name])
        compared = (
            ("", "", "")
            if variant.base == variant.name
            else (variant.base, f"{ratio(seconds, variant, 0):.3f}", f"{ratio(seconds, variant, 1):.3f}")
        )
        lines.append(f"| {variant.name} | {rate:,.0f} | {' | '.join(compared)} |")
    if not any("vLLM" in variant.name for variant in variants):
        lines += ["", "vLLM was not installed here."]
    kinds = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    lines += [
        "",
        "Goals: steered at least 0.97 of unsteered in the same engine; one row at a time at most 0.125 of the batch.",
        "",
        f"CPU, {os.cpu_count()} cores; load average {load:.1f} at the beginning, {os.getloadavg()[0]:.1f} at the end. "
        f"{kinds}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
