"""Axes that read well: limits that one outlier does not stretch, ticks at round numbers, labels
that do not lie on each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from flowray.findings.checks import text as short
from flowray.report.paint import INK, MUTED
from flowray.report.results import spans_decades

# ticks of a decade, ever closer
SUBS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
TICKS = 3  # that an axis has at least
LINE = 0.055  # the height of a label, in axes


def ticks_between(low: float, high: float) -> list[float]:
    """Round numbers from low to high on a log axis, 0 < low < high, at least three; even ones
    where the range has too few of its own.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(decades) // 6)
    for subs in SUBS:
        marks = [sub * 10.0**decade for decade in decades[::every] for sub in subs]
        inside = [mark for mark in marks if low * (1 - 1e-9) <= mark <= high * (1 + 1e-9)]
        if len(inside) >= TICKS:
            return inside
    inside, slack = [], 1e-9 * (high - low)
    for bins in (5, 7, 9):
        even = MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        inside = [float(mark) for mark in even if low - slack <= mark <= high + slack]
        if len(inside) >= TICKS:
            break
    return inside


def fence(values: Iterable[float], *, log: bool = False, reach: float = 1.5) -> tuple[float, float]:
    """The least and greatest value that are no outliers (Tukey: farther from the quartiles than
    `reach` times their distance).
    """
    known = sorted(values)
    if len(known) < 5 or (log and known[0] <= 0):
        return (known[0], known[-1]) if known else (0.0, 1.0)
    scaled = np.log(known) if log else np.asarray(known)
    first, median, third = np.percentile(scaled, (25, 50, 75))
    far = max(reach * (third - first), 0.05 * (1.0 if log else abs(median)))
    inside = [
        value
        for value, place in zip(known, scaled, strict=True)
        if first - far <= place <= third + far
    ]
    return inside[0], inside[-1]


def reach_of(values: Sequence[float]) -> tuple[float, float, bool]:
    """Least and greatest value to show, and whether on a log axis: where the values spread over
    decades without their outliers.
    """
    log = spans_decades(values)
    low, high = fence(values, log=log)
    if log and not spans_decades([low, high]):
        return *fence(values), False
    return low, high, log


def limit(ax: Axes, low: float, high: float, *, log: bool = False) -> None:
    """Set the y axis from low to high, with a margin."""
    if log:
        edge = (high / low) ** 0.06 if high > low else 1.2
        ax.set_yscale("log", nonpositive="mask")
        ax.set_ylim(low / edge, high * edge)
    else:
        edge = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        ax.set_ylim(low - edge, high + edge)


def beyond(ax: Axes, y: float) -> bool:
    """Whether a point lies beyond the y axis."""
    low, high = ax.get_ylim()
    return not low <= y <= high


def mark_edges(ax: Axes, points: Iterable[tuple[float, float, str]]) -> None:
    """Mark the points (x, y, colour) that lie beyond the y axis at its edge, the farthest of each
    x with its value.
    """
    low, high = ax.get_ylim()
    found: dict[tuple[float, bool], tuple[float, str]] = {}
    for x, y, colour in points:
        if beyond(ax, y):
            far, _ = found.get((x, y > high), (y, colour))
            found[x, y > high] = (max(far, y) if y > high else min(far, y), colour)
    for (x, above), (far, colour) in found.items():
        edge = high if above else low
        ax.plot(x, edge, "^" if above else "v", color=colour, markersize=6, clip_on=False, zorder=5)
        right = ax.transAxes.inverted().transform(ax.transData.transform((x, edge)))[0] > 0.85
        where: dict[str, Any] = {
            "textcoords": "offset points",
            "ha": "right" if right else "left",
            "va": "center",
        }
        ax.annotate(
            short(far),
            (x, edge),
            (-6 if right else 6, 0),
            fontsize=7.5,
            annotation_clip=False,
            **where,
        )


def log_ticks(ax: Axes) -> None:
    """Plain round numbers on every log axis, once its limits stand."""
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        if axis.get_scale() == "log":
            axis.set_major_locator(FixedLocator(ticks_between(low, high)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
            axis.set_minor_formatter(NullFormatter())


def end_labels(ax: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Names beside the ends of curves, (name, x, y, colour) each, all of one x: spread where they
    would lie on each other, each then with a line to its end.
    """
    to_axes = ax.transData + ax.transAxes.inverted()
    places = sorted(
        (float(to_axes.transform((x, y))[1]), name, x, y, colour) for name, x, y, colour in ends
    )
    places = [place for place in places if 0 <= place[0] <= 1]
    if not places:
        return
    heights: list[float] = []
    for wanted, *_ in places:
        heights.append(max(wanted, heights[-1] + LINE) if heights else wanted)
    shift = float(np.mean(heights)) - float(np.mean([place[0] for place in places]))
    shift = min(max(shift, heights[-1] - 0.98), heights[0] - 0.02)  # inside the axes
    for height, (wanted, name, x, y, colour) in zip(heights, places, strict=True):
        at = height - shift
        moved = abs(at - wanted) > LINE / 3
        if moved:
            to_label = {
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "shrinkA": 0,
                "shrinkB": 2,
            }
            words: dict[str, Any] = {
                "xycoords": "data",
                "textcoords": ax.transAxes,
                "annotation_clip": False,
            }
            ax.annotate("", (x, y), (1.022, at), arrowprops=to_label, **words)
        where: dict[str, Any] = {
            "va": "center",
            "ha": "left",
            "fontsize": 8.5,
            "fontweight": "bold",
        }
        ax.text(
            1.026,
            at,
            name,
            transform=ax.transAxes,
            color=INK if colour == MUTED else colour,
            **where,
        )


def free_labels(
    ax: Axes,
    points: Mapping[str, tuple[float, float]],
    others: Sequence[tuple[float, float]],
    colour: str,
) -> None:
    """Names beside points, on the side where no other point or name lies; a name that has no such
    side is left out.
    """
    taken = [tuple(ax.transData.transform(point)) for point in others]
    for name, point in points.items():
        x, y = ax.transData.transform(point)
        half = 3.0 * len(name)  # of the name's width
        beside = [(side * (8 + half), rise) for rise in (0, 9, -9) for side in (1, -1)]
        for dx, dy in [*beside[:2], (0, 11), (0, -11), *beside[2:]]:
            free = all(abs(x + dx - a) > half + 5 or abs(y + dy - b) > 8 for a, b in taken)
            if (
                free
                and ax.bbox.contains(x + dx - half, y + dy)
                and ax.bbox.contains(x + dx + half, y + dy)
            ):
                taken.append((x + dx, y + dy))
                where: dict[str, Any] = {
                    "textcoords": "offset pixels",
                    "ha": "center",
                    "va": "center",
                    "fontsize": 8.5,
                }
                ax.annotate(name, point, (dx, dy), fontweight="bold", color=colour, **where)
                break
