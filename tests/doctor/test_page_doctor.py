"""doctor.html: whole without other files, says what was found in order, and leaves out what was
not measured.
"""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from flowray.cli.doctor import show
from flowray.config.errors import InputError
from flowray.findings.finding import Finding
from flowray.report.doctor_page import DoctorData, doctor_plots, write_doctor_page

CAUSE = Finding(
    "scale_twice",
    "bad",
    "slope 0.55, about 0.55",
    "the scale is applied <twice>",
    "model.autoencoder.scaling_factor=null",
)
EFFECT = Finding(
    "worse_than_nothing",
    "bad",
    "shoot/skill -1, below -0.05",
    "further than standing still",
    "none",
    "scale_twice",
)
OTHER = Finding(
    "clip_weak", "warn", "loss/clip 4.1, above 3.7", "teaches nothing", "loss.clip.weight=2"
)
TRACE = {"trace/first_dz_rms": 0.0026}
TENTHS = [0.05 + 0.1 * i for i in range(10)]


def data(**changes: object) -> DoctorData:
    rng = np.random.default_rng(0)
    parts: dict[str, object] = {
        "where": "runs/quickstart",
        "step": 3400,
        "findings": [CAUSE, OTHER, EFFECT],
        "metrics": {
            "flow/cos": 0.93,
            "ema/flow/cos": 0.94,
            "trivial/flow/cos": 0.0,
            "shoot/nmse": math.nan,
            "vae/psnr": 12.0,
            "ema/delta_rms": 0.01,
        }
        | TRACE,
        "facts": {"head": "pooled", "notes": ["vae: no pictures"], "nonfinite": {}},
        "history": [{"step": i, "loss/flow": 1 / (i + 1), "lr/trunk": 1e-3} for i in range(20)],
        "pictures": {
            "orig": rng.integers(0, 255, (3, 16, 16, 3), dtype=np.uint8),
            "trace_end": np.zeros((2, 16, 16, 3), np.uint8),
        },
        "curves": {
            "t": {
                "x": TENTHS,
                "nmse": [0.5] * 10,
                "cos": [0.9] * 9 + [math.nan],
                "train_share": [0.1] * 10,
                "gain_ls": [1.0] * 10,
            },
            "endpoint": {
                "x": [8, 16, 32, 64],
                "euler": [1.0, 0.9, 0.8, 0.8],
                "heun": [1.0, 0.9, 0.9, 0.8],
            },
            "teacher": {"x": [5, 100], "fp32": [1e-14, 1e-12], "native": [5e-5, 1.5e-2]},
            "dt_scale": {"x": [1, 2, 3], "nmse": [0.5, 1.0, 2.0]},
            "shares": {"flow": [1.0, 1.0], "kl": [0.1, 0.2]},
            "latents": {
                "x": [-1, 0, 1],
                "z0": [0.2, 0.4, 0.2],
                "z1": [0.1, 0.5, 0.1],
                "mu": [0, 1, 0],
            },
        },
    }
    return DoctorData(**{**parts, **changes})  # type: ignore[arg-type]


def test_the_page_needs_no_other_file_and_keeps_the_order(tmp_path: Path) -> None:
    html = write_doctor_page(tmp_path / "doctor.html", data()).read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert (
        html.index("1. scale twice")
        < html.index("explains: worse than nothing")
        < html.index("2. clip weak")
    )
    assert "3. " not in re.findall(r'<p class="big">(.*?)<', html)
    assert "2 causes found" in html
    assert "the scale is applied &lt;twice&gt;" in html
    assert "vae: no pictures" in html
    assert "[C] decode(z_end)" in html
    assert "[B] first |dz| rms 0.0026" in html
    assert html.count("</html>") == 1


def test_every_plot_is_a_picture_and_every_picture_is_shown(tmp_path: Path) -> None:
    plots = doctor_plots(data())
    assert len(plots) == 11
    for plot in plots:
        assert b"<svg" in base64.b64decode(plot.src.split(",", 1)[1])
        assert plot.alt
    html = write_doctor_page(tmp_path / "doctor.html", data()).read_text(encoding="utf-8")
    tiles = [
        Image.open(io.BytesIO(base64.b64decode(code)))
        for code in re.findall(r"data:image/png;base64,([^\"]+)", html)
    ]
    assert len(tiles) == 5
    assert np.array_equal(np.asarray(tiles[0]), data().pictures["orig"][0])


@pytest.mark.parametrize("left", [0, 1])
def test_what_is_absent_is_left_out(tmp_path: Path, left: int) -> None:
    bare = data(
        metrics={},
        facts={},
        history=[],
        pictures={},
        findings=[CAUSE][:left],
        curves={"t": {"x": [0.5], "nmse": [math.nan]}, "endpoint": {}},
    )
    assert doctor_plots(bare) == []
    html = write_doctor_page(tmp_path / "doctor.html", bare).read_text(encoding="utf-8")
    assert "<h2>Plots" not in html
    assert "<h2>Pictures" not in html
    assert ("Healthy" in html) == (left == 0)


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"doctor\.html: cannot be written"):
        write_doctor_page(tmp_path / "missing" / "doctor.html", data())


def test_numbers_outside_their_range_are_marked(tmp_path: Path) -> None:
    html = write_doctor_page(tmp_path / "doctor.html", data()).read_text(encoding="utf-8")
    rows = {
        row[0]: row[1]
        for row in re.findall(r'<tr><th scope="row">([\w/]+)</th>(.*?)</tr>', html, re.S)
    }
    assert "outside" in rows["vae/psnr"]
    assert "outside" not in rows["flow/cos"]
    assert "0.940" in rows["flow/cos"]
    assert "–" in rows["shoot/nmse"]
    assert "minus raw weights" in rows["ema/delta_rms"]


def test_the_terminal_shows_causes_with_what_they_explain_on_one_screen(tmp_path: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    many = [
        CAUSE,
        *(Finding(f"other_{i}", "warn", "1, above 0", "why", "do") for i in range(8)),
        EFFECT,
    ]
    show(console, data(findings=many), many, tmp_path / "doctor.html")
    text = console.export_text()
    assert (
        text.index("scale_twice")
        < text.index("explains: worse_than_nothing")
        < text.index("other_0")
    )
    assert "most likely cause first" in text
    assert "also: other_5, other_6, other_7" in text
    assert len(text.splitlines()) < 50
