"""What can be wrong in a phantom chest: the findings, how often they occur, and their random description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from mg3d.datasets.labels import CT_RATE_LABELS

SIDES: tuple[str, str] = ("left", "right")
SITES: tuple[str, str] = ("upper", "lower")

# Fixed before any training run: the findings whose mean AUROC the demo reports. All of them are visible at voxels of
# about 9 mm; lung nodules and wall calcification are drawn and reported too, but are smaller than one voxel or two.
SCORED_FINDINGS: tuple[str, ...] = (
    "Medical material",
    "Cardiomegaly",
    "Pericardial effusion",
    "Hiatal hernia",
    "Emphysema",
    "Lung opacity",
    "Pleural effusion",
    "Consolidation",
)

PREVALENCE: Mapping[str, float] = MappingProxyType(
    {
        "Medical material": 0.28,
        "Arterial wall calcification": 0.15,
        "Cardiomegaly": 0.30,
        "Pericardial effusion": 0.25,
        "Hiatal hernia": 0.26,
        "Emphysema": 0.28,
        "Lung nodule": 0.15,
        "Lung opacity": 0.25,
        "Pleural effusion": 0.34,
        "Consolidation": 0.32,
    }
)
FINDINGS: tuple[str, ...] = tuple(PREVALENCE)

# Smallest and largest extent in mm (for a pleural effusion: percent of the pleural cavity).
_EXTENT: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "Medical material": (42.0, 54.0),
        "Arterial wall calcification": (4.0, 7.0),
        "Cardiomegaly": (128.0, 146.0),
        "Pericardial effusion": (9.0, 17.0),
        "Hiatal hernia": (44.0, 66.0),
        "Emphysema": (12.0, 28.0),
        "Lung nodule": (10.0, 28.0),
        "Lung opacity": (76.0, 108.0),
        "Pleural effusion": (10.0, 34.0),
        "Consolidation": (56.0, 84.0),
    }
)
_SIDED = frozenset({"Medical material", "Lung nodule", "Lung opacity", "Pleural effusion", "Consolidation"})
_IN_A_LOBE = frozenset({"Lung nodule", "Lung opacity", "Consolidation"})
_OFTEN_BOTH = frozenset({"Pleural effusion", "Lung opacity"})
_BILATERAL_SHARE = 0.25
# Fluid round the heart rarely comes alone: mild co-occurrence (observed over expected about 1.5).
_TOGETHER: Mapping[str, tuple[str, float]] = MappingProxyType({"Pericardial effusion": ("Pleural effusion", 1.5)})


@dataclass(frozen=True)
class Lesion:
    """One finding of one study.

    Attributes:
        finding: name out of `FINDINGS`.
        side: "left", "right", "bilateral", or "" for a midline or diffuse finding.
        site: "upper" or "lower" lobe, or "".
        extent: size in mm; percent of the pleural cavity for a pleural effusion.
        severity: 0 small, 1 moderate, 2 large: which third of the range the extent is in.
        seed: seed of the shape, so a lesion looks alike with and without its neighbours.
    """

    finding: str
    side: str
    site: str
    extent: float
    severity: int
    seed: int

    def sides(self) -> tuple[str, ...]:
        """The single sides that are affected; empty for a midline finding."""
        return SIDES if self.side == "bilateral" else (self.side,) if self.side else ()

    def mirrored(self) -> Lesion:
        """The same lesion on the other side."""
        other = {"left": "right", "right": "left"}
        return replace(self, side=other.get(self.side, self.side))


def draw_lesion(finding: str, rng: np.random.Generator) -> Lesion:
    """Draw side, lobe and size of one finding.

    Args:
        finding: name out of `FINDINGS`.
        rng: source of randomness.

    Raises:
        ValueError: for a finding that the phantom cannot draw.
    """
    if finding not in PREVALENCE:
        raise ValueError(f"the phantom cannot draw {finding!r}; it knows {', '.join(FINDINGS)}")
    low, high = _EXTENT[finding]
    share, side_draw, site_draw = rng.random(3)
    side = SIDES[int(side_draw * 2)] if finding in _SIDED else ""
    if finding in _OFTEN_BOTH and side_draw < _BILATERAL_SHARE:
        side = "bilateral"
    site = SITES[int(site_draw * 2)] if finding in _IN_A_LOBE else ""
    return Lesion(finding, side, site, low + (high - low) * share, int(share * 3), int(rng.integers(2**31)))


def draw_lesions(rng: np.random.Generator) -> tuple[Lesion, ...]:
    """Draw the findings of one study at their prevalence, in the order of `FINDINGS`."""
    chances = dict(PREVALENCE)
    uniform = dict(zip(FINDINGS, rng.random(len(FINDINGS)), strict=True))
    for finding, (partner, factor) in _TOGETHER.items():
        present = uniform[partner] < PREVALENCE[partner]
        absent_factor = (1 - factor * PREVALENCE[partner]) / (1 - PREVALENCE[partner])
        chances[finding] *= factor if present else absent_factor
    return tuple(draw_lesion(finding, rng) for finding in FINDINGS if uniform[finding] < chances[finding])


def redraw_lesions(lesions: Sequence[Lesion], rng: np.random.Generator) -> tuple[Lesion, ...]:
    """Findings at a follow-up scan: each old finding stays with probability one half, new ones may appear."""
    kept = {lesion.finding: lesion for lesion in lesions if rng.random() < 0.5}
    fresh = {lesion.finding: lesion for lesion in draw_lesions(rng)}
    merged = {**fresh, **kept}
    return tuple(merged[finding] for finding in FINDINGS if finding in merged)


def label_vector(lesions: Sequence[Lesion]) -> np.ndarray:
    """The 18 CT-RATE labels of a study.

    Returns:
        int8 array [18] of 0 and 1, in the order of `CT_RATE_LABELS`.
    """
    present = {lesion.finding for lesion in lesions}
    return np.asarray([name in present for name in CT_RATE_LABELS], dtype=np.int8)
