"""A worker that is killed at one step again and again, as the kernel does where memory runs out."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from kills import LONG_S
from support import tiny_recipe

from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
CODE = """if True:
    import os, signal, sys
    from pathlib import Path
    from flowray.cluster.session import started
    from flowray.config.recipe import Recipe
    from flowray.rayrun.failures import OutOfMemory
    from flowray.rayrun.trainer import fit

    def worker(config):
        import os, signal
        from pathlib import Path
        from flowray.rayrun import trainer

        rows = Path(config["run_dir"]) / "metrics.jsonl"

        def dies():
            if rows.exists() and rows.read_bytes().count(b"\\n") >= 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        trainer.told_to_go = dies
        trainer.train_worker(config)

    recipe = Recipe.model_validate_json(sys.argv[1])
    run = Path(recipe.storage_path) / recipe.name
    with started():
        try:
            fit(recipe, run, name="train", ray_storage=run / ".ray", worker=worker)
        except OutOfMemory as error:
            print(error)
"""


def test_ends_after_the_third_time(tmp_path, monkeypatch):
    tmp = tempfile.mkdtemp(prefix="frk-")  # short, for Ray's sockets
    monkeypatch.setenv("TMPDIR", tmp)
    rare = {"train.log_every": 1, "train.checkpoint_every": 4, "train.probe_every": 1000}
    recipe = tiny_recipe(tmp_path, **rare, **{"resources.max_failures": 3})
    words = [sys.executable, "-c", CODE, recipe.model_dump_json()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=2 * LONG_S)
    shutil.rmtree(tmp, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    said = (
        f"{run.path}: a worker was killed three times after step 6, with no step gained: so does"
        " the kernel where memory runs out"
    )
    assert said in done.stdout.splitlines()  # beside Ray's own
    rows = read_rows(run.times)
    assert [row["step"] for row in rows if row.get("what") == "ready"] == [0, 4, 4]
    assert sum("lost" in row for row in rows) == 3
