"""A best value at the end of what was searched: it is named, with what widens the range as
flowray.tune takes it.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweep_records import LR, METRIC, make

from flowray.report.edges import edges
from flowray.report.load import load_sweep
from flowray.report.sweep_page import sweep_commands
from flowray.sweepconfig.check import base_recipe, check_trials
from flowray.sweepconfig.file import dump_sweep, text_sweep
from flowray.sweepconfig.file import load_sweep as load_file


@pytest.mark.parametrize(
    ("spec", "value", "widen"),
    [
        (LR, 9e-3, "parameters.k.max=0.03"),
        (LR, 1.1e-4, "parameters.k.min=3.3e-05"),
        (LR, 1e-3, None),
        ({"distribution": "uniform", "min": -2.0, "max": 6.0}, 5.9, "parameters.k.max=10"),
        ({"distribution": "uniform", "min": -2.0, "max": 6.0}, -1.9, "parameters.k.min=-6"),
        # 0 is where such a range ends
        ({"distribution": "uniform", "min": 0.0, "max": 1.0}, 0.01, None),
        ({"distribution": "int_uniform", "min": 2, "max": 8}, 8, "parameters.k.max=11"),
        (
            {"distribution": "categorical", "values": [0.3, 1, 2]},
            2,
            "parameters.k.values=[0.3,1,2,3]",
        ),
        (
            {"distribution": "categorical", "values": [0.3, 1, 2]},
            0.3,
            "parameters.k.values=[0.15,0.3,1,2]",
        ),
        ({"distribution": "categorical", "values": [0, 1, 2]}, 0, None),
        ({"distribution": "categorical", "values": [1, 2]}, 2, None),
        ({"distribution": "categorical", "values": ["a", "b", "c"]}, "c", None),
    ],
)
def test_the_edge_of_a_range_is_named_with_what_widens_it(
    tmp_path: Path, spec: dict, value: Any, widen: str | None
) -> None:
    trials = [{"params": {"k": value}, "metrics": {METRIC: 0.4}}]
    found = edges(load_sweep(make(tmp_path / "s", trials, parameters={"k": spec})))
    assert [edge.widen for edge in found] == ([] if widen is None else [widen])
    if found and widen and not widen.endswith("]"):
        bound = float(widen.partition("=")[2])
        assert not float(spec["min"]) <= bound <= float(spec["max"])


def uniform(low: float, high: float, kind: str = "uniform", **more: float) -> dict[str, Any]:
    return {"distribution": kind, "min": low, "max": high, **more}


@pytest.mark.parametrize(
    ("key", "spec", "value", "widen"),
    [
        ("optim.lr", LR, 9e-3, "max=0.03"),
        ("optim.lr", uniform(1e-4, 1e-2), 2e-4, "min=5e-05"),  # half the range below lies below 0
        ("loss.clip.weight", uniform(0.1, 2.0), 0.12, "min=0.05"),
        ("flow.time.uniform_floor", uniform(0.05, 0.8), 0.79, "max=0.99"),  # a share
        ("flow.time.uniform_floor", uniform(0.05, 1.0), 1.0, None),  # nothing lies beyond
        ("train.ema", {"values": [0.9, 0.99, 0.999]}, 0.999, "values=[0.9,0.99,0.999,0.999563]"),
        ("model.velocity.depth", uniform(1, 8, "int_uniform"), 1, None),
        ("model.velocity.depth", uniform(2, 8, "int_uniform"), 2, "min=1"),
        ("train.batch_size", uniform(32, 256, "q_uniform", q=32), 32.0, None),
        # 224 is the last that is drawn
        ("train.batch_size", uniform(32, 250, "q_uniform", q=32), 224.0, "max=320"),
        # whole, not 2.62144e+06
        ("train.batch_size", uniform(2**20, 2**21, "int_uniform"), 2**21, "max=2621440"),
        (
            "train.steps",
            {"values": [1000000, 1000001, 1000002]},
            1000002,
            "values=[1000000,1000001,1000002,1000003]",
        ),
        ("flow.time.low", uniform(-10, -3), -3, "max=0.5"),
        ("flow.time.low", uniform(-10, -3), -3.1, "max=0.5"),
    ],
)
def test_flowray_tune_takes_what_widens_a_range(
    tmp_path: Path, key: str, spec: dict, value: Any, widen: str | None
) -> None:
    """The sweep loads with the override, and recipes can be made at the ends of its space."""
    plain = {
        "name": "s",
        "base": "sweep_proxy",
        "metric": {"name": METRIC},
        "set": {"flow.time.kind": "log_snr"},
        "method": "random",
    }
    text = yaml.safe_dump({**plain, "parameters": {key: spec}})
    trials = [{"params": {key: value}, "metrics": {METRIC: 0.4}}]
    folder = make(tmp_path / "s", trials, **yaml.safe_load(dump_sweep(text_sweep(text, "s"))))
    found = edges(load_sweep(folder))
    assert [edge.widen for edge in found] == (
        [] if widen is None else [f"parameters.{key}.{widen}"]
    )
    for edge in found:
        wider = load_file(str(folder / "sweep.yaml"), shlex.split(edge.typed))
        check_trials(wider, base_recipe(wider))
        assert str(wider.parameters[key].model_dump()) != str(
            load_file(str(folder / "sweep.yaml")).parameters[key].model_dump()
        )


def test_the_command_beyond_all_edges_is_a_sweep_of_its_own_that_starts_from_this_one(
    tmp_path: Path,
) -> None:
    params = {"optim.lr": LR, "train.ema": {"values": [0.9, 0.99, 0.999]}}
    text = {
        "name": "s",
        "base": "sweep_proxy",
        "metric": {"name": METRIC},
        "parameters": params,
        "points": [{"optim.lr": 1e-3}],
    }
    trials = [{"params": {"optim.lr": 9e-3, "train.ema": 0.999}, "metrics": {METRIC: 0.4}}]
    folder = make(
        tmp_path / "a sweep",
        trials,
        **yaml.safe_load(dump_sweep(text_sweep(yaml.safe_dump(text), "s"))),
    )
    typed = shlex.split(sweep_commands(load_sweep(folder))["Search on beyond the edges"])
    assert typed[:4] == ["python", "-m", "flowray.tune", str(folder / "sweep.yaml")]
    wider = load_file(typed[3], typed[4:])
    check_trials(wider, base_recipe(wider))
    assert (wider.name, wider.warm_start, wider.points) == ("s-wider", (str(folder),), ())
    assert (wider.parameters["optim.lr"].max, wider.parameters["train.ema"].values[-1]) == (
        0.03,
        0.999563,
    )
    inside = make(
        tmp_path / "b",
        [{"params": {"optim.lr": 1e-3}, "metrics": {METRIC: 0.4}}],
        parameters={"optim.lr": LR},
    )
    assert "Search on beyond the edges" not in sweep_commands(load_sweep(inside))
