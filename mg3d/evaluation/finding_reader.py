"""Who reads findings from a report, and which findings a study has.

n studies, L findings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mg3d.config_schema import MG3DConfig
from mg3d.datasets.keyword_labels import findings_by_keywords
from mg3d.datasets.labels import CT_RATE_LABELS, UNKNOWN_LABEL
from mg3d.finetuning.report_baseline import stated_table
from mg3d.phantoms.findings import FINDINGS
from mg3d.phantoms.report import stated_findings

__all__ = ["FROM_LABELS", "FindingReader", "finding_reader"]

FROM_LABELS, FROM_TEXT = "labels of the corpus", "read from their text"


@dataclass(frozen=True)
class FindingReader:
    """Reads findings from a text: L names, and which of them a report states."""

    names: tuple[str, ...]
    read: Callable[[str], frozenset[str]]

    def table(self, texts: Sequence[str]) -> np.ndarray:
        """Findings of n texts, 0 or 1, [n, L]."""
        return stated_table(texts, self.read, self.names)

    def of_studies(self, labels: np.ndarray, references: Sequence[str]) -> tuple[np.ndarray, str]:
        """Findings of n studies and where they come from: the labels where all are known, else the references.

        Args:
            labels: [n, 18] in the order of ``CT_RATE_LABELS``, -1 unknown.
            references: n reports.

        Returns:
            0 or 1, [n, L]; and `FROM_LABELS` or what else was read.
        """
        known = np.asarray(labels)[:, [CT_RATE_LABELS.index(name) for name in self.names]]
        if (known != UNKNOWN_LABEL).all():
            return known, FROM_LABELS
        return self.table(references), FROM_TEXT


def finding_reader(cfg: MG3DConfig) -> FindingReader | None:
    """The reader that ``clm_findings`` names, for the findings of ``eval_findings``; None for "none"."""
    if cfg.clm_findings == "none":
        return None
    known, read = (
        (FINDINGS, stated_findings) if cfg.clm_findings == "phantom" else (CT_RATE_LABELS, findings_by_keywords)
    )
    return FindingReader(tuple(name for name in known if name in (cfg.eval_findings or known)), read)
