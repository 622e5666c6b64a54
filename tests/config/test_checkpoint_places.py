"""Where checkpoints are sent, and which is the best: what a recipe may say."""

from __future__ import annotations

import pytest
from support import assert_refused

from flowray.config.errors import InputError
from flowray.config.load import load_recipe


def loaded(value: str, key: str = "train.checkpoint_url") -> object:
    return load_recipe("quickstart", [f"{key}={value}"]).recipe.train


def test_a_bucket_is_an_address_and_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_BUCKET", "mine")
    assert loaded("s3://$SOME_BUCKET/runs/").checkpoint_url == "s3://mine/runs"
    for value in ("runs", "https://host/runs", "file:///runs", "hf://me/runs"):
        assert_refused(lambda v=value: loaded(v), InputError, "s3:// or gs://")
    assert_refused(lambda: loaded("s3://"), InputError, "checkpoint_url")


def test_no_secret_goes_into_a_recipe_or_a_message() -> None:
    with pytest.raises(InputError, match="credentials belong in the environment") as caught:
        loaded("s3://name:hidden@host/runs")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("key", ["ema/delta_rms", "ema/nonsense"])
def test_the_best_wants_a_direction(key: str) -> None:
    assert loaded("ema/shoot/nmse", "train.keep_best").checkpoints_on_disk == 3
    assert_refused(lambda: loaded(key, "train.keep_best"), InputError, f"keep_best {key}: ")
