"""The table of an evaluation by nearest neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_ROWS = (
    ("clip_score", "CLIP score"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("density", "density"),
    ("coverage", "coverage"),
    ("diversity", "diversity"),
    ("frechet", "frechet distance"),
    ("kernel", "kernel distance"),
    ("copies/nearer", "copies"),
    ("copies/median_ratio", "  distance ratio"),
)


def show_neighbours(console: Console, run: Path, result: dict[str, Any]) -> None:
    """The tables of an evaluation's `neighbours`."""
    scores = result["neighbours"]
    controls, errors, beaten = (
        scores["controls"],
        scores["standard_error"],
        scores["beats_mu"] or {},
    )
    columns = {
        "run": scores,
        "ceiling": controls["ceiling"],
        "real": controls["real"],
        "shuffled": controls["shuffled"],
        "mu": controls["mu"],
        "z0": controls["z0"],
    }
    many = f"{scores['captions']} held-out captions, {scores['draws']} draws of each"
    judged = f"by {scores['features']['of']}, {scores['features']['dims']} dims"
    table = Table(title=f"{run} at step {result['step']}: {many}, judged {judged}")
    for name in ("", "run", "+-", *list(columns)[1:]):
        table.add_column(name, justify="right" if name else "left")
    for path, label in (*((name, name.replace("_", " ")) for name in _accuracies(scores)), *_ROWS):
        figure = path.partition("/")[0]
        if figure not in scores:
            continue
        cells = [_cell(column, path) for column in columns.values()]
        if beaten.get(figure) is False and path != "copies/median_ratio":
            cells[0] += " *"
        error = errors.get(figure) if path != "copies/median_ratio" else None
        cells.insert(1, "" if error is None else f"{error:.3f}")
        table.add_row(label, *cells)
    console.print(table)
    if False in beaten.values():
        console.print("* the caption's mean picture, decode(mu), reaches as much without the flow")
    if scores["by_group"]:
        _show_groups(console, scores)
    few, features = scores["samples"], scores["features"]
    console.print(
        f"accuracy: the nearest of all {few['real']} real pictures is of the caption; precision,"
        f" recall, density, coverage: against {few['matched']} training pictures, frechet distance"
        f" against {few['reference']}; diversity: distance between draws of a caption, 1 as between"
        " real ones; copies:"
        " nearer to a training picture than 0.99 of held-out pictures are, and the medians' ratio"
    )
    console.print(
        f"ceiling: {few['ceiling']} held-out pictures through the autoencoder; real: these as they"
        " are, each without itself among the real ones; shuffled: the draws against another"
        " caption; mu, z0: decoded without the flow; +-: standard error over captions"
    )
    if few["left_out"]:
        console.print(
            "held-out pictures left out, as they are in the training shards too or held out twice:"
            f" {few['left_out']}"
        )
    console.print(f"features: {features['of']} ({features['why']})")


def _accuracies(scores: dict[str, Any]) -> list[str]:
    return [name for name in scores if name.endswith("_accuracy")]


def _cell(column: dict[str, Any] | None, path: str) -> str:
    value: Any = column
    for key in path.split("/"):
        value = value.get(key) if value else None
    return "" if value is None else f"{value:.3f}"


def _show_groups(console: Console, scores: dict[str, Any]) -> None:
    accuracies = _accuracies(scores)
    table = Table(title="by group")
    heads = [head for name in accuracies for head in (name.replace("_", " "), "ceiling")]
    for name in ("", "captions", *heads):
        table.add_column(name, justify="right" if name else "left")
    for group, told in scores["by_group"].items():
        cells = [_cell(told[of], name) for name in accuracies for of in ("run", "ceiling")]
        table.add_row(group, str(told["captions"]), *cells)
    console.print(table)
