"""`flowray.doctor --selfcheck`: the formulas of this installation held against theory on tiny
tensors, whoever changed its source.

The theory is written out here (and of the loss terms in terms.py, which every examination asks)
once more, and nowhere else (but for the true field of `precision`):
each check calls what training or sampling calls and says how far it is from what the method
prescribes.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from flowray.config.errors import last_line
from flowray.config.flow import EulerSolver, SolverConfig
from flowray.config.load import load_recipe
from flowray.config.losses import ClipLossConfig
from flowray.config.recipe import Recipe
from flowray.data.pixels import from_pictures
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards, write_shards
from flowray.doctor.sampler import native_teacher
from flowray.doctor.terms import normal, on_path, term_off
from flowray.flow.draws import Draws
from flowray.flow.path import sample_path
from flowray.flow.solver import integrate, time_grid
from flowray.losses.terms import Forward
from flowray.losses.total import Batch, Objective
from flowray.model.assemble import FlowModel, build_model
from flowray.model.autoencoder import Autoencoder, load_autoencoder
from flowray.model.latent import LatentScale, Moments, PerChannel
from flowray.sample import generate as sampling
from flowray.store.latents import LatentSet
from flowray.train.group import Group
from flowray.train.optim import Ema
from flowray.train.step import BatchMaker

SAMPLES = 8
POINT = -30.0  # log-variance of a posterior that is a point, for all that fp32 shows
SMALL = (
    "model.velocity={kind: dit, patch: 2, width: 32, depth: 1, heads: 2}",
    "model.head={kind: pooled, hidden: 32}",
    f"train.batch_size={SAMPLES}",
    "sample.steps=4",
    "sample.grid=uniform",
    "sample.solver={kind: euler}",
)


@dataclass(frozen=True)
class Checked:
    """One check. theory: what holds; measured: how far off it is, or the error that came; where:
    the source to look at.
    """

    id: str
    passed: bool
    theory: str
    measured: str
    where: str


def selfcheck() -> list[Checked]:
    """Every check, in the order in which training and sampling use what is checked."""
    with tempfile.TemporaryDirectory(prefix="flowray-selfcheck-") as folder:
        tiny = Tiny(Path(folder))
        return [_checked(id, check, tiny) for id, check in CHECKS.items()]


def _checked(id: str, check: Check, tiny: Tiny) -> Checked:
    try:
        with torch.random.fork_rng(devices=[]):
            got = check.off(tiny)
    except Exception as error:  # of changed source anything may come, and the others still count
        said = last_line(f"{type(error).__name__}: {error}")
        return Checked(id, False, check.theory, said, check.where)
    measured = f"off by {got:.2g}, at most {check.within:g}"
    return Checked(id, got <= check.within, check.theory, measured, check.where)


def _off(got: Tensor, want: Tensor) -> float:
    """The greatest difference; infinite where one is not a number."""
    return float((got.detach().double() - want.detach().double()).abs().nan_to_num(math.inf).max())


def _column(value: PerChannel) -> Tensor:
    return torch.as_tensor(value).view(-1, 1, 1)


def _scaled(scale: LatentScale, raw: Tensor) -> Tensor:
    return (raw - _column(scale.shift)) * _column(scale.scale)


def _unscaled(scale: LatentScale, z: Tensor) -> Tensor:
    return z / _column(scale.scale) + _column(scale.shift)


def _code(t: Tensor) -> Tensor:
    return 4 - 8 * t


@contextmanager
def hearing_codes(model: FlowModel) -> Iterator[list[Tensor]]:
    """Within the block, the list receives the time code (B,) of every call of the velocity
    network, in order.
    """
    velocity, heard = model.velocity, []
    levels = velocity.levels

    def listening(x: Tensor, time_code: Tensor, *others: Any) -> tuple[Tensor, ...]:
        heard.append(time_code.detach().clone())
        return levels(x, time_code, *others)

    # shadows the method: training calls `levels`, sampling calls the module
    velocity.__dict__["levels"] = listening
    try:
        yield heard
    finally:
        del velocity.__dict__["levels"]


class Tiny:
    """What the checks share: quickstart_closed with small networks whose weights are all
    random, its autoencoder, and a cache of latents of which every other one is a point.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.captions = [f"a {size} circle" for size in ("small", "large")] * (SAMPLES // 2)

    @cached_property
    def recipe(self) -> Recipe:
        return load_recipe("quickstart_closed", SMALL).recipe

    @property
    def rho(self) -> float:
        return self.recipe.flow.path.rho

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.recipe.model.latent.shape

    @cached_property
    def model(self) -> FlowModel:
        model = build_model(self.recipe.model, self.recipe.loss, 0)
        with torch.no_grad():  # the velocity starts at zero, which would hide what it is told
            for place, p in enumerate(model.trainable().values()):
                p.add_(0.1 * normal(place, *p.shape))
        return model.eval()

    @cached_property
    def autoencoder(self) -> Autoencoder:
        return load_autoencoder(self.recipe.model.autoencoder, self.recipe.model.latent)

    @cached_property
    def moments(self) -> Moments:
        """Of the cached latents, exact in the half precision of a cache."""
        logvar = torch.full((SAMPLES, *self.shape), POINT)
        logvar[1::2] = 0.0
        return Moments(normal(1, SAMPLES, *self.shape).half().float(), logvar)

    @cached_property
    def batches(self) -> BatchMaker:
        def sample(i: int) -> dict[str, Any]:
            buffer = io.BytesIO()
            np.save(buffer, torch.cat([part[i] for part in self.moments]).half().numpy())
            text = self.captions[i].encode()
            return {"__key__": f"s{i}", "moments.npy": buffer.getvalue(), "txt": text}

        folder = write_shards(self.folder / "latents", map(sample, range(SAMPLES)), meta={})
        reader = ShardReader(find_shards(str(folder)))
        latents = LatentSet(reader, self.autoencoder.scale, ())
        return BatchMaker(self.recipe, latents, Group(0, 1, torch.device("cpu")))

    @cached_property
    def batch(self) -> Batch:
        """A batch that does not hang on the cache: times and null samples of both kinds."""
        z1, target, noise = (normal(seed, SAMPLES, *self.shape) for seed in (2, 3, 4))
        null = torch.arange(SAMPLES) % 3 == 0
        return Batch(self.captions, z1, target, noise, (torch.arange(SAMPLES) + 0.5) / 8, null)

    @cached_property
    def trained(self) -> tuple[dict[str, Tensor], Forward, list[Tensor]]:
        """(losses, forward pass, time codes heard) of a training step on `batch`."""
        objective = Objective(self.model, self.recipe.flow, self.recipe.loss)
        try:
            with hearing_codes(self.model.train()) as heard, torch.no_grad():
                return *objective(self.batch), heard
        finally:
            self.model.eval()

    @cached_property
    def z0(self) -> Tensor:
        """Where the batch starts."""
        with torch.no_grad():
            posterior = self.model.posterior(
                self.model.text(self.model.text.tokenize(self.captions))
            )
        return posterior.mu + (0.5 * posterior.logvar).exp() * self.batch.noise

    @torch.no_grad()
    def sampled(self, z: Tensor, guidance: float) -> Tensor:
        """z at the end of the recipe's Euler steps, written out."""
        steps = self.recipe.sample.steps
        for k in range(steps):
            code = _code(torch.full((len(z),), (k + 0.5) / steps))
            own, null = (
                self.model.velocity(z, code, torch.full((len(z),), flag)) for flag in (False, True)
            )
            z = z + (null + guidance * (own - null)) / steps
        return z


def _path(tiny: Tiny) -> float:
    batch = tiny.batch
    made = sample_path(batch.t, batch.z1, batch.target, tiny.rho)
    xt, v = on_path(batch.t, batch.z1, batch.target, tiny.rho)
    return max(_off(made.xt, xt), _off(made.v_target, v))


def _batch_latents(tiny: Tiny, points: bool) -> tuple[Tensor, Tensor]:
    """(z1 of a training batch, the scaled mean that it should have) of the samples that are
    points, or of the others.
    """
    order, mean = tiny.batches.indices(0), tiny.moments.mean
    wanted = torch.from_numpy(order % 2 == (0 if points else 1))
    return tiny.batches(0).z1[wanted], _scaled(tiny.autoencoder.scale, mean[order])[wanted]


def _latent_scale(tiny: Tiny) -> float:
    return _off(*_batch_latents(tiny, points=True))


def _latent_drawn(tiny: Tiny) -> float:
    """|ln| of the noise's size over what it should be."""
    z1, mean = _batch_latents(tiny, points=False)
    size = ((z1 - mean) / _column(tiny.autoencoder.scale.scale)).square().mean().sqrt()
    return abs(math.log(max(float(size), 1e-12)))


def _encode(tiny: Tiny) -> float:
    pictures = normal(5, 2, 3, *(8 * side for side in tiny.shape[1:])).clamp(-1, 1)
    with torch.no_grad():
        raw = tiny.autoencoder.net.encode(pictures).latent_dist.parameters
    made = tiny.autoencoder.encode_moments(pictures)
    return max(_off(torch.cat(made, 1), raw), _off(made.mean, raw.chunk(2, 1)[0]))


def _frozen(tiny: Tiny) -> float:
    """How many modules are in train mode once the autoencoder was told to train."""
    return float(sum(module.training for module in tiny.autoencoder.train().net.modules()))


def _sample(tiny: Tiny) -> float:
    autoencoder, (mean, logvar), noise = tiny.autoencoder, tiny.moments, tiny.batch.noise
    want = _scaled(autoencoder.scale, mean + (0.5 * logvar).exp() * noise)
    return _off(autoencoder.sample(tiny.moments, noise), want)


@torch.no_grad()
def _decode(tiny: Tiny) -> float:
    autoencoder, z = tiny.autoencoder, tiny.batch.z1[:2]
    return _off(autoencoder.decode(z), autoencoder.net.decode(_unscaled(autoencoder.scale, z))[0])


def _source(tiny: Tiny) -> float:
    return _off(tiny.trained[1].z0, tiny.z0)


def _trained_code(tiny: Tiny) -> float:
    (heard,) = tiny.trained[2]
    return _off(heard, _code(tiny.batch.t))


@torch.no_grad()
def _flow_loss(tiny: Tiny) -> float:
    losses, forward, _ = tiny.trained
    xt, v = on_path(tiny.batch.t, forward.z0, tiny.batch.target, tiny.rho)
    u = tiny.model.velocity(xt, _code(tiny.batch.t), tiny.batch.null)
    return _off(losses["flow"], (u - v).square().mean())


def _kl(tiny: Tiny) -> float:
    config = tiny.recipe.loss.kl
    forms = (config.model_copy(update={"form": form}) for form in ("gaussian", "box"))
    return max(max(term_off("kl", form)) for form in forms)


def _contrastive(tiny: Tiny) -> float:
    return max(term_off("clip", ClipLossConfig(weight=1.0)))


def _ema(tiny: Tiny) -> float:
    """Two updates, of a decay that still warms up and of one that has."""
    p = nn.Parameter(torch.zeros(3))
    ema = Ema({"p": p}, 0.9)
    with torch.no_grad():
        p.add_(1.0)
    ema.update(0)
    ema.update(10_000)
    return _off(ema.average["p"], torch.full((3,), 1 - 0.1 * 0.9))


def _grows(tiny: Tiny, kind: Callable[[], SolverConfig]) -> float:
    """How far a solver takes dx/dt = 2 t x from e times where it began, in 100 steps."""
    x = tiny.batch.noise.abs() + 1
    end = integrate(kind(), lambda x, t: 2 * t.view(-1, 1, 1, 1) * x, x, time_grid("uniform", 100))
    return _off(end / x, torch.full_like(x, math.e))


def _euler(tiny: Tiny) -> float:
    return _grows(tiny, EulerSolver)


def _solvers(tiny: Tiny) -> float:
    kinds = set(get_args(get_args(SolverConfig)[0])) - {EulerSolver}
    return max(_grows(tiny, kind) for kind in kinds)


def _precision(tiny: Tiny) -> float:
    """The sampler on the true field of known ends."""
    batch, config = tiny.batch, tiny.recipe.sample.model_copy(update={"guidance_scale": 1.0})
    rows = native_teacher(batch.z1, batch.target, tiny.captions, batch.noise, config, tiny.rho)
    return max(value for key, value in rows.items() if "/mse@" in key)


def _sampled_code(tiny: Tiny) -> float:
    config, steps = tiny.recipe.sample, tiny.recipe.sample.steps
    config = config.model_copy(update={"guidance_scale": 1.0, "solver": EulerSolver()})
    with hearing_codes(tiny.model) as heard:
        sampling.generate_latents(tiny.model, tiny.captions, config, tiny.batch.noise)
    want = _code((torch.arange(steps) + 0.5) / steps)
    return _off(torch.stack(heard), want[:, None].expand(steps, SAMPLES))


def _sampler(tiny: Tiny) -> float:
    """Without guidance and with a scale of 3."""
    worst = 0.0
    for scale in (1.0, 3.0):
        config = tiny.recipe.sample.model_copy(update={"guidance_scale": scale})
        made = sampling.generate_latents(tiny.model, tiny.captions, config, tiny.batch.noise)
        worst = max(worst, _off(made, tiny.sampled(tiny.z0, scale)))
    return worst


def _pictures(tiny: Tiny) -> float:
    """In grey levels, of 255."""
    model, autoencoder, seed, cpu = tiny.model, tiny.autoencoder, 0, torch.device("cpu")
    noise = torch.cat(
        [
            Draws(seed, tiny.captions[:place].count(caption), 1, slice(None), cpu).normal(
                f"sample/{caption}", tiny.shape
            )
            for place, caption in enumerate(tiny.captions)
        ]
    )
    with torch.no_grad():
        posterior = model.posterior(model.text(model.text.tokenize(tiny.captions)))
        z0 = posterior.mu + (0.5 * posterior.logvar).exp() * noise
        z = tiny.sampled(z0, tiny.recipe.sample.guidance_scale)
        want = autoencoder.net.decode(_unscaled(autoencoder.scale, z))[0]
    made = sampling.generate(model, autoencoder, tiny.captions, tiny.recipe.sample, seed)
    return _off(torch.from_numpy(made), torch.from_numpy(from_pictures(want)))


@dataclass(frozen=True)
class Check:
    """where: the source that the theory is about; within: how far off it may be."""

    theory: str
    where: str
    within: float
    off: Callable[[Tiny], float]


AUTOENCODER, SCALE = "flowray/model/autoencoder.py", "flowray/model/latent.py"
STEP, TERMS, TOTAL = "flowray/train/step.py", "flowray/losses/terms.py", "flowray/losses/total.py"
PATH, SOLVER, SAMPLER = (
    "flowray/flow/path.py",
    "flowray/flow/solver.py",
    "flowray/sample/generate.py",
)
CHECKS: dict[str, Check] = {
    "encode": Check("encode_moments gives raw mean and log-variance", AUTOENCODER, 1e-5, _encode),
    "frozen": Check("the autoencoder stays in eval mode", AUTOENCODER, 0.0, _frozen),
    "sample": Check("z1 = (mean + exp(logvar / 2) noise - shift) * scale", SCALE, 1e-4, _sample),
    "latent_scale": Check("training takes z1 scaled once", STEP, 1e-4, _latent_scale),
    "latent_drawn": Check("training draws z1 from its posterior", STEP, 0.15, _latent_drawn),
    "decode": Check("decode(z) is the decoder on z / scale + shift", SCALE, 1e-4, _decode),
    "path": Check("x_t = (1 + t (rho - 1)) z0 + t z1, v* = (rho - 1) z0 + z1", PATH, 1e-5, _path),
    "source": Check("training starts at z0 = mu + exp(logvar / 2) noise", TOTAL, 1e-5, _source),
    "trained_code": Check("training tells the network 4 - 8 t", TOTAL, 1e-5, _trained_code),
    "flow_loss": Check("loss/flow = mean (u(x_t, 4 - 8 t) - v*)^2", TERMS, 1e-4, _flow_loss),
    "kl": Check("loss/kl is that of N(mu, sigma^2) to N(0, 1), unscaled", TERMS, 1e-4, _kl),
    "contrastive": Check(
        "loss/clip = -ln softmax of own pairs, both ways", TERMS, 1e-5, _contrastive
    ),
    "ema": Check("the EMA takes in 1 - decay of the weights", "flowray/train/optim.py", 1e-6, _ema),
    "euler": Check("Euler takes dx/dt = 2 t x about from 1 to e", SOLVER, 0.02, _euler),
    "solvers": Check("all others, of second order, take it there", SOLVER, 1e-3, _solvers),
    "precision": Check("the sampler adds up its steps in fp32", SAMPLER, 1e-9, _precision),
    "sampled_code": Check("sampling tells the network 4 - 8 t", SAMPLER, 1e-5, _sampled_code),
    "sampler": Check("sampling adds dt (v_null + s (v - v_null))", SAMPLER, 1e-3, _sampler),
    "pictures": Check("a picture is the end of sampling, decoded once", SAMPLER, 1.0, _pictures),
}
