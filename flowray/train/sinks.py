"""What the lead rank writes beside the checkpoints: metric and probe rows, TensorBoard events,
sample strips, and what of these failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from flowray.config.errors import last_line
from flowray.config.load import dump_recipe
from flowray.config.recipe import Recipe
from flowray.config.writing import NO_ROOM, write_whole
from flowray.probes.vae import vae_metrics
from flowray.sample.generate import save_strip
from flowray.store.latents import LatentSet, channel_metrics, some_captions
from flowray.store.rows import RowWriter, has_row, read_rows
from flowray.store.run import RunDirectory
from flowray.train.looks import Looks, Seen
from flowray.train.speed import Speed
from flowray.train.spread import Attempt
from flowray.train.state import TrainState

Row = dict[str, Any]
# metrics.jsonl has them of the training batch, probes.jsonl of the held-out one
PROBED_TOO = ("mu/abs_mean", "std/mean")
# a strip and a visit that failed, in gaps.jsonl
PICTURES, VISIT = "pictures", "the doctor's visit"


@dataclass(frozen=True)
class Due:
    """What belongs to a step beside its update."""

    log: bool
    probe: bool
    sample: bool
    checkpoint: bool
    visit: bool

    @classmethod
    def at(cls, step: int, recipe: Recipe) -> Due:
        """By the recipe's cadence; all of it at the last step."""
        train, doctor_every = recipe.train, recipe.probes.doctor_every

        def due(every: int) -> bool:
            return every > 0 and (step % every == 0 or step == train.steps)

        return cls(
            log=due(train.log_every),
            probe=due(train.probe_every),
            sample=due(train.sample_every),
            checkpoint=due(train.checkpoint_every),
            visit=due(train.probe_every * doctor_every),
        )


NOTHING = Due(log=False, probe=False, sample=False, checkpoint=False, visit=False)


class Sinks:
    """What the lead writes. say: hears of what failed and left a gap, which ends no run."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        latents: LatentSet,
        held_out: LatentSet,
        state: TrainState,
        looks: Looks,
        say: Callable[[str], None],
    ):
        self.recipe, self.run, self.state, self.looks = recipe, run, state, looks
        self.start, self._say = state.step, say
        self.latents, self.held_out = latents, held_out
        self._speed = Speed(state.model, some_captions(latents), looks.group)
        self._metrics, self._probes = (
            RowWriter(run.metrics, state.step),
            RowWriter(run.probes, state.step),
        )
        self._logged: Row = next(reversed(read_rows(run.metrics)), {"step": 0})
        self._gaps = RowWriter(run.gaps, state.step) if run.gaps.exists() else None
        # The suffix keeps two starts within one second apart: the writer names its file by the
        # second.
        place = {"logdir": str(run.path / "tensorboard"), "filename_suffix": f".{state.step}"}
        self._board = SummaryWriter(**place, purge_step=state.step + 1, flush_secs=10)
        prompts = "\n".join(looks.prompts) + "\n"
        (run.samples / "prompts.txt").write_text(prompts, encoding="utf-8")
        if run.next_config.exists():  # the state has been restored: what was there before may go
            run.next_config.replace(run.config)
        elif not run.config.exists():
            write_whole(run.config, dump_recipe(recipe))

    def log(self, row: Row) -> None:
        """One metrics row, and the same numbers to TensorBoard."""
        row["perf/images_per_s"] = self.recipe.train.batch_size / row["perf/step_s"]
        row |= self._speed.row(row["perf/images_per_s"])
        self._logged = {"step": self.state.step, **row}
        self._metrics.write(self._logged)
        self._to_board(
            {f"train/{key}" if key in PROBED_TOO else key: value for key, value in row.items()}
        )

    def missed(self) -> Due:
        """What belongs to the step that was restored and was cut off between its checkpoint and
        there: it is to be made before the next step.
        """
        step, run = self.state.step, self.run
        if step == 0:
            return NOTHING
        due = Due.at(step, self.recipe)
        drawn = run.strip(step).exists() or has_row(run.gaps, step, what=PICTURES)
        visited = has_row(run.findings, step) or has_row(run.gaps, step, what=VISIT)
        return Due(
            log=False,
            probe=due.probe and not has_row(run.probes, step),
            sample=due.sample and not drawn,
            checkpoint=False,
            visit=due.visit and not visited,
        )

    def probe(self, seen: Seen) -> Row:
        """Write what the probes of the EMA weights found (and of the raw ones); returns the row for
        `report`.

        Of probes that failed the numbers are missing in it.
        """
        recipe, step = self.recipe, self.state.step
        final, row = step == recipe.train.steps, Row()
        with self.gap("the probes"):
            row |= {f"ema/{key}": value for key, value in seen.probes["ema"].get().items()}
        if raw := seen.probes.get("raw"):
            with self.gap("the probes of the raw weights"):
                row |= raw.get()
        row["ema/delta_rms"] = seen.delta_rms
        # the first probe, resumed or not
        if step == min(recipe.train.probe_every, recipe.train.steps):
            with self.gap("what is said of the data"):
                row |= channel_metrics(self.held_out)
                row["text/cut"] = self.state.model.text.prompts.cut_share(
                    some_captions(self.latents)
                )
        if final:
            with self.gap("the autoencoder's round trip"):
                row |= vae_metrics(
                    self.looks.autoencoder,
                    self.held_out,
                    recipe.probes.batch_size,
                    recipe.probes.seed,
                )
        self._probes.write({"step": step, **row})
        self._to_board(row)
        place = {"step": step, "start": self.start}
        reported = {**place, "budget_steps": recipe.train.steps, **row}
        losses = self._logged if self._logged["step"] == step else {}
        return reported | {key: value for key, value in losses.items() if key.startswith("loss/")}

    def sample(self, painted: Attempt[np.ndarray]) -> None:
        """A strip of pictures of the fixed prompts."""
        step = self.state.step
        with self.gap(PICTURES):
            pictures = painted.get()
            save_strip(pictures, self.run.strip(step))
            self._board.add_images("samples", pictures, step, dataformats="NHWC")

    @contextmanager
    def gap(self, what: str) -> Iterator[None]:
        """A block beside training. Where it fails, gaps.jsonl says so and the run goes on; a full
        disk raises, as the rows after it would not be written either.
        """
        try:
            yield
        except Exception as error:
            if getattr(error, "errno", None) in NO_ROOM:
                raise
            why = f"{type(error).__name__}: {last_line(str(error))}"
            if self._gaps is None:
                self._gaps = RowWriter(self.run.gaps, self.state.step)
            # probes that were cut off behind one are made again
            if not has_row(self.run.gaps, self.state.step, what=what):
                self._gaps.write({"step": self.state.step, "what": what, "why": why})
            self._say(f"warning: step {self.state.step}: {what} failed: {why}; training goes on")

    def flush(self) -> None:
        """TensorBoard's events to disk; the rows are there already."""
        self._board.flush()

    def close(self) -> None:
        """Write what is pending and let go of the files."""
        self._board.close()
        self._metrics.close()
        self._probes.close()
        if self._gaps:
            self._gaps.close()

    def _to_board(self, row: Row) -> None:
        for key, value in row.items():
            if "trivial/" not in key:
                self._board.add_scalar(key, value, self.state.step)
