"""The health checks: which rows pass, and both commands whole on a tiny recipe."""

import json
import math

import pytest
from support import tiny_recipe

from flowray.cli.health import main
from flowray.cli.verdicts import Arm, ablation_verdicts, overfit_verdicts
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe


def learning(flow_end=0.5, cos_end=0.8, kl=lambda x: 0.1, steps=40):
    """Rows of a run whose flow loss falls from 1 and cosine rises from 0, both linearly; 10 latent dims."""
    shares = [i / (steps - 1) for i in range(steps)]
    rows = [
        {"step": i, "loss/flow": 1 + x * (flow_end - 1), "train/cos": x * cos_end, "loss/kl_raw": 10 * kl(x)} for i, x in enumerate(shares)
    ]
    return Arm(rows, dims=10)


def words(verdicts):
    return [verdict.verdict for verdict in verdicts]


def test_overfit_passes_only_where_loss_cosine_and_kl_do():
    assert words(overfit_verdicts(learning())) == ["pass", "pass", "pass"]
    assert words(overfit_verdicts(learning(flow_end=0.9))) == ["fail", "pass", "pass"]
    assert words(overfit_verdicts(learning(cos_end=0.4))) == ["pass", "fail", "pass"]
    assert words(overfit_verdicts(learning(kl=lambda x: math.exp(8 * x)))) == ["pass", "pass", "fail"]
    assert words(overfit_verdicts(learning(kl=lambda x: 1 - x))) == ["pass", "pass", "pass"]  # it may fall
    assert words(overfit_verdicts(Arm(refused="training halted: step 3: loss/flow is not finite"))) == ["fail"]
    assert words(overfit_verdicts(learning(steps=4))) == ["unclear"]


def probed(**metrics):
    return Arm(probes=[{"step": 200, **{key.replace("__", "/"): value for key, value in metrics.items()}}])


def test_each_arrow_of_the_ablations_has_its_own_verdict():
    whole = probed(mu__rms=0.5, std__mean=0.9, shoot__cond_gain=0.6, flow__cond_gain_cos=0.05)
    flow = {"flow/cos": 0.7, "flow/nmse": 0.9, "flow/endpt_rmse@32": 0.99, "trivial/flow/endpt_rmse@32": 1.0}
    no_kl = probed(mu__rms=0.8, std__mean=0.97)
    shuffled = probed(shoot__cond_gain=0.7, flow__cond_gain_cos=0.001)
    got = {v.expected.split(" ")[0]: v.verdict for v in ablation_verdicts(whole, Arm(probes=[flow]), no_kl, shuffled)}
    assert got == {
        "flow/cos": "pass",
        "flow/nmse": "unclear",
        "flow/endpt_rmse@32": "fail",
        "mu/rms": "pass",
        "std/mean": "fail",  # nearer to 1 without the KL
        "shoot/cond_gain": "fail",  # more without the captions
        "flow/cond_gain_cos": "pass",
    }


def test_an_arm_that_the_recipe_refuses_is_unclear_and_hides_no_other():
    whole = probed(mu__rms=0.5, std__mean=0.9, shoot__cond_gain=0.6, flow__cond_gain_cos=0.05)
    got = ablation_verdicts(whole, Arm(refused="no"), whole, whole)
    assert words(got)[0] == "unclear"
    assert [v.arm for v in got] == ["flow only", "KL off", "KL off", "captions shuffled", "captions shuffled"]
    assert words(got)[1:3] == ["unclear", "unclear"]  # no difference


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_recipe(tiny_recipe(tmp_path, **{"optim.lr": 3e-3, "loss.clip.weight": 0.3})))
    return file


def test_overfit_command_trains_on_the_samples_asked_for(recipe_file, tmp_path, capsys):
    argv = ["overfit", str(recipe_file), "--samples", "16", "--steps", "60", "--dir", str(tmp_path / "out"), "--json"]
    code = main(argv)
    said = json.loads(capsys.readouterr().out)
    assert (said["check"], len(said["checks"])) == ("overfit", 3)
    assert code == (0 if said["passed"] else 1)
    assert said["checks"][0]["verdict"] == "pass", said
    assert "limit: 16" in (tmp_path / "out" / "overfit" / "config.yaml").read_text()
    with pytest.raises(InputError, match="holds a run already"):
        main(argv)


def test_overfit_fails_a_recipe_that_cannot_learn(recipe_file, capsys):
    assert main(["overfit", str(recipe_file), "--steps", "30", "optim.lr=1e-9"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_ablations_command_runs_four_arms_from_one_start(recipe_file, tmp_path, capsys):
    main(["ablations", str(recipe_file), "--steps", "20", "--dir", str(tmp_path / "out"), "--json", "train.log_every=1"])
    said = json.loads(capsys.readouterr().out)
    assert {check["arm"] for check in said["checks"]} == {"flow only", "KL off", "captions shuffled"}
    first = {}
    for arm in ("whole", "flow_only", "no_kl", "shuffled"):
        with (tmp_path / "out" / arm / "metrics.jsonl").open() as rows:
            first[arm] = json.loads(next(rows))
    assert len({first[arm]["loss/flow"] for arm in ("whole", "flow_only", "no_kl")}) == 1  # the same weights and batch
    assert first["shuffled"]["loss/flow"] != first["whole"]["loss/flow"]  # other captions
    assert "loss/kl" not in first["no_kl"]
    assert "loss/clip" not in first["flow_only"]


def test_too_few_steps_are_refused(recipe_file):
    with pytest.raises(InputError, match="--steps"):
        main(["ablations", str(recipe_file), "--steps", "5"])
