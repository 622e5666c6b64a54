"""`python -m benchmarks.gpu`: training on one GPU, measured without Ray, in one JSON file.

What it does in a few minutes: quickstart in every precision, with a resume that must be exact to
the bit; then a 0.6B DiT with random weights on made-up latents: images a second, MFU, memory, where
the host waits for the GPU, what a checkpoint costs, and what a hand-written loop reaches.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.trunk import (
    Bench,
    PlainLoop,
    counted_flops,
    host_syncs,
    kernels,
    made_up_latents,
    seconds,
    trunk_flops,
    trunk_recipe,
)
from flowray.config.load import load_recipe
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.latents import LatentSet
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.speed import peak_of_card
from flowray.train.state import restore_state, save_state

Figures = dict[str, Any]
PARTS = ("trunk", "plain", "checkpoint", "quickstart")
OUT_OF_MEMORY = "out of memory"


def main(argv: list[str]) -> int:
    """Run the parts asked for; 0 where each came to its end and every resume was exact, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-bench"), help="folder for all files")
    parser.add_argument("--size", choices=("xl", "tiny"), default="xl", help="trunk, default xl")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--steps", type=int, default=60, help="quickstart's, for each precision")
    parser.add_argument("--timed", type=int, default=10, help="steps that one timing takes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args(argv)
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out}: is not empty; remove it or choose another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    figures: Figures = {"card": card(device)}
    parts: dict[str, Callable[[], Figures]] = {
        "quickstart": lambda: quickstart(args.out, args.steps, device),
        "trunk": lambda: trunk(args, latents(), device),
        "checkpoint": lambda: checkpoint(args, latents(), device),
        "plain": lambda: plain(args, latents(), device),
    }
    made: list[LatentSet] = []

    def latents() -> LatentSet:
        if not made:
            made.append(made_up_latents(args.out / "latents", (4, 32, 32)))
        return made[0]

    for part in args.parts:
        began = time.perf_counter()
        try:
            figures[part] = parts[part]()
        except torch.OutOfMemoryError as error:
            figures[part] = {OUT_OF_MEMORY: str(error).splitlines()[0]}
        figures[part]["took_s"] = round(time.perf_counter() - began, 1)
        (args.out / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(json.dumps({part: figures[part]}, indent=1), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return 0 if _exact(figures) else 1


def card(device: torch.device) -> Figures:
    """The card, and what it makes of the largest product, beside the vendor's peak."""
    about: Figures = {"torch": torch.__version__, "device": str(device)}
    if device.type != "cuda":
        return about
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds(lambda: a @ b, 3, device)
    reached = 2 * 8192**3 / seconds(lambda: a @ b, 10, device)
    name = torch.cuda.get_device_name(device)
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    product = {
        "bf16_product_tflops": reached / 1e12,
        "bf16_peak_tflops": (peak_of_card(name) or 0) / 1e12,
    }
    return about | {"name": name, "memory_gib": memory, "cuda": torch.version.cuda, **product}


def quickstart(out: Path, steps: int, device: torch.device) -> Figures:
    """The recipe as it stands, in every precision: its speed, and a run that was stopped in its
    middle against one that was not, as sha256 of everything in the last checkpoint.
    """
    figures: Figures = {}
    half = steps // 2
    for precision in ("fp32", "bf16", "fp16"):
        cadence = [f"train.{key}_every={half}" for key in ("probe", "sample", "checkpoint")]
        typed = [f"train.precision={precision}", f"train.steps={steps}", "train.log_every=5"]
        recipe = load_recipe("quickstart", [*typed, *cadence, "resources.num_workers=1"]).recipe
        whole, parted = (RunDirectory(out / f"quickstart-{precision}-{n}") for n in ("a", "b"))
        began = time.perf_counter()
        train(recipe, whole, Group(0, 1, device), lambda row: None)
        took = time.perf_counter() - began
        train(recipe, parted, Group(0, 1, device), partial(_ask_to_stop, parted))
        stopped_at = _newest(parted).name
        parted.stop_request.unlink()
        train(recipe, parted, Group(0, 1, device), lambda row: None)
        rows = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
        late = rows[len(rows) // 2 :]
        probes = [json.loads(line) for line in whole.probes.read_text().splitlines()]
        figures[precision] = {
            "images_per_s": statistics.median(row["perf/images_per_s"] for row in late),
            "data_wait_share": statistics.median(
                row["perf/data_wait_s"] / row["perf/step_s"] for row in late
            ),
            "run_s": took,
            "loss_first_last": [rows[0]["loss/total"], rows[-1]["loss/total"]],
            "shoot_nmse": probes[-1].get("ema/shoot/nmse"),
            "stopped_at": stopped_at,
            "resume_exact": _digest(_newest(whole)) == _digest(_newest(parted)),
        }
    return figures


def _ask_to_stop(run: RunDirectory, row: Figures) -> None:
    run.stop_request.touch()


def _newest(run: RunDirectory) -> Path:
    found = newest_checkpoint(run.checkpoints)
    if found is None:
        raise RuntimeError(f"{run.checkpoints}: no checkpoint")
    return found


def _digest(checkpoint: Path) -> str:
    """Of the tensors' files: weights, average, optimiser."""
    whole = hashlib.sha256()
    for file in sorted(checkpoint.glob("*.safetensors")):
        whole.update(file.name.encode() + file.read_bytes())
    return whole.hexdigest()


def trunk(args: argparse.Namespace, latents: LatentSet, device: torch.device) -> Figures:
    """The 0.6B trunk by batch size, as it stands and with changes that a recipe may choose."""
    figures: Figures = {}
    for batch in args.batches:
        for arm in ("eager", "compiled"):
            try:
                figures[f"{arm}-{batch}"] = _arm(args, latents, device, batch, arm)
            except torch.OutOfMemoryError as error:
                figures[f"{arm}-{batch}"] = {OUT_OF_MEMORY: str(error).splitlines()[0]}
            gc.collect()
            torch.cuda.empty_cache()
            print(json.dumps({f"{arm}-{batch}": figures[f"{arm}-{batch}"]}), flush=True)
    return figures


def _arm(
    args: argparse.Namespace, latents: LatentSet, device: torch.device, batch: int, arm: str
) -> Figures:
    recipe = trunk_recipe(args.size, batch, f"train.compile={str(arm == 'compiled').lower()}")
    bench = Bench.of(recipe, latents, device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    kept = bench.batch()
    first_s = seconds(lambda: bench.step(kept), 1, device)
    seconds(bench.step, 6, device)  # each length of caption has kernels of its own to choose
    alone_s = seconds(lambda: bench.step(kept), args.timed, device)
    whole_s = seconds(bench.step, args.timed, device)
    data_s = seconds(bench.batch, 3, device)
    flops = trunk_flops(bench)
    figures: Figures = {
        "parameters": sum(p.numel() for p in bench.state.model.velocity.parameters()),
        "first_step_s": first_s,
        "step_s": whole_s,
        "step_without_data_s": alone_s,
        "data_s": data_s,
        "images_per_s": batch / whole_s,
        "trunk_flops": flops,
    }
    if cuda:
        peak = peak_of_card(torch.cuda.get_device_name(device))
        figures["mfu"] = flops / whole_s / peak if peak else None
        figures["mfu_without_data"] = flops / alone_s / peak if peak else None
        figures["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        figures["host_syncs"] = host_syncs(lambda: bench.step(bench.batch()))
    if arm == "eager" and batch == args.batches[0]:
        figures["counted_flops"] = counted_flops(bench, kept)
    if cuda and batch == args.batches[-1]:
        figures["kernels"] = kernels(lambda: bench.step(kept))
    return figures


def checkpoint(args: argparse.Namespace, latents: LatentSet, device: torch.device) -> Figures:
    """Seconds that all wait while the trunk's state is written, and that a resume reads; both
    must hold the same bits.
    """
    recipe = trunk_recipe(args.size, 32)
    run = RunDirectory(args.out / "trunk-run")
    run.create()
    bench = Bench.of(recipe, latents, device)
    bench.step()
    save_s = seconds(lambda: save_state(bench.state, recipe, run), 1, device)
    written = sum(file.stat().st_size for file in _newest(run).iterdir())
    other = Bench.of(recipe, latents, device)
    restore_s = seconds(lambda: restore_state(other.state, recipe, run), 1, device)
    same = all(
        torch.equal(p, other.state.parameters[name]) for name, p in bench.state.parameters.items()
    )
    steps = [float(each.step(each.batch())["loss/total"]) for each in (bench, other)]
    return {
        "bytes": written,
        "save_s": save_s,
        "restore_s": restore_s,
        "resume_exact": same and steps[0] == steps[1],
    }


def plain(args: argparse.Namespace, latents: LatentSet, device: torch.device) -> Figures:
    """A hand-written eager loop with the autoencoder on the fly, at the first batch size."""
    from diffusers import AutoencoderKL

    batch = args.batches[0]
    bench = Bench.of(trunk_recipe(args.size, batch), latents, device)
    widths = (128, 256, 512, 512) if args.size == "xl" else (8, 8, 8, 8)
    ends: Figures = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    made: Any = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=min(32, widths[0]),
        **ends,
    )
    loop = PlainLoop(bench, made.to(device).requires_grad_(False), 256)
    kept = bench.batch()
    seconds(lambda: loop.step(kept), 3, device)
    step_s = seconds(lambda: loop.step(kept), args.timed, device)
    return {"batch": batch, "step_s": step_s, "images_per_s": batch / step_s}


def _exact(figures: Any) -> bool:
    """Whether every `resume_exact` in the figures is true, and no part ran out of memory; of the
    trunk a batch size may.
    """
    if not isinstance(figures, dict):
        return True
    whole = OUT_OF_MEMORY not in figures and figures.get("resume_exact", True)
    return whole and all(_exact(part) for name, part in figures.items() if name != "trunk")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
