"""How a run is looked at while it trains: probes and pictures, each rank its share of the passes
through the model, the lead all that follows from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from flowray.config.recipe import Recipe
from flowray.model.assemble import FlowModel, Source
from flowray.model.autoencoder import Autoencoder, load_autoencoder
from flowray.probes.battery import (
    Looked,
    ProbeBatch,
    look,
    make_probe_batch,
    probe_metrics,
    read_source,
    together,
)
from flowray.sample.generate import generate, numbers_of
from flowray.store.latents import LatentSet
from flowray.train.group import Group
from flowray.train.optim import delta_rms
from flowray.train.spread import Attempt, attempted, attempted_by_all, share_of
from flowray.train.state import TrainState
from flowray.train.view import Kind, view_of

GRID_PROMPTS = 8
Metrics = dict[str, float]


@dataclass(frozen=True)
class Seen:
    """What a look found, on the lead; what was not asked for is not there.

    pictures: uint8 (prompts, H, W, 3). probes: of the weights of each kind. delta_rms: root mean
    square of EMA minus weights.
    """

    pictures: Attempt[np.ndarray] | None
    probes: dict[Kind, Attempt[Metrics]]
    delta_rms: float


class Looks:
    """Every rank has one, and looks at the same steps: it takes its rows of the probes' batch and
    of the prompts through the model, and the lead makes of all rows what it would have made alone.

    No rank waits for another within its passes, so an error in them is an error of the look, on all
    ranks. Captions are read by every rank: one pass of a text model beside the hundreds through the
    velocity network.
    """

    def __init__(self, recipe: Recipe, latents: LatentSet, held_out: LatentSet, group: Group):
        self.recipe, self.group = recipe, group
        training = latents if group.lead else None  # for what the lead makes of the shots
        self.batch: ProbeBatch = make_probe_batch(recipe, held_out, group.device, training)
        self.prompts = list(recipe.sample.prompts) or _some_prompts(held_out)
        self._autoencoder: Autoencoder | None = None

    @property
    def autoencoder(self) -> Autoencoder:
        """Loaded when the first picture is wanted."""
        if self._autoencoder is None:
            self._autoencoder = load_autoencoder(
                self.recipe.model.autoencoder, self.recipe.model.latent
            ).to(self.group.device)
        return self._autoencoder

    def __call__(self, state: TrainState, *, pictures: bool, probes: bool) -> Seen:
        """Look at a state, which stays as it is. Every rank has to call it."""
        strip: Attempt[np.ndarray] | None = None
        probed: dict[Kind, Attempt[Metrics]] = {}
        made = attempted_by_all(self.group, lambda: view_of(state))
        kinds: tuple[Kind, ...] = ("ema", "raw")
        for kind in kinds:
            paints = pictures and self.recipe.sample.weights == kind
            looks = probes and (kind == "ema" or self.recipe.probes.raw)
            if made.error is not None:
                strip = Attempt(error=made.error) if paints else strip
                probed |= {kind: Attempt(error=made.error)} if looks else {}
            elif paints or looks:
                view = made.get()
                with view.showing(kind):
                    strip = self._pictures(view.model) if paints else strip
                    if looks:
                        last = state.step == self.recipe.train.steps
                        probed[kind] = self._probes(view.model, endpoints=last)
        weights = {name: p.detach() for name, p in state.parameters.items()}
        return Seen(strip, probed, delta_rms(state.ema.average, weights) if probes else 0.0)

    def _pictures(self, model: FlowModel) -> Attempt[np.ndarray]:
        config, count = self.recipe.sample, len(self.prompts)
        mine = share_of(count, self.group)
        if self.group.world > 1:  # no rank fills its share up to a whole batch
            size = min(config.batch_size, math.ceil(count / self.group.world))
            config = config.model_copy(update={"batch_size": size})

        def paint() -> list[np.ndarray]:
            prompts, numbers = self.prompts[mine], numbers_of(self.prompts)[mine]
            of = model, self.autoencoder, prompts, config, self.recipe.probes.seed
            return [generate(*of, numbers=numbers)] if prompts else []

        painted = attempted_by_all(self.group, paint)
        if painted.error:
            return Attempt(error=painted.error)
        parts = self.group.collected(painted.get())
        return attempted(lambda: np.concatenate([*chain(*parts)])) if parts else Attempt()

    def _probes(self, model: FlowModel, *, endpoints: bool) -> Attempt[Metrics]:
        recipe, batch, group = self.recipe, self.batch, self.group
        rows = share_of(len(batch.captions), group)

        def passes() -> tuple[Source, list[Looked]]:
            source = read_source(model, batch)
            if rows.start == rows.stop:
                return source, []
            looked = look(model, recipe, batch, source, rows, endpoints=endpoints)
            return source, [looked if group.world == 1 else looked.to(torch.device("cpu"))]

        passed = attempted_by_all(group, passes)
        if passed.error:
            return Attempt(error=passed.error)
        source, mine = passed.get()
        parts = group.collected(mine)
        if not parts:
            return Attempt()

        def metrics() -> Metrics:
            looked = together([part.to(group.device) for part in chain(*parts)])
            return probe_metrics(model, recipe, batch, source, looked)

        return attempted(metrics)


def _some_prompts(held_out: LatentSet) -> list[str]:
    """The first held-out captions that differ, for the sample strip."""
    texts = [held_out.captions(i)[0] for i in range(min(len(held_out), 10 * GRID_PROMPTS))]
    return list(dict.fromkeys(texts))[:GRID_PROMPTS]
