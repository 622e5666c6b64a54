"""What shoot/nmse says while a run learns: at first the source's blur, later the flow's drawing,
which squared error punishes.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowray.report.results import Run, Series

SCORE = "shoot/nmse"
# of the whole path, which has no length where the flow stands still
SHOT = (SCORE, "shoot/energy", "shoot/diversity", "shoot/diversity_all")


@dataclass(frozen=True)
class Stage:
    """One probe. value: shoot/nmse; still: what the source scores without the flow; cos: flow/cos,
    energy: shoot/energy, None where not measured.
    """

    step: int
    value: float
    still: float
    cos: float | None
    energy: float | None


def without_flow(run: Run, key: str) -> Series:
    """What the run's source scores as it stands in this metric, over steps; [] for other metrics
    than SHOT, or where not measured.
    """
    base = key.removeprefix("ema/")
    return run.series(f"{key.removesuffix(base)}trivial/{base}") if base in SHOT else []


def stages(run: Run, key: str) -> list[Stage]:
    """The first probe, the one with the least value, the first with flow/cos of 0.5 and the last;
    [] where the metric is another.
    """
    if key.removeprefix("ema/") != SCORE:
        return []
    still = dict(without_flow(run, key))
    prefix = key.removesuffix(SCORE)
    cos, energy = (dict(run.series(prefix + name)) for name in ("flow/cos", "shoot/energy"))
    probes = [
        Stage(step, value, still[step], cos.get(step), energy.get(step))
        for step, value in run.series(key)
        if step in still
    ]
    if not probes:
        return []
    least = min(probes, key=lambda probe: probe.value)
    learnt = next((probe for probe in probes if probe.cos is not None and probe.cos >= 0.5), least)
    return sorted({probes[0], least, learnt, probes[-1]}, key=lambda probe: probe.step)
