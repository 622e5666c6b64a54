"""What trivial predictors score, and the usual thresholds, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flowray.config.keys import GOOD_PSNR


@dataclass(frozen=True)
class Baseline:
    """What a trivial predictor scores, or the usual threshold, in words."""

    value: float
    words: str


BASELINES: Mapping[str, Baseline] = {
    "shoot/nmse": Baseline(1.0, "predicting the mean"),
    "shoot/skill": Baseline(0.0, "doing nothing"),
    "shoot/energy": Baseline(1.0, "drawing any picture of the data"),
    "shoot/diversity": Baseline(1.0, "as varied as the data"),
    "shoot/diversity_all": Baseline(1.0, "as any two pictures"),
    "source/width": Baseline(1.0, "what a caption leaves open"),
    "source/width_all": Baseline(1.0, "all that the data vary"),
    "shoot/copies": Baseline(0.01, "new pictures"),
    "flow/nmse": Baseline(1.0, "predicting zero"),
    "train/nmse": Baseline(1.0, "predicting zero"),
    "flow/cos": Baseline(0.0, "unrelated"),
    "flow/speed_ratio": Baseline(1.0, "right speed"),
    "std/mean": Baseline(1.0, "the prior's width"),
    "text/cos_mu": Baseline(0.9, "prompts too alike above"),
    "vae/psnr": Baseline(GOOD_PSNR, "autoencoder in order above"),
    "shoot/cond_gain": Baseline(0.0, "caption ignored"),
    "flow/cond_gain_cos": Baseline(0.0, "caption ignored"),
}


def baseline(key: str) -> Baseline | None:
    """The baseline of a key, measured on raw or EMA weights alike."""
    return BASELINES.get(key.removeprefix("ema/"))
