"""`flowray.bench data`: reading the same tars through flowray and through stock webdataset."""

import json
from dataclasses import replace

import pytest

from benchmarks.__main__ import main
from benchmarks.data import MOST_BYTES, QUICK, SIDES, facts
from benchmarks.data_arms import Times
from flowray.config.errors import InputError

RATIOS = {
    *("cold_latents", "warm_latents", "pictures", "resume"),
    *("first_latents", "uncached_latents"),
}
GUARDS = {"equal_samples", "equal_tensors", "resume_flat", "index_memory", "flat_memory"}
READ = Times(4.0, 2.0, 3.0, 1.0, 100, 0.0, ("captions", "arrays"))


def measured(ours=READ, resume=0.1, index=4.0):
    """The facts of one round in which flowray read so, and webdataset READ and skipped in 9 s."""
    passes = {
        way: {"flowray": [ours], "webdataset": [READ]}
        for way in ("cold", "first", "uncached", "pictures")
    }
    first, *_, last = QUICK.positions
    times = {first: [0.1], last: [resume]}
    resumes = {p: {"flowray": ours, "webdataset": [9.0]} for p, ours in times.items()}
    return facts(QUICK, passes, resumes, (1000, index, 0.5))


def test_a_round_of_small_sets_keeps_every_guard(capsys):
    assert main(["data", "--quick", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bench"] == "data"
    assert told["guards"] == dict.fromkeys(GUARDS, True)
    assert told["ratios"].keys() == RATIOS
    for ratio in told["ratios"].values():
        assert ratio["rounds"] == 1
        assert 0 < ratio["min"] == ratio["median"] == ratio["max"]
    assert told["cpu_ratios"].keys() == told["microseconds"].keys() == RATIOS - {"resume"}
    assert list(told["resume_s"]) == [str(p) for p in QUICK.positions]
    assert told["index"]["samples"] == QUICK.indexed
    for name, cost in told["microseconds"].items():
        assert cost["webdataset"] / cost["flowray"] == pytest.approx(told["ratios"][name]["median"])


def test_a_ratio_is_webdatasets_time_over_ours():
    told = measured(replace(READ, cold=0.5, warm=0.1, warm_cpu=0.25))
    assert told["guards"] == dict.fromkeys(GUARDS, True)
    ratios = {name: ratio["median"] for name, ratio in told["ratios"].items()}
    assert ratios == pytest.approx(
        {
            "cold_latents": 8.0,
            "first_latents": 8.0,
            "uncached_latents": 8.0,
            "warm_latents": 20.0,
            "pictures": 20.0,
            "resume": 90.0,
        }
    )
    assert told["cpu_ratios"]["warm_latents"]["median"] == 4.0
    assert told["microseconds"]["cold_latents"] == dict(zip(SIDES, (5000.0, 40000.0), strict=True))


@pytest.mark.parametrize(
    ("guards", "measurement"),
    [
        ({"equal_tensors"}, {"ours": replace(READ, digests=("captions", "others"))}),
        ({"equal_samples", "equal_tensors"}, {"ours": replace(READ, digests=("fewer", "others"))}),
        ({"resume_flat"}, {"resume": 0.3}),
        ({"index_memory"}, {"index": MOST_BYTES + 0.1}),
        ({"flat_memory"}, {"ours": replace(READ, grown=9.0)}),
    ],
)
def test_what_is_not_as_it_should_be_fails_its_guard(guards, measurement):
    told = measured(**measurement)["guards"]
    assert {name for name, holds in told.items() if not holds} == guards


def test_samples_that_fill_no_batches_are_refused():
    with pytest.raises(InputError, match="multiple of 256"):
        main(["data", "--samples", "1000"])
