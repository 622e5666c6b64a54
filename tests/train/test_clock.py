"""Step times where only logged steps are waited for."""

from __future__ import annotations

import time

import pytest

from flowray.train.clock import Clock


def test_means_since_the_last_row_with_the_fetch_and_without_what_lies_between() -> None:
    clock = Clock()
    for again in range(2):
        for _ in range(4):
            clock.start()
            time.sleep(0.01)
            clock.waited()
            time.sleep(0.01)
            clock.stepped()
        time.sleep(0.2)  # the row's numbers come when the device has done all four
        row = clock.row()
        assert row["perf/data_wait_s"] == pytest.approx(0.01, abs=0.02), again
        assert row["perf/step_s"] == pytest.approx((4 * 0.02 + 0.2) / 4, abs=0.03), again
        time.sleep(0.2)  # a probe
