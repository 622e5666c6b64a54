"""Errors for wrong arguments of the functions of flow/ and losses/: what was wanted, what came.

Shapes that merely broadcast, and names that fall through to a default, would train something else
without a word. The checks look at shapes and types; values are read on the CPU only, since asking
a GPU for one would make every step wait.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from flowray.config.errors import did_you_mean

ROUNDING = 1e-5  # by which a time may lie outside [0, 1]: a solver's sums of steps end near 1


def described(value: Any) -> str:
    """A value in few words: a tensor's shape and type, else its text and type."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    text = repr(value)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{shown} ({type(value).__name__})"


def floating(name: str, value: Any, shape: str, ndim: int | None = None) -> None:
    """TypeError unless the value is a floating point tensor, ValueError unless it has `ndim` axes.

    shape: the wanted one in words, such as (B, C, H, W).
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: want a floating point tensor {shape}, got {described(value)}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name}: want shape {shape}, got {tuple(value.shape)}")


def alike(shape: str, **values: Any) -> None:
    """TypeError unless all are floating point tensors, ValueError unless they have one shape."""
    for name, value in values.items():
        floating(name, value, shape)
    if len({value.shape for value in values.values()}) > 1:
        got = ", ".join(f"{name} {tuple(value.shape)}" for name, value in values.items())
        raise ValueError(f"want {' and '.join(values)} of one shape {shape}, got {got}")


def times(t: Any, batch: int | None = None) -> None:
    """TypeError unless t is an fp32 or fp64 tensor, ValueError unless it is (B,) in [0, 1]."""
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.itemsize < 4:
        raise TypeError(f"t: want times (B,) in [0, 1] as an fp32 tensor, got {described(t)}")
    if t.ndim != 1:
        raise ValueError(f"t must be 1-D (B,), got shape {tuple(t.shape)}")
    if batch is not None and len(t) != batch:
        raise ValueError(f"t: want a time for each of the {batch} samples, got {len(t)}")
    if t.device.type == "cpu" and len(t):
        low, high = (float(x) for x in t.detach().aminmax())
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            raise ValueError(f"t: want times in [0, 1], got {low:.6g} to {high:.6g}")


def one_of(name: str, value: Any, allowed: Collection[str]) -> None:
    """ValueError unless the value is one of the allowed names."""
    if not isinstance(value, str) or value not in allowed:
        near = did_you_mean(value, list(allowed)) if isinstance(value, str) else ""
        raise ValueError(f"{name}: want one of {', '.join(allowed)}, got {described(value)}{near}")


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """TypeError unless the value is a plain number, ValueError unless it lies in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: want a number, got {described(value)}")
    if not (low <= float(value) <= high and math.isfinite(value)):
        span = f" from {low:g}" if high == math.inf else f" from {low:g} to {high:g}"
        span = "" if low == -math.inf else span
        raise ValueError(f"{name}: want a finite number{span}, got {value!r}")


def count(name: str, value: Any, low: int) -> None:
    """TypeError unless the value is an integer, ValueError unless it is at least `low`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: want an integer, got {described(value)}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def member(name: str, config: Any, table: Mapping[type, Any]) -> Any:
    """The table's entry for the type of the config; TypeError where it has none."""
    try:
        return table[type(config)]
    except KeyError:
        names, got = ", ".join(kind.__name__ for kind in table), described(config)
        fields = {kind: getattr(kind, "model_fields", {}).get("kind") for kind in table}
        same = [kind for kind, field in fields.items() if field and field.default == config]
        near = f"; did you mean {same[0].__name__}()?" if same else ""
        raise TypeError(f"{name}: want a config, one of {names}, got {got}{near}") from None
