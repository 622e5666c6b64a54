"""The JSON schema of sweep files, by which editors complete and check them as they are typed
(`flowray.tune --schema`).
"""

from __future__ import annotations

import re
from typing import Any

from flowray.config.keys import KEYS, alternatives
from flowray.config.schema import known_keys, want
from flowray.sweepconfig.parameters import RAY_FIELDS_WITH, accepted_distributions
from flowray.sweepconfig.priors import FIELD_NOTES
from flowray.sweepconfig.stop import KINDS
from flowray.sweepconfig.sweep import Sweep

# an editor reads 1e-4 as a number, PyYAML as text: both are taken
_NUMBER = {
    "anyOf": [
        {"type": "number"},
        {"type": "string", "pattern": r"^[-+]?[0-9.]+([eE][-+]?[0-9]+)?$"},
    ]
}
_DRAWN = {"$ref": "#/$defs/Drawn"}


def sweep_schema() -> dict[str, Any]:
    """The schema (draft 2020-12): Sweep's own, with every recipe key under `parameters`, `set`
    and `points`, and every metric by name.
    """
    schema = Sweep.model_json_schema()
    properties, defs = schema["properties"], schema["$defs"]
    del properties["more_metrics"]
    for name in [
        name for name, made in defs.items() if "distribution" in made.get("properties", {})
    ]:
        del defs[name]
    defs["Drawn"] = _drawn()
    defs["Metric"]["properties"]["name"] = _metric_name()
    for rule in KINDS:
        if "metric" in rule.model_fields:
            defs[rule.__name__]["properties"]["metric"] = _metric_name()
    properties["metric"] = {
        "anyOf": [
            {"$ref": "#/$defs/Metric"},
            {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/Metric"}},
        ]
    }
    properties["parameters"] = {"type": "object", "minProperties": 1, **_by_key(_DRAWN)}
    properties["set"] = {"type": "object", **_by_key({})}
    properties["points"] = {"type": "array", "items": {"type": "object", **_by_key({})}}
    properties["time_budget"] = {
        "anyOf": [
            {"type": "number", "exclusiveMinimum": 0},
            {"type": "string", "pattern": r"^(\d+(\.\d+)?[smhd])+$"},
        ]
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "flowray sweep",
    }


def _drawn() -> dict[str, Any]:
    prior = {
        "type": "object",
        "properties": {
            "value": {},
            "sigma": {**_NUMBER, "description": "standard deviation; in decades on a log range"},
        },
        "required": ["value"],
        "additionalProperties": False,
    }
    fields: dict[str, Any] = {
        "distribution": {"enum": accepted_distributions()},
        "values": {"type": "array", "minItems": 1},
        "value": {"description": "a constant"},
        "categories": {"type": "array", "minItems": 1, "description": "Ray's name of values"},
        "when": {
            "type": "object",
            "minProperties": 1,
            "description": "other parameters and the values with which this one is drawn",
        },
        "prior": {
            "anyOf": [
                {"const": "field_notes", "description": f"shipped for {', '.join(FIELD_NOTES)}"},
                prior,
            ]
        },
    }
    fields |= dict.fromkeys(("min", "max", "q", "lower", "upper"), _NUMBER)
    wandb_only = [name for name in accepted_distributions() if name not in RAY_FIELDS_WITH]
    one_of = [["min", "max"], ["lower", "upper"], ["values"], ["categories"], ["value"]]
    return {
        "type": "object",
        "properties": fields,
        "additionalProperties": False,
        "anyOf": [{"required": names} for names in one_of],
        "if": {"properties": {"distribution": {"enum": wandb_only}}, "required": ["distribution"]},
        "then": {"properties": dict.fromkeys(("lower", "upper", "categories"), False)},
    }


def _by_key(leaf: dict[str, Any]) -> dict[str, Any]:
    """Properties for every recipe key: dotted ones hold `leaf`, sections hold their keys nested."""
    properties: dict[str, Any] = {}
    for key, slots in known_keys().items():
        if all(slot.sections for slot in slots):
            properties[key] = {"type": "object"}
        else:
            words = " or ".join(dict.fromkeys(want(slot.field) for slot in slots))
            properties[key] = {**leaf, "description": words}
    return {"properties": properties, "additionalProperties": False}


def _metric_name() -> dict[str, Any]:
    names = [name for key in KEYS for name in alternatives(key.name)]
    plain = [name for name in names if "<" not in name]
    free = "|".join(
        "[\\w.@-]+".join(map(re.escape, re.split(r"<\w+>", name))) for name in names if "<" in name
    )
    return {
        "anyOf": [
            {"enum": [*plain, *(f"ema/{name}" for name in plain if not name.startswith("ema/"))]},
            {"pattern": f"^(ema/)?({free})$"},
        ]
    }
