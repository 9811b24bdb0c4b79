"""Convert weights between this project and other programs.

    python tools/convert_meter_weights.py FILE OUT --to folder              config, safetensors, model card
    python tools/convert_meter_weights.py FILE OUT --to monai_swin_unetr    for MONAI's SwinUNETR
    python tools/convert_meter_weights.py FILE OUT --to nnunet              for nnUNetv2_train -pretrained_weights
    python tools/convert_meter_weights.py FILE OUT --to mg3d                for load_path (torch file)
    python tools/convert_meter_weights.py FILE OUT --to safetensors         the same, as safetensors

FILE is a checkpoint or export folder of this project, a released MG-3D file, MONAI's SwinUNETR or its self-supervised
weights, VoCo, nnU-Net, Models Genesis, METER or PTUnifier (2-D: text and fusion only, with --allow-partial).

Patch merging: files made with MONAI before 1.5 need "legacy" merging, files made with MONAI 1.5 or later "fixed". Names
and shapes are the same, so a file without a description cannot be told apart: "legacy" is assumed, as for all
published files; say --patch-merging fixed for your own newer ones. The order cannot be converted, only recorded.

The last line of standard output is one JSON object. Exit code 0: written; 1: could not be written; 2: bad input.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mg3d.command_line import Parser, exit_code_of, print_json_line
from mg3d.errors import CheckpointError
from mg3d.locks import exclusive_output

TARGETS = ("folder", "monai_swin_unetr", "nnunet", "safetensors", "mg3d")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", type=Path, help="weights file or export folder")
    add("out", type=Path, help="file or folder to write")
    add("--to", choices=TARGETS, required=True, help="what to write")
    add("--patch-merging", choices=("legacy", "fixed"), help="order of a Swin file that does not say (legacy)")
    add("--allow-partial", action="store_true", help="accept a file that covers under 95 %% of the image encoder")
    add("--cast-float32", action="store_true", help="turn half or double precision into float32")
    add("--overwrite", action="store_true", help="replace OUT")
    add("--report", type=Path, metavar="JSON", help="write what became of every entry")
    card = parser.add_argument_group("export folder")
    card.add_argument("--licence", default="not stated", help="licence of the weights, e.g. cc-by-nc-sa-4.0")
    card.add_argument("--data-licence", default="not stated", help="licence of the training data")
    card.add_argument("--training-data", default="", help="a sentence about the training data")
    card.add_argument("--title", default="", help="name of the model (the folder's name)")
    card.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of the text encoder's tokenizer")
    other = parser.add_argument_group("other programs")
    other.add_argument(
        "--classes", type=int, default=2, help="nnunet: classes of the segmentation, background included"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Convert one file.

    Args:
        arguments: command line without the program name.

    Returns:
        0 written, 1 could not be written, 2 bad input.
    """
    options = build_parser().parse_args(arguments)
    return exit_code_of(
        lambda: _run(options),
        disk_code=1,
        disk_remedy="check FILE and OUT, space and permissions",
        interrupted="interrupted; nothing was written",
    )


def _run(options: argparse.Namespace) -> int:
    if not options.file.exists():
        raise CheckpointError(f"{options.file} does not exist", "check the first argument")
    _check_out(options)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    with exclusive_output(options.out, what="OUT"):
        _check_out(options)  # another process may have finished it meanwhile
        from tools.convert.job import convert

        return print_json_line(convert(options))


def _check_out(options: argparse.Namespace) -> None:
    if options.out.exists() and not options.overwrite:
        raise CheckpointError(f"{options.out} exists already", "choose another name, or add --overwrite")
    if options.to != "folder" and options.out.is_dir():
        raise CheckpointError(f"{options.out} is a folder", "name the file to write")
    if options.out.resolve() == options.file.resolve():
        raise CheckpointError("FILE and OUT are the same", "name another OUT")


if __name__ == "__main__":
    raise SystemExit(main())
