"""The command line of the packer: one sub-command per kind of data, every flag with its range."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from mg3d.command_line import Parser, natural
from mg3d.files import add_encoding_option
from mg3d.scans.folders import FOLLOW_LINKS

DESCRIPTION = """Pack CT-RATE, CTRG-Chest or your own scans into the Arrow files that pre-training reads.

    python prepro/prepro_pretraining_data.py ct_rate --root DIR --out data/pretrain_arrows
    python prepro/prepro_pretraining_data.py ctrg --root DIR --annotation JSON --out data/pretrain_arrows
    python prepro/prepro_pretraining_data.py own --root DIR --table CSV --out data/pretrain_arrows

Works from any folder and needs no installation. Killed at any moment and started again it goes on where it was. The
last line of standard output is one JSON object. Exit code 0: all packed; 1: packed, but some scans were unusable and
left out, or the run broke down; 2: bad input or arguments.
"""
CORPUS_NAME = re.compile(r"clm_own(_[a-z0-9]+)*(?<!_train)(?<!_val)(?<!_test)")
SHARD_OF = re.compile(r"(\d+)/(\d+)")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line: one sub-command per data set."""
    parser = Parser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="dataset", required=True, metavar="{ct_rate,ctrg,own}")
    ct_rate = commands.add_parser("ct_rate", help="CT-RATE: NIfTI volumes with report, label and metadata tables")
    ctrg = commands.add_parser("ctrg", help="CTRG-Chest: slice images or NIfTI volumes with an annotation JSON")
    own = commands.add_parser("own", help="your own scans: one CSV that names volumes and reports")
    for command in (ct_rate, ctrg, own):
        _add_data_arguments(command, root_needed=command is not own)
        _add_geometry_arguments(command)
        _add_text_arguments(command)
        _add_run_arguments(command)
    for command in (ct_rate, own):
        _add_hounsfield_arguments(command)
    _add_ct_rate_arguments(ct_rate)
    _add_ctrg_arguments(ctrg)
    _add_own_arguments(own)
    return parser


def _add_data_arguments(command: argparse.ArgumentParser, root_needed: bool) -> None:
    add = command.add_argument_group("data").add_argument
    add("--root", type=Path, required=root_needed, help="folder of the download; for own data the table's by default")
    add("--out", type=Path, required=True, help="folder of the arrows and manifests; made if absent")
    add("--exclude", type=Path, metavar="FILE", help="scans to leave out: text or CSV, one id or file name a line")
    add_encoding_option(add)
    add("--split-protocol", choices=("clean", "reference"), default="clean", help="see data/README.md")
    add(
        "--val-fraction",
        type=_fraction,
        default=None,
        metavar="F",
        help="share of training patients drawn for validation (0.02 CT-RATE, 0.10 otherwise)",
    )
    add("--seed", type=int, default=0, help="seed of the validation draw")
    add("--limit", type=_positive_int, default=None, metavar="N", help="first N scans of each split, for a trial")


def _add_geometry_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("geometry").add_argument
    add("--image-size", type=_positive_int, nargs=3, metavar=("D", "H", "W"), help="stored voxels (128 96 128)")
    add(
        "--crop-fractions",
        nargs="+",
        metavar="F",
        help="central part of each axis (D H W) that is kept (0.88 0.65625 0.875), or none for no crop",
    )
    add(
        "--store",
        choices=("crop", "native"),
        default="crop",
        help="what a row holds: the pre-training crop, or the whole volume at the target spacing, compressed",
    )
    add("--max-volume-gib", type=_positive_float, default=4.0, help="refuse volumes whose header claims more")
    add(
        "--assume-spacing",
        type=_spacing,
        nargs=3,
        metavar=("Z", "Y", "X"),
        help="voxel size in mm for scans whose files have none",
    )


def _add_text_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("text").add_argument
    add("--empty-report", choices=("skip", "keep"), default="skip", help="reports of fewer than three words")
    add(
        "--caption-separator",
        choices=("blank", "none_reference"),
        default="blank",
        help="between findings and impression; the published files have nothing there",
    )
    add("--fragments", choices=("comma", "sentence"), default="comma", help="pieces of a report; comma is published")
    add("--tokenizer", metavar="NAME_OR_DIR", help="counts truncated reports exactly; words give a lower bound")
    add("--max-text-len", type=_positive_int, default=250, metavar="N", help="tokens a model reads of a report")


def _add_run_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("run").add_argument
    add("--workers", type=natural, default=0, help="processes that read scans; 0 chooses")
    add("--scheduler", metavar="ADDRESS", help="read scans on a running Dask cluster, for example tcp://host:8786")
    add("--rows-per-shard", type=natural, default=0, metavar="N", help="rows per arrow; 0 writes one file per split")
    add("--shard", type=_shard, metavar="I/N", help="write the I-th of N parts of the shards, counted from 1")
    add("--on-bad", choices=("skip", "stop"), default="skip", help="an unusable scan: leave it out, or end the run")
    add("--dry-run", action="store_true", help="count, time a few scans, estimate time and disk; write nothing")


def _add_hounsfield_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("voxel values and sizes").add_argument
    add(
        "--target-spacing",
        nargs="+",
        metavar="MM",
        help="intermediate spacing z y x in mm (1.5 0.75 0.75), or none",
    )
    add(
        "--window-hu",
        type=int,
        nargs=2,
        default=[-1000, 1000],
        metavar=("LOW", "HIGH"),
        help="values are clipped to these before resampling; training maps them to 0..1 (-1000 1000)",
    )
    add(
        "--rescale",
        choices=("auto", "apply", "skip"),
        default="auto",
        help="stored values to HU: look at the voxels, apply slope and intercept, or leave them",
    )
    add(
        "--orientation",
        choices=("canonical", "snap"),
        default="canonical",
        help="axes tilted by more than 1 degree: resample, or only reorder as published",
    )


def _add_ctrg_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("CTRG").add_argument
    add("--annotation", type=Path, required=True, help="JSON with id, report, result, image_path")
    add(
        "--nifti-order",
        choices=("published", "header"),
        default="published",
        help="axes of NIfTI volumes: stored order with z reversed, or as their header says",
    )


def _add_ct_rate_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("CT-RATE").add_argument
    help_text = "also read linked folders that lie outside --root"
    add(FOLLOW_LINKS, action="store_true", default=argparse.SUPPRESS, help=help_text)


def _add_own_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("own data").add_argument
    add("--table", type=Path, required=True, help="CSV of scans and reports; its paths are below --root")
    add("--series", default=argparse.SUPPRESS, metavar="UID|largest", help="of DICOM folders that hold several series")
    add("--corpus", type=_corpus, default="clm_own", help="clm_own or clm_own_NAME: first part of the file names")


def _positive_int(text: str) -> int:
    value = natural(text)
    if value < 1:
        raise ValueError(text)
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError(text)
    return value


def _spacing(text: str) -> float:
    value = float(text)
    if not 0.05 <= value <= 20:
        raise argparse.ArgumentTypeError(f"{text} mm is not between 0.05 and 20")
    return value


def _shard(text: str) -> tuple[int, int]:
    match = SHARD_OF.fullmatch(text)
    part, parts = (int(number) for number in match.groups()) if match else (0, 0)
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N")
    return part, parts


def _corpus(text: str) -> str:
    if not CORPUS_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not clm_own, or clm_own_ and words that are no split")
    return text
