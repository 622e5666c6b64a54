"""Self-contained HTML pages: `report.html` of a sweep and of a run, readable offline and on a phone."""

from __future__ import annotations

import base64
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from flowray.config.errors import InputError
from flowray.config.keys import MetricKey, describe
from flowray.findings.baselines import Baseline, baseline
from flowray.report import figures
from flowray.report.figures import value_text
from flowray.report.importance import FEW_TRIALS, importances
from flowray.report.load import Run, Status, Strip, Sweep, Trial, finite, load_run, load_sweep, series

TABLE_METRICS = ("shoot/nmse", "flow/cos", "std/mean", "loss/flow")
PROBE_PANELS = (
    "shoot/nmse",
    "shoot/skill",
    "flow/cos",
    "flow/nmse",
    "std/mean",
    "text/cos_mu",
    "shoot/cond_gain",
    "flow/speed_ratio",
    "vae/psnr",
)
T_BINS = range(10)
STATUSES: tuple[Status, ...] = ("finished", "stopped", "running", "failed")
MAX_ROWS = 24  # of pictures on a page


@dataclass(frozen=True)
class Plot:
    """A figure on the page. src: a data URI; alt: what it shows, in words."""

    src: str
    alt: str
    wide: bool = False


@dataclass(frozen=True)
class GridRow:
    """One row of pictures: its heading, a line below it, the pictures as data URIs, one for each prompt."""

    head: str
    sub: str
    pictures: list[str]
    best: bool = False


@dataclass(frozen=True)
class Number:
    """One line of the table of last values."""

    name: str
    raw: str
    ema: str
    key: MetricKey | None
    base: Baseline | None
    outside: bool


def write_sweep_report(sweep_dir: Path) -> Path:
    """Write `<sweep_dir>/report.html` and return its path; InputError when sweep.yaml cannot be read or the page cannot be written."""
    return write_page(sweep_dir / "report.html", "sweep.html.j2", _sweep_context(load_sweep(sweep_dir)))


def write_run_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` and return its path; raises InputError when it cannot be written."""
    return write_page(run_dir / "report.html", "run.html.j2", _run_context(load_run(run_dir)))


def sweep_commands(sweep: Sweep) -> dict[str, str]:
    """The commands that follow a sweep, by label, for the best trial; {} before there is one."""
    if sweep.best is None:
        return {}
    best = sweep.best
    commands = {}
    if (sweep.path / "best.yaml").is_file():
        longer = f"python -m flowray.train {shlex.quote(str(sweep.path / 'best.yaml'))} train.steps={4 * best.budget_steps}"
        commands["Train the best recipe longer"] = longer
    prompt = best.run.prompts[0] if best.run.prompts else "a small red circle on a white background"
    commands["Sample from the best trial"] = f"python -m flowray.sample {shlex.quote(str(best.run.path))} {shlex.quote(prompt)}"
    commands["Open TensorBoard"] = f"tensorboard --logdir {shlex.quote(str(sweep.path))}"
    return commands


def sweep_verdict(sweep: Sweep) -> str:
    """One sentence: the best trial, how many ended how, the share of full-budget steps saved."""
    ended = ", ".join(f"{count} {status}" for status in STATUSES if (count := len(sweep.by(status))))
    spent = f"{len(sweep.trials)} trials ({ended}); early stopping saved {sweep.saved:.0%} of the full-budget steps"
    if sweep.best is None:
        return f"{sweep.name}: no trial has a value of {sweep.metric.name}; {spent}"
    params = ", ".join(f"{key}={value_text(value)}" for key, value in sweep.best.params.items())
    score = sweep.best.value(sweep.metric.name)
    return f"{sweep.name}: best is trial {sweep.best.number}, {sweep.metric.name} {score:.3g}, with {params}. {spent}"


def number_text(value: float | None) -> str:
    """A measured value with three decimals, or in the form that shows it where those would not."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if not 0.001 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def duration_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _sweep_context(sweep: Sweep) -> dict[str, Any]:
    key, best, varied = sweep.metric.name, sweep.best, sweep.varied()
    table = [name for name in (key, *TABLE_METRICS, *_evaluations(sweep.trials)) if any(t.value(name) is not None for t in sweep.trials)]
    card = _mapping(sweep.settings.get("card"))
    rows, aside = _trial_pictures(sweep)
    important = importances(sweep)
    scored = [trial for trial in sweep.trials if trial.value(key) is not None]
    return {
        "sweep": sweep,
        "card": card,
        "purpose": card.get("purpose") or sweep.settings.get("description"),
        "best": best,
        "verdict": sweep_verdict(sweep),
        "commands": sweep_commands(sweep),
        "best_value": number_text(best.value(key)) if best else "",
        "baseline": baseline(key),
        "varied": varied,
        "fixed": {name: value for name, value in (sweep.trials[0].params if sweep.trials else {}).items() if name not in varied},
        "columns": list(dict.fromkeys(table)),
        "counts": {status: len(sweep.by(status)) for status in STATUSES},
        "seconds": sum(trial.seconds for trial in sweep.trials),
        "curves": make_plot(
            figures.sweep_curves(f"{key} over steps", sweep.trials, best, key), f"{key} over steps of {len(scored)} trials", wide=True
        )
        if scored
        else None,
        "prompts": next((t.run.prompts for t in sweep.trials if t.run.prompts), ()),
        "grid_rows": rows,
        "grid_aside": aside,
        "slices": [
            make_plot(figures.slice_panel(name, scored, best, key), f"{key} over {name}")
            for name in varied
            if any(name in t.params for t in scored)
        ],
        "importance": make_plot(figures.shares(important), "importance: " + ", ".join(f"{k} {v:.0%}" for k, v in important.items()))
        if important
        else None,
        "few_trials": FEW_TRIALS if len(scored) < FEW_TRIALS else 0,
        "failed": sweep.by("failed"),
    }


def _evaluations(trials: Iterable[Trial]) -> list[str]:
    """Keys of picture-level scores, where trials have them."""
    return sorted({key for trial in trials for key in trial.metrics if key.startswith("eval/")})


def _trial_pictures(sweep: Sweep) -> tuple[list[GridRow], list[str]]:
    """Rows trials x prompts, best first, and what is not shown and why. Only equal prompts are comparable."""
    prompts = next((t.run.prompts for t in sweep.trials if t.run.prompts), ())
    rows: list[GridRow] = []
    missing, other, beyond = list[str](), list[str](), list[str]()
    for trial in sweep.trials:
        strip = trial.run.strips[-1] if trial.run.strips else None
        if strip is not None and trial.run.prompts not in ((), prompts):
            other.append(str(trial.number))
        elif len(rows) == MAX_ROWS:
            beyond.append(str(trial.number))
        elif strip is not None and (pictures := _pictures(strip)):
            value = number_text(trial.value(sweep.metric.name))
            rows.append(GridRow(f"trial {trial.number}", f"{value} at step {strip.step:,}", pictures, trial is sweep.best))
        else:
            missing.append(str(trial.number))
    said = (("no pictures", missing), ("other prompts, so not comparable", other), (f"beyond the best {MAX_ROWS}", beyond))
    return rows, [f"Not shown ({why}): trial {', '.join(numbers)}." for why, numbers in said if numbers]


def _run_context(run: Run) -> dict[str, Any]:
    place = run.path.resolve()
    chosen = _spread(run.strips, MAX_ROWS)
    rows = [GridRow(f"step {strip.step:,}", "", pictures) for strip in chosen if (pictures := _pictures(strip))]
    numbers = _numbers(run)
    steps = [row["step"] for row in (*run.metrics, *run.probes) if isinstance(row.get("step"), int)]
    headline = [key for key in ("shoot/nmse", "shoot/skill", "flow/cos", "std/mean") if _either(run, key) is not None]
    return {
        "run": run,
        "name": "/".join(place.parts[-2:]) if place.name.isdigit() else place.name,  # a trial is named by its number
        "last_step": max(steps, default=0),
        "headline": [(key, number_text(_either(run, key)), baseline(key)) for key in headline],
        "training": _training_plots(run),
        "probes": _probe_plots(run),
        "bins": _bin_plots(run),
        "grid_rows": rows,
        "grid_aside": [f"{len(chosen)} of {len(run.strips)} strips, spread over the run."] if len(chosen) < len(run.strips) else [],
        "prompts": run.prompts,
        "numbers": [number for number in numbers if not re.search(r"_t\d$", number.name)],
        "bin_numbers": [number for number in numbers if re.search(r"_t\d$", number.name)],
    }


def _either(run: Run, key: str) -> float | None:
    """The EMA's value, which is what gets sampled, else the raw one."""
    ema = run.last(f"ema/{key}")
    return run.last(key) if ema is None else ema


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
        names = ["perf/step_s", "perf/data_wait_s"] if prefix == "perf/" else [key for key in keys if key.startswith(prefix)]
        curves = {name.removeprefix(prefix): points for name in names if (points := series(run.metrics, name) or series(run.probes, name))}
        if curves:
            positive = any(value > 0 for points in curves.values() for _, value in points)
            plots.append(make_plot(figures.lines(title, curves, log=log and positive), f"{title} over steps: {', '.join(curves)}"))
    return plots


def _probe_plots(run: Run) -> list[Plot]:
    plots = []
    for key in PROBE_PANELS:
        curves = {name: points for name, full in (("EMA", f"ema/{key}"), ("raw", key)) if (points := run.series(full))}
        if not curves:
            continue
        base = baseline(key)
        against = f" against {base.value:g} ({base.words})" if base else ""
        plots.append(make_plot(figures.lines(key, curves, base=base), f"{key} over steps{against}"))
    return plots


def _bin_plots(run: Run) -> list[Plot]:
    """The last probe by time: t = 0 is the text latent, t = 1 the image latent."""
    labels = [f"{index / 10:.1f}" for index in T_BINS]
    plots = []
    for key in ("flow/nmse", "flow/cos"):
        found = {name: [run.last(f"{prefix}{key}_t{index}") for index in T_BINS] for name, prefix in (("EMA", "ema/"), ("raw", ""))}
        groups = {name: values for name, values in found.items() if any(value is not None for value in values)}
        if groups:
            plots.append(
                make_plot(
                    figures.bars(f"{key} by time", groups, labels, baseline(key), "t, lower edge of the bin"), f"{key} in ten bins of t"
                )
            )
    return plots


def _numbers(run: Run) -> list[Number]:
    """The last value of every key, raw and EMA on one line, with what it means."""
    rows = (*run.metrics, *run.probes)
    keys = {key for row in rows for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
    return [_number(run, name) for name in sorted({key.removeprefix("ema/") for key in keys})]


def _number(run: Run, name: str) -> Number:
    raw, ema, key = run.last(name), run.last(f"ema/{name}"), describe(name)
    judged = raw if ema is None else ema
    low, high = key.good if key is not None and key.good else (None, None)
    outside = judged is not None and ((low is not None and judged < low) or (high is not None and judged > high))
    return Number(name, number_text(raw), number_text(ema), key, baseline(name), outside)


def good_text(key: MetricKey | None) -> str:
    """A metric's good range in words, '' where it has none."""
    if key is None or not key.good:
        return ""
    low, high = (finite(edge) for edge in key.good)
    if low is None or high is None:
        return f"≤ {high:g}" if high is not None else f"≥ {low:g}" if low is not None else ""
    return f"{low:g} to {high:g}"


def _spread(strips: Sequence[Strip], count: int) -> list[Strip]:
    """At most `count` of them, evenly spread, the first and the last among them."""
    if len(strips) <= count:
        return list(strips)
    return [strips[round(index * (len(strips) - 1) / (count - 1))] for index in range(count)]


def _pictures(strip: Strip) -> list[str]:
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
    """Markdown as HTML. Tags in it are escaped; of a picture the name stays, for the page is whole without other files."""
    reader = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table")
    reader.add_render_rule("image", lambda self, tokens, index, options, env: str(escape(tokens[index].content)))
    return Markup(reader.render(text))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def write_page(path: Path, template: str, context: Mapping[str, Any]) -> Path:
    """Render and replace the file in one step, so that a reader never sees half a page."""
    pages = Environment(
        loader=PackageLoader("flowray", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters |= {"number": number_text, "value": value_text, "duration": duration_text, "good": good_text, "breakable": _breakable}
    pages.filters["markdown"] = _markdown
    html = pages.get_template(template).render(**context)
    try:
        handle, name = tempfile.mkstemp(prefix=".report-", suffix=".html", dir=path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make the folder writable") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(html)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); free space or make the folder writable") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
