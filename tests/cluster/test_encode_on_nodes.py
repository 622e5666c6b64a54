"""`flowray.data encode` on a real cluster of two nodes, one of which is killed while it encodes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ray_nodes import Node, joined, offspring, running_head
from support import Heard, tiny_pictures, tiny_recipe

from flowray.config.load import dump_recipe, override_recipe
from flowray.store.latents import ensure_latents, load_latents

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

PICTURES = 3200  # 200 shards: some seconds to encode
BEFORE = 8  # shards that are there when the node is killed
SLOW_S = 600.0


def wait_for(what: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + SLOW_S
    while not what():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)


def encodes(node: Node) -> bool:
    """Whether a task that encodes runs on it."""
    for pid in node.pids:
        try:
            if b"ray::_work" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False


def test_a_node_that_is_killed_midway_costs_no_shard(tmp_path_factory: pytest.TempPathFactory):
    with running_head(tmp_path_factory.mktemp("encode"), "--num-cpus=1") as head:
        shards = tiny_pictures(head.shared / "many", PICTURES)
        recipe = tiny_recipe(head.shared / "made", **{"data.shards": str(shards)})
        made_of = recipe.model.autoencoder, recipe.model.latent
        (head.shared / "tiny.yaml").write_text(dump_recipe(recipe))
        cache, log = Path(str(recipe.data.cache)), head.folder / "encode.log"

        def whole() -> dict[str, tuple[int, int]]:
            tars = [file.with_suffix(".tar") for file in cache.glob("latents-*/shards/*.json")]
            return {tar.name: (tar.stat().st_ino, tar.stat().st_mtime_ns) for tar in tars}

        command = [sys.executable, "-m", "flowray.data", "encode", "tiny.yaml", "--workers", "2"]
        with joined(head) as node, log.open("w") as out:
            driver = subprocess.Popen(
                command, cwd=head.shared, env=head.as_driver, stdout=out, stderr=out
            )
            try:
                wait_for(lambda: len(whole()) >= BEFORE and encodes(node), driver, log)
                node.kill()
                kept = whole()
                assert driver.wait(SLOW_S) == 0, log.read_text()[-3000:]
            finally:
                driver.kill()
                driver.wait()
        assert BEFORE <= len(kept) < PICTURES // 16
        assert {name: whole()[name] for name in kept} == kept  # none is encoded twice

        again = Heard()
        latents = load_latents(ensure_latents(recipe.data, *made_of, again)["train"])
        assert not [what for what in again.tasks if what.startswith(("encoding", "reading shards"))]
        torch.set_num_threads(1)
        alone = override_recipe(recipe, {"data.cache": str(head.folder / "alone")}).data
        wanted = load_latents(ensure_latents(alone, *made_of)["train"])
        every = np.arange(PICTURES)
        assert latents.reader.keys == wanted.reader.keys
        assert len(latents) == PICTURES
        torch.testing.assert_close(
            latents.moments(every).mean, wanted.moments(every).mean, rtol=2e-3, atol=2e-3
        )
        assert latents.variance == pytest.approx(wanted.variance, rel=1e-5)
        mark = f"FLOWRAY_CLUSTER_TEST={head.folder}"
    assert offspring(mark) == []
