"""How well a training uses its machine: MFU, and the most memory it had."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence

import torch

from flowray.config.errors import InputError
from flowray.model.assemble import FlowModel
from flowray.model.flops import step_flops
from flowray.train.group import Group

PEAK = "FLOWRAY_PEAK_TFLOPS"  # of one device, for those that are not in the table
# dense bf16 products, TFLOP/s, by the vendor's data sheets; the first name that fits
PEAKS = {
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "4090": 165.0,
}


def peak_of(device: torch.device) -> float | None:
    """The device's peak in operations a second: what FLOWRAY_PEAK_TFLOPS says, else a known card's;
    None of others and of a CPU. InputError where the variable is no number above 0.
    """
    if typed := os.environ.get(PEAK):
        try:
            peak = float(typed)
        except ValueError:
            peak = 0.0
        if not 0 < peak < float("inf"):
            raise InputError(f"{PEAK}: want a number of TFLOP/s above 0, got {typed!r}")
        return peak * 1e12
    return peak_of_card(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of_card(name: str) -> float | None:
    """Of a card by its name."""
    return next((peak * 1e12 for card, peak in PEAKS.items() if card in name), None)


def memory_gb(device: torch.device) -> float:
    """The most that this process has had so far, in 10^9 bytes: allocated on its GPU, else resident
    on the host.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


class Speed:
    """perf/mfu, where the peak and all of the model are known, and perf/memory_gb of this rank.

    captions: as the run trains on; the mean of their lengths in tokens counts, padding does not.
    """

    def __init__(self, model: FlowModel, captions: Sequence[str], group: Group):
        self._device, self._flops = group.device, None
        peak = peak_of(group.device)
        rows = model.text.prompts.rows(captions) if peak and captions else []
        if peak and rows:
            counted = step_flops(model, sum(map(len, rows)) / len(rows))
            if counted is not None:
                self._flops = counted.model / (peak * group.world)

    def row(self, images_per_s: float) -> dict[str, float]:
        """At a speed of so many images a second, of all ranks together."""
        row = {"perf/memory_gb": memory_gb(self._device)}
        if self._flops is not None:
            row["perf/mfu"] = images_per_s * self._flops
        return row
