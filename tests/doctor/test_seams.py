"""The seams between training and sampling, on a tiny model: silent where both are as they should
be, and the first that differs where one of them is not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import in_bf16, replacing, target
from support import tiny_recipe
from torch import Tensor, nn

from flowray.doctor.seams import hearing, seam_rows
from flowray.doctor.subject import Subject, live_subject
from flowray.findings.diagnose import diagnose
from flowray.findings.rules_seams import SEAMS
from flowray.flow import guidance
from flowray.losses import total
from flowray.model.assemble import FlowModel
from flowray.model.autoencoder import Autoencoder, load_autoencoder
from flowray.model.dit import DiT
from flowray.model.posterior import Posterior
from flowray.model.prompts import PromptTokenizer
from flowray.sample import generate
from flowray.store.latents import ensure_latents, load_latents
from flowray.train.state import fresh_state
from flowray.train.step import BatchMaker

CPU = torch.device("cpu")


def subject_of(home: Path, **overrides: Any) -> Subject:
    """An untrained run whose weights are all random: the velocity starts at zero."""
    recipe = tiny_recipe(home, **overrides)
    made = recipe.data, recipe.model.autoencoder, recipe.model.latent
    folders, state = ensure_latents(*made), fresh_state(recipe, CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in state.parameters.values():
            p.add_(0.2 * torch.randn_like(p))
    return live_subject(
        state,
        recipe,
        latents=load_latents(folders["train"]),
        held_out=load_latents(folders["val"]),
        autoencoder=load_autoencoder(*made[1:]),
        history=[],
    )


def seams(subject: Subject) -> tuple[dict[str, float], dict[str, str]]:
    return seam_rows(subject, subject.batches(subject.step))


def roots(subject: Subject) -> list[str]:
    """The findings that follow from no other."""
    rows, places = seams(subject)
    facts = {"precision": subject.recipe.train.precision, "seams": places}
    return [one.id for one in diagnose(rows, facts) if one.explained_by is None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seams")


@pytest.fixture(scope="module")
def subject(home: Path) -> Subject:
    guided = {"sample.guidance_scale": 3.0, "flow.null_probability": 0.2}
    return subject_of(home, **guided, **{"model.velocity.condition": {"kind": "adaln"}})


def test_both_ways_agree_and_the_model_is_left_as_it_was(subject: Subject) -> None:
    model = subject.model
    before = {name: x.clone() for name, x in model.state_dict().items()}
    modes, kept = [module.training for module in model.modules()], set(model.__dict__)
    rows, places = seams(subject)
    # sampling opens no weights of a live state
    assert rows.keys() == {f"seam/{seam.name}" for seam in SEAMS} - {"seam/weights"}
    assert rows == pytest.approx(dict.fromkeys(rows, 0.0), abs=0.2)
    close = {key: x for key, x in rows.items() if "draws" not in key and key != "seam/pixels"}
    assert close == pytest.approx(dict.fromkeys(close, 0.0), abs=0.01)
    assert not any(places.values())
    assert [module.training for module in model.modules()] == modes
    assert set(model.__dict__) == kept
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.precision": "bf16", "sample.solver": {"kind": "heun"}},
        {
            "model.head": {"kind": "transencoder", "layers": 1, "ffn": 16, "dropout": 0.5},
            "sample.solver": {"kind": "dopri5", "max_steps": 50},
        },
        {
            "model.velocity.condition": {"kind": "adaln"},
            "model.source": {"kind": "noise"},
            "loss.kl.weight": 0.0,
            "sample.grid": "logit_normal",
            "sample.solver": {"kind": "euler", "nodes": "endpoint"},
        },
        {"sample.steps": 1, "loss.dino.weight": 0.1, "loss.dino.prototypes": 16},
    ],
    ids=["bf16, heun", "dropout, dopri5", "noise", "one step, dino"],
)
def test_no_recipe_has_a_seam(home: Path, overrides: dict[str, Any]) -> None:
    assert roots(subject_of(home, **overrides)) == []


def test_compiled_blocks_are_heard_as_they_are(home: Path) -> None:
    compiled = subject_of(home)
    compiled.model.velocity.compile_blocks()
    assert roots(compiled) == []


def test_what_draws_is_left_out_and_nothing_else_is(home: Path) -> None:
    """Dropout in the head does not hide a velocity network that answers otherwise."""
    head = {"kind": "transencoder", "layers": 1, "ffn": 16, "dropout": 0.5}
    drawing = subject_of(home, **{"model.head": head})
    with replacing(DiT, "levels", _flipped_in_eval)():
        assert roots(drawing)[:1] == ["seam_velocity"]


def _mean_in_training(original: Any) -> Any:
    return lambda self, noise: self.mean if torch.is_grad_enabled() else original(self, noise)


def _mean_in_sampling(original: Any) -> Any:
    return lambda self, noise: original(self, noise) if torch.is_grad_enabled() else self.mean


def _amplitude_in_training(original: Any) -> Any:
    def sample(self: Posterior, noise: Tensor) -> Tensor:
        made = original(self, noise)
        return made + 2 * self.mean if torch.is_grad_enabled() else made

    return sample


def _wider_in_training(original: Any) -> Any:
    def posterior(self: FlowModel, tokens: Any) -> Posterior:
        made = original(self, tokens)
        return replace(made, logvar=made.logvar + 1) if self.training else made

    return posterior


def _noise(of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], Any]:
    """The source noise of a batch as `of(its own, that of step 0)` makes it."""

    def make(original: Any) -> Any:
        def batch(self: BatchMaker, step: int) -> Any:
            made = original(self, step)
            return replace(made, noise=of(made.noise, original(self, 0).noise))

        return batch

    return make


def _without_the_last_step(original: Any) -> Any:
    def integrate(config: Any, velocity_fn: Any, x: Tensor, grid: Any, *rest: Any) -> Tensor:
        for t, after in list(pairwise(grid))[:-1]:
            x = x + (after - t) * velocity_fn(x, torch.full((len(x),), t))
        return x

    return integrate


def _halves_swapped(original: Any) -> Any:
    def guided(velocity: Any, scale: float, *how: Any) -> Any:
        def turned(x: Tensor, t: Tensor, null: Tensor) -> Tensor:
            return velocity(x, t, null if len(null) == null.logical_not().sum() else ~null)

        return original(turned, scale, *how)

    return guided


def _flipped_in_eval(original: Any) -> Any:
    return lambda self, x, *others: original(self, x if self.training else x.flip(-1), *others)


def _short_in_sampling(original: Any) -> Any:
    def rows(self: PromptTokenizer, prompts: Any) -> Any:
        made = original(self, prompts)
        return made if torch.is_grad_enabled() else [row[:1] for row in made]

    return rows


def _framed(original: Any) -> Any:
    def latents(model: FlowModel, prompts: Any, *others: Any) -> Tensor:
        return original(model, [f"a photo of {prompt}" for prompt in prompts], *others)

    return latents


BUGS: tuple[tuple[str, str, Callable[[], AbstractContextManager[Any]]], ...] = (
    ("captions", "another template", replacing(generate, "generate_latents", _framed)),
    (
        "captions",
        "upper case in training",
        replacing(
            BatchMaker,
            "_captions",
            lambda made: lambda self, *of: [text.upper() for text in made(self, *of)],
        ),
    ),
    ("tokens", "another truncation", replacing(PromptTokenizer, "rows", _short_in_sampling)),
    ("std", "a wider posterior in training", replacing(FlowModel, "posterior", _wider_in_training)),
    ("draws_trained", "the mean in training", replacing(Posterior, "sample", _mean_in_training)),
    (
        "draws_trained",
        "frozen noise",
        replacing(BatchMaker, "__call__", _noise(lambda own, first: first.clone())),
    ),
    (
        "draws_trained",
        "one noise for all captions",
        replacing(BatchMaker, "__call__", _noise(lambda own, first: own[:1].repeat(8, 1, 1, 1))),
    ),
    ("draws_sampled", "the mean in sampling", replacing(Posterior, "sample", _mean_in_sampling)),
    (
        "draws_sampled",
        "one seed",
        replacing(
            generate,
            "source_noise",
            lambda made: lambda model, count, seed, *rest: made(model, count, 0, *rest),
        ),
    ),
    ("z0", "an amplitude in training", replacing(Posterior, "sample", _amplitude_in_training)),
    (
        "latents",
        "z1 scaled again",
        replacing(BatchMaker, "_latents", lambda made: lambda self, *of: 1.5 * made(self, *of)),
    ),
    ("target", "the sign of v*", target(lambda x0, x1: x0 - x1)),
    ("steps", "the last step left out", replacing(generate, "integrate", _without_the_last_step)),
    (
        "time_code",
        "squared in sampling",
        replacing(guidance, "time_code", lambda made: lambda t: made(t).square()),
    ),
    (
        "time_code",
        "turned in training",
        replacing(total, "time_code", lambda made: lambda t: -made(t)),
    ),
    ("velocity", "flipped in eval mode", replacing(DiT, "levels", _flipped_in_eval)),
    ("guidance", "halves swapped", replacing(generate, "guided", _halves_swapped)),
    ("loss", "half of it", replacing(total, "loss_term", lambda made: lambda *of: made(*of) / 2)),
    (
        "pixels",
        "scaled once more",
        replacing(Autoencoder, "decode", lambda made: lambda self, z: made(self, 3 * z)),
    ),
)


@pytest.mark.parametrize(("seam", "bug"), [(s, b) for s, _, b in BUGS], ids=[b[1] for b in BUGS])
def test_the_first_seam_that_differs_is_named(
    subject: Subject, seam: str, bug: Callable[[], AbstractContextManager[Any]]
) -> None:
    with bug():
        assert roots(subject)[:1] == [f"seam_{seam}"]


def test_a_sampler_in_half_precision_ends_elsewhere(subject: Subject) -> None:
    with replacing(generate, "integrate", in_bf16)():
        assert roots(subject) == ["seam_steps"]


def test_the_module_that_differs_is_named(subject: Subject, monkeypatch: Any) -> None:
    layer = subject.model.velocity.get_submodule("blocks.1")
    inner = next(module for module in layer.modules() if isinstance(module, nn.Linear))
    name = next(at for at, module in subject.model.named_modules() if module is inner)
    forward = inner.forward
    monkeypatch.setattr(inner, "forward", lambda x: forward(x) * (1 if inner.training else 3))
    assert seams(subject)[1]["velocity"] == name


def test_kept_texts_are_run_all_the_same(tmp_path: Path) -> None:
    """Two passes are compared module by module, whichever of them meets a caption first."""
    subject = subject_of(tmp_path, **{"model.text.cache": True})
    model, heard = subject.model, []
    noise = torch.zeros(1, *subject.recipe.model.latent.shape)
    for _ in range(2):
        model.source(["a red circle"], noise)
        with torch.no_grad(), hearing(model) as now:
            model.source(["a red circle"], noise)
        heard.append([name for name, *_ in now.inside])
    assert heard[0] == heard[1]
    passes = [name for name in heard[0] if name.endswith("layers.0.self_attn.q_proj")]
    assert len(passes) == 2  # the prompt's and the queries'
    assert model.text.kept is not None
    assert len(model.text.kept) == 1
    rows, _ = seams(subject)
    assert (rows["seam/tokens"], rows["seam/text"]) == (0.0, 0.0)
