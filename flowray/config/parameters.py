"""A sweep file's parameters: W&B's and Ray's spellings, nested keys, conditions and priors, checked one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flowray.config.errors import InputError, did_you_mean
from flowray.config.priors import FIELD_NOTES
from flowray.config.schema import coerce, known_keys, show, unknown_key
from flowray.config.sweep import Categorical, Constant, Parameter, infer_distribution
from flowray.config.yamlfile import YamlFile

_PARAMETER: TypeAdapter[Parameter] = TypeAdapter(Parameter)
DISTRIBUTIONS = ("uniform", "log_uniform_values", "q_uniform", "int_uniform", "q_log_uniform_values", "categorical", "constant")
FIELDS = ("distribution", "min", "max", "q", "values", "value", "when", "prior")

_EXPONENTS = {"log_uniform": "log_uniform_values", "q_log_uniform": "q_log_uniform_values"}  # W&B: min and max are exponents of e
_RAY = {
    "choice": "categorical",
    "loguniform": "log_uniform_values",
    "quniform": "q_uniform",
    "qloguniform": "q_log_uniform_values",
    "randint": "int_uniform",
    "qrandint": "q_uniform",
    "lograndint": "q_log_uniform_values",
    "qlograndint": "q_log_uniform_values",
}
_UPPER_EXCLUDED = ("randint", "lograndint")
_RAY_FIELDS = {"lower": "min", "upper": "max", "categories": "values"}
_NEAREST = {  # distributions that Optuna does not draw from, and the nearest that it does
    "inv_log_uniform": "log_uniform_values",
    "inv_log_uniform_values": "log_uniform_values",
    "normal": "uniform over mean -+ 2 standard deviations, with prior: {value: mean, sigma: standard deviation}",
    "q_normal": "q_uniform over mean -+ 2 standard deviations, with prior: {value: mean, sigma: standard deviation}",
    "randn": "uniform over mean -+ 2 standard deviations, with prior: {value: mean, sigma: standard deviation}",
    "qrandn": "q_uniform over mean -+ 2 standard deviations, with prior: {value: mean, sigma: standard deviation}",
    "log_normal": "log_uniform_values, with prior: {value: median, sigma: in decades}",
    "q_log_normal": "q_log_uniform_values, with prior: {value: median, sigma: in decades}",
    "beta": "uniform",
    "q_beta": "q_uniform",
    "categorical_w_probabilities": "categorical, with prior: {value: the likeliest}",
}


def accepted_distributions() -> list[str]:
    """Every spelling that a file may have."""
    return [*DISTRIBUTIONS, *_EXPONENTS, *_RAY]


def flat(section: Any, what: str = "set", prefix: str = "") -> dict[str, Any]:
    """Nested or dotted recipe keys as dotted ones."""
    if not isinstance(section, Mapping):
        raise InputError(f"{what}: got {show(section)}, want a mapping of recipe keys, such as train.steps: 200")
    out: dict[str, Any] = {}
    for key, value in section.items():
        nested = isinstance(value, Mapping)
        out |= flat(value, what, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out


def flat_parameters(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys, with or without W&B's inner `parameters:`; what is drawn stays a mapping."""
    out: dict[str, Any] = {}
    for key, spec in section.items():
        name = f"{prefix}{key}"
        if isinstance(spec, Mapping) and _is_section(name) and not set(spec) & set(FIELDS):
            inner = spec["parameters"] if set(spec) == {"parameters"} and isinstance(spec["parameters"], Mapping) else spec
            out |= flat_parameters(inner, f"{name}.")
        else:
            out[name] = spec
    return out


def checked(at: str, key: str, value: Any, file: YamlFile) -> Any:
    """The value through the recipe field's type; errors point at the line of `at`."""
    if key not in known_keys():
        raise InputError(f"{file.where(at)}: {unknown_key(key)}")
    try:
        return coerce(key, value)
    except InputError as error:
        raise InputError(f"{file.where(at)}: {error}") from None


def read_parameters(section: Mapping[str, Any], file: YamlFile) -> dict[str, Parameter]:
    """Every parameter of a flat mapping; conditions must name parameters beside them and not wait for each other."""
    made = {key: _parameter(key, spec, file) for key, spec in section.items()}
    for key, parameter in made.items():
        for parent, values in parameter.when.items():
            where = f"{file.where(f'parameters.{key}.when')}: {key}.when"
            if parent not in made:
                raise InputError(f"{where}: {parent} is not searched{did_you_mean(parent, made)}; search it, or leave the condition out")
            known = made[parent]
            for value in values:
                if isinstance(known, Categorical) and value not in known.values:
                    drawn = ", ".join(map(show, known.values))
                    raise InputError(f"{where}: {parent} is never {show(value)}, it is one of {drawn}")
        if _waits_for(key, key, made, set()):
            raise InputError(f"{file.where(f'parameters.{key}.when')}: {key}.when: the conditions lead back to {key} itself")
    return made


def _waits_for(key: str, wanted: str, made: Mapping[str, Parameter], seen: set[str]) -> bool:
    if key in seen:
        return False
    seen.add(key)
    return any(parent == wanted or _waits_for(parent, wanted, made, seen) for parent in made[key].when if parent in made)


def _is_section(key: str) -> bool:
    slots = known_keys().get(key, ())
    return bool(slots) and all(slot.sections for slot in slots)


def _parameter(key: str, spec: Any, file: YamlFile) -> Parameter:
    at = f"parameters.{key}"
    where = file.where(at)
    if key not in known_keys():
        raise InputError(f"{where}: parameters: {unknown_key(key)}")
    if not isinstance(spec, Mapping):
        raise InputError(f"{where}: {key}: got {show(spec)}, want {{distribution, min, max}}, {{values: [...]}} or {{value: ...}}")
    given = _wandb(key, spec, at, file)
    for field in given:
        if field not in FIELDS:
            near = did_you_mean(field, (*FIELDS, *_RAY_FIELDS))
            raise InputError(f"{file.where(f'{at}.{field}')}: {key}: unknown key {field}{near}; allowed: {', '.join(FIELDS)}")
    given |= {field: checked(f"{at}.{field}", key, given[field], file) for field in ("min", "max", "value") if field in given}
    if "values" in given:
        if not isinstance(given["values"], list) or not given["values"]:
            raise InputError(f"{file.where(at + '.values')}: {key}.values: got {show(given['values'])}, want a list of at least one value")
        given["values"] = [checked(f"{at}.values", key, value, file) for value in given["values"]]
    if given.get("when") is not None:
        given["when"] = _condition(key, given["when"], at, file)
    if given.get("prior") is not None:
        given["prior"] = _prior(key, given["prior"], at, file)
    ends = [given[field] for field in ("min", "max") if field in given]
    name = given.get("distribution") or infer_distribution(given, all(isinstance(end, int) for end in ends))
    if name is None:
        raise InputError(f"{where}: {key}: got {', '.join(spec) or 'nothing'}, want min and max, values or value")
    if name not in DISTRIBUTIONS:
        near = f"; the nearest that can be drawn is {_NEAREST[name]}" if name in _NEAREST else did_you_mean(str(name), DISTRIBUTIONS)
        raise InputError(
            f"{file.where(at + '.distribution')}: {key}: got distribution {show(name)}, allowed: {', '.join(DISTRIBUTIONS)}{near}"
        )
    return _made(key, name, {field: value for field, value in given.items() if value is not None or field == "value"}, at, file)


def _made(key: str, name: str, given: Mapping[str, Any], at: str, file: YamlFile) -> Parameter:
    try:
        return _PARAMETER.validate_python({**given, "distribution": name})
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][-1]) if len(first["loc"]) > 1 else ""
        cause = first.get("ctx", {}).get("error")
        words = {"missing": f"{field} is missing", "extra_forbidden": f"{field} has no meaning for {name}"}.get(first["type"])
        words = words or (str(cause) if cause else f"{field}: got {show(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}")
        raise InputError(f"{file.where(f'{at}.{field}'.rstrip('.'))}: {key}: {words}") from None


def _wandb(key: str, spec: Mapping[str, Any], at: str, file: YamlFile) -> dict[str, Any]:
    """The spec in W&B's words: Ray's names and fields, and ranges given by their exponents, translated."""
    name, given = spec.get("distribution"), dict(spec)
    if name in _RAY or name == "uniform":
        given = {_RAY_FIELDS.get(field, field): value for field, value in spec.items()}
        given["distribution"] = _RAY.get(name, name)
    if name in _UPPER_EXCLUDED:
        if "upper" not in spec:
            raise InputError(
                f"{file.where(at)}: {key}: {name} takes lower and upper, which itself is not drawn; for min and max take int_uniform"
            )
        given["max"] = checked(f"{at}.upper", key, spec["upper"], file) - 1
    if name == "lograndint":
        given["q"] = 1
    if name in _EXPONENTS:
        given |= _from_exponents(key, spec, at, file) | {"distribution": _EXPONENTS[name]}
    return given


def _from_exponents(key: str, spec: Mapping[str, Any], at: str, file: YamlFile) -> dict[str, float]:
    """W&B's log_uniform draws between e^min and e^max. Ends inside (0, 1] are nearly always meant as values: refused."""
    try:
        ends = {field: float(spec[field]) for field in ("min", "max") if field in spec}
    except (TypeError, ValueError):
        raise InputError(f"{file.where(at)}: {key}: {spec['distribution']} takes numbers as min and max, exponents of e") from None
    if len(ends) == 2 and 0 < ends["min"] < ends["max"] <= 1:
        took = f"{math.exp(ends['min']):.4g} to {math.exp(ends['max']):.4g}"
        raise InputError(
            f"{file.where(at)}: {key}: {spec['distribution']} takes exponents of e, so this is {took}; "
            f"for values type distribution: {_EXPONENTS[spec['distribution']]}"
        )
    return {field: math.exp(end) for field, end in ends.items()}


def _condition(key: str, when: Any, at: str, file: YamlFile) -> dict[str, tuple[Any, ...]]:
    if not isinstance(when, Mapping) or not when:
        raise InputError(
            f"{file.where(at + '.when')}: {key}.when: got {show(when)}, want another parameter and its values, such as "
            "when: {model.head.kind: grid}"
        )
    asked = {parent: values if isinstance(values, list) else [values] for parent, values in flat(when, f"{key}.when").items()}
    return {parent: tuple(checked(f"{at}.when", parent, value, file) for value in values) for parent, values in asked.items()}


def _prior(key: str, prior: Any, at: str, file: YamlFile) -> dict[str, Any]:
    where = f"{file.where(at + '.prior')}: {key}.prior"
    if prior == "field_notes":
        if key not in FIELD_NOTES:
            raise InputError(f"{where}: the field notes say nothing of {key}; they do of {', '.join(FIELD_NOTES)}")
        return FIELD_NOTES[key].model_dump(exclude_none=True)
    if not isinstance(prior, Mapping) or "value" not in prior or not set(prior) <= {"value", "sigma"}:
        raise InputError(f"{where}: got {show(prior)}, want {{value: ..., sigma: ...}} (sigma in decades on a log range), or field_notes")
    return {**prior, "value": checked(f"{at}.prior", key, prior["value"], file)}


def ends(parameter: Parameter) -> tuple[Any, ...]:
    """The values of a choice, the two ends of a range."""
    match parameter:
        case Categorical(values=values):
            return values
        case Constant(value=value):
            return (value,)
        case _:
            return (parameter.min, parameter.max)
