"""`python -m tools.assets {autoencoder,decoder,text}`: train the small models that flowray ships,
and write their cards.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from flowray.cli.common import GOOD
from flowray.cli.parser import Parser
from flowray.config.card import git_commit

DEFAULT_STEPS = {"autoencoder": 7000, "decoder": 3000, "text": 2000}


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        prog="tools.assets",
        description="Train a model that flowray ships, from the embedded data alone.",
    )
    parser.add_argument("what", choices=sorted(DEFAULT_STEPS))
    parser.add_argument("--out", type=Path, help="folder to write; default flowray/assets/<what>")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from flowray.model.assets import asset_path
    from tools import train_autoencoder, train_text

    steps = args.steps or DEFAULT_STEPS[args.what]
    out = args.out or asset_path("autoencoder" if args.what == "decoder" else args.what)
    began = time.monotonic()
    if args.what != "text":
        data = "embedded shapes (training split) and digits pictures, half of them in false colours"
        made = {"autoencoder": train_autoencoder.train, "decoder": train_autoencoder.train_decoder}
        figures = made[args.what](out, steps, args.seed)
    else:
        data = "embedded captions"
        figures = train_text.train(out, steps, args.seed)
    lines = [
        f"# The {args.what} model shipped with flowray",
        "",
        f"- command: `python -m tools.assets {' '.join(argv)}`",
        f"- data: {data}, made by `flowray.data make`; nothing else",
        (
            f"- made: {git_commit() or 'outside a repository'}, {time.monotonic() - began:.0f} s on"
            f" {os.cpu_count()} CPU cores"
        ),
        *(f"- {name}: {value:.2f}" for name, value in figures.items()),
    ]
    (out / "CARD.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return GOOD


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
