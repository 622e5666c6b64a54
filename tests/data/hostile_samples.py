"""Hostile and odd pictures and captions."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from typing import Any

from hostile import OTHER, B, Case, members, noise, parts, picture, saved, texts
from PIL import Image
from test_decode import KINDS, ORDINARY

RGB = Image.fromarray(noise(2))


def kind(name: str) -> Case:
    """A kind of tests/data/test_decode.py."""
    extension, data, right, off = KINDS[name]()
    return Case(name, picture(extension, data), right=right, off=off)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def flat_png(width: int, height: int, depth: int = 1, colour: int = 0, *more: bytes) -> bytes:
    """A PNG of zeros, by the standard, so that it takes no memory to make a vast one."""
    row = 1 + (width * depth * {0: 1, 2: 3, 6: 4}[colour] + 7) // 8
    packer, data = zlib.compressobj(1), b""
    rows = bytes(row) * max(1, (1 << 20) // row)
    left = row * height
    while left:
        data += packer.compress(rows[:left])
        left -= min(left, len(rows))
    data += packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def with_chunk(name: bytes, data: bytes) -> bytes:
    """OTHER with one more chunk after its header."""
    return OTHER[:33] + chunk(name, data) + OTHER[33:]


def zeros(size: int) -> bytes:
    return zlib.compress(bytes(size), 1)


def gif(width: int, height: int) -> bytes:
    """OTHER as a GIF whose screen and picture are said to be this large."""
    data = bytearray(saved(RGB, "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    place = data.index(b",\0\0\0\0\x08\0\x08\0")
    data[place + 5 : place + 9] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp_upside_down() -> bytes:
    data = bytearray(saved(Image.fromarray(noise(2)[::-1]), "BMP"))
    data[22:26] = struct.pack("<i", -8)
    return bytes(data)


def tiff_in_a_ring() -> bytes:
    """A TIFF whose first directory names itself as the next."""
    data = bytearray(saved(RGB, "TIFF"))
    (first,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, first)
    struct.pack_into("<I", data, first + 2 + 12 * count, first)
    return bytes(data)


def tiff_of_many(count: int) -> bytes:
    return saved(RGB, "TIFF", save_all=True, append_images=[Image.new("RGB", (8, 8))] * count)


def tiff_with_count(count: int) -> bytes:
    """A TIFF whose first tag is said to have so many values."""
    data = bytearray(saved(RGB, "TIFF"))
    (first,) = struct.unpack_from("<I", data, 4)
    struct.pack_into("<I", data, first + 2 + 12 * 6 + 4, count)
    return bytes(data)


def jpeg(**how: Any) -> bytes:
    return saved(RGB, "JPEG", quality=100, subsampling=0, **how)


def mpo() -> bytes:
    return saved(
        RGB,
        "MPO",
        save_all=True,
        append_images=[Image.new("RGB", (8, 8))],
        quality=100,
        subsampling=0,
    )


def exif_ring() -> bytes:
    """EXIF whose directory is its own sub-directory, and that says orientation 77."""
    tags = struct.pack("<HHHIIHHII", 2, 0x0112, 3, 1, 77, 0x8769, 4, 1, 8) + bytes(4)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><script href="x"/></svg>'
PSD = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(14) + bytes(192)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
JXL = b"\xff\x0a" + bytes(64)

BROKEN = [
    Case("a picture of 0 bytes", picture("png", b"")),
    Case("a web page called .jpg", picture("jpg", b"<!DOCTYPE html><p>403")),
    Case("a PNG cut off", picture("png", OTHER[:100])),
    Case("a JPEG cut off", picture("jpg", lambda: jpeg()[:-40])),
    Case("a progressive JPEG cut off", picture("jpg", lambda: jpeg(progressive=True)[:-40])),
    Case("a WebP cut off", picture("webp", lambda: saved(RGB, "WEBP")[:-20])),
    Case("a GIF cut off", picture("gif", lambda: saved(RGB, "GIF")[:-30])),
    Case("a TIFF cut off", picture("tif", lambda: saved(RGB, "TIFF")[:100])),
    Case("a PNG with a wrong sum", picture("png", OTHER[:50] + b"\0" + OTHER[51:])),
    Case(
        "a JPEG with garbage after it",
        picture("jpg", lambda: jpeg() + b"PK\3\4" * 300),
        right=noise(2),
        off=8,
    ),
    Case("a PNG called .jpg", picture("jpg", OTHER), right=noise(2)),
    Case("two pictures in a sample", parts(png=OTHER, jpg=b"", txt=b"a thing"), right=noise(2)),
    Case("no picture", parts(txt=b"a thing")),
    Case("0 x 0 pixels", picture("png", lambda: flat_png(0, 0))),
    Case("1 x 70,000 pixels", picture("png", lambda: flat_png(1, 70_000))),
    Case("70,000 x 1 pixels", picture("png", lambda: flat_png(70_000, 1))),
]

BOMBS = [
    Case("30,000 x 30,000 in 110 kB", picture("png", lambda: flat_png(30_000, 30_000))),
    Case("13,000 x 13,000 in 21 kB", picture("png", lambda: flat_png(13_000, 13_000))),
    Case(
        "9,400 x 9,400 with alpha, in 400 kB", picture("png", lambda: flat_png(9_400, 9_400, 8, 6))
    ),
    Case("a GIF of 65,535 x 65,535", picture("gif", lambda: gif(65_535, 65_535))),
    Case(
        "a GIF of 13,000 x 13,000, few of them there", picture("gif", lambda: gif(13_000, 13_000))
    ),
    Case(
        "a PNG of 2^31 - 1 a side",
        picture("png", OTHER[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + OTHER[24:]),
    ),
    Case(
        "zTXt of 100 MB in 100 kB",
        picture("png", lambda: with_chunk(b"zTXt", b"k\0\0" + zeros(10**8))),
    ),
    Case(
        "iCCP of 100 MB in 100 kB",
        picture("png", lambda: with_chunk(b"iCCP", b"k\0\0" + zeros(10**8))),
    ),
    Case(
        "iCCP, zeros packed twice",
        picture("png", lambda: with_chunk(b"iCCP", b"k\0\0" + zlib.compress(zeros(10**8)))),
        right=noise(2),
    ),
    Case(
        "2,000 zTXt of 1 MB",
        picture(
            "png", lambda: OTHER[:33] + chunk(b"zTXt", b"k\0\0" + zeros(10**6)) * 2000 + OTHER[33:]
        ),
    ),
    Case("a TIFF of 500 pages", picture("tif", lambda: tiff_of_many(500)), right=noise(2)),
    Case("a TIFF whose pages go round", picture("tif", tiff_in_a_ring), right=noise(2)),
    Case("a TIFF tag of 2^32 values", picture("tif", lambda: tiff_with_count(2**32 - 1))),
    Case(
        "a profile of 10 MB",
        picture("jpg", lambda: jpeg(icc_profile=ORDINARY.ljust(10**7, b"\0"))),
        right=noise(2),
        off=8,
    ),
]

FORMS = [
    Case("EPS called .png", picture("png", EPS)),
    Case("EPS", picture("eps", EPS)),
    Case("SVG called .png", picture("png", SVG)),
    Case("SVG, gzipped", picture("svg.gz", lambda: gzip.compress(SVG))),
    Case("PSD called .png", picture("png", PSD)),
    Case("HEIC", picture("heic", HEIC)),
    Case("JPEG XL", picture("jxl", JXL)),
    Case("ICO called .png", picture("png", lambda: saved(RGB, "ICO", sizes=[(8, 8)]))),
    Case("a BMP of negative height", picture("bmp", bmp_upside_down), right=noise(2)),
    Case("MPO, as some cameras write .jpg", picture("jpg", mpo), right=noise(2), off=8),
    Case(
        "EXIF that goes round",
        picture("jpg", lambda: jpeg(exif=exif_ring())),
        right=noise(2),
        off=8,
    ),
    Case(
        "XMP that is no XML",
        picture("jpg", lambda: jpeg(xmp=b"<<<tiff:Orientation='6")),
        right=noise(2),
        off=8,
    ),
]

KNOWN = [
    kind(name)
    for name in (
        "grey",
        "1 bit",
        "16-bit grey",
        "16-bit RGB",
        "16-bit RGBA",
        "16-bit grey, key",
        "12-bit grey",
        "32-bit ints",
        "floats",
        "RGBA",
        "clear",
        "grey, alpha",
        "palette, alpha",
        "gif, clear",
        "animated gif",
        "animated webp",
        "animated png",
        "CMYK",
        "CMYK, profile",
        "Display P3",
        "linear grey",
        "broken profile",
        "profile of other colours",
        "broken EXIF",
        *(f"orientation {turn}" for turn in range(2, 9)),
    )
]

DEEP = b"[" * 100_000 + b"]" * 100_000


def told(**row: Any) -> bytes:
    return json.dumps(row).encode()


CAPTIONS = [
    Case("no caption", members(B[0])),
    Case("a .txt of 0 bytes", texts(txt=b"")),
    Case("a .txt of white space", texts(txt=b" \n\t\r\n")),
    Case("a byte order mark alone", texts(txt=b"\xef\xbb\xbf")),
    Case("a byte order mark and a text", texts(txt=b"\xef\xbb\xbfred"), captions=("red",)),
    Case("UTF-16", texts(txt="red".encode("utf-16"))),
    Case("Latin-1", texts(txt="caf\u00e9".encode("latin-1"))),
    Case("NUL bytes", texts(txt=b"red\0\0car")),
    Case("UTF-16 without a mark, as NULs", texts(txt="red".encode("utf-16-le"))),
    Case("10 MB", texts(txt=b"red " * 2_500_000)),
    Case("U+2028 and a form feed", texts(txt="a\u2028b\fc".encode()), captions=("a\u2028b\fc",)),
    Case("several lines", texts(txt=b"one\r\ntwo\n\n"), captions=("one", "two")),
    Case("escapes for terminals", texts(txt=b"\x1b[2Jred"), captions=("\x1b[2Jred",)),
    Case("JSON cut off", texts(json=b'{"caption": "re')),
    Case("JSON with garbage after it", texts(json=b'{"caption": "red"} x')),
    Case("JSON null", texts(json=b"null")),
    Case("JSON that is a list", texts(json=b'["red"]', txt=b"blue"), captions=("blue",)),
    Case("caption null, text there", texts(json=told(caption=None, text="red")), captions=("red",)),
    Case("caption a number", texts(json=told(caption=3))),
    Case("caption NaN", texts(json=b'{"caption": NaN}')),
    Case("caption an object", texts(json=told(caption={"en": "red"}))),
    Case("captions with an empty one", texts(json=told(captions=["red", ""]))),
    Case("captions nested", texts(json=told(captions=[["red"]]))),
    Case(
        "caption and captions",
        texts(json=told(caption="one", captions=["red", "car"])),
        captions=("red", "car"),
    ),
    Case(
        "caption twice in the JSON",
        texts(json=b'{"caption": "one", "caption": "red"}'),
        captions=("red",),
    ),
    Case("half of a surrogate pair", texts(json=b'{"caption": "red \\ud83d"}')),
    Case("JSON nested 100,000 deep", texts(json=b'{"x": ' + DEEP + b', "caption": "red"}')),
    Case(
        "a number of 100,000 digits",
        texts(json=b'{"caption": "red", "x": ' + b"9" * 100_000 + b"}"),
    ),
]
