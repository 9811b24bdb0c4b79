"""Values of config keys as a command line or a JSON file gives them: plain types only, nothing is built from them.

Sacred's own readers hand every dictionary to jsonpickle, which imports and calls what a tag such as ``py/object``
names. Here a value is a number, a text, a truth value, None, a list or a dictionary, and of a bounded size.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mg3d.errors import ConfigError
from mg3d.terminal import one_line

__all__ = ["parse_updates", "read_config_file"]

MAX_DEPTH = 16
MAX_FILE_BYTES = 4 << 20
MAX_VALUE_CHARACTERS = 100_000
MAX_DIGITS = 18
FILE_REMEDY = "give the config.json of a run folder"
_TAG = "py/"
_TOKEN = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[\[\](){}]", re.DOTALL)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def parse_updates(updates: Sequence[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` words; ``a.b=1`` sets a part of a dictionary.

    Args:
        updates: the words.

    Returns:
        Nested dictionary; a value that is no literal of Python is text.

    Raises:
        ConfigError: a value is no plain one, or a key is given both whole and in parts.
    """
    found: dict[str, Any] = {}
    for update in updates:
        path, _, text = (part.strip() for part in update.partition("="))
        inner = found
        *parents, last = path.split(".")
        if not all((*parents, last)):
            raise ConfigError(f"{path}: a part of the key is empty", "write KEY.PART=VALUE")
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise _whole_and_parts(path)
        if isinstance(inner.get(last), dict) and parents:
            raise _whole_and_parts(path)
        inner[last] = parse_value(path, text)
    return found


def _whole_and_parts(path: str) -> ConfigError:
    return ConfigError(f"{path}: a key is given both whole and in parts", "give the whole dictionary or its parts")


def parse_value(key: str, text: str) -> Any:
    """Read one value as a Python literal, or as text.

    Args:
        key: its key, for messages.
        text: as typed.

    Raises:
        ConfigError: too long, too deep, a number without end, a dictionary with an object tag or a key twice.
    """
    if len(text) > MAX_VALUE_CHARACTERS:
        raise ConfigError(f"{key}: a value of {len(text)} characters", "give a value, not a file")
    if text[:1] in "[{(" and _too_deep(text) is not None:
        raise _deep(key)
    try:
        tree = ast.parse(text, mode="eval")
        _refuse_repeats(key, tree)
        value = ast.literal_eval(tree)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = text
    _check_plain(key, value)
    return value


def _refuse_repeats(key: str, tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            names = [part.value for part in node.keys if isinstance(part, ast.Constant)]
            _pairs(key, [(name, None) for name in names])


def read_config_file(path: str) -> dict[str, Any]:
    """Read a JSON object of keys.

    Args:
        path: the file.

    Raises:
        ConfigError: unreadable, no object, or a key or value in it that is no plain one; the message names the key.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path} cannot be read as a config: it is no file", FILE_REMEDY)
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        text = data.decode("utf-8-sig")
        deep = _too_deep(text)
        if len(data) > MAX_FILE_BYTES or deep is not None:
            raise _deep(f"{path}: {deep}") if deep is not None else ConfigError(f"{path} is no config", FILE_REMEDY)
        content = json.loads(
            text,
            object_pairs_hook=lambda pairs: _pairs(path, pairs),
            parse_int=lambda digits: int(digits) if len(digits) <= MAX_DIGITS + 1 else math.inf,
            parse_constant=lambda word: math.nan,
        )
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as a config: {error}", FILE_REMEDY) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no dictionary of keys", FILE_REMEDY)
    for key, value in content.items():
        if "." in key:
            raise ConfigError(f"{path}: the key {key} has a dot", "nest the dictionaries instead")
        _check_plain(f"{path}: {key}", value)
        _check_name(f"{path}: {key}", key)
    return content


def _pairs(place: str, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{place}: the key {one_line(str(twice))} is there twice", "keep one of them")
    return found


def _too_deep(text: str) -> str | None:
    """The key of the outermost object below which brackets nest too deeply; None for a sound text."""
    depth, key = 0, ""
    for token in _TOKEN.finditer(text):
        if token[0] in "[({":
            depth += 1
            if depth > MAX_DEPTH:
                return one_line(key)
        elif token[0] in "])}":
            depth -= 1
        elif depth == 1 and text[token.end() : token.end() + 20].lstrip().startswith(":"):
            key = token[0][1:-1]
    return None


def _deep(place: str) -> ConfigError:
    return ConfigError(f"{place}: nested more than {MAX_DEPTH} levels", "give plain values")


def _check_plain(key: str, value: Any) -> None:
    for place, item in _items(key, value):
        if isinstance(item, dict):
            for name in item:
                _check_name(f"{place}.{name}" if isinstance(name, str) else place, name)
        elif isinstance(item, str):
            if _CONTROL.search(item):
                raise ConfigError(f"{place}={item[:80]}: a control character", "give a text without")
        elif isinstance(item, float) and not math.isfinite(item):
            raise ConfigError(f"{place}={item}: no finite number, or too large a one", "give a number of usual size")
        elif isinstance(item, int) and abs(item) >= 10**MAX_DIGITS:
            raise ConfigError(f"{place}: a number of more than {MAX_DIGITS} digits", "give a number of usual size")
        elif not isinstance(item, (bool, int, float, list, tuple)) and item is not None:
            raise ConfigError(
                f"{place}: a value of type {type(item).__name__}", "give a number, text, list or dictionary"
            )


def _check_name(place: str, name: Any) -> None:
    if not isinstance(name, str):
        raise ConfigError(f"{place}: the key {name!r} of a dictionary is no text", "put it in quotation marks")
    if name.startswith(_TAG):
        raise ConfigError(f"{place}: {name} is a tag that builds objects", "give plain values")
    if not name or "." in name or one_line(name) != name:
        raise ConfigError(f"{one_line(place)} is no name of a key", "nest the dictionaries instead of dots")


def _items(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value and everything in it, with its place; the depth is bounded already."""
    yield place, value
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _items(f"{place}.{name}", item)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _items(f"{place}[{number}]", item)
