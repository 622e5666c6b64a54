"""doctor.html: the findings of an examination with the plots and pictures behind them, one
self-contained page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowray.config.keys import GOOD_PSNR
from flowray.config.rounding import finite
from flowray.findings.baselines import Baseline
from flowray.findings.finding import Finding, healthy
from flowray.findings.judge import Judge
from flowray.report import figures
from flowray.report.page import (
    GridRow,
    Number,
    Plot,
    data_uri,
    make_number,
    make_plot,
    number_names,
    number_text,
    write_page,
)
from flowray.report.results import series, spans_decades

Curve = Mapping[str, Sequence[float | None]]
TILES: Mapping[str, str] = {
    "shoot/energy": "1: drawing any picture of the data",
    "shoot/diversity": "1: as varied as the data; 0: one picture a caption",
    "shoot/diversity_all": "1: as any two pictures; 0: one picture a caption",
    "shoot/nmse": "1: predicting the mean",
    "shoot/skill": "0: doing nothing",
    "flow/cos": "0: unrelated; 0.5 and more is learnt",
    "flow/nmse": "1: predicting zero",
    "std/mean": "1: the prior's width",
    "text/snr": "0: the caption does not arrive",
    "vae/psnr": f"dB; {GOOD_PSNR:g} is in order",
}
PICTURES: Mapping[str, tuple[str, str]] = {
    "orig": ("orig", "held-out pictures"),
    "recon_wrap": ("recon_wrap", "encoded, decoded"),
    "recon_direct": ("recon_direct", "decoded without unscaling: wrong"),
    "recon_twice": ("recon_twice", "unscaled twice: wrong"),
    "trace_init": ("[A] decode(z_init)", "the text latent itself"),
    "trace_end": ("[C] decode(z_end)", "after integrating"),
    "samples": ("samples", "as sampling makes them"),
}
DRAWN = "samples"  # from the prompts; the other pictures are of the held-out batch
NOT_FACTS = ("notes", "nonfinite", "captions", "prompts", "seams", "least", "suspects")
LEGEND: Mapping[str, str] = {
    "nmse": "raw",
    "cos": "raw",
    "ema_nmse": "EMA",
    "ema_cos": "EMA",
    "gain_ls": "least squares",
    "gain_median": "median ||v*||/||u||",
    "euler": "Euler",
    "heun": "Heun",
    "standing_still": "standing still",
    "native": "sampler's dtype",
}


@dataclass(frozen=True)
class DoctorData:
    """What the page shows, as plain data; whatever is empty is left out.

    metrics, facts, history: as the findings read them. pictures: uint8 (N, H, W, 3). curves: series
    by name, `x` the axis.
    """

    where: str
    step: int
    findings: Sequence[Finding]
    metrics: Mapping[str, float]
    facts: Mapping[str, Any]
    history: Sequence[dict[str, Any]]
    pictures: Mapping[str, np.ndarray]
    curves: Mapping[str, Curve]


def write_doctor_page(path: Path, data: DoctorData) -> Path:
    """Write the page and return its path; InputError when it cannot be written."""
    consequences: dict[str, list[Finding]] = {}
    for finding in data.findings:
        if finding.explained_by:
            consequences.setdefault(finding.explained_by, []).append(finding)
    context = {
        "data": data,
        "healthy": healthy(data.findings),
        "roots": [finding for finding in data.findings if not finding.explained_by],
        "consequences": consequences,
        "tiles": [
            (key, number_text(value), words)
            for key, words in TILES.items()
            if (value := _value(data.metrics, key)) is not None
        ],
        "plots_shown": doctor_plots(data),
        "grids": _grids(data),
        "numbers": _numbers(data),
        "facts": {
            name: value
            for name, value in data.facts.items()
            if name not in NOT_FACTS and value is not None
        },
        "notes": data.facts.get("notes") or [],
    }
    return write_page(path, "doctor.html.j2", context)


def doctor_plots(data: DoctorData) -> list[Plot]:
    """Every figure whose numbers are there."""
    learnt, mean = Baseline(0.5, "learnt above"), Baseline(1.0, "predicting the mean")
    zero, none_needed = Baseline(1.0, "predicting zero"), Baseline(1.0, "none needed")
    ends = ("euler", "heun", "standing_still")
    error = "true field integrated: error"
    gain = "gain on u that fits v* best"
    panels = [
        _panel(data, "t", ("nmse", "ema_nmse"), "flow/nmse by time", "t", base=zero),
        _panel(data, "t", ("cos", "ema_cos"), "flow/cos by time", "t", base=learnt),
        _panel(data, "endpoint", ends, "endpoint RMSE over K", "K, steps of the solver"),
        _panel(data, "teacher", ("fp32", "native"), error, "N, steps", log=True),
        _panel(data, "dt_scale", ("nmse",), "shoot/nmse over dt_scale", "dt_scale", base=mean),
        _panel(data, "t", ("gain_ls", "gain_median"), gain, "t", base=none_needed),
        _times(data),
        _gradients(data),
        _latents(data),
        *_training(data),
    ]
    return [panel for panel in panels if panel is not None]


def _panel(
    data: DoctorData,
    curve: str,
    names: Sequence[str],
    title: str,
    xlabel: str,
    *,
    log: bool = False,
    base: Baseline | None = None,
) -> Plot | None:
    """Some series of one curve over its x; None where none has two finite points."""
    found = data.curves.get(curve, {})
    drawn = {
        LEGEND.get(name, name): points
        for name in names
        if len(points := _points(found, name, positive=log)) > 1
    }
    if not drawn:
        return None
    return make_plot(
        figures.lines(title, drawn, log=log, base=base, xlabel=xlabel),
        f"{title}: {', '.join(drawn)}",
    )


def _points(curve: Curve, name: str, *, positive: bool = False) -> list[tuple[float, float]]:
    pairs = [
        (finite(x), finite(y))
        for x, y in zip(curve.get("x", ()), curve.get(name, ()), strict=False)
    ]
    return [(x, y) for x, y in pairs if x is not None and y is not None and (y > 0 or not positive)]


def _latents(data: DoctorData) -> Plot | None:
    """Densities of the latents beside the prior's."""
    found = data.curves.get("latents", {})
    drawn = {
        name: points
        for name in ("z0", "z1", "z_end", "mu")
        if len(points := _points(found, name)) > 1
    }
    if not drawn:
        return None
    xs = [x for x, _ in next(iter(drawn.values()))]
    drawn["N(0, 1)"] = [(x, math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)) for x in xs]
    return make_plot(
        figures.lines("latent values: density", drawn, xlabel="value", marks=0),
        f"histograms of {', '.join(drawn)} over latent values",
    )


def _times(data: DoctorData) -> Plot | None:
    """Share of the training times in every tenth of [0, 1]."""
    points = _points(data.curves.get("t", {}), "train_share")
    if not points:
        return None
    labels = [f"{max(x - 0.05, 0):.1f}" for x, _ in points]
    bars = figures.bars(
        "training times",
        {"share": [y for _, y in points]},
        labels,
        Baseline(0.1, "uniform"),
        "t, lower edge of the bin",
    )
    return make_plot(bars, "share of training times in ten bins of t")


def _gradients(data: DoctorData) -> Plot | None:
    """Norms of each loss's gradient, unweighted and weighted."""
    shares = {
        name: values
        for name, values in data.curves.get("shares", {}).items()
        if name != "x" and len(values) == 2
    }
    if not shares:
        return None
    groups = {
        words: [finite(values[place]) for values in shares.values()]
        for place, words in enumerate(("unweighted", "weighted"))
    }
    return make_plot(
        figures.bars(
            "gradient norms",
            groups,
            list(shares),
            None,
            "usual: dino 0.2-0.5, kl 0.1-0.3 of flow (weighted)",
        ),
        f"gradient norms of {', '.join(shares)}, unweighted and weighted",
    )


def _training(data: DoctorData) -> list[Plot]:
    """Losses and learning rates over steps."""
    plots = []
    for prefix, title in (("loss/", "losses"), ("lr/", "learning rate")):
        keys = sorted(
            {
                key
                for row in data.history
                for key in row
                if key.startswith(prefix) and key != "loss/kl_raw"
            }
        )
        curves = {
            key.removeprefix(prefix): points
            for key in keys
            if len(points := series(data.history, key)) > 1
        }
        if curves:
            log = spans_decades([value for points in curves.values() for _, value in points])
            plots.append(
                make_plot(
                    figures.lines(title, curves, log=log),
                    f"{title} over steps: {', '.join(curves)}",
                )
            )
    return plots


def _grids(data: DoctorData) -> list[tuple[list[str], list[GridRow]]]:
    """(captions, rows): the pictures of the held-out batch, and those drawn from the prompts; one
    grid where both have the same.
    """
    rows = _rows(data)
    captions, prompts = data.facts.get("captions") or [], data.facts.get("prompts") or []
    if captions == prompts or not prompts:
        return [(captions, rows)] if rows else []
    sides = [
        (captions, [row for row in rows if row.head != DRAWN]),
        (prompts, [row for row in rows if row.head == DRAWN]),
    ]
    return [(words, found) for words, found in sides if found]


def _rows(data: DoctorData) -> list[GridRow]:
    """Every kind of picture there is, known kinds first; [B], a number, stands under [C]."""
    pictures = data.pictures
    names = [
        *(name for name in PICTURES if name in pictures),
        *(name for name in pictures if name not in PICTURES),
    ]
    rows = []
    for name in names:
        head, sub = PICTURES.get(name, (name, ""))
        if (
            name == "trace_end"
            and (first := finite(data.metrics.get("trace/first_dz_rms"))) is not None
        ):
            sub = f"{sub}; [B] first |dz| rms {first:.2g}"
        shown = [
            data_uri("image/png", figures.png(Image.fromarray(np.asarray(picture, dtype=np.uint8))))
            for picture in pictures[name]
        ]
        if shown:
            rows.append(GridRow(head, sub, shown))
    return rows


def _value(metrics: Mapping[str, float], key: str) -> float | None:
    raw = finite(metrics.get(key))
    return finite(metrics.get(f"ema/{key}")) if raw is None else raw


def _numbers(data: DoctorData) -> list[Number]:
    """Every measured number, raw and EMA on one line, what is said of it, and what a trivial
    predictor scores.
    """
    judge = Judge(data.metrics, data.facts, data.history, data.findings)
    return [
        make_number(name, lambda key: finite(data.metrics.get(key)), judge)
        for name in number_names(data.metrics)
    ]
