"""`flowray.data show`: the figures of sets whose samples are known, the page and the sheet."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import files_of_at_most

from flowray.cli.data import main
from flowray.config.errors import InputError
from flowray.data import survey as module
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards, write_shards
from flowray.data.survey import GAP, LINE, SIDE, Histogram, contact_sheet, histogram, show, survey

FOX = "一只红色的狐狸<b>"


def picture(colour: tuple[int, int, int], size: tuple[int, int], kind: str = "png") -> bytes:
    file, options = io.BytesIO(), {}
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        kind, options = "jpeg", {"exif": exif}
    Image.new("RGB", size, colour).save(file, kind, **options)
    return file.getvalue()


RED, GREEN = (255, 0, 0), (0, 255, 0)


def samples() -> list[dict[str, Any]]:
    """Eight: two equal pictures under two extensions, one broken, one without, one turned."""
    red = picture(RED, (64, 64), "jpeg")
    many = json.dumps({"captions": ["a red square", FOX, "a red square"]}).encode()
    return [
        {"__key__": "a", "jpg": red, "json": many},
        {"__key__": "b", "jpeg": red, "txt": b"a red square"},
        {"__key__": "c", "png": picture(GREEN, (200, 100)), "txt": b"a long green picture"},
        {"__key__": "d", "jpg": picture(GREEN, (100, 200), "turned"), "txt": FOX.encode()},
        {"__key__": "e", "png": picture(GREEN, (30, 31)), "txt": b"  "},
        {"__key__": "f", "png": b"no picture", "txt": b"broken"},
        {"__key__": "g", "cls": b"7", "txt": b"none"},
        {"__key__": "h", "png": picture(GREEN, (64, 64))},
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("s") / "mine", samples(), per_shard=3, meta={})


def open_set(folder: Path) -> ShardReader:
    return ShardReader(find_shards(str(folder)))


def test_the_command_tells_the_figures(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "page.html"
    assert main(["show", str(shards), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["page"], told["sheet"]) == (str(out), str(out.with_suffix(".png")))
    assert (told["samples"], told["looked_at"], told["shards"]) == (8, 8, 3)
    assert told["bytes"] == sum(tar.stat().st_size for tar in shards.glob("*.tar"))
    assert told["extensions"] == {"cls": 1, "jpeg": 1, "jpg": 2, "json": 1, "png": 4, "txt": 6}
    assert (told["without_picture"], told["broken"], told["without_caption"]) == (1, 1, 2)
    assert told["sizes"] == {"64 x 64": 3, "200 x 100": 2, "30 x 31": 1}
    assert {name: count for name, count in told["aspects"].items() if count} == {"1:1": 4, "2:1": 2}
    assert (told["captions"], told["distinct_captions"]) == (8, 5)
    assert told["shared"] == {"a red square": 2, FOX: 2}
    assert (told["duplicates"], told["equal"]) == (1, [["a", "b"]])
    side, characters = told["shorter_side"], told["characters"]
    assert (side["least"], side["median"], side["greatest"], sum(side["counts"])) == (
        30,
        64,
        100,
        6,
    )
    assert (characters["least"], characters["greatest"]) == (4, len("a long green picture"))
    assert (told["words"]["least"], told["words"]["greatest"], told["words"]["median"]) == (1, 4, 2)


def test_the_page_is_whole_and_shows_every_caption(shards: Path, tmp_path: Path) -> None:
    assert main(["show", str(shards), "--out", str(tmp_path / "a.html")]) == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]*)"', page)
    assert all(source.startswith("data:") for source in sources)
    assert sum(source.startswith("data:image/png") for source in sources) == 6
    assert sum(source.startswith("data:image/svg") for source in sources) == 4
    assert FOX.replace("<b>", "&lt;b&gt;") in page
    assert FOX not in page
    assert page.count("<figcaption") == 8
    assert page.count("no caption</span>") == 2
    for link in re.findall(r'href="([^"]*)"', page):
        assert link == "data:,"


def test_the_sheet_has_the_pictures_in_their_shape(shards: Path, tmp_path: Path) -> None:
    assert main(["show", str(shards), "--out", str(tmp_path / "a.html")]) == 0
    sheet = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    step, first = SIDE + GAP, GAP + SIDE // 2
    assert sheet.shape == (SIDE + LINE + 2 * GAP, 8 * step + GAP, 3)
    for place, colour in ((0, RED), (1, RED), (2, GREEN), (3, GREEN), (4, GREEN), (7, GREEN)):
        assert np.abs(sheet[first, first + place * step] - colour).max() < 5, place
    top = sheet[GAP + 1, first::step]
    white = [place for place in range(8) if (top[place] == 255).all()]
    assert white == [2, 3, 4]  # two that lie on their side, and one of 31 px, four times as large
    grey = [place for place in range(8) if len(set(top[place])) == 1 and top[place][0] < 255]
    assert grey == [5, 6]

    shown = show(open_set(shards), 3)
    assert [each.key for each in shown] == ["a", "e", "h"]
    assert contact_sheet(shown).shape[1] == 3 * (SIDE + GAP) + GAP


def test_a_large_set_is_sampled_and_says_so(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOKED_AT", 3)
    told = survey(open_set(shards))
    assert (told.samples, told.looked_at, told.captions, told.duplicates) == (8, 3, 3, 0)
    assert told.sizes == {"64 x 64": 2, "30 x 31": 1}
    assert told.extensions == {"jpg": 2, "json": 1, "png": 4, "txt": 6}
    assert main(["show", str(shards), "--out", str(tmp_path / "a.html")]) == 0
    assert "of 3 samples" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_a_full_disk_leaves_neither_page_nor_sheet(shards: Path, tmp_path: Path) -> None:
    assert main(["show", str(shards), "--out", str(tmp_path / "whole.html")]) == 0
    sheet, page = ((tmp_path / f"whole.{kind}").stat().st_size for kind in ("png", "html"))
    assert sheet < page - 1
    for room in (sheet - 1, page - 1):
        with files_of_at_most(room), pytest.raises(InputError, match="cannot be written"):
            main(["show", str(shards), "--out", str(tmp_path / "cut.html")])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.html", "whole.png"]


def test_histograms() -> None:
    assert histogram([]) is None
    assert histogram([5, 5]) == Histogram([5], [2], 5, 5.0, 5)
    assert histogram([1, 2, 2, 3]) == Histogram([1, 2], [1, 3], 1, 2.0, 3)
    many = histogram([*range(1000), 10**6])
    assert many is not None
    assert sum(many.counts) == 1001
    assert max(many.starts) < 1000 < many.greatest
    assert max(many.counts[:-1]) < 2 * min(many.counts[:-1])


def test_a_set_without_captions_or_pictures(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", [{"__key__": "a", "cls": b"1"}], meta={})
    assert main(["show", str(folder), "--out", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "a.png").is_file()
    told = survey(open_set(folder))
    assert (told.sizes, told.shorter_side, told.words, told.equal) == ({}, None, None, [])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "a.png"], "--out a.png: a page is an .html file"),
        (["--out", "{folder}/a.html/b.html"], "cannot be written"),
        (["--count", "0"], "--count: got 0"),
    ],
)
def test_refusals_write_nothing(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.html").write_text("mine")
    given = [word.replace("{folder}", str(tmp_path)) for word in words]
    with pytest.raises(InputError, match=re.escape(says)):
        main(["show", str(shards), *given])
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
