"""Names of scans in a download."""

from __future__ import annotations

__all__ = ["SCAN_SUFFIXES", "strip_suffix"]

SCAN_SUFFIXES = (".nii.gz.npz", ".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".npz")


def strip_suffix(name: str) -> str:
    """Drop the ending of a scan file: ``train_1_a_1.nii.gz`` gives ``train_1_a_1``.

    Args:
        name: a file name; other endings stay.
    """
    lower = name.lower()
    ending = next((suffix for suffix in SCAN_SUFFIXES if lower.endswith(suffix)), "")
    return name[: len(name) - len(ending)]
