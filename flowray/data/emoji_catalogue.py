"""Which emoji are drawn in which styles, and what they are called: pinned packages, joined.

Captions, groups and skin tones are Emojibase's. Five of the nine packages of drawings name an emoji
by its code points. The other four name it by words, which are those of its label of today, of its
Unicode name or of a short code; a name that fits two emoji fits none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError, did_you_mean
from flowray.data.packages import Package, member_names, read_members

LEFT_OUT = ("component", "symbols", "flags")  # groups that are signs, not drawings of things
_SHORT = ("cldr", "emojibase", "iamcal", "github", "joypixels", "emojibase-legacy")
_RASTER = "package/assets/"

CAPTIONS = Package(
    name="emojibase-data",
    version="17.0.0",
    registry="npm",
    file="emojibase-data-17.0.0.tgz",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    licence="MIT",
    attribution="Miles Johnson, https://github.com/milesj/emojibase",
)


def _iconify(name: str, version: str, sha256: str, licence: str, attribution: str) -> Package:
    return Package(
        name=f"@iconify-json/{name}",
        version=version,
        registry="npm",
        file=f"iconify-json-{name}-{version}.tgz",
        sha256=sha256,
        licence=licence,
        attribution=attribution,
    )


# style, as captions name it -> the package of its drawings; each package says its licence itself
STYLES: dict[str, Package] = {
    "noto": _iconify(
        "noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Google Inc, https://github.com/googlefonts/noto-emoji",
    ),
    "blob": _iconify(
        "noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        "Google Inc, https://github.com/googlefonts/noto-emoji",
    ),
    "twemoji": _iconify(
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twitter, https://github.com/jdecked/twemoji",
    ),
    "outline": _iconify(
        "openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
        "OpenMoji, https://github.com/hfg-gmuend/openmoji",
    ),
    "emojitwo": _iconify(
        "emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "Emoji One, https://github.com/EmojiTwo/emojitwo",
    ),
    "emojione": _iconify(
        "emojione-v1",
        "1.2.3",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        "CC-BY-SA-4.0",
        "Emoji One, https://github.com/joypixels/emojione-legacy",
    ),
    "firefox": _iconify(
        "fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
        "Mozilla, https://github.com/mozilla/fxemoji",
    ),
    "flat": _iconify(
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Microsoft Corporation, https://github.com/microsoft/fluentui-emoji",
    ),
    "3d": Package(
        name="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        registry="npm",
        file="lobehub-fluent-emoji-3d-1.1.0.tgz",
        sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        licence="MIT",
        attribution="Microsoft Corporation, https://github.com/microsoft/fluentui-emoji",
    ),
}
# style -> an icon whose name is another emoji's -> the label it draws, "" for that of none
_RENAMED: dict[str, dict[str, str]] = {
    "blob": {"pistol": ""},  # not yet a water pistol
    "emojitwo": {"pistol": ""},
    "emojione": {"pistol": ""},
    "firefox": {
        "pistol": "",
        "cat": "cat face",
        "catside": "cat",
        "construction": "building construction",
        "dog": "dog face",
        "dogside": "dog",
        "keyboard": "",
        "kiss": "",
        "mouse": "mouse face",
        "mouseside": "mouse",
        "pig": "pig face",
        "pigside": "pig",
        "pout": "person pouting",
        "pouting": "enraged face",
        "sunglasses": "smiling face with sunglasses",
        "tiger": "tiger face",
        "tigerside": "tiger",
        "wave": "water wave",
        "window": "",
    },
}
PERMISSIVE = tuple(style for style, package in STYLES.items() if "-SA-" not in package.licence)


@dataclass(frozen=True)
class Emoji:
    """One emoji and its words.

    base: the hexcode without skin tones; tones: 1 (light) to 5 (dark), one for each person.
    words: language -> (label, tags), of the languages that have it.
    """

    hexcode: str
    base: str
    label: str
    group: str
    subgroup: str
    tones: tuple[int, ...]
    words: Mapping[str, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Drawing:
    """An emoji in one style. art: a whole SVG, or the bytes of a raster picture."""

    emoji: Emoji
    style: str
    art: str | bytes


def read_drawings(
    captions: Path, archives: Mapping[str, Path], languages: Iterable[str], *, skin_tones: bool
) -> list[Drawing]:
    """Every drawing of the styles in `archives` (style -> its package's archive), by hexcode, then
    style; without LEFT_OUT groups, and without skin tones unless asked for.

    Art that a package has for several emoji, as for a man and a person who run, is one drawing, of
    the emoji of the fewest code points.

    InputError: a language that Emojibase does not have, an archive of another form.
    """
    emoji = read_emoji(captions, languages)
    names = _name_tables(captions, emoji)
    found: list[Drawing] = []
    for style, archive in archives.items():
        try:
            art = _art(archive, emoji, names, _RENAMED.get(style, {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{archive}: not drawings as style {style} has them: {error}"
            ) from error
        general = sorted(art, key=lambda code: (len(code.split("-")), code), reverse=True)
        of_art = {art[code]: code for code in general}
        found += [Drawing(emoji[code], style, drawn) for drawn, code in of_art.items()]
    return sorted(
        (
            drawing
            for drawing in found
            if drawing.emoji.group not in LEFT_OUT and (skin_tones or not drawing.emoji.tones)
        ),
        key=lambda drawing: (drawing.emoji.hexcode, drawing.style),
    )


def read_emoji(captions: Path, languages: Iterable[str]) -> dict[str, Emoji]:
    """Plain code -> emoji, of Emojibase's archive."""
    languages = tuple(languages)
    known = sorted(
        match[1]
        for name in member_names(captions)
        if (match := re.fullmatch(r"package/([^/]+)/data\.json", name))
    )
    for language in languages:
        if language not in known:
            raise InputError(
                f"--lang {language}: no captions in it{did_you_mean(language, known)}; give"
                f" {', '.join(known)}"
            )
    files = {each: f"package/{each}/data.json" for each in {"en", *languages}}
    groups_file = "package/meta/groups.json"
    held = read_members(captions, [*files.values(), groups_file])
    groups = json.loads(held[groups_file])
    rows = {
        language: {row["hexcode"]: (row, base) for row, base in _rows(json.loads(held[file]))}
        for language, file in files.items()
    }
    return {
        plain(code): Emoji(
            hexcode=code,
            base=base,
            label=row["label"],
            group=groups["groups"][str(row["group"])],
            subgroup=groups["subgroups"][str(row["subgroup"])],
            tones=_tones(row),
            words={
                language: (there["label"], tuple(there.get("tags", ())))
                for language in languages
                if (there := rows[language].get(code, ({},))[0])
            },
        )
        for code, (row, base) in rows["en"].items()
        if "group" in row  # the letters of flags have none
    }


def _rows(data: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], str]]:
    """Every emoji and the hexcode of its form without skin tones."""
    for row in data:
        yield row, row["hexcode"]
        yield from ((skin, row["hexcode"]) for skin in row.get("skins", ()))


def _tones(row: Mapping[str, Any]) -> tuple[int, ...]:
    tone = row.get("tone", ())
    return (tone,) if isinstance(tone, int) else tuple(tone)


def plain(hexcode: str) -> str:
    """A hexcode as all packages agree on it: lower case, without the wish for colour (FE0F)."""
    return "-".join(part for part in re.split("[-_]", hexcode.lower()) if part != "fe0f")


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _name_tables(captions: Path, emoji: Mapping[str, Emoji]) -> list[dict[str, str]]:
    """Letters of a name -> plain code: by labels, by Unicode names, by short codes, the surest
    first.
    """
    unicode_file = "package/meta/unicode-names.json"
    short_files = [f"package/en/shortcodes/{source}.json" for source in _SHORT]
    held = {
        name: json.loads(data)
        for name, data in read_members(captions, [unicode_file, *short_files]).items()
    }
    short = [
        (name, code)
        for file in short_files
        for code, names in held[file].items()
        for name in ([names] if isinstance(names, str) else names)
    ]
    labels = [(each.label, code) for code, each in emoji.items()]
    unicode = [(name, code) for code, name in held[unicode_file].items()]
    tables = []
    for pairs in (labels, unicode, short):
        table: dict[str, set[str]] = {}
        for name, code in pairs:
            if plain(code) in emoji:
                table.setdefault(_letters(name), set()).add(plain(code))
        tables.append({name: min(codes) for name, codes in table.items() if len(codes) == 1})
    return tables


def _art(
    archive: Path,
    emoji: Mapping[str, Emoji],
    names: list[dict[str, str]],
    renamed: Mapping[str, str],
) -> dict[str, str | bytes]:
    """Plain code -> the drawing of it, of one package."""
    pictures = {
        plain(Path(name).stem): name for name in member_names(archive) if name.startswith(_RASTER)
    }
    if pictures:
        chosen = {code: name for code, name in pictures.items() if code in emoji}
        data = read_members(archive, chosen.values())
        return {code: data[name] for code, name in chosen.items()}
    icons_file, chars_file = "package/icons.json", "package/chars.json"
    held = read_members(archive, [icons_file, chars_file])
    icons, chars = json.loads(held[icons_file]), json.loads(held[chars_file])
    by_code = {plain(code): name for code, name in chars.items() if plain(code) in emoji}
    of_label = {each.label: code for code, each in emoji.items()}
    told = {of_label[label]: name for name, label in renamed.items() if label in of_label}
    taken = {*by_code.values(), *renamed}
    found = {**_by_name(icons, names, taken), **told, **by_code}
    return {code: svg_of(icons, name) for code, name in found.items()}


def _by_name(
    icons: Mapping[str, Any], names: list[dict[str, str]], taken: set[str]
) -> dict[str, str]:
    """Plain code -> icon, of the icons that are not `taken` and not withdrawn; none stands for
    two emoji, as two names of one drawing would have it.
    """
    drawn = {name: name for name, icon in icons["icons"].items() if not icon.get("hidden")}
    for name, alias in icons.get("aliases", {}).items():
        if alias["parent"] in drawn:  # one that is turned is a drawing of its own
            drawn[name] = name if set(alias) > {"parent"} else alias["parent"]
    taken, found = set(taken), dict[str, str]()
    for table in names:
        for name, of in drawn.items():
            code = table.get(_letters(name))
            if code and code not in found and of not in taken:
                found[code] = name
                taken.add(of)
    return found


def svg_of(icons: Mapping[str, Any], name: str) -> str:
    """The SVG of one icon of an Iconify set (its `icons.json`), or of an alias of one."""
    alias = icons.get("aliases", {}).get(name, {})
    icon = {**icons, **icons["icons"][alias.get("parent", name)], **alias}
    left, top, width, height = (
        float(icon.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    body = icon["body"]
    if icon.get("hFlip"):
        body = f'<g transform="translate({2 * left + width:g} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{left:g} {top:g} {width:g} {height:g}">{body}</svg>'
    )
