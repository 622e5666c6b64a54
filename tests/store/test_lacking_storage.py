"""Storage that can do less than a disk: mounted buckets and drives, exFAT, some clusters' disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import lacking
import pytest
import torch
from support import tiny_pictures, tiny_recipe

from flowray.config.errors import InputError
from flowray.config.load import dump_recipe
from flowray.data.shards import MANIFEST, write_shards
from flowray.store.checkpoint import list_checkpoints, newest_checkpoint, save_checkpoint
from flowray.store.latents import ensure_latents
from flowray.store.run import RunDirectory, require_writable

TESTS = Path(__file__).parents[1]

KEEP = """
import os, sys
from pathlib import Path
import torch
from flowray.config.errors import InputError
from flowray.sweepconfig.sweep import Sweep
from flowray.data.make import ShapesSet, ensure_set
from flowray.store.checkpoint import newest_checkpoint, save_checkpoint
from flowray.store.run import RunDirectory, RunLock
from flowray.tune.study import SweepStudy

folder = Path(sys.argv[1])
for make in (os.link, os.symlink):
    try:
        make(folder, folder / "x")
    except PermissionError:
        continue
    raise SystemExit(f"{make} works: this test shows nothing")
run = RunDirectory(folder / "run")
run.create()
with RunLock(run):
    save_checkpoint(run.checkpoints, 3, {"model": {"w": torch.ones(2)}}, {"seed": 0}, keep=2)
print(newest_checkpoint(run.checkpoints).name, sorted(path.name for path in run.path.iterdir()))
sweep = Sweep.model_validate(
    {"name": "s", "base": "quickstart", "method": "random", "run_cap": 2,
     "metric": {"name": "loss/total"},
     "parameters": {"optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}}}
)
for session in range(2):
    print(SweepStudy(sweep, folder / "study.journal").ask()[0])
made = ensure_set(ShapesSet(train=2, val=1, unseen=1), folder / "cache")
print(sorted(path.name for path in made["train"].iterdir()))
"""


@pytest.mark.skipif(not lacking.KNOWN, reason="the kernel's filter is Linux's")
def test_a_run_a_study_and_a_data_set_without_links_and_locks(tmp_path):
    command = [sys.executable, str(TESTS / "lacking.py"), "link,symlink,flock", sys.executable]
    done = subprocess.run([*command, "-c", KEEP, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "step_000003 ['checkpoints', 'samples']",
        "0",
        "1",
        str(["manifest.json", "shard-000000.tar"]),
    ]
    assert not list(tmp_path.glob("*.lock"))


READ_ONLY = """
import sys
from pathlib import Path
import torch
from flowray.config.errors import InputError
from flowray.config.load import load_recipe, override_recipe
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

recipe = load_recipe(sys.argv[1]).recipe
try:
    open(Path(recipe.data.cache) / "x", "w")
except OSError as error:
    print(error.strerror)
for shards in (recipe.data.shards, recipe.data.val_shards + "/new"):
    run = RunDirectory(Path(recipe.storage_path) / Path(shards).name)
    run.create()
    data = override_recipe(recipe, {"data.shards": shards})
    try:
        train(data, run, Group(0, 1, torch.device("cpu")), lambda row: None)
    except InputError as error:
        print(error)
"""


def test_training_from_a_cache_that_can_only_be_read(tmp_path):
    recipe = tiny_recipe(tmp_path, **{"train.steps": 2})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    tiny_pictures(Path(recipe.data.val_shards) / "new", 4, start=100)
    cache = tmp_path / "cache"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    mounted = f"mount --bind {cache} {cache} && mount -o remount,ro,bind {cache}"
    inside = ["unshare", "-rm", "sh", "-c", f'{mounted} && exec "$@"', "sh"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mounts of one's own here")
    command = [*inside, sys.executable, "-c", READ_ONLY, str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    read_only, refused = done.stdout.splitlines()
    assert read_only == "Read-only file system"
    assert f"{cache}" in refused
    assert "cannot be written: Read-only file system" in refused
    assert newest_checkpoint(tmp_path / "runs" / "train" / "checkpoints").name == "step_000002"
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def no_folders(source, target):
    """What gcsfuse says to the renaming of a folder."""
    if Path(source).is_dir():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return os.rename(source, target)


def test_checkpoints_and_shards_where_folders_are_not_renamed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", no_folders)
    for step in (1, 2, 2):
        saved = {"model": {"w": torch.full((2,), float(step))}}
        save_checkpoint(tmp_path / "checkpoints", step, saved, {"seed": 0}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == [
        "step_000001",
        "step_000002",
    ]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # nothing partial
    samples = [{"__key__": "a", "txt": b"x"}]
    assert (write_shards(tmp_path / "shards", samples, per_shard=4, meta={}) / MANIFEST).is_file()
    with pytest.raises(InputError, match="not an empty folder"):
        write_shards(tmp_path / "shards", samples, per_shard=4, meta={})


def test_a_checkpoint_cut_off_while_its_files_are_renamed_is_none(tmp_path, monkeypatch):
    """The last file makes it one: a kill between two renames leaves the older checkpoint newest."""
    save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {"seed": 0}, keep=2)
    left = [2]  # files

    def until_cut_off(source, target):
        no_folders(source, target)
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.EIO, "pulled out")

    monkeypatch.setattr(os, "replace", until_cut_off)
    groups = {name: {"w": torch.ones(2)} for name in ("model", "ema", "optim")}
    with pytest.raises(OSError, match="pulled out"):
        save_checkpoint(tmp_path, 2, groups, {"seed": 0}, keep=2)
    assert newest_checkpoint(tmp_path).name == "step_000001"


def test_a_folder_whose_names_cannot_be_synced(tmp_path, monkeypatch):
    """Some network disks sync files only."""
    real = os.fsync

    def files_only(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    saved = save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {"seed": 0}, keep=2)
    assert newest_checkpoint(tmp_path) == saved


@pytest.mark.parametrize("lacks", ["rename", "append", "exclusive"])
def test_storage_that_cannot_hold_a_run_is_refused_by_name(tmp_path, monkeypatch, lacks):
    run = RunDirectory(tmp_path / "run")
    if lacks == "rename":

        def refuse(source, target):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))

        monkeypatch.setattr(os, "replace", refuse)
    real = Path.open

    def opened(path, mode="r", *rest, **more):
        if lacks == "append" and mode == "a":
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, "w" if lacks == "exclusive" and mode == "x" else mode, *rest, **more)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(InputError, match=f"storage_path: {run.path} "):
        run.create()
    assert not [path for path in run.path.iterdir() if path.is_file()]


def test_storage_that_can_is_left_as_it_was(tmp_path):
    require_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def exfat(folder: Path) -> Path | None:
    """A real exFAT file system of 300 MB, mounted; None where this machine or user has none."""
    tools = ("mkfs.exfat", "mount.exfat-fuse", "losetup")
    if os.getuid() or not all(map(shutil.which, tools)) or not Path("/dev/fuse").exists():
        return None
    image, mounted = folder / "image", folder / "exfat"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(300 * 2**20)
    subprocess.run(["mkfs.exfat", image], check=True, capture_output=True)
    loop = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True)
    device = loop.stdout.strip()
    if loop.returncode or subprocess.run(["mount.exfat-fuse", device, mounted]).returncode:
        return None
    return mounted


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_sweep_on_exfat(tmp_path):
    """From its first row to its report, and again with --resume."""
    from support import tiny_recipe

    from flowray.config.load import dump_recipe

    mounted = exfat(tmp_path)
    if mounted is None:
        pytest.skip("needs root, exfatprogs, exfat-fuse and a loop device")
    try:
        made = tiny_recipe(mounted, **{"data.cache": str(mounted / "cache")})
        (mounted / "tiny.yaml").write_text(dump_recipe(made))
        sweep = [sys.executable, "-m", "flowray.tune", "sweeps/head.yaml", "base=tiny.yaml"]
        sweep += ["name=s", f"storage_path={mounted / 'runs'}", "run_cap=2", "points=[]"]
        for more in (["max_concurrent=1"], ["run_cap=3", "max_concurrent=1", "--resume"]):
            done = subprocess.run([*sweep, *more], cwd=mounted, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        rows = (mounted / "runs" / "s" / "trials.jsonl").read_text().splitlines()
        assert [json.loads(row)["trial"] for row in rows] == [0, 1, 2]
        assert (mounted / "runs" / "s" / "report.html").is_file()
        assert newest_checkpoint(RunDirectory(mounted / "runs" / "s" / "0").checkpoints)
    finally:
        deadline = time.monotonic() + 60  # the last of Ray's processes may still be at its end
        while subprocess.run(["umount", mounted]).returncode:
            assert time.monotonic() < deadline, "something is still at work in the folder"
            time.sleep(0.5)
        listed = subprocess.run(
            ["losetup", "-j", tmp_path / "image"], capture_output=True, text=True
        )
        if device := listed.stdout.partition(":")[0]:
            subprocess.run(["losetup", "-d", device], check=True)
