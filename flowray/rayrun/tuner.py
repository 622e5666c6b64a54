"""A sweep under Ray Tune: every trial is a Tune function that drives its own Ray Train run,
judged at every probe.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback

from flowray.cluster import session as ray_session
from flowray.cluster.capacity import machines
from flowray.cluster.ray_private import HEAD, dashboard_url
from flowray.cluster.storage import StorageNotShared, marker_file, refusal_here, refuse_unshared
from flowray.cluster.waiting import RoomWatch, is_active
from flowray.config.errors import InputError, last_line
from flowray.config.load import dump_recipe, override_recipe
from flowray.config.progress import SILENT, Progress
from flowray.config.recipe import Recipe
from flowray.config.writing import write_whole
from flowray.rayrun.encoder import ensure_encoded
from flowray.rayrun.failures import RunFailed, no_room
from flowray.rayrun.retries import FailureReset, newest_step
from flowray.rayrun.search import (
    ERRNO,
    FAILED,
    NO_STORAGE,
    NotRestored,
    ProbeScheduler,
    StudySearch,
)
from flowray.rayrun.trainer import fit, train_worker
from flowray.report.load import load_sweep as load_report
from flowray.report.results import Sweep as Report
from flowray.store.run import RunDirectory, RunLock
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.folder import held_directory, refuse_taken, sweep_folder
from flowray.tune.ledger import Ledger
from flowray.tune.observers import Observer
from flowray.tune.plan import longest
from flowray.tune.policy import Policy
from flowray.tune.records import TrialRecord, repeat_dir, repeat_of
from flowray.tune.room import Placed, needed_cpus, place
from flowray.tune.sampling import score_pictures
from flowray.tune.session import SweepSession
from flowray.tune.space import ends_with_its_space, left_to_begin, trial_count
from flowray.tune.warm import earlier_trials
from flowray.views.console import SweepConsole
from flowray.views.gauges import SweepGauges, leave_link
from flowray.views.live import Gallery, TrialBoard

_DATA = {"data", "model.autoencoder", "model.latent"}  # parts of a recipe that latents depend on

# trains one recipe in one run directory, inside a Tune session
TrialFn = Callable[[Recipe, Path], None]

_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 the only way to no output at all
    # metrics.jsonl and TensorBoard are the run directory's
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own state is never read again
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # a stopped trial closes its files before the next one takes its process
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in recipes keep their meaning
}


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to. report: its folder as the report reads it; best: the best trial's
    record, None without a value.

    interrupted: trials that this session was to train are left to be continued, because of a
    signal, or where it is out_of_time, because the time budget ran out. left: all that the sweep
    has still to begin or to continue.
    """

    report: Report
    trials: tuple[TrialRecord, ...]
    best: TrialRecord | None
    saved: float
    interrupted: bool
    out_of_time: bool = False
    left: int = 0

    @property
    def sweep_dir(self) -> Path:
        return self.report.path


class _SeedReport(TuneReportCallback):
    """Reports probe rows to Tune, each with the number of its seed within the trial."""

    def __init__(self, repeat: int):
        super().__init__()
        self._repeat = repeat

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        super().after_report(run_context, [{**metrics[0], "repeat": self._repeat}], checkpoint)


def train_trial(recipe: Recipe, run_dir: Path, worker: Callable[..., None] = train_worker) -> None:
    """Train one trial with Ray Train; its probe rows go to Tune. worker: as `fit` takes it."""
    repeat = repeat_of(run_dir)
    first = run_dir.parent.parent if repeat else run_dir
    name = f"trial-{first.name}" + (f"-{repeat}" if repeat else "")
    to_tune: dict[str, Any]
    if recipe.resources.num_workers == 1:
        to_tune = {"here": lambda row: tune.report({**row, "repeat": repeat})}
    else:  # made only here: it starts an actor for its queue, of 66 MB and with 0.2 s a look at it
        to_tune = {"callbacks": [_SeedReport(repeat)]}
    fit(
        recipe,
        run_dir,
        name=name,
        ray_storage=first.parent / ".ray" / "train",
        worker=worker,
        **to_tune,
    )


def sample_trial(source: Path) -> TrialFn:
    """Score pictures of the trained run `source` in the trial's own process."""

    def trial(recipe: Recipe, run_dir: Path) -> None:
        torch.set_num_threads(recipe.resources.cpus_per_worker)
        tune.report({**score_pictures(recipe, source, run_dir), "repeat": repeat_of(run_dir)})

    return trial


def run_sweep(
    sweep: Sweep,
    base: Recipe,
    *,
    resume: bool,
    finish: Sequence[int] = (),
    trial_fn: TrialFn | None = None,
    stream: TextIO = sys.stderr,
    progress: Progress = SILENT,
    observers: Sequence[Observer] = (),
) -> SweepResult:
    """Run the trials that are still missing and write sweep.yaml, trials.jsonl, study.journal,
    best.yaml and the run directories.

    finish: stopped trials to train to their last step, and nothing else. observers: who else hears
    of every trial. A sweep that has all its trials returns at once, without starting Ray, unless it
    is on a cluster, which is asked for the storage first. InputError: the nodes do not share the
    storage; the directory holds another sweep (see `open_directory`).
    OSError: a full disk; the trials that it cut off go on in the next session, as they do where a
    node came that lacks the storage, an InputError.
    """
    with ray_session.connected(progress):
        refuse_unshared(Path(sweep.storage_path), base.data, progress)
        there = Ledger(sweep_folder(sweep) / "trials.jsonl")
        for number in finish:
            there.to_finish(number)
        work = _work_left(sweep, there, finish)
        placed = place(sweep, base, machines()) if work else None
    deadline = math.inf if sweep.time_budget is None else time.monotonic() + sweep.time_budget
    trains = trial_fn is None and sweep.task == "train"
    own = train_trial if sweep.task == "train" else sample_trial(Path(sweep.base))
    trial_fn = trial_fn or own
    earlier = earlier_trials(sweep, base) if sweep.warm_start else None
    if earlier:
        print(earlier, file=stream)
    refuse_taken(sweep, base, resume)
    same_data = not _DATA.intersection(map(_part, sweep.parameters))
    if placed and trains and same_data:  # once, before all trials want them
        workers = placed.concurrent * placed.base.resources.num_workers
        ensure_encoded(placed.base, workers, progress)
    sweep_dir, out_of_time = sweep_folder(sweep), False
    with held_directory(sweep, base, resume) as lock:
        if placed:
            needed = needed_cpus(placed)
            with _quiet(), ray_session.started(needed, progress):
                leave_link(sweep_dir, dashboard_url())
                with SweepConsole(sweep, sweep_dir, trial_count(sweep), stream) as console:
                    session = SweepSession(
                        sweep,
                        sweep_dir,
                        Policy(sweep, longest(sweep, base)),
                        (*observers, console, *_views(sweep, sweep_dir)),
                        concurrent=placed.concurrent,
                        deadline=deadline,
                        finish=finish,
                        earlier=earlier.trials if earlier else (),
                    )
                    if session.due():
                        _run(session, placed, trial_fn, _Events(session, placed, console, lock))
                    if session.suspended_by:
                        raise session.suspended_by
                    out_of_time = session.out_of_time
    ledger = Ledger(sweep_dir / "trials.jsonl")
    result = _result(sweep, ledger, load_report(sweep_dir), finish, out_of_time)
    _conclude(sweep, base, ledger, result.best, stream)
    return result


def _conclude(
    sweep: Sweep, base: Recipe, ledger: Ledger, best: TrialRecord | None, stream: TextIO
) -> None:
    """Write best.yaml; say where the space has no setting left to try."""
    if (settings := ends_with_its_space(sweep)) and not _to_begin(sweep, ledger):
        more = "for more trials, name=OTHER and more values"
        print(
            f"no setting is left of the {settings} in the space, run_cap {sweep.run_cap}; {more}",
            file=stream,
        )
    if best:
        write_whole(ledger.path.parent / "best.yaml", _best_recipe(sweep, base, best))


def _views(sweep: Sweep, sweep_dir: Path) -> tuple[Observer, ...]:
    """Where a sweep is shown beside the console: TensorBoard, optuna-dashboard, Ray's dashboard."""
    return TrialBoard(sweep, sweep_dir), Gallery(sweep_dir, sweep), SweepGauges(sweep)


def _part(key: str) -> str:
    """The part of the recipe that a key belongs to: `data`, `model.autoencoder`."""
    parts = key.split(".")
    return parts[0] if parts[0] != "model" else ".".join(parts[:2])


def _result(
    sweep: Sweep, ledger: Ledger, report: Report, finish: Sequence[int], out_of_time: bool
) -> SweepResult:
    """The result, from the ledger and the folder.

    finish: the trials that this session was to finish; then only these count as interrupted.
    """
    trials = tuple(ledger.trials[n] for n in sorted(ledger.trials))
    unfinished = {trial.trial for trial in trials if trial.status in ("running", "waiting")}
    return SweepResult(
        report,
        trials,
        ledger.trials[report.best.number] if report.best else None,
        ledger.saved(),
        interrupted=bool(unfinished & set(finish) if finish else unfinished),
        out_of_time=out_of_time,
        left=len(unfinished) + _to_begin(sweep, ledger),
    )


def _work_left(sweep: Sweep, ledger: Ledger, finish: Sequence[int]) -> bool:
    left = _to_begin(sweep, ledger) or ledger.by("running", "waiting")
    return bool(left or finish)


def _to_begin(sweep: Sweep, ledger: Ledger) -> int:
    return left_to_begin(sweep, (trial.params for trial in ledger.trials.values()))


def _run(session: SweepSession, placed: Placed, trial_fn: TrialFn, events: _Events) -> None:
    """Tune over all that the session hands out.

    A trial of one worker is that worker; one of several takes no CPU, it waits for them.
    """
    sweep, sweep_dir, base = session.sweep, session.sweep_dir, placed.base
    seeds = sweep.seeds

    def trial(config: dict[str, Any]) -> None:
        for repeat in range(seeds):
            run_dir = repeat_dir(sweep_dir / str(config["number"]), repeat)
            place: dict[str, Any] = {"name": run_dir.name, "storage_path": str(run_dir.parent)}
            if repeat:
                place["seed"] = base.seed + repeat
            try:
                if refusal := refusal_here(sweep_dir, marker):
                    raise StorageNotShared(refusal)
                trial_fn(override_recipe(base, {**config["params"], **place}), run_dir)
            except StorageNotShared as error:
                tune.report({NO_STORAGE: str(error)})
                return
            except Exception as error:
                full = no_room(error)
                if full is None and not isinstance(error, InputError | RunFailed):
                    raise
                # it would come again, so it is reported: Tune tries again what raises
                line = f"{type(error).__name__}: {error}"
                tune.report({FAILED: line, ERRNO: full.errno if full else None})
                return

    takes = {HEAD: 0.001}
    # the trial's own process does the work
    if sweep.task == "sample" or base.resources.num_workers == 1:
        takes = {
            "CPU": float(base.resources.cpus_per_worker),
            "GPU": float(base.resources.gpus_per_worker),
        }
    with (
        marker_file(sweep_dir, sole=True) as marker,
        _suspending_without_room(session),
        _sigterm_as_interrupt(),
    ):
        tune.Tuner(
            tune.with_resources(trial, takes),
            tune_config=tune.TuneConfig(
                search_alg=StudySearch(session),
                scheduler=ProbeScheduler(session),
                num_samples=-1,  # the searcher says when there are no more
                max_concurrent_trials=placed.concurrent,
                # from its rung on it is another one
                trial_dirname_creator=lambda t: f"{t.config['number']}-{t.trial_id}",
                reuse_actors=True,  # a process starts and imports once, not once a trial
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(sweep_dir / ".ray"),
                failure_config=tune.FailureConfig(max_failures=base.resources.max_failures),
                callbacks=[events],
                verbose=0,
            ),
        ).fit()


@contextlib.contextmanager
def _suspending_without_room(session: SweepSession) -> Iterator[None]:
    """A full disk within the block, also where it is Tune that cannot write a file, suspends the
    sweep.
    """
    try:
        yield
    except Exception as error:
        full = no_room(error)
        if full is None:
            raise
        session.suspend(full)


class _Events(NotRestored, tune.Callback):
    """Hands on what Tune tells: errors to the session, a heartbeat to the rest."""

    def __init__(self, session: SweepSession, placed: Placed, console: SweepConsole, lock: RunLock):
        self._session, self._console, self._lock = session, console, lock
        self._room = RoomWatch(placed.base.resources, console.remark)
        self._failures = FailureReset(self._progress)

    def _runs(self, number: int) -> Iterator[RunDirectory]:
        """A trial's runs, one for each seed."""
        run_dir = self._session.sweep_dir / str(number)
        for repeat in range(self._session.sweep.seeds):
            yield RunDirectory(repeat_dir(run_dir, repeat))

    def _progress(self, number: int) -> int:
        """Checkpointed steps of a trial, of all its seeds."""
        return sum(map(newest_step, self._runs(number)))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._console.heartbeat()
        self._lock.renew()
        self._failures.update(trials)
        self._room.look(lambda: sum(map(self._waits_for_room, trials)))

    def _waits_for_room(self, trial: Any) -> bool:
        """Whether it, or its workers where it has several, has no place yet."""
        if trial.status != Trial.RUNNING or self._room.asked.num_workers == 1:
            return bool(trial.status == Trial.PENDING)
        return not any(map(is_active, self._runs(trial.config["number"])))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._failures.on_failure(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, theirs = trial.config["number"], Path(trial.error_file)
        # Tune's own goes with its temporary folder
        mine = self._session.sweep_dir / str(number) / "error.txt"
        with _suspending_without_room(self._session):
            mine.parent.mkdir(exist_ok=True)
            shutil.copyfile(theirs, mine)
            # of what the trial's process raised; ours, of just now
            pickled = trial.pickled_error_file
            if pickled and (full := no_room(_unpickled(Path(pickled)))):
                raise full
            self._session.end(number, error=_error_line(mine))


def _unpickled(path: Path) -> BaseException:
    try:
        raised: BaseException = pickle.loads(path.read_bytes())
    except Exception as error:  # as an __init__ with arguments of its own makes of it
        return error if isinstance(error, OSError) else RuntimeError("not known")
    return raised


def _error_line(path: Path) -> str:
    """The last line of a trial's error file, and where the rest is."""
    said = last_line(path.read_text(errors="replace"))[:300] or "no message"
    return f"{said} (traceback: {path.parent.name}/{path.name})"


def _best_recipe(sweep: Sweep, base: Recipe, best: TrialRecord) -> str:
    place = {"name": f"{sweep.name}-best", "storage_path": sweep.storage_path}
    return dump_recipe(override_recipe(base, {**best.params, **place}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tune without its own output; set before Ray starts, so that the trials' processes inherit
    it.
    """
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # trials that stop or fail have their own lines
    old = {key: os.environ.get(key) for key in _QUIET}
    os.environ.update(_QUIET)
    try:
        yield
    finally:
        logger.setLevel(level)
        for key, value in old.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a sweep as Ctrl-C does: trials stay unfinished in the study, to be resumed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
