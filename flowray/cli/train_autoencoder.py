"""`flowray.train_autoencoder SHARDS --out FOLDER`: an autoencoder of one's own pictures."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from flowray.cli.common import GOOD
from flowray.cli.parser import JSON, Parser, whole_number
from flowray.cli.progress import IMPORTING, ConsoleProgress, quiet_libraries
from flowray.config.errors import InputError
from flowray.config.paths import argument, expand
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards


def _levels(text: str) -> tuple[int, ...]:
    try:
        channels = tuple(int(part) for part in text.split(","))
    except ValueError:
        channels = ()
    if not 2 <= len(channels) <= 6 or any(c < 8 or c % 8 for c in channels):
        raise argparse.ArgumentTypeError(
            f"got {text}, want two to six multiples of 8, such as 32,64,96,128"
        )
    return channels


def _parser() -> Parser:
    parser = Parser(
        prog="flowray.train_autoencoder",
        description=(
            "Train diffusers' AutoencoderKL on the pictures of a shard set, all of one size:"
            " encoder and decoder, then the decoder alone on latents with noise. A command that"
            " was ended goes on where it was."
        ),
        epilog=("A recipe uses it by model.autoencoder.path and model.latent; its card says both."),
    )
    parser.add_argument("shards", type=expand, help="a folder of .tar files, a glob or one .tar")
    parser.add_argument("--val", type=expand, metavar="SHARDS", help="held-out pictures")
    parser.add_argument("--out", type=argument, required=True, help="the folder to write")
    parser.add_argument(
        "--channels",
        type=_levels,
        default=(32, 64, 96, 128),
        metavar="A,B,...",
        help="of each level, 32,64,96,128: each but the last halves the side",
    )
    counts = {
        "--latent-channels": (4, 1, "channels of a latent"),
        "--steps": (6000, 1, "of encoder and decoder"),
        "--decoder-steps": (2000, 0, "of the decoder alone, afterwards"),
        "--batch-size": (16, 1, "pictures a step"),
        "--seed": (0, 0, "of weights, order and noise"),
        "--workers": (0, 0, "processes that decode pictures"),
    }
    for option, (default, low, what) in counts.items():
        parser.add_argument(
            option, type=whole_number(low), default=default, metavar="N", help=f"{what}, {default}"
        )
    parser.add_argument("--lr", type=float, default=2e-3, metavar="X", help="highest, 2e-3")
    parser.add_argument("--json", action="store_true", help=JSON)
    return parser


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args, progress = _parser().parse_args(argv), ConsoleProgress()
    if not 0 < args.lr < 1:
        raise InputError(f"--lr {args.lr}: must lie between 0 and 1")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(
            f"--out {args.out}: exists already and is not an empty folder; remove it or choose"
            " another"
        )
    reader = ShardReader(find_shards(args.shards))
    held_out = ShardReader(find_shards(args.val)) if args.val else None
    quiet_libraries()
    with progress.task(IMPORTING):
        import torch

        from flowray.data.pictures import decode_image
        from flowray.train.autoencoder import JUDGED, Design, held_out_psnr, in_order
        from flowray.train.autoencoder import train_autoencoder as fit

    design = Design(
        channels=args.channels,
        latent_channels=args.latent_channels,
        steps=args.steps,
        decoder_steps=args.decoder_steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
    )
    height, width = decode_image(reader, 0).shape[:2]
    if height != width or width % design.factor:
        raise InputError(
            f"{args.shards}: pictures of {width} x {height} px; want squares whose side is a"
            f" multiple of {design.factor}, which {len(args.channels)} levels need;"
            " `flowray.data pack --size` makes squares"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.monotonic()
    fit(reader, design, args.out, device=device, workers=args.workers, progress=progress)
    seconds = time.monotonic() - began
    figures: dict[str, Any] = {
        "out": str(args.out),
        "latent": [design.latent_channels, height // design.factor, width // design.factor],
        "seconds": round(seconds, 1),
    }
    if held_out:
        with progress.task("judging held-out pictures"):
            figures["psnr"] = held_out_psnr(args.out, in_order(held_out, JUDGED), args.seed)
    _write_card(args.out, argv, figures)
    print(json.dumps(figures) if args.json else (args.out / "CARD.md").read_text(), end="")
    return GOOD


def _write_card(out: Path, argv: list[str], figures: dict[str, Any]) -> None:
    channels, height, width = figures["latent"]
    lines = [
        f"# {out.name}",
        "",
        "diffusers' AutoencoderKL; mean and standard deviation of its latents are in its config.",
        "",
        f"- command: `python -m flowray.train_autoencoder {' '.join(argv)}`",
        f"- it took {figures['seconds']:.0f} s on a machine with {os.cpu_count()} CPU cores",
        f"- in a recipe: `model.autoencoder.path: {out}`, `model.latent: {{channels: {channels},"
        f" height: {height}, width: {width}}}`",
    ]
    if "psnr" in figures:
        lines.append(f"- encode, sample, decode on held-out pictures: {figures['psnr']:.2f} dB")
    (out / "CARD.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
