"""Reading a sweep file: YAML and overrides, one line for what is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flowray.config.errors import InputError, RuleError, did_you_mean
from flowray.config.paths import (
    STORAGE,
    PathField,
    exists,
    is_file,
    looks_like_path,
    make_absolute,
    map_paths,
    moved,
    no_such,
    path_field,
    source_path,
    storage_folder,
    written,
)
from flowray.config.schema import key_paths, known_keys, show
from flowray.config.sources import (
    comes_first,
    is_kept,
    is_sweep,
    packaged,
    packaged_sweeps,
    what_it_is,
)
from flowray.config.yamlfile import (
    COMMAND_LINE,
    YamlFile,
    key_values,
    parse_value,
    parse_yaml,
    read_yaml,
)
from flowray.sweepconfig.card import head_card
from flowray.sweepconfig.distributions import Parameter, drawn, inside
from flowray.sweepconfig.parameters import (
    FIELDS,
    checked,
    ends,
    flat,
    flat_parameters,
    read_parameters,
    wanted,
)
from flowray.sweepconfig.stop import TAG
from flowray.sweepconfig.sweep import Sweep
from flowray.sweepconfig.words import allowed_words, check_halving, check_metrics, unknown_key_words


def load_sweep(source: str, overrides: Sequence[str] = (), *, in_place: bool = False) -> Sweep:
    """Read a sweep file, or a packaged one where no such file is found from here, and apply
    `key=value` overrides.

    Paths come out absolute, as `load_recipe` makes them. Override keys are sweep keys (`run_cap=4`,
    `metric.goal=maximize`), recipe keys for every trial (`set.train.steps=50`) and parts of a
    parameter (`parameters.optim.lr.max=0.01`). InputError names the file, the line and the key.
    in_place: storage_path and name of the sweep.yaml in a sweep's folder are that folder.
    """
    file, text = _open(source)
    data = _plain(file)
    if in_place and is_kept(Path(file.label), "sweep.yaml"):
        storage = storage_folder(str(data.get("storage_path", "runs")))
        here = moved(Path(file.label), storage, str(data.get("name")))
        data |= {key: written(value) for key, value in here.items()}
    data.setdefault("card", head_card(text))
    typed = list(key_values(overrides, "run_cap=4 or set.train.steps=50"))
    # kinds first: they drop what belongs to another one
    for key, raw in sorted(typed, key=lambda pair: pair[0] not in _KINDS):
        file = file.typed(_override(data, key, parse_value(raw)))
    sweep = build_sweep(data, file)
    return sweep.model_copy(update={"base": _base(sweep, file)})


def _base(sweep: Sweep, file: YamlFile) -> str:
    """The sweep's base, absolute unless it is the name of a packaged recipe.

    A run is also found as other commands find it.
    """
    folders, is_run = file.folders_of("base"), sweep.task == "sample"
    field = PathField(root=STORAGE, run=True) if is_run else PathField()
    place = make_absolute(sweep.base, field, folders, f"{file.where('base')}: base")
    known = is_run or looks_like_path(sweep.base) or is_file(Path(place))
    return place if known else sweep.base


def build_sweep(data: Mapping[str, Any], file: YamlFile) -> Sweep:
    """Check a sweep's plain data; `file` says where each key stands."""
    for key in data:
        if key not in Sweep.model_fields:
            raise InputError(f"{file.where(key)}: {unknown_key_words(key)}")
    if not isinstance(data.get("parameters"), Mapping) or not data["parameters"]:
        raise InputError(
            f"{file.where('parameters')}: parameters: want a mapping of recipe keys, such as"
            " optim.lr: {min: 1e-4, max: 1e-2}"
        )
    check_metrics(data, file)
    check_halving(data.get("early_terminate"), file)
    made = read_parameters(data["parameters"], file)
    both = [key for key in made if key in data.get("set", {})]
    if both:
        raise InputError(
            f"{file.where('set.' + both[0])}: {both[0]} is both set and searched; leave one out"
        )
    fixed = {
        key: checked(f"set.{key}", key, value, file) for key, value in data.get("set", {}).items()
    }
    for section, keys in (("parameters", made), ("set", fixed)):
        for key in keys:
            if key in ("name", "storage_path") or (
                section == "parameters" and key.startswith("resources.")
            ):
                raise InputError(
                    f"{file.where(f'{section}.{key}')}: {key} belongs to the whole sweep, of which"
                    f" each trial gets its part; {_OWN}"
                )
    points = _points(data.get("points"), made, file)
    places = {
        name: make_absolute(
            data[name], path_field(field), file.folders_of(name), f"{file.where(name)}: {name}"
        )
        for name, field in Sweep.model_fields.items()
        if name in data
    }
    places.setdefault("storage_path", storage_folder())
    try:
        return Sweep.model_validate({**places, "parameters": made, "set": fixed, "points": points})
    except ValidationError as error:
        # what a misspelt key leaves missing is its fault
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        key = _name_of(first["loc"], listed=isinstance(file.data.get("metric"), list))
        section = re.split(r"[.\[]", key)[0]
        where = file.where(key.partition("[")[0])
        if first["type"] == "missing":
            example = _EXAMPLES.get(key, _EXAMPLES.get(section, ""))
            raise InputError(f"{where}: {key} is missing{example}") from None
        if first["type"] == "extra_forbidden":
            raise InputError(f"{where}: unknown key {key}{allowed_words(first['loc'])}") from None
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, RuleError) and not key:
            raise InputError(f"{file.where(cause.keys[0])}: {cause}") from None
        auto = (
            " or auto"
            if any(str(each["loc"][-1]).startswith("literal['auto'") for each in error.errors())
            else ""
        )
        words = (
            str(cause)
            if cause
            else f"got {show(first['input'])}, {wanted(first)}{auto}{_EXAMPLES.get(key, '')}"
        )
        raise InputError(f"{where}: {key}: {words}" if key else f"{file.label}: {words}") from None


def _name_of(loc: Sequence[int | str], *, listed: bool = False) -> str:
    """The place of an error as a file has it: stop[0].below, metric[1].goal; without the kinds,
    which pydantic names too. listed: `metric` is a list there, of which more_metrics is the rest.
    """
    if listed and loc[:1] == ("more_metrics",):
        return _name_of(("metric", int(loc[1]) + 1, *loc[2:]))
    section = str(loc[0]) if loc else ""
    tagged = any(key.startswith(f"{section}.") for key in _KINDS)
    name = section
    for part in loc[2 if tagged else 1 :]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif not re.match(_UNION_PART, part):
            name += f".{part}"
    return name


def dump_sweep(sweep: Sweep) -> str:
    """The sweep as YAML, defaults included; `load_sweep` reads it back."""
    plain = sweep.model_dump(mode="json", exclude_none=True)
    plain["card"] = {field: value for field, value in plain["card"].items() if value}
    if more := plain.pop("more_metrics"):
        plain["metric"] = [plain["metric"], *more]
    plain["parameters"] = {
        key: plain_parameter(parameter) for key, parameter in sweep.parameters.items()
    }
    for name, field in Sweep.model_fields.items():
        if name in plain and (name == "base" or path_field(field)):
            plain[name] = map_paths(plain[name], written)
    return yaml.safe_dump(
        {**plain, **{name: _as_written(plain[name]) for name in ("set", "parameters", "points")}},
        sort_keys=False,
    )


def _as_written(node: Any, paths: bool = False) -> Any:
    """Values below recipe keys that hold paths, as a file has them."""
    if isinstance(node, Mapping):
        return {
            key: _as_written(value, key_paths(key) is not None if key in known_keys() else paths)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_as_written(value, paths) for value in node]
    return map_paths(node, written) if paths else node


def plain_parameter(parameter: Parameter) -> dict[str, Any]:
    """A parameter as the sweep file would have it, without what is not said of it."""
    plain = parameter.model_dump(mode="json")
    return {
        field: value
        for field, value in plain.items()
        if field == "value" or value not in (None, {})
    }


def text_sweep(text: str, label: str) -> Sweep:
    """`load_sweep` for YAML already in memory."""
    file = parse_yaml(text, label)
    return build_sweep(_plain(file), file)


_OWN = "name, storage_path and resources stand at the top of the file"


_KINDS = ("early_terminate.type", "search.kind")


_UNION_PART = rf"constrained-|literal\[|function-|{TAG}"  # pydantic's words for a member of a union


_EXAMPLES = {
    "name": ", such as name: head",
    "base": ", such as base: sweep_proxy (a packaged recipe or a file)",
    "metric": ", such as metric: {name: ema/shoot/nmse, goal: minimize}",
    "search": ", such as search: {kind: tpe}",
    "stop": ", such as stop: [{metric: ema/std/mean, below: 0.1, after: 150}]",
    "warm_start": ", such as warm_start: [runs/head]",
    "early_terminate": ", such as early_terminate: {type: hyperband, min_iter: 100, eta: 3}",
    "resources": ", such as resources: {cpus_per_worker: auto}",
}


def _plain(file: YamlFile) -> dict[str, Any]:
    """The file's data with dotted keys in `set` and `parameters`."""
    return {
        "set": {},
        **{key: _dotted(key, value, file.where(key)) for key, value in file.data.items()},
    }


def _dotted(key: str, value: Any, where: str) -> Any:
    """The value of a top-level key; `set` and `parameters` with dotted keys."""
    if key == "set":
        return flat(value or {}, f"{where}: set")
    if key == "parameters" and isinstance(value, Mapping):
        return flat_parameters(value, f"{where}: parameters")
    return value


def _points(
    points: Any, parameters: Mapping[str, Parameter], file: YamlFile
) -> list[dict[str, Any]]:
    """The known good points; one that leaves nothing to be drawn is there once."""
    if not isinstance(points, list | None):
        raise InputError(
            f"{file.where('points')}: points: got {show(points)}, want a list of mappings, such as"
            " [{optim.lr: 1e-3}]"
        )
    made = [
        _point(point, f"points[{index}]", parameters, file)
        for index, point in enumerate(points or ())
    ]
    for index, point in enumerate(made):
        if point in made[:index] and all(
            key in point for key in parameters if drawn(parameters[key], point)
        ):
            raise InputError(
                f"{file.where('points')}: points[{index}] is points[{made.index(point)}] again;"
                " seeds: 2 trains every setting twice"
            )
    return made


def _point(
    point: Any, name: str, parameters: Mapping[str, Parameter], file: YamlFile
) -> dict[str, Any]:
    """A known good point, as dotted keys with values of the recipe's types, each one that could
    be drawn.
    """
    made: dict[str, Any] = {}
    where = f"{file.where('points')}: {name}"
    for key, value in flat(point, where).items():
        if key not in parameters:
            raise InputError(f"{where}: {key} is not searched{did_you_mean(key, parameters)}")
        made[key] = checked("points", key, value, file)
        if not inside(parameters[key], made[key]):
            between = " to " if hasattr(parameters[key], "min") else ", "
            allowed = between.join(map(show, ends(parameters[key])))
            raise InputError(f"{where}: {key}: got {show(value)}, want {allowed}")
    return made


def _open(source: str) -> tuple[YamlFile, str]:
    """A sweep file, or the packaged one of that name where no such file is found from here, with
    its text.
    """
    path = source_path(source)
    names = packaged_sweeps()
    is_there = exists(path)
    if is_file(path):
        file = read_yaml(path)
        if not is_sweep(file.data):
            raise InputError(
                f"{source}: want a sweep, which has `parameters` and a `metric`; this is"
                f" {what_it_is(path)}"
            )
        return file, path.read_text(encoding="utf-8")
    if not is_there and (name := f"{path.name.removesuffix('.yaml')}.yaml") in names:
        text = (packaged("sweeps") / name).read_text(encoding="utf-8")
        return parse_yaml(text, f"flowray/sweeps/{name}"), text
    if what := what_it_is(path):
        raise InputError(f"{source}: want a sweep, this is {what}")
    if is_there:
        raise InputError(f"{source}: {no_such(path)}; want a sweep file")
    comes_first(source, "the sweep", "flowray.tune")
    near = did_you_mean(
        path.name.removesuffix(".yaml"), [name.removesuffix(".yaml") for name in names]
    )
    if not near and looks_like_path(source):
        raise InputError(f"{source}: {no_such(path)}; packaged sweeps: {', '.join(names)}")
    raise InputError(
        f"{source}: no such sweep file{near or '; packaged sweeps: ' + ', '.join(names)}"
    )


def _override(data: dict[str, Any], key: str, value: Any) -> str:
    """Lay one typed key over the file's data.

    Returns what of them is now typed: the key, or the section that begins anew with it, as one does
    whose kind is another than the file's.
    """
    head, _, rest = key.partition(".")
    if head not in Sweep.model_fields:
        raise InputError(f"{COMMAND_LINE}: {unknown_key_words(key)}")
    if head == "set" and rest:
        data["set"] = {**data["set"], rest: value}
    elif head == "parameters" and rest:
        name, _, field = rest.rpartition(".")
        whole = field not in FIELDS  # parameters.KEY={...} replaces, parameters.KEY.max=... changes
        old = data.get("parameters") or {}
        data["parameters"] = (
            {**old, rest: value}
            if whole
            else {**old, name: {**(old.get(name) or {}), field: value}}
        )
    elif rest:
        old, more = data.get(head), []
        if head == "metric" and isinstance(old, list):  # the first, as `metric` alone
            old, *more = old or [None]
        if not isinstance(old, Mapping | None):
            words = f"{head} is {show(old)}, want a mapping, in {{ }}{_EXAMPLES.get(head, '')}"
            raise InputError(f"{COMMAND_LINE}: {key}: {words}")
        if more:
            data[head] = [{**(old or {}), rest: value}, *more]
            return head
        if old is None or (key in _KINDS and old.get(rest) != value):
            data[head] = {rest: value}
            return head
        data[head] = {**old, rest: value}
    else:
        data[key] = _dotted(key, value, COMMAND_LINE)
    return key
