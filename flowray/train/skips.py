"""Steps whose loss or gradient is not finite: written down, counted, and what is done after too
many.

Such a step leaves weights, moments and step counts of the optimiser as they are and still takes its
batch, its place in the schedules and its update of the average, so that the order of the data and
the number of steps are those of a run without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from flowray.config.recipe import Recipe
from flowray.flow.draws import stream_seed
from flowray.losses.gradients import autocast
from flowray.losses.total import weights_at
from flowray.probes.broken import broken_rows, first_bad_module
from flowray.probes.untouched import untouched
from flowray.store.checkpoint import list_checkpoints
from flowray.store.latents import LatentSet
from flowray.store.rows import RowWriter
from flowray.store.run import RunDirectory
from flowray.train.gradients import micro_batches
from flowray.train.group import Group
from flowray.train.state import Halted, TrainState, restore_state
from flowray.train.step import BatchMaker
from flowray.train.tally import Skipped

FEW = 16  # samples named


class SkippedSteps(AbstractContextManager["SkippedSteps"]):
    """Looks after the skipped steps of a run, at logged steps and before checkpoints, on every
    rank. saved: waits for the checkpoint that is being written.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        group: Group,
        state: TrainState,
        latents: LatentSet,
        saved: Callable[[], None] | None = None,
    ):
        self.recipe, self.run, self.group, self.state = recipe, run, group, state
        self._saved = saved
        # of its own: batches are made in a thread
        make_batch = BatchMaker(recipe, latents, group, sizes=state.batch_sizes)
        self.make_batch, self.indices = make_batch, make_batch.indices
        self.key = latents.reader.key
        self._rows: RowWriter | None = None
        if group.lead and run.skipped.exists():  # those after this step will come again
            self._rows = RowWriter(run.skipped, state.step)

    def look(self, saving: bool) -> bool:
        """Write down what was skipped since the last look, and act on it. saving: whether a
        checkpoint is due, or the run stops; returns whether to write it.

        What is skipped over and over may be the weights' fault, so that in the middle of such steps
        the checkpoint from before them is kept, but for the end of the run. One that stops there
        goes on from that one too: it takes the steps since once more and comes to the same end,
        where from a checkpoint within it would roll back to the very weights at fault.

        After `train.rollback_after` in a row the weights, the optimiser and the average become
        those of the newest checkpoint, and the run goes on with the next batch: the batches since
        then are not taken again, as the same weights would meet them. Halted where there is no
        checkpoint, and after `train.max_skipped` in all.
        """
        tally, limits = self.state.tally, self.recipe.train
        if not (found := tally.look(self.group)):
            return saving
        rows = [self._described(skipped) for skipped in found]
        too_many = tally.skipped > limits.max_skipped
        try:
            rows[0] |= self._diagnosed(found[0].step - 1)
            if not too_many and 0 < limits.rollback_after <= tally.in_a_row:
                back = self._roll_back()
                rows[-1]["rolled_back_to"] = back
                too_many = back is None
        finally:  # what ends the run there may come of them
            self._write(rows)
        if too_many:
            self.state.step = found[-1].step - 1  # who examines the run now meets that batch
            raise Halted(_blame(found[-1], tally.skipped))
        return saving and (not tally.in_a_row or self.state.step == self.recipe.train.steps)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if self.group.lead:
            self._rows = self._rows or RowWriter(self.run.skipped, rows[0]["step"] - 1)
            for row in rows:
                self._rows.write(row)

    def __exit__(self, *_: object) -> None:
        if self._rows:
            self._rows.close()

    def _described(self, skipped: Skipped) -> dict[str, Any]:
        keys = [self.key(int(i)) for i in self.indices(skipped.step - 1)]
        return {
            "step": skipped.step,
            "losses": {name: _number(loss) for name, loss in skipped.losses.items()},
            "norm": _number(skipped.norm),
            "samples": keys,
        }

    def _diagnosed(self, step: int) -> dict[str, Any]:
        """The first module, in a forward pass of that batch with the weights of now, whose output
        is not finite, and the samples that are not where others are.
        """
        batch, model, recipe = self.make_batch(step), self.state.model, self.recipe
        weights = weights_at(recipe.loss, step, recipe.train.steps)
        idle = frozenset(name for name, weight in weights.items() if weight == 0)
        seed = stream_seed(recipe.seed, step, f"dropout/{self.group.rank}")
        first, broken, done = None, [], self.group.rows(recipe.train.batch_size).start
        with untouched(model), self.group.seeded(seed), torch.no_grad():
            model.train()
            model.semantic.eval()  # in training they count their batches
            for part in micro_batches(batch, recipe.train.accumulate):
                with first_bad_module(model) as bad, autocast(recipe, self.group.device):
                    _, forward = self.state.objective(part, idle)
                first = first or (bad[0] if bad else None)
                broken += [done + row for row in broken_rows(forward, part)]
                done += len(part.t)
        # FSDP leaves the root's weights gathered until a backward pass: a roll-back is not in them
        if isinstance(self.state.objective, FSDPModule):
            self.state.objective.reshard()
        found = self.group.gathered((first, broken))
        indices = self.indices(step)
        places = [place for _, rows in found for place in rows][:FEW]
        return {
            "module": next((name for name, _ in found if name), None),
            "broken_samples": [self.key(int(indices[place])) for place in places],
        }

    def _roll_back(self) -> int | None:
        """Take weights, optimiser and average from the newest checkpoint; its step, None where
        there is none.
        """
        state, group = self.state, self.group
        if self._saved:
            self._saved()
        if not group.agree(bool(list_checkpoints(self.run.checkpoints)) if group.lead else False):
            return None
        step, counts, backoffs = state.step, state.tally.kept(), int(state.backoffs)
        sizes = state.batch_sizes
        restore_state(state, self.recipe, self.run, group)
        back, state.step, state.batch_sizes = state.step, step, sizes
        state.tally.restore(counts | {"in_a_row": 0})
        state.backoffs.fill_(backoffs)
        return back


def _number(value: float) -> float | str:
    """nan and inf in words, which JSON has no numbers for."""
    return value if math.isfinite(value) else str(value)


def _blame(last: Skipped, count: int) -> str:
    bad = [name for name, loss in last.losses.items() if not math.isfinite(loss)]
    what = f"loss/{bad[0]}" if bad else f"the gradient (norm {last.norm}) with every loss finite"
    often = "" if count == 1 else f", as in {count - 1} steps before, which skipped_steps.jsonl has"
    return (
        f"step {last.step}: {what} is not finite{often}; it did not reach the weights; try a lower"
        " optim.lr"
    )
