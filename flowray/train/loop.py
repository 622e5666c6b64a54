"""The training loop.

It knows nothing of Ray: a caller gives it the ranks (`Group`) and gets a row at every probe
(`report`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal, Protocol

import torch
from tensorboardX import SummaryWriter

from flowray.config.load import dump_recipe
from flowray.config.progress import SILENT
from flowray.config.recipe import Recipe
from flowray.config.writing import write_whole
from flowray.model.autoencoder import Autoencoder, load_autoencoder
from flowray.model.prompts import check_captions
from flowray.probes.battery import ProbeBatch, make_probe_batch, run_probes
from flowray.probes.vae import vae_metrics
from flowray.sample.generate import generate, save_strip
from flowray.store.checkpoint import list_checkpoints, load_state, newest_checkpoint
from flowray.store.doing import WrittenProgress
from flowray.store.latents import (
    LatentSet,
    channel_metrics,
    ensure_latents,
    load_latents,
    load_training,
    some_captions,
)
from flowray.store.rows import RowWriter
from flowray.store.run import RunDirectory, RunLock
from flowray.store.splits import bad_samples
from flowray.train.ahead import BatchesAhead
from flowray.train.group import Group
from flowray.train.state import TrainState, fresh_state, restore_state, save_state
from flowray.train.step import BatchMaker, train_step
from flowray.train.view import View, view_of

Row = dict[str, Any]
Report = Callable[[Row], None]
Outcome = Literal["finished", "stopped"]
GRID_PROMPTS = 8
# a worker that was cut off from a dead head trains on for up to a minute before Ray ends it; its
# successor waits
ORPHANED_S = 90.0
# metrics.jsonl has them of the training batch, probes.jsonl of the held-out one
PROBED_TOO = ("mu/abs_mean", "std/mean")


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
) -> Outcome:
    """Train to `train.steps`, from the newest valid checkpoint of `run` if there is one.

    Probes, samples and a checkpoint also come at the last step. `stopped`: `run.stop_request`
    appeared and a checkpoint was written. Every rank reports the lead's row of every probe.
    make_visitor: who comes at every `probes.doctor_every`-th probe, on the lead. InputError where a
    rank cannot use the GPU that it was given.
    """
    group.require_gpus(recipe.resources.gpus_per_worker, recipe.train.device)
    progress = WrittenProgress(run) if group.lead else SILENT
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    folders = ensure_latents(*made_of, progress, recipe.model.text) if group.lead else {}
    group.agree(True)  # the others wait until the lead has encoded
    folders = folders or ensure_latents(*made_of)
    latents, held_out = load_training(folders["train"], recipe), load_latents(folders["val"])
    if group.lead:
        run.create()
        if left_out := bad_samples(folders.values()):
            write_whole(run.bad_samples, left_out)
    with ExitStack() as closing:
        if group.lead:
            closing.enter_context(RunLock(run, ORPHANED_S))
        with progress.task("loading the models"):
            state = fresh_state(recipe, group.device, group)
            restore_state(state, recipe, run, group)
        if warning := check_captions(state.model.text.prompts, some_captions(latents)):
            progress.say(warning)
        objective = group.wrap(state.objective)
        make_batch = closing.enter_context(
            BatchesAhead(BatchMaker(recipe, latents, group), recipe.train.steps, group.device)
        )
        sinks = Sinks(recipe, run, latents, held_out, state, group) if group.lead else None
        if sinks:
            closing.callback(sinks.close)
        visitor = None
        if make_visitor and sinks and recipe.probes.doctor_every:
            visitor = make_visitor(recipe, run, latents, held_out, state)
            closing.enter_context(visitor)
        attending, cadence, last = group.lead or state.shards, recipe.train, recipe.train.steps
        while state.step < last:
            started = time.perf_counter()
            batch = make_batch(state.step)
            waited = time.perf_counter() - started
            row = train_step(state, objective, batch, recipe, group)
            step, logged = state.step, state.step % cadence.log_every == 0 or state.step == last
            if logged:
                losses = _scalars(row, group)
                losses |= {"perf/data_wait_s": waited, "perf/step_s": time.perf_counter() - started}
                if sinks:
                    sinks.log(losses)
            stop = logged and group.agree(run.stop_request.exists() if group.lead else False)
            probing, probed = step % cadence.probe_every == 0 or step == last, {}
            sampling = step % cadence.sample_every == 0 or step == last
            view = view_of(state) if attending and (probing or sampling) else None
            if sinks and view and probing:
                probed = sinks.probe(view, losses if logged else {}, final=step == last)
            if sinks and view and sampling:
                sinks.sample(view)
            if attending and (step % cadence.checkpoint_every == 0 or step == last or stop):
                save_state(state, recipe, run)
                if sinks:
                    sinks.flush()
            if visitor and (
                step % (cadence.probe_every * recipe.probes.doctor_every) == 0 or step == last
            ):
                probed["findings"] = visitor.visit()
            # after all that belongs to the step is on disk: who hears it may end this process
            if probing:
                report(group.share(probed))
            if stop and step < last:
                return "stopped"
        return "finished"


def is_finished(recipe: Recipe, run: RunDirectory) -> bool:
    """Whether the newest checkpoint has all the steps."""
    steps, valid = recipe.train.steps, list_checkpoints(run.checkpoints)
    if not valid or load_state(valid[-1])["step"] < steps:
        return False  # known without reading every byte of it, as `newest_checkpoint` does
    checkpoint = newest_checkpoint(run.checkpoints)
    return checkpoint is not None and load_state(checkpoint)["step"] >= steps


def _scalars(row: dict[str, torch.Tensor], group: Group) -> Row:
    """A step's tensors as numbers, averaged over ranks, in one transfer."""
    stacked = group.mean(torch.stack([value.float().to(group.device) for value in row.values()]))
    return dict(zip(row, stacked.tolist(), strict=True))


class Sinks:
    """What the lead writes: metric and probe rows, TensorBoard events, sample strips."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        latents: LatentSet,
        held_out: LatentSet,
        state: TrainState,
        group: Group,
    ):
        self.recipe, self.run, self.state, self.device = recipe, run, state, group.device
        self.start = state.step
        self.held_out = held_out
        self.probe_batch: ProbeBatch = make_probe_batch(recipe, held_out, group.device, latents)
        self.prompts = list(recipe.sample.prompts) or _some_prompts(held_out)
        self._metrics, self._probes = (
            RowWriter(run.metrics, state.step),
            RowWriter(run.probes, state.step),
        )
        # The suffix keeps two starts within one second apart: the writer names its file by the
        # second.
        place = {"logdir": str(run.path / "tensorboard"), "filename_suffix": f".{state.step}"}
        self._board = SummaryWriter(**place, purge_step=state.step + 1, flush_secs=10)
        self._autoencoder: Autoencoder | None = None
        (run.samples / "prompts.txt").write_text("\n".join(self.prompts) + "\n", encoding="utf-8")
        if run.next_config.exists():  # the state has been restored: what was there before may go
            run.next_config.replace(run.config)
        elif not run.config.exists():
            write_whole(run.config, dump_recipe(recipe))

    @property
    def autoencoder(self) -> Autoencoder:
        """Loaded when the first picture is wanted."""
        if self._autoencoder is None:
            self._autoencoder = load_autoencoder(
                self.recipe.model.autoencoder, self.recipe.model.latent
            ).to(self.device)
        return self._autoencoder

    def log(self, row: Row) -> None:
        """One metrics row, and the same numbers to TensorBoard."""
        row["perf/images_per_s"] = self.recipe.train.batch_size / row["perf/step_s"]
        self._metrics.write({"step": self.state.step, **row})
        self._to_board(
            {f"train/{key}" if key in PROBED_TOO else key: value for key, value in row.items()}
        )

    def probe(self, view: View, losses: Row, *, final: bool) -> Row:
        """Run the probes on the EMA weights (and the raw ones); returns the row for `report`."""
        row: Row = {}
        with view.averaged():
            row |= {
                f"ema/{key}": value
                for key, value in run_probes(
                    view.model, self.recipe, self.probe_batch, endpoints=final
                ).items()
            }
        if self.recipe.probes.raw:
            with view.plain():
                row |= run_probes(view.model, self.recipe, self.probe_batch, endpoints=final)
        row["ema/delta_rms"] = view.delta_rms()
        # the first probe, resumed or not
        if self.state.step == min(self.recipe.train.probe_every, self.recipe.train.steps):
            row |= channel_metrics(self.held_out)
        if final:
            row |= vae_metrics(
                self.autoencoder,
                self.held_out,
                self.recipe.probes.batch_size,
                self.recipe.probes.seed,
            )
        self._probes.write({"step": self.state.step, **row})
        self._to_board(row)
        place = {"step": self.state.step, "start": self.start}
        reported = {**place, "budget_steps": self.recipe.train.steps, **row}
        return reported | {key: value for key, value in losses.items() if key.startswith("loss/")}

    def sample(self, view: View) -> None:
        """A strip of pictures of the fixed prompts with the weights that `sample.weights` names."""
        config = self.recipe.sample
        with view.averaged() if config.weights == "ema" else view.plain():
            pictures = generate(
                view.model, self.autoencoder, self.prompts, config, self.recipe.probes.seed
            )
        save_strip(pictures, self.run.samples / f"step_{self.state.step:06d}.png")
        self._board.add_images("samples", pictures, self.state.step, dataformats="NHWC")

    def flush(self) -> None:
        """TensorBoard's events to disk; the rows are there already."""
        self._board.flush()

    def close(self) -> None:
        """Write what is pending and let go of the files."""
        self._board.close()
        self._metrics.close()
        self._probes.close()

    def _to_board(self, row: Row) -> None:
        for key, value in row.items():
            if "trivial/" not in key:
                self._board.add_scalar(key, value, self.state.step)


def _some_prompts(held_out: LatentSet) -> list[str]:
    """The first held-out captions that differ, for the sample strip."""
    texts = [held_out.captions(i)[0] for i in range(min(len(held_out), 10 * GRID_PROMPTS))]
    return list(dict.fromkeys(texts))[:GRID_PROMPTS]
