"""A run's sampler as an object, for notebooks and the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowray.config.buckets import size_for
from flowray.config.errors import InputError
from flowray.config.flow import SampleConfig
from flowray.config.load import override_recipe
from flowray.config.progress import Advance
from flowray.config.recipe import Recipe
from flowray.data.decode import upright_rgb
from flowray.data.pixels import to_pictures
from flowray.data.prepare import Preparation
from flowray.flow.solver import Observer, time_grid
from flowray.model.autoencoder import Autoencoder, load_autoencoder
from flowray.sample.arithmetic import sum_latents
from flowray.sample.between import Mix, between
from flowray.sample.generate import (
    check_finite,
    check_negative,
    decoded,
    encoded,
    latent_batches,
    numbers_of,
    source_noise,
)
from flowray.sample.prompts import check_balanced, check_prompts
from flowray.sample.restore import OpenedRun, open_run
from flowray.sample.reverse import RoundTrip, round_trip
from flowray.store.found import Found, find_checkpoint


class Pictures(NamedTuple):
    """images: one a prompt, in order. numbers: how many equal prompts came before each. seed, and
    how they were drawn.
    """

    images: list[Image.Image]
    prompts: list[str]
    numbers: list[int]
    seed: int
    sample: SampleConfig


class Way(NamedTuple):
    """The way of latents: states (T, B, C, H, W) on the CPU at times (T,), from 0, the source's
    draw, to 1.
    """

    times: list[float]
    states: Tensor


class Pipeline:
    """Draws with one checkpoint of a run.

    All methods that draw take any keys of the recipe's `sample` section, such as steps=50 or
    guidance_scale=2; all but `reverse` seed and aspect, width / height, one of the run's
    data.aspect_ratios; all but `between` and `reverse` numbers, which draw of its caption each is
    (`numbers_of` unless given). Calling it, `pictures`, `latents`, `path` and `strip` also take
    negative, a caption to be guided away from, and compile, the velocity network through
    torch.compile. InputError, one line, for what is mistyped or does not go with a method, and for
    a latent that is not finite.
    """

    def __init__(self, opened: OpenedRun, autoencoder: Autoencoder):
        self.recipe, self.step, self.path_of_run = opened.recipe, opened.step, opened.path
        self.model, self.autoencoder = opened.model, autoencoder

    def __call__(self, prompts: Sequence[str], *, seed: int = 0, **how: Any) -> Pictures:
        """Pictures of captions; one is the same whatever captions are beside it."""
        numbers = how.pop("numbers", None)
        numbers = numbers_of(prompts) if numbers is None else numbers
        sample = self.settings(how)
        parts = self.pictures(prompts, seed=seed, numbers=numbers, **how)
        images = [Image.fromarray(picture) for part in parts for picture in part]
        return Pictures(images, list(prompts), list(numbers), seed, sample)

    def pictures(self, prompts: Sequence[str], **how: Any) -> Iterator[np.ndarray]:
        """The same as uint8 (B, H, W, 3), at most `sample.batch_size` at a time."""
        most = self.settings(how).batch_size
        for latents in self._batches(prompts, **how):
            yield decoded(self.autoencoder, latents, most)

    def latents(self, prompts: Sequence[str], **how: Any) -> Tensor:
        """Latents (B, C, H, W) of captions, scaled as in training, on the run's device."""
        return torch.cat(list(self._batches(prompts, **how)))

    def path(self, prompts: Sequence[str], **how: Any) -> Way:
        """The latents on their way, at each edge of the time grid. InputError for dopri5, which
        gives every latent times of its own.
        """
        sample = self.settings(how)
        if sample.solver.kind == "dopri5":
            raise InputError("sample.solver: dopri5 has no times that latents share; take heun")
        times, steps = time_grid(sample.grid, sample.steps), sample.steps
        seen: list[Tensor] = []
        ends = self._batches(
            prompts, observe=lambda k, t, x, v: seen.append(x.float().cpu()), **how
        )
        states = [torch.stack([*seen[-steps:], end.float().cpu()]) for end in ends]
        return Way(times, torch.cat(states, dim=1))

    def strip(self, prompts: Sequence[str], pictures: int, **how: Any) -> np.ndarray:
        """The way as pictures uint8 (B, pictures, H, W, 3): what the latents decode to at as many
        edges of the time grid, evenly chosen, both ends counted. InputError for more than it has.
        """
        edges = self.settings(how).steps + 1
        if not 2 <= pictures <= edges:
            why = f"the way of {edges - 1} sample.steps has {edges} times"
            raise InputError(f"strip: {why}, want from 2 to {edges}, got {pictures}")
        places = [round(i * (edges - 1) / (pictures - 1)) for i in range(pictures)]
        states = self.path(prompts, **how).states[places]
        most = self.settings(how).batch_size
        shown = [decoded(self.autoencoder, state.to(self.device), most) for state in states]
        return np.stack(shown, axis=1)

    def between(
        self,
        prompts: Sequence[str],
        pictures: int,
        *,
        rows: int = 1,
        mix: Mix | None = None,
        seed: int = 0,
        aspect: float | None = None,
        advance: Advance | None = None,
        **keys: Any,
    ) -> np.ndarray:
        """Pictures uint8 (rows, columns, H, W, 3) on the way from each prompt to the next,
        `pictures` a leg, both ends counted; mix: how, as `flowray.sample.between.between` says.
        """
        check_prompts(prompts)
        if len(prompts) < 2 or pictures < 2:
            raise InputError("between: want two prompts or more, and two pictures or more")
        _refuse_own("between", keys)
        made = between(
            self.model,
            self.autoencoder,
            prompts,
            pictures,
            rows,
            self.settings(keys),
            seed,
            advance,
            self._size(aspect),
            mix,
        )
        return made.reshape(rows, -1, *made.shape[1:])

    def arithmetic(
        self,
        prompts: Sequence[str],
        plus: Sequence[str],
        minus: Sequence[str],
        *,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        aspect: float | None = None,
        advance: Advance | None = None,
        **keys: Any,
    ) -> np.ndarray:
        """Pictures uint8 (B, columns, H, W, 3), a row a prompt: the prompt, each of `plus` and
        `minus`, and prompt + plus - minus, all of the prompt's own noise.
        """
        check_prompts([*prompts, *plus, *minus])
        check_balanced(plus, minus)
        _refuse_own("arithmetic", keys)
        config, size, rows = self.settings(keys), self._size(aspect), []
        noise = source_noise(self.model, prompts, seed, self.device, size, numbers)
        for prompt, own in zip(prompts, noise.split(1), strict=True):
            latents = sum_latents(self.model, prompt, plus, minus, config, own)
            check_finite(latents, [prompt, *plus, *minus, prompt])
            rows.append(decoded(self.autoencoder, latents, config.batch_size))
            if advance:
                advance(len(latents))
        return np.stack(rows)

    def reverse(self, latents: Tensor, prompts: Sequence[str], **keys: Any) -> RoundTrip:
        """Where the flow of captions leads to latents (B, C, H, W) from, and there again from it.
        keys: of the recipe's `sample` section.
        """
        check_prompts(prompts)
        if len(prompts) != len(latents):
            raise InputError(f"reverse: {len(latents)} latents, but {len(prompts)} prompts")
        _refuse_own("reverse", keys)
        made = round_trip(self.model, prompts, latents.to(self.device), self.settings(keys))
        check_finite(made.again, prompts)
        return made

    def encode(self, images: Sequence[Image.Image] | Image.Image) -> Tensor:
        """Latents (B, C, H, W) of pictures, the means of their posteriors, scaled as in training.

        Pictures are turned upright, laid on the recipe's background and brought to the run's size
        as in training, also those that training would leave out; where its data.prepare.resize is
        none, by lanczos.
        """
        pixels = to_pictures(self.prepared(images)).to(self.device)
        return encoded(self.autoencoder, pixels, self.recipe.sample.batch_size)

    def prepared(self, images: Sequence[Image.Image] | Image.Image) -> list[np.ndarray]:
        """Pictures uint8 (H, W, 3) as the autoencoder is given them; see `encode`."""
        config = self.recipe.data.prepare
        if config.resize == "none":
            config = config.model_copy(update={"resize": "lanczos"})
        prepare = Preparation(config, self.autoencoder.picture_size)
        given = [images] if isinstance(images, Image.Image) else images
        return [prepare.fitted(upright_rgb(image, config.background)) for image in given]

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents (B, C, H, W)."""
        pictures = decoded(self.autoencoder, latents.to(self.device), self.recipe.sample.batch_size)
        return [Image.fromarray(picture) for picture in pictures]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.velocity.parameters()).device

    def settings(self, how: dict[str, Any]) -> SampleConfig:
        """The `sample` section with the keys of it that are in `how`."""
        return sample_settings(self.recipe, how)

    def _size(self, aspect: float | None) -> tuple[int, int] | None:
        """(height, width) of latents of a ratio; None for the model's own."""
        if aspect is None:
            return None
        return size_for(self.recipe.data, self.recipe.model.latent, aspect)

    def _batches(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        negative: str | None = None,
        aspect: float | None = None,
        observe: Observer | None = None,
        compile: bool = False,
        **keys: Any,
    ) -> Iterator[Tensor]:
        check_prompts(prompts)
        config, start = self.settings(keys), 0
        if negative is not None:
            check_prompts([negative])
            check_negative(self.model, config)
        parts = latent_batches(
            self.model,
            prompts,
            config,
            seed,
            self._size(aspect),
            numbers=numbers,
            negative=negative,
            observe=observe,
            compiled=compile,
        )
        for part in parts:
            check_finite(part, prompts[start : start + len(part)])
            start += len(part)
            yield part


def sample_settings(recipe: Recipe, how: Mapping[str, Any]) -> SampleConfig:
    """A recipe's `sample` section with the keys of it that are in `how`."""
    keys = {f"sample.{key}": x for key, x in how.items() if key not in _OWN}
    sample = override_recipe(recipe, keys).sample
    if (weights := sample.weights) != recipe.sample.weights:
        raise InputError(
            f"weights={weights!r}: they were chosen as the run was loaded; want"
            f' flowray.load(RUN, ["sample.weights={weights}"])'
        )
    return sample


# what is no key of the recipe
_OWN = {"seed", "numbers", "negative", "aspect", "observe", "compile"}


def _refuse_own(method: str, keys: Mapping[str, Any]) -> None:
    """InputError for a key that other methods take and this one does not."""
    if other := sorted(_OWN & keys.keys()):
        raise InputError(f"{method}: does not go with {other[0]}")


def load_pipeline(
    run: Path, keys: Sequence[str] = (), device: str | torch.device | None = None
) -> Pipeline:
    """`flowray.load`."""
    return open_pipeline(find_checkpoint(run, keys), device)


def open_pipeline(found: Found, device: str | torch.device | None = None) -> Pipeline:
    """The sampler of a checkpoint that was found; device: CUDA where there is one unless given."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    opened = open_run(found, where)
    config = opened.recipe.model
    return Pipeline(opened, load_autoencoder(config.autoencoder, config.latent).to(where))
