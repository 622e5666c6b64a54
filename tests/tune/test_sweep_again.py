"""The same command typed again, without Ray: which sweep goes on, which is refused, and what
becomes of trials that were cut off.
"""

import errno
import json
import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from builders import METRIC, make_sweep, open_session
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from support import assert_refused

from flowray.cli.tune import main
from flowray.config.errors import InputError
from flowray.config.load import load_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.rayrun.search import ERRNO, FAILED, NO_STORAGE, ProbeScheduler, StudySearch
from flowray.rayrun.tuner import SweepResult, _result
from flowray.report.results import Metric
from flowray.report.results import Sweep as Results
from flowray.store.run import RunDirectory, RunLock
from flowray.sweepconfig.distributions import LogUniform
from flowray.sweepconfig.file import load_sweep
from flowray.sweepconfig.stop import BoundRule
from flowray.sweepconfig.sweep import Hyperband, Sweep
from flowray.tune.folder import held_directory, open_directory, refuse_taken
from flowray.tune.ledger import Ledger
from flowray.tune.records import TrialRecord
from flowray.tune.session import SweepSession

FORK = multiprocessing.get_context("fork")


def make(folder, **changes) -> Sweep:
    plain = {
        "storage_path": str(folder),
        "base": "b.yaml",
        "early_terminate": Hyperband(min_iter=20, eta=2),
        "method": "random",
        "run_cap": 3,
    }
    return make_sweep(**{**plain, **changes})


@pytest.fixture
def there(tmp_path):
    """A sweep's directory as its first session left it."""
    open_directory(make(tmp_path), Recipe(), resume=False)
    return tmp_path


def ended(folder, *states):
    """The records of a sweep whose trials have come to these states, in its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "sweep.yaml").touch()
    records = Ledger(folder / "trials.jsonl")
    for number, state in enumerate(states):
        records.trials[number] = TrialRecord(number, {}, state, 20, 80, waits=state == "waiting")
    records.save()
    return records


@pytest.mark.parametrize("resume", [False, True])
def test_the_same_sweep_goes_on_also_where_only_places_differ(there, resume):
    before = load_sweep(str(there / "s" / "sweep.yaml"))
    assert open_directory(make(there), Recipe(), resume) == there / "s"
    moved = make(there, base="/another/working/dir/b.yaml", description="typed again")
    other = override_recipe(
        Recipe(),
        {
            "resources.num_workers": 2,
            "data.cache": "/elsewhere",
            "name": "x",
            "train.checkpoint_every": 7,
            "storage_path": "/x",
        },
    )
    open_directory(moved, other, resume)
    assert load_recipe(str(there / "s" / "base.yaml")).recipe == other
    assert load_sweep(str(there / "s" / "sweep.yaml")).parameters == before.parameters
    assert not list((there / "s").glob(".*"))


@pytest.mark.parametrize(
    ("changes", "keys", "resume", "words"),
    [
        (
            {"seed": 4},
            {},
            True,
            (
                r"seed differs from the sweep to resume \(4, there it is 0\); take it back, or type"
                r" name=OTHER"
            ),
        ),
        (
            {"parameters": {"optim.lr": LogUniform(min=1e-5, max=1e-2)}},
            {},
            True,
            "parameters differs",
        ),
        (
            {},
            {"train.steps": 7},
            True,
            r"train\.steps differs from the sweep to resume \(7, there it is 1000\)",
        ),
        ({"set": {"loss.kl.weight": 2.0}}, {"loss.kl.weight": 2.0}, True, "loss.kl.weight differs"),
        (
            {"run_cap": 5},
            {},
            False,
            (
                "run_cap differs from the sweep that is there, of which 0 trials are done; type"
                " --resume"
            ),
        ),
        (
            {"stop": (BoundRule(metric=METRIC, above=5),)},
            {},
            False,
            "stop differs from the sweep that is there",
        ),
    ],
)
def test_another_sweep_is_refused_in_one_line_and_nothing_is_written(
    there, changes, keys, resume, words
):
    before = {path.name: path.read_text() for path in (there / "s").iterdir()}
    with pytest.raises(InputError, match=words):
        open_directory(make(there, **changes), override_recipe(Recipe(), keys), resume)
    assert {path.name: path.read_text() for path in (there / "s").iterdir()} == before


@pytest.mark.parametrize("rule", [False, True])
def test_errors_in_the_unit_of_older_versions_are_not_ranked_beside_new_ones(there, rule):
    changes = {"metric": {"name": "ema/flow/cos", "goal": "maximize"}} if rule else {}
    sweep = make(there, name="t", stop=(BoundRule(metric=METRIC, above=2.0),), **changes)
    open_directory(sweep, Recipe(), resume=False)
    ledger = Ledger(there / "t" / "trials.jsonl")
    ledger.trials[0] = TrialRecord(0, {}, "finished", metrics={METRIC: 0.5, "data/var": 0.9})
    ledger.save()
    open_directory(sweep, Recipe(), resume=True)
    ledger.trials[1] = TrialRecord(1, {}, "stopped", metrics={METRIC: 0.5})
    ledger.save()
    opening = lambda: open_directory(sweep, Recipe(), resume=True)  # noqa: E731
    assert_refused(opening, InputError, f"trial 1 has {METRIC} over the variance about one mean")


def test_caps_and_stops_may_differ_where_that_is_said(there):
    open_directory(
        make(there, run_cap=5, stop=(BoundRule(metric=METRIC, above=5),)), Recipe(), resume=True
    )
    kept = load_sweep(str(there / "s" / "sweep.yaml"))
    assert (kept.run_cap, kept.stop[0].above) == (5, 5)


def hold(folder, pipe) -> None:
    with RunLock(RunDirectory(folder)):
        pipe.send("held")
        time.sleep(300)


def test_of_two_that_make_a_sweep_at_once_one_writes(tmp_path):
    """The other finds no sweep there yet, but its lock."""
    (tmp_path / "s").mkdir()
    here, pipe = multiprocessing.Pipe()
    owner = FORK.Process(target=hold, args=(tmp_path / "s", pipe))
    owner.start()
    try:
        assert here.poll(60)
        refuse_taken(make(tmp_path), Recipe(), resume=False)
        with pytest.raises(InputError, match=f"in use by process {owner.pid}"):
            held_directory(make(tmp_path), Recipe(), resume=False).__enter__()
        assert [path.name for path in (tmp_path / "s").iterdir()] == [".lock"]
    finally:
        owner.kill()
        owner.join()


def test_a_sweep_that_another_process_runs_is_not_touched_until_that_is_killed(there):
    here, pipe = multiprocessing.Pipe()
    owner = FORK.Process(target=hold, args=(there / "s", pipe))
    owner.start()
    try:
        assert here.poll(60)
        with pytest.raises(InputError, match=f"in use by process {owner.pid}"):
            open_directory(make(there, run_cap=5), Recipe(), resume=True)
        assert load_sweep(str(there / "s" / "sweep.yaml")).run_cap == 3
        began = time.monotonic()
        with (
            pytest.raises(InputError, match="in use"),
            RunLock(RunDirectory(there / "s"), patience_s=0.5),
        ):
            pass
        assert time.monotonic() - began >= 0.5
    finally:
        owner.kill()
        owner.join()
    open_directory(make(there, run_cap=5), Recipe(), resume=True)


# trials that were cut off


def open_it(folder, **changes) -> SweepSession:
    sweep = make(folder, **changes)
    return open_session(sweep, folder, 80)


def write(folder, number, *values, start=10) -> list[dict]:
    """Probe rows on the disk, every 10 steps; as the run would report them."""
    (folder / str(number)).mkdir(exist_ok=True)
    rows = [{"step": start + 10 * i, METRIC: value} for i, value in enumerate(values)]
    with (folder / str(number) / "probes.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return [{**row, "budget_steps": 80} for row in rows]


def test_rows_that_a_killed_process_wrote_and_could_not_report_are_judged_with_the_next(tmp_path):
    judge = open_it(tmp_path)
    for value in (1.0, 2.0):
        number, _ = judge.next()
        rows = write(tmp_path, number, value, value, value)
        assert judge.report(number, rows[0]) is False
        assert judge.report(
            number, rows[2] | {"start": 10}
        )  # the one at step 20, a rung, comes from the disk
        judge.end(number)
    assert judge.ledger.trials[1].last_step == 20
    assert judge.ledger.trials[1].stopped_by.endswith(
        "at step 20 is number 2 of 2 so far; the best 1/2 go on"
    )
    assert judge.next()[0] == 0


def test_a_trial_that_was_killed_after_its_last_checkpoint_has_finished(tmp_path):
    """Started again it has nothing to do, and reports nothing."""
    judge = open_it(tmp_path)
    judge.next()
    judge.report(0, write(tmp_path, 0, 3.0)[0])
    write(tmp_path, 0, *[2.0] * 6, 0.5, start=20)
    with (tmp_path / "0" / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"step": 80, "loss/flow": 0.25, "perf/step_s": 1.0}) + "\n")
    judge.end(0)
    record = judge.ledger.trials[0]
    assert (record.status, record.last_step, record.metrics) == (
        "finished",
        80,
        {METRIC: 0.5, "loss/flow": 0.25},
    )


def test_a_stop_that_the_killed_driver_had_not_told_is_told_by_the_next_session(tmp_path):
    judge = open_it(tmp_path)
    for value in (1.0, 2.0):
        number, _ = judge.next()
        rows = write(tmp_path, number, value, value)
        # and killed, before `ended`
        assert [judge.report(number, row) for row in rows] == [False, True]
    again = open_it(tmp_path)
    assert [again.ledger.trials[number].status for number in (0, 1)] == ["waiting", "waiting"]
    assert again.next()[0] == 0
    assert again.next()[0] == 2


def test_a_node_that_lacks_the_storage_fails_no_trial(tmp_path):
    """It may come late, on a growing cluster: the sweep waits, with a line that names path and
    node, and goes on where it is right.
    """
    judge = open_it(tmp_path)
    search, scheduler = StudySearch(judge), ProbeScheduler(judge)
    there, here = (
        SimpleNamespace(config=search.suggest("a")),
        SimpleNamespace(config=search.suggest("b")),
    )
    words = (
        f"storage_path: {tmp_path} is not shared with node late (10.0.0.9): there is no such folder"
        " there"
    )
    assert scheduler.on_trial_result(None, there, {NO_STORAGE: words}) == TrialScheduler.STOP
    search.on_trial_complete("a")
    assert search.suggest("c") == Searcher.FINISHED
    # it pauses
    assert scheduler.on_trial_result(None, here, write(tmp_path, 1, 1.0)[0]) == TrialScheduler.STOP
    search.on_trial_complete("b")
    assert isinstance(judge.suspended_by, InputError)
    assert (
        str(judge.suspended_by)
        == f"{words}; the sweep waits: when the node has it, or is gone, type the same command"
        " again"
    )
    again = open_it(tmp_path)
    assert [again.next()[0] for _ in range(3)] == [0, 1, 2]
    assert [(t.status, t.last_step) for t in again.ledger.trials.values()] == [
        ("running", 0),
        ("running", 10),
        ("running", 0),
    ]


# finished by hand


def results(folder: Path) -> Results:
    return Results(folder, "s", {}, (Metric(METRIC, "minimize"),), (), {}, ())


@pytest.mark.parametrize(("finish", "interrupted"), [((), True), ((0,), False), ((1,), True)])
def test_a_session_that_finished_its_trials_was_not_interrupted_whatever_the_sweep_has_left(
    tmp_path, finish, interrupted
):
    records = ended(tmp_path, "finished", "running", "stopped", "waiting")
    result = _result(make(tmp_path, run_cap=6), records, results(tmp_path), finish, False)
    assert (result.interrupted, result.left) == (interrupted, 4)


@pytest.mark.parametrize(
    ("out_of_time", "interrupted", "code"), [(False, False, 0), (True, True, 0), (False, True, 75)]
)
def test_what_is_left_is_said_with_the_command_that_goes_on(
    there, monkeypatch, capsys, out_of_time, interrupted, code
):
    """A session that finished trial 1 does not call the rest of the sweep interrupted, nor does
    its command finish 1 again.
    """
    result = SweepResult(
        results(there / "s"),
        (TrialRecord(1, {}, "finished", 80, 80),),
        None,
        0.0,
        interrupted,
        out_of_time,
        left=4,
    )
    monkeypatch.setattr("flowray.rayrun.tuner.run_sweep", lambda *args, **options: result)
    monkeypatch.setattr("flowray.cli.tune._report", lambda found: [])
    ended(there / "lr_restart", "finished", "stopped")
    assert main(["lr_restart", "run_cap=5", "--finish", "1", f"storage_path={there}"]) == code
    said = capsys.readouterr().err
    rest = f"python -m flowray.tune lr_restart run_cap=5 storage_path={there}\n"
    if interrupted:
        assert (
            "to continue: python -m flowray.tune lr_restart run_cap=5 --finish 1"
            f" storage_path={there}" in said
        )
    else:
        assert said == f"4 trials of the sweep are left; to go on: {rest}"


@pytest.mark.parametrize(("number", "says"), [("99", "stopped trials: 1"), ("0", "is finished")])
def test_a_trial_that_cannot_be_finished_is_refused(there, number, says):
    ended(there / "lr_restart", "finished", "stopped")
    argv = ["lr_restart", f"storage_path={there}", "--finish", number]
    assert_refused(lambda: main(argv), InputError, f"^--finish {number}: .*{says}")
    assert_refused(
        lambda: main([*argv, "name=other"]),
        InputError,
        f"^--finish {number}: {there}/other holds no sweep; name=",
    )


def test_where_there_is_nothing_to_continue_a_line_says_so(tmp_path, capsys):
    """The plan alone: a start would begin with trial 0."""
    main(["lr_restart", f"storage_path={tmp_path}", "--resume", "--plan", "--json"])
    first = capsys.readouterr().err.splitlines()[0]
    assert f"{tmp_path}/lr_restart holds no sweep to continue" in first
    assert "storage_path=FOLDER" in first


def test_a_full_disk_fails_no_trial(tmp_path):
    judge = open_it(tmp_path)
    search, scheduler = StudySearch(judge), ProbeScheduler(judge)
    trial = SimpleNamespace(config=search.suggest("a"))
    scheduler.on_trial_result(None, trial, write(tmp_path, 0, 1.0)[0])
    words = "RunFailed: s/0: step 14: the checkpoint cannot be written: kein Platz"
    full = {FAILED: words, ERRNO: errno.ENOSPC}
    assert scheduler.on_trial_result(None, trial, full) == TrialScheduler.STOP
    search.on_trial_complete("a")
    assert search.suggest("b") == Searcher.FINISHED
    assert judge.suspended_by.strerror == words
    again = open_it(tmp_path)
    assert (again.ledger.trials[0].status, again.next()[0]) == ("running", 0)
    other = {FAILED: "InputError: No space left on device: no such file", ERRNO: None}
    assert scheduler.on_trial_result(None, trial, other) == TrialScheduler.STOP
    assert judge.ledger.trials[0].status == "failed"
