"""The command line of the verifier; imports nothing heavy, so that ``--help`` is instant."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from mg3d.command_line import Parser, natural
from mg3d.files import ENCODING_HELP
from mg3d.scans.folders import FOLLOW_LINKS

DESCRIPTION = """Check packed arrows, or a download before packing: list every bad case with file, reason and mend.

    python prepro/verify.py data/pretrain_arrows
    python prepro/verify.py data/pretrain_arrows/clm_ct_rate_val.arrow --json report.json
    python prepro/verify.py DIR                      (a CT-RATE download)
    python prepro/verify.py DIR --annotation JSON    (a CTRG-Chest download)
    python prepro/verify.py cases.csv                (your own scans; or DIR --table cases.csv)

The last line of standard output is one JSON object with counts. Exit code 0: nothing wrong (warnings allowed);
1: warnings, with --strict; 2: errors, or bad arguments. Report text is never printed.
"""
ALL: Final = ("ct_rate", "ctrg", "own")
HU: Final = ("ct_rate", "own")
FORWARDED: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "--annotation": (("ctrg",), "JSON of a CTRG download"),
    "--nifti-order": (("ctrg",), "axes of its NIfTI volumes: published or header"),
    "--table": (("own",), "CSV of your own scans, when the path given is their folder"),
    "--corpus": (("own",), "name of your data set"),
    "--rescale": (HU, "stored values to HU: auto, apply or skip"),
    "--orientation": (HU, "axes tilted by more than 1 degree: canonical or snap"),
    "--assume-spacing": (ALL, "voxel size z y x in mm for scans whose files have none"),
    "--series": (("own",), "of a DICOM folder that holds several: largest, or SeriesInstanceUID"),
    FOLLOW_LINKS: (("ct_rate",), "also read linked folders that lie outside the root"),
    "--empty-report": (ALL, "reports of fewer than three words: skip or keep"),
    "--max-volume-gib": (ALL, "refuse volumes whose header claims more"),
    "--encoding": (ALL, ENCODING_HELP),
    "--exclude": (ALL, "scans to leave out, a text or CSV file"),
    "--split-protocol": (ALL, "splits for the leakage check: clean or reference"),
    "--val-fraction": (ALL, "share of training patients drawn for validation"),
    "--seed": (ALL, "seed of the validation draw"),
}


def build_verify_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", type=Path, nargs="+", metavar="PATH", help="arrow file, folder of arrows, download, or CSV")
    add("--json", type=Path, metavar="FILE", help="write every finding for a program")
    add("--strict", action="store_true", help="warnings make the exit code 1")
    add("--workers", type=natural, default=0, metavar="N", help="processes; 0 chooses")
    add("--scheduler", metavar="ADDRESS", help="read scans on a running Dask cluster, for example tcp://host:8786")
    tree = parser.add_argument_group("a download, as for packing")
    tree.add_argument("--quick", action="store_true", help="tables and file sizes only: read no voxels")
    for flag, (_, text) in FORWARDED.items():
        if flag == FOLLOW_LINKS:
            tree.add_argument(flag, action="store_true", help=text)
        elif flag == "--assume-spacing":
            tree.add_argument(flag, nargs=3, metavar=("Z", "Y", "X"), help=text)
        else:
            tree.add_argument(flag, metavar="VALUE", help=text)
    return parser
