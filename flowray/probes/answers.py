"""Whether a caption's answers are pictures, several and its own: what tells a blur from a picture,
and how far a path can tell its caption from others.

|.| is the Euclidean norm of a flattened latent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from flowray.flow.path import psi
from flowray.model.posterior import Posterior

SEARCHED = 4096  # samples whose captions are looked through for equal ones
PARTNERS = 4  # of one sample at most: no caption that fits everything outweighs the others
ENOUGH = 16  # pairs; fewer say too little of what a caption leaves open
DRAWN = 8  # latents that stand for the data at each of the batch; with 2 energy's unit is rough
TIMES = (0.0, 0.25, 0.5)


@dataclass(frozen=True)
class Answers:
    """The batch's own latents z1 (B, C, H, W) and what else the data would answer.

    drawn: other samples of the set for each of the batch, whatever their caption, (K, B, C, H, W),
    K up to DRAWN. partners (P, C, H, W): latents of other samples with the caption of batch sample
    rows (P,); P is 0 where too few captions repeat.
    """

    z1: Tensor
    drawn: Tensor
    rows: Tensor
    partners: Tensor

    @property
    def over(self) -> str:
        """What a key ends with whose data are not of one caption."""
        return "" if len(self.rows) else "_all"

    @property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, a, b): pairs of the data within a caption, and whose caption it is; pairs of any
        two pictures, and every row, where too few captions repeat.
        """
        if len(self.rows):
            return self.rows, self.z1[self.rows], self.partners
        every = torch.arange(len(self.z1), device=self.z1.device)
        return every, torch.cat([self.z1, *self.drawn[:-1]]), torch.cat([*self.drawn])


def strangers(u: Tensor, count: int) -> Tensor:
    """Other samples, all different, for each of the first B of a set of `count`: (K, B) from u (K,
    B) in [0, 1), fewer where there are not K others.
    """
    shifts: list[Tensor] = []
    for row in u[: count - 1]:
        left = count - 1 - len(shifts)
        shift = 1 + (row * left).long().clamp(max=left - 1)
        for taken in torch.stack(shifts).sort(0).values if shifts else ():
            shift = shift + (shift >= taken).long()
        shifts.append(shift)
    return (torch.arange(u.shape[1]) + torch.stack(shifts)) % count


def same_captions(texts: list[str], captions: Iterable[list[str]]) -> tuple[list[int], list[int]]:
    """(rows, samples) of pairs: for samples 0, 1, ... of a set, of which the first stand in the
    batch under `texts`, others that have the text among their captions. None where there are fewer
    than ENOUGH.
    """
    found: dict[str, list[int]] = {text: [] for text in texts}
    for sample, said in enumerate(captions):
        for text in dict.fromkeys(said):
            if text in found and len(found[text]) <= PARTNERS:  # a row may find itself
                found[text].append(sample)
    pairs = [
        (row, sample)
        for row, text in enumerate(texts)
        for sample in [other for other in found[text] if other != row][:PARTNERS]
    ]
    if len(pairs) < ENOUGH:
        return [], []
    return [row for row, _ in pairs], [sample for _, sample in pairs]


def distances(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| of each sample, (B,)."""
    return (a - b).flatten(1).norm(dim=1)


def energies(draws: Tensor, z1: Tensor) -> Tensor:
    """E|X - z1| - E|X - X'| / 2 of each sample, (B,), over its draws X (K, B, C, H, W).

    Its mean is least where X is drawn as z1 is (Gneiting and Raftery 2007).
    """
    off = torch.stack([distances(x, z1) for x in draws]).mean(0)
    apart = [distances(x, other) for x, other in combinations(draws, 2)]
    return off - torch.stack(apart).mean(0) / 2 if apart else off


def answer_metrics(x: Tensor, other: Tensor, answers: Answers) -> dict[str, float]:
    """shoot/energy and shoot/diversity of two pictures of every caption, each (B, C, H, W).

    energy 1 is drawing any picture of the data. diversity 0 is one picture a caption, 1 as varied
    as the data's own; both sides of it are of the same captions.
    """
    any_picture = energies(answers.drawn, answers.z1).mean().clamp_min(1e-12)
    rows, a, b = answers.pairs
    varied = distances(x, other)[rows].mean() / distances(a, b).mean().clamp_min(1e-12)
    return {
        "shoot/energy": float(energies(torch.stack([x, other]), answers.z1).mean() / any_picture),
        f"shoot/diversity{answers.over}": float(varied),
    }


def left_open(answers: Answers) -> dict[str, float]:
    """data/left_open: variance of the data within a caption over their whole; 1: a caption says
    nothing, 0: it says everything. Nothing where too few captions repeat.
    """
    if not len(answers.rows):
        return {}
    _, a, b = answers.pairs
    whole = torch.cat([answers.z1, *answers.drawn]).var(0).mean().clamp_min(1e-12)
    return {"data/left_open": float((a - b).square().mean() / 2 / whole)}


def source_metrics(
    posterior: Posterior, z0: Tensor, captions: list[str], answers: Answers, rho: float
) -> dict[str, float]:
    """source/* of a text source: how well x_t tells its caption, and sigma^2 over what the data
    leave open in a caption.
    """
    rows, a, b = answers.pairs
    left_open = (a - b).square().mean().clamp_min(1e-12) / 2
    width = posterior.std[rows].square().mean() / left_open
    told = {
        f"source/separation@{t:g}": separation(posterior, z0, captions, answers, rho, t)
        for t in TIMES
    }
    return told | {f"source/width{answers.over}": float(width)}


def separation(
    posterior: Posterior, z0: Tensor, captions: list[str], answers: Answers, rho: float, t: float
) -> float:
    """Share of the batch's x_t whose most likely caption, of the different ones of the batch, is
    their own; where k are equally likely it counts 1 / k.

    x_t of a caption is taken as N(psi(t, mu, m), (1 + t (rho - 1))^2 sigma^2 + t^2 v), m and v the
    data's mean and variance of each channel and place.
    """
    times = torch.full((len(z0),), t, device=z0.device)
    seen = torch.cat([answers.z1, *answers.drawn])
    m, v = seen.mean(0), seen.var(0)
    mean = psi(times, posterior.mean, m.expand_as(z0), rho).flatten(1)
    keep = 1 + t * (rho - 1)
    variance = (keep**2 * posterior.std.square() + t**2 * v).flatten(1).clamp_min(1e-12)
    xt = psi(times, z0, answers.z1, rho).flatten(1)
    texts = list(dict.fromkeys(captions))
    # one caption at a time: (B, captions, dims) at once is large
    likelihood = torch.stack(
        [
            -((xt - mean[c]).square() / variance[c] + variance[c].log()).sum(1)
            for c in map(captions.index, texts)
        ],
        dim=1,
    )
    best = likelihood == likelihood.amax(1, keepdim=True)
    own = torch.tensor([texts.index(text) for text in captions], device=z0.device)
    right = best.gather(1, own[:, None]).squeeze(1).float()
    return float((right / best.sum(1).clamp_min(1)).mean())
