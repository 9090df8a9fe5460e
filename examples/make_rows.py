"""Make rows in which a model is steered off-topic, notices it and answers: on the shipped tiny model, in seconds.

python examples/make_rows.py
"""

from pathlib import Path

from data_gen import Context, SteerableLatent, generate_rows, read_cues
from esr_train.models import load_model, load_tokenizer
from esr_train.recipe import ModelSection, SplitSection, SteeredSection
from esr_train.steering.direction_files import load_sae
from esr_train.steering.engine import Sampling
from esr_train.steering.latent_labels import read_labels
from esr_train.steering.transformers_engine import TransformersEngine
from eval.cells import make_pools, read_prompts
from eval.judging.lexical import LexicalJudge

ASSETS = Path(__file__).resolve().parent.parent / "recipes" / "tiny" / "assets"
THRESHOLD = 0.9  # of every latent here, in median residual norms; `esr eval calibrate` finds each one's own

section = ModelSection(path=str(ASSETS / "llama"), dtype="float32", device="cpu")
model, tokenizer = load_model(section), load_tokenizer(section)
sae = load_sae(str(ASSETS), "llama-sae", model=model, tokenizer=tokenizer)
prompts = make_pools(read_prompts(ASSETS / "prompts.jsonl"), SplitSection())

# Latents that stand for topics of the training split: nothing that evaluation uses gets into the rows.
labels = read_labels(ASSETS / "llama-sae" / "labels.jsonl")
chosen = {label: latent for latent, label in labels.items() if prompts.topics.get(label) == "train"}
latents = [SteerableLatent(sae.direction(latent, label=label), THRESHOLD) for label, latent in chosen.items()]

context = Context(
    engine=TransformersEngine(model, tokenizer),
    judge=LexicalJudge.from_file(ASSETS / "vocabulary.json"),
    sampling=Sampling(temperature=0.6, max_new_tokens=96),
    positions="all",
    model="tiny llama",
    seed=0,
    tokenizer=tokenizer,
    prompts=prompts,
    latents=latents,
    cues=read_cues(str(ASSETS.parent / "cues.txt")),
)
shape = SteeredSection(rows=4, start=(0, 3), cut=(1, 2), cut_words=(3, 12), mid_sentence=0.8, max_new_tokens=40)
for row in generate_rows("steered", shape, context):
    print(f"\n{row.prompt}  [steered towards {row.steering.label}]" if row.steering else row.prompt)
    for span in row.spans:
        print(f"  {span.kind:>9}: {span.text.strip()}")
