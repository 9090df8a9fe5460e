"""Steer a model by one latent of an SAE: `python examples/steer.py`, a few seconds on a CPU.

The model and SAE are the small ones of this repository, which know an invented language of 208 subjects. For a real
one, name it: `load_model("google/gemma-2-9b-it")`, `load_sae("gemma-scope-9b-it-res-canonical", "…")`.
"""

from esr_train import generate, load_model, load_sae, load_tokenizer, read_labels, steer

ASSETS = "recipes/tiny/assets"
PROMPT = "Explain how to shape the loaf with the flour."

model, tokenizer = load_model(f"{ASSETS}/llama", dtype="float32"), load_tokenizer(f"{ASSETS}/llama")
sae = load_sae(ASSETS, "llama-sae", model=model, tokenizer=tokenizer)
labels = read_labels(f"{ASSETS}/llama-sae/labels.jsonl")
latent = next(latent for latent, label in labels.items() if label == "jazz")
direction = sae.direction(latent, label=labels[latent])

# One line a reply: rendered by the chat template, greedy, every row under its own steering.
for strength in (0.0, 0.5, 1.0):
    (reply,) = generate(model, tokenizer, PROMPT, direction.add(strength))
    print(f"{direction.label} at {strength} residual norms ({reply.steered_tokens} tokens steered): {reply.text}\n")

# The same around transformers' own `generate`, which knows nothing of steering.
messages = [{"role": "user", "content": PROMPT}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with steer(model, direction.add(0.5)) as steered:
    output = model.generate(**inputs.to(model.device), max_new_tokens=128, do_sample=False)
print(f"generate() under {steered.tokens[0]} steered tokens:", tokenizer.decode(output[0], skip_special_tokens=True))
