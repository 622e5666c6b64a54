"""`flowray.doctor overfit RECIPE` and `flowray.doctor ablations RECIPE`: the field notes' health
checks, which train for a minute.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flowray.cli.common import FINDINGS, GOOD, refuse_unwritable
from flowray.cli.parser import JSON, Parser, add_recipe, whole_number
from flowray.cli.progress import IMPORTING, ConsoleProgress, RunProgress, quiet_libraries, run_shown
from flowray.cli.ready import check_shards
from flowray.config.errors import InputError
from flowray.config.load import load_recipe, override_recipe, recipe_diffs
from flowray.config.losses import LossConfig, TermConfig
from flowray.config.paths import argument
from flowray.config.progress import Progress
from flowray.config.recipe import Recipe
from flowray.findings.verdicts import Arm, Verdict, ablation_verdicts, free_mu, overfit_verdicts
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory

_ARMS = {
    "overfit": ("overfit",),
    "ablations": ("whole", "flow_only", "no_kl", "shuffled"),
}  # each a run directory
CHECKS = tuple(_ARMS)
_ABOUT = {
    "overfit": (
        "Pass or fail: can this recipe learn a few samples by heart? loss/flow down by more than 20"
        " %, cosine up, KL steady. A recipe that cannot has a bug in its data or code, not a lack"
        " of steps."
    ),
    "ablations": (
        "Four short runs from the same start: the recipe, flow loss only, KL off, captions"
        " shuffled; each arrow that the field notes expect is checked."
    ),
}
_STEPS = {"overfit": 500, "ablations": 200}
STOPPING_S = 5.0  # for an interrupted training to end its step


def _parser(check: str) -> Parser:
    parser = Parser(
        prog=f"flowray.doctor {check}",
        description=_ABOUT[check],
        epilog=(
            "The recipe as it is, but for a constant lr after a short warm-up, KL from the first"
            " step and one worker; key=value has the last word. Each arrow is pass, fail, unclear"
            " or not judged. Exit code: 0 nothing failed, 1 a check failed, 2 bad input."
        ),
    )
    add_recipe(parser, "optim.lr=1e-3")
    if check == "overfit":
        parser.add_argument(
            "--samples",
            type=whole_number(1),
            metavar="N",
            default=128,
            help="how many samples to learn by heart; the notes take 128 or 512",
        )
    parser.add_argument(
        "--steps",
        type=whole_number(20),
        metavar="N",
        default=_STEPS[check],
        help=f"steps of each run (default {_STEPS[check]})",
    )
    parser.add_argument(
        "--dir", type=argument, help="keep the run directories here; a temporary folder otherwise"
    )
    parser.add_argument("--json", action="store_true", help=JSON)
    return parser


def main(argv: list[str]) -> int:
    """Run the check that argv[0] names; returns the exit code."""
    check = argv[0]
    args = _parser(check).parse_intermixed_args(argv[1:])
    if args.dir:
        _refuse_taken(args.dir, check)
    quiet_libraries()
    samples = getattr(args, "samples", None)
    recipe = _short(args.recipe, args.overrides, args.steps, samples)
    with _folder(args.dir) as folder:
        judged = _overfit if check == "overfit" else _ablations
        verdicts = judged(recipe, folder, ConsoleProgress())
    passed = all(verdict.verdict != "fail" for verdict in verdicts)
    if args.json:
        print(
            json.dumps(
                {
                    "check": check,
                    "passed": passed,
                    "recipe": args.recipe,
                    "checks": [asdict(v) for v in verdicts],
                }
            )
        )
    else:
        _show(check, verdicts)
    return GOOD if passed else FINDINGS


def _refuse_taken(folder: Path, check: str) -> None:
    """InputError where a run of the check could not be kept in the folder, before one trains."""
    for name in _ARMS[check]:
        refuse_unwritable(folder / name / "config.yaml", "--dir", makes_folders=True)
        if newest_checkpoint(RunDirectory(folder / name).checkpoints) is not None:
            raise InputError(f"{folder / name} holds a run already; give another --dir")


def _short(source: str, overrides: Sequence[str], steps: int, samples: int | None) -> Recipe:
    """The recipe cut to a short run of one process; what the user typed comes last."""
    short = [
        "optim.schedule.kind=constant",
        f"optim.schedule.warmup={min(20, steps // 10)}",
        "loss.kl.schedule.kind=constant",
        "resources.num_workers=1",
        "probes.raw=true",
        "probes.doctor_every=0",
        "train.grad_every=0",
        "train.checkpoint_url=null",  # a check before may have left a run of this name there
        f"train.steps={steps}",
        f"train.log_every={max(1, steps // 50)}",
        # the last probe alone is judged
        *(f"train.{what}_every={steps}" for what in ("probe", "sample", "checkpoint")),
        *([f"data.limit={samples}"] if samples is not None else []),
    ]
    return load_recipe(source, [*short, *overrides]).recipe


@contextmanager
def _folder(wanted: Path | None) -> Iterator[Path]:
    if wanted is not None:
        yield wanted.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="flowray-health-") as folder:
        yield Path(folder)


def _overfit(recipe: Recipe, folder: Path, progress: Progress) -> list[Verdict]:
    return overfit_verdicts(_train(recipe, folder, "overfit", {}, progress))


def _ablations(recipe: Recipe, folder: Path, progress: Progress) -> list[Verdict]:
    others = [
        name
        for name in LossConfig.model_fields
        if name != "flow" and isinstance(getattr(recipe.loss, name), TermConfig)
    ]
    plans: dict[str, dict[str, Any]] = {
        "whole": {},
        "flow_only": {f"loss.{name}.weight": 0.0 for name in others},
        "no_kl": {"loss.kl.weight": 0.0},
        "shuffled": {"data.shuffle_captions": True},
    }
    arms = {}
    if recipe.loss.kl.weight == 0:
        del plans["no_kl"]
        arms["no_kl"] = Arm(
            refused="loss.kl.weight is 0 in this recipe: there is no KL to switch off"
        )
    arms |= {
        name: _train(recipe, folder, name, changes, progress) for name, changes in plans.items()
    }
    return ablation_verdicts(**arms, mu_is_free=free_mu(recipe.loss.kl, recipe.loss.anchor.weight))


def _train(
    recipe: Recipe, folder: Path, name: str, changes: dict[str, Any], progress: Progress
) -> Arm:
    """One short run of the recipe with some keys changed; a recipe that is refused or training
    that halts is told, not raised.
    """
    with progress.task(IMPORTING):
        from flowray.store.latents import ensure_latents, load_training, with_part
        from flowray.train.group import Group
        from flowray.train.loop import train
        from flowray.train.state import Halted

    try:
        varied = override_recipe(recipe, {**changes, "name": name, "storage_path": str(folder)})
    except InputError as error:
        return Arm(refused=f"the recipe does not allow it: {error}")
    run = RunDirectory(folder / name)
    changed = recipe_diffs(recipe, varied).keys() - {"name", "storage_path"}
    progress.say(
        f"{name}: {recipe.train.steps} steps"
        + (f", {', '.join(sorted(changed))} changed" if changed else "")
    )
    check_shards(varied)
    varied = with_part(varied, progress)
    folders = ensure_latents(
        varied.data, varied.model.autoencoder, varied.model.latent, progress, varied.model.text
    )
    if (
        varied.data.limit is not None
        and (there := len(load_training(folders["train"], varied))) < varied.data.limit
    ):
        progress.say(f"data.shards holds {there} samples, not {varied.data.limit}: those are taken")
    failure: list[Exception] = []
    ended = threading.Event()

    def work() -> None:
        try:
            train(varied, run, Group.current(varied.train.device), lambda row: None)
        except Exception as error:
            failure.append(error)
        finally:
            ended.set()

    try:
        run_shown(work, RunProgress(run, varied.train.steps, 0, progress), progress)
    except KeyboardInterrupt:
        run.stop_request.touch()
        ended.wait(STOPPING_S)  # it writes into a folder that is about to go
        raise
    if failure and not isinstance(failure[0], Halted):
        raise failure[0]
    refused = f"training halted: {failure[0]}" if failure else ""
    prefix = "ema/" if varied.sample.weights == "ema" else ""
    return Arm(
        read_rows(run.metrics), read_rows(run.probes), recipe.model.latent.dims, refused, prefix
    )


def _show(check: str, verdicts: Sequence[Verdict]) -> None:
    said = "FAILED" if any(v.verdict == "fail" for v in verdicts) else "passed"
    unclear = sum(v.verdict == "unclear" for v in verdicts)
    sources = "; ".join(dict.fromkeys(verdict.source for verdict in verdicts))
    title = f"{check}: {said}" + (f", {unclear} of {len(verdicts)} unclear" if unclear else "")
    table = Table(
        title=title,
        caption=f"expected by: {sources}",
        title_justify="left",
        caption_justify="left",
        show_lines=True,
    )
    table.add_column("run", no_wrap=True)
    table.add_column("expected", ratio=1, overflow="fold")
    table.add_column("measured", ratio=1, overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for before, verdict in zip((None, *verdicts), verdicts, strict=False):
        arm = verdict.arm if before is None or before.arm != verdict.arm else ""
        table.add_row(arm, verdict.expected, verdict.measured, verdict.verdict)
    Console(highlight=False).print(table)
