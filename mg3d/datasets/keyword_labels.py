"""The 18 CT-RATE findings read from a report by keywords: a baseline for trained labellers, and one that needs nothing.

A finding is present when a sentence names it and does not deny it. The list was written by hand with CT-RATE's wording
in view; no figure was optimised with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import numpy as np

from mg3d.datasets.labels import CT_RATE_LABELS

_SENTENCE_END: Final = re.compile(r"(?<!\d)[.](?!\d)|[.](?=\s|$)|[!?;\n\"\u2022]|\bbut\b|\bhowever\b")
_DENIED_BEFORE: Final = re.compile(r"\b(?:no|without|neither|free of|absence of|rather than)\b")
_DENIED_ANYWHERE: Final = re.compile(r"\b(?:not|n't|nor|none|absent|excluded|ruled out|disappeared|resolved)\b")

_KEYWORDS: Final[dict[str, str]] = {
    "Medical material": r"catheter|\bstent|pacemaker|electrode|prosthe|sternotomy|suture|surgical clip|\bcoil|\bport\b"
    r"|endotracheal|tracheostomy|nasogastric|drainage tube|chest tube|\bdevice|metallic|\bvalve replacement"
    r"|medical material|implant|\bwires?\b",
    "Arterial wall calcification": r"(?:aort|arter|vascular|great vessel)(?=.*(?:calci|atheroma|atheroscl|plaque))"
    r"|(?:calci|atheroma|atheroscl|plaque)(?=.*(?:aort|arter|vascular|great vessel))",
    "Cardiomegaly": r"cardiomegaly|enlarged heart|heart[^,]*(?:size|dimension)[^,]*(?:increase|enlarg|larger)"
    r"|heart (?:is|was) (?:slightly |mildly )?(?:enlarg|larger)|cardiothoracic (?:index|ratio)[^,]*increase",
    "Pericardial effusion": r"pericardial[^,]*(?:effusion|fluid)|(?:effusion|fluid)[^,]*pericardi",
    "Coronary artery wall calcification": r"coronary(?=.*(?:calci|atheroma|atheroscl|plaque))"
    r"|(?:calci|atheroma|atheroscl|plaque)(?=.*coronary)",
    "Hiatal hernia": r"hiatal hernia|hiatus hernia|hiatal herniation",
    "Lymphadenopathy": r"lymphadenopath|lymph node|\blaps?\b|\blymphaden",
    "Emphysema": r"emphysem",
    "Atelectasis": r"atelecta",
    "Lung nodule": r"(?<!thyroid )nodul",
    "Lung opacity": r"ground[- ]?glass|opacit|density increase|increased? density|infiltrat|consolidat",
    "Pulmonary fibrotic sequela": r"sequela|fibro(?:tic|sis)|pleuroparenchymal|parenchymal band|scar",
    "Pleural effusion": r"pleural[^,]*(?:effusion|fluid)|(?:effusion|fluid)[^,]*pleural|hydrothorax|hydropneumothorax"
    r"|bilateral effusion",
    "Mosaic attenuation pattern": r"mosaic",
    "Peribronchial thickening": r"peribronch[^,]*thick|bronchial wall[^,]*thick|thick[^,]*bronchial wall|peribronchial",
    "Consolidation": r"consolidat",
    "Bronchiectasis": r"bronchiecta",
    "Interlobular septal thickening": r"sept[ao]l?[^,]*thick|thick[^,]*sept|interlobular sept",
}
_CORONARY: Final = re.compile(r"\bcoronary (?:artery|arteries|vascular structures?)\b")
_PATTERNS: Final = {name: re.compile(_KEYWORDS[name]) for name in CT_RATE_LABELS}


def label_by_keywords(text: str) -> np.ndarray:
    """Findings that a report states.

    Args:
        text: a report in English.

    Returns:
        int8 [18] of 0 and 1 in the order of ``CT_RATE_LABELS``; all 0 for empty text.
    """
    # a coronary artery is no evidence of calcification in the wall of another
    plain = _CORONARY.sub("coronary", text.lower())
    clauses = [clause for clause in _SENTENCE_END.split(plain) if clause and clause.strip()]
    stated = [any(_states(pattern, clause) for clause in clauses) for pattern in _PATTERNS.values()]
    return np.asarray(stated, dtype=np.int8)


def findings_by_keywords(text: str) -> frozenset[str]:
    """The same as names out of ``CT_RATE_LABELS``."""
    return frozenset(name for name, value in zip(CT_RATE_LABELS, label_by_keywords(text), strict=True) if value)


def label_all_by_keywords(texts: Sequence[str]) -> np.ndarray:
    """`label_by_keywords` of every report.

    Args:
        texts: n reports.

    Returns:
        int8 [n, 18].
    """
    return np.stack([label_by_keywords(text) for text in texts]) if texts else np.zeros((0, 18), dtype=np.int8)


def _states(pattern: re.Pattern[str], clause: str) -> bool:
    found = pattern.search(clause)
    if found is None or _DENIED_ANYWHERE.search(clause):
        return False
    return _DENIED_BEFORE.search(clause[: found.start()]) is None
