"""The field notes' experiments as sweeps: each plans, carries its card, and holds the values that the notes give."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from flowray.cli.tune import main
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, load_recipe
from flowray.config.sweepfile import base_recipe, check_trials, load_sweep, packaged_sweeps
from flowray.tune.plan import Cluster, check_storage, make_plan, share_cluster
from flowray.tune.records import Records, TrialRecord

FOLDER = Path(__file__).parents[2] / "sweeps"
NOTES = {"lr_restart": "A_", "logsnr": "B_", "structure": "C_", "kl": "", "source_grad": "", "cfg": ""}


@pytest.fixture
def trained(tmp_path):
    """The folder of a run as far as a plan looks at it."""
    run = tmp_path / "runs" / "quickstart"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_recipe(load_recipe("quickstart").recipe))
    return run


def plan_of(capsys, *words: str) -> dict:
    assert main([*words, "--plan", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_all_of_the_notes_experiments_come_with_flowray():
    assert {f"{name}.yaml" for name in NOTES} < set(packaged_sweeps())


@pytest.mark.parametrize("name", NOTES)
def test_each_plans_and_starts_nothing(name, trained, tmp_path, capsys):
    words = [f"base={trained}"] if name == "cfg" else []
    facts = plan_of(capsys, name, *words, f"storage_path={tmp_path / 'out'}")
    assert facts["name"] == name
    assert facts["trials"] >= 6
    assert facts["concurrent"] >= 1
    assert (facts["storage"]["problem"], facts["storage"]["needed_bytes"] > 0) == ("", name != "cfg")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NOTES)
def test_each_has_its_card_and_the_reading_it_expects(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    head = text[: text.index("\nname:")]
    assert all(line.startswith("#") for line in head.splitlines())
    for field in ("EXP_ID", "PURPOSE", "KEY_DIFFS", "DATASET", "HARDWARE", "CORE PARAMS", "TAGS", "NOTES", "Expected reading:"):
        assert field in head, field
    assert f"EXP_ID      : {NOTES[name]}{name}" in head
    assert f"python -m flowray.tune sweeps/{name}.yaml" in head
    assert yaml.safe_load(text)["name"] == name


def test_a_restarts_at_the_notes_scale():
    """The overrides of the card, on the notes' own recipe."""
    notes = ["set.data.shards=TRAIN", "set.data.val_shards=VAL", "parameters.optim.lr={values: [2.5e-6, 5e-6, 1e-5]}", "points=[]"]
    notes += ["parameters.optim.schedule.t0.values=[20000]", "parameters.optim.schedule.eta_min.min=2.5e-7", "set.train.steps=100000"]
    sweep = load_sweep("lr_restart", ["base=fieldnotes_256", *notes])
    base = base_recipe(sweep)
    check_trials(sweep, base)
    assert sweep.parameters["optim.schedule.t0"].when == {"optim.schedule.kind": ("warm_restarts",)}
    assert sweep.parameters["optim.lr"].values[1] == 2 * base.optim.lr == 5e-6
    plateau, cure = load_sweep("lr_restart").points
    assert (cure["optim.lr"], cure["optim.schedule.kind"]) == (2 * plateau["optim.lr"], "warm_restarts")


def test_b_tries_the_notes_ranges_first():
    sweep = load_sweep("logsnr")
    assert [point.get("flow.time.low") for point in sweep.points] == [None, -2, 0.81]
    assert (sweep.points[1]["flow.time.high"], sweep.parameters["flow.time.low"].prior.value) == (6, -2)


def test_c_doubles_the_contrastive_weight_and_takes_a_perceptual_loss_where_there_are_weights():
    sweep = load_sweep("structure")
    own = base_recipe(sweep).loss.clip.weight
    assert {0, own, 2 * own} < set(sweep.parameters["loss.clip.weight"].values)
    perceptual = "parameters.loss.lpips.weight={values: [0, 0.1, 0.2]}"
    with_vgg = load_sweep("structure", ["set.loss.lpips.vgg=vgg16.safetensors", perceptual])
    check_trials(with_vgg, base_recipe(with_vgg))
    without = load_sweep("structure", [perceptual])
    with pytest.raises(InputError, match="lpips needs vgg"):
        check_trials(without, base_recipe(without))


def test_cfg_has_the_notes_grid_as_s_and_refuses_what_is_no_run(trained, tmp_path):
    sweep = load_sweep("cfg", [f"base={trained}"])
    assert {1 + w for w in (0, 2, 3, 4.5, 6)} < set(sweep.parameters["sample.guidance_scale"].values)
    check_trials(sweep, base_recipe(sweep))
    with pytest.raises(InputError, match="is no trained run; type base=runs/NAME"):
        base_recipe(load_sweep("cfg", [f"base={tmp_path}"]))
    other = tmp_path / "digits"
    shutil.copytree(trained, other)
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("shards: shapes", "shards: digits"))
    digits = load_sweep("cfg", [f"base={other}"])
    with pytest.raises(InputError, match=r"data\.shards digits.*only pictures of shapes have an exact score"):
        check_trials(digits, base_recipe(digits))


# the plan's numbers


def test_hours_are_bounded_by_measured_steps_and_by_the_time_budget(tmp_path):
    sweep = load_sweep("head", [f"storage_path={tmp_path}", "run_cap=4", "seeds=2"])
    base = base_recipe(sweep)
    steps = 4 * 2 * base.train.steps
    unknown = make_plan(sweep, base, Cluster(((8, 0),)))["hours_at_most"]
    assert (unknown["cpu"], unknown["gpu"]) == (None, None)
    assert "set time_budget, or run one (run_cap=1)" in unknown["from"]
    (tmp_path / "head").mkdir()
    records = Records(tmp_path / "head" / "trials.jsonl")
    records.trials = {0: TrialRecord(0, {}, "finished", 500, 500, seconds=100.0), 1: TrialRecord(1, {}, "stopped", 100, 500, seconds=20.0)}
    records.save()
    measured = make_plan(sweep, base, Cluster(((8, 0),)))
    assert measured["steps_at_most"] == steps
    assert measured["hours_at_most"]["cpu"] == pytest.approx(steps * 0.2 / 3600)
    on_gpus = load_sweep("head", [f"storage_path={tmp_path}", "time_budget=1m", "resources.gpus_per_worker=auto", "max_concurrent=auto"])
    bound = make_plan(on_gpus, base, Cluster(((16, 4),)))
    assert (bound["concurrent"], bound["takes"]["resources.gpus_per_worker"]) == (4, 1)
    assert bound["hours_at_most"]["gpu"] == pytest.approx(4 / 60)


def test_storage_that_is_full_closed_or_a_file_is_a_problem_in_words(tmp_path, monkeypatch):
    assert check_storage(tmp_path / "not" / "yet", 10**6)["problem"] == ""
    assert "of checkpoints to come; type storage_path=FOLDER" in check_storage(tmp_path, 2**60)["problem"]
    (tmp_path / "file").write_text("")
    assert check_storage(tmp_path / "file", 0)["problem"].endswith("is a file; type storage_path=FOLDER")


def test_pictures_of_a_run_have_one_worker_whatever_it_was_trained_with(trained):
    sweep = load_sweep("cfg", [f"base={trained}"])
    base = base_recipe(sweep)
    assert base.resources.num_workers == 2
    assert share_cluster(sweep, base, Cluster(((8, 0),)))[0]["resources.num_workers"] == 1
