"""Colours of the figures, each with its counterpart on a dark page; a figure follows the reader's
setting by itself.

Okabe and Ito's, told apart with any colour vision; shape and line style say the same thing again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)
INK, MUTED, GRID, PAPER = "#334155", "#94a3b8", "#e5e9f0", "#ffffff"
CYCLE = (BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY, INK)
DARK: Mapping[str, str] = {
    BLUE: "#4db3f0",
    VERMILLION: "#ff8a3d",
    GREEN: "#2fcf9f",
    PINK: "#eda4ca",
    ORANGE: "#f5bd3f",
    SKY: "#8fd0ff",
    INK: "#d3dbe6",
    MUTED: "#71809a",
    GRID: "#2b3544",
    PAPER: "#19212c",
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a `$` in a parameter value is a dollar
    "svg.hashsalt": "flowray",  # equal rows give equal bytes
}


def themed(svg: bytes) -> bytes:
    """The figure with every colour of the palette by name, light or dark as the reader's page
    is.
    """
    names = {colour: f"--c{index}" for index, colour in enumerate(DARK)}
    text = re.sub(r"#[0-9a-f]{6}\b", lambda found: _named(found[0], names), svg.decode())
    light, dark = (
        "".join(f"{name}:{pick[colour]};" for colour, name in names.items())
        for pick in ({c: c for c in DARK}, DARK)
    )
    style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    return text.replace("<defs>", f"{style}<defs>", 1).encode()


def _named(colour: str, names: Mapping[str, str]) -> str:
    return f"var({names[colour]}, {colour})" if colour in names else colour
