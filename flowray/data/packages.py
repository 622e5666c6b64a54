"""Archives of package registries, pinned by their sha256: fetched whole or not at all, and read
without unpacking them.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from flowray.config.errors import InputError, last_line
from flowray.config.progress import SILENT, Progress
from flowray.data.folders import locked
from flowray.data.shards import sha256

_FETCHING = ".fetching-"  # how hidden folders of archives under way begin
_SHOWN = 300  # characters of what a failed command said


@dataclass(frozen=True)
class Package:
    """One version of a package, and the one archive of it that is taken for whole.

    file: the archive's name, as `npm pack` (.tgz) or `pip download` (.whl) writes it.
    sha256: in hex. licence: SPDX. attribution: who made it, and where.
    """

    name: str
    version: str
    registry: Literal["npm", "pypi"]
    file: str
    sha256: str
    licence: str
    attribution: str = ""

    @property
    def pinned(self) -> str:
        """Name and version, as the registry's client takes them."""
        return f"{self.name}{'@' if self.registry == 'npm' else '=='}{self.version}"


def command(packages: Sequence[Package]) -> list[str]:
    """The words that fetch packages of one registry into the working directory."""
    pinned = [package.pinned for package in packages]
    if packages[0].registry == "npm":
        return ["npm", "pack", *pinned]
    # a wheel alone: what pip builds from source runs that source
    return ["python", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *pinned]


def fetch(package: Package, folder: Path, progress: Progress = SILENT) -> Path:
    """The package's archive in `folder`, fetched by npm or pip if it is not there; several
    processes may ask at once.

    It is fetched into a hidden folder beside its place, its sha256 is checked, and then it is
    renamed. An archive with another sha256 is fetched again. InputError: no npm or no pip, the
    command fails, another file came, the folder cannot be written; what lay there still does.
    """
    return fetch_all([package], folder, progress)[0]


def fetch_all(packages: Sequence[Package], folder: Path, progress: Progress = SILENT) -> list[Path]:
    """`fetch` of each, in their order; where one cannot be fetched, the InputError names all that
    `folder` lacks, and one command for them.
    """
    return [_ensure(packages[i:], packages, folder, progress) for i in range(len(packages))]


def _ensure(
    left: Sequence[Package], packages: Sequence[Package], folder: Path, progress: Progress
) -> Path:
    """The archive of the first that is left."""
    package = left[0]
    place = folder / package.file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            alone = locked(lock)
            if place.is_file():
                if sha256(place) == package.sha256:
                    return place
                progress.say(f"{place}: damaged or another version, fetched again")
            if alone:
                for half in folder.glob(f"{_FETCHING}*"):  # by a process that was killed
                    shutil.rmtree(half, ignore_errors=True)
            with (
                tempfile.TemporaryDirectory(prefix=_FETCHING, dir=folder) as hidden,
                progress.task(f"fetching {package.pinned}"),
            ):
                _fetch(left, folder, Path(hidden)).replace(place)
    except OSError as error:
        raise InputError(
            f"{place}: cannot be fetched: {error.strerror or error}; have room in a folder that can"
            f" be written, or {_command(packages)} and name that folder with --packages"
        ) from error
    return place


def _fetch(left: Sequence[Package], kept: Path, folder: Path) -> Path:
    """The archive of the first that is left, fetched into an empty folder. kept: where the others
    may be.
    """
    package, words = left[0], command(left[:1])
    if package.registry == "npm":
        client, there = "npm, which comes with Node.js,", bool(shutil.which("npm"))
    else:
        client, there = "pip (python -m ensurepip)", bool(importlib.util.find_spec("pip"))
        words[0] = sys.executable
    if not there:
        lacking = _lacking(left, kept)
        raise InputError(
            f"{_names(lacking)} cannot be fetched: {client} is not installed; install it, or"
            f" {_command(lacking)} and copy what came into {kept}"
        )
    done = subprocess.run(
        words,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    got = folder / package.file
    if done.returncode or not got.is_file():
        came = ", ".join(path.name for path in folder.iterdir()) or "nothing"
        said = _error_of(done.stderr) if done.returncode else f"{came} came, not {package.file}"
        lacking = _lacking(left, kept)
        raise InputError(
            f"{_names(lacking)} cannot be fetched: {shlex.join(command([package]))} ended with"
            f" {done.returncode}: {said}; mend that, or {_command(lacking)} and copy what came into"
            f" {kept}"
        )
    if (digest := sha256(got)) != package.sha256:
        raise InputError(
            f"{package.pinned}: the registry's {package.file} has sha256 {digest}, not"
            f" {package.sha256}; try again, and where it comes again, do not use it"
        )
    return got


def _error_of(stderr: str) -> str:
    """What a client says of its failure, shortened; the log that npm points to last is no
    reason.
    """
    errors = [
        line
        for line in stderr.splitlines()
        if "error" in line.lower() and "complete log" not in line
    ]
    said = "; ".join(line.strip() for line in errors) or last_line(stderr)
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}..."


def _lacking(packages: Sequence[Package], folder: Path) -> list[Package]:
    """Those whose archive a folder has not, or has with another sha256."""
    return [
        package
        for package in packages
        if not (at := folder / package.file).is_file() or sha256(at) != package.sha256
    ]


def _names(packages: Sequence[Package]) -> str:
    return ", ".join(package.pinned for package in packages)


def _command(packages: Sequence[Package]) -> str:
    """How to bring packages from where there is a network."""
    commands = [
        shlex.join(command(same))
        for registry in ("npm", "pypi")
        if (same := [package for package in packages if package.registry == registry])
    ]
    return f"run `{' && '.join(commands)}` in a folder where it works"


def require(packages: Sequence[Package], folder: Path) -> list[Path]:
    """The archives of packages in a folder that somebody filled, without network; in their order.

    InputError names those that are missing or differ in sha256, and what fetches them.
    """
    places = [folder / package.file for package in packages]
    lacking = _lacking(packages, folder)
    missing = [package for package in lacking if not (folder / package.file).is_file()]
    wrong = [package for package in lacking if package not in missing]
    if lacking:
        lacks = f"has no {', '.join(each.file for each in missing)}" if missing else ""
        differs = f"{', '.join(each.file for each in wrong)} with another sha256" if wrong else ""
        raise InputError(
            f"--packages {folder}: {' and has '.join(filter(None, (lacks, differs)))};"
            f" {_command(lacking)} and copy what came into it"
        )
    return places


def read_members(archive: Path, names: Collection[str]) -> dict[str, bytes]:
    """The content of files in a .tgz or a .whl by their full names, in one pass; nothing is
    written to disk, and links are not followed.

    InputError names those that it does not hold, or an archive that does not decode.
    """
    wanted = set(names)
    with _opened(archive) as opened:
        if isinstance(opened, zipfile.ZipFile):
            found = {name: opened.read(name) for name in wanted & set(opened.namelist())}
        else:
            found = {}
            for member in opened:
                if member.isfile() and member.name in wanted:
                    found[member.name] = cast(IO[bytes], opened.extractfile(member)).read()
    if lacking := sorted(wanted - found.keys()):
        raise InputError(f"{archive}: it does not hold {', '.join(lacking[:5])}")
    return found


def member_names(archive: Path) -> list[str]:
    """The full names of the files in a .tgz or a .whl, in its order."""
    with _opened(archive) as opened:
        if isinstance(opened, zipfile.ZipFile):
            return [member.filename for member in opened.infolist() if not member.is_dir()]
        return [member.name for member in opened if member.isfile()]


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    is_zip = archive.suffix in (".whl", ".zip")
    try:
        with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive, "r:gz") as opened:
            yield opened
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{archive}: cannot be read: {error}") from error
