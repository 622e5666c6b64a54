"""Files that are mapped while a run trains: ours are replaced and never overwritten in place."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from support import SPEC, tiny_autoencoder, tiny_pictures

from flowray.config.model import KLAutoencoder
from flowray.config.train import DataConfig
from flowray.store.latents import ensure_latents, load_latents
from flowray.store.sums import REMEMBERED

CUT_SHORT = """
import sys
from pathlib import Path
from flowray.data.reader import ShardReader

path = Path(sys.argv[1])
reader = ShardReader([path])
print(len(reader.read(0, "png")), flush=True)
with path.open("r+b") as file:
    file.truncate()
reader.read(0, "png")
print("read on", flush=True)
"""


def test_what_is_encoded_anew_leaves_a_reader_what_it_has_mapped(tmp_path: Path) -> None:
    train, val = tiny_pictures(tmp_path / "train", 20), tiny_pictures(tmp_path / "val", 4)
    data = DataConfig(shards=str(train), val_shards=str(val), cache=str(tmp_path / "cache"))
    config = KLAutoencoder(path=str(tiny_autoencoder(tmp_path / "autoencoder")))
    latents = load_latents(ensure_latents(data, config, SPEC)["train"])
    every = np.arange(len(latents))

    def read() -> tuple[bytes, list[list[str]]]:
        moments = latents.moments(every)
        return moments.mean.numpy().tobytes(), [latents.captions(i) for i in every.tolist()]

    def places() -> dict[Path, int]:
        files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        return {path: path.stat().st_ino for path in files if path.name != REMEMBERED}

    # held by another name, so that no inode is given again
    before, had = read(), places()
    for number, path in enumerate(had):
        path.with_name(f"held{number}").hardlink_to(path)
    for path in had:
        if path.suffix in (".json", ".index"):  # all is encoded anew, and indexed
            path.unlink()
    ensure_latents(data, config, SPEC)
    assert read() == before
    now = {path: inode for path, inode in places().items() if not path.name.startswith("held")}
    assert now.keys() == had.keys()
    shards = [path for path in had if path.parent.name == "shards"]
    assert len(shards) == 9  # of three shards the latents, their index and what is said of them
    assert not [path for path in shards if now[path] == had[path]]


def test_a_shard_that_another_program_cuts_short_ends_who_reads_it(tmp_path: Path) -> None:
    """As docs/data.md says: the kernel does it, with no word."""
    (shard,) = tiny_pictures(tmp_path / "set", 4).glob("*.tar")
    command = [sys.executable, "-c", CUT_SHORT, str(shard)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip().isdecimal(), done.stdout
    assert done.returncode == -signal.SIGBUS
