"""`flowray.train_autoencoder`: what it saves, that a killed command goes on bit for bit, and what
it refuses.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from flowray.cli.train_autoencoder import main
from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.model import KLAutoencoder
from flowray.config.progress import SILENT, Silent
from flowray.data.prepare import AS_THEY_ARE
from flowray.data.reader import ShardReader
from flowray.data.shards import find_shards, write_shards
from flowray.model.autoencoder import load_autoencoder
from flowray.store.checkpoint import load_state, load_tensors, newest_checkpoint
from flowray.store.encode import Budget
from flowray.train import autoencoder_pictures
from flowray.train.autoencoder import Design, Fit, fresh, left_over, preview, train_autoencoder
from flowray.train.autoencoder_pictures import batches, in_order, look_through

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = Design(channels=(8, 16), steps=6, decoder_steps=4, batch_size=4)
OURS = Design(channels=(8, 16), steps=4, decoder_steps=2, batch_size=4)  # of these options
OPTIONS = ["--channels", "8,16", "--steps", "4", "--decoder-steps", "2", "--batch-size", "4"]

HOLD = """
import sys, time
from pathlib import Path
from flowray.store.run import RunDirectory, RunLock
with RunLock(RunDirectory(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def shard_set(
    folder: Path, count: int, side: tuple[int, int] = (16, 16), odd: int | None = None
) -> ShardReader:
    """Two-coloured pictures, (width, height) = side; the `odd` one is wider."""

    def samples() -> Iterator[dict[str, object]]:
        rng = np.random.default_rng(0)
        for i in range(count):
            picture = np.empty((side[1], side[0] + 16 * (i == odd), 3), np.uint8)
            picture[:] = rng.integers(256, size=3)
            picture[: rng.integers(1, side[1])] = rng.integers(256, size=3)
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, format="png")
            yield {"__key__": f"{i:04d}", "png": buffer.getvalue(), "txt": b"two colours"}

    return ShardReader(find_shards(str(write_shards(folder, samples(), meta={}))))


class Killed(Exception):
    pass


class KilledAfter(Silent):
    """Progress that ends the training at its n-th step."""

    def __init__(self, steps: int):
        self.left = steps

    def task(self, what, total=None, done=0):
        from contextlib import contextmanager

        @contextmanager
        def running():
            def advance(count=1, note=""):
                self.left -= what.startswith("training")
                if self.left == 0:
                    raise Killed

            yield advance

        return running()


@pytest.mark.parametrize("steps", [1, 3, 5, 6, 7, 9])
def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path, steps: int) -> None:
    reader = shard_set(tmp_path / "pictures", 12)
    train_autoencoder(reader, SMALL, tmp_path / "whole", device=CPU)
    with pytest.raises(Killed):
        train_autoencoder(
            reader, SMALL, tmp_path / "cut", device=CPU, save_every=2, progress=KilledAfter(steps)
        )
    assert not (tmp_path / "cut").exists()
    train_autoencoder(reader, SMALL, tmp_path / "cut", device=CPU, save_every=2)
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "cut"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("whole", "cut")]
    assert configs[0] == configs[1]
    assert not list(tmp_path.glob(".*training*"))


def test_another_design_does_not_go_on_from_what_was_left(tmp_path: Path) -> None:
    reader = shard_set(tmp_path / "pictures", 12)
    with pytest.raises(Killed):
        train_autoencoder(
            reader, SMALL, tmp_path / "a", device=CPU, save_every=1, progress=KilledAfter(4)
        )
    other = Design(channels=(8, 16), steps=6, decoder_steps=4, batch_size=4, seed=1)
    train_autoencoder(reader, other, tmp_path / "a", device=CPU)
    train_autoencoder(reader, other, tmp_path / "b", device=CPU)
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("a", "b"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def left_by_a_kill(reader: ShardReader, out: Path, steps: int, design: Design = SMALL) -> Path:
    """A training ended at this step, which it did not save; its newest checkpoint."""
    with pytest.raises(Killed):
        train_autoencoder(
            reader, design, out, device=CPU, save_every=2, progress=KilledAfter(steps)
        )
    newest = newest_checkpoint(out.with_name(f".{out.name}.training"))
    assert newest is not None
    return newest


def test_what_another_design_left_takes_no_checkpoint_from_this_one(tmp_path: Path) -> None:
    reader, out = shard_set(tmp_path / "pictures", 12), tmp_path / "out"
    assert left_by_a_kill(reader, out, 9).name == "step_000008"
    other = Design(channels=(8, 16), steps=6, decoder_steps=4, batch_size=4, seed=1)
    assert left_by_a_kill(reader, out, 5, other).name == "step_000004"
    _, state = left_over(reader, other, out)
    assert state["step"] == 4
    assert left_over(reader, SMALL, out)[1] == {}


def test_a_training_that_diverges_ends_with_its_last_good_checkpoint(tmp_path: Path) -> None:
    reader, out = shard_set(tmp_path / "pictures", 12), tmp_path / "out"
    wild = Design(channels=(8, 16), steps=6, decoder_steps=4, batch_size=4, lr=1e30)
    with pytest.raises(InputError, match=r"diverged at step 1: .*--lr"):
        train_autoencoder(reader, wild, out, device=CPU, save_every=1)
    assert not out.exists()
    newest, state = left_over(reader, wild, out)
    assert newest is not None
    assert state["step"] == 1
    assert all(bool(value.isfinite().all()) for value in load_tensors(newest, "fit").values())


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    torch.manual_seed(0)
    net = fresh(SMALL, 16)
    fit = Fit(net, 6, 1e-3, decoder_alone=False, design=SMALL)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(InputError, match="step 0"):
        fit(torch.full((2, 3, 16, 16), torch.nan))
    assert fit.step == 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("lr", ["0", "0.5", "nan", "inf"])
def test_learning_rates_that_can_train_nothing_are_refused(tmp_path: Path, lr: str) -> None:
    with pytest.raises(InputError, match="--lr"):
        main([str(tmp_path), "--out", str(tmp_path / "out"), "--lr", lr])


def test_held_out_pictures_of_another_size_are_refused_before_training(tmp_path: Path) -> None:
    shard_set(tmp_path / "train", 4)
    shard_set(tmp_path / "val", 4, (32, 32))
    argv = [str(tmp_path / "train"), "--val", str(tmp_path / "val")]
    with pytest.raises(InputError, match="several sizes"):
        main([*argv, "--out", str(tmp_path / "out"), *OPTIONS])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "val"]


def test_a_training_ended_while_it_is_judged_has_lost_nothing(tmp_path: Path) -> None:
    reader, out = shard_set(tmp_path / "pictures", 12), tmp_path / "out"
    seconds = []

    def complete(partial: Path, took: float) -> None:
        seconds.append(took)
        if len(seconds) == 1:
            raise KeyboardInterrupt
        assert (partial / WEIGHTS).is_file()
        (partial / "CARD.md").touch()

    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(reader, SMALL, out, device=CPU, complete=complete)
    assert not out.exists()
    untrained = KilledAfter(1)
    train_autoencoder(reader, SMALL, out, device=CPU, complete=complete, progress=untrained)
    assert untrained.left == 1
    assert (out / "CARD.md").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures"]


def test_what_a_kill_while_it_is_judged_leaves_is_removed(tmp_path: Path) -> None:
    reader, out = shard_set(tmp_path / "pictures", 4), tmp_path / "o[u]t"
    others = [tmp_path / name for name in (".o[u]t.my_own_notes", ".out.0123456789ab")]
    for folder in (left := tmp_path / ".o[u]t.0123456789ab", *others):
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(b"half")
    train_autoencoder(reader, replace(SMALL, steps=1, decoder_steps=0), out, device=CPU)
    assert not left.exists()
    assert all(folder.exists() for folder in others)


def test_the_seconds_are_those_of_all_sessions(tmp_path: Path) -> None:
    reader, out = shard_set(tmp_path / "pictures", 12), tmp_path / "out"
    newest = left_by_a_kill(reader, out, 9)
    state = load_state(newest)
    assert state["seconds"] > 0
    (newest / "state.json").write_text(json.dumps({**state, "seconds": 1000.0}))
    told: list[float] = []
    train_autoencoder(
        reader, SMALL, out, device=CPU, complete=lambda _, seconds: told.append(seconds)
    )
    assert 1000 < told[0] < 1100


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_of_another_size_is_named(tmp_path: Path, workers: int) -> None:
    reader, out = shard_set(tmp_path / "pictures", 12, odd=5), tmp_path / "out"
    with pytest.raises(InputError, match=r"0005.*32 x 16 px") as refused:
        train_autoencoder(reader, SMALL, out, device=CPU, workers=workers)
    assert "Traceback" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


@pytest.mark.parametrize("odd", [6, 11])
def test_pictures_of_several_sizes_are_refused_before_training(tmp_path: Path, odd: int) -> None:
    shard_set(tmp_path / "train", 12, odd=odd)
    with pytest.raises(InputError, match="several sizes"):
        main([str(tmp_path / "train"), "--out", str(tmp_path / "out"), *OPTIONS])


def test_bad_pictures_within_the_budget_are_left_out_and_named(tmp_path: Path, capsys) -> None:
    """One that does not decode, one of another size, one without a caption, which none needs."""

    def samples(bad: bool) -> Iterator[dict[str, object]]:
        reader = shard_set(tmp_path / f"good {bad}", 16)
        for i in range(16):
            png = reader.read(i, "png")
            if bad and i == 5:
                png = png[:60]
            if bad and i == 0:
                buffer = io.BytesIO()
                Image.new("RGB", (32, 16)).save(buffer, format="png")
                png = buffer.getvalue()
            if bad or i not in (0, 5):
                yield {"__key__": f"{i:04d}", "png": png, "cls": b"7"}

    for name, bad in (("dirty", True), ("clean", False)):
        write_shards(tmp_path / name, samples(bad), meta={})
    argv = [str(tmp_path / "dirty"), "--out", str(tmp_path / "dirty-out"), *OPTIONS]
    with pytest.raises(InputError, match=r"^1 bad of 16 train .*'0005'.*--max-bad 0\.07 to leave"):
        main(argv)
    with pytest.raises(InputError, match=r"^2 bad of 16 .*'0005'.*'0000': 32 x 16 px .*--size PX"):
        main([*argv, "--max-bad", "0.1"])
    assert not (tmp_path / "dirty-out").exists()
    assert main([*argv, "--max-bad", "0.2"]) == 0
    assert "2 of 16 train samples skipped" in capsys.readouterr().err
    named = (tmp_path / "dirty-out" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(row)["key"] for row in named] == ["0000", "0005"]
    assert main([str(tmp_path / "clean"), "--out", str(tmp_path / "clean-out"), *OPTIONS]) == 0
    assert not (tmp_path / "clean-out" / "bad_samples.jsonl").exists()
    one, other = (load_file(tmp_path / f"{name}-out" / WEIGHTS) for name in ("dirty", "clean"))
    assert all(bool((one[name] == other[name]).all()) for name in other)


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    reader, out = shard_set(tmp_path / "pictures", 12), tmp_path / "out"
    newest = left_by_a_kill(reader, out, 5)
    held = [sys.executable, "-c", HOLD, str(newest.parent)]
    with subprocess.Popen(held, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(InputError, match=f"in use by process {other.pid}"):
                train_autoencoder(reader, SMALL, out, device=CPU)
        finally:
            other.kill()
    assert newest.is_dir()
    train_autoencoder(reader, SMALL, out, device=CPU)
    assert (out / WEIGHTS).is_file()


def test_a_disk_that_takes_no_more_is_one_line_with_the_last_good_step(tmp_path: Path) -> None:
    reader, out = shard_set(tmp_path / "pictures", 12), tmp_path / "out"
    left_by_a_kill(reader, out, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot be written: .* from step 2$"):
            train_autoencoder(reader, SMALL, out, device=CPU, save_every=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    train_autoencoder(reader, SMALL, out, device=CPU)
    assert (out / WEIGHTS).is_file()


def test_a_place_beside_which_nothing_can_be_kept_is_one_line(tmp_path: Path) -> None:
    reader = shard_set(tmp_path / "pictures", 12)
    (tmp_path / ".out.training").touch()
    with pytest.raises(InputError, match="out: cannot be written"):
        train_autoencoder(reader, SMALL, tmp_path / "out", device=CPU)


def test_latents_have_mean_0_and_variance_1_and_the_first_three_show_the_picture(
    tmp_path: Path,
) -> None:
    reader = shard_set(tmp_path / "pictures", 64)
    design = Design(channels=(8, 16), steps=90, decoder_steps=1, batch_size=8, preview=1.0)
    train_autoencoder(reader, design, tmp_path / "out", device=CPU)
    net = AutoencoderKL.from_pretrained(tmp_path / "out")
    pictures = torch.cat(list(in_order(reader, 64)))
    with torch.no_grad():
        latents = net.encode(pictures).latent_dist.mean
    mean, std = (torch.tensor(net.config[f"latents_{name}"]) for name in ("mean", "std"))
    normal = (latents - mean[:, None, None]) / std[:, None, None]
    assert normal.mean((0, 2, 3)).abs().max() < 0.02
    assert (normal.std((0, 2, 3)) - 1).abs().max() < 0.02
    small = preview(pictures, design.factor)
    error = (latents[:, :3] - small).square().mean()
    assert error < 0.2 * small.var()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.filterwarnings("error:Using a target size")
def test_latents_of_fewer_channels_than_a_picture_train(tmp_path: Path, channels: int) -> None:
    """The first of them show the first colours; no channel is drawn to all three."""
    reader = shard_set(tmp_path / "pictures", 4)
    design = replace(SMALL, latent_channels=channels, steps=1, decoder_steps=0)
    train_autoencoder(reader, design, tmp_path / "out", device=CPU)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["latent_channels"] == channels


def test_order_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    reader = shard_set(tmp_path / "pictures", 12)
    whole = list(batches(reader, 4, 0, 0, 6))
    assert [len(part) for part in whole] == [4] * 6
    for mine, alike in zip(batches(reader, 4, 0, 4, 6), whole[4:], strict=True):
        assert torch.equal(mine, alike)
    assert not torch.equal(next(batches(reader, 4, 1, 0, 1)), whole[0])


def test_the_command_judges_held_out_pictures_and_writes_a_card(tmp_path: Path, capsys) -> None:
    shard_set(tmp_path / "train", 16)
    shard_set(tmp_path / "val", 8)
    out = tmp_path / "made"
    argv = [str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--out", str(out)]
    assert main([*argv, *OPTIONS, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["latent"] == [4, 8, 8]
    assert 0 < told["psnr"] < 60
    assert f"{told['psnr']:.2f} dB" in (out / "CARD.md").read_text()
    with pytest.raises(InputError, match="exists already"):
        main([*argv, *OPTIONS])


def test_the_working_directory_can_be_written_and_a_recipe_finds_it(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    shard_set(tmp_path / "train", 16)
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path / "made")
    assert main([str(tmp_path / "train"), "--out", ".", *OPTIONS]) == 0
    assert f"model.autoencoder.path: {tmp_path / 'made'}`" in capsys.readouterr().out
    assert (tmp_path / "made" / "CARD.md").is_file()


def test_a_named_set_brings_its_held_out_pictures(tmp_path: Path, capsys) -> None:
    assert main(["digits", "--out", str(tmp_path / "out"), "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["pictures"] > plan["held_out"] > 0
    assert plan["latent"] == [4, 8, 8]


def test_a_named_set_that_is_not_made_says_what_makes_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FLOWRAY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="make emoji --size 64"):
        main(["emoji_64", "--out", str(tmp_path / "out")])


def test_the_plan_says_what_is_left_and_writes_nothing(tmp_path: Path, capsys) -> None:
    reader, out = shard_set(tmp_path / "train", 12), tmp_path / "out"
    argv = [str(tmp_path / "train"), "--out", str(out), *OPTIONS]
    assert main([*argv, "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["from_step"], plan["removes"]) == (0, None)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    newest = left_by_a_kill(reader, out, 3, OURS)
    assert main([*argv, "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["from_step"] == 2
    assert main([*argv, "--plan", "--json", "--seed", "1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["from_step"], plan["removes"]) == (0, str(newest))
    assert newest.is_dir()
    assert main([*argv, "--plan"]) == 0
    assert f"{plan['parameters']:,}" in capsys.readouterr().out
    assert plan["parameters"] == sum(each.numel() for each in fresh(OURS, 16).parameters())


@pytest.mark.parametrize("side", [(16, 12), (18, 18)])
def test_pictures_that_do_not_fit_the_levels_are_refused(tmp_path: Path, side) -> None:
    shard_set(tmp_path / "train", 4, side)
    with pytest.raises(InputError, match="multiple of 8"):
        main([str(tmp_path / "train"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("channels", ["32", "12,24", "a,b", "8,8,8,8,8,8,8"])
def test_levels_that_cannot_be_are_refused(tmp_path: Path, channels: str) -> None:
    with pytest.raises(InputError, match="multiples of 8"):
        main([str(tmp_path), "--out", str(tmp_path / "out"), "--channels", channels])


def test_half_saves_the_same_weights_in_half_the_bytes(tmp_path: Path) -> None:
    shard_set(tmp_path / "train", 8)
    for name, words in {"full": [], "half": ["--half"]}.items():
        assert main([str(tmp_path / "train"), "--out", str(tmp_path / name), *OPTIONS, *words]) == 0
    full, half = (load_file(tmp_path / name / WEIGHTS) for name in ("full", "half"))
    assert {value.dtype for value in half.values()} == {torch.float16}
    assert all(torch.equal(full[name].half(), half[name]) for name in full)
    spec = LatentSpec(channels=4, height=8, width=8)
    loaded = load_autoencoder(KLAutoencoder(path=str(tmp_path / "half")), spec)
    assert {value.dtype for value in loaded.net.parameters()} == {torch.float32}


@pytest.mark.parametrize("option", ["--preview", "--noise"])
def test_the_weights_of_preview_and_noise_are_part_of_the_design(
    tmp_path: Path, option: str
) -> None:
    shard_set(tmp_path / "train", 8)
    for name, weight in {"none": "0", "much": "1"}.items():
        words = ["--out", str(tmp_path / name), *OPTIONS, option, weight]
        assert main([str(tmp_path / "train"), *words]) == 0
    none, much = (load_file(tmp_path / name / WEIGHTS) for name in ("none", "much"))
    assert not torch.equal(none["decoder.conv_out.weight"], much["decoder.conv_out.weight"])
    for weight in ("-0.1", "1.5", "nan", "some"):
        with pytest.raises(InputError, match=option):
            main([str(tmp_path / "train"), "--out", str(tmp_path / "no"), option, weight])


def test_a_start_gives_its_weights_and_without_steps_its_encoder_stays(tmp_path: Path) -> None:
    shard_set(tmp_path / "train", 8)
    argv = [str(tmp_path / "train"), *OPTIONS]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*argv, "--out", str(first)]) == 0
    other = shard_set(tmp_path / "other", 12).paths[0].parent  # latents of another mean and std
    on = [str(other), *OPTIONS, "--out", str(second), "--start", str(first), "--steps", "0"]
    assert main([*on, "--seed", "1"]) == 0
    ours, theirs = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    for name in ours:
        kept = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(ours[name], theirs[name]) == kept, name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    for key in ("latents_mean", "latents_std", "scaling_factor"):
        assert configs[0][key] == configs[1][key], key


def test_what_was_trained_from_another_start_is_not_gone_on_with(tmp_path: Path) -> None:
    reader, start = shard_set(tmp_path / "train", 12), tmp_path / "start"
    train_autoencoder(reader, SMALL, start, device=CPU)
    begun = dataclasses.replace(SMALL, start=str(start))
    left_by_a_kill(reader, tmp_path / "out", 3, begun)
    assert left_over(reader, begun, tmp_path / "out")[1]["step"] == 2
    shutil.rmtree(start)
    train_autoencoder(reader, dataclasses.replace(SMALL, seed=1), start, device=CPU)
    assert left_over(reader, begun, tmp_path / "out")[1] == {}


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    shard_set(tmp_path / "train", 8)
    argv = [str(tmp_path / "train"), "--out", str(tmp_path / "out"), *OPTIONS]
    with pytest.raises(InputError, match="--start"):
        main([*argv, "--steps", "0"])
    reader = ShardReader(find_shards(str(tmp_path / "train")))
    newest = left_by_a_kill(reader, tmp_path / "out", 3, OURS)
    wrong = {"embedded": "block_out_channels is", str(tmp_path / "none"): "--start: .*no such"}
    for start, says in wrong.items():
        for plan in ([], ["--plan"]):
            with pytest.raises(InputError, match=says):
                main([*argv, "--start", start, *plan])
    assert newest.is_dir()
    assert not (tmp_path / "out").exists()


def test_pictures_are_looked_at_once_and_large_sets_not_for_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On standard error is what takes time; a plan knows what an ended command left out."""
    monkeypatch.setenv("FLOWRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autoencoder_pictures, "PLANNED", 11)
    shard_set(tmp_path / "pictures", 12, odd=5)
    shard_set(tmp_path / "held", 12)
    argv = [str(tmp_path / "pictures"), "--val", str(tmp_path / "held"), *OPTIONS]
    argv += ["--max-bad", "0.1"]

    def kept() -> int:
        return len(list((tmp_path / "cache").glob("looked-*.json")))

    def planned() -> int:
        assert main([*argv, "--out", str(tmp_path / "plan"), "--plan", "--json"]) == 0
        return int(json.loads(capsys.readouterr().out.splitlines()[-1])["pictures"])

    assert (planned(), kept()) == (12, 0)
    assert main([*argv, "--out", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    assert (planned(), kept()) == (11, 2)
    looked = dict.fromkeys((tmp_path / "cache").glob("looked-*.json"))
    times = {file: file.stat().st_mtime_ns for file in looked}
    assert main([*argv, "--out", str(tmp_path / "b")]) == 0
    assert {file: file.stat().st_mtime_ns for file in looked} == times
    named = [(tmp_path / out / "bad_samples.jsonl").read_text() for out in "ab"]
    assert named[0] == named[1] != ""
    os.utime(next((tmp_path / "pictures").glob("*.tar")), ns=(1, 1))  # perhaps another picture
    assert (planned(), kept()) == (12, 2)


def test_of_held_out_pictures_those_that_are_judged_are_looked_at(tmp_path: Path) -> None:
    reader = shard_set(tmp_path / "pictures", 12, odd=5)
    budget = Budget("val", 3, 0.0)
    few, rows = look_through(reader, budget, AS_THEY_ARE, SILENT, tmp_path, most=3)
    assert (len(few), rows) == (3, [])
    assert [few.key(i) for i in range(3)] == ["0000", "0006", "0011"]
