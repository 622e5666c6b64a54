"""`flowray.load`: what a notebook draws is what the command and the sampler draw; the documented
example is executed.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ExifTags import Base
from support import PICTURE, perturbed, tiny_recipe

import flowray
from flowray.cli.sample import main
from flowray.config.errors import InputError
from flowray.data.pixels import from_pictures
from flowray.data.prepare import Preparation
from flowray.sample.pipeline import Pipeline
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

PAGE = Path(__file__).parent.parent.parent / "docs" / "python.md"
PROMPTS = ["a red circle", "a blue square on the left"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    recipe = tiny_recipe(folder, **{"train.steps": 4})
    path: Path = folder / "runs" / "tiny"
    train(recipe, RunDirectory(path), Group.current("cpu"), lambda row: None)
    return path


@pytest.fixture(scope="module")
def pipe(run: Path) -> Pipeline:
    return flowray.load(run)


def test_the_example_of_the_docs_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"^(?:    .*\n|\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    code = "".join(block for block in blocks if "import flowray" in block)
    assert "runs/quickstart" in code
    lines = [line.removeprefix("    ") for line in code.splitlines()]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec("\n".join(lines).replace("runs/quickstart", str(run)), names)
    assert [image.size for image in names["drawn"].images] == [(PICTURE, PICTURE)] * 2
    assert (tmp_path / "circle.png").is_file()
    assert len(names["way"].times) == len(names["way"].states) == 9
    assert names["again"].size == (PICTURE, PICTURE)


def test_the_command_writes_the_same_pictures(run: Path, pipe: Pipeline, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    keys = ["--set", "sample.steps=3", "--set", "sample.guidance_scale=2"]
    assert main([str(run), *PROMPTS, *keys, "--seed", "5", "--out", str(out)]) == 0
    drawn = pipe(PROMPTS, seed=5, steps=3, guidance_scale=2)
    sheet = np.concatenate([np.asarray(image) for image in drawn.images])
    assert np.array_equal(np.asarray(Image.open(out)), sheet)
    assert (drawn.prompts, drawn.numbers, drawn.seed) == (PROMPTS, [0, 0], 5)
    assert (drawn.sample.steps, drawn.sample.guidance_scale) == (3, 2.0)
    alone = pipe(PROMPTS[1:], seed=5, steps=3, guidance_scale=2).images[0]
    assert np.array_equal(np.asarray(alone), np.asarray(drawn.images[1]))


def test_latents_and_their_pictures(pipe: Pipeline) -> None:
    latents = pipe.latents(PROMPTS, seed=1)
    assert latents.shape == (2, 4, 4, 4)
    for a, b in zip(pipe.decode(latents), pipe(PROMPTS, seed=1).images, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    numbered = pipe.latents([PROMPTS[0]] * 2, seed=1, numbers=[0, 9])
    assert torch.equal(numbered[0], latents[0])
    assert not torch.equal(numbered[1], latents[0])


@pytest.mark.parametrize("kind", ["euler", "heun"])
def test_the_path_begins_at_the_source_and_ends_at_the_latents(pipe: Pipeline, kind: str) -> None:
    how = {"steps": 4, "solver": {"kind": kind}, "batch_size": 2}
    three = [*PROMPTS, "cross"]
    way = pipe.path(three, seed=2, **how)
    assert way.times == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert way.states.shape == (5, 3, 4, 4, 4)
    assert torch.equal(way.states[-1], pipe.latents(three, seed=2, **how))
    alone = pipe.path(["cross"], seed=2, **how)
    assert torch.equal(way.states[:, 2], alone.states[:, 0])
    longer = pipe.path(["cross"], seed=2, **how | {"steps": 8})
    assert torch.equal(longer.states[0], alone.states[0])
    assert not torch.equal(way.states[0], way.states[1])


def test_a_strip_decodes_the_path(pipe: Pipeline) -> None:
    strip = pipe.strip(PROMPTS, 3, seed=2, steps=8)
    states = pipe.path(PROMPTS, seed=2, steps=8).states
    assert strip.shape == (2, 3, PICTURE, PICTURE, 3)
    for column, place in enumerate((0, 4, 8)):
        for row, image in enumerate(pipe.decode(states[place])):
            assert np.array_equal(strip[row, column], np.asarray(image))


def test_the_reverse_flow_finds_where_a_path_began(pipe: Pipeline) -> None:
    """From the ends of paths to their z0, to the solver's error, which falls with the steps."""
    how = {"solver": {"kind": "heun"}, "grid": "logit_normal"}
    way = pipe.path(PROMPTS, seed=2, steps=64, **how)
    fine, coarse = (pipe.reverse(way.states[-1], PROMPTS, steps=steps, **how) for steps in (64, 2))
    assert torch.allclose(fine.z0.cpu(), way.states[0], atol=1e-3)
    assert torch.allclose(fine.again.cpu(), way.states[-1], atol=1e-3)
    assert not torch.allclose(fine.z0.cpu(), way.states[-1], atol=1e-2)
    assert fine.error.shape == (2,)
    assert float(fine.error.max()) < 1e-6
    assert float(coarse.error.min()) > 10 * float(fine.error.max())
    with pytest.raises(InputError, match="2 latents, but 1 prompts"):
        pipe.reverse(way.states[-1], PROMPTS[:1])


def test_encoding_is_the_mean_of_the_posterior(pipe: Pipeline) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (PICTURE, PICTURE, 3), dtype=np.uint8)
    latent = pipe.encode(Image.fromarray(pixels))
    assert latent.shape == (1, 4, 4, 4)
    moments = pipe.autoencoder.encode_moments(
        torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    )
    scale = pipe.autoencoder.scale
    assert torch.allclose(latent, scale.sample(moments, torch.zeros_like(moments.mean)))
    assert not torch.allclose(latent, moments.mean)
    back = from_pictures(pipe.autoencoder.decode(latent))[0]
    assert np.abs(np.asarray(pipe.decode(latent)[0]).astype(int) - back).max() <= 1
    assert pipe.encode([Image.new("L", (33, 20))] * 2).shape == (2, 4, 4, 4)


def test_pictures_are_encoded_as_training_prepares_them(run: Path, tmp_path: Path) -> None:
    """On its side by EXIF, half transparent, larger than the run's: as a shard's would be."""
    keys = ["data.prepare.background=[255,0,0]", "data.prepare.resize=area"]
    pipe = flowray.load(run, keys)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 4), dtype=np.uint8)
    pixels[..., 3] = np.where(pixels[..., 3] > 99, 255, 0)
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    for name, given in (
        ("aside.png", Image.fromarray(pixels)),
        ("aside.tif", Image.fromarray(pixels)),
        ("aside.jpg", Image.fromarray(pixels[..., :3])),
        ("grey.png", Image.fromarray(pixels[..., 0])),
    ):
        given.save(tmp_path / name, exif=exif)
        prepare = Preparation(pipe.recipe.data.prepare, (PICTURE, PICTURE))
        wanted = prepare((tmp_path / name).read_bytes())
        # from bytes: Pillow maps a TIFF file that lies on its side wrongly
        with Image.open(io.BytesIO((tmp_path / name).read_bytes())) as image:
            (got,) = pipe.prepared(image)
            latent = pipe.encode(image)
        assert np.array_equal(got, wanted), name
        assert torch.equal(latent, pipe.encode(Image.fromarray(wanted))), name
    plain = flowray.load(run).prepared([Image.fromarray(pixels)])[0]
    assert plain.shape == (PICTURE, PICTURE, 3)
    assert not np.array_equal(plain, got)


def test_mistakes_are_one_line(run: Path, pipe: Pipeline, tmp_path: Path) -> None:
    for call, why in (
        (lambda: flowray.load(tmp_path / "nothing"), "no such"),
        (lambda: pipe([]), "no prompt"),
        (lambda: pipe("a red circle"), "want a list of captions"),
        (lambda: pipe([""]), "is empty"),
        (lambda: pipe(PROMPTS, guidance_scal=2), "did you mean"),
        (lambda: pipe(PROMPTS, steps=0), "sample.steps"),
        (lambda: pipe(PROMPTS, weights="raw"), r"sample\.weights=raw"),
        (lambda: pipe.path(PROMPTS, solver={"kind": "dopri5"}), "dopri5"),
        (lambda: pipe(PROMPTS, negative="cross", guidance_scale=2), "reads no caption"),
    ):
        with pytest.raises(InputError, match=why):
            call()


def test_what_a_method_does_not_take_is_refused(pipe: Pipeline) -> None:
    latents = torch.zeros(2, 4, 4, 4)
    others = {"negative": "cross", "compile": True, "observe": None}
    for name, call, also in (
        ("between", lambda **how: pipe.between(PROMPTS, 2, **how), {"numbers": [0, 1]}),
        ("arithmetic", lambda **how: pipe.arithmetic(PROMPTS, ["ring"], ["cross"], **how), {}),
        (
            "reverse",
            lambda **how: pipe.reverse(latents, PROMPTS, **how),
            {"numbers": [0, 1], "seed": 1, "aspect": 1.0},
        ),
    ):
        for key, value in {**others, **also}.items():
            with pytest.raises(InputError, match=f"{name}: does not go with {key}"):
                call(**{key: value})


@pytest.mark.parametrize("batch", [2, 4])
def test_the_reverse_of_a_picture_does_not_hang_on_its_neighbours(run: Path, batch: int) -> None:
    pipe = flowray.load(run, [f"sample.batch_size={batch}"])
    perturbed(pipe.model.velocity)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, PICTURE, PICTURE, 3), dtype=np.uint8)
    images, prompts = [Image.fromarray(each) for each in pixels], [*PROMPTS, "cross", "x", "y"]
    latents, seen = pipe.encode(images), list[int]()
    pipe.model.velocity.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    many = pipe.reverse(latents, prompts, steps=3)
    for i in (0, 4):
        assert torch.equal(pipe.encode(images[i])[0], latents[i])
        one = pipe.reverse(latents[i : i + 1], prompts[i : i + 1], steps=3)
        for a, b in zip(one, many, strict=True):
            assert torch.equal(a[0], b[i])
    assert max(seen, default=batch) <= 2 * batch  # with guidance's half
