"""`flowray.bench`: the measurements of a checkout's `benchmarks` folder, which no wheel carries."""

from __future__ import annotations

import sys
from pathlib import Path

from flowray.config.errors import InputError


def main(argv: list[str], root: Path = Path(__file__).parents[2]) -> int:
    """`python -m benchmarks` of the checkout that this flowray lies in.

    root: where that is. InputError where it is none, as an installed wheel's folder.
    """
    if not all((root / part).is_file() for part in ("pyproject.toml", "benchmarks/__main__.py")):
        raise InputError(
            f"flowray.bench: the benchmarks are not part of an installed flowray, and {root} is no"
            " checkout of it; run `python -m flowray.bench` in a checkout"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from benchmarks.__main__ import main as benchmarks

    return benchmarks(argv, "flowray.bench")
