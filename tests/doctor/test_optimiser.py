"""The optimiser's arithmetic agrees with training to its last digits, and each fault of a step
moves its own number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_recipe

from flowray.config.recipe import Recipe
from flowray.doctor import battery, optimiser
from flowray.doctor.examine import examine
from flowray.doctor.subject import Subject, live_subject, open_subject
from flowray.model.autoencoder import load_autoencoder
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.found import find_checkpoint
from flowray.store.latents import ensure_latents, load_latents
from flowray.store.run import RunDirectory
from flowray.train import state as state_module
from flowray.train import step as step_module
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.optim import Ema
from flowray.train.state import fresh_state
from flowray.train.step import BatchMaker, train_step

CPU = torch.device("cpu")
ALONE = Group(0, 1, CPU)
GROUPS = ("text", "z_head", "trunk", "trunk_plain", "flow_head")
Optimizer = torch.optim.AdamW
Patch = pytest.MonkeyPatch


def built(patch: Patch, change: Callable[[Optimizer], None]) -> None:
    """Training's optimiser, changed."""
    original = state_module.build_optimizer

    def build(*args: Any) -> Optimizer:
        optimizer = original(*args)
        change(optimizer)
        return optimizer

    patch.setattr(state_module, "build_optimizer", build)


def large_eps(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["eps"] = 1.0


def twice(optimizer: Optimizer) -> None:
    step = optimizer.step

    def both(*args: Any, **kwargs: Any) -> Any:
        step(*args, **kwargs)
        return step(*args, **kwargs)

    optimizer.step = both  # type: ignore[method-assign]


def without_trunk(optimizer: Optimizer) -> None:
    optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["name"] != "trunk"]


def never_zeroed(optimizer: Optimizer) -> None:
    optimizer.zero_grad = lambda *args, **kwargs: None  # type: ignore[method-assign]


def no_rate(patch: Patch) -> None:
    patch.setattr(step_module, "lr_at", lambda *args: 0.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimiser")


def subject_of(home: Path, steps: int = 4, **keys: Any) -> Subject:
    """A live state after some steps."""
    recipe = tiny_recipe(home, **keys)
    folders = ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    latents, state = load_latents(folders["train"]), fresh_state(recipe, CPU)
    initial = {name: p.detach().clone() for name, p in state.parameters.items()}
    batches, history = BatchMaker(recipe, latents, ALONE), []
    for _ in range(steps):
        row = train_step(state, state.objective, batches(state.step), recipe, ALONE)
        history.append({"step": state.step} | {key: float(x) for key, x in row.items()})
    return live_subject(
        state,
        recipe,
        latents=latents,
        held_out=load_latents(folders["val"]),
        autoencoder=load_autoencoder(recipe.model.autoencoder, recipe.model.latent),
        history=history,
        initial=initial,
    )


def rows_of(subject: Subject) -> dict[str, float]:
    seen = examine(subject, batch=8, parts=["training"])
    assert seen.facts["notes"] == []
    return {
        key.removeprefix("optim/"): x for key, x in seen.metrics.items() if key.startswith("optim/")
    }


@contextmanager
def unchanged(subject: Subject) -> Iterator[None]:
    def held() -> list[torch.Tensor]:
        slots = [x for kept in subject.slots.values() for x in kept.values()]
        tensors = [*subject.model.state_dict().values(), *subject.ema.values(), *slots]
        return [x.detach().clone() for x in tensors]

    before = held()
    yield
    assert all(torch.equal(a, b) for a, b in zip(before, held(), strict=True))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"loss.clip.weight": 0.3, "train.accumulate": 2},
        {"loss.dino.weight": 0.1, "loss.dino.prototypes": 16, "optim.clip_grad": 0.01},
        {"model.source": {"kind": "noise"}, "loss.kl.weight": 0.0, "loss.anchor.weight": 0.0}
        | {"model.velocity.condition": {"kind": "adaln"}, "optim.weight_decay": 1.0},
        {"optim.betas": [0.5, 0.99], "optim.lr_scale.trunk": 3.0, "optim.lr_max.text": 1e-4},
    ],
    ids=["plain", "accumulated", "clipped", "noise", "scaled"],
)
def test_the_arithmetic_is_that_of_training(home: Path, keys: dict[str, Any]) -> None:
    subject = subject_of(home, **keys)
    with unchanged(subject):
        rows = rows_of(subject)
    parts = [group for group in GROUPS if f"scale/{group}" in rows]
    assert len(parts) == (4 if "model.source" in keys else 5)
    errors = [rows[key] for key in rows if key.startswith("replay/error/")]
    assert len(errors) >= 2
    assert max(errors) < 1e-3
    ones = ("replay/count", "replay/gradient", "replay/gradient_cos", "replay/ema")
    ones += ("schedule/agrees", *(f"count/{group}" for group in parts))
    assert {key: rows[key] for key in ones} == pytest.approx(dict.fromkeys(ones, 1.0), rel=1e-3)
    assert sum(rows[f"left_out/{group}"] for group in parts) == 0
    assert all(rows.get(f"travel_straight/{group}", 1.0) < 1.1 for group in parts)


@pytest.mark.parametrize(
    ("fault", "key", "low", "high"),
    [
        (lambda patch: built(patch, large_eps), "eps/text", 0.0, 0.5),
        (lambda patch: built(patch, large_eps), "replay/size/z_head", 0.0, 0.5),
        (lambda patch: built(patch, twice), "count/z_head", 2.0, 2.0),
        (lambda patch: built(patch, twice), "replay/count", 2.0, 2.0),
        (lambda patch: built(patch, without_trunk), "left_out/trunk", 0.5, 1.0),
        (lambda patch: built(patch, never_zeroed), "replay/gradient_cos", -1.0, 0.9),
        (lambda patch: patch.setattr(Ema, "update", lambda *args: None), "replay/ema", 0, 0),
        (no_rate, "schedule/idle", 1, 1),
        (no_rate, "replay/size/text", 0, 0),
    ],
)
def test_a_fault_of_the_step_moves_its_number(
    home: Path,
    fault: Callable[[Patch], None],
    key: str,
    low: float,
    high: float,
    monkeypatch: Patch,
) -> None:
    fault(monkeypatch)
    assert low <= rows_of(subject_of(home))[key] <= high


def test_each_factor_of_a_small_step_has_its_own_number(home: Path) -> None:
    usual = rows_of(subject_of(home))
    clipped = rows_of(subject_of(home, **{"optim.clip_grad": 1e-9}))
    assert clipped["eps/text"] < 0.1 < 0.9 < clipped["eps_unclipped/text"]
    assert clipped["clip/kept"] < 1e-7
    warm = rows_of(subject_of(home, **{"optim.schedule.warmup": 15_000}))
    assert warm["schedule/highest_planned"] < 12 / 15_000
    assert warm["rate/text"] < 0.01 * usual["rate/text"]
    assert warm["reach_peak"] == usual["reach_peak"]
    slow = rows_of(subject_of(home, **{"optim.lr": 1e-9}))
    assert slow["pace"] < 1e-5 * usual["pace"]
    decayed = rows_of(subject_of(home, **{"optim.weight_decay": 100.0}))
    assert decayed["decay/trunk"] > 0.5 > usual["decay/trunk"]


def test_the_copy_runs_its_own_blocks(home: Path) -> None:
    """Compiled ones carry a forward of the block that they were made of."""
    subject = subject_of(home)
    ran = []
    for block in subject.model.velocity.token_blocks().blocks:

        def forward(*inputs: Any, eager: Any = block.forward) -> Any:
            ran.append(None)
            return eager(*inputs)

        block.forward = forward  # type: ignore[method-assign]
    copied = optimiser._copied(subject, 4)[0].model.velocity
    blocks, originals = (v.token_blocks().blocks for v in (copied, subject.model.velocity))
    assert not any("forward" in vars(block) for block in blocks)
    assert all("forward" in vars(block) for block in originals)
    rows = rows_of(subject)
    assert ran
    assert max(rows[key] for key in rows if key.startswith("replay/error/")) < 1e-3
    assert rows["replay/gradient_cos"] == pytest.approx(1.0, rel=1e-3)


def test_a_replay_that_cannot_be_made_is_said(home: Path, monkeypatch: Patch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    subject = subject_of(home)
    monkeypatch.setattr(optimiser, "_copied", full)
    seen = examine(subject, batch=8, parts=["training"])
    assert "optim/betas" in seen.metrics
    assert [note.startswith("training: a step on a copy") for note in seen.facts["notes"]] == [True]
    monkeypatch.setattr(battery, "training_rows", full)
    assert examine(subject, batch=8, parts=["training"]).facts["notes"] == ["training: no room"]


def test_rates_before_a_resume_are_of_another_recipe(home: Path) -> None:
    subject = subject_of(home)
    assert "gradient/trunk" not in rows_of(subject)  # its second moment has forgotten nothing yet
    earlier = [{key: 0.1 * x for key, x in row.items()} for row in subject.history[:-1]]
    history = [
        row | {"step": step} for step, row in enumerate([*earlier, subject.history[-1]], start=1)
    ]
    rows = optimiser.schedule_rows(replace(subject, history=history))
    assert rows["optim/schedule/agrees"] == pytest.approx(1.0)


def test_a_rate_of_zero_in_a_checkpoint_is_zero(home: Path, monkeypatch: Patch) -> None:
    recipe: Recipe = tiny_recipe(home, name="stopped", **{"train.steps": 2, "train.probe_every": 2})
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    for module in (step_module, state_module):
        monkeypatch.setattr(module, "lr_at", lambda *args: 0.0)
    train(recipe, run, ALONE, lambda row: None)
    assert newest_checkpoint(run.checkpoints) is not None
    subject = open_subject(find_checkpoint(run.path))
    assert subject.lr == 0
    assert set(subject.rates(subject.lr).values()) == {0.0}
