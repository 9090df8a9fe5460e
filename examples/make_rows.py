"""Make rows in which a model drifts off under steering and comes back: `python examples/make_rows.py`, a few seconds.

The model, SAE and prompts are the small ones of this repository, which know an invented language of 208 subjects.
"""

from data_gen import Context, SteerableLatent, generate_rows, read_cues
from esr_train import Sampling, load_model, load_sae, load_tokenizer, read_labels
from esr_train.recipe import SplitSection, SteeredSection
from esr_train.steering.transformers_engine import TransformersEngine
from eval.cells import make_pools, read_prompts
from eval.judging.lexical import LexicalJudge

ASSETS = "recipes/tiny/assets"
THRESHOLD = 0.9  # in residual norms, where a latent spoils answers; `esr eval calibrate` finds each one's own

model, tokenizer = load_model(f"{ASSETS}/llama", dtype="float32"), load_tokenizer(f"{ASSETS}/llama")
sae = load_sae(ASSETS, "llama-sae", model=model, tokenizer=tokenizer)
labels = read_labels(f"{ASSETS}/llama-sae/labels.jsonl")
prompts = make_pools(read_prompts(f"{ASSETS}/prompts.jsonl"), SplitSection())

# Latents that stand for topics of the training split, one for each: nothing that is evaluated gets into the rows.
latents = {label: latent for latent, label in labels.items() if prompts.topics.get(label) == "train"}

context = Context(
    engine=TransformersEngine(model, tokenizer),
    judge=LexicalJudge.from_file(f"{ASSETS}/vocabulary.json"),
    sampling=Sampling(temperature=0.6, max_new_tokens=96),
    positions="all",
    model="tiny llama",
    seed=0,
    tokenizer=tokenizer,
    prompts=prompts,
    latents=[SteerableLatent(sae.direction(latent, label=label), THRESHOLD) for label, latent in latents.items()],
    cues=read_cues("recipes/tiny/cues.txt"),
)
shape = SteeredSection(rows=4, start=(0, 3), cut=(1, 2), cut_words=(3, 12), mid_sentence=0.8, max_new_tokens=40)
for row in generate_rows("steered", shape, context):
    print(f"\n{row.prompt}  [steered towards {row.steering.label if row.steering else 'nothing'}]")
    for span in row.spans:
        print(f"  {span.kind:>9}: {span.text.strip()}")
