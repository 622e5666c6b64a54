"""A run taken apart into what a pipeline of diffusers holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from flowray.config.base import Config
from flowray.config.errors import InputError
from flowray.config.paths import is_hub_name
from flowray.export.network import FlowNetwork, Settings
from flowray.export.source import bundled, written
from flowray.model.autoencoder import Autoencoder
from flowray.model.files import AUTOENCODER, TEXT, open_autoencoder, open_model
from flowray.model.latent import LatentScale
from flowray.model.local import Kind, local_place
from flowray.model.pretrained import transformers_config
from flowray.sample.restore import OpenedRun

NETWORK = "FlowTransformer"
_NOT_USED = frozenset({"autoencoder", "semantic"})  # sections of `model` that painting never reads
_TITLE = (
    "The trained model of this pipeline: flowray's own code, as far as this model needs it, in one"
    " file.\n\nMade by `flowray export`. Annotations may name types that are not in here: they are"
    " never evaluated.\n"
)


@dataclass(frozen=True)
class Parts:
    """network: the trained weights; module, code: name and text of the file that defines it."""

    network: FlowNetwork
    module: str
    code: str
    text_encoder: Any
    tokenizer: Any
    vae: Any
    text_dtype: str


def taken_apart(opened: OpenedRun, autoencoder: Autoencoder) -> Parts:
    """What the pipeline of a run is made of. InputError, one line, for what it cannot hold."""
    text = opened.model.text
    tokenizer = text.prompts.inner
    if not hasattr(transformers, type(tokenizer).__name__):
        kind = type(tokenizer).__name__
        raise InputError(f"{TEXT}: its tokenizer is a {kind}, which a pipeline cannot name")
    settings = _settings(opened, autoencoder.scale)
    module, code = _module(settings)
    network_class = type(NETWORK, (FlowNetwork,), {"settings": settings, "__module__": module})
    network: FlowNetwork = network_class()
    _fill(network, opened)
    backbone = text.backbone
    dtype = str(backbone.dtype).removeprefix("torch.")
    return Parts(network, module, code, backbone, tokenizer, autoencoder.net, dtype)


@torch.no_grad()
def _fill(network: FlowNetwork, opened: OpenedRun) -> None:
    trained = opened.model.trainable()
    for name, parameter in network.flow.named_parameters():
        parameter.copy_(trained[name])


def _settings(opened: OpenedRun, scale: LatentScale) -> Settings:
    model, sample = opened.recipe.model, opened.recipe.sample
    # the path is one of this machine and only stands in errors
    known = {"width": opened.model.text.lm_width, "path": "text_encoder"}
    text = model.text.model_copy(update=known)
    return Settings(
        model.model_copy(update={"text": text}), sample.model_copy(update={"prompts": ()}), scale
    )


def _module(settings: Settings) -> tuple[str, str]:
    """Name and text of the network's file; another text has another name, as diffusers keeps the
    files of all pipelines in one folder.
    """
    kinds = {*_kinds(settings.model), *_kinds(settings.sample), LatentScale, Settings}
    bundle = bundled(FlowNetwork, kinds, _TITLE)
    values = written(settings, bundle.names, _NOT_USED, 1)
    words = '"""The network of one run."""'
    code = (
        f"{bundle.text}\n\nclass {NETWORK}(FlowNetwork):\n    {words}\n\n    settings = {values}\n"
    )
    compile(code, NETWORK, "exec")
    return f"flow_{hashlib.sha256(code.encode()).hexdigest()[:12]}", code


def _kinds(config: Config) -> Iterator[type]:
    """The config classes of a section, those that are used."""
    yield type(config)
    for key in type(config).model_fields:
        value = getattr(config, key)
        if isinstance(value, Config) and key not in _NOT_USED:
            yield from _kinds(value)


def references(opened: OpenedRun, parts: Parts) -> dict[str, list[str]]:
    """Of the frozen models that have a name on the hub, component -> [library, class, name, folder
    in it, revision]. InputError where none has one, or one cannot be loaded from there as it is.
    """
    model = opened.recipe.model
    found: dict[str, list[str]] = {}
    if is_hub_name(path := model.text.path):
        files = open_model(path, TEXT, "text_encoder")
        if type(transformers_config(files, TEXT, "text_encoder")) is not type(
            parts.text_encoder.config
        ):
            raise InputError(f"{TEXT}: {path!r} holds more than the text model; leave --refer out")
        kind = type(parts.text_encoder).__name__
        found["text_encoder"] = ["transformers", kind, *_place(path, files.folder, "text")]
        folder = Path(parts.tokenizer.name_or_path)
        found["tokenizer"] = ["transformers", "AutoTokenizer", *_place(path, folder, "text")]
    if is_hub_name(path := model.autoencoder.path):
        files_or_file = open_autoencoder(path)
        if isinstance(files_or_file, Path):
            raise InputError(f"{AUTOENCODER}: {path!r} is one file; leave --refer out")
        place = _place(path, files_or_file.folder, "autoencoder")
        found["vae"] = ["diffusers", type(parts.vae).__name__, *place]
    if not found:
        paths = f"{model.text.path!r} and {model.autoencoder.path!r}"
        raise InputError(f"--refer: {paths} are no names on the hub; leave it out to copy them")
    return found


def _place(path: str, folder: Path, kind: Kind) -> list[str]:
    """Name, folder in it and revision of a hub's model that is on this machine."""
    top = local_place(path, kind)
    if top is None or not folder.is_relative_to(top):
        raise InputError(f"{path!r}: its files are not where the hub's are; leave --refer out")
    inside = folder.relative_to(top).as_posix()
    return [path, "" if inside == "." else inside, top.name]
