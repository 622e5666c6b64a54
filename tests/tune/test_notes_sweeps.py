"""The field notes' experiments as sweeps: each plans, carries its card, and holds the values
that the notes give.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from flowray.cli.tune import main
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, load_recipe, override_recipe
from flowray.config.sources import packaged
from flowray.sweepconfig.check import base_recipe, check_trials
from flowray.sweepconfig.file import load_sweep, packaged_sweeps
from flowray.tune.ledger import Ledger
from flowray.tune.pace import Pace
from flowray.tune.plan import Cluster, check_storage, make_plan, share_cluster
from flowray.tune.records import TrialRecord

FOLDER = Path(__file__).parents[2] / "sweeps"
NOTES = {
    "lr_restart": "A_",
    "logsnr": "B_",
    "structure": "C_",
    "kl": "",
    "source_grad": "",
    "cfg": "",
}


@pytest.fixture
def trained(tmp_path):
    """The folder of a run as far as a plan looks at it."""
    run = tmp_path / "runs" / "quickstart"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_recipe(load_recipe("quickstart").recipe))
    checkpoint = run / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "state.json").write_text('{"step": 10, "files": {}, "frozen": {}}')
    return run


def plan_of(capsys, *words: str, problems: int = 0) -> dict:
    assert main([*words, "--plan", "--json"]) == min(1, problems)
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["problems"]) == problems
    return facts


def test_all_of_the_notes_experiments_come_with_flowray():
    assert {f"{name}.yaml" for name in NOTES} < set(packaged_sweeps())


@pytest.mark.parametrize("name", NOTES)
def test_each_plans_and_starts_nothing(name, trained, tmp_path, capsys):
    words = [f"base={trained}"] if name == "cfg" else []
    lacks = int(name == "structure")  # the file of VGG16's weights
    facts = plan_of(capsys, name, *words, f"storage_path={tmp_path / 'out'}", problems=lacks)
    assert facts["name"] == name
    assert facts["trials"] >= 6
    assert facts["concurrent"] >= 1
    assert (facts["storage"]["problem"], facts["storage"]["needed_bytes"] > 0) == (
        "",
        name != "cfg",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NOTES)
def test_each_has_its_card_and_the_reading_it_expects(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    head = text[: text.index("\nname:")]
    assert all(line.startswith("#") for line in head.splitlines())
    for field in (
        "EXP_ID",
        "PURPOSE",
        "KEY_DIFFS",
        "DATASET",
        "HARDWARE",
        "CORE PARAMS",
        "TAGS",
        "NOTES",
        "Expected reading:",
    ):
        assert field in head, field
    assert f"EXP_ID      : {NOTES[name]}{name}" in head
    assert f"python -m flowray.tune sweeps/{name}.yaml" in head
    assert yaml.safe_load(text)["name"] == name


def test_a_restarts_at_the_notes_scale():
    """The overrides of the card, on the notes' own recipe."""
    notes = [
        "set.data.shards=TRAIN",
        "set.data.val_shards=VAL",
        "parameters.optim.lr={values: [2.5e-6, 5e-6, 1e-5]}",
        "points=[]",
    ]
    notes += [
        "parameters.optim.schedule.t0.values=[20000]",
        "parameters.optim.schedule.eta_min.min=2.5e-7",
        "set.train.steps=100000",
    ]
    notes += ["early_terminate.min_iter=30000"]
    sweep = load_sweep("lr_restart", ["base=fieldnotes_256", *notes])
    base = base_recipe(sweep)
    check_trials(sweep, base)
    assert sweep.parameters["optim.schedule.t0"].when == {"optim.schedule.kind": ("warm_restarts",)}
    assert sweep.parameters["optim.lr"].values[1] == 2 * base.optim.lr == 5e-6
    plateau, cure = load_sweep("lr_restart").points
    assert (cure["optim.lr"], cure["optim.schedule.kind"]) == (
        2 * plateau["optim.lr"],
        "warm_restarts",
    )


def test_b_tries_the_notes_ranges_first():
    notes = [
        "base=fieldnotes_256",
        "set.data.shards=TRAIN",
        "set.data.val_shards=VAL",
        "early_terminate.min_iter=10000",
    ]
    full = load_sweep("logsnr", notes)
    check_trials(full, base_recipe(full))
    sweep = load_sweep("logsnr")
    assert [point.get("flow.time.low") for point in sweep.points] == [None, -2, 0.81]
    assert (sweep.points[1]["flow.time.high"], sweep.parameters["flow.time.low"].prior.value) == (
        6,
        -2,
    )


def test_c_searches_the_contrastive_and_the_perceptual_weight_and_dino():
    sweep = load_sweep("structure")
    own = base_recipe(sweep).loss.clip.weight
    assert {0, own, 2 * own} < set(sweep.parameters["loss.clip.weight"].values)
    assert set(sweep.parameters["loss.lpips.weight"].values) == {0, 0.1, 0.2}
    assert "loss.dino.weight" in sweep.parameters
    check_trials(sweep, base_recipe(sweep))
    without = load_sweep("structure", ["set.loss.lpips.vgg=null"])
    with pytest.raises(InputError, match="lpips needs vgg"):
        check_trials(without, base_recipe(without))


def test_a_plan_names_the_weights_that_are_not_here(tmp_path, capsys):
    """And with them, or without the loss that reads them, it does not."""
    out = f"storage_path={tmp_path / 'out'}"
    (lacks,) = plan_of(capsys, "structure", out, problems=1)["problems"]
    assert f"loss.lpips.vgg: {str(Path('vgg16.safetensors').absolute())!r}: no such file" in lacks
    save_file({"features.0.bias": np.zeros(64, np.float32)}, tmp_path / "vgg16.safetensors")
    for words in (
        f"set.loss.lpips.vgg={tmp_path / 'vgg16.safetensors'}",
        "parameters.loss.lpips.weight={value: 0}",
    ):
        facts = plan_of(capsys, "structure", words, out)
        assert all(each["present"] for each in facts["weights"]), words
    with pytest.raises(InputError) as told:
        main(["structure", out])
    assert str(told.value) == lacks
    assert not (tmp_path / "out").exists()


def test_c_at_the_notes_scale():
    """The overrides of the card, on the notes' own recipe."""
    notes = [
        "set.data.shards=TRAIN",
        "set.data.val_shards=VAL",
        "parameters.loss.clip.weight={values: [1.0, 2.0]}",
        "points=[]",
    ]
    notes += [
        "set.loss.lpips.schedule.steps=50000",
        "set.loss.lpips.samples=null",
        "early_terminate.min_iter=10000",
    ]
    sweep = load_sweep("structure", ["base=fieldnotes_256", *notes])
    check_trials(sweep, base_recipe(sweep))
    assert base_recipe(sweep).loss.lpips.schedule.steps == 50_000


def test_cfg_has_the_notes_grid_as_s_and_refuses_what_is_no_run(trained, tmp_path):
    sweep = load_sweep("cfg", [f"base={trained}"])
    assert {1 + w for w in (0, 2, 3, 4.5, 6)} < set(
        sweep.parameters["sample.guidance_scale"].values
    )
    check_trials(sweep, base_recipe(sweep))
    with pytest.raises(
        InputError,
        match=r"no trained run; type python -m flowray\.train RECIPE first, or base=runs/NAME",
    ):
        base_recipe(load_sweep("cfg", [f"base={tmp_path}"]))
    other = tmp_path / "digits"
    shutil.copytree(trained, other)
    (other / "config.yaml").write_text(
        (other / "config.yaml").read_text().replace("shards: shapes", "shards: digits")
    )
    digits = load_sweep("cfg", [f"base={other}"])
    with pytest.raises(InputError, match=r"eval/named is no score of pictures of digits.*frechet"):
        check_trials(digits, base_recipe(digits))
    digits = load_sweep("cfg", [f"base={other}", "metric.name=eval/kernel"])
    check_trials(digits, base_recipe(digits))
    assert digits.metric.goal == "minimize"
    for name in ("eval/frechet", "eval/style_accuracy"):
        digits = load_sweep("cfg", [f"base={other}", f"metric.name={name}"])
        check_trials(digits, base_recipe(digits))
        assert [metric.name for metric in digits.objectives] == [name, "perf/network_calls"]
    assert digits.metric.goal == "maximize"
    assert sweep.metric.name == "eval/named"
    closed = tmp_path / "closed"
    shutil.copytree(trained, closed)
    config = closed / "config.yaml"
    config.write_text(config.read_text().replace("shards: shapes", "shards: shapes_closed"))
    sweep = load_sweep("cfg", [f"base={closed}"])
    with pytest.raises(InputError, match=r"eval/named .*this one is on shapes_closed"):
        check_trials(sweep, base_recipe(sweep))
    for name in ("all_correct", "two_objects/binding", "unseen/size"):
        for run in (trained, closed):
            sweep = load_sweep("cfg", [f"base={run}", f"metric.name=eval/{name}"])
            check_trials(sweep, base_recipe(sweep))
    for name in ("precision", "kernel", "nonsense", "two_objects/size", "style_accuracy"):
        for run in (trained, closed):
            sweep = load_sweep("cfg", [f"base={run}", f"metric.name=eval/{name}"])
            with pytest.raises(InputError, match=f"eval/{name} is no score .*eval/unseen/size"):
                check_trials(sweep, base_recipe(sweep))


def test_cfg_refuses_to_guide_a_run_that_was_trained_without_null_samples(trained):
    config = trained / "config.yaml"
    config.write_text(config.read_text().replace("null_probability: 0.1", "null_probability: 0.0"))
    sweep = load_sweep("cfg", [f"base={trained}"])
    with pytest.raises(InputError, match=r"null_probability 0.*type 'parameters\.sample\.") as told:
        check_trials(sweep, base_recipe(sweep))
    typed = str(told.value).rpartition("type ")[2].strip("'")
    sweep = load_sweep("cfg", [f"base={trained}", typed])
    check_trials(sweep, base_recipe(sweep))
    fixed = load_sweep(
        "cfg", [f"base={trained}", typed, "parameters.sample.guidance_scale.value=2"]
    )
    with pytest.raises(InputError, match="nothing can guide it"):
        check_trials(fixed, base_recipe(fixed))


# the plan's numbers


def test_hours_are_bounded_by_measured_steps_and_by_the_time_budget(tmp_path):
    sweep = load_sweep("head", [f"storage_path={tmp_path}", "run_cap=4", "seeds=2"])
    base = base_recipe(sweep)
    steps = 4 * 2 * base.train.steps
    unknown = make_plan(sweep, base, Cluster(((8, 0),)))["hours_at_most"]
    assert (unknown["cpu"], unknown["gpu"], unknown["rough"]) == (None, None, False)
    assert "set time_budget, or run one (run_cap=1)" in unknown["from"]
    (tmp_path / "head").mkdir()
    records = Ledger(tmp_path / "head" / "trials.jsonl")
    records.trials = {
        0: TrialRecord(0, {}, "finished", 500, 500, seconds=100.0),
        1: TrialRecord(1, {}, "stopped", 100, 500, seconds=20.0),
    }
    records.save()
    measured = make_plan(sweep, base, Cluster(((8, 0),)))
    assert measured["steps_at_most"] == steps
    assert measured["hours_at_most"]["cpu"] == pytest.approx(steps * 0.2 / 3600)
    on_gpus = load_sweep(
        "head",
        [
            f"storage_path={tmp_path}",
            "time_budget=1m",
            "resources.gpus_per_worker=auto",
            "max_concurrent=auto",
        ],
    )
    bound = make_plan(on_gpus, base, Cluster(((16, 4),)))
    assert (bound["concurrent"], bound["takes"]["resources.gpus_per_worker"]) == (4, 1)
    assert bound["hours_at_most"]["gpu"] == pytest.approx(4 / 60)


def test_a_sweep_that_was_never_timed_says_roughly_from_what_it_takes_its_hours(tmp_path):
    """From the latest run of the same model and batch on the same kind of device; from nothing
    else of this place.
    """
    sweep = load_sweep("head", [f"storage_path={tmp_path}", "run_cap=4"])
    base = base_recipe(sweep)
    steps = 4 * base.train.steps
    kinds = {
        "other": ({"train.batch_size": 8}, 9.0),
        "gpu": ({"resources.gpus_per_worker": 1}, 9.0),
        "like": ({"loss.kl.weight": 3, "resources.num_workers": 2}, 0.25),
        "broken": ({}, 9.0),
    }
    for age, (name, (changes, step_s)) in enumerate(kinds.items()):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(
            dump_recipe(override_recipe(base, changes)) if name != "broken" else "model: 3"
        )
        # the first step is slow
        rows = [
            {"step": step, "perf/step_s": step_s * slow}
            for step, slow in ((10, 40), (20, 1), (30, 1))
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.utime(run / "metrics.jsonl", (age, age))
    hours = make_plan(sweep, base, Cluster(((8, 0),)))["hours_at_most"]
    assert hours["cpu"] == pytest.approx(steps * 2 * 0.25 / 3600)  # two workers' work on one
    assert (hours["rough"], hours["gpu"], str(tmp_path / "like") in hours["from"]) == (
        True,
        0,
        True,
    )
    recorded = Pace(0.1, "elsewhere", rough=True)
    empty = sweep.model_copy(update={"storage_path": str(tmp_path / "none")})
    assert make_plan(empty, base, Cluster(((8, 0),)), recorded=recorded)["hours_at_most"][
        "cpu"
    ] == pytest.approx(steps * 0.1 / 3600)
    on_gpus = load_sweep(
        "head", [f"storage_path={tmp_path / 'none'}", "resources.gpus_per_worker=1"]
    )
    # a CPU's pace
    assert (
        make_plan(on_gpus, base, Cluster(((8, 1),)), recorded=recorded)["hours_at_most"]["gpu"]
        is None
    )
    limited = empty.model_copy(update={"time_budget": 60.0})
    # a bound is better
    assert (
        make_plan(limited, base, Cluster(((8, 0),)), recorded=recorded)["hours_at_most"]["rough"]
        is False
    )


def test_the_packaged_record_gives_hours_for_what_is_like_it_alone(tmp_path, capsys):
    """The default sweep is; one with another batch or model, or one whose losses look at pictures,
    is not.
    """
    out = f"storage_path={tmp_path / 'out'}"
    recorded = json.loads((packaged("assets") / "pace" / "sweep_proxy.json").read_text())
    facts = plan_of(capsys, "head", out)
    assert facts["hours_at_most"]["cpu"] == pytest.approx(
        facts["steps_at_most"] * recorded["seconds_per_step"] / 3600
    )
    assert "30 trials of sweep_proxy recorded on 2 CPU cores" in facts["hours_at_most"]["from"]
    other = plan_of(capsys, "head", "set.train.batch_size=16", out)
    assert "timed on this machine just now" in other["hours_at_most"]["from"]
    assert plan_of(capsys, "structure", out, problems=1)["hours_at_most"]["cpu"] is None
    assert facts["image_steps_at_most"] == 32 * facts["steps_at_most"]
    assert main(["head", "--plan", out]) == 0
    assert "CPU-hours if none stops early (rough: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("early", "words"),
    [
        (
            "{type: hyperband, min_iter: 800}",
            (
                "hyperband stops nothing: its first rung, min_iter 800, is not below the 500 steps"
                " of a trial"
            ),
        ),
        ("{type: median, min_iter: 100}", "median rule from step 100"),
        ("{type: hyperband, min_iter: 100}", "halving at steps 100\n"),
    ],
)
def test_a_plan_says_what_stops_trials(early, words, tmp_path, capsys):
    assert (
        main(["head", "--plan", f"early_terminate={early}", f"storage_path={tmp_path / 'out'}"])
        == 0
    )
    out = capsys.readouterr().out
    assert words in out
    assert ("median rule" in out) == ("median" in early)
    if "stops nothing" in out:
        typed = re.search(r"type (early_terminate\.min_iter=\d+)", out)[1]
        assert plan_of(
            capsys, "head", f"early_terminate={early}", typed, f"storage_path={tmp_path / 'out'}"
        )["rungs"]


@pytest.mark.parametrize(
    ("per_gpu", "nodes", "at_once"),
    [
        (0.2, ((64, 1),), 5),  # 1 // 0.2 is 4 in floats
        (0.1, ((64, 1),), 10),
        (0.1, ((64, 4),), 40),
        (0.3, ((64, 4),), 12),  # 4 / 0.3 is 13, but no worker lies on two GPUs
        (0.5, ((3, 2), (64, 1)), 5),
        (2, ((64, 1), (64, 5)), 2),
    ],
)
def test_workers_share_a_gpu_as_ray_places_them(per_gpu, nodes, at_once):
    sweep = load_sweep(
        "head", [f"resources.gpus_per_worker={per_gpu}", "max_concurrent=auto", "run_cap=99"]
    )
    takes, concurrent = share_cluster(sweep, base_recipe(sweep), Cluster(nodes))
    assert (takes["resources.gpus_per_worker"], concurrent) == (per_gpu, at_once)


def test_storage_that_is_full_closed_or_a_file_is_a_problem_in_words(tmp_path, monkeypatch):
    assert check_storage(tmp_path / "not" / "yet", 10**6)["problem"] == ""
    assert (
        "of checkpoints to come; type storage_path=FOLDER"
        in check_storage(tmp_path, 2**60)["problem"]
    )
    (tmp_path / "file").write_text("")
    assert check_storage(tmp_path / "file", 0)["problem"].endswith(
        "is a file; type storage_path=FOLDER"
    )


def test_pictures_of_a_run_have_one_worker_whatever_it_was_trained_with(trained):
    sweep = load_sweep("cfg", [f"base={trained}"])
    base = base_recipe(sweep)
    assert base.resources.num_workers == 2
    assert share_cluster(sweep, base, Cluster(((8, 0),)))[0]["resources.num_workers"] == 1
