"""Packing what people have: a stable held-out share, bad files named and left out, each picture
decoded once.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import own_pictures

from flowray.cli.data import main
from flowray.config.errors import InputError
from flowray.data import prepare
from flowray.data.captions import LONGEST_CELL
from flowray.data.check import check_shards
from flowray.data.pack import key_of, pack_folder
from flowray.data.prepare import AS_THEY_ARE
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards


def photos(folder: Path, names: list[str]) -> Path:
    """A folder of 8 px pictures with a caption each."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i % 256, i // 256, 7)).save(path)
        path.with_suffix(".txt").write_text(f"picture {name}\n")
    return folder


def sources(folder: Path) -> set[str]:
    """Which pictures lie in a split."""
    reader = ShardReader(find_shards(str(folder)))
    return {json.loads(reader.read(i, "json"))["source"] for i in range(len(reader))}


def test_the_split_stays_when_files_are_added(tmp_path: Path) -> None:
    names = [f"{i:03d}.png" for i in range(120)]
    photos(tmp_path / "in", names)
    packed = pack_folder(tmp_path / "in", tmp_path / "one", 8, val=0.2)
    train, val = sources(tmp_path / "one" / "train"), sources(tmp_path / "one" / "val")
    assert packed.samples == {"train": len(train), "val": len(val)}
    assert train | val == set(names)
    assert not train & val
    assert 12 <= len(val) <= 36

    photos(tmp_path / "in", [f"0/{name}" for name in names])  # sorted before all the others
    pack_folder(tmp_path / "in", tmp_path / "two", 8, val=0.2)
    assert sources(tmp_path / "two" / "val") & set(names) == val
    assert check_shards(str(tmp_path / "two" / "*" / "*.tar")).good

    pack_folder(tmp_path / "in", tmp_path / "more", 8, val=0.4)
    assert sources(tmp_path / "two" / "val") < sources(tmp_path / "more" / "val")


def test_each_picture_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "in", [f"{i}.png" for i in range(30)])
    seen: list[bytes] = []
    decode = prepare.decode_rgb
    monkeypatch.setattr(
        prepare, "decode_rgb", lambda data, *more: (seen.append(data), decode(data, *more))[1]
    )
    pack_folder(tmp_path / "in", tmp_path / "out", 8, val=0.3)
    assert sorted(seen) == sorted(path.read_bytes() for path in (tmp_path / "in").glob("*.png"))


def test_bad_files_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos(tmp_path / "in", [f"{i}.png" for i in range(40)])
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:40])
    (folder / "5.png").write_bytes(b"")
    (folder / "7.txt").unlink()
    (folder / "9.txt").write_bytes(b"\xff\xfe")
    (folder / "11.txt").write_text(" \n")
    argv = ["pack", str(folder), str(tmp_path / "out"), "--size", "8", "--val", "0.3"]
    with pytest.raises(InputError, match="--skip-bad"):
        main(argv)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

    assert main([*argv, "--skip-bad"]) == 0
    out, err = capsys.readouterr()
    named = [line for line in err.splitlines() if line.startswith("left out: ")]
    assert [Path(line.split(": ")[1]).stem for line in sorted(named)] == ["11", "3", "5", "7", "9"]
    counts = {Path(line.split()[-1]).name: int(line.split()[0]) for line in out.splitlines()}
    assert counts.keys() == {"train", "val"}
    assert sum(counts.values()) == 35
    kept = sources(tmp_path / "out" / "train") | sources(tmp_path / "out" / "val")
    assert kept == {f"{i}.png" for i in range(40)} - {"3.png", "5.png", "7.png", "9.png", "11.png"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--val", "1"], "val 1.0"),
        (["--val", "-0.1"], "val -0.1"),
        (["--val", "0.0001"], "none would go to val"),
        (["--val", "many"], "--val"),
        (["--size", "0"], "size 0"),
        (["--size", "-64"], "size -64"),
        (["--size", "4097"], "4096"),
        (["--size", "99999999999999999999"], "4096"),
        (["--per-shard", "0"], "per_shard 0"),
    ],
)
def test_a_share_or_size_that_cannot_be(tmp_path: Path, argv: list[str], says: str) -> None:
    photos(tmp_path / "in", [f"{i}.png" for i in range(5)])
    with pytest.raises(InputError, match=says):
        main(["pack", str(tmp_path / "in"), str(tmp_path / "out"), *argv])
    assert not (tmp_path / "out").exists()


def test_nothing_good_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", ["a.png"])
    (folder / "a.png").write_bytes(b"no picture")
    for bad in (True, False):
        with pytest.raises(InputError, match=r"a\.png: does not decode") as caught:
            pack_folder(folder, tmp_path / "out", 8, skip_bad=bad)
        assert ("--skip-bad" in str(caught.value)) is not bad
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_hidden_files_are_not_looked_at(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", ["a.png", ".thumbnails/b.png"])
    (folder / "._a.png").write_bytes(b"what macOS puts beside a file on a foreign disk")
    pack_folder(folder, tmp_path / "out", 8)
    assert sources(tmp_path / "out") == {"a.png"}


def test_keys_of_names_that_webdataset_would_cut_or_skip(tmp_path: Path) -> None:
    names = ["__old__/a.png", "a.b.png", "a b/ü.png", "a_b.png"]
    photos(tmp_path / "in", names)
    pack_folder(tmp_path / "in", tmp_path / "out", 8)
    assert sources(tmp_path / "out") == set(names)
    assert set(ShardReader(find_shards(str(tmp_path / "out"))).keys) == {
        key_of(name) for name in names
    }


ROWS = [
    {"file_name": "a.png", "text": 'one, "quoted"'},
    {"file_name": "b.png", "text": "b\u2028ü"},
    {"file_name": "a.png", "text": "two"},
]
CSV = 'file_name, text\r\na.png,"one, ""quoted"""\r\n\r\nb.png, b\u2028ü\r\na.png,two\r\n'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("captions.jsonl", json.dumps(ROWS)),
        ("captions.json", json.dumps(ROWS, indent=1)),
        (
            "captions.csv",
            'id,caption,image\n1,"one, ""quoted""",a.png\n2,b\u2028ü,b.png\n3,two,a.png\n',
        ),
        ("metadata.csv", CSV),
        ("METADATA.CSV", CSV.replace(" text", "caption")),
        ("sub/metadata.csv", CSV),
    ],
)
def test_caption_lists_as_others_write_them(tmp_path: Path, name: str, text: str) -> None:
    """Of Hugging Face's image folders, with a byte order mark, as one JSON list, at the
    pictures' depth.
    """
    folder = tmp_path / "in"
    photos((folder / name).parent, ["a.png", "b.png"])
    (folder / name).write_text("\ufeff" + text, encoding="utf-8", newline="")
    pack_folder(folder, tmp_path / "out", 8)
    reader = ShardReader(find_shards(str(tmp_path / "out")))
    captions = {
        json.loads(reader.read(i, "json"))["source"][-5:]: reader.captions(i) for i in range(2)
    }
    assert captions == {"a.png": ['one, "quoted"', "two"], "b.png": ["b\u2028ü"]}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"captions.jsonl": '["a.png", "one"]'}, "captions.jsonl:1: no entry"),
        ({"captions.json": '{"a.png": "one"}'}, "captions.json:1: want image"),
        ({"captions.json": '[{"image": "a.png",}]'}, "captions.json: cannot be read"),
        ({"captions.jsonl": '{"image": 3, "caption": "one"}'}, "captions.jsonl:1: want image"),
        (
            {"captions.jsonl": '{"image": "a.png", "captions": [3]}'},
            "captions.jsonl:1: empty caption",
        ),
        ({"metadata.csv": "file_name,label\na.png,3\n"}, "metadata.csv:1: want image"),
        ({"metadata.csv": "file_name;text\na.png;one\n"}, "metadata.csv:1: want image"),
        ({"metadata.csv": "file_name,text\na.png,red, blue\n"}, "metadata.csv:2: more cells"),
        ({"metadata.csv": "file_name,text\na.png\n"}, "metadata.csv:2: empty caption"),
        ({"metadata.csv": "file_name,text\nb.png,one\n"}, "b.png: no such picture"),
        ({"metadata.csv": ""}, "metadata.csv:1: want image"),
        ({"metadata.csv": b"\xff\xfe"}, "metadata.csv: cannot be read"),
        (
            {"metadata.csv": f"file_name,text\na.png,{'x' * (LONGEST_CELL + 1)}\n"},
            "metadata.csv: cannot be read (line 2: field larger than field limit",
        ),
        ({"metadata.csv": "file_name,text\na.png,one\n", "captions.jsonl": ""}, "keep one"),
    ],
)
def test_a_list_that_is_none_is_one_line_in_plain_words(
    tmp_path: Path, files: dict[str, str | bytes], says: str
) -> None:
    folder = photos(tmp_path / "in", ["a.png"])
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        pack_folder(folder, tmp_path / "out", 8)
    assert says in str(caught.value)
    assert "Error" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_cell_of_a_table_beyond_what_python_reads_by_default(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", ["a.png"])
    text = "red " * (1 << 17)
    (folder / "metadata.csv").write_text(f"file_name,text\na.png,{text}\n")
    pack_folder(folder, tmp_path / "out", 8)
    assert ShardReader(find_shards(str(tmp_path / "out"))).captions(0) == [text.strip()]
    # of the whole process: a list that is through must not take it from one beside it
    assert csv.field_size_limit() >= LONGEST_CELL


def test_extensions_in_capitals(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", ["UP.JPG", "a.Png"])
    (folder / "UP.txt").rename(folder / "UP.TXT")
    (folder / "a.TXT").write_text("not this one\n")
    pack_folder(folder, tmp_path / "out", 8)
    reader = ShardReader(find_shards(str(tmp_path / "out")))
    assert [reader.captions(i) for i in range(2)] == [["picture UP.JPG"], ["picture a.Png"]]


def test_pictures_without_captions_are_told_what_is_read(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", ["a.png"])
    (folder / "a.txt").rename(folder / "a.caption")
    with pytest.raises(InputError, match=r"a\.txt.* metadata\.csv"):
        pack_folder(folder, tmp_path / "out", 8)


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", ["a.png"])
    (folder / "a.txt").write_text("eins\n", encoding="utf-8-sig")
    pack_folder(folder, tmp_path / "out", 8)
    assert ShardReader(find_shards(str(tmp_path / "out"))).captions(0) == ["eins"]


def test_sixteen_bits_a_pixel_keep_their_grey(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    found = AS_THEY_ARE((tmp_path / "deep.png").read_bytes())
    np.testing.assert_array_equal(found[..., 1], grey >> 8)


def test_a_share_that_holds_none_out_names_the_least_that_does(tmp_path: Path) -> None:
    """Of few pictures chance may hold none out; what the line says to type works."""
    own_pictures(tmp_path / "in", 3)
    with pytest.raises(InputError) as caught:
        pack_folder(tmp_path / "in", tmp_path / "out", 8, val=0.0001)
    least = float(str(caught.value).split()[-1])
    assert pack_folder(tmp_path / "in", tmp_path / "out", 8, val=least).samples == {
        "train": 2,
        "val": 1,
    }
    with pytest.raises(InputError) as caught:
        pack_folder(tmp_path / "in", tmp_path / "other", 8, val=0.9999)
    most = float(str(caught.value).split()[-1])
    assert pack_folder(tmp_path / "in", tmp_path / "other", 8, val=most).samples == {
        "train": 1,
        "val": 2,
    }


def test_links_to_folders_are_followed_once_each(tmp_path: Path) -> None:
    photos(tmp_path / "elsewhere", ["far.png", "deep/er.png"])
    folder = photos(tmp_path / "in", ["a.png", "z/b.png", ".hidden/c.png"])
    (folder / "far").symlink_to("../elsewhere")
    (folder / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    (folder / "itself").symlink_to(".")
    (folder / "to_z").symlink_to("z")  # what is in the folder keeps its name, and so its side
    (folder / "shown").symlink_to(".hidden")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    pack_folder(folder, tmp_path / "out", 8)
    want = {"a.png", "z/b.png", "shown/c.png", "again/er.png", "far/far.png"}
    assert sources(tmp_path / "out") == want


def test_what_cannot_be_looked_at_is_a_fault(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", ["a.png", "b.png"])
    (folder / "b.png").unlink()
    (folder / "b.png").symlink_to(".git/annex/b.png")  # as of a set whose files are not all here
    with pytest.raises(InputError, match=r"1 fault.*b\.png: cannot be read"):
        pack_folder(folder, tmp_path / "out", 8)
    packed = pack_folder(folder, tmp_path / "out", 8, skip_bad=True)
    assert [line.startswith(f"{folder / 'b.png'}: ") for line in packed.left_out] == [True]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", ["a.png", "b.png"])
    for suffix in (b".png", b".txt"):
        (folder / os.fsdecode(b"b" + suffix)).rename(folder / os.fsdecode(b"gr\xfcn" + suffix))
    pack_folder(folder, tmp_path / "out", 8)
    assert sources(tmp_path / "out") == {"a.png", r"gr\xfcn.png"}
