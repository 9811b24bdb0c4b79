"""A drawn CTRG-Chest download: slice folders, the annotation, and the table of 14 finding codes (downstream 8.1).

The sentences of a report stand in one order, as a radiologist dictates; the wording varies.

python -m mg3d.phantoms.downstream.ctrg --out DIR --studies 300 --seed 1
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mg3d.datasets.labels import CHEXBERT_LABELS
from mg3d.files import write_csv
from mg3d.phantoms.ctrg_layout import write_annotation, write_slices
from mg3d.phantoms.findings import FINDINGS
from mg3d.phantoms.studies import Study, plan_studies

__all__ = ["FINDING_TABLE", "PLANTED_TABLE", "finding_codes", "plan_ctrg", "write_ctrg"]

FINDING_TABLE = "CTRG_finding_labels.csv"
PLANTED_TABLE = "planted_findings.csv"
_NOTED_AS = {
    "Cardiomegaly": "cardiomegaly",
    "Lung opacity": "lung_opacity",
    "Lung nodule": "lung_lesion",
    "Consolidation": "consolidation",
    "Pleural effusion": "pleural_effusion",
    "Medical material": "support_devices",
}


def write_ctrg(root: Path, *, studies: int = 60, size: int = 48, seed: int = 0) -> None:
    """Write the data set; the last fifth of the studies is both ``val`` and ``test``, as published.

    Args:
        root: folder that receives ``Chest_New``, ``annotation.json``, the published finding table, and one of what was
            drawn.
        studies: number of studies.
        size: slices, and voxels drawn per axis, at least 32.
        seed: seed of everything; a longer list begins with the shorter one.
    """
    planned = plan_ctrg(studies, size, seed)
    write_annotation(root, planned)
    for study in planned:
        write_slices(root, study)
    _write_table(root / FINDING_TABLE, CHEXBERT_LABELS, [finding_codes(study) for study in planned], planned)
    drawn = [{lesion.finding for lesion in study.case.lesions} for study in planned]
    _write_table(root / PLANTED_TABLE, FINDINGS, [[int(name in each) for name in FINDINGS] for each in drawn], planned)


def plan_ctrg(studies: int, size: int, seed: int) -> list[Study]:
    """The studies of a data set: one of each patient, as an id names a patient here, with an ordered report."""
    first_scans = (study for study in plan_studies("ctrg", 2 * studies, size, seed) if study.scan == "a")
    return [_in_order(study) for study in itertools.islice(first_scans, studies)]


def _in_order(study: Study) -> Study:
    sentences = [f"{sentence.strip(' .')}." for sentence in study.report.findings.split(". ")]
    sentences.sort(key=_place)
    return replace(study, report=replace(study.report, findings=" ".join(sentences)))


def _place(sentence: str) -> int:
    """Place of a sentence: that of the finding it speaks of, first without any."""
    return next((place for place, name in enumerate(FINDINGS) if name.lower() in sentence.lower()), -1)


def finding_codes(study: Study) -> list[int]:
    """The 14 codes of a study: 1 present, 2 stated to be absent, 0 not mentioned."""
    present = {_NOTED_AS.get(lesion.finding, "") for lesion in study.case.lesions}
    text = study.report.findings.lower()
    negated = {code for name, code in _NOTED_AS.items() if name.lower() in text} - present
    codes = [1 if name in present else 2 if name in negated else 0 for name in CHEXBERT_LABELS]
    return [*codes[:-1], 0 if study.case.lesions else 1]


def _write_table(path: Path, names: Sequence[str], codes: Sequence[Sequence[int]], studies: Sequence[Study]) -> None:
    rows = ([study.patient, *row] for study, row in zip(studies, codes, strict=True))
    write_csv(path, ["id", *names], rows)


def main() -> None:
    """Write a data set of any size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="target folder")
    parser.add_argument("--studies", type=int, default=300, help="number of studies (%(default)s)")
    parser.add_argument("--size", type=int, default=48, help="voxels per axis (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (%(default)s)")
    options = parser.parse_args()
    write_ctrg(options.out, studies=options.studies, size=options.size, seed=options.seed)


if __name__ == "__main__":
    main()
