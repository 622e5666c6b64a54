"""The recipe's keys as data: which dotted keys exist, what each accepts, and the nearest one to
a misspelt name.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as limits
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from flowray.config.aliases import ALIASES, HINTS
from flowray.config.errors import InputError, did_you_mean
from flowray.config.paths import PathField, path_field
from flowray.config.recipe import Recipe

_NOUNS = {
    float: "a number",
    int: "a whole number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}
_PLURALS = {float: "numbers", int: "whole numbers", str: "texts", bool: "true or false"}


@dataclass(frozen=True)
class Slot:
    """One place a dotted key can stand: a field of a config class. Union members that share a
    key give several slots.
    """

    owner: type[BaseModel]
    name: str
    field: FieldInfo

    @property
    def sections(self) -> tuple[type[BaseModel], ...]:
        """The config classes that the field holds; empty for a plain value."""
        return members(self.field.annotation)


def members(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The config classes inside a type annotation, union members in order."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(found for part in get_args(annotation) for found in members(part))
    return (
        (annotation,) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else ()
    )


def kind_of(cls: type[BaseModel]) -> str | None:
    """The `kind` that selects this class in its union, None for a class outside any."""
    field = cls.model_fields.get("kind")
    return None if field is None else str(field.default)


@lru_cache(maxsize=1)
def known_keys() -> Mapping[str, tuple[Slot, ...]]:
    """Every dotted key of the recipe, sections included, with the places it can stand (all union
    members).
    """
    found: dict[str, tuple[Slot, ...]] = {}

    def walk(cls: type[BaseModel], prefix: str) -> None:
        for name, field in cls.model_fields.items():
            slot = Slot(cls, name, field)
            found[prefix + name] = (*found.get(prefix + name, ()), slot)
            for section in slot.sections:
                walk(section, f"{prefix}{name}.")

    walk(Recipe, "")
    return types.MappingProxyType(found)


def key_paths(key: str) -> PathField | None:
    """How a recipe key holds paths, None where it holds none or does not exist."""
    return next(filter(None, (path_field(slot.field) for slot in known_keys().get(key, ()))), None)


def suggest(key: str) -> str:
    """What to say after 'unknown key KEY': the alias's key, the nearest full dotted key, or a
    hint; '' where nothing is near.
    """
    keys, last = known_keys(), key.rpartition(".")[2]
    for name in (key, last, key.partition(".")[0]):
        if name.lower() in HINTS:
            return f"; {HINTS[name.lower()]}"
        if name.lower() in ALIASES:
            return f", did you mean {ALIASES[name.lower()]}?"
    same_ending = [known for known in keys if known.rpartition(".")[2] == last]
    if same_ending:
        return f", did you mean {difflib.get_close_matches(key, same_ending, n=1, cutoff=0)[0]}?"
    # a shared section alone makes optim.zzz look like optim.lr: the last parts must be alike too
    return did_you_mean(
        key,
        [
            known
            for known in keys
            if difflib.SequenceMatcher(None, last, known.rpartition(".")[2]).ratio() >= 0.5
        ],
    )


def unknown_key(key: str) -> str:
    """'unknown key KEY, did you mean X?', or the keys of its section where nothing is near."""
    section = key.rpartition(".")[0]
    while section and section not in known_keys():
        section = section.rpartition(".")[0]
    allowed = [name.removeprefix(f"{section}.") for name in _below(section)]
    return f"unknown key {key}" + (
        suggest(key) or f"; allowed{f' under {section}' if section else ''}: {', '.join(allowed)}"
    )


def show(value: Any) -> str:
    """A value as the user wrote it in YAML, cut to a readable length."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def want(field: FieldInfo) -> str:
    """What a field accepts, in words: 'a number >= 0', 'one of full, path, none', 'a list of 2
    numbers'.
    """
    return f"{_type_in_words(field.annotation)} {_bounds(field)}".strip()


def _bounds(field: FieldInfo) -> str:
    signs = (
        (limits.Ge, "ge", ">="),
        (limits.Gt, "gt", ">"),
        (limits.Le, "le", "<="),
        (limits.Lt, "lt", "<"),
    )
    return " and ".join(
        f"{sign} {getattr(m, name):g}"
        for m in field.metadata
        for cls, name, sign in signs
        if isinstance(m, cls)
    )


def _type_in_words(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join(
            [
                _type_in_words(args[0]),
                *(_bounds(extra) for extra in args[1:] if isinstance(extra, FieldInfo)),
            ]
        ).strip()
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0])
    # null first, so that bounds follow the number they belong to
    if origin in (Union, types.UnionType):
        return " or ".join(sorted(map(_type_in_words, args), key=lambda words: words != "null"))
    if origin in (tuple, list):
        keys = [", ".join(section.model_fields) for section in members(args[0])]
        inner = f"mappings of {' or '.join(keys)}" if keys else _PLURALS.get(args[0], "values")
        return (
            f"a list of {inner}"
            if origin is list or Ellipsis in args
            else f"a list of {len(args)} {inner}"
        )
    if members(annotation):
        return "a mapping"
    return _NOUNS.get(annotation, str(getattr(annotation, "__name__", annotation)))


def is_bool_as_number(given: Any, accepted: Any) -> bool:
    """pydantic takes true for 1.0: a slip (`lr: yes`) that nobody means."""
    return isinstance(given, bool) and not isinstance(accepted, bool)


def coerce(key: str, value: Any) -> Any:
    """One value through the type of the recipe field `key`; where union members share the key,
    through any that accepts.

    '1e-4' (what PyYAML makes of 1e-4) becomes 0.0001 for a float field. InputError names the key,
    the value and what is allowed.
    """
    slots = known_keys().get(key)
    if slots is None:
        raise InputError(unknown_key(key))
    if all(slot.sections for slot in slots):
        raise InputError(
            f"{key} is a section, not a value; set one of its keys: {', '.join(_below(key))}"
        )
    wanted: list[str] = []
    for slot in slots:
        adapter: TypeAdapter[Any] = TypeAdapter(slot.field.rebuild_annotation())
        try:
            accepted = adapter.validate_python(value)
        except ValidationError as error:
            cause = error.errors()[0].get("ctx", {}).get("error")
            wanted.append(str(cause) if cause else f"want {want(slot.field)}")
            continue
        if not is_bool_as_number(value, accepted):
            return accepted
        wanted.append(f"want {want(slot.field)}")
    near = ""
    if key.rpartition(".")[2] == "kind":
        kinds = [kind for slot in slots if (kind := kind_of(slot.owner))]
        wanted, near = [f"want one of {', '.join(kinds)}"], did_you_mean(str(value), kinds)
    raise InputError(f"{key}: got {show(value)}, {' or '.join(dict.fromkeys(wanted))}{near}")


def _below(section: str) -> list[str]:
    prefix = f"{section}." if section else ""
    return [
        known
        for known in known_keys()
        if known.startswith(prefix) and "." not in known.removeprefix(prefix)
    ]
