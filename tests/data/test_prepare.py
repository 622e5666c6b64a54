"""What is done to a picture before it is packed, encoded or looked at; which are left out."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from pydantic import ValidationError

from flowray.config.prepare import AS_DECODED, PrepareConfig
from flowray.data.decode import picture_size
from flowray.data.pictures import filtered, one_size
from flowray.data.prepare import (
    AS_THEY_ARE,
    ASPECT,
    OTHER_SIZE,
    TOO_SMALL,
    Filtered,
    Preparation,
    Refused,
)
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards, write_shards


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_of(image: Image.Image | np.ndarray) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, "png")
    return buffer.getvalue()


def prepare(size: tuple[int, int] | None, **config: object) -> Preparation:
    return Preparation(PrepareConfig.model_validate(config), size)


def test_by_default_a_picture_stays_as_it_is() -> None:
    whole = picture(30, 20)
    np.testing.assert_array_equal(AS_THEY_ARE(png_of(whole)), whole)
    np.testing.assert_array_equal(Preparation(AS_DECODED, (8, 8))(png_of(whole)), whole)
    assert AS_DECODED.tag == AS_THEY_ARE.tag == ""
    assert not AS_DECODED.filters


def test_area_by_whole_numbers_is_the_mean() -> None:
    whole = picture(32, 48)
    found = prepare((8, 8), resize="area")(png_of(whole))
    middle = whole[:, 8:40].reshape(8, 4, 8, 4, 3).astype(float).mean((1, 3))
    assert np.abs(found - middle).max() <= 1  # rows and columns are rounded one after the other


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (12, 8)])
def test_lanczos_is_pillows(size: tuple[int, int]) -> None:
    whole = picture(37, 51)
    found = prepare(size, resize="lanczos")(png_of(whole))
    fitted = ImageOps.fit(Image.fromarray(whole), size[::-1], Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(found, np.asarray(fitted))
    assert found.shape == (*size, 3)


@pytest.mark.parametrize("resize", ["area", "lanczos"])
def test_a_picture_of_that_size_is_not_touched(resize: str) -> None:
    whole = picture(8, 12)
    np.testing.assert_array_equal(prepare((8, 12), resize=resize)(png_of(whole)), whole)


def test_what_is_clear_stands_on_the_background() -> None:
    clear = png_of(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))
    found = prepare(None, background=[10, 20, 30])(clear)
    assert (found == [10, 20, 30]).all()
    assert (AS_THEY_ARE(clear) == 255).all()


@pytest.mark.parametrize(
    ("height", "width", "config", "cause"),
    [
        (7, 40, {"resize": "area"}, TOO_SMALL),
        (40, 7, {"resize": "lanczos"}, TOO_SMALL),
        (8, 8, {"resize": "area"}, None),
        (7, 40, {"resize": "area", "min_size": 1}, None),
        (7, 40, {"resize": "area", "min_size": 7}, None),
        (7, 40, {"resize": "area", "min_size": 8}, TOO_SMALL),
        (20, 20, {"resize": "area", "min_size": 21}, TOO_SMALL),
        (7, 7, {}, None),
        (7, 7, {"min_size": 8}, TOO_SMALL),
        (20, 40, {"max_aspect": 2}, None),
        (20, 41, {"max_aspect": 2}, ASPECT),
        (41, 20, {"max_aspect": 2}, ASPECT),
        (9, 9, {"max_aspect": 1}, None),
    ],
)
def test_which_are_left_out(
    height: int, width: int, config: dict[str, object], cause: str | None
) -> None:
    prepared, data = prepare((8, 8), **config), png_of(picture(height, width))
    if cause is None:
        shape = prepared(data).shape
        assert shape == ((8, 8, 3) if "resize" in config else (height, width, 3))
        return
    with pytest.raises(Filtered) as caught:
        prepared(data)
    assert caught.value.cause == cause
    assert f"{width} x {height} px" in str(caught.value)


def test_upright_sides_count(tmp_path: Path) -> None:
    """An EXIF-6 JPEG of 40 x 12 px is 12 wide; by its header and by its pixels alike."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(picture(12, 40)).save(buffer, "jpeg", exif=exif)
    wide = {"__key__": "a", "png": png_of(picture(12, 40)), "txt": b"wide"}
    turned = {"__key__": "b", "jpg": buffer.getvalue(), "txt": b"tall"}
    cut = {"__key__": "c", "png": png_of(picture(2, 2))[:60], "txt": b"broken below its header"}
    write_shards(tmp_path / "set", [wide, turned, cut], meta={})
    reader = ShardReader(find_shards(str(tmp_path / "set")))
    for_wide = prepare((12, 20), resize="area")
    assert filtered(reader, for_wide) == {1, 2}
    assert filtered(reader, prepare((20, 12), resize="area")) == {0, 2}
    assert filtered(reader, Preparation(AS_DECODED, (12, 20))) == set()
    with pytest.raises(Filtered, match="12 x 40"):
        for_wide(buffer.getvalue())
    assert one_size([reader], "set", for_wide) == (12, 20)


def turned(kind: str, height: int, width: int) -> bytes:
    """A picture that EXIF lays on its side: upright it is `width` high."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(picture(height, width)).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def exif_at_the_end(png: bytes) -> bytes:
    """The PNG with its eXIf chunk behind its pixels, where it may stand."""
    at = png.index(b"eXIf") - 4
    chunk = png[at : at + 12 + int.from_bytes(png[at : at + 4], "big")]
    end = png.index(b"IEND") - 4
    return png[:at] + png[at + len(chunk) : end] + chunk + png[end:]


@pytest.mark.parametrize("kind", ["jpeg", "png", "png, EXIF at its end", "tiff", "webp"])
def test_sizes_by_the_header_are_those_of_the_pixels(kind: str) -> None:
    data = turned(kind.partition(",")[0], 12, 40)
    data = exif_at_the_end(data) if "," in kind else data
    assert picture_size(data) == (12, 40)
    upright = Preparation(AS_DECODED, (40, 12), strict=True)
    assert upright(data).shape == (40, 12, 3)
    for size in [(12, 40), (40, 40)]:
        with pytest.raises(Refused, match=r"the picture is (12 x 40|40 x 12) px") as caught:
            Preparation(AS_DECODED, size, strict=True)(data)
        assert caught.value.cause == OTHER_SIZE


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
@pytest.mark.parametrize(
    ("prepared", "cause"),
    [
        (Preparation(AS_DECODED, (8, 8), strict=True), OTHER_SIZE),
        (prepare((8, 8), min_size=13), TOO_SMALL),
        (prepare((8, 8), resize="area", max_aspect=3), ASPECT),
        (prepare((40, 20), resize="area"), TOO_SMALL),
    ],
)
def test_what_its_size_refuses_is_not_decoded(kind: str, prepared: Preparation, cause: str) -> None:
    """Of a picture that ends behind its header nothing can be."""
    data = turned(kind, 12, 40)
    assert picture_size(data) == (12, 40)
    cut = data[:-40]
    with pytest.raises(ValueError, match=r"."):
        AS_THEY_ARE(cut)
    with pytest.raises(Refused) as caught:
        prepared(cut)
    assert caught.value.cause == cause


def test_tags_tell_settings_apart() -> None:
    configs = [
        {"resize": "area"},
        {"resize": "lanczos"},
        {"resize": "area", "min_size": 3},
        {"resize": "area", "max_aspect": 3},
        {"resize": "area", "background": [0, 0, 0]},
        {"background": [0, 0, 0]},
    ]
    sizes = ((8, 8), (8, 16))
    tags = {prepare(size, **config).tag for config in configs for size in sizes}
    assert len(tags) == 11  # without `resize` the size plays no part
    assert "" not in tags
    assert prepare((8, 8), resize="none", min_size=None).tag == ""


@pytest.mark.parametrize(
    "config",
    [
        {"background": [0, 0, 256]},
        {"background": [0, 0]},
        {"resize": "nearest"},
        {"min_size": 0},
        {"max_aspect": 0.5},
    ],
)
def test_settings_that_cannot_be(config: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PrepareConfig.model_validate(config)
