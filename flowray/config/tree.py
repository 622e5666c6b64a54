"""The layers of a recipe, laid over each other and validated as one.

A later layer wins key by key; a `kind` that differs from the one below drops the other keys of its
mapping. Every key remembers where it was last set, so that any error is one line with the place,
the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from flowray.config.errors import InputError, OtherKind, RuleError, did_you_mean
from flowray.config.paths import PathField, make_absolute, path_field
from flowray.config.recipe import Recipe
from flowray.config.schema import (
    Slot,
    is_bool_as_number,
    kind_of,
    known_keys,
    show,
    unknown_key,
    want,
)

Where = Callable[[str], str]


@dataclass(frozen=True)
class Place:
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


class Tree:
    """The settings gathered so far, as nested mappings over all defaults, and where each dotted
    key was last set.
    """

    def __init__(self, data: dict[str, Any], origin: dict[str, str] | None = None):
        self.data = data
        self.origin = origin or {}

    def merge(self, layer: Mapping[str, Any], place: Place) -> None:
        """Lay one layer over the tree; InputError for keys and kinds that do not exist.

        Of other shards than those below, the card no longer says what it said of these.
        """
        before = self.data["data"]["shards"]
        self._merge_section(self.data, layer, Recipe, "", place)
        if self.data["data"]["shards"] != before and "dataset" not in (layer.get("card") or {}):
            self.data["card"]["dataset"] = ""

    def override(
        self, pairs: Iterable[tuple[str, Any]], where: str, folders: tuple[Path, ...] = ()
    ) -> None:
        """Set dotted keys in order, kinds first (outermost first): an option may then stand
        before the kind it belongs to. What the card says of the data comes last.
        """
        leaves = [leaf for key, value in pairs for leaf in _leaves(key, value, where)]
        leaves.sort(
            key=lambda leaf: (
                (0, leaf[0].count("."))
                if leaf[0].endswith(".kind")
                else (1 + (leaf[0] == "card.dataset"), 0)
            )
        )
        for key, value in leaves:
            layer: dict[str, Any] = {}
            inner = layer
            *sections, last = key.split(".")
            for name in sections:
                inner = inner.setdefault(name, {})
            inner[last] = value
            self.merge(layer, Place(lambda _: where, folders))

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
        place: Place,
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


def plain(value: Any) -> Any:
    """A value of a recipe as YAML and JSON have it."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.model_dump() if isinstance(value, BaseModel) else value


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
        name: plain(field.get_default())
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
