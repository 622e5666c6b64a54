"""`flowray.train_autoencoder SHARDS --out FOLDER`: an autoencoder of one's own pictures."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowray.cli.common import GOOD
from flowray.cli.parser import JSON, Parser, number, whole_number
from flowray.cli.progress import IMPORTING, ConsoleProgress, quiet_libraries
from flowray.config.cache import cache_dir
from flowray.config.errors import InputError
from flowray.config.load import load_recipe
from flowray.config.paths import PathField, absolute, expand, model_argument
from flowray.config.train import DataConfig
from flowray.data.pack import LARGEST
from flowray.data.prepare import Preparation
from flowray.data.reader import ShardReader
from flowray.data.shards import NAMED, find_shards, refuse_occupied

if TYPE_CHECKING:  # torch takes seconds to import, and --help none
    import torch

    from flowray.train.autoencoder import Design

HIGHEST_LR = 0.1  # AdamW moves every weight by about its learning rate at every step
CARD = "CARD.md"
MAX_BAD = DataConfig().max_bad


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


def _place(text: str) -> Path:
    # `.` has no name to put another folder beside, and a recipe starts from its own folder
    return Path(absolute(text, PathField(), Path.cwd()))


def _parser() -> Parser:
    parser = Parser(
        prog="flowray.train_autoencoder",
        description=(
            "Train diffusers' AutoencoderKL on the pictures of a shard set: encoder and decoder,"
            " then the decoder alone on latents with noise. A command that was ended goes on where"
            " it was."
        ),
        epilog="A recipe uses it by model.autoencoder.path and model.latent, as CARD.md says.",
    )
    parser.add_argument(
        "shards", type=expand, help=f"a folder of .tar files, a glob, one .tar, {', '.join(NAMED)}"
    )
    held_out = "held-out pictures; a named set has its own"
    parser.add_argument("--val", type=expand, metavar="SHARDS", help=held_out)
    parser.add_argument("--out", type=_place, required=True, help="the folder to write")
    parser.add_argument(
        "--size",
        type=whole_number(1, LARGEST),
        metavar="PX",
        help="crop and resize to squares; without it, all of one size",
    )
    key = "of data.prepare, such as min_size=32; may come again"
    parser.add_argument("--prepare", action="append", default=[], metavar="key=value", help=key)
    left_out = f"share of bad samples that is left out, {MAX_BAD:g}"
    share = number(0, 1)
    parser.add_argument("--max-bad", type=share, default=MAX_BAD, metavar="X", help=left_out)
    parser.add_argument(
        "--channels",
        type=_levels,
        default=(32, 64, 96, 128),
        metavar="A,B,...",
        help="of each level, 32,64,96,128; all but one halve it",
    )
    counts = {
        "--latent-channels": (4, 1, "channels of a latent"),
        "--steps": (6000, 0, "of encoder and decoder"),
        "--decoder-steps": (2000, 0, "of the decoder alone, afterwards"),
        "--batch-size": (16, 1, "pictures a step"),
        "--seed": (0, 0, "of weights, order and noise"),
        "--workers": (0, 0, "processes that decode pictures"),
    }
    for option, (default, low, what) in counts.items():
        parser.add_argument(
            option, type=whole_number(low), default=default, metavar="N", help=f"{what}, {default}"
        )
    rate = number(0, HIGHEST_LR, above=0)
    parser.add_argument("--lr", type=rate, default=2e-3, metavar="X", help="highest, 2e-3")
    parser.add_argument(
        "--preview",
        type=number(0, 1),
        default=0.1,
        metavar="X",
        help="weight of the latents' likeness to the picture, 0.1",
    )
    parser.add_argument(
        "--noise",
        type=number(0, 1),
        default=0.3,
        metavar="X",
        help="most noise that the decoder learns to read, 0.3",
    )
    parser.add_argument(
        "--half", action="store_true", help="save the weights in fp16, half as large"
    )
    parser.add_argument(
        "--start",
        type=model_argument,
        metavar="MODEL",
        help="begin with its weights; --steps 0: its decoder alone",
    )
    planned = "print what would be trained, and from which step"
    parser.add_argument("--plan", action="store_true", help=planned)
    parser.add_argument("--json", action="store_true", help=JSON)
    return parser


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args, progress = _parser().parse_args(argv), ConsoleProgress()
    if not (args.steps or args.start):
        raise InputError(
            "--steps 0: leaves an encoder that nothing has trained; give --start MODEL"
        )
    refuse_occupied(args.out)
    quiet_libraries()
    prepare = _preparation(args)
    bad = list[dict[str, str]]()
    reader = _open(args, args.shards, "train", prepare, bad, progress)
    val = args.val or (args.shards if args.shards in NAMED else None)
    held_out = _open(args, val, "val", prepare, bad, progress) if val else None
    with progress.task(IMPORTING):
        import torch

        from flowray.store.splits import BAD_SAMPLES
        from flowray.train.autoencoder import Design, held_out_psnr
        from flowray.train.autoencoder import train_autoencoder as fit
        from flowray.train.autoencoder_pictures import JUDGED, in_order

    design = Design(
        channels=args.channels,
        latent_channels=args.latent_channels,
        steps=args.steps,
        decoder_steps=args.decoder_steps,
        batch_size=args.batch_size,
        lr=args.lr,
        preview=args.preview,
        noise=args.noise,
        seed=args.seed,
        start=args.start,
        prepare=prepare,
    )
    side = _side(args.shards, [reader, held_out] if held_out else [reader], design)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = {
        "out": str(args.out),
        "latent": [design.latent_channels, side // design.factor, side // design.factor],
        "device": _name(device),
    }
    if args.plan:
        figures["held_out"] = len(held_out) if held_out else 0
        _print_plan(figures | _plan(reader, design, args.out, side), as_json=args.json)
        return GOOD

    def complete(partial: Path, seconds: float) -> None:
        figures["seconds"] = round(seconds, 1)
        if held_out:
            with progress.task("judging held-out pictures"):
                pictures = in_order(held_out, JUDGED, prepare)
                figures["psnr"] = held_out_psnr(partial, pictures, args.seed, device)
        (partial / CARD).write_text(_card(args.out, argv, figures), encoding="utf-8")
        if bad:
            rows = "".join(json.dumps(row) + "\n" for row in bad)
            (partial / BAD_SAMPLES).write_text(rows, encoding="utf-8")

    fit(
        reader,
        design,
        args.out,
        device=device,
        workers=args.workers,
        half=args.half,
        progress=progress,
        complete=complete,
    )
    print(json.dumps(figures) + "\n" if args.json else (args.out / CARD).read_text(), end="")
    return GOOD


def _preparation(args: argparse.Namespace) -> Preparation:
    keys = ["resize=lanczos" if args.size else "resize=none", *args.prepare]
    config = load_recipe("base", [f"data.prepare.{key}" for key in keys]).recipe.data.prepare
    return Preparation(config, (args.size, args.size) if args.size else None)


def _open(
    args: argparse.Namespace,
    spec: str,
    split: str,
    prepare: Preparation,
    bad: list[dict[str, str]],
    progress: ConsoleProgress,
) -> ShardReader:
    """A split of a named set, or the shards that `spec` names, without what is to be left out,
    which is added to `bad`; of held-out ones those that are judged.
    """
    shards = () if spec in NAMED else find_shards(spec)
    with progress.task(IMPORTING):
        from flowray.store.encode import Budget
        from flowray.store.latents import split_shards
        from flowray.train.autoencoder_pictures import JUDGED, look_through
    every = ShardReader(shards or split_shards(DataConfig(shards=spec), progress)[split])
    most = JUDGED if split == "val" else None
    looked_at = len(every) if most is None else min(most, len(every))
    budget = Budget(split, looked_at, args.max_bad, option="--max-bad ", kept="")
    where = cache_dir(None)
    reader, rows = look_through(
        every, budget, prepare, progress, where, most=most, planned=args.plan
    )
    bad += rows
    if told := budget.told():
        progress.say(f"{told}; bad_samples.jsonl in {args.out} will name them")
    return reader


def _side(shards: str, readers: list[ShardReader], design: Design) -> int:
    """The side of the pictures in px; InputError where they are not squares of one size that the
    levels can halve.
    """
    from flowray.data.pictures import one_size

    height, width = one_size(readers, shards, design.prepare)
    if height != width or width % design.factor:
        raise InputError(
            f"{shards}: pictures of {width} x {height} px; want squares whose side is a multiple"
            f" of {design.factor}, which {len(design.channels)} levels need; --size PX makes them"
        )
    return height


def _name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores"


def _plan(reader: ShardReader, design: Design, out: Path, side: int) -> dict[str, Any]:
    """What would be trained, and what is there already of it."""
    import torch

    from flowray.train.autoencoder import fresh, left_over, refuse_other_start

    refuse_other_start(design, side)
    newest, state = left_over(reader, design, out)
    with torch.device("meta"):
        parameters = sum(each.numel() for each in fresh(design, side).parameters())
    return {
        "pictures": len(reader),
        "side": side,
        "channels": list(design.channels),
        "parameters": parameters,
        "steps": design.steps,
        "decoder_steps": design.decoder_steps,
        "batch_size": design.batch_size,
        "start": design.start,
        "from_step": state.get("step", 0),
        "removes": str(newest) if newest and not state else None,
    }


def _print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan))
        return
    channels, height, width = plan["latent"]
    levels = ",".join(map(str, plan["channels"]))
    lines = {
        "pictures": f"{plan['pictures']} of {plan['side']} px, {plan['held_out']} held out",
        "autoencoder": f"levels {levels}, {plan['parameters']:,} parameters",
        "latent": f"({channels}, {height}, {width})",
        "steps": f"{plan['steps']}, then {plan['decoder_steps']} of the decoder alone,"
        f" {plan['batch_size']} pictures each",
        "begins with": plan["start"] or "random weights",
        "from step": plan["from_step"],
        "device": plan["device"],
        "out": plan["out"],
    }
    if plan["removes"]:
        lines["removes"] = f"{plan['removes']}, of another design or other pictures"
    for name, value in lines.items():
        print(f"{name:<12} {value}")


def _card(out: Path, argv: list[str], figures: dict[str, Any]) -> str:
    channels, height, width = figures["latent"]
    lines = [
        f"# {out.name}",
        "",
        "diffusers' AutoencoderKL; mean and standard deviation of its latents are in its config.",
        "",
        f"- command: `python -m flowray.train_autoencoder {shlex.join(argv)}`",
        f"- training took {figures['seconds']:.0f} s, last on {figures['device']}",
        f"- in a recipe: `model.autoencoder.path: {out}`, `model.latent: {{channels: {channels},"
        f" height: {height}, width: {width}}}`",
    ]
    if "psnr" in figures:
        lines.append(f"- encode, sample, decode on held-out pictures: {figures['psnr']:.2f} dB")
    return "\n".join(lines) + "\n"
