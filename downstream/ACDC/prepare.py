"""The published ACDC folders to single frames with nnU-Net names, copied byte for byte.

``training/patient001/patient001_frame01.nii.gz`` and ``_frame01_gt.nii.gz`` become
``Dataset027_ACDC/imagesTr/patient001_frame01_0000.nii.gz`` and ``labelsTr/patient001_frame01.nii.gz``; the test
patients go to ``imagesTs`` and ``labelsTs``. ``cases.json`` keeps what ``Info.cfg`` says about each frame.
"""

from __future__ import annotations

import json
from pathlib import Path

from mg3d.atomic import write_text_atomically
from mg3d.errors import DataError
from mg3d.finetuning.benchmark import Case
from mg3d.finetuning.copies import copy_once

PARTS = {"training": "Tr", "testing": "Ts"}
PLACES = ("", "database", "ACDC/database", "ACDC")
GROUPS = ("NOR", "MINF", "DCM", "HCM", "RV")
LABELS = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}


def find_patients(root: Path, part: str = "training") -> list[Path]:
    """Patient folders of one part of the download, sorted; empty where there are none."""
    places = [root / place / part for place in PLACES] + ([root] if part == "training" else [])
    found = (sorted(path for path in place.glob("patient[0-9]*") if path.is_dir()) for place in places)
    return next((folders for folders in found if folders), [])


def frames(patient: Path) -> list[Case]:
    """The frames at end-diastole and end-systole of a patient folder, whether or not their files are there.

    Raises:
        DataError: ``Info.cfg`` is missing, or its ED, ES or Group is missing or impossible.
    """
    path = patient / "Info.cfg"
    if not path.is_file():
        raise DataError("missing: which frames are ED and ES is not known", "download it again", path=str(path))
    pairs = (line.partition(":") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    info = {key.strip(): value.strip() for key, _, value in pairs}
    group = info.get("Group", "")  # older releases do not tell that of test patients
    known = group in GROUPS or (not group and patient.parent.name == "testing")
    if not (known and info.get("ED", "").isdigit() and info.get("ES", "").isdigit()):
        raise DataError(f"ED, ES or Group is missing or impossible in {info}", "download it again", path=str(path))
    cases, tags = [], {"group": group} if group else {}
    for phase in ("ED", "ES"):
        name = f"{patient.name}_frame{int(info[phase]):02d}"
        files = patient / f"{name}.nii.gz", patient / f"{name}_gt.nii.gz"
        cases.append(Case(name, patient.name, *files, stratum=group, tags={"phase": phase, **tags}))
    return cases


def convert(root: Path, target: Path) -> None:
    """Write the nnU-Net folder; files that are there already are kept, so a stopped run goes on.

    Args:
        root: the download.
        target: folder to fill, ``Dataset027_ACDC``.

    Raises:
        DataError: an ``Info.cfg`` or a frame is missing (labels of test patients may be).
    """
    tags, counts = {}, {}
    for part, suffix in PARTS.items():
        cases = [case for patient in find_patients(root, part) for case in frames(patient)]
        counts[part] = len(cases)
        for case in cases:
            copy_once(case.image, target / f"images{suffix}" / f"{case.id}_0000.nii.gz")
            if case.label is not None and (part == "training" or case.label.is_file()):
                copy_once(case.label, target / f"labels{suffix}" / f"{case.id}.nii.gz")
            tags[case.id] = dict(case.tags)
    summary = {"channel_names": {"0": "cineMRI"}, "labels": LABELS, "numTraining": counts["training"]}
    for name, content in (("dataset.json", {**summary, "file_ending": ".nii.gz"}), ("cases.json", tags)):
        write_text_atomically(target / name, json.dumps(content, indent=1) + "\n")
