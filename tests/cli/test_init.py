"""`flowray.init`: a recipe from a look at the shards, and one line where they are not ready for
one.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors
from support import ldm_names, own_pictures, tiny_autoencoder, tiny_text
from text_support import Maker, bert, clip, save, t5

from flowray.cli import data, init, train
from flowray.cli.ready import problems
from flowray.config.errors import InputError
from flowray.config.keys import GOOD_PSNR, POOR_PSNR
from flowray.config.load import load_recipe
from flowray.config.recipe import Recipe


def photos(folder: Path, size: int = 64) -> Path:
    """Pictures with the texture of photographs, and words that the shipped model does not know."""
    folder.mkdir(parents=True)
    for i in range(12):
        rng = np.random.default_rng(i)
        noise = rng.integers(0, 256, (size // 2, size // 2, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(
            folder / f"{i}.png"
        )
        (folder / f"{i}.txt").write_text(
            f"Portrait of an elderly fisherman mending nets at dawn, photograph {i}"
        )
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `own` (shapes) and `photos`, packed into `shards`, `flat` (no split) and
    `wild`.
    """
    folder = tmp_path_factory.mktemp("a place")
    own_pictures(folder / "own")
    photos(folder / "photos")
    for argv in (
        ["own", "shards", "--val", "0.3"],
        ["own", "flat"],
        ["photos", "wild", "--val", "0.3"],
    ):
        source, out, *rest = argv
        assert data.main(["pack", str(folder / source), str(folder / out), *rest]) == 0
    return folder


def init_recipe(place: Path, name: str, *argv: str) -> Recipe:
    assert init.main([*argv, "--out", str(place / name)]) == 0
    return load_recipe(str(place / name)).recipe


def test_the_shipped_models_where_they_fit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    recipe = init_recipe(place, "my shapes.yaml", "--data", "shards")
    base = load_recipe("quickstart").recipe
    assert recipe.name == "my-shapes"
    # not quickstart's
    assert (recipe.card.title, recipe.card.purpose, recipe.card.notes) == ("my-shapes", "", "")
    assert recipe.card.dataset.endswith(" held out")
    assert (recipe.model.text, recipe.model.autoencoder) == (
        base.model.text,
        base.model.autoencoder,
    )
    assert recipe.model.latent.shape == (4, 8, 8)
    assert (recipe.loss, recipe.flow) == (base.loss, base.flow)  # what makes a caption arrive
    assert Path(recipe.data.shards).resolve() == (place / "shards" / "train").resolve()
    assert recipe.data.val_shards
    assert Path(recipe.data.val_shards).resolve() == (place / "shards" / "val").resolve()


def test_published_models_where_the_shipped_ones_do_not_fit(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = init_recipe(place, "wild.yaml", "--data", str(place / "wild"))
    said = capsys.readouterr().out
    for part in (recipe.model.text, recipe.model.autoencoder):
        assert f"hf download {part.path}" in said
    # the weights are missing, every width is in the recipe
    assert train.main([str(place / "wild.yaml"), "--plan", "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["text.backbone"] == 596_049_920


def test_the_shipped_autoencoder_is_taken_where_its_run_calls_it_good(place: Path) -> None:
    """Between what spoils a run and what is good there is no recipe with it: shapes with the
    grain of a film.
    """
    for file in own_pictures(place / "grain").glob("*.png"):
        picture = np.asarray(Image.open(file))
        grain = np.random.default_rng(int(file.stem)).normal(0, 10, picture.shape)
        Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8)).save(file)
    assert data.main(["pack", str(place / "grain"), str(place / "grainy"), "--val", "0.3"]) == 0
    recipe = init_recipe(place, "grain.yaml", "--data", str(place / "grainy"))
    text = (place / "grain.yaml").read_text()
    found = int(text.partition(" dB only")[0].rpartition(" ")[2])
    assert POOR_PSNR < found < GOOD_PSNR
    assert recipe.model.autoencoder.path == init.AUTOENCODER


def test_models_of_ones_own_give_their_sizes(place: Path) -> None:
    text, autoencoder = tiny_text(place / "lm"), tiny_autoencoder(place / "vae")
    argv = ["--data", str(place / "shards"), "--text", str(text), "--autoencoder", str(autoencoder)]
    recipe = init_recipe(place, "tiny.yaml", *argv)
    assert recipe.model.latent.shape == (4, 32, 32)  # the tiny autoencoder halves the side
    assert (recipe.model.text.path, recipe.model.autoencoder.path) == (str(text), str(autoencoder))
    # The plan times a few steps: of a network that takes no minute on one core.
    small = [
        "model.velocity.width=16",
        "model.velocity.depth=1",
        "model.velocity.heads=2",
        "train.batch_size=4",
    ]
    assert train.main([str(place / "tiny.yaml"), "--plan", "--json", *small]) == 0


def test_an_autoencoder_in_a_pipeline_beside_other_models(place: Path) -> None:
    tiny_autoencoder(place / "pipeline" / "vae")
    tiny_text(place / "pipeline" / "text_encoder")
    (place / "pipeline" / "model_index.json").write_text("{}")
    recipe = init_recipe(
        place,
        "part.yaml",
        "--data",
        str(place / "shards"),
        "--autoencoder",
        str(place / "pipeline"),
    )
    assert recipe.model.latent.shape == (4, 32, 32)
    assert recipe.model.autoencoder.path == str(place / "pipeline")


def test_an_autoencoder_in_one_file_needs_its_scale(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels and px a cell come from its weights."""
    monkeypatch.chdir(place)
    net = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=16,
    )
    save_tensors(ldm_names(net.state_dict(), 1), place / "vae.safetensors")
    argv = ["--data", "shards", "--autoencoder", "vae.safetensors"]
    with pytest.raises(InputError, match=r"vae.safetensors.* --scaling-factor 0\.18215"):
        init.main([*argv, "--out", "one.yaml"])
    assert not (place / "one.yaml").exists()
    recipe = init_recipe(place, "one.yaml", *argv, "--scaling-factor", "0.5")
    assert recipe.model.latent.shape == (16, 32, 32)
    assert recipe.model.autoencoder.scaling_factor == 0.5
    assert list(problems(recipe)) == []


@pytest.mark.parametrize(("make", "tokens"), [(clip, 20), (t5, 128), (bert, 32)])
def test_a_text_encoder_is_written_as_one(place: Path, make: Maker, tokens: int) -> None:
    folder = place / make.__name__
    save(make, folder)
    argv = ["--data", str(place / "shards"), "--text", str(folder)]
    text = init_recipe(place, f"{make.__name__}.yaml", *argv).model.text
    assert (text.kind, text.path, text.max_tokens) == ("encoder", str(folder), tokens)


def test_a_model_that_training_refuses_leaves_no_recipe(place: Path) -> None:
    text = tiny_text(place / "untokenized")
    for file in text.glob("tokenizer*"):
        file.unlink()
    argv = ["--data", str(place / "shards"), "--text", str(text), "--out", str(place / "no.yaml")]
    with pytest.raises(InputError, match=str(text)):
        init.main(argv)
    assert not (place / "no.yaml").exists()


def test_an_autoencoder_too_coarse_for_the_pictures_leaves_no_recipe(place: Path) -> None:
    folder = place / "coarse"
    folder.mkdir()
    blocks = [8] * 7  # 64 px a cell
    config = {
        "_class_name": "AutoencoderDC",
        "encoder_block_out_channels": blocks,
        "latent_channels": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": np.zeros(1, np.float32)}, folder / "diffusion_pytorch_model.safetensors")
    argv = [
        "--data",
        str(place / "shards"),
        "--autoencoder",
        str(folder),
        "--out",
        str(place / "coarse.yaml"),
    ]
    with pytest.raises(InputError, match="128"):
        init.main(argv)
    assert not (place / "coarse.yaml").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--data", "own"], "flowray.data pack own shards"),
        (["--data", "flat"], "--val"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "shards/trian"], "did you mean"),
        (["--data", "shapes"], "flowray.train quickstart data.shards=shapes"),
        (["--data", "digits"], "flowray.train digits"),
        (["--data", "emoji_64"], "flowray.train emoji_64"),
        (["--data", "/dev/null"], "a device"),
        (["--data", "shards", "--val", "shards/train"], "--val shards/train"),
        (["--data", "shards", "--out", "taken.yaml"], "taken.yaml"),
        (["--data", "shards", "--out", "recipe"], "recipe"),
        (["--data", "shards", "--out", "/dev/null/mine.yaml"], "/dev/null/mine.yaml"),
        (["--data", "shards", "--out", "new.yaml", "--text", "org/name"], "hf download org/name"),
        (
            ["--data", "shards", "--out", "new.yaml", "--autoencoder", "org/name"],
            "hf download org/name",
        ),
        (["--data", "shards", "--out", "new.yaml", "--scaling-factor", "0.5"], "--autoencoder"),
        (
            ["--data", "shards", "--autoencoder", "embedded_emoji", "--scaling-factor", "0.5"],
            "--autoencoder PATH",
        ),
        (["--data", "shards", "--scaling-factor", "0"], "--scaling-factor: got 0, want a number"),
        (["--data", "shards", "--scaling-factor", "x"], "--scaling-factor: got x, want a number"),
        (["--data", "shards", "--scaling-factor", "inf"], "--scaling-factor: got inf"),
        ([], "--data"),
        (["--data", "s3://bucket/set"], "s3://bucket/set: an address"),
    ],
)
def test_one_line_where_a_recipe_cannot_be_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], says: str
) -> None:
    monkeypatch.chdir(place)
    (place / "taken.yaml").write_text("mine\n")
    with pytest.raises(InputError) as caught:
        init.main(argv)
    assert says in str(caught.value)
    assert (place / "taken.yaml").read_text() == "mine\n"
    assert not (place / "new.yaml").exists()


@pytest.mark.parametrize(("sizes", "side"), [((64, 48), 48), ((72, 72), 64)])
def test_pictures_that_no_network_takes_are_brought_to_a_size_it_takes(
    tmp_path: Path, sizes: tuple[int, int], side: int
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(8):
        px = sizes[i % 2]
        Image.new("RGB", (px, px), (i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    assert data.main(["pack", str(folder), str(tmp_path / "out"), "--val", "0.4"]) == 0
    recipe = init_recipe(tmp_path, "new.yaml", "--data", str(tmp_path / "out"))
    assert recipe.model.latent.shape == (4, side // 8, side // 8)
    assert recipe.data.prepare.resize == "lanczos"


def test_captions_that_are_all_alike_teach_nothing(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in")
    for path in folder.glob("*.txt"):
        path.write_text("a picture")
    assert data.main(["pack", str(folder), str(tmp_path / "out"), "--val", "0.4"]) == 0
    with pytest.raises(InputError, match="a picture"):
        init.main(["--data", str(tmp_path / "out"), "--out", str(tmp_path / "new.yaml")])
