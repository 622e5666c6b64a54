"""`flowray.train RECIPE`: one run under Ray Train."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from pathlib import Path

from flowray.cli.common import FINDINGS, GOOD, STOPPED
from flowray.cli.progress import RunProgress
from flowray.config.card import git_commit, header, render_card
from flowray.config.errors import InputError
from flowray.config.load import Loaded, dump_recipe, load_recipe, recipe_names
from flowray.config.recipe import Recipe
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory

_CARD_METRICS = ("ema/shoot/nmse", "ema/shoot/skill", "ema/flow/cos", "ema/flow/speed_ratio", "ema/std/mean", "ema/text/cos_mu", "vae/psnr")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowray.train",
        description="Train a text-to-image latent flow model under Ray Train. Writes <storage_path>/<name>/.",
        epilog=f"Packaged recipes: {', '.join(recipe_names())}. Example: python -m flowray.train quickstart optim.lr=2e-3 name=fast",
    )
    parser.add_argument("recipe", help="a packaged recipe's name or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted recipe keys, e.g. loss.kl.weight=0.3")
    parser.add_argument("--resume", action="store_true", help="continue <storage_path>/<name> from its newest valid checkpoint")
    parser.add_argument("--plan", action="store_true", help="print the parts and the cost, start nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(argv)
    loaded = load_recipe(args.recipe, args.overrides)
    if args.plan:
        return _plan(loaded.recipe, as_json=args.json)
    run = RunDirectory((Path(loaded.recipe.storage_path) / loaded.recipe.name).absolute())
    if newest_checkpoint(run.checkpoints) and not args.resume:
        raise InputError(f"{run.path} holds a run already; type --resume to continue it, or name=OTHER for a new one")
    return _train(loaded, run, as_json=args.json)


def _train(loaded: Loaded, run: RunDirectory, *, as_json: bool) -> int:
    from flowray.rayrun.session import started
    from flowray.rayrun.trainer import RunFailed, fit
    from flowray.store.latents import ensure_latents
    from flowray.train.loop import is_finished

    recipe = loaded.recipe
    if is_finished(recipe, run):
        print(f"{run.path} has finished its {recipe.train.steps} steps", file=sys.stderr)
        return GOOD
    run.create()
    _write_card(loaded, run)
    ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent, lambda text: print(text, file=sys.stderr, flush=True))
    failure: list[Exception] = []

    def work() -> None:
        try:
            workers = recipe.resources
            with started(num_cpus=workers.num_workers * workers.cpus_per_worker):
                fit(recipe, run.path, name="train", ray_storage=run.path / ".ray")
        except Exception as error:
            failure.append(error)

    began = time.monotonic()
    stop_asked = _run_with_signals(work, run, RunProgress(run, recipe.train.steps, sys.stderr))
    stopped = stop_asked and not is_finished(recipe, run)
    run.stop_request.unlink(missing_ok=True)
    if failure:
        if isinstance(failure[0], RunFailed):
            print(f"error: {failure[0]}", file=sys.stderr)
            return FINDINGS
        raise failure[0]
    _finish(loaded, run, time.monotonic() - began, as_json=as_json, stopped=stopped)
    return STOPPED if stopped else GOOD


def _run_with_signals(work: object, run: RunDirectory, progress: RunProgress) -> bool:
    """Run `work` in a thread, showing progress; SIGTERM or SIGINT asks the loop for a checkpoint and a stop. Returns whether one came.

    The thread leaves the main thread free for signals; Ray Train would otherwise abort on SIGINT without a checkpoint.
    """
    asked = threading.Event()

    def ask(*_: object) -> None:
        if not asked.is_set():
            print("stopping: a checkpoint is being written (this takes a few seconds)", file=sys.stderr, flush=True)
        asked.set()
        run.stop_request.touch()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        thread = threading.Thread(target=work, name="ray-train", daemon=True)  # type: ignore[arg-type]
        thread.start()
        while thread.is_alive():
            thread.join(0.5)
            progress.show()
        progress.show()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return asked.is_set()


def _write_card(loaded: Loaded, run: RunDirectory) -> None:
    recipe = loaded.recipe
    head = header(recipe, loaded.diffs, exp_id=recipe.name, commit=git_commit(), hardware=_hardware(recipe))
    partial = run.config.with_suffix(".partial")
    partial.write_text(head + dump_recipe(loaded.recipe), encoding="utf-8")
    partial.replace(run.config)


def _hardware(recipe: Recipe) -> str:
    each = recipe.resources
    gpus = f", {each.gpus_per_worker:g} GPU" if each.gpus_per_worker else ""
    return f"{each.num_workers} worker(s) x {each.cpus_per_worker} CPU{gpus}"


def _finish(loaded: Loaded, run: RunDirectory, seconds: float, *, as_json: bool, stopped: bool) -> None:
    from flowray.report.page import write_run_report

    rows = read_rows(run.probes)
    last = rows[-1] if rows else {}
    recipe = loaded.recipe
    strips = [f"samples/{path.name}" for path in sorted(run.samples.glob("step_*.png"))[-1:]]
    shown = {key: last[key] for key in _CARD_METRICS if last.get(key) is not None}
    step = last.get("step", 0)
    facts = {"exp_id": recipe.name, "commit": git_commit(), "hardware": _hardware(recipe)}
    render_card(run.card, recipe, loaded.diffs, **facts, metrics=shown, step=step, samples=strips)
    report = write_run_report(run.path)
    if as_json:
        print(json.dumps({"run": str(run.path), "stopped": stopped, "seconds": round(seconds, 1), "report": str(report), "metrics": last}))
        return
    command = f"python -m flowray.sample {run.path} "
    print(f"{'stopped' if stopped else 'finished'} after {seconds:.0f} s: {run.path}")
    print(f"  report       {report}")
    print(f'  sample       {command}"a small red circle left of a large blue square"')
    print(f"  evaluate     python -m flowray.eval {run.path}")
    print(f"  TensorBoard  tensorboard --logdir {run.path / 'tensorboard'}")
    if stopped:
        print("  continue     the same command with --resume")


def _plan(recipe: Recipe, *, as_json: bool) -> int:
    from flowray.model.assemble import build_model, part_sizes

    parameters = part_sizes(build_model(recipe.model, recipe.loss, recipe.seed))
    images = recipe.train.steps * recipe.train.batch_size
    plan = {"parameters": parameters, "steps": recipe.train.steps, "images": images, "workers": recipe.resources.num_workers}
    if as_json:
        print(json.dumps(plan))
        return GOOD
    for part, count in parameters.items():
        print(f"{part:<28}{count:>14,}")
    print(f"{recipe.train.steps} steps of {recipe.train.batch_size} = {images:,} images on {recipe.resources.num_workers} worker(s)")
    return GOOD
