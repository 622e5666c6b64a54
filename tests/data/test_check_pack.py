"""`flowray.data check` and `pack`, and their command line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowray.cli.data import main
from flowray.config.errors import InputError
from flowray.config.prepare import PrepareConfig
from flowray.data.check import check_shards
from flowray.data.make import png
from flowray.data.pack import Packed, pack_folder
from flowray.data.prepare import Preparation
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards, write_shards


def picture(seed: int, width: int = 16, height: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sample(i: int, **over: Any) -> dict[str, Any]:
    row = {
        "__key__": f"{i:04d}",
        "png": png(picture(i)),
        "txt": b"a thing",
        "json": b'{"captions": ["a thing", "it"]}',
        **over,
    }
    return {name: value for name, value in row.items() if value is not None}


def check(tmp_path: Path, rows: list[dict[str, Any]]) -> Any:
    return check_shards(str(write_shards(tmp_path / "set", rows, per_shard=4, meta={})))


def test_a_good_set(tmp_path: Path) -> None:
    result = check(tmp_path, [sample(i) for i in range(6)])
    assert result.good
    assert result.problems == []
    assert (result.shards, result.samples, result.captions, result.sizes) == (
        2,
        6,
        12,
        {"16x16": 6},
    )


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"png": b"\x89PNG not really"}, ".png does not decode"),
        ({"png": png(picture(0))[:-40]}, ".png does not decode"),
        ({"png": None}, "no image"),
        ({"txt": b"  ", "json": None}, "no caption"),
        ({"json": b'{"captions": []}'}, "no caption"),
        ({"json": b'{"caption": 3}'}, "empty caption, or one that is no text"),
        ({"txt": b"\xff\xfe", "json": None}, "caption cannot be read: 'utf-8' codec"),
        ({"txt": b"\xef\xbb\xbf", "json": None}, "no caption"),
        ({"json": b"{nope"}, "caption cannot be read: Expecting"),
        ({"pkl": b"N."}, ".pkl is a pickle"),
        ({"png": None, "npy": b"\x93NUMPY"}, ".npy does not decode"),
    ],
)
def test_each_fault_is_named_with_its_sample(
    tmp_path: Path, over: dict[str, Any], says: str
) -> None:
    result = check(tmp_path, [sample(0), sample(1), sample(2, **over), sample(3), sample(4)])
    assert not result.good
    assert [(p.severity, p.shard, p.sample) for p in result.problems] == [
        ("bad", "shard-000000.tar", "0002")
    ]
    assert says in result.problems[0].what
    assert result.samples == 5


MIXED = {0: (16, 16), 1: (16, 16), 2: (20, 16), 3: (40, 60), 4: (12, 30)}


def mixed_set(folder: Path) -> Path:
    rows = [sample(i, png=png(picture(i, *size))) for i, size in MIXED.items()]
    return write_shards(folder / "set", rows, per_shard=4, meta={})


def test_several_sizes_are_told_but_not_bad(tmp_path: Path) -> None:
    result = check_shards(str(mixed_set(tmp_path)))
    assert result.good
    assert result.sizes == {"16x16": 2, "20x16": 1, "40x60": 1, "12x30": 1}
    (told,) = result.problems
    assert told.severity == "info"
    assert "4 sizes" in told.what
    assert "shard-000000.tar:0002 (20x16)" in told.what
    assert "data.prepare.resize" in told.what


@pytest.mark.parametrize(
    ("config", "others", "bad", "left_out"),
    [
        ({}, (), ["0002", "0003", "0004"], ""),
        ({"resize": "lanczos"}, (), [], "too small 1"),
        ({"resize": "area", "min_size": 1}, (), [], ""),
        ({"resize": "area", "min_size": 20, "max_aspect": 1.2}, (), [], "too small 4, aspect"),
        ({"resize": "area"}, ((30, 12),), [], ""),  # a bucket that the small one fits
    ],
)
def test_a_recipe_says_which_sizes_are_bad(
    tmp_path: Path, config: dict[str, Any], others: Any, bad: list[str], left_out: str
) -> None:
    prepare = Preparation(PrepareConfig(**config), (16, 16), others)
    result = check_shards(str(mixed_set(tmp_path)), prepare=prepare)
    assert [p.sample for p in result.problems if p.severity == "bad"] == bad
    told = [p.what for p in result.problems if p.severity == "info"]
    assert [left_out in each for each in told] == ([True] if left_out else [])
    assert result.sizes == {"16x16": 2, "20x16": 1, "40x60": 1, "12x30": 1}


def test_check_as_a_recipe_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, recipe = mixed_set(tmp_path), tmp_path / "mine.yaml"
    latent = "model: {latent: {height: 2, width: 2}}"
    argv = ["check", str(folder), "--recipe", str(recipe), "--json"]
    recipe.write_text(f"base: quickstart\nname: mine\n{latent}\n")
    assert main(argv) == 1
    said = json.loads(capsys.readouterr().out)
    assert {p["sample"] for p in said["problems"]} == {"0002", "0003", "0004"}
    prepare = "data: {caption_key: captions, prepare: {resize: lanczos, min_size: 1}}"
    recipe.write_text(f"base: quickstart\nname: mine\n{latent}\n{prepare}\n")
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    recipe.write_text(recipe.read_text().replace("captions", "nope"))
    assert main(argv) == 1
    recipe.write_text("base: quickstart\nname: mine\nmodel: {autoencoder: {path: org/name}}\n")
    with pytest.raises(InputError, match="org/name"):
        main(argv)


def test_cached_latents_are_a_good_set_and_nan_is_not(tmp_path: Path) -> None:
    def latents(fill: float) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, np.full((8, 4, 4), fill, np.float16))
        return buffer.getvalue()

    rows = [sample(i, png=None, **{"moments.npy": latents(i)}) for i in range(3)]
    assert check(tmp_path, rows).good
    bad = check_shards(
        str(
            write_shards(
                tmp_path / "nan",
                [*rows, sample(3, png=None, **{"moments.npy": latents(np.nan)})],
                meta={},
            )
        )
    )
    assert [(p.sample, "NaN" in p.what) for p in bad.problems] == [("0003", True)]


@pytest.mark.parametrize(("both", "severity"), [(0, None), (1, "info"), (3, "bad")])
def test_pictures_of_a_split_that_another_has_too_are_told(
    tmp_path: Path, both: int, severity: str | None
) -> None:
    """By their bytes: keys and shards are others."""
    write_shards(tmp_path / "set" / "train", [sample(i) for i in range(6)], per_shard=4, meta={})
    held_out = [sample(10 + i, png=png(picture(i if i < both else 20 + i))) for i in range(3)]
    write_shards(tmp_path / "set" / "val", held_out, meta={})
    result = check_shards(str(tmp_path / "set" / "train"), str(tmp_path / "set" / "val"))
    told = [(p.severity, p.what) for p in result.problems if "held out" in p.what]
    assert [kind for kind, _ in told] == ([severity] if severity else [])
    assert all(what.startswith(f"{both} picture(s) of val are") for _, what in told)
    assert result.good == (severity != "bad")


def test_duplicate_images_are_told_but_not_bad(tmp_path: Path) -> None:
    result = check(tmp_path, [sample(0), sample(1), sample(2, png=png(picture(0)))])
    assert result.good
    assert result.duplicates == 1
    assert "shard-000000.tar:0000 = shard-000000.tar:0002" in result.problems[0].what


def test_a_copied_shard_and_a_changed_shard(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", [sample(i) for i in range(6)], per_shard=4, meta={})
    tars = find_shards(str(folder))
    (folder / "copy.tar").write_bytes(tars[0].read_bytes())
    data = bytearray(tars[1].read_bytes())
    at = data.index(b"a thing")
    data[at : at + 1] = b"A"
    tars[1].write_bytes(data)
    problems = {(p.shard, p.sample): p.what for p in check_shards(str(folder)).problems}
    assert "not in manifest.json" in problems["copy.tar", ""]
    assert "sha256" in problems["shard-000001.tar", ""]
    assert "copy.tar:0000 = shard-000000.tar:0000" in problems["", ""]


def test_a_shard_of_the_manifest_that_is_gone(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", [sample(i) for i in range(6)], per_shard=2, meta={})
    (folder / "shard-000001.tar").unlink()
    (gone,) = check_shards(str(folder)).problems
    assert (gone.severity, gone.shard) == ("bad", "shard-000001.tar")
    assert gone.what == "in manifest.json, but not there"
    for spec in ("*2.tar", "shard-000002.tar", "shard-{000000,000002}.tar"):
        # nobody has asked for the others
        assert not check_shards(str(folder / spec)).problems, spec


def test_several_sets_are_checked_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a shell hands them over: tars by name, a folder, one of them twice."""
    folder = write_shards(tmp_path / "set", [sample(i) for i in range(6)], per_shard=2, meta={})
    other = write_shards(tmp_path / "other", [sample(5)], meta={})
    first, second, _ = find_shards(str(folder))
    monkeypatch.chdir(folder)
    assert main(["check", first.name, str(second), str(first), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 4
    assert main(["check", str(folder), str(other), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["shards"], report["duplicates"]) == (7, 4, 1)
    (twin,) = report["problems"]
    assert "other/shard-000000.tar:0005 = set/shard-000002.tar:0005" in twin["what"] or (
        "set/shard-000002.tar:0005 = other/shard-000000.tar:0005" in twin["what"]
    )
    with pytest.raises(InputError, match="nowhere"):
        main(["check", str(folder), "nowhere"])


def test_a_truncated_shard_does_not_hide_the_others(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", [sample(i) for i in range(8)], per_shard=4, meta={})
    first = find_shards(str(folder))[0]
    first.write_bytes(first.read_bytes()[:3000])
    result = check_shards(str(folder))
    assert any("truncated" in p.what for p in result.problems if p.shard == first.name)
    assert not [p for p in result.problems if p.shard != first.name]
    assert result.samples == 5  # one before the cut


def fill(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(picture(1, 40, 20)).save(folder / "a.png")
    (folder / "a.txt").write_text("a wide one\nsomething wide\n\n", encoding="utf-8")
    Image.fromarray(picture(2, 20, 40)).save(folder / "sub" / "b.c.jpg")
    (folder / "sub" / "b.c.txt").write_text("ein schönes Bild", encoding="utf-8")
    return folder


def test_pack_crops_and_keeps_captions(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in")
    assert pack_folder(folder, tmp_path / "out", size=20) == Packed({"all": 2})
    reader = ShardReader(find_shards(str(tmp_path / "out")))
    assert [reader.captions(i) for i in range(2)] == [
        ["a wide one", "something wide"],
        ["ein schönes Bild"],
    ]
    assert json.loads(reader.read(1, "json"))["source"] == "sub/b.c.jpg"
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(reader.read(0, "png")))), picture(1, 40, 20)[:, 10:30]
    )
    with Image.open(folder / "sub" / "b.c.jpg") as tall:
        np.testing.assert_array_equal(
            np.asarray(Image.open(io.BytesIO(reader.read(1, "png")))), np.asarray(tall)[10:30]
        )
    assert check_shards(str(tmp_path / "out")).good


def test_pack_without_size_keeps_pixels_and_puts_alpha_on_white(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(folder / "z.png")
    (folder / "z.txt").write_text("nothing")
    pack_folder(folder, tmp_path / "out", size=None, per_shard=1)
    reader = ShardReader(find_shards(str(tmp_path / "out")))
    assert len(reader.paths) == 3
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(reader.read(0, "png")))), picture(1, 40, 20)
    )
    assert (np.asarray(Image.open(io.BytesIO(reader.read(2, "png")))) == 255).all()


def test_pack_reads_a_caption_list(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in")
    rows = [
        {"image": "a.png", "caption": "listed"},
        {"image": "sub/b.c.jpg", "captions": ["one", "two"]},
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    pack_folder(folder, tmp_path / "out", size=8)
    assert check_shards(str(tmp_path / "out")).sizes == {"8x8": 2}
    reader = ShardReader(find_shards(str(tmp_path / "out")))
    assert [reader.captions(i) for i in range(2)] == [["listed"], ["one", "two"]]


def test_pack_names_the_faults_and_writes_nothing(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in")
    (folder / "a.txt").unlink()
    (folder / "sub" / "b.c.txt").write_bytes(b"\xff\xff")
    data = (folder / "a.png").read_bytes()
    (folder / "broken.png").write_bytes(data[: len(data) // 2])
    (folder / "broken.txt").write_text("fine")
    with pytest.raises(
        InputError, match=r"2 fault\(s\).*a.png: no caption file a.txt.*b.c.txt: cannot be read"
    ):
        pack_folder(folder, tmp_path / "out", size=16)
    (folder / "a.txt").write_text("fine")
    (folder / "sub" / "b.c.txt").write_text("fine")
    with pytest.raises(InputError, match=r"1 fault\(s\).*broken.png: does not decode .*--skip-bad"):
        pack_folder(folder, tmp_path / "out", size=16)
    assert not (tmp_path / "out").exists()
    rows = ['{"image": "a.png", "caption": ""}', "{", '{"image": "gone.png", "caption": "x"}']
    (folder / "captions.jsonl").write_text("\n".join(rows))
    with pytest.raises(
        InputError,
        match=(
            r"captions.jsonl:1: .*empty caption.*captions.jsonl:2: .*gone.png: no such picture.*;"
            r" and 1 more"
        ),
    ):
        pack_folder(folder, tmp_path / "out", size=16)
    assert not (tmp_path / "out").exists()


def test_command_line_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shapes"
    assert (
        main(
            [
                "make",
                "shapes",
                "--out",
                str(out),
                "--samples",
                "32",
                "--two-share",
                "0",
                "--seed",
                "3",
            ]
        )
        == 0
    )
    assert json.loads((out / "val" / "manifest.json").read_text())["samples"] == 2
    reader = ShardReader(find_shards(str(out / "train")))
    assert {len(json.loads(reader.read(i, "json"))["scene"]["things"]) for i in range(32)} == {1}
    capsys.readouterr()
    assert main(["check", str(out / "train"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["good"], report["samples"]) == (True, 32)
    assert main(["pack", str(fill(tmp_path / "in")), str(tmp_path / "packed")]) == 0
    assert main(["check", str(tmp_path / "packed")]) == 0  # two sizes, which a recipe may take
    assert "16x16" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["mak"],
        ["make", "circles"],
        ["make", "shapes", "--samples", "x"],
        ["make", "shapes", "--samples", "0"],
        ["make", "shapes", "--two-share", "2"],
        ["make", "shapes", "--seed", "-1"],
        ["make", "digits", "--samples", "3"],
        ["check", "nowhere"],
        ["pack", "nowhere", "out"],
        ["make", "digits", "--out", "/proc/nowhere"],
    ],
)
def test_bad_input_is_one_line(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        main(argv)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_help_fits_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["make", "--help"], ["pack", "--help"], ["check", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 0
        assert len(capsys.readouterr().out.splitlines()) <= 24
