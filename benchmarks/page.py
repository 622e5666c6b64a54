"""The page and the figure of `benchmarks sweep`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.replay import KEPT, ROUND
from benchmarks.sweep import ARMS, BEST, EARLY, Bench, first_rung, ranked, summary
from flowray.report.paint import BLUE, GREEN, INK, MUTED, STYLE, VERMILLION
from flowray.sweepconfig.sweep import Sweep

COLOURS = {"random": MUTED, "one_rung": GREEN, "loss": VERMILLION, "default": BLUE, "oracle": INK}
SHOWN = 12  # metrics in the table and the figure
_BUDGETS = ("mean_budgets", "median_budgets", "pool_budgets")
WORDS = 5  # reasons of stops


def write_page(bench: Bench, page: Path) -> None:
    """Write the Markdown page, and the figure beside it under the same name."""
    page.parent.mkdir(parents=True, exist_ok=True)
    picture = page.with_suffix(".png")
    _draw(bench, picture)
    page.write_text("\n".join(_lines(bench, summary(bench), picture.name)) + "\n", encoding="utf-8")


def _lines(bench: Bench, facts: dict[str, Any], picture: str) -> list[str]:
    return [
        *_about(bench, facts, picture),
        *_compute(bench, facts),
        *_default(bench, facts),
        *_why(facts),
        *_knowledge(bench),
    ]


def _about(bench: Bench, facts: dict[str, Any], picture: str) -> list[str]:
    """What was recorded, and what is counted."""
    pool, seeds = bench.pool, len(bench.arms["default"])
    return [
        "# What the probes save a sweep",
        "",
        (
            "Written by `python -m benchmarks sweep --page FILE`, not typed by hand; the pool by"
            " `python -m benchmarks record`."
        ),
        "",
        (
            f"Pool: {len(pool.entries)} configurations drawn at random from the space of"
            f" `{pool.sweep.name}`, each trained for all of its"
        ),
        (
            f"{pool.budget_steps} steps; its pictures judged by `flowray.eval`"
            f" ({_words(pool.judged_by[0])}). Recorded with {_recorded(facts)}."
        ),
        (
            f"The best {len(bench.goal)} are {', '.join(map(str, sorted(bench.goal)))}, with scores"
            f" {_scores(bench)}."
        ),
        (
            "Each search below trains configurations of the pool until one of these has been"
            " trained in full; one full budget is"
        ),
        (
            f"{pool.budget_steps} steps. {seeds} seeds. Trials run one after another. Replayed in"
            f" {bench.seconds:.0f} s on {facts['machine']}."
        ),
        "",
        (
            "![compute until one of the best is found, and what each probe knows of the final"
            f" pictures]({picture})"
        ),
        "",
    ]


def _compute(bench: Bench, facts: dict[str, Any]) -> list[str]:
    """What every search took, and the ratios."""
    pool, sweep = bench.pool, bench.sweep
    return [
        "| search | full budgets, mean | median | for the whole pool | best lost to stops |",
        "|---|---|---|---|---|",
        *(
            f"| {ARMS[name]} | "
            + " | ".join(f"{arm[key]:.1f}" for key in _BUDGETS)
            + f" | {arm['best_lost']:.0%} |"
            for name, arm in facts["arms"].items()
        ),
        "",
        (
            "| ratio of compute, higher is better | median over seeds | 95 % interval | of the"
            " means | 95 % interval |"
        ),
        "|---|---|---|---|---|",
        *(
            f"| {name} | {r['median']:.2f} | {_interval(r['interval'])} | {r['of_means']:.2f} |"
            f" {_interval(r['of_means_interval'])} |"
            for name, r in facts["ratios"].items()
        ),
        "",
        (
            f"One rung: {ROUND} at random to step {first_rung(sweep, pool.budget_steps)}, the best"
            f" {KEPT} of them in full, again with the next"
        ),
        (
            f"{ROUND}; it ranks by {sweep.metric.name} too. The loss: {bench.loss}, its mean over"
            " the steps since the probe before. The last"
        ),
        (
            "search is told the final score at every probe: what a perfect probe would give with"
            " the same rungs. A search that stops all of"
        ),
        (
            "the best finishes what it stopped, in its own order; what waited at a rung when the"
            " pool was empty counts as lost."
        ),
        _limit(facts),
        *_points(sweep),
        "",
    ]


def _points(sweep: Sweep) -> list[str]:
    """What a sweep is told beforehand and a random search is not."""
    count = len(sweep.points)
    return [f"The sweeps begin with the {count} points of `{sweep.name}`."] if count else []


def _default(bench: Bench, facts: dict[str, Any]) -> list[str]:
    """What the default stops by, and how it does on pools that it was not chosen with."""
    sweep, halving = bench.sweep, bench.sweep.early_terminate
    rules = [f"- {rule.words}" for rule in sweep.stop]
    return [
        (
            "The default's metric, rungs and sampler were chosen with this pool in sight. On a"
            " random half of it for each seed, with the best"
        ),
        (
            f"{BEST} of that half, which a random search meets twice as soon, it takes"
            f" {_ratio(facts['halves'])} times the default's compute."
        ),
        "",
        (
            f"The default: {sweep.metric.goal} {sweep.metric.name}, early_terminate"
            f" {halving.model_dump() if halving else 'off'}, stop rules:"
        ),
        *(rules or ["- none"]),
        "",
    ]


def _knowledge(bench: Bench) -> list[str]:
    """How well each metric foretells the final pictures."""
    shares = (*EARLY, 1.0)
    first, beside = map(_words, bench.pool.judged_by)
    return [
        "## What a probe knows of the final pictures",
        "",
        (
            f"Spearman's rho with the final {first} over the configurations, and with {beside}; the"
            " sign says which way is good."
        ),
        "",
        f"| metric | {first}, at 10 % | 33 % | the end | {beside}, at 10 % | 33 % | the end |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | "
            + " | ".join(
                _rho(of[name][share])
                for of in (bench.correlations, bench.beside)
                for share in shares
            )
            + " |"
            for name in _shown(bench)
        ),
    ]


def _words(score: str) -> str:
    return score.replace("_", " ")


def _limit(facts: dict[str, Any]) -> str:
    """What keeps the default from being faster, as far as the search that is told the end can
    say.
    """
    ours, told = (facts["arms"][name]["mean_budgets"] for name in ("default", "oracle"))
    if told < 0.9 * ours:
        return (
            f"With a perfect probe the default would take {told:.1f} full budgets in place of"
            f" {ours:.1f}: the probes are what limits it."
        )
    return (
        f"A perfect probe would hardly make the default faster ({told:.1f} full budgets against"
        f" {ours:.1f}): what limits it is how soon the sampler draws one of the best, and what it"
        " trains in full before."
    )


def _recorded(facts: dict[str, Any]) -> str:
    known = [str(facts["pool"][key]) for key in ("machine", "commit") if facts["pool"].get(key)]
    return ", ".join(known) or "no note of the machine"


def _scores(bench: Bench) -> str:
    score = bench.pool.judged_by[0]
    best = sorted(
        (entry.score[score] for entry in bench.pool.entries if entry.number in bench.goal),
        reverse=True,
    )
    others = np.median([entry.score[score] for entry in bench.pool.entries if entry.error is None])
    return f"{', '.join(f'{one:.3f}' for one in best)} (median of the pool {others:.3f})"


def _why(facts: dict[str, Any]) -> list[str]:
    lost = list(facts["arms"]["default"]["lost_because"].items())[:WORDS]
    return (
        [
            "The best that the default stopped, most often:",
            *(f"- {count}x {words}" for words, count in lost),
            "",
        ]
        if lost
        else []
    )


def _ratio(found: dict[str, Any]) -> str:
    return (
        f"{found['of_means']:.2f} ({_interval(found['of_means_interval'])}; median over seeds"
        f" {found['median']:.2f})"
    )


def _interval(ends: list[float]) -> str:
    return f"{ends[0]:.2f} to {ends[1]:.2f}"


def _rho(value: float) -> str:
    return f"{value:+.2f}" if math.isfinite(value) else "–"


def _shown(bench: Bench) -> list[str]:
    """The metrics that say most, and those that decide, whatever they say."""
    named = [bench.sweep.metric.name, bench.loss, *bench.sweep.rule_metrics]
    return list(dict.fromkeys([*ranked(bench)[:SHOWN], *named]))


def _draw(bench: Bench, path: Path) -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(9.4, 3.9), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _found(bench, left)
        _known(bench, right)
        figure.savefig(path, dpi=150, facecolor="white")


def _found(bench: Bench, ax: Axes) -> None:
    """Per search the share of seeds that have found one of the best after so much compute."""
    for name, replays in bench.arms.items():
        hits = np.sort([replay.hit / bench.pool.budget_steps for replay in replays])
        share = np.arange(1, len(hits) + 1) / len(hits)
        style, width = ":" if name == "oracle" else "-", 2.4 if name == "default" else 1.6
        ax.step(
            [0, *hits],
            [0, *share],
            where="post",
            color=COLOURS[name],
            label=ARMS[name],
            linestyle=style,
            linewidth=width,
        )
    ax.set(
        title="One of the best three trained in full",
        xlabel="compute, full budgets",
        ylabel="share of seeds",
        ylim=(0, 1.02),
    )
    ax.set_xlim(left=0)
    ax.legend(loc="lower right", fontsize=7, frameon=True, framealpha=0.85, edgecolor="none")


def _known(bench: Bench, ax: Axes) -> None:
    """|rho| of the metrics at a tenth and at a third of the budget."""
    names = _shown(bench)[::-1]
    for share, marker, colour in zip(EARLY, ("o", "s"), (GREEN, BLUE), strict=True):
        points = [(abs(bench.correlations[name][share]), i) for i, name in enumerate(names)]
        ax.plot(
            *zip(*points, strict=True),
            marker,
            color=colour,
            markersize=4,
            label=f"at {share:.0%} of the budget",
        )
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set(
        title="What a probe knows of the final pictures",
        xlabel="|Spearman's rho| with the final picture score",
        xlim=(-0.02, 1.02),
    )
    ax.legend(loc="lower right", fontsize=7, frameon=True, framealpha=0.85, edgecolor="none")
