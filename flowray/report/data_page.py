"""The page of a set of pictures with captions, from its figures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowray.report import figures
from flowray.report.page import Plot, make_plot, write_page


@dataclass(frozen=True)
class Sample:
    """A sample on the page. picture: a data URI; None, and why not."""

    key: str
    captions: Sequence[str]
    picture: str | None
    why: str


def write_data_page(
    path: Path, name: str, figures_of: Mapping[str, Any], samples: Sequence[Sample]
) -> Path:
    """Write the page and return its path. figures_of: a survey of flowray/data/survey.py, as JSON.

    InputError where it cannot be written.
    """
    context = {"name": name, "set": figures_of, "samples": samples, "shown": _plots(figures_of)}
    return write_page(path, "data.html.j2", context)


def _plots(told: Mapping[str, Any]) -> list[Plot]:
    found = [
        _histogram("pictures by shorter side", told["shorter_side"], "px"),
        _bars("pictures by width : height", told["aspects"], "the nearest of these"),
        _histogram("captions by length", told["characters"], "characters"),
        _histogram("captions by words", told["words"], "words, split at spaces"),
    ]
    return [plot for plot in found if plot]


def _histogram(title: str, told: Mapping[str, Any] | None, unit: str) -> Plot | None:
    if told is None:
        return None
    labels = [f"{start}" for start in told["starts"]]
    if told["greatest"] > told["starts"][-1]:
        labels[-1] += "+"
    what = f"from ... {unit}"
    return _bars(title, dict(zip(labels, told["counts"], strict=True)), what)


def _bars(title: str, counts: Mapping[str, int], xlabel: str) -> Plot | None:
    if not counts:
        return None
    svg = figures.bars(title, {"": list(counts.values())}, list(counts), None, xlabel)
    return make_plot(svg, f"{title}: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))
