"""Parts and inputs that are cut off, of a tiny run: the number that says so, and no other's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support import tiny_recipe
from torch import Tensor

from flowray.config.flow import AlphaTime, LogitNormalTime, LogSNRTime, UniformTime
from flowray.doctor import parts as parts_module
from flowray.doctor.parts import parts_rows
from flowray.doctor.sampler import latent_metrics, opened_metrics
from flowray.doctor.subject import Subject, open_subject
from flowray.findings.diagnose import diagnose
from flowray.findings.rules_parts import PARTS as RULES
from flowray.flow.draws import Draws
from flowray.flow.time import training_times
from flowray.losses import total
from flowray.model import assemble, dit
from flowray.model.condition import PooledCaption
from flowray.model.dimr import TimeVector
from flowray.model.dit import DiT, DiTBlock
from flowray.model.heads import Grid
from flowray.model.levels import TimeEmbedding
from flowray.model.posterior import Posterior
from flowray.model.semantic import SmallTower
from flowray.model.text import CausalQueries
from flowray.probes.battery import make_probe_batch
from flowray.probes.untouched import untouched
from flowray.sample import restore
from flowray.store.found import find_checkpoint
from flowray.store.run import RunDirectory
from flowray.train import step as step_module
from flowray.train.group import Group
from flowray.train.loop import train

STEPS = 24
LONG = {
    "train.steps": STEPS,
    "train.probe_every": STEPS,
    "train.sample_every": STEPS,
    "train.checkpoint_every": STEPS,
    "loss.clip.weight": 0.3,
    "optim.lr": 3e-3,
}
KINDS = {
    "text": {},
    "adaln": {
        "model.velocity.condition": {"kind": "adaln"},
        "model.source": {"kind": "noise"},
        "loss.clip.weight": 0.0,
        "loss.kl.weight": 0.0,
    },
    "dimr": {"model.velocity": {"kind": "dimr", "widths": [16, 16], "depths": [3, 3], "heads": 2}},
    "bf16": {"train.precision": "bf16"},
    "bf16_velocity_fp32": {"train.precision": "bf16", "train.velocity_fp32": True},
    # the flow loss trains the queries by the condition alone, and the head not at all
    "by_condition": {
        "model.velocity.condition": {"kind": "adaln"},
        "loss.flow.source_grad": "none",
    },
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def subjects(home: Path) -> Callable[[str], Subject]:
    made: dict[str, Subject] = {}

    def of(kind: str) -> Subject:
        if kind not in made:
            recipe = tiny_recipe(home, name=kind, **{**LONG, **KINDS[kind]})
            run = RunDirectory(Path(recipe.storage_path) / kind)
            train(recipe, run, Group(0, 1, torch.device("cpu")), lambda row: None)
            made[kind] = open_subject(find_checkpoint(run.path))
        return made[kind]

    return of


def named(subject: Subject) -> tuple[list[str], dict[str, float]]:
    with untouched(subject.model):
        rows, least = parts_rows(subject, 8)
    found = diagnose(
        rows, {"step": subject.step, "null_probability": 0.1, "least": least}, (), RULES
    )
    return [finding.id for finding in found if finding.explained_by is None], rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_run_has_every_part_taking_part(
    kind: str, subjects: Callable[[str], Subject]
) -> None:
    subject = subjects(kind)
    before = {name: p.detach().clone() for name, p in subject.parameters.items()}
    found, rows = named(subject)
    assert found == [], rows
    asked = {key.split("/")[1] for key in rows if key.startswith("part/")}
    assert {"queries", "patches", "time", "null", "blocks", "output"} <= asked
    assert ("caption" in asked) == (kind in ("adaln", "by_condition"))
    assert ("tower" in asked) == ("head" in asked) == (kind != "adaln")
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in subject.parameters.items())
    assert not {"levels", "source"} & {*vars(subject.model), *vars(subject.model.velocity)}


def of(owner: Any, name: str, make: Callable[[Any], Any]) -> AbstractContextManager[Any]:
    return patch.object(owner, name, make(getattr(owner, name)))


def without_gradient(original: Any) -> Any:
    def call(*inputs: Any) -> Any:
        with torch.no_grad():
            return original(*inputs)

    return call


def zeroed(original: Any) -> Any:
    return lambda *inputs: torch.zeros_like(original(*inputs))


def first_of(stream: str) -> Callable[[Any], Any]:
    """Every sample has the first one's draws."""

    def make(original: Any) -> Any:
        def normal(self: Draws, name: str, shape: tuple[int, ...]) -> Tensor:
            made = original(self, name, shape)
            return made[:1].expand_as(made).clone() if name == stream else made

        return normal

    return make


def unmoving(stream: str) -> Callable[[Any], Any]:
    """Every step has the first one's draws."""
    return lambda original: (
        lambda self, name, shape: original(
            replace(self, step=0) if name == stream else self, name, shape
        )
    )


@contextmanager
def gates_shut() -> Iterator[None]:
    def make(original: Any) -> Any:
        def forward(self: DiTBlock, x: Tensor, condition: Tensor, *caption: Tensor) -> Tensor:
            with of(type(self.modulation), "forward", gateless):
                return original(self, x, condition, *caption)

        return forward

    def gateless(original: Any) -> Any:
        def linear(self: Any, x: Tensor) -> Tensor:
            made = original(self, x)
            if self.out_features != 6 * self.in_features:
                return made
            return torch.cat(
                [
                    torch.zeros_like(y) if i in (2, 5) else y
                    for i, y in enumerate(made.chunk(6, -1))
                ],
                dim=-1,
            )

        return linear

    with of(DiTBlock, "forward", make):
        yield


def places_lost(original: Any) -> Any:
    def levels(self: DiT, *inputs: Any) -> Any:
        with patch.object(self, "positions", torch.zeros_like(self.positions)):
            return original(self, *inputs)

    return levels


def only_last_block(original: Any) -> Any:
    """A block cut off from those before it."""

    def forward(self: DiTBlock, x: Tensor, *others: Tensor) -> Tensor:
        return original(self, x.detach(), *others)

    return forward


BUGS: dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {
    "queries_idle": ("text", lambda: of(CausalQueries, "forward", without_gradient)),
    "head_idle": (
        "text",
        lambda: of(Posterior, "sample", lambda old: lambda self, noise: old(self, noise).detach()),
    ),
    "head_idle, no gradient at all": ("text", lambda: of(Grid, "forward", without_gradient)),
    "mu_idle": (
        "text",
        lambda: of(
            assemble,
            "make_posterior",
            lambda old: lambda config, mu, *others: old(config, mu.detach(), *others),
        ),
    ),
    "patches_unheard": (
        "text",
        lambda: of(
            dit, "attention", lambda old: lambda q, k, v, heads: old(q, k[:, :2], v[:, :2], heads)
        ),
    ),
    "tower_idle": (
        "text",
        lambda: of(
            SmallTower,
            "forward",
            lambda old: lambda *inputs: (lambda text, image: (text, image.detach()))(*old(*inputs)),
        ),
    ),
    "time_unused": ("text", lambda: of(TimeEmbedding, "forward", zeroed)),
    "time_unused, dimr": (
        "dimr",
        lambda: of(
            TimeVector,
            "forward",
            lambda old: lambda self, tau, like: old(self, torch.zeros_like(tau), like),
        ),
    ),
    "time_frozen": ("text", lambda: of(total, "time_code", lambda old: lambda t: old(0 * t))),
    "time_frozen, from step to step": (
        "adaln",
        lambda: of(
            step_module,
            "training_times",
            lambda old: lambda config, u: old(config, torch.linspace(0, 0.99, len(u))),
        ),
    ),
    "block_idle": ("text", lambda: of(DiTBlock, "forward", only_last_block)),
    "block_idle, skipped": (
        "text",
        lambda: of(DiTBlock, "forward", lambda old: lambda self, x, *others: x),
    ),
    "block_idle, its gates shut": ("text", gates_shut),
    "positions_unused": ("text", lambda: of(DiT, "levels", places_lost)),
    "noise_shared": ("text", lambda: of(Draws, "normal", first_of("source"))),
    "noise_frozen": ("adaln", lambda: of(Draws, "normal", unmoving("source"))),
    "noise_unused": (
        "text",
        lambda: of(Posterior, "sample", lambda _: lambda self, noise: self.mean),
    ),
    "caption_idle": ("adaln", lambda: of(PooledCaption, "forward", zeroed)),
    "null_misdrawn": (
        "text",
        lambda: of(
            step_module,
            "null_partners",
            lambda _: lambda u, share, samples: (u < 0, torch.arange(len(u))),
        ),
    ),
    "null_unused": (
        "text",
        lambda: of(
            torch.nn.Embedding,
            "forward",
            lambda old: (
                lambda self, i: old(self, 0 * i) if self.num_embeddings == 2 else old(self, i)
            ),
        ),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_what_is_cut_off_is_named_first(name: str, subjects: Callable[[str], Subject]) -> None:
    kind, bug = BUGS[name]
    subject = subjects(kind)
    with bug():
        found, rows = named(subject)
    assert found[:1] == [name.split(",")[0]], rows


def test_sampling_opens_the_weights_that_training_kept(subjects: Callable[[str], Subject]) -> None:
    subject = subjects("text")
    assert opened_metrics(subject) == {"seam/weights": 0.0}

    def headless(old: Any) -> Any:
        def copy(found: Any, parameters: dict[str, Any], tensors: dict[str, Tensor]) -> None:
            fresh = {name: p.detach().clone() for name, p in parameters.items()}
            old(found, parameters, {n: fresh[n] if "head." in n else x for n, x in tensors.items()})

        return copy

    with of(restore, "copy_found", headless):
        assert opened_metrics(subject)["seam/weights"] > 0.01


def test_few_steps_paint_other_pictures(subjects: Callable[[str], Subject]) -> None:
    subject = subjects("text")
    batch = make_probe_batch(subject.recipe, subject.held_out, subject.device, subject.latents)
    source = subject.model.source(batch.captions, batch.noise)
    one, many = (
        latent_metrics(
            subject.model, subject.recipe.sample.model_copy(update={"steps": n}), batch, source
        )[0]["sampler/coarse"]
        for n in (1, 64)
    )
    assert one > 20 * many


def test_a_part_that_only_decays_has_not_moved(subjects: Callable[[str], Subject]) -> None:
    subject = subjects("text")
    assert subject.initial is not None
    held = "velocity.patch_in."
    shrunk = {
        name: p.detach() * 1.01 if name.startswith(held) else x
        for (name, p), x in zip(subject.parameters.items(), subject.initial.values(), strict=True)
    }
    found, rows = named(replace(subject, initial=shrunk))
    assert found[:1] == ["patches_idle"]
    assert rows["part/patches/moved"] < 1e-6


def test_a_frozen_part_is_named(subjects: Callable[[str], Subject]) -> None:
    """With requires_grad off it is not among what trains, nor in the checkpoint."""
    subject = subjects("text")
    queries = subject.model.text.queries
    assert subject.initial is not None
    trained = {name: x for name, x in subject.initial.items() if name != "text.queries"}
    queries.requires_grad_(False)
    try:
        assert named(replace(subject, initial=trained))[0][:1] == ["queries_idle"]
    finally:
        queries.requires_grad_(True)


def test_what_a_recipe_leaves_out_is_not_asked(
    home: Path, subjects: Callable[[str], Subject]
) -> None:
    """Without null samples nothing trains their embedding; a source that the flow loss is kept
    from learns from its other losses, and one that has none is meant to stay.
    """
    subject = subjects("text")
    recipe = tiny_recipe(
        home, name="text", **LONG, **{"flow.null_probability": 0.0, "loss.flow.source_grad": "none"}
    )
    found, rows = named(replace(subject, recipe=recipe))
    assert not any(key.startswith(("part/null/", "input/null/o")) for key in rows)
    assert rows["part/head/grad"] > 0
    assert found == []
    # of few samples chance alone makes a null sample more or less
    rare = tiny_recipe(home, name="text", **LONG, **{"flow.null_probability": 0.003})
    assert "input/null/off" not in named(replace(subject, recipe=rare))[1]


def test_times_of_small_batches_are_joined(subjects: Callable[[str], Subject]) -> None:
    """Two times lie close together in one batch of six."""
    subject, spread = subjects("adaln"), []
    for step in range(12):
        with untouched(subject.model):
            rows = parts_module._draws(replace(subject, step=step), 2)
        spread.append(rows["input/time/rows"])
        assert rows["input/time/steps"] > 0.3
    assert min(spread) > 0.4


@pytest.mark.parametrize(
    "config",
    [
        UniformTime(),
        LogitNormalTime(mean=0.5, std=2.0),
        LogSNRTime(uniform_floor=0.3),
        AlphaTime(low=0.2, high=0.5),
    ],
    ids=lambda config: config.kind,
)
def test_times_are_uniform_under_their_distribution(config: Any) -> None:
    function = parts_module._distribution(config)
    assert function is not None
    u = (torch.arange(1000) + 0.5) / 1000
    made = function(training_times(config, u).double()).sort()[0]
    torch.testing.assert_close(made.float(), u, atol=2e-3, rtol=0)
