"""Ranges of the keys that one benchmark alone has, refused before anything is read. No heavy import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mg3d.errors import ConfigError

__all__ = ["check_ranges", "check_report_keys", "check_vocabulary_keys"]

HEADS = 8
METEOR = ("auto", "java", "nltk", "none")
SHARE = (0.0, 1.0)
REPORT_RANGES: Mapping[str, tuple[float, float | None]] = {
    "min_count": (1, None),
    "max_tokens": (3, None),
    "beams": (1, None),
    "min_words": (0, None),
    "width": (HEADS, None),
    "length_penalty": (0, None),
    "label_loss": (0, None),
    "ranking_loss": (0, None),
    "text_memory": SHARE,
    "patch_dropout": SHARE,
    "dropout": SHARE,
    "place_scale": (0, None),
}


VOCABULARY_RANGES: Mapping[str, tuple[float, float | None]] = {
    "width": (HEADS, None),
    "latent": (1, None),
    "max_tokens": (3, None),
    "report_loss": (0, None),
    "max_cases": (0, None),
}


def check_ranges(keys: Mapping[str, Any], ranges: Mapping[str, tuple[float, float | None]]) -> None:
    """Refuse a key outside of its range.

    Args:
        keys: key -> value.
        ranges: key -> least and largest value; None: no limit.

    Raises:
        ConfigError: naming the key, its value and its range.
    """
    for name, (low, high) in ranges.items():
        value = keys[name]
        if not low <= value or (high is not None and value > high):
            allowed = f"{low:g} to {high:g}" if high is not None else f"at least {low:g}"
            nearest = low if value < low or high is None else high
            raise ConfigError(f"{name}={value!r}\n  allowed: {allowed}", f"write {name}={nearest:g}")


def check_report_keys(keys: Mapping[str, Any]) -> None:
    """Refuse keys of a report benchmark that cannot be used.

    Raises:
        ConfigError: a key is out of its range, or two contradict each other.
    """
    check_ranges(keys, REPORT_RANGES)
    _check_width(keys["width"])
    if keys["min_words"] > keys["max_tokens"]:
        raise ConfigError(
            f"min_words={keys['min_words']}, but max_tokens={keys['max_tokens']}", "write fewer min_words"
        )
    if keys["meteor"] not in METEOR:
        raise ConfigError(f"meteor={keys['meteor']!r}", f"choose one of {', '.join(METEOR)}")


def check_vocabulary_keys(keys: Mapping[str, Any]) -> None:
    """Refuse keys of a vocabulary benchmark that cannot be used.

    Raises:
        ConfigError: a key is out of its range.
    """
    check_ranges(keys, VOCABULARY_RANGES)
    _check_width(keys["width"])


def _check_width(width: int) -> None:
    if width % HEADS:
        raise ConfigError(f"width={width} is no multiple of the {HEADS} heads", f"write width={width + -width % HEADS}")
