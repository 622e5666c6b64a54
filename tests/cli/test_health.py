"""The health checks: which rows pass, and both commands whole on a tiny recipe."""

import json
import math

import pytest
from support import tiny_recipe

from flowray.cli.health import main
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe
from flowray.config.losses import KLLossConfig
from flowray.findings.verdicts import Arm, ablation_verdicts, free_mu, overfit_verdicts


def learning(flow_end=0.5, cos_end=0.8, kl=lambda x: 0.1, steps=40, **more):
    """Rows of a run whose flow loss falls from 1 and cosine rises from 0, both linearly; 10
    latent dims. more: key=function of time.
    """
    shares = [i / (steps - 1) for i in range(steps)]
    rows = [
        {
            "step": i,
            "loss/flow": 1 + x * (flow_end - 1),
            "train/cos": x * cos_end,
            **({"loss/kl_raw": 10 * kl(x)} if kl else {}),
            **{key.replace("__", "/"): value(x) for key, value in more.items()},
        }
        for i, x in enumerate(shares)
    ]
    return Arm(rows, dims=10)


def words(verdicts):
    return [verdict.verdict for verdict in verdicts]


def test_overfit_passes_only_where_loss_cosine_and_kl_do():
    assert words(overfit_verdicts(learning())) == ["pass", "pass", "pass"]
    assert words(overfit_verdicts(learning(flow_end=0.9))) == ["fail", "pass", "pass"]
    assert words(overfit_verdicts(learning(cos_end=0.4))) == ["pass", "fail", "pass"]
    assert words(overfit_verdicts(learning(kl=lambda x: math.exp(8 * x)))) == [
        "pass",
        "pass",
        "fail",
    ]
    # it may fall
    assert words(overfit_verdicts(learning(kl=lambda x: 1 - x))) == ["pass", "pass", "pass"]
    assert words(overfit_verdicts(learning(kl=None))) == ["pass", "pass", "not judged"]
    assert words(
        overfit_verdicts(Arm(refused="training halted: step 3: loss/flow is not finite"))
    ) == ["fail"]
    assert words(overfit_verdicts(learning(steps=4))) == ["unclear"]


@pytest.mark.parametrize(
    ("nmse_end", "cos_end", "anchor_end", "said"),
    [
        (0.7, 0.25, 0.2, ["pass", "pass"]),
        (0.99, 0.17, 0.2, ["unclear", "pass"]),
        (1.0, 0.0, 0.2, ["fail", "pass"]),
        (0.7, 0.25, 0.95, ["pass", "fail"]),
    ],
    ids=["sound", "slow", "the velocity is dead", "the head is dead"],
)
def test_overfit_of_an_anchored_recipe_is_not_judged_by_its_cosine(
    nmse_end, cos_end, anchor_end, said
):
    """As a run with a narrow anchored source: the cosine is 0.5 while the source is noise, 0 when
    it has narrowed and 0.25 after 200 steps.
    """
    anchored = learning(
        cos_end=cos_end,
        train__nmse=lambda x: 1 + x * (nmse_end - 1),
        loss__anchor=lambda x: 1 + x * (anchor_end - 1),
        kl=lambda x: 1.5,
    )
    assert words(overfit_verdicts(anchored)) == ["pass", "not judged", *said, "pass"]


def probed(prefix="", **metrics):
    row = {key.replace("__", "/"): value for key, value in metrics.items()}
    return Arm(probes=[{"step": 200, **row}], prefix=prefix)


def test_each_arrow_of_the_ablations_has_its_own_verdict():
    whole = probed(mu__rms=0.5, std__mean=0.9, shoot__cond_gain=0.6, flow__cond_gain_cos=0.05)
    flow = {
        "flow/cos": 0.7,
        "flow/nmse": 0.9,
        "flow/endpt_rmse@32": 0.99,
        "trivial/flow/endpt_rmse@32": 1.0,
    }
    flow["scale/z1_norm"] = 1.0
    no_kl = probed(mu__rms=0.8, std__mean=0.97)
    shuffled = probed(shoot__cond_gain=0.7, flow__cond_gain_cos=0.001)
    got = {
        v.expected.split(" ")[0]: v.verdict
        for v in ablation_verdicts(whole, Arm(probes=[flow]), no_kl, shuffled)
    }
    assert got == {
        "flow/cos": "pass",
        "flow/nmse": "unclear",
        "flow/endpt_rmse@32": "fail",
        "mu/rms": "pass",
        "std/mean": "fail",  # nearer to 1 without the KL
        "shoot/cond_gain": "fail",  # more without the captions
        "flow/cond_gain_cos": "pass",
    }


def only_flow(rmse, still, width=1.0):
    """The verdict on the end point of the arm with the flow loss alone, where E z1^2 is 1."""
    row = {
        "flow/cos": 1.0,
        "flow/nmse": 0.0,
        "flow/endpt_rmse@32": rmse,
        "trivial/flow/endpt_rmse@32": still,
    }
    arm = Arm([{"step": 4, "std/mean": width}], [{"step": 200, "scale/z1_norm": 1.0, **row}])
    nothing = Arm(refused="not of interest")
    return next(
        v for v in ablation_verdicts(nothing, arm, nothing, nothing) if "endpt" in v.expected
    )


def test_the_end_point_is_held_against_the_start_and_against_standing_still():
    # an anchored source's: from 1.41, although the collapsed source alone gives 1.08
    assert only_flow(0.9, 1.08).verdict == "pass"
    assert "at the start 1.414" in only_flow(0.9, 1.08).measured
    # the source has collapsed and the field does nothing
    assert only_flow(1.05, 1.08).verdict == "fail"
    assert only_flow(1.3, 1.38).verdict == "unclear"
    # a source that started narrow started nearer
    assert only_flow(0.9, 1.08, width=0.3).verdict == "unclear"


def kl_off(std, mu=(0.9, 0.9), free=""):
    arms = [probed(mu__rms=m, std__mean=s) for m, s in zip(mu, std, strict=True)]
    return [
        v
        for v in ablation_verdicts(arms[0], Arm(refused="no"), arms[1], arms[1], free)
        if v.arm == "KL off"
    ]


def test_widths_are_told_apart_by_their_logarithm():
    assert words(kl_off((0.14, 0.062)))[1] == "pass"  # an anchored source's
    assert words(kl_off((0.8, 6.0)))[1] == "pass"
    assert words(kl_off((0.14, 0.5)))[1] == "fail"
    assert words(kl_off((0.99, 0.97)))[1] == "unclear"  # both at 1: no pull to see


def test_mu_is_judged_only_where_the_kl_pulls_it():
    assert free_mu(KLLossConfig(form="gaussian", weight=1.0), 0.0) == ""
    # 1 / (1 + 1/8): 11 % shorter
    assert free_mu(KLLossConfig(form="gaussian", weight=1.0), 4.0) == ""
    assert "shortens it by 0.4 %" in free_mu(KLLossConfig(form="gaussian", weight=0.03), 4.0)
    assert "box" in free_mu(KLLossConfig(form="box", weight=1.0), 0.0)
    (mu, _) = kl_off((0.5, 0.1), (0.96, 0.95), "it is free")
    assert (mu.verdict, mu.measured) == ("not judged", "0.960 with, 0.950 without; it is free")
    assert words(kl_off((0.5, 0.1), (0.5, 0.8))) == ["pass", "pass"]


def test_the_anchor_is_worse_with_shuffled_captions_and_the_weights_that_sampling_uses_are_read():
    def arm(anchor, gain):
        made = probed(
            "ema/",
            ema__shoot__cond_gain=gain,
            ema__flow__cond_gain_cos=gain,
            shoot__cond_gain=0.0,
            flow__cond_gain_cos=0.0,
        )
        return Arm(
            [{"step": i, "loss/anchor": anchor} for i in range(5)], made.probes, prefix=made.prefix
        )

    nothing = Arm(refused="not of interest")
    said = ablation_verdicts(arm(0.27, 1.3), nothing, nothing, arm(1.1, -0.1))
    assert [(v.expected.split()[0], v.verdict) for v in said if v.arm == "captions shuffled"] == [
        ("shoot/cond_gain", "pass"),
        ("flow/cond_gain_cos", "pass"),
        ("loss/anchor", "pass"),
    ]


def test_an_arm_that_the_recipe_refuses_is_unclear_and_hides_no_other():
    whole = probed(mu__rms=0.5, std__mean=0.9, shoot__cond_gain=0.6, flow__cond_gain_cos=0.05)
    got = ablation_verdicts(whole, Arm(refused="no"), whole, whole)
    assert words(got)[0] == "unclear"
    assert [v.arm for v in got] == [
        "flow only",
        "KL off",
        "KL off",
        "captions shuffled",
        "captions shuffled",
    ]
    assert words(got)[1:3] == ["unclear", "unclear"]  # no difference


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(
        dump_recipe(tiny_recipe(tmp_path, **{"optim.lr": 3e-3, "loss.clip.weight": 0.3}))
    )
    return file


def test_overfit_command_trains_on_the_samples_asked_for(recipe_file, tmp_path, capsys):
    argv = [
        "overfit",
        str(recipe_file),
        "--samples",
        "16",
        "--steps",
        "60",
        "--dir",
        str(tmp_path / "out"),
        "--json",
    ]
    code = main(argv)
    said = json.loads(capsys.readouterr().out)
    assert (said["check"], len(said["checks"])) == ("overfit", 3)
    assert code == (0 if said["passed"] else 1)
    assert said["checks"][0]["verdict"] == "pass", said
    assert "limit: 16" in (tmp_path / "out" / "overfit" / "config.yaml").read_text()
    with pytest.raises(InputError, match="holds a run already"):
        main(argv)


@pytest.mark.parametrize(
    "fault",
    [["optim.lr=1e-9"], ["optim.lr_scale.flow_head=1e-9", "loss.anchor.weight=4"]],
    ids=["lr", "dead velocity"],
)
def test_overfit_fails_a_recipe_that_cannot_learn(recipe_file, capsys, fault):
    assert main(["overfit", str(recipe_file), "--steps", "30", *fault]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_ablations_command_runs_four_arms_from_one_start(recipe_file, tmp_path, capsys):
    main(
        [
            "ablations",
            str(recipe_file),
            "--steps",
            "20",
            "--dir",
            str(tmp_path / "out"),
            "--json",
            "train.log_every=1",
        ]
    )
    said = json.loads(capsys.readouterr().out)
    assert {check["arm"] for check in said["checks"]} == {
        "flow only",
        "KL off",
        "captions shuffled",
    }
    first = {}
    for arm in ("whole", "flow_only", "no_kl", "shuffled"):
        with (tmp_path / "out" / arm / "metrics.jsonl").open() as rows:
            first[arm] = json.loads(next(rows))
    # the same weights and batch
    assert len({first[arm]["loss/flow"] for arm in ("whole", "flow_only", "no_kl")}) == 1
    assert first["shuffled"]["loss/flow"] != first["whole"]["loss/flow"]  # other captions
    assert "loss/kl" not in first["no_kl"]
    assert "loss/clip" not in first["flow_only"]


def test_too_few_steps_are_refused(recipe_file):
    with pytest.raises(InputError, match="--steps"):
        main(["ablations", str(recipe_file), "--steps", "5"])
