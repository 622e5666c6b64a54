"""Self-contained HTML pages, readable offline and on a phone: how they are written, and
`report.html` of a run.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from flowray.config.errors import InputError
from flowray.config.keys import KEYS, MetricKey, alternatives, describe
from flowray.config.progress import duration
from flowray.config.rounding import finite
from flowray.config.writing import write_whole
from flowray.findings.baselines import Baseline, baseline
from flowray.findings.judge import Verdict
from flowray.report import figures
from flowray.report.figures import value_text
from flowray.report.load import load_run
from flowray.report.results import Run, Series, Strip, series
from flowray.report.stages import SCORE, stages, without_flow

# of a pattern with alternatives each is a curve
PROBE_PANELS = (
    "shoot/energy",
    "shoot/diversity{,_all}",
    "shoot/nmse",
    "shoot/skill",
    "flow/cos",
    "flow/nmse",
    "std/mean",
    "text/cos_mu",
    "shoot/cond_gain",
    "flow/speed_ratio",
    "source/separation@{0,0.25,0.5}",
    "source/width{,_all}",
    "vae/psnr",
)
HEADLINE = (
    "shoot/energy",
    "shoot/diversity",
    "shoot/diversity_all",
    "shoot/nmse",
    "shoot/skill",
    "flow/cos",
    "std/mean",
)
T = TypeVar("T")
T_BINS = range(10)
NO_NORM = ("grad/clip_frac", "grad/cos_")  # under grad/, but a share and cosines
MAX_ROWS, SHOWN_ROWS = 24, 5  # of pictures on a page, and of these in the grid that stands open


@dataclass(frozen=True)
class Plot:
    """A figure on the page. src: a data URI; alt: what it shows, in words."""

    src: str
    alt: str
    wide: bool = False


@dataclass(frozen=True)
class GridRow:
    """One row of pictures: its heading, a line below it, the pictures as data URIs, one for each
    prompt.
    """

    head: str
    sub: str
    pictures: list[str]
    best: bool = False


@dataclass(frozen=True)
class Number:
    """One line of the table of last values; trivial: what a predictor that knows nothing scores."""

    name: str
    raw: str
    ema: str
    key: MetricKey | None
    trivial: str
    verdict: Verdict


def write_run_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` and return its path; raises InputError when it cannot be
    written.
    """
    return write_page(run_dir / "report.html", "run.html.j2", _run_context(load_run(run_dir)))


def number_text(value: float | None) -> str:
    """A measured value with three decimals, or in the form that shows it where those would not."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if not 0.001 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def _run_context(run: Run) -> dict[str, Any]:
    place = run.path.resolve()
    chosen = _spread(run.strips, MAX_ROWS)
    rows = [
        GridRow(f"step {strip.step:,}", "", pictures)
        for strip in chosen
        if (pictures := pictures_of(strip))
    ]
    open_rows = _spread(rows, SHOWN_ROWS)
    numbers = _numbers(run)
    steps = [row["step"] for row in (*run.metrics, *run.probes) if isinstance(row.get("step"), int)]
    headline = [key for key in HEADLINE if run.either(key) is not None]
    return {
        "run": run,
        # a trial is named by its number
        "name": "/".join(place.parts[-2:]) if place.name.isdigit() else place.name,
        "last_step": max(steps, default=0),
        "headline": [(key, number_text(run.either(key)), baseline(key)) for key in headline],
        "scores": _scores(run),
        "header": "\n".join(line for line in run.header.splitlines() if line.strip("=- ")),
        "training": _training_plots(run),
        "probes": _probe_plots(run),
        "bins": _bin_plots(run),
        "stage_rows": stages(run, f"ema/{SCORE}") or stages(run, SCORE),
        "grid_rows": open_rows,
        "grid_more": [row for row in rows if row not in open_rows],
        "grid_aside": [f"{len(chosen)} of {len(run.strips)} strips, spread over the run."]
        if len(chosen) < len(run.strips)
        else [],
        "prompts": run.prompts,
        "numbers": [number for number in numbers if not re.search(r"_t\d$", number.name)],
        "bin_numbers": [number for number in numbers if re.search(r"_t\d$", number.name)],
    }


# part of eval.json, score, words
_SCORES = (
    ("open", "named", "pictures with all that is named right, held-out open captions"),
    ("open", "coverage_excess", "coverage excess of what those leave open; 0 as in the data"),
    ("neighbours", "caption_accuracy", "pictures nearest to a real one of their held-out caption"),
    ("shapes", "all_correct", "pictures with every attribute right, held-out prompts"),
    ("shapes", "mean_attribute_accuracy", "attributes right, held-out prompts"),
)


def _scores(run: Run) -> list[tuple[str, str]]:
    """Picture-level scores that flowray.eval wrote beside the run: (value, words)."""
    try:
        told = json.loads((run.path / "eval.json").read_text("utf-8"))
    except (OSError, ValueError):
        return []
    shown = []
    for part, score, words in _SCORES:
        section = told.get(part) if isinstance(told, dict) else None
        value = finite(section.get(score)) if isinstance(section, dict) else None
        if value is not None:
            text = f"{value:.3f}" if score == "coverage_excess" else f"{100 * value:.0f} %"
            shown.append((text, f"{words} (flowray.eval)"))
    return shown


def _training_plots(run: Run) -> list[Plot]:
    """Losses, gradients, learning rates and step time over steps, from the training rows."""
    keys = sorted({key for row in (*run.metrics, *run.probes) for key in row})
    groups = (
        ("loss/", "losses", True),
        ("grad/", "gradient norms", True),
        ("lr/", "learning rate", False),
        ("perf/", "seconds a step", False),
    )
    plots = []
    for prefix, title, log in groups:
        names = (
            ["perf/step_s", "perf/data_wait_s"]
            if prefix == "perf/"
            else [key for key in keys if key.startswith(prefix)]
        )
        known = {
            name: points
            for name in names
            if (points := series(run.metrics, name) or series(run.probes, name))
        }
        curves = _merged(
            {
                name.removeprefix(prefix): points
                for name, points in known.items()
                if not name.startswith(NO_NORM)
            }
        )
        visible = {
            name: points for name, points in curves.items() if any(value > 0 for _, value in points)
        }
        if curves:
            shown = visible if log and visible else curves
            plots.append(
                make_plot(
                    figures.lines(title, shown, log=log and bool(visible)),
                    f"{title} over steps: {', '.join(shown)}",
                )
            )
    return plots


def _merged(curves: Mapping[str, Series]) -> dict[str, Series]:
    """Equal curves as one, named after all: drawn over each other only the last would be seen."""
    names: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, points in curves.items():
        names.setdefault(tuple(points), []).append(name)
    return {
        ", ".join(found) if len(found) < 3 else f"{found[0]} and {len(found) - 1} more": list(
            points
        )
        for points, found in names.items()
    }


def _probe_plots(run: Run) -> list[Plot]:
    plots = []
    for pattern in PROBE_PANELS:
        found = {key: own for key in alternatives(pattern) if (own := _probe_curves(run, key))}
        if not found:
            continue
        title, curves = next(iter(found.items()))
        base = baseline(title) or _blind(run, title)
        if len(found) > 1:
            title = pattern.partition("{")[0].rstrip("@")
            curves = {
                key.removeprefix(title) or key: next(iter(own.values()))
                for key, own in found.items()
            }
        against = f" against {base.value:g} ({base.words})" if base else ""
        plots.append(
            make_plot(figures.lines(title, curves, base=base), f"{title} over steps{against}")
        )
    return plots


def _probe_curves(run: Run, key: str) -> dict[str, Series]:
    """A probe over steps, by EMA and raw weights, and what it is without the flow."""
    curves = {
        name: points
        for name, full in (("EMA", f"ema/{key}"), ("raw", key))
        if (points := run.series(full))
    }
    if curves and (still := without_flow(run, f"ema/{key}") or without_flow(run, key)):
        curves["without the flow"] = still
    return curves


def _blind(run: Run, key: str) -> Baseline | None:
    """What a source that knows no caption scores, where it was measured."""
    value = run.either(f"trivial/{key}")
    return None if value is None else Baseline(value, "a blind source")


def _bin_plots(run: Run) -> list[Plot]:
    """The last probe by time: t = 0 is the text latent, t = 1 the image latent."""
    labels = [f"{index / 10:.1f}" for index in T_BINS]
    plots = []
    for key in ("flow/nmse", "flow/cos"):
        found = {
            name: [run.last(f"{prefix}{key}_t{index}") for index in T_BINS]
            for name, prefix in (("EMA", "ema/"), ("raw", ""))
        }
        groups = {
            name: values
            for name, values in found.items()
            if any(value is not None for value in values)
        }
        if groups:
            plots.append(
                make_plot(
                    figures.bars(
                        f"{key} by time", groups, labels, baseline(key), "t, lower edge of the bin"
                    ),
                    f"{key} in ten bins of t",
                )
            )
    return plots


def _numbers(run: Run) -> list[Number]:
    """The last value of every key, raw and EMA on one line, with what it means."""
    rows = (*run.metrics, *run.probes)
    keys = {
        key
        for row in rows
        for key, value in row.items()
        if isinstance(value, (int, float)) and key != "step"
    }
    last = run.probes[-1] if run.probes else {}
    judge = run.judge(
        last, int(last.get("step") or (run.metrics[-1].get("step", 0) if run.metrics else 0))
    )
    return [make_number(name, run.last, judge) for name in number_names(keys)]


def number_names(keys: Iterable[str]) -> list[str]:
    """The lines of these keys, sorted: raw and EMA share one, a trivial value stands beside its
    key's.
    """
    own = {key.name for key in KEYS}  # ema/delta_rms is a key, not delta_rms of the EMA
    names = {
        key if key in own else key.removeprefix("ema/") for key in keys if "trivial/" not in key
    }
    return sorted(names, key=_by_number)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts mse@5 before mse@10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def make_number(
    name: str, value: Callable[[str], float | None], judge: Callable[[str], Verdict]
) -> Number:
    """The line of a key. value: of a whole key, as measured on raw or EMA weights."""
    trivial = value(f"trivial/{name}")
    trivial = value(f"ema/trivial/{name}") if trivial is None else trivial
    raw, ema = number_text(value(name)), number_text(value(f"ema/{name}"))
    return Number(name, raw, ema, describe(name), number_text(trivial), judge(name))


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of them, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def pictures_of(strip: Strip) -> list[str]:
    """The pictures of a strip as data URIs, left to right; [] where it cannot be read."""
    return [data_uri("image/png", tile) for tile in figures.tiles(strip.path)]


def make_plot(svg: bytes, alt: str, *, wide: bool = False) -> Plot:
    """A figure for the page, with its words."""
    return Plot(data_uri("image/svg+xml", svg), alt, wide)


def data_uri(kind: str, content: bytes) -> str:
    """The bytes as a URI that needs no other file; kind: its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _breakable(key: str) -> Markup:
    """A dotted or slashed key that a narrow table heading may break after its separators."""
    return Markup("<wbr>").join(part for part in re.split(r"(?<=[./_])", key) if part)


def _markdown(text: str) -> Markup:
    """Markdown as HTML. Tags in it are escaped; of a picture the name stays, for the page is
    whole without other files.
    """
    reader = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table")
    reader.add_render_rule(
        "image", lambda self, tokens, index, options, env: str(escape(tokens[index].content))
    )
    return Markup(reader.render(text))


def write_page(path: Path, template: str, context: Mapping[str, Any]) -> Path:
    """Render an HTML template and replace the file in one step; InputError where it cannot be
    written.
    """
    pages = _environment(autoescape=True)
    pages.filters |= {"breakable": _breakable, "markdown": _markdown}
    return write_text(path, pages.get_template(template).render(**context))


def write_markdown(path: Path, template: str, context: Mapping[str, Any]) -> Path:
    """Render a markdown template and replace the file in one step; InputError where it cannot be
    written.
    """
    pages = _environment(autoescape=False)
    pages.filters |= {"cell": _cell}
    return write_text(
        path, re.sub(r"\n{3,}", "\n\n", pages.get_template(template).render(**context))
    )


def _environment(*, autoescape: bool) -> Environment:
    pages = Environment(
        loader=PackageLoader("flowray", "report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"number": number_text, "value": value_text, "duration": duration}
    return pages


def _cell(text: Any) -> str:
    """Text for a cell of a markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def write_text(path: Path, text: str) -> Path:
    """`write_whole`; InputError where the file cannot be written."""
    try:
        write_whole(path, text, shared=True)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free space or make the folder writable"
        ) from error
    return path
