"""A model that was made and trained elsewhere, by docs/bring-your-own.md: what the doctor says of
it as it is, and with a fault at its interface.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import answering_model, tiny_recipe
from torch import Tensor, nn

from flowray.cli.common import FINDINGS
from flowray.cli.doctor import main
from flowray.config.errors import InputError
from flowray.config.flow import SampleConfig
from flowray.config.keys import describe
from flowray.config.losses import LossConfig
from flowray.config.model import TextSource
from flowray.data.make import png, sample
from flowray.data.shapes import samples
from flowray.data.shards import write_shards
from flowray.doctor.battery import PARTS
from flowray.doctor.foreign import ASKED, SKIPPED, Report, examine_foreign, open_foreign
from flowray.findings.rules import RULES
from flowray.findings.rules_foreign import FOREIGN, INTERFACE
from flowray.model.assemble import FlowModel
from flowray.model.autoencoder import load_autoencoder
from flowray.model.foreign import Brought
from flowray.sample.generate import generate_latents, source_noise

PAGE = Path(__file__).parents[2] / "docs" / "bring-your-own.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    for split, count in (("train", 800), ("val", 128)):
        drawn = samples(count, split, 0, two_share=0.0)  # type: ignore[arg-type]
        write_shards(
            folder / "shards" / split,
            (
                sample(f"{split}-{i:05d}", png(picture), captions, {"scene": scene.as_json()})
                for i, (picture, captions, scene) in enumerate(drawn)
            ),
            meta={},
        )
    return folder


@pytest.fixture(scope="module")
def page(shards: Path) -> dict[str, Any]:
    """The names that the page's code has made, run in the folder of the shards."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shards)
        for block in blocks():
            exec(block, names)
    return names


def ids(report: Report) -> set[str]:
    return {finding.id for finding in report.findings if finding.severity != "info"}


class Wrapped(nn.Module):
    """A model whose methods are replaced."""

    def __init__(self, model: Any, **methods: Callable[..., Any]):
        super().__init__()
        self.model = model
        for name in ("encode_text", "encode_image", "velocity", "decode"):
            setattr(self, name, methods.get(name, getattr(model, name)))
        if "posterior" in methods:
            self.posterior = methods["posterior"]


def examined(model: Any, shards: Path, **options: Any) -> Report:
    train, val = (str(shards / "shards" / split) for split in ("train", "val"))
    settings = {"limit": 120, "batch": 32, "steps": 10} | options
    return examine_foreign(model, train, held_out=val, **settings)


def test_a_model_in_order_has_but_a_coarse_autoencoder_and_paints(page: dict[str, Any]) -> None:
    report: Report = page["report"]
    assert ids(report) == {"vae_poor"}
    numbers = page["numbers"]
    assert numbers["flow/cos"] > 0.6
    assert numbers["foreign/nmse_told"] == pytest.approx(numbers["flow/nmse"], rel=0.05)
    assert numbers["foreign/nmse_reversed"] > 2 * numbers["foreign/nmse_told"]
    assert [key for key in numbers if describe(key.removeprefix("trivial/")) is None] == []
    assert page["drawn"].shape == (1, 64, 64, 3)
    assert page["drawn"].dtype == np.uint8


def test_what_is_not_asked_is_named(page: dict[str, Any]) -> None:
    report: Report = page["report"]
    assert set(PARTS) - set(ASKED) <= {name.split()[0] for name in SKIPPED}
    assert {f"{part}: {why}" for part, why in SKIPPED.items()} <= set(
        report.examination.facts["notes"]
    )
    assert report.skipped == SKIPPED
    ours = ("lr/", "ema/", "optim/", "seam/", "grad/", "time/share_t", "moved/")
    assert [key for key in report.examination.metrics if key.startswith(ours)] == []


FAULTS: dict[str, tuple[str, Callable[[Any], dict[str, Any]], dict[str, Any]]] = {
    "the sign is lost": (
        "velocity_points_back",
        lambda m: {"velocity": lambda x, t, null, text: -m.velocity(x, t, null, text)},
        {},
    ),
    "time runs the other way": (
        "time_read_otherwise",
        lambda m: {"velocity": lambda x, t, null, text: m.velocity(x, 1 - t, null, text)},
        {},
    ),
    "time in thousandths": (
        "time_read_otherwise",
        lambda m: {"velocity": lambda x, t, null, text: m.velocity(x, t / 1000, null, text)},
        {},
    ),
    "the picture for the velocity": (
        "picture_predicted",
        lambda m: {
            "velocity": lambda x, t, null, text: (
                x + (1 - t).view(-1, 1, 1, 1) * m.velocity(x, t, null, text)
            )
        },
        {},
    ),
    "the source for the velocity": (
        "source_predicted",
        lambda m: {
            "velocity": lambda x, t, null, text: (
                x - t.view(-1, 1, 1, 1) * m.velocity(x, t, null, text)
            )
        },
        {},
    ),
    "null is not looked at": (
        "guidance_ignored",
        lambda m: {
            "velocity": lambda x, t, null, text: m.velocity(x, t, torch.zeros_like(null), text)
        },
        {"guidance_scale": 2.0},
    ),
    "the scale is not undone": (
        "decode_unlike",
        lambda m: {"decode": lambda z: m.decode(4 * z)},
        {},
    ),
    "captions are not read": (
        "condition_ignored",
        lambda m: {"encode_text": lambda captions: m.encode_text(["the"] * len(captions))},
        {},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_the_interface_is_named_first(
    fault: str, page: dict[str, Any], shards: Path
) -> None:
    expected, methods, options = FAULTS[fault]
    report = examined(Wrapped(page["model"], **methods(page["model"])), shards, **options)
    named = [finding.id for finding in report.findings if finding.explained_by is None]
    assert named[0] == expected, [(f.id, f.evidence) for f in report.findings]
    assert not report.healthy


def test_paths_may_begin_at_the_text(page: dict[str, Any], shards: Path) -> None:
    def posterior(text: Any) -> tuple[Tensor, Tensor]:
        mu = text.values.sum(1)[:, :, None, None].expand(-1, -1, 1, 3)
        return mu.reshape(-1, 3, 8, 8), torch.full((len(mu), 3, 8, 8), -1.0)

    model = page["model"]
    report = examined(Wrapped(model, posterior=posterior), shards)
    metrics = report.examination.metrics
    assert metrics["logvar/min"] == metrics["logvar/max"] == -1.0
    assert metrics["mu/rms"] > 0
    assert "mu/rms" not in page["numbers"]


@pytest.mark.parametrize("kind", ["text", "noise"])
def test_a_flow_model_without_a_run_answers_as_itself(kind: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"model.source.kind": kind}
    if kind == "noise":
        keys |= {"model.velocity.condition.kind": "adaln", "loss.kl.weight": 0.0}
    recipe = tiny_recipe(tmp_path, **keys)
    model = answering_model(recipe).eval()
    autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
    opened = open_foreign(Brought(model, autoencoder), autoencoder.picture_size)
    assert (opened.model.head is None) == (kind == "noise")
    settings, prompts = SampleConfig(guidance_scale=2.0, steps=5), ["a red circle", "blue"]
    noise = source_noise(model, prompts, 0, torch.device("cpu"))
    wanted = generate_latents(model, prompts, settings, noise)
    made = generate_latents(opened.model, prompts, settings, noise)
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
    assert wanted.std() > 0.1
    torch.testing.assert_close(opened.autoencoder.decode(made), autoencoder.decode(made))
    dropping = model.config.model_copy(update={"source": TextSource(drop_null=True)})
    with pytest.raises(InputError, match="drop_null"):
        Brought(FlowModel(dropping, LossConfig(), model.text), autoencoder)


def test_what_does_not_fit_is_one_line(page: dict[str, Any], shards: Path) -> None:
    model = page["model"]
    with pytest.raises(InputError, match=r"^model: Linear has no encode_text and no .*$"):
        examined(nn.Linear(1, 1), shards)
    flat = torch.zeros(1, 3)
    wrong: dict[str, Callable[..., Any]] = {
        "velocity": lambda x, t, null, text: x[:, :1],
        "encode_image": lambda pictures: pictures.flatten(1),
        "encode_text": lambda captions: flat,
        "decode": lambda z: z,
        "posterior": lambda text: (flat, flat),
    }
    for name, method in wrong.items():
        with pytest.raises(InputError, match=rf"^model\.{name}: gave \("):
            examined(Wrapped(model, **{name: method}), shards)


def test_the_command(
    page: dict[str, Any], shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    torch.save(page["model"].state_dict(), shards / "mine.pt")
    code = "\n".join(blocks()[:1]) + (
        f"WORDS = {sorted(page['model'].place)!r}\n"
        "def made():\n    model = Mine(WORDS)\n"
        "    model.load_state_dict(torch.load('mine.pt', weights_only=True))\n"
        "    return model\n"
        "class Back(Mine):\n    def __init__(self):\n        super().__init__(WORDS)\n"
        "        self.load_state_dict(torch.load('mine.pt', weights_only=True))\n"
        "    def velocity(self, *given):\n        return -super().velocity(*given)\n"
    )
    (shards / "elsewhere.py").write_text(code)
    monkeypatch.chdir(shards)
    typed = ["--data", "shards/train", "--held-out", "shards/val", "--steps", "10", "--json"]
    typed += ["--limit", "120", "--batch", "32"]
    assert main(["--model", "elsewhere:made", *typed]) == FINDINGS
    told = json.loads(capsys.readouterr().out)
    assert [finding["id"] for finding in told["findings"]] == ["vae_poor"]
    assert (shards / "doctor.html").read_text().count("<img") > 0
    assert main(["--model", "elsewhere:Back", *typed]) == FINDINGS
    told = json.loads(capsys.readouterr().out)
    assert told["findings"][0]["id"] == "velocity_points_back"
    for wrong in ("elsewhere", "no_such_module:made", "elsewhere:nothing"):
        with pytest.raises(InputError, match=r"^--model: "):
            main(["--model", wrong, *typed])


def test_rules_are_the_doctors_own_with_no_recipe_keys() -> None:
    taken = [rule for rule in FOREIGN if rule not in INTERFACE]
    known = {rule.id: rule for rule in RULES}
    assert all(rule.when is known[rule.id].when for rule in taken)
    assert not {rule.id for rule in INTERFACE} & set(known)
    for rule in FOREIGN:
        if isinstance(rule.fix, str):
            assert not re.search(r"\b(loss|optim|train|model|flow|sample)\.\w+=", rule.fix), rule.id
