"""Features, embeddings, labels and reports of a split, collected with the trained or a freshly initialised model.

Shape legend: B batch, E encoder width, P shared space, F findings, n cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.evaluation.report import Cases
from mg3d.inference.text import tokenize_prompts

LOCAL_SPACE = "class features before fusion (no shared space was trained)"
DUAL_SPACE = "shared space of the objective itc"


@dataclass(frozen=True)
class Collected:
    """What one pass over a split gives.

    Attributes:
        features: mean encoder token of each volume [n, E].
        random_features: the same from the freshly initialised encoder [n, E].
        image: unit vectors [n, P] of the volumes, None without a space.
        text: unit vectors [n, P] of the reports, None without a space.
        cases: labels, patients and reports.
    """

    features: np.ndarray
    random_features: np.ndarray
    image: np.ndarray | None
    text: np.ndarray | None
    cases: Cases


def space_name(module: Any) -> str | None:
    """Which image-text space the model offers: that of ``itc``, the local contrast's class features, or None."""
    if "itc" in module.options.objectives:
        return DUAL_SPACE
    return LOCAL_SPACE if "local_itc" in module.options.objectives else None


def _unit(x_BP: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x_BP.float(), dim=-1)


def embed_batch(module: Any, batch: Mapping[str, Any], encoded: Any) -> tuple[Tensor, Tensor]:
    """Unit vectors [B, P] of the volumes and of the reports of a batch in the model's space.

    Without a trained shared space the class features of the local contrast before fusion stand in: nothing trains them
    to agree, which is what the figures then show.
    """
    if space_name(module) == DUAL_SPACE:
        return module.image_text_itc_head.embed_image(encoded.image_tokens), module.encode_report(batch)
    sentences_BSC, mask_BS = encoded.sentences
    text = module.uni_global_text_attention(sentences_BSC, mask_BS)
    return _unit(module.uni_modal_vision_pooler(encoded.contrast_image)), _unit(text)


def embed_prompts(module: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Unit vectors [F, P] of short texts, each taken as one sentence."""
    ids, mask = tokenize_prompts(tokenizer, prompts, module.language_encoder.max_length, module.device)
    if space_name(module) == DUAL_SPACE:
        return module.encode_text(ids, mask)
    hidden = module.project_text(module.contextualize_text(module.embed_text(ids), mask))
    weight = mask[..., None].to(hidden.dtype)
    sentence = (hidden * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    return _unit(module.uni_global_text_attention(sentence, torch.ones_like(ids[:, :1], dtype=torch.bool)))


def _move(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@torch.no_grad()
def collect(module: Any, random_encoder: Any, batches: Iterable[Mapping[str, Any]], total: int, name: str) -> Collected:
    """Run both encoders over a split.

    Args:
        module: the trained model, in evaluation mode.
        random_encoder: image encoder at its initialisation.
        batches: batches of the split.
        total: number of batches, for the progress bar.
        name: name of the split, for the progress bar.

    Returns:
        All features on the CPU as float32 arrays.
    """
    rows: dict[str, list[np.ndarray]] = {key: [] for key in ("features", "random", "image", "text", "labels")}
    patients: list[str] = []
    reports: list[str] = []
    space = space_name(module)
    for batch in tqdm(batches, total=total, desc=f"encode {name}", unit="batch"):
        moved = _move(batch, module.device)
        encoded = module.encode(moved)
        found = {
            "features": encoded.image_tokens.mean(1),
            "random": random_encoder.tokens(encoded.volume).mean(1),
            "labels": moved["labels"],
        }
        if space is not None:
            found["image"], found["text"] = embed_batch(module, moved, encoded)
        for key, value in found.items():
            rows[key].append(value.float().cpu().numpy())
        patients += batch["patient_id"]
        reports += batch["report"]
    joined = {key: np.concatenate(value) if value else None for key, value in rows.items()}
    labels = np.asarray(joined["labels"]).astype(int)
    cases = Cases(labels=labels, patients=patients, reports=reports)
    return Collected(joined["features"], joined["random"], joined["image"], joined["text"], cases)  # type: ignore[arg-type]


def finding_columns(findings: Sequence[str]) -> tuple[list[str], list[int]]:
    """Names and label columns of the scored findings; all 18 when none are named."""
    names = list(findings) or list(CT_RATE_LABELS)
    return names, [CT_RATE_LABELS.index(name) for name in names]
