"""The card states what the log asks for, stays a comment, and keeps what a person wrote."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from flowray.config.card import git_commit, header, key_diffs, render_card
from flowray.config.load import Loaded, dump_recipe, load_recipe

FACTS = {"exp_id": "exp_20250903_A", "commit": "main / abc1234", "hardware": "2 CPU cores"}
LOGS_FIELDS = [
    "EXP_ID",
    "TITLE",
    "PURPOSE",
    "KEY_DIFFS",
    "DATASET",
    "HARDWARE",
    "BRANCH/COMMIT",
    "CORE PARAMS",
    "TAGS",
    "NOTES",
]


@pytest.fixture
def loaded() -> Loaded:
    overrides = [
        "name=try",
        "seed=3",
        "storage_path=/x",
        "card.title=five layers",
        "card.purpose=does a pooled head do?",
        "card.tags=[ablation, 5L]",
        "card.notes=line one\nseed: 99",
        "model.head.kind=pooled",
        "optim.lr=2e-4",
    ]
    return load_recipe("base", overrides)


def fields(block: str) -> dict[str, str]:
    return {
        m[1].strip(): m[2]
        for line in block.splitlines()
        if (m := re.fullmatch(r"# ([A-Z_/ ]+?) *: ?(.*)", line))
    }


def test_the_header_has_the_logs_fields_in_the_logs_order(loaded: Loaded) -> None:
    found = fields(header(loaded.recipe, loaded.diffs, **FACTS))
    assert list(found) == LOGS_FIELDS
    assert found["EXP_ID"] == "exp_20250903_A"
    assert found["TITLE"] == "five layers"
    assert found["KEY_DIFFS"] == "model.head.kind=pooled (was grid), optim.lr=0.0002 (was 0.001)"
    assert found["DATASET"] == "shapes"
    assert found["BRANCH/COMMIT"] == "main / abc1234"
    assert found["CORE PARAMS"] == "lr=0.0002, batch=32, latent=4x8x8, steps=1000, seed=3"
    assert found["TAGS"] == "[ablation, 5L]"
    assert found["NOTES"] == "line one seed: 99"


def test_a_config_with_its_header_loads_as_the_same_recipe(tmp_path: Path, loaded: Loaded) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(header(loaded.recipe, loaded.diffs, **FACTS) + dump_recipe(loaded.recipe))
    assert load_recipe(str(path)).recipe == loaded.recipe


def test_what_the_recipe_states_wins() -> None:
    loaded = load_recipe("base", ["card.hardware=A100 x 64", "card.dataset=24M pairs"])
    found = fields(header(loaded.recipe, loaded.diffs, **FACTS))
    assert (found["HARDWARE"], found["DATASET"]) == ("A100 x 64", "24M pairs")


@pytest.mark.parametrize(
    ("own", "typed", "says"),
    [
        ("", [], "shapes, 12k procedural pictures whose captions name a part of them"),
        ("", ["data.shards=shapes"], "shapes, 12k procedural pictures"),
        ("", ["data.shards=digits"], "digits"),
        ("", ["data.shards=digits", "card.dataset=scans"], "scans"),
        ("", ["card.dataset=scans", "data.shards=digits"], "scans"),
        ("data: {shards: mine}", [], "/mine"),
        ("data: {shards: mine}\ncard: {dataset: birds}", [], "birds"),
        ("data: {shards: mine}\ncard: {dataset: birds}", ["data.shards=digits"], "digits"),
        ("data: {limit: 10}", [], "shapes, 12k procedural pictures"),
    ],
)
def test_the_dataset_is_the_one_that_is_trained_on(
    tmp_path: Path, own: str, typed: list[str], says: str
) -> None:
    """Not the base recipe's, where other shards were named and nothing was said of them."""
    path = tmp_path / "own.yaml"
    path.write_text(f"base: quickstart\n{own}\n")
    loaded = load_recipe(str(path), typed)
    found = fields(header(loaded.recipe, loaded.diffs, **FACTS))["DATASET"]
    assert found.endswith(says) if says.startswith("/") else found.startswith(says)
    again = tmp_path / "config.yaml"
    again.write_text(dump_recipe(loaded.recipe))
    assert load_recipe(str(again)).recipe == loaded.recipe


def test_key_diffs_are_few() -> None:
    assert key_diffs({"name": ("a", "b"), "seed": (0, 1)}) == "none: the base as it is"
    diffs = {f"train.k{n}": (n, n + 1) for n in range(6)}
    assert (
        key_diffs(diffs)
        == ", ".join(f"train.k{n}={n + 1} (was {n})" for n in range(4)) + " and 2 more"
    )


def render(path: Path, loaded: Loaded, step: int = 10, **metrics: float) -> str:
    said = {"ema/flow/cos": "good (0.5 to 1)"}
    strips = ["samples/step_10.png"]
    render_card(
        path,
        loaded.recipe,
        loaded.diffs,
        **FACTS,
        metrics=metrics,
        step=step,
        verdicts=said,
        samples=strips,
    )
    return path.read_text(encoding="utf-8")


def test_the_card_has_all_its_sections(tmp_path: Path, loaded: Loaded) -> None:
    text = render(tmp_path / "card.md", loaded, **{"shoot/nmse": 0.2834, "ema/flow/cos": 0.91})
    assert re.findall("^## (.*)$", text, re.M) == [
        "Goal",
        "Settings (difference from the base)",
        "Metrics and records",
        "Conclusion",
        "Next step",
    ]
    assert "# five layers" in text
    assert "does a pooled head do?" in text
    assert "- `model.head.kind`: grid → pooled" in text
    assert "| `shoot/nmse` | 0.2834 | - | lower |  |" in text
    assert "| `ema/flow/cos` | 0.91 | cosine | higher | good (0.5 to 1) |" in text
    assert "keep / reject / re-verify" in text
    assert "![samples/step_10.png](samples/step_10.png)" in text
    assert [item.name for item in tmp_path.iterdir()] == ["card.md"]


def test_hand_written_text_survives_and_numbers_are_renewed(tmp_path: Path, loaded: Loaded) -> None:
    path = tmp_path / "card.md"
    text = render(path, loaded, **{"shoot/nmse": 0.5})
    mine = "**keep**: 形状出来了\n\n```\n## not a heading\n```"
    text = text.replace("- keep / reject / re-verify: not judged yet", mine).replace(
        "does a pooled head do?", "my own goal"
    )
    path.write_text(
        text.replace("## Next step\n\n-", "## Next step\n\ntry 2x lr\n\n## Remarks\n\nof my own"),
        encoding="utf-8",
    )
    again = render(path, loaded, step=20, **{"shoot/nmse": 0.25})
    assert mine in again
    assert "my own goal" in again
    assert "does a pooled head do?" not in again
    assert "## Next step\n\ntry 2x lr\n" in again
    assert "## Remarks\n\nof my own\n" in again
    assert "0.25" in again
    assert "| 0.5 |" not in again
    assert render(path, loaded, step=20, **{"shoot/nmse": 0.25}) == again


def test_git_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() == ""

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-b", "dev")
    assert git_commit() == ""
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    commit = git("rev-parse", "--short", "HEAD")
    assert git_commit() == f"dev / {commit}"
    (tmp_path / "file").write_text("2")
    assert git_commit() == f"dev / {commit} + local changes"
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_commit() == ""
