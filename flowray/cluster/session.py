"""Starting Ray for a command: the cluster it was submitted to, or a private local one."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray

from flowray.cluster.access import LOOPBACK, require_token, take_token
from flowray.cluster.address import refuse_unreachable
from flowray.cluster.ray_private import psutil, services, utils
from flowray.config.cluster import in_cluster
from flowray.config.errors import InputError, last_line
from flowray.config.progress import SILENT, TRAINING, Progress

FOLDERS = "fr-"  # begins the names of local Rays' folders; short, for `SOCKET`
# The longest name that Ray gives a socket, below its folder; the system takes 107 bytes in all.
SOCKET = Path("session_2026-01-01_00-00-00_000000_4194304", "sockets", "dash_MetricsHead")
LOCK = "flowray.lock"  # in each of them, locked for as long as its driver lives
ENDING_S = 10.0  # for a Ray that was shut down to have ended its processes
OBJECT_STORE_BYTES = 200 * 2**20  # nothing large goes through it: data is read from shards
# on the disk of its folder: logs, and the object store
LEAST_FREE = OBJECT_STORE_BYTES + 50 * 2**20

_START_S = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # also the pace of ray.train.report
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    _START_S: "300",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def set_defaults() -> None:
    """Ray's variables, and the model libraries', where the user has set none.

    Ray Train hands its own on to controller and workers.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)


def start_with_fewer() -> None:
    """Workers that may be fewer do not wait long for lost ones, unless the user has said how long:
    Ray Train takes a lost node for present until a start has timed out.
    """
    if os.environ.get(_START_S) in (None, _QUIET[_START_S]):
        os.environ[_START_S] = "20"


@contextmanager
def started(num_cpus: int | None = None, progress: Progress = SILENT) -> Iterator[None]:
    """Ray for the block: an initialised one as it is, the cluster named by RAY_ADDRESS, else a
    private local one, shut down after.

    num_cpus: CPUs the local Ray offers, at least those of the machine. A bare `ray.init()` would
    join any Ray on the host, so the local one is asked for by name and keeps its files in a folder
    of its own. It takes a token, always: InputError where that is switched off, where Ray does not
    come up, and where RAY_ADDRESS names no cluster that answers.
    """
    if ray.is_initialized():
        yield
        return
    set_defaults()
    if in_cluster():
        # training runs show in the cluster's dashboard
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
        take_token()
        refuse_unreachable()
        with progress.task("joining the Ray cluster"), _signals_kept():
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        try:
            yield
        finally:
            _shut_down()
        return
    require_token(private=True)
    take_token()
    with local_folder() as folder:
        try:
            with progress.task("starting Ray"), _signals_kept():
                _init_local(folder, max(os.cpu_count() or 1, num_cpus or 1))
            yield
        finally:
            with progress.task("ending Ray"):
                _shut_down()
                _end_all(folder)


def _shut_down() -> None:
    """Disconnect from Ray, unless an interrupt has left a training behind, with which the process
    and so the connection is about to end.

    A thread that still uses Ray would otherwise abort the process (core_worker_process.cc: "has
    already been shutdown"), with exit code 1 and before anything is cleared up.
    """
    if not any(thread.name == TRAINING for thread in threading.enumerate()):
        ray.shutdown()


@contextmanager
def connected(progress: Progress = SILENT) -> Iterator[None]:
    """The cluster named by RAY_ADDRESS for the block, to be asked what it is; else nothing is
    started.
    """
    with started(progress=progress) if in_cluster() else nullcontext():
        yield


def _init_local(folder: Path, num_cpus: int) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            # Tune frees the placement groups of stopped trials through its State API
            include_dashboard=True,
            dashboard_host=LOOPBACK,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _temp_dir=str(folder),
        )
    except Exception as error:  # Ray raises no narrower class
        raise InputError(
            f"Ray did not start: {last_line(str(error)) or type(error).__name__}; load"
            f" {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores,"
            f" {shutil.disk_usage(folder).free / 2**30:.1f} GiB free in {folder.parent}; end other"
            " work, then type the command again"
        ) from error


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray, started in the block, leaves the signals to this command: its handler of SIGTERM is not
    kept, which would cut the command off, and its processes have process groups of their own. Else
    a signal to the group of this one, as `timeout`, schedulers and terminals send it, would end
    them under it.
    """
    start, take, ours = (
        services.ConsolePopen,
        utils.set_sigterm_handler,
        signal.getsignal(signal.SIGTERM),
    )
    # they end with this process; elsewhere Ray ends them by their group
    if utils.detect_fate_sharing_support():
        services.ConsolePopen = partial(start, process_group=0)
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        services.ConsolePopen, utils.set_sigterm_handler = start, take
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)  # Ray's C++ has one too, which prints a stack


def _end_all(folder: Path) -> None:
    """End what this process has started for the Ray that keeps its files there: of a start that
    was cut off Ray knows nothing.
    """
    doomed: set[Any] = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(folder.name in word for word in process.cmdline()):
                # agents and workers write titles over the command that they were started with
                doomed |= {process, *process.children(recursive=True)}
    for process in doomed:
        with suppress(psutil.Error):
            process.kill()


@contextmanager
def local_folder() -> Iterator[Path]:
    """A new folder for this process's Ray, removed after. Those that killed drivers left behind go
    first, or at the end: a Ray whose driver was killed this very moment still writes.

    It lies in TMPDIR, or in /tmp where Ray could not work there, and TMPDIR says so for the block:
    Ray's dashboard makes sockets of its own there. InputError where Ray could work in none.
    """
    folder, before = new_folder(FOLDERS), os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder.parent)
    try:
        with (folder / f"{LOCK}.new").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.replace(file.name, folder / LOCK)  # appears locked, or not at all
            yield folder
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
        deadline = time.monotonic() + ENDING_S
        while _in_use(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        with suppress(OSError):
            _clear(folder)
        _remove_left(folder.parent)


def new_folder(prefix: str) -> Path:
    """A new folder in the first of the places for temporary files where a Ray can work."""
    problems = []
    for place in dict.fromkeys(_places()):
        _remove_left(Path(place))
        try:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=Path(place).absolute()))
        except OSError as error:
            problems.append(f"{place}: {error.strerror}")
            continue
        if not (problem := _unfit(folder)):
            return folder
        problems.append(f"{place}: {problem}")
        shutil.rmtree(folder, ignore_errors=True)
    raise InputError(
        f"TMPDIR: no folder for Ray's files: {'; '.join(problems)}; type TMPDIR=FOLDER with a short"
        " path before the command, or make room"
    )


def _places() -> Iterator[str]:
    """Folders for temporary files: the configured one, then the short ones of the system."""
    with suppress(FileNotFoundError):  # none of those that Python knows can be written
        yield tempfile.gettempdir()
    yield from ("/tmp", "/var/tmp")


def _unfit(folder: Path) -> str:
    """Why Ray cannot keep its files there, '' where it can: it needs sockets, locks and room."""
    try:
        (folder / SOCKET).parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as one, (folder / "lock").open("w") as file:
            one.bind(str(folder / SOCKET))
            fcntl.flock(file, fcntl.LOCK_EX)
        shutil.rmtree(folder / SOCKET.parts[0])
        (folder / "lock").unlink()
    except OSError as error:  # one of a path that is too long has no number
        return f"no sockets or locks: {error.strerror or error}"
    free = shutil.disk_usage(folder).free
    return f"{free / 2**20:.0f} MB free" if free < LEAST_FREE else ""


def _clear(folder: Path) -> None:
    """Remove it, its lock last: so what is cut off here is found again."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    shutil.rmtree(folder)


def _remove_left(parent: Path) -> None:
    """Remove the folders of local Rays under `parent` whose drivers are gone: nobody holds their
    locks.
    """
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
    """Whether a process of the Ray that keeps its files there is left: it would make anew what
    is removed, without the lock.
    """
    name = os.fsencode(folder.name)
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if name in command.read_bytes():
                return True
    return False
