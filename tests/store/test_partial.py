"""Training on the shards that are encoded already: which they are, and that a run keeps to them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Heard, assert_refused, tiny_pictures, tiny_recipe

from flowray.cli import train as train_command
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, load_recipe, override_recipe
from flowray.config.partial import Part, parse_part
from flowray.config.recipe import Recipe
from flowray.data.reader import ShardReader
from flowray.report.load import load_run
from flowray.store.latents import (
    LatentSet,
    ensure_latents,
    load_latents,
    load_training,
    skipped_places,
    split_shards,
    unencoded,
    with_part,
)
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.sweepconfig.check import base_recipe, check_trials
from flowray.sweepconfig.file import load_sweep
from flowray.train.group import Group
from flowray.train.loop import train

HASHING = "reading shards for their sha256"
ALL = 6  # shards of 16 pictures


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    whole = tiny_recipe(tmp_path, **{"train.log_every": 1, "train.probe_every": 3})
    more = sorted(tiny_pictures(tmp_path / "more", 32, start=200).glob("*.tar"))
    for number, shard in enumerate(more, 4):
        shutil.copy(shard, Path(whole.data.shards) / f"shard-{number:06d}.tar")
    return whole


def encode(recipe: Recipe, numbers: set[int]) -> None:
    """As an encode leaves it that has done these shards so far."""
    folder = Path(recipe.data.shards)
    aside = {path: path.with_suffix(".aside") for path in sorted(folder.glob("*.tar"))}
    for number, (path, other) in enumerate(aside.items()):
        if number not in numbers:
            path.rename(other)
    ensured(recipe)
    for path, other in aside.items():
        if other.exists():
            other.rename(path)


def ensured(recipe: Recipe, heard: Heard | None = None) -> dict[str, Path]:
    made_of = recipe.data, recipe.model.autoencoder, recipe.model.latent
    return ensure_latents(*made_of, heard or Heard())


def partial(recipe: Recipe, value: bool | str = True) -> Recipe:
    return override_recipe(recipe, {"data.partial": value})


def keys(latents: LatentSet) -> list[str]:
    return [f"{shard.name} {key}" for shard, key in _places(latents.picture_reader())]


def _places(reader: ShardReader) -> list[tuple[Path, str]]:
    each = [ShardReader([path]) for path in reader.paths]
    return [(one.paths[0], key) for one in each for key in one.keys]


def test_parts_are_what_their_texts_say() -> None:
    rng = random.Random(0)
    for _ in range(300):
        of = rng.randrange(1, 60)
        places = tuple(sorted(rng.sample(range(of), rng.randrange(1, of + 1))))
        part = Part(places, of, f"{rng.randrange(2**32):08x}")
        assert parse_part(str(part)) == part
    assert str(Part((0, 1, 2, 4, 6, 7), 9, "0" * 8)) == "0-2,4,6-7/9@00000000"


@pytest.mark.parametrize(
    "text", ["3-1", "1,0", "0,1", "0-9", "12", "0-99999999999999", "01", "1-1", "", "x", "0,,1"]
)
def test_what_is_no_part_is_refused(recipe: Recipe, text: str) -> None:
    for whole in (f"{text}/9@00000000", f"{text}/9"):
        told = r"data\.partial: got .*, want true, false or a part of a set, such as [^ ]+$"
        assert_refused(lambda value=whole: partial(recipe, value), InputError, told)


def test_only_what_is_encoded_is_trained_on(recipe: Recipe) -> None:
    encode(recipe, {1, 4})
    wanted = partial(recipe)
    made_of = wanted.data, wanted.model.autoencoder, wanted.model.latent
    assert unencoded(*made_of) == 0
    heard = Heard()
    folders = ensured(wanted, heard)
    assert not {what for what in heard.tasks if what.startswith("encoding")}
    assert HASHING not in heard.tasks  # of the two the sums are known, the others are not read
    latents = load_training(folders["train"], wanted)
    assert len(latents) == 32
    assert [path.name for path in latents.pictures] == ["shard-000001.tar", "shard-000004.tar"]
    (told,) = [line for line in heard.said if "of 6 shards" in line]
    assert "trained on 2 of 6 shards" in told
    assert "32 samples" in told
    assert skipped_places(*made_of)["train"] == frozenset()
    named = with_part(wanted)
    assert str(named.data.partial).startswith("1,4/6@")
    assert f"data.partial={named.data.partial}" in told
    assert split_shards(named.data)["train"] == latents.pictures
    assert len(load_latents(folders["val"])) == 16


def test_held_out_shards_are_encoded_for_it(recipe: Recipe) -> None:
    """They come last in an encode, and probes want all of them."""
    encode(recipe, {0})
    every = list(Path(str(recipe.data.cache)).glob("latents-*/shards/*.json"))
    held_out = split_shards(recipe.data)["val"]
    assert len(every) == 1 + len(held_out)
    for file in Path(str(recipe.data.cache)).glob("latents-*/val-*/manifest.json"):
        for row in load_latents(file.parent).reader.paths:
            row.with_suffix(".json").resolve().unlink()
    heard = Heard()
    folders = ensured(partial(recipe), heard)
    assert [what for what in heard.tasks if what.startswith("encoding")] == [
        "encoding val pictures"
    ]
    assert len(load_latents(folders["val"])) == 16


def test_nothing_encoded_is_one_line(recipe: Recipe) -> None:
    wanted = partial(recipe)
    line = "none of the 6 training shards is encoded"
    assert_refused(lambda: ensured(wanted), InputError, line)
    assert not list(Path(str(recipe.data.cache)).rglob("*.tar"))


def test_what_is_named_stays_the_same_set(recipe: Recipe) -> None:
    encode(recipe, {0, 2, 3})
    named = with_part(partial(recipe))
    before = load_training(ensured(named)["train"], named)
    ensured(recipe)  # the encode goes on to its end
    after = load_training(ensured(named)["train"], named)
    assert keys(after) == keys(before)
    assert after.variance == before.variance
    assert len(load_training(ensured(partial(recipe))["train"], recipe)) == 96
    assert str(with_part(partial(recipe)).data.partial).startswith("0-5/6@")
    shutil.rmtree(str(recipe.data.cache))  # and where the cache is lost, it is made again
    heard = Heard()
    again = load_training(ensured(named, heard)["train"], named)
    assert heard.tasks["encoding train pictures"] == 48
    assert keys(again) == keys(before)


def grow(folder: Path) -> None:
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000000-more.tar")


def change(folder: Path) -> None:
    shard = folder / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes().replace(b"s0003", b"t0003"))


def shrink(folder: Path) -> None:
    for number in range(2, ALL):
        (folder / f"shard-{number:06d}.tar").unlink()


@pytest.mark.parametrize(
    ("fault", "line"),
    [(grow, "other content"), (change, "other content"), (shrink, "names shard 2")],
)
def test_other_shards_than_were_named_are_refused(
    recipe: Recipe, fault: Callable[[Path], None], line: str
) -> None:
    encode(recipe, {0, 2})
    named = with_part(partial(recipe))
    fault(Path(recipe.data.shards))
    assert_refused(lambda: ensured(named), InputError, rf"data\.partial.*{line}")


def run_of(recipe: Recipe, name: str, *, stop: bool = False, **changes: object) -> RunDirectory:
    """stop: at the first probe, after 3 steps."""
    recipe = override_recipe(recipe, {"name": name, **changes})
    run = RunDirectory(Path(recipe.storage_path) / name)
    report = (lambda row: run.stop_request.touch()) if stop else (lambda row: None)
    train(recipe, run, Group.current("cpu"), report)
    run.stop_request.unlink(missing_ok=True)
    return run


def losses(run: RunDirectory) -> list[float]:
    return [row["loss/flow"] for row in read_rows(run.metrics)]


def test_a_resume_trains_on_the_set_of_its_start(recipe: Recipe, tmp_path: Path) -> None:
    encode(recipe, {0, 2, 3})
    named = with_part(partial(recipe))
    whole, cut = run_of(named, "whole"), run_of(named, "cut", stop=True)
    assert len(losses(cut)) == 4
    ensured(recipe)
    kept = load_recipe(str(cut.config)).recipe
    assert kept.data.partial == named.data.partial
    assert losses(run_of(kept, "cut")) == losses(whole)
    assert len(losses(whole)) == 12
    assert losses(run_of(recipe, "all")) != losses(whole)
    (note,) = load_run(cut.path).notes
    assert "3 of 6 shards" in note
    assert load_run(whole.path.with_name("all")).notes == ()


def test_true_at_a_resume_means_the_set_of_the_run(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(recipe, {0, 2})
    named = with_part(partial(recipe))
    run = run_of(named, "tiny", **{"train.steps": 3})
    whole = run_of(recipe, "other", **{"train.steps": 3})
    typed = tmp_path / "typed.yaml"
    typed.write_text(dump_recipe(override_recipe(recipe, {"train.steps": 3})))
    before = run.config.read_bytes()
    argv = [str(typed), "data.partial=true", "--resume"]
    assert train_command.main(argv) == 0
    assert "has finished its 3 steps" in capsys.readouterr().err
    assert run.config.read_bytes() == before
    for words, got in ((argv[:1], "false"), ([*argv[:2], f"name={whole.path.name}"], "true")):
        with pytest.raises(InputError, match=f"data.partial: got {got}"):
            train_command.main([*words, "--resume"])


def test_who_trains_wants_names(recipe: Recipe, tmp_path: Path) -> None:
    encode(recipe, {0})
    run = RunDirectory(tmp_path / "runs" / "unnamed")
    call = lambda: train(partial(recipe), run, Group.current("cpu"), lambda row: None)  # noqa: E731
    assert_refused(call, InputError, "names of shards")
    assert not run.path.exists()


def test_a_sweep_wants_names(recipe: Recipe, tmp_path: Path) -> None:
    encode(recipe, {0, 1})
    (tmp_path / "tiny.yaml").write_text(dump_recipe(recipe))
    (tmp_path / "s.yaml").write_text(
        "name: s\nbase: tiny.yaml\nmetric: {name: ema/shoot/nmse}\nparameters:\n"
        "  optim.lr: {min: 1e-4, max: 1e-2}\n"
    )
    for value, refused in ((True, True), (with_part(partial(recipe)).data.partial, False)):
        sweep = load_sweep(str(tmp_path / "s.yaml"), [f"set.data.partial={str(value).lower()}"])
        if refused:
            line = "data.partial true would give each trial"
            assert_refused(lambda s=sweep: check_trials(s, base_recipe(s)), InputError, line)
        else:
            check_trials(sweep, base_recipe(sweep))
