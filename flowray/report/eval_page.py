"""The page of an evaluation, from its JSON and its sheet of pictures alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowray.report.page import data_uri, write_page

# what a score is, and which way is better: "" where neither end is
FIGURES = {
    "mean_attribute_accuracy": ("attributes that come out right", "higher"),
    "all_correct": ("pictures with every attribute right", "higher"),
    "relation": ("both objects stand as they should", "higher"),
    "binding": ("and each has its own colour and shape", "higher"),
    "all": ("and size and background are right too", "higher"),
    "named": ("all that the caption says is so", "higher"),
    "sharp": ("a clean scene", "higher"),
    "coverage_excess": (
        "variation between draws and data beyond chance; 0 as in the data",
        "lower",
    ),
    "entropy": ("of what is left open, over the data's; 1 as in the data", ""),
    "caption_accuracy": (
        "the nearest of all real pictures is of the caption; none where each has its own captions",
        "higher",
    ),
    "clip_score": ("100 x cosine of picture and caption by CLIP, 0 where negative", "higher"),
    "precision": ("draws that lie among real pictures", "higher"),
    "recall": ("real pictures that lie among draws", "higher"),
    "density": ("real pictures around a draw; 1 as in the data", ""),
    "coverage": ("real pictures with a draw near; 0.97 as in the data", "higher"),
    "diversity": ("distance of two draws of a caption; 1 as in the data", ""),
    "frechet": ("Frechet distance; larger of few pictures", "lower"),
    "frechet_real": ("the same between two halves of the real pictures", ""),
    "kernel": (
        "kernel distance, unbiased; about 0 as in the data; of a width made for CLIP (CMMD)",
        "lower",
    ),
    "kernel_biased": ("the same as published, above 0 of few pictures", "lower"),
    "copies": ("draws nearer to a training picture than 0.99 of held-out ones", "lower"),
    "distance ratio": ("median distance to training over that of held-out ones", ""),
}
NO_FIGURES = {"captions", "draws", "prompts", "coverage_floor", "by_group", "beats_mu"}
RIGHT = ("pictures where this is right", "higher")
OPEN_COVERAGE = {"coverage": ("total variation between draws and data", "lower")}


@dataclass(frozen=True)
class Row:
    """A figure: cells are those of the table's columns; reached: its source does as well."""

    name: str
    cells: list[str]
    interval: str
    meaning: str
    better: str
    reached: bool


@dataclass(frozen=True)
class Table:
    """Figures by columns, the run's first."""

    title: str
    columns: list[str]
    rows: list[Row]


def write_eval_page(path: Path, told: Mapping[str, Any], sheet: bytes | None) -> Path:
    """Write the page of what `flowray.eval` tells, and return its path. sheet: a PNG.

    InputError where it cannot be written.
    """
    tables = [*_shapes(told.get("shapes")), *_open(told.get("open"))]
    context = {
        "told": told,
        "tables": [*tables, *_neighbours(told.get("neighbours"))],
        "near": told.get("neighbours"),
        "sheet": sheet and data_uri("image/png", sheet),
        "name": Path(told["run"]).name,
    }
    return write_page(path, "eval.html.j2", context)


def _shapes(scores: Mapping[str, Any] | None) -> list[Table]:
    if not scores:
        return []
    intervals, controls = scores["interval"], scores["controls"]
    parts = {
        "one object, held-out scenes": (scores, intervals, controls),
        "one object, pairs of colour and shape never seen": _part(scores, "unseen"),
        "two objects": _part(scores, "two_objects"),
    }
    return [
        _table(
            f"{title}: {of['prompts']} prompts, by template matching",
            {"run": of, "real": one["ceiling"], "shuffled": one["floor"]},
            interval,
            words=FIGURES | dict.fromkeys(of.get("by_attribute", ()), RIGHT),
        )
        for title, (of, interval, one) in parts.items()
    ]


def _part(scores: Mapping[str, Any], name: str) -> tuple[Any, Any, Any]:
    return scores[name], scores["interval"][name], scores["controls"][name]


def _open(scores: Mapping[str, Any] | None) -> list[Table]:
    if not scores:
        return []
    controls = scores["controls"]
    title = f"{scores['captions']} captions that leave things open, {scores['draws']} draws of each"
    real = controls["ceiling"] | {"frechet_real": scores["frechet_real"]}
    columns = {"run": {**scores, "frechet_real": None}, "real": real, **_controls(controls)}
    words = FIGURES | OPEN_COVERAGE
    words |= dict.fromkeys(scores["entropy_by_attribute"], ("entropy of this alone", ""))
    return [_table(title, columns, _normal(scores), scores["beats_mu"] or {}, words)]


def _neighbours(scores: Mapping[str, Any] | None) -> list[Table]:
    if not scores:
        return []
    controls, features = scores["controls"], scores["features"]
    title = f"{scores['captions']} held-out captions, {scores['draws']} draws of each, by"
    columns = {
        "run": scores,
        "real": controls["real"],
        "real, decoded": controls["ceiling"],
        **_controls(controls),
    }
    beaten = scores["beats_mu"] or {}
    of = f"{title} {features['of']} ({features['dims']} dims)"
    return [_table(of, columns, scores["interval"], beaten)]


def _controls(controls: Mapping[str, Any]) -> dict[str, Any]:
    return {name: controls[name] for name in ("shuffled", "mu", "z0") if controls.get(name)}


def _normal(scores: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Intervals of 95 % from standard errors."""
    errors = scores["standard_error"].items()
    return {
        name: (scores[name] - 1.96 * error, scores[name] + 1.96 * error)
        for name, error in errors
        if scores[name] is not None
    }


def _table(
    title: str,
    columns: Mapping[str, Mapping[str, Any]],
    intervals: Mapping[str, Any],
    beaten: Mapping[str, Any] | None = None,
    words: Mapping[str, tuple[str, str]] = FIGURES,
) -> Table:
    flat = {name: _flat(scores) for name, scores in columns.items()}
    rows = []
    for name in flat["run"]:
        meaning, better = words.get(name, ("", "higher" if name.endswith("accuracy") else ""))
        cells = [_cell(each.get(name)) for each in flat.values()]
        ends = intervals.get(name)
        interval = " to ".join(map(_cell, ends)) if ends else ""
        reached = (beaten or {}).get(name) is False
        rows.append(Row(name.replace("_", " "), cells, interval, meaning, better, reached))
    return Table(title, list(columns), rows)


def _flat(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """Its figures: numbers, and those of attributes and copies as figures of their own."""
    found: dict[str, float | None] = {}
    for name, value in scores.items():
        if name in ("by_attribute", "entropy_by_attribute"):
            found |= value
        elif name == "copies":
            found |= {name: value["nearer"], "distance ratio": value["median_ratio"]}
        elif name not in NO_FIGURES and (value is None or isinstance(value, int | float)):
            found[name] = value
    return found


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
