"""`flowray.train_autoencoder --size` on pictures of all sizes: the autoencoder that packing them to
that size first would give.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from flowray.cli import data
from flowray.cli.train_autoencoder import main
from flowray.config.errors import InputError

OPTIONS = ["--channels", "8,16", "--steps", "3", "--decoder-steps", "1", "--batch-size", "4"]
SIZES = [(40, 30), (16, 16), (24, 60), (33, 47), (12, 30), (20, 20)]  # one is smaller than 16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mixed` as the pictures are, `packed` to 16 px, and `packed_small`, enlarged ones too."""
    folder = tmp_path_factory.mktemp("autoencoder of mixed pictures")
    (folder / "photos").mkdir()
    for i, (width, height) in enumerate(SIZES * 2):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i:02d}.jpg")
        (folder / "photos" / f"{i:02d}.txt").write_text(f"picture {i}")
    for name, words in {
        "mixed": [],
        "packed": ["--size", "16"],
        "packed_small": ["--size", "16", "--resize", "area", "--min-size", "1"],
    }.items():
        assert data.main(["pack", str(folder / "photos"), str(folder / name), *words]) == 0
    return folder


def trained(place: Path, shards: str, out: Path, *words: str) -> dict[str, object]:
    argv = [str(place / shards), "--val", str(place / shards), "--out", str(out), *OPTIONS]
    assert main([*argv, *words]) == 0
    return load_file(out / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("packed", "words"),
    [("packed", []), ("packed_small", ["--prepare", "resize=area", "--prepare", "min_size=1"])],
)
def test_it_is_the_one_of_the_packed_pictures(
    place: Path, tmp_path: Path, packed: str, words: list[str]
) -> None:
    first = trained(place, packed, tmp_path / "first")
    straight = trained(place, "mixed", tmp_path / "straight", "--size", "16", *words)
    assert all(bool((first[name] == straight[name]).all()) for name in first)
    cards = [(tmp_path / name / "CARD.md").read_text() for name in ("first", "straight")]
    told = [[line for line in card.splitlines() if " dB" in line] for card in cards]
    assert told[0] == told[1] != []


def test_what_is_too_small_is_left_out(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(place / "mixed"), "--out", str(tmp_path / "out"), "--plan", "--json"]
    for words, pictures in ((["--size", "16"], 10), (["--size", "24"], 6)):
        assert main([*argv, *words]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert (plan["pictures"], plan["side"]) == (pictures, int(words[1]))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--size PX"),
        (["--size", "64"], "no samples left"),
        (["--size", "16", "--prepare", "least=3"], "data.prepare.least"),
        (["--size", "16", "--prepare", "resize=cubic"], "data.prepare.resize"),
    ],
)
def test_one_line_where_they_cannot_be_brought_to_one_size(
    place: Path, tmp_path: Path, words: list[str], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        main([str(place / "mixed"), "--out", str(tmp_path / "out"), *OPTIONS, *words])
    assert not (tmp_path / "out").exists()
