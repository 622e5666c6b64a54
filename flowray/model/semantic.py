"""The networks of the semantic losses: contrastive tower, DINO student and teacher, REPA projector,
perceptual distance.

Training runs on cached latents and has no pictures. A network that wants to see one gets the
decoded latent: the frozen autoencoder is loaded beside it and run only where a loss that needs it
is on. Nothing here has a part in making pictures.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.losses import (
    ClipLossConfig,
    DinoLossConfig,
    EmaTeacher,
    LossConfig,
    RepaLossConfig,
)
from flowray.config.model import ModelConfig
from flowray.config.towers import ImageTower, TowerConfig
from flowray.model.autoencoder import load_autoencoder
from flowray.model.images import ImageEncoder, load_image_encoder
from flowray.model.layers import ConvAdaptor
from flowray.model.levels import VelocityNet
from flowray.model.pretrained import planning
from flowray.model.ranks import gathered, sum_over_ranks
from flowray.model.vgg import Lpips


def _trunk(latent: LatentSpec, hidden: int, out: int) -> nn.Sequential:
    flat = hidden * math.ceil(latent.height / 2) * math.ceil(latent.width / 2)
    return nn.Sequential(
        nn.Conv2d(latent.channels, hidden, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(hidden, hidden, 3, stride=2, padding=1),
        nn.GELU(),
        _Flat(math.ceil(latent.height / 2), math.ceil(latent.width / 2)),
        nn.LayerNorm(flat),
        nn.Linear(flat, out),
    )


class _Flat(nn.Module):
    """Flattens features (B, C, h, w); those of a bucket's latents are averaged to the rows and
    columns of the model's own first, as torchvision's VGG takes pictures of any size.
    """

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.size = rows, columns

    def forward(self, features: Tensor) -> Tensor:
        if features.shape[2:] != self.size:
            features = F.adaptive_avg_pool2d(features, self.size)
        return features.flatten(1)


class SmallTower(nn.Module):
    """Two trunks of one form, on the image latent z1 and the text latent z0."""

    wants_pictures = False

    def __init__(self, config: TowerConfig, latent: LatentSpec):
        super().__init__()
        self.image = _trunk(latent, config.hidden, config.dim)
        self.text = _trunk(latent, config.hidden, config.dim)

    def forward(self, z0: Tensor, z1: Tensor, pictures: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.text(z0), self.image(z1)


class PictureTower(nn.Module):
    """SigLIP's or CLIP's tower on the decoded z1, brought to the size of z0; the text side is z0
    itself.
    """

    wants_pictures = True

    def __init__(self, config: ImageTower, latent: LatentSpec):
        super().__init__()
        self.encoder = load_image_encoder(config.net, "model.semantic.net", frozen=config.frozen)
        if not config.frozen:
            self.encoder.freeze_idle()
        width, hidden = self.encoder.width, config.hidden
        self.out: nn.Module
        if config.output == "adaptor":
            self.out = nn.Sequential(ConvAdaptor(width, config.hidden, latent.shape), nn.Flatten())
        else:
            self.out = nn.Sequential(
                nn.Linear(width, hidden),
                nn.GELU(),
                nn.LayerNorm(hidden),
                nn.Linear(hidden, latent.dims),
            )

    def forward(self, z0: Tensor, z1: Tensor, pictures: Tensor | None) -> tuple[Tensor, Tensor]:
        return z0.flatten(1), self.out(self.encoder(_seen(pictures)).pooled)


_TOWERS: dict[type, Callable[[Any, LatentSpec], SmallTower | PictureTower]] = {
    TowerConfig: SmallTower,
    ImageTower: PictureTower,
}


class SemanticTower(nn.Module):
    """Embeds text latents z0 and their images into one space (B, dim), L2-normalised, and learns
    the logit scale.
    """

    def __init__(self, config: TowerConfig | ImageTower, loss: ClipLossConfig, latent: LatentSpec):
        super().__init__()
        self.tower = _TOWERS[type(config)](config, latent)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / loss.temperature)))
        self.max_scale = loss.max_scale

    @property
    def scale(self) -> Tensor:
        """Logit scale: exponentiated, capped.

        The cap moves the parameter itself, so that its gradient never vanishes there.
        """
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(self.max_scale))
        return self.log_scale.exp()

    def forward(self, z0: Tensor, z1: Tensor, pictures: Tensor | None) -> tuple[Tensor, Tensor]:
        """(text, image) embeddings."""
        text, image = self.tower(z0, z1, pictures)
        return F.normalize(text, dim=-1), F.normalize(image, dim=-1)


class DinoHead(nn.Module):
    """Latents (B, C, H, W) -> logits (B, K): cosines of a bottleneck with K learnt prototypes."""

    def __init__(self, config: DinoLossConfig, latent: LatentSpec):
        super().__init__()
        self.trunk = _trunk(latent, config.hidden, config.bottleneck)
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, config.bottleneck))

    def forward(self, z: Tensor) -> Tensor:
        return _cosines(self.trunk(z), self.prototypes)


class AveragedTeacher(nn.Module):
    """The student's moving average, on the image latent."""

    wants_pictures = False

    def __init__(self, config: EmaTeacher, student: DinoHead):
        super().__init__()
        self.momentum = config.momentum
        self.head = copy.deepcopy(student).requires_grad_(False)

    def forward(self, z1: Tensor, pictures: Tensor | None) -> Tensor:
        return self.head(z1)

    @torch.no_grad()
    def begin(self, student: DinoHead) -> None:
        """Be as the student is."""
        for own, live in zip(self.head.parameters(), student.parameters(), strict=True):
            own.copy_(gathered(live))

    @torch.no_grad()
    def follow(self, student: DinoHead) -> None:
        live = [gathered(p) for p in student.parameters()]
        get_ema_multi_avg_fn(self.momentum)(list(self.head.parameters()), live, None)


class EncoderTeacher(nn.Module):
    """A frozen picture encoder: cosines of its pooled feature with fixed random directions, the
    same in every run.
    """

    wants_pictures = True

    def __init__(self, encoder: ImageEncoder, prototypes: int):
        super().__init__()
        self.encoder = encoder
        fixed = torch.randn(
            prototypes, encoder.width, generator=torch.Generator("cpu").manual_seed(0), device="cpu"
        )
        self.directions: Tensor
        self.register_buffer("directions", fixed, persistent=False)

    def forward(self, z1: Tensor, pictures: Tensor | None) -> Tensor:
        return _cosines(self.encoder(_seen(pictures)).pooled, self.directions)

    def begin(self, student: DinoHead) -> None:
        """It is frozen."""

    def follow(self, student: DinoHead) -> None:
        """It is frozen."""


class Dino(nn.Module):
    """Student on z0, teacher on the image, and the running centre of the teacher's logits (arXiv
    2104.14294).

    Nothing moves in a forward pass: `advance`, once a step, moves the centre by the mean over all
    ranks and micro-batches since the last, and the teacher after the student.
    """

    def __init__(self, config: DinoLossConfig, latent: LatentSpec):
        super().__init__()
        self.momentum = config.centre_momentum
        self.student = DinoHead(config, latent)
        self.teacher: AveragedTeacher | EncoderTeacher
        if isinstance(config.teacher, EmaTeacher):
            self.teacher = AveragedTeacher(config.teacher, self.student)
        else:
            encoder = load_image_encoder(config.teacher, "loss.dino.teacher", frozen=True)
            self.teacher = EncoderTeacher(encoder, config.prototypes)
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(config.prototypes))
        self._seen: list[Tensor] = []

    def forward(self, z0: Tensor, z1: Tensor, pictures: Tensor | None) -> tuple[Tensor, Tensor]:
        """(student, centred teacher) logits, (B, K) fp32 each; no gradient into the teacher's."""
        with torch.no_grad():
            logits = self.teacher(z1, pictures)
            if self.training:
                self._seen.append(torch.cat([logits.sum(0), logits.new_tensor([len(logits)])]))
            # a new tensor: the buffer moves before the backward pass of another micro-batch
            centred = logits - self.centre
        return self.student(z0), centred

    @torch.no_grad()
    def advance(self) -> None:
        """After an optimiser step, on every rank."""
        if self._seen:
            *total, count = sum_over_ranks(torch.stack(self._seen).sum(0)).split(
                [len(self.centre), 1]
            )
            moved = self.centre.lerp(total[0] / count, 1 - self.momentum)
            # one batch that is not finite would stay in the centre for ever
            self.centre.copy_(torch.where(moved.isfinite().all(), moved, self.centre))
        self._seen.clear()
        self.teacher.follow(self.student)

    def moving(self) -> dict[str, Tensor]:
        """What `advance` moves, by name."""
        kept = {"centre": self.centre}
        if isinstance(self.teacher, AveragedTeacher):
            average = self.teacher.head.named_parameters()
            kept |= {f"teacher.{name}": p.detach() for name, p in average}
        return kept


class Repa(nn.Module):
    """Projects hidden tokens of the velocity network onto a frozen encoder's patch features
    (arXiv 2410.06940).
    """

    def __init__(self, config: RepaLossConfig, velocity: VelocityNet):
        super().__init__()
        blocks, width, patch = velocity.token_blocks()
        if config.depth > len(blocks):
            raise InputError(
                f"loss.repa.depth: got {config.depth}, but model.velocity has {len(blocks)} blocks"
                " of tokens; lower it"
            )
        self.depth, self.patch = config.depth, patch
        self.encoder = load_image_encoder(config.teacher, "loss.repa.teacher", frozen=True)
        hidden = config.hidden
        self.projector = nn.Sequential(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, self.encoder.width),
        )

    @contextmanager
    def listen(self, velocity: VelocityNet) -> Iterator[list[Tensor]]:
        """Within the block, the list receives the output of the chosen block, (B, N, width)."""
        heard: list[Tensor] = []
        hook = (
            velocity.token_blocks()
            .blocks[self.depth - 1]
            .register_forward_hook(lambda module, inputs, output: heard.append(output))
        )
        try:
            yield heard
        finally:
            hook.remove()

    def forward(
        self, tokens: Tensor, pictures: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """(projected tokens, features of the same places), (B, rows * columns, width of the
        encoder) each.

        size: (height, width) of the latents in cells. The encoder sees a square, whatever the
        pictures are, and its features are brought back to the latents' rows and columns.
        """
        rows, columns = (side // self.patch for side in size)
        patches = self.encoder(pictures).patches.permute(0, 3, 1, 2)
        if patches.shape[2:] != (rows, columns):
            patches = F.interpolate(patches, (rows, columns), mode="bilinear", antialias=True)
        return self.projector(tokens[:, -rows * columns :]), patches.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Views:
    """What the semantic networks made of a forward pass; None where one is not built, or not
    wanted at this step.
    """

    # text and image embeddings (B, dim), logit scale
    clip: tuple[Tensor, Tensor, Tensor] | None = None
    dino: tuple[Tensor, Tensor] | None = None  # student and centred teacher logits (B, K)
    repa: tuple[Tensor, Tensor] | None = None  # projected tokens and features (B, N, width)
    lpips: Tensor | None = None  # distances (B',)


class Semantics(nn.Module):
    """The networks of the losses that are on; empty where none is."""

    def __init__(self, config: ModelConfig, loss: LossConfig, velocity: VelocityNet):
        super().__init__()
        latent = config.latent
        self.clip = (
            SemanticTower(config.semantic, loss.clip, latent) if loss.clip.weight > 0 else None
        )
        self.dino = Dino(loss.dino, latent) if loss.dino.weight > 0 else None
        self.repa = Repa(loss.repa, velocity) if loss.repa.weight > 0 else None
        self.lpips = Lpips(loss.lpips) if loss.lpips.weight > 0 else None
        self._clip_sees = self.clip is not None and self.clip.tower.wants_pictures
        self._dino_sees = self.dino is not None and self.dino.teacher.wants_pictures
        wanted = (
            self._clip_sees or self._dino_sees or self.repa is not None or self.lpips is not None
        )
        self.autoencoder = (
            load_autoencoder(config.autoencoder, latent) if wanted and not planning() else None
        )

    @contextmanager
    def listen(self, velocity: VelocityNet) -> Iterator[list[Tensor]]:
        """Within the block, the list receives the hidden tokens that REPA reads."""
        if self.repa is None:
            yield []
            return
        with self.repa.listen(velocity) as heard:
            yield heard

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        target: Tensor,
        estimate: Tensor,
        tokens: list[Tensor],
        idle: frozenset[str],
    ) -> Views:
        """Views of latents (B, C, H, W).

        z1 is each caption's own image, which z0 is compared with; target is where the velocity
        leads, another image where the sample is null, and estimate what it makes of it. idle:
        losses of weight 0 at this step; of these, lpips is left out.
        """
        own = self._decode(z1) if self._clip_sees or self._dino_sees else None
        return Views(
            clip=None if self.clip is None else (*self.clip(z0, z1, own), self.clip.scale),
            dino=None if self.dino is None else self.dino(z0, z1, own),
            repa=(
                None
                if self.repa is None
                else self.repa(tokens[-1], self._decode(target), (target.shape[2], target.shape[3]))
            ),
            lpips=(
                None
                if self.lpips is None or "lpips" in idle
                else self._perceive(self.lpips, estimate, target)
            ),
        )

    def _decode(self, z: Tensor) -> Tensor:
        return self._pictures_of(z.detach())

    def _pictures_of(self, z: Tensor) -> Tensor:
        if self.autoencoder is None:
            raise RuntimeError("the autoencoder is left out of a model that is only planned")
        return (
            self.autoencoder.decode_with_grad(z) if z.requires_grad else self.autoencoder.decode(z)
        )

    def _perceive(self, lpips: Lpips, estimate: Tensor, target: Tensor) -> Tensor:
        return lpips(
            self._pictures_of(estimate[: lpips.samples]), self._decode(target[: lpips.samples])
        )

    def begin(self) -> None:
        """After weights were given to the model: what follows them starts from them."""
        if self.dino is not None:
            self.dino.teacher.begin(self.dino.student)

    def advance(self) -> None:
        """After an optimiser step, on every rank: move what moves without a gradient."""
        if self.dino is not None:
            self.dino.advance()

    def moving(self) -> dict[str, Tensor]:
        """What `advance` moves, by name; a checkpoint keeps it beside the weights."""
        return (
            {}
            if self.dino is None
            else {f"dino.{name}": tensor for name, tensor in self.dino.moving().items()}
        )


def _seen(pictures: Tensor | None) -> Tensor:
    if pictures is None:
        raise RuntimeError("this network sees pictures, and none was decoded for it")
    return pictures


def _cosines(feature: Tensor, directions: Tensor) -> Tensor:
    """(B, D), (K, D) -> (B, K) fp32: bf16 cosines over a temperature of 0.04 would be off by a
    tenth.
    """
    with torch.autocast(feature.device.type, enabled=False):
        return F.normalize(feature.float(), dim=-1) @ F.normalize(directions.float(), dim=-1).T
