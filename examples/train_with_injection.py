"""Live injection in a TRL script of your own: `python examples/train_with_injection.py`, seconds on a CPU.

Every row's own steering is active in its forward and backward pass: the model learns to come back while it is steered.
"""

from tempfile import gettempdir

from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from esr_train import Span, SpanKind, Transcript, load_model, load_sae, load_tokenizer
from esr_train.recipe import LiveSection
from esr_train.training.batches import Collator
from esr_train.training.dataset import singly, table, to_dataset, training_row
from esr_train.training.injection import LiveInjection, load_vectors
from esr_train.transcript import Steering

ASSETS = "recipes/tiny/assets"
model, tokenizer = load_model(f"{ASSETS}/llama", dtype="float32"), load_tokenizer(f"{ASSETS}/llama")
sae = load_sae(ASSETS, "llama-sae", model=model, tokenizer=tokenizer)

# Rows as `esr data generate` makes them; here by hand, each steered by another latent at 0.9 residual norms.
spans = (
    Span(SpanKind.OFF_TOPIC, "First, knead the dough and dust the flour."),
    Span(SpanKind.CUE, " Wait, that's not right."),
    Span(SpanKind.ANSWER, " Start by tucking one corner into the other."),
)
rows = []
for latent in range(8):
    steering = Steering(sae.ref, sae.layer, latent, None, sae.direction(latent).strength(0.9))
    row = Transcript(f"row-{latent}", "How do you fold a fitted sheet?", spans, "steered", steering=steering)
    rows.append(training_row(tokenizer, row))

sources = table(rows)
live = LiveInjection(LiveSection(strength=(0.8, 1.3)), load_vectors(sources), sae.layer, seed=0)


class SteeredTrainer(SFTTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        with live.steering(model, inputs, epoch=int(self.state.epoch or 0)):
            return super().training_step(model, inputs, num_items_in_batch)


args = SFTConfig(
    gettempdir(),
    max_steps=6,
    learning_rate=2e-3,
    logging_steps=1,
    save_strategy="no",
    bf16=False,
    use_cpu=True,
    remove_unused_columns=False,
    dataset_kwargs={"skip_prepare_dataset": True},
)
lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
dataset, collator = to_dataset(singly(rows), sources), Collator(tokenizer.pad_token_id)
trainer = SteeredTrainer(model, args, collator, dataset, processing_class=tokenizer, peft_config=lora)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss under each row's own steering: {losses[0]:.2f} at the first step, {losses[-1]:.2f} at the last")
