"""`flowray.train RECIPE`: one run under Ray Train."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from flowray.cli.common import FINDINGS, GOOD, STOPPED, end
from flowray.cli.memory import advice
from flowray.cli.parser import JSON, Parser, add_recipe
from flowray.cli.progress import IMPORTING, ConsoleProgress, RunProgress, quiet_libraries, run_shown
from flowray.cli.ready import refuse_unready
from flowray.config.card import git_commit, header, render_card
from flowray.config.errors import InputError
from flowray.config.load import (
    Loaded,
    dump_recipe,
    load_recipe,
    override_recipe,
    recipe_diffs,
    recipe_names,
)
from flowray.config.progress import Progress
from flowray.config.recipe import Recipe
from flowray.config.resume import refuse_changes
from flowray.config.writing import write_whole
from flowray.store.checkpoint import load_state, newest_checkpoint
from flowray.store.remote_run import RemoteRun, is_sent
from flowray.store.rows import has_row, read_rows
from flowray.store.run import RunDirectory, RunLock

_CARD_METRICS = (
    "ema/shoot/energy",
    "ema/shoot/diversity",
    "ema/shoot/diversity_all",
    "ema/shoot/nmse",
    "ema/shoot/skill",
    "ema/flow/cos",
    "ema/flow/speed_ratio",
    "ema/std/mean",
    "ema/text/cos_mu",
    "ema/source/separation@0.25",
    "vae/psnr",
)


def _parser() -> Parser:
    parser = Parser(
        prog="flowray.train",
        description=(
            "Train a text-to-image latent flow model under Ray Train. Writes"
            " <storage_path>/<name>/."
        ),
        epilog=(
            f"Packaged recipes: {', '.join(recipe_names())}. Example: python -m flowray.train"
            " quickstart optim.lr=2e-3 name=fast"
        ),
    )
    add_recipe(parser, "loss.kl.weight=0.3")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue <storage_path>/<name> from its newest valid checkpoint",
    )
    planned = (
        "print parts, cost and problems, exit code 1 for any; times a few steps, starts no run"
    )
    parser.add_argument("--plan", action="store_true", help=planned)
    parser.add_argument("--json", action="store_true", help=JSON)
    return parser


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_intermixed_args(argv)
    quiet_libraries()
    loaded = load_recipe(args.recipe, args.overrides, in_place=True)
    progress = ConsoleProgress()
    if args.plan:
        started_s = time.monotonic()
        with progress.task(IMPORTING):
            from flowray.cli.plan import show_plan

        imports_s = time.monotonic() - started_s
        good = show_plan(loaded.recipe, progress, as_json=args.json, imports_s=imports_s)
        return GOOD if good else FINDINGS
    run = RunDirectory(Path(loaded.recipe.storage_path) / loaded.recipe.name)
    checkpoint = _newest(loaded.recipe, run, progress, resume=args.resume)
    if args.resume and not checkpoint:
        progress.say(f"{run.path} has no checkpoint to continue from: it starts at step 0")
    # before anything in it is touched; the worker that trains takes the lock
    RunLock(run).refuse_if_held()
    start = load_state(checkpoint)["step"] if checkpoint else 0
    if start and run.config.is_file():
        before = load_recipe(str(run.config)).recipe
        loaded = _with_its_part(loaded, before)
        refuse_changes(before, loaded.recipe, start, str(run.path))
    if checkpoint and start < loaded.recipe.train.steps:
        from flowray.store.frozen import refuse_other_weights

        refuse_other_weights(checkpoint, load_state(checkpoint), loaded.recipe.model)
    return _train(loaded, run, start, progress, as_json=args.json)


def _newest(
    recipe: Recipe, run: RunDirectory, progress: ConsoleProgress, *, resume: bool
) -> Path | None:
    """The checkpoint that the run goes on from, fetched where it is in the bucket alone; None for a
    new run. InputError where there is one and nobody said to resume.
    """
    remote = RemoteRun.of(recipe, run)
    if remote:
        remote.require_writable()
    if remote and resume:
        RunLock(run).refuse_if_held()
        remote.lock.refuse_if_held()
        run.create()
        with RunLock(run):
            return remote.newest(progress.say)
    checkpoint = newest_checkpoint(run.checkpoints, progress.say)
    place = str(run.path) if checkpoint else ""
    if remote and not checkpoint and any(remote.steps().values()):
        place = remote.url
    if place and not resume:
        raise InputError(
            f"{place} holds a run already; type --resume to continue it, or name=OTHER for a"
            " new one"
        )
    return checkpoint


def _train(
    loaded: Loaded, run: RunDirectory, start: int, progress: ConsoleProgress, *, as_json: bool
) -> int:
    recipe, steps = loaded.recipe, loaded.recipe.train.steps
    if start >= steps and has_row(run.probes, start) and is_sent(recipe, run, start):
        progress.say(f"{run.path} has finished its {steps} steps; train.steps=N for more")
        if as_json:
            report = run.path / "report.html"
            print(_summary(run, stopped=False, seconds=0.0, report=report))
        return GOOD
    with progress.task(IMPORTING):
        from flowray.cluster.capacity import machines
        from flowray.cluster.session import connected
        from flowray.cluster.storage import refuse_unshared
        from flowray.rayrun.encoder import ensure_encoded
        from flowray.tune.room import refuse_without_room

    refuse_unready(recipe)
    with connected(progress):
        refuse_unshared(run.path.parent, recipe.data, progress)
        refuse_without_room(recipe.resources, machines())
    with _taking_over(run):
        loaded = _with_part(loaded, progress)
        recipe = loaded.recipe
        ensure_encoded(recipe, recipe.resources.num_workers, progress)
        if start:
            _say_changes(recipe, run, start, progress)
        _write_config(loaded, run)
        if not run.card.exists():
            _write_card(loaded, run)
        code, seconds = _run(loaded, run, start, progress)
    if code in (GOOD, STOPPED):
        _finish(loaded, run, seconds, progress, as_json=as_json, stopped=code == STOPPED)
    return code


def _with_its_part(loaded: Loaded, before: Recipe) -> Loaded:
    """For a resume: `data.partial: true` as the shards that the run was trained on."""
    if loaded.recipe.data.partial is True and isinstance(before.data.partial, str):
        return _naming(loaded, before.data.partial)
    return loaded


def _with_part(loaded: Loaded, progress: Progress) -> Loaded:
    """`data.partial: true` as the shards that are encoded now."""
    if loaded.recipe.data.partial is not True:
        return loaded
    from flowray.store.latents import with_part  # torch is slow to import

    return _naming(loaded, str(with_part(loaded.recipe, progress).data.partial))


def _naming(loaded: Loaded, part: str) -> Loaded:
    recipe, key = override_recipe(loaded.recipe, {"data.partial": part}), "data.partial"
    old, _ = loaded.diffs.get(key, (loaded.recipe.data.partial, None))
    return replace(loaded, recipe=recipe, diffs=loaded.diffs | {key: (old, part)})


@contextmanager
def _taking_over(run: RunDirectory) -> Iterator[None]:
    """The run's folders, made, for one start at a time: InputError for a second one.

    A start that is refused or cut off leaves a run as it was, and no folder where there was none.
    """
    folders = (run.samples, run.checkpoints, run.path, *run.path.parents)
    new = [folder for folder in folders if not folder.exists()]
    run.create()
    with RunLock(run, file=run.start_lock):
        try:
            yield
        except BaseException:
            if not run.config.exists():  # no worker has begun
                if run.path in new:
                    shutil.rmtree(run.path, ignore_errors=True)
                for folder in new:
                    with suppress(OSError):  # gone, or something else is in it
                        folder.rmdir()
            raise
        finally:
            with suppress(OSError):
                run.next_config.unlink()


def _run(
    loaded: Loaded, run: RunDirectory, start: int, progress: ConsoleProgress
) -> tuple[int, float]:
    """(exit code, seconds) of the workers; InputError for what only they can see."""
    with progress.task(IMPORTING):
        from flowray.cluster.session import started
        from flowray.rayrun.failures import OutOfMemory, RunFailed
        from flowray.rayrun.trainer import fit
        from flowray.train.loop import is_finished

    recipe, steps = loaded.recipe, loaded.recipe.train.steps
    run.stop_request.unlink(missing_ok=True)
    failure: list[Exception] = []

    def work() -> None:
        try:
            fit(recipe, run.path, name="train", ray_storage=run.path / ".ray", say=progress.say)
        except Exception as error:
            failure.append(error)

    started_s, workers = time.monotonic(), recipe.resources
    cpus = workers.num_workers * workers.cpus_per_worker
    with _StopSignals(run, progress) as signals, started(cpus, progress):
        run_shown(work, RunProgress(run, steps, start, progress), progress)
    run.stop_request.unlink(missing_ok=True)
    shutil.rmtree(run.path / ".ray", ignore_errors=True)
    if failure:
        if isinstance(failure[0], RunFailed):
            what = advice(recipe) if isinstance(failure[0], OutOfMemory) else ""
            print(f"error: {'; '.join(filter(None, (str(failure[0]), what)))}", file=sys.stderr)
            return FINDINGS, time.monotonic() - started_s
        raise failure[0]
    stopped = signals.came and not is_finished(recipe, run)
    return STOPPED if stopped else GOOD, time.monotonic() - started_s


class _StopSignals:
    """Within the block SIGTERM and SIGINT ask the loop for a checkpoint and a stop; `came` says
    whether one did.

    Before a worker has taken the run over there is nothing to keep that was not there: they end the
    start.
    """

    def __init__(self, run: RunDirectory, progress: Progress):
        self._run, self._progress, self.came = run, progress, False
        self._before = {
            number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def __enter__(self) -> _StopSignals:
        for number in self._before:
            signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if not self._run.taken_over and number == signal.SIGTERM:
            end(number)
        if not self._run.taken_over:
            raise KeyboardInterrupt
        again, self.came = self.came, True  # before all else: the next one may come meanwhile
        self._run.stop_request.touch()
        if not again:
            after = "the step under way ends the run, with a checkpoint"
            self._progress.say(f"stopping: {after}; Ctrl-C again ends it without")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


def _say_changes(recipe: Recipe, run: RunDirectory, start: int, progress: Progress) -> None:
    """Tell where a resumed run goes on, and which keys are not what they were: a forgotten
    override would change it silently.
    """
    progress.say(f"continuing {run.path} from step {start}")
    if run.config.is_file():
        before = load_recipe(str(run.config)).recipe
        for key, (old, new) in recipe_diffs(before, recipe).items():
            progress.say(f"  changed: {key}={new} (was {old})")


def _facts(recipe: Recipe) -> dict[str, str]:
    return {"exp_id": recipe.name, "commit": git_commit(), "hardware": _hardware(recipe)}


def _write_card(loaded: Loaded, run: RunDirectory) -> None:
    """card.md with the newest probes and samples; what was written into it by hand stays."""
    from flowray.report.load import load_run

    rows = read_rows(run.probes)
    last = rows[-1] if rows else {}
    shown = {key: last[key] for key in _CARD_METRICS if last.get(key) is not None}
    strips = [f"samples/{path.name}" for path in run.strips()[-1:]]
    step, facts = int(last.get("step", 0)), _facts(loaded.recipe)
    loaded_run = load_run(run.path)
    judge = loaded_run.judge(last, step)
    said = {key: judge(key).text for key in shown}
    render_card(
        run.card,
        loaded.recipe,
        loaded.diffs,
        **facts,
        metrics=shown,
        step=step,
        verdicts=said,
        samples=strips,
        time=loaded_run.spent.words if loaded_run.spent else "",
    )


def _write_config(loaded: Loaded, run: RunDirectory) -> None:
    """The recipe, for the worker that restores the state to put in its place."""
    head = header(loaded.recipe, loaded.diffs, **_facts(loaded.recipe))
    write_whole(run.next_config, head + dump_recipe(loaded.recipe))


def _hardware(recipe: Recipe) -> str:
    each = recipe.resources
    gpus = f", {each.gpus_per_worker:g} GPU" if each.gpus_per_worker else ""
    return f"{each.num_workers} worker(s) x {each.cpus_per_worker} CPU{gpus}"


def _finish(
    loaded: Loaded,
    run: RunDirectory,
    seconds: float,
    progress: Progress,
    *,
    as_json: bool,
    stopped: bool,
) -> None:
    with progress.task("writing the report"):
        from flowray.report.page import write_run_report

        _write_card(loaded, run)
        report = write_run_report(run.path)
    if as_json:
        print(_summary(run, stopped=stopped, seconds=seconds, report=report))
        return
    place, prompts = (
        shlex.quote(str(run.path)),
        (run.samples / "prompts.txt").read_text(encoding="utf-8").splitlines(),
    )
    print(f"{'stopped' if stopped else 'finished'} after {seconds:.0f} s: {run.path}")
    print(f"  report       {report}")
    print(f"  sample       python -m flowray.sample {place} {shlex.quote(prompts[0])}")
    print(f"  evaluate     python -m flowray.eval {place}")
    print(f"  TensorBoard  tensorboard --logdir {place}/tensorboard")
    if stopped:
        print("  continue     the same command with --resume")


def _summary(run: RunDirectory, *, stopped: bool, seconds: float, report: Path) -> str:
    rows = read_rows(run.probes)
    facts = {
        "run": str(run.path),
        "stopped": stopped,
        "seconds": round(seconds, 1),
        "report": str(report),
    }
    return json.dumps({**facts, "metrics": rows[-1] if rows else {}})
