"""Observers that write for other tools: TensorBoard's HParams tab and the pictures of the trials
in the Optuna study. No Ray.
"""

from __future__ import annotations

import json
import time
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams.summary_v2 import (
    Discrete,
    Domain,
    HParam,
    Metric,
    RealInterval,
    hparams_config_pb,
    hparams_pb,
)
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from flowray.store.run import RunDirectory
from flowray.sweepconfig.distributions import (
    Categorical,
    Constant,
    IntUniform,
    LogUniform,
    Parameter,
    QLogUniform,
    QUniform,
    Uniform,
)
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.observers import Observer
from flowray.tune.records import TrialRecord
from flowray.tune.study import Journal

# the folder of a sweep that holds its trials' pictures for optuna-dashboard
ARTIFACTS = "artifacts"
HPARAMS = ".hparams"  # ends the name of an event file that holds no scalars
SHOWN = (
    "ema/shoot/energy",
    "ema/shoot/nmse",
    "ema/shoot/skill",
    "ema/flow/cos",
    "ema/std/mean",
    "loss/flow",
)


class TrialBoard(Observer):
    """A row in TensorBoard's HParams tab for every trial, beside the scalars in the trial's own
    event files.

    The row is there from the trial's start; the values in it are the last scalars of those tags. It
    takes files of its own: the trial's writer belongs to another process, maybe on another node.
    """

    def __init__(self, sweep: Sweep, sweep_dir: Path):
        self._dir = sweep_dir
        space = [
            HParam(key, _domain(parameter))
            for key, parameter in sweep.parameters.items()
            if not isinstance(parameter, Constant)
        ]
        metrics = [
            Metric(name)
            for name in dict.fromkeys(
                [*(metric.name for metric in sweep.objectives), *SHOWN, *sweep.rule_metrics]
            )
        ]
        self._space = hparams_config_pb(space, metrics)

    def started(self, trial: TrialRecord) -> None:
        folder = self._folder(trial)
        if any(folder.glob(f"*{HPARAMS}")):  # continued: it has its row
            return
        params = {key: _scalar(value) for key, value in trial.params.items() if value is not None}
        _write(folder, self._space, hparams_pb(params, trial_id=f"trial {trial.trial}"))

    def ended(self, trial: TrialRecord) -> None:
        # paused, to be continued by a later session
        if trial.status == "waiting" and not trial.waits:
            return
        status = api_pb2.STATUS_FAILURE if trial.status == "failed" else api_pb2.STATUS_SUCCESS
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        plugin = metadata.create_summary_metadata(
            plugin_data_pb2.HParamsPluginData(session_end_info=end, version=0)
        )
        _write(
            self._folder(trial),
            Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=plugin)]),
        )

    def _folder(self, trial: TrialRecord) -> Path:
        return self._dir / str(trial.trial) / "tensorboard"


def _write(folder: Path, *summaries: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    writer = EventFileWriter(str(folder), filename_suffix=HPARAMS)
    try:
        for summary in summaries:
            writer.add_event(Event(summary=summary, wall_time=time.time(), step=0))
    finally:
        writer.close()


def _domain(parameter: Parameter) -> Domain | None:
    match parameter:
        case Uniform() | LogUniform() | QUniform() | QLogUniform() | IntUniform():
            return RealInterval(float(parameter.min), float(parameter.max))
        case Categorical(values=values):
            plain = [_scalar(value) for value in values if value is not None]
            alike = len({type(value) for value in plain}) == 1
            return Discrete(plain) if alike else Discrete([str(value) for value in plain])
        case _:
            return None


def _scalar(value: Any) -> bool | float | str:
    """TensorBoard keeps booleans, numbers and strings; anything else stands as its JSON text."""
    if isinstance(value, bool | str):
        return value
    return float(value) if isinstance(value, int | float) else json.dumps(value)


class Gallery(Observer):
    """Attaches each new sample strip to its trial in the study, through Optuna's artifacts:
    optuna-dashboard shows them there.

    A trial that was told to the study takes no more; the last strip is there before, as the loop
    draws before it reports. The study's values get the names of the sweep's metrics, which
    optuna-dashboard would call Objective 0.
    """

    def __init__(self, sweep_dir: Path, sweep: Sweep):
        self._dir, self._study = sweep_dir, sweep.name
        self._metrics, self._named = [metric.name for metric in sweep.objectives], False

    @cached_property
    def _storage(self) -> BaseStorage:
        """The study's journal, which is there when the first trial is."""
        return JournalStorage(Journal(self._dir / "study.journal"))

    @cached_property
    def _store(self) -> FileSystemArtifactStore:
        (self._dir / ARTIFACTS).mkdir(exist_ok=True)
        return FileSystemArtifactStore(str(self._dir / ARTIFACTS))

    def started(self, trial: TrialRecord) -> None:
        """With the first trial the study is there, to be given its names."""
        if self._named:
            return
        with warnings.catch_warnings():
            # the names; they are as in the Optuna that is pinned
            warnings.simplefilter("ignore", ExperimentalWarning)
            study = optuna.load_study(study_name=self._study, storage=self._storage)
            if study.metric_names != self._metrics:
                study.set_metric_names(self._metrics)
        self._named = True

    def probed(self, trial: TrialRecord) -> None:
        strips = RunDirectory(self._dir / str(trial.trial)).strips()
        if not strips:
            return
        study = self._storage.get_study_id_from_name(self._study)
        number = self._storage.get_trial_id_from_study_id_trial_number(study, trial.trial)
        frozen = self._storage.get_trial(number)
        if frozen.state.is_finished():  # a stopped trial that is finished after all
            return
        known = {
            meta.filename
            for meta in get_all_artifact_meta(study_or_trial=frozen, storage=self._storage)
        }
        for strip in strips:
            if strip.name not in known:
                upload_artifact(
                    artifact_store=self._store,
                    file_path=str(strip),
                    study_or_trial=frozen,
                    storage=self._storage,
                )
