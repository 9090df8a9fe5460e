"""`esr sae train`: an SAE of a recipe's model, from the model's own conversations."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_gen.latents.latent_naming import LatentLabel
from data_gen.latents.sae_data import (
    REPLY_TOKENS,
    Reply,
    Text,
    ask_about,
    read_plain,
    read_states,
    sample_replies,
    to_read,
)
from data_gen.latents.sae_fitting import Quality, SaeSettings, fit, measure, saved_aside
from data_gen.latents.steering_labels import find_candidates, label_by_steering
from data_gen.prompted import SUBJECTS
from esr_train.errors import InputError
from esr_train.files import hold, read_rows, write_json
from esr_train.models import check_layer
from esr_train.provenance import git_state, hardware, model_hashes, sae_hashes, sha256, versions
from esr_train.recipe import Recipe
from esr_train.steering.direction_files import check_fits, load_sae
from esr_train.steering.readout import active_latents, measure_residual_norm
from eval.cells import read_prompts
from recipes.resources import Resources, located, open_resources

MORE_SUBJECTS = SUBJECTS.with_name("more-subjects.txt")
"""Everyday subjects beside the 96; none is a topic of the shipped prompts."""

CANDIDATES = 384
"""Latents that are steered unless the caller says how many."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Args:
        layer, width, active: see `SaeSettings`.
        tokens: states to train on.
        out: folder to write; it must not exist.
        subjects: files of subjects to ask about; none: the shipped ones.
    """

    command: str
    layer: int
    width: int
    active: int
    tokens: int
    out: Path
    subjects: tuple[str, ...]
    text: tuple[str, ...]

    @property
    def replies(self) -> Path:
        """Where the model's replies are kept, for another training and for `esr data labels`."""
        return self.out.with_name(f"{self.out.name}.replies.jsonl")


def make_sae(recipe: Recipe, asked: Wanted) -> Quality:
    """Train, measure and save an SAE; `training.json` beside its weights says how it was made and how good it is.

    Raises:
        InputError: a folder that exists, a layer that the model does not have, a subject that is a topic of the
            recipe's held-out prompts.
    """
    if asked.out.exists():
        raise InputError("the folder exists", str(asked.out), "Name another one; nothing was overwritten.")
    hold(asked.out.with_name(f".{asked.out.name}.lock"))
    with open_resources(recipe) as resources:
        plain = list(read_plain(map(located, asked.text)))
        replies = _replies(resources, asked)
        model, tokenizer = resources.base_model(), resources.tokenizer()
        check_layer(model, asked.layer, "--layer")
        texts = to_read(tokenizer, replies, plain, recipe.seed)
        rows = recipe.engine.chunk()
        states = read_states(model, tokenizer, texts, asked.layer, asked.tokens, rows, asked.out.parent)
        settings = SaeSettings(asked.layer, asked.width, asked.active, recipe.seed, recipe.model.path)
        trained = fit(states, settings, str(model.device))
        with saved_aside(trained.to("cpu"), asked.out) as aside:
            quality = measure(model, tokenizer, load_sae(str(aside)), texts, states.values)
            write_json(aside / "training.json", _told(recipe, asked, texts, replies, len(states.values), quality))
    return quality


def _replies(resources: Resources, asked: Wanted) -> list[Reply]:
    recipe = resources.recipe
    pools = resources.prompts() if recipe.prompts else None
    files = [located(file) for file in asked.subjects] or [SUBJECTS, MORE_SUBJECTS]
    subjects = list(dict.fromkeys(row.text for file in files for row in read_prompts(file, "subject")))
    topics = set(pools.topics) if pools else set()
    if shared := sorted(topics & set(subjects)):
        what = f"{shared[0]!r} is a topic of the recipe's prompts, of which some are held out"
        raise InputError(what, "--subjects", "Take it out of the subjects.")
    prompts = ask_about(pools.train if pools else (), subjects, recipe.seed)
    sampling = replace(resources.sampling(), max_new_tokens=REPLY_TOKENS)
    model = model_hashes(recipe.model)
    # Some are held out, and a text is read up to its end.
    wanted = asked.tokens * 11 // 10
    rows = recipe.engine.chunk()
    return sample_replies(
        resources.base(), resources.tokenizer(), model, prompts, sampling, wanted, asked.replies, rows
    )


def _told(
    recipe: Recipe, asked: Wanted, texts: Sequence[Text], replies: Sequence[Reply], states: int, quality: Quality
) -> dict[str, Any]:
    """JSON values of `training.json`."""
    held_out = sum(text.held_out for text in texts)
    return {
        "command": asked.command,
        "layer": asked.layer,
        "width": asked.width,
        "active": asked.active,
        "seed": recipe.seed,
        "states": states,
        "texts": {"replies": len(replies), "trained": len(texts) - held_out, "held_out": held_out},
        "files": {file: sha256(located(file)) for file in (*asked.subjects, *asked.text)},
        "quality": {**asdict(quality), "loss_recovered": quality.loss_recovered},
        "model": {"path": recipe.model.path, "files": model_hashes(recipe.model)},
        "code": git_state(),
        "versions": versions(),
        "hardware": hardware(),
    }


def label_sae(recipe: Recipe, texts: Path, column: str, latents: int | None, out: Path) -> list[LatentLabel]:
    """Label latents of the recipe's SAE by what they steer to (see `data_gen.latents.steering_labels`).

    Candidates are active on no prompt of the recipe, and no label is a topic of its prompts.

    Args:
        recipe: with model, SAE and prompts.
        texts: file whose rows have a `topic`, such as the replies that an SAE was trained on.
        latents: most candidates; None: 384.
        out: file of labels; what was read off is kept beside it.

    Raises:
        InputError: for a row without a topic, or if no latent can be labelled.
    """
    with open_resources(recipe) as resources:
        pools, sae, tokenizer = resources.prompts(), resources.sae(), resources.tokenizer()
        rows = [(str(row[column]), _topic(where, row)) for where, row in read_rows(texts, column)]
        subjects = [row for row in rows if row[1] not in pools.topics]
        model, at_once = resources.base_model(), recipe.engine.chunk()
        check_fits(sae, model)
        active = active_latents(model, tokenizer, sae, resources.rendered(pools.all_prompts), at_once)
        found = find_candidates(model, tokenizer, sae, subjects, active, latents or CANDIDATES, at_once)
        norm = measure_residual_norm(model, tokenizer, sae.layer)
        made_by = [model_hashes(recipe.model), sae_hashes(sae.ref.release, sae.ref.id), norm]
        readings = out.with_name(f"{out.stem}.steered.jsonl")
        return label_by_steering(resources.base(), sae, norm, found, pools.train, readings, made_by, recipe.seed)


def _topic(where: str, row: Mapping[str, Any]) -> str:
    topic = row.get("topic")
    if not isinstance(topic, str) or not topic.strip():
        raise InputError("the row has no 'topic'", where, "Name the replies of `esr sae train`, or add one.")
    return topic.strip()


def said(quality: Quality, asked: Wanted) -> str:
    """What the command prints at its end."""
    return (
        f"{asked.out}: {quality.variance_explained:.1%} of the variance explained, {quality.l0:.1f} latents active a "
        f"token, {quality.dead} of {asked.width} dead; spliced in, {quality.loss_recovered:.1%} of the loss is "
        f"recovered ({quality.loss_clean:.3f} clean, {quality.loss_spliced:.3f} spliced, {quality.loss_zeroed:.3f} "
        "nats a token zeroed)"
    )
