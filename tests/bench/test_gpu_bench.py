"""What the GPU benchmark counts, on a tiny trunk and a CPU, and that these parts end."""

import json

import pytest
import torch

from benchmarks.gpu import main
from benchmarks.trunk import Bench, counted_flops, made_up_latents, trunk_flops, trunk_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize(
    ("route", "seen"), [("null", 256), ("{keep: 0.25, before: 0, after: 1}", 64)]
)
def test_the_formula_counts_what_torch_counts(folder, route, seen):
    latents = made_up_latents(folder / f"latents-{seen}", (4, 32, 32))
    typed = ["model.velocity.width=256", "train.precision=fp32", f"model.velocity.route={route}"]
    recipe = trunk_recipe("tiny", 4, *typed)
    bench = Bench.of(recipe, latents, torch.device("cpu"))
    counted = counted_flops(bench, bench.batch())
    # torch does not count attention on a CPU
    attention = 3 * 4 * 4 * 256 * (256 * 256 + seen * seen)
    assert trunk_flops(bench) - attention == pytest.approx(counted["trunk"], rel=0.001)
    assert counted["step"] > counted["trunk"]


def test_parts_write_their_figures(folder, capsys):
    typed = ["--size", "tiny", "--batches", "4", "--timed", "1"]
    parts = ["--parts", "plain", "checkpoint"]
    assert main(["--out", str(folder / "out"), *typed, *parts]) == 0
    figures = json.loads((folder / "out" / "gpu.json").read_text())
    assert figures["plain"]["images_per_s"] > 0
    assert figures["checkpoint"]["resume_exact"]
    # weights, average and two moments in fp32
    assert figures["checkpoint"]["bytes"] > 4 * 4 * 170_000
    with pytest.raises(SystemExit):
        main(["--out", str(folder / "out"), *typed, *parts])
    assert "is not empty" in capsys.readouterr().err
