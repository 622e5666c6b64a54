"""The page of an evaluation: every score beside its controls, and nothing but what was told."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flowray.report.eval_page import write_eval_page

ACCURACY = {"colour": 0.75, "shape": 0.5}
SINGLE = {"mean_attribute_accuracy": 0.625, "all_correct": 0.25, "by_attribute": ACCURACY}
SINGLE |= {"prompts": 8}
PAIR = {"relation": 0.875, "binding": 0.375, "all": 0.125, "prompts": 9}
ONE, TWO = {"ceiling": SINGLE, "floor": SINGLE}, {"ceiling": PAIR, "floor": PAIR}
COPIES = {"copies": {"nearer": 0.011, "median_ratio": None}}
NEAR: dict[str, Any] = {"caption_accuracy": 0.811, "recall": None, "frechet": 5.0, "kernel": -0.25}
NEAR |= COPIES


def told() -> dict[str, Any]:
    sample = {"steps": 20, "solver": {"kind": "euler"}, "guidance_scale": 2.0, "weights": "ema"}
    interval = {"all_correct": [0.0625, 0.4375], "colour": [0.5, 1.0]}
    shapes = SINGLE | {"two_objects": PAIR, "unseen": SINGLE}
    shapes["interval"] = interval | {"two_objects": {"binding": [0.1, 0.7]}, "unseen": {}}
    shapes["controls"] = ONE | {"two_objects": TWO, "unseen": ONE}
    near = {
        "features": {"of": "latents", "dims": 256},
        "captions": 12,
        "draws": 3,
        **NEAR,
        "interval": {"kernel": [-0.5, 0.125], "recall": None},
        "beats_mu": {"frechet": False, "kernel": True},
        "controls": {
            "real": NEAR | {"kernel": 0.0625},
            "ceiling": NEAR,
            "mu": NEAR | {"kernel": 7.5},
            "z0": None,
            "shuffled": {"caption_accuracy": 0.03},
        },
        "samples": dict.fromkeys(("generated", "reference", "matched", "real"), 36),
        "by_group": None,
    }
    near["samples"]["left_out"] = 0
    return {
        "run": "/runs/<b>one</b>",
        "step": 7,
        "seed": 0,
        "sample": sample,
        "shapes": shapes,
        "neighbours": near,
    }


class Cells(HTMLParser):
    """The text of the cells of every row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    png = io.BytesIO()
    Image.new("RGB", (2, 2)).save(png, format="png")
    path: Path = tmp_path_factory.mktemp("page") / "eval.html"
    return write_eval_page(path, told(), png.getvalue()).read_text()


def test_every_score_stands_beside_its_controls(page: str) -> None:
    cells = Cells()
    cells.feed(page)
    rows = [row for row in cells.rows if row]
    (heads,) = [row for row in rows if row[0] == "score" and "mu" in row]
    assert heads == ["score", "run", "95 %", "real", "real, decoded", "shuffled", "mu", *heads[-2:]]
    found = {row[0]: row[1:-1] for row in rows}
    kernel = ["-0.250", "-0.500 to 0.125", "0.062", "-0.250", "", "7.500", "lower"]
    assert found["kernel"] == kernel
    assert found["frechet"][0] == "5.000 *"  # mu does as well
    assert found["recall"][:2] == ["", ""]
    assert found["copies"][0] == "0.011"
    assert found["distance ratio"][0] == ""
    assert found["binding"] == ["0.375", "0.100 to 0.700", "0.375", "0.375", "higher"]
    assert [row[1] for row in rows if row[0] == "all correct"] == ["0.250", "0.250"]
    assert [row[1] for row in rows if row[0] == "colour"] == ["0.750", "0.750"]


def test_open_captions_have_the_distance_of_real_pictures_among_these(tmp_path: Path) -> None:
    own = {"named": 0.5, "entropy": None, "entropy_by_attribute": {"size": 0.9}, "frechet": 9.0}
    own |= COPIES
    scores: dict[str, Any] = {"captions": 3, "draws": 4, **own, "frechet_real": 1.5}
    scores["controls"] = {"ceiling": own, "shuffled": {"named": 0.125}, "mu": None, "z0": None}
    scores |= {"standard_error": {"named": 0.1, "entropy": 0.0}, "beats_mu": None}
    page = write_eval_page(tmp_path / "eval.html", told() | {"open": scores}, None).read_text()
    cells = Cells()
    cells.feed(page)
    found = {row[0]: row[1:5] for row in cells.rows if row}
    assert found["named"] == ["0.500", "0.304 to 0.696", "0.500", "0.125"]
    assert found["frechet real"] == ["", "", "1.500", ""]


def test_it_is_whole_and_a_name_is_no_markup(page: str) -> None:
    assert "<b>one</b>" not in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []


def test_captions_alone_have_a_page(tmp_path: Path) -> None:
    """As of a run on other pictures, whose sheet is gone."""
    some = {key: value for key, value in told().items() if key != "shapes"}
    page = write_eval_page(tmp_path / "eval.html", some, None).read_text()
    assert page.count("<h2>") == 1
