"""Judge a few responses and get rates with intervals that know which of them were steered by the same latent.

python examples/measure.py
"""

from eval import LexicalJudge, cluster_interval, esr_rate, judge_responses

# Counts words of topics: exact and free. A language model judges anything: judge_responses("openai/gpt-…", …).
judge = LexicalJudge({"laundry": ["fold", "sheet", "corner", "wash"], "baking": ["dough", "knead", "oven", "flour"]})
prompt = "How do I fold a sheet?"
responses = [  # the latent that steered the response, and the response
    (7, "Knead the dough well. Wait, that is not what you asked. Fold the sheet corner to corner."),
    (7, "Knead the dough. Let it rest by the oven."),
    (7, "Heat the oven. Wait, that's wrong. Dust the flour over it."),
    (12, "Fold the sheet in half, corner on corner."),
    (12, "Sift the flour. Sorry, I got off track. Wash the sheet and fold it."),
    (31, "Dust the flour over the dough."),
    (31, "Fold the sheet. Wait, let me start over. Knead the dough."),
    (31, "Knead the dough."),
]

judged = judge_responses(judge, [prompt] * len(responses), [text for _, text in responses])
for (latent, text), judgement in zip(responses, judged, strict=True):
    scores = ", ".join(f"{attempt.score:.0f}" for attempt in judgement.attempts)
    print(f"latent {latent:2}: attempts score {scores:>8}   {text[:60]}")

# What the judge failed on counts nowhere; trials of one latent are alike, so the interval resamples whole latents.
scored = [(latent, judgement) for (latent, _), judgement in zip(responses, judged, strict=True) if not judgement.error]
latents = [latent for latent, _ in scored]
restarts = [len(judgement.attempts) > 1 for _, judgement in scored]
first, last = ([judgement.attempts[at].score for _, judgement in scored] for at in (0, -1))
worse = [end < start for start, end in zip(first, last, strict=True)]

print(f"\nESR {esr_rate(judged):.0%} of {len(scored)} responses")
for name, values in {"restart": restarts, "worse": worse, "first score": first, "last score": last}.items():
    low, high = cluster_interval(values, latents, bounds=(0, 100))
    print(f"{name:>12} {sum(values) / len(values):6.2f}   95 % interval {low:.2f} to {high:.2f}")
