"""Shards of object stores and web servers. Each has a place in the cache, a path like any other's,
and beside it a JSON that says where it comes from; the tar itself is fetched, whole, when somebody
opens it, and the ones that were used longest ago make room.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from flowray.config.cache import cache_dir
from flowray.config.errors import InputError
from flowray.config.train import DataConfig
from flowray.config.writing import write_whole
from flowray.data.folders import locked, shard_stat

SUFFIX = ".remote"  # of the JSON beside a shard's place
TRIES = 8
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 20.0
_BOUND = "bound.json"  # in the cache's folder
_USUAL_BOUND = int(DataConfig().remote_cache_gb * 1e9)
_AHEAD = 2  # shards that are fetched while one is in use
_ABANDONED_S = 3600.0  # a fetch adds to its hidden file much more often
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}  # any other: aiohttp

Found = TypeVar("Found")


@dataclass(frozen=True)
class RemoteCache:
    """Where fetched shards lie, and how many bytes of them at most."""

    folder: Path
    bound: int | None = None  # None: as before

    @classmethod
    def of(cls, data: DataConfig | None = None) -> RemoteCache:
        """That of a recipe, or else the usual one."""
        folder = cache_dir(data.cache if data else None) / "remote"
        return cls(folder, int(data.remote_cache_gb * 1e9) if data else None)

    def prepare(self) -> None:
        """Make the folder, and have the bound hold for all who fetch into it from now on."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            bound = _bound(self.folder) if self.bound is None else self.bound
            if bound != _bound(self.folder) or not (self.folder / _BOUND).is_file():
                write_whole(self.folder / _BOUND, json.dumps({"bytes": bound}), shared=True)
                _make_room(self.folder, 0)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class Remote:
    """What the JSON beside a shard's place says.

    url: without credentials, which never are in one; size: bytes; version: changes when the content
    does; content: 64 hex digits that stand for the content; sha256: of the tar, where its set's
    manifest has it, and samples likewise. cache, at: the cache's folder and the shard's place, so
    that a copy of the JSON elsewhere says nothing.
    """

    url: str
    size: int
    version: str
    content: str
    sha256: str | None
    samples: int | None
    cache: str
    at: str

    @property
    def stamp(self) -> int:
        """The time in ns that a fetched tar has: a hash of its version, in even seconds, as some
        disks count them, between 2004 and 2021.
        """
        digest = hashlib.sha256(self.version.encode()).hexdigest()
        return (2**30 + 2 * int(digest[:7], 16)) * 10**9

    def write(self) -> Path:
        """Say it; the place."""
        path = Path(self.at)
        beside, text = path.with_name(path.name + SUFFIX), json.dumps(asdict(self), indent=1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not (beside.is_file() and beside.read_text(encoding="utf-8") == text):
                write_whole(beside, text, shared=True)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        return path


def remote_of(path: Path) -> Remote | None:
    """Where the shard at this place comes from; None for a local one."""
    beside = path.with_name(path.name + SUFFIX)
    try:
        found = Remote(**json.loads(beside.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.at == str(path.absolute()) else None


def shown(path: Path) -> str:
    """A shard as a person knows it: its address, or its path."""
    remote = remote_of(path)
    return remote.url if remote else str(path)


def stat_of(path: Path) -> tuple[int, int]:
    """Size in bytes and time in ns of a shard, fetched or not; InputError where there is none."""
    if remote := remote_of(path):
        return remote.size, remote.stamp
    stat = shard_stat(path)
    return stat.st_size, stat.st_mtime_ns


def opened(path: Path) -> BufferedReader:
    """A shard, opened; fetched first where it is a remote one that is not here. It stays readable
    when it makes room for others. InputError where it cannot be fetched, OSError for a local one.
    """
    if (remote := remote_of(path)) is None:
        return path.open("rb")
    if (kept := _opened_here(path, remote)) is not None:
        return kept
    with _alone(path.with_name(path.name + SUFFIX)):
        kept = _opened_here(path, remote)
        return _fetch(path, remote) if kept is None else kept


def is_here(path: Path) -> bool:
    """Whether a shard can be opened without fetching it."""
    if (remote := remote_of(path)) is None:
        return True
    with suppress(OSError):
        stat = path.stat()
        return (stat.st_size, stat.st_mtime_ns) == (remote.size, remote.stamp)
    return False


def ahead(paths: Iterable[Path], needed: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """The same paths; while one is in use the next ones are fetched, as many as the bound has room
    for. needed: whether a shard will be opened at all.
    """
    every = deque(paths)
    remotes = {path: remote for path in every if (remote := remote_of(path)) is not None}
    if not remotes:
        yield from every
        return
    pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="fetch")
    begun = set[Path]()
    try:
        while every:
            path = every.popleft()
            room = _bound(Path(remotes[path].cache)) - remotes[path].size if path in remotes else 0
            for following in list(every)[:_AHEAD]:
                remote = remotes.get(following)
                room -= remote.size if remote else 0
                if remote and following not in begun and room >= 0:
                    begun.add(following)
                    pool.submit(_try_fetch, following, needed)
            yield path
    finally:
        pool.shutdown(cancel_futures=True)


def _try_fetch(path: Path, needed: Callable[[Path], bool] | None) -> None:
    with suppress(InputError, OSError):  # who opens it says so
        if needed is None or needed(path):
            opened(path).close()


def _opened_here(path: Path, remote: Remote) -> BufferedReader | None:
    """The fetched tar, marked as just used; None where it is not here, or an older version is."""
    try:
        file = path.open("rb")
    except OSError:
        return None
    stat = os.fstat(file.fileno())
    if (stat.st_size, stat.st_mtime_ns) != (remote.size, remote.stamp):
        file.close()
        return None
    with suppress(OSError):
        os.utime(file.fileno(), ns=(time.time_ns(), remote.stamp))
    return file


def _fetch(path: Path, remote: Remote) -> BufferedReader:
    """Fetch it whole, put it in place and open it."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with _alone(Path(remote.cache) / _BOUND):
            _make_room(Path(remote.cache), remote.size, path)
            partial.touch()  # this room is taken
        retried(f"shard {remote.url}", lambda: _fetch_to(partial, remote))
        file = partial.open("rb")
        os.utime(partial, ns=(time.time_ns(), remote.stamp))
        os.replace(partial, path)
        return file
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _fetch_to(partial: Path, remote: Remote) -> None:
    """One try; InputError where another version is there now, or none."""
    fs = filesystem(remote.url)
    place = fs._strip_protocol(remote.url)
    try:
        fs.get_file(place, str(partial))
        # a manifest's sha256 says more than a version
        found = "" if remote.sha256 else version_of(fs.info(place))
    except FileNotFoundError:
        raise InputError(f"shard {remote.url}: is not there any more; start again") from None
    except PermissionError as error:
        raise InputError(f"shard {remote.url}: cannot be read: {plain(error)}") from None
    if found not in (remote.version, ""):
        raise InputError(f"shard {remote.url}: has changed meanwhile; start again")
    if (size := partial.stat().st_size) != remote.size:
        raise ConnectionError(f"got {size} of {remote.size} bytes")
    if remote.sha256:
        with partial.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != remote.sha256:
                raise InputError(
                    f"shard {remote.url}: its bytes are not those its manifest was written for"
                    " (sha256)"
                )


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process at a time, where the disk has locks: else two may fetch the same, whole."""
    try:
        lock = file.open("r+b")
    except OSError:
        yield
        return
    with lock:
        locked(lock)
        yield


def _bound(folder: Path) -> int:
    try:
        return int(json.loads((folder / _BOUND).read_text(encoding="utf-8"))["bytes"])
    except (OSError, ValueError, TypeError, KeyError):
        return _USUAL_BOUND


def _make_room(folder: Path, size: int, wanted: Path | None = None) -> None:
    """Remove the tars that were used longest ago until there is room for one of `size` bytes, and
    what killed processes left. A tar larger than the bound is alone.
    """
    room, held = _bound(folder) - size, list[tuple[int, int, Path]]()
    for beside in folder.rglob(f"*.tar{SUFFIX}"):
        path = beside.with_name(beside.name.removesuffix(SUFFIX))
        with suppress(OSError):
            stat = path.stat()
            held.append((stat.st_atime_ns, stat.st_size, path))
    for left in folder.rglob(".*.tar.????????????"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                left.unlink()
            elif coming := remote_of(left.with_name(left.name[1:].rpartition(".")[0])):
                room -= coming.size
    total = sum(size for _, size, path in held if path != wanted)
    for _, size, path in sorted(held):
        if total <= room:
            return
        if path != wanted:
            with suppress(OSError):
                path.unlink()
            total -= size


def retried(what: str, call: Callable[[], Found]) -> Found:
    """What the call returns, tried again, ever more slowly, where a server fails.

    FileNotFoundError and PermissionError pass; InputError, which begins with `what`, where there is
    no room on this side, or the last try has failed.
    """
    pause = _FIRST_PAUSE_S
    for left in reversed(range(TRIES)):
        try:
            return call()
        except (FileNotFoundError, PermissionError, InputError):
            raise
        except Exception as error:  # each library has its own kinds
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise
            no_credentials = "Credentials" in type(error).__name__
            if not left or no_credentials:
                hint = "; give credentials in the environment" if no_credentials else ""
                tries = "" if no_credentials else f", {TRIES} times"
                raise InputError(
                    f"{what}: cannot be reached or read{tries}: {plain(error)}{hint}"
                ) from None
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, _LONGEST_PAUSE_S)
    raise AssertionError("the last try returns or raises")


def plain(error: BaseException) -> str:
    """An error of a library in one line, without what follows the `?` of an address or stands
    before its `@`: both may be secrets.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\?[^\s'\")]+", "", re.sub(r"://[^/\s@]+@", "://", text))[:300]


def filesystem(url: str) -> Any:
    """fsspec's file system for an address; InputError where its package is not installed."""
    return _filesystem(url.partition("://")[0], os.getpid())


@lru_cache(maxsize=8)  # making one takes a second, and fsspec's own would be one for each thread
def _filesystem(protocol: str, process: int) -> Any:
    import fsspec  # with its implementations slow to import, and local shards need none of it

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            # its usual bound is on the whole of a transfer, five minutes
            wait = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            own = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
            options["client_kwargs"] = {"timeout": wait, **own}
        if protocol == "s3":  # tried again here, and by s3fs itself: that is enough
            own = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, **own}
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        package = _PACKAGES.get(protocol, "aiohttp")
        raise InputError(
            f"{protocol}:// needs the package {package}; type `pip install {package}`"
        ) from error


def version_of(info: dict[str, Any]) -> str:
    """What changes when a file's content does, by what a server says of it; "" for nothing."""
    for name in ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "Last-Modified", "updated"):
        if value := info.get(name):
            return f"{name.lower()} {value}".replace('"', "").replace("W/", "")
    return ""
