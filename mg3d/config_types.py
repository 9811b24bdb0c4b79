"""Declares and checks one config key: its type, range, choices and meaning. Pure Python, no heavy import."""

from __future__ import annotations

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from mg3d.errors import ConfigError

__all__ = ["check_value", "describe", "plain", "setting", "suggest"]

_NAMES = {bool: "True or False", int: "an integer", float: "a number", str: "text", type(None): "None"}


def setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[Any] | None = None,
    path: bool = False,
) -> Any:
    """Declare one key of the config.

    Args:
        default: default value, plain JSON; a list or dictionary is copied for every config.
        doc: meaning with its unit.
        low: smallest allowed number (inclusive).
        high: largest allowed number (inclusive).
        above: exclusive lower bound.
        below: exclusive upper bound.
        choices: allowed values; of a list, the allowed items; ``word_*`` allows everything that begins with ``word_``.
        path: True when the text is a place on disk, in which ``~`` is expanded.

    Returns:
        A dataclass field whose metadata hold the above.
    """
    limits = {"low": low, "high": high, "above": above, "below": below}
    metadata = {"doc": doc, "limits": limits, "choices": tuple(choices) if choices is not None else None, "path": path}
    metadata["default"] = default
    if isinstance(default, list | dict):
        frozen = tuple(default) if isinstance(default, list) else default
        return dataclasses.field(default_factory=lambda: copy.deepcopy(frozen), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def suggest(word: str, candidates: Sequence[str], synonyms: Mapping[str, str] | None = None) -> str:
    """Nearest spelling of ``word`` among ``candidates``, or an empty text when nothing is near."""
    import difflib

    if synonyms and word in synonyms:
        return synonyms[word]
    lowered = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[near[0]] if near else ""


def _convert_scalar(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether ``value`` is of the scalar type ``kind``, and the value in that type (an integer serves as a float)."""
    if kind is Any:
        return True, plain(value)
    if kind is type(None):
        return value is None, None
    if kind is bool:
        return isinstance(value, bool), value
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number, float(value) if number else value
    return isinstance(value, kind), value


def _convert(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether ``value`` fits the annotation ``hint`` and the converted value; unions keep the order of their parts."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            fits, converted = _convert(value, part)
            if fits:
                return True, converted
        return False, value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False, value
        items = [_convert(item, typing.get_args(hint)[0]) for item in value]
        return all(fits for fits, _ in items), tuple(item for _, item in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            return False, value
        items = [_convert(item, typing.get_args(hint)[1]) for item in value.values()]
        named = all(isinstance(key, str) for key in value)
        return named and all(fits for fits, _ in items), dict(zip(value, (item for _, item in items), strict=True))
    return _convert_scalar(value, hint)


def _type_text(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(part) for part in typing.get_args(hint))
    if origin is tuple:
        return f"a list of {_type_text(typing.get_args(hint)[0]).removeprefix('an ').removeprefix('a ')}s"
    if origin is dict:
        return "a dictionary"
    return _NAMES.get(hint, getattr(hint, "__name__", "a value"))


def describe(field: dataclasses.Field[Any], hint: Any) -> str:
    """What the key allows, in words: its choices, or its type with its range."""
    if field.metadata["choices"] is not None:
        listed = ", ".join(str(choice) for choice in field.metadata["choices"])
        return f"a list of {listed}" if typing.get_origin(hint) is tuple else listed
    limits = field.metadata["limits"]
    signs = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
    bounds = [f"{sign} {limits[name]}" for name, sign in signs.items() if limits[name] is not None]
    return " ".join([_type_text(hint), *([" and ".join(bounds)] if bounds else [])])


def _within(value: Any, limits: Mapping[str, float | None]) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    if not math.isfinite(value):
        return False
    low, high, above, below = (limits[name] for name in ("low", "high", "above", "below"))
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def _is_choice(item: Any, choices: Sequence[Any]) -> bool:
    """Whether an item is one of the choices, or begins as one that ends in ``*``."""
    stems = tuple(str(choice)[:-1] for choice in choices if str(choice).endswith("*"))
    return item in choices or (isinstance(item, str) and bool(stems) and item.startswith(stems))


def check_value(name: str, value: Any, field: dataclasses.Field[Any], hint: Any) -> Any:
    """Check one value against its declaration.

    Args:
        name: key, for the message.
        value: value as given (from a command line, a named config or a caller).
        field: the declaration made by `setting`.
        hint: resolved annotation of the key.

    Returns:
        The value in its declared type (lists as tuples, integers as floats where a float is declared).

    Raises:
        ConfigError: wrong type, not a choice, or out of range.
    """
    fits, converted = _convert(value, hint)
    items = converted if isinstance(converted, tuple) else (converted,)
    choices = field.metadata["choices"]
    odd = [str(item) for item in items if choices is not None and item is not None and not _is_choice(item, choices)]
    if not fits or odd:
        near = ""
        if choices is not None:
            near = suggest(odd[0], [str(choice).rstrip("_*") for choice in choices]) if odd else ""
            near = f"[{near}]" if near and isinstance(converted, tuple) else near
        elif isinstance(value, str) and hint is bool:
            near = suggest(value, ["True", "False"])
        raise _refusal(name, value, field, hint, near)
    if not all(_within(item, field.metadata["limits"]) for item in items):
        raise _refusal(name, value, field, hint)
    return converted


def _refusal(name: str, value: Any, field: dataclasses.Field[Any], hint: Any, near: str = "") -> ConfigError:
    allowed = describe(field, hint)
    remedy = f"write {name}={near}" if near else f"give {name} an allowed value (default {field.metadata['default']!r})"
    return ConfigError(f"{name}={value!r} is not allowed\n  allowed: {allowed}", remedy)


def plain(value: Any) -> Any:
    """The value as plain JSON types: mappings as dictionaries, sequences as lists, scalars as they are."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
