"""Reading at the tokens of replies, held against plain hooks; `test_vllm_engine.py` holds vLLM to the same."""

import pytest
import torch

from esr_train.errors import InputError, RunError
from esr_train.models import decoder_layers, load_model, load_tokenizer
from esr_train.recipe import ModelSection
from esr_train.steering.direction_files import load_sae
from esr_train.steering.directions import Add
from esr_train.steering.engine import Request, Sampling
from esr_train.steering.hook import SteeringHook
from esr_train.steering.token_reading import Activations, Projections, Reader, States, open_states, store_states
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.template import encode_prompt
from esr_train.transcript import SaeRef
from eval.beginnings import sums_of
from eval.detectors import Detector, Detectors, DetectorSet
from tests.conftest import ASSETS

GREEDY = Sampling(temperature=0, max_new_tokens=12)
PROMPTS = ("How do I fold a fitted sheet?", "Which rope holds best?", "How do I bake bread at home, from the start?")


class World:
    """A tiny model, its SAE, and requests that are steered each in its own way."""

    def __init__(self, name: str) -> None:
        section = ModelSection(path=str(ASSETS / name), dtype="float32", device="cpu")
        self.model, self.tokenizer = load_model(section), load_tokenizer(section)
        self.sae = load_sae(SaeRef(str(ASSETS), f"{name}-sae"))
        self.engine = TransformersEngine(self.model, self.tokenizer, batch_rows=2)
        direction, layer = self.sae.direction(7, 20.0), self.sae.layer
        steerings = ((), (direction.add(0.8, "generated"),), (direction.add(0.5), Add(layer - 1, direction.unit * 9)))
        self.requests = [
            Request(str(n), prompt, interventions=steering)
            for n, (prompt, steering) in enumerate(zip(PROMPTS, steerings, strict=True))
        ]

    def naive(self, request: Request, ids: list[int], start: int, layer: int) -> torch.Tensor:
        """States [positions, d_model] of one row under plain hooks."""

        def adding(add):
            def hook(_, __, output):
                output = output.clone()
                output[:, 0 if add.positions == "all" else start :] += add.vector
                return output

            return decoder_layers(self.model)[add.layer].register_forward_hook(hook)

        handles, kept = [adding(add) for add in request.interventions], []
        handles.append(decoder_layers(self.model)[layer].register_forward_hook(lambda _, __, out: kept.append(out[0])))
        with torch.no_grad():
            self.model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        return kept[0]


@pytest.fixture(scope="module", params=["llama", "gemma"])
def world(request, assets):
    return World(request.param)


def test_every_probe_reads_at_every_token_of_a_generated_reply_under_the_rows_own_steering(world):
    replies = [completion.token_ids for completion in world.engine.generate(world.requests, GREEDY)]
    directions = torch.randn(2, world.sae.d_model, generator=torch.Generator().manual_seed(0))
    probes = [Activations(world.sae, (7, 3)), Projections(0, directions), States(world.sae.layer), States(0)]
    found = list(world.engine.read(world.requests, replies, probes))
    assert isinstance(world.engine, Reader)
    for request, reply, (latents, projected, states, first) in zip(world.requests, replies, found, strict=True):
        ids, start = encode_prompt(world.tokenizer, request.prompt)
        there, early = (world.naive(request, [*ids, *reply], start, at)[start:] for at in (world.sae.layer, 0))
        torch.testing.assert_close(states, there, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(first, early, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(latents, world.sae.encode(there)[:, [7, 3]], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(projected, early @ directions.T, atol=1e-3, rtol=1e-3)


def test_what_detectors_make_of_a_text_is_the_sum_of_each_one_s_strongest_activation(world):
    sets = [
        DetectorSet(contrast, tuple(map(detector, latents)), None, (), (), (), 0, 0)
        for contrast, latents in (("off_topic", (7, 3)), ("steered", ()))
    ]
    detectors, texts = Detectors("r", "i", world.sae.layer, tuple(sets)), ["Fold it.", "Knead it.", "Dust the bread."]
    found = sums_of(world.engine, world.sae, detectors, world.requests, texts)
    read = world.engine.read(world.requests, texts, [Activations(world.sae, (7, 3))])
    assert [{"off_topic": pytest.approx(float(values.amax(0).sum()))} for (values,) in read] == found


def detector(latent: int) -> Detector:
    return Detector(latent, str(latent), *[0.0] * 8, 0, (0.0, 0.0))


def test_the_pass_ends_behind_the_last_layer_that_is_read_or_steered(world):
    ran = []
    modules = decoder_layers(world.model)
    handles = [
        module.register_forward_hook(lambda *_, number=number: ran.append(number), prepend=True)
        for number, module in enumerate(modules)
    ]
    for request, last in zip(world.requests[:2], (0, world.sae.layer), strict=True):
        ran.clear()
        list(world.engine.read([request], [" Wait."], [States(0)]))
        assert ran == list(range(last + 1))
    for handle in handles:
        handle.remove()


def test_a_given_text_is_read_behind_the_prefix_with_steering_or_without(world):
    request = Request("a", PROMPTS[0], prefix="Start by", interventions=world.requests[1].interventions)
    off = Request("a", PROMPTS[0], prefix="Start by")
    text, probe = " smoothing the sheet.", States(world.sae.layer)
    (steered,), (plain,) = (next(world.engine.read([each], [text], [probe])) for each in (request, off))
    ids, start = encode_prompt(world.tokenizer, PROMPTS[0], None, "Start by" + text)
    begun = len(encode_prompt(world.tokenizer, PROMPTS[0], None, "Start by")[0])
    torch.testing.assert_close(steered, world.naive(request, ids, start, probe.layer)[begun:], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(plain, world.naive(off, ids, start, probe.layer)[begun:], atol=1e-3, rtol=1e-3)
    assert (steered - plain).norm() > 1


def test_states_of_many_replies_go_into_a_file_that_is_mapped(world, tmp_path):
    replies = [" Wait.", " Start by folding it.", " Knead the dough and wait."]
    stored = store_states(world.engine, world.requests, replies, 0, tmp_path / "deep" / "states.bin")
    again = open_states(tmp_path / "deep" / "states.bin")
    wanted = [states for (states,) in world.engine.read(world.requests, replies, [States(0)])]
    assert stored.starts == again.starts
    assert stored.starts[-1] == sum(map(len, wanted))
    for number, states in enumerate(wanted):
        assert torch.equal(torch.from_numpy(again.of(number).copy()), states)


def test_states_that_were_not_written_to_their_end_are_not_opened(world, tmp_path):
    path = tmp_path / "states.bin"
    store_states(world.engine, world.requests, [" Wait."] * 3, 0, path)
    with pytest.raises(InputError, match="there is no layer 99"):
        store_states(world.engine, world.requests, [" Wait."] * 3, 99, path)
    with pytest.raises(InputError, match=r"states\.bin\.json"):
        open_states(path)


def test_what_cannot_be_read_is_refused_by_name(world):
    request = world.requests[0]
    with pytest.raises(InputError, match="there is no latent"):
        Activations(world.sae, (world.sae.n_latents,))
    with pytest.raises(InputError, match="does not fit a residual stream"):
        next(world.engine.read([request], [" Wait."], [Projections(0, torch.ones(1, 3))]))
    with pytest.raises(InputError, match="empty reply"):
        next(world.engine.read([request], [""], [States(0)]))


def test_a_reply_that_was_not_steered_as_asked_is_an_error(world, monkeypatch):
    monkeypatch.setattr(SteeringHook, "__enter__", lambda self: self)
    with pytest.raises(RunError, match="steered 0 tokens"):
        list(world.engine.read(world.requests, [" Wait."] * 3, [States(0)]))
