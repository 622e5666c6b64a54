"""perf/mfu and perf/memory_gb at given speeds, peaks and ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support import assert_refused, tiny_recipe

from flowray.config.errors import InputError
from flowray.model.flops import step_flops
from flowray.train.group import Group
from flowray.train.speed import PEAK, Speed, memory_gb, peak_of, peak_of_card
from flowray.train.state import fresh_state

CPU = torch.device("cpu")
CAPTIONS = ["a red circle", "a small blue square"]


def test_mfu_is_of_all_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_state(tiny_recipe(tmp_path), CPU).model
    assert "perf/mfu" not in Speed(model, CAPTIONS, Group(0, 1, CPU)).row(100.0)
    monkeypatch.setenv(PEAK, "2")
    prompts = sum(map(len, model.text.prompts.rows(CAPTIONS))) / 2
    counted = step_flops(model, prompts)
    assert counted is not None
    for world in (1, 2):
        row = Speed(model, CAPTIONS, Group(0, world, CPU)).row(100.0)
        assert row["perf/mfu"] == pytest.approx(100 * counted.model / (2e12 * world))
    assert "perf/mfu" not in Speed(model, [], Group(0, 1, CPU)).row(100.0)


def test_recomputed_work_is_no_model_work(tmp_path: Path) -> None:
    plain, again = (
        step_flops(
            fresh_state(
                tiny_recipe(tmp_path, **{"model.velocity.gradient_checkpointing": on}), CPU
            ).model,
            8,
        )
        for on in (False, True)
    )
    assert plain is not None
    assert again is not None
    assert plain.model == again.model
    assert plain.again == 0 < again.again < again.model / 3


@pytest.mark.parametrize("typed", ["fast", "0", "-3", "nan", "inf"])
def test_a_peak_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    monkeypatch.setenv(PEAK, typed)
    assert_refused(lambda: peak_of(CPU), InputError, f"{PEAK}: .*{typed}")


def test_cards_by_name() -> None:
    peaks = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA GeForce RTX 4090": 165e12,
        "Tesla T4": None,
    }
    assert {name: peak_of_card(name) for name in peaks} == peaks


def test_memory_is_the_most_so_far() -> None:
    held = torch.ones(2**26)
    page = os.sysconf("SC_PAGE_SIZE")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * page / 1e9
    assert 0.99 * resident < memory_gb(CPU) < os.sysconf("SC_PHYS_PAGES") * page / 1e9
    del held
    assert memory_gb(CPU) > 0.99 * resident
