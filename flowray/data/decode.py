"""Bytes of a picture file to RGB, the one way for folders and shards alike."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError, features
from PIL.ExifTags import Base

from flowray.config.errors import InputError
from flowray.config.prepare import WHITE

# extensions of a picture; where a sample has several pictures the first of these is meant
EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "jfif", "gif", "tif", "tiff", "avif")
# those of pictures too that are not read: Pillow lacks them, or they are no finished pixels
UNREAD = ("heic", "heif", "hif", "jxl", "jp2", "psd", "svg", "eps", "dng", "cr2", "nef", "arw")
# Pillow's names of these kinds. Of others it may start a program: Ghostscript for EPS
_KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
VERSION = 2  # rises where a picture comes out otherwise than before, so that no cache goes stale
# what a file may say besides its pixels that changes how it is to be seen
_TELLING = {
    "exif",
    "Raw profile type exif",
    "xmp",
    "XML:com.adobe.xmp",
    "icc_profile",
    "transparency",
}
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF orientation -> what undoes it
    2: lambda rgb: rgb[:, ::-1],
    3: lambda rgb: rgb[::-1, ::-1],
    4: lambda rgb: rgb[::-1],
    5: lambda rgb: rgb.swapaxes(0, 1),
    6: lambda rgb: np.rot90(rgb, -1),
    7: lambda rgb: rgb[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}
_ASIDE = (5, 6, 7, 8)  # EXIF orientations that lie on their side
_STRIP = 1 << 22  # pixels worked on at a time, so that a large picture is not held several times
_ALIKE = 2  # of 255: profiles of sRGB by several makers differ by less
_INK_IS_HIGH = 0  # of TIFF's tag PhotometricInterpretation: 0 is white


def decode_rgb(
    data: bytes, over: tuple[int, int, int] = WHITE, look: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """The picture in a file's bytes as uint8 (H, W, 3): upright, in sRGB, the first frame where it
    has several.

    over: the colour behind transparent pixels. Deeper pixels are cut to 8 bits: of 16-bit values v,
    v >> 8; of floats in [0, 1], 255 v. A colour profile or EXIF block that is broken is ignored.
    look: takes (width, height) in px, upright, once but the header is read, and again once the
    pixels are; what it raises, an InputError, comes as it is. ValueError, one line, where the bytes
    hold no picture, a broken one or one of too many pixels.
    """
    try:
        with _opened(data) as image:
            if look:
                _show_size(image, look)
            image.load()
            if look:
                look(*_upright_size(image))
            plain = image.mode == "RGB" and not image.info.keys() & _TELLING
            if plain and image.width * image.height <= _STRIP:
                return np.asarray(image)  # most pictures: nothing to do, so nothing is copied
            turn = _UPRIGHT.get(_orientation(image))
            _scale_key(image, data)
            rgb = _in_strips(image, over)
            image.close()  # its pixels are not needed for the turn
        return rgb if turn is None else np.ascontiguousarray(turn(rgb))
    except InputError:  # of `look`
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on bad bytes
        raise ValueError(_reason(error, data)) from error


def upright_rgb(image: Image.Image, over: tuple[int, int, int] = WHITE) -> np.ndarray:
    """An opened picture as uint8 (H, W, 3), as `decode_rgb` has the bytes of its file; only a
    transparent colour of 16-bit or fewer than 8-bit PNGs is taken as Pillow has it.
    """
    image.load()  # of a TIFF this turns it
    turn = _UPRIGHT.get(_orientation(image))
    rgb = _in_strips(image, over)
    return rgb if turn is None else np.ascontiguousarray(turn(rgb))


@lru_cache(maxsize=1)
def _kinds() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in _KINDS if kind in Image.OPEN)


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=_kinds())


def _in_strips(image: Image.Image, over: tuple[int, int, int]) -> np.ndarray:
    """The picture as it is stored, not yet upright, uint8 (H, W, 3)."""
    rows, rgb = max(1, _STRIP // image.width), np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image.crop((0, top, image.width, bottom))
        rgb[top:bottom] = np.asarray(_flat(_eight_bits(strip, image), over))
    return rgb


def picture_of(extensions: Collection[str]) -> str | None:
    """Which of a sample's extensions is its picture; None where it has none."""
    return next((extension for extension in EXTENSIONS if extension in extensions), None)


def unread(counts: Mapping[str, int]) -> str:
    """One line about pictures whose extensions are in UNREAD: extension -> how many."""
    told = ", ".join(f".{extension} ({count})" for extension, count in sorted(counts.items()))
    return (
        f"{sum(counts.values())} picture file(s) of kinds that are not read: {told}; convert them"
        " to .png or .jpg to have them"
    )


def _reason(error: Exception, data: bytes) -> str:
    if not isinstance(error, UnidentifiedImageError):
        return " ".join(str(error).split()) or type(error).__name__
    if data[4:12] in (b"ftypavif", b"ftypavis") and not features.check("avif"):
        return "AVIF needs pillow 11.3 or newer"
    return "not a picture"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(Base.Orientation, 1))
    except Exception:  # a broken EXIF block raises nearly anything too, and the pixels are whole
        return 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    if image.format == "TIFF":  # Pillow has turned it already
        return width, height
    return (height, width) if _orientation(image) in _ASIDE else (width, height)


def _show_size(image: Image.Image, look: Callable[[int, int], None]) -> None:
    """Give `look` the size of a picture that is not loaded, and leave it so."""
    if image.format != "PNG" or "exif" in image.info:
        look(*_upright_size(image))
        return
    # Pillow decodes a PNG to see whether it says its orientation behind its pixels
    width, height = image.size
    try:
        look(width, height)
    except InputError as refused:
        try:
            look(height, width)
        except InputError:
            raise refused from None


def _scale_key(image: Image.Image, data: bytes) -> None:
    """A transparent colour of its own in 8 bits, as the pixels are."""
    key = image.info.get("transparency")
    if image.format == "PNG" and isinstance(key, tuple | int):
        depth = data[24]  # pillow scales the pixels to 8 bits, the transparent colour not
        if isinstance(key, tuple) and depth == 16:
            image.info["transparency"] = tuple(value >> 8 for value in key)
        elif image.mode == "L" and depth < 8:
            image.info["transparency"] = int(key) * 255 // (2**depth - 1)  # type: ignore[arg-type]


def _eight_bits(image: Image.Image, whole: Image.Image) -> Image.Image:
    """A strip of a picture with 8 bits a value."""
    key, tags = image.info.get("transparency"), getattr(whole, "tag_v2", {})
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image)
    bits = min(16, tags.get(258, (16,))[0])
    white = 1 if image.mode == "F" else 2**bits - 1
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= white:
        raise ValueError(f"its values run from {low:g} to {high:g}; 0 to {white} are read")
    grey = (
        (values * 255).round() if image.mode == "F" else values.astype(np.int64) >> (bits - 8)
    ).astype(np.uint8)
    out = Image.fromarray(255 - grey if tags.get(262) == _INK_IS_HIGH else grey)
    if isinstance(key, int):
        out.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    out.info = {"icc_profile": image.info.get("icc_profile")}
    return out


def _flat(image: Image.Image, over: tuple[int, int, int]) -> Image.Image:
    """As RGB in sRGB, without transparency."""
    if not image.has_transparency_data:
        return _in_srgb(image)
    grey = image.mode in ("L", "LA", "La")
    layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    flat = _in_srgb(layer.getchannel(0) if grey else layer.convert("RGB"))
    flat.putalpha(layer.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", flat.size, over), flat).convert("RGB")


def _in_srgb(image: Image.Image) -> Image.Image:
    profile, mode = image.info.get("icc_profile"), image.mode
    mode = mode if mode in ("L", "CMYK") else "RGB"
    transform = _to_srgb(profile, mode) if profile else None
    image = image.convert(mode)
    return image.convert("RGB") if transform is None else transform.apply(image)


@lru_cache(maxsize=16)  # pictures of one set mostly share theirs, and to set one up takes longest
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; None where they are sRGB already, or the profile is broken
    or of another mode's colours.
    """
    try:
        given = ImageCms.getOpenProfile(io.BytesIO(profile))
        # littlecms's table of a grey curve is up to 10 of 255 off in the dark
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        wanted = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(given, wanted, mode, "RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "CMYK":
        return transform
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(len(steps), -1, 3)
    probe = Image.fromarray(colours if mode == "RGB" else steps[None])
    before, after = np.asarray(probe.convert("RGB"), int), np.asarray(transform.apply(probe), int)
    return None if abs(after - before).max() <= _ALIKE else transform


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) in px of the picture in a file's bytes, upright, by its header alone; what
    follows may be broken. ValueError, one line, where the bytes begin no picture.
    """
    try:
        with _opened(data) as image:
            return _upright_size(image)
    except Exception as error:
        raise ValueError(_reason(error, data)) from error
