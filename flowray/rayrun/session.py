"""Starting Ray for a command: the cluster it was submitted to, or a private local one."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import ray

from flowray.config.errors import InputError
from flowray.config.progress import SILENT, Progress
from flowray.rayrun.access import LOOPBACK, require_token

FOLDERS = "fr-"  # begins the names of local Rays' folders; short: Ray's socket paths must stay under 107 bytes
LOCK = "flowray.lock"  # in each of them, locked for as long as its driver lives
ENDING_S = 10.0  # for a Ray that was shut down to have ended its processes
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


def set_defaults() -> None:
    """Ray's variables, and the model libraries', where the user has set none. Ray Train hands its own on to controller and workers."""
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)


@contextmanager
def started(num_cpus: int | None = None, progress: Progress = SILENT) -> Iterator[None]:
    """Ray for the block: an initialised one as it is, the cluster named by RAY_ADDRESS, else a private local one, shut down after.

    num_cpus: CPUs the local Ray offers, at least those of the machine. A bare `ray.init()` would join any Ray on the host, so
    the local one is asked for by name and keeps its files in a folder of its own. It takes a token, always: InputError where that is
    switched off, and where Ray does not come up.
    """
    if ray.is_initialized():
        yield
        return
    set_defaults()
    if in_cluster():
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # training runs show in the cluster's dashboard
        _use_token()
        with progress.task("joining the Ray cluster"):
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
        return
    require_token()
    with local_folder() as folder:
        try:
            with progress.task("starting Ray"):
                _init_local(folder, max(os.cpu_count() or 1, num_cpus or 1))
            yield
        finally:
            with progress.task("ending Ray"):
                ray.shutdown()


@contextmanager
def connected(progress: Progress = SILENT) -> Iterator[None]:
    """The cluster named by RAY_ADDRESS for the block, to be asked what it is; else nothing is started."""
    with started(progress=progress) if in_cluster() else nullcontext():
        yield


def _init_local(folder: Path, num_cpus: int) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=True,  # Tune frees the placement groups of stopped trials through its State API
            dashboard_host=LOOPBACK,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _temp_dir=str(folder),
        )
    except Exception as error:  # Ray raises no narrower class
        if "timed out during startup" not in str(error):
            raise
        raise InputError(
            f"Ray did not start within the 30 s that it gives itself: load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, "
            f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free in {folder.parent}; end other work, then type the command again"
        ) from None


@contextmanager
def local_folder() -> Iterator[Path]:
    """A new folder for this process's Ray, removed after. Those that killed drivers left behind go first, or at the end: a Ray whose
    driver was killed this very moment still writes.
    """
    _remove_left(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=FOLDERS))
    try:
        with (folder / f"{LOCK}.new").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.replace(file.name, folder / LOCK)  # appears locked, or not at all
            yield folder
    finally:
        deadline = time.monotonic() + ENDING_S
        while _in_use(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        with suppress(OSError):
            _clear(folder)
        _remove_left(folder.parent)


def _clear(folder: Path) -> None:
    """Remove it, its lock last: so what is cut off here is found again."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    shutil.rmtree(folder)


def _remove_left(parent: Path) -> None:
    """Remove the folders of local Rays under `parent` whose drivers are gone: nobody holds their locks."""
    for lock in parent.glob(f"{FOLDERS}*/{LOCK}"):
        try:
            with lock.open() as file:
                if os.fstat(file.fileno()).st_uid != os.getuid():
                    continue
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _in_use(lock.parent):
                    _clear(lock.parent)
        except OSError:  # its driver lives, or another start removes it
            continue


def _in_use(folder: Path) -> bool:
    """Whether a process of the Ray that keeps its files there is left: it would make anew what is removed, without the lock."""
    name = os.fsencode(folder.name)
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if name in command.read_bytes():
                return True
    return False


def _use_token() -> None:
    """Take part in token authentication where a token is at hand: Ray's clients stay out of it unless RAY_AUTH_MODE is set."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
