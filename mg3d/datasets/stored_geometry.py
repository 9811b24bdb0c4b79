"""How the volumes of packed files were prepared, in the words that go beside trained weights.

Keys: ``axis_order``, ``spacing_mm`` (z, y, x; None: as scanned), ``crop_fractions_dhw``, ``window_hu`` (a pair, or
``grey8``), and ``corpora`` with the same three per corpus where several are trained on together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from mg3d.datasets.arrow_files import find_arrow_files
from mg3d.datasets.arrow_schema import AXIS_ORDER, SPLITS, WINDOW_GREY_TEXT
from mg3d.datasets.volume import CROP_FRACTIONS_DHW, TARGET_SPACING_MM, WINDOW_HU
from mg3d.errors import DataError


def published_geometry() -> dict[str, Any]:
    """Preparation of the published CT-RATE volumes, which the released weights expect."""
    return {
        "axis_order": AXIS_ORDER,
        "spacing_mm": list(TARGET_SPACING_MM),
        "crop_fractions_dhw": list(CROP_FRACTIONS_DHW),
        "window_hu": list(WINDOW_HU),
    }


def stored_geometry(data_root: str | Path, corpora: Sequence[str]) -> dict[str, Any]:
    """Preparation that the packed files of some corpora record; the published one where they record none.

    Files in Hounsfield units come first: a scan to be encoded later is given in these.

    Args:
        data_root: folder of the packed files.
        corpora: dataset keys, for example ``clm_ct_rate``.
    """
    found = {corpus: _of_corpus(data_root, corpus) for corpus in corpora}
    recorded = {corpus: geometry for corpus, geometry in found.items() if geometry}
    if not recorded:
        return published_geometry()
    first = min(recorded.values(), key=lambda geometry: geometry["window_hu"] == WINDOW_GREY_TEXT)
    several = {"corpora": recorded} if len(recorded) > 1 else {}
    return {"axis_order": AXIS_ORDER, **first, **several}


def _of_corpus(data_root: str | Path, corpus: str) -> dict[str, Any]:
    for split in SPLITS:
        try:
            path = find_arrow_files(data_root, corpus, split)[0]
            with pa.memory_map(str(path)) as source:
                metadata = pa.ipc.open_file(source).schema.metadata or {}
        except (DataError, OSError, pa.ArrowInvalid):  # whoever reads the rows says what is wrong with the file
            continue
        return _from_metadata({key.decode(): value.decode() for key, value in metadata.items()})
    return {}


def _from_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    if "mg3d.geometry" not in metadata:
        return {}
    geometry, window = json.loads(metadata["mg3d.geometry"]), metadata["mg3d.window_hu"]
    return {
        "spacing_mm": geometry.get("target_spacing_mm"),
        "crop_fractions_dhw": geometry.get("crop_fractions"),
        "window_hu": window if window == WINDOW_GREY_TEXT else json.loads(window),
    }
