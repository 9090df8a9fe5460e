"""Our training against plain TRL: same transcripts, same model, same LoRA, same rows in a step, one thread each.

    python benchmarks/train.py                  every variant, each in a process of its own; writes results/train.md
    python benchmarks/train.py --rows 64        smaller
    python benchmarks/train.py --before TREE [--rounds 3]
                                                with live injection: this tree against another checkout of the project
                                                and plain TRL, in alternation; printed
    python benchmarks/train.py --before TREE --model FOLDER --data FILE.jsonl
                                                the same with a real model (bfloat16) on its own rows
    python benchmarks/train.py --model FOLDER --data FILE.jsonl
                                                plain TRL against ours with live injection and without, in alternation

Plain TRL is `SFTTrainer` with its defaults and prompt-completion masking. To have the same objective, ours trains the
whole reply (`train.loss: unmasked`) in the first rows of the table; the last row masks the detours, as our recipes do.
"""

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, os.environ.get("TRAINED_TREE", str(ROOT)))
RESULTS = ROOT / "benchmarks" / "results" / "train.md"
MAX_LENGTH, ROWS_OF_A_STEP, LAYER = 1024, 8, 2
VOCABULARY = 4096
LORA = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
WORDS = """the a of to in and is on with for it that this then from by at as you your add take put hold cut fold turn
slowly gently well first next last before after until water oil salt dough rope sail knife board paper glue wood nail
paint brush sand soil seed leaf root stem stone wheel chain brake pump light lens film scale chord beat tune page line
word note proof sum line angle circle ratio force mass heat steam ice wind cloud rain river hill road map coin price
loan bond share yarn hook stitch seam cloth thread needle clay kiln glaze bowl plate spoon bread crust yeast""".split()  # noqa: SIM905

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl": ("plain TRL (defaults, prompt-completion masking)", {}),
    "grouped": ("ours, rows of like length together (our default)", {}),
    "random": ("ours, rows in random order", {"train_sampling_strategy": "random"}),
    "packed": ("ours, packed", {"packing": True, "per_device_train_batch_size": 2}),
    "live": ("ours, rows of like length, live injection", {"live": True}),
    "masked": ("ours, rows of like length, detours masked", {"loss": "masked"}),
}


def main() -> None:
    """Run every variant and write the table, or run the one that is named and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, help="folder of a real model")
    parser.add_argument("--data", type=Path, help="its training rows (with --model)")
    parser.add_argument("--before", type=Path, help="another checkout of the project")
    parser.add_argument("--rounds", type=int, default=3, help="with --before or --model")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure_real(options) if options.model else measure(options)))
        return
    if options.before or options.model:
        print(alternate(options))
        return
    load = os.getloadavg()
    found = {name: in_process(name, options, ROOT) for name in VARIANTS}
    RESULTS.parent.mkdir(exist_ok=True)
    # Sections behind the page are of other runs.
    _, heading, sections = RESULTS.read_text(encoding="utf-8").partition("\n## ") if RESULTS.exists() else ("",) * 3
    RESULTS.write_text(page(found, options, load, os.getloadavg()) + heading + sections, encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def in_process(name: str, options: argparse.Namespace, tree: Path) -> dict[str, float]:
    """A variant's figures with a checkout's code, in a process of its own so that its peak memory is its own."""
    threads = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    arguments = ["--variant", name, "--rows", str(options.rows), "--epochs", str(options.epochs)]
    if options.model:
        arguments += ["--model", str(options.model.resolve()), "--data", str(options.data.resolve())]
    command = [sys.executable, __file__, *arguments]
    paths = {"PYTHONPATH": str(tree), "TRAINED_TREE": str(tree)}
    done = subprocess.run(command, env={**os.environ, **threads, **paths}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Train one variant: real tokens a second, seconds, peak memory above the start's, held-out loss."""
    variant, rows, epochs = options.variant, options.rows, options.epochs
    with tempfile.TemporaryDirectory() as folder, processor_time() as spent:
        os.chdir(folder)
        kept = transcripts(rows + 32)
        write_world(kept)
        training, held_out = kept[:rows], kept[rows:]
        before = memory()
        run = train_trl if variant == "trl" else train_ours
        seconds, model = run(training, variant, epochs)
        peak = memory() - before
        tokens = sum(lengths(training)) * epochs
        return {
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "cpu": spent[0],
            "peak_gib": peak,
            "loss": loss_on(model, held_out, "unmasked"),
            "loss_masked": loss_on(model, held_out, "masked"),
            "tokens": tokens,
            "longest": max(lengths(training)),
            "mean": tokens / epochs / rows,
        }


@contextmanager
def processor_time() -> Iterator[list[float]]:
    """Collects the processor seconds of every training loop, which other work on the machine disturbs least."""
    from transformers import Trainer

    spent: list[float] = []
    train = Trainer.train

    def timed(*arguments: Any, **options: Any) -> Any:
        begun = time.process_time()
        result = train(*arguments, **options)
        spent.append(time.process_time() - begun)
        return result

    Trainer.train = timed
    yield spent


def alternate(options: argparse.Namespace) -> str:
    """Plain TRL, and two checkouts or our two ways, in turn, as a Markdown table: medians, and the ratios' range."""
    before = options.before.resolve() if options.before else None
    ours = (
        {"before": ("live", before), "after": ("live", ROOT)}
        if before
        else {"ours": ("grouped", ROOT), "ours, live injection": ("live", ROOT)}
    )
    compared, bases = {"plain TRL": ("trl", ROOT), **ours}, (["before"] if before else []) + ["plain TRL"]
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(options.rounds):
        rounds.append({})
        for name, (variant, tree) in compared.items():
            rounds[-1][name] = in_process(variant, options, tree)
            print(name, rounds[-1][name], f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    against = " | ".join(f"against {base}" for base in bases)
    lines = [
        f"| variant | real tokens/s | {against} | processor seconds | the same, {against} | peak memory (GiB) "
        "| held-out loss |",
        f"|---|---|{'---|' * 2 * len(bases)}---|---|---|",
    ]
    for name in compared:
        speeds = [each[name]["tokens_per_second"] for each in rounds]
        speed, cpu = (
            " | ".join(ratio_range([(each[name][key] / each[base][key]) ** sign for each in rounds]) for base in bases)
            for key, sign in (("tokens_per_second", 1), ("cpu", -1))
        )
        middle = [statistics.median(each[name][key] for each in rounds) for key in ("cpu", "peak_gib", "loss")]
        lines.append(
            f"| {name} | {statistics.median(speeds):,.0f} | {speed} | {middle[0]:,.0f} | {cpu} | {middle[1]:.2f} "
            f"| {middle[2]:.3f} |"
        )
    return "\n".join(lines)


def ratio_range(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def measure_real(options: argparse.Namespace) -> dict[str, float]:
    """Train one variant on a real model's own rows; figures as `measure`'s, and the loop's seconds of the processor."""
    from esr_train.transcript import read_transcripts

    rows = read_transcripts(options.data)
    training, held_out = rows[: options.rows], rows[-16:]
    REAL.update(path=str(options.model), dtype="bfloat16", attn_implementation="eager")
    COMMON.update(gradient_checkpointing=False, learning_rate=1e-3)
    with tempfile.TemporaryDirectory() as folder, processor_time() as spent:
        os.chdir(folder)
        before = memory()
        run = train_trl if options.variant == "trl" else train_ours
        seconds, model = run(training, options.variant, 1)
        peak, tokens = memory() - before, sum(lengths(training))
        loss = loss_on(model, held_out, "unmasked")
    return {"tokens_per_second": tokens / seconds, "seconds": seconds, "cpu": spent[0], "peak_gib": peak, "loss": loss}


def memory() -> float:
    """The most this process has held so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def transcripts(rows: int) -> list[Any]:
    """Half self-correction rows, half normal ones, with the wide spread of lengths that answers have."""
    from esr_train.transcript import SaeRef, Span, SpanKind, Steering, Strength, Transcript

    rng = random.Random(0)
    made = []
    for number in range(rows):
        answer = Span(SpanKind.ANSWER, text(rng, median=130))
        prompt = f"{text(rng, median=12)}?"
        if number % 2:
            made.append(Transcript(f"n{number}", prompt, (answer,), "normal"))
            continue
        detour = Span(SpanKind.OFF_TOPIC, text(rng, median=60))
        cue = Span(SpanKind.CUE, " Wait, that is not right. ")
        steering = Steering(SaeRef("saes", "first"), LAYER, number % 8, None, Strength(raw=1.0, norm=1.0))
        made.append(Transcript(f"s{number}", prompt, (detour, cue, answer), "steered", steering=steering))
    return made


def text(rng: random.Random, median: float) -> str:
    """Sentences whose number of words is log-normal; common words come first in the list and are drawn more often."""
    count = min(max(int(median * math.exp(rng.gauss(0, 0.8))), 3), 600)
    words = rng.choices(WORDS, [1 / (place + 2) for place in range(len(WORDS))], k=count)
    return " ".join(word + ("." if place % 11 == 10 else "") for place, word in enumerate(words)).strip()


def write_world(rows: list[Any]) -> None:
    """Model and tokenizer with random weights, an SAE, and the training file, in the current directory."""
    import torch
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    from tools.tiny_world.tokenizer import build_tokenizer

    tokenizer = build_tokenizer([row.content for row in rows], "llama", vocab_size=600)
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4}
    special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **shape, **special))
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=256, d_sae=8))
    sae.W_dec.data = 0.1 * torch.randn_like(sae.W_dec)
    sae.cfg.metadata.hook_name = f"blocks.{LAYER}.hook_resid_post"
    sae.save_model("saes/first")


def recipe(variant: str, epochs: int) -> Any:
    """Ours as a recipe; checkpointing on and the learning rate as in plain TRL's run."""
    from esr_train.recipe import Recipe

    extra = dict(VARIANTS[variant][1])
    live, loss = extra.pop("live", False), extra.pop("loss", "unmasked")
    args = {
        "per_device_train_batch_size": ROWS_OF_A_STEP,
        "gradient_accumulation_steps": 1,
        **COMMON,
        "num_train_epochs": epochs,
        **extra,
    }
    train = {"args": args, "lora": LORA, "max_length": MAX_LENGTH, "loss": loss}
    model = {"path": "model", "dtype": "float32", "attn_implementation": "sdpa", "device": "cpu", **REAL}
    return Recipe.model_validate(
        {"name": "bench", "model": model, "train": {**train, **({"live": {}} if live else {})}}
    )


REAL: dict[str, str] = {}
"""What a real model's run says of the model instead."""

COMMON: dict[str, Any] = {
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "gradient_checkpointing": True,
    "save_strategy": "no",
    "report_to": "none",
}
"""The same for both: TRL checkpoints gradients by default, too."""


def train_ours(rows: list[Any], variant: str, epochs: int) -> tuple[float, Any]:
    """Train with this project; seconds of the training loop and the model."""
    from esr_train.adapters import load_adapter
    from esr_train.models import load_model
    from esr_train.training.trainer import train
    from esr_train.transcript import write_transcripts

    section = recipe(variant, epochs)
    write_transcripts(Path("runs/bench/data/tuned.jsonl"), rows)
    folder = train(section, "tuned", section.directory)
    log = json.loads((folder / "training_log.json").read_text())
    return log[-1]["train_runtime"], load_adapter(load_model(section.model), folder)


def train_trl(rows: list[Any], variant: str, epochs: int) -> tuple[float, Any]:
    """Train with plain TRL: conversational prompt and completion, everything else at its default."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    said = [{"prompt": turn("user", row.prompt), "completion": turn("assistant", row.content)} for row in rows]
    common = {**COMMON, "max_length": MAX_LENGTH, "per_device_train_batch_size": ROWS_OF_A_STEP}
    section = recipe("grouped", epochs).model
    half = section.dtype == "bfloat16"
    loading = {"dtype": section.dtype, "attn_implementation": section.attn_implementation} if REAL else None
    options = {"use_cpu": True, "bf16": half, "disable_tqdm": True, "model_init_kwargs": loading}
    args = SFTConfig("trl", num_train_epochs=epochs, **options, **common)
    lora = LoraConfig(task_type="CAUSAL_LM", **LORA)
    trainer = SFTTrainer(section.path, args=args, train_dataset=Dataset.from_list(said), peft_config=lora)
    seconds = trainer.train().metrics["train_runtime"]
    return seconds, trainer.model.eval()


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def labelled(rows: list[Any], policy: Any) -> list[Any]:
    from esr_train.masking import label
    from esr_train.models import load_tokenizer

    tokenizer = load_tokenizer(recipe("grouped", 1).model)
    return [label(tokenizer, row, policy) for row in rows]


def lengths(rows: list[Any]) -> list[int]:
    """Real tokens of every row."""
    return [len(row.input_ids) for row in labelled(rows, "unmasked")]


def loss_on(model: Any, rows: list[Any], policy: str) -> float:
    """Mean loss of a trained token of rows nobody trained on."""
    import torch

    total = count = 0.0
    with torch.no_grad():
        for row in labelled(rows, policy):
            ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
            trained = int((labels[:, 1:] != -100).sum())
            total += model(input_ids=ids, labels=labels).loss.item() * trained
            count += trained
    return total / count


def page(found: dict[str, dict[str, float]], options: argparse.Namespace, before: Any, after: Any) -> str:
    """The result as Markdown."""
    from esr_train.provenance import versions

    plain = found["trl"]
    lines = [
        "# Training speed against plain TRL",
        "",
        f"`python benchmarks/train.py --rows {options.rows} --epochs {options.epochs} --threads {options.threads}`",
        "",
        f"{options.rows} transcripts, {plain['tokens'] / options.epochs:,.0f} tokens "
        f"(mean {plain['mean']:.0f}, longest {plain['longest']:.0f}). A Llama of 6 layers, 256 wide, vocabulary "
        f"{VOCABULARY}, random weights, float32, LoRA r 16, {ROWS_OF_A_STEP} rows in a step (packed: 2 sequences of at "
        f"most {MAX_LENGTH} tokens), gradient checkpointing on. Real tokens: padding does not count. Peak memory "
        "is what the process held above what it held before training. Held-out loss: 32 rows, the whole reply | from "
        "the cue on.",
        "",
        "| variant | real tokens/s | against plain TRL | peak memory (GiB) | held-out loss |",
        "|---|---|---|---|---|",
    ]
    for name, figures in found.items():
        ratio = figures["tokens_per_second"] / plain["tokens_per_second"]
        losses = f"{figures['loss']:.3f} \\| {figures['loss_masked']:.3f}"
        lines.append(
            f"| {VARIANTS[name][0]} | {figures['tokens_per_second']:,.0f} | {ratio:.2f} x "
            f"| {figures['peak_gib']:.2f} | {losses} |"
        )
    kinds = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    lines += [
        "",
        f"CPU, {options.threads} thread(s) of {os.cpu_count()}; load average {before[0]:.1f} at the beginning, "
        f"{after[0]:.1f} at the end. {kinds}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
