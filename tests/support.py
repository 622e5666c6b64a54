"""What several parts' tests need: models and data sets so small that a run takes a second, in
the real formats on disk.
"""

from __future__ import annotations

import io
import json
import re
import resource
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from flowray.config.base import LatentSpec
from flowray.config.load import dump_recipe, override_recipe
from flowray.config.progress import Advance
from flowray.config.recipe import Recipe
from flowray.data.make import png
from flowray.data.shapes import caption, samples, single_scenes
from flowray.data.shards import MANIFEST, write_shards
from flowray.model.assemble import FlowModel, build_model
from flowray.model.levels import VelocityNet
from flowray.store.run import RunDirectory
from flowray.train.state import fresh_state, save_state

SPEC = LatentSpec(channels=4, height=4, width=4)
SCALE, SHIFT = 0.5, 0.25  # neither trivial, so that a scale applied twice or not at all shows
PICTURE = 8  # px, twice the latent's side: what the tiny autoencoder takes
mp.set_forkserver_preload(["flowray.train.loop"])  # for `on_two_ranks`


class Heard:
    """Progress that keeps what it is told.

    said: the lines of `say`; tasks: description -> how many were done.
    """

    def __init__(self) -> None:
        self.said: list[str] = []
        self.tasks: dict[str, int] = {}

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def task(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        self.tasks[what] = done

        def advance(count: int = 1, note: str = "") -> None:
            self.tasks[what] += count

        yield advance
        assert total is None or self.tasks[what] == total, f"{what}: {self.tasks[what]} of {total}"


def remarks(stderr: str) -> list[str]:
    """The lines that are no progress ("[    2 s] loading the model")."""
    return [line for line in stderr.splitlines() if not re.match(r"\[ *\d+ s\] ", line)]


def captions(count: int) -> list[str]:
    """`count` captions of shapes scenes, the first 300 or so all different."""
    scenes = single_scenes("train")
    return [caption(scenes[(i * 37) % len(scenes)]) for i in range(count)]


def answering_model(recipe: Recipe) -> FlowModel:
    """The recipe's model with a velocity network that already answers: it starts at zero."""
    model = build_model(recipe.model, recipe.loss, 0)
    with torch.no_grad():
        for p in model.velocity.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return model


def word_tokenizer(words: Sequence[str] = ()) -> Any:
    """A word-level tokenizer that knows `words`, or those of `captions`, and ends every text
    with <eos>.
    """
    from transformers import PreTrainedTokenizerFast

    texts = captions(len(single_scenes("train")))
    words = words or sorted({word.strip(",") for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", ",", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def saved_run(recipe: Recipe) -> RunDirectory:
    """A run at its first checkpoint."""
    run = RunDirectory(Path(str(recipe.storage_path)) / recipe.name)
    run.create()
    run.config.write_text(dump_recipe(recipe))
    save_state(fresh_state(recipe, torch.device("cpu")), recipe, run)
    return run


def tiny_text(path: Path, seed: int = 0) -> Path:
    """A random causal LM (Qwen3, width 32, 2 layers) and its tokenizer, saved to a folder as
    transformers does.
    """
    from transformers import Qwen3Config, Qwen3Model

    if (path / "config.json").is_file():
        return path
    tokenizer = word_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                max_position_embeddings=128,
                pad_token_id=0,
                eos_token_id=1,
            )
        )
    net.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tiny_autoencoder(path: Path, spec: LatentSpec = SPEC, seed: int = 0) -> Path:
    """A random AutoencoderKL, pictures of twice the latent's side, saved to a folder as
    diffusers does.
    """
    from diffusers import AutoencoderKL

    if (path / "config.json").is_file():
        return path
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=spec.channels,
            norm_num_groups=4,
            scaling_factor=SCALE,
            shift_factor=SHIFT,
            mid_block_add_attention=False,
        )
    net.save_pretrained(path)
    return path


def ldm_names(weights: dict[str, torch.Tensor], last: int) -> dict[str, torch.Tensor]:
    """diffusers' names as Stable Diffusion's code has them; last: number of the lowest stage."""
    attention = {
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "group_norm": "norm",
    }
    named = {}
    for key, value in weights.items():
        name = (
            key.replace("conv_norm_out", "norm_out")
            .replace("conv_shortcut", "nin_shortcut")
            .replace("mid_block.", "mid.")
        )
        name = (
            name.replace("resnets.0", "block.0")
            .replace("resnets.1", "block.1")
            .replace("resnets.2", "block.2")
        )
        name = (
            name.replace("downsamplers.0", "downsample")
            .replace("upsamplers.0", "upsample")
            .replace("down_blocks", "down")
        )
        for i in range(last + 1):
            name = name.replace(f"up_blocks.{i}.", f"up.{last - i}.")
        if "mid." in name:
            name = (
                name.replace("block.0", "block_1")
                .replace("block.1", "block_2")
                .replace("attentions.0", "attn_1")
            )
            for new, old in attention.items():
                name = name.replace(f".{new}.", f".{old}.")
            value = value[:, :, None, None] if "attn_1" in name and value.ndim == 2 else value
        named[name] = value.contiguous()
    return named


def tiny_pictures(folder: Path, n: int, start: int = 0) -> Path:
    """Image shards of `n` random 8 px pictures (`KEY.png`, `.txt`, `.json` with two captions),
    keys from `start`; returns `folder`.
    """

    def sample(i: int, text: str) -> dict[str, Any]:
        picture = np.random.default_rng(i).integers(0, 256, (PICTURE, PICTURE, 3), dtype=np.uint8)
        row = json.dumps({"captions": [text, f"{text} "]})
        return {
            "__key__": f"s{i:05d}",
            "png": png(picture),
            "txt": text.encode(),
            "json": row.encode(),
        }

    if not (folder / MANIFEST).is_file():
        texts = captions(start + n)[start:]
        write_shards(
            folder, (sample(start + i, text) for i, text in enumerate(texts)), per_shard=16, meta={}
        )
    return folder


def tiny_latents(folder: Path, n: int, spec: LatentSpec = SPEC) -> Path:
    """Latent shards of `n` random moments as flowray/store/latents.py writes them; open with
    `load_latents(folder)`.

    The picture shards they name lie in `folder`-pictures. Sample i's moments and caption depend on
    i alone.
    """
    meta: dict[str, Any] = {"scale": SCALE, "shift": SHIFT, "deterministic": False}
    meta["pictures"] = [
        str(path)
        for path in sorted(
            tiny_pictures(folder.with_name(f"{folder.name}-pictures"), n).glob("*.tar")
        )
    ]
    rows = [_moments(i, spec) for i in range(n)]
    mean, logvar = np.stack(rows).astype(np.float64).reshape(n, 2, -1).transpose(1, 0, 2)
    z = (mean - SHIFT) * SCALE
    meta["mean"] = float(z.mean())
    meta["variance"] = float(z.var() + (np.exp(logvar) * SCALE**2).mean())

    def sample(i: int, text: str) -> dict[str, Any]:
        buffer = io.BytesIO()
        np.save(buffer, rows[i])
        return {
            "__key__": f"s{i:05d}",
            "moments.npy": buffer.getvalue(),
            "json": json.dumps({"captions": [text]}).encode(),
        }

    return write_shards(
        folder, (sample(i, text) for i, text in enumerate(captions(n))), per_shard=16, meta=meta
    )


def _moments(i: int, spec: LatentSpec) -> np.ndarray:
    rng = np.random.default_rng([7, i])
    mean = 2 * rng.standard_normal(spec.shape)
    logvar = rng.uniform(-6, -3, spec.shape)
    return np.concatenate([mean, logvar]).astype(np.float16)


def tiny_recipe(tmp_path: Path, **overrides: Any) -> Recipe:
    """A recipe that trains in a second: everything it names lies under `tmp_path`, made there on
    the first call.

    64 + 16 pictures of 8 px, latents (4, 4, 4), a text model of width 32, 12 steps of batch 8.
    Overrides are dotted recipe keys: `tiny_recipe(tmp_path, **{"loss.clip.weight": 1.0})`.
    """
    tiny = {
        "name": "tiny",
        "storage_path": str(tmp_path / "runs"),
        "data.shards": str(tiny_pictures(tmp_path / "pictures" / "train", 64)),
        "data.val_shards": str(tiny_pictures(tmp_path / "pictures" / "val", 16, start=64)),
        "data.cache": str(tmp_path / "cache"),
        "model.latent.channels": SPEC.channels,
        "model.latent.height": SPEC.height,
        "model.latent.width": SPEC.width,
        "model.text.path": str(tiny_text(tmp_path / "text")),
        "model.text.queries": 4,
        "model.autoencoder.path": str(tiny_autoencoder(tmp_path / "autoencoder")),
        "model.head.hidden": 16,
        "model.head.heads": 2,
        "model.head.layers": 1,
        "model.velocity.width": 16,
        "model.velocity.depth": 2,
        "model.velocity.heads": 2,
        "train.steps": 12,
        "train.batch_size": 8,
        "train.log_every": 2,
        "train.probe_every": 4,
        "train.sample_every": 6,
        "train.checkpoint_every": 4,
        "train.device": "cpu",
        "optim.schedule.warmup": 2,
        "probes.batch_size": 8,
        "probes.shoot_steps": 5,
        "sample.steps": 4,
    }
    recipe = override_recipe(Recipe(), tiny)
    return override_recipe(recipe, overrides) if overrides else recipe


def own_pictures(folder: Path, count: int = 24) -> Path:
    """`count` pictures of 64 px with their captions in files, as people have them, of shapes
    scenes with one object.
    """
    folder.mkdir(parents=True)
    for i, (picture, captions, _) in enumerate(samples(count, "train", 7, 0.0)):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text("\n".join(captions) + "\n")
    return folder


def assert_refused(call: Callable[[], object], kind: type[Exception], words: str) -> None:
    """The call ends in this very kind of error, one line that matches the words."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert re.search(words, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def perturbed(net: VelocityNet, seed: int = 0) -> VelocityNet:
    """Off the zero start, as training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return net


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A write beyond `size` bytes fails within the block, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module, trainable or not."""
    return sum(p.numel() for p in module.parameters())


def on_two_ranks(work: Callable[..., None], *args: Any) -> None:
    """`on_ranks` of two."""
    on_ranks(2, work, *args)


def on_ranks(world: int, work: Callable[..., None], *args: Any) -> None:
    """work(rank, *args) in every process of a gloo group.

    They fork from a server that has imported torch and the loop, once for all the tests of a
    worker: seconds each.
    """
    processes = started_ranks(world, work, *args)
    while not processes.join():  # it returns with every one that ends
        pass


def started_ranks(world: int, work: Callable[..., None], *args: Any) -> mp.ProcessContext:
    """The processes of `on_ranks`, which nobody waits for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (world, port, work, args)
    return mp.start_processes(_rank, arguments, world, join=False, start_method="forkserver")


def _rank(rank: int, world: int, port: int, work: Callable[..., None], args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    work(rank, *args)
    dist.destroy_process_group()
