"""`flowray.eval` of a run on pictures that no exact checker reads: shards of several styles, and
digits.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from support import PICTURE, Heard, assert_refused, saved_run, tiny_recipe

from flowray.cli.eval import evaluate, main
from flowray.cli.eval_neighbours import show_neighbours
from flowray.config.errors import InputError
from flowray.config.keys import describe
from flowray.config.load import load_recipe, override_recipe
from flowray.config.progress import SILENT
from flowray.config.train import OTHER_SCORES
from flowray.data.make import png
from flowray.data.pictures import decode_image
from flowray.data.shards import write_shards
from flowray.model.autoencoder import load_autoencoder
from flowray.model.efficientnet import WEIGHTS, EfficientNetLite0
from flowray.sample.asked import prepare, says
from flowray.sample.evaluate_neighbours import evaluate_neighbours, features_of
from flowray.sample.judges import LATENTS, open_judge
from flowray.sample.manifolds import DENSE
from flowray.sample.neighbours import Choices
from flowray.store.found import find_checkpoint
from flowray.sweepconfig.sweep import Metric
from flowray.tune.sampling import score_pictures

LABELS = [f"{a} {b}" for a in ("red", "green", "blue") for b in ("cat", "dog", "fox", "owl")]
STYLES = ("flat", "line_art", "round", "shaded")
KINDS = {"cat": "pets", "dog": "pets", "fox": "wild", "owl": "wild"}


def styled(split: str) -> Iterator[dict[str, Any]]:
    """Every label in every style, each a pattern of its own in the colour of the style's field;
    `val` holds one style of each label, in turn.
    """
    for i, label in enumerate(LABELS):
        for j, name in enumerate(STYLES):
            if (split == "val") != (j == i % len(STYLES)):
                continue
            pattern = np.random.default_rng(i).integers(0, 200, (PICTURE, PICTURE, 3))
            tint = 40 * (np.arange(3) == j)
            captions = [f"a {label}", f"a {label}, {name.replace('_', ' ')} style"]
            row = {"captions": captions, "label": label, "one": "same", "style": name}
            row["group"] = KINDS[label.split()[1]]
            yield {
                "__key__": f"{split}{i:02d}{j}",
                "png": png((pattern + tint).astype(np.uint8)),
                "json": json.dumps(row).encode(),
            }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at its first checkpoint on a set of four styles."""
    place = tmp_path_factory.mktemp("styled")
    shards = {
        f"data.{key}": str(write_shards(place / split, styled(split), meta={}))
        for key, split in (("shards", "train"), ("val_shards", "val"))
    }
    return saved_run(tiny_recipe(place, **shards)).path


def test_a_sweep_scores_a_run_as_the_command_does(run: Path, tmp_path: Path) -> None:
    """All of its scores but copies, each with the side that is better; sampling as the trial has
    it, at its price.
    """
    recipe = override_recipe(find_checkpoint(run).recipe, {"sample.guidance_scale": 3.0})
    row = score_pictures(recipe, run, tmp_path / "cfg" / "0")
    told = evaluate(run, ["sample.guidance_scale=3"], 0, SILENT)["neighbours"]
    names = [f"{name}_accuracy" for name in ("caption", "style")] + [*OTHER_SCORES]
    scored = {key.removeprefix("eval/"): x for key, x in row.items() if key.startswith("eval/")}
    assert scored == {name: told[name] for name in names if told[name] is not None}
    assert {"frechet", "caption_accuracy", "precision", "diversity"} <= scored.keys()
    assert row["perf/network_calls"] == 2 * recipe.sample.steps
    assert all(describe(name) for name in row if "/" in name)
    assert [Metric(name=f"eval/{name}").goal for name in ("frechet", "recall")] == [
        *("minimize", "maximize")
    ]


def test_the_command_on_a_set_of_several_styles(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--captions", "10", "--draws", "3", "--features", "pixels"]) == 0
    told = json.loads((run / "eval.json").read_text())
    assert set(told) == {"run", "step", "sample", "seed", "neighbours"}
    found = told["neighbours"]
    assert (found["captions"], found["draws"], found["label"]) == (10, 3, "label")
    assert found["features"]["of"] == "pixels"
    assert found["features"]["dims"] == 3 * PICTURE**2
    assert found["samples"] == {
        "generated": 30,
        "ceiling": 12,  # all that are held out
        "reference": 36,
        "matched": 30,
        "training": 36,
        "real": 48,
        "left_out": 0,
    }
    # the real pictures of a label differ in their tint alone
    assert found["controls"]["real"]["caption_accuracy"] == 1
    assert found["caption_accuracy"] < 0.5
    # the velocity of a fresh network is 0: all of a flow is its source
    assert found["controls"]["z0"]["frechet"] == pytest.approx(found["frechet"])
    figures = {"caption_accuracy", "style_accuracy", "frechet", "precision", "recall", "density"}
    figures |= {"coverage", "diversity", "copies", "kernel"}
    assert set(found["standard_error"]) == set(found["beats_mu"]) == figures
    assert set(found["interval"]) == figures
    low, high = found["interval"]["kernel"]
    assert low < found["kernel"] < high
    told = figures | {"kernel_biased"}
    assert set(found["controls"]["ceiling"]) == set(found["controls"]["mu"]) == told
    # 12 pictures cannot reach what 30 do
    for name in ("recall", "coverage"):
        assert found["controls"]["ceiling"][name] is found["controls"]["real"][name] is None
        assert found[name] is not None
    assert found["controls"]["real"]["precision"] is not None
    assert set(found["controls"]["shuffled"]) == {"caption_accuracy", "style_accuracy"}
    groups = found["by_group"]
    assert sorted(groups) == ["pets", "wild"]
    assert sum(group["captions"] for group in groups.values()) == 10
    assert groups["pets"]["ceiling"]["caption_accuracy"] is not None
    assert all(row["caption"].startswith(f"a {row['label']}") for row in found["by_caption"])
    for row in found["by_caption"]:
        assert (row["style"] is not None) == row["caption"].endswith("style")
        assert (row["style_accuracy"] is None) == (row["style"] is None)
    page = (run / "eval.html").read_text()
    for row in (f"{found['kernel']:.3f}", f"{found['controls']['real']['kernel']:.3f}", "shuffled"):
        assert row in page
    with Image.open(run / "eval.png") as sheet:
        assert sheet.width > 4 * 64
        assert sheet.height > 10 * 64
    lines = capsys.readouterr().out.splitlines()
    assert any("caption accuracy" in line for line in lines)
    assert any("pets" in line for line in lines)


def test_pictures_that_lent_the_captions_are_right_in_everything(run: Path) -> None:
    recipe = find_checkpoint(run).recipe
    prepared = prepare(recipe, Choices(draws=2, features="pixels"), seed=0)
    lent = [decode_image(prepared.lent.reader, one.index) for one in prepared.asked]
    drawn = {"run": np.repeat(np.stack(lent), prepared.draws, axis=0)}
    autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
    cpu = torch.device("cpu")
    judge = open_judge(prepared.features, autoencoder, recipe.model.autoencoder, cpu)
    features = [
        features_of(each, judge, run / "cache", SILENT) for each in prepared.samples.values()
    ]
    found, sheet = evaluate_neighbours(prepared, judge, features, autoencoder, drawn, seed=0)
    assert found["caption_accuracy"] == 1
    assert found["controls"]["shuffled"]["caption_accuracy"] == 0
    assert found["diversity"] == pytest.approx(0, abs=1e-4)
    assert found["beats_mu"] is found["controls"]["mu"] is None
    assert sheet.shape == (12, 3, PICTURE, PICTURE, 3)
    assert (sheet[:, 1] == sheet[:, 0]).all()
    json.dumps(found, allow_nan=False)


def test_captions_are_asked_for_by_label_and_style_where_it_is_said(run: Path) -> None:
    assert says("A Red  cat, line art style", "line_art")
    assert says("\u72d0\u72f8\uff0c3d\u98ce\u683c", "3d")  # a fox, in a script without spaces
    assert not says("a flattened cat", "flat")
    assert not says("\uff01", "\u2605")  # no words at all
    assert not says("a cat", "")
    recipe = find_checkpoint(run).recipe
    prepared = prepare(recipe, Choices(), seed=0)
    asked = prepared.asked
    assert sorted(str(one.wanted["label"]) for one in asked) == sorted(LABELS)
    for one in asked:
        row = json.loads(prepared.lent.reader.read(one.index, "json"))
        assert one.text in row["captions"]
        assert one.wanted["label"] == row["label"]
        assert one.wanted["style"] == (row["style"] if "style" in one.text else None)
    assert prepare(recipe, Choices(), seed=0).asked == asked
    assert prepare(recipe, Choices(), seed=1).asked != asked
    assert prepared.draws == 24  # 288 in all
    training = prepare(recipe, Choices(held_out=recipe.data.shards), seed=0)
    assert (training.held_out, training.offset()) == ("train", 0)
    assert (prepared.held_out, prepared.offset()) == ("val", 36)


def test_what_cannot_be_asked_for_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval.json"
    for choices, words in (
        (Choices(captions=13), "--captions: want at most 12, got 13"),
        (
            Choices(label="shape"),
            "no field 'shape' in its JSON; it has captions, label, one, style",
        ),
        (Choices(attributes=("group",)), "--attribute group: no caption that is asked for"),
        (Choices(features=str(tmp_path / "none")), "--features: .*want pixels, latents, or"),
        (Choices(features=str(tmp_path)), f"--features: .*has no {WEIGHTS}"),
        (Choices(held_out=str(tmp_path / "none")), "none"),
        (Choices(group="family"), "no field 'family' in its JSON; it has captions, label, one"),
        (Choices(label="style", attributes=("style",)), "--attribute style: says already which"),
        (Choices(label="one"), "all held-out pictures are of one caption, 'same'"),
    ):
        assert_refused(
            lambda choices=choices: evaluate(run, [], 0, SILENT, out, choices), InputError, words
        )
    for name in ("scores.png", "scores.html"):  # which sheet and page would be written over
        path = tmp_path / name
        assert_refused(
            lambda path=path: evaluate(run, [], 0, SILENT, path), InputError, "--out .*as JSON"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_style_may_be_the_label(run: Path) -> None:
    """Of every caption, whether it names the style or not."""
    prepared = prepare(find_checkpoint(run).recipe, Choices(label="style"), seed=0)
    assert sorted(str(one.wanted["style"]) for one in prepared.asked) == sorted(STYLES)
    assert all(set(one.wanted) == {"style"} for one in prepared.asked)


def one_captioned(place: Path, captions: dict[str, str], large: int | None = None) -> Path:
    """Shards of one picture for each label; the large-th is twice the size of the others."""
    sides = [PICTURE * (1 + (i == large)) for i in range(len(captions))]
    samples = [
        {
            "__key__": f"{place.name}{i}",
            "png": png(np.zeros((sides[i], sides[i], 3), dtype=np.uint8)),
            "json": json.dumps({"captions": [text], "label": label, "style": "flat"}).encode(),
        }
        for i, (label, text) in enumerate(captions.items())
    ]
    return write_shards(place, samples, per_shard=1, meta={})


def test_a_label_s_own_words_name_no_style(run: Path, tmp_path: Path) -> None:
    said = {
        "flat shoe": "a Flat  shoe",
        "flat": "a flat, flat style",
        "inflat": "inflat, not inflatable",
        "at": "a flat at",
    }
    held_out = str(one_captioned(tmp_path / "few", said))
    asked = prepare(find_checkpoint(run).recipe, Choices(held_out=held_out), seed=0).asked
    named = {one.wanted["label"]: one.wanted["style"] for one in asked}
    assert named == {"flat shoe": None, "flat": "flat", "inflat": None, "at": "flat"}


def test_shards_are_one_split_by_whatever_path(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = find_checkpoint(run).recipe
    val = Path(str(recipe.data.val_shards))
    (tmp_path / "link").symlink_to(val)
    monkeypatch.chdir(val.parent)
    for path in ("val", str(val / "*.tar"), str(tmp_path / "link"), str(val)):
        found = prepare(recipe, Choices(held_out=path), seed=0)
        assert (found.held_out, list(found.samples)) == ("val", ["train", "val"])
    pair = one_captioned(tmp_path / "pair", {"cat": "a cat", "dog": "a dog"})
    with_pair = override_recipe(recipe, {"data.val_shards": str(pair)})
    part = Choices(held_out=str(pair / "shard-000001.tar"))
    assert_refused(lambda: prepare(with_pair, part, 0), InputError, "is one of the 2 val shards")
    assert prepare(recipe, Choices(held_out=str(pair)), 0).held_out == "held_out"


def with_others(place: Path, others: str, keys: str) -> Path:
    """The held-out pictures of `styled`, and after each one of another split, by another key."""

    def samples() -> Iterator[dict[str, Any]]:
        for i, (own, other) in enumerate(zip(styled("val"), styled(others), strict=False)):
            yield own
            yield other | {"__key__": f"{keys}{i}"}

    return write_shards(place, samples(), meta={})


def test_a_held_out_picture_of_the_training_shards_is_left_out(run: Path, tmp_path: Path) -> None:
    """Byte for byte and by whatever key: else it would be its own nearest neighbour, and no copy
    of it one.
    """
    mixed = with_others(tmp_path / "mixed", "train", "again")
    few = Choices(captions=4, draws=2)
    clean = evaluate(run, [], 0, SILENT, tmp_path / "a.json", few)["neighbours"]
    heard = Heard()
    told = evaluate(run, [f"data.val_shards={mixed}"], 0, heard, tmp_path / "b.json", few)
    found = told["neighbours"]
    assert (clean["samples"].pop("left_out"), found["samples"].pop("left_out")) == (0, 12)
    assert found == clean
    assert any(line.endswith(": 12") for line in heard.said)
    # neither counts a picture twice that is held out in two splits
    twice = with_others(tmp_path / "twice", "train", "more")
    recipe = find_checkpoint(run).recipe
    prepared = prepare(recipe, Choices(held_out=str(twice)), seed=0)
    assert list(prepared.samples) == ["train", "held_out"]
    assert (prepared.left_out, len(prepared.lent), prepared.offset()) == (24, 12, 36)


def test_where_nothing_is_held_out_nothing_is_judged(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    recipe = find_checkpoint(run).recipe
    for overrides, choices in (
        ([f"data.val_shards={recipe.data.shards}"], Choices()),
        ([f"data.val_shards={recipe.data.shards}"], Choices(held_out=recipe.data.shards)),
    ):
        assert_refused(
            lambda overrides=overrides, choices=choices: evaluate(
                run, overrides, 0, SILENT, out, choices
            ),
            InputError,
            "every held-out picture is in data.shards too",
        )
    assert not out.exists()


def test_a_field_that_is_null_says_nothing(run: Path, tmp_path: Path) -> None:
    def samples() -> Iterator[dict[str, Any]]:
        for sample in styled("val"):
            row = json.loads(sample["json"]) | {"style": None}
            yield sample | {"json": json.dumps(row).encode()}

    null = str(write_shards(tmp_path / "null", samples(), meta={}))
    recipe = override_recipe(find_checkpoint(run).recipe, {"data.val_shards": null})
    assert set(prepare(recipe, Choices(), seed=0).asked[0].wanted) == {"label"}
    chosen = Choices(attributes=("style",))
    assert_refused(lambda: prepare(recipe, chosen, 0), InputError, "no field 'style'")


def test_pictures_of_another_size_are_refused(run: Path, tmp_path: Path) -> None:
    recipe, names = find_checkpoint(run).recipe, {name: f"a {name}" for name in "abcde"}
    last, inside = (str(one_captioned(tmp_path / f"{i}", names, large=i)) for i in (4, 3))
    refused = "pictures are of several sizes, 8 x 8 px: .*16 x 16 px: shard .*shard-000004"
    assert_refused(lambda: prepare(recipe, Choices(held_out=last), 0), InputError, refused)
    out, few = tmp_path / "eval.json", Choices(held_out=inside, features="pixels", captions=2)
    words = "shard-000003.tar, sample '33': 16 x 16 px among pictures of 8 x 8"
    assert_refused(lambda: evaluate(run, [], 0, SILENT, out, few), InputError, words)
    assert not out.exists()


def test_what_training_lacks_is_refused_before_anything_is_painted(
    run: Path, tmp_path: Path
) -> None:
    recipe = find_checkpoint(run).recipe
    training = str(one_captioned(tmp_path / "train", {"red cat": "a red cat"}))
    bare = override_recipe(recipe, {"data.shards": training})
    for choices in (Choices(label="group"), Choices(attributes=("group",))):
        assert_refused(
            lambda choices=choices: prepare(bare, choices, 0), InputError, "no field 'group'"
        )
    assert_refused(
        lambda: prepare(recipe, Choices(held_out=training, group="group"), 0),
        InputError,
        "no field 'group'",
    )


def test_without_fields_a_caption_is_its_own_label(tmp_path: Path) -> None:
    """As in shards of pictures and captions alone, each once: no pair of a caption is real."""
    recipe = tiny_recipe(tmp_path)
    run = saved_run(recipe).path
    heard = Heard()
    told = evaluate(run, [], 0, heard, choices=Choices(captions=5, draws=2))
    # training has encoded them all
    assert "looking at real pictures" not in heard.tasks
    found = told["neighbours"]
    assert (found["label"], found["by_group"], found["features"]["of"]) == (
        "caption",
        None,
        "latents",
    )
    assert found["diversity"] is found["controls"]["real"]["diversity"] is None
    assert found["controls"]["real"]["caption_accuracy"] == 0
    # what was not measured is neither reached nor missed
    assert found["beats_mu"]["diversity"] is found["standard_error"]["diversity"] is None
    console = Console(file=io.StringIO(), width=200)
    show_neighbours(console, run, told)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    (row,) = [line for line in lines if line.startswith("\u2502 diversity")]
    assert not set(row) & set("*0123456789")
    assert all(row["caption"] for row in found["by_caption"])


def test_a_network_s_features_are_kept(run: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(EfficientNetLite0().state_dict(), tmp_path / WEIGHTS)
    heard, again = Heard(), Heard()
    few = Choices(captions=2, draws=2, features=str(tmp_path))
    out, out_again = tmp_path / "eval-0.5", tmp_path / "eval-0.7"
    first = evaluate(run, [], 0, heard, out, few)
    assert first["neighbours"]["features"]["dims"] == 1280
    assert heard.tasks["looking at real pictures"] == 12  # of val; a task of its own for each split
    assert evaluate(run, [], 0, again, out_again, few) == first
    assert "looking at real pictures" not in again.tasks
    told = {f"eval-0.{i}{end}" for i in (5, 7) for end in ("", ".png", ".html")}
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, *told}


def test_kept_features_are_no_more_than_a_help(run: Path, tmp_path: Path) -> None:
    recipe = find_checkpoint(run).recipe
    samples = prepare(recipe, Choices(), seed=0).lent
    autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
    judge = open_judge(LATENTS, autoencoder, recipe.model.autoencoder, torch.device("cpu"))
    # a place that cannot be written
    found = features_of(samples, judge, tmp_path / "none", SILENT)
    assert (features_of(samples, judge, tmp_path, SILENT) == found).all()
    (file,) = tmp_path.glob("*.npy")
    whole = file.read_bytes()
    # cut off, while another evaluation is at the same file
    for left in (0, 5, len(whole) // 2):
        file.write_bytes(whole[:left])
        (tmp_path / f".{file.name}.partial").mkdir(exist_ok=True)
        assert (features_of(samples, judge, tmp_path, SILENT) == found).all()
        assert file.read_bytes() == whole


def test_digits_by_pixels(tmp_path: Path) -> None:
    """A set that is made on first use; the next scan by pixels is of the same digit 0.98 of the
    time.
    """
    small = {
        "name": "digits",
        "storage_path": str(tmp_path),
        "data.cache": str(tmp_path / "cache"),
        "model.velocity.width": 16,
        "model.velocity.depth": 1,
        "model.velocity.heads": 2,
        "sample.steps": 1,
        "train.device": "cpu",
    }
    run = saved_run(override_recipe(load_recipe("digits").recipe, small)).path
    choices = Choices(draws=18, features="pixels")
    found = evaluate(run, [], 0, SILENT, choices=choices)["neighbours"]
    assert (found["captions"], found["by_group"]) == (10, None)
    assert found["samples"]["real"] == 1797
    controls = found["controls"]
    assert controls["real"]["caption_accuracy"] > 0.95
    assert controls["real"]["caption_accuracy"] >= controls["shuffled"]["caption_accuracy"] + 0.8
    assert controls["real"]["diversity"] == pytest.approx(1, abs=0.1)
    assert controls["real"]["coverage"] == pytest.approx(1 - 2.0**-DENSE, abs=0.04)
    assert controls["real"]["copies"]["nearer"] < 0.1
    assert found["caption_accuracy"] < 0.5  # nothing is learnt yet
    assert found["precision"] < controls["real"]["precision"]
