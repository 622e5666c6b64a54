"""What the users' field notes advise, as priors that a sweep can take with `prior: field_notes`.

Values of losses are in this package's units: means over latent dims, where the notes' sums are
marked. sigma says how far the notes' own advice spreads: in decades, for LINEAR keys in their own
units. `field_notes_prior` makes it what the searched range takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from flowray.sweepconfig.distributions import Prior

FIELD_NOTES: Mapping[str, Prior] = {
    # log 0919: restart at 2 x the base lr of 2.5e-6, at batch 1024
    "optim.lr": Prior(value=5e-6, sigma=0.3),
    "optim.weight_decay": Prior(value=0.01, sigma=0.3),
    "optim.clip_grad": Prior(value=1.0, sigma=0.3),
    "optim.schedule.t0": Prior(value=20_000, sigma=0.3),
    "loss.kl.weight": Prior(value=4.0, sigma=0.5),  # 1e-3 on the KL summed over 4096 dims
    "loss.clip.weight": Prior(value=2.0, sigma=0.3),  # "x 2, such as 1.0 -> 2.0"
    "loss.lpips.weight": Prior(value=0.1, sigma=0.3),  # 0.1 to 0.2 for the first 50k steps
    "loss.tv.weight": Prior(value=2e-6, sigma=0.35),  # 1e-6 to 5e-6
    "flow.time.low": Prior(value=-2.0, sigma=1.0),  # kind log_snr: uniform in [-2, 6]
    "flow.time.high": Prior(value=6.0, sigma=1.0),
    "train.ema": Prior(value=0.999, sigma=0.001),
    # s = 1 + w, the middle of their grid w = 0, 2, 3, 4.5, 6
    "sample.guidance_scale": Prior(value=4.0, sigma=1.5),
}
LINEAR = frozenset({"flow.time.low", "flow.time.high", "train.ema", "sample.guidance_scale"})


def field_notes_prior(key: str, distribution: str) -> Prior:
    """The notes' prior of a key as a parameter of that distribution takes it: sigma in decades on a
    log range, in the key's own units on an even one, none on values. A spread of s decades around v
    is v sinh(s ln 10) to each side, the mean of v 10^s - v and v - v / 10^s.
    """
    known = FIELD_NOTES[key]
    assert known.sigma is not None
    if distribution in ("categorical", "constant"):
        return Prior(value=known.value)
    decades, value = math.log(10), abs(known.value)
    if key in LINEAR and "log" in distribution:
        return Prior(value=known.value, sigma=math.asinh(known.sigma / value) / decades)
    if key not in LINEAR and "log" not in distribution:
        return Prior(value=known.value, sigma=value * math.sinh(known.sigma * decades))
    return known
