"""What the tests of the files under cluster/ share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent  # shellcheck and hadolint come with the dev extra
LAUNCHERS = ["aws.yaml", "gcp.yaml", "onprem.yaml"]
CLOUDS = LAUNCHERS[:2]
KUBERAY = ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"]
TOKEN_PATH = "/home/ray/.ray/auth_token"


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def strings(node: Any) -> Iterator[tuple[str, str]]:
    """(key, text) of every string in a parsed file."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from (
                ((key, value),)
                if isinstance(value, str)
                else ((key if k == "" else k, v) for k, v in strings(value))
            )
    elif isinstance(node, list):
        for value in node:
            yield from (("", value),) if isinstance(value, str) else strings(value)


def header(name: str) -> str:
    return "\n".join(
        line for line in (CLUSTER / name).read_text().splitlines()[:24] if line.startswith("#")
    )
