"""`flowray.init --data FOLDER`: a recipe for shards of one's own, written after a look at them."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flowray.cli.common import GOOD
from flowray.cli.init_look import FACTOR, MOST, PATCH, SIDES, Looked, look
from flowray.cli.parser import Parser, number, whole_number
from flowray.cli.progress import IMPORTING, ConsoleProgress, quiet_libraries
from flowray.config.errors import InputError
from flowray.config.keys import GOOD_PSNR
from flowray.config.load import load_recipe
from flowray.config.model import ModelConfig
from flowray.config.paths import SHIPPED, argument, is_address, model_argument, written
from flowray.config.recipe import Recipe
from flowray.data.pack import LARGEST

# tokens a word; the shipped tokenizer needs 1.1 for its own captions, over 2 for others
KNOWN_WORDS = 1.6
SMALL_CELLS = 256  # of a latent; more want a wider network than quickstart's

QUERIES, MAX_TOKENS = 64, 128  # of a text model that is not the shipped one

# What is taken where the shipped models do not fit: a name, and what a plan needs to know of it.
TEXT = "Qwen/Qwen3-0.6B"
TEXT_FACTS = {"width": 1024, "parameters": 596_049_920}
AUTOENCODER = "stabilityai/sd-vae-ft-ema"
AUTOENCODER_FACTS = {"scaling_factor": 0.18215, "parameters": 83_653_863}


@dataclass(frozen=True)
class Part:
    """A model that the recipe names: its section of the recipe, and why it was taken."""

    section: dict[str, Any]
    why: str


def _parser() -> Parser:
    parser = Parser(
        prog="flowray.init",
        description=(
            "Look at shards of your own and write a recipe that trains on them: the models shipped"
            " with flowray where they fit pictures and captions, else published ones, with the"
            " command that gets them."
        ),
        epilog="Example: python -m flowray.init --data shards/ --out mine.yaml",
    )
    parser.add_argument(
        "--data",
        type=_folder,
        required=True,
        metavar="FOLDER",
        help="shards: a folder with train/ and val/, as pack --val makes",
    )
    parser.add_argument(
        "--val",
        type=_folder,
        metavar="FOLDER",
        help="held-out shards, where they are not FOLDER/val",
    )
    parser.add_argument(
        "--size",
        type=_side,
        metavar="PX",
        help=f"crop and resize to squares; of several sizes what fits most, at most {MOST}",
    )
    parser.add_argument(
        "--caption", metavar="KEY", help="the key of the .json that has the captions"
    )
    parser.add_argument(
        "--out", type=argument, default=Path("mine.yaml"), help="the recipe to write, %(default)s"
    )
    parser.add_argument(
        "--text",
        type=model_argument,
        metavar="PATH",
        help="a causal language model or a text encoder: folder, hub name or embedded",
    )
    parser.add_argument(
        "--autoencoder",
        type=model_argument,
        metavar="PATH",
        help="a diffusers AutoencoderKL or AutoencoderDC: folder, hub name, one file,"
        f" {' or '.join(SHIPPED)}",
    )
    parser.add_argument(
        "--scaling-factor",
        type=number(above=0),
        metavar="X",
        help="of the latents, where the autoencoder's files do not state it: 0.18215 (SD 1 and 2)",
    )
    return parser


def _folder(text: str) -> Path:
    """An argument's type: a folder here."""
    if is_address(text):
        raise argparse.ArgumentTypeError(
            f"{text}: an address, and a folder is looked at; write a recipe of one with some of the"
            " shards and train it with data.shards=ADDRESS data.val_shards=ADDRESS"
        )
    return argument(text)


def _side(text: str) -> int:
    """An argument's type: px of a square that the network's patches divide."""
    side = whole_number(SIDES, LARGEST)(text)
    if side % SIDES:
        raise argparse.ArgumentTypeError(f"got {text}, want a multiple of {SIDES}")
    return side


def main(argv: list[str]) -> int:
    """Run the command; InputError where a recipe cannot be written that would run."""
    args = _parser().parse_args(argv)
    quiet_libraries()
    out: Path = args.out
    if out.suffix not in (".yaml", ".yml"):
        raise InputError(f"--out {out}: a recipe is a .yaml file")
    if out.exists():
        raise InputError(f"--out {out}: exists already; remove it or choose another name")
    progress = ConsoleProgress()
    with progress.task(IMPORTING):
        from flowray.model.local import Kind, local_weights
    with progress.task(f"looking at {args.data}"):
        looked = look(args.data, args.val, args.size, args.caption)
        text = _text(args.text, looked)
        autoencoder, latent = _autoencoder(args.autoencoder, looked, args.scaling_factor)
        recipe = _recipe(out.absolute(), looked, text, autoencoder, latent)
    parts: dict[Kind, Part] = {"text": text, "autoencoder": autoencoder}
    partial = out.with_name(f".{out.name}")  # in the same folder: paths are relative to it
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(recipe, encoding="utf-8")
        made = load_recipe(str(partial)).recipe
        absent = [
            name for name, part in parts.items() if not local_weights(part.section["path"], name)
        ]
        with progress.task("checking the recipe"):
            _refuse_unready(made, absent)
        partial.replace(out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from error
    finally:
        if partial.exists():
            partial.unlink()
    print(f"{out}: {looked.count} pictures, {looked.held_out} held out")
    for note in looked.notes:
        print(f"  note         {note}")
    for name, part in parts.items():
        print(f"  {name:<12} {part.why}")
    for name in absent:
        print(f"  get weights  hf download {parts[name].section['path']}")
    place = shlex.quote(str(out))
    print(f"  cost first   python -m flowray.train {place} --plan")
    print(f"  train        python -m flowray.train {place}")
    return GOOD


def _refuse_unready(recipe: Recipe, absent: Sequence[str]) -> None:
    """InputError for what training would refuse, but for the weights of the `absent` parts, which
    the user is told to download.
    """
    from flowray.cli.ready import refuse_unready
    from flowray.model.assemble import planned_model

    planned_model(recipe.model, recipe.loss)
    shipped = ModelConfig()
    here = recipe.model.model_copy(update={name: getattr(shipped, name) for name in absent})
    refuse_unready(recipe.model_copy(update={"model": here}))


def _text(given: str | None, looked: Looked) -> Part:
    """`model.text`: the shipped model where its tokenizer knows the captions' words, unless one
    is given.
    """
    from tokenizers import Tokenizer

    from flowray.model.assets import asset_path

    tokenizer = Tokenizer.from_file(str(asset_path("text") / "tokenizer.json"))
    tokens = [len(tokenizer.encode(caption).ids) for caption in looked.captions]
    a_word = sum(tokens) / sum(len(caption.split()) for caption in looked.captions)
    if given == "embedded" or (given is None and a_word <= KNOWN_WORDS):
        return Part(
            {"path": "embedded"}, f"the shipped model: {a_word:.1f} tokens a word of the captions"
        )
    sizes = {"dtype": "bf16", "queries": QUERIES, "max_tokens": MAX_TOKENS}
    section: dict[str, Any] = {"path": TEXT} | sizes
    if given is None:
        return Part(
            section | TEXT_FACTS, f"{TEXT}: the shipped model has no words for these captions"
        )
    if given == TEXT:
        return Part(section | TEXT_FACTS, TEXT)
    from flowray.model.backbone import is_encoder
    from flowray.model.files import TEXT as KEY
    from flowray.model.files import open_model
    from flowray.model.pretrained import transformers_config

    config = transformers_config(open_model(given, KEY, "text_encoder"), KEY, "text_encoder")
    language = config.get_text_config()  # of a vision-language model, or of CLIP
    positions = getattr(language, "max_position_embeddings", None) or QUERIES + MAX_TOKENS
    section = {"kind": "causal_lm", "path": written(given)} | sizes
    if is_encoder(config):
        del section["queries"]
        section["kind"] = "encoder"
    section["max_tokens"] = min(MAX_TOKENS, positions - section.get("queries", 0))
    return Part(section, f"{given}, {config.model_type}")


def _autoencoder(
    given: str | None, looked: Looked, factor: float | None
) -> tuple[Part, tuple[int, int, int]]:
    """`model.autoencoder`, a shipped one where it brings the pictures back, and the shape of its
    latents. factor: the scale of the latents of a `given` one, where its files are not to say it.
    """
    height, width = looked.size
    latent = (4, height // FACTOR, width // FACTOR)
    if factor and given in (None, *SHIPPED):
        raise InputError(f"--scaling-factor {factor:g}: give --autoencoder PATH with it")
    if given in (None, *SHIPPED):
        found, path = max(
            (_round_trip(path, looked, latent), path) for path in ([given] if given else SHIPPED)
        )
        if given or found >= GOOD_PSNR:
            why = f"a shipped one: it brings these pictures back at {found:.0f} dB"
            return Part({"path": path}, why), latent
        why = f"{AUTOENCODER}: the shipped ones bring these pictures back at {found:.0f} dB only"
        return Part({"path": AUTOENCODER} | AUTOENCODER_FACTS, why), latent
    scale = {"scaling_factor": factor} if factor else {}
    if given == AUTOENCODER:
        return Part({"path": AUTOENCODER} | AUTOENCODER_FACTS | scale, AUTOENCODER), latent
    from flowray.model.autoencoder import compression

    config = _autoencoder_config(given, factor)
    known = compression(config)
    if known is None:
        raise InputError(
            f"--autoencoder {given}: its config.json is no AutoencoderKL's or AutoencoderDC's"
        )
    channels, cell = known
    if height % (cell * PATCH) or width % (cell * PATCH):
        raise InputError(
            f"--autoencoder {given}: takes {cell} px a cell, and these pictures are "
            f"{width} x {height}; give a --size that {cell * PATCH} divides"
        )
    kind = "dc" if config.get("_class_name") == "AutoencoderDC" else "kl"
    section = {"kind": kind, "path": written(given)} | scale
    why = f"{given}, {channels} channels, {cell} px a cell"
    return Part(section, why), (channels, height // cell, width // cell)


def _autoencoder_config(given: str, factor: float | None) -> dict[str, Any]:
    """Its config.json; of one file of weights the same from their shapes. InputError: such a file
    without a `factor`, which is nowhere in it.
    """
    from flowray.model.files import AUTOENCODER as KEY
    from flowray.model.files import open_autoencoder
    from flowray.model.singlefile import ldm_config, no_scale, read_single_file

    files = open_autoencoder(given)
    if not isinstance(files, Path):
        return files.config
    config = ldm_config(read_single_file(files, KEY))
    if factor is None:
        raise no_scale(files, "--autoencoder", "--scaling-factor ")
    return config


def _round_trip(path: str, looked: Looked, latent: tuple[int, int, int]) -> float:
    """vae/psnr of the pictures, as a run measures it: through a shipped autoencoder with the
    posterior's noise, and back.
    """
    import torch

    from flowray.config.base import LatentSpec
    from flowray.config.model import KLAutoencoder
    from flowray.data.pixels import to_pictures
    from flowray.model.autoencoder import load_autoencoder
    from flowray.probes.vae import psnr

    channels, height, width = latent
    net = load_autoencoder(
        KLAutoencoder(path=path), LatentSpec(channels=channels, height=height, width=width)
    )
    pictures = to_pictures(looked.pictures[:16])
    moments = net.encode_moments(pictures)
    noise = torch.randn(moments.mean.shape, generator=torch.Generator().manual_seed(0))
    return psnr(net.decode(net.sample(moments, noise)), pictures)


def _recipe(
    out: Path, looked: Looked, text: Part, autoencoder: Part, latent: tuple[int, int, int]
) -> str:
    """The recipe file."""
    import torch

    def section(values: dict[str, Any]) -> str:
        line = yaml.safe_dump(
            values, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1000
        )
        return str(line).strip()

    def place(folder: Path) -> str:  # relative to the recipe, so that both can be moved together
        path = os.path.relpath(folder.absolute(), out.parent)
        return written(path if not path.startswith("..") else str(folder.absolute()))

    height, width = looked.size
    gpus = torch.cuda.device_count()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem).strip("-._") or "mine"
    wide = latent[1] * latent[2] > SMALL_CELLS
    made = "brought to" if "prepare" in looked.data else "of"
    pictures = f"{looked.count} pictures {made} {width} x {height} px, {looked.held_out} held out"
    shards = {"shards": place(looked.train), "val_shards": place(looked.val)}
    # not quickstart's
    card = {"title": name, "purpose": "", "dataset": pictures, "tags": [], "notes": ""}
    lines = [
        f"# Written by flowray.init: {pictures}.",
        "# Every other key is quickstart's; docs/objective.md lists them all.",
        "base: quickstart",
        yaml.safe_dump({"name": name}).strip(),  # in quotes where it is `no` or a number
        f"card: {section(card)}",
        f"data: {section(shards | looked.data)}",
        "model:",
        f"  latent: {section(dict(zip(('channels', 'height', 'width'), latent, strict=True)))}",
        f"  # {text.why}",
        f"  text: {section(text.section)}",
        f"  # {autoencoder.why}",
        f"  autoencoder: {section(autoencoder.section)}",
    ]
    if wide:
        lines.append(
            "  # a DiT-S, for latents larger than quickstart's; widen it where the loss stalls"
        )
        lines.append("  velocity: {width: 384, depth: 12, heads: 6}")
        lines.append("optim: {lr: 1e-3}")
    if gpus:
        lines.append(f"train: {section({'batch_size': 64 * gpus, 'precision': 'bf16'})}")
        lines.append(f"resources: {section({'num_workers': gpus, 'gpus_per_worker': 1})}")
    return "\n".join(lines) + "\n"
