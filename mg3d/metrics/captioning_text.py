"""Text of reports before it is scored: one stated tokenisation, and blanks that cannot upset a scorer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mg3d.errors import DataError

_TOKEN = re.compile(r"\d+(?:[.,]\d+)+|\w+(?:[-']\w+)*|[^\w\s]")
TOKENISED = "lower case; words, numbers and punctuation marks are tokens"
PRETOKENISED = "as given; tokens are what blanks and line breaks separate"
_SHOWN = 3


def tokenise(text: str) -> str:
    """Lower-case tokens joined by single blanks; a number keeps its point, a hyphenated word stays whole.

    Text that is already lower case with its punctuation split off comes back unchanged.
    """
    return " ".join(_TOKEN.findall(text.lower()))


def collapse_blanks(text: str) -> str:
    """Every run of blanks, tabs and line breaks as one blank, none at the ends."""
    return " ".join(text.split())


def prepare(
    references: Sequence[str | Sequence[str]],
    hypotheses: Sequence[str],
    ids: Sequence[str] | None = None,
    *,
    pretokenised: bool = False,
) -> tuple[list[list[str]], list[str]]:
    """Check pairs and bring both sides into the same tokens.

    Args:
        references: of each of D cases one text or several.
        hypotheses: D generated texts; an empty one is allowed and scores zero.
        ids: names of the cases for messages; positions when None.
        pretokenised: leave the text as it is, blanks apart.

    Returns:
        references [D][>= 1] and hypotheses [D], tokens separated by single blanks.

    Raises:
        DataError: no case, different numbers of cases, or a reference without any token.
    """
    if len(references) != len(hypotheses) or not hypotheses:
        raise DataError(f"{len(references)} references and {len(hypotheses)} hypotheses", "give one of each per case")
    clean = collapse_blanks if pretokenised else tokenise
    found = [[clean(text) for text in ([entry] if isinstance(entry, str) else entry)] for entry in references]
    names = list(ids) if ids is not None else [str(number) for number in range(len(found))]
    empty = [name for name, texts in zip(names, found, strict=True) if not texts or not all(texts)]
    if empty:
        shown = ", ".join(empty[:_SHOWN]) + (" ..." if len(empty) > _SHOWN else "")
        raise DataError(f"{len(empty)} cases have an empty reference: {shown}", "leave these cases out")
    return found, [clean(text) for text in hypotheses]
