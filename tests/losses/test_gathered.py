"""Losses on two gloo ranks against one process on the joined batch: values, gradients, DINO's
centre.
"""

from __future__ import annotations

from pathlib import Path

import torch
from support import on_two_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flowray.config.base import LatentSpec
from flowray.config.losses import ClipLossConfig, DinoLossConfig
from flowray.config.towers import TowerConfig
from flowray.flow.path import sample_path
from flowray.losses.terms import Forward, loss_term
from flowray.model.posterior import Posterior
from flowray.model.semantic import Dino, SemanticTower, Views

LATENT = LatentSpec(channels=2, height=4, width=4)
CLIP = ClipLossConfig(weight=1.0, temperature=0.2)
DINO = DinoLossConfig(
    weight=1.0, prototypes=12, hidden=4, bottleneck=8, centre_momentum=0.5, teacher_temperature=0.1
)
GLOBAL = 8


class Losses(nn.Module):
    """A tower, a DINO pair and a source that trains, so that gradients also reach z0's maker."""

    def __init__(self, clip: ClipLossConfig):
        super().__init__()
        self.config = clip
        self.source = nn.Conv2d(2, 2, 1)
        self.tower = SemanticTower(TowerConfig(hidden=4, dim=8), clip, LATENT)
        self.dino = Dino(DINO, LATENT)

    def forward(self, x: Tensor, z1: Tensor) -> dict[str, Tensor]:
        z0 = self.source(x)
        views = Views(
            clip=(*self.tower(z0, z1, None), self.tower.scale), dino=self.dino(z0, z1, None)
        )
        path = sample_path(torch.full((len(x),), 0.5), z0, z1, 0.0)
        forward = Forward(Posterior(z0, z0), z0, z1, path, z0, (), views)
        return {"clip": loss_term(self.config, forward), "dino": loss_term(DINO, forward)}


def run(rank: int, world: int, gather: bool) -> dict[str, Tensor]:
    """Two SGD steps on this rank's rows of fixed batches: losses, the last gradients and what
    moved without one.
    """
    torch.manual_seed(0)
    losses = Losses(CLIP.model_copy(update={"gather": gather}))
    wrapped = DistributedDataParallel(losses) if world > 1 else losses
    optimizer = torch.optim.SGD(losses.parameters(), lr=0.5)
    generator, told = torch.Generator().manual_seed(1), {}
    rows = slice(rank * GLOBAL // world, (rank + 1) * GLOBAL // world)
    for step in range(2):
        x, z1 = torch.randn(2, GLOBAL, *LATENT.shape, generator=generator)
        optimizer.zero_grad()
        values = wrapped(x[rows], z1[rows])
        (values["clip"] + values["dino"]).backward()
        optimizer.step()
        losses.dino.advance()
        for name, value in values.items():
            told[f"{name}_{step}"] = value.detach()
    told |= {f"grad.{name}": p.grad for name, p in losses.named_parameters() if p.grad is not None}
    return told | {name: tensor.clone() for name, tensor in losses.dino.moving().items()}


def worker(rank: int, folder: Path) -> None:
    for gather in (True, False):
        torch.save(run(rank, 2, gather), folder / f"{gather}-{rank}")


def test_two_ranks_make_what_one_makes_of_the_joined_batch(tmp_path: Path) -> None:
    on_two_ranks(worker, tmp_path)
    alone = run(0, 1, True)
    first, second = (torch.load(tmp_path / f"True-{rank}", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys() == alone.keys()
    assert {
        "grad.source.weight",
        "grad.tower.log_scale",
        "grad.dino.student.prototypes",
        "centre",
    } <= alone.keys()
    for name, expected in alone.items():
        # a rank's own share of the loss: the mean over ranks is the joined batch's
        if name.partition("_")[0] in ("clip", "dino"):
            torch.testing.assert_close(
                (first[name] + second[name]) / 2, expected, rtol=1e-5, atol=1e-6
            )
        else:
            assert bool(expected.any()), name
            # Against the whole tensor: single numbers are what is left of larger ones.
            assert (first[name] - expected).norm() < 1e-3 * expected.norm(), name
            assert torch.equal(first[name], second[name]), name
    few, others = (torch.load(tmp_path / f"False-{rank}", weights_only=True) for rank in (0, 1))
    # half the negatives: an easier task
    assert float((few["clip_0"] + others["clip_0"]) / 2) < float(alone["clip_0"]) - 0.1


def test_the_centre_is_the_mean_of_every_micro_batch_since_the_last_step() -> None:
    torch.manual_seed(0)
    dino = Dino(DINO, LATENT)
    z0, z1 = torch.randn(2, 6, *LATENT.shape)
    logits = dino.teacher(z1, None)
    for rows in (slice(0, 2), slice(2, 6)):
        # nothing moves between two advances
        torch.testing.assert_close(dino(z0[rows], z1[rows], None)[1], logits[rows])
    student = [p.detach().clone() for p in dino.student.parameters()]
    with torch.no_grad():
        for p in dino.student.parameters():
            p += 1.0
    dino.eval()
    dino(z0, 5 * z1, None)  # a probe leaves no trace
    dino.advance()
    torch.testing.assert_close(dino.centre, 0.5 * logits.mean(0))
    for before, after in zip(student, dino.teacher.parameters(), strict=True):
        torch.testing.assert_close(after, before + (1 - 0.996))
    torch.testing.assert_close(dino(z0, z1, None)[1], dino.teacher(z1, None) - dino.centre)
