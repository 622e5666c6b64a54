"""Muon for the matrices of the velocity network's blocks, AdamW for all else, as one optimiser."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import on_two_ranks, tiny_recipe
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.config.resume import refuse_changes
from flowray.config.train import MuonMatrices, OptimConfig
from flowray.doctor.examine import examine
from flowray.doctor.subject import live_subject
from flowray.losses.total import Batch
from flowray.model.autoencoder import load_autoencoder
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.latents import ensure_latents, load_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.optim import build_optimizer, set_lr
from flowray.train.state import TrainState, fresh_state, load_slots
from flowray.train.step import BatchMaker, train_step
from flowray.tune.pace import same_cost

CPU = Group(0, 1, torch.device("cpu"))
MUON = {"optim.matrices.kind": "muon"}
OFTEN = {"train.log_every": 1, "train.sample_every": 100, "train.checkpoint_every": 3}
BY_MUON = {  # of a DiT's block -> how many matrices it stacks
    "qkv.weight": 3,
    "out.weight": 1,
    "mlp.0.weight": 1,
    "mlp.2.weight": 1,
    "modulation.weight": 6,
    "caption.query.weight": 1,
    "caption.key_value.weight": 2,
    "caption.out.weight": 1,
}
DIMR = {"kind": "dimr", "widths": [16, 8], "depths": [3, 1], "heads": 2, "kernel": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    often = {**OFTEN, "train.steps": 6, "train.probe_every": 100}
    cross = {"model.velocity.condition.kind": "cross_attention"}
    return tiny_recipe(tmp_path_factory.mktemp("muon"), **often, **cross, **MUON)


@pytest.fixture(scope="module")
def batch(base: Recipe) -> Batch:
    made_of = base.data, base.model.autoencoder, base.model.latent
    return BatchMaker(base, load_latents(ensure_latents(*made_of)["train"]), CPU)(0)


def moved(recipe: Recipe) -> TrainState:
    """A state whose last layers are not at zero, so that gradients reach all parameters."""
    state, generator = fresh_state(recipe, CPU.device), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in state.parameters.values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return state


def named(state: TrainState, group: str) -> dict[str, Tensor]:
    names = {id(p): name for name, p in state.parameters.items()}
    found = next((g for g in state.optimizer.param_groups if g["name"] == group), {"params": []})
    return {names[id(p)]: p for p in found["params"]}


def in_block(name: str) -> tuple[str, str]:
    """(its part before the block's own names, those)."""
    first, _, rest = name.partition(".blocks.")
    return first, rest.partition(".")[2]


class TestGroups:
    def test_muon_gets_the_matrices_of_the_blocks_and_nothing_else(self, base: Recipe) -> None:
        state = fresh_state(base, CPU.device)
        depth = len(state.model.velocity.token_blocks().blocks)
        own = [in_block(name) for name in named(state, "trunk_muon")]
        assert sorted(own) == sorted(("velocity", name) for name in BY_MUON for _ in range(depth))
        group = next(g for g in state.optimizer.param_groups if g["name"] == "trunk_muon")
        assert group["pieces"] == [BY_MUON[name] for _, name in own]
        # what embeds the inputs and the null indicator, and the last modulation
        left = named(state, "trunk")
        outside = ("patch_in", "null", "modulation")
        assert {f"velocity.{layer}.weight" for layer in outside} < left.keys()
        everything = [p for g in state.optimizer.param_groups for p in g["params"]]
        assert len(everything) == len({id(p) for p in everything}) == len(state.parameters)

    def test_a_convolution_is_no_matrix(self, base: Recipe) -> None:
        state = fresh_state(override_recipe(base, {"model.velocity": DIMR}), CPU.device)
        by_muon, left = named(state, "trunk_muon"), named(state, "trunk")
        assert any(".depthwise." in name for name in left)
        for stage in ("transformer", "convnext_1"):
            assert any(name.startswith(f"velocity.{stage}.blocks.0.mlp.w0") for name in by_muon)
        assert all(p.ndim == 2 for p in by_muon.values())

    def test_rate_and_decay_are_the_trunks(self) -> None:
        names = ("velocity.blocks.0.qkv.weight", "velocity.patch_in.weight")
        parameters = {name: nn.Parameter(torch.ones(6, 2)) for name in names}
        config = OptimConfig.model_validate(
            {"matrices": {"kind": "muon", "lr_scale": 2.0}, "weight_decay": 0.3}
            | {"lr_scale": {"trunk": 0.5}, "lr_max": {"trunk": 0.4}}
        )
        optimizer = build_optimizer(parameters, config, "patch_out")
        assert set_lr(optimizer, 0.1) == pytest.approx({"trunk": 0.05, "trunk_muon": 0.1})
        assert set_lr(optimizer, 9.0) == pytest.approx({"trunk": 0.4, "trunk_muon": 0.4})
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3]


def orthogonal(gradient: Tensor, iterations: int) -> Tensor:
    """Newton-Schulz by the singular values, which is what the iteration acts on alone."""
    u, s, v = torch.linalg.svd(gradient.double() / gradient.double().norm(), full_matrices=False)
    for _ in range(iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_an_update_is_muons_of_every_piece(pieces: int, adjust: Any, nesterov: bool) -> None:
    rows, columns, lr, decay, momentum = 24, 16, 0.02, 0.5, 0.9
    layer = "qkv" if pieces == 3 else "out"
    weight = nn.Parameter(torch.randn(pieces * rows, columns, generator=_seeded(0)))
    config = OptimConfig(
        matrices=MuonMatrices(adjust=adjust, nesterov=nesterov, momentum=momentum),
        weight_decay=decay,
    )
    beside = {"velocity.patch_in.weight": nn.Parameter(torch.zeros(2, 2))}
    name = f"velocity.blocks.0.{layer}.weight"
    optimizer = build_optimizer({name: weight, **beside}, config, "patch_out")
    set_lr(optimizer, lr)
    size = 0.2 * math.sqrt(max(rows, columns)) if adjust != "original" else math.sqrt(1.5)
    buffer = torch.zeros_like(weight)
    for step in range(3):
        before = weight.detach().clone()
        weight.grad = torch.randn(weight.shape, generator=_seeded(step + 1))
        buffer = momentum * buffer + (1 - momentum) * weight.grad
        ahead = momentum * buffer + (1 - momentum) * weight.grad if nesterov else buffer
        optimizer.step()
        wanted = torch.cat([orthogonal(piece, 5) for piece in ahead.chunk(pieces)])
        made = (weight.detach() - (1 - lr * decay) * before) / (-lr * size)
        # the iteration is in bf16
        assert float((made - wanted).norm() / wanted.norm()) < 0.03
    assert torch.allclose(optimizer.state[weight]["momentum_buffer"], buffer, atol=1e-6)


def in_parts(rank: int) -> None:
    """Two steps of weights of which each rank holds a part, and of whole ones, are the same."""
    config = OptimConfig(matrices=MuonMatrices(), weight_decay=0.1)
    made = []
    for parted in (False, True):
        torch.manual_seed(0)
        qkv, last = nn.Linear(8, 24), nn.Linear(24, 8)
        net = nn.Sequential(qkv, last)
        if parted:
            mesh = init_device_mesh("cpu", (2,))
            for layer in net:
                fully_shard(layer, mesh=mesh)
        names = {"velocity.blocks.0.qkv": qkv, "velocity.patch_in": last}
        parameters = {
            f"{name}.{which}": p
            for name, layer in names.items()
            for which, p in layer.named_parameters()
        }
        optimizer = build_optimizer(parameters, config, "patch_out")
        for step in range(2):
            optimizer.zero_grad()
            net(torch.randn(4, 8, generator=_seeded(step))).square().sum().backward()
            optimizer.step()
        buffer = optimizer.state[qkv.weight]["momentum_buffer"]
        made.append([_whole(p) for p in (*parameters.values(), buffer)])
        assert isinstance(buffer, DTensor) == parted
        if parted:
            assert buffer.to_local().numel() == buffer.numel() // 2
    for whole, part in zip(*made, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def test_weights_that_ranks_hold_in_parts_move_as_whole_ones() -> None:
    on_two_ranks(in_parts)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_all_else_moves_as_with_adamw_alone(base: Recipe, batch: Batch) -> None:
    states = [moved(base), moved(override_recipe(base, {"optim.matrices": {"kind": "adamw"}}))]
    for state in states:
        train_step(state, state.objective, batch, base, CPU)
    muon = named(states[0], "trunk_muon").keys()
    for name, p in states[0].parameters.items():
        assert torch.equal(p, states[1].parameters[name]) == (name not in muon), name


def test_a_step_that_overflows_in_fp16_moves_nothing(base: Recipe, batch: Batch) -> None:
    recipe = override_recipe(base, {"train.precision": "fp16", "train.loss_scale": 2.0**60})
    state = moved(recipe)
    before = {name: p.detach().clone() for name, p in state.parameters.items()}
    train_step(state, state.objective, batch, recipe, CPU)
    assert all(torch.equal(p, before[name]) for name, p in state.parameters.items())
    assert state.backoffs == 1
    assert not any(state.optimizer.state.values())


def go(recipe: Recipe, name: str, **overrides: Any) -> RunDirectory:
    recipe = override_recipe(recipe, {"name": name, **overrides})
    run = RunDirectory(Path(str(recipe.storage_path)) / name)
    train(recipe, run, CPU, lambda row: None)
    return run


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_resumed_run_repeats_the_whole_one_bit_for_bit(base: Recipe, precision: str) -> None:
    same = {"train.precision": precision, "optim.schedule.kind": "constant"}
    whole = go(base, f"whole-{precision}", **same)
    go(base, f"parts-{precision}", **same, **{"train.steps": 3})
    parts = go(base, f"parts-{precision}", **same)
    rows = read_rows(whole.metrics)
    assert rows[0]["lr/trunk_muon"] == rows[0]["lr/trunk"] > 0
    for key in ("loss/total", "grad/total", "lr/trunk_muon"):
        assert [row[key] for row in read_rows(parts.metrics)] == [row[key] for row in rows], key
    ends = [newest_checkpoint(run.checkpoints) for run in (whole, parts)]
    assert all(end is not None for end in ends)
    for file in ("model", "ema", "optim"):
        first, second = (
            (end / f"{file}.safetensors").read_bytes() for end in ends if end is not None
        )
        assert first == second, file
    slots = load_slots(ends[0]) if ends[0] else {}
    assert slots["velocity.blocks.0.qkv.weight"].keys() == {"momentum_buffer"}
    assert slots["velocity.patch_in.weight"].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_a_resume_keeps_the_optimiser_and_may_change_its_numbers(base: Recipe) -> None:
    refuse_changes(base, override_recipe(base, {"optim.matrices.lr_scale": 2.0}), 3, "run")
    other = override_recipe(base, {"optim.matrices": {"kind": "adamw"}})
    for before, after in ((base, other), (other, base)):
        with pytest.raises(InputError, match=r"^optim\.matrices\.kind: got '\w+', but run has"):
            refuse_changes(before, after, 3, "run")


def test_a_step_costs_another_time_than_with_adamw(base: Recipe) -> None:
    """So a plan takes no pace from a run of the other optimiser."""
    assert same_cost(base, override_recipe(base, {"optim.matrices.lr_scale": 2.0}))
    assert not same_cost(base, override_recipe(base, {"optim.matrices": {"kind": "adamw"}}))


def test_the_doctor_finds_nothing_wrong_with_it(base: Recipe) -> None:
    """It repeats AdamW's arithmetic, which Muon's weights do not follow."""
    recipe = override_recipe(base, {"train.steps": 8})
    folders = ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    latents, state = load_latents(folders["train"]), fresh_state(recipe, CPU.device)
    initial = {name: p.detach().clone() for name, p in state.parameters.items()}
    batches, history = BatchMaker(recipe, latents, CPU), []
    for _ in range(4):
        row = train_step(state, state.objective, batches(state.step), recipe, CPU)
        history.append({"step": state.step} | {key: float(x) for key, x in row.items()})
    subject = live_subject(
        state,
        recipe,
        latents=latents,
        held_out=load_latents(folders["val"]),
        autoencoder=load_autoencoder(recipe.model.autoencoder, recipe.model.latent),
        history=history,
        initial=initial,
    )
    seen = examine(subject, batch=8, parts=["training"])
    assert seen.facts["notes"] == []
    replay = {k: v for k, v in seen.metrics.items() if k.startswith("optim/replay/error/")}
    assert {key.rpartition("/")[2] for key in replay} >= {"trunk", "flow_head", "z_head"}
    assert max(replay.values()) < 1e-4
    left_out = [v for k, v in seen.metrics.items() if k.startswith("optim/left_out/")]
    assert max(left_out) == 0
    assert not any("trunk_muon" in key for key in seen.metrics if key.startswith("optim/"))
