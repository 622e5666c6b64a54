"""Pure functions from rows to pictures: matplotlib figures as SVG bytes, sample strips as PNG
tiles.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from flowray.config.rounding import finite
from flowray.findings.baselines import Baseline, baseline
from flowray.report.axes import (
    beyond,
    end_labels,
    fence,
    free_labels,
    limit,
    log_ticks,
    mark_edges,
    reach_of,
)
from flowray.report.paint import BLUE, CYCLE, INK, MUTED, PAPER, STYLE, themed
from flowray.report.results import Metric, Series, Trial, spans_decades

Points = Sequence[tuple[float, float]]
DASHES = ("-", "--", "-.", ":")
SMALL, WIDE = (4.1, 2.7), (9.4, 3.9)  # inches
LABELS = 8  # curve ends labelled
# of one run's curves, whose start is far from their end, only what is this far out is left at the
# edge
FAR = 6.0
CROSS: dict[str, Any] = {  # where a curve ended early
    "marker": "x",
    "linestyle": "none",
    "color": INK,
    "markersize": 6,
    "markeredgewidth": 1.5,
    "zorder": 4,
}
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

    still: what the best trial scores where its field stands still. A value far out is shown at
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
                ax.plot(steps[-1], values[-1], **CROSS)
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
            ax.plot([], [], label="ended early", **CROSS)
        if ax.get_legend_handles_labels()[0]:  # above the frame: inside it lie levels and curves
            ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, ncols=2)

    return _svg(title, WIDE, draw)


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
        wide = spans_decades([a for a, _ in known.values()])
        left, right = fence([a for a, _ in known.values()], log=wide)
        left, right = min([left, *(a for a, _ in ends)]), max([right, *(a for a, _ in ends)])
        if wide:
            margin = (right / left) ** 0.08
            ax.set_xscale("log")
            ax.set_xlim(left / margin, right * margin)
        else:
            margin = 0.08 * (right - left) or 0.1
            ax.set_xlim(left - margin, right + margin)
        for trial, (a, b) in known.items():
            whole = trial.status == "finished"
            colour = BLUE if trial in front else MUTED
            if beyond(ax, b):
                mark_edges(ax, [(min(max(a, left), right), b, colour)])
                continue
            if not left <= a <= right:
                first, last = ax.get_xlim()
                side, edge = (">", last) if a > right else ("<", first)
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
