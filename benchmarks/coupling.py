"""How often two arms with the same seed draw the same token, with noise in two levels and over the whole vocabulary.

    python benchmarks/coupling.py --model FOLDER

The two arms' distributions are a model's own next-token distributions, unsteered and under a push of a given size at
one layer, behind the first words of its replies. Sharing noise cannot do better than 1 - total variation; independent
noise is what arms without a common seed would draw.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LAYER, TEMPERATURE, CONTEXTS, DRAWS = 17, 0.6, 192, 50
PUSHES = (0.03, 0.1, 0.3)
"""In median residual norms."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model")
    options = parser.parse_args()
    print(
        "| push | total variation | two levels | whole vocabulary | independent | at most |\n|---|---|---|---|---|---|"
    )
    for push, (plain, steered) in pushed_logits(options.model).items():
        print(f"| {push} | " + " | ".join(f"{value:.3f}" for value in row(plain, steered)) + " |")


def pushed_logits(folder: str) -> dict[float, tuple[Any, Any]]:
    """Push -> unsteered and steered next-token logits, each [contexts, vocabulary]."""
    import torch

    from esr_train.files import read_jsonl
    from esr_train.models import load_model, load_tokenizer
    from esr_train.recipe import ModelSection
    from esr_train.steering.directions import Add
    from esr_train.steering.engine import Request, Sampling, encoded
    from esr_train.steering.hook import steering
    from esr_train.steering.readout import measure_residual_norm
    from esr_train.steering.transformers_engine import TransformersEngine

    section = ModelSection(path=folder, dtype="bfloat16", attn_implementation="eager", device="cpu")
    model, tokenizer = load_model(section), load_tokenizer(section)
    prompts = read_jsonl(ROOT / "data_gen" / "prompts" / "how-to.jsonl", lambda line: line["prompt"])
    asked = [Request(str(n), prompts[n % len(prompts)], seed=n) for n in range(CONTEXTS)]
    sampling = Sampling(temperature=TEMPERATURE, max_new_tokens=24)
    replies = TransformersEngine(model, tokenizer, batch_rows=48).generate(asked, sampling)
    texts = [
        [*encoded(tokenizer, request).ids, *reply.token_ids[: 1 + number % 20]]
        for number, (request, reply) in enumerate(zip(asked, replies, strict=True))
    ]
    norm = measure_residual_norm(model, tokenizer, LAYER, prompts[:32])

    def logits(push: float) -> Any:
        found = []
        for number, text in enumerate(texts):
            vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(number))
            add, ids = Add(LAYER, push * norm * vector / vector.norm()), torch.tensor([text])
            with steering(model, [(add,) if push else ()]) as hook, torch.no_grad():
                hook.set_rows(torch.zeros_like(ids))
                found.append(model(ids).logits[0, -1].float())
        return torch.stack(found)

    plain = logits(0.0)
    return {push: (plain, logits(push)) for push in PUSHES}


def row(plain: Any, steered: Any) -> list[float]:
    """Total variation, and the share of equal tokens in each way of drawing them."""
    import torch

    from esr_train.steering.engine import Sampling
    from esr_train.steering.sampling import next_tokens, row_seeds, uniforms

    sampling, steps = Sampling(temperature=TEMPERATURE), torch.zeros(len(plain), dtype=torch.int64)
    unused = torch.zeros(len(plain), 1, dtype=torch.int64)

    def whole(logits: Any, seeds: Any) -> Any:
        noise = -torch.log(-torch.log1p(-uniforms(seeds, steps, torch.arange(logits.shape[1])[None])))
        return (logits / TEMPERATURE + noise).argmax(-1)

    distance = 0.5 * ((plain / TEMPERATURE).softmax(-1) - (steered / TEMPERATURE).softmax(-1)).abs().sum(-1).mean()
    equal = torch.zeros(3)
    for draw in range(DRAWS):
        seeds = row_seeds([1000 * draw + number for number in range(len(plain))], "cpu")
        drawn = next_tokens(plain, unused, sampling, seeds, steps)
        others = (
            next_tokens(steered, unused, sampling, seeds, steps),
            next_tokens(steered, unused, sampling, seeds + 7_777_777, steps),
        )
        two, independent = ((drawn == other).float().mean() for other in others)
        equal += torch.stack([two, (whole(plain, seeds) == whole(steered, seeds)).float().mean(), independent]) / DRAWS
    return [float(distance), *map(float, equal), 1 - float(distance)]


if __name__ == "__main__":
    main()
