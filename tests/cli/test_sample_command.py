"""`flowray.sample` on a real run: which pictures it writes, and that they are those of the run's
own sampler.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import PICTURE, tiny_recipe

from flowray.cli.sample import main, read_prompts
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
