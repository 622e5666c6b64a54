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
from healthy import ANSWERS, FACTS, FLAT, HEALTHY, falling

from flowray.config.keys import describe
from flowray.config.load import load_recipe
from flowray.findings.calibration import domain
from flowray.findings.derived import DERIVED
from flowray.findings.diagnose import diagnose
from flowray.findings.finding import Finding, healthy, recorded
from flowray.findings.rules import RULES
from flowray.findings.rules_parts import TABLE
from flowray.findings.rules_seams import SEAMS


class Case(NamedTuple):
    """What the numbers of a run with this fault are, where they differ from the healthy run's."""

    id: str
    metrics: dict[str, float] = {}
    facts: dict[str, Any] = {}
    history: list[dict[str, Any]] = falling(1.5, 0.27)
    absent: tuple[str, ...] = ()  # numbers that were not measured


# no rule reads them
ODD = dict.fromkeys([f"optim/step_highest/{group}" for group in ("text", "z_head", "trunk")], 40.0)
EPS = {"optim/eps/trunk": 1e-4}
NO_PACE = ("optim/pace",)  # rows of a run that the doctor did not see
NO_PAIRS = ("data/left_open", "source/width", "shoot/diversity")  # captions never repeat

CASES = (
    Case(
        "non_finite",
        {"loss/flow": math.nan, "finite/parameters": 0.5},
        {"nonfinite": {"module": "velocity.blocks.1", "step": 41}},
    ),
    Case(
        "moments_as_latents",
        {"scale/z1_norm": 896.0, "scale/z0_norm": 151.0, "scale/ratio": 5.93},
        absent=("latent/var",),
    ),
    *(
        Case(id, {f"known/{key}": off, f"known/{key}_gradient": gradient})
        for key, id, off, gradient in (
            ("flow", "flow_loss_wrong", 0.5, 0.5),
            ("kl", "kl_wrong", 0.7, 2.0),
            ("clip", "contrastive_wrong", 17.3, 5.4),
            ("dino", "dino_wrong", 0.0, 1.0),  # its gradient alone: the student was detached
            ("repa", "repa_wrong", 2.0, 2.0),
            ("anchor", "anchor_wrong", 0.4, 0.1),
            ("tv", "tv_wrong", 1e6, 1e6),  # it raised
            ("norm", "norm_wrong", 0.3, 0.3),
        )
    ),
    Case("path_wrong", {"known/path": 2.0, "same_batch/ratio": 30.0}),
    Case(
        "kl_wrong",
        {"std/mean": 0.05, "share/kl": 0.001},
        {},
        [{**row, "loss/kl": -0.3} for row in falling(1.5, 0.27)],
    ),
    Case(
        "wrong_autoencoder",
        {"latent/fit_residual": 0.6, "latent/stale_share": 1.0, "vae/psnr": 21.0},
    ),
    Case(
        "cache_scaled",
        {"latent/fit_slope_train": 1.5, "latent/stale_share": 1.0, "latent/stale_suspects": 1.0},
    ),
    Case("cache_scaled", {"latent/batch_slope": 0.13}),
    Case("cache_stale", {"latent/stale_suspects": 0.5, "latent/var": 12.0}),
    Case("cache_stale", {"latent/stale_share": 0.06, "latent/fit_residual_train": 0.45}),
    Case("latent_scale_off", {"latent/var": 30.0}),
    Case("vae_poor", {"vae/psnr": 17.0}),
    Case("captions_shuffled", {"data/agreement_z": 0.3, "data/agreement": -0.1, "text/snr": 0.0}),
    Case("captions_partly_wrong", {"data/captions_wrong": 0.21, "data/captions_wrong_low": 0.15}),
    Case("captions_repeat", {"data/caption_same": 0.4, "data/caption_over_next": 154.0}),
    Case("captions_repeat", {"data/caption_same": 0.6, "data/caption_over_next": 1.5}),
    Case(
        "captions_empty",
        {"data/caption_wordless": 0.5, "data/caption_same": 0.5, "data/caption_over_next": 77.0},
    ),
    Case("captions_cut", {"data/caption_full": 1.0, "data/caption_broken": 0.6}),
    Case("channels_swapped", {"data/colour_told": -0.16, "data/colour_other": 0.53}),
    Case("pictures_grey", {"data/colour_chroma": 0.0, "data/colour_z": 0.0}),
    Case("sides_swapped", {"data/side_across_high": 0.07, "data/side_across_low": -0.07}),
    Case("pictures_mirrored", {"data/side_across_high": 0.61, "data/side_across_low": 0.46}),
    Case("held_out_seen", {"data/seen_share": 1.0}),
    Case("dataset_near_copies", {"data/near_share": 0.68, "data/near_typical": 0.004}),
    Case("dataset_duplicated", {"data/duplicate_share": 0.9, "data/samples": 512}),
    Case("dataset_too_small", {"data/samples": 128}),
    Case("dataset_too_small", {"data/epochs": 900, "train_set/shoot_nmse": 0.05}),
    Case("memorised", {**ANSWERS, "shoot/copies": 0.6}),
    Case("memorised", {**ANSWERS, "train_set/shoot_nmse": 0.19}),
    Case("time_untrained", {"time/coverage_min": 0.0, "shoot/skill": -0.2}, {"time_kind": "alpha"}),
    Case(
        "time_untrained", {"flow/nmse_t0": 1.4, "time/coverage_min": 0.1}, {"time_kind": "log_snr"}
    ),
    *(Case(f"seam_{seam.name}", {f"seam/{seam.name}": 0.9, "shoot/skill": -0.2}) for seam in SEAMS),
    Case(
        "lr_too_low",
        {"step/z_head_update_ratio_peak": 4e-6, "step/flow_head_update_ratio_peak": 2e-6},
        {"lr_peak": 2.5e-7},
        absent=NO_PACE,
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
        absent=NO_PACE,
    ),
    Case(
        "lr_too_low",
        {"train/nmse": 0.6},
        {"lr": 2.5e-7, "lr_peak": 1e-4, "lr_schedule": "warm_restarts"},
        FLAT,
    ),
    Case(
        "lr_too_high",
        {"step/z_head_update_ratio_peak": 2.0, "flow/nmse": 4.0, "shoot/skill": -3.0},
        absent=NO_PACE,
    ),
    Case(
        "lr_too_high",
        {},
        {},
        [*falling(1.5, 0.3), *({"step": 3000 + 50 * i, "loss/flow": 1.2} for i in range(1, 9))],
    ),
    Case("lr_too_high", {"moved/head": 12.0, "text/snr": 0.0, "shoot/skill": -0.2}, {"step": 150}),
    Case("dead_head", {"step/z_head_update_ratio_peak": 1e-9, "text/snr": 0.0}),
    # parts and inputs that take no part
    *(Case(part.id, {f"part/{part.name}/grad": 0.0}) for part in TABLE),
    *(Case(part.id, {f"part/{part.name}/moved": 1e-5}) for part in TABLE),
    *(Case(part.id, {f"part/{part.name}/matters": 0.0}) for part in TABLE if not part.within),
    Case(
        "head_idle",
        {"part/head/grad": 0.0, "part/queries/grad": 0.0, "moved/head": 0.0, "text/snr": 0.0},
    ),
    Case(
        "output_idle",
        {
            **{f"part/{name}/grad": 0.0 for name in ("patches", "time", "null", "gates", "blocks")},
            "part/output/moved": 0.0,
            "flow/speed_ratio": 5e-8,
            "flow/nmse": 1.0,
            "flow/cos": 0.11,
        },
    ),
    *(
        Case(
            f"{loss}_detached", {f"weight/{loss}": 0.3, f"grad/{loss}_head": 0.0, "grad/total": 0.4}
        )
        for loss in ("clip", "dino", "anchor")
    ),
    Case(  # without its gates a block is nothing, nor are they without it
        "block_idle",
        {f"part/{name}/{kind}": 0.0 for name in ("gates", "blocks") for kind in ("grad", "moved")},
    ),
    Case("time_unused", {"input/time/matters": 0.0}),
    Case("patches_unheard", {"input/patches/heard": 0.25}),
    Case("batches_alike", {"data/batch_alike": 6.0}),
    Case("too_few_steps", {"sampler/coarse": 0.2, "shoot/skill": -0.2}),
    Case("noise_unused", {"input/noise/std": 0.0, "std/mean": 0.1}),
    Case("noise_unused", {"input/noise/std": 2.0}),
    Case("noise_shared", {"input/noise/rows": 0.0}),
    Case("noise_frozen", {"input/noise/steps": 0.0}),
    Case("time_frozen", {"input/time/rows": 0.0, "input/time/off": 9.0}),
    Case("time_frozen", {"input/time/steps": 0.0}),
    Case("time_misdrawn", {"input/time/off": 9.0}),
    Case("null_misdrawn", {"input/null/share": 0.0, "input/null/off": 7.5}),
    Case("positions_unused", {"input/position/matters": 1e-6}),
    Case("caption_unused", {"input/caption/matters": 0.0, "text/snr": 0.0}),
    Case("lr_too_low", {"optim/reach_peak": 5e-4, "optim/pace": 4e-6, "moved/velocity": 7e-5}),
    Case("lr_too_high", {"optim/rate/trunk": 1.4}),
    Case("group_too_slow", {"optim/reach/text": 1e-5, "optim/scale/text": 1e-6}),
    Case("group_left_out", {"optim/left_out/trunk": 1.0, "optim/replay/error/trunk": 1.0}),
    Case("warmup_too_long", {"optim/schedule/highest_planned": 0.003, "optim/reach/trunk": 0.01}),
    Case("schedule_spent", {"optim/schedule/idle": 0.7, "optim/schedule/agrees": 0.0}),
    Case("lr_not_applied", {"optim/schedule/agrees": 0.01, "optim/travel_walk/trunk": 0.9}),
    Case("eps_too_large", {"optim/eps_value": 1.0, **EPS, "optim/eps_unclipped/trunk": 2e-4}),
    Case("clip_too_tight", {"optim/clip/kept": 1e-6, **EPS, "optim/eps_unclipped/trunk": 1.0}),
    Case("second_moment_inflated", {"optim/gradient/trunk": 0.005, "optim/direction/trunk": 0.05}),
    Case("decay_wins", {"optim/decay/trunk": 0.25}),
    Case("gradient_accumulates", {"optim/gradient_logged": 6.0, "optim/snr/text": 0.9}),
    Case("optimiser_steps_twice", {"optim/count/trunk": 2.0, "optim/replay/count": 2.0}),
    Case("optimiser_reset", {"optim/count/trunk": 0.34}),
    Case("momentum_stale", {"optim/memory": 6.7}),
    Case("momentum_stale", {"optim/betas": 0.1}),
    Case("step_differs", {"optim/replay/gradient_cos": 0.2}),
    Case("step_differs", {"optim/replay/error/trunk": 0.5}),
    Case("moves_too_little", {"optim/travel_walk/trunk": 5e-3, "optim/moved/trunk": 2e-3}),
    Case("moves_too_much", {"optim/travel_straight/text": 3.0}),
    Case("ema_off", {}, {"ema_decay": 0.0}),
    Case("ema_never_updated", {"optim/replay/ema": 0.0}),
    Case("logvar_saturated", {"logvar/clamped_share": 0.9, "std/mean": 0.05}),
    Case(  # the quickstart recipe on open captions
        "source_averages",
        {
            **ANSWERS,
            "std/mean": 0.0936,
            "source/width": 0.0127,
            "source/separation@0": 1.0,
            "shoot/diversity": 0.334,
            "shoot/nmse": 0.847,
            "shoot/skill": -0.625,
            "scale/ratio": 3.1,
        },
        {"kl_weight": 0.03, "loss_weights": {"flow": 1.0, "kl": 0.03, "anchor": 4.0}},
    ),
    Case(
        "source_blind",
        {**ANSWERS, "source/separation@0": 0.0625, "text/snr": 1e-4, "shoot/cond_gain": 0.01},
    ),
    Case(
        "source_blind",
        {
            **{key: x for key, x in ANSWERS.items() if key not in NO_PAIRS},
            "source/separation@0": 0.0625,
            "shoot/cond_gain": 0.01,
            "shoot/diversity_all": 0.9,
        },
    ),
    Case(
        "codes_merge",
        {
            **ANSWERS,
            "source/separation@0": 0.594,
            "source/separation@0.25": 0.219,
            "source/separation@0.5": 0.0938,
            "shoot/cond_gain": 0.017,
        },
    ),
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
    Case("kl_drowned", {"share/kl": 0.001, "std/mean": 0.25}, {"kl_weight": 1e-5}),
    Case(
        "kl_crushing",
        {"text/snr": 1e-4, "std/mean": 1.0, "mu/rms": 0.01},
        {"kl_weight": 300.0, "kl_form": "gaussian"},
    ),
    Case("condition_ignored", {"text/snr": 0.0, "text/cos_mu": 1.0}),
    Case(
        "condition_ignored",
        {"shoot/cond_gain": 0.001, "flow/cond_gain_cos": 0.0, "input/caption/matters": 0.003},
    ),
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
    Case("unlike_healthy", ODD, {name: high for name, (_, high) in domain().items()}, []),
)


def read(case: Case) -> list[Any]:
    metrics = {key: x for key, x in HEALTHY.items() if key not in case.absent}
    return diagnose({**metrics, **case.metrics}, {**FACTS, **case.facts}, case.history)


def test_a_healthy_run_has_no_finding() -> None:
    assert diagnose(HEALTHY, FACTS, falling(1.5, 0.27)) == []
    assert diagnose({**HEALTHY, **ANSWERS}, FACTS, falling(1.5, 0.27)) == []


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
    assert seen >= 50
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_finding_comes_back_from_its_row(case: Case) -> None:
    for finding in read(case):
        row = json.loads(json.dumps(asdict(finding), allow_nan=False))
        assert recorded(row) == finding
        assert recorded({key: value for key, value in row.items() if key != "judged"}) is None
