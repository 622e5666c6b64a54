"""`pack` by any number of threads, and what it leaves out, enlarges and refuses."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from pack_sources import packed, picture, samples, tars
from PIL import Image
from support import Heard, assert_refused

from flowray.cli.data import main
from flowray.config.errors import InputError
from flowray.config.prepare import PrepareConfig
from flowray.data.pack import LEFT_OUT, in_order, pack_folder


def mixed(folder: Path, count: int) -> Path:
    """Large ones, small ones, and every seventh broken: what is read first is done last."""
    folder.mkdir()
    for i in range(count):
        side = 300 if i % 5 == 0 else 10
        data = picture(i, side, side + 3)
        (folder / f"{i:03d}.png").write_bytes(data[:60] if i % 7 == 3 else data)
        (folder / f"{i:03d}.txt").write_text(f"picture {i}")
    return folder


def test_any_number_of_workers_makes_the_same(tmp_path: Path) -> None:
    folder = mixed(tmp_path / "in", 40)
    options = {"skip_bad": True, "per_shard": 9, "val": 0.2}
    found = {
        n: pack_folder(folder, tmp_path / str(n), 8, workers=n, **options)  # type: ignore[arg-type]
        for n in (1, 2, 7, 64)
    }
    assert found[1].left_out
    for n in (2, 7, 64):
        assert found[n] == found[1]
        assert tars(tmp_path / str(n)) == tars(tmp_path / "1")
        for name in ("train/manifest.json", LEFT_OUT):
            assert (tmp_path / str(n) / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    for n in (1, 7):
        with pytest.raises(InputError, match=r"1 fault\(s\): .*003\.png: does not decode"):
            pack_folder(folder, tmp_path / "none", 8, workers=n)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pack")]


def test_few_are_under_way_at_a_time() -> None:
    begun, taken, ahead = 0, 0, []

    def items() -> Iterator[int]:
        nonlocal begun
        for i in range(100):
            begun += 1
            yield i

    for i, found in enumerate(in_order(lambda i: i * i, items(), 3)):
        assert found == i * i
        taken += 1
        ahead.append(begun - taken)
    assert taken == 100
    assert max(ahead) <= 6


def test_progress_counts_every_picture(tmp_path: Path) -> None:
    folder, heard = mixed(tmp_path / "in", 12), Heard()
    pack_folder(folder, tmp_path / "out", 8, skip_bad=True, workers=3, progress=heard)
    assert heard.tasks["packing all pictures"] == 12


def of_sizes(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    folder.mkdir()
    for i, (height, width) in enumerate(sizes):
        (folder / f"{i}.png").write_bytes(picture(i, height, width))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def test_small_and_long_pictures_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = of_sizes(tmp_path / "in", [(20, 20), (7, 20), (20, 70), (8, 8), (20, 7)])
    out = tmp_path / "out"
    assert main(["pack", str(folder), str(out), "--size", "8", "--max-aspect", "3"]) == 0
    assert [captions for _, captions in samples(out)] == [["picture 0"], ["picture 3"]]
    rows = [json.loads(line) for line in (out / LEFT_OUT).read_text().splitlines()]
    causes = [(Path(row["message"].split(":")[0]).name, row["cause"]) for row in rows]
    assert causes == [("1.png", "too small"), ("2.png", "aspect ratio"), ("4.png", "too small")]
    err = capsys.readouterr().err
    assert "3 picture(s) not packed: too small x2, aspect ratio x1" in err
    assert str(out / LEFT_OUT) in err


def test_small_pictures_are_enlarged_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = of_sizes(tmp_path / "in", [(20, 20), (7, 20), (4, 4)])
    argv = ["pack", str(folder), str(tmp_path / "out"), "--size", "8", "--min-size", "5"]
    assert main([*argv, "--resize", "area"]) == 0
    assert [captions for _, captions in samples(tmp_path / "out")] == [["picture 0"], ["picture 1"]]
    kept = packed(folder, tmp_path / "kept", None)  # no size: none is small
    assert len(kept) == 3


def test_only_small_pictures_are_one_line(tmp_path: Path) -> None:
    folder = of_sizes(tmp_path / "in", [(7, 20), (4, 4)])
    refused = "nothing packed; 2 picture.* too small x2, first .*0.png: 20 x 7 px"
    assert_refused(lambda: pack_folder(folder, tmp_path / "out", 8), InputError, refused)
    assert not (tmp_path / "out").exists()


def test_background_and_filter_are_told_in_the_manifest(tmp_path: Path) -> None:
    folder = of_sizes(tmp_path / "in", [(16, 16)])
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(folder / "0.png")
    argv = ["pack", str(folder), str(tmp_path / "out"), "--size", "8"]
    assert main([*argv, "--background", "9,8,7", "--resize", "area", "--workers", "2"]) == 0
    ((data, _),) = samples(tmp_path / "out")
    with Image.open(io.BytesIO(data)) as found:
        assert (np.asarray(found) == [9, 8, 7]).all()
    meta = json.loads((tmp_path / "out" / "manifest.json").read_text())["meta"]
    assert PrepareConfig.model_validate(meta["prepare"]).background == (9, 8, 7)


@pytest.mark.parametrize(
    "argv",
    [
        ["--background", "1,2"],
        ["--background", "1,2,256"],
        ["--background", "white"],
        ["--background", "-1,2,3"],
        ["--resize", "cubic"],
        ["--min-size", "0"],
        ["--max-aspect", "0.9"],
        ["--workers", "0"],
    ],
)
def test_options_that_cannot_be(tmp_path: Path, argv: list[str]) -> None:
    folder = of_sizes(tmp_path / "in", [(16, 16)])
    with pytest.raises(InputError, match=argv[0]):
        main(["pack", str(folder), str(tmp_path / "out"), *argv])
    assert not (tmp_path / "out").exists()
