"""`flowray.export RUN --out DIR`: a run as a pipeline of diffusers."""

from __future__ import annotations

import json

from safetensors import SafetensorError

from flowray.cli.common import GOOD, refuse_unwritable
from flowray.cli.parser import JSON, Parser
from flowray.cli.progress import IMPORTING, LOOKING, ConsoleProgress, quiet_libraries
from flowray.config.errors import InputError
from flowray.config.paths import argument
from flowray.store.found import find_checkpoint


def _parser() -> Parser:
    parser = Parser(
        prog="flowray.export",
        description=(
            "Write a run as a pipeline that diffusers loads without flowray and that paints what"
            " flowray.sample paints; or all its weights in one file."
        ),
        epilog="Example: python -m flowray.export runs/quickstart --out quickstart_pipeline",
    )
    parser.add_argument(
        "run", type=argument, help="a run directory or one of its checkpoints/step_* folders"
    )
    parser.add_argument(
        "--out", type=argument, metavar="DIR", help="folder of the pipeline, not there yet"
    )
    parser.add_argument(
        "--single",
        type=argument,
        metavar="FILE",
        help="a .safetensors file with every weight, and the recipe in its metadata",
    )
    parser.add_argument(
        "--refer",
        action="store_true",
        help="name frozen models of the hub in place of copying them; loading then asks the hub",
    )
    keys = "recipe keys, e.g. sample.guidance_scale=3"
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help=keys)
    parser.add_argument("--json", action="store_true", help=JSON)
    return parser


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_intermixed_args(argv)
    if not (args.out or args.single):
        raise InputError("nothing to write; give --out DIR, --single FILE or both")
    if args.refer and not args.out:
        raise InputError("--refer: names models in a folder; give --out DIR too")
    if args.single and args.single.suffix != ".safetensors":
        raise InputError(f"--single {args.single}: want a name that ends in .safetensors")
    for file, option in ((args.single, "--single"), (args.out and args.out / "x", "--out")):
        if file:
            refuse_unwritable(file, option, makes_folders=True)
    quiet_libraries()
    progress = ConsoleProgress()
    with progress.task(LOOKING):
        found = find_checkpoint(args.run, args.set)
    with progress.task(IMPORTING):
        import torch

        from flowray.export.folder import origin, refuse_taken, save_folder, save_single
        from flowray.export.parts import references, taken_apart
        from flowray.model.autoencoder import load_autoencoder
        from flowray.sample.restore import open_run

    if args.out:
        refuse_taken(args.out)
    with progress.task("loading the models"):
        opened = open_run(found, torch.device("cpu"))
        model = opened.recipe.model
        parts = taken_apart(opened, load_autoencoder(model.autoencoder, model.latent))
        refers = references(opened, parts) if args.refer else {}
    told: dict[str, object] = {"step": opened.step}
    lines: list[str] = []
    where = ""
    try:
        if args.out:
            where = f"--out {args.out}"
            with progress.task("writing the pipeline"):
                sizes = save_folder(opened, parts, refers, args.out.absolute())
            told |= {"folder": str(args.out), "bytes": sizes, "referred": refers}
            lines.append(str(args.out))
            lines += [
                f"  {name:<13} {n / 1e6:10,.1f} MB  {origin(name)}" for name, n in sizes.items()
            ]
            lines += [f"  {name:<13} {'':>13}  named: {at[2]}" for name, at in refers.items()]
        if args.single:
            where = f"--single {args.single}"
            args.single.absolute().parent.mkdir(parents=True, exist_ok=True)
            with progress.task("writing the file"):
                size = save_single(opened, parts, args.single.absolute())
            told |= {"file": str(args.single), "file_bytes": size}
            lines.append(f"{args.single}: {size / 1e6:,.1f} MB")
    except (OSError, SafetensorError) as error:  # the disk; what safetensors writes to has its own
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{where}: cannot be written: {why}") from error
    print(json.dumps(told) if args.json else "\n".join(lines))
    return GOOD
