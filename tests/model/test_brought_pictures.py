"""Autoencoders and picture encoders as people have them, and hub names without a network."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support import PICTURE, SPEC, ldm_names, tiny_autoencoder, tiny_text

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.load import load_recipe
from flowray.config.losses import LpipsLossConfig
from flowray.config.model import CausalText, DCAutoencoder, KLAutoencoder
from flowray.config.towers import DinoV2Net
from flowray.model import local
from flowray.model.autoencoder import Autoencoder, load_autoencoder, planned_autoencoder
from flowray.model.backbone import planned_backbone
from flowray.model.images import load_image_encoder
from flowray.model.local import DOWNLOAD, find_place, local_weights
from flowray.model.prompts import load_tokenizer
from flowray.model.text import load_text
from flowray.model.vgg import Lpips
from flowray.store.fingerprints import autoencoder_fingerprint

WEIGHTS = "diffusion_pytorch_model.safetensors"
HALVES = "diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_autoencoder(tmp_path_factory.mktemp("brought") / "kl")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "kl"))


def pictures(side: int = PICTURE) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def mean(path: Path, **options: Any) -> torch.Tensor:
    return (
        load_autoencoder(KLAutoencoder(path=str(path), **options), SPEC)
        .encode_moments(pictures())
        .mean
    )


def one_line(config: KLAutoencoder | DCAutoencoder | Path, *words: str) -> None:
    """Loading ends in an InputError that begins with the key and has the words."""
    config = KLAutoencoder(path=str(config)) if isinstance(config, Path) else config
    with pytest.raises(InputError, match=r"^model\.autoencoder\.") as caught:
        load_autoencoder(config, SPEC)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_folders_as_downloads_and_clones_leave_them(folder: Path, original: Path) -> None:
    before = autoencoder_fingerprint(KLAutoencoder(path=str(folder)))
    for hidden in (".cache/huggingface", ".git/lfs", "images"):
        (folder / hidden).mkdir(parents=True)
    (folder / "README.md").write_text("new words")
    # it is of what is read
    assert autoencoder_fingerprint(KLAutoencoder(path=str(folder))) == before
    assert torch.equal(mean(folder), mean(original))
    weights = load_file(folder / WEIGHTS)
    save_file(
        {key: value + 1 for key, value in weights.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    assert autoencoder_fingerprint(KLAutoencoder(path=str(folder))) != before


def test_the_autoencoder_of_a_pipeline(original: Path, tmp_path: Path) -> None:
    root = tmp_path / "pipeline"
    shutil.copytree(original, root / "vae")
    tiny_text(root / "text_encoder")
    (root / "model_index.json").write_text("{}")
    (root / "unet").mkdir()
    (root / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert torch.equal(mean(root), mean(original))
    assert planned_autoencoder(KLAutoencoder(path=str(root))) == planned_autoencoder(
        KLAutoencoder(path=str(original))
    )
    # by path
    assert (
        len(
            {
                autoencoder_fingerprint(KLAutoencoder(path=str(path)))
                for path in (root, root / "vae")
            }
        )
        == 2
    )
    for part in ("unet", "text_encoder"):
        shutil.copyfile(original / WEIGHTS, root / part / WEIGHTS)
        one_line(root / part, "holds", f"type model.autoencoder.path={root}/vae")
    shutil.move(root / "vae", root / "vae_a")
    shutil.copytree(root / "vae_a", root / "vae_b")
    one_line(root, f"{root}/vae_a", "vae_b")


def lfs(folder: Path) -> None:
    (folder / WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 334643276\n"
    )


def cut_off(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)


def gone(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def fp8(folder: Path) -> None:
    weights = {
        key: value.to(torch.float8_e5m2) for key, value in load_file(folder / WEIGHTS).items()
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lfs, "lfs pull"),
        (cut_off, "cut off"),
        (gone, "no weights"),
        (fp8, "F8_E5M2"),
        (quantised, "bitsandbytes"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    damage: Callable[[Path], None], words: str, folder: Path
) -> None:
    damage(folder)
    one_line(folder, words, str(folder))
    # before anything is encoded
    with pytest.raises(InputError, match=r"^model\.autoencoder\.path"):
        autoencoder_fingerprint(KLAutoencoder(path=str(folder)))


def test_half_precision_and_pickled_weights_load(folder: Path, original: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file(
        {key: value.half() for key, value in weights.items()},
        folder / HALVES,
        metadata={"format": "pt"},
    )
    net = load_autoencoder(KLAutoencoder(path=str(folder)), SPEC)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.allclose(mean(folder), mean(original), atol=1e-2)
    assert torch.equal(mean(folder / HALVES), mean(folder))
    (folder / HALVES).unlink()
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    assert torch.equal(mean(folder), mean(original))
    torch.save({"encoder.conv_in.weight": os.system}, folder / "diffusion_pytorch_model.bin")
    one_line(folder, "safetensors")


LATENT = LatentSpec(channels=4, height=8, width=8)


@pytest.fixture(scope="module")
def ldm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One autoencoder as diffusers' folder and as one file of Stable Diffusion's code."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    stages = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    net = AutoencoderKL(
        **stages, block_out_channels=(32, 64), layers_per_block=2, latent_channels=4
    )
    folder = tmp_path_factory.mktemp("ldm") / "vae"
    net.save_pretrained(folder)
    file = folder.parent / "vae-ft-mse.safetensors"
    save_file(ldm_names(net.state_dict(), 1), file)
    return folder, file


@pytest.mark.parametrize("form", ["vae", "whole", "ckpt"])
def test_one_file_in_stable_diffusions_form(
    form: str, ldm: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, file = ldm
    weights = load_file(file)
    if form == "whole":
        weights = {f"first_stage_model.{key}": value for key, value in weights.items()}
        save_file(
            weights | {"model.diffusion_model.out.weight": torch.zeros(2)},
            file := tmp_path / "v1-5.safetensors",
        )
    elif form == "ckpt":
        torch.save({"state_dict": weights}, file := tmp_path / "vae.ckpt")
    elif form == "vae":
        # beside another one's config.json
        shutil.copyfile(file, file := folder / "sdxl_vae.safetensors")
    one = load_autoencoder(KLAutoencoder(path=str(file), scaling_factor=0.18215), LATENT)
    whole = load_autoencoder(KLAutoencoder(path=str(folder)), LATENT)
    moments = whole.encode_moments(pictures(16))
    assert torch.equal(one.encode_moments(pictures(16)).mean, moments.mean)
    assert torch.equal(one.decode(moments.mean), whole.decode(moments.mean))
    assert autoencoder_fingerprint(KLAutoencoder(path=str(file)))
    one_line(KLAutoencoder(path=str(file)), "type model.autoencoder.scaling_factor=0.18215")
    one_line(DCAutoencoder(path=str(file)), "kind dc")


def test_one_file_of_another_form(ldm: tuple[Path, Path], tmp_path: Path) -> None:
    folder, file = ldm
    shutil.copyfile(folder / WEIGHTS, tmp_path / "my_vae.safetensors")
    one_line(tmp_path / "my_vae.safetensors", "its config.json")
    shutil.copyfile(folder / WEIGHTS, tmp_path / WEIGHTS)
    one_line(tmp_path / WEIGHTS, "config.json")
    save_file({"lora.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    one_line(tmp_path / "lora.safetensors", "no KL autoencoder")
    weights = load_file(file)
    del weights["decoder.conv_out.weight"]
    save_file(weights, tmp_path / "less.safetensors")
    one_line(
        KLAutoencoder(path=str(tmp_path / "less.safetensors"), scaling_factor=1.0),
        "lacks 1 weights, such as decoder.conv_out",
    )


def named(name: str) -> list[Callable[[], object]]:
    """Every loader that takes a hub name, each given `name`."""
    return [
        lambda: load_text(CausalText(path=name)),
        lambda: load_autoencoder(KLAutoencoder(path=name), SPEC),
        lambda: load_autoencoder(DCAutoencoder(path=name), SPEC),
        lambda: load_image_encoder(DinoV2Net(path=name), "loss.repa.teacher", frozen=True),
    ]


def test_hub_names_ask_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: asked.append(args))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: asked.append(args))
    for load in named("org/absent"):
        with pytest.raises(
            InputError, match=r"^\S+\.path: 'org/absent' .*type `hf download org/absent`"
        ) as caught:
            load()
        assert len(str(caught.value).splitlines()) == 1
    assert asked == []


def test_what_looks_like_a_path_is_no_hub_name(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(original.parent)
    for name in (f"{original}x", "./klx"):
        for load in named(name):
            with pytest.raises(InputError, match="no such folder"):
                load()
    typed = load_recipe("quickstart", ["model.text.path=kl/absent"]).recipe.model.text.path
    assert typed == str(original.parent / "kl" / "absent")
    for load in named("kl/absent"):  # what loading left a name is one, wherever the worker runs
        with pytest.raises(InputError, match="hf download kl/absent"):
            load()
    with pytest.raises(InputError, match=f"did you mean {original}"):
        load_autoencoder(KLAutoencoder(path=f"{original}x"), SPEC)
    with pytest.raises(InputError, match="did you mean kl"):
        load_autoencoder(KLAutoencoder(path="kll"), SPEC)  # a folder's name, or a hub's of old
    for name, words in (("vgg.pth", "no such file"), (str(original), "a folder")):
        with pytest.raises(InputError, match=rf"^loss\.lpips\.vgg: .*{words}"):
            Lpips(LpipsLossConfig(vgg=name))


def test_a_hub_name_that_was_downloaded(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `hf download` leaves it; with config.json alone a plan knows the sizes."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--org--vae"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "abc").mkdir(parents=True)
    shutil.copy(original / "config.json", cache / "snapshots" / "abc")
    config = KLAutoencoder(path="org/vae", parameters=1)
    assert local_weights("org/vae") is None
    assert planned_autoencoder(config) == planned_autoencoder(KLAutoencoder(path=str(original)))
    one_line(config, "'org/vae' lacks weights", "`hf download org/vae`")
    shutil.copy(original / WEIGHTS, cache / "snapshots" / "abc")
    assert isinstance(load_autoencoder(config, SPEC), Autoencoder)
    assert autoencoder_fingerprint(config) != autoencoder_fingerprint(
        KLAutoencoder(path=str(original))
    )


def part_of_a_text_model(cache: Path, whole: Path) -> Path:
    """The snapshot of `org/lm` in the hub's cache, as `hf download org/lm config.json` leaves
    it.
    """
    snapshot = cache / "models--org--lm" / "snapshots" / "aaaa"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("aaaa")
    shutil.copy(whole / "config.json", snapshot)
    return snapshot


def test_a_snapshot_without_weights_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_text(tmp_path / "lm")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = part_of_a_text_model(tmp_path / "hub", whole)
    config = CausalText(path="org/lm", queries=2)
    with pytest.raises(InputError, match=r"^model\.text\.path: 'org/lm' .*`hf download org/lm`"):
        load_text(config)

    def fetched(name: str, *, local_files_only: bool = False, **_: object) -> str:
        if not local_files_only:
            shutil.copytree(whole, snapshot, dirs_exist_ok=True)
        return str(snapshot)

    monkeypatch.setattr(local, "snapshot_download", fetched)
    monkeypatch.setenv(DOWNLOAD, "1")
    with torch.device("meta"):
        assert planned_backbone(config) is not None
    assert local_weights("org/lm") is None  # a plan downloads nothing
    load_tokenizer(config)
    assert local_weights("org/lm") == snapshot
    load_text(config)


def test_a_snapshot_that_lacks_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_text(tmp_path / "lm")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = part_of_a_text_model(tmp_path / "hub", whole)
    for shard in ("1-of-00002", "2-of-00002"):
        assert local_weights("org/lm") is None
        with pytest.raises(InputError, match="hf download org/lm"):
            find_place("org/lm", "model.text.path")
        save_file({"w": torch.zeros(1)}, snapshot / f"model-0000{shard}.safetensors")
    assert find_place("org/lm", "model.text.path") == local_weights("org/lm") == snapshot


def test_a_download_that_cannot_be_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv(DOWNLOAD, "1")
    with pytest.raises(
        InputError, match=r"^model\.text\.path: cannot download 'org/absent'"
    ) as caught:
        load_text(CausalText(path="org/absent"))
    assert len(str(caught.value).splitlines()) == 1
    part_of_a_text_model(tmp_path, tiny_text(tmp_path / "lm"))
    with pytest.raises(InputError, match=r"^model\.text\.path: cannot download 'org/lm'"):
        load_text(CausalText(path="org/lm"))
