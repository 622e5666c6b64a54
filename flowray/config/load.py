"""A recipe from a packaged name or a file: layers of YAML and `key=value` over the defaults, then
one validation.

A later layer wins key by key; a `kind` that differs from the one below drops the other keys of its
mapping. Every key remembers where it was last set, so that any error is one line with the place,
the value and what is allowed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from flowray.config.errors import InputError, OtherKind, RuleError, did_you_mean
from flowray.config.paths import (
    PathField,
    exists,
    is_file,
    is_folder,
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
from flowray.config.schema import (
    Slot,
    coerce,
    is_bool_as_number,
    kind_of,
    known_keys,
    show,
    unknown_key,
    want,
)
from flowray.config.sources import (
    comes_first,
    is_kept,
    is_sweep,
    packaged,
    recipe_names,
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

__all__ = [
    "Loaded",
    "coerce",
    "dump_recipe",
    "known_keys",
    "load_recipe",
    "override_recipe",
    "recipe_diffs",
    "recipe_names",
]

Where = Callable[[str], str]


@dataclass(frozen=True)
class Loaded:
    """A recipe, the file it came from, and the dotted keys in which it differs from its `base:`
    as (old, new).
    """

    recipe: Recipe
    source: str
    diffs: dict[str, tuple[Any, Any]]


def load_recipe(source: str, overrides: Sequence[str] = (), *, in_place: bool = False) -> Loaded:
    """Load a packaged recipe by name, or a YAML file by path, and apply `key=value` overrides in
    order.

    Paths come out absolute: those of a file start from its folder, those typed from the working
    directory, and a relative storage_path, wherever it stands, from FLOWRAY_STORAGE or, where that
    is not set, the working directory. In the files of a run or sweep, of which older ones have
    relative paths, what is not beside the file is looked for from the working directory.
    in_place: storage_path and name of a run's config.yaml are the folder it is in.
    Raises InputError, one line: `file.yaml:12: loss.kl.weight: got 'abc', want a number >= 0`.
    """
    tree, base, label = _load_tree(source, Path(), ())
    if in_place and is_kept(Path(label), "config.yaml"):
        here = moved(Path(label), str(tree.data["storage_path"]), str(tree.data["name"]))
        tree.merge(here, _Place(lambda _: label, ()))
    pairs = [(key, _typed(key, raw)) for key, raw in key_values(overrides, "optim.lr=3e-4")]
    tree.override(pairs, COMMAND_LINE, (Path.cwd(),))
    recipe = tree.recipe(label)
    return Loaded(recipe, label, recipe_diffs(base, recipe))


def override_recipe(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A copy with dotted keys set to Python values; a `kind` is applied before the options below
    it, whatever the order.

    Paths are taken as they are.
    """
    tree = _Tree(recipe.model_dump())
    tree.override(list(values.items()), "")
    return tree.recipe("")


def dump_recipe(recipe: Recipe) -> str:
    """YAML text, every key written out, that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(_as_written(recipe), sort_keys=False, allow_unicode=True, width=120)


def _as_written(node: BaseModel) -> dict[str, Any]:
    data = node.model_dump(mode="json")
    for name, field in type(node).model_fields.items():
        if isinstance(section := getattr(node, name), BaseModel):
            data[name] = _as_written(section)
        elif path_field(field):
            data[name] = map_paths(data[name], written)
    return data


def recipe_diffs(old: BaseModel, new: BaseModel, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, as (old, new).

    Where the kind differs, the options of the new kind against its own defaults.
    """
    same_class = type(old) is type(new)
    found: dict[str, tuple[Any, Any]] = {}
    for name, field in type(new).model_fields.items():
        before = (
            getattr(old, name, None)
            if same_class or name == "kind"
            else None
            if field.is_required()
            else field.get_default()
        )
        after = getattr(new, name)
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            found |= recipe_diffs(before, after, f"{prefix}{name}.")
        elif before != after:
            found[prefix + name] = (_plain(before), _plain(after))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.model_dump() if isinstance(value, BaseModel) else value


@dataclass(frozen=True)
class _Place:
    """Where a layer comes from: what errors call its keys, and the folders that its relative paths
    start from, see `paths.absolute` (none: they are left as they are).
    """

    where: Where
    folders: tuple[Path, ...]

    def made_absolute(self, key: str, value: Any, paths: PathField | None) -> Any:
        """A value with its paths absolute; InputError where one cannot be."""
        if not self.folders:
            return value
        return make_absolute(value, paths, self.folders, f"{self.where(key)}: {key}")


class _Tree:
    """The settings gathered so far, as nested mappings over all defaults, and where each dotted
    key was last set.
    """

    def __init__(self, data: dict[str, Any], origin: dict[str, str] | None = None):
        self.data = data
        self.origin = origin or {}

    def merge(self, layer: Mapping[str, Any], place: _Place) -> None:
        """Lay one layer over the tree; InputError for keys and kinds that do not exist."""
        self._merge_section(self.data, layer, Recipe, "", place)

    def override(
        self, pairs: Iterable[tuple[str, Any]], where: str, folders: tuple[Path, ...] = ()
    ) -> None:
        """Set dotted keys in order, kinds first (outermost first): an option may then stand
        before the kind it belongs to.
        """
        leaves = [leaf for key, value in pairs for leaf in _leaves(key, value, where)]
        leaves.sort(
            key=lambda leaf: (0, leaf[0].count(".")) if leaf[0].endswith(".kind") else (1, 0)
        )
        for key, value in leaves:
            layer: dict[str, Any] = {}
            inner = layer
            *sections, last = key.split(".")
            for name in sections:
                inner = inner.setdefault(name, {})
            inner[last] = value
            self.merge(layer, _Place(lambda _: where, folders))

    def recipe(self, label: str) -> Recipe:
        """Validate the whole; the first error becomes one line that points at the layer which
        set the value.
        """
        try:
            recipe = Recipe.model_validate(self.data)
        except ValidationError as error:
            raise InputError(self._explain(error, label)) from None
        for key in self.origin:
            given, accepted = _at(self.data, key), _at(recipe, key)
            if is_bool_as_number(given, accepted):
                raise InputError(
                    _line(
                        self.origin[key],
                        f"{key}: got {show(given)}, want {want(known_keys()[key][0].field)}",
                    )
                )
        return recipe

    def _merge_section(
        self,
        into: dict[str, Any],
        layer: Mapping[str, Any],
        cls: type[BaseModel],
        prefix: str,
        place: _Place,
    ) -> None:
        where = place.where
        for name, value in layer.items():
            key = prefix + name
            if name not in cls.model_fields:
                raise _misplaced(key, cls, where(key))
            sections = Slot(cls, name, cls.model_fields[name]).sections
            nullable = type(None) in getattr(cls.model_fields[name].annotation, "__args__", ())
            if not sections or (value is None and nullable):
                into[name] = place.made_absolute(key, value, path_field(cls.model_fields[name]))
                self._set(key, where(key))
                continue
            if value is None:  # a section whose keys are all commented out
                continue
            if not isinstance(value, Mapping):
                kinds = [kind for section in sections if (kind := kind_of(section))]
                hint = f"; type {key}.kind={value}" if value in kinds else ""
                raise InputError(
                    _line(where(key), f"{key}: got {show(value)}, want a mapping{hint}")
                )
            self._set(key, where(key))
            below = into[name] if isinstance(into[name], dict) else {}
            chosen = _choose(sections, value, below, key, where)
            if "kind" in value and value["kind"] != below.get("kind"):
                below = _defaults(chosen)
                self._forget(key)
            into[name] = below
            self._merge_section(below, value, chosen, f"{key}.", place)

    def _set(self, key: str, where: str) -> None:
        self.origin.pop(key, None)  # to the end: the last entry is the latest
        self.origin[key] = where

    def _forget(self, section: str) -> None:
        for key in [key for key in self.origin if key.startswith(f"{section}.")]:
            del self.origin[key]

    def _explain(self, error: ValidationError, label: str) -> str:
        first, more = error.errors()[0], error.error_count() - 1
        key, slot = _locate(first["loc"])
        cause = first.get("ctx", {}).get("error")
        plain = slot is not None and not slot.sections
        if first["type"] == "missing" and slot is not None and key not in self.origin:
            kind = kind_of(slot.owner)
            text = (
                f"{key}: is missing{f' (kind {kind} needs it)' if kind else ''}, want"
                f" {want(slot.field)}"
            )
        elif plain and slot is not None:
            got = _at(self.data, key)
            unquoted = (
                slot.field.annotation is str
                and got is not None
                and not isinstance(got, Mapping | list)
            )
            text = (
                f"{key}: got {show(got)},"
                f" {cause or f'want {want(slot.field)}'}"
                f"{' in quotes' if unquoted and not cause else ''}"
            )
        else:
            reason = str(cause or first["msg"])
            if isinstance(cause, RuleError) and cause.exclusive:
                reason += _rivals(_at(self.data, key) if key else self.data, cause.keys)
            text = f"{key}: {reason}" if key else reason
        others = f" (and {more} more error{'s' if more > 1 else ''})" if more else ""
        named = cause.keys if isinstance(cause, RuleError) else ()
        return _line(self._origin_of(key, named, label), text + others)

    def _origin_of(self, key: str, named: Collection[str], label: str) -> str:
        """Where `key` was set last; for a rule over a section, where the latest key that it
        names was, or of its section.
        """
        if key in self.origin and not known_keys()[key][0].sections:
            return self.origin[key]
        scope = key
        while True:
            inside = [name for name in self.origin if not scope or name.startswith(f"{scope}.")]
            found = [
                name
                for name in inside
                if {name.removeprefix(f"{scope}."), name.rpartition(".")[2]} & set(named)
            ]
            if found or (scope and inside):
                return self.origin[(found or inside)[-1]]
            if not scope:
                return label
            scope = scope.rpartition(".")[0]


def _load_tree(source: str, folder: Path, above: tuple[str, ...]) -> tuple[_Tree, Recipe, str]:
    """(tree of the file over its base, the base as a recipe, label of the file); `above` are the
    files that lead here.
    """
    file = _open(source, folder)
    if file.label in above:
        raise _BadSource(f"{source} leads back to itself: {' -> '.join((*above, file.label))}")
    layer = dict(file.data)
    base = layer.pop("base", None)
    tree = _Tree(Recipe(storage_path=storage_folder()).model_dump())
    if base is not None:
        if not isinstance(base, str):
            raise InputError(
                f"{file.where('base')}: base: got {show(base)}, want the name or path of a recipe"
            )
        try:
            tree, _, _ = _load_tree(base, Path(file.label).parent, (*above, file.label))
        except _BadSource as error:
            raise InputError(f"{file.where('base')}: base: {error}") from None
    below = _Tree(copy.deepcopy(tree.data), dict(tree.origin)).recipe(file.where("base"))
    tree.merge(layer, _Place(file.where, file.folders))
    return tree, below, file.label


class _BadSource(InputError):
    """A name or path that gives no recipe; the file that says it adds its place."""


def _open(source: str, folder: Path) -> YamlFile:
    try:
        path = Path(os.path.normpath(source_path(source, folder)))
        is_there = exists(path)
    except InputError as error:
        raise _BadSource(str(error)) from None
    if is_file(path):
        file = read_yaml(path)
        if is_sweep(file.data):
            raise _BadSource(f"{path}: want a recipe, this is {what_it_is(path)}")
        if is_kept(path, "config.yaml") and "base" not in file.data:
            _refuse_cut_off(file)
        return file
    names = recipe_names()
    if source in names:
        text = (packaged("recipes") / f"{source}.yaml").read_text(encoding="utf-8")
        return parse_yaml(text, f"flowray/recipes/{source}.yaml")
    if what := what_it_is(path if is_there else source):
        raise _BadSource(f"{path if is_there else source}: want a recipe, this is {what}")
    if is_folder(path):
        raise _BadSource(f"{path} is a folder, want the path of a .yaml file")
    if looks_like_path(source):
        name = path.name.removesuffix(".yaml")
        if name in names:
            raise _BadSource(f"{source}: no such file; type {name} for the packaged recipe")
        raise _BadSource(f"{path}: {no_such(path)}")
    comes_first(source, "the recipe", "flowray.train")
    raise _BadSource(
        f"unknown recipe {source!r}{did_you_mean(source, names)} (packaged: {', '.join(names)}; or"
        " the path of a .yaml file)"
    )


def _refuse_cut_off(file: YamlFile) -> None:
    """InputError where the config.yaml of a run, which holds every section, lacks one.

    The defaults in its place would be another recipe.
    """
    for name, field in Recipe.model_fields.items():
        if Slot(Recipe, name, field).sections and not isinstance(file.data.get(name), Mapping):
            why = "it was cut off, or a part was taken out; put the whole file back"
            raise InputError(f"{file.label}: has no {name}: {why}")


def _typed(key: str, raw: str) -> Any:
    """The value of `key=raw`; a text field takes the text as typed where YAML makes something
    else of it.
    """
    value = parse_value(raw)
    slots = known_keys().get(key, ())
    if value is not None and any(slot.field.annotation in (str, str | None) for slot in slots):
        value = value if isinstance(value, str) else raw
    return value


def _leaves(key: str, value: Any, where: str) -> list[tuple[str, Any]]:
    """A mapping given for a section, as the dotted keys inside it."""
    slots = known_keys().get(key)
    if slots is None:
        raise InputError(_line(where, unknown_key(key)))
    if isinstance(value, Mapping) and any(slot.sections for slot in slots):
        return [
            leaf for name, inner in value.items() for leaf in _leaves(f"{key}.{name}", inner, where)
        ]
    return [(key, value)]


def _choose(
    sections: tuple[type[BaseModel], ...],
    value: Mapping[str, Any],
    below: Mapping[str, Any],
    key: str,
    where: Where,
) -> type[BaseModel]:
    """The config class of a section: the only one, or the union member that `kind` names."""
    kinds = {kind: section for section in sections if (kind := kind_of(section))}
    if len(sections) == 1 and not kinds:
        return sections[0]
    kind = value.get("kind", below.get("kind"))
    if not isinstance(kind, str) or kind not in kinds:
        near = did_you_mean(str(kind), kinds)
        raise InputError(
            _line(
                where(f"{key}.kind"),
                f"{key}.kind: got {show(kind)}, want one of {', '.join(kinds)}{near}",
            )
        )
    return kinds[kind]


def _defaults(cls: type[BaseModel]) -> dict[str, Any]:
    return {
        name: _plain(field.get_default())
        for name, field in cls.model_fields.items()
        if not field.is_required()
    }


def _misplaced(key: str, cls: type[BaseModel], where: str) -> InputError:
    """Why `key` is no key of the section class `cls`: it belongs to another kind, or to nothing."""
    owners = [kind for slot in known_keys().get(key, ()) if (kind := kind_of(slot.owner))]
    section, _, _ = key.rpartition(".")
    if not owners:
        return InputError(_line(where, unknown_key(key)))
    kinds = list(dict.fromkeys(owners))
    takes = ", ".join(name for name in cls.model_fields if name != "kind") or "no keys"
    words = (
        f"{key} belongs to kind {' or '.join(kinds)}, but {section}.kind is {kind_of(cls)} (which"
        f" takes {takes}); set {section}.kind too, or drop the key"
    )
    return OtherKind(_line(where, words), section, kinds)


def _rivals(section: Mapping[str, Any], keys: Collection[str]) -> str:
    """The values of options that exclude each other: one of them may come from a base recipe
    that the user has not in view.
    """
    named = {name: value for name, value in section.items() if name in keys and value is not None}
    if len(named) < 2:
        return ""
    return (
        f" ({', '.join(f'{name} is {show(value)}' for name, value in named.items())}; null unsets"
        " one)"
    )


def _locate(loc: tuple[int | str, ...]) -> tuple[str, Slot | None]:
    """(dotted key, its field) for the place pydantic reports, which also holds union tags and
    positions in lists.
    """
    cls: type[BaseModel] = Recipe
    key, slot = "", None
    for part in map(str, loc):
        tagged = _tagged(slot, part) if slot is not None and len(slot.sections) > 1 else None
        if tagged is not None:
            cls = tagged
            continue
        if part not in cls.model_fields or (slot is not None and not slot.sections):
            break
        key = f"{key}.{part}" if key else part
        slot = Slot(cls, part, cls.model_fields[part])
        if len(slot.sections) == 1:
            cls = slot.sections[0]
    return key, slot


def _tagged(slot: Slot, tag: str) -> type[BaseModel] | None:
    return next((section for section in slot.sections if kind_of(section) == tag), None)


def _at(node: Any, key: str) -> Any:
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else getattr(node, name, None)
    return node


def _line(where: str, text: str) -> str:
    return f"{where}: {text}" if where else text
