"""Loading a sweep: YAML, overrides, recipe keys and values checked, one line for what is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flowray.config.errors import InputError, did_you_mean
from flowray.config.keys import KEYS, alternatives, describe
from flowray.config.load import load_recipe, override_recipe, recipe_names
from flowray.config.parameters import (
    FIELDS,
    checked,
    ends,
    flat,
    flat_parameters,
    read_parameters,
    wanted,
)
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
from flowray.config.recipe import Recipe
from flowray.config.scale import scale_keys
from flowray.config.schema import key_paths, kind_of, known_keys, members, show
from flowray.config.search import LearningSearch
from flowray.config.sources import (
    comes_first,
    is_kept,
    is_sweep,
    packaged,
    packaged_sweeps,
    what_it_is,
)
from flowray.config.sweep import (
    Asha,
    Hyperband,
    Median,
    Parameter,
    SuccessiveHalving,
    Sweep,
    SweepCard,
    drawn,
    in_order,
    inside,
    milestones,
)
from flowray.config.yamlfile import (
    COMMAND_LINE,
    YamlFile,
    key_values,
    parse_value,
    parse_yaml,
    read_yaml,
)

_WANDB_ONLY = (
    "program",
    "command",
    "project",
    "entity",
    "description_file",
    "job",
    "image_uri",
    "controller",
    "enable",
)
_INSTEAD = {  # W&B's and Ray's words for what a sweep has under another name
    "prior_runs": "warm_start: [runs/OLD]",
    "num_samples": "run_cap",
    "count": "run_cap",
    "mode": "metric: {name: ..., goal: minimize}",
    "search_alg": "search: {kind: tpe}",
    "scheduler": "early_terminate: {type: hyperband, min_iter: 100}",
    "time_budget_s": "time_budget",
    "max_concurrent_trials": "max_concurrent",
    "param_space": "parameters",
    "resources_per_trial": "resources",
}


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


_FIELD = re.compile(
    r"# +(TITLE|PURPOSE|KEY_DIFFS|DATASET|HARDWARE|CORE PARAMS|TAGS|NOTES) *: *(.*)"
)
_EXPECTS = re.compile(r"# +Expect(?:ed reading)? *: *(.*)")


def head_card(text: str) -> dict[str, Any]:
    """The experiment card in the comment block on top of a file: `# PURPOSE : ...`, `# Expected
    reading: ...`, up to a gap.
    """
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if field := _FIELD.match(line):
            current = found.setdefault(field[1].lower().replace(" ", "_"), [field[2]])
        elif expects := _EXPECTS.match(line):
            current = found.setdefault("expects", [expects[1]])
        elif words := line.lstrip("# "):
            current.append(words)
        else:
            current = []
    card: dict[str, Any] = {name: " ".join(lines) for name, lines in found.items()}
    if "tags" in card:
        card["tags"] = [tag.strip() for tag in card["tags"].strip("[] ").split(",") if tag.strip()]
    return card


def build_sweep(data: Mapping[str, Any], file: YamlFile) -> Sweep:
    """Check a sweep's plain data; `file` says where each key stands."""
    for key in data:
        if key not in Sweep.model_fields:
            raise InputError(f"{file.where(key)}: {_unknown(key)}")
    if not isinstance(data.get("parameters"), Mapping) or not data["parameters"]:
        raise InputError(
            f"{file.where('parameters')}: parameters: want a mapping of recipe keys, such as"
            " optim.lr: {min: 1e-4, max: 1e-2}"
        )
    _check_metrics(data, file)
    _check_halving(data.get("early_terminate"), file)
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
        first = error.errors()[0]
        section, *rest = map(str, first["loc"]) if first["loc"] else ("",)
        if any(key.startswith(f"{section}.") for key in _KINDS):
            rest = rest[1:]  # without its kind, which pydantic names too
        key = ".".join(part for part in (section, *rest) if not re.match(_UNION_PART, part))
        if first["type"] == "missing":
            example = _EXAMPLES.get(key, _EXAMPLES.get(section, ""))
            raise InputError(f"{file.where(key)}: {key} is missing{example}") from None
        if first["type"] == "extra_forbidden":
            raise InputError(
                f"{file.where(key)}: unknown key {key}{_nearby(first['loc'])}"
            ) from None
        cause = first.get("ctx", {}).get("error")
        # a rule over several keys begins with the one to blame
        if cause and not key and (about := re.match(r"[a-z_]+", str(cause))):
            raise InputError(f"{file.where(about[0])}: {cause}") from None
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
        raise InputError(
            f"{file.where(key)}: {key}: {words}" if key else f"{file.label}: {words}"
        ) from None


def base_recipe(sweep: Sweep) -> Recipe:
    """The recipe that every trial starts from: `base`, for task sample that of the run `base`,
    with `set` applied.
    """
    if sweep.task == "train":
        return override_recipe(load_recipe(sweep.base).recipe, sweep.set)
    config = Path(sweep.base) / "config.yaml"
    if not is_file(config):
        run = Path(sweep.base)
        what = f"{no_such(sweep.base)}" if not exists(run) else "no trained run"
        recipe = run.name if run.name in recipe_names() else "RECIPE"
        raise InputError(
            f"sweep {sweep.name}: it scores the pictures of a trained run, and base {sweep.base}:"
            f" {what}; type python -m flowray.train {recipe} first, or base=runs/NAME of"
            " another run"
        )
    return override_recipe(load_recipe(str(config)).recipe, sweep.set)


def check_trials(sweep: Sweep, base: Recipe) -> None:
    """Make the recipes at the ends of the space, so that a range that the recipe refuses is found
    before anything runs.

    Also refuses metrics of the raw weights where the recipe probes the EMA only, as they would
    never be seen; a ranking of what does not compare; rungs without a checkpoint.
    """
    if base.probes.doctor_every == 0 and any(rule.finding for rule in sweep.stop):
        raise InputError(
            f"sweep {sweep.name}: a stop rule waits for a finding, but no doctor comes; type"
            " set.probes.doctor_every=1"
        )
    if sweep.task == "sample" and base.data.shards != "shapes":
        shards = base.data.shards
        raise InputError(
            f"sweep {sweep.name}: {sweep.base} has data.shards {shards}; only pictures of shapes"
            " have an exact score"
        )
    for name in (
        *(metric.name for metric in sweep.objectives),
        *(rule.metric for rule in sweep.stop if rule.metric),
    ):
        if sweep.task == "train" and name.startswith(_NOT_REPORTED):
            raise InputError(
                f"sweep {sweep.name}: {name} is in the training log only; trials are judged by"
                " their probes: ema/shoot/nmse, loss/flow, ..."
            )
        if name.startswith(_NO_EMA):
            raise InputError(
                f"sweep {sweep.name}: {name} is not measured on the EMA weights; type"
                f" {name.removeprefix('ema/')}"
            )
        if not base.probes.raw and name.startswith(_PROBED):
            raise InputError(
                f"sweep {sweep.name}: {name} is not probed, as probes.raw is false; type"
                f" ema/{name}, or set probes.raw: true"
            )
        if sweep.task == "train" and name.startswith("eval/"):
            raise InputError(
                f"sweep {sweep.name}: {name} is no probe of a training run; take ema/shoot/nmse, or"
                " task: sample"
            )
    _check_scale(sweep, base)
    for case in _cases(sweep):
        try:
            trial = override_recipe(base, case)
        except InputError as error:
            words = ", ".join(f"{key}={show(value)}" for key, value in case.items())
            raise InputError(
                f"sweep {sweep.name}: no recipe can be made with {words}:"
                f" {error}{_condition_hint(sweep, str(error))}"
            ) from None
        _check_rungs(sweep, base, trial)


def _check_scale(sweep: Sweep, base: Recipe) -> None:
    """InputError where trials of another scale would be ranked with each other, as halving and a
    learning sampler do with all there are.
    """
    searched = [key for key, parameter in sweep.parameters.items() if len(ends(parameter)) > 1]
    mixed = scale_keys(
        searched, own_pictures=bool(base.data.val_shards) and "data.val_shards" not in searched
    )
    instead = {"early_terminate": "early_terminate=null"} if sweep.early_terminate else {}
    instead |= (
        {"method bayes": "method=random search=null" if sweep.search else "method=random"}
        if sweep.method == "bayes"
        else {}
    )
    if mixed and instead:
        raise InputError(
            f"sweep {sweep.name}: {mixed[0]} sets the scale of every value, and"
            f" {' and '.join(instead)} would rank across it; type {' '.join(instead.values())}, or"
            " make a sweep for each value of it"
        )


def _check_rungs(sweep: Sweep, base: Recipe, trial: Recipe) -> None:
    """InputError where a trial that waits at a rung would have no checkpoint there and train a
    part of its steps again.
    """
    if not isinstance(sweep.early_terminate, SuccessiveHalving):
        return
    longest = (
        max(ends(sweep.parameters["train.steps"]))
        if "train.steps" in sweep.parameters
        else base.train.steps
    )
    rungs, every, cadence = (
        milestones(sweep.early_terminate, longest),
        trial.train.probe_every,
        trial.train.checkpoint_every,
    )
    waits = sorted(
        {
            math.ceil(rung / every) * every
            for rung in rungs
            if math.ceil(rung / every) * every < trial.train.steps
        }
    )
    if any(step % cadence for step in waits):
        at = ", ".join(map(str, waits))
        raise InputError(
            f"sweep {sweep.name}: train.checkpoint_every is {cadence}, but trials wait at step {at}"
            " (the first probe from a rung on) and go on from a checkpoint there; type"
            f" set.train.checkpoint_every={math.gcd(*waits)}"
        )


def _cases(sweep: Sweep) -> list[dict[str, Any]]:
    """Points at the ends of the space: every parameter alone, with what its condition asks for;
    all at one end, for every kind.
    """
    parameters = sweep.parameters

    def corner(fixed: Mapping[str, Any], end: int) -> dict[str, Any]:
        point: dict[str, Any] = {}
        for key in in_order(parameters):
            if drawn(parameters[key], point):
                point[key] = fixed.get(key, ends(parameters[key])[end])
        return point

    def needed(key: str) -> dict[str, Any]:
        wanted = {parent: values[0] for parent, values in parameters[key].when.items()}
        return {**{k: v for parent in wanted for k, v in needed(parent).items()}, **wanted}

    cases = [
        {**needed(key), key: value}
        for key, parameter in parameters.items()
        for value in ends(parameter)
    ]
    kinds = {key: ends(parameters[key]) for key in parameters if key.endswith(".kind")}
    cases += [
        corner({**needed(key), key: kind}, end)
        for key, values in kinds.items()
        for kind in values
        for end in (0, -1)
    ]
    cases += [corner({}, end) for end in (0, -1)]
    return cases + [dict(point) for point in sweep.points]


def _condition_hint(sweep: Sweep, error: str) -> str:
    """What to type where an option of one kind is searched together with another kind."""
    found = re.search(r"(\S+)\.\w+ belongs to kind (.+?), but", error)
    if found is None or f"{found[1]}.kind" not in sweep.parameters:
        return ""
    return (
        f"; to search it with that kind only, type when: {{{found[1]}.kind:"
        f" [{found[2].replace(' or ', ', ')}]}}"
    )


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


# measured for raw and EMA weights
_PROBED = ("flow/", "shoot/", "text/", "mu/", "logvar/", "std/", "z_init/", "scale/", "teacher/")
_NO_EMA = ("ema/loss/", "ema/vae/", "ema/latent/")
_NOT_REPORTED = tuple(
    f"{ema}{group}/"
    for ema in ("", "ema/")
    for group in ("grad", "lr", "perf", "amp", "weight", "step", "ent")
)
_OWN = "name, storage_path and resources stand at the top of the file"
_KINDS = ("early_terminate.type", "search.kind")
_UNION_PART = r"constrained-|literal\[|function-"  # pydantic's words for a member of a union
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
    made = [_point(point, parameters, file) for point in points or ()]
    for index, point in enumerate(made):
        if point in made[:index] and all(
            key in point for key in parameters if drawn(parameters[key], point)
        ):
            raise InputError(
                f"{file.where('points')}: points: {index + 1} is {made.index(point) + 1} again;"
                " seeds: 2 trains every setting twice"
            )
    return made


def _point(point: Any, parameters: Mapping[str, Parameter], file: YamlFile) -> dict[str, Any]:
    """A known good point, as dotted keys with values of the recipe's types, each one that could
    be drawn.
    """
    made: dict[str, Any] = {}
    for key, value in flat(point, f"{file.where('points')}: points").items():
        if key not in parameters:
            raise InputError(
                f"{file.where('points')}: points: {key} is not"
                f" searched{did_you_mean(key, parameters)}"
            )
        made[key] = checked("points", key, value, file)
        if not inside(parameters[key], made[key]):
            low, *_, high = (
                (*ends(parameters[key]), None)
                if len(ends(parameters[key])) == 1
                else ends(parameters[key])
            )
            allowed = (
                f"{show(low)} to {show(high)}"
                if hasattr(parameters[key], "min")
                else ", ".join(map(show, ends(parameters[key])))
            )
            raise InputError(
                f"{file.where('points')}: points: {key}: got {show(value)}, want {allowed}"
            )
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
        raise InputError(f"{source}: is a folder, want a sweep file")
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
        raise InputError(f"{COMMAND_LINE}: {_unknown(key)}")
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
        old = data.get(head)
        if not isinstance(old, Mapping | None):
            raise InputError(f"{COMMAND_LINE}: {key}: {head} is not a mapping")
        if old is None or (key in _KINDS and old.get(rest) != value):
            data[head] = {rest: value}
            return head
        data[head] = {**old, rest: value}
    else:
        data[key] = _dotted(key, value, COMMAND_LINE)
    return key


def _unknown(key: str) -> str:
    if key in known_keys():
        return (
            f"{key} is a recipe key; for every trial type set.{key}=..., to search it put it under"
            " parameters"
        )
    if key in _INSTEAD:
        return f"{key} is called otherwise here; type {_INSTEAD[key]}"
    if key in _WANDB_ONLY:
        return f"{key} is known to W&B only; leave it out (base names the recipe that is trained)"
    return (
        f"unknown key {key}{did_you_mean(key, Sweep.model_fields)}; allowed:"
        f" {', '.join(Sweep.model_fields)}"
    )


def _nearby(loc: tuple[int | str, ...]) -> str:
    models: dict[str, Any] = {name: field.annotation for name, field in Sweep.model_fields.items()}
    kinds = {
        "metric": "name, goal",
        "stop": "metric, finding, below, above, gains_less_than, after, patience",
    }
    kinds["card"] = ", ".join(SweepCard.model_fields)
    kinds["resources"] = "num_workers, cpus_per_worker, gpus_per_worker"
    if loc[0] == "search":
        kinds["search"] = ", ".join(
            next(
                (cls.model_fields for cls in members(LearningSearch) if kind_of(cls) in loc),
                ["kind"],
            )
        )
    if loc[0] == "early_terminate":
        named = next((cls for cls in (Asha, Median) if cls.__name__.lower() in loc), Hyperband)
        kinds["early_terminate"] = ", ".join(named.model_fields)
    allowed = kinds.get(str(loc[0]), ", ".join(models))
    return f"{did_you_mean(str(loc[-1]), allowed.split(', '))}; allowed: {allowed}"


def _check_metrics(data: Mapping[str, Any], file: YamlFile) -> None:
    """A misspelt metric would never stop a trial, and end the sweep without a value."""
    metric, rules = data.get("metric"), data.get("stop") or []
    metrics = metric if isinstance(metric, list) else [metric]
    named = [
        ("metric.name", one.get("name") if isinstance(one, Mapping) else None) for one in metrics
    ]
    named += [
        ("stop", rule.get("metric") if isinstance(rule, Mapping) else None)
        for rule in (rules if isinstance(rules, list) else [])
    ]
    known = [name for key in KEYS for name in alternatives(key.name)]
    for at, name in named:
        if isinstance(name, str) and describe(name) is None:
            near = (
                did_you_mean(name, [*known, *(f"ema/{k}" for k in known)])
                or "; trials are judged by a probe, such as ema/shoot/nmse"
            )
            raise InputError(f"{file.where(at)}: unknown metric {name}{near}")
        if isinstance(one := metric, Mapping) and "target" in one:
            raise InputError(
                f"{file.where('metric.target')}: metric.target: a sweep has no target; it ends with"
                " run_cap or time_budget"
            )


def _check_halving(early: Any, file: YamlFile) -> None:
    """W&B also gives the rungs from the top down: max_iter / eta, max_iter / eta^2, ..., s of
    them.
    """
    if not isinstance(early, Mapping) or "max_iter" not in early or "min_iter" in early:
        return
    try:
        eta, levels = float(early.get("eta", 3)), float(early.get("s", 1))
        first = max(1, round(float(early["max_iter"]) / eta**levels))
        least = f"; yours is min_iter: {first}"
    except (TypeError, ValueError, ArithmeticError):
        least = ""
    raise InputError(
        f"{file.where('early_terminate.max_iter')}: early_terminate: max_iter and s are W&B's; type"
        f" min_iter, the first rung in steps, max_iter / eta^s{least}"
    )
