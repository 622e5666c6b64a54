"""The logs replayed from their numbers alone, each run on its own: what the notes' authors took
days to see, or saw otherwise.
"""

from __future__ import annotations

import pytest

from flowray.findings.diagnose import diagnose
from flowray.findings.finding import Finding, healthy


def by_id(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.id: finding for finding in findings}


# Log 0919: cos and ratio at four times, shooting, the "passed" teacher curve, text cosines of
# samples, the VAE's self test.
LOG_0919 = {
    "flow/cos_t1": 0.050,
    "flow/cos_t3": 0.045,
    "flow/cos_t6": 0.036,
    "flow/cos_t9": 0.015,
    "flow/speed_ratio": (0.287 + 0.296 + 0.286 + 0.282) / 4,
    "shoot/mse": 4.531314,
    "teacher_native/mse@5": 5.42e-5,
    "teacher_native/mse@10": 1.54e-4,
    "teacher_native/mse@20": 5.84e-4,
    "teacher_native/mse@50": 3.41e-3,
    "teacher_native/mse@100": 1.51e-2,
    "text/cos": (0.098 + 0.114 + 0.108) / 3,
    "vae/psnr": 29.08,
    "latent/var": 1.414,
}


def test_log_0919_its_field_is_not_learnt_and_a_gain_would_make_it_worse() -> None:
    found = diagnose(LOG_0919, {"latent": [4, 32, 32]})
    assert [finding.id for finding in found] == [
        "worse_than_zero",
        "half_precision_solver",
        "text_unproven",
        "worse_than_nothing",
        "gain_would_hurt",
    ]
    named = by_id(found)
    assert "flow/nmse 1.06" in named["worse_than_zero"].evidence
    assert "predicting zero: 1" in named["worse_than_zero"].evidence
    assert "from 1.06 to 1.93" in named["gain_would_hurt"].evidence
    assert "gain 3.48" in named["gain_would_hurt"].evidence  # the log rounds it to 3.5
    assert "shoot/mse 4.53" in named["worse_than_nothing"].evidence
    # Var(z1) 1.414 and a source of unit variance
    assert "likely scores 2.41" in named["worse_than_nothing"].evidence
    assert {named[name].explained_by for name in ("worse_than_nothing", "gain_would_hurt")} == {
        "worse_than_zero"
    }
    assert "279" in named["half_precision_solver"].evidence  # 1.51e-2 / 5.42e-5: the curve grows
    # the log's "text passed" stands on drawn latents
    assert named["text_unproven"].severity == "info"
    assert not healthy(found)


def test_log_0919_from_the_four_numbers_that_are_quoted_most() -> None:
    teacher = {f"teacher/mse@{n}": value for n, value in ((5, 5.42e-5), (100, 1.51e-2))}
    found = diagnose({"flow/cos": 0.05, "flow/speed_ratio": 0.29, "shoot/mse": 4.53, **teacher}, {})
    named = by_id(found)
    assert [finding.id for finding in found][:2] == ["worse_than_zero", "half_precision_solver"]
    assert {"worse_than_nothing", "gain_would_hurt"} <= named.keys()
    assert "likely scores 2 (estimated" in named["worse_than_nothing"].evidence
    assert "velocity_too_small" not in named  # amplitude is not what it lacks


# Log 0901: 40k steps, loss/flow 0.92 to 0.93 for long, base lr 2.5e-6 of which 2.5e-7 is left,
# norms 70 and 71, pooled head.
LOG_0901 = {
    "loss/flow": 0.925,
    "loss/kl": 0.069,
    "loss/kl_raw": 70.0,
    "scale/z0_norm": 70.0,
    "scale/z1_norm": 71.0,
    "logvar/min": -0.44,
    "logvar/max": 0.02,
}
FACTS_0901 = {
    "step": 40000,
    "lr": 2.5e-7,
    "lr_peak": 2.5e-6,
    "lr_schedule": "warm_restarts",
    "head": "pooled",
    "latent": [4, 32, 32],
}
PLATEAU_0901 = [
    {"step": step, "loss/flow": 0.93 - 0.01 * (step - 20000) / 20000}
    for step in range(20000, 40001, 1000)
]


def test_log_0901_the_learning_rate_then_the_missing_places() -> None:
    found = diagnose(LOG_0901, FACTS_0901, PLATEAU_0901)
    assert [(finding.id, finding.severity) for finding in found] == [
        ("lr_too_low", "bad"),
        ("no_spatial_structure", "warn"),
    ]
    rate, places = found
    assert "2.5e-7" in rate.evidence
    assert "loss/flow 0.925" in rate.evidence
    assert "optim.lr=5e-6" in rate.fix  # twice the base: the log's own restart
    assert "warm_restarts" in rate.fix
    assert "'model.head={kind: grid}'" in places.fix


def test_log_0901_norms_of_70_and_71_accuse_no_scale() -> None:
    assert (
        not {"latent_scale_off", "moments_as_latents"}
        & by_id(diagnose(LOG_0901, FACTS_0901, PLATEAU_0901)).keys()
    )


def test_log_0901_with_a_grid_head_and_a_normal_rate_would_be_a_plateau_only() -> None:
    facts = FACTS_0901 | {"lr": 1e-4, "lr_peak": 1e-4, "head": "grid"}
    assert [finding.id for finding in diagnose(LOG_0901, facts, PLATEAU_0901)] == ["plateau"]


@pytest.mark.parametrize(("z0", "z1"), [(151.0, 896.0), (155.0, 1224.0)])
def test_log_0907_moments_without_sampling(z0: float, z1: float) -> None:
    found = diagnose({"scale/z0_norm": z0, "scale/z1_norm": z1}, {})
    assert [finding.id for finding in found] == ["moments_as_latents", "latent_scale_off"]
    assert "autoencoder.sample(autoencoder.encode_moments(x)" in found[0].fix
    assert "Do not rescale z1 by a norm ratio" in found[0].fix
    assert found[1].explained_by == "moments_as_latents"
    assert not any("r =" in finding.fix for finding in found)


def test_the_logs_thresholds_of_the_training_losses() -> None:
    weak = diagnose(
        {"grad/dino_of_total": 0.04, "grad/flow_of_total": 0.08}, {"loss_weights": {"dino": 0.5}}
    )
    assert {finding.id for finding in weak} == {"dino_weak", "flow_drowned"}
    assert "loss.dino.weight=2" in by_id(weak)["dino_weak"].fix  # four times what it is
    assert diagnose({"grad/dino_of_total": 0.3, "grad/flow_of_total": 0.6}, {}) == []
    assert [
        f.id
        for f in diagnose(
            {"step/z_head_update_ratio_peak": 9e-6, "step/flow_head_update_ratio_peak": 1e-3}, {}
        )
    ] == ["dead_head"]
    assert (
        diagnose(
            {"step/z_head_update_ratio_peak": 1.1e-5, "step/flow_head_update_ratio_peak": 1e-3}, {}
        )
        == []
    )
    assert [finding.id for finding in diagnose({"ent/teacher": 0.001}, {})] == ["dino_saturated"]


def test_log_0826_guidance_needs_null_samples() -> None:
    guided = {"guidance_scale": 5.5, "null_probability": 0.0}  # the log's w = 4.5
    assert [finding.id for finding in diagnose({}, guided)] == ["guidance_without_null"]
