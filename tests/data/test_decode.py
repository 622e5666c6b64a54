"""Every kind of picture comes out with its right values, the same from a folder and from shards."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin, features

from flowray.config.errors import InputError
from flowray.data.check import check_shards
from flowray.data.decode import EXTENSIONS, decode_rgb
from flowray.data.pack import pack_folder
from flowray.data.pictures import decode_image
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards, write_shards

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3, (0,) * 3
DEEP = np.linspace(0, 65535, 24 * 16).reshape(16, 24).astype(np.uint16)
GREY = np.repeat((DEEP >> 8).astype(np.uint8)[..., None], 3, -1)
Kind = tuple[str, bytes, Any, int]  # extension, file, right values, how far off they may be


def four() -> np.ndarray:
    """A picture whose four quarters tell every turn and flip apart, (16, 24, 3)."""
    picture = np.empty((16, 24, 3), np.uint8)
    picture[:8, :12], picture[:8, 12:] = (200, 30, 30), (30, 200, 30)
    picture[8:, :12], picture[8:, 12:] = (30, 30, 200), (230, 230, 230)
    return picture


def saved(image: Image.Image, form: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


def filled(colour: Any, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (24, 16), colour)


def png(values: np.ndarray, colour: int, depth: int = 16, key: bytes = b"") -> bytes:
    """A PNG as the standard has it, as Pillow writes no 16-bit colour; key: its tRNS chunk."""

    def chunk(name: bytes, data: bytes) -> bytes:
        ending = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + ending

    width = values.shape[1] * (8 // depth if depth < 8 else 1)
    head = struct.pack(">IIBBBBB", width, len(values), depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2" if depth == 16 else "u1"))
    rest = chunk(b"tRNS", key) if key else b""
    rest += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + rest


def profile(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ") -> bytes:
    """An ICC profile, version 2, of these tags."""
    tags |= {b"wtpt": xyz(0.9642, 1, 0.8249), b"cprt": b"text\0\0\0\0none\0"}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    at, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s", at + len(body), bytes(4), 0x02400000, kind, space, pcs)
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(value * 65536) for value in values))


def gamma(power: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(power * 256)) + b"\0\0"


P3 = np.array(
    [[0.51512, 0.2412, -0.00105], [0.29198, 0.69225, 0.04189], [0.1571, 0.06657, 0.78407]]
)
SRGB = np.array(  # to XYZ at D50, as P3: red, green and blue are its rows
    [[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.7141]]
)
WIDE = profile(
    b"RGB ",
    {name + b"XYZ": xyz(*row) for name, row in zip((b"r", b"g", b"b"), P3, strict=True)}
    | {name + b"TRC": gamma(2.2) for name in (b"r", b"g", b"b")},
)
DARK = profile(b"GRAY", {b"kTRC": gamma(1.0)})
ORDINARY = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def inks() -> bytes:
    """A CMYK profile of 16 corners, in which black ink is a blue that is not dark."""
    corners = bytearray()
    for corner in range(16):
        cyan, magenta, yellow, black = (corner >> i & 1 for i in (3, 2, 1, 0))
        light = 255 - 60 * (cyan + magenta + yellow) - 40 * black
        corners += bytes([light, 128 + 50 * magenta - 50 * cyan, 128 + 60 * yellow - 60 * black])
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0])
    table += struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    return profile(b"CMYK", {b"A2B0": table + ramp * 4 + corners + ramp * 3}, b"Lab ")


def encoded(linear: np.ndarray) -> np.ndarray:
    """sRGB's own curve, to [0, 255]."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def by_littlecms(image: Image.Image, given: bytes) -> np.ndarray:
    made = ImageCms.profileToProfile(
        image, io.BytesIO(given), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert made is not None
    return np.asarray(made)


def turned(orientation: int, form: str, **how: Any) -> bytes:
    """`four` as a camera held askew stores it."""
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](four())
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    return saved(image, form, exif=exif.tobytes(), **how)


def animated(form: str, **how: Any) -> bytes:
    rest = [filled(GREEN), filled(BLUE)]
    return saved(filled(RED), form, save_all=True, append_images=rest, duration=50, **how)


def palette() -> Kind:
    """Red, half transparent blue and clear green by a palette with alpha."""
    image = filled(0, "P")
    image.putpalette([*RED, *BLUE, *GREEN])
    image.putdata([0, 1, 2] * 128)
    right = np.resize(np.array([RED, (127, 127, 255), WHITE]), (16, 24, 3))
    return "png", saved(image, "PNG", transparency=bytes([255, 128, 0])), right, 1


def gif_with_hole() -> Kind:
    image = filled(0, "P")
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1] * 192)
    right = np.resize(np.array([RED, WHITE]), (16, 24, 3))
    return "gif", saved(image, "GIF", transparency=1), right, 0


def keyed(channels: int) -> Kind:
    """16 bits, and one grey that stands for clear."""
    grey = int(DEEP[0, 3])
    values = DEEP if channels == 1 else np.stack([DEEP] * 3, -1)
    # of 16-bit colours Pillow keeps the upper byte alone
    clear = grey == DEEP if channels == 1 else grey >> 8 == DEEP >> 8
    right = np.where(clear[..., None], 255, GREY)
    key = struct.pack(">H", grey) * channels
    return "png", png(values, 0 if channels == 1 else 2, key=key), right, 0


def wide() -> Kind:
    """Values of Display P3's primaries, against arithmetic."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    right = encoded((values / 255) ** 2.2 @ P3 @ np.linalg.inv(SRGB))
    file = saved(Image.fromarray(values), "PNG", icc_profile=WIDE)
    assert abs(right - values).max() > 30
    return "png", file, right, 2


def wide_with_alpha() -> Kind:
    image = filled((200, 90, 40, 128), "RGBA")
    solid = by_littlecms(filled((200, 90, 40)), WIDE)
    right = (solid * 128.0 + 255 * 127) / 255
    return "png", saved(image, "PNG", icc_profile=WIDE), right, 1


def inked(given: bytes | None) -> Kind:
    image = filled((20, 120, 200, 60), "CMYK")
    if given is not None:
        return (
            "jpg",
            saved(image, "JPEG", quality=100, icc_profile=given),
            by_littlecms(image, given),
            3,
        )
    right = [(255 - ink) * (255 - 60) / 255 for ink in (20, 120, 200)]
    return "jpg", saved(image, "JPEG", quality=100), right, 2


def twelve_bits() -> bytes:
    """A TIFF of one strip, 12 bits a pixel: two pixels in three bytes."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    values = (DEEP >> 4).reshape(-1, 2).astype(int)
    strip = np.stack(
        [values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], -1
    ).astype(np.uint8)
    rows = {256: 24, 257: 16, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: 16, 279: strip.size}
    for tag, value in rows.items():
        tags[tag] = value
    return b"II*\0" + struct.pack("<I", 8) + tags.tobytes(8) + strip.tobytes()


def premultiplied() -> bytes:
    """A grey TIFF that says its greys are already multiplied by their alpha."""
    data = saved(filled((50, 128), "LA"), "TIFF")
    said = struct.pack("<HHI", 338, 3, 1)  # ExtraSamples: one short, 2 where it is not so
    assert data.count(said) == 1
    return data.replace(said + b"\2", said + b"\1")


KINDS: dict[str, Callable[[], Kind]] = {
    "png": lambda: ("png", saved(Image.fromarray(four()), "PNG"), four(), 0),
    "jpeg": lambda: ("jpeg", turned(1, "JPEG", quality=95, subsampling=0), four(), 4),
    "jfif": lambda: ("jfif", turned(1, "JPEG", quality=95, subsampling=0), four(), 4),
    "webp": lambda: ("webp", saved(Image.fromarray(four()), "WEBP", lossless=True), four(), 0),
    "bmp": lambda: ("bmp", saved(Image.fromarray(four()), "BMP"), four(), 0),
    "gif": lambda: ("gif", saved(Image.fromarray(four()), "GIF"), four(), 0),
    "tif": lambda: ("tif", saved(Image.fromarray(four()), "TIFF"), four(), 0),
    "tiff, lzw": lambda: (
        "tiff",
        saved(Image.fromarray(four()), "TIFF", compression="tiff_lzw"),
        four(),
        0,
    ),
    "grey": lambda: ("png", saved(Image.fromarray(GREY[..., 0]), "PNG"), GREY, 0),
    "1 bit": lambda: ("png", saved(filled(1, "1"), "PNG"), WHITE, 0),
    "16-bit grey": lambda: ("png", saved(Image.fromarray(DEEP), "PNG"), GREY, 0),
    "16-bit grey tif": lambda: ("tif", saved(Image.fromarray(DEEP), "TIFF"), GREY, 0),
    "16-bit grey tif, 0 white": lambda: (
        "tif",
        saved(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0}),
        255 - GREY,
        0,
    ),
    "12-bit grey": lambda: ("tif", twelve_bits(), GREY, 0),
    "16-bit RGB": lambda: ("png", png(np.stack([DEEP] * 3, -1), 2), GREY, 0),
    "16-bit RGBA": lambda: (
        "png",
        png(np.stack([DEEP, DEEP, DEEP, np.full_like(DEEP, 0x8000)], -1), 6),
        (GREY * 128.0 + 255 * 127) / 255,
        1,
    ),
    "16-bit grey, alpha": lambda: (
        "png",
        png(np.stack([DEEP, np.full_like(DEEP, 0x8000)], -1), 4),
        (GREY * 128.0 + 255 * 127) / 255,
        1,
    ),
    "16-bit grey, key": lambda: keyed(1),
    "16-bit RGB, key": lambda: keyed(3),
    "2-bit grey, key": lambda: (
        "png",
        png(np.full((16, 6), 0b00_01_10_11, np.uint8), 0, 2, key=b"\0\2"),
        np.resize(np.array([[0] * 3, [85] * 3, [255] * 3, [255] * 3]), (16, 24, 3)),
        0,
    ),
    "32-bit ints": lambda: ("tif", saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), GREY, 0),
    "floats": lambda: (
        "tif",
        saved(Image.fromarray((DEEP / 65535).astype(np.float32)), "TIFF"),
        GREY,
        1,
    ),
    "RGBA": lambda: ("png", saved(filled((*RED, 128), "RGBA"), "PNG"), (255, 127, 127), 1),
    "RGBA webp": lambda: (
        "webp",
        saved(filled((*RED, 128), "RGBA"), "WEBP", lossless=True),
        (255, 127, 127),
        1,
    ),
    "clear": lambda: ("png", saved(filled((*BLACK, 0), "RGBA"), "PNG"), WHITE, 0),
    "grey, alpha": lambda: ("png", saved(filled((100, 128), "LA"), "PNG"), (177, 177, 177), 1),
    "grey, alpha multiplied": lambda: ("tif", premultiplied(), (177, 177, 177), 1),
    "palette, alpha": palette,
    "gif, clear": gif_with_hole,
    "animated gif": lambda: ("gif", animated("GIF"), RED, 0),
    "animated webp": lambda: ("webp", animated("WEBP", lossless=True), RED, 0),
    "animated png": lambda: ("png", animated("PNG"), RED, 0),
    "CMYK": lambda: inked(None),
    "CMYK tif": lambda: ("tif", saved(filled((255, 0, 0, 0), "CMYK"), "TIFF"), (0, 255, 255), 0),
    "CMYK, profile": lambda: inked(inks()),
    "Display P3": wide,
    "Display P3, alpha": wide_with_alpha,
    "Display P3 jpg": lambda: (
        "jpg",
        saved(filled((200, 90, 40)), "JPEG", quality=100, icc_profile=WIDE),
        by_littlecms(filled((200, 90, 40)), WIDE),
        3,
    ),
    "linear grey": lambda: (
        "png",
        saved(Image.fromarray(GREY[..., 0]), "PNG", icc_profile=DARK),
        encoded(GREY / 255),
        1,
    ),
    "linear grey, alpha": lambda: (
        "png",
        saved(filled((55, 128), "LA"), "PNG", icc_profile=DARK),
        (encoded(np.full(3, 55 / 255)) * 128 + 255 * 127) / 255,
        1,
    ),
    "sRGB": lambda: ("png", saved(Image.fromarray(four()), "PNG", icc_profile=ORDINARY), four(), 0),
    "broken profile": lambda: (
        "png",
        saved(Image.fromarray(four()), "PNG", icc_profile=WIDE[:200]),
        four(),
        0,
    ),
    "profile of other colours": lambda: (
        "png",
        saved(Image.fromarray(four()), "PNG", icc_profile=inks()),
        four(),
        0,
    ),
    "broken EXIF": lambda: (
        "webp",
        saved(Image.fromarray(four()), "WEBP", lossless=True, exif=b"Exif\0\0no such"),
        four(),
        0,
    ),
    "orientation 6 png": lambda: ("png", turned(6, "PNG"), four(), 0),
    "orientation 6 webp": lambda: ("webp", turned(6, "WEBP", lossless=True), four(), 0),
    "orientation 8 tif": lambda: ("tif", turned(8, "TIFF"), four(), 0),
    "orientation 8 tif, lzw": lambda: ("tif", turned(8, "TIFF", compression="tiff_lzw"), four(), 0),
}
for _turn in range(2, 9):
    KINDS[f"orientation {_turn}"] = lambda turn=_turn: (  # type: ignore[misc]
        "jpg",
        turned(turn, "JPEG", quality=95, subsampling=0),
        four(),
        4,
    )
if features.check("avif"):
    KINDS["avif"] = lambda: ("avif", turned(1, "AVIF", quality=95, subsampling="4:4:4"), four(), 6)
    KINDS["orientation 5 avif"] = lambda: (
        "avif",
        turned(5, "AVIF", quality=95, subsampling="4:4:4"),
        four(),
        6,
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_and_shards_give_the_right_values(tmp_path: Path, name: str) -> None:
    extension, data, right, off = KINDS[name]()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.{extension}").write_bytes(data)
    (tmp_path / "in" / "a.txt").write_text("a picture")
    pack_folder(tmp_path / "in", tmp_path / "packed", None)
    row = {"__key__": "a", extension: data, "txt": b"a picture"}
    write_shards(tmp_path / "shards", [row], meta={})
    packed, sharded = (
        decode_image(ShardReader(find_shards(str(tmp_path / folder))), 0)
        for folder in ("packed", "shards")
    )
    np.testing.assert_array_equal(packed, sharded)
    assert (sharded.dtype, sharded.shape) == (np.uint8, (16, 24, 3))
    assert abs(sharded - np.broadcast_to(np.asarray(right, float), sharded.shape)).max() <= off
    checked = check_shards(str(tmp_path / "shards"))
    assert (checked.good, checked.sizes) == (True, {"24x16": 1})


def test_transparency_shows_the_colour_that_is_asked_for() -> None:
    data = saved(filled((*RED, 0), "RGBA"), "PNG")
    assert (decode_rgb(data, over=(10, 20, 30)) == (10, 20, 30)).all()


@pytest.mark.parametrize(
    ("extension", "data", "says"),
    [
        ("jpg", b"no picture", "not a picture"),
        ("png", b"", "not a picture"),
        ("png", saved(Image.fromarray(four()), "PNG")[:-30], ""),
        ("jpg", turned(6, "JPEG")[:-30], "truncated"),
        ("tif", saved(Image.fromarray(np.array([[0, 2]], np.float32)), "TIFF"), "0 to 2; 0 to 1"),
        ("tif", saved(Image.fromarray(np.array([[np.nan]], np.float32)), "TIFF"), "nan"),
        ("tif", saved(Image.fromarray(np.array([[70000]], np.int32)), "TIFF"), "0 to 65535"),
        ("tif", saved(Image.fromarray(np.array([[-1]], np.int32)), "TIFF"), "0 to 65535"),
    ],
)
def test_what_does_not_decode_is_one_line(
    tmp_path: Path, extension: str, data: bytes, says: str
) -> None:
    row = {"__key__": "k", extension: data, "txt": b"a picture"}
    shards = str(write_shards(tmp_path / "shards", [row], meta={}))
    with pytest.raises(InputError) as caught:
        decode_image(ShardReader(find_shards(shards)), 0)
    assert f"shard-000000.tar, sample 'k': .{extension} does not decode: " in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [(p.severity, p.sample) for p in check_shards(shards).problems] == [("bad", "k")]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"k.{extension}").write_bytes(data)
    (tmp_path / "in" / "k.txt").write_text("a picture")
    with pytest.raises(InputError, match=rf"k\.{extension}: does not decode"):
        pack_folder(tmp_path / "in", tmp_path / "packed", None)


def test_too_many_pixels_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(filled(RED), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    row = {"__key__": "k", "png": data, "txt": b"a picture"}
    shards = str(write_shards(tmp_path / "shards", [row], meta={}))
    with pytest.raises(InputError, match=r"sample 'k': \.png does not decode: .*384 pixels"):
        decode_image(ShardReader(find_shards(shards)), 0)
    assert not check_shards(shards).good


def test_of_two_pictures_in_a_sample_reader_and_check_take_the_same(tmp_path: Path) -> None:
    files = {"tif": saved(filled(RED), "TIFF"), "png": saved(filled(BLUE).resize((8, 8)), "PNG")}
    rows = [{"__key__": "k", **files, "txt": b"a picture"}]
    shards = str(write_shards(tmp_path / "shards", rows, meta={}))
    assert decode_image(ShardReader(find_shards(shards)), 0).shape == (8, 8, 3)
    checked = check_shards(shards)
    assert checked.sizes == {"8x8": 1}
    assert [(p.severity, ".png, .tif" in p.what) for p in checked.problems] == [("info", True)]


def test_each_extension_has_a_kind_here() -> None:
    assert {KINDS[name]()[0] for name in KINDS} >= set(EXTENSIONS) - {"avif"}
