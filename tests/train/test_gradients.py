"""A step's gradient: micro-batches, single losses' gradients, mixed precision, and what a
checkpoint keeps of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_recipe
from torch import Tensor, nn

from flowray.config.errors import InputError
from flowray.config.keys import describe
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.losses.gradients import autocast
from flowray.losses.total import Batch
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.latents import ensure_latents, load_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.gradients import micro_batches
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.state import TrainState, fresh_state
from flowray.train.step import BatchMaker, train_step

CPU = Group(0, 1, torch.device("cpu"))
OFTEN = {
    "train.log_every": 1,
    "train.probe_every": 100,
    "train.sample_every": 100,
    "train.checkpoint_every": 3,
    "train.steps": 6,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Recipe:
    return tiny_recipe(
        tmp_path_factory.mktemp("gradients"),
        **OFTEN,
        **{"loss.kl.schedule.kind": "constant", "loss.clip.weight": 0.0},
    )


@pytest.fixture(scope="module")
def batch(base) -> Batch:
    latents = load_latents(
        ensure_latents(base.data, base.model.autoencoder, base.model.latent)["train"]
    )
    return BatchMaker(base, latents, CPU)(0)


def moved(recipe: Recipe) -> TrainState:
    """A state whose velocity network's last layers are not at zero, so that gradients reach all
    parameters.
    """
    state, generator = fresh_state(recipe, CPU.device), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in state.parameters.values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return state


def gradient(
    recipe: Recipe, batch: Batch, **overrides: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(gradient of each parameter after one step without clipping, the step's row)."""
    recipe = override_recipe(recipe, {"optim.clip_grad": 1e9, **overrides})
    state = moved(recipe)
    row = train_step(state, state.objective, batch, recipe, CPU)
    return {name: p.grad for name, p in state.parameters.items() if p.grad is not None}, row


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """||a - b|| / ||b|| over all parameters."""
    assert a.keys() == b.keys()
    difference = sum(float((a[name] - b[name]).double().square().sum()) for name in a)
    return (difference / sum(float(b[name].double().square().sum()) for name in b)) ** 0.5


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_micro_batches_make_the_undivided_gradient(base, batch, parts):
    whole, row = gradient(base, batch)
    divided, summed = gradient(base, batch, **{"train.accumulate": parts})
    assert far(divided, whole) < 2e-6
    for key in ("loss/flow", "loss/kl", "loss/total", "loss/kl_raw", "mu/abs_mean", "grad/total"):
        assert float(summed[key]) == pytest.approx(float(row[key]), rel=1e-5), key


def test_micro_batches_are_the_batch_cut_up(batch):
    parts = micro_batches(batch, 4)
    assert [len(part.captions) for part in parts] == [2] * 4
    assert [text for part in parts for text in part.captions] == list(batch.captions)
    for name in ("z1", "target", "noise", "t", "null"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_a_batch_that_does_not_divide_is_refused(base):
    with pytest.raises(
        InputError,
        match=(
            r"train\.batch_size 8 must be a multiple of resources\.num_workers 1 x"
            r" train\.accumulate 3"
        ),
    ):
        override_recipe(base, {"train.accumulate": 3})


@pytest.mark.parametrize("parts", [1, 2])
def test_measured_gradients_are_each_losss_own_and_their_sum_is_the_step(base, batch, parts):
    recipe = override_recipe(base, {"loss.clip.weight": 0.5, "loss.kl.weight": 3.0})
    plain, _ = gradient(recipe, batch, **{"train.accumulate": parts})
    measured, row = gradient(recipe, batch, **{"train.grad_every": 1, "train.accumulate": parts})
    assert far(measured, plain) < 2e-6
    if parts > 1:
        return
    state = moved(recipe)
    losses, _ = state.objective(batch)
    own = {}
    for name, loss in losses.items():
        pieces = torch.autograd.grad(
            loss, list(state.parameters.values()), retain_graph=True, allow_unused=True
        )
        zeros = [torch.zeros(p.numel()) for p in state.parameters.values()]
        own[name] = torch.cat(
            [zero if g is None else g.flatten() for g, zero in zip(pieces, zeros, strict=True)]
        )
    for name, weight in {"flow": 1.0, "kl": 3.0, "clip": 0.5}.items():
        assert float(row[f"grad/{name}"]) == pytest.approx(float(own[name].norm()), rel=1e-4)
        assert float(row[f"grad/{name}_weighted"]) == pytest.approx(
            weight * float(own[name].norm()), rel=1e-4
        )
    for a, b in (("flow", "kl"), ("flow", "clip"), ("kl", "clip")):
        expected = float(torch.cosine_similarity(own[a], own[b], dim=0))
        assert float(row[f"grad/cos_{a}_{b}"]) == pytest.approx(expected, abs=1e-4)
    assert float(row["grad/total"]) == pytest.approx(
        float((own["flow"] + 3 * own["kl"] + 0.5 * own["clip"]).norm()), rel=1e-4
    )


NETWORKS = {
    "checkpointed": {"model.velocity.gradient_checkpointing": True},
    "dimr": {
        "model.velocity.kind": "dimr",
        "model.velocity.widths": [16, 16],
        "model.velocity.depths": [3, 1],
    },
    "semantic": {
        "loss.clip.weight": 0.5,
        "loss.dino.weight": 0.5,
        "loss.tv.weight": 0.1,
        "loss.norm.weight": 0.01,
    },
}


@pytest.mark.parametrize("network", NETWORKS)
def test_measuring_leaves_the_step_as_it_is_whatever_is_trained(base, batch, network):
    plain, _ = gradient(base, batch, **NETWORKS[network])
    measured, row = gradient(base, batch, **NETWORKS[network], **{"train.grad_every": 1})
    assert far(measured, plain) < 2e-6
    losses = {name.removeprefix("loss/") for name in row if name.startswith("loss/")} - {
        "total",
        "kl_raw",
    }
    assert all(float(row[f"grad/{name}"]) > 0 for name in losses)


def test_update_ratios_are_those_of_the_heads(base, batch):
    recipe = override_recipe(base, {"train.grad_every": 1, "optim.lr_scale.z_head": 3.0})
    state = moved(recipe)
    before = {name: p.detach().clone() for name, p in state.parameters.items()}
    row = train_step(state, state.objective, batch, recipe, CPU)
    for head, prefix in (("z_head", "head."), ("flow_head", "velocity.patch_out.")):
        names = [name for name in before if name.startswith(prefix)]
        ratios = [
            (state.parameters[name].detach() - before[name]).norm() / before[name].norm()
            for name in names
        ]
        assert float(row[f"step/{head}_update_ratio"]) == pytest.approx(
            float(sum(ratios) / len(ratios)), rel=1e-5
        )
    # its last layer starts at zero: no ratio, rather than an infinite one
    fresh = fresh_state(recipe, CPU.device)
    assert "step/flow_head_update_ratio" not in train_step(
        fresh, fresh.objective, batch, recipe, CPU
    )


def run(recipe: Recipe, name: str, **overrides: Any) -> tuple[RunDirectory, list[dict]]:
    recipe = override_recipe(recipe, {"name": name, **overrides})
    place = RunDirectory(Path(recipe.storage_path) / name)
    train(recipe, place, CPU, lambda row: None)
    return place, read_rows(place.metrics)


def timeless(rows: list[dict]) -> list[dict]:
    """Rows without the clock's numbers."""
    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows
    ]


def test_cadence_0_measures_nothing_and_k_every_kth_step(base):
    _, off = run(base, "unmeasured")
    _, rows = run(base, "measured", **{"train.grad_every": 2})
    keys = {
        "grad/flow",
        "grad/kl",
        "grad/cos_flow_kl",
        "grad/kl_weighted",
        "step/z_head_update_ratio",
    }
    assert not any(keys & row.keys() for row in off)
    assert [keys <= row.keys() for row in rows] == [False, True] * 3
    assert all(
        describe(key) is not None
        for row in rows
        for key in row
        if key not in {"step", "train/nmse", "train/cos"}
    )
    for row, plain in zip(rows, off, strict=True):  # the same path but for the order of the sums
        assert row["loss/flow"] == pytest.approx(plain["loss/flow"], rel=1e-4)
    with pytest.raises(InputError, match=r"grad_every 3 must be a multiple of log_every 2"):
        override_recipe(base, {"train.log_every": 2, "train.grad_every": 3})


@pytest.mark.parametrize("kind", ["shares", "gradnorm", "pcgrad"])
def test_balancing_changes_the_step_and_survives_a_resume_bit_for_bit(base, kind):
    options = {"loss.kl.weight": 20.0, "optim.schedule.kind": "constant", "loss.balance.kind": kind}
    if kind != "pcgrad":
        options["loss.balance.every"] = 2
    place, rows = run(base, kind, **options)
    for row in rows:
        terms = [
            row[f"balance/{k}"] * row[f"weight/{k}"] * row[f"loss/{k}"] for k in ("flow", "kl")
        ]
        assert row["loss/total"] == pytest.approx(sum(terms), rel=1e-5)
        if "grad/kl_weighted" in row:
            assert row["grad/kl_weighted"] == pytest.approx(
                20 * row["balance/kl"] * row["grad/kl"], rel=1e-5
            )
    if kind != "pcgrad":
        assert ["grad/kl" in row for row in rows] == [True, False] * 3
        assert len({row["balance/kl"] for row in rows}) == 3
    _, plain = run(
        base, f"plain-{kind}", **{"loss.kl.weight": 20.0, "optim.schedule.kind": "constant"}
    )
    assert rows[0]["loss/flow"] == plain[0]["loss/flow"]
    assert rows[-1]["loss/flow"] != pytest.approx(plain[-1]["loss/flow"], rel=1e-5)
    assert not any("balance/kl" in row for row in plain)

    run(base, f"{kind}-resumed", **options, **{"train.steps": 3})
    _, resumed = run(base, f"{kind}-resumed", **options)
    assert timeless(resumed) == timeless(rows)
    kept = json.loads((newest_checkpoint(place.checkpoints) / "state.json").read_text())["balance"]
    assert kept["multipliers"]["kl"] == pytest.approx(rows[-1]["balance/kl"], rel=1e-6)


def test_the_gradient_is_clipped_to_its_norm(base, batch):
    whole, row = gradient(base, batch)
    norm = torch.cat([g.flatten() for g in whole.values()]).norm()
    assert float(row["grad/total"]) == pytest.approx(float(norm), rel=1e-5)
    clipped, cut = gradient(base, batch, **{"optim.clip_grad": 0.25 * float(norm)})
    assert all(
        torch.allclose(clipped[name], 0.25 * g, rtol=1e-3, atol=1e-7) for name, g in whole.items()
    )
    assert float(cut["grad/total"]) == float(row["grad/total"])


def test_the_share_of_clipped_steps_is_over_all_since_the_last_row_whatever_stops_between(base):
    _, every = run(base, "each-clipped", **{"optim.schedule.kind": "constant"})
    norms = [row["grad/total"] for row in every]
    limit = sorted(norms)[len(norms) // 2]  # some are above, some below
    options = {"optim.clip_grad": limit, "optim.lr": 1e-9, "train.steps": 12}
    options |= {"optim.schedule.kind": "constant", "train.checkpoint_every": 4}
    _, single = run(base, "clip-single", **options)
    clipped = [float(row["grad/total"] > limit) for row in single]
    assert [row["grad/clip_frac"] for row in single] == clipped
    assert 0 < sum(clipped) < len(clipped)
    _, rows = run(base, "clip-share", **options, **{"train.log_every": 6})
    shares = [sum(clipped[:6]) / 6, sum(clipped[6:]) / 6]
    assert [row["grad/clip_frac"] for row in rows] == pytest.approx(shares)

    stopping = override_recipe(base, {"name": "clip-resumed", **options, "train.log_every": 6})
    place = RunDirectory(Path(stopping.storage_path) / "clip-resumed")
    probed = override_recipe(stopping, {"train.probe_every": 9})

    def interrupt(row: dict) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):  # after step 9; the checkpoint is of step 8
        train(probed, place, CPU, interrupt)
    train(stopping, place, CPU, lambda row: None)
    resumed = read_rows(place.metrics)
    assert [row["grad/clip_frac"] for row in resumed] == pytest.approx(shares)


DROPOUT = {
    "kind": "transencoder",
    "layers": 1,
    "reductions": 1,
    "heads": 2,
    "ffn": 16,
    "dropout": 0.3,
}


def test_dropout_is_a_function_of_seed_step_and_rank_so_that_a_resume_repeats_it(base):
    options = {"model.head": DROPOUT, "optim.schedule": {"kind": "constant"}}
    _, rows = run(base, "dropout", **options)
    _, plain = run(base, "no-dropout", **options, **{"model.head.dropout": 0.0})
    assert rows[0]["loss/kl"] != pytest.approx(plain[0]["loss/kl"], rel=1e-6)
    run(base, "dropout-resumed", **options, **{"train.steps": 3})
    torch.rand(7)  # a process that goes on has drawn other numbers than one that begins
    _, resumed = run(base, "dropout-resumed", **options)
    assert timeless(resumed) == timeless(rows)


def test_dropout_differs_by_step_and_rank_and_leaves_the_global_generator(base, batch):
    recipe = override_recipe(base, {"model.head": DROPOUT})

    def loss(rank: int, step: int) -> float:
        state = moved(recipe)
        state.step = step
        return float(
            train_step(state, state.objective, batch, recipe, Group(rank, 1, CPU.device))["loss/kl"]
        )

    before = torch.get_rng_state()
    first = loss(0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert loss(0, 0) == first
    assert len({first, loss(0, 1), loss(1, 0)}) == 3


class Seen(nn.Module):
    """A module that notes the dtype of every linear layer's output inside it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(
                    lambda _layer, _inputs, output: self.dtypes.add(output.dtype)
                )


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("island", [False, True])
def test_autocast_computes_in_half_and_keeps_weights_path_and_losses_in_fp32(
    base, batch, precision, dtype, island
):
    recipe = override_recipe(
        base, {"train.precision": precision, "train.velocity_fp32": island, "loss.clip.weight": 0.5}
    )
    state = moved(recipe)
    head, velocity = Seen(state.model.head), Seen(state.model.velocity)
    with autocast(recipe, CPU.device):
        losses, forward = state.objective(batch)
    assert head.dtypes == {dtype}
    assert velocity.dtypes == ({torch.float32} if island else {dtype})
    fp32 = [
        forward.z0,
        forward.posterior.mu,
        forward.path.xt,
        forward.path.v_target,
        *losses.values(),
    ]
    assert {tensor.dtype for tensor in fp32} == {torch.float32}
    train_step(state, state.objective, batch, recipe, CPU)
    assert {p.dtype for p in state.parameters.values()} == {torch.float32}
    assert {p.grad.dtype for p in state.parameters.values() if p.grad is not None} == {
        torch.float32
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"train.grad_every": 1}, {"train.accumulate": 2}, {"loss.balance.kind": "pcgrad"}],
)
@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.05), ("fp16", 0.01)])
def test_half_precision_gradients_are_the_fp32_ones_to_their_accuracy(
    base, batch, precision, limit, options
):
    exact, plain = gradient(base, batch, **options)
    # fp16's scale must not show in what is reported or applied
    rough, row = gradient(
        base, batch, **options, **{"train.precision": precision, "train.loss_scale": 1024.0}
    )
    assert 0 < far(rough, exact) < limit
    for key in plain.keys() & {"grad/total", "grad/flow", "grad/kl", "loss/total"}:
        assert float(row[key]) == pytest.approx(float(plain[key]), rel=limit), key


def test_fp16_cuts_its_scale_on_overflow_and_keeps_the_weights(base):
    place, rows = run(
        base,
        "backs-off",
        **{"train.precision": "fp16", "train.loss_scale": 2.0**40, "train.steps": 30},
    )
    backoffs = [row["amp/backoffs"] for row in rows]
    assert 5 < backoffs[-1] < 30
    assert backoffs == sorted(backoffs)
    assert [row["amp/scale"] for row in rows] == [2.0**40 / 2**count for count in backoffs]
    steps = json.loads((newest_checkpoint(place.checkpoints) / "state.json").read_text())
    assert steps["backoffs"] == backoffs[-1]
    assert steps["scaler"]["scale"] == rows[-1]["amp/scale"]


def test_a_skipped_step_changes_no_weight(base, batch):
    recipe = override_recipe(base, {"train.precision": "fp16", "train.loss_scale": 2.0**60})
    state = moved(recipe)
    before = {name: p.detach().clone() for name, p in state.parameters.items()}
    row = train_step(state, state.objective, batch, recipe, CPU)
    assert all(torch.equal(p, before[name]) for name, p in state.parameters.items())
    assert (state.step, state.backoffs, float(row["amp/scale"])) == (1, 1, 2.0**59)


def test_a_loss_that_is_not_finite_counts_as_skipped_under_fp16_too(base, batch):
    recipe = override_recipe(base, {"train.precision": "fp16", "train.loss_scale": 4.0})
    state = moved(recipe)
    next(iter(state.parameters.values())).data.fill_(float("nan"))
    for _ in range(2):  # from 4 to 2 to 1
        train_step(state, state.objective, batch, recipe, CPU)
    train_step(state, state.objective, batch, recipe, CPU)
    # the loss itself is not finite, which no scale mends
    assert [skipped.step for skipped in state.tally.look(CPU)] == [1, 2, 3]


def test_the_scaler_survives_a_resume(base):
    options = {
        "train.precision": "fp16",
        "train.loss_scale": 2.0**30,
        "optim.schedule.kind": "constant",
    }
    _, whole = run(base, "scaled", **options)
    run(base, "scaled-resumed", **options, **{"train.steps": 3})
    _, resumed = run(base, "scaled-resumed", **options)
    for key in ("amp/scale", "amp/backoffs", "loss/total", "grad/total"):
        assert [row[key] for row in resumed] == [row[key] for row in whole], key
    assert whole[0]["amp/backoffs"] > 0


def test_a_restart_takes_the_lr_of_the_checkpoint_as_its_floor_and_keeps_to_it(base):
    first = {"optim.schedule.kind": "constant", "optim.lr": 1e-4, "train.steps": 3}
    run(base, "restarted", **first)
    again = {
        "optim.schedule": {
            "kind": "warm_restarts",
            "start": "resume",
            "eta_min": "current",
            "t0": 4,
        },
        "optim.lr": 2e-4,
    }
    run(base, "restarted", **again, **{"train.steps": 6})
    # a second resume does not restart again
    _, rows = run(base, "restarted", **again, **{"train.steps": 12})
    rates = [row["lr/trunk"] for row in rows]
    cosine = [
        1e-4 * (1 + (1 + torch.cos(torch.tensor(torch.pi * (i % 4) / 4)).item()) / 2)
        for i in range(9)
    ]
    assert rates == pytest.approx([1e-4] * 3 + cosine, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_tf32_is_allowed_within_a_steps_passes_alone(base, batch, precision):
    recipe = override_recipe(base, {"train.precision": precision})
    state, flags = fresh_state(recipe, CPU.device), torch.backends.cuda.matmul
    seen = []
    block = state.model.velocity.blocks_in_order()[0]
    block.register_forward_hook(lambda *_: seen.append(flags.allow_tf32))
    block.register_full_backward_hook(lambda *_: seen.append(flags.allow_tf32))
    train_step(state, state.objective, batch, recipe, CPU)
    assert len(seen) >= 2
    assert set(seen) == {precision == "tf32"}
    assert not flags.allow_tf32
