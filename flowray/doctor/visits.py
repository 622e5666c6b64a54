"""The doctor's visits to a run that trains: every now and then a row of findings.jsonl; it reads
the state and leaves it as it was.
"""

from __future__ import annotations

from contextlib import closing, suppress
from dataclasses import asdict
from typing import Any

from flowray.config.recipe import Recipe
from flowray.doctor.examine import examine
from flowray.doctor.subject import examined, live_subject, merged_history, untrained, written_strip
from flowray.findings.diagnose import diagnose
from flowray.model.autoencoder import load_autoencoder
from flowray.store.latents import LatentSet
from flowray.store.rows import RowWriter
from flowray.store.run import RunDirectory
from flowray.train.state import Halted, TrainState


class Visits:
    """Writes findings.jsonl, rows {step, findings}, the most likely cause first; stop rules and the
    live progress read it.

    They are the findings that `flowray.doctor` has on a checkpoint of that step.

    A context manager around training: where that halts, the doctor comes once more, for the state
    is as it was before the step and its next batch is the one that failed.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        latents: LatentSet,
        held_out: LatentSet,
        state: TrainState,
    ):
        self.recipe, self.run, self.state = recipe, run, state
        self.latents, self.held_out = examined(latents), held_out
        device = next(state.model.velocity.parameters()).device
        self.autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent).to(
            device
        )
        # A start from nothing still holds the weights of step 0; a resumed run makes them again.
        initial = (
            {name: p.detach() for name, p in state.parameters.items()}
            if state.step == 0
            else untrained(recipe, state.begun_from)[1]
        )
        self._initial = initial and {name: x.to("cpu", copy=True) for name, x in initial.items()}
        self._rows = RowWriter(run.findings, state.step)

    def visit(self) -> list[dict[str, Any]]:
        """Examine the run as it is now; the findings, the most likely cause first."""
        subject = live_subject(
            self.state,
            self.recipe,
            latents=self.latents,
            held_out=self.held_out,
            autoencoder=self.autoencoder,
            history=merged_history(self.run),
            initial=self._initial,
            strip=written_strip(self.run, self.state.step),
        )
        seen = examine(subject)
        findings = [asdict(f) for f in diagnose(seen.metrics, seen.facts, seen.history)]
        self._rows.write({"step": self.state.step, "findings": findings})
        return findings

    def __enter__(self) -> Visits:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with closing(self._rows), suppress(OSError):  # a full disk may be why it halted
            if kind is not None and issubclass(kind, Halted):
                self.visit()
