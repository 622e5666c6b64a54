"""Everything in a folder that is a bucket, mounted by s3fs: no hard links, renames in steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from remote_servers import BUCKET, KEYS, client, s3_process
from support import own_pictures, tiny_recipe
from test_remote_run import cached, latents_of, trained

from flowray.cli.data import main
from flowray.cli.eval import main as evaluate
from flowray.config.load import dump_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.data.check import check_shards
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.run import RunDirectory

MOUNT = shutil.which("s3fs")  # Debian's, a program; the Python package of that name has none

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        MOUNT is None or not os.access("/dev/fuse", os.R_OK | os.W_OK),
        reason="needs the program s3fs (apt install s3fs) and /dev/fuse",
    ),
]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A folder that is the bucket; it knows no hard links, or the test shows nothing."""
    place, secret = tmp_path / "mounted", tmp_path / "secret"
    place.mkdir()
    secret.write_text(f"{KEYS['AWS_ACCESS_KEY_ID']}:{KEYS['AWS_SECRET_ACCESS_KEY']}\n")
    secret.chmod(0o600)
    # not through this process: its threads cannot answer while it waits for a mapped page
    process, port = s3_process()
    endpoint = f"http://127.0.0.1:{port}"
    client(endpoint).create_bucket(Bucket=BUCKET)
    try:
        options = f"url={endpoint},use_path_request_style,passwd_file={secret},sigv4"
        made = subprocess.run(
            [str(MOUNT), BUCKET, str(place), "-o", options], capture_output=True, text=True
        )
        if made.returncode or not os.path.ismount(place):
            pytest.skip(f"nothing can be mounted here: {made.stderr.strip()}")
        try:
            (place / "file").write_text("x")
            with pytest.raises(OSError):
                os.link(place / "file", place / "link")
            yield place
        finally:
            for _ in range(50):
                if subprocess.run(["umount", str(place)], capture_output=True).returncode == 0:
                    break
                time.sleep(0.2)
    finally:
        process.kill()
        process.wait()


def scores(recipe: Recipe) -> dict[str, Any]:
    """What `flowray.eval` says of a run, which begins with its config, as the command writes it."""
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    run.config.write_text(dump_recipe(recipe))
    words = ["--captions", "6", "--draws", "2", "--features", "pixels"]
    assert evaluate([str(run.path), *words]) == 0
    found = json.loads((run.path / "eval.json").read_text())
    del found["run"]
    return found


def test_pack_encode_train_resume_and_evaluate_there_equal_those_on_a_disk(
    mounted: Path, tmp_path: Path
) -> None:
    own = own_pictures(tmp_path / "own", 24)
    disk = tiny_recipe(tmp_path)
    recipes = []
    for place in (tmp_path / "disk", mounted):
        words = ["--size", "8", "--val", "0.4", "--per-shard", "5"]
        assert main(["pack", str(own), str(place / "set"), *words]) == 0
        assert check_shards(str(place / "set" / "train")).good
        recipes.append(
            override_recipe(
                disk,
                {
                    "data.shards": str(place / "set" / "train"),
                    "data.val_shards": str(place / "set" / "val"),
                    "data.cache": str(place / "cache"),
                    "storage_path": str(place / "runs"),
                },
            )
        )
    here, there = recipes
    latents_of(here)
    latents_of(there)
    assert cached(there) == cached(here)
    for recipe in recipes:
        trained(recipe, until=6)
    assert trained(there) == trained(here)
    assert scores(there) == scores(here)
    run = RunDirectory(Path(there.storage_path) / there.name)
    assert newest_checkpoint(run.checkpoints).name == "step_000012"
    assert not list(run.path.rglob("*.partial"))
