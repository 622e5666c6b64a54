"""The views of a running sweep: TensorBoard's HParams read by TensorBoard, pictures read by
Optuna, the console's table, gauge names.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.artifacts import FileSystemArtifactStore, download_artifact, get_all_artifact_meta
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from tensorboardX import SummaryWriter

from flowray.config.keys import describe
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.observers import Observers
from flowray.tune.records import TrialRecord
from flowray.tune.study import SweepStudy
from flowray.views.console import METRICS, SweepConsole
from flowray.views.gauges import GAUGES, RUN_GAUGES, exported_names, run_label
from flowray.views.live import ARTIFACTS, Gallery, TrialBoard

METRIC = "ema/shoot/nmse"


def make(**changes: Any) -> Sweep:
    plain = {
        "name": "s",
        "base": "unused",
        "metric": {"name": METRIC},
        "parameters": {
            "optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
            "model.head.kind": {"distribution": "categorical", "values": ["pooled", "conv"]},
            "train.batch_size": {"distribution": "constant", "value": 32},
        },
        "stop": [{"metric": "text/snr", "below": 0.3}],
    }
    return Sweep.model_validate({**plain, **changes})


def record(number: int, **changes: Any) -> TrialRecord:
    params = {
        "optim.lr": 1e-3 * (number + 1),
        "model.head.kind": ["pooled", "conv"][number % 2],
        "train.batch_size": 32,
    }
    return TrialRecord(**{"trial": number, "params": params, "budget_steps": 400, **changes})


def hparam_rows(folder: Path) -> list[Any]:
    """The rows of the HParams tab, as TensorBoard's own backend makes them from the event files."""
    runs = plugin_event_multiplexer.EventMultiplexer()
    runs.AddRunsFromDirectory(str(folder))
    runs.Reload()
    backend = backend_context.Context(
        type(
            "TBContext",
            (),
            {
                "data_provider": data_provider.MultiplexerDataProvider(runs, str(folder)),
                "logdir": str(folder),
            },
        )()
    )
    context = RequestContext()
    experiment = backend.experiment_from_metadata(
        context, "", True, backend.hparams_metadata(context, ""), []
    )
    assert sorted(info.name for info in experiment.hparam_infos) == ["model.head.kind", "optim.lr"]
    wanted = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[
            api_pb2.STATUS_UNKNOWN,
            api_pb2.STATUS_SUCCESS,
            api_pb2.STATUS_FAILURE,
            api_pb2.STATUS_RUNNING,
        ],
        col_params=[api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos],
        slice_size=100,
        include_metrics=True,
    )
    handler = list_session_groups.Handler(context, backend, "", wanted)
    return sorted(handler.run().session_groups, key=lambda group: group.name)


def test_tensorboard_has_one_row_for_every_trial(tmp_path: Path) -> None:
    board, values = TrialBoard(make(), tmp_path), [0.5, 0.25, 0.75]
    for number, value in enumerate(values):
        trial = record(number)
        board.started(trial)
        # as the trial itself does
        with SummaryWriter(str(tmp_path / str(number) / "tensorboard")) as writer:
            writer.add_scalar(METRIC, 9.0, 100)
            writer.add_scalar(METRIC, value, 200)
            writer.add_scalar("ema/shoot/energy", value / 2, 200)
    board.started(record(0, last_step=200))  # continued after a crash
    board.ended(record(0, status="finished"))
    board.ended(record(1, status="failed"))
    board.ended(record(2, status="waiting"))  # paused
    rows = hparam_rows(tmp_path)
    assert [row.name for row in rows] == ["trial 0", "trial 1", "trial 2"]
    assert [row.hparams["optim.lr"].number_value for row in rows] == [0.001, 0.002, 0.003]
    assert [row.hparams["model.head.kind"].string_value for row in rows] == [
        "pooled",
        "conv",
        "pooled",
    ]
    found = [{value.name.tag: value.value for value in row.metric_values} for row in rows]
    assert [row[METRIC] for row in found] == values
    assert [row["ema/shoot/energy"] for row in found] == [value / 2 for value in values]
    assert [row.sessions[0].status for row in rows] == [
        api_pb2.STATUS_SUCCESS,
        api_pb2.STATUS_FAILURE,
        api_pb2.STATUS_UNKNOWN,
    ]
    assert [len(row.sessions) for row in rows] == [1, 1, 1]


def test_pictures_are_attached_to_their_trial_once(tmp_path: Path) -> None:
    sweep = make()
    study = SweepStudy(sweep, tmp_path / "study.journal")
    gallery = Gallery(tmp_path, sweep)
    for number in range(2):
        assert study.ask()[0] == number
        gallery.started(record(number))
        gallery.probed(record(number))  # no pictures yet
    samples = tmp_path / "1" / "samples"
    samples.mkdir(parents=True)
    for step in (100, 200):
        (samples / f"step_{step:06d}.png").write_bytes(f"picture {step}".encode())
        gallery.probed(record(1, last_step=step))
        gallery.probed(record(1, last_step=step))
    study.report(1, 200, 0.5)
    study.stop(1, "hopeless")
    (samples / "step_000300.png").write_bytes(b"later")
    gallery.probed(record(1, last_step=300))  # the study takes no more: no error either
    # as optuna-dashboard opens it
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
    stored = optuna.load_study(study_name="s", storage=storage)
    assert stored.metric_names == [METRIC]
    trials = stored.trials
    found = {
        meta.filename: meta
        for meta in get_all_artifact_meta(study_or_trial=trials[1], storage=storage)
    }
    assert sorted(found) == ["step_000100.png", "step_000200.png"]
    assert {meta.mimetype for meta in found.values()} == {"image/png"}
    assert get_all_artifact_meta(study_or_trial=trials[0], storage=storage) == []
    out = tmp_path / "out.png"
    store = FileSystemArtifactStore(str(tmp_path / ARTIFACTS))
    download_artifact(
        artifact_store=store, file_path=str(out), artifact_id=found["step_000200.png"].artifact_id
    )
    assert out.read_bytes() == b"picture 200"


class Diary:
    """An audience that notes what it hears, and whose disk is full from some trial on."""

    def __init__(self, full_from: int = 99):
        self.heard: list[tuple[str, int]] = []
        self._full_from = full_from

    def _note(self, what: str, trial: TrialRecord) -> None:
        if trial.trial >= self._full_from:
            raise OSError(28, "No space left on device")
        self.heard.append((what, trial.trial))

    def known(self, trial: TrialRecord) -> None:
        self._note("known", trial)

    def started(self, trial: TrialRecord) -> None:
        self._note("started", trial)

    def probed(self, trial: TrialRecord) -> None:
        self._note("probed", trial)

    def ended(self, trial: TrialRecord) -> None:
        self._note("ended", trial)


def test_a_full_disk_costs_one_view_only() -> None:
    first, second = Diary(full_from=1), Diary()
    both = Observers(first, second)
    for number in range(2):
        both.started(record(number))
        both.probed(record(number))
        both.ended(record(number))
    assert first.heard == [("started", 0), ("probed", 0), ("ended", 0)]
    assert second.heard == [
        (what, number) for number in range(2) for what in ("started", "probed", "ended")
    ]


def test_a_resumed_sweep_shows_the_trials_that_there_were(tmp_path: Path) -> None:
    """Counted, ranked and in the last table; none of them runs before it is started, and the
    pace is this session's.
    """
    out = io.StringIO()
    console = SweepConsole(make(), tmp_path, 6, out)
    both = Observers(console, TrialBoard(make(), tmp_path))
    for number, (status, nmse) in enumerate(
        [("finished", 0.4), ("stopped", 0.9), ("running", 0.6)]
    ):
        both.known(
            record(number, status=status, last_step=100, budget_steps=400, metrics={METRIC: nmse})
        )
    assert out.getvalue() == ""
    assert not list(tmp_path.iterdir())
    assert "2 of 6 trials done" in console._headline()
    assert "best 0.4 (trial 0)" in console._headline()
    assert "left" not in console._headline()  # nothing was done in this session yet
    again, new = (
        record(2, last_step=100, budget_steps=400, metrics={METRIC: 0.6}),
        record(3, budget_steps=400),
    )

    def states() -> list[tuple[str, str]]:
        return re.findall(r"(?m)^ *(\d\*?) *(waiting|running|finished|stopped)", drawn(console, 6))

    assert states() == [("2", "waiting"), ("0*", "finished"), ("1", "stopped")]
    both.started(again)
    both.started(new)
    assert states() == [("2", "running"), ("3", "running"), ("0*", "finished"), ("1", "stopped")]
    both.ended(again)  # out of time
    assert states()[0] == ("2", "waiting")
    new.status, new.metrics = "finished", {METRIC: 0.3}
    both.ended(new)
    assert "3 of 6 trials done" in console._headline()
    assert "best 0.3 (trial 3)" in console._headline()
    assert "left" in console._headline()


def drawn(console: SweepConsole, rows: int) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(console.table(rows))
    return out.getvalue()


def shown(tmp_path: Path, width: int, trials: list[TrialRecord]) -> str:
    console = SweepConsole(make(), tmp_path, 8, io.StringIO())
    console._console.width = width
    for trial in trials:
        console._trials[trial.trial] = trial
    out = io.StringIO()
    Console(file=out, width=width).print(console.table(len(trials)))
    return out.getvalue()


def some_trials() -> list[TrialRecord]:
    metrics = {
        METRIC: 0.5,
        "text/snr": 2.0,
        "ema/flow/cos": 0.9,
        "ema/std/mean": 0.8,
        "loss/flow": 0.7,
    }
    why = f"{METRIC} 1.4 at step 100 is outside the best 1/3 of 3 trials (cutoff 1.36)"
    return [
        record(0, status="finished", last_step=400, metrics=metrics),
        record(1, status="stopped", last_step=100, metrics=metrics | {METRIC: 1.4}, stopped_by=why),
        record(2, status="finished", last_step=400, metrics=metrics | {METRIC: 0.25}),
        record(3, status="failed", error="ValueError: [bold]x", metrics={METRIC: 0.1}),
        record(4, last_step=50),
    ]


def test_console_table_is_compact(tmp_path: Path) -> None:
    text = shown(tmp_path, 140, some_trials())
    assert "batch" not in text  # the same in all trials
    header = re.sub(r"\s+", " ", text.partition("─")[0])
    assert sum(name in header for name in ("nmse", "snr", "cos", "mean", "flow ")) <= METRICS + 1
    lines = [line.split() for line in text.splitlines() if re.match(r" ?\d", line)]
    # what runs, then best first, failures last
    assert [line[0] for line in lines] == ["4", "2*", "0", "1", "3"]
    assert lines[1][1:] == ["finished", "400/400", "0.25", "2", "0.9", "0.8", "0.003", "pooled"]
    assert "outside the best 1/3 of 3 trials" in " ".join(lines[3])
    assert "ValueError: [bold]x" in text
    assert lines[0][1:3] == ["running", "start-up"]


def test_a_quiet_sweep_shows_signs_of_life_ever_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    clock, log = Clock(), io.StringIO()
    monkeypatch.setattr("flowray.views.console.time", clock)
    console = SweepConsole(make(), tmp_path, 8, log)

    def beats(until: float) -> list[int]:
        log.truncate(log.seek(0))
        while clock.now < until:
            clock.now += 1
            console.heartbeat()
        return [
            int(seconds) for seconds in re.findall(r"(?m)^ *(\d+) s  0 of 8 done", log.getvalue())
        ]

    assert beats(1000) == [3, 8, 18, 38, 78, 158, 318, 618, 918]
    console.started(record(0))
    assert beats(1040) == [1003, 1008, 1018, 1038]


def test_progress_counts_the_steps_of_all_seeds(tmp_path: Path) -> None:
    console, trial = (
        SweepConsole(make(seeds=2), tmp_path, 8, io.StringIO()),
        record(0, budget_steps=800),
    )
    console.started(trial)

    def said() -> list[str]:
        return re.findall(r"start-up|\d+/800", drawn(console, 1))

    assert said() == ["start-up"]
    for folder, step, shown in (("0", 400, "400/800"), ("0/seeds/1", 50, "450/800")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")
        assert said() == [shown]


def test_console_table_shows_the_noise_over_seeds(tmp_path: Path) -> None:
    trials = some_trials()
    trials[2].noise = {METRIC: 0.0312}
    assert "0.25 ±0.031" in shown(tmp_path, 140, trials)


def test_console_table_fits_a_narrow_terminal(tmp_path: Path) -> None:
    text = shown(tmp_path, 64, some_trials())
    assert max(map(len, text.splitlines())) <= 64
    assert "0.25" in text
    assert "trial 1 stopped: ema/shoot/nmse 1.4" in text  # below the table
    assert "…" in text.splitlines()[-2] + text.splitlines()[-1]


def test_sweep_ends_with_the_table_in_a_file_too(tmp_path: Path) -> None:
    log = io.StringIO()
    with SweepConsole(make(), tmp_path, 8, log) as console:
        for trial in some_trials():
            console.started(trial)
    table = log.getvalue().partition("trial ")[2].rpartition("trial ")[2]
    assert re.findall(r"(?m)^ *(\d\*?) +(\w+)", table)[:2] == [("4", "running"), ("2*", "finished")]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_events_are_broken_between_words_at_the_width_of_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    log, why = (
        io.StringIO(),
        "ema/shoot/nmse 0.801 at step 50 is number 25 of 30 so far; the best 1/8 go on",
    )
    console = SweepConsole(make(), tmp_path, 40, log)
    for number in range(30):
        waits = number % 2 == 0
        status = "waiting" if waits else "stopped"
        trial = record(
            number, status=status, last_step=50, budget_steps=500, stopped_by=why, waits=waits
        )
        console.started(trial)
        console.ended(trial)
    lines = log.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(log.getvalue().split())
    assert words.count(why) == 30  # no line was broken inside a word
    assert (words.count("WAITING"), words.count("STOPPED")) == (15, 15)
    assert "15 of 40 trials done, 15 waiting" in console._headline()


def test_gauges_are_declared_once_and_name_known_metrics() -> None:
    names = [spec.name for spec in GAUGES]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"flowray_[a-z0-9_]+", name) for name in names)
    assert "ray_flowray_shoot_nmse" in exported_names()
    assert all(describe(spec.shows) for spec in RUN_GAUGES if "/" in spec.shows)
    assert [spec.shows for spec in RUN_GAUGES if "/" not in spec.shows] == ["step", "budget_steps"]


@pytest.mark.parametrize(
    ("path", "label"),
    [("/r/quick", "quick"), ("/r/head/3", "head/3"), ("/r/head/3/seeds/1", "head/3/seeds/1")],
)
def test_runs_are_labelled_by_name(path: str, label: str) -> None:
    assert run_label(Path(path)) == label
