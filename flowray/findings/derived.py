"""Numbers that follow from others, by key: for runs of which only some were written down, and
for what rules compare.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping

from flowray.findings.reading import Absent, Reading

BINS = range(10)
ENDS = (5, 10, 20, 50, 100)


def _dims(r: Reading) -> int:
    return math.prod(r.fact("latent"))


def _known(r: Reading, prefix: str, names: Iterable[object], least: int = 1) -> list[float]:
    """The measured ones of the keys PREFIX + name; Absent where they are fewer than `least`."""
    found = [r[key] for name in names if r.has(key := f"{prefix}{name}")]
    if len(found) < least:
        raise Absent(prefix)
    return found


def _nothing(r: Reading) -> float:
    """mean (z0 - z1)^2: measured, or Var(z1) + Var(z0) of independent latents, each 1 where it
    is not known.
    """
    if r.has("trivial/shoot/mse"):
        return r["trivial/shoot/mse"]
    return r.get("latent/var", 1.0) + r.get("z_init/var", 1.0)


def _growth(r: Reading, curve: str) -> float:
    """Error at the most steps over that at the fewest."""
    errors = _known(r, f"{curve}/mse@", ENDS, least=2)
    return errors[-1] / max(errors[0], 1e-12)


def _rounding(r: Reading, curve: str) -> float:
    """Error at the most steps, relative to the state at the end (1 where it is not known)."""
    known = r.has("scale/z1_norm") and "latent" in r.facts
    size = r["scale/z1_norm"] / _dims(r) ** 0.5 if known else 1.0
    return math.sqrt(r[f"{curve}/mse@{ENDS[-1]}"]) / max(size, 1e-12)


def _bins(r: Reading) -> list[float]:
    return _known(r, "flow/nmse_t", BINS, least=5)


def _sampled(key: str) -> Callable[[Reading], float]:
    """The metric of the weights that sampling uses."""
    return lambda r: (
        r[f"ema/{key}"]
        if r.facts.get("weights_sampled") == "ema" and f"ema/{key}" in r.metrics
        else r[key]
    )


def _late(r: Reading) -> tuple[list[float], list[float]]:
    """The third and the last quarter of the flow loss's curve."""
    values = [value for _, value in r.points("loss/flow", least=8)]
    return values[len(values) // 2 : 3 * len(values) // 4], values[3 * len(values) // 4 :]


def _fall(r: Reading) -> float:
    before, last = _late(r)
    return 1 - statistics.median(last) / statistics.median(before)


def _rise(r: Reading) -> float:
    """Median of the last tenth over the least median of any tenth: of the flow loss, and of the
    training nmse where it was logged; the smaller counts. A source that grows raises the loss and
    not the nmse, one that narrows on an anchor the nmse and not the loss.
    """
    rises = []
    for curve in ("loss/flow", "train/nmse"):
        try:
            values = [value for _, value in r.points(curve, least=20)]
        except Absent:
            continue
        size = max(len(values) // 10, 2)
        tenths = [
            statistics.median(values[i : i + size]) for i in range(0, len(values) - size + 1, size)
        ]
        rises.append(statistics.median(values[-size:]) / min(tenths))
    if not rises:
        raise Absent("loss/flow")
    return min(rises)


def _train_nmse(r: Reading) -> float:
    if r.has("scale/v_norm"):
        return r["loss/flow"] * _dims(r) / r["scale/v_norm"] ** 2
    # independent latents
    return r["loss/flow"] * _dims(r) / (r["scale/z0_norm"] ** 2 + r["scale/z1_norm"] ** 2)


def _negative(r: Reading) -> float:
    """How far loss/kl, which is never below 0, was below it."""
    return -min(value for _, value in r.points("loss/kl", least=1))


DERIVED: Mapping[str, Callable[[Reading], float]] = {
    # of the field: per sample nmse = 1 + k^2 - 2 k c
    "flow/cos": lambda r: statistics.fmean(_known(r, "flow/cos_t", BINS)),
    "flow/nmse": lambda r: (
        1 + r["flow/speed_ratio"] ** 2 - 2 * r["flow/speed_ratio"] * r["flow/cos"]
    ),
    "gain/best": lambda r: r["flow/cos"] / r["flow/speed_ratio"],
    "gain/median": lambda r: 1 / r["flow/speed_ratio"],
    "gain/nmse_ls": lambda r: 1 - r["flow/cos"] ** 2,
    "gain/nmse_median": lambda r: 2 - 2 * r["flow/cos"],
    "gain/nmse_none": lambda r: r["flow/nmse"],
    "sampled/cos": _sampled("flow/cos"),
    "flow/bin_worst": lambda r: max(_bins(r)),
    "flow/bin_middle": lambda r: statistics.median(_bins(r)),
    # of the whole path
    "shoot/nothing": _nothing,
    # as near as notes come; probes divide by the variance about the mean latent
    "shoot/nmse": lambda r: r["shoot/mse"] / r["latent/var"],
    "shoot/skill": lambda r: 1 - r["shoot/mse"] / r["shoot/nothing"],
    "teacher/growth": lambda r: _growth(r, "teacher"),
    "teacher_native/growth": lambda r: _growth(r, "teacher_native"),
    "teacher/rounding": lambda r: _rounding(r, "teacher"),
    "teacher_native/rounding": lambda r: _rounding(r, "teacher_native"),
    "data/gap": lambda r: r["shoot/nmse"] - r["train_set/shoot_nmse"],
    # of the latents and the text
    "scale/ratio": lambda r: r["scale/z1_norm"] / r["scale/z0_norm"],
    "text/nats": lambda r: 0.5 * _dims(r) * math.log1p(r["text/snr"]),
    # of training
    "history/fall": _fall,
    "history/rise": _rise,
    "history/kl_negative": _negative,
    "train/nmse": _train_nmse,
    "moved/most": lambda r: max(_known(r, "moved/", ("head", "velocity"))),
}
