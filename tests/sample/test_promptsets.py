"""Pictures for GenEval, DPG-Bench and COCO: what their scorers look for is where they look."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import PICTURE, Heard, assert_refused, saved_run, tiny_recipe

import flowray
from flowray.cli.eval import main
from flowray.config.errors import InputError
from flowray.sample.pipeline import Pipeline
from flowray.sample.promptsets import LISTED, Coco, Dpg, GenEval, PromptSet, paint_set, read_set

PROMPTS = ["a red circle", "a blue square", "a red circle"]
HOW = {"step": "0"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tiny_recipe(tmp_path_factory.mktemp("sets"))).path


@pytest.fixture(scope="module")
def pipe(run: Path) -> Pipeline:
    return flowray.load(run)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


class PromptSetContract(ABC):
    """What every set holds to; PROMPTS are its prompts in `written`."""

    prompts: PromptSet

    @abstractmethod
    def written(self, folder: Path) -> Path:
        """The set's file or folder, as its authors give it."""

    @abstractmethod
    def scored(self, folder: Path) -> list[list[np.ndarray]]:
        """The pictures of each prompt, found as the scorer finds them."""

    @abstractmethod
    def damaged(self, folder: Path) -> Path:
        """One that lacks a prompt."""

    def paint(self, pipe: Pipeline, out: Path, wanted: Any, heard: Heard, seed: int = 0) -> int:
        return paint_set(self.prompts, wanted, pipe, out, HOW, seed, heard)

    def test_the_scorer_finds_what_the_pipeline_draws(self, pipe: Pipeline, tmp_path: Path) -> None:
        wanted, each = read_set(self.prompts, self.written(tmp_path)), self.prompts.each
        assert [one.prompt for one in wanted] == PROMPTS
        heard = Heard()
        assert self.paint(pipe, tmp_path / "out", wanted, heard) == 0
        assert heard.tasks["sampling"] == 3 * each
        texts = [text for text in PROMPTS for _ in range(each)]
        # a prompt that comes again goes on with its draws
        numbers = [*range(each), *range(each), *range(each, 2 * each)]
        drawn = np.concatenate(list(pipe.pictures(texts, numbers=numbers, seed=0)))
        found = self.scored(tmp_path / "out")
        assert [len(pictures) for pictures in found] == [each] * 3
        assert (np.concatenate(found) == drawn).all()

    def test_what_is_there_is_kept_and_another_seed_is_not(
        self, pipe: Pipeline, tmp_path: Path
    ) -> None:
        wanted, out, heard = (
            read_set(self.prompts, self.written(tmp_path)),
            tmp_path / "out",
            Heard(),
        )
        assert self.paint(pipe, out, wanted[:2], heard) == 0
        files = self.prompts.files(out, wanted[0].name)
        before = [path.stat().st_mtime_ns for path in files]
        whole = files[-1].read_bytes()
        cut = self.prompts.files(out, wanted[1].name)[-1]
        cut.write_bytes(cut.read_bytes()[:-40])
        assert self.paint(pipe, out, wanted, heard) == 1
        assert [path.stat().st_mtime_ns for path in files] == before
        assert len(self.scored(out)) == 3
        assert self.paint(pipe, out, wanted, heard, seed=1) == 0
        assert files[-1].read_bytes() != whole

    def test_a_limit_takes_the_first(self, tmp_path: Path) -> None:
        written = self.written(tmp_path)
        first = read_set(self.prompts, written, 2)
        assert first == read_set(self.prompts, written)[:2]

    def test_what_is_no_such_set_is_refused(self, tmp_path: Path) -> None:
        option = self.prompts.option
        for path in (tmp_path / "none", self.damaged(tmp_path)):
            assert_refused(
                lambda path=path: read_set(self.prompts, path), InputError, f"{option}: "
            )


class TestGenEval(PromptSetContract):
    prompts = GenEval()

    def written(self, folder: Path) -> Path:
        rows = [{"tag": "single_object", "include": [{"class": "x"}], "prompt": p} for p in PROMPTS]
        path = folder / "evaluation_metadata.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def scored(self, folder: Path) -> list[list[np.ndarray]]:
        found = []
        for place in sorted(path for path in folder.iterdir() if path.name.isdigit()):
            row = json.loads((place / "metadata.jsonl").read_text())
            assert (row["tag"], row["prompt"]) == ("single_object", PROMPTS[int(place.name)])
            found.append([pixels(path) for path in sorted((place / "samples").glob("*.png"))])
            rows = [np.concatenate(found[-1][i : i + 2], axis=1) for i in (0, 2)]
            assert (pixels(place / "grid.png") == np.concatenate(rows)).all()
        assert [path.name for path in sorted(folder.iterdir())] == ["00000", "00001", "00002"]
        return found

    def damaged(self, folder: Path) -> Path:
        path = folder / "damaged.jsonl"
        path.write_text('{"prompt": "a cat"}\n{"tag": "colors"}\n')
        return path

    def test_a_line_is_named_as_an_editor_counts_it(self, tmp_path: Path) -> None:
        path = tmp_path / "gaps.jsonl"
        path.write_text('\n{"prompt": "a cat"}\n\n{"tag": "colors"}\n')
        assert_refused(
            lambda: read_set(self.prompts, path), InputError, r"gaps\.jsonl:4: want a 'prompt'"
        )
        path.write_text('\n{"prompt": "a cat"}\n\n{"prompt": "a dog"}\n')
        assert [one.name for one in read_set(self.prompts, path)] == ["00000", "00001"]


class TestDpg(PromptSetContract):
    prompts = Dpg()

    def written(self, folder: Path) -> Path:
        (folder / "prompts").mkdir(exist_ok=True)
        for i, prompt in enumerate(PROMPTS):
            (folder / "prompts" / f"midjourney{i}.txt").write_text(prompt + "\n")
        return folder / "prompts"

    def scored(self, folder: Path) -> list[list[np.ndarray]]:
        found = []
        files = sorted(folder.iterdir())  # the scorer takes every file for a picture
        assert [path.name for path in files] == [f"midjourney{i}.png" for i in range(3)]
        for path in files:
            with Image.open(path) as image:
                corners = [(0, 0), (PICTURE, 0), (0, PICTURE), (PICTURE, PICTURE)]
                boxes = [(x, y, x + PICTURE, y + PICTURE) for x, y in corners]
                found.append([np.asarray(image.crop(box)) for box in boxes])
                assert image.size == (2 * PICTURE, 2 * PICTURE)
        return found

    def damaged(self, folder: Path) -> Path:
        (folder / "damaged").mkdir(exist_ok=True)
        (folder / "damaged" / "a.txt").write_text(" \n")
        return folder / "damaged"

    def test_hidden_files_are_no_prompts(self, tmp_path: Path) -> None:
        written = self.written(tmp_path)
        (written / "._midjourney0.txt").write_bytes(b"\x00\x05\x16\x07")
        assert [one.prompt for one in read_set(self.prompts, written)] == PROMPTS


class TestCoco(PromptSetContract):
    prompts = Coco()

    def written(self, folder: Path) -> Path:
        rows = [
            {"image_id": image, "id": number, "caption": caption}
            for image, number, caption in (
                (42, 9, "another caption"),
                (42, 3, PROMPTS[0]),
                (74, 1, PROMPTS[1] + "\n"),
                (133, 5, PROMPTS[2]),
            )
        ]
        images = [{"id": 74, "file_name": "COCO_val2014_000000000074.jpg"}]
        path = folder / "captions_val2014.json"
        path.write_text(json.dumps({"images": images, "annotations": rows}))
        return path

    def scored(self, folder: Path) -> list[list[np.ndarray]]:
        names = ["000000000042.png", "COCO_val2014_000000000074.png", "000000000133.png"]
        listed = [json.loads(line) for line in (folder / LISTED).read_text().splitlines()]
        assert [(row["file"], row["caption"]) for row in listed] == list(
            zip(names, PROMPTS, strict=True)
        )
        assert [row["image_id"] for row in listed] == [42, 74, 133]
        assert {path.name for path in folder.iterdir()} == {*names, LISTED}
        return [[pixels(folder / name)] for name in names]

    def damaged(self, folder: Path) -> Path:
        path = folder / "damaged.json"
        path.write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "a cat"}]}))
        return path

    def test_an_image_without_a_file_name_is_told(self, tmp_path: Path) -> None:
        path = self.written(tmp_path)
        told = json.loads(path.read_text())
        del told["images"][0]["file_name"]
        path.write_text(json.dumps(told))
        assert_refused(
            lambda: read_set(self.prompts, path), InputError, "image 74: want a 'file_name'"
        )


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = TestGenEval().written(tmp_path)
    words = [str(run), "--geneval", str(path), "--limit", "2", "--json"]
    assert main(words) == main(words) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["prompts"], first["each"], first["kept"], second["kept"]) == (2, 4, 0, 2)
    assert first["pictures"] == str(run / "geneval")
    assert len(list((run / "geneval").glob("*/samples/*.png"))) == 8
    more = ["--captions", "4"]
    assert_refused(lambda: main([*words, *more]), InputError, "--geneval: goes with --limit")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    gone = [str(run), "--geneval", str(empty), "--out", str(tmp_path / "gone")]
    assert_refused(lambda: main(gone), InputError, "no prompts in it")
    assert not (tmp_path / "gone").exists()
    both = [str(run), "--geneval", str(path), "--coco", str(path)]
    assert_refused(lambda: main(both), InputError, "not allowed with")
