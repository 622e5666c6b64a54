"""Regenerate docs/benchmarks/autoscaling.md and its picture: real sweeps on a cluster that grows,
shrinks and loses a node.

    python tests/cluster/autoscaling_plot.py [--out docs/benchmarks/autoscaling.md]

Takes some minutes on two cores; the machinery is that of tests/cluster/test_autoscaling.py.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `support`, as pytest has it

from autoscaling import (
    CHECKPOINT_EVERY,
    GROWS,
    IDLE_S,
    LOSES,
    LOST_S,
    NODES,
    Moment,
    Story,
    autoscaling_head,
    tell_growth,
    tell_loss,
)
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flowray.report.figures import BLUE, INK, ORANGE, STYLE, VERMILLION
from flowray.store.rows import read_rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Record nodes and trials over time on a cluster with a real autoscaler."
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/autoscaling.md"))
    page = parser.parse_args(argv).out
    with (
        tempfile.TemporaryDirectory(prefix="autoscaling-") as folder,
        autoscaling_head(Path(folder)) as head,
    ):
        grows, loses = tell_growth(head, "grows"), tell_loss(head, "loses")
        page.parent.mkdir(parents=True, exist_ok=True)
        draw(grows, loses, page.with_suffix(".png"))
        page.write_text("\n".join(lines(grows, loses, page.with_suffix(".png").name)) + "\n")
    return max(grows.code, loses.code)


def lines(grows: Story, loses: Story, picture: str) -> list[str]:
    """The page."""
    loss = loses.loss
    assert loss is not None
    return [
        "# A sweep on an autoscaling cluster",
        "",
        (
            "Written by `python tests/cluster/autoscaling_plot.py`, not typed by hand; `make"
            " test-cluster` asserts what it shows."
        ),
        "",
        (
            "A head without CPUs, Ray's own autoscaler, and its `fake_multinode` provider, which"
            " starts and ends real nodes (a raylet of one"
        ),
        (
            f"CPU each) on one machine: at most {NODES}, ended after {IDLE_S:g} s without work,"
            f" taken for lost after {LOST_S} s without a sign"
        ),
        (
            "of life. `max_concurrent: auto` follows that maximum. Real training of a tiny model;"
            " all nodes share this machine's"
        ),
        f"{os.cpu_count()} CPUs ({platform.platform()}).",
        "",
        (
            "![nodes and trials over time, in a sweep with a straggler and in one that loses a"
            f" node]({picture})"
        ),
        "",
        (
            f"Left: one trial of {GROWS[0]} steps and {len(GROWS) - 1} of {GROWS[1]}. Right:"
            f" {len(LOSES)} trials of {LOSES[0]} steps; the node"
        ),
        "under one of them is killed.",
        "",
        "| | straggler | node lost |",
        "|---|---|---|",
        *(
            f"| {words} | {a} | {b} |"
            for words, a, b in zip(_FACTS, _facts(grows), _facts(loses), strict=True)
        ),
        "",
        (
            f"The lost trial had logged step {loss.step} and had a checkpoint of step"
            f" {loss.checkpoint} (one every {CHECKPOINT_EVERY}): it"
        ),
        (
            f"went on from there on another node, its {len(loss.rows)} rows up to there untouched;"
            f" {loss.step - loss.checkpoint} steps or"
        ),
        "so were trained again.",
    ]


_FACTS = (
    "nodes, one count after the other",
    "trials out at once, at most",
    "all trials waiting and no node, until second",
    f"{NODES} nodes from second",
    "last trial ended at second",
    "no node from second",
    "trials that ended well",
)


def _facts(story: Story) -> list[str]:
    moments = story.moments
    last = max((m.seconds for m in moments if m.training + m.waiting), default=0.0)
    most = [m.seconds for m in moments if m.nodes == NODES]
    return [
        " → ".join(map(str, story.node_counts)),
        str(max(m.training + m.waiting for m in moments)),
        f"{max((m.seconds for m in moments if m.waiting == NODES and not m.nodes), default=0):.0f}",
        f"{min(most):.0f}" if most else "never",
        f"{last:.0f}",
        f"{moments[-1].seconds:.0f}",
        str(sum(row["status"] == "finished" for row in read_rows(story.folder / "trials.jsonl"))),
    ]


def draw(grows: Story, loses: Story, path: Path) -> None:
    """Nodes as a line, trials that train and that wait as areas, over the seconds since the
    sweep's start.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(9.4, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, grows.moments, "A straggler: idle nodes are released")
        _panel(right, loses.moments, "A node is killed: its trial goes on elsewhere")
        left.set_ylabel("count")
        if loses.loss:
            right.axvline(loses.loss.seconds, color=VERMILLION, linestyle=":", label="node killed")
        for ax in (left, right):
            ax.legend(loc="upper right", ncols=2, fontsize=7)
        figure.savefig(path, dpi=150)


def _panel(ax: Axes, moments: Sequence[Moment], title: str) -> None:
    seconds, training = [m.seconds for m in moments], [m.training for m in moments]
    out = [m.training + m.waiting for m in moments]
    ax.fill_between(
        seconds,
        training,
        step="post",
        color=BLUE,
        alpha=0.35,
        linewidth=0,
        label="trials that train",
    )
    ax.fill_between(
        seconds,
        training,
        out,
        step="post",
        color=ORANGE,
        alpha=0.35,
        linewidth=0,
        label="trials that wait",
    )
    ax.step(seconds, [m.nodes for m in moments], where="post", color=INK, label="nodes")
    ax.set(
        title=title, xlabel="seconds since the sweep's start", ylim=(0, NODES + 1.2), xlim=(0, None)
    )
    ax.set_yticks(range(NODES + 1))


if __name__ == "__main__":
    raise SystemExit(main())
