"""Porter's suffix stripping for English (Program, 1980) with the departures that NLTK makes by default.

The stems are those on which rouge-score counts; other tools that stem ("Porter") may differ in a few words.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

_VOWELS = frozenset("aeiou")
_IRREGULAR = {
    "sky": "sky",
    "skies": "sky",
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "innings": "inning",
    "outings": "outing",
    "cannings": "canning",
    **{word: word for word in ("news", "inning", "outing", "canning", "howe", "proceed", "exceed", "succeed")},
}
_SECOND = (
    *(("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble")),
    *(("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate")),
    *(("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al")),
    *(("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful")),
)
_THIRD = (
    *(("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", "")),
)
_FOURTH = (
    *("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent"),
    *("ion", "ou", "ism", "ate", "iti", "ous", "ive", "ize"),
)


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """Stem of a lower-case word; words of one or two letters stay."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plural, _past, _final_y, _double_suffix, _full_suffix, _single_suffix, _final_e, _final_ll):
        word = step(word)
    return word


def _is_consonant(word: str, place: int) -> bool:
    if word[place] in _VOWELS:
        return False
    return word[place] != "y" or place == 0 or not _is_consonant(word, place - 1)


def _measure(base: str) -> int:
    """Number of vowel-consonant turns."""
    kinds = [_is_consonant(base, place) for place in range(len(base))]
    return sum(not first and second for first, second in pairwise(kinds))


def _has_vowel(base: str) -> bool:
    return any(not _is_consonant(base, place) for place in range(len(base)))


def _is_short(base: str) -> bool:
    """Whether it ends consonant-vowel-consonant, the last not w, x or y; of two letters vowel-consonant will do."""
    kinds = [_is_consonant(base, place) for place in range(len(base))]
    if len(base) == 2:
        return kinds == [False, True]
    return kinds[-3:] == [True, False, True] and base[-1] not in "wxy"


def _replace(word: str, pairs: tuple[tuple[str, str], ...], allowed: Callable[[str], bool]) -> str:
    """The first suffix that fits decides, whether it is then replaced or not."""
    for suffix, other in pairs:
        if word.endswith(suffix):
            base = word[: len(word) - len(suffix)]
            return base + other if allowed(base) else word
    return word


def _plural(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    return _replace(word, (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")), lambda _: True)


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        base = word[: len(word) - len(suffix)]
        if word.endswith(suffix) and _has_vowel(base):
            return _mended(base)
    return word


def _mended(base: str) -> str:
    """A verb without its ending gets back the e, or loses the doubled consonant."""
    if base.endswith(("at", "bl", "iz")):
        return base + "e"
    if len(base) >= 2 and base[-1] == base[-2] and _is_consonant(base, len(base) - 1):
        return base if base[-1] in "lsz" else base[:-1]
    return base + "e" if _measure(base) == 1 and _is_short(base) else base


def _final_y(word: str) -> str:
    base = word[:-1]
    return base + "i" if word.endswith("y") and len(base) > 1 and _is_consonant(base, len(base) - 1) else word


def _double_suffix(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _double_suffix(word[:-2])
    if word.endswith("logi"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replace(word, _SECOND, lambda base: _measure(base) > 0)


def _full_suffix(word: str) -> str:
    return _replace(word, _THIRD, lambda base: _measure(base) > 0)


def _single_suffix(word: str) -> str:
    for suffix in _FOURTH:
        if word.endswith(suffix):
            base = word[: len(word) - len(suffix)]
            fits = _measure(base) > 1 and (suffix != "ion" or base[-1] in "st")
            return base if fits else word
    return word


def _final_e(word: str) -> str:
    if not word.endswith("e"):
        return word
    base = word[:-1]
    turns = _measure(base)
    return base if turns > 1 or (turns == 1 and not _is_short(base)) else word


def _final_ll(word: str) -> str:
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
