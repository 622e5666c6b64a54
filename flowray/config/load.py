"""A recipe from a packaged name or a file: layers of YAML and `key=value` over the defaults, then
one validation (tree.py).
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel

from flowray.config.errors import InputError, did_you_mean
from flowray.config.model import ModelConfig
from flowray.config.paths import (
    exists,
    is_file,
    is_folder,
    looks_like_path,
    map_paths,
    moved,
    no_such,
    path_field,
    source_path,
    storage_folder,
    written,
)
from flowray.config.recipe import Recipe
from flowray.config.schema import Slot, known_keys, show
from flowray.config.sources import (
    comes_first,
    is_kept,
    is_sweep,
    packaged,
    recipe_names,
    what_it_is,
)
from flowray.config.tree import Place, Tree, plain
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
    "dump_recipe",
    "load_recipe",
    "override_recipe",
    "recipe_diffs",
    "recipe_names",
]


# what stands around a resolved recipe: a file with the first line and without the last was cut off
_FIRST, _LAST = "--- # the resolved recipe, to its last line", "# end of the recipe"


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
        tree.merge(here, Place(lambda _: label, ()))
    pairs = [(key, _typed(key, raw)) for key, raw in key_values(overrides, "optim.lr=3e-4")]
    tree.override(pairs, COMMAND_LINE, (Path.cwd(),))
    recipe = tree.recipe(label)
    return Loaded(recipe, label, recipe_diffs(base, recipe))


def override_recipe(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A copy with dotted keys set to Python values; a `kind` is applied before the options below
    it, whatever the order.

    Paths are taken as they are.
    """
    tree = Tree(recipe.model_dump())
    tree.override(list(values.items()), "")
    return tree.recipe("")


def dump_recipe(recipe: Recipe) -> str:
    """YAML text, every key written out, that `load_recipe` reads back to an equal recipe."""
    text = yaml.safe_dump(_as_written(recipe), sort_keys=False, allow_unicode=True, width=120)
    return f"{_FIRST}\n{text}{_LAST}\n"


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
            found[prefix + name] = (plain(before), plain(after))
    return found


def _load_tree(source: str, folder: Path, above: tuple[str, ...]) -> tuple[Tree, Recipe, str]:
    """(tree of the file over its base, the base as a recipe, label of the file); `above` are the
    files that lead here.
    """
    file = _open(source, folder)
    if file.label in above:
        raise _BadSource(f"{source} leads back to itself: {' -> '.join((*above, file.label))}")
    layer = dict(file.data)
    base = layer.pop("base", None)
    tree = Tree(Recipe(storage_path=storage_folder()).model_dump())
    if base is not None:
        if not isinstance(base, str):
            raise InputError(
                f"{file.where('base')}: base: got {show(base)}, want the name or path of a recipe"
            )
        try:
            tree, _, _ = _load_tree(base, Path(file.label).parent, (*above, file.label))
        except _BadSource as error:
            raise InputError(f"{file.where('base')}: base: {error}") from None
    below = Tree(copy.deepcopy(tree.data), dict(tree.origin)).recipe(file.where("base"))
    tree.merge(layer, Place(file.where, file.folders))
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
            _refuse_cut_off(file, path.read_text(encoding="utf-8").splitlines())
        _rename_older_set(file)
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
        _refuse_misspelt(source, path, names)
    comes_first(source, "the recipe", "flowray.train")
    raise _BadSource(
        f"unknown recipe {source!r}{did_you_mean(source, names)} (packaged: {', '.join(names)}; or"
        " the path of a .yaml file)"
    )


def _refuse_misspelt(source: str, path: Path, names: list[str]) -> NoReturn:
    """_BadSource for a path where nothing is: the nearest name may be a packaged recipe's."""
    beside = path.parent.glob("*.y*ml") if is_folder(path.parent) else ()
    known = [*names, *(file.stem for file in beside)]
    near = difflib.get_close_matches(path.name.removesuffix(".yaml"), known, n=1)
    if near and near[0] in names:
        raise _BadSource(f"{source}: no such file; type {near[0]} for the packaged recipe")
    raise _BadSource(f"{path}: {no_such(path)}")


def _refuse_cut_off(file: YamlFile, lines: Sequence[str]) -> None:
    """InputError where the config.yaml of a run, which holds every section, lacks one or its end.

    The defaults in place of what is lacking would be another recipe.
    """
    lacks = _lacking(Recipe, file.data)
    lacks += [f"line {_LAST!r}"] if _FIRST in lines and _LAST not in lines else []
    if lacks:
        why = "it was cut off, or a part was taken out; put the whole file back"
        raise InputError(f"{file.label}: has no {lacks[0]}: {why}")


def _lacking(owner: type[BaseModel], data: Mapping[str, Any]) -> list[str]:
    """The sections of a config class that its mapping does not have."""
    fields = owner.model_fields.items()
    sections = [name for name, field in fields if Slot(owner, name, field).sections]
    return [name for name in sections if not isinstance(data.get(name), Mapping)]


def _rename_older_set(file: YamlFile) -> None:
    """In a resolved recipe of before `model.source`, `shapes` was the set of closed captions.

    One written by hand means today's: it does not have every section.
    """
    data = file.data
    whole = "base" not in data and not _lacking(Recipe, data)
    older = whole and _lacking(ModelConfig, data["model"]) == ["source"]
    if older and data["data"].get("shards") == "shapes":
        data["data"]["shards"] = "shapes_closed"


def _typed(key: str, raw: str) -> Any:
    """The value of `key=raw`; a text field takes the text as typed where YAML makes something
    else of it.
    """
    value = parse_value(raw)
    slots = known_keys().get(key, ())
    if value is not None and any(slot.field.annotation in (str, str | None) for slot in slots):
        value = value if isinstance(value, str) else raw
    return value
