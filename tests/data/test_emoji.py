"""Emoji: small packages of the real ones' layout, joined to captions, drawn, split and packed."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowray.cli.data import main
from flowray.config.cache import cache_dir
from flowray.config.errors import InputError
from flowray.config.load import load_recipe
from flowray.config.paths import SETS
from flowray.config.progress import SILENT
from flowray.config.train import DataConfig
from flowray.data import emoji
from flowray.data.emoji import SIZES, EmojiSet, captions, made_emoji, split_drawings, unseen_pairs
from flowray.data.emoji_catalogue import PERMISSIVE, STYLES, Drawing, Emoji, read_drawings
from flowray.data.emoji_render import render, render_pngs
from flowray.data.make import ensure_set, set_folders
from flowray.data.reader import ShardReader
from flowray.data.shards import FETCHED, NAMED, find_shards
from flowray.store.latents import split_shards
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

RED, BLUE = (214, 48, 49), (41, 84, 200)
GROUPS = {"0": "smileys-emotion", "1": "people-body", "3": "animals-nature", "4": "food-drink"}
GROUPS |= {"8": "symbols", "9": "flags"}
# hexcode, label, tags, group, subgroup
ROWS: list[tuple[str, str, list[str], int, int]] = [
    ("1F34E", "red apple", ["apple", "fruit", "red", "ripe"], 4, 0),
    ("1F34B", "lemon", ["citrus", "fruit"], 4, 0),
    ("1F96F", "bagel", ["bread"], 4, 1),
    ("1F950", "croissant", ["bread", "french"], 4, 1),
    ("1F436", "dog face", ["dog", "pet"], 3, 2),
    ("1F415", "dog", ["pet"], 3, 2),
    ("1F42B", "two-hump camel", ["hump"], 3, 2),
    ("1F98A", "fox", [], 3, 2),
    ("1F44B", "waving hand", ["hello"], 1, 3),
    ("1F6B6", "person walking", ["walk"], 1, 4),
    ("1F6B6-200D-2642-FE0F", "man walking", ["walk"], 1, 4),
    ("2764-FE0F", "red heart", ["love"], 0, 5),
    ("2753", "red question mark", ["ask"], 8, 6),
    ("1F1EB-1F1F7", "flag: France", ["FR"], 9, 7),
]
TONED = "1F44B"


def _tgz(folder: Path, name: str, files: Mapping[str, Any]) -> Path:
    with tarfile.open(folder / name, "w:gz") as tar:
        for path, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return folder / name


def _language(say: Callable[[str], str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"label": say("regional indicator A"), "hexcode": "1F1E6"}]
    for code, label, tags, group, subgroup in ROWS:
        row = {"hexcode": code, "label": say(label), "group": group, "subgroup": subgroup}
        row |= {"tags": [say(tag) for tag in tags]} if tags else {}
        if code == TONED:
            row["skins"] = [
                {**row, "hexcode": f"{code}-1F3F{'ABCDEF'[tone]}", "tone": tone}
                | {"label": say(f"{label}: tone {tone}")}
                for tone in range(1, 6)
            ]
        rows.append(row)
    return rows


def _square(colour: tuple[int, int, int], lower: int = 4) -> str:
    """A 4 px margin on each side of a 16 px box; `lower` makes two of them differ."""
    red, green, blue = colour
    return f'<path fill="rgb({red},{green},{blue})" d="M4 4h8v{lower + 4}h-8z"/>'


def _webp() -> bytes:
    picture, buffer = np.zeros((256, 256, 4), np.uint8), io.BytesIO()
    picture[64:192, 64:192] = (*BLUE, 255)
    Image.fromarray(picture).save(buffer, format="webp", lossless=True)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Emojibase and the packages of all nine styles, small."""
    folder = tmp_path_factory.mktemp("packages")
    short = {"1F98A": "fox_face", "2764": ["heart", "red_heart"], "1F44B": "wave"}
    sources = ("cldr", "emojibase", "iamcal", "github", "joypixels", "emojibase-legacy")
    _tgz(
        folder,
        emoji.CAPTIONS.file,
        {
            "en/data.json": _language(lambda text: text),
            "zh/data.json": _language(lambda text: f"中{text}"),
            "meta/groups.json": {
                "groups": GROUPS,
                "subgroups": {str(n): f"sub{n}" for n in range(8)},
            },
            "meta/unicode-names.json": {"1F42B": "BACTRIAN CAMEL", "1F436": "DOG FACE"},
            **{f"en/shortcodes/{source}.json": short for source in sources},
        },
    )
    codes = [code for code, *_ in ROWS] + [f"{TONED}-1F3FB"]
    for style in ("noto", "twemoji", "outline", "flat"):
        icons = {f"icon-{n}": {"body": _square(RED, n % 5)} for n in range(len(codes))}
        icons["icon-9"] |= {"body": '<g><path d="M4 4h8v8h-8z"/></g>'}  # a man walks as a person
        icons["icon-10"] |= {"body": '<g><path d="M4 4h8v8h-8z"/></g>'}
        for n, icon in enumerate(icons.values()):
            icon["body"] += f"<desc>{n if n != 10 else 9}</desc>"
        chars = {code.lower().replace("-fe0f", ""): f"icon-{n}" for n, code in enumerate(codes)}
        del chars["1f98a"]  # a fox is drawn, under its name alone
        icons["fox"] = icons.pop("icon-7")
        aliases = {"old-lemon": {"parent": "icon-1"}}
        made = {"prefix": style, "width": 16, "height": 16, "icons": icons, "aliases": aliases}
        _tgz(folder, STYLES[style].file, {"icons.json": made, "chars.json": chars})
    named = {
        "blob": ["red-apple", "lemon", "pistol"],
        "emojitwo": ["red-apple", "bactrian-camel", "heart", "dog-face", "withdrawn"],
        "emojione": ["red-apple", "lemon", "waving-hand", "waving-hand-tone-1", "bagel"],
        "firefox": ["redapple", "dog", "dogside", "wave", "foxface"],
    }
    for style, names in named.items():
        icons = {name: {"body": f"{_square(BLUE)}<desc>{name}</desc>"} for name in names}
        if style == "emojitwo":
            icons["withdrawn"] = {"body": _square(RED), "hidden": True}
        made = {"width": 16, "height": 16, "icons": icons}
        if style == "emojitwo":
            turned = {"parent": "red-apple", "hFlip": True}
            made["aliases"] = {
                "bagel": {"parent": "heart"},
                "lemon": turned,
                "fox": {"parent": "withdrawn"},
            }
        _tgz(folder, STYLES[style].file, {"icons.json": made, "chars.json": {}})
    rasters = ["1f34e", "2764-fe0f", "1f44b", "1f44b-1f3fb", "1f1eb-1f1f7"]
    files = {f"assets/{code}.webp": _webp() + b"\0" * n for n, code in enumerate(rasters)}
    _tgz(folder, STYLES["3d"].file, {"package.json": {}, **files})
    return folder


def _drawings(folder: Path, *, skin_tones: bool = False, lang: str = "en") -> list[Drawing]:
    archives = {style: folder / package.file for style, package in STYLES.items()}
    return read_drawings(
        folder / emoji.CAPTIONS.file, archives, lang.split(","), skin_tones=skin_tones
    )


def _labels(drawings: list[Drawing], style: str) -> set[str]:
    return {drawing.emoji.label for drawing in drawings if drawing.style == style}


@pytest.fixture
def pinned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small packages under the pins that they have."""

    def at(file: str) -> str:
        return hashlib.sha256((folder / file).read_bytes()).hexdigest()

    for style, package in list(STYLES.items()):
        monkeypatch.setitem(STYLES, style, replace(package, sha256=at(package.file)))
    own = replace(emoji.CAPTIONS, sha256=at(emoji.CAPTIONS.file))
    monkeypatch.setattr(emoji, "CAPTIONS", own)
    return folder


def test_joins_by_hexcode(folder: Path) -> None:
    drawings = _drawings(folder)
    for style in ("noto", "outline"):
        assert _labels(drawings, style) == {
            *("red apple", "lemon", "bagel", "croissant", "dog face", "dog", "two-hump camel"),
            *("fox", "waving hand", "person walking", "red heart"),
        }
    assert _labels(drawings, "3d") == {"red apple", "red heart", "waving hand"}
    heart = next(drawing.emoji for drawing in drawings if drawing.emoji.label == "red heart")
    assert heart == Emoji(
        hexcode="2764-FE0F",
        base="2764-FE0F",
        label="red heart",
        group="smileys-emotion",
        subgroup="sub5",
        tones=(),
        words={"en": ("red heart", ("love",))},
    )


def test_joins_by_name(folder: Path) -> None:
    drawings = _drawings(folder)
    assert _labels(drawings, "blob") == {"red apple", "lemon"}
    # by Unicode name, by short code, by label; of two names of one drawing the surer, a turned one
    # is another drawing, a withdrawn one none
    assert _labels(drawings, "emojitwo") == {
        *("red apple", "two-hump camel", "bagel", "dog face", "lemon")
    }
    art = {each.emoji.label: each.art for each in drawings if each.style == "emojitwo"}
    assert "scale(-1 1)" in str(art["lemon"])
    assert "scale" not in str(art["red apple"])
    firefox = {each.emoji.label: str(each.art) for each in drawings if each.style == "firefox"}
    assert "dogside" in firefox["dog"]
    assert "<desc>dog<" in firefox["dog face"]
    assert firefox.keys() == {"red apple", "dog", "dog face", "fox"}  # its wave is one of the sea


def test_skin_tones(folder: Path) -> None:
    plain, toned = _drawings(folder), _drawings(folder, skin_tones=True)
    assert all(not drawing.emoji.tones for drawing in plain)
    more = [drawing for drawing in toned if drawing not in plain]
    assert {(each.emoji.hexcode, each.emoji.base, each.emoji.tones) for each in more} == {
        ("1F44B-1F3FB", "1F44B", (1,))
    }
    assert {each.style for each in more} == {"noto", "twemoji", "outline", "flat", "emojione", "3d"}


def test_art_of_several_emoji_is_one_drawing(folder: Path) -> None:
    for style in ("noto", "flat"):
        assert "man walking" not in _labels(_drawings(folder), style)


def test_captions_of_languages(folder: Path) -> None:
    drawings = {(each.emoji.label, each.style): each for each in _drawings(folder, lang="en,zh")}
    apple = captions(drawings["red apple", "flat"])
    assert apple[:2] == ["red apple", "red apple in flat style"]
    assert apple[3:5] == ["中red apple", "中red apple，flat风格"]
    tags = set(apple[2].split(", "))
    assert len(tags) == 3
    assert tags < {"apple", "fruit", "red", "ripe"}
    assert captions(drawings["fox", "firefox"]) == [
        *("fox", "fox in firefox style", "中fox", "中fox，firefox风格")
    ]
    with pytest.raises(InputError, match="--lang xx"):
        _drawings(folder, lang="xx")


def _many() -> list[Drawing]:
    """300 emoji of 20 subgroups in every style, a fifth of them in four tones besides."""
    found = []
    for number in range(300):
        base = f"1F{number:03X}"
        for tone in range(5 if number % 5 == 0 else 1):
            code = f"{base}-1F3F{tone}" if tone else base
            made = Emoji(code, base, code, "g", f"s{number % 20}", (tone,) if tone else (), {})
            # the later ones are drawn in few styles
            styles = list(STYLES)[: 9 if number < 200 else 3]
            found += [Drawing(made, style, "") for style in styles]
    return found


def _keys(drawings: list[Drawing]) -> set[tuple[str, str]]:
    return {(drawing.emoji.hexcode, drawing.style) for drawing in drawings}


def test_splits_are_disjoint_and_hold_what_they_say() -> None:
    drawings = _many()
    splits = split_drawings(drawings)
    keys = {split: _keys(of) for split, of in splits.items()}
    assert set().union(*keys.values()) == _keys(drawings)
    assert sum(map(len, keys.values())) == len(drawings)
    trained: dict[str, set[str]] = {}
    for code, style in keys["train"]:
        trained.setdefault(code, set()).add(style)
    assert 0.02 < len(keys["val"]) / len(drawings) < 0.08
    assert all(len(trained[code] - {style}) >= 3 for code, style in keys["val"])
    # no form of a held-out emoji is in training in that style
    for split in ("val", "unseen"):
        held = {(each.emoji.base, each.style) for each in splits[split]}
        assert held.isdisjoint({(each.emoji.base, each.style) for each in splits["train"]})
    pairs = unseen_pairs(drawings)
    seen = {(each.style, each.emoji.subgroup) for each in splits["train"]}
    assert {style for style, _ in pairs} == set(STYLES)
    assert pairs.isdisjoint(seen)
    assert {subgroup for _, subgroup in pairs} <= {subgroup for _, subgroup in seen}
    assert {style for style, _ in pairs} == {style for style, _ in seen}


def test_splits_follow_from_names_not_from_order() -> None:
    drawings = _many()
    splits, turned = split_drawings(drawings), split_drawings(drawings[::-1])
    assert splits == turned
    assert splits["train"] != sorted(splits["train"], key=drawings.index)
    # without a style, the pairs of the others stay where they are, or are no longer known enough
    fewer = split_drawings([each for each in drawings if each.style != "3d"])
    assert _keys(fewer["unseen"]) == {key for key in _keys(splits["unseen"]) if key[1] != "3d"}
    assert _keys(fewer["val"]) <= _keys(splits["val"])


def test_one_style_still_holds_out() -> None:
    splits = split_drawings([each for each in _many() if each.style == "noto"])
    assert all(splits.values())


def test_colours_and_place() -> None:
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">'
        '<path fill="rgb(214,48,49)" d="M4 4h8v8h-8z"/></svg>'
    )
    picture = render(svg, 64)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    inside = np.zeros((64, 64), bool)
    inside[16:48, 16:48] = True
    assert (picture[inside] == RED).all()
    assert (picture[~inside] == 255).all()
    whole = render(svg.replace("M4 4h8v8h-8z", "M0 0h16v16h-16z"), 64)  # it touches the border
    assert (whole[2:62, 2:62] == RED).all()
    assert (whole[[0, 1, 62, 63]] == 255).all()
    assert (whole[:, [0, 1, 62, 63]] == 255).all()
    wide = render(svg.replace("0 0 16 16", "-8 4 32 8"), 64)  # 32 x 8, in the middle
    assert (wide[26:38, 26:38] == RED).all()
    assert (wide[:20] == 255).all()


def test_raster_art_is_reduced_without_dark_edges() -> None:
    picture = render(_webp(), 64)
    assert (picture[20:44, 20:44] == BLUE).all()
    assert (picture[:12] == 255).all()
    mixed = picture.reshape(-1, 3).astype(int)
    assert (mixed >= np.array(BLUE) - 2).all()  # transparent black would show between


def test_processes_draw_what_one_does() -> None:
    box = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">'
    arts = [(str(n), f'{box}<path d="M1 1h{n % 7}v3z"/></svg>') for n in range(70)]
    drawn = list(render_pngs(arts, 64))
    assert drawn == [png for art in arts for png in render_pngs([art], 64)]
    with pytest.raises(InputError, match="drawing broken-noto"):
        list(render_pngs([("broken-noto", "<svg"), *arts], 64))


def test_the_command_makes_shards(
    pinned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    words = ["make", "emoji", "--lang", "en,zh", "--packages", str(pinned), "--out", str(out)]
    assert main(words) == 0
    told = capsys.readouterr().out
    counted = 0
    for split in EmojiSet.splits:
        reader = ShardReader(find_shards(str(out / split)))
        counted += len(reader)
        assert str(out / split) in told
        for index in range(len(reader)):
            row = json.loads(reader.read(index, "json"))
            package = STYLES[row["style"]]
            assert (row["licence"], row["attribution"]) == (package.licence, package.attribution)
            assert row["captions"][:2] == [row["label"], f"{row['label']} in {row['style']} style"]
            assert row["group"] in {
                "smileys-emotion",
                "people-body",
                "animals-nature",
                "food-drink",
            }
            assert row["skin_tones"] == []
            assert f"{row['hexcode'].lower()}-{row['style']}" in reader.label(index)
            assert np.asarray(Image.open(io.BytesIO(reader.read(index, "png")))).shape == (
                64,
                64,
                3,
            )
    assert counted == len(_drawings(pinned))
    manifest = json.loads((out / "train" / "manifest.json").read_text())
    assert manifest["meta"]["languages"] == ["en", "zh"]
    assert "packages" not in manifest["meta"]


def test_permissive_leaves_out_what_passes_its_licence_on(pinned: Path, tmp_path: Path) -> None:
    assert set(STYLES) - set(PERMISSIVE) == {"outline", "emojione"}
    made = EmojiSet(styles=PERMISSIVE, packages=pinned)
    made.prepare(tmp_path, SILENT)
    drawings = [drawing for split in made.splits for drawing in made.drawings[split]]
    assert {drawing.style for drawing in drawings} == set(PERMISSIVE)
    assert all("SA" not in STYLES[drawing.style].licence for drawing in drawings)


def test_the_named_set_is_what_make_puts_into_the_cache(pinned: Path, tmp_path: Path) -> None:
    data = DataConfig(shards="emoji_64", cache=str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    with pytest.raises(InputError, match="make emoji --size 64"):
        split_shards(data)
    assert list((tmp_path / "cache").iterdir()) == []
    folders = ensure_set(EmojiSet(packages=pinned), tmp_path / "cache")
    assert made_emoji("emoji_64", tmp_path / "cache") == folders
    assert set(split_shards(data)) == {"train", "val", "unseen"}
    other = EmojiSet(styles=("noto", "3d"))
    assert set_folders(other, tmp_path) == set_folders(EmojiSet(styles=("3d", "noto")), tmp_path)
    assert set_folders(other, tmp_path) != set_folders(EmojiSet(), tmp_path)


def test_the_recipe_trains_on_the_set(
    pinned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the small language model in the place of the fetched one."""
    monkeypatch.setenv("FLOWRAY_CACHE", str(tmp_path / "cache"))
    made = ensure_set(EmojiSet(packages=pinned), cache_dir(None))
    assert 40 <= len(ShardReader(find_shards(str(made["train"])))) < 80
    text = "{kind: causal_lm, path: embedded, width: null, parameters: null}"
    small = [f"model.text={text}", "model.velocity={kind: dit, patch: 2, width: 32, depth: 1}"]
    small += ["train.steps=2", "train.batch_size=4", "train.probe_every=2", "probes.batch_size=4"]
    recipe = load_recipe("emoji_64", [*small, "train.sample_every=2"]).recipe
    assert (recipe.model.autoencoder.path, recipe.model.latent.shape) == (
        "embedded_emoji",
        (4, 8, 8),
    )
    run = RunDirectory(tmp_path / "run")
    train(recipe, run, Group(0, 1, torch.device("cpu")), lambda row: None)
    (probed,) = list(read_rows(run.probes))
    assert probed["vae/psnr"] > 20
    with Image.open(run.samples / "step_000002.png") as sheet:
        assert sheet.height % 64 == 0


def test_the_docs_credit_every_style() -> None:
    page = (Path(__file__).parents[2] / "docs" / "emoji.md").read_text(encoding="utf-8")
    for style, package in STYLES.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{style}` |"))
        maker, _, address = package.attribution.partition(", ")
        for said in (f"`{package.name}` {package.version}", package.licence, maker, address):
            assert said in row


def test_names_agree_between_the_rooms() -> None:
    assert SETS == NAMED
    assert load_recipe("quickstart", ["data.shards=emoji_64"]).recipe.data.shards == "emoji_64"
    assert tuple(EmojiSet(size=size).name for size in SIZES) == FETCHED


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["emoji", "--samples", "5"], "--samples"),
        (["digits", "--size", "64"], "--size"),
        (["shapes", "--permissive"], "--permissive"),
        (["emoji", "--styles", "notto"], "did you mean noto"),
        (["emoji", "--styles", "3d,outline", "--permissive"], "outline"),
        (["emoji", "--styles", ","], "--styles"),
        (["emoji", "--size", "65"], "65"),
        (["emoji", "--packages", "{empty}"], "npm pack emojibase-data@17.0.0 @iconify-json/noto"),
    ],
)
def test_refusals_write_nothing(words: list[str], says: str, tmp_path: Path) -> None:
    given = [word.replace("{empty}", str(tmp_path)) for word in words]
    with pytest.raises(InputError) as told:
        main(["make", *given, "--out", str(tmp_path / "out")])
    assert says in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_without_resvg_the_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(InputError, match=r"pip install 'flowray\[emoji\]'"):
        EmojiSet(packages=tmp_path).prepare(tmp_path, SILENT)
