"""Finding the shards of an address, and packing to one."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from flowray.config.errors import InputError
from flowray.config.paths import WRITABLE, address
from flowray.config.writing import write_whole
from flowray.data.folders import is_clutter
from flowray.data.index import SUFFIX as INDEX
from flowray.data.remote import Remote, RemoteCache, plain, retried, version_of
from flowray.data.remote_place import RemotePlace
from flowray.data.shards import MANIFEST, SPLITS, expand_braces

PACKING = ".packing"  # lies in a folder until its set is whole
_ASKING = 16  # requests at a time
_WILD = "*?["  # what begins a wildcard
_BLOCK = 512  # bytes of a tar's header


@dataclass(frozen=True)
class _File:
    """A tar as the server tells of it. name: as fsspec has it, without `s3://`."""

    name: str
    size: int
    version: str
    sha256: str | None = None  # told by the server itself


class _Place(RemotePlace):
    """Where shards lie."""

    def tars(self, name: str) -> list[_File]:
        """The tars right in a folder, hidden ones apart."""
        return [self.file(row) for row in self.ls(name) if self._is_shard(row)]

    def splits(self, name: str) -> list[str]:
        """The folders in a folder that have tars."""
        below = sorted(row["name"] for row in self.ls(name) if row["type"] == "directory")
        below = [each for each in below if not is_clutter(PurePosixPath(_last(each)))]
        return [each for each in below if self.tars(each)]

    def one(self, url: str) -> tuple[list[_File], str]:
        """The tars of an address without braces, and, where there are none, why."""
        name, wild = self.name(url), self.lists and any(sign in url for sign in _WILD)
        if url.lower().endswith(".tar") and not wild:
            row = self.ask(name, lambda: self.fs.info(name))
            there = row is not None and row["type"] == "file"
            return ([self.file(row)], "") if there else ([], "no such file")
        if not self.lists:
            raise InputError(
                f"{url}: web servers list no folders; name the tars, many with braces:"
                " {000..009}.tar"
            )
        if wild:
            rows = self.ask(name, lambda: self.fs.glob(name, detail=True)) or {}
            found = [self.file(row) for row in rows.values() if self._is_shard(row)]
            return found, "no .tar file matches"
        if found := self.tars(name):
            return found, ""
        below = self.splits(name)
        if below and not any(_last(each).lower() in SPLITS for each in below):
            return [file for each in below for file in self.tars(each)], ""
        if below:
            names = ", ".join(map(_last, below[:5]))
            first = self.url(below[0])
            return [], f"no .tar file there, but in {names}; did you mean {first}?"
        return [], "no .tar file there"

    def file(self, row: dict[str, Any]) -> _File:
        if row.get("size") is None:
            raise InputError(f"{self.url(row['name'])}: the server does not say how large it is")
        told = (row.get("lfs") or {}).get("sha256")
        return _File(row["name"], row["size"], version_of(row), told)

    def _is_shard(self, row: dict[str, Any]) -> bool:
        last = _last(row["name"])
        return row["type"] == "file" and last.lower().endswith(".tar") and last[0] != "."


@dataclass(frozen=True)
class _Folder:
    """A folder of tars, and what its manifest says of them, where there is one."""

    place: _Place
    name: str

    @cached_property
    def text(self) -> str:
        """The manifest; "" for none. InputError where the folder is being packed."""
        name = f"{self.name}/{MANIFEST}"
        try:
            found = retried(self.place.url(name), lambda: self.place.fs.cat_file(name))
        except (FileNotFoundError, PermissionError):  # some servers say so of what is not there
            found = b""
        packing = f"{self.name}/{PACKING}"
        begun = not found and self.place.protocol in WRITABLE
        if begun and self.place.ask(packing, lambda: self.place.fs.info(packing)):
            raise InputError(
                f"{self.place.url(self.name)}: being packed, or packing was cut off; then remove it"
            )
        return bytes(found).decode("utf-8", errors="replace")

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        try:
            return {row["name"]: row for row in json.loads(self.text)["shards"]}
        except (ValueError, KeyError, TypeError):
            return {}


def find_remote(spec: str, cache: RemoteCache) -> tuple[Path, ...]:
    """`find_shards` of an address: the places of its tars in the cache, sorted. None is fetched."""
    place = _Place(address(spec))
    names = expand_braces(address(spec))
    with ThreadPoolExecutor(_ASKING) as pool:
        each = list(pool.map(place.one, names))
    if lacking := [name for name, (files, _) in zip(names, each, strict=True) if not files]:
        what = each[0][1] if len(names) == 1 else f"{len(lacking)} of {len(names)} are not there"
        first = "" if len(names) == 1 else f", first {lacking[0]}"
        raise InputError(
            f"shards {spec!r}: {what}{first}; give a folder of .tar files, a glob or one .tar"
        )
    files = sorted({file.name: file for found, _ in each for file in found}.items())
    cache.prepare()
    folders = {name: _Folder(place, name) for name in {_parent(name) for name, _ in files}}
    remotes = [_remote(folders[_parent(name)], file, cache) for name, file in files]
    with ThreadPoolExecutor(_ASKING) as pool:
        paths = list(pool.map(Remote.write, remotes))
    _keep_manifests(folders, cache)
    if not any(_has_samples(place, remote) for remote in remotes):
        raise InputError(
            f"shards {spec!r}: {len(files)} .tar file(s) but not one sample in them, first"
            f" {remotes[0].url}"
        )
    return tuple(sorted(paths))


def remote_splits(url: str) -> list[str]:
    """The folders of a folder that holds train/, val/, ...; [] where it has tars itself, or `url`
    is no folder.
    """
    place = _Place(address(url))
    if not place.lists or any(sign in url for sign in _WILD + "{") or url.lower().endswith(".tar"):
        return []
    name = place.name(address(url))
    return [] if place.tars(name) else [place.url(each) for each in place.splits(name)]


def _remote(folder: _Folder, file: _File, cache: RemoteCache) -> Remote:
    url, row = folder.place.url(file.name), folder.rows.get(_last(file.name), {})
    fits = row.get("bytes") == file.size and isinstance(row.get("sha256"), str)
    sha256 = row["sha256"] if fits else file.sha256
    samples = row.get("samples") if fits else None
    made_of = [url, file.version, file.size]
    if folder.place.protocol in WRITABLE and file.version.lower().startswith(("etag", "md5hash")):
        made_of = made_of[1:]  # a hash of the content
    content = sha256 or hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    at = _at(url, cache)
    return Remote(
        url, file.size, file.version, content, sha256, samples, str(cache.folder), str(at)
    )


def _at(url: str, cache: RemoteCache) -> Path:
    """The place in the cache; InputError where the address's parts are no names of files."""
    protocol, _, rest = url.partition("://")
    parts = rest.split("/")
    if any(part in ("", ".", "..") or "\0" in part or len(part) > 200 for part in parts):
        raise InputError(f"shard {url!r}: its address is no path")
    return cache.folder.absolute().joinpath(protocol, *parts)


def _keep_manifests(folders: dict[str, _Folder], cache: RemoteCache) -> None:
    """The manifests beside the places of their tars, where whoever reads them looks."""
    for folder in folders.values():
        file = _at(f"{folder.place.url(folder.name)}/{MANIFEST}", cache)
        try:
            if not folder.text:
                file.unlink(missing_ok=True)
            elif not file.is_file() or file.read_text(encoding="utf-8") != folder.text:
                write_whole(file, folder.text, shared=True)
        except OSError as error:
            raise InputError(f"{file}: cannot be written: {error.strerror}") from error


def _has_samples(place: _Place, remote: Remote) -> bool:
    """Whether a tar begins with a member: read, unless the manifest or an index has it."""
    if remote.samples is not None:
        return remote.samples > 0
    if Path(remote.at + INDEX).is_file():
        return True
    name = place.name(remote.url)
    if remote.size < _BLOCK:
        return False
    return any(place.ask(name, lambda: place.fs.cat_file(name, start=0, end=_BLOCK)) or b"")


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _parent(name: str) -> str:
    return name.rstrip("/").rpartition("/")[0]


@contextmanager
def packing_to(url: str) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """A folder to write a set in, and what takes each of its shards away, to the same place under
    `url`; manifests go there at the end, so that a reader finds the whole set or none. On any
    exception what went there is removed. InputError where something is there already.
    """
    place = _Place(url)
    if place.protocol not in WRITABLE:
        raise InputError(
            f"{url}: can only be read; shards are packed to a folder,"
            f" {' or '.join(f'{name}://' for name in WRITABLE)}"
        )
    if there := place.ls(place.name(url)):
        first = place.url(there[0]["name"])
        raise InputError(f"{url}: not empty, such as {first}; remove it or choose another")
    with tempfile.TemporaryDirectory(prefix="flowray-pack-") as made:
        packing = _Packing(place, place.name(url), Path(made))
        try:
            yield Path(made), packing.take
            packing.finish()
        except BaseException:
            packing.undo()
            raise


class _Packing:
    def __init__(self, place: _Place, root: str, made: Path):
        self._place, self._root, self._made = place, root, made
        self._sent = list[str]()
        self._marked = dict[str, None]()  # folders, in their order

    def take(self, shard: Path) -> None:
        folder = self._name(shard.parent)
        if folder not in self._marked:
            self._marked[folder] = None
            mark = f"{folder}/{PACKING}"
            try:
                self._place.write(mark, b"packing\n")
            except FileNotFoundError as error:  # there is no such bucket
                url = self._place.url(mark)
                raise InputError(f"{url}: cannot be written: {plain(error)}") from None
        self._send(shard)
        shard.unlink()

    def finish(self) -> None:
        files = [path for path in self._made.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda path: (path.name == MANIFEST, path)):
            self._send(file)
        self._unmark()

    def undo(self) -> None:
        with suppress(Exception):  # the exception on its way says more
            self._place.remove(self._sent)
            self._unmark()

    def _unmark(self) -> None:
        self._place.remove(f"{folder}/{PACKING}" for folder in self._marked)

    def _name(self, path: Path) -> str:
        inside = path.relative_to(self._made).as_posix()
        return self._root if inside == "." else f"{self._root}/{inside}"

    def _send(self, file: Path) -> None:
        name = self._name(file)
        self._sent.append(name)
        self._place.put(file, name)
