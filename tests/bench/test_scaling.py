"""The model of many GPUs, and that docs/scaling.md shows what it gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scaling import Machine, Work, compared, page, sent_s, step

DOCS = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_the_documented_tables_are_those_that_the_model_gives() -> None:
    assert page(3.0) in DOCS.read_text()


def test_one_gpu_computes_alone_at_the_two_measured_times() -> None:
    for images, seconds in ((64, 0.163), (128, 0.275)):
        alone = step(1, images, Work(), Machine())
        assert alone.sent_s == alone.exposed_s == 0
        assert alone.compute_s == pytest.approx(seconds, rel=2e-2)


def test_a_network_that_hides_behind_the_step_scales_in_proportion() -> None:
    eight = step(8, 128, Work(), Machine())
    for gpus in (64, 512):
        many = step(gpus, 128, Work(), Machine())
        assert many.images_per_s == pytest.approx(gpus / 8 * eight.images_per_s)
        assert many.cost(Machine()) == pytest.approx(eight.cost(Machine()))


def test_a_slow_network_shows_what_the_step_does_not_cover() -> None:
    slow = compared(3.0)["100 Gbit/s a node"]
    work = Work(trained=1e9, blocks=1)
    sent = sent_s(16, work, slow, parts=False)
    # 8 GB: 7/8 of them within the node; half of an eighth between two nodes
    assert sent == pytest.approx(7e9 / slow.nvlink + 0.5e9 / slow.network + 2 * slow.latency_s)
    made = step(16, 128, work, slow)
    assert made.exposed_s == pytest.approx(sent - made.compute_s * 2 / 3)
    covered = step(16, 128, work, slow, parts=True)
    assert covered.exposed_s < made.exposed_s
