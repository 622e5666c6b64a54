"""A change of a recipe beside the recipe: the arithmetic, and three short trainings for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny_recipe

from benchmarks.pairs import PLAIN, Pair, compared, run
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe


def test_differences_are_taken_seed_by_seed() -> None:
    told = {
        PLAIN: [{"a": 1.0, "b": 5.0}, {"a": 2.0, "b": 5.0}, {"a": 9.0, "b": 5.0}],
        "same steps": [{"a": 0.5, "b": 5.0}, {"a": 1.0, "b": 6.0}, {"a": 7.5, "b": 4.0}],
    }
    found = compared(told)
    assert found["a"][PLAIN] == 4.0
    # -0.5, -1.0 and -1.5: the seeds' own spread, 4.4, is in none of them
    assert found["a"]["same steps"]["difference"] == -1.0
    assert found["a"]["same steps"]["standard_error"] == pytest.approx(0.5 / 3**0.5)
    assert found["b"]["same steps"]["standard_error"] == pytest.approx(1 / 3**0.5)


def test_of_one_seed_there_is_no_error() -> None:
    found = compared({PLAIN: [{"a": 1.0}], "same time": [{"a": 3.0}]})
    assert found == {"a": {PLAIN: 1.0, "same time": {"difference": 2.0, "standard_error": None}}}


def test_a_folder_of_another_pair_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pair.json").write_text(json.dumps(Pair("quickstart", (), ("seed=1",)).kept()))
    with pytest.raises(InputError, match="holds trainings of another pair"):
        run(tmp_path, Pair("quickstart", (), ("seed=2",)), [0], 1)


@pytest.mark.slow
@pytest.mark.timeout(900)  # eight processes that import torch, on a busy machine slowly
def test_trainings_are_compared_and_nothing_is_trained_twice(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(dump_recipe(tiny_recipe(tmp_path)))
    typed = [str(tmp_path / "out"), str(recipe), "train.steps=8", "train.probe_every=8"]
    change = ["--change", "optim.matrices={kind: muon}", "--seeds", "3", "--json"]

    def pair() -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", "pair", *typed, *change],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    facts = pair()
    names = sorted(path.parent.name for path in (tmp_path / "out").glob("*/probe.json"))
    assert {"plain-8-3", "changed-8-3"} <= set(names)
    metrics = facts["metrics"]
    assert isinstance(metrics, dict)
    first, second = (
        json.loads((tmp_path / "out" / f"{side}-8-3" / "probe.json").read_text())
        for side in ("plain", "changed")
    )
    for key, sides in metrics.items():
        assert sides["same steps"] == {
            "difference": second[key] - first[key],
            "standard_error": None,
        }
        assert first[key] != second[key]
    before = [p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/probe.json")]
    assert pair() == facts
    assert [p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/probe.json")] == before
