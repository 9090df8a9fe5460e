"""What steering costs in generation: both engines, and the plain way of one hook and one row at a time.

    python benchmarks/generate.py                     writes results/generate.md
    python benchmarks/generate.py --rounds 3          shorter
    python benchmarks/generate.py --model FOLDER      on a real model, bfloat16, along random directions; printed

Every variant generates the same number of tokens from the same prompts on the recipes' tiny Llama, greedily unless it
says otherwise, and none may stop early. Rounds are interleaved: each runs every variant once, so that a busy machine
slows all of them alike. vLLM and other libraries that steer (`others.py`) take part where they can be imported.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "generate.md"
ASSETS = ROOT / "recipes" / "tiny" / "assets"
STRENGTH, MODERATE = 0.8, 0.4
"""In median residual norms: of the tiny model's latents, of a real model's random directions."""
TEMPERATURE = 0.6


@dataclass(frozen=True)
class Variant:
    """One way to do the work; `run` returns how much it has done, `base` is what its speed is held against."""

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
    parser.add_argument("--model", type=Path, help="folder of a real model")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    load = os.getloadavg()[0]
    variants, shape, remarks = prepared(options)
    seconds = measured(variants, options.rounds)
    if options.model:
        print(page(variants, seconds, shape, remarks, options, load))
        return
    # Sections behind the page are of other runs.
    _, heading, sections = RESULTS.read_text(encoding="utf-8").partition("\n## ")
    made_page = page(variants, seconds, shape, remarks, options, load)
    RESULTS.write_text(made_page + heading + sections, encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def prepared(options: argparse.Namespace) -> tuple[list[Variant], str, list[str]]:
    """The variants, model loaded; the model's shape in words, and what is to be said about the variants."""
    import torch

    from esr_train.models import load_model, load_tokenizer
    from esr_train.recipe import ModelSection
    from esr_train.steering.engine import Request, Sampling
    from esr_train.steering.transformers_engine import TransformersEngine

    path, dtype = (options.model.resolve(), "bfloat16") if options.model else (ASSETS / "llama", "float32")
    section = ModelSection(path=str(path), dtype=dtype, attn_implementation="eager", device="cpu")
    tokenizer, model = load_tokenizer(section), load_model(section)
    texts, pushes = (real if options.model else tiny)(model, tokenizer, options.rows)
    plain = [Request(str(number), text) for number, text in enumerate(texts)]
    steered = [replace(each, interventions=(push,)) for each, push in zip(plain, pushes, strict=True)]
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
            lambda: in_turn(model, tokenizer, [(each, options.tokens) for each in steered[: options.alone]]),
            "transformers, steered, a direction per row",
        ),
    ]
    # vLLM first: nnsight gives every object a method `save`, at which a vLLM that starts later takes offence.
    has_vllm = importlib.util.find_spec("vllm") is not None
    on_vllm = of_vllm(section, tokenizer, plain, steered, sampling) if has_vllm else []
    ours = [list(completion.token_ids) for completion in engine.generate(steered, sampling)]
    others, remarks = of_others(section, tokenizer, steered, ours, options)
    variants += others + on_vllm
    if not has_vllm:
        remarks.append("vLLM was not installed here.")
    config, parameters = model.config, sum(each.numel() for each in model.parameters())
    shape = (
        f"{parameters / 1e6:.1f} M parameters, {config.num_hidden_layers} layers, {config.hidden_size} wide, {dtype}, "
        f"torch on {torch.get_num_threads()} thread(s)"
    )
    return variants, shape, remarks


def tiny(model: Any, tokenizer: Any, rows: int) -> tuple[list[str], list[Any]]:
    """Prompts of the tiny world, and for each what its latent adds."""
    from esr_train.files import read_jsonl
    from esr_train.steering.direction_files import load_sae
    from esr_train.steering.readout import measure_residual_norm
    from esr_train.transcript import SaeRef

    texts = read_jsonl(ASSETS / "prompts.jsonl", lambda row: row["prompt"])[:rows]
    sae = load_sae(SaeRef(str(ASSETS), "llama-sae"))
    norm = measure_residual_norm(model, tokenizer, sae.layer, texts[:32])
    return texts, [sae.direction(number % sae.n_latents, norm).add(STRENGTH) for number in range(len(texts))]


def real(model: Any, tokenizer: Any, rows: int) -> tuple[list[str], list[Any]]:
    """How-to questions, and for each what a random direction of its own adds at the middle layer."""
    import torch

    from esr_train.files import read_jsonl
    from esr_train.models import hidden_size
    from esr_train.steering.directions import Add
    from esr_train.steering.readout import measure_residual_norm

    texts = read_jsonl(ROOT / "data_gen" / "prompts" / "how-to.jsonl", lambda row: row["prompt"])[:rows]
    layer = model.config.num_hidden_layers // 2
    norm = measure_residual_norm(model, tokenizer, layer, texts[:32])
    drawn = torch.randn(len(texts), hidden_size(model), generator=torch.Generator().manual_seed(0))
    return texts, [Add(layer, MODERATE * norm * each / each.norm()) for each in drawn]


def of_others(
    section: Any, tokenizer: Any, steered: Sequence[Any], ours: Sequence[list[int]], options: argparse.Namespace
) -> tuple[list[Variant], list[str]]:
    """The variants in other libraries, and for each a sentence: which tokens it makes, or why it cannot."""
    from importlib.metadata import PackageNotFoundError, version

    from benchmarks.others import LIBRARIES, Batch
    from esr_train.models import load_model

    variants, remarks = [], []
    for package, name, make, batched in LIBRARIES:
        chosen = list(steered if batched else steered[: options.alone])
        try:
            found = f"{package} {version(package)}"
            model = load_model(section)
            run = make(section.path, model, tokenizer, Batch(tokenizer, chosen, model.dtype), options.tokens)
            made = run()
        except PackageNotFoundError:
            remarks.append(f"{package} was not installed here.")
            continue
        except Exception as error:
            remarks.append(f"{found} cannot run here: {type(error).__name__}: {str(error).splitlines()[0][:200]}.")
            continue
        # Up to our end of turn: the others are kept from choosing it, to generate on.
        ends = [row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row) for row in ours]
        same = sum(a[:end] == b[:end] for a, b, end in zip(made, ours, ends, strict=False))
        remarks.append(f"{found}, {name.partition(', ')[2]}: {same} of {len(chosen)} rows have our engine's tokens.")
        variants.append(Variant(name, partial(tokens_of, run), "transformers, steered, a direction per row"))
    return variants, remarks


def tokens_of(run: Callable[[], list[list[int]]]) -> int:
    """Run; how many tokens that made."""
    return sum(map(len, run()))


def of_vllm(section: Any, tokenizer: Any, plain: Sequence[Any], steered: Sequence[Any], sampling: Any) -> list[Variant]:
    """The variants on vLLM, which is started here."""
    import esr_train.steering.vllm.vllm_engine as ours
    from esr_train.steering.vllm.vllm_server import VllmServer

    chosen = ours._params
    ours._params = lambda *arguments: endless(chosen(*arguments))
    server = VllmServer(section, rows=len(plain))
    engine = ours.VllmEngine(server, tokenizer)
    server.start()
    drawn = replace(sampling, temperature=TEMPERATURE)
    stock, prompts = stock_vllm(server), [prompt_ids(tokenizer, each) for each in plain]
    alike = "vLLM as it comes, unsteered, sampled with a seed per row"
    return [
        Variant("vLLM, unsteered", lambda: made(engine.generate(plain, sampling)), "vLLM, unsteered"),
        Variant(
            "vLLM, steered, a direction per row", lambda: made(engine.generate(steered, sampling)), "vLLM, unsteered"
        ),
        Variant(alike, lambda: as_it_comes(stock, prompts, drawn), alike),
        Variant("vLLM, steered, a direction per row, sampled", lambda: made(engine.generate(steered, drawn)), alike),
    ]


def endless(params: Any) -> Any:
    """Sampling parameters with which a row goes on behind an end of turn."""
    params.ignore_eos, params.stop_token_ids = True, []
    return params


def stock_vllm(server: Any) -> Any:
    """A second vLLM with the same settings but for what steers and what draws tokens."""
    from vllm import LLM

    added = ("worker_extension_cls", "logits_processors")
    return LLM(**{key: value for key, value in server._arguments().items() if key not in added})


def prompt_ids(tokenizer: Any, request: Any) -> list[int]:
    """A request's prompt as the model reads it."""
    from esr_train.template import encode_prompt

    ids: list[int] = encode_prompt(tokenizer, request.prompt, None, "")[0]
    return ids


def as_it_comes(llm: Any, prompts: Sequence[list[int]], sampling: Any) -> int:
    """Generate with vLLM's own seeded sampling; how many tokens that made."""
    from vllm import SamplingParams

    asked = {"temperature": sampling.temperature, "max_tokens": sampling.max_new_tokens, "detokenize": False}
    params = [endless(SamplingParams(seed=number, **asked)) for number in range(len(prompts))]
    done = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return sum(len(each.outputs[0].token_ids) for each in done)


def made(completions: Sequence[Any]) -> int:
    """Generated tokens."""
    return sum(len(completion.token_ids) for completion in completions)


def in_turn(model: Any, tokenizer: Any, asked: Sequence[tuple[Any, int]], rows: int = 1, **sampling: Any) -> int:
    """What is usually done: a hook that adds one vector, and `model.generate`; returns the generated tokens.

    Args:
        model: of transformers.
        tokenizer: the model's.
        asked: requests and how many tokens each is to get.
        rows: of one batch; they all get the first one's vector, and as many tokens as the longest.
        sampling: of `model.generate`.
    """
    return sum(
        _together(model, tokenizer, asked[start : start + rows], sampling) for start in range(0, len(asked), rows)
    )


def _together(model: Any, tokenizer: Any, asked: Sequence[tuple[Any, int]], sampling: dict[str, Any]) -> int:
    import torch

    from esr_train.models import decoder_layers
    from esr_train.template import encode_prompt

    prompts = [encode_prompt(tokenizer, request.prompt, None, request.prefix)[0] for request, _ in asked]
    width, tokens = max(map(len, prompts)), max(count for _, count in asked)
    ids = torch.tensor([[prompt[0]] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    hooks = [
        decoder_layers(model)[add.layer].register_forward_hook(adding(add.vector)) for add in asked[0][0].interventions
    ]
    try:
        model.generate(
            ids,
            attention_mask=mask,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            **{"do_sample": False, **sampling},
        )
    finally:
        for hook in hooks:
            hook.remove()
    return sum(count for _, count in asked)


def adding(vector: Any) -> Callable[..., Any]:
    """A forward hook that adds a vector to a decoder layer's output."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        added = states + vector.to(states.dtype)
        return (added, *output[1:]) if isinstance(output, tuple) else added

    return hook


Seconds = dict[str, list[tuple[float, float]]]
"""For each variant and round: seconds and processor seconds for one unit of work, such as a token."""


def measured(variants: Sequence[Variant], rounds: int, unit: str = "tok") -> Seconds:
    """One round to warm up, then `rounds` of them, every other one in reverse order."""
    found: Seconds = {variant.name: [] for variant in variants}
    for number in range(rounds + 1):
        for variant in variants if number % 2 else reversed(variants):
            clock, processor = time.perf_counter(), time.process_time()
            done = variant.run()
            spent = (time.perf_counter() - clock) / done, (time.process_time() - processor) / done
            if number:
                found[variant.name].append(spent)
            print(f"round {number}: {variant.name}: {1 / spent[0]:,.1f} {unit}/s", file=sys.stderr)
    return found


def ratio(seconds: Seconds, variant: Variant, clock: int) -> float:
    """Median over the rounds of the variant's speed as a share of its base's in the same round."""
    pairs = zip(seconds[variant.base], seconds[variant.name], strict=True)
    return statistics.median(base[clock] / own[clock] for base, own in pairs)


def circumstances(load: float) -> str:
    """Where and with what it was measured; `load` is the load average at the beginning."""
    from esr_train.provenance import versions

    kinds = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    ends = f"load average {load:.1f} at the beginning, {os.getloadavg()[0]:.1f} at the end"
    return f"CPU, {os.cpu_count()} cores; {ends}. {kinds}."


def page(
    variants: Sequence[Variant],
    seconds: Seconds,
    shape: str,
    remarks: Sequence[str],
    options: argparse.Namespace,
    load: float,
) -> str:
    """The result as Markdown."""
    name = options.model.name if options.model else "recipes/tiny/assets/llama"
    lines = [
        "# Generation speed, steered and not",
        "",
        f"`python benchmarks/generate.py --rows {options.rows} --alone {options.alone} --tokens {options.tokens} "
        f"--rounds {options.rounds}`",
        "",
        f"{options.rows} prompts x {options.tokens} new tokens, greedy, in one batch; one at a time: the first "
        f"{options.alone} of them. {name}: {shape}. Medians of {options.rounds} interleaved rounds; "
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
    lines += ["", *(f"- {remark}" for remark in remarks)]
    lines += [
        "",
        "Goals: steered at least 0.97 of unsteered in the same engine; one row at a time at most 0.125 of the batch; "
        "vLLM steered and sampled at least 0.95 of vLLM as it comes.",
        "",
        circumstances(load),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
