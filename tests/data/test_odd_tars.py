"""Tars that nobody here wrote: stock webdataset's, img2dataset's, GNU tar's; and odd and hostile
members, which are read by their place and never run or unpacked.
"""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from flowray.cli.data import main
from flowray.config.errors import InputError
from flowray.data.captions import captions_in
from flowray.data.check import check_shards
from flowray.data.decode import decode_rgb
from flowray.data.pack import pack_folder
from flowray.data.pictures import decode_image
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards, write_shards


def picture(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (seed, 2 * seed, 7)).save(buffer, kind)
    return buffer.getvalue()


def tar_of(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def good(key: str = "a") -> list[tuple[str | tarfile.TarInfo, bytes]]:
    return [(f"{key}.png", picture(1)), (f"{key}.txt", b"a thing")]


def img2dataset(folder: Path) -> Path:
    """The layout of img2dataset: a parquet and statistics beside each tar, keys by shard."""
    for shard in range(2):
        rows: list[tuple[str | tarfile.TarInfo, bytes]] = []
        for i in range(3):
            told = {"caption": f"no {shard} {i}", "key": f"{i:09d}", "status": "success"}
            rows += [
                (f"{i:09d}.jpg", picture(10 * shard + i, "JPEG")),
                (f"{i:09d}.txt", told["caption"].encode()),
                (f"{i:09d}.json", json.dumps(told | {"sha256": None, "exif": "{}"}).encode()),
            ]
        folder.mkdir(exist_ok=True)
        tar_of(folder / f"{shard:05d}.tar", rows)
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder


def test_img2dataset_as_it_comes(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "laion")
    reader = ShardReader(find_shards(str(folder / "{00000..00001}.tar")))
    assert [reader.captions(i) for i in range(6)] == [
        [f"no {shard} {i}"] for shard in range(2) for i in range(3)
    ]
    pixels = [decode_image(reader, i)[0, 0, 0] for i in range(6)]
    np.testing.assert_allclose(pixels, [0, 1, 2, 10, 11, 12], atol=3)
    assert check_shards(str(folder)).problems == []


def test_stock_webdataset_reads_ours_and_we_read_its(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"__key__": f"{i:04d}", "png": picture(i), "txt": f"no {i}".encode(), "cls": b"3"}
        for i in range(7)
    ]
    ours = write_shards(tmp_path / "ours", rows, per_shard=3, meta={})
    (tmp_path / "its").mkdir()
    pattern = str(tmp_path / "its" / "%05d.tar")
    with webdataset.ShardWriter(pattern, maxcount=3, encoder=False, verbose=0) as writer:
        for row in rows:
            writer.write(row)
    with webdataset.TarWriter(str(tmp_path / "one.tar"), encoder=False) as one:
        for row in rows:
            one.write(row)
    for spec in (ours, tmp_path / "its", tmp_path / "one.tar"):
        paths = find_shards(str(spec))
        stock = list(webdataset.WebDataset([str(p) for p in paths], shardshuffle=False))
        reader = ShardReader(paths)
        assert [sample["__key__"] for sample in stock] == reader.keys
        for i, row in enumerate(rows):
            assert {e: reader.read(i, e) for e in reader.extensions(i)} == {
                e: stock[i][e] for e in ("cls", "png", "txt")
            }
            assert reader.read(i, "png") == row["png"]


@pytest.mark.parametrize("form", ["ustar", "pax", "gnu", "oldgnu", "v7"])
def test_plain_tar(tmp_path: Path, form: str) -> None:
    long = {"v7": "x" * 90, "ustar": "x" * 95}.get(form, "ü" * 120)
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / f"{long}.png").write_bytes(picture(5))
    (folder / "deep" / f"{long}.txt").write_text("a thing")
    archive = tmp_path / "made.tar"
    command = ["tar", "-C", str(folder), f"--format={form}", "-cf", str(archive), "."]
    if form == "v7":
        command = [*command[:-1], "deep"]
    subprocess.run(command, check=True, capture_output=True)
    reader = ShardReader([archive])
    assert len(reader) == 1
    assert reader.key(0).endswith(f"deep/{long}")
    assert reader.captions(0) == ["a thing"]
    np.testing.assert_array_equal(decode_image(reader, 0), decode_rgb(picture(5)))
    stock = list(webdataset.WebDataset([str(archive)], shardshuffle=False))
    assert [sample["__key__"] for sample in stock] == reader.keys
    assert len(ShardReader([archive])) == 1  # by the index that is kept now


class Runs:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def linked(name: str, kind: bytes, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


HOSTILE: dict[str, tuple[str | tarfile.TarInfo, bytes]] = {
    "parent folders": ("../../escaped.txt", b"x"),
    "an absolute path": ("/tmp/flowray-escaped/b.txt", b"x"),
    "a symbolic link": (linked("b.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
    "a hard link": (linked("b.png", tarfile.LNKTYPE, "a.png"), b""),
    "a device": (linked("b.png", tarfile.CHRTYPE), b""),
    "a pipe": (linked("b.png", tarfile.FIFOTYPE), b""),
    "a folder": (linked("b.png", tarfile.DIRTYPE), b""),
    "a tar in a tar": ("b.tar", b"a.txt"),
    "hidden": ("._a.png", b"Mac OS X"),
    "of macOS's archives": ("__MACOSX/._a.png", b"Mac OS X"),
    "of a Synology": ("@eaDir/a.png/SYNO.jpg", b"small"),
    "of macOS's folders": ("deep/.DS_Store", b"\0"),
    "of Windows's folders": ("deep/Thumbs.db", b"\0"),
    "without an extension": ("LICENSE", b"free"),
    "not UTF-8": (tarfile.TarInfo("caf\udce9.txt"), b"x"),
}
SAMPLES = {"parent folders": 2, "an absolute path": 2, "a tar in a tar": 2, "not UTF-8": 2}


@pytest.mark.parametrize("what", HOSTILE)
def test_odd_members_harm_nothing(tmp_path: Path, what: str) -> None:
    path = tar_of(tmp_path / "odd.tar", [*good(), HOSTILE[what]])
    for _ in range(2):  # found, and by the index that is kept
        reader = ShardReader([path])
        assert len(reader) == SAMPLES.get(what, 1)
        assert reader.captions(0) == ["a thing"]
        assert reader.extensions(0) == ["png", "txt"]
        assert "\n" not in reader.label(len(reader) - 1)
        reader.label(len(reader) - 1).encode()  # as it is printed
        assert len(reader.fingerprint()) == 16
    check_shards(str(path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd.tar", "odd.tar.index"]
    assert not Path("/tmp/flowray-escaped").exists()


@pytest.mark.parametrize(
    "extension", ["pkl", "pyd", "pickle", "pth", "pt", "npy", "npz", "moments.npy"]
)
def test_nothing_is_unpickled(tmp_path: Path, extension: str) -> None:
    data = pickle.dumps(Runs(tmp_path / "ran"))
    if extension.endswith("npy"):
        buffer = io.BytesIO()
        np.save(buffer, np.array([Runs(tmp_path / "ran")], dtype=object), allow_pickle=True)
        data = buffer.getvalue()
    path = tar_of(tmp_path / "set.tar", [*good(), (f"a.{extension}", data)])
    reader = ShardReader([path])
    assert reader.captions(0) == ["a thing"]
    assert reader.read(0, extension) == data
    with pytest.raises(InputError, match=r"not a plain .npy"):
        reader.gather(np.array([0]), extension)
    check_shards(str(path))
    assert not (tmp_path / "ran").exists()


def test_compressed_tars_and_sparse_members_are_one_line(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    holes = tmp_path / "a.txt"
    with holes.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"text")
    sparse = tmp_path / "sparse.tar"
    subprocess.run(["tar", "-C", tmp_path, "--sparse", "-cf", sparse, "a.txt"], check=True)
    for name, says in {"zipped.tar": "compressed; gunzip", "sparse.tar": "stored sparse"}.items():
        with pytest.raises(InputError, match=says) as caught:
            ShardReader([tmp_path / name]).read(0, "txt")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "text", "wanted"),
    [
        (None, "\ufeffeins", ["eins"]),
        (None, "one\r\ntwo\n\n", ["one", "two"]),
        (None, "a\u2028b\fc\x85d", ["a\u2028b\fc\x85d"]),
        ('{"captions": ["one", "two\\nlines"]}', "not this", ["one", "two\nlines"]),
        ('{"caption": "one"}', "not this", ["one"]),
        ('{"text": "one"}', None, ["one"]),
        ('{"caption": null, "text": "one"}', None, ["one"]),
        ('{"caption": null}', "this", ["this"]),
        ('\ufeff{"caption": "\ufeffone"}', None, ["one"]),
        ('["no object"]', "this", ["this"]),
        (None, "\ufeff", None),
        (None, " \n\t\n", None),
        (None, None, None),
        ('{"caption": " "}', "this", None),
        ('{"captions": []}', "this", None),
        ('{"captions": ["one", 3]}', None, None),
    ],
)
def test_what_a_caption_is(row: str | None, text: str | None, wanted: list[str] | None) -> None:
    given = [part.encode() if part is not None else None for part in (row, text)]
    if wanted is not None:
        assert captions_in(*given) == wanted
        return
    with pytest.raises(ValueError, match="caption"):
        captions_in(*given)


def test_a_text_file_means_the_same_in_a_folder_and_in_a_tar(tmp_path: Path) -> None:
    text = "\ufeffone\u2028still one\r\ntwo\n".encode()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(1))
    (folder / "a.txt").write_bytes(text)
    pack_folder(folder, tmp_path / "out", None)
    packed = ShardReader(find_shards(str(tmp_path / "out")))
    plain = ShardReader([tar_of(tmp_path / "a.tar", [("a.png", picture(1)), ("a.txt", text)])])
    assert packed.captions(0) == plain.captions(0) == ["one\u2028still one", "two"]


def test_pictures_of_kinds_that_are_not_read_are_said_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    (folder / "__MACOSX").mkdir(parents=True)
    for name in ("a.png", "b.HEIC", "c.heic", "d.jxl", "__MACOSX/a.png", "Thumbs.db"):
        (folder / name).write_bytes(picture(1))
    (folder / "a.txt").write_text("a thing")
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert "3 picture file(s)" in said
    assert ".heic (2), .jxl (1)" in said
    path = tar_of(tmp_path / "a.tar", [*good(), ("a.heic", b"x")])
    assert [(p.severity, ".heic (1)" in p.what) for p in check_shards(str(path)).problems] == [
        ("info", True)
    ]
    (folder / "a.png").unlink()
    with pytest.raises(InputError, match=r"no picture in it, but 3 picture file"):
        pack_folder(folder, tmp_path / "other", None)
