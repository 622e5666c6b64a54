"""Numbers that look like a fault and are none, or are no more than a warning."""

from __future__ import annotations

import pytest
from healthy import FACTS, HEALTHY, falling

from flowray.findings.diagnose import diagnose


def test_a_collapsed_source_is_no_sign_of_raw_moments() -> None:
    """It makes z0 small by itself; z1 is as it should be."""
    norms = {"scale/z1_norm": 16.0, "scale/z0_norm": 4.0, "scale/ratio": 4.0}
    facts = {"latent": [4, 8, 8]}
    wide = {found.id for found in diagnose(norms | {"std/mean": 0.8}, facts, [])}
    narrow = {found.id for found in diagnose(norms | {"std/mean": 0.001}, facts, [])}
    assert "moments_as_latents" in wide
    assert "moments_as_latents" not in narrow


def test_neither_digits_nor_a_narrow_source_has_latents_off_scale() -> None:
    narrow = {"scale/ratio": 7.7, "std/mean": 0.067, "latent/var": 0.94}
    for rows in ({"latent/var": 4.94, "scale/ratio": 3.4}, narrow):
        found = diagnose({**HEALTHY, **rows}, FACTS, falling(1.5, 0.27))
        assert "latent_scale_off" not in {finding.id for finding in found}


@pytest.mark.parametrize(
    "rows",
    [
        {"data/caption_same": 0.6, "data/caption_over_next": 1.5, "data/caption_classes": 2},
        {"data/caption_same": 1.0, "data/caption_over_next": 512, "data/caption_classes": 1},
        {"data/caption_same": 0.1, "data/caption_over_next": 9.0, "data/caption_wordless": 0.1},
        {"loss/clip": 8.0, "clip/chance": 3.5},  # a scale too high for what it is of
    ],
)
def test_captions_made_on_purpose_and_a_high_loss_are_no_faults(rows: dict[str, float]) -> None:
    found = diagnose({**HEALTHY, **rows}, FACTS, falling(1.5, 0.27))
    silent = {"captions_repeat", "captions_empty", "contrastive_wrong"}
    assert silent.isdisjoint(finding.id for finding in found)


def test_captions_do_not_explain_a_poor_autoencoder() -> None:
    rows = {"data/captions_wrong": 0.21, "data/captions_wrong_low": 0.15, "vae/psnr": 17.0}
    found = {f.id: f for f in diagnose({**HEALTHY, **rows}, FACTS, falling(1.5, 0.27))}
    assert {"captions_partly_wrong", "vae_poor"} <= found.keys()


def test_what_a_natural_set_may_have_is_no_more_than_a_warning() -> None:
    for rows, id in (
        ({"data/side_across_high": 0.61, "data/side_across_low": 0.46}, "pictures_mirrored"),
        ({"data/captions_wrong_low": 0.15}, "captions_partly_wrong"),
    ):
        found = {f.id: f for f in diagnose({**HEALTHY, **rows}, FACTS, falling(1.5, 0.27))}
        assert found[id].severity == "warn"
        assert " or " in found[id].cause
