"""Every metric key that flowray writes: what it measures, in which unit, which way is better, what is normal and who says so.

Names may hold alternatives `{a,b}` and `{0..9}` or a free part `<loss>`; `describe` resolves concrete names, and `ema/KEY` to KEY
measured on the EMA weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

INF = math.inf
Direction = Literal["higher", "lower", "none"]


@dataclass(frozen=True)
class MetricKey:
    """One metric. good: the (low, high) a healthy run stays in, infinite where a side is open; None where nothing is claimed."""

    name: str
    unit: str
    direction: Direction
    good: tuple[float, float] | None
    formula: str
    source: str


LOSSES = "log, training losses"
PIPELINE = "log, pipeline check"
LOG_0919 = "log 0919"
LOG_0901 = "log 0901"
CROSSFLOW = "CrossFlow"
FLOWRAY = "flowray"


def _key(
    name: str, unit: str, direction: Direction, formula: str, source: str = FLOWRAY, good: tuple[float, float] | None = None
) -> MetricKey:
    return MetricKey(name, unit, direction, good, formula, source)


KEYS: tuple[MetricKey, ...] = (
    # the objective, unweighted
    _key("loss/flow", "latent^2 per dim", "lower", "mean |u(x_t, t) - v*|^2", CROSSFLOW),
    _key("loss/kl", "nats per dim (gaussian form)", "none", "KL(N(mu, sigma^2) || N(0, I)) / D on unscaled mu, logvar", LOSSES),
    _key("loss/kl_raw", "nats (gaussian form)", "none", "loss/kl * D, the sum over latent dims", LOG_0901),
    _key("loss/clip", "nats", "lower", "symmetric InfoNCE of z0 and the tower's view of z1", CROSSFLOW),
    _key("loss/dino", "nats", "lower", "cross-entropy of the student with the teacher's soft targets", LOSSES),
    _key("loss/lpips", "distance", "lower", "perceptual distance of decoded x1 estimate and picture", LOG_0901),
    _key("loss/tv", "latent per step", "lower", "mean |difference of neighbouring latent cells| of z0", LOG_0901),
    _key("loss/norm", "latent^2", "lower", "mean (||v|| - ||v*||)^2", LOG_0919),
    _key("loss/total", "-", "lower", "sum of weight/<loss> * loss/<loss>"),
    _key("weight/<loss>", "-", "none", "the loss's weight at this step, after its schedule"),
    # optimisation
    _key("lr/<group>", "-", "none", "learning rate of the parameter group", LOG_0901),
    _key("amp/scale", "-", "none", "loss scale of mixed precision", LOG_0901),
    _key("amp/backoffs", "count", "lower", "times the loss scale was cut so far", LOG_0901),
    _key("grad/clip_frac", "share", "none", "share of steps whose gradient norm was above optim.clip_grad", LOG_0901),
    _key("grad/total", "norm", "none", "norm of the gradient of the weighted sum, before clipping", LOSSES),
    _key("grad/{flow,kl,clip,dino,lpips,tv,norm}", "norm", "none", "norm of the gradient of this loss alone, unweighted", LOSSES),
    _key("grad/{flow,kl,clip,dino,lpips,tv,norm}_weighted", "norm", "none", "weight/<loss> * grad/<loss>; shares are of these", LOSSES),
    _key("step/{z_head,flow_head}_update_ratio", "-", "none", "mean of ||update|| / ||parameter|| per tensor", LOSSES, (1e-5, INF)),
    _key("ent/{teacher,student}", "nats", "none", "entropy of the softened outputs; near 0: too sharp to teach", LOSSES),
    # the source posterior
    _key("mu/abs_mean", "latent", "none", "mean |mu|; falls where the KL acts", LOSSES),
    _key("mu/rms", "latent", "none", "root mean mu^2; near 0: the text does not reach the latent", LOSSES),
    _key("logvar/mean", "nats", "none", "mean log sigma^2; tends to 0 where the KL acts", LOSSES, (-6.0, 6.0)),
    _key("std/mean", "latent", "none", "mean sigma; tends to 1 where the KL acts, near 0 is a collapsed source", LOSSES, (0.3, 3.0)),
    _key("std/{min,max}", "latent", "none", "least or greatest sigma of the batch", LOSSES),
    _key("z_init/mean", "latent", "none", "mean of the sampled z0, about 0", LOSSES),
    _key("z_init/var", "latent^2", "none", "variance of the sampled z0, about 1", LOSSES),
    _key("z_init/std_per_dim_mean", "latent", "none", "std over the batch, averaged over latent dims", LOSSES),
    _key("scale/{z0,z1,xt,v}_norm", "latent", "none", "batch mean of ||.|| over all latent dims", PIPELINE),
    _key("scale/ratio", "-", "none", "||z1|| / ||z0||; far from 1: check the autoencoder interface", PIPELINE, (1 / 3, 3.0)),
    # the velocity field on the fixed held-out batch
    _key("flow/cos", "cosine", "higher", "mean over samples of cos(u, v*)", LOG_0919, (0.5, 1.0)),
    _key("flow/nmse", "-", "lower", "mean |u - v*|^2 / mean |v*|^2; predicting 0 gives 1", LOSSES, (0.0, 1.0)),
    _key("flow/speed_ratio", "-", "none", "mean over samples of ||u|| / ||v*||", LOG_0919, (0.5, 2.0)),
    _key("flow/cond_gain_cos", "cosine", "higher", "cos with own z0 minus cos with another caption's z0, same z1", LOSSES, (0.0, 2.0)),
    _key("flow/nmse_t{0..9}", "-", "lower", "flow/nmse of the samples with t in this tenth", LOSSES, (0.0, 1.0)),
    _key("flow/cos_t{0..9}", "cosine", "higher", "flow/cos of the samples with t in this tenth", LOSSES, (0.5, 1.0)),
    _key("flow/endpt_rmse@{8,16,32,64}", "latent", "lower", "root mean (z_end - z1)^2 after K Euler steps; falls with K", LOSSES),
    # the whole path from a sampled z0
    _key("shoot/mse", "latent^2", "lower", "mean (z_end - z1)^2 after 100 Euler steps from a sampled z0", LOG_0919),
    _key("shoot/nmse", "-", "lower", "shoot/mse / Var(z1) of the data set; the mean latent gives 1", FLOWRAY, (0.0, 1.0)),
    _key("shoot/skill", "-", "higher", "1 - shoot/mse / mean (z0 - z1)^2; standing still gives 0", FLOWRAY, (0.0, 1.0)),
    _key("shoot/cond_gain", "-", "higher", "(mse with captions swapped - mse) / Var(z1)", FLOWRAY, (0.0, INF)),
    _key("teacher/mse@{5,10,20,50,100}", "latent^2", "lower", "mean (z_end - psi(1))^2, true field, N fp32 steps", LOG_0919, (0.0, 1e-9)),
    _key("teacher_native/mse@{5,10,20,50,100}", "latent^2", "lower", "teacher/mse in the sampler's own dtype; bf16 grows with N", LOG_0919),
    _key("gain/best", "-", "none", "the factor on u that fits v* best (least squares)", LOG_0919, (0.5, 2.0)),
    # text, autoencoder, time code
    _key(
        "text/cos", "cosine", "lower", "mean cosine of sampled z0 over pairs of prompts; low with mu near 0 is noise", LOG_0919, (-1.0, 0.9)
    ),
    _key("text/cos_mu", "cosine", "lower", "mean cosine of mu over pairs of prompts", FLOWRAY, (-1.0, 0.9)),
    _key("text/cos_same", "cosine", "none", "cosine of two z0 of one prompt; the noise's share"),
    _key("text/snr", "-", "higher", "Var over prompts of mu / mean sigma^2"),
    _key("vae/psnr", "dB", "higher", "10 log10(1 / mean (decode(encode(x)) - x)^2), pixels in [0, 1]", LOG_0919, (29.0, INF)),
    _key("time/embed_norm", "norm", "none", "norm of the time embedding; too large drowns the rest", PIPELINE),
    _key("ema/delta_rms", "-", "none", "root mean square of EMA minus raw weights"),
    # pictures and speed
    _key("eval/mean_attribute_accuracy", "share", "higher", "mean accuracy over attributes, held-out single-object prompts"),
    _key("eval/all_correct", "share", "higher", "share of pictures with every attribute right, held-out single-object prompts"),
    _key("eval/<score>", "share", "higher", "share of pictures that pass this check"),
    _key("eval/<set>/<score>", "share", "higher", "share of pictures of this set that pass this check"),
    _key("perf/images_per_s", "1/s", "higher", "train.batch_size / perf/step_s"),
    _key("perf/step_s", "s", "lower", "wall time of a training step"),
    _key("perf/data_wait_s", "s", "lower", "time a step waited for its batch"),
    _key("perf/mfu", "share", "higher", "model FLOPs per second / peak of the device"),
)


def alternatives(pattern: str) -> Iterator[str]:
    """'a_{x,y}{0..1}' as a_x0, a_x1, a_y0, a_y1; free parts `<...>` stay."""
    braces = re.search(r"\{([^}]*)\}", pattern)
    if not braces:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    parts = [str(n) for n in range(int(span[1]), int(span[2]) + 1)] if span else braces[1].split(",")
    for part in parts:
        yield from alternatives(pattern[: braces.start()] + part + pattern[braces.end() :])


@lru_cache(maxsize=1)
def _table() -> tuple[dict[str, MetricKey], list[tuple[re.Pattern[str], MetricKey]]]:
    """(keys by concrete name, keys with a free part)."""
    concrete: dict[str, MetricKey] = {}
    free: list[tuple[re.Pattern[str], MetricKey]] = []
    for key in KEYS:
        for name in alternatives(key.name):
            if "<" in name:
                free.append((re.compile(re.sub(r"<\w+>", r"[\\w.@-]+", name)), key))
            else:
                concrete[name] = replace(key, name=name)
    return concrete, free


def describe(name: str) -> MetricKey | None:
    """What a concrete metric name means, under that name; None for a name that flowray does not write."""
    concrete, free = _table()
    if name in concrete:
        return concrete[name]
    found = next((key for pattern, key in free if pattern.fullmatch(name)), None)
    if found is None and name.startswith("ema/") and not name.startswith("ema/ema/"):
        found = describe(name.removeprefix("ema/"))
        return None if found is None else replace(found, name=name, formula=f"{found.formula} (EMA weights)")
    return None if found is None else replace(found, name=name)
