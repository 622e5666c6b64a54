"""What follows from what, and single rules on the runs that taught them."""

from __future__ import annotations

import pytest
from healthy import ANSWERS, FACTS, HEALTHY

from flowray.findings.diagnose import diagnose
from flowray.findings.finding import as_json, healthy

AVERAGES = "source_averages"


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


def ids(metrics: dict[str, float], **facts: object) -> list[str]:
    return [f.id for f in diagnose({**HEALTHY, **ANSWERS, **metrics}, {**FACTS, **facts})]


def test_a_narrow_source_averages_only_where_a_caption_leaves_things_open() -> None:
    """Where it does not, its mean picture is the picture."""
    narrow = {"std/mean": 0.12, "source/width": 0.0127, "shoot/diversity": 0.334}
    anchor = {"loss_weights": {"flow": 1.0, "anchor": 4.0}}
    assert ids(narrow, **anchor) == ["source_averages"]
    assert ids({**narrow, "data/left_open": 0.014}, **anchor) == ["undertrained"]
    # it narrowed for want of a KL, or onto the anchor
    for weights, first in (({"flow": 1.0}, "source_collapsed"), (*anchor.values(), AVERAGES)):
        found = diagnose(
            {**HEALTHY, **ANSWERS, **narrow, "std/mean": 0.04}, {**FACTS, "loss_weights": weights}
        )
        assert found[0].id == first
        assert {f.id: f.explained_by for f in found}[AVERAGES] == (
            None if first == AVERAGES else first
        )


@pytest.mark.parametrize("condition", ["adaln", "cross_attention"])
def test_beside_a_caption_that_the_network_reads_the_source_need_not_tell_it(
    condition: str,
) -> None:
    apart = {"source/separation@0": 0.0313, "source/separation@0.5": 0.0313}
    blind = {**apart, "text/snr": 1e-5, "shoot/cond_gain": 0.01}
    merging = {"source/separation@0.5": 0.0313, "shoot/cond_gain": 0.03}
    assert ids(blind, condition="none")[:2] == ["source_blind", "condition_ignored"]
    assert ids(blind) == ids(blind, condition="none")  # a recipe of before there was a choice
    # a head of attention layers tells captions only after some 150 steps
    assert ids(blind | {"step": 150}, condition="none")[0] == "condition_ignored"
    # a network reads codes that no neighbour tells apart, as of a head that has just begun
    assert ids({**apart, "shoot/cond_gain": 0.3}, condition="none") == []
    assert ids(merging, condition="none") == ["codes_merge"]
    assert ids({**merging, "shoot/cond_gain": 0.4}) == []  # what was read at the start lasts
    assert ids({**apart, "text/snr": 1e-5}, condition=condition) == ["text_unproven"]
    assert ids(merging, condition=condition) == []
    unread = {"shoot/cond_gain": 0.0, "flow/cond_gain_cos": 0.0}
    deaf = {**unread, "input/caption/matters": 0.01}
    assert ids(deaf, condition=condition)[0] == "condition_ignored"
    # one that heeds its caption has only not learnt what it says yet
    assert "condition_ignored" not in ids(unread, condition=condition)


def test_draws_of_many_answers_are_not_held_against_the_mean_picture() -> None:
    """Right ones, drawn at random, have twice the squared error of their mean."""
    drawn = {"shoot/nmse": 1.2, "shoot/skill": -0.6}
    assert ids(drawn) == []
    assert ids({**drawn, "data/left_open": 0.1}) == ["worse_than_nothing"]
    assert ids({**drawn, "shoot/energy": 0.8}) == ["worse_than_nothing"]
    assert ids({"shoot/nmse": 1.4}) == ["undertrained"]


@pytest.mark.parametrize("data", [{"data/duplicate_share": 0.98}, {"data/samples": 64}])
def test_pictures_known_by_heart_follow_from_too_little_data(data: dict[str, float]) -> None:
    for seen in ({"shoot/copies": 0.7}, {"train_set/shoot_nmse": 0.19}):
        found = diagnose({**HEALTHY, **ANSWERS, **data, **seen}, FACTS)
        assert {f.id: f.explained_by for f in found}["memorised"] == found[0].id
        assert found[0].id.startswith("dataset_")
    # the mean picture of a caption is as near; and where it says everything the picture is known
    assert ids({"train_set/shoot_nmse": 0.56}) == []
    assert ids({"train_set/shoot_nmse": 0.05, "data/left_open": 0.02}) == ["undertrained"]


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
    # a source that runs away takes the nmse with it, though no step is too large
    away = {**HEALTHY, "std/mean": 9.0, "mu/rms": 5.2}
    weak = {**FACTS, "kl_weight": 3e-4, "step": 150}
    explained = {f.id: f.explained_by for f in diagnose(away, weak, undone)}
    assert (explained["source_inflated"], explained["lr_too_high"]) == (None, "source_inflated")
    leaps = diagnose({**away, "optim/rate/z_head": 2.0}, weak, undone)
    explained = {f.id: f.explained_by for f in leaps}
    assert (explained["lr_too_high"], explained["source_inflated"]) == (None, "lr_too_high")


def test_a_field_with_nothing_left_to_learn_is_not_at_fault() -> None:
    """Where captions fix the picture an anchored source becomes it; what is left is jitter."""
    seen = {**HEALTHY, "flow/nmse": 1.0, "flow/cos": 0.06, "flow/speed_ratio": 0.1}
    facts = {**FACTS, "loss_weights": {"flow": 1.0, "anchor": 4.0}}

    def named(step: int, **more: float) -> set[str]:
        return {f.id for f in diagnose({**seen, **more}, {**facts, "step": step})}

    fields = {"worse_than_zero", "field_weak", "gain_would_hurt"}
    assert not named(3000, **{"trivial/shoot/nmse": 0.05}) & fields
    # most of the picture is there: a short run has not begun with the rest, a long one should have
    assert not named(150, **{"trivial/shoot/nmse": 0.3}) & fields
    assert "worse_than_zero" in named(3000, **{"trivial/shoot/nmse": 0.3})
    assert "worse_than_zero" in named(150, **{"trivial/shoot/nmse": 0.7})
    # what captions leave open nothing but the field can choose
    assert "worse_than_zero" in named(150, **{"trivial/shoot/nmse": 0.3, "data/left_open": 0.4})


def test_a_run_that_halts_at_once_is_not_said_to_learn_too_slowly() -> None:
    seen = {
        **HEALTHY,
        "moved/head": 1e-4,
        "moved/velocity": 1e-4,
        "flow/nmse": 1.0,
        "train/nmse": 1.0,
        "finite/forward": 0.5,
    }
    del seen["optim/pace"]  # what its rates come to, which would tell
    found = diagnose(seen, {**FACTS, "nonfinite": {"step": 3}})
    assert found[0].id == "non_finite"
    assert (
        next(finding for finding in found if finding.id == "lr_too_low").explained_by
        == "non_finite"
    )


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


def test_a_root_cause_has_its_consequences_under_it() -> None:
    found = diagnose(
        {**HEALTHY, "time/coverage_min": 0.0, "flow/nmse": 1.1, "shoot/skill": -1.0}, FACTS
    )
    assert [(finding.id, finding.explained_by) for finding in found] == [
        ("time_untrained", None),
        ("worse_than_zero", "time_untrained"),
        ("worse_than_nothing", "time_untrained"),
    ]
    assert as_json(found)["explained_by"] == {finding.id: "time_untrained" for finding in found[1:]}
    assert [set(row) for row in as_json(found)["findings"]] == [
        {"id", "severity", "evidence", "cause", "fix"}
    ] * 3


def test_the_first_seam_that_differs_is_the_finding() -> None:
    """What comes after it differs too, and follows from it."""
    later = {"seam/z0": 0.8, "seam/start": 0.8, "seam/velocity": 0.4, "sampler/gap": 0.4}
    found = diagnose({**HEALTHY, **later, "seam/draws_trained": 1.0, "flow/nmse": 1.1}, FACTS)
    assert [finding.id for finding in found if finding.explained_by is None] == [
        "seam_draws_trained"
    ]
    assert {"seam_z0", "seam_velocity", "sampler_mismatch", "worse_than_zero"} <= {
        finding.id for finding in found if finding.explained_by == "seam_draws_trained"
    }


def test_the_rounding_of_half_precision_is_no_seam() -> None:
    rounded = {**HEALTHY, "seam/text": 0.02, "seam/velocity": 0.03, "seam/guidance": 0.1}
    assert diagnose(rounded, {**FACTS, "precision": "bf16", "velocity_fp32": True}) == []
    assert diagnose(rounded, FACTS)[0].id == "seam_text"


def test_the_solvers_rounding_is_judged_by_the_size_of_its_state() -> None:
    errors = {f"teacher_native/mse@{n}": 1e-8 * n for n in (5, 10, 20, 50, 100)}
    assert diagnose({**HEALTHY, **errors}, FACTS)[0].id == "half_precision_solver"
    assert (
        diagnose(
            {
                **HEALTHY,
                **errors,
                "scale/z1_norm": 15.9e3,
                "scale/z0_norm": 15.9e3,
                "scale/ratio": 1.0,
            },
            FACTS,
        )
        == []
    )


def test_undertrained_is_said_of_healthy_runs_only() -> None:
    short = {**HEALTHY, "shoot/nmse": 1.4}
    assert [finding.id for finding in diagnose(short, FACTS)] == ["undertrained"]
    assert "undertrained" not in [
        finding.id for finding in diagnose({**short, "vae/psnr": 10.0}, FACTS)
    ]


def test_a_derived_number_tells_the_one_it_follows_from() -> None:
    (condition,) = [
        f for f in diagnose(HEALTHY | {"text/snr": 1e-9}, FACTS) if f.id == "condition_ignored"
    ]
    assert ("text/nats", "text/snr") in [(judged.key, judged.of) for judged in condition.judged]


def test_nothing_measured_is_nothing_found() -> None:
    assert diagnose({}, {}, []) == []
