"""The examination of a real tiny run: complete, read-only, the same live as from disk, and its
numbers move with planted faults.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_recipe
from torch import Tensor
from watched import public_probes, recorded, snapshot

from flowray.cli.doctor import main as command
from flowray.config.errors import InputError
from flowray.config.keys import describe
from flowray.config.recipe import Recipe
from flowray.doctor import battery
from flowray.doctor.battery import PARTS
from flowray.doctor.examine import Examination, examine
from flowray.doctor.subject import BatchOf, live_subject, merged_history, open_subject
from flowray.doctor.visits import Visits
from flowray.findings.diagnose import diagnose
from flowray.losses.total import Batch
from flowray.model.assemble import FlowModel
from flowray.model.autoencoder import load_autoencoder
from flowray.probes.untouched import untouched
from flowray.probes.vae import vae_metrics
from flowray.sample import generate
from flowray.store.found import find_checkpoint
from flowray.store.latents import LatentSet, ensure_latents, load_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.optim import Ema
from flowray.train.state import TrainState, fresh_state, restore_state
from flowray.train.step import BatchMaker, train_step, whole_batches

CPU = torch.device("cpu")
GROUP = Group(0, 1, CPU)


def opened(
    path: Path,
    batches: Callable[[Recipe, LatentSet, torch.device], BatchOf] = whole_batches,
    parts: Collection[str] = PARTS,
) -> Examination:
    subject = open_subject(find_checkpoint(path))
    made = batches(subject.recipe, subject.latents, subject.device)
    return examine(replace(subject, batches=made), batch=8, parts=parts)


def living(
    state: TrainState, recipe: Recipe, history: list[Any], parts: Collection[str] = PARTS
) -> Examination:
    return examine(
        live_subject(state, recipe, history=history, **sets(recipe)), batch=8, parts=parts
    )


def trained(home: Path, name: str) -> tuple[Recipe, RunDirectory]:
    losses = {"loss.clip.weight": 0.3, "loss.dino.weight": 0.1, "loss.dino.prototypes": 16}
    visited = {"probes.doctor_every": 3}  # at step 12
    recipe = tiny_recipe(
        home,
        name=name,
        **losses,
        **visited,
        **{"optim.schedule": {"kind": "constant"}, "train.grad_every": 4},
    )
    run = RunDirectory(Path(recipe.storage_path) / name)
    train(recipe, run, GROUP, lambda row: None, Visits)
    return recipe, run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examine")


@pytest.fixture(scope="module")
def ran(home: Path) -> tuple[Recipe, RunDirectory]:
    return trained(home, "healthy")


@pytest.fixture(scope="module")
def healthy(ran: tuple[Recipe, RunDirectory]) -> Examination:
    return opened(ran[1].path)


def again(ran: tuple[Recipe, RunDirectory], *parts: str) -> dict[str, float]:
    """The metrics of some parts of the battery, on the run of `ran`."""
    return opened(ran[1].path, parts=parts).metrics


def sets(recipe: Recipe) -> dict[str, Any]:
    folders = ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
    return {
        "latents": load_latents(folders["train"]),
        "held_out": load_latents(folders["val"]),
        "autoencoder": autoencoder,
    }


def test_everything_is_measured_declared_and_finite(healthy: Examination) -> None:
    assert healthy.facts["notes"] == []
    assert healthy.step == 12
    assert {key: value for key, value in healthy.metrics.items() if not math.isfinite(value)} == {}
    assert {f"trivial/flow/{key}" for key in ("nmse", "endpt_rmse@8")} <= healthy.metrics.keys()
    assert [
        key for key in healthy.metrics if not key.startswith("trivial/") and describe(key) is None
    ] == []
    assert len(healthy.metrics) > 250
    assert json.loads(json.dumps(healthy.facts))["head"] == "grid"
    assert [row["step"] for row in healthy.history] == [2, 4, 6, 8, 10, 12]
    assert "grad/flow" in healthy.history[1]
    assert "ema/shoot/nmse" in healthy.history[1]
    shown = {
        "orig",
        "recon_wrap",
        "recon_direct",
        "recon_twice",
        "trace_init",
        "trace_end",
        "samples",
    }
    assert {name: pictures.shape for name, pictures in healthy.pictures.items()} == dict.fromkeys(
        shown, (8, 8, 8, 3)
    )
    for curve in healthy.curves.values():
        assert len({len(values) for values in curve.values()}) <= 1 or "x" not in curve


def test_a_healthy_run_agrees_with_itself(healthy: Examination) -> None:
    rows = healthy.metrics
    same = (
        "same_batch/ratio",
        "latent/fit_slope",
        "finite/parameters",
        "finite/gradients",
        "finite/forward",
    )
    assert {key: rows[key] for key in same} == pytest.approx(dict.fromkeys(same, 1.0), abs=1e-4)
    zero = ("sampler/gap", "latent/fit_residual")
    assert {key: rows[key] for key in zero} == pytest.approx(dict.fromkeys(zero, 0.0), abs=1e-3)
    assert rows["sampler/psnr"] == rows["sampler/strip_psnr_ema"] == 99.0
    assert rows["sampler/strip_psnr_raw"] < 99.0
    assert rows["sampler/bits"] == 24
    assert max(value for key, value in rows.items() if key.startswith("teacher")) < 1e-9
    last = healthy.history[-1]
    # the probes of training, on the same batch
    assert rows["ema/flow/nmse"] == pytest.approx(last["ema/flow/nmse"], rel=1e-5)
    assert rows["ema/flow/endpt_rmse@64"] == pytest.approx(last["ema/flow/endpt_rmse@64"], rel=1e-5)


def test_a_checkpoint_and_what_is_not_there(
    ran: tuple[Recipe, RunDirectory], tmp_path: Path
) -> None:
    older = opened(ran[1].checkpoints / "step_000008", parts=["weights", "field"])
    assert older.step == 8
    assert older.history[-1]["step"] == 8
    assert "endpoint/falls_heun" in older.metrics
    assert "shoot/nmse" not in older.metrics  # of a part that was not asked for
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError) as caught:
            find_checkpoint(path)
        assert "\n" not in str(caught.value)


def words_and_numbers(value: Any) -> tuple[str, list[float]]:
    """A value as JSON, with its numbers taken out: their last digits come with every pass."""
    text, number = json.dumps(value), r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
    return re.sub(number, "#", text), [float(each) for each in re.findall(number, text)]


def test_training_heard_from_its_doctor_what_the_checkpoint_tells(
    ran: tuple[Recipe, RunDirectory], healthy: Examination
) -> None:
    (visit,) = read_rows(ran[1].findings)
    assert visit["step"] == healthy.step == 12
    found = diagnose(healthy.metrics, healthy.facts, healthy.history)
    (said, numbers), (again, others) = (
        words_and_numbers(findings) for findings in (visit["findings"], list(map(asdict, found)))
    )
    assert said == again
    assert numbers == pytest.approx(others, rel=0.02, abs=1e-6)  # text/snr is 5e-8 here
    assert visit["findings"], "12 steps on 64 pictures"


def test_every_probe_leaves_a_live_state_as_it_was_and_reads_like_its_checkpoint(
    ran: tuple[Recipe, RunDirectory], healthy: Examination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part by part of the battery; a probe that none of them runs fails this test too."""
    recipe, run = ran
    state = fresh_state(recipe, CPU)
    restore_state(state, recipe, run)
    state.model.train()
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.optim.lr
    sum(p.square().sum() for p in state.parameters.values()).backward()
    data, changed = sets(recipe), []
    before = snapshot(state, data["autoencoder"])

    @contextmanager
    def watched(model: FlowModel) -> Iterator[None]:
        with untouched(model):
            yield
        after = snapshot(state, data["autoencoder"])
        assert after.keys() == before.keys()
        changed.append([name for name in before if not torch.equal(before[name], after[name])])

    monkeypatch.setattr(battery, "untouched", watched)
    with recorded() as code:
        live = examine(live_subject(state, recipe, history=merged_history(run), **data), batch=8)
        vae_metrics(data["autoencoder"], data["held_out"], 4, 0)  # training's own
    assert dict(zip(PARTS, changed, strict=True)) == {part: [] for part in PARTS}
    assert live.facts["notes"] == []
    ranks = "battery.together"  # joins what several have looked at
    left = [name for name, made in public_probes().items() if made not in code]
    assert left == [ranks]
    after = snapshot(state, data["autoencoder"])
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    from_the_start = "pace|rate/|reach|step|travel"  # beside the weights of step 0
    only_files_know = {
        key
        for key in healthy.metrics
        if "moved" in key.split("/")
        or re.match(rf"seam/weights|sampler/strip|optim/({from_the_start})", key)
    }
    assert healthy.metrics.keys() - live.metrics.keys() == only_files_know
    assert live.metrics == pytest.approx(
        {key: healthy.metrics[key] for key in live.metrics}, rel=1e-4, abs=1e-6
    )


def test_the_command_says_every_number_and_looks_first_whether_it_can_write(
    ran: tuple[Recipe, RunDirectory],
    healthy: Examination,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(ran[1].path)
    with pytest.raises(InputError, match=r"--out .*nowhere: no such folder; make it first"):
        command([path, "--out", str(tmp_path / "nowhere" / "page.html")])
    code = command([path, "--json", "--batch", "8", "--out", str(tmp_path / "page.html")])
    said = json.loads(capsys.readouterr().out)
    assert code == (0 if said["healthy"] else 1)
    assert {
        "run",
        "step",
        "page",
        "healthy",
        "findings",
        "explained_by",
        "healthy_share",
        "metrics",
        "not_measured",
    } == said.keys()
    assert said["metrics"] == pytest.approx(healthy.metrics, rel=1e-6)
    assert said["not_measured"] == []
    assert (tmp_path / "page.html").is_file()


def test_a_capped_logit_scale_stays_above_its_cap(ran: tuple[Recipe, RunDirectory]) -> None:
    recipe, run = ran
    state = fresh_state(recipe, CPU)
    restore_state(state, recipe, run)
    assert state.model.semantic.clip is not None
    with torch.no_grad():
        # training caps it in place in its next forward pass
        state.model.semantic.clip.log_scale.fill_(9.0)
    living(state, recipe, [], parts=["training"])
    assert float(state.model.semantic.clip.log_scale.detach()) == 9.0


def test_gradients_and_updates_are_those_of_the_next_step(
    ran: tuple[Recipe, RunDirectory], healthy: Examination
) -> None:
    recipe, run = ran
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"grad_every": 1})})
    state, data = fresh_state(recipe, CPU), sets(recipe)
    restore_state(state, recipe, run)
    row = train_step(
        state, state.objective, BatchMaker(recipe, data["latents"], GROUP)(12), recipe, GROUP
    )
    keys = [
        key
        for key in row
        if key.startswith(("grad/", "step/", "loss/", "ent/")) and key != "grad/clip_frac"
    ]
    assert len(keys) > 20
    assert {key: float(row[key]) for key in keys} == pytest.approx(
        {key: healthy.metrics[key] for key in keys}, rel=2e-3, abs=1e-6
    )


def test_a_weight_that_is_not_finite_is_named(ran: tuple[Recipe, RunDirectory]) -> None:
    recipe, run = ran
    state = fresh_state(recipe, CPU)
    restore_state(state, recipe, run)
    with torch.no_grad():
        state.parameters["velocity.blocks.1.qkv.weight"][0, 0] = torch.nan
    live = living(state, recipe, [])
    assert live.metrics["finite/parameters"] < 1
    assert live.metrics["finite/ema"] == 1
    assert live.metrics["finite/forward"] == 0
    assert live.metrics["finite/gradients"] < 1
    assert live.facts["nonfinite"]["parameter"] == "velocity.blocks.1.qkv.weight"
    assert live.facts["nonfinite"]["module"] == "velocity.blocks.1.qkv"
    assert live.facts["nonfinite"]["loss"] == "flow"


def test_a_sample_that_is_not_finite_is_named(ran: tuple[Recipe, RunDirectory]) -> None:
    recipe, run = ran

    def poisoned(recipe: Recipe, latents: LatentSet, device: torch.device) -> Any:
        true = whole_batches(recipe, latents, device)

        def batch(step: int) -> Batch:
            made = true(step)
            made.z1[2, 0, 0, 0] = torch.nan
            return made

        return batch

    found = opened(run.path, poisoned, parts=["training"])
    latents = sets(recipe)["latents"]
    assert found.facts["nonfinite"]["keys"] == [
        latents.reader.keys[BatchMaker(recipe, latents, GROUP).indices(12)[2]]
    ]
    assert found.facts["nonfinite"]["loss"] in ("flow", "clip", "dino")
    assert found.metrics["finite/gradients"] < 1


def test_an_ema_that_never_moves(
    home: Path, monkeypatch: pytest.MonkeyPatch, healthy: Examination
) -> None:
    monkeypatch.setattr(Ema, "update", lambda self, step: None)
    _, run = trained(home, "stale")
    assert opened(run.path, parts=["weights"]).metrics["ema/moved"] == pytest.approx(0.0, abs=1e-6)
    assert healthy.metrics["ema/moved"] > 0.1


def test_reversed_time(ran: tuple[Recipe, RunDirectory], monkeypatch: pytest.MonkeyPatch) -> None:
    turned = lambda network: lambda x, t, null: network(x, 8 * t - 4, null)  # noqa: E731
    monkeypatch.setattr(generate, "with_time_code", turned)
    assert again(ran, "sampler")["sampler/gap"] > 0


def test_a_bf16_solver_state(
    ran: tuple[Recipe, RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_bf16(
        config: Any, velocity_fn: Any, x: Tensor, grid: list[float], watch: Any = None
    ) -> Tensor:
        x = x.bfloat16()
        for t, after in pairwise(grid):
            v = velocity_fn(x.float(), torch.full((len(x),), (t + after) / 2)).bfloat16()
            x = x + (after - t) * v
        return x.float()

    monkeypatch.setattr(generate, "integrate", in_bf16)
    rows = again(ran, "sampler", "standard")
    assert rows["sampler/bits"] == 8
    assert rows["teacher_native/mse@100"] > rows["teacher_native/mse@5"] > 1e-7
    assert rows["teacher/mse@100"] < 1e-9


def test_a_flipped_field(ran: tuple[Recipe, RunDirectory], healthy: Examination) -> None:
    recipe, run = ran
    state = fresh_state(recipe, CPU)
    restore_state(state, recipe, run)
    with torch.no_grad():
        for name, p in state.parameters.items():
            if name.startswith("velocity.patch_out."):
                p.neg_()
                state.ema.average[name].neg_()
    flipped = living(state, recipe, []).metrics
    for key in ("flow/cos", "field/fit_x1", "field/fit_x0"):
        assert flipped[key] == pytest.approx(-healthy.metrics[key], rel=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        {
            "model.velocity": {
                "kind": "dimr",
                "widths": [16, 8],
                "depths": [3, 1],
                "heads": 2,
                "kernel": 3,
            },
            "sample.guidance_scale": 3.0,
        },
        {
            "train.precision": "bf16",
            "sample.solver": {"kind": "dopri5", "max_steps": 50},
            "model.head": {"kind": "pooled", "hidden": 8},
        },
        {
            "sample.weights": "raw",
            "sample.grid": "logit_normal",
            "loss.kl.weight": 0.0,
            "sample.solver": {"kind": "heun"},
        },
    ],
    ids=["dimr, guidance", "bf16, dopri5", "raw, heun, no KL"],
)
def test_every_kind_of_recipe_is_examined(home: Path, overrides: dict[str, Any]) -> None:
    recipe = tiny_recipe(home, **overrides)
    state = fresh_state(recipe, CPU)
    live = living(state, recipe, [])
    assert live.facts["notes"] == []
    assert [
        key
        for key, x in live.metrics.items()
        if not math.isfinite(x) or not (describe(key) or key.startswith("trivial/"))
    ] == []
    assert live.metrics["sampler/gap"] == pytest.approx(0.0, abs=1e-9)
    assert live.metrics["same_batch/ratio"] == pytest.approx(1.0, abs=0.02)
    assert live.metrics["sampler/psnr"] == 99


def test_what_cannot_be_read_costs_its_own_numbers_alone(
    ran: tuple[Recipe, RunDirectory], healthy: Examination, tmp_path: Path
) -> None:
    """Training pictures, or one caption: the rest of the part is there, and a note says why."""
    subject = open_subject(find_checkpoint(ran[1].path))

    def lacking(latents: LatentSet) -> tuple[set[str], list[str]]:
        made = examine(replace(subject, latents=latents), batch=8, parts=["data", "autoencoder"])
        whole = again(ran, "data", "autoencoder")
        return whole.keys() - made.metrics.keys(), made.facts["notes"]

    gone = replace(subject.latents, pictures=(tmp_path / "gone.tar",))
    lost, notes = lacking(gone)
    assert all("gone.tar" in note for note in notes)
    assert {note.split(":")[0] for note in notes} == {"data", "autoencoder"}
    assert {"latent/stale_share", "latent/fit_slope_train"} <= lost
    assert all(key.startswith(("latent/", "data/colour", "data/side")) for key in lost)

    class Unreadable(LatentSet):
        def captions(self, index: int) -> list[str]:
            if index == 40:
                raise InputError("sample 40: no caption")
            return super().captions(index)

    lost, notes = lacking(Unreadable(**vars(subject.latents)))
    assert notes == ["data: captions: sample 40: no caption"]
    assert lost
    assert all(key.startswith("data/caption_") for key in lost)
