"""Loading a sweep: YAML, overrides, recipe keys and values checked, one line for what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from flowray.config.errors import InputError, did_you_mean
from flowray.config.keys import KEYS, alternatives, describe
from flowray.config.load import load_recipe, override_recipe
from flowray.config.recipe import Recipe
from flowray.config.schema import coerce, known_keys, show, unknown_key
from flowray.config.sweep import NEAREST, Categorical, Constant, Parameter, Sweep, infer_distribution
from flowray.config.yamlfile import YamlFile, parse_value, parse_yaml, read_yaml

_PARAMETER: TypeAdapter[Parameter] = TypeAdapter(Parameter)
_DISTRIBUTIONS = ("uniform", "log_uniform_values", "q_uniform", "int_uniform", "q_log_uniform_values", "categorical", "constant")
_FIELDS = ("distribution", "min", "max", "q", "values", "value")
_WANDB_ONLY = ("program", "command", "project", "entity", "description_file", "job", "image_uri")


def load_sweep(source: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file, or a packaged one where no such file is found from here, and apply `key=value` overrides.

    Override keys are sweep keys (`run_cap=4`, `metric.goal=maximize`), recipe keys for every trial (`set.train.steps=50`) and parts of a
    parameter (`parameters.optim.lr.max=0.01`). InputError names the file, the line and the key.
    """
    path = _find(source)
    file = read_yaml(path)
    data = {**file.data, "set": _flat(file.data.get("set") or {}, "")}
    for text in overrides:
        _override(data, text)
    sweep = build_sweep(data, file)
    beside = path.parent / sweep.base  # a path is relative to the sweep file, as a recipe's base is to the recipe
    return sweep.model_copy(update={"base": str(beside.resolve())}) if beside.is_file() else sweep


def build_sweep(data: Mapping[str, Any], file: YamlFile) -> Sweep:
    """Check a sweep's plain data; `file` says where each key stands."""
    for key in data:
        if key not in Sweep.model_fields:
            raise InputError(f"{file.where(key)}: {_unknown(key)}")
    if data.get("task", "train") != "train":
        raise InputError(f"{file.where('task')}: task: got {show(data['task'])}, only train can be swept so far; leave the key out")
    if isinstance(data.get("metric"), list):
        raise InputError(
            f"{file.where('metric')}: metric: got a list, one metric can be optimised so far; type metric: {{name: ema/shoot/nmse}}"
        )
    if not isinstance(data.get("parameters"), Mapping) or not data["parameters"]:
        raise InputError(
            f"{file.where('parameters')}: parameters: want a mapping of recipe keys, such as optim.lr: {{min: 1e-4, max: 1e-2}}"
        )
    _check_metrics(data, file)
    made = {key: _parameter(key, spec, file) for key, spec in data["parameters"].items()}
    both = [key for key in made if key in data.get("set", {})]
    if both:
        raise InputError(f"{file.where('set.' + both[0])}: {both[0]} is both set and searched; leave one out")
    fixed = {key: _checked(f"set.{key}", key, value, file) for key, value in data.get("set", {}).items()}
    try:
        return Sweep.model_validate({**data, "parameters": made, "set": fixed})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise InputError(f"{file.where(key)}: {key} is missing{_EXAMPLES.get(key, '')}") from None
        if first["type"] == "extra_forbidden":
            raise InputError(f"{file.where(key)}: unknown key {key}{_nearby(first['loc'])}") from None
        cause = first.get("ctx", {}).get("error")
        words = str(cause) if cause else f"got {show(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"
        raise InputError(f"{file.where(key)}: {key}: {words}" if key else f"{file.label}: {words}") from None


def base_recipe(sweep: Sweep) -> Recipe:
    """The recipe that every trial starts from: `base` with `set` applied."""
    return override_recipe(load_recipe(sweep.base).recipe, sweep.set)


def check_trials(sweep: Sweep, base: Recipe) -> None:
    """Make the recipes at the ends of the space, so that a range that the recipe refuses is found before anything runs.

    Also refuses metrics of the raw weights where the recipe probes the EMA only: they would never be seen.
    """
    if base.probes.doctor_every == 0 and any(rule.finding for rule in sweep.stop):
        raise InputError(f"sweep {sweep.name}: a stop rule waits for a finding, but no doctor comes; type set.probes.doctor_every=1")
    for name in (sweep.metric.name, *(rule.metric for rule in sweep.stop if rule.metric)):
        if not base.probes.raw and name.startswith(_PROBED):
            raise InputError(f"sweep {sweep.name}: {name} is not probed, as probes.raw is false; type ema/{name}, or set probes.raw: true")
    ends = {key: _ends(parameter) for key, parameter in sweep.parameters.items()}
    cases = [{key: value} for key, values in ends.items() for value in values]
    cases += [{key: values[end] for key, values in ends.items()} for end in (0, -1)]
    for case in cases:
        try:
            override_recipe(base, case)
        except InputError as error:
            words = ", ".join(f"{key}={show(value)}" for key, value in case.items())
            raise InputError(f"sweep {sweep.name}: no recipe can be made with {words}: {error}") from None


def dump_sweep(sweep: Sweep) -> str:
    """The sweep as YAML, defaults included; `load_sweep` reads it back."""
    return yaml.safe_dump(sweep.model_dump(mode="json", exclude_none=True), sort_keys=False)


def text_sweep(text: str, label: str) -> Sweep:
    """`load_sweep` for YAML already in memory."""
    file = parse_yaml(text, label)
    return build_sweep({**file.data, "set": _flat(file.data.get("set") or {}, "")}, file)


def packaged_sweeps() -> list[str]:
    """File names of the sweeps that come with flowray."""
    folder = resources.files("flowray") / "sweeps"
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml")) if folder.is_dir() else []


_PROBED = ("flow/", "shoot/", "text/", "mu/", "logvar/", "std/", "z_init/", "scale/", "teacher/")  # measured for raw and EMA weights
_EXAMPLES = {
    "name": ", such as name: head",
    "base": ", such as base: sweep_proxy (a packaged recipe or a file)",
    "metric": ", such as metric: {name: ema/shoot/nmse, goal: minimize}",
}


def _find(source: str) -> Path:
    path = Path(source)
    if path.exists():
        return path
    stem = path.name.removesuffix(".yaml")
    packaged = packaged_sweeps()
    if f"{stem}.yaml" in packaged:
        return Path(str(resources.files("flowray") / "sweeps" / f"{stem}.yaml"))
    near = did_you_mean(stem, [name.removesuffix(".yaml") for name in packaged])
    raise InputError(f"{source}: no such sweep file{near or '; packaged sweeps: ' + (', '.join(packaged) or 'none')}")


def _flat(section: Any, prefix: str) -> dict[str, Any]:
    """Nested or dotted recipe keys as dotted ones."""
    if not isinstance(section, Mapping):
        raise InputError(f"set: got {show(section)}, want a mapping of recipe keys, such as train.steps: 200")
    out: dict[str, Any] = {}
    for key, value in section.items():
        nested = isinstance(value, Mapping)
        out |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise InputError(f"{text}: want key=value, such as run_cap=4 or set.train.steps=50")
    value, head, rest = parse_value(raw), *key.partition(".")[::2]
    if head not in Sweep.model_fields:
        raise InputError(_unknown(key))
    if head == "set" and rest:
        data["set"] = {**data["set"], rest: value}
    elif head == "parameters" and rest:
        name, _, field = rest.rpartition(".")
        whole = field not in _FIELDS  # parameters.KEY={...} replaces, parameters.KEY.max=... changes
        old = data.get("parameters") or {}
        data["parameters"] = {**old, rest: value} if whole else {**old, name: {**(old.get(name) or {}), field: value}}
    elif rest:
        old = data.get(head)
        if not isinstance(old, Mapping | None):
            raise InputError(f"{key}: {head} is not a mapping")
        data[head] = {**(old or {}), rest: value}
    else:
        data[key] = value


def _unknown(key: str) -> str:
    if key in known_keys():
        return f"{key} is a recipe key; for every trial type set.{key}=..., to search it put it under parameters"
    if key in _WANDB_ONLY:
        return f"{key} is known to W&B only; leave it out (base names the recipe that is trained)"
    return f"unknown key {key}{did_you_mean(key, Sweep.model_fields)}; allowed: {', '.join(Sweep.model_fields)}"


def _nearby(loc: tuple[int | str, ...]) -> str:
    models: dict[str, Any] = {name: field.annotation for name, field in Sweep.model_fields.items()}
    kinds = {"metric": "name, goal", "early_terminate": "type, min_iter, eta", "stop": "metric, finding, below, above, after, patience"}
    kinds["resources"] = "num_workers, cpus_per_worker, gpus_per_worker"
    allowed = kinds.get(str(loc[0]), ", ".join(models))
    return f"{did_you_mean(str(loc[-1]), allowed.split(', '))}; allowed: {allowed}"


def _checked(at: str, key: str, value: Any, file: YamlFile) -> Any:
    """The value through the recipe field's type; errors point at the line of `at`."""
    if key not in known_keys():
        raise InputError(f"{file.where(at)}: {unknown_key(key)}")
    try:
        return coerce(key, value)
    except InputError as error:
        raise InputError(f"{file.where(at)}: {error}") from None


def _check_metrics(data: Mapping[str, Any], file: YamlFile) -> None:
    """A misspelt metric would never stop a trial, and end the sweep without a value."""
    metric, rules = data.get("metric"), data.get("stop") or []
    named = [("metric.name", metric.get("name") if isinstance(metric, Mapping) else None)]
    named += [("stop", rule.get("metric") if isinstance(rule, Mapping) else None) for rule in (rules if isinstance(rules, list) else [])]
    known = [name for key in KEYS for name in alternatives(key.name)]
    for at, name in named:
        if isinstance(name, str) and describe(name) is None:
            raise InputError(f"{file.where(at)}: unknown metric {name}{did_you_mean(name, [*known, *(f'ema/{k}' for k in known)])}")


def _parameter(key: str, spec: Any, file: YamlFile) -> Parameter:
    at = f"parameters.{key}"
    where = file.where(at)
    if key not in known_keys():
        raise InputError(f"{where}: parameters: {unknown_key(key)}")
    if not isinstance(spec, Mapping):
        raise InputError(f"{where}: {key}: got {show(spec)}, want {{distribution, min, max}}, {{values: [...]}} or {{value: ...}}")
    for field in spec:
        if field not in _FIELDS:
            raise InputError(
                f"{file.where(f'{at}.{field}')}: {key}: unknown key {field}{did_you_mean(field, _FIELDS)}; allowed: {', '.join(_FIELDS)}"
            )
    given = {
        field: _checked(f"{at}.{field}", key, value, file) if field in ("min", "max", "value") else value for field, value in spec.items()
    }
    if "values" in given:
        if not isinstance(given["values"], list) or not given["values"]:
            raise InputError(f"{file.where(at + '.values')}: {key}.values: got {show(given['values'])}, want a list of at least one value")
        given["values"] = [_checked(f"{at}.values", key, value, file) for value in given["values"]]
    ends = [given[field] for field in ("min", "max") if field in given]
    name = given.get("distribution") or infer_distribution(given, all(isinstance(end, int) for end in ends))
    if name is None:
        raise InputError(f"{where}: {key}: got {', '.join(spec) or 'nothing'}, want min and max, values or value")
    if name not in _DISTRIBUTIONS:
        near = f"; the nearest that can be drawn is {NEAREST[name]}" if name in NEAREST else did_you_mean(str(name), _DISTRIBUTIONS)
        raise InputError(
            f"{file.where(at + '.distribution')}: {key}: got distribution {show(name)}, allowed: {', '.join(_DISTRIBUTIONS)}{near}"
        )
    try:
        return _PARAMETER.validate_python({**given, "distribution": name})
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][-1]) if len(first["loc"]) > 1 else ""
        cause = first.get("ctx", {}).get("error")
        words = {"missing": f"{field} is missing", "extra_forbidden": f"{field} has no meaning for {name}"}.get(first["type"])
        words = words or (str(cause) if cause else f"{field}: got {show(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}")
        raise InputError(f"{file.where(f'{at}.{field}'.rstrip('.'))}: {key}: {words}") from None


def _ends(parameter: Parameter) -> tuple[Any, ...]:
    match parameter:
        case Categorical(values=values):
            return values
        case Constant(value=value):
            return (value,)
        case _:
            return (parameter.min, parameter.max)
