"""The table of recipe keys: complete, with aliases that lead to keys, and a value's type."""

from __future__ import annotations

import pytest

from flowray.config.aliases import ALIASES, HINTS
from flowray.config.errors import InputError
from flowray.config.model import GridHead, TransEncoderHead
from flowray.config.recipe import Recipe
from flowray.config.schema import coerce, known_keys


def test_known_keys_cover_every_union_member() -> None:
    keys = known_keys()
    assert {
        "optim.lr",
        "model.head",
        "model.head.heads",
        "model.head.mlp",
        "loss.kl.schedule.floor",
        "flow.time.low",
    } <= set(keys)
    assert {slot.owner for slot in keys["model.head.heads"]} == {GridHead, TransEncoderHead}
    assert len(keys["model.head.kind"]) == 4


def test_every_key_of_the_defaults_is_known() -> None:
    def walk(node: object, prefix: str = "") -> list[str]:
        if not isinstance(node, dict):
            return [prefix[:-1]]
        return [key for name, value in node.items() for key in walk(value, f"{prefix}{name}.")]

    assert set(walk(Recipe().model_dump())) <= set(known_keys())


def test_aliases_lead_to_keys_that_exist() -> None:
    assert set(ALIASES.values()) <= set(known_keys())
    assert not set(ALIASES) & set(HINTS)
    for wanted in ("learning_rate", "batch", "workers", "num_gpus", "beta_kl", "w_clip"):
        assert wanted in ALIASES
    top_level = {key for key in known_keys() if "." not in key}
    assert not top_level & (set(ALIASES) | set(HINTS))


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("optim.lr", "1e-4", 1e-4),
        ("model.head.heads", "8", 8),
        ("model.head.kind", "conv", "conv"),
        ("flow.time.low", -2, -2.0),
    ],
)
def test_coerce_takes_any_union_member(key: str, given: object, value: object) -> None:
    got = coerce(key, given)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("optim.lr", True, "optim.lr: got true, want a number > 0"),
        ("train.steps", 2.5, "train.steps: got 2.5, want a whole number > 0"),
        (
            "model.head.kind",
            "poled",
            (
                "model.head.kind: got 'poled', want one of pooled, grid, conv, transencoder, did"
                " you mean pooled?"
            ),
        ),
        (
            "model.head",
            1,
            "model.head is a section, not a value; set one of its keys: model.head.kind",
        ),
        ("optim.lrr", 1, "unknown key optim.lrr, did you mean optim.lr?"),
    ],
)
def test_coerce_refuses_in_one_line(key: str, given: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        coerce(key, given)
    assert str(caught.value).startswith(message)
