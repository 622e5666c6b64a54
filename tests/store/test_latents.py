"""Latent shards: made once from pictures, made again when pictures or autoencoder change, exact
and checked.
"""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from support import SCALE, SHIFT, SPEC, Heard, tiny_autoencoder, tiny_latents, tiny_pictures

from flowray.config.errors import InputError
from flowray.config.model import KLAutoencoder
from flowray.config.train import DataConfig
from flowray.data import decode
from flowray.data.make import ShapesSet, png, write_set
from flowray.data.pack import pack_folder
from flowray.data.pictures import decode_image
from flowray.data.pixels import from_pictures, to_pictures
from flowray.data.reader import ShardReader
from flowray.data.shards import MANIFEST, find_shards, write_shards
from flowray.store.fingerprints import pictures_fingerprint
from flowray.store.latents import ensure_latents, load_latents, others
from flowray.store.sums import Sums


@pytest.fixture
def config(tmp_path) -> KLAutoencoder:
    return KLAutoencoder(path=str(tiny_autoencoder(tmp_path / "autoencoder")))


@pytest.fixture
def data(tmp_path) -> DataConfig:
    train, val = tiny_pictures(tmp_path / "train", 40), tiny_pictures(tmp_path / "val", 8, start=40)
    return DataConfig(shards=str(train), val_shards=str(val), cache=str(tmp_path / "cache"))


def ensure(data: DataConfig, config: KLAutoencoder) -> tuple[dict[str, Path], dict[str, int]]:
    """The folders, and what was encoded."""
    heard = Heard()
    folders = ensure_latents(data, config, SPEC, heard)
    return folders, {what: n for what, n in heard.tasks.items() if what.startswith("encoding")}


def write(folder: Path, pictures: list[np.ndarray]) -> str:
    rows = (
        {"__key__": f"k{i}", "png": png(p), "txt": b"a picture"} for i, p in enumerate(pictures)
    )
    return str(write_shards(folder, rows, meta={}))


def test_moments_scale_and_variance_are_those_of_the_pictures(data, config):
    folders, encoded = ensure(data, config)
    assert encoded == {"encoding train pictures": 40, "encoding val pictures": 8}
    latents = load_latents(folders["train"])
    assert (latents.scale.scale, latents.scale.shift, latents.scale.deterministic) == (
        SCALE,
        SHIFT,
        False,
    )
    reader = ShardReader(find_shards(data.shards))
    pictures = to_pictures([decode_image(reader, i) for i in range(40)])
    assert np.array_equal(from_pictures(pictures)[3], decode_image(reader, 3))
    with torch.no_grad():
        direct = AutoencoderKL.from_pretrained(config.path).eval().encode(pictures).latent_dist
    moments = latents.moments(np.arange(40))
    # kept in half precision
    torch.testing.assert_close(moments.mean, direct.mean, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(moments.logvar, direct.logvar, rtol=2e-3, atol=2e-3)
    assert [latents.captions(i) for i in (0, 39)] == [reader.captions(i) for i in (0, 39)]

    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(40, *SPEC.shape, generator=generator) for _ in range(64)]
    drawn = torch.stack([latents.scale.sample(moments, noise) for noise in noises])
    torch.testing.assert_close(
        drawn[0], (direct.mean + direct.std * noises[0] - SHIFT) * SCALE, rtol=5e-3, atol=5e-3
    )
    assert latents.variance == pytest.approx(float(drawn.var((0, 1)).mean()), rel=0.01)


def test_encoded_once_and_again_when_something_changes(data, config, tmp_path):
    first, _ = ensure(data, config)
    stamp = (first["train"] / MANIFEST).stat().st_mtime_ns
    again, encoded = ensure(data, config)
    assert (again, encoded) == (first, {})
    assert (again["train"] / MANIFEST).stat().st_mtime_ns == stamp

    # Other pixels under the same key in a tar of the same size.
    tar = sorted(Path(data.shards).glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        member = next(m for m in opened if m.name.endswith(".png"))
        picture = opened.extractfile(member).read()
    brighter = png(np.random.default_rng(99).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert len(brighter) == len(picture)
    content[member.offset_data : member.offset_data + member.size] = brighter
    tar.write_bytes(content)
    changed, lines = ensure(data, config)
    assert changed["train"] != first["train"]
    assert (changed["val"], len(lines)) == (first["val"], 1)

    # Another autoencoder in the same folder.
    net = AutoencoderKL.from_pretrained(config.path)
    with torch.no_grad():
        next(net.parameters()).add_(0.1)
    net.save_pretrained(config.path)
    other, lines = ensure(data, config)
    assert other["val"] != changed["val"]
    assert len(lines) == 2
    assert not np.array_equal(
        load_latents(other["val"]).moments(np.arange(2)).mean,
        load_latents(changed["val"]).moments(np.arange(2)).mean,
    )


def test_only_pictures_of_others_are_encoded_anew_when_decoding_changes(tmp_path, monkeypatch):
    """What was packed or made here is plain RGB, which every decoding takes for the same."""
    pictures = [np.full((8, 8, 3), i, np.uint8) for i in range(3)]
    write(tmp_path / "foreign", pictures)
    (tmp_path / "in").mkdir()
    for i, picture in enumerate(pictures):
        (tmp_path / "in" / f"{i}.png").write_bytes(png(picture))
        (tmp_path / "in" / f"{i}.txt").write_text("a picture")
    pack_folder(tmp_path / "in", tmp_path / "packed", None)
    write_set(ShapesSet(train=2, val=2, unseen=2), tmp_path / "made")
    pack_folder(tmp_path / "in", tmp_path / "changed", None)
    with (tmp_path / "changed" / "shard-000000.tar").open("ab") as tar:
        tar.write(bytes(512))

    def fingerprints() -> dict[str, str]:
        places = "foreign", "packed", "made/train", "changed"
        readers = {name: ShardReader(find_shards(str(tmp_path / name))) for name in places}
        sums = Sums(tmp_path)
        return {name: pictures_fingerprint(reader, sums) for name, reader in readers.items()}

    before = fingerprints()
    monkeypatch.setattr(decode, "VERSION", decode.VERSION + 1)
    after = fingerprints()
    assert {name for name in before if before[name] != after[name]} == {"foreign", "changed"}


def test_moved_pictures_are_found_again(data, config, tmp_path):
    """The manifest names the pictures, which the last probes read: a stale name would fail a run
    at its end.
    """
    ensure(data, config)
    Path(data.shards).rename(tmp_path / "moved")
    folders, _ = ensure(data.model_copy(update={"shards": str(tmp_path / "moved")}), config)
    assert all(path.is_file() for path in load_latents(folders["train"]).pictures)


def test_limit_takes_the_first_samples(data, config):
    folders, _ = ensure(data, config)
    assert len(load_latents(folders["train"], limit=7)) == 7


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_corrupt_picture_names_shard_and_sample_and_leaves_no_cache(tmp_path, config, seed):
    folder = tmp_path / "train"
    write(folder, [np.full((8, 8, 3), i, dtype=np.uint8) for i in range(5)])
    tar = folder / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        member = next(m for m in opened if m.name == "k3.png")
    rng = np.random.default_rng(seed)
    content[member.offset_data + 8 + seed * 9 : member.offset_data + member.size] = rng.bytes(
        member.size - 8 - seed * 9
    )
    tar.write_bytes(content)
    data = DataConfig(shards=str(folder), val_shards=str(folder), cache=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"shard-000000.tar, sample 'k3': .png does not decode"):
        ensure(data, config)
    left = [file for file in (tmp_path / "cache").glob("latents-*/**/*") if file.is_file()]
    assert left == []


def test_pictures_of_two_sizes_or_of_no_fitting_size_are_input_errors(tmp_path, config):
    mixed = write(
        tmp_path / "mixed", [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 16, 3), np.uint8)]
    )
    with pytest.raises(InputError, match=r"sample 'k1': the picture is 16 x 8 px, .*want 8 x 8"):
        ensure(DataConfig(shards=mixed, val_shards=mixed, cache=str(tmp_path / "cache")), config)
    large = write(tmp_path / "large", [np.zeros((16, 16, 3), np.uint8)])
    with pytest.raises(
        InputError, match=r"sample 'k0': the picture is 16 x 16 px, model.latent .*want 8 x 8"
    ):
        ensure(DataConfig(shards=large, val_shards=large, cache=str(tmp_path / "cache")), config)


def test_a_sample_without_a_picture_and_missing_val_shards(tmp_path, config):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    folder = write_shards(
        tmp_path / "bare",
        [{"__key__": "k0", "npy": buffer.getvalue(), "json": json.dumps({}).encode()}],
        meta={},
    )
    with pytest.raises(InputError, match=r"sample 'k0': no picture \(.png"):
        ensure(
            DataConfig(shards=str(folder), val_shards=str(folder), cache=str(tmp_path / "cache")),
            config,
        )
    with pytest.raises(InputError, match=r"data.val_shards: not given"):
        ensure(DataConfig(shards=str(folder), cache=str(tmp_path / "cache")), config)


def test_held_out_shards_that_are_training_ones_are_said_wherever_they_lie(tmp_path, config, data):
    def warnings(**keys):
        heard = Heard()
        ensure_latents(data.model_copy(update=keys), config, SPEC, heard)
        return [line for line in heard.said if "held out" in line]

    assert warnings() == []
    twice = tmp_path / "elsewhere"
    twice.mkdir()
    shutil.copy(Path(data.shards) / "shard-000001.tar", twice / "a.tar")
    shutil.copy(Path(data.val_shards) / "shard-000000.tar", twice / "b.tar")
    (told,) = warnings(val_shards=str(twice))  # without a manifest, so its key is another
    assert told.startswith("warning: 16 of 24 val samples")
    assert str(twice / "a.tar") in told
    (told,) = warnings(val_shards=data.shards)
    assert told.startswith("warning: 40 of 40 val samples")
    assert len(warnings(val_shards=data.shards)) == 1  # also where all is encoded
    assert warnings(val_shards=str(twice), limit=16) == []  # what is not trained on is held out


def test_a_shard_that_the_manifest_names_and_that_is_not_there_is_said(tmp_path, config, data):
    heard = Heard()
    ensure_latents(data, config, SPEC, heard)
    assert not [line for line in heard.said if "not there" in line]
    gone = Path(data.shards) / "shard-000001.tar"
    gone.unlink()
    folders = ensure_latents(data, config, SPEC, heard)
    (told,) = [line for line in heard.said if "not there" in line]
    assert told.startswith("warning: 1 train shard(s)")
    assert str(gone) in told
    assert len(load_latents(folders["train"])) == 24


def test_shuffled_captions_are_all_there_and_none_is_in_its_place(tmp_path):
    folder = tiny_latents(tmp_path / "latents", 40)
    own, shuffled, again = (
        load_latents(folder),
        load_latents(folder, shuffle=3),
        load_latents(folder, shuffle=3),
    )
    texts = [latents.captions(i)[0] for latents in (own, shuffled, again) for i in range(40)]
    assert sorted(texts[:40]) == sorted(texts[40:80])
    assert all(mine != theirs for mine, theirs in zip(texts[:40], texts[40:80], strict=True))
    assert texts[40:80] == texts[80:]
    assert torch.equal(own.moments(np.arange(40)).mean, shuffled.moments(np.arange(40)).mean)


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_everyone_gets_another(count):
    partner = others(count, seed=0)
    assert sorted(partner) == list(range(count))
    assert count == 1 or (partner != np.arange(count)).all()
    assert count < 17 or not np.array_equal(partner, others(count, seed=1))
