"""The plan: every packaged recipe, at full scale, without weights, network or memory."""

from __future__ import annotations

import re
import resource
import socket
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_recipe, tiny_text
from transformers import Qwen2Config, Qwen2Model

from flowray.cli.plan import kept_behind_queries, kept_per_sample, make_plan, show_plan
from flowray.config.errors import InputError
from flowray.config.load import load_recipe, override_recipe, recipe_diffs, recipe_names
from flowray.config.progress import SILENT
from flowray.model.assemble import FlowModel, build_model, part_sizes, planned_model
from flowray.model.local import local_weights

FULL = ("crossflow_256", "crossflow_512", "crossflow_dit", "openuni_512", "fieldnotes_256")


@lru_cache
def plan_of(name: str) -> dict[str, Any]:
    return make_plan(load_recipe(name).recipe)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError(f"a plan asked the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_plans(name: str) -> None:
    recipe, plan = load_recipe(name).recipe, plan_of(name)
    assert all(count > 0 for count in plan["parameters"].values())
    assert {"text.backbone", "autoencoder"} <= plan["parameters"].keys()
    assert ("head" in plan["parameters"]) == (recipe.model.source.kind == "text")
    assert ("head" in plan["tokens"]) == ("head" in plan["parameters"])
    assert any(part.startswith("velocity.") for part in plan["parameters"])
    assert plan["images"] == recipe.train.steps * recipe.train.batch_size
    assert (
        plan["memory_per_gpu"]["adamw"]
        == 2 * plan["memory_per_gpu"]["gradients"]
        == 8 * plan["trainable"]
    )
    assert plan["checkpoint_bytes"] == 16 * plan["trainable"]


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - {"base"}))
def test_every_packaged_recipe_says_what_it_is(name: str) -> None:
    text = (files("flowray") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert any(f"python -m flowray.train {name}" in line for line in head)
    card = load_recipe(name).recipe.card
    assert card.title
    if name in (*FULL, "overfit", "digits"):
        assert all(
            any(line.startswith(f"# {word}:") for line in head)
            for word in ("Command", "Cost", "Expect")
        )
        named = card.notes.partition("differs from ")[2].partition(": ")[2].split("; ")
        assert 2 <= len(named) <= 4, named


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        (
            "crossflow_256",
            {"velocity.transformer": 749.97, "velocity.convnext_1": 200.81, "head": 110.16},
        ),
        (
            "crossflow_512",
            {
                "velocity.transformer": 750.02,
                "velocity.convnext_1": 200.81,
                "velocity.convnext_2": 34.61,
                "head": 97.48,
            },
        ),
        ("crossflow_dit", {"velocity.blocks": 1062.37, "velocity.time": 1.969, "head": 142.43}),
        ("openuni_512", {"text.queries": 0.2294, "text.connector": 54.431}),
    ],
)
def test_published_counts(name: str, millions: dict[str, float]) -> None:
    for part, published in millions.items():
        assert plan_of(name)["parameters"][part] / 1e6 == pytest.approx(published, rel=0.01), part


def test_published_output_heads_of_the_tower() -> None:
    """20.988 M behind the SigLIP tower at 256 px (MLP), 21.804 M at 512 (convolutions)."""
    for name, published in (("crossflow_256", 20.988), ("crossflow_512", 21.804)):
        recipe = load_recipe(name).recipe
        tower = planned_model(recipe.model, recipe.loss).semantic.clip.tower.out
        assert sum(p.numel() for p in tower.parameters()) / 1e6 == pytest.approx(
            published, rel=0.01
        )


def test_units_are_converted() -> None:
    """A weight w on the summed KL is w D on the mean that loss/kl is."""
    for name in ("crossflow_256", "crossflow_512", "crossflow_dit"):
        recipe = load_recipe(name).recipe
        assert recipe.loss.kl.weight == pytest.approx(1e-2 * recipe.model.latent.dims)
    notes = load_recipe("fieldnotes_256").recipe
    assert notes.loss.kl.weight == pytest.approx(0.069 / 70 * notes.model.latent.dims, rel=0.02)


@pytest.mark.parametrize(
    ("name", "before", "count"),
    [("fieldnotes_256", "one override each:", 11), ("openuni_512", "overrides together:", 6)],
)
def test_the_overrides_that_a_header_offers_load(name: str, before: str, count: int) -> None:
    text = (files("flowray") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    block = text.partition(before)[2].partition("base: base")[0]
    cures = [
        word.strip("'") for word in re.findall(r"'[^']+'|\b[a-z_]+(?:\.[a-z0-9_]+)+=\S+", block)
    ]
    assert len(cures) == count
    together = load_recipe(name, cures).recipe
    changed = recipe_diffs(load_recipe(name).recipe, together)
    assert all(any(key.startswith(cure.partition("=")[0]) for key in changed) for cure in cures), (
        cures
    )


def test_nothing_is_allocated() -> None:
    """crossflow_dit has 6 G parameters, 24 GB; its plan takes an eighth of that at the very most.

    What it does take is modules that are imported, which differs from machine to machine.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recipe = load_recipe("crossflow_dit").recipe
    make_plan(recipe)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3_000_000  # KiB
    model = planned_model(recipe.model, recipe.loss)
    assert {p.device.type for p in [*model.parameters(), *model.velocity.buffers()]} == {"meta"}


def test_counts_are_those_of_the_model_it_would_build(tmp_path: Path) -> None:
    connector = {"layers": 1, "hidden": 32, "intermediate": 16, "heads": 2, "out": 24}
    recipe = tiny_recipe(
        tmp_path,
        **{
            "loss.clip.weight": 1.0,
            "model.text.connector": connector,
            "model.head.kind": "transencoder",
        },
    )
    recipe = override_recipe(
        recipe, {"model.head.heads": 1, "model.head.layers": 1, "model.velocity.kind": "dimr"}
    )
    plan = make_plan(recipe)
    real = build_model(recipe.model, recipe.loss, 0)
    assert {
        part: n for part, n in plan["parameters"].items() if part != "autoencoder"
    } == part_sizes(real)
    assert plan["trainable"] == sum(p.numel() for p in real.trainable().values())
    assert "text.connector" in plan["parameters"]


def test_absent_text_counts_as_the_recipe_says(tmp_path: Path) -> None:
    here = tiny_recipe(tmp_path)
    size = make_plan(here)["parameters"]["text.backbone"]
    gone = {"model.text.path": "nobody/nothing", "model.text.width": 32}
    absent = make_plan(override_recipe(here, {**gone, "model.text.parameters": size}))
    assert absent["parameters"] == make_plan(here)["parameters"]
    memory, known = absent["memory_per_gpu"], make_plan(here)["memory_per_gpu"]
    assert {**memory, "text_activations_estimate": 0} == {**known, "text_activations_estimate": 0}
    assert memory["text_activations_estimate"] == pytest.approx(
        known["text_activations_estimate"], rel=0.7
    )
    assert "text.backbone" not in make_plan(override_recipe(here, gone))["parameters"]
    with pytest.raises(InputError, match=r"model\.text\.width"):
        make_plan(override_recipe(here, {"model.text.path": "nobody/nothing"}))


def test_weights_it_needs(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    assert [(w["key"], w["present"]) for w in make_plan(recipe)["weights"]] == [
        ("model.text.path", True),
        ("model.autoencoder.path", True),
    ]
    named = {w["key"]: w for w in plan_of("crossflow_256")["weights"]}
    # the tower starts from random weights
    assert named.keys() == {"model.text.path", "model.autoencoder.path"}
    assert local_weights(str(tiny_text(tmp_path / "text"))) == tmp_path / "text"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert local_weights(str(tmp_path / "empty")) is None
    assert local_weights("nobody/nothing") is None


def test_a_picture_encoder_that_is_not_here_takes_its_sizes() -> None:
    keys = ["loss.clip.weight=1", "model.semantic.kind=image", "model.semantic.net.path=org/absent"]
    with pytest.raises(InputError) as caught:
        make_plan(load_recipe("quickstart", keys).recipe)
    typed = re.search(r"'(model\.semantic\.net\.dims=.*)'", str(caught.value))
    assert typed, str(caught.value)
    recipe = load_recipe("quickstart", [*keys, typed[1].replace("N", "32")]).recipe
    assert make_plan(recipe)["parameters"]["semantic.clip"] > 0


def test_memory_follows_the_run(tmp_path: Path) -> None:
    def memory(**overrides: Any) -> dict[str, int]:
        return make_plan(tiny_recipe(tmp_path, **overrides))["memory_per_gpu"]

    plain = memory()["activations_estimate"]
    assert memory(**{"train.batch_size": 16})["activations_estimate"] == 2 * plain
    assert memory(**{"train.accumulate": 2})["activations_estimate"] == plain // 2
    assert memory(**{"train.precision": "bf16"})["activations_estimate"] == plain // 2
    assert (
        memory(**{"model.velocity.gradient_checkpointing": True})["activations_estimate"]
        < 0.8 * plain
    )
    assert (
        memory(**{"model.text.dtype": "bf16"})["text_activations_estimate"]
        == memory()["text_activations_estimate"] // 2
    )
    assert "text_cache_at_most" not in memory()
    kept = memory(**{"model.text.cache": True, "model.text.cache_gib": 0.5})
    assert kept["text_cache_at_most"] == 2**29
    assert "loss_gradients" not in memory()
    apart = memory(**{"loss.balance.kind": "shares", "loss.clip.weight": 1.0})
    assert (
        apart["loss_gradients"]
        == 3 * apart["gradients"]
        == memory(**{"train.grad_every": 2, "loss.clip.weight": 1.0})["loss_gradients"]
    )
    assert "ddp_buckets" not in memory()
    assert memory(**{"resources.num_workers": 2})["ddp_buckets"] == memory()["gradients"]


def really_kept(model: FlowModel, forward: Callable[[], object]) -> int:
    """Bytes that a pass on the CPU saves for the backward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = forward()
    assert held is not None
    return sum(storage.nbytes() for storage in kept.values())


def test_memory_of_a_worker_that_holds_a_part(tmp_path: Path) -> None:
    def memory(**overrides: Any) -> dict[str, int]:
        recipe = tiny_recipe(tmp_path, **{"resources.num_workers": 4, **overrides})
        return make_plan(recipe)["memory_per_gpu"]

    whole, full = memory(), memory(**{"resources.shard": "full"})
    trained = whole["gradients"]
    for name in ("gradients", "adamw", "ema"):
        assert full[name] == whole[name] // 4
    assert whole["weights"] - full["weights"] == trained - trained // 4
    assert "ddp_buckets" in whole
    assert "ddp_buckets" not in full
    recipe = tiny_recipe(tmp_path)
    model = planned_model(recipe.model, recipe.loss)
    blocks = [4 * sum(p.numel() for p in b.parameters()) for b in model.velocity.blocks_in_order()]
    rest = trained - sum(blocks)
    assert full["gathered_weights"] == rest + 2 * blocks[0]
    assert full["gathered_gradients"] == rest + blocks[0]
    half = memory(**{"resources.shard": "full", "train.precision": "bf16"})
    assert half["gathered_weights"] == rest + blocks[0]
    several = memory(**{"resources.shard": "full", "train.accumulate": 2})
    assert several["gathered_gradients"] == trained
    text = memory(**{"resources.shard": "full", "resources.shard_text": True})
    frozen = 4 * part_sizes(model)["text.backbone"]
    assert full["weights"] - text["weights"] == frozen - frozen // 4
    # while a worker probes it holds all weights, and no activations
    few = {"resources.shard": "full", "train.batch_size": 4, "model.velocity.width": 256}
    probing = memory(**few)
    trainable = planned_model(tiny_recipe(tmp_path, **few).model, recipe.loss).trainable()
    largest = max(p.numel() for p in trainable.values())
    shown = 4 * sum(p.numel() for p in trainable.values()) + 4 * 2 * largest
    active = probing["activations_estimate"] + probing.get("text_activations_estimate", 0)
    assert probing["probes"] == shown - active > 0
    assert memory(**few, **{"resources.shard_text": True})["probes"] - probing["probes"] == frozen
    nodes = memory(
        **{"resources.num_workers": 16, "resources.shard": "hybrid", "train.batch_size": 16}
    )
    assert nodes["ema"] == whole["ema"] // 8


def test_activations_are_about_what_a_real_pass_keeps(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path,
        **{"model.velocity.width": 64, "model.velocity.depth": 4, "model.text.queries": 64},
    )
    planned, model = (
        planned_model(recipe.model, recipe.loss),
        build_model(recipe.model, recipe.loss, 0),
    )
    prompts = model.text.tokenize([" ".join(["red"] * 39)])
    assert prompts.ids.shape[1] == recipe.model.text.max_tokens
    tokens = model.text(prompts)

    def rest() -> object:
        mu, logvar = model.head(tokens)
        return logvar, model.velocity(mu, torch.zeros(1), torch.zeros(1, dtype=torch.bool))

    assert kept_per_sample(planned) == pytest.approx(really_kept(model, rest), rel=0.1)
    assert kept_behind_queries(planned, 0) == pytest.approx(
        really_kept(model, lambda: model.text(prompts)), rel=0.2
    )


def test_an_absent_language_model_keeps_about_what_one_of_its_size_does() -> None:
    """InternVL3-1B's language model: 24 layers of Qwen2."""
    recipe = load_recipe("openuni_512").recipe
    shape = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151674,
    }
    guess = kept_behind_queries(
        planned_model(recipe.model, recipe.loss), recipe.model.text.parameters or 0
    )
    planned = planned_model(recipe.model, recipe.loss)
    with torch.device("meta"):
        planned.text.backbone = Qwen2Model(
            Qwen2Config(num_hidden_layers=24, **shape)
        ).requires_grad_(False)
    assert (
        sum(p.numel() for p in planned.text.backbone.parameters()) == recipe.model.text.parameters
    )
    assert guess == pytest.approx(kept_behind_queries(planned, 0), rel=0.2)


def test_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    show_plan(tiny_recipe(tmp_path), SILENT, as_json=False)
    shown = capsys.readouterr().out
    assert all(
        part in shown
        for part in (
            "velocity.blocks",
            "together, about",
            "model.text.path",
            "tokens a sample",
            "a checkpoint is",
        )
    )
