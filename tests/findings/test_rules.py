"""Every rule: it fires on the numbers of its fault, first or second, and not on those of a
healthy run; nothing absent crashes it.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import asdict
from typing import Any, NamedTuple

import pytest

from flowray.config.keys import describe
from flowray.config.load import load_recipe
from flowray.findings.derived import DERIVED
from flowray.findings.diagnose import diagnose
from flowray.findings.finding import Finding, as_json, healthy, recorded
from flowray.findings.rules import RULES

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
    **{f"latent/{side}_{name}": 0.0 for side in ("fit", "batch") for name in ("power", "away")},
    "latent/std_power": 0.02,
    "latent/noise_ratio": 1.0,
    "latent/noise_ratio_train": 1.0,
    "latent/batch_noise_ratio": 1.0,
    "vae/psnr": 32.6,
    "vae/scale_power": 0,
    "vae/training": 0,
    "vae/repeat_error": 0.0,
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
    "kl/ratio": 1.0,
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
    "time/train_gap": 0.0,
    "time/sample_gap": 0.0,
    "time/cos_reversed": 0.7,
    "time/cos_plain": 0.8,
    "time/cos_log_snr": 0.6,
    "time/coverage_min": 0.98,
    "time/embed_ratio": 1.6,
    "shoot/nmse_dt1": 0.56,
    "shoot/nmse_reversed": 1.5,
    "sampler/gap": 0.0,
    "sampler/psnr": 99.0,
    "sampler/psnr_resampled": 18.0,
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
    "train_set/shoot_nmse": 0.5,
    **{
        f"{curve}/mse@{n}": 1e-14 * n
        for curve in ("teacher", "teacher_native")
        for n in (5, 10, 20, 50, 100)
    },
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


class Case(NamedTuple):
    """What the numbers of a run with this fault are, where they differ from the healthy run's."""

    id: str
    metrics: dict[str, float] = {}
    facts: dict[str, Any] = {}
    history: list[dict[str, Any]] = falling(1.5, 0.27)


FLAT = falling(0.93, 0.925)
CASES = (
    Case(
        "non_finite",
        {"loss/flow": math.nan, "finite/parameters": 0.5},
        {"nonfinite": {"module": "velocity.blocks.1", "step": 41}},
    ),
    Case("scale_twice", {"latent/fit_power": 1.0}),
    Case(
        "scale_twice",
        {"latent/batch_power": 1.02, "latent/noise_ratio_train": 4.0, "flow/cos": 0.7},
    ),
    Case(
        "scale_twice",
        {"latent/std_power": 1.0, "latent/var": 0.3, "vae/scale_power": -1, "vae/psnr": 22.0},
    ),
    Case("scale_never", {"latent/fit_power": -1.0, "latent/var": 3.3}),
    Case(
        "scale_never",
        {"latent/std_power": -1.0, "latent/var": 3.3, "vae/scale_power": 1, "vae/psnr": 20.0},
    ),
    Case("scale_inverted", {"latent/fit_power": -2.0, "latent/var": 11.0}),
    Case("moments_as_latents", {"latent/noise_ratio_train": 0.0, "latent/batch_noise_ratio": 0.0}),
    Case(
        "moments_as_latents",
        {
            "latent/batch_power": -1.0,
            "latent/noise_ratio_train": 9.0,
            "latent/batch_noise_ratio": 0.0,
        },
    ),
    Case("decode_scale", {"vae/scale_power": -2, "vae/psnr": 15.0}),
    Case("autoencoder_in_train_mode", {"vae/training": 1}),
    Case("autoencoder_in_train_mode", {"vae/repeat_error": 0.1, "latent/fit_residual": 0.2}),
    Case("wrong_autoencoder", {"latent/fit_residual": 0.6, "vae/psnr": 21.0}),
    Case("latent_scale_off", {"latent/var": 6.0}),
    Case("vae_poor", {"vae/psnr": 17.0}),
    Case("captions_shuffled", {"data/agreement_z": 0.3, "data/agreement": -0.1, "text/snr": 0.0}),
    Case("dataset_duplicated", {"data/duplicate_share": 0.9, "data/samples": 512}),
    Case("dataset_too_small", {"data/samples": 128}),
    Case("dataset_too_small", {"data/epochs": 900, "train_set/shoot_nmse": 0.05}),
    Case(
        "velocity_sign",
        {
            "field/fit_x1": -0.9,
            "field/fit_x0": 0.9,
            "flow/cos": -0.9,
            "flow/nmse": 3.6,
            "shoot/skill": -2.0,
        },
    ),
    Case(
        "x1_target",
        {"field/fit_x1": 0.9, "field/fit_x0": -0.05, "flow/cos": 0.6, "same_batch/ratio": 2.0},
    ),
    Case(
        "epsilon_target",
        {
            "field/fit_x1": 0.1,
            "field/fit_x0": 0.9,
            "flow/cos": -0.6,
            "flow/nmse": 2.5,
            "same_batch/ratio": 2.0,
        },
    ),
    Case(
        "epsilon_target",
        {"field/cos_eps": 0.8, "field/fit_x1": 0.2, "field/fit_x0": 0.5, "flow/cos": -0.4},
    ),
    Case("time_code_mismatch", {"time/train_gap": 8.0}),
    Case("time_code_mismatch", {"time/cos_reversed": 0.96}),
    Case("time_untrained", {"time/coverage_min": 0.0, "shoot/skill": -0.2}, {"time_kind": "alpha"}),
    Case(
        "time_untrained", {"flow/nmse_t0": 1.4, "time/coverage_min": 0.1}, {"time_kind": "log_snr"}
    ),
    Case("same_batch_mismatch", {"same_batch/ratio": 1.6, "shoot/skill": -0.2}),
    Case(
        "lr_too_low",
        {"step/z_head_update_ratio_peak": 4e-6, "step/flow_head_update_ratio_peak": 2e-6},
        {"lr_peak": 2.5e-7},
    ),
    Case(
        "lr_too_low",
        {
            "moved/head": 2e-4,
            "moved/velocity": 1e-4,
            "flow/nmse": 0.99,
            "train/nmse": 1.0,
            "flow/cos": 0.1,
        },
    ),
    Case(
        "lr_too_low",
        {"train/nmse": 0.6},
        {"lr": 2.5e-7, "lr_peak": 1e-4, "lr_schedule": "warm_restarts"},
        FLAT,
    ),
    Case(
        "lr_too_high", {"step/z_head_update_ratio_peak": 2.0, "flow/nmse": 4.0, "shoot/skill": -3.0}
    ),
    Case(
        "lr_too_high",
        {},
        {},
        [*falling(1.5, 0.3), *({"step": 3000 + 50 * i, "loss/flow": 1.2} for i in range(1, 9))],
    ),
    Case("lr_too_high", {"moved/head": 12.0, "text/snr": 0.0, "shoot/skill": -0.2}, {"step": 150}),
    Case("dead_head", {"step/z_head_update_ratio_peak": 1e-9, "text/snr": 0.0}),
    Case("dead_head", {"moved/head": 0.0, "text/snr": 0.0}),
    Case("dead_head", {"grad/flow_head": 0.0}),
    Case("dead_head", {"flow/speed_ratio": 5e-8, "flow/nmse": 1.0, "flow/cos": 0.11}),
    Case("logvar_saturated", {"logvar/clamped_share": 0.9, "std/mean": 0.05}),
    Case(
        "source_collapsed",
        {"std/mean": 0.08, "shoot/nmse": 1.6, "shoot/skill": -0.3},
        {"kl_weight": 0.01},
    ),
    Case("source_collapsed", {"std/mean": 0.05, "logvar/clamped_share": 0.9}, {"kl_weight": 0.01}),
    Case(
        "source_inflated",
        {"std/mean": 6.0, "scale/ratio": 0.2, "shoot/skill": -0.3},
        {"kl_weight": 0.01, "source_grad": "path"},
    ),
    Case("kl_on_scaled", {"kl/ratio": 3.0}),
    Case("kl_drowned", {"share/kl": 0.001, "std/mean": 0.25}, {"kl_weight": 1e-5}),
    Case(
        "kl_crushing",
        {"text/snr": 1e-4, "std/mean": 1.0, "mu/rms": 0.01},
        {"kl_weight": 300.0, "kl_form": "gaussian"},
    ),
    Case("condition_ignored", {"text/snr": 0.0, "text/cos_mu": 1.0}),
    Case("condition_ignored", {"shoot/cond_gain": 0.001, "flow/cond_gain_cos": 0.0}),
    Case("guidance_without_null", {}, {"guidance_scale": 4.0, "null_probability": 0.0}),
    Case("clip_weak", {"loss/clip": 4.1, "clip/cond_gain": 0.05}),
    Case("clip_weak", {"grad/clip_of_total": 0.001, "loss/clip": 2.0}),
    Case(
        "clip_weak",
        {"grad/clip_of_total": 4e-4, "loss/clip": 0.7, "clip/cond_gain": 10.0},
        {},
        falling(1.5, 0.27, 20),
    ),
    Case("clip_saturated", {"loss/clip": 1e-4, "clip/scale": 100.0}),
    Case("dino_weak", {"grad/dino_of_total": 0.02}, {"loss_weights": {"flow": 1.0, "dino": 0.5}}),
    Case("dino_weak", {"ent/teacher": 6.93, "ent/chance": math.log(1024), "ent/student": 6.9}),
    Case("dino_saturated", {"ent/teacher": 1e-5, "ent/chance": math.log(1024)}),
    Case("losses_opposed", {"grad/cos_flow_clip": -0.9}),
    Case("flow_drowned", {"grad/flow_of_total": 0.03}),
    Case("worse_than_zero", {"flow/cos": 0.0365, "flow/speed_ratio": 0.288, "flow/nmse": 1.06}),
    Case(
        "velocity_too_small",
        {"flow/cos": 0.9, "flow/speed_ratio": 0.28, "flow/nmse": 0.58, "gain/nmse_none": 0.58},
    ),
    Case("gain_would_hurt", {"flow/cos": 0.55, "flow/speed_ratio": 0.45, "flow/nmse": 0.71}),
    Case("velocity_too_large", {"flow/speed_ratio": 3.0, "flow/nmse": 4.6}),
    Case("field_weak", {"flow/cos": 0.35, "flow/nmse": 0.9, "flow/speed_ratio": 0.6}),
    Case(
        "half_precision_velocity",
        {"variant/fp32_cos": 0.93, "variant/bf16_cos": 0.8},
        {"precision": "bf16"},
    ),
    Case("sample_on_latent", {"sampler/psnr": 18.0, "sampler/psnr_resampled": 99.0}),
    Case(
        "half_precision_solver",
        {"teacher_native/mse@5": 5.42e-5, "teacher_native/mse@100": 1.51e-2, "sampler/psnr": 38.0},
    ),
    Case("half_precision_solver", {"sampler/bits": 8}),
    Case("ema_never_updated", {"ema/moved": 0.0, "ema/flow/nmse": 1.0, "ema/flow/cos": 0.0}),
    Case("raw_sampled", {}, {"weights_sampled": "raw"}),
    Case("raw_sampled", {"sampler/strip_psnr_ema": 41.0, "sampler/strip_psnr_raw": 99.0}),
    Case("sampler_mismatch", {"sampler/gap": 0.4, "sampler/psnr": 12.0}),
    Case("endpoint_grows", {"endpoint/falls_euler": 1.6}),
    Case("worse_than_nothing", {"shoot/skill": -0.4}),
    Case(
        "no_spatial_structure",
        {"train/nmse": 0.4},
        {"lr_schedule": "warm_restarts", "lr": 1e-4},
        FLAT,
    ),
    Case(
        "plateau",
        {"train/nmse": 0.4},
        {"lr_schedule": "constant", "head": "grid", "lr": 1e-4},
        FLAT,
    ),
    Case("text_unproven", {"text/cos": 0.1, "text/snr": 0.05}),
    Case("time_embedding_loud", {"time/embed_ratio": 50.0}),
    Case("undertrained", {"shoot/nmse": 1.4}),
)


def read(case: Case) -> list[Any]:
    return diagnose({**HEALTHY, **case.metrics}, {**FACTS, **case.facts}, case.history)


def test_a_healthy_run_has_no_finding() -> None:
    assert diagnose(HEALTHY, FACTS, falling(1.5, 0.27)) == []


def test_every_rule_has_a_case() -> None:
    assert {rule.id for rule in RULES} == {case.id for case in CASES}
    assert len({rule.id for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_fault_is_named_first_or_second(case: Case) -> None:
    found = read(case)
    assert case.id in [finding.id for finding in found][:2]
    named = next(finding for finding in found if finding.id == case.id)
    assert named.explained_by is None
    assert re.search(r"\d", named.evidence) or named.id in ("non_finite", "raw_sampled")
    assert named.cause
    assert named.fix
    assert healthy(found) == (named.severity == "info")


def test_a_small_velocity_that_no_gain_would_mend_is_not_called_too_small() -> None:
    """What remains of an anchored source's path after 150 steps: mostly noise, which least
    squares rightly shrinks.
    """
    field = {"flow/cos": 0.32, "flow/speed_ratio": 0.0942, "flow/nmse": 0.967}
    gains = {
        "gain/nmse_none": 0.967,
        "gain/nmse_ls": 0.949,
        "gain/nmse_median": 1.6,
        "gain/best": 2.46,
        "gain/median": 11.2,
    }
    assert "velocity_too_small" not in [
        finding.id for finding in diagnose({**HEALTHY, **field, **gains}, FACTS)
    ]


def test_an_anchored_source_may_be_narrow_but_not_a_point() -> None:
    narrow = {
        **HEALTHY,
        "std/mean": 0.147,
        "logvar/clamped_share": 0.3,
        "shoot/skill": -0.4,
        "share/kl": 0.001,
    }
    facts = {**FACTS, "kl_weight": 0.03, "loss_weights": {"flow": 1.0, "kl": 0.03, "anchor": 4.0}}
    assert healthy(diagnose(narrow, facts))
    assert not healthy(diagnose(narrow, {**facts, "loss_weights": {"flow": 1.0, "kl": 0.03}}))
    point = diagnose({**narrow, "std/mean": 0.03}, facts)
    assert point[0].id == "source_collapsed"


def test_a_loss_that_grows_with_the_source_is_no_high_learning_rate() -> None:
    """The flow loss of a source that grows rises with v*; the nmse falls all the same."""
    grown = [{"step": 5 * i, "loss/flow": 2.0 + 0.3 * i, "train/nmse": 1 / i} for i in range(1, 31)]
    found = diagnose(
        {**HEALTHY, "std/mean": 2.4, "mu/rms": 5.2},
        {**FACTS, "kl_weight": 0.003, "step": 150},
        grown,
    )
    assert found[0].id == "source_inflated"
    assert "lr_too_high" not in [finding.id for finding in found]
    narrowed = [
        {"step": 5 * i, "loss/flow": 2 / i, "train/nmse": 0.3 + 0.02 * i} for i in range(1, 31)
    ]
    assert "lr_too_high" not in [finding.id for finding in diagnose(HEALTHY, FACTS, narrowed)]
    undone = [{**row, "train/nmse": row["loss/flow"]} for row in grown]
    assert "lr_too_high" in [finding.id for finding in diagnose(HEALTHY, FACTS, undone)]


def test_a_run_that_halts_at_once_is_not_said_to_learn_too_slowly() -> None:
    seen = {
        **HEALTHY,
        "moved/head": 1e-4,
        "moved/velocity": 1e-4,
        "flow/nmse": 1.0,
        "train/nmse": 1.0,
        "finite/forward": 0.5,
    }
    found = diagnose(seen, {**FACTS, "nonfinite": {"step": 3}})
    assert found[0].id == "non_finite"
    assert (
        next(finding for finding in found if finding.id == "lr_too_low").explained_by
        == "non_finite"
    )


def test_a_velocity_from_a_narrow_source_is_no_x1_prediction() -> None:
    fitted = {**HEALTHY, "field/fit_x1": 0.665}
    assert "x1_target" not in [
        finding.id for finding in diagnose({**fitted, "field/fit_x0": -0.231}, FACTS)
    ]
    assert diagnose({**fitted, "field/fit_x0": 0.14}, FACTS)[0].id == "x1_target"


@pytest.mark.parametrize("data", [{"data/duplicate_share": 0.98}, {"data/samples": 8}])
def test_a_wild_source_on_unseen_prompts_follows_from_too_little_data(
    data: dict[str, float],
) -> None:
    first, second = diagnose({**HEALTHY, **data, "std/mean": 1.76}, FACTS)[:2]
    assert (first.id, second.id, second.explained_by) == (first.id, "source_inflated", first.id)
    assert first.id.startswith("dataset_")
    loose = diagnose({**HEALTHY, **data, "std/mean": 1.76}, {**FACTS, "kl_weight": 0.01})
    assert (
        next(finding for finding in loose if finding.id == "source_inflated").explained_by is None
    )


def test_a_missing_number_crashes_nothing_and_is_never_evidence() -> None:
    everything: dict[str, float] = {}
    looked: list[Finding] = []
    for case in CASES:
        everything |= case.metrics
        for key in case.metrics:
            left = {
                name: value for name, value in {**HEALTHY, **case.metrics}.items() if name != key
            }
            looked += diagnose(left, {**FACTS, **case.facts})
    metrics = {**HEALTHY, **everything}
    for key in metrics:
        looked += diagnose({name: value for name, value in metrics.items() if name != key}, FACTS)
    for name in FACTS:
        looked += diagnose(
            metrics, {key: value for key, value in FACTS.items() if key != name}, FLAT
        )
    assert looked
    assert [finding.evidence for finding in looked if re.search(r"\bnan\b", finding.evidence)] == []


def test_nothing_measured_is_nothing_found() -> None:
    assert diagnose({}, {}, []) == []


def test_rules_read_keys_that_exist() -> None:
    """A misspelt key would make a rule silent for ever."""
    asked: set[str] = set()

    class Noted(dict[str, float]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

    for case in CASES:
        diagnose(Noted({**HEALTHY, **case.metrics}), {**FACTS, **case.facts}, case.history)
    plain = {
        name
        for key in asked
        if "/" in (name := key.removeprefix("ema/").removeprefix("ema/").removeprefix("trivial/"))
    }
    assert {key for key in plain if describe(key) is None and key not in DERIVED} == set()
    assert len(plain) > 80


def test_the_fixes_are_overrides_that_the_recipe_takes() -> None:
    """Every `key=value` in a fix loads; a placeholder in capitals is the user's own."""
    typed = set()
    for case in CASES:
        for finding in read(case):
            words = re.findall(
                r"'[\w.]+=[^']*'|\b(?:model|loss|optim|flow|train|data|sample)\.[\w.]+=[^\s,;)]+",
                finding.fix,
            )
            typed |= {shlex.split(word)[0] for word in words if not re.search(r"=[A-Z]+$", word)}
    assert len(typed) > 20
    for override in sorted(typed):
        load_recipe("quickstart", [override])


def test_explanations_name_rules_and_never_lose_a_finding() -> None:
    ids = {rule.id for rule in RULES}
    assert {
        entry[0] if isinstance(entry, tuple) else entry for rule in RULES for entry in rule.explains
    } <= ids
    everything: dict[str, float] = {}
    for case in CASES:
        everything |= case.metrics
    found = diagnose({**HEALTHY, **everything}, {**FACTS, "precision": "bf16"}, FLAT)
    roots = [finding.id for finding in found if finding.explained_by is None]
    assert roots
    assert {finding.explained_by for finding in found} - {None} <= set(roots)
    assert [finding.explained_by is None for finding in found] == sorted(
        (f.explained_by is None for f in found), reverse=True
    )


def test_a_root_cause_has_its_consequences_under_it() -> None:
    found = diagnose(
        {
            **HEALTHY,
            "latent/fit_power": 1.0,
            "flow/nmse": 1.1,
            "shoot/skill": -1.0,
            "same_batch/ratio": 2.0,
        },
        FACTS,
    )
    assert [(finding.id, finding.explained_by) for finding in found] == [
        ("scale_twice", None),
        ("same_batch_mismatch", "scale_twice"),
        ("worse_than_zero", "scale_twice"),
        ("worse_than_nothing", "scale_twice"),
    ]
    assert as_json(found)["explained_by"] == {finding.id: "scale_twice" for finding in found[1:]}
    assert [set(row) for row in as_json(found)["findings"]] == [
        {"id", "severity", "evidence", "cause", "fix"}
    ] * 4


def test_undertrained_is_said_of_healthy_runs_only() -> None:
    short = {**HEALTHY, "shoot/nmse": 1.4}
    assert [finding.id for finding in diagnose(short, FACTS)] == ["undertrained"]
    assert "undertrained" not in [
        finding.id for finding in diagnose({**short, "vae/psnr": 10.0}, FACTS)
    ]


def test_no_finding_blames_a_number_for_lying_on_its_better_side() -> None:
    """A cosine of 0.9 beside a speed that is too small is evidence, and not at fault."""
    worse = {"higher": "below", "lower": "above"}
    wrong, seen = [], 0
    for case in CASES:
        for finding in read(case):
            for judged in finding.judged:
                key = describe(judged.key)
                side = worse.get(key.direction) if key is not None else None
                seen += side is not None
                if side is not None and judged.side in worse.values() and judged.side != side:
                    wrong.append((case.id, finding.id, judged))
    assert seen > 50
    assert wrong == []


def test_every_warning_says_which_numbers_are_at_fault() -> None:
    """But for those that judge the recipe alone."""
    silent = {
        finding.id
        for case in CASES
        for finding in read(case)
        if finding.severity != "info" and not finding.judged
    }
    assert silent <= {"raw_sampled"}


def test_a_derived_number_tells_the_one_it_follows_from() -> None:
    (condition,) = [
        f for f in diagnose(HEALTHY | {"text/snr": 1e-9}, FACTS) if f.id == "condition_ignored"
    ]
    assert ("text/nats", "text/snr") in [(judged.key, judged.of) for judged in condition.judged]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_finding_comes_back_from_its_row(case: Case) -> None:
    for finding in read(case):
        row = json.loads(json.dumps(asdict(finding), allow_nan=False))
        assert recorded(row) == finding
        assert recorded({key: value for key, value in row.items() if key != "judged"}) is None
