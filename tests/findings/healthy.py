"""The numbers, facts and loss curves of a healthy run, from which the tests' cases depart."""

from __future__ import annotations

import math
from typing import Any

# Of a run on shapes that paints what it is told; its weights move little at the end of the cosine.
HEALTHY: dict[str, float] = {
    "loss/flow": 0.27,
    "train/nmse": 0.12,
    "flow/cos": 0.93,
    "flow/nmse": 0.13,
    "flow/speed_ratio": 0.93,
    "flow/cond_gain_cos": 0.03,
    **{
        f"flow/nmse_t{b}": value
        for b, value in enumerate((0.15, 0.11, 0.1, 0.09, 0.08, 0.08, 0.09, 0.11, 0.17, 0.35))
    },
    "shoot/mse": 0.56,
    "shoot/nmse": 0.55,
    "shoot/skill": 0.72,
    "shoot/cond_gain": 1.0,
    "trivial/shoot/mse": 2.0,
    "latent/var": 1.01,
    "latent/fit_slope": 1.0,
    "latent/fit_residual": 0.001,
    "vae/psnr": 32.6,
    "scale/z0_norm": 19.7,
    "scale/z1_norm": 15.9,
    "scale/v_norm": 25.0,
    "scale/ratio": 0.8,
    "std/mean": 0.92,
    "mu/rms": 0.7,
    "logvar/mean": -0.2,
    "logvar/clamped_share": 0.0,
    "text/cos": 0.08,
    "text/cos_mu": 0.2,
    "text/cos_prompts": 0.2,
    "text/snr": 0.59,
    "share/kl": 0.27,
    "share/clip": 1.1,
    "grad/flow_of_total": 0.8,
    "grad/clip_of_total": 0.6,
    "grad/flow_head": 0.2,
    "grad/cos_flow_clip": 0.2,
    "grad/cos_kl_clip": -0.54,
    "loss/clip": 0.3,
    "clip/chance": math.log(64),
    "clip/cond_gain": 5.0,
    "clip/scale": 20.0,
    "step/z_head_update_ratio_peak": 5e-3,
    "step/flow_head_update_ratio_peak": 1e-2,
    "moved/head": 1.1,
    "moved/velocity": 1.5,
    "ema/moved": 0.99,
    "ema/delta_relative": 0.01,
    "ema/flow/cos": 0.93,
    "ema/flow/nmse": 0.13,
    "ema/shoot/nmse": 0.55,
    "field/fit_x1": 0.95,
    "field/fit_x0": -0.97,
    "field/cos_x1": 0.6,
    "field/cos_x0": -0.7,
    "field/cos_eps": -0.5,
    "same_batch/ratio": 1.02,
    "same_batch/train_loss": 0.27,
    "same_batch/eval_loss": 0.275,
    "time/cos_reversed": 0.7,
    "time/cos_plain": 0.8,
    "time/cos_log_snr": 0.6,
    "time/coverage_min": 0.98,
    "time/embed_ratio": 1.6,
    "shoot/nmse_dt1": 0.56,
    "shoot/nmse_reversed": 1.5,
    "sampler/gap": 0.0,
    "sampler/psnr": 99.0,
    "sampler/strip_psnr_ema": 99.0,
    "sampler/strip_psnr_raw": 41.0,
    "sampler/bits": 24,
    "endpoint/falls_euler": 1.03,
    "flow/endpt_rmse@8": 0.73,
    "flow/endpt_rmse@64": 0.75,
    "data/samples": 12000,
    "data/epochs": 9,
    "data/duplicate_share": 0.0,
    "data/agreement": 0.6,
    "data/agreement_shuffled": -0.1,
    "data/agreement_z": 40.0,
    "data/near_share": 0.22,
    "data/near_typical": 0.05,
    "data/seen_share": 0.03,
    "data/captions_wrong": 0.01,
    "data/captions_wrong_low": 0.0,
    "data/word_auc": 1.0,
    "data/caption_same": 0.01,
    "data/caption_over_next": 1.4,
    "data/caption_wordless": 0.0,
    "data/caption_full": 0.7,
    "data/caption_broken": 0.0,
    "data/colour_told": 0.53,
    "data/colour_other": 0.26,
    "data/colour_z": 15.0,
    "data/colour_chroma": 0.1,
    "data/side_across": 1.0,
    "data/side_across_high": 1.07,
    "data/side_across_low": 0.93,
    "latent/stale_share": 0.0,
    "latent/stale_suspects": 0.0,
    "latent/fit_slope_train": 1.0,
    "latent/fit_residual_train": 1e-7,
    "latent/batch_slope": 1.0,
    **{f"known/{term}": 1e-7 for term in ("path", "flow", "kl", "clip")},
    **{f"known/{term}_gradient": 1e-7 for term in ("flow", "kl", "clip")},
    "train_set/shoot_nmse": 0.5,
    **{
        f"{curve}/mse@{n}": 1e-14 * n
        for curve in ("teacher", "teacher_native")
        for n in (5, 10, 20, 50, 100)
    },
}
# What stands beside that where captions leave things open: quickstart at its end.
ANSWERS: dict[str, float] = {
    "data/left_open": 0.642,
    "source/width": 1.58,
    **{f"source/separation@{t}": x for t, x in (("0", 0.875), ("0.25", 0.656), ("0.5", 0.5))},
    **{f"trivial/source/separation@{t}": 0.0313 for t in ("0", "0.25", "0.5")},
    "shoot/nmse": 1.08,
    "shoot/skill": 0.284,
    "shoot/energy": 0.674,
    "trivial/shoot/energy": 0.742,
    "shoot/diversity": 0.763,
    "shoot/copies": 0.0,
    "shoot/cond_gain": 0.41,
    "train_set/shoot_nmse": 0.95,
}
FACTS: dict[str, Any] = {
    "step": 3400,
    "steps": 3400,
    "latent": [4, 8, 8],
    "deterministic": False,
    "head": "pooled",
    "lr": 1e-8,
    "lr_peak": 3e-3,
    "lr_schedule": "cosine",
    "precision": "fp32",
    "velocity_fp32": False,
    "weights_sampled": "ema",
    "guidance_scale": 1.0,
    "null_probability": 0.1,
    "kl_weight": 2.0,
    "kl_form": "box",
    "source_grad": "full",
    "loss_weights": {"flow": 1.0, "kl": 2.0, "clip": 0.3},
    "nonfinite": {},
}


def falling(start: float, end: float, rows: int = 60) -> list[dict[str, Any]]:
    """A loss curve that falls fast at first."""
    return [
        {"step": 50 * (i + 1), "loss/flow": end + (start - end) * math.exp(-9 * i / rows)}
        for i in range(rows)
    ]


FLAT = falling(0.93, 0.925)
