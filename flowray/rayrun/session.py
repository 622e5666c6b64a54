"""Starting Ray for a command: the cluster it was submitted to, or a private local one."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from flowray.config.errors import InputError
from flowray.rayrun.access import LOOPBACK, require_token

OBJECT_STORE_BYTES = 200 * 2**20  # nothing large goes through it: data is read from shards

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # also the pace of ray.train.report
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def in_cluster() -> bool:
    """Whether this process is a job of, or pointed at, a running cluster."""
    return "RAY_ADDRESS" in os.environ


@contextmanager
def started(num_cpus: int | None = None) -> Iterator[None]:
    """Ray for the block: an initialised one as it is, the cluster named by RAY_ADDRESS, else a private local one, shut down after.

    num_cpus: CPUs the local Ray offers, at least those of the machine. A bare `ray.init()` would join any Ray on the host, so
    the local one is asked for by name and keeps its files in a folder of its own. It takes a token, always: InputError where that is
    switched off.
    """
    if ray.is_initialized():
        yield
        return
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    if in_cluster():
        _use_token()
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
        return
    require_token()
    folder = tempfile.mkdtemp(prefix="fr-")  # short: Ray's socket paths must stay under 107 bytes
    try:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, num_cpus or 1),
            include_dashboard=True,  # Tune frees the placement groups of stopped trials through its State API
            dashboard_host=LOOPBACK,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def cluster_size() -> tuple[int, int]:
    """(CPUs, GPUs) of the cluster that RAY_ADDRESS names. InputError where none answers."""
    try:
        with started():
            have = ray.cluster_resources()
    except (ConnectionError, RuntimeError) as error:
        address = os.environ["RAY_ADDRESS"]
        raise InputError(f"RAY_ADDRESS={address}: no cluster answers ({error}); unset it to plan for this machine") from None
    return int(have.get("CPU", 0)), int(have.get("GPU", 0))


def _use_token() -> None:
    """Take part in token authentication where a token is at hand: Ray's clients stay out of it unless RAY_AUTH_MODE is set."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
