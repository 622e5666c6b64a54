"""Pure functions from rows to pictures: matplotlib figures as SVG bytes, sample strips as PNG tiles.

Colours are Okabe and Ito's, told apart with any colour vision; shape and line style say the same thing again.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from flowray.findings.baselines import Baseline, baseline
from flowray.report.load import Metric, Series, Trial, finite, numeric, spans_decades

BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
Points = Sequence[tuple[float, float]]
INK, MUTED, GRID = "#334155", "#94a3b8", "#e5e9f0"
CYCLE = (BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY, INK)
DASHES = ("-", "--", "-.", ":")
SMALL, WIDE = (4.1, 2.7), (9.4, 3.9)  # inches
LABELS = 8  # curve ends labelled at one step
TILE = 256  # px; larger pictures are inlined at this size
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a `$` in a parameter value is a dollar
    "svg.hashsalt": "flowray",  # equal rows give equal bytes
}


_BETTER = {"minimize": "lower is better", "maximize": "higher is better"}


def value_text(value: Any) -> str:
    """A parameter value in few characters."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)


def lines(
    title: str, curves: Mapping[str, Points], *, log: bool = False, base: Baseline | None = None, xlabel: str = "step", marks: int = 12
) -> bytes:
    """One panel of named curves over steps or, with an `xlabel`, over anything; `log` for a log y axis, without values <= 0.

    marks: curves of fewer points get markers.
    """

    def draw(ax: Axes) -> None:
        for index, (name, points) in enumerate(curves.items()):
            steps, values = zip(*points, strict=True)
            style = DASHES[index % len(DASHES)]
            marker = "o" if len(points) < marks else ""
            ax.plot(steps, values, style, marker=marker, markersize=3, color=CYCLE[index % len(CYCLE)], label=name)
        if log:
            _log(ax, "y")
        if base:
            _baseline(ax, base)
        if xlabel == "step":
            _step_axis(ax)
        else:
            ax.set_xlabel(xlabel)
        if len(curves) > 1 and ax.figure is not None:  # below the axes: inside, it would lie on the curves
            long = max(map(len, curves)) > 14
            ax.figure.legend(loc="outside lower center", ncols=min(len(curves), 2 if long else 4), columnspacing=1.2, handlelength=1.8)

    return _svg(title, SMALL, draw)


def sweep_curves(title: str, trials: Sequence[Trial], best: Trial | None, key: str) -> bytes:
    """The metric over steps of every trial (best first), an x where one stopped early, the best one and the next four in colour."""
    curves = {trial: _curve(trial, key) for trial in trials}
    drawn = [trial for trial in trials if curves[trial]]
    order = sorted(drawn, key=lambda trial: trial is not best)  # the best first, the rest as ranked
    colours = {trial: CYCLE[rank] if rank < 5 else MUTED for rank, trial in enumerate(order)}

    def draw(ax: Axes) -> None:
        for rank, trial in reversed(list(enumerate(order))):
            steps, values = zip(*curves[trial], strict=True)
            style = DASHES[rank % len(DASHES)] if rank < 5 else "-"
            width = 2.4 if trial is best else 1.4 if rank < 5 else 0.9
            ax.plot(steps, values, style, color=colours[trial], linewidth=width, zorder=3 if rank < 5 else 2)
            if trial.status in ("stopped", "failed"):
                ax.plot(steps[-1], values[-1], "x", color=INK, markersize=7, markeredgewidth=1.8, zorder=4)
        if spans_decades([value for points in curves.values() for _, value in points]):
            _log(ax, "y")
        if base := baseline(key):
            _baseline(ax, base)
        _step_axis(ax)
        _end_labels(ax, {trial: curves[trial][-1] for trial in order}, colours)
        if any(trial.status in ("stopped", "failed") for trial in order):
            ax.plot([], [], "x", color=INK, markersize=7, markeredgewidth=1.8, label="ended early")
            ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)  # above the frame: inside it lie levels and curves

    return _svg(title, WIDE, draw)


def slice_panel(param: str, trials: Sequence[Trial], best: Trial | None, key: str, *, log: bool = False) -> bytes:
    """The metric's last value over one parameter: an axis for numbers, logarithmic if `log`, a strip for the rest."""
    points = [(trial, trial.params[param], value) for trial in trials if param in trial.params and (value := trial.value(key)) is not None]
    raw = [value for _, value, _ in points]
    continuous = numeric(raw)
    names = sorted({value_text(value) for value in raw})

    def place(value: Any, index: int) -> float:
        if continuous:
            return float(value)
        return names.index(value_text(value)) + (0.0, -0.12, 0.12, -0.06, 0.06)[index % 5]  # a strip: spread, not drawn at random

    def draw(ax: Axes) -> None:
        for index, (trial, value, score) in enumerate(points):
            whole = trial.status in ("finished", "running")
            colour = VERMILLION if trial is best else BLUE if whole else MUTED
            size, marker = (90, "*") if trial is best else (34, "o" if whole else "x")
            edge, above = 1.6 if marker == "x" else 0.5, 4 if trial is best else 3
            ax.scatter(place(value, index), score, s=size, c=colour, marker=marker, linewidths=edge, zorder=above)
        if spans_decades([score for *_, score in points]):
            _log(ax, "y")
        if not continuous:
            ax.set_xticks(range(len(names)), [name if len(name) < 15 else name[:13] + "…" for name in names])
            ax.set_xlim(-0.6, len(names) - 0.4)
        elif log:
            _log(ax, "x")
        ax.set_xlabel(param)
        ax.set_ylabel(key)

    return _svg("", SMALL, draw)


@dataclass(frozen=True)
class Axis:
    """One axis of parallel coordinates: its values for the trials that have one, of which null is one; log: spaced by the logarithm."""

    name: str
    values: Mapping[Trial, Any]
    log: bool = False
    upside_down: bool = False

    def places(self) -> tuple[dict[Trial, float], list[tuple[float, str]]]:
        """Where each trial crosses, 0 to 1, and the ticks (place, text)."""
        known = self.values
        if not numeric(known.values()) or not known:
            names = sorted({value_text(value) for value in known.values()})
            gap = max(len(names) - 1, 1)
            at = {name: 0.5 if len(names) == 1 else index / gap for index, name in enumerate(names)}
            return {trial: at[value_text(value)] for trial, value in known.items()}, [(place, name) for name, place in at.items()]
        numbers = {trial: math.log(value) if self.log else float(value) for trial, value in known.items()}
        low, high = min(numbers.values()), max(numbers.values())
        span = (high - low) or 1.0

        def place(number: float) -> float:
            return (high - number if self.upside_down else number - low) / span if high > low else 0.5

        marks = sorted({low + span * share for share in (0, 0.25, 0.5, 0.75, 1)}) if high > low else [low]
        ticks = [(place(mark), f"{math.exp(mark) if self.log else mark:.2g}") for mark in marks]
        return {trial: place(number) for trial, number in numbers.items()}, ticks


def parallel(axes: Sequence[Axis], order: Sequence[Trial], best: Trial | None) -> bytes:
    """Parallel coordinates: a line for each trial (`order`: best first) through all axes, the last one the metric, its best end on top.

    The best and the next four in colour, thin and dashed where a trial was stopped; a trial without a value on an axis crosses below it.
    """
    ranked = sorted(order, key=lambda trial: trial is not best)

    def draw(ax: Axes) -> None:
        crossings = []
        for x, axis in enumerate(axes):
            places, ticks = axis.places()
            crossings.append(places)
            ax.plot([x, x], [0, 1], color=INK, linewidth=1, zorder=2)
            for y, text in ticks:
                ax.plot([x - 0.015, x + 0.015], [y, y], color=INK, linewidth=1, zorder=2)
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.4}
                text = text if len(text) < 13 else text[:11] + "…"
                ax.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8, bbox=box, zorder=5)
        for rank, trial in reversed(list(enumerate(ranked))):
            ys = [places.get(trial, -0.1) for places in crossings]
            colour = CYCLE[rank] if rank < 5 else MUTED
            style = "-" if trial.status in ("finished", "running") else (0, (3, 2))
            ax.plot(
                range(len(axes)), ys, linestyle=style, color=colour, linewidth=2.4 if trial is best else 1.2 if rank < 5 else 0.8, zorder=4
            )
        height = 2.0
        for rank, trial in sorted(enumerate(ranked[:5]), key=lambda item: -crossings[-1][item[1]]):
            height = min(crossings[-1][trial], height - 0.045)  # from the top down, none on another
            where: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8.5, "fontweight": "bold"}
            ax.annotate(f"{trial.number}", (len(axes) - 1, height), (34, 0), color=CYCLE[rank], **where)
        ax.set_xticks(range(len(axes)), [_two_lines(axis.name) for axis in axes], fontsize=8.5)
        ax.set_yticks([])
        ax.set_xlim(-0.15, len(axes) - 0.5)
        ax.set_ylim(-0.15 if any(len(places) < len(ranked) for places in crossings) else -0.05, 1.05)
        ax.grid(visible=False)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        ax.tick_params(length=0)

    return _svg("", (max(WIDE[0], 1.25 * len(axes)), 4.0), draw)


def _two_lines(key: str) -> str:
    """A long dotted key broken before its last part."""
    if len(key) < 12:
        return key
    cut = max(key.rfind("."), key.rfind("/")) + 1
    return f"{key[:cut]}\n{key[cut:]}" if cut else key


def pareto(trials: Sequence[Trial], front: Sequence[Trial], x: Metric, y: Metric, *, joined: bool = True) -> bytes:
    """Two metrics of all trials against each other, each of the front's with its number; `joined`: the edge of what was reached."""

    def draw(ax: Axes) -> None:
        points = {trial: (trial.value(x.name), trial.value(y.name)) for trial in trials}
        known = {trial: (a, b) for trial, (a, b) in points.items() if a is not None and b is not None}
        for trial, (a, b) in known.items():
            whole = trial.status == "finished"
            colour = BLUE if trial in front else MUTED
            ax.scatter(a, b, s=34, c=colour, marker="o" if whole else "x", linewidths=0.5 if whole else 1.4, zorder=3)
        edge = sorted(known[trial] for trial in front if trial in known)
        if edge and joined:  # a stair: no trial was seen to reach what a straight line would promise
            steps = "steps-post" if x.goal == "minimize" else "steps-pre"
            ax.plot(*zip(*edge, strict=True), color=BLUE, linewidth=1.2, zorder=2, drawstyle=steps)
        left, down = x.goal == "minimize", y.goal == "minimize"  # the better side has neither stair nor points
        where: dict[str, Any] = {"textcoords": "offset points", "ha": "right" if left else "left", "va": "top" if down else "bottom"}
        for trial in front:
            offset = (-3 if left else 3, -2 if down else 2)
            ax.annotate(str(trial.number), known[trial], offset, fontsize=8.5, fontweight="bold", color=BLUE, **where)
        ax.set_xlabel(f"{x.name}, {_BETTER[x.goal]}")
        ax.set_ylabel(f"{y.name}\n{_BETTER[y.goal]}")
        ax.margins(0.1)

    return _svg("", (SMALL[0], 3.2), draw)  # as wide as its neighbours: a wider one's text would come out smaller


def bars(title: str, groups: Mapping[str, Sequence[float | None]], labels: Sequence[str], base: Baseline | None, xlabel: str) -> bytes:
    """Bars side by side, one of each group for each label; a missing value is no bar. A baseline of 0 is the axis itself."""

    def draw(ax: Axes) -> None:
        width = 0.8 / max(len(groups), 1)
        for index, (name, values) in enumerate(groups.items()):
            at = np.arange(len(labels)) + (index - (len(groups) - 1) / 2) * width
            heights = [np.nan if value is None else value for value in values]
            ax.bar(at, heights, width * 0.9, color=CYCLE[index], hatch="//" if index else None, edgecolor="white", label=name)
        if base and base.value:
            _baseline(ax, base)
        ax.set_xticks(range(len(labels)), labels)
        ax.set_xlabel(xlabel)
        if len(groups) > 1:
            ax.set_ylim(top=ax.get_ylim()[1] * 1.15)  # room for the legend
            ax.legend(ncols=2, loc="upper left")

    return _svg(title, SMALL, draw)


def shares(values: Mapping[str, float]) -> bytes:
    """Horizontal bars of shares that sum to 1, in the order given, from the top."""

    def draw(ax: Axes) -> None:
        names = list(values)[::-1]
        ax.barh(names, [values[name] for name in names], height=0.6, color=BLUE)
        for row, name in enumerate(names):
            ax.annotate(f"{values[name]:.0%}", (values[name], row), (4, 0), textcoords="offset points", va="center", fontsize=8)
        ax.set_xlim(0, max(values.values()) * 1.15)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
        ax.grid(visible=False, axis="y")

    return _svg("", (SMALL[0], 0.7 + 0.32 * len(values)), draw)


def tiles(strip: Path) -> list[bytes]:
    """The pictures of a strip, left to right, each as PNG bytes; [] when the file cannot be read as a strip.

    A strip is (S, N * S) pixels; pictures larger than TILE are scaled down to it.
    """
    try:
        with Image.open(strip) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError):  # Pillow reports a broken PNG as any of these
        return []
    side = image.height
    return [png(image.crop((left, 0, left + side, side))) for left in range(0, image.width - side + 1, side)]


def png(picture: Image.Image) -> bytes:
    """A picture as PNG bytes, at most TILE wide."""
    if picture.width > TILE:
        picture = picture.resize((TILE, TILE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _svg(title: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> bytes:
    """Draw on the only axes of a new figure."""
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        ax = figure.add_subplot()
        draw(ax)
        ax.set_title(title)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _curve(trial: Trial, key: str) -> Series:
    """The trial's curve; without its rows, the one value of its record."""
    last = finite(trial.metrics.get(key))
    return trial.run.series(key) or ([(trial.last_step, last)] if last is not None else [])


def _step_axis(ax: Axes) -> None:
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.margins(x=0.02)


def _log(ax: Axes, which: str) -> None:
    """A log axis with plain numbers, marked at 1, 2 and 5 where it spans few decades."""
    axis = ax.yaxis if which == "y" else ax.xaxis
    if which == "y":
        ax.set_yscale("log", nonpositive="mask")
        low, high = ax.get_ylim()
    else:
        ax.set_xscale("log", nonpositive="mask")
        low, high = ax.get_xlim()
    decades = np.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _baseline(ax: Axes, base: Baseline) -> None:
    ax.axhline(base.value, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "zorder": 2.5}
    ax.annotate(f"{base.value:g}: {base.words}", (0.96, base.value), (0, 3), fontsize=7.5, bbox=box, **where)


def _end_labels(ax: Axes, ends: Mapping[Trial, tuple[int, float]], colours: Mapping[Trial, str]) -> None:
    """Trial numbers at the ends of the curves (`ends`: best first), those of one step spread around their marks, at most LABELS of them."""
    to_axes = ax.transData + ax.transAxes.inverted()
    where: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "center"}
    for step in {step for step, _ in ends.values()}:
        ranked = [(float(to_axes.transform(end)[1]), trial.number, colours[trial]) for trial, end in ends.items() if end[0] == step]
        column = sorted(ranked[:LABELS])
        heights: list[float] = []
        for wanted, _, _ in column:
            heights.append(max(wanted, heights[-1] + 0.055) if heights else wanted)
        shift = float(np.mean(heights)) - float(np.mean([wanted for wanted, _, _ in column]))
        shift = min(max(shift, heights[-1] - 0.98), heights[0] - 0.02)  # inside the axes
        for height, (_, number, colour) in zip(heights, column, strict=True):
            colour = INK if colour == MUTED else colour
            ax.annotate(f"{number}", (step, height - shift), (7, 0), color=colour, fontsize=8.5, fontweight="bold", **where)
