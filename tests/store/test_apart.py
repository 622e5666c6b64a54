"""Work in a process of its own: it shows and fails here, and this process keeps nothing of it."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from apart_work import count, die, refuse, wait
from support import Heard, tiny_recipe

from flowray.config.errors import InputError
from flowray.store.apart import apart
from flowray.store.latents import ensure_latents, ensure_latents_apart


def test_what_it_tells_shows_here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    heard = Heard()
    apart(partial(count, tmp_path / "pid"), heard)
    assert int((tmp_path / "pid").read_text()) != os.getpid()
    assert (heard.tasks, heard.said) == ({"outer": 2, "inner": 3}, ["a remark"])
    assert capfd.readouterr().out == ""


def test_it_fails_here() -> None:
    with pytest.raises(InputError, match=r"^data\.shards: bad$"):
        apart(refuse, Heard())
    with pytest.raises(RuntimeError, match="exit code 9"):
        apart(die, Heard())


def test_ended_early_it_leaves_nothing_behind(tmp_path: Path) -> None:
    class Impatient(Heard):
        def say(self, text: str) -> None:
            assert [path.name for path in tmp_path.glob(".*/*")] == [text]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apart(partial(wait, tmp_path / "out"), Impatient())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_latents_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded apart where there is a GPU; here the other process finds none and takes the CPU."""
    recipe, heard = tiny_recipe(tmp_path), Heard()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ensure_latents_apart(recipe, heard)
    assert heard.tasks["encoding train pictures"] == 64
    there = Heard()
    ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent, there)
    assert not any("encoding" in what for what in there.tasks)
