"""What a step is made of: the same global batch for any number of ranks, every sample once an
epoch, null samples.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import tiny_latents, tiny_recipe

from flowray.config.load import override_recipe
from flowray.flow.draws import Draws, null_partners
from flowray.losses.total import Batch
from flowray.model.text import load_text
from flowray.store.latents import load_latents
from flowray.train.group import Group
from flowray.train.step import BatchMaker

SIZE, SAMPLES = 8, 24
FIELDS = ("z1", "target", "noise", "t", "null")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return load_latents(tiny_latents(tmp_path_factory.mktemp("batches") / "latents", SAMPLES))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    overrides = {
        "train.batch_size": SIZE,
        "flow.null_probability": 0.4,
        "flow.time.kind": "logit_normal",
    }
    return tiny_recipe(tmp_path_factory.mktemp("recipe"), **overrides)


def ranks(recipe, latents, world: int, step: int) -> list[Batch]:
    return [
        BatchMaker(recipe, latents, Group(rank, world, torch.device("cpu")))(step)
        for rank in range(world)
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(recipe, latents, world):
    for step in (0, 1, 7, 1000):
        (alone,), parts = ranks(recipe, latents, 1, step), ranks(recipe, latents, world, step)
        assert [len(part.captions) for part in parts] == [SIZE // world] * world
        assert [text for part in parts for text in part.captions] == list(alone.captions)
        for field in FIELDS:
            assert torch.equal(
                torch.cat([getattr(part, field) for part in parts]), getattr(alone, field)
            ), field


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_are_disjoint_and_an_epoch_is_complete(recipe, latents, world):
    own = {
        round(float(mean.sum()), 4): i
        for i, mean in enumerate(latents.moments(np.arange(SAMPLES)).mean)
    }
    assert len(own) == SAMPLES
    caption_of = {text: i for i in range(SAMPLES) for text in latents.captions(i)}
    for epoch in range(2):
        seen = []
        for step in range(epoch * SAMPLES // SIZE, (epoch + 1) * SAMPLES // SIZE):
            batches = ranks(recipe, latents, world, step)
            per_rank = [[caption_of[text] for text in batch.captions] for batch in batches]
            assert len({i for indices in per_rank for i in indices}) == SIZE
            seen += [i for indices in per_rank for i in indices]
        assert sorted(seen) == list(range(SAMPLES))


def test_null_samples_aim_at_another_samples_latent_and_keep_their_own(recipe, latents):
    nulls = 0
    for step in range(12):
        (batch,) = ranks(recipe, latents, 1, step)
        maker = BatchMaker(recipe, latents, Group(0, 1, torch.device("cpu")))
        draws = Draws(recipe.seed, step, SIZE, slice(None), torch.device("cpu"))
        indices = maker.indices(step)
        _, partner = null_partners(
            draws.uniform_batch("null"), recipe.flow.null_probability, indices.tolist()
        )
        own = latents.scale.sample(
            latents.moments(indices), draws.normal("posterior", recipe.model.latent.shape)
        )
        assert torch.equal(batch.z1, own)  # captions, KL and semantic losses keep the true pair
        assert torch.equal(batch.target[~batch.null], own[~batch.null])
        for i in batch.null.nonzero().flatten().tolist():
            matches = [j for j in range(SIZE) if torch.equal(batch.target[i], own[j])]
            assert matches == [int(partner[i])]
            assert matches != [i]
        nulls += int(batch.null.sum())
    assert 0.2 < nulls / (12 * SIZE) < 0.6


def test_a_batch_that_straddles_two_epochs_pairs_no_sample_with_itself(latents, tmp_path):
    """20 of 24 samples a step: some stand twice in most batches."""
    recipe = tiny_recipe(tmp_path, **{"train.batch_size": 20, "flow.null_probability": 0.9})
    twice = 0
    for step in range(60):
        maker = BatchMaker(recipe, latents, Group(0, 1, torch.device("cpu")))
        indices, batch = maker.indices(step), maker(step)
        draws = Draws(recipe.seed, step, 20, slice(None), torch.device("cpu"))
        own = latents.scale.sample(
            latents.moments(indices), draws.normal("posterior", recipe.model.latent.shape)
        )
        for i in batch.null.nonzero().flatten().tolist():
            (place,) = [j for j in range(20) if torch.equal(batch.target[i], own[j])]
            assert indices[place] != indices[i], step
        twice += len(set(indices.tolist())) < 20
    assert twice > 20


def test_a_curriculum_changes_the_times_of_a_run_and_of_nothing_else(latents, recipe):
    stage = {"steps": 3, "time": {"kind": "alpha", "low": 0.8, "high": 1.0, "uniform_floor": 0.2}}
    staged = override_recipe(recipe, {"flow.curriculum": [stage]})
    for step in range(6):
        (plain,), (biased,) = ranks(recipe, latents, 1, step), ranks(staged, latents, 1, step)
        assert torch.equal(plain.target, biased.target)
        assert torch.equal(plain.t, biased.t) == (step >= 3)
    early = torch.cat([ranks(staged, latents, 1, step)[0].t for step in range(3)])
    assert float((early >= 0.8).float().mean()) > 0.6


def test_a_batch_comes_with_its_token_ids_kept(latents, recipe):
    group, text = Group(0, 1, torch.device("cpu")), load_text(recipe.model.text)
    batch = BatchMaker(recipe, latents, group, text.prompts)(3)
    plain = BatchMaker(recipe, latents, group)(3)
    assert list(batch.captions) == list(plain.captions)
    assert all(torch.equal(getattr(batch, field), getattr(plain, field)) for field in FIELDS)
    wanted = load_text(recipe.model.text).tokenize(batch.captions)
    ids, mask = _without_a_tokenizer(text, batch.captions)
    assert torch.equal(ids, wanted.ids)
    assert torch.equal(mask, wanted.mask)


def _without_a_tokenizer(text, captions):
    inner = text.prompts.inner
    text.prompts.inner = SimpleNamespace(
        pad_token_id=inner.pad_token_id, eos_token_id=inner.eos_token_id
    )
    return text.tokenize(captions)


def test_captions_and_noise_change_with_the_step_and_the_seed(recipe, latents):
    (first,), (later,) = ranks(recipe, latents, 1, 0), ranks(recipe, latents, 1, SAMPLES // SIZE)
    assert not torch.equal(first.noise, later.noise)
    (other,) = ranks(recipe.model_copy(update={"seed": 1}), latents, 1, 0)
    assert not torch.equal(first.noise, other.noise)
    assert list(first.captions) != list(other.captions)
