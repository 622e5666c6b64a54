"""Pure functions from rows to pictures: matplotlib figures as SVG bytes, sample strips as PNG
tiles.
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
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from flowray.findings.baselines import Baseline, baseline
from flowray.findings.checks import text as short
from flowray.report.axes import (
    LINE,
    beyond,
    end_labels,
    fence,
    free_labels,
    limit,
    log_ticks,
    mark_edges,
    reach_of,
    ticks_between,
)
from flowray.report.load import Metric, Series, Trial, finite, numeric
from flowray.report.paint import BLUE, CYCLE, INK, MUTED, PAPER, STYLE, VERMILLION, themed

Points = Sequence[tuple[float, float]]
DASHES = ("-", "--", "-.", ":")
SMALL, WIDE = (4.1, 2.7), (9.4, 3.9)  # inches
LABELS = 8  # curve ends labelled
# of one run's curves, whose start is far from their end, only what is this far out is left at the
# edge
FAR = 6.0
TILE = 256  # px; larger pictures are inlined at this size
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
    title: str,
    curves: Mapping[str, Points],
    *,
    log: bool = False,
    base: Baseline | None = None,
    xlabel: str = "step",
    marks: int = 12,
) -> bytes:
    """One panel of named curves over steps or, with an `xlabel`, over anything; `log` for a log y
    axis, without values <= 0.

    marks: curves of fewer points get markers.
    """

    def draw(ax: Axes) -> None:
        for index, (name, points) in enumerate(curves.items()):
            steps, values = zip(*points, strict=True)
            style = DASHES[index % len(DASHES)]
            marker = "o" if len(points) < marks else ""
            ax.plot(
                steps,
                values,
                style,
                marker=marker,
                markersize=3,
                color=CYCLE[index % len(CYCLE)],
                label=name,
            )
        known = [value for points in curves.values() for _, value in points if value > 0 or not log]
        low, high = fence(known, log=log, reach=FAR)
        if base and not log:
            low, high = min(low, base.value), max(high, base.value)
        limit(ax, low, high, log=log)
        for index, points in enumerate(curves.values()):
            out = [
                (step, value)
                for step, value in points
                if beyond(ax, value) and (value > 0 or not log)
            ]
            if out:  # of many the farthest
                mark_edges(
                    ax, [(*max(out, key=lambda point: abs(point[1])), CYCLE[index % len(CYCLE)])]
                )
        if base:
            _baseline(ax, base)
        if xlabel == "step":
            _step_axis(ax)
        else:
            ax.set_xlabel(xlabel)
        # below the axes: inside, it would lie on the curves
        if len(curves) > 1 and ax.figure is not None:
            long = max(map(len, curves)) > 14
            ax.figure.legend(
                loc="outside lower center",
                ncols=min(len(curves), 2 if long else 4),
                columnspacing=1.2,
                handlelength=1.8,
            )

    return _svg(title, SMALL, draw)


def sweep_curves(
    title: str,
    trials: Sequence[Trial],
    best: Trial | None,
    key: str,
    still: Sequence[tuple[int, float]] = (),
) -> bytes:
    """The metric over steps of every trial (best first), an x where one stopped early, the best
    one and the next four in colour.

    still: what the best trial scores where its field stands still. A value far out is marked at
    the edge.
    """
    curves = {trial: _curve(trial, key) for trial in trials}
    drawn = [trial for trial in trials if curves[trial]]
    order = sorted(drawn, key=lambda trial: trial is not best)  # the best first, the rest as ranked
    colours = {trial: CYCLE[rank] if rank < 5 else MUTED for rank, trial in enumerate(order)}
    values = [value for points in curves.values() for _, value in points]
    low, high, log = reach_of(values)
    base = baseline(key)
    if base and not log:
        low, high = min(low, base.value), max(high, base.value)
    low, high = (
        min([low, *(value for _, value in still)]),
        max([high, *(value for _, value in still)]),
    )

    def draw(ax: Axes) -> None:
        limit(ax, low, high, log=log)
        for rank, trial in reversed(list(enumerate(order))):
            steps, values = zip(*curves[trial], strict=True)
            style = DASHES[rank % len(DASHES)] if rank < 5 else "-"
            width = 2.4 if trial is best else 1.4 if rank < 5 else 0.9
            ax.plot(
                steps,
                values,
                style,
                color=colours[trial],
                linewidth=width,
                zorder=3 if rank < 5 else 2,
            )
            early = trial.status in ("stopped", "waiting", "failed")
            if early and not beyond(ax, values[-1]):
                ax.plot(
                    steps[-1],
                    values[-1],
                    "x",
                    color=INK,
                    markersize=6,
                    markeredgewidth=1.5,
                    zorder=4,
                )
        mark_edges(ax, [(*curves[trial][-1], INK) for trial in order])
        if base:
            _baseline(ax, base)
        if still and best is not None:
            ax.plot(
                *zip(*still, strict=True),
                ":",
                color=INK,
                linewidth=1.6,
                zorder=4,
                label=f"trial {best.number} without its flow",
            )
        _step_axis(ax)
        last = max(curves[trial][-1][0] for trial in order)
        whole = [trial for trial in order if curves[trial][-1][0] == last][:LABELS]
        end_labels(ax, [(f"{trial.number}", *curves[trial][-1], colours[trial]) for trial in whole])
        if any(trial.status in ("stopped", "waiting", "failed") for trial in order):
            ax.plot(
                [],
                [],
                "x",
                color=INK,
                markersize=6,
                markeredgewidth=1.5,
                linestyle="none",
                label="ended early",
            )
        if ax.get_legend_handles_labels()[0]:  # above the frame: inside it lie levels and curves
            ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, ncols=2)

    return _svg(title, WIDE, draw)


def slice_panel(
    param: str, trials: Sequence[Trial], best: Trial | None, key: str, *, log: bool = False
) -> bytes:
    """The metric's last value over one parameter: an axis for numbers, logarithmic if `log`, a
    strip for the rest.
    """
    points = [
        (trial, trial.params[param], value)
        for trial in trials
        if param in trial.params and (value := trial.value(key)) is not None
    ]
    raw = [value for _, value, _ in points]
    continuous = numeric(raw)
    names = sorted({value_text(value) for value in raw})

    def place(value: Any, index: int) -> float:
        if continuous:
            return float(value)
        # a strip: spread, not drawn at random
        return names.index(value_text(value)) + (0.0, -0.12, 0.12, -0.06, 0.06)[index % 5]

    scores = [score for *_, score in points]

    def draw(ax: Axes) -> None:
        low, high, tall = reach_of(scores)
        limit(ax, low, high, log=tall)
        for index, (trial, value, score) in enumerate(points):
            whole = trial.status in ("finished", "running")
            colour = VERMILLION if trial is best else BLUE if whole else MUTED
            size, marker = (90, "*") if trial is best else (34, "o" if whole else "x")
            edge, above = 1.6 if marker == "x" else 0.5, 4 if trial is best else 3
            if beyond(ax, score):
                mark_edges(ax, [(place(value, index), score, colour)])
            else:
                ax.scatter(
                    place(value, index),
                    score,
                    s=size,
                    c=colour,
                    marker=marker,
                    linewidths=edge,
                    zorder=above,
                )
        if not continuous:
            ax.set_xticks(
                range(len(names)), [name if len(name) < 15 else name[:13] + "…" for name in names]
            )
            ax.set_xlim(-0.6, len(names) - 0.4)
        elif log:
            ax.set_xscale("log", nonpositive="mask")
        ax.set_xlabel(param)
        ax.set_ylabel(key)

    return _svg("", SMALL, draw)


@dataclass(frozen=True)
class Axis:
    """One axis of parallel coordinates: its values for the trials that have one, of which null is
    one; log: spaced by the logarithm.

    robust: outliers lie at its end.
    """

    name: str
    values: Mapping[Trial, Any]
    log: bool = False
    upside_down: bool = False
    robust: bool = False

    def places(self) -> tuple[dict[Trial, float], list[tuple[float, str]]]:
        """Where each trial crosses, 0 to 1, and the ticks (place, text)."""
        known = self.values
        if not numeric(known.values()) or not known:
            names = sorted({value_text(value) for value in known.values()})
            gap = max(len(names) - 1, 1)
            at = {name: 0.5 if len(names) == 1 else index / gap for index, name in enumerate(names)}
            return {trial: at[value_text(value)] for trial, value in known.items()}, [
                (place, name) for name, place in at.items()
            ]
        low, high = (
            fence(known.values(), log=self.log)
            if self.robust
            else (min(known.values()), max(known.values()))
        )
        scale: Callable[[float], float] = math.log if self.log else float

        def place(value: float) -> float:
            if not high > low:
                return 0.5
            share = (scale(min(max(value, low), high)) - scale(low)) / (scale(high) - scale(low))
            return 1 - share if self.upside_down else share

        ticks = {place(mark): short(mark) for mark in ticks_between(low, high, log=self.log)}
        beyond = [
            (end, f"{sign} {short(end)}")
            for end, sign, far in (
                (low, "≤", min(known.values())),
                (high, "≥", max(known.values())),
            )
            if far != end
        ]
        near = [place(end) for end, _ in beyond]
        ticks = {
            at: said for at, said in ticks.items() if all(abs(at - end) > LINE for end in near)
        }
        ticks |= {place(end): said for end, said in beyond}
        return {trial: place(value) for trial, value in known.items()}, sorted(ticks.items())


def parallel(axes: Sequence[Axis], order: Sequence[Trial], best: Trial | None) -> bytes:
    """Parallel coordinates: a line for each trial (`order`: best first) through all axes, the last
    one the metric, its best end on top.

    The best and the next four in colour, thin and dashed where a trial was stopped; a trial without
    a value on an axis crosses below it.
    """
    ranked = sorted(order, key=lambda trial: trial is not best)

    def draw(ax: Axes) -> None:
        crossings = []
        for x, axis in enumerate(axes):
            places, ticks = axis.places()
            crossings.append(places)
            ax.plot([x, x], [0, 1], color=INK, linewidth=1, zorder=2)
            last = x == len(axes) - 1  # whose right side is the trials'
            for y, text in ticks:
                ax.plot([x - 0.015, x + 0.015], [y, y], color=INK, linewidth=1, zorder=2)
                box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.4}
                text = text if len(text) < 13 else text[:11] + "…"
                where: dict[str, Any] = {
                    "textcoords": "offset points",
                    "va": "center",
                    "fontsize": 8,
                    "zorder": 5,
                }
                ax.annotate(
                    text,
                    (x, y),
                    (-5 if last else 5, 0),
                    ha="right" if last else "left",
                    bbox=box,
                    **where,
                )
        for rank, trial in reversed(list(enumerate(ranked))):
            ys = [places.get(trial, -0.1) for places in crossings]
            colour = CYCLE[rank] if rank < 5 else MUTED
            style = "-" if trial.status in ("finished", "running") else (0, (3, 2))
            ax.plot(
                range(len(axes)),
                ys,
                linestyle=style,
                color=colour,
                linewidth=2.4 if trial is best else 1.2 if rank < 5 else 0.8,
                zorder=4,
            )
        height, end = 2.0, len(axes) - 1
        for rank, trial in sorted(enumerate(ranked[:5]), key=lambda item: -crossings[-1][item[1]]):
            height = min(crossings[-1][trial], height - 0.05)  # from the top down, none on another
            ax.plot(
                [end, end + 0.3],
                [crossings[-1][trial], height],
                color=CYCLE[rank],
                linewidth=0.7,
                zorder=3,
            )
            bold: dict[str, Any] = {"va": "center", "fontsize": 8.5, "fontweight": "bold"}
            ax.text(end + 0.32, height, f"{trial.number}", color=CYCLE[rank], **bold)
        ax.set_xticks(range(len(axes)), [_two_lines(axis.name) for axis in axes], fontsize=8.5)
        ax.set_yticks([])
        ax.set_xlim(-0.15, len(axes) - 0.5)
        ax.set_ylim(
            -0.15 if any(len(places) < len(ranked) for places in crossings) else -0.05, 1.05
        )
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


def pareto(
    trials: Sequence[Trial], front: Sequence[Trial], x: Metric, y: Metric, *, joined: bool = True
) -> bytes:
    """Two metrics of all trials against each other, each of the front's with its number;
    `joined`: the edge of what was reached.
    """

    def draw(ax: Axes) -> None:
        points = {trial: (trial.value(x.name), trial.value(y.name)) for trial in trials}
        known = {
            trial: (a, b) for trial, (a, b) in points.items() if a is not None and b is not None
        }
        ends = [known[trial] for trial in front if trial in known]  # the front is shown whole
        low, high = fence([b for _, b in known.values()])
        limit(ax, min([low, *(b for _, b in ends)]), max([high, *(b for _, b in ends)]))
        left, right = fence([a for a, _ in known.values()])
        left, right = min([left, *(a for a, _ in ends)]), max([right, *(a for a, _ in ends)])
        margin = 0.08 * (right - left) or 0.1
        ax.set_xlim(left - margin, right + margin)
        for trial, (a, b) in known.items():
            whole = trial.status == "finished"
            colour = BLUE if trial in front else MUTED
            if beyond(ax, b):
                mark_edges(ax, [(min(max(a, left), right), b, colour)])
                continue
            if not left <= a <= right:
                side, edge = (">", right + margin) if a > right else ("<", left - margin)
                ax.plot(edge, b, side, color=colour, markersize=6, clip_on=False, zorder=5)
                continue
            ax.scatter(
                a,
                b,
                s=34,
                c=colour,
                marker="o" if whole else "x",
                linewidths=0.5 if whole else 1.4,
                zorder=3,
            )
        stair = sorted(known[trial] for trial in front if trial in known)
        # a stair: no trial was seen to reach what a straight line would promise
        if stair and joined:
            steps = "steps-post" if x.goal == "minimize" else "steps-pre"
            ax.plot(*zip(*stair, strict=True), color=BLUE, linewidth=1.2, zorder=2, drawstyle=steps)
        free_labels(
            ax, {str(trial.number): known[trial] for trial in front}, list(known.values()), BLUE
        )
        ax.set_xlabel(f"{x.name}, {_BETTER[x.goal]}")
        ax.set_ylabel(f"{y.name}\n{_BETTER[y.goal]}")

    # as wide as its neighbours: a wider one's text would come out smaller
    return _svg("", (SMALL[0], 3.2), draw)


def bars(
    title: str,
    groups: Mapping[str, Sequence[float | None]],
    labels: Sequence[str],
    base: Baseline | None,
    xlabel: str,
) -> bytes:
    """Bars side by side, one of each group for each label; a missing value is no bar. A baseline
    of 0 is the axis itself.
    """

    def draw(ax: Axes) -> None:
        width = 0.8 / max(len(groups), 1)
        for index, (name, values) in enumerate(groups.items()):
            at = np.arange(len(labels)) + (index - (len(groups) - 1) / 2) * width
            heights = [np.nan if value is None else value for value in values]
            ax.bar(
                at,
                heights,
                width * 0.9,
                color=CYCLE[index],
                hatch="//" if index else None,
                edgecolor=PAPER,
                label=name,
            )
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
            ax.annotate(
                f"{values[name]:.0%}",
                (values[name], row),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        ax.set_xlim(0, max(values.values()) * 1.15)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
        ax.grid(visible=False, axis="y")

    return _svg("", (SMALL[0], 0.7 + 0.32 * len(values)), draw)


def tiles(strip: Path) -> list[bytes]:
    """The pictures of a strip, left to right, each as PNG bytes; [] when the file cannot be read as
    a strip.

    A strip is (S, N * S) pixels; pictures larger than TILE are scaled down to it.
    """
    try:
        with Image.open(strip) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError):  # Pillow reports a broken PNG as any of these
        return []
    side = image.height
    return [
        png(image.crop((left, 0, left + side, side)))
        for left in range(0, image.width - side + 1, side)
    ]


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
        log_ticks(ax)
        ax.set_title(title, pad=10)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return themed(buffer.getvalue())


def _curve(trial: Trial, key: str) -> Series:
    """The trial's curve; without its rows, the one value of its record."""
    last = finite(trial.metrics.get(key))
    return trial.run.series(key) or ([(trial.last_step, last)] if last is not None else [])


def _step_axis(ax: Axes) -> None:
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.margins(x=0.02)


def _baseline(ax: Axes, base: Baseline) -> None:
    ax.axhline(base.value, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
    low, high = sorted(ax.get_ylim())
    if not low <= base.value <= high:
        return
    box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    where: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "textcoords": "offset points",
        "ha": "right",
        "zorder": 2.5,
    }
    ax.annotate(
        f"{base.value:g}: {base.words}", (0.96, base.value), (0, 3), fontsize=7.5, bbox=box, **where
    )
