"""Bugs planted in the source, which `flowray.doctor --selfcheck` finds without a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from faults import Bug, Fault, in_bf16, of_its_own, replacing, target
from torch import Tensor

from flowray.config.flow import EulerSolver, HeunSolver
from flowray.flow import solver
from flowray.losses import terms, total
from flowray.model.assemble import FlowModel
from flowray.model.assets import asset_path
from flowray.model.autoencoder import Autoencoder
from flowray.model.latent import LatentScale, Moments, over_channels
from flowray.sample import generate as generate_module
from flowray.train.optim import Ema
from flowray.train.step import BatchMaker

SHIPPED = json.loads((asset_path("autoencoder") / "config.json").read_text())
# per channel
SCALE, SHIFT = tuple(1 / std for std in SHIPPED["latents_std"]), tuple(SHIPPED["latents_mean"])


def _unscaled(moments: Moments, noise: Tensor) -> Tensor:
    return LatentScale(SCALE, SHIFT, False).unscale(_healthy_latent(moments, noise))


def _healthy_latent(moments: Moments, noise: Tensor) -> Tensor:
    return LatentScale(SCALE, SHIFT, False).sample(moments, noise)


def training_latents(spoil: Callable[[Moments, Tensor], Tensor]) -> Callable[[], Bug]:
    """z1 of the training batches as `spoil(moments, noise)` makes it."""

    def spoilt(self: BatchMaker, indices: np.ndarray, noise: Tensor) -> Tensor:
        return spoil(self.latents.moments(indices), noise)

    return replacing(BatchMaker, "_latents", lambda _: spoilt)


def _inverted_unscale(original: Any) -> Any:
    return lambda self, z: z * over_channels(self.scale, z) + over_channels(self.shift, z)


def _resampled(original: Any) -> Any:
    def generate_latents(*args: Any) -> Tensor:
        z = original(*args)
        return LatentScale(SCALE, SHIFT, True).sample(Moments(z, torch.zeros_like(z)), z)

    return generate_latents


def _scaled_kl(original: Any) -> Any:
    return lambda mu, logvar, form: original(mu * 0.18215, logvar + 2 * np.log(0.18215), form)


def _train_mode_everywhere() -> Bug:
    original = Autoencoder.__init__

    def start(self: Autoencoder, *args: Any) -> None:
        original(self, *args)
        self.net.train()

    @contextmanager
    def planted() -> Iterator[None]:
        with (
            patch.object(Autoencoder, "__init__", start),
            patch.object(Autoencoder, "train", lambda self, mode=True: self),
        ):
            yield

    return planted()


def _scaled_raw(original: Any) -> Any:
    def encode_moments(self: Autoencoder, pictures: Tensor) -> Moments:
        mean, logvar = original(self, pictures)
        return Moments(mean * over_channels(self.scale.scale, mean), logvar)

    return encode_moments


def _wide(original: Any) -> Any:
    return lambda self, moments, noise: original(
        self, moments, (0.5 * moments.logvar).exp() * noise * 1.2
    )


def _mean_in_training(original: Any) -> Any:
    def source(self: FlowModel, captions: Any, noise: Tensor) -> Any:
        return original(self, captions, torch.zeros_like(noise) if self.training else noise)

    return source


def _shifted(original: Any) -> Any:
    return lambda text, image, scale, gather: original(text, image.roll(1, 0), scale, gather=gather)


def _halved(original: Any) -> Any:
    return lambda *args: original(*args) / 2


def _reversed_time(network: Any) -> Any:
    return lambda x, t, null: network(x, 8 * t - 4, null)


def _plain_euler(config: Any, velocity_fn: Any, x: Tensor, grid: Any, observe: Any) -> Tensor:
    return solver._euler(EulerSolver(), velocity_fn, x, grid, observe)


def _negated(original: Any) -> Any:
    return lambda *args: -original(*args)


# Bugs in the source, which `flowray.doctor --selfcheck` finds without a run; named by the check
# that fails first.
SOURCE_FAULTS: tuple[Fault, ...] = (
    Fault("moments_scaled", ("encode",), bug=replacing(Autoencoder, "encode_moments", _scaled_raw)),
    Fault("autoencoder_train_mode", ("frozen",), bug=_train_mode_everywhere),
    Fault("sigma_is_variance", ("sample",), bug=replacing(LatentScale, "sample", _wide)),
    Fault(
        "scale_twice",
        ("latent_scale",),
        bug=training_latents(
            lambda m, noise: _healthy_latent(m, noise) * over_channels(SCALE, noise)
        ),
    ),
    Fault("scale_never", ("latent_scale",), bug=training_latents(_unscaled)),
    Fault("moments_as_latent", ("latent_scale",), bug=training_latents(lambda m, noise: m.mean)),
    Fault(
        "mean_as_latent",
        ("latent_drawn",),
        bug=training_latents(lambda m, noise: _healthy_latent(m, torch.zeros_like(noise))),
    ),
    Fault(
        "scale_inverted_at_decode",
        ("decode",),
        bug=replacing(LatentScale, "unscale", _inverted_unscale),
    ),
    Fault("sign_flipped", ("path",), bug=target(lambda x0, x1: x0 - x1)),
    Fault("target_x1", ("path",), bug=target(lambda x0, x1: x1)),
    Fault("target_epsilon", ("path",), bug=target(lambda x0, x1: x0)),
    Fault("mean_as_source", ("source",), bug=replacing(FlowModel, "source", _mean_in_training)),
    Fault(
        "time_code_mismatch",
        ("trained_code",),
        bug=replacing(total, "time_code", lambda _: lambda t: 8 * t - 4),
    ),
    Fault("flow_halved", ("flow_loss",), bug=replacing(terms, "flow_mse", _halved)),
    Fault("kl_on_scaled", ("kl",), bug=replacing(terms, "kl_per_dim", _scaled_kl)),
    Fault("kl_negated", ("kl",), bug=replacing(terms, "kl_per_dim", _negated)),
    Fault("labels_shifted", ("contrastive",), bug=replacing(terms, "info_nce", _shifted)),
    Fault("text_with_itself", ("contrastive",), bug=replacing(terms, "info_nce", of_its_own)),
    Fault(
        "ema_forgotten", ("ema",), bug=replacing(Ema, "update", lambda _: lambda self, step: None)
    ),
    Fault("steps_halved", ("euler",), bug=replacing(solver, "_at", _halved)),
    Fault(
        "heun_is_euler",
        ("solvers",),
        bug=lambda: patch.dict(solver._SOLVERS, {HeunSolver: _plain_euler}),
    ),
    Fault("sampling_in_bf16", ("precision",), bug=replacing(generate_module, "integrate", in_bf16)),
    Fault(
        "time_code_sampling",
        ("sampled_code",),
        bug=replacing(generate_module, "with_time_code", lambda _: _reversed_time),
    ),
    Fault(
        "sample_on_latent",
        ("sampler",),
        bug=replacing(generate_module, "generate_latents", _resampled),
    ),
    Fault("pictures_negated", ("pictures",), bug=replacing(generate_module, "generate", _negated)),
)
