"""Which failures count against max_failures: Ray Tune's own count of a trial, and the decision
about a run that Ray Train gave up.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.tune.experiment.trial import Trial
from support import tiny_recipe

from flowray.cluster.ray_private import HealthCheckFailed
from flowray.config.errors import InputError
from flowray.config.train import ResourceConfig
from flowray.rayrun import retries
from flowray.rayrun.failures import write_failure
from flowray.rayrun.retries import FailureReset, newest_step, should_retry
from flowray.rayrun.trainer import _trained
from flowray.rayrun.tuner import _Events
from flowray.store.checkpoint import save_checkpoint
from flowray.store.run import RunDirectory


def save(run_dir: Path, step: int) -> None:
    groups = {
        "model": {"w": torch.zeros(1)},
        "ema": {"w": torch.zeros(1)},
        "optim": {"w": torch.zeros(1)},
    }
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_checkpoint(run_dir / "checkpoints", step, groups, {"step": step, "seed": 0}, keep=3)


def tune_trial(folder: Path, number: int, max_failures: int) -> Trial:
    """As Tune makes it, but for the storage, of which it is given the folder for its error file."""
    trial = Trial("a", stub=True, config={"number": number}, max_failures=max_failures)
    trial.storage = SimpleNamespace(trial_driver_staging_path=str(folder))
    return trial


class Sweeping:
    """A Tune trial of two seeds in `folder`, whose process dies, and what the sweep's callback
    makes of it.
    """

    def __init__(self, folder: Path, max_failures: int):
        self.folder = folder
        self.trial = tune_trial(folder, 4, max_failures)
        session = SimpleNamespace(sweep_dir=folder, sweep=SimpleNamespace(seeds=2))
        placed = SimpleNamespace(base=SimpleNamespace(resources=ResourceConfig()))
        quiet = SimpleNamespace(
            heartbeat=lambda: None, renew=lambda: None, remark=lambda text: None
        )
        self.events = _Events(session, placed, quiet, quiet)

    def dies(self, error: Exception) -> bool:
        """Whether Tune starts it again, by Tune's own count."""
        self.events.on_step_end(1, [self.trial])
        self.trial.handle_error(error)
        goes_on = self.trial.should_recover()
        if goes_on:
            self.events.on_trial_recover(1, [self.trial], self.trial)
        return goes_on


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "LOOK_S", 0.0)


def test_a_trial_that_loses_its_node_again_and_again_goes_on_as_long_as_it_comes_on(
    tmp_path: Path,
) -> None:
    sweeping = Sweeping(tmp_path, max_failures=2)
    for step in range(10, 60, 10):
        save(tmp_path / "4", step)
        assert sweeping.dies(RayActorError())
    save(tmp_path / "4" / "seeds" / "1", 10)  # the next seed is progress too
    assert [sweeping.dies(RayActorError()) for _ in range(3)] == [True, True, False]


def test_failures_in_a_row_are_counted_as_ray_does(tmp_path: Path) -> None:
    sweeping = Sweeping(tmp_path, max_failures=2)
    save(tmp_path / "4", 10)  # of an earlier session
    assert [sweeping.dies(ValueError("shapes")) for _ in range(3)] == [True, True, False]
    assert Sweeping(tmp_path, max_failures=0).dies(RayActorError()) is False


def test_only_the_trial_that_came_on_starts_to_count_anew(tmp_path: Path) -> None:
    come = {0: 0, 1: 0}
    reset = FailureReset(come.__getitem__)
    trials = [tune_trial(tmp_path, number, 3) for number in come]
    for trial in trials:
        trial.handle_error(RayActorError())
        reset.on_failure(trial)
    come[1] = 10
    reset.update(trials)
    assert [trial.num_failures for trial in trials] == [1, 0]


def test_a_run_that_ray_train_gave_up_goes_on_where_workers_were_lost_after_a_new_checkpoint() -> (
    None
):
    lost = HealthCheckFailed("no heartbeat", RayActorError())
    for failures in (
        {0: RayActorError()},
        {1: lost},
        {0: RuntimeError("connection reset"), 1: lost},
    ):
        error = WorkerGroupError("gone", failures)
        assert should_retry(error, before=100, after=200)
        assert not should_retry(error, before=100, after=100)
    bug = WorkerGroupError("a bug", {0: ValueError("shapes")})
    assert not should_retry(bug, before=100, after=200)


def test_a_run_is_started_again_only_after_a_loss_that_followed_a_checkpoint(
    tmp_path: Path,
) -> None:
    run, lost = RunDirectory(tmp_path), WorkerGroupError("gone", {0: RayActorError()})

    def ends(error: Exception | None, step: int) -> bool:
        def fit() -> None:
            save(tmp_path, step)
            if error:
                raise error

        return _trained(SimpleNamespace(fit=fit), run, tiny_recipe(tmp_path))

    assert ends(None, 10) is True
    assert ends(lost, 20) is False
    for error, step in ((lost, 20), (WorkerGroupError("a bug", {0: ValueError("shapes")}), 30)):
        with pytest.raises(WorkerGroupError):
            ends(error, step)
    write_failure(run, InputError("optim.lr"))  # it would come again
    with pytest.raises(WorkerGroupError):
        ends(lost, 40)


def test_a_notice_of_an_earlier_start_starts_no_finished_run_again(tmp_path: Path) -> None:
    run, recipe = RunDirectory(tmp_path), tiny_recipe(tmp_path, **{"train.steps": 20})

    def ends(step: int) -> bool:
        def fit() -> None:
            save(tmp_path, step)
            run.probes.write_text(f'{{"step": {step}}}\n')
            run.preempted.touch()

        return _trained(SimpleNamespace(fit=fit), run, recipe)

    assert ends(10) is False
    assert ends(20) is True
    write_failure(run, InputError("optim.lr"))
    assert ends(10) is True


def test_the_newest_step_is_that_of_a_whole_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert newest_step(run) == 0
    for step in (90, 100):
        save(tmp_path, step)
    assert newest_step(run) == 100
    (run.checkpoints / "step_000100" / "model.safetensors").write_bytes(b"")
    assert newest_step(run) == 90
