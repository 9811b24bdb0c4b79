"""Decide whether stored values already are Hounsfield units (spec downstream 7.3; CT-RATE v1 against v2).

The first release of CT-RATE needs ``slope * value + intercept`` of its metadata table; the second already holds
Hounsfield units under the same table. Applying it twice is the most frequent mistake with this data, so the
default looks at the voxels: a chest CT holds air or lung near -850 HU and soft tissue near 40 HU at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mg3d.errors import DataError

RESCALE_MODES = ("auto", "apply", "skip")
AIR_HU = (-1100.0, -600.0)  # room air and lung; scanner padding lies below and does not count
TISSUE_HU = (-200.0, 300.0)
MIN_AIR_SHARE = 0.01  # real chest volumes: 0.36 to 0.60, an unscaled one 0
MIN_TISSUE_SHARE = 0.02  # real chest volumes: 0.35 to 0.61, a twice-scaled one below 0.006
SAMPLE_VOXELS = 1_000_000


@dataclass(frozen=True)
class Rescale:
    """How stored values become Hounsfield units: ``slope * stored + intercept``.

    Attributes:
        slope: combined scale.
        intercept: combined offset in HU.
        decision: ``as_stored`` or ``applied``.
        plausible: whether the result holds both air and soft tissue.
    """

    slope: float
    intercept: float
    decision: str
    plausible: bool


def tissue_shares(values_hu: np.ndarray) -> tuple[float, float]:
    """Shares of voxels that look like air or lung, and like soft tissue.

    Args:
        values_hu: sample of voxel values in HU, any shape.

    Returns:
        (air share, tissue share), each in [0, 1].
    """
    air = np.mean((values_hu >= AIR_HU[0]) & (values_hu <= AIR_HU[1]))
    tissue = np.mean((values_hu >= TISSUE_HU[0]) & (values_hu <= TISSUE_HU[1]))
    return float(air), float(tissue)


def decide_rescale(
    voxels: np.ndarray, header: tuple[float, float], table: tuple[float, float] | None, mode: str = "auto"
) -> Rescale:
    """Choose between the header scale alone and the header scale followed by the metadata table's.

    Args:
        voxels: stored values, any three axes.
        header: slope and intercept of the file header.
        table: slope and intercept of the metadata table; None when there is no row.
        mode: ``auto`` looks at the voxels, ``apply`` and ``skip`` obey.

    Returns:
        the combined scale and what was decided.

    Raises:
        DataError: mode ``apply`` without a table row, or ``auto`` with no plausible reading.
    """
    as_stored = (header[0], header[1], "as_stored")
    options = [] if mode == "apply" else [as_stored]
    if mode != "skip" and table is not None:
        options.append((table[0] * header[0], table[0] * header[1] + table[1], "applied"))
    if not options:
        raise DataError("no rescale slope and intercept in the metadata table", "use --rescale skip or auto")
    sample = _sample(voxels)
    shares = [tissue_shares(sample * slope + intercept) for slope, intercept, _ in options]
    verdicts = [air >= MIN_AIR_SHARE and tissue >= MIN_TISSUE_SHARE for air, tissue in shares]
    if mode == "auto" and not any(verdicts):
        seen = "; ".join(f"{o[2]}: air {a:.1%}, tissue {t:.1%}" for o, (a, t) in zip(options, shares, strict=True))
        raise DataError(f"no reading of the values looks like a chest CT in HU ({seen})", "use --rescale apply or skip")
    chosen = verdicts.index(True) if mode == "auto" else 0
    slope, intercept, decision = options[chosen]
    return Rescale(slope, intercept, decision, verdicts[chosen])


def _sample(voxels: np.ndarray) -> np.ndarray:
    step = max(1, int(np.ceil((voxels.size / SAMPLE_VOXELS) ** (1 / 3))))
    values = voxels[::step, ::step, ::step].astype(np.float32)
    return values[np.isfinite(values)]
