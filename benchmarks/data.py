"""What batches save when rows are generated: many latents and strengths in one forward, against one at a time.

    python benchmarks/data.py                     prints a table in Markdown
    python benchmarks/data.py --rounds 3          shorter

Ours is the whole of `esr data generate` for the quickstart's steered rows: it draws, steers, cuts, judges, corrects,
filters, and writes to disk. The plain ways only generate: the detours and answers of the first of those candidates,
each as long as it came out there, with a hook that adds one vector, and `model.generate`. Rounds are interleaved.
Thresholds are not calibrated but all the same.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from generate import ROOT, Seconds, Variant, circumstances, in_turn, measured, ratio

THRESHOLD = 0.9
"""Of every latent, in median residual norms: about the quickstart's median."""
GOAL = 8


@dataclass
class Recorder:
    """An engine that notes what it was asked and how many tokens each answer had."""

    engine: Any
    name: str = "recorder"
    asked: list[tuple[Any, int]] = field(default_factory=list)

    def generate(self, requests: Sequence[Any], sampling: Any, progress: Any = None) -> list[Any]:
        """As the engine."""
        completions = self.engine.generate(requests, sampling, progress)
        self.asked += [(each, len(done.token_ids)) for each, done in zip(requests, completions, strict=True)]
        return list(completions)


def main() -> None:
    """Run every variant in every round and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96, help="kept rows of a round")
    parser.add_argument("--alone", type=int, default=8, help="candidates that are generated in the plain ways")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    variants, tokens, shape = prepared(options)
    print(page(variants, tokens, measured(variants, options.rounds, "candidates"), shape, options, load))


def prepared(options: argparse.Namespace) -> tuple[list[Variant], list[float], str]:
    """The variants, the tokens that each generates for a candidate, and the work in words."""
    import torch

    torch.set_num_threads(options.threads)
    from data_gen.collect import collect
    from data_gen.sources import Context, SteerableLatent, read_cues
    from data_gen.steered import steered
    from recipes.experiment import read_recipe
    from recipes.resources import Resources

    recipe = read_recipe(ROOT / "recipes" / "tiny" / "quickstart.yaml")
    resources, section, chunk = Resources(recipe), recipe.data.steered, recipe.engine.batch_rows
    sae, prompts, norm = resources.sae(), resources.prompts(), resources.residual_norm()
    # The first latent of each label that is a topic of the training split, as the recipe would choose.
    labels = {label: latent for latent, label in reversed(resources.labels().items())}
    chosen = {label: latent for label, latent in labels.items() if prompts.topics.get(label) == "train"}
    latents = [SteerableLatent(sae.direction(latent, norm, label), THRESHOLD) for label, latent in chosen.items()]
    context = Context(
        engine=resources.base(),
        judge=resources.judge(),
        sampling=resources.sampling(),
        positions="all",
        model=recipe.model.path,
        seed=recipe.seed,
        tokenizer=resources.tokenizer(),
        prompts=prompts,
        latents=latents,
        cues=read_cues(recipe.data.cues),
    )
    recorder = Recorder(context.engine)

    def candidates(used: Context) -> int:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "candidates.jsonl"
            found = collect("steered", options.rows, steered(used, section), path, chunk)
        return sum(found.funnel.values()) + sum(found.surplus.values())

    whole = candidates(replace(context, engine=recorder)), sum(tokens for _, tokens in recorder.asked)
    recorder.asked.clear()
    steered(replace(context, engine=recorder), section)(range(options.alone))
    detours = [each for each in recorder.asked if each[0].interventions]
    others = [each for each in recorder.asked if not each[0].interventions]
    few = sum(tokens for _, tokens in recorder.asked) / options.alone
    drawn = {"do_sample": True, "temperature": recipe.sampling.temperature}
    model, tokenizer = resources.base_model(), resources.tokenizer()

    def plain(rows: int) -> int:
        for part in (detours, others):
            in_turn(model, tokenizer, part, rows, **drawn)
        return options.alone

    ours = "`esr data generate`"
    variants = [
        Variant(ours, lambda: candidates(context), ours),
        Variant("one latent and row at a time (plain hook, `model.generate`)", lambda: plain(1), ours),
        Variant("one latent at a time, 8 of its rows in a batch", lambda: plain(8), ours),
    ]
    shape = (
        f"{whole[0]} candidates in chunks of {chunk}, {len({each.direction.latent for each in latents})} latents, "
        f"{len(prompts.train)} prompts, {options.rows} rows wanted. recipes/tiny/assets/llama, float32, "
        f"torch on {torch.get_num_threads()} thread(s)"
    )
    return variants, [whole[1] / whole[0], few, few], shape


def page(
    variants: Sequence[Variant],
    tokens: Sequence[float],
    seconds: Seconds,
    shape: str,
    options: argparse.Namespace,
    load: float,
) -> str:
    """The result as Markdown."""
    lines = [
        f"`python benchmarks/data.py --rows {options.rows} --alone {options.alone} --threads {options.threads} "
        f"--rounds {options.rounds}`",
        "",
        f"{shape}; plain ways: the starts, detours and answers of the first {options.alone} candidates, as long as "
        f"they came out in ours. Medians of {options.rounds} interleaved rounds; a ratio is the median of the rounds' "
        "own ratios. Processor time is what the process itself computed: other load on the machine is not in it.",
        "",
        "| variant | tokens of a candidate | candidates/s | ours is faster by | in processor time |",
        "|---|---|---|---|---|",
    ]
    for variant, length in zip(variants, tokens, strict=True):
        rate = 1 / statistics.median(clock for clock, _ in seconds[variant.name])
        compared = variant.base != variant.name
        faster = [f"{1 / ratio(seconds, variant, clock):.1f} x" if compared else "" for clock in (0, 1)]
        lines.append(f"| {variant.name} | {length:.0f} | {rate:.1f} | {' | '.join(faster)} |")
    return "\n".join([*lines, "", f"Goal: {GOAL} x. {circumstances(load)}"])


if __name__ == "__main__":
    sys.exit(main())
