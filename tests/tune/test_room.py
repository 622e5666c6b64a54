"""What `auto` means on a described cluster, and what is refused before anything starts: one set
of checks.
"""

import json
import os
import re
from pathlib import Path

import pytest

from flowray.cli.ready import problems
from flowray.cli.tune import main
from flowray.cluster.capacity import of_unknown_size
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, load_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.rayrun.tuner import run_sweep
from flowray.sweepconfig.check import base_recipe
from flowray.sweepconfig.file import load_sweep, packaged_sweeps
from flowray.tune.plan import Cluster
from flowray.tune.room import place, refuse_without_room, this_machine

LAPTOP = Cluster(((2, 0),), here=True, drivers=40)
GPUS = Cluster(((4, 0), *[(64, 8)] * 4), drivers=40)  # a head without GPUs, 32 GPUs behind it
TAKES = ("num_workers", "cpus_per_worker", "gpus_per_worker")


@pytest.fixture
def trained(tmp_path) -> Path:
    """The folder of a run as far as a plan looks at it."""
    run = tmp_path / "runs" / "quickstart"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_recipe(load_recipe("quickstart").recipe))
    checkpoint = run / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "state.json").write_text('{"step": 10, "files": {}, "frozen": {}}')
    return run


def placed(name: str, cluster: Cluster, *overrides: str):
    sweep = load_sweep(name, overrides)
    return place(sweep, base_recipe(sweep), cluster)


@pytest.mark.parametrize("name", packaged_sweeps())
def test_packaged_sweeps_use_what_is_there(name, trained):
    words = [f"base={trained}"] if name == "cfg.yaml" else []
    sweep = load_sweep(name, words)
    trials = {
        "head.yaml": 30,
        "cfg.yaml": 32,
        "kl.yaml": 10,
        "source_grad.yaml": 6,
        "lr_restart.yaml": 12,
        "emoji.yaml": 24,
    }.get(name, 14)
    there = placed(name, GPUS, *words)
    assert (there.concurrent, there.base.resources.gpus_per_worker) == (trials, 1)
    here = placed(name, LAPTOP, *words)
    alone = sweep.task == "sample"
    assert here.concurrent == (1 if alone else 2)
    assert list(here.takes.values()) == [1, 2 if alone else 1, 0]


@pytest.mark.parametrize(
    ("overrides", "takes", "at_once"),
    [
        (["resources.num_workers=auto"], (1, 8, 1), 30),  # 32 GPUs, 30 trials
        (["resources.num_workers=auto", "run_cap=4"], (8, 8, 1), 4),
        # six GPUs each, and a batch of 32 does not split in six
        (["resources.num_workers=auto", "run_cap=5", "points=[]"], (4, 8, 1), 5),
        (["resources.num_workers=auto", "run_cap=4", "set.train.accumulate=8"], (4, 8, 1), 4),
        # the fifth would wait with its time running
        (["resources.num_workers=8", "max_concurrent=9"], (8, 8, 1), 4),
    ],
)
def test_auto_splits_every_batch_and_no_trial_waits(overrides, takes, at_once):
    found = placed("head", GPUS, "resources.cpus_per_worker=8", *overrides)
    assert (tuple(found.takes[f"resources.{name}"] for name in TAKES), found.concurrent) == (
        takes,
        at_once,
    )


BATCHES = "parameters.train.batch_size={distribution: q_uniform, min: 8, max: 64, q: 4}"


@pytest.mark.parametrize(
    ("cluster", "overrides", "key"),
    [
        (LAPTOP, ["gpus_per_worker=1"], "gpus_per_worker"),
        (LAPTOP, ["cpus_per_worker=64"], "cpus_per_worker"),
        # memory
        (
            LAPTOP,
            [
                "num_workers=64",
                BATCHES.replace("min: 8, max: 64, q: 4", "min: 64, max: 128, q: 64"),
            ],
            "num_workers",
        ),
        (GPUS, ["cpus_per_worker=65"], "cpus_per_worker"),
        # 32 GPUs, but CPUs for eight
        (GPUS, ["cpus_per_worker=32", "num_workers=16"], "num_workers"),
        (GPUS, ["gpus_per_worker=8"], "num_workers=8"),
        (GPUS, ["gpus_per_worker=1.5"], "gpus_per_worker=1"),
        # NCCL has a GPU for each rank
        (GPUS, ["gpus_per_worker=0.5", "num_workers=2"], "gpus_per_worker=1"),
        (GPUS, ["num_workers=3"], "train.batch_size 32"),
        (GPUS, ["num_workers=8", BATCHES], "train.batch_size 12"),  # both ends do split
    ],
)
def test_what_can_never_be_placed_is_refused(cluster, overrides, key, tmp_path):
    words = [word if word.startswith("parameters") else f"resources.{word}" for word in overrides]
    with pytest.raises(InputError) as told:
        placed("head", cluster, *words)
    assert key in str(told.value)
    assert "; type resources." in str(told.value)
    assert "\n" not in str(told.value)


def test_a_head_alone_is_asked_for_its_nodes():
    with pytest.raises(InputError, match="add its nodes first"):
        placed("head", Cluster(((0, 0),)))


def test_a_cluster_that_may_grow_beyond_what_is_known_is_waited_for():
    hosts = Cluster(((8, 0),), grows=True)
    asked = {"resources.num_workers": 4, "resources.gpus_per_worker": 1}
    refuse_without_room(override_recipe(Recipe(), asked).resources, hosts)
    with pytest.raises(InputError, match="gpus_per_worker"):
        refuse_without_room(
            override_recipe(Recipe(), {"resources.gpus_per_worker": 2}).resources, hosts
        )
    assert placed("head", hosts, "resources.gpus_per_worker=1", "max_concurrent=3").concurrent == 3


@pytest.mark.parametrize(
    ("config", "grows"),
    [
        ({}, True),  # there is one, and it cannot be read
        (
            {
                "max_workers": 3,
                "head_node_type": "local",
                "available_node_types": {"local": {"resources": {}}},
            },
            True,
        ),
        (
            {
                "max_workers": 0,
                "head_node_type": "local",
                "available_node_types": {"local": {"resources": {}}},
            },
            False,
        ),
        (
            {
                "max_workers": 3,
                "head_node_type": "h",
                "available_node_types": {"h": {}, "w": {"resources": {"CPU": 8}}},
            },
            False,
        ),
        (
            {
                "max_workers": 3,
                "head_node_type": "h",
                "available_node_types": {"h": {"resources": {"CPU": 8}}, "w": {}},
            },
            True,
        ),
    ],
)
def test_which_autoscalers_state_no_size(config, grows):
    assert of_unknown_size(config) == grows


@pytest.mark.parametrize(
    "resource",
    ["gpus_per_worker=64", f"cpus_per_worker={(os.cpu_count() or 1) + 1}", "num_workers=5"],
)
def test_plan_and_run_refuse_the_same_before_anything_is_written(resource, tmp_path, capsys):
    """And a run of flowray.train does, for what is no matter of a batch."""
    words = ["head", f"resources.{resource}", f"storage_path={tmp_path / 'out'}"]
    assert main([*words, "--plan", "--json"]) == 1
    planned = json.loads(capsys.readouterr().out)
    assert planned["trials"] == 30
    sweep = load_sweep(words[0], words[1:])
    with pytest.raises(InputError) as told:
        run_sweep(sweep, base_recipe(sweep), resume=False)
    assert planned["problems"][0] == str(told.value)
    assert not (tmp_path / "out").exists()
    if "num_workers" not in resource:
        recipe = load_recipe("sweep_proxy", [f"resources.{resource}"]).recipe
        assert next(problems(recipe)) == str(told.value)


def test_a_plan_refuses_the_folder_that_a_run_would(tmp_path, capsys):
    from flowray.tune.folder import open_directory

    out = f"storage_path={tmp_path}"
    sweep = load_sweep("head", [out])
    open_directory(sweep, base_recipe(sweep), resume=False)
    for word, says in (
        ("seed=7", "seed differs"),
        ("run_cap=40", r"run_cap differs .* type --resume"),
    ):
        assert main(["head", out, word, "--plan", "--json"]) == 1
        (problem,) = json.loads(capsys.readouterr().out)["problems"]
        assert re.search(says, problem)
    assert main(["head", out, "run_cap=40", "--plan", "--resume", "--json"]) == 0


def test_this_machine_counts_its_memory():
    here = this_machine()
    assert here.cpus == os.cpu_count()
    assert here.workers(1, 0) == here.drivers


def test_pictures_of_a_run_that_is_not_there_or_has_no_checkpoint(
    trained, tmp_path, monkeypatch, capsys
):
    """Planned and run alike, with what makes it."""
    monkeypatch.chdir(tmp_path)
    assert main(["cfg", "--plan", "--json"]) == 0
    (trained / "checkpoints" / "step_00000010" / "state.json").unlink()
    capsys.readouterr()
    assert main(["cfg", "--plan", "--json"]) == 1
    assert "no valid checkpoint" in json.loads(capsys.readouterr().out)["problems"][0]
    with pytest.raises(InputError, match="no valid checkpoint"):
        main(["cfg"])
    (trained / "config.yaml").unlink()
    for words in (["cfg", "--plan"], ["cfg"]):
        with pytest.raises(InputError, match=r"type python -m flowray\.train quickstart first"):
            main(words)
