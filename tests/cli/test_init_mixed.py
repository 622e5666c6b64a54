"""`flowray.init` on shards as they come: pictures of all sizes, captions under a key of their own,
broken samples.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import own_pictures

from flowray.cli import data, init
from flowray.cli.ready import problems
from flowray.config.errors import InputError
from flowray.config.load import load_recipe
from flowray.config.recipe import Recipe
from flowray.data.shards import write_shards


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Image.Image, str]]:
    """Shapes, which the shipped models know, each with a caption."""
    folder = own_pictures(tmp_path_factory.mktemp("shapes") / "own")
    return [
        (Image.open(path).convert("RGB"), path.with_suffix(".txt").read_text().splitlines()[0])
        for path in sorted(folder.glob("*.png"))
    ]


def as_jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="jpeg", quality=95)
    return buffer.getvalue()


def mixed(pictures: Sequence[tuple[Image.Image, str]], least: int = 80) -> list[dict[str, Any]]:
    """The same as JPEGs of all sizes, the shorter side of all but the last at least `least` px."""
    rows = []
    for i, (picture, caption) in enumerate(pictures):
        width, height = least + 7 * (i % 5), least + 11 * (i % 7)
        jpeg = as_jpeg(picture.resize((width, height)))
        rows.append({"__key__": f"{i:03d}", "jpg": jpeg, "txt": caption.encode()})
    return rows


def shard_set(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """The last four are held out."""
    write_shards(folder / "train", rows[:-4], meta={})
    write_shards(folder / "val", rows[-4:], meta={})
    return folder


def made(folder: Path, *words: str) -> Recipe:
    out = folder / "recipe.yaml"
    assert init.main(["--data", str(folder), "--out", str(out), *words]) == 0
    return load_recipe(str(out)).recipe


@pytest.mark.parametrize(
    ("least", "words", "side"),
    [(80, [], 80), (90, [], 80), (300, [], 256), (80, ["--size", "64"], 64), (30, [], 16)],
)
def test_several_sizes_are_brought_to_one(
    tmp_path: Path, pictures: list[tuple[Image.Image, str]], least: int, words: list[str], side: int
) -> None:
    recipe = made(shard_set(tmp_path, mixed(pictures, least)), *words)
    assert recipe.data.prepare.resize == "lanczos"
    assert (recipe.model.latent.height, recipe.model.latent.width) == (side // 8, side // 8)
    assert f" {side} x {side} px" in recipe.card.dataset
    assert not [line for line in problems(recipe) if "shards" in line]


def test_a_few_tiny_pictures_do_not_set_the_size_of_all(
    tmp_path: Path, pictures: list[tuple[Image.Image, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = mixed(pictures, 300)
    for i in (3, 7, 11):
        rows[i]["jpg"] = as_jpeg(pictures[i][0].resize((20 + i, 18)))
    recipe = made(shard_set(tmp_path, rows))
    assert recipe.model.latent.shape == (4, 32, 32)
    assert f"3 of {len(rows)} pictures looked at are smaller" in capsys.readouterr().out


def test_one_size_stays_as_it_is_and_another_is_made_of_it(
    tmp_path: Path, pictures: list[tuple[Image.Image, str]]
) -> None:
    """64 x 48 px; a few odd ones do not change what the others have, and are brought to it."""
    rows = [
        {"__key__": f"{i:03d}", "jpg": as_jpeg(picture.resize((64, 48))), "txt": caption.encode()}
        for i, (picture, caption) in enumerate(pictures)
    ]
    alike = made(shard_set(tmp_path / "alike", rows))
    assert alike.data.prepare.resize == "none"
    assert (alike.model.latent.height, alike.model.latent.width) == (6, 8)
    smaller = made(tmp_path / "alike", "--out", str(tmp_path / "alike" / "b.yaml"), "--size", "32")
    assert smaller.data.prepare.resize == "none"  # the first recipe, read again
    smaller = load_recipe(str(tmp_path / "alike" / "b.yaml")).recipe
    assert smaller.data.prepare.resize == "lanczos"
    assert (smaller.model.latent.height, smaller.model.latent.width) == (4, 4)
    rows[5]["jpg"] = as_jpeg(pictures[5][0].resize((90, 70)))
    odd = made(shard_set(tmp_path / "odd", rows))
    assert odd.data.prepare.resize == "lanczos"
    assert (odd.model.latent.height, odd.model.latent.width) == (6, 8)


def test_captions_under_a_key_of_their_own(
    tmp_path: Path, pictures: list[tuple[Image.Image, str]]
) -> None:
    rows = mixed(pictures)
    for row in rows:
        told = {"long_caption": row.pop("txt").decode(), "url": "https://x.org", "width": 3}
        row["json"] = json.dumps(told).encode()
    assert made(shard_set(tmp_path / "one", rows)).data.caption_key == "long_caption"
    for row in rows:
        row["json"] = json.dumps({**json.loads(row["json"]), "alt_text": "a shape"}).encode()
    two = shard_set(tmp_path / "two", rows)
    with pytest.raises(InputError, match=r"--caption KEY .*alt_text, long_caption"):
        made(two)
    assert not (two / "recipe.yaml").exists()
    assert made(two, "--caption", "long_caption").data.caption_key == "long_caption"
    with pytest.raises(InputError, match="`nope`"):
        made(two, "--caption", "nope", "--out", str(two / "other.yaml"))


def test_a_broken_sample_is_told_and_costs_no_more(
    tmp_path: Path, pictures: list[tuple[Image.Image, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = mixed(pictures)
    rows[3]["jpg"] = rows[3]["jpg"][:200]
    del rows[4]["txt"]
    made(shard_set(tmp_path, rows))
    said = capsys.readouterr().out
    assert "2 of" in said
    assert "sample '003'" in said
    assert "flowray.data check" in said


def test_held_out_pictures_that_are_training_ones(
    tmp_path: Path, pictures: list[tuple[Image.Image, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """One of four is told, all are refused: by their bytes, under other keys."""
    rows = mixed(pictures)
    rows[-1]["jpg"] = rows[2]["jpg"]
    made(shard_set(tmp_path / "some", rows))
    assert (
        "1 of 4 held-out pictures looked at are in the training shards" in capsys.readouterr().out
    )
    for each, first in zip(rows[-4:], rows, strict=False):
        each["jpg"] = first["jpg"]
    with pytest.raises(InputError, match="every held-out picture looked at is in the training"):
        made(shard_set(tmp_path / "all", rows))
    assert not (tmp_path / "all" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--size", "100"], "multiple of 16"),
        (["--size", "8"], "from 16"),
        (["--size", "512"], "would be enlarged"),
    ],
)
def test_a_size_that_cannot_be_is_refused(
    tmp_path: Path, pictures: list[tuple[Image.Image, str]], words: list[str], says: str
) -> None:
    folder = shard_set(tmp_path, mixed(pictures))
    with pytest.raises(InputError, match=says):
        made(folder, *words)
    assert not (folder / "recipe.yaml").exists()


def test_pictures_too_small_for_any_size_are_refused(
    tmp_path: Path, pictures: list[tuple[Image.Image, str]]
) -> None:
    with pytest.raises(InputError, match="12 px or less; 16"):
        made(shard_set(tmp_path, mixed(pictures, 12)))


def test_a_folder_of_photographs_to_a_recipe(
    tmp_path: Path, pictures: list[tuple[Image.Image, str]]
) -> None:
    """`pack` without a size keeps each picture's own."""
    (tmp_path / "photos").mkdir()
    for row in mixed(pictures):
        (tmp_path / "photos" / f"{row['__key__']}.jpg").write_bytes(row["jpg"])
        (tmp_path / "photos" / f"{row['__key__']}.txt").write_bytes(row["txt"])
    argv = ["pack", str(tmp_path / "photos"), str(tmp_path / "shards"), "--val", "0.2"]
    assert data.main(argv) == 0
    recipe = made(tmp_path / "shards")
    assert recipe.data.prepare.resize == "lanczos"
    assert recipe.model.latent.shape == (4, 10, 10)
    assert list(problems(recipe)) == []
    assert np.isclose(recipe.data.max_bad, load_recipe("quickstart").recipe.data.max_bad)
