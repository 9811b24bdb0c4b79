"""Dataset keys to dataset classes. A new corpus of the same row layout is one line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Final

from mg3d.datasets.volume_report import VolumeReportDataset
from mg3d.errors import ConfigError

DATASETS: Final[Mapping[str, Callable[..., VolumeReportDataset]]] = {
    "clm_chest_ctrg": VolumeReportDataset,
    "clm_ct_rate": VolumeReportDataset,
    "clm_own": VolumeReportDataset,
}

OWN_PREFIX: Final = "clm_own_"


def dataset_class(key: str) -> Callable[..., VolumeReportDataset]:
    """Return the dataset class of a key; ``clm_own_<word>`` names further sets of own data.

    Raises:
        ConfigError: unknown key; the message names the nearest one.
    """
    if key in DATASETS:
        return DATASETS[key]
    if key.startswith(OWN_PREFIX):
        return DATASETS["clm_own"]
    near = difflib.get_close_matches(key, DATASETS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown dataset {key!r}", f"{hint}known: {', '.join(sorted(DATASETS))}")
