"""The loop that one writes first, on flowray's modules: what `benchmarks step` times beside
flowray's own.

It decodes and encodes each step's pictures, steps a stock AdamW, averages the weights parameter by
parameter and reads every loss at every step; nothing is made ahead. The draws are flowray's, so
that the losses can be compared.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tensorboardX import SummaryWriter

from flowray.config.load import load_recipe
from flowray.data.pictures import decode_image
from flowray.data.pixels import to_pictures
from flowray.data.prepare import Preparation
from flowray.losses.total import total_loss, weights_at
from flowray.model.autoencoder import Autoencoder, load_autoencoder
from flowray.model.latent import Moments
from flowray.store.latents import LatentSet, ensure_latents, load_training
from flowray.store.rows import RowWriter
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.optim import lr_at, set_lr
from flowray.train.state import fresh_state
from flowray.train.step import BatchMaker

OWN = ("params", "name", "scale", "lr_max", "lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class Pictures(LatentSet):
    """The set without its cache: moments are encoded when they are asked for. Those of the batch
    asked for last are kept, for the samples that borrow another one's latent.
    """

    autoencoder: Autoencoder | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_last", {})

    def moments(self, indices: np.ndarray) -> Moments:
        last: dict[int, tuple[torch.Tensor, torch.Tensor]] = vars(self)["_last"]
        wanted = indices.tolist()
        if not last.keys() >= set(wanted):
            assert self.autoencoder is not None
            reader, size = self.picture_reader(), self.autoencoder.picture_size
            prepare = Preparation(self.prepare, size)
            images = to_pictures([decode_image(reader, i, prepare) for i in wanted])
            with torch.no_grad():
                pairs = zip(*self.autoencoder.encode_moments(images), strict=True)
            last.clear()
            last.update(zip(wanted, pairs, strict=True))
        mean, logvar = zip(*(last[i] for i in wanted), strict=True)
        return Moments(torch.stack(mean), torch.stack(logvar))


def plain(recipe_name: str, *overrides: str) -> None:
    """Train the recipe on one CPU thread; rows and events as flowray's loop leaves them."""
    recipe = load_recipe(recipe_name, list(overrides)).recipe
    torch.set_num_threads(recipe.resources.cpus_per_worker)
    run, group = RunDirectory(Path(recipe.storage_path) / recipe.name), Group.current("cpu")
    run.create()
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    latents = load_training(ensure_latents(*made_of)["train"], recipe)
    autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
    make_batch = BatchMaker(recipe, Pictures(**vars(latents), autoencoder=autoencoder), group)
    state = fresh_state(recipe, group.device)
    groups = [{key: each[key] for key in OWN} for each in state.optimizer.param_groups]
    optimizer = torch.optim.AdamW(groups)
    average = {name: p.detach().clone() for name, p in state.parameters.items()}
    rows = RowWriter(run.metrics, 0)
    board = SummaryWriter(logdir=str(run.path / "tensorboard"))
    for step in range(recipe.train.steps):
        weights = weights_at(recipe.loss, step, recipe.train.steps)
        set_lr(optimizer, lr_at(state.schedule, recipe.optim.lr, step, recipe.train.steps))
        losses, _ = state.objective(make_batch(step))
        total = total_loss(losses, weights)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(list(state.parameters.values()), recipe.optim.clip_grad)
        optimizer.step()
        decay = min(recipe.train.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, p in state.parameters.items():
                average[name].mul_(decay).add_(p, alpha=1 - decay)
        row = {f"loss/{name}": loss.item() for name, loss in losses.items()}
        row["loss/total"] = total.item()
        rows.write({"step": step + 1, **row})
        for name, value in row.items():
            board.add_scalar(name, value, step + 1)
    board.close()
    rows.close()


if __name__ == "__main__":
    plain(*sys.argv[1:])
