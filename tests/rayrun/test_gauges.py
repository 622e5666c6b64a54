"""The gauges as Prometheus would read them: scraped from a live Ray's metrics port."""

import io
import json
import math
import re
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from flowray.cluster import session
from flowray.cluster.ray_private import dashboard_url
from flowray.report.load import load_sweep
from flowray.store.run import RunDirectory
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.ledger import Ledger
from flowray.tune.records import LAST_BYTES, TrialRecord
from flowray.views import gauges
from flowray.views.console import SweepConsole
from flowray.views.gauges import RunGauges, SweepGauges, exported_names, leave_link

METRIC = "ema/shoot/nmse"
LINE = re.compile(r"(?m)^(ray_flowray_\w+)\{(.*)\} (\S+)$")


def scrape() -> dict[tuple[str, str], float]:
    """(name, the label that tells runs or states apart) -> value, of everything that flowray
    exports.
    """
    port = ray.nodes()[0]["MetricsExportPort"]
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
    found = {}
    for name, labels, value in LINE.findall(text):
        mark = re.search(r'(?:run|state|metric)="([^"]*)"', labels)
        found[name, mark[1] if mark else ""] = float(value)
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    """Stands in for Ray's agent: (name, labels in their order) -> value."""
    found: dict[tuple[str, ...], float] = {}

    class Kept:
        def __init__(self, spec: gauges.GaugeSpec):
            self.spec = spec

        def set(self, value: float, tags: dict[str, str]) -> None:
            found[(self.spec.name, *(tags[label] for label in self.spec.labels))] = value

    monkeypatch.setattr(gauges, "_open", Kept)
    return found


def test_a_resumed_sweep_begins_with_its_earlier_trials(seen: dict[tuple[str, ...], float]) -> None:
    space = {"optim.lr": {"distribution": "uniform", "min": 0.0, "max": 1.0}}
    whole = SweepGauges(
        Sweep.model_validate(
            {
                "name": "s",
                "base": "unused",
                "metric": {"name": "ema/shoot/nmse"},
                "parameters": space,
            }
        )
    )
    for trial in (
        TrialRecord(0, {}, "finished", metrics={"ema/shoot/nmse": 0.25}),
        TrialRecord(1, {}, "stopped", metrics={"ema/shoot/nmse": 0.75}),
        TrialRecord(2, {}, "failed", metrics={"ema/shoot/nmse": 0.1}),
    ):
        whole.known(trial)
    states = {"finished": 1, "stopped": 1, "failed": 1}
    assert seen == {
        ("flowray_trials", "s", state): states.get(state, 0)
        for state in ("running", "waiting", *states)
    } | {("flowray_best", "s", "ema/shoot/nmse"): 0.25}
    whole.started(TrialRecord(3, {}))
    assert (seen["flowray_trials", "s", "running"], seen["flowray_trials", "s", "finished"]) == (
        1,
        1,
    )
    probed = {"optim.lr": 0.5}, {"ema/shoot/nmse": 0.2}
    whole.probed(TrialRecord(3, probed[0], metrics=probed[1]))
    assert seen["flowray_best", "s", "ema/shoot/nmse"] == 0.25  # the best that has finished
    whole.ended(TrialRecord(3, probed[0], "finished", metrics=probed[1]))
    assert seen["flowray_best", "s", "ema/shoot/nmse"] == 0.2


def finished(number: int, value: float | None, **more: Any) -> TrialRecord:
    params = more.pop("params", {"optim.lr": 0.1 * number})
    plain = {"status": "finished", "last_step": 40, "budget_steps": 40}
    return TrialRecord(number, params, metrics={METRIC: value}, **{**plain, **more})


def seeds(number: int, lr: float, seed: int, value: float) -> TrialRecord:
    return finished(number, value, params={"optim.lr": lr, "seed": seed})


def latent(number: int, channels: int, value: float) -> TrialRecord:
    return finished(number, value, params={"optim.lr": 0.1 * number, CHANNELS: channels})


CHANNELS = "model.latent.channels"
NEVER = {"status": "stopped", "last_step": 10}
LOST: dict[str, Any] = {"status": "failed", "last_step": 0, "metrics": {}}


@pytest.mark.parametrize(
    ("trials", "goal", "wanted"),
    [
        ([finished(0, 0.3), finished(1, 0.3 * (1 - 1e-7))], "minimize", 0),  # equal, so the earlier
        ([finished(0, 0.3), finished(1, 0.3 * (1 + 1e-7))], "maximize", 0),
        ([finished(0, 0.3), finished(1, 0.299)], "minimize", 1),
        ([finished(0, None), finished(1, 0.9)], "minimize", 1),  # NaN, as rows have it
        ([finished(0, 0.1, status="failed"), finished(1, 0.9)], "minimize", 1),
        ([finished(0, 0.1, **NEVER), finished(1, 0.9)], "minimize", 1),
        ([finished(0, 0.1, status="running"), finished(1, 0.9)], "minimize", 1),
        ([finished(0, 0.4, **NEVER), finished(1, 0.4, status="waiting")], "minimize", 0),
        ([finished(0, None), finished(1, 0.7, **NEVER)], "minimize", 1),  # the best so far
        # a lucky seed does not win
        ([seeds(0, 1, 0, 0.3), seeds(1, 1, 1, 0.7), seeds(2, 2, 0, 0.45)], "minimize", 2),
        ([seeds(0, 1, 0, 0.3), seeds(1, 1, 1, 0.5), seeds(2, 2, 0, 0.45)], "minimize", 0),
        ([finished(0, 0.1, status="failed"), finished(1, None)], "minimize", None),
        # values of another latent do not compare
        ([latent(0, 4, 0.3), latent(1, 4, 0.2)], "minimize", 1),
        ([latent(0, 4, 0.3), latent(1, 16, 0.2)], "minimize", None),
        # one that failed before it wrote anything is compared with none
        ([latent(0, 4, 0.3), replace(latent(1, 16, 0.2), **LOST)], "minimize", 0),
    ],
)
def test_console_gauges_and_report_name_the_same_best_trial(
    tmp_path: Path,
    seen: dict[tuple[str, ...], float],
    trials: list[TrialRecord],
    goal: str,
    wanted: int | None,
) -> None:
    space: dict[str, Any] = {"optim.lr": {"distribution": "uniform", "min": 0.0, "max": 1.0}}
    space |= {CHANNELS: {"distribution": "categorical", "values": [4, 16]}}
    plain = {"name": "s", "base": "unused", "metric": {"name": METRIC, "goal": goal}}
    sweep = Sweep.model_validate({**plain, "parameters": space})
    (tmp_path / "sweep.yaml").write_text(json.dumps(plain))
    ledger, screen = Ledger(tmp_path / "trials.jsonl"), io.StringIO()
    console, whole = SweepConsole(sweep, tmp_path, len(trials), screen), SweepGauges(sweep)
    for trial in trials:
        ledger.trials[trial.trial] = trial
        run = tmp_path / str(trial.trial)
        run.mkdir()
        if trial.metrics:
            (run / "config.yaml").write_text(
                f"model: {{latent: {{channels: {trial.params.get(CHANNELS, 4)}}}}}\n"
            )
        console.known(trial)
        whole.known(trial)
    ledger.save()
    report = load_sweep(tmp_path)
    assert (report.best and report.best.number) == wanted
    with console:
        pass  # its last table
    assert re.findall(r"(?m)^ *(\d+)\*", screen.getvalue()) == [
        str(number) for number in (wanted,) if number is not None
    ]
    value = None if wanted is None else trials[wanted].metrics[METRIC]
    shown = seen.get(("flowray_best", "s", METRIC))
    assert shown == value or (value is None and math.isnan(shown))
    assert f"{ledger.saved():.6f}" == f"{report.saved:.6f}"
    share = f"{report.saved:.0%} of the steps saved"
    assert (share in console._headline()) is bool(report.budget_steps)


def test_speed_is_of_the_last_step_logged(
    tmp_path: Path, seen: dict[tuple[str, ...], float]
) -> None:
    run = RunDirectory(tmp_path / "s" / "4")
    run.create()
    shown = RunGauges(run.path)
    shown.show({"step": 1})
    assert ("flowray_images_per_s", "s/4") not in seen  # nothing is logged yet
    with run.metrics.open("w") as file:
        for step in range(2000):
            file.write(
                json.dumps({"step": step, "perf/images_per_s": 1000.0 + step, "loss/total": 0.5})
                + "\n"
            )
        file.write('{"step": 2000, "perf/im')  # is being written
    assert run.metrics.stat().st_size > LAST_BYTES
    shown.show({"step": 2000})
    assert seen["flowray_images_per_s", "s/4"] == 2999.0
    shown.show({"step": 1, "perf/images_per_s": 7.0})  # of a sweep over samplers
    assert seen["flowray_images_per_s", "s/4"] == 7.0


@pytest.mark.slow
def test_rays_metrics_port_serves_the_declared_names(tmp_path: Path) -> None:
    space = {"optim.lr": {"distribution": "uniform", "min": 0.0, "max": 1.0}}
    sweep = Sweep.model_validate(
        {"name": "s", "base": "unused", "metric": {"name": "ema/shoot/nmse"}, "parameters": space}
    )
    with session.started():
        whole = SweepGauges(sweep)
        whole.started(TrialRecord(0, {}))
        whole.probed(TrialRecord(1, {}, metrics={"ema/shoot/nmse": 0.5}))
        whole.ended(TrialRecord(1, {}, "finished", metrics={"ema/shoot/nmse": 0.25}))
        whole.ended(TrialRecord(2, {}, "failed", metrics={"ema/shoot/nmse": 0.1}))
        row = {
            "step": 10,
            "budget_steps": 20,
            "shoot/nmse": 0.9,
            "ema/shoot/nmse": 0.5,
            "loss/flow": 0.3,
            "loss/total": None,
        }
        RunGauges(tmp_path / "s" / "0").show(row)
        RunGauges(tmp_path / "s" / "1").show(row | {"ema/shoot/nmse": 0.25})
        leave_link(tmp_path, dashboard_url())
        until, found = time.monotonic() + 120, {}
        while ("ray_flowray_shoot_nmse", "s/1") not in found and time.monotonic() < until:
            time.sleep(1)
            found = scrape()
    assert {name for name, _ in found} <= exported_names()
    assert found["ray_flowray_shoot_nmse", "s/0"] == 0.5  # of the EMA weights
    assert found["ray_flowray_shoot_nmse", "s/1"] == 0.25
    assert found["ray_flowray_step", "s/0"] == 10
    assert ("ray_flowray_loss_total", "s/0") not in found
    states = {
        state: found["ray_flowray_trials", state]
        for state in ("running", "finished", "stopped", "failed")
    }
    assert states == {"running": 1, "finished": 1, "stopped": 0, "failed": 1}
    assert found["ray_flowray_best", "ema/shoot/nmse"] == 0.25
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+\n", (tmp_path / ".ray" / "dashboard").read_text())
