"""Loss functions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mg3d.mim_cells import cell_grid, reference_cells
from mg3d.models.heads import ITCHead
from mg3d.models.losses import (
    contrastive_loss,
    mim_loss,
    mlm_loss,
    sentence_alignment_loss,
    sentence_similarity_loss,
)
from mg3d.models.masking import apply_mask, cells_to_voxels
from tools.golden.adapters.common import check_gradients, leaf, loaded, padded, sequence
from tools.golden.bundle import Bundle


def _check_losses(
    bundle: Bundle, terms: Mapping[str, Tensor], differentiated: str, leaves: Mapping[str, Tensor]
) -> None:
    for name, value in terms.items():
        bundle.check(f"loss.{name}", value)
    check_gradients(bundle, [terms[differentiated]], [None], leaves)


def _named(prefix: str, rows: list[Tensor]) -> dict[str, Tensor]:
    return {f"grad.in.{prefix}.{position}": row for position, row in enumerate(rows)}


def local_contrast(bundle: Bundle) -> None:
    """Global alignment, global-aggregated contrast and sentence similarity matching."""
    state = bundle.state()
    names = sorted({name.split(".")[0] for name in state})
    widths = {name: state[f"{name}.vision_proj.weight"].shape for name in names}
    heads = nn.ModuleDict({name: ITCHead(width[1], width[0], bundle.config["temp"]) for name, width in widths.items()})
    loaded(heads, state)
    inputs = {
        name: leaf(bundle, f"in.{name}")
        for name in ("multi_modal_cls", "uni_modal_cls", "multi_modal_image_cls", "agg_image_cls")
    }
    visual, text = sequence(bundle, "in.sen_image"), sequence(bundle, "in.sen_text")
    cross = heads["itc_cross_head"](inputs["multi_modal_cls"], inputs["uni_modal_cls"])
    aggregated = heads["itc_agg_head"](inputs["multi_modal_image_cls"], inputs["agg_image_cls"])
    logits = (
        "itc_logits_cross_image",
        "itc_logits_cross_text",
        "agg_itc_logits_gl_image",
        "agg_itc_logits_gl_image_agg",
    )
    for name, value in zip(logits, (*cross, *aggregated), strict=True):
        bundle.check(name, value)
    visual_BSF, mask_BS = padded(visual)
    terms = {
        "cml": contrastive_loss(*cross),
        "dcl": contrastive_loss(*aggregated),
        "ssm": sentence_similarity_loss(visual_BSF, padded(text)[0], mask_BS, *bundle.config["thresholds"]),
    }
    terms["total"] = torch.stack([terms[name] for name in bundle.options["terms"]]).sum()
    leaves = {f"grad.in.{name}": value for name, value in inputs.items()} | _named("sen_image", visual)
    leaves |= {f"grad.param.{name}": value for name, value in heads.named_parameters()}
    _check_losses(bundle, terms, "total", leaves)


def sentence_similarity(bundle: Bundle) -> None:
    """Sentence similarity matching alone; without stored thresholds, at the default ones."""
    visual, text = sequence(bundle, "in.sen_image"), sequence(bundle, "in.sen_text")
    visual_BSF, mask_BS = padded(visual)
    thresholds = bundle.config.get("thresholds", ())
    loss = sentence_similarity_loss(visual_BSF, padded(text)[0], mask_BS, *thresholds)
    _check_losses(bundle, {"ssm": loss}, "ssm", _named("sen_image", visual))


def sentence_mlm(bundle: Bundle) -> None:
    """Masked tokens plus sentence alignment."""
    logits, recon, target = leaf(bundle, "in.logits"), sequence(bundle, "in.recon"), sequence(bundle, "in.target")
    recon_BSF, mask_BS = padded(recon)
    terms = {
        "mlm_ce": mlm_loss(logits, bundle.read("in.labels")),
        "sal": sentence_alignment_loss(recon_BSF, padded(target)[0], mask_BS, weight=bundle.config["weight"]),
    }
    terms["total"] = torch.stack(list(terms.values())).sum()
    leaves = {"grad.in.logits": logits} | _named("recon", recon) | _named("target", target)
    _check_losses(bundle, terms, "total", leaves)


def masked_image(bundle: Bundle) -> None:
    """Masked-voxel error; the mask is drawn again from the stored seed and compared too."""
    config = bundle.config
    recon, target = leaf(bundle, "in.recon"), bundle.read("in.target_bdchw").transpose(1, 2)
    generator = np.random.RandomState(config["numpy_seed"])
    cells = torch.from_numpy(reference_cells(cell_grid(config["dhw"], config["window"]), config["ratio"], generator))
    voxels = cells_to_voxels(cells, config["dhw"], config["window"])
    bundle.check("in.mask", voxels)
    bundle.check("masked_image", apply_mask(target, cells, config["window"]))
    loss = mim_loss(recon, target, voxels, ratio=config["ratio"])
    _check_losses(bundle, {"mim": loss}, "mim", {"grad.in.recon": recon})
