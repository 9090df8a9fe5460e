"""Memory and time of reading a whole dictionary in one pass, beside the bare forward pass of the same replies.

    python benchmarks/latents.py [--model FOLDER] [--rows 32] [--tokens 96] [--latents 16384 131072]

The SAE is a random JumpReLU SAE of the model's width that is active on about one latent in fifty; what its numbers
mean plays no part. Each size runs in a process of its own, and the passes alternate so that both meet the same load.
"""

import argparse
import resource
import subprocess
import sys
import time
from statistics import median

import numpy as np
import torch

from esr_train.models import load_model, load_tokenizer
from esr_train.recipe import ModelSection
from esr_train.steering.directions import LoadedSae
from esr_train.steering.engine import Request
from esr_train.steering.token_reading import peak_activations, with_reply
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.transcript import SaeRef

PASSES = 3
MIB = 1 << 20


def random_sae(width: int, latents: int, layer: int) -> LoadedSae:
    """A JumpReLU SAE with random weights."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=width, d_sae=latents))
    with torch.no_grad():
        sae.W_enc.normal_(std=width**-0.5)
        sae.b_enc.fill_(0.0)
        sae.threshold.fill_(2.0)
    return LoadedSae(SaeRef("random", str(latents)), layer, width, latents, sae.requires_grad_(False))


def peak() -> float:
    """The most memory this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def measure(model: str, rows: int, tokens: int, latents: int) -> None:
    """Print one row of the table."""
    section = ModelSection(path=model, device="cpu")
    network, tokenizer = load_model(section), load_tokenizer(section)
    engine = TransformersEngine(network, tokenizer, batch_rows=rows)
    ids = tokenizer.encode("What people ask for most is a short answer. " * tokens)[:tokens]
    requests, replies = [Request(str(n), "How do I fold a sheet?") for n in range(rows)], [ids] * rows
    whole = torch.tensor([with_reply(tokenizer, requests[0], ids)[0].ids] * rows)

    def bare() -> None:
        with torch.no_grad():
            network(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False, logits_to_keep=1)

    bare()
    before = peak()
    sae = random_sae(network.config.hidden_size, latents, network.config.num_hidden_layers // 2)
    peaks = np.zeros((rows, latents), np.float32)
    peak_activations(engine, requests[:1], replies[:1], sae, peaks)
    times: dict[str, list[float]] = {"bare": [], "read": []}
    for _ in range(PASSES):
        for name, run in (("bare", bare), ("read", lambda: peak_activations(engine, requests, replies, sae, peaks))):
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)
    alone, read = (rows * whole.shape[1] / median(values) for values in times.values())
    print(f"| {latents:,} | {alone:,.0f} | {read:,.0f} | {read / alone:.2f} | {peak() - before:,.0f} |", flush=True)


def main() -> int:
    """Print the table, each size from a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--latents", type=int, nargs="+", default=[16_384, 131_072])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.model, options.rows, options.tokens, options.one)
        return 0
    print("| latents | forward pass, tok/s | with the dictionary read, tok/s | ratio | MiB above the model |")
    print("|---|---|---|---|---|", flush=True)
    for latents in options.latents:
        subprocess.run([sys.executable, *sys.argv, "--one", str(latents)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
