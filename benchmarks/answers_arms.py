"""The arms of `benchmarks answers`, known to its help without torch."""

from __future__ import annotations

from collections.abc import Mapping

# source and condition -> the recipe and what is typed behind it
ARMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "text": ("quickstart", ("model.velocity.condition={kind: none}",)),
    "text_adaln": ("quickstart", ()),
    "noise_adaln": ("quickstart_noise", ()),
}
