"""A sweep under Ray Tune: every trial is a Tune function that drives its own Ray Train run, judged at every probe."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.config.sweep import Sweep
from flowray.config.sweepfile import dump_sweep, text_sweep
from flowray.rayrun import session
from flowray.rayrun.console import SweepConsole
from flowray.rayrun.search import ProbeScheduler, Rungs, StudySearch, Unpickled
from flowray.rayrun.trainer import fit
from flowray.report.load import load_sweep as load_report
from flowray.store.run import RunDirectory, RunLock
from flowray.tune.records import Records, TrialRecord
from flowray.tune.referee import Referee
from flowray.tune.space import trial_count

TrialFn = Callable[[Recipe, Path], None]  # trains one recipe in one run directory, inside a Tune session

_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 the only way to no output at all
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics.jsonl and TensorBoard are the run directory's
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own state is never read again
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in recipes keep their meaning
}


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to. best: the best trial's record, None without a value; interrupted: a signal ended it early."""

    sweep_dir: Path
    trials: tuple[TrialRecord, ...]
    best: TrialRecord | None
    saved: float
    interrupted: bool


def train_trial(recipe: Recipe, run_dir: Path) -> None:
    """Train one trial with Ray Train; its probe rows go to Tune."""
    fit(recipe, run_dir, callbacks=[TuneReportCallback()], name=f"trial-{run_dir.name}", ray_storage=run_dir.parent / ".ray" / "train")


def run_sweep(sweep: Sweep, base: Recipe, *, resume: bool, trial_fn: TrialFn = train_trial, stream: TextIO = sys.stderr) -> SweepResult:
    """Run the trials that are still missing and write sweep.yaml, trials.jsonl, study.journal, best.yaml and the run directories.

    A sweep that has all its trials returns at once, without starting Ray. InputError: the directory holds a sweep already and `resume`
    is false, or it holds another sweep than this one.
    """
    sweep_dir = open_directory(sweep, resume)
    records = Records(sweep_dir / "trials.jsonl")
    if len(records.trials) < trial_count(sweep) or records.by("running"):
        takes, at_once = share_cluster(sweep, base, os.cpu_count() or 1, 0)
        needed = at_once * takes["resources.num_workers"] * takes["resources.cpus_per_worker"]  # a local Ray offers at least these
        with RunLock(RunDirectory(sweep_dir)) as lock, _quiet(), session.started(num_cpus=needed), _sigterm_as_interrupt():
            cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
            resources, concurrent = share_cluster(sweep, base, cpus, gpus)
            _run(sweep, override_recipe(base, resources), sweep_dir, concurrent, trial_fn, stream, lock)
    records = Records(sweep_dir / "trials.jsonl")
    best = load_report(sweep_dir).best
    record = records.trials[best.number] if best else None
    if record:
        (sweep_dir / "best.yaml").write_text(_best_recipe(sweep, base, record))
    trials = tuple(records.trials[n] for n in sorted(records.trials))
    return SweepResult(sweep_dir, trials, record, records.saved(), interrupted=bool(records.by("running")))


def open_directory(sweep: Sweep, resume: bool) -> Path:
    """Make `<storage_path>/<name>`, or check that the sweep there is this one; run_cap, max_concurrent and resources may differ."""
    sweep_dir = Path(sweep.storage_path).resolve() / sweep.name
    kept = sweep_dir / "sweep.yaml"
    if kept.exists():
        done = len([t for t in Records(sweep_dir / "trials.jsonl").trials.values() if t.status != "running"])
        if not resume:
            raise InputError(
                f"{sweep_dir} holds a sweep with {done} of {trial_count(sweep)} trials done; "
                "type --resume to continue it (run_cap=N for more trials), or name=OTHER for a new one"
            )
        old = text_sweep(kept.read_text(), str(kept))
        for field in ("base", "set", "method", "metric", "parameters", "seed"):
            if getattr(old, field) != getattr(sweep, field):
                raise InputError(f"{kept}: {field} differs from the sweep to resume; take it back, or type name=OTHER for a new sweep")
    try:
        sweep_dir.mkdir(parents=True, exist_ok=True)
        kept.write_text(dump_sweep(sweep))
    except OSError as error:
        raise InputError(f"{sweep_dir}: cannot be written: {error.strerror}; type storage_path=FOLDER") from None
    return sweep_dir


def share_cluster(sweep: Sweep, base: Recipe, cpus: int, gpus: int) -> tuple[dict[str, Any], int]:
    """What each trial takes, as recipe overrides, and how many run at once; `auto` parts follow from the cluster's CPUs and GPUs.

    auto: a GPU for each worker where there are any; as many workers as the GPUs allow, else one; the CPUs in equal parts; as many trials
    as then fit. At least one of each, for a cluster that grows when it is asked.
    """

    def pick(name: str, auto: float) -> Any:
        value = getattr(sweep.resources, name)
        return auto if value == "auto" else getattr(base.resources, name) if value is None else value

    slots = None if sweep.max_concurrent == "auto" else sweep.max_concurrent
    per_gpu = pick("gpus_per_worker", 1 if gpus else 0)
    workers = pick("num_workers", max(1, gpus // (slots or gpus)) if gpus and per_gpu else 1)
    per_cpu = pick("cpus_per_worker", max(1, cpus // (workers * (slots or max(1, gpus)))))
    fits = min(cpus // (workers * per_cpu), gpus // (workers * per_gpu) if per_gpu else cpus)
    chosen = {"resources.num_workers": workers, "resources.cpus_per_worker": per_cpu, "resources.gpus_per_worker": per_gpu}
    return chosen, min(slots or max(1, int(fits)), trial_count(sweep))


def _run(sweep: Sweep, base: Recipe, sweep_dir: Path, concurrent: int, trial_fn: TrialFn, stream: TextIO, lock: RunLock) -> None:
    budget = _longest(sweep, base)
    with SweepConsole(sweep, sweep_dir, trial_count(sweep), stream) as console:
        rungs = Rungs(sweep, budget) if sweep.early_terminate else None
        referee = Referee(sweep, sweep_dir, budget, rungs, console, concurrent=concurrent)
        if not referee.remaining():
            return

        def trial(config: dict[str, Any]) -> None:
            place = {"name": str(config["number"]), "storage_path": str(sweep_dir)}
            trial_fn(override_recipe(base, {**config["params"], **place}), sweep_dir / str(config["number"]))

        tune.Tuner(
            tune.with_resources(trial, {"node:__internal_head__": 0.001}),  # no CPU: the driver only waits for its workers
            tune_config=tune.TuneConfig(
                search_alg=StudySearch(referee),
                scheduler=ProbeScheduler(referee),
                num_samples=referee.remaining(),
                max_concurrent_trials=concurrent,
                trial_dirname_creator=lambda t: str(t.config["number"]),
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(sweep_dir / ".ray"),
                callbacks=[_Events(referee, console, lock)],
                verbose=0,
            ),
        ).fit()


class _Events(Unpickled, tune.Callback):
    """Errors to the referee, a pulse to the console and the lock."""

    def __init__(self, referee: Referee, console: SweepConsole, lock: RunLock):
        self._referee, self._console, self._lock = referee, console, lock

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._console.beat()
        self._lock.renew()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, theirs = trial.config["number"], Path(trial.error_file)
        mine = self._referee.sweep_dir / str(number) / "error.txt"  # Tune's own goes with its temporary folder
        mine.parent.mkdir(exist_ok=True)
        shutil.copyfile(theirs, mine)
        self._referee.ended(number, error=_error_line(mine))


def _error_line(path: Path) -> str:
    """The last line of a trial's error file, and where the rest is."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1][:300] if lines else 'no message'} (traceback: {path.parent.name}/{path.name})"


def _longest(sweep: Sweep, base: Recipe) -> int:
    """The largest step budget of any trial."""
    parameter = sweep.parameters.get("train.steps")
    if parameter is None:
        return base.train.steps
    spec = parameter.model_dump()
    return int(max(spec.get("values") or [spec.get("max", spec.get("value"))]))


def _best_recipe(sweep: Sweep, base: Recipe, best: TrialRecord) -> str:
    place = {"name": f"{sweep.name}-best", "storage_path": sweep.storage_path}
    return dump_recipe(override_recipe(base, {**best.params, **place}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tune without its own output; set before Ray starts, so that the trials' processes inherit it."""
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
    """SIGTERM ends a sweep as Ctrl-C does: trials stay unfinished in the study, to be resumed. Set after Ray's own handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
