"""One conversion: read into the project's names, write what was asked for, say what became of every entry."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from mg3d.atomic import write_text_atomically
from mg3d.datasets.stored_geometry import published_geometry
from mg3d.datasets.volume import PRETRAIN_SIZE_DHW
from mg3d.models.checkpoint import match_tensors
from mg3d.models.conversion import OwnWeights, read_own_weights, to_swin_unetr
from mg3d.models.export import TOKENIZER_NAME, export_folder
from mg3d.models.weight_shapes import ENCODER_PREFIX
from mg3d.models.weights_file import METADATA_KEY, save_torch, save_weights

LEGACY_NOTE = (
    "trained with legacy merging: build SwinUNETR with "
    "downsample=mg3d.models.vision_encoders.monai_swin.LegacyPatchMerging (MONAI >= 1.5 merges in another order)"
)
ASSUMED_NOTE = "the file does not say its merging order: legacy assumed (--patch-merging fixed for MONAI >= 1.5)"
FIXED_NOTE = "trained with fixed merging: MONAI >= 1.5 runs it as it is"
NNUNET_NOTE = (
    "put the architecture below into your nnU-Net plans; the encoder was trained on HU mapped to [0, 1], so window the "
    "scans and choose RescaleTo01Normalization there; the decoder is freshly drawn"
)


def convert(options: Namespace) -> dict[str, Any]:
    """Do what the command line says.

    Args:
        options: parsed arguments of the tool.

    Returns:
        Summary in plain JSON types.

    Raises:
        CheckpointError: the file cannot be read or does not fit the target.
    """
    extra = {**published_geometry(), "input_size_dhw": list(PRETRAIN_SIZE_DHW)}
    own = read_own_weights(
        options.file,
        patch_merging=options.patch_merging,
        allow_partial=options.allow_partial,
        cast=options.cast_float32,
        extra=extra,
    )
    print(f"read {options.file.name}: {own.report}")
    notes = [ASSUMED_NOTE] if own.merging_assumed and not options.patch_merging else []
    written = _WRITERS[options.to](own, options)
    notes += written.pop("notes", [])
    for note in notes:
        print(f"note: {note}")
    if options.report:
        write_text_atomically(options.report, json.dumps(own.report.as_dict(), indent=2) + "\n")
    summary = {"file": options.file.name, "to": options.to, "out": str(options.out), "notes": notes}
    return summary | _counts(own) | written


def _counts(own: OwnWeights) -> dict[str, Any]:
    report = own.report
    return {
        "family": report.family,
        "vision_encoder": own.metadata["vision_encoder"].get("name"),
        "patch_merging": own.metadata.get("patch_merging"),
        **report.counts(),
        "encoder_loaded": report.encoder_loaded,
        "encoder_total": report.encoder_total,
    }


def _folder(own: OwnWeights, options: Namespace) -> dict[str, Any]:
    inside = options.file / TOKENIZER_NAME
    folder = export_folder(
        own,
        options.out,
        licence=options.licence,
        data_licence=options.data_licence,
        training_data=options.training_data,
        title=options.title,
        tokenizer=options.tokenizer or (inside if inside.is_dir() else None),
        overwrite=options.overwrite,
    )
    return {"entries": len(own.tensors), "files": sorted(path.name for path in folder.iterdir())}


def _mg3d(own: OwnWeights, options: Namespace) -> dict[str, Any]:
    save_torch({"state_dict": own.tensors, METADATA_KEY: own.metadata}, options.out)
    return {"entries": len(own.tensors)}


def _safetensors(own: OwnWeights, options: Namespace) -> dict[str, Any]:
    save_weights(own.tensors, options.out, own.metadata)
    return {"entries": len(own.tensors)}


def _swin_unetr(own: OwnWeights, options: Namespace) -> dict[str, Any]:
    from monai.networks.nets.swin_unetr import SwinUNETR

    state, arguments = to_swin_unetr(own)
    target = SwinUNETR(out_channels=2, **arguments).state_dict()
    report = match_tensors(state, target)[1]
    legacy = own.metadata["patch_merging"] == "legacy"
    metadata = {key: own.metadata[key] for key in ("format_version", "vision_encoder", "patch_merging")}
    if options.out.suffix == ".safetensors":
        save_weights(state, options.out, metadata)
    else:
        save_torch({"state_dict": state, METADATA_KEY: metadata}, options.out)
    return {
        "entries": len(state),
        "target_loaded": len(report.loaded),
        "target_entries": len(target),
        "arguments": arguments,
        "notes": [LEGACY_NOTE if legacy else FIXED_NOTE],
    }


def _nnunet(own: OwnWeights, options: Namespace) -> dict[str, Any]:
    from mg3d.models.nnunet_format import to_nnunet

    prefix = ENCODER_PREFIX
    encoder = {name.removeprefix(prefix): value for name, value in own.tensors.items() if name.startswith(prefix)}
    content = to_nnunet(encoder, own.metadata, options.classes)
    metadata = {key: own.metadata[key] for key in ("format_version", "vision_encoder")}
    save_torch(content | {METADATA_KEY: metadata}, options.out)
    plans = content["init_args"]["plans"]["configurations"][content["init_args"]["configuration"]]
    return {"entries": len(content["network_weights"]), **plans, "notes": [NNUNET_NOTE]}


_WRITERS = {
    "folder": _folder,
    "mg3d": _mg3d,
    "safetensors": _safetensors,
    "monai_swin_unetr": _swin_unetr,
    "nnunet": _nnunet,
}
