"""The training loop.

It knows nothing of Ray: a caller gives it the ranks (`Group`) and gets a row at every probe
(`report`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from flowray.config.errors import InputError
from flowray.config.progress import SILENT, Progress
from flowray.config.recipe import Recipe
from flowray.config.writing import write_whole
from flowray.model.prompts import check_captions
from flowray.store.checkpoint import list_checkpoints, load_state, newest_checkpoint
from flowray.store.doing import WrittenProgress
from flowray.store.latents import (
    LatentSet,
    ensure_latents,
    load_latents,
    load_training,
    some_captions,
)
from flowray.store.remote_run import RemoteRun, is_sent
from flowray.store.rows import has_row
from flowray.store.run import RunDirectory, RunLock
from flowray.store.splits import bad_samples
from flowray.train.ahead import BatchesAhead
from flowray.train.clock import Clock
from flowray.train.group import Group
from flowray.train.looks import Looks
from flowray.train.saving import Saver
from flowray.train.sinks import NOTHING, VISIT, Due, Sinks
from flowray.train.skips import SkippedSteps
from flowray.train.state import Kept, TrainState, fresh_state, kept_of, restore_state
from flowray.train.step import BatchMaker, train_step
from flowray.train.stopping import StopRequests
from flowray.train.times import Times
from flowray.train.uploading import Uploader
from flowray.train.watch import Watch

Row = dict[str, Any]
Report = Callable[[Row], None]
Outcome = Literal["finished", "stopped", "preempted"]
# a worker that was cut off from a dead head trains on for up to a minute before Ray ends it; its
# successor waits
ORPHANED_S = 90.0


class Visitor(AbstractContextManager[Any], Protocol):
    """Whoever examines the run now and then while it trains, and leaves it as it was."""

    def visit(self) -> Any:
        """Examine the run as it is now; what was found goes into the row of the step."""


# of recipe, run, training and held-out data, and the state that is trained
MakeVisitor = Callable[[Recipe, RunDirectory, LatentSet, LatentSet, TrainState], Visitor]


def train(
    recipe: Recipe,
    run: RunDirectory,
    group: Group,
    report: Report,
    make_visitor: MakeVisitor | None = None,
    told: Callable[[], bool] | None = None,
) -> Outcome:
    """Train to `train.steps`, from the newest intact checkpoint of `run` if there is one.

    Probes, samples and a checkpoint also come at the last step, the checkpoint first. `stopped`:
    `run.stop_request` appeared and a checkpoint was written (but see `SkippedSteps.look`). Every
    rank calls `report`, with the lead's row, at every probe. make_visitor: who comes at every
    `probes.doctor_every`-th probe, on the lead. told: whether this rank's process is about to be
    taken away; where any is told so, a checkpoint is written after the step under way: `preempted`.
    InputError where a rank cannot use the GPU that it was given.
    """
    group.require_gpus(recipe.resources.gpus_per_worker, recipe.train.device)
    with Watch(run, group, recipe.resources.stuck_after_s) as watch:
        return _watched(recipe, run, group, report, make_visitor, told, watch)


def _watched(
    recipe: Recipe,
    run: RunDirectory,
    group: Group,
    report: Report,
    make_visitor: MakeVisitor | None,
    told: Callable[[], bool] | None,
    watch: Watch,
) -> Outcome:
    progress = WrittenProgress(run) if group.lead else SILENT
    latents, held_out = _data(recipe, run, group, progress)
    with ExitStack() as closing:
        if group.lead:
            closing.enter_context(RunLock(run, ORPHANED_S))
            times = closing.enter_context(Times(run))
        saver, remote = _saver(recipe, run, group, progress.say, closing)
        with progress.task("loading the models"):
            state = fresh_state(recipe, group.device, group)
            state.data = group.share(latents.told() if group.lead else {})
            restore_state(state, recipe, run, group, progress.say, remote)
        if warning := check_captions(state.model.text.prompts, some_captions(latents)):
            progress.say(warning)
        objective = group.wrap(state.objective)
        maker = BatchMaker(recipe, latents, group, state.model.text.prompts, state.batch_sizes)
        make_batch = BatchesAhead(maker, recipe.train.steps, group.device, recipe.data.prefetch)
        closing.enter_context(make_batch)
        lead, looks = None, Looks(recipe, latents, held_out, group)
        state.before_update = saver.settle
        if group.lead:
            sinks = Sinks(recipe, run, latents, held_out, state, looks, progress.say)
            closing.callback(sinks.close)
            visitor = None
            if make_visitor and recipe.probes.doctor_every:
                visitor = make_visitor(recipe, run, latents, held_out, state)
                closing.enter_context(visitor)
                closing.callback(saver.settle)  # before its last visit, to a run that halted
            lead = _Lead(sinks, visitor, times)
            state.before_update = times.on("saving")(saver.settle)
            saver.resume(state.step)
            times.ready(state.step, group.world)
        skips = SkippedSteps(recipe, run, group, state, latents, saver.wait)
        closing.enter_context(skips)
        closing.callback(watch.apart)  # what ends here may take its time
        stops, clock = StopRequests(run, group, told, saver.failed), Clock()
        # cut off after the checkpoint that the run goes on from
        missed = group.share(lead.sinks.missed() if lead else NOTHING)
        _show(lead, saver, looks, missed, state, report)
        while state.step < recipe.train.steps:
            watch.fetches(state.step)
            clock.start()
            batch = make_batch(state.step)
            clock.waited()
            watch.steps()
            row = train_step(state, objective, batch, recipe, group)
            clock.stepped()
            due, stop = Due.at(state.step, recipe), stops.heard()
            if due.log or due.checkpoint or stop:
                group.finish()  # what hangs on a GPU is to hang within the step
            watch.apart()
            if stop == "failed":
                raise saver.failure()
            saving = False
            if due.log or due.checkpoint or stop:
                saving = skips.look(due.checkpoint or bool(stop))
            if due.log:
                losses = _scalars(row, group) | state.tally.logged() | clock.row()
                if lead:
                    lead.sinks.log(losses)
            if lead and (due.log or saving):
                lead.times.row(state.step)
            if saving:  # at the end nothing is trained meanwhile
                waiting = bool(stop) or state.step == recipe.train.steps
                _save(lead, saver, kept_of(state, recipe, group), waiting=waiting)
            _show(lead, saver, looks, due, state, report)
            if stop and state.step < recipe.train.steps:
                return _ended(lead, saver, state, stop)
        return _ended(lead, saver, state, "finished")


def _data(
    recipe: Recipe, run: RunDirectory, group: Group, progress: Progress
) -> tuple[LatentSet, LatentSet]:
    """Training and held-out latents; what is not encoded yet the lead encodes."""
    if recipe.data.partial is True:  # its shards would be others at each start, and on each rank
        raise InputError("data.partial: true is to be made names of shards first, by `with_part`")
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    folders = ensure_latents(*made_of, progress, recipe.model.text) if group.lead else {}
    group.agree(True)  # the others wait until the lead has encoded
    folders = folders or ensure_latents(*made_of)
    if group.lead:
        run.create()
        if left_out := bad_samples(folders.values()):
            write_whole(run.bad_samples, left_out)
    return load_training(folders["train"], recipe), load_latents(folders["val"])


def _saver(
    recipe: Recipe, run: RunDirectory, group: Group, say: Callable[[str], None], closing: ExitStack
) -> tuple[Saver, RemoteRun | None]:
    """What writes this rank's share of the checkpoints, and on the lead where else they go."""
    train, uploader = recipe.train, None
    remote = RemoteRun.of(recipe, run, ORPHANED_S) if group.lead else None
    if remote:
        closing.enter_context(remote.lock)
        uploader = Uploader(remote, train.keep_checkpoints, train.checkpoint_patience_s, say)
    best = train.keep_best if group.lead else None
    saver = Saver(run, train.keep_checkpoints, group, best, uploader)
    closing.callback(saver.tidy)  # the last one of the three
    if uploader:
        closing.enter_context(uploader)
    return closing.enter_context(saver), remote


@dataclass(frozen=True)
class _Lead:
    """What the lead rank alone has."""

    sinks: Sinks
    visitor: Visitor | None
    times: Times


def _save(lead: _Lead | None, saver: Saver, kept: Kept, *, waiting: bool) -> None:
    """Begin a checkpoint; waiting: and wait for it, where nothing is trained meanwhile."""
    with lead.times.on("saving") if lead else nullcontext():
        saver.begin(kept, *([lead.sinks.flush] if lead else []))
        if waiting:
            saver.wait()


def _ended(lead: _Lead | None, saver: Saver, state: TrainState, how: Outcome) -> Outcome:
    if lead:
        lead.times.ended(state.step, how)
        if how == "preempted":
            saver.leave()
    return how


def _show(
    lead: _Lead | None, saver: Saver, looks: Looks, due: Due, state: TrainState, report: Report
) -> None:
    """Pictures, probes and the visit that are due at the present step, after its checkpoint; every
    rank reports the row, once all that belongs to the step is on disk: who hears it may end this
    process.
    """
    with lead.times.on("probes") if lead else nullcontext():
        row = _look(lead, saver, looks, due, state)
        if due.probe:
            with lead.times.on("saving") if lead else nullcontext():
                saver.wait()
            saver.judge()
            report(looks.group.share(row))


def _look(lead: _Lead | None, saver: Saver, looks: Looks, due: Due, state: TrainState) -> Row:
    row: Row = {}
    if due.sample or due.probe:
        seen = looks(state, pictures=due.sample, probes=due.probe)
        if lead and seen.pictures:
            lead.sinks.sample(seen.pictures)
        if lead and due.probe:
            row = lead.sinks.probe(seen)
    if lead and due.visit and lead.visitor:
        saver.settle()  # it takes steps, and takes them back
        with lead.sinks.gap(VISIT):
            row["findings"] = lead.visitor.visit()
    return row


def is_finished(recipe: Recipe, run: RunDirectory) -> bool:
    """Whether the newest checkpoint has all the steps, the last one's probes are there, which come
    after it, and a bucket that is to have them has both.
    """
    steps, valid = recipe.train.steps, list_checkpoints(run.checkpoints)
    if not valid or load_state(valid[-1])["step"] < steps:
        return False  # known without reading every byte of it, as `newest_checkpoint` does
    if not has_row(run.probes, load_state(valid[-1])["step"]):
        return False
    checkpoint = newest_checkpoint(run.checkpoints)
    if checkpoint is None or (step := load_state(checkpoint)["step"]) < steps:
        return False
    return is_sent(recipe, run, step)


def _scalars(row: dict[str, torch.Tensor], group: Group) -> Row:
    """A step's tensors as numbers, averaged over ranks, in one transfer."""
    stacked = group.mean(torch.stack([value.float().to(group.device) for value in row.values()]))
    return dict(zip(row, stacked.tolist(), strict=True))
