"""The README of an export folder: what the model is, what it may be used for, where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

CITATION = (
    "X. Ni, L. Wu, J. Zhuang, Q. Wang, M. Wu, V. Vardhanabhuti, L. Zhang, H. Gao, H. Chen: MG-3D: Multi-Grained "
    "Knowledge-Enhanced Vision-Language Pre-training for 3D Medical Image Analysis. Medical Image Analysis, 2026, "
    "104027. doi 10.1016/j.media.2026.104027"
)
_USE_SHARED = "zero-shot classification by prompts, retrieval between scans and reports"
_USE_IMAGE = "image features for probes, fine-tuning and scan-to-scan retrieval"


def write_card(config: Mapping[str, Any], preprocessor: Mapping[str, Any], title: str) -> str:
    """Model card in markdown, with the yaml header that model hubs read.

    Args:
        config: content of ``config.json``.
        preprocessor: content of ``preprocessor.json``.
        title: name of the model.
    """
    shared = config["has_shared_space"]
    encoder = config["vision_encoder"]
    sections = {
        "What it is": _summary(config, encoder),
        "Use": _use(title, shared),
        "Input": _input(preprocessor),
        "Limits": _limits(shared),
        "Training data": config.get("training_data") or "not stated",
        "Licences": _licences(config["licence"]),
        "Citation": f"{CITATION}\n\nReimplementation: mg3d {config['mg3d_version']}, {_commit(config)}.",
    }
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items())
    return f"{_header(config, shared)}\n# {title}\n\n{body}\n"


def _header(config: Mapping[str, Any], shared: bool) -> str:
    task = "zero-shot-image-classification" if shared else "image-feature-extraction"
    tags = ["medical-imaging", "chest-ct", "3d", "vision-language", config["vision_encoder"].get("name", "text-only")]
    lines = ["---", f"license: {_hub_licence(config['licence']['weights'])}", "language: en", "library_name: mg3d"]
    return "\n".join([*lines, f"pipeline_tag: {task}", "tags:", *(f"- {tag}" for tag in tags), "---", ""])


def _hub_licence(text: str) -> str:
    """Identifier for the header: lower case where it looks like one, ``other`` for free text."""
    return text.lower() if text and " " not in text.strip() else "other"


def _summary(config: Mapping[str, Any], encoder: Mapping[str, Any]) -> str:
    count, size = config["weights"]["parameters"], config["input_size_dhw"]
    lines = [
        f"MG-3D weights: image encoder `{encoder.get('name', 'none')}`"
        + (", residual blocks (SwinUNETR v2)" if encoder.get("residual_blocks") else "")
        + (f", patch merging `{config['patch_merging']}`" if config.get("patch_merging") else "")
        + f", {count / 1e6:.2f} M numbers in {config['weights']['entries']} tensors, input (D, H, W) = {size}.",
        f"Text encoder: {config['text_encoder']['name'] or 'none'}.",
    ]
    if config.get("objectives"):
        lines.append(f"Pre-trained with: {', '.join(config['objectives'])}.")
    return "\n".join(lines)


def _use(title: str, shared: bool) -> str:
    purpose = f"{_USE_IMAGE}; {_USE_SHARED}" if shared else _USE_IMAGE
    return (
        f"Research: {purpose}.\n\n```python\nimport mg3d\n\nmodel = mg3d.load_model({title!r})\n"
        f"processor = mg3d.load_processor({title!r})\n"
        'embedding = mg3d.encode_image(model, processor, "scan.nii.gz")\n```'
    )


def _input(preprocessor: Mapping[str, Any]) -> str:
    window = preprocessor["window_hu"]
    values = "8-bit grey values divided by 255" if window == "grey8" else f"HU {window} mapped to [0, 1]"
    spacing = preprocessor["target_spacing_mm"]
    resampled = f"resampled to {spacing} mm (z, y, x)" if spacing else "not resampled"
    return (
        f"Chest CT, axes {preprocessor['axis_order']}, {values}, {resampled}, centre part "
        f"{preprocessor['crop_fractions_dhw']} of (D, H, W) resized to {preprocessor['size_dhw']} voxels. "
        "`preprocessor.json` holds these numbers; nothing has to be retyped."
    )


def _limits(shared: bool) -> str:
    lines = [
        "- Not a medical device; not for diagnosis, triage or any decision about a patient.",
        "- Trained on chest CT of adults from few sites; other regions, children, other modalities, scanners and "
        "reconstruction kernels are untested.",
        "- Fine detail (small nodules) is lost at the input size.",
    ]
    if not shared:
        lines.append("- No trained shared image-text space: zero-shot and image-text retrieval are refused.")
    return "\n".join(lines)


def _licences(licence: Mapping[str, str]) -> str:
    rows = "\n".join(f"| {part} | {licence.get(part, 'not stated')} |" for part in ("code", "weights", "data"))
    return (
        f"| part | licence |\n|---|---|\n{rows}\n\nThe licence of the code does not extend to the weights or the data. "
        "CT-RATE is gated (CC BY-NC-SA, research only); weights trained on it inherit its conditions."
    )


def _commit(config: Mapping[str, Any]) -> str:
    return f"commit {config['source_commit']}" if config.get("source_commit") else "commit not recorded"


def as_json(content: Mapping[str, Any]) -> str:
    """JSON text with sorted keys and a final newline."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
