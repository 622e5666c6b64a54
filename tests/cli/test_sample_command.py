"""`flowray.sample` on a real run: which pictures it writes, and that they are those of the run's
own sampler.
"""

import io
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import PICTURE, tiny_recipe

from flowray.cli.sample import main
from flowray.config.errors import InputError, Notice
from flowray.sample.prompts import read_prompts
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    recipe = tiny_recipe(folder, **{"train.steps": 4, "probes.seed": 5})
    train(recipe, RunDirectory(folder / "runs" / "tiny"), Group.current("cpu"), lambda row: None)
    return folder / "runs" / "tiny"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_runs_own_strip_comes_out_again(run, tmp_path, capsys):
    """The strip of the last step: same prompts, same seed, EMA weights."""
    out = tmp_path / "sheet.png"
    assert (
        main(
            [
                str(run),
                "--prompts",
                str(run / "samples" / "prompts.txt"),
                "--seed",
                "5",
                "--out",
                str(out),
                "--json",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert (told["picture"], told["step"]) == (str(out), 4)
    strip = pixels(run / "samples" / "step_000004.png")
    rows = np.split(pixels(out), len(told["prompts"]))
    assert np.array_equal(np.concatenate(rows, axis=1), strip)


def test_count_scale_seed_and_checkpoint(run, tmp_path, capsys):
    def sheet(*options: str, where: Path = run) -> np.ndarray:
        assert main([str(where), "a red circle", *options, "--out", str(tmp_path / "x.png")]) == 0
        return pixels(tmp_path / "x.png")

    three = sheet("--count", "3")
    assert three.shape == (PICTURE, 3 * PICTURE, 3)
    assert np.array_equal(three, sheet("--count", "3"))
    assert np.array_equal(three[:, :PICTURE], sheet())
    assert not np.array_equal(three[:, :PICTURE], three[:, PICTURE : 2 * PICTURE])
    assert not np.array_equal(sheet(), sheet("--seed", "1"))
    assert np.array_equal(sheet("--scale", "2")[::2, ::2], sheet())
    assert np.array_equal(sheet(where=run / "checkpoints" / "step_000004"), sheet())
    assert not np.array_equal(sheet("--set", "sample.weights=raw"), sheet())


def test_between_captions(run, tmp_path, capsys):
    """A row begins with the first caption's own picture, and is the same through a joint; what
    lies between two captions is neither.
    """

    def grid(*words: str) -> np.ndarray:
        """(rows, columns, H, W, 3) of a sheet."""
        assert main([str(run), *words, "--out", str(tmp_path / "x.png")]) == 0
        sheet = pixels(tmp_path / "x.png").astype(int)
        rows, columns = (side // PICTURE for side in sheet.shape[:2])
        return sheet.reshape(rows, PICTURE, columns, PICTURE, 3).swapaxes(1, 2)

    captions = ["cross", "a large red circle on the left", "a green ring"]
    alone = grid(captions[0], "--count", "2")[0]
    way = grid(*captions, "--between", "3", "--count", "2")
    assert way.shape == (2, 5, PICTURE, PICTURE, 3)
    assert np.abs(way[:, 0] - alone).max() <= 1
    straight = grid(captions[0], captions[2], "--between", "2", "--count", "2")
    assert np.abs(way[:, [0, 4]] - straight).max() <= 1
    joint = grid(*captions[:2], "--between", "2", "--count", "2")
    assert np.abs(way[:, 2] - joint[:, 1]).max() <= 1
    for column in (1, 3):
        for beside in (column - 1, column + 1):
            assert not np.array_equal(way[:, column], way[:, beside])
    assert np.array_equal(way, grid(*captions, "--between", "3", "--count", "2"))
    assert grid(*captions[:2], "--between", "4").shape[:2] == (1, 4)


def test_the_default_file_name_comes_from_the_prompt(run, capsys):
    assert main([str(run), "a red/../circle"]) == 0
    assert main([str(run), "红色的圆" * 40]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == str(run / "samples" / "a_red_circle.png")
    assert Path(second).is_file()


def test_no_picture_is_written_over_another(run, capsys):
    """The same prompt again, one of the same file name, several that begin with it; a training
    strip.
    """
    asked = (
        ["a green ring"],
        ["a green ring", "--seed", "1"],
        ["a green, ring!"],
        ["a green ring", "a red circle"],
        ["step_000004"],
    )
    strip = (run / "samples" / "step_000004.png").read_bytes()
    for words in asked:
        assert main([str(run), *words]) == 0
    files = capsys.readouterr().out.splitlines()
    assert len(set(files)) == len(asked)
    assert pixels(files[0]).shape == pixels(files[2]).shape == (PICTURE, PICTURE, 3)
    assert not np.array_equal(pixels(files[0]), pixels(files[1]))
    assert pixels(files[3]).shape == (2 * PICTURE, PICTURE, 3)
    assert (run / "samples" / "step_000004.png").read_bytes() == strip


def test_a_prompt_file_may_begin_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa red circle\r\n\r\n  a blue square \n")
    assert read_prompts(file) == ["a red circle", "a blue square"]


CAPTIONS = ["a red circle", "a blue square 🟦", "ein grüner Ring"]


def drawn(run: Path, folder: Path, *words: str) -> dict[str, bytes]:
    """The files beside a sheet, by name."""
    assert main([str(run), *words, "--out", str(folder / "s.png"), "--each", str(folder)]) == 0
    return {file.name: file.read_bytes() for file in folder.glob("*_seed*.png")}


def test_each_picture_says_how_it_was_drawn(run, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert main([str(run), *CAPTIONS, "--count", "2", "--seed", "3", "--out", str(out)]) == 0
    folder = tmp_path / "sheet_each"
    rows = [json.loads(line) for line in (folder / "pictures.jsonl").open(encoding="utf-8")]
    assert [row["prompt"] for row in rows] == [c for c in CAPTIONS for _ in range(2)]
    assert [row["number"] for row in rows] == ["0", "1"] * 3
    assert len({row["key"] for row in rows}) == len({row["file"] for row in rows}) == 6
    assert {row["seed"] for row in rows} == {"3"}
    assert {row["step"] for row in rows} == {"4"}
    assert all(row["flowray"] for row in rows)
    sheet = pixels(out).reshape(3, PICTURE, 2, PICTURE, 3).swapaxes(1, 2).reshape(6, -1)
    for row, cell in zip(rows, sheet, strict=True):
        with Image.open(folder / row["file"]) as image:
            assert {"file": row["file"], **image.info} == row
            assert np.array_equal(np.asarray(image).ravel(), cell)
    assert {path.name for path in folder.iterdir()} == {
        "pictures.jsonl",
        *(row["file"] for row in rows),
    }


def test_pictures_do_not_hang_on_list_count_or_batch(run, tmp_path, capsys):
    whole = drawn(run, tmp_path / "a", *CAPTIONS, CAPTIONS[0], "--count", "3")
    assert len(whole) == 12
    for place, (words, count) in enumerate(
        (
            ([*CAPTIONS[::-1], CAPTIONS[0]], 3),
            ([CAPTIONS[0], CAPTIONS[0]], 1),
            ([CAPTIONS[2], "cross"], 2),
        )
    ):
        other = drawn(run, tmp_path / str(place), *words, "--count", str(count))
        shared = whole.keys() & other.keys()
        assert len(shared) == (12, 2, 2)[place]
        assert all(whole[name] == other[name] for name in shared)


def test_an_interrupted_set_goes_on(run, tmp_path, capsys):
    """What lies there whole stays; what is missing, cut off or of other settings is drawn."""
    folder = tmp_path / "set"
    first = drawn(run, folder, *CAPTIONS, "--count", "2")
    sheet = (folder / "s.png").read_bytes()
    names = sorted(first)
    (folder / names[0]).unlink()
    (folder / names[1]).write_bytes(first[names[1]][:100])
    shutil.copy(folder / names[2], folder / names[3])
    kept = {name: (folder / name).stat().st_mtime_ns for name in names[1:]}
    assert drawn(run, folder, *CAPTIONS, "--count", "2") == first
    assert (folder / "s.png").read_bytes() == sheet
    now = {name: (folder / name).stat().st_mtime_ns for name in names[1:]}
    assert [name for name in names[1:] if kept[name] != now[name]] == [names[1], names[3]]
    finer = drawn(run, folder, *CAPTIONS, "--count", "2", "--set", "sample.steps=5")
    assert finer.keys() == first.keys()
    assert all(finer[name] != first[name] for name in names)
    more = drawn(run, folder, "cross", "--set", "sample.steps=5")
    assert more.keys() > finer.keys()
    assert len((folder / "pictures.jsonl").read_text(encoding="utf-8").splitlines()) == 7


def test_a_list_of_pictures_survives_odd_letters_and_damage(run, tmp_path, capsys):
    folder = tmp_path / "set"
    drawn(run, folder, "one\u2028two")
    listed = folder / "pictures.jsonl"
    listed.write_text(listed.read_text(encoding="utf-8") + "cut off {\n", encoding="utf-8")
    drawn(run, folder, "cross")
    rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").split("\n") if line]
    assert [row["prompt"] for row in rows] == ["one\u2028two", "cross"]


def test_a_picture_of_other_weights_is_not_kept(run, tmp_path, capsys):
    """A run trained anew under its name has the same step, and other sums in state.json."""
    folder, copy = tmp_path / "set", tmp_path / run.name
    shutil.copytree(run, copy)
    first = drawn(copy, folder, "cross")
    state = max((copy / "checkpoints").iterdir()) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"lr": 0.5}))
    again = drawn(copy, folder, "cross")
    assert first.keys() == again.keys()
    assert all(again[name] != first[name] for name in first)


def test_a_strip_goes_from_the_source_to_the_picture(run, tmp_path, capsys):
    """Of 4 steps, at times 0, 0.5 and 1; a row a picture."""
    words = [str(run), *CAPTIONS, "--count", "2", "--out"]
    assert main([*words, str(tmp_path / "ways.png"), "--strip", "3"]) == 0
    assert main([*words, str(tmp_path / "ends.png")]) == 0
    ways = pixels(tmp_path / "ways.png")
    assert ways.shape == (6 * PICTURE, 3 * PICTURE, 3)
    ends = pixels(tmp_path / "ends.png").reshape(3, PICTURE, 2, PICTURE, 3).swapaxes(1, 2)
    assert np.array_equal(ways[:, -PICTURE:], ends.reshape(6 * PICTURE, PICTURE, 3))
    assert not np.array_equal(ways[:, :PICTURE], ways[:, -PICTURE:])
    assert not (tmp_path / "ways_each").exists()
    with pytest.raises(InputError, match=r"the way of 4 sample\.steps has 5 times"):
        main([*words, str(tmp_path / "x.png"), "--strip", "6"])


def test_prompts_from_stdin(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("a cross\n\n🟦\n".encode())))
    assert main([str(run), "--prompts", "-", "--out", str(tmp_path / "x.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == ["a cross", "🟦"]
    assert pixels(tmp_path / "x.png").shape == (2 * PICTURE, PICTURE, 3)


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("", "prompt 2 of 2: is empty"),
        (" \t ", "prompt 2 of 2: is empty"),
        ("a \x07 bell", r"a control character, U\+0007 at letter 3"),
        ("a red\x1b[31m circle", r"a control character, U\+001B at letter 6"),
        ("half \udce9", r"half a letter, U\+DCE9 at letter 6"),
    ],
)
def test_prompts_that_are_refused(run, tmp_path, prompt, why):
    with pytest.raises(InputError, match=why):
        main([str(run), "cross", prompt, "--out", str(tmp_path / "x.png")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "prompt", ["🟥🔵👩‍🚀", "a red circle " * 770, "two\nlines", "\u202eright to left"]
)
def test_odd_prompts_that_are_drawn(run, tmp_path, capsys, prompt):
    """One of 10,010 letters is cut to what the text model takes, with a notice."""
    out = tmp_path / "x.png"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert main([str(run), prompt, "--out", str(out)]) == 0
    assert pixels(out).shape == (PICTURE, PICTURE, 3)
    cut = [str(one.message) for one in told if issubclass(one.category, Notice)]
    assert len(cut) == (len(prompt) > 1000)
    (file,) = (tmp_path / "x_each").glob("*.png")
    with Image.open(file) as image:
        assert image.info["prompt"] == prompt


def test_what_does_not_go_together_is_refused(run, tmp_path):
    out = ["--out", str(tmp_path / "x.png")]
    for words, why in (
        (["a", "b", "--between", "3", "--negative", "c"], "goes with none of --compile"),
        (["a", "b", "--between", "3", "--compile"], "goes with none of --compile"),
        (["a", "--negative", "b"], "a negative prompt: this run's velocity network"),
        (["a", "--set", "sample.guidance_interval=[0.8, 0.2]"], "guidance_interval begins at 0.8"),
    ):
        with pytest.raises(InputError, match=why):
            main([str(run), *words, *out])
        assert not list(tmp_path.iterdir())


def test_a_latent_that_is_not_finite_is_no_black_picture(run, tmp_path):
    """A guidance so large that fp32 overflows."""
    words = [str(run), "cross", "--set", "sample.guidance_scale=1e38", "--out"]
    with pytest.raises(InputError, match="'cross': the latent is not finite"):
        main([*words, str(tmp_path / "x.png")])
    assert not list(tmp_path.iterdir())
