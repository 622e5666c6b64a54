"""`flowray.sample` on a real run: which pictures it writes, and that they are those of the run's
own sampler.
"""

import io
import json
import re
import shlex
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import PICTURE, tiny_recipe

import flowray
from flowray.cli.sample import main
from flowray.config.errors import InputError, Notice
from flowray.sample.pngs import key_of
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


def test_a_prompt_that_comes_again_counts_on_as_in_python(run, tmp_path, capsys):
    pipe = flowray.load(run)
    for prompts, count in ((["cross", "a green ring", "cross"], 1), (["cross", "cross"], 2)):
        folder = tmp_path / str(count)
        drawn(run, folder, *prompts, "--count", str(count))
        lines = (folder / "pictures.jsonl").open(encoding="utf-8")
        rows = sorted((json.loads(line) for line in lines), key=lambda row: row["key"])
        again = pipe([prompt for prompt in prompts for _ in range(count)])
        ours = [
            (key_of(prompt, number), image)
            for image, prompt, number in zip(*again[:3], strict=True)
        ]
        ours.sort(key=lambda pair: pair[0])
        assert [row["key"] for row in rows] == [key for key, _ in ours]
        for row, (_, image) in zip(rows, ours, strict=True):
            assert np.array_equal(pixels(folder / row["file"]), np.asarray(image))


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


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["a", "b", "--between", "3", "--negative", "c"], "--negative: does not go with --between"),
        (["a", "b", "--between", "3", "--compile"], "--compile: does not go with --between"),
        (["a", "b", "--between", "3", "--strip", "3"], "--between and --strip: a sheet shows one"),
        (["a", "--between", "3"], "got 1 caption, want two or more"),
        (["a", "--mix", "linear"], "--mix: does not go with plain pictures; it goes with --betw"),
        (["a", "--animate"], "it goes with --between, --strip"),
        (["a", "--strip", "3", "--workers", "2"], "--workers: does not go with --strip"),
        (["a", "--strip", "3", "--each", "x"], "--each: does not go with --strip"),
        (["a", "--plus", "b"], "1 --plus and 0 --minus: want as many"),
        (["a", "--minus", "b"], "0 --plus and 1 --minus: want as many"),
        (["a", "--plus", " ", "--minus", "b"], "prompt 1 of 1: is empty"),
        (["a", "--reverse", "nosuch.png"], r"--reverse nosuch\.png: no such file"),
        (["a", "--reverse", __file__, "--count", "2"], "--count: does not go with --reverse"),
        (
            ["a", "--reverse", __file__, "--reverse", __file__],
            "2 --reverse pictures, but 1 prompts",
        ),
        (["a", "--reverse", __file__], r"--reverse .*\.py: not a picture"),
        (["a", "--negative", "b"], "a negative prompt: this run's velocity network"),
        (["a", "--set", "sample.guidance_interval=[0.8, 0.2]"], "guidance_interval begins at 0.8"),
    ],
)
def test_what_does_not_go_together_is_refused(run, tmp_path, words, why):
    with pytest.raises(InputError, match=why):
        main([str(run), *words, "--out", str(tmp_path / "x.png")])
    assert not list(tmp_path.iterdir())


def test_a_sum_of_captions(run, tmp_path, capsys):
    """A row a picture: the prompt, what is added, what is taken away, what it comes to."""
    out = tmp_path / "sum.png"
    words = ["a red circle", "cross", "--plus", "a blue square", "--minus", "a red square"]
    assert main([str(run), *words, "--count", "2", "--out", str(out)]) == 0
    cells = pixels(out).reshape(4, PICTURE, 4, PICTURE, 3).swapaxes(1, 2).astype(int)
    drawn(run, tmp_path / "alone", "a red circle", "cross", "--count", "2")
    alone = pixels(tmp_path / "alone" / "s.png").reshape(2, PICTURE, 2, PICTURE, 3)
    assert np.abs(cells[:, 0] - alone.swapaxes(1, 2).reshape(4, PICTURE, PICTURE, 3)).max() <= 1
    for column in range(3):
        assert not np.array_equal(cells[:, column], cells[:, 3])


def test_a_picture_back_to_its_source_and_forth(run, tmp_path, capsys):
    """The autoencoder's picture comes out again; JSON has the error that pipe.reverse has."""
    given, out = tmp_path / "given.png", tmp_path / "back.png"
    noise = np.random.default_rng(0).integers(0, 256, (2 * PICTURE, 2 * PICTURE, 4), np.uint8)
    Image.fromarray(noise).save(given)
    words = [str(run), "a red circle", "--reverse", str(given), "--set", "sample.steps=64"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    picture, coded, source, again = np.split(pixels(out).astype(int), 4, axis=1)
    pipe = flowray.load(run)
    with Image.open(given) as image:
        made = pipe.reverse(pipe.encode(image), ["a red circle"], steps=64)
        assert np.array_equal(picture, pipe.prepared(image)[0])
    assert told["round_trip_error"] == [pytest.approx(float(made.error[0]), rel=1e-3, abs=1e-9)]
    assert told["round_trip_error"][0] < 1e-3
    assert np.abs(coded - again).max() <= 8
    assert np.abs(source - again).max() > 8
    assert main([*words, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(out)
    assert lines[1].startswith("round-trip error ")
    assert lines[1].endswith(str(given))


def frames(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        count = getattr(image, "n_frames", 1)
        return [(image.seek(i), np.asarray(image.convert("RGB")))[1] for i in range(count)]


def test_an_animation_shows_a_sheets_columns_in_time(run, tmp_path, capsys):
    still, moving = tmp_path / "still.png", tmp_path / "moving.png"
    for words, grid in (
        ([*CAPTIONS, "--count", "2", "--strip", "4"], (3, 2)),
        ([*CAPTIONS, "--count", "2", "--between", "3"], (1, 2)),
    ):
        assert main([str(run), *words, "--out", str(still)]) == 0
        assert main([str(run), *words, "--animate", "--out", str(moving)]) == 0
        sheet = pixels(still)
        rows = sheet.shape[0] // PICTURE
        cells = sheet.reshape(rows, PICTURE, -1, PICTURE, 3).swapaxes(1, 2)
        shown = frames(moving)
        wanted = [
            cells[:, column].reshape(*grid, PICTURE, PICTURE, 3).swapaxes(1, 2).reshape(size)
            for column in range(cells.shape[1])
            for size in [(grid[0] * PICTURE, grid[1] * PICTURE, 3)]
        ]
        # Pillow shows equal ones that follow each other as one, for as long
        wanted = [
            each
            for i, each in enumerate(wanted)
            if not i or not np.array_equal(each, wanted[i - 1])
        ]
        assert len(wanted) > 2
        assert len(shown) == len(wanted)
        for frame, each in zip(shown, wanted, strict=True):
            assert np.array_equal(frame, each)


def test_the_commands_of_the_docs_run(run, tmp_path, capsys, monkeypatch):
    """Each as it stands, on a tiny run, but for the workers: tests/rayrun/test_painting.py."""
    page = Path(__file__).parent.parent.parent / "docs" / "sampling.md"
    lines = re.findall(r"^ {4}python -m (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) > 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    shutil.copytree(run, tmp_path / "runs" / "quickstart")
    for line in lines:
        verb, *words = shlex.split(line)
        assert verb == "flowray.sample"
        if "--workers" in words:
            at = words.index("--workers")
            words[at : at + 2] = []
        assert main(words) == 0, line
        out = Path(capsys.readouterr().out.splitlines()[0])
        assert pixels(out).size > 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2


def test_a_caption_without_variations_is_told_of(run, tmp_path, capsys):
    """A source without noise to speak of draws one picture whatever its number is."""
    words = [str(run), "a red circle", "--count", "2", "--out", str(tmp_path / "x.png")]
    still = ["model.posterior.logvar_min=-70", "model.posterior.logvar_max=-60"]
    for keys, told in (([], 0), ([word for key in still for word in ("--set", key)], 1)):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            assert main([*words, *keys]) == 0
        notices = [str(each.message) for each in heard if issubclass(each.category, Notice)]
        assert len(notices) == told
    assert "all its pictures are the same" in notices[0]
    assert "std is 9.4e-14" in notices[0]


def test_a_latent_that_is_not_finite_is_no_black_picture(run, tmp_path):
    """A guidance so large that fp32 overflows."""
    words = [str(run), "cross", "--set", "sample.guidance_scale=1e38", "--out"]
    with pytest.raises(InputError, match="'cross': the latent is not finite"):
        main([*words, str(tmp_path / "x.png")])
    assert not list(tmp_path.iterdir())
