"""A sweep file's parameters: W&B's and Ray's spellings, nested keys, conditions and priors,
checked one by one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flowray.config.errors import InputError, did_you_mean
from flowray.config.paths import make_absolute
from flowray.config.schema import coerce, key_paths, known_keys, show, unknown_key
from flowray.config.yamlfile import YamlFile
from flowray.sweepconfig.distributions import (
    Categorical,
    Constant,
    LogUniform,
    Parameter,
    QLogUniform,
    QUniform,
    Uniform,
    infer_distribution,
    inside,
)
from flowray.sweepconfig.priors import FIELD_NOTES, field_notes_prior

_PARAMETER: TypeAdapter[Parameter] = TypeAdapter(Parameter)
DISTRIBUTIONS = (
    "uniform",
    "log_uniform_values",
    "q_uniform",
    "int_uniform",
    "q_log_uniform_values",
    "categorical",
    "constant",
)
FIELDS = ("distribution", "min", "max", "q", "values", "value", "when", "prior")

_EXPONENTS = {  # W&B: min and max are exponents of e, of the inverse in the last
    "log_uniform": "log_uniform_values",
    "q_log_uniform": "q_log_uniform_values",
    "inv_log_uniform": "log_uniform_values",
}
_INVERSE = "inv_log_uniform_values"  # log(1/x) drawn evenly is log(x) drawn evenly
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
# the distributions, or none, beside which Ray's fields stand
RAY_FIELDS_WITH = (None, "uniform", *_RAY)
# distributions that Optuna does not draw from, and the nearest that it does
_BELLS = {
    "normal": "uniform",
    "q_normal": "q_uniform",
    "randn": "uniform",
    "qrandn": "q_uniform",
    "log_normal": "log_uniform_values",
    "q_log_normal": "q_log_uniform_values",
}
_NEAREST = {
    "beta": "uniform",
    "q_beta": "q_uniform",
    "sample_from": (
        "a range or values, with when: {other.key: its value} for what depends on another key"
    ),
}
_BELL_FIELDS = {"mu", "sigma", "mean", "sd"}  # W&B's and Ray's


def accepted_distributions() -> list[str]:
    """Every spelling that a file may have."""
    return [*DISTRIBUTIONS, *_EXPONENTS, _INVERSE, *_RAY]


def wanted(error: Mapping[str, Any]) -> str:
    """What pydantic found wrong, in the words of this package: 'want a whole number'."""
    about, kind = error.get("ctx", {}), error["type"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        field, tags = about["discriminator"].strip("'"), about.get("expected_tags")
        return f"want {{{field}: ...}}" + (
            f" with {field} one of {tags.replace(chr(39), '')}" if tags else ""
        )
    if kind == "literal_error":
        return f"want {about['expected'].replace(chr(39), '')}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        (name, bound), sign = (
            next(iter(about.items())),
            {"gt": ">", "ge": ">=", "lt": "<", "le": "<="},
        )
        return f"want a number {sign[name]} {bound:g}"
    for ending, words in _WANTED.items():
        if kind.startswith(ending):
            return f"want {words}"
    message = str(error["msg"])
    return f"{message[0].lower()}{message[1:]}"


_WANTED = {  # beginnings of pydantic's error types
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "tuple_type": "a list, in [ ]",
    "none_required": "nothing here; leave it out",
    "model_": "a mapping, in { }",
    "dict_type": "a mapping, in { }",
}


def flat(section: Any, what: str = "set", prefix: str = "") -> dict[str, Any]:
    """Nested or dotted recipe keys as dotted ones."""
    if not isinstance(section, Mapping):
        raise InputError(
            f"{what}: got {show(section)}, want a mapping of recipe keys, such as train.steps: 200"
        )
    out: dict[str, Any] = {}
    for key, value in section.items():
        nested = isinstance(value, Mapping)
        _add(
            out, flat(value, what, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}, what
        )
    return out


def _add(out: dict[str, Any], more: Mapping[str, Any], what: str) -> None:
    """Dotted and nested keys may name the same one, of which the later would silently win."""
    if twice := [key for key in more if key in out]:
        raise InputError(f"{what}: {twice[0]} is given twice, dotted and nested; keep one")
    out.update(more)


def flat_parameters(
    section: Mapping[str, Any], what: str = "parameters", prefix: str = ""
) -> dict[str, Any]:
    """Nested sections as dotted keys, with or without W&B's inner `parameters:`; what is drawn
    stays a mapping.
    """
    out: dict[str, Any] = {}
    for key, spec in section.items():
        name = f"{prefix}{key}"
        if isinstance(spec, Mapping) and _is_section(name) and not set(spec) & set(FIELDS):
            inner = (
                spec["parameters"]
                if set(spec) == {"parameters"} and isinstance(spec["parameters"], Mapping)
                else spec
            )
            _add(out, flat_parameters(inner, what, f"{name}."), what)
        else:
            _add(out, {name: spec}, what)
    return out


def checked(at: str, key: str, value: Any, file: YamlFile) -> Any:
    """The value through the recipe field's type, its paths absolute; errors point at the line of
    `at`.
    """
    if key not in known_keys():
        raise InputError(f"{file.where(at)}: {unknown_key(key)}")
    try:
        accepted = coerce(key, value)
    except InputError as error:
        raise InputError(f"{file.where(at)}: {error}") from None
    return make_absolute(accepted, key_paths(key), file.folders_of(at), f"{file.where(at)}: {key}")


@dataclass(frozen=True)
class _Searched:
    """A searched key, in its file."""

    key: str
    file: YamlFile

    def checked(self, field: str, value: Any, key: str = "") -> Any:
        """A value in one of its fields, as its own recipe key, or another, takes it."""
        return checked(f"parameters.{self.key}.{field}", key or self.key, value, self.file)

    def error(self, words: str, line: str = "") -> InputError:
        """line: the field that is to blame, else the key."""
        at = f"parameters.{self.key}.{line}".removesuffix(".")
        return InputError(f"{self.file.where(at)}: {self.key}: {words}")

    def error_in(self, field: str, words: str) -> InputError:
        """The same, named by the field."""
        at = f"parameters.{self.key}.{field}"
        return InputError(f"{self.file.where(at)}: {self.key}.{field}: {words}")


def read_parameters(section: Mapping[str, Any], file: YamlFile) -> dict[str, Parameter]:
    """Every parameter of a flat mapping; conditions must name parameters beside them and not
    wait for each other.
    """
    made = {key: _parameter(_Searched(key, file), spec) for key, spec in section.items()}
    for key, parameter in made.items():
        at = _Searched(key, file)
        for parent, values in parameter.when.items():
            if parent not in made:
                near = did_you_mean(parent, made)
                words = f"{parent} is not searched{near}; search it, or leave the condition out"
                raise at.error_in("when", words)
            known = made[parent]
            if isinstance(known, Uniform | LogUniform | QLogUniform):
                words = f"{parent} is drawn from a range, which hits no single value"
                raise at.error_in("when", f"{words}; search values: [...] of it")
            for value in values:
                if not inside(known, value):
                    words = f"{parent} is never {show(value)}, it is {_drawn_words(known)}"
                    raise at.error_in("when", words)
        if _waits_for(key, key, made, set()):
            raise at.error_in("when", f"the conditions lead back to {key} itself")
    return made


def _waits_for(key: str, wanted: str, made: Mapping[str, Parameter], seen: set[str]) -> bool:
    if key in seen:
        return False
    seen.add(key)
    return any(
        parent == wanted or _waits_for(parent, wanted, made, seen)
        for parent in made[key].when
        if parent in made
    )


def _is_section(key: str) -> bool:
    slots = known_keys().get(key, ())
    return bool(slots) and all(slot.sections for slot in slots)


def _parameter(at: _Searched, spec: Any) -> Parameter:
    key, file = at.key, at.file
    if key not in known_keys():
        raise InputError(f"{file.where(f'parameters.{key}')}: parameters: {unknown_key(key)}")
    if not isinstance(spec, Mapping):
        want = "{distribution, min, max}, {values: [...]} or {value: ...}"
        raise at.error(f"got {show(spec)}, want {want}")
    if instead := _undrawable(spec):
        raise at.error(instead, "distribution")
    given = _wandb(at, spec)
    for field in given:
        if field not in FIELDS:
            ours = _RAY_FIELDS.get(field)
            near = f", did you mean {ours}?" if ours else did_you_mean(field, FIELDS)
            raise at.error(f"unknown key {field}{near}; allowed: {', '.join(FIELDS)}", field)
    for field in ("min", "max", "value"):
        if field in given:
            given[field] = at.checked(field, given[field])
    if "values" in given:
        if not isinstance(given["values"], list) or not given["values"]:
            words = f"got {show(given['values'])}, want a list of at least one value"
            raise at.error_in("values", words)
        given["values"] = [at.checked("values", value) for value in given["values"]]
    if given.get("when") is not None:
        given["when"] = _condition(at, given["when"])
    ends = [given[field] for field in ("min", "max") if field in given]
    whole = all(isinstance(end, int) for end in ends)
    name = given.get("distribution") or infer_distribution(given, whole)
    if name is None:
        raise at.error(f"got {', '.join(spec) or 'nothing'}, want min and max, values or value")
    if name not in DISTRIBUTIONS:
        near = did_you_mean(str(name), accepted_distributions())
        words = f"got distribution {show(name)}, allowed: {', '.join(DISTRIBUTIONS)}{near}"
        raise at.error(words, "distribution")
    if given.get("prior") is not None:
        given["prior"] = _prior(at, name, given["prior"])
    if len(ends) == 2 and whole:
        _check_whole(at, name, given.get("q", 1.0))
    said = {field: x for field, x in given.items() if x is not None or field == "value"}
    try:
        return _PARAMETER.validate_python({**said, "distribution": name})
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][-1]) if len(first["loc"]) > 1 else ""
        cause = first.get("ctx", {}).get("error")
        words = {
            "missing": f"{field} is missing",
            "extra_forbidden": f"{field} has no meaning for {name}",
        }.get(first["type"], "")
        got = f"{field}: got {show(first['input'])}, {wanted(first)}"
        raise at.error(words or (str(cause) if cause else got), field) from None


def _check_whole(at: _Searched, name: str, q: Any) -> None:
    """Refuse what draws broken numbers for a field of whole ones: every such trial would fail."""
    if name in ("uniform", "log_uniform_values"):
        whole = "int_uniform" if name == "uniform" else "q_log_uniform_values with q: 1"
        words = f"takes whole numbers, of which {name} draws none; type distribution: {whole}"
        raise at.error(words)
    if name.startswith("q_") and isinstance(q, int | float) and q != round(q):
        raise at.error(f"takes whole numbers, got q {q:g}; type a whole q")


def _drawn_words(parameter: Parameter) -> str:
    """What a parameter can be."""
    match parameter:
        case Categorical(values=values):
            return f"one of {', '.join(map(show, values))}"
        case Constant(value=value):
            return show(value)
        case QUniform(min=low, max=high, q=q):
            return f"{low:g} to {high:g} in steps of {q:g}"
        case _:
            return f"{parameter.min:g} to {parameter.max:g}"


def _undrawable(spec: Mapping[str, Any]) -> str:
    """What of a W&B or Ray spec Optuna does not draw, and what to type in its place; '' where
    there is nothing such.
    """
    name = spec.get("distribution")
    if "grid_search" in spec:
        return (
            f"grid_search is Ray's; type values: {show(spec['grid_search'])} and, above, method:"
            " grid"
        )
    if "probabilities" in spec or name == "categorical_w_probabilities":
        values, weights = spec.get("values"), spec.get("probabilities")
        try:
            chances = zip(weights, values, strict=True)  # type: ignore[arg-type]
            likeliest = show(max(chances, key=lambda pair: float(pair[0]))[1])
        except (TypeError, ValueError):
            likeliest = "the likeliest"
        return (
            "values are drawn evenly, not with probabilities; leave them out, and to begin with"
            f" one type prior: {{value: {likeliest}}}"
        )
    if name is None and _BELL_FIELDS & set(spec):
        name = "normal"
    if name not in (*_BELLS, *_NEAREST):
        return ""
    return (
        f"got distribution {show(name)}; the nearest that can be drawn is"
        f" {_NEAREST.get(name) or _bell(name, spec)}"
    )


def _bell(name: str, spec: Mapping[str, Any]) -> str:
    """The range of two standard deviations to each side of a (log-)normal, with the prior that
    begins near its middle.
    """
    drawn = _BELLS[name]
    log = "log" in drawn
    try:
        middle, sigma = (
            float(spec.get("mu", spec.get("mean", 0))),
            float(spec.get("sigma", spec.get("sd", 1))),
        )
        low, value, high = (
            math.exp(x) if log else x for x in (middle - 2 * sigma, middle, middle + 2 * sigma)
        )
    except (TypeError, ValueError, OverflowError):
        low = high = 0.0
    if not low < high or not _BELL_FIELDS & set(spec):
        words = "median, sigma: in decades" if log else "mean, sigma: standard deviation"
        return f"{drawn} over 2 standard deviations to each side, with prior: {{value: {words}}}"
    step = f", q: {spec['q']}" if "q" in spec else ""
    near = f"prior: {{value: {value:.4g}, sigma: {sigma / math.log(10) if log else sigma:.3g}}}"
    return f"{{distribution: {drawn}, min: {low:.4g}, max: {high:.4g}{step}, {near}}}"


def _wandb(at: _Searched, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec in W&B's words: Ray's names and fields, and ranges given by their exponents,
    translated.
    """
    name, given = spec.get("distribution"), dict(spec)
    if name in RAY_FIELDS_WITH:
        for field in _RAY_FIELDS.keys() & spec.keys():
            if (ours := _RAY_FIELDS[field]) in spec:
                words = f"{field} is Ray's word for {ours}; leave one of them out"
                raise at.error(words, field)
        given = {_RAY_FIELDS.get(field, field): value for field, value in spec.items()}
    if name in _RAY:
        given["distribution"] = _RAY[name]
    if name in _UPPER_EXCLUDED:
        if "upper" not in spec:
            raise at.error(
                f"{name} takes lower and upper, which itself is not drawn; for min and max take"
                " int_uniform"
            )
        given["max"] = at.checked("upper", spec["upper"]) - 1
    if name == "lograndint":
        given["q"] = 1
    if name == _INVERSE:
        given["distribution"] = "log_uniform_values"
    if name in _EXPONENTS:
        given |= _from_exponents(at, spec) | {"distribution": _EXPONENTS[name]}
    return given


def _from_exponents(at: _Searched, spec: Mapping[str, Any]) -> dict[str, float]:
    """W&B's log_uniform draws between e^min and e^max.

    Ends inside (0, 1] are nearly always meant as values: refused.
    """
    name = spec["distribution"]
    try:
        ends = {field: float(spec[field]) for field in ("min", "max") if field in spec}
    except (TypeError, ValueError):
        raise at.error(f"{name} takes numbers as min and max, exponents of e") from None
    if len(ends) == 2 and 0 < ends["min"] < ends["max"] <= 1:
        took = f"{math.exp(ends['min']):.4g} to {math.exp(ends['max']):.4g}"
        words = f"{name} takes exponents of e, so this is {took}"
        raise at.error(f"{words}; for values type distribution: {_EXPONENTS[name]}")
    if name == "inv_log_uniform":
        ends = {{"min": "max", "max": "min"}[field]: -end for field, end in ends.items()}
    try:
        values = {field: math.exp(end) for field, end in ends.items()}
        step = float(spec.get("q", 1)) if name == "q_log_uniform" else 0.0
    except (OverflowError, TypeError, ValueError):
        words = f"{name} takes exponents of e and a number q; got {show(spec)}"
        raise at.error(words) from None
    return {
        field: max(step, round(value / step) * step) if step > 0 else value
        for field, value in values.items()
    }


def _condition(at: _Searched, when: Any) -> dict[str, tuple[Any, ...]]:
    if not isinstance(when, Mapping) or not when:
        raise at.error_in(
            "when",
            f"got {show(when)}, want another parameter and its values, such as when:"
            " {model.head.kind: grid}",
        )
    line = at.file.where(f"parameters.{at.key}.when")
    return {
        parent: tuple(
            at.checked("when", value, parent)
            for value in (values if isinstance(values, list) else [values])
        )
        for parent, values in flat(when, f"{line}: {at.key}.when").items()
    }


def _prior(at: _Searched, distribution: str, prior: Any) -> dict[str, Any]:
    if prior == "field_notes":
        if at.key not in FIELD_NOTES:
            words = f"the field notes say nothing of {at.key}; they do of {', '.join(FIELD_NOTES)}"
            raise at.error_in("prior", words)
        return field_notes_prior(at.key, distribution).model_dump(exclude_none=True)
    fields = set(prior) if isinstance(prior, Mapping) else set()
    if not {"value"} <= fields <= {"value", "sigma"}:
        want = "{value: ..., sigma: ...} (sigma in decades on a log range), or field_notes"
        raise at.error_in("prior", f"got {show(prior)}, want {want}")
    return {**prior, "value": at.checked("prior", prior["value"])}


def ends(parameter: Parameter) -> tuple[Any, ...]:
    """The values of a choice, the two ends of a range."""
    match parameter:
        case Categorical(values=values):
            return values
        case Constant(value=value):
            return (value,)
        case _:
            return (parameter.min, parameter.max)
