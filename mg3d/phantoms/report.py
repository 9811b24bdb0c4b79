"""Reports of phantom studies: findings and impression built from sentence templates.

A report names every finding that was drawn, with its side, and no other except in a negation. Sentences hold no comma,
so the fragment rule of the packing step leaves them whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mg3d.phantoms.findings import FINDINGS, Lesion

NEGATION_SHARE = 0.7
_EMPTY_IMPRESSION_SHARE = 0.05

_SEVERITY = ("Mild", "Moderate", "Marked")
# {side} left / right / bilateral, {lobe} "right upper lobe", {severity} Mild / Moderate / Marked, {mm} a size.
_PRESENT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Medical material": (
            "Medical material is present on the {side} side of the chest wall.",
            "There is medical material in the {side} anterior chest wall with its lead in the heart.",
            "A pacemaker is seen as medical material on the {side} side.",
        ),
        "Arterial wall calcification": (
            "Arterial wall calcification is present in the aorta.",
            "There is arterial wall calcification along the thoracic aorta.",
        ),
        "Cardiomegaly": (
            "Cardiomegaly is present.",
            "There is cardiomegaly with an increased cardiothoracic ratio.",
            "The heart is enlarged in keeping with cardiomegaly.",
        ),
        "Pericardial effusion": (
            "Pericardial effusion is present.",
            "There is pericardial effusion around the heart.",
            "{severity} pericardial effusion is observed.",
        ),
        "Hiatal hernia": (
            "Hiatal hernia is present.",
            "There is a hiatal hernia behind the heart.",
            "{severity} hiatal hernia with gas is observed.",
        ),
        "Emphysema": (
            "Emphysema is present.",
            "There is emphysema in both lungs.",
            "{severity} emphysema is observed in both lungs.",
        ),
        "Lung nodule": (
            "Lung nodule is present in the {lobe}.",
            "There is a lung nodule of {mm} mm in the {lobe}.",
        ),
        "Lung opacity": (
            "Lung opacity is present in the {lobe}.",
            "There is lung opacity of ground glass density in the {lobe}.",
            "Ground glass lung opacity is observed in the {lobe}.",
        ),
        "Pleural effusion": (
            "Pleural effusion is present on the {side} side.",
            "There is {side} pleural effusion.",
            "{severity} {side} pleural effusion is observed.",
        ),
        "Consolidation": (
            "Consolidation is present in the {lobe}.",
            "There is consolidation with air bronchogram in the {lobe}.",
            "Dense consolidation is observed in the {lobe}.",
        ),
    }
)
_ABSENT = ("There is no {finding}.", "No {finding} is present.", "No {finding} is observed.")
_NORMAL = (
    "The trachea and the main bronchi are open.",
    "The ribs and the vertebrae are intact.",
    "The upper abdominal organs are unremarkable.",
)
_CLEAR_IMPRESSION = "No acute finding in the chest."


@dataclass(frozen=True)
class Report:
    """Text of one study: findings and impression, the latter possibly empty."""

    findings: str
    impression: str


def write_report(lesions: Sequence[Lesion], rng: np.random.Generator) -> Report:
    """Write the report of a study.

    Args:
        lesions: what was drawn.
        rng: source of the wording; two studies with the same findings may get the same text.

    Returns:
        Findings (positive sentences, negations and normal structures in random order) and impression.
    """
    present = {lesion.finding for lesion in lesions}
    sentences = [_sentence(lesion, rng) for lesion in lesions]
    for finding in FINDINGS:
        chance, wording = rng.random(2)
        if finding not in present and chance < NEGATION_SHARE:
            sentences.append(_ABSENT[int(wording * len(_ABSENT))].format(finding=finding.lower()))
    sentences += [text for text in _NORMAL if rng.random() < 0.1]
    sentences = sentences or [_NORMAL[0]]
    order = rng.permutation(len(sentences))
    return Report(" ".join(sentences[i] for i in order), _impression(lesions, rng))


def _sentence(lesion: Lesion, rng: np.random.Generator) -> str:
    templates = _PRESENT[lesion.finding]
    return templates[int(rng.integers(len(templates)))].format(
        side=lesion.side,
        lobe=f"{lesion.side} {lesion.site} lobe" + ("s" if lesion.side == "bilateral" else ""),
        severity=_SEVERITY[lesion.severity],
        mm=round(lesion.extent),
    )


def _impression(lesions: Sequence[Lesion], rng: np.random.Generator) -> str:
    if rng.random() < _EMPTY_IMPRESSION_SHARE:
        return ""
    if not lesions:
        return _CLEAR_IMPRESSION
    named = (f"{lesion.side} {lesion.finding.lower()}".strip().capitalize() + "." for lesion in lesions)
    return " ".join(named)


def stated_findings(text: str) -> frozenset[str]:
    """Read a phantom report, or one generated in its words: the findings that some sentence states as present.

    Args:
        text: as written, or lower-cased and tokenised; sentences end with a full stop.

    Returns:
        names out of `FINDINGS`; a sentence with the word "no" states nothing.
    """
    sentences = [sentence.split() for sentence in text.lower().split(".")]
    stated = [" ".join(words) for words in sentences if "no" not in words]
    return frozenset(name for name in FINDINGS if any(name.lower() in sentence for sentence in stated))
