"""One whole pre-training step: intermediate features, losses, gradients, parameter groups and an Adam step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel

from mg3d.datasets.collate import collate_reports
from mg3d.datasets.report_text import ReportEncoding, SentenceEncoding
from mg3d.datasets.volume import to_unit_range
from mg3d.mim_cells import cell_grid, reference_cells
from mg3d.models.encoded_batch import EncodedBatch
from mg3d.models.language_encoders import BertTextEncoder
from mg3d.models.network import MG3DNetwork
from mg3d.models.objectives import create_objective, weighted_total
from mg3d.models.optimization import build_optimizer, build_parameter_groups, parameter_group_index
from mg3d.models.options import NetworkOptions
from mg3d.models.vision_encoders.registry import create_vision_encoder
from tools.golden.adapters.common import loaded, unpadded
from tools.golden.bundle import Bundle
from tools.golden.index import Entry
from tools.golden.measure import gradient_norms, step_ranges, window_edge

REUSE = {"projected": "projected_reference"}


def _bias_table(bundle: Bundle) -> int:
    """Rows of the first attention bias table."""
    return len(bundle.peek(next(name for name in bundle.names() if name.endswith("relative_position_bias_table"))))


def network(bundle: Bundle, reuse: str) -> MG3DNetwork:
    """The network of the stored sizes and settings, randomly initialised."""
    config = bundle.config
    vision = create_vision_encoder(
        "swin_l" if config["swin_l"] else "swin_b",
        patch_merging=bundle.options.get("patch_merging", "legacy"),
        embed_dim=config["embed_dim"],
        depths=config["swin_depths"],
        num_heads=config["swin_heads"],
        window_size=window_edge(_bias_table(bundle)),
    )
    text = BertConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["text_layers"],
        num_attention_heads=config["text_heads"],
        intermediate_size=config["text_intermediate"],
        max_position_embeddings=config["max_position_embeddings"],
        type_vocab_size=config["type_vocab_size"],
        layer_norm_eps=config["bert_layer_norm_eps"],
        pad_token_id=config["special_ids"]["pad"],
    )
    options = NetworkOptions(
        volume_size=tuple(config["image_dhw"]),
        max_text_len=config["text_len"],
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_top_layer=config["num_top_layer"],
        fusion_variant=bundle.options["fusion_variant"],
        image_feature_reuse=REUSE.get(reuse, reuse),
        cl_temp=config["cl_temp"],
        mim_window=config["mask"]["window"],
        objectives=tuple(config["loss_weights"]),
    )
    encoder = BertTextEncoder(BertModel(text), frozen=True, eval_mode=bundle.options["text_encoder_eval"])
    return MG3DNetwork(vision, encoder, options)


def _report(bundle: Bundle, position: int) -> ReportEncoding:
    """The token view of one stored report, as the data path would hand it to the collator."""
    names = sorted(bundle.names(f"sen_txt_ids.{position}."), key=lambda name: int(name.rsplit(".", 1)[1]))
    ids, masks, index = (bundle.read(key)[position].numpy() for key in ("text_ids", "text_masks", "sentence_index"))
    return ReportEncoding(
        text="",
        input_ids=ids,
        attention_mask=masks,
        sentence_index=index,
        sentences=[SentenceEncoding("", bundle.read(name).squeeze(0).tolist()) for name in names],
        has_text=bool(names),
    )


def _batch(bundle: Bundle) -> dict[str, Any]:
    mask = bundle.config["mask"]
    generator = np.random.RandomState(mask["numpy_seed"])
    grid = cell_grid(bundle.config["image_dhw"], mask["window"])
    cells = torch.from_numpy(reference_cells(grid, mask["ratio"], generator))
    bundle.check("mim.mask_cells", cells)
    image = torch.from_numpy(to_unit_range(bundle.read("image_u8").numpy()))
    batch = collate_reports([_report(bundle, position) for position in range(len(image))])
    masked = {key: bundle.read(key) for key in ("text_ids_mlm", "text_labels_mlm")}
    return {"image": image, "mim_mask": cells.expand(len(image), *cells.shape), **batch, **masked}


def _check_masked_branches(bundle: Bundle, net: MG3DNetwork, encoded: EncodedBatch) -> None:
    fused_text, _ = net.fuse_report(encoded.masked_text, encoded.image)
    bundle.check("mlm.encoder_image_tokens", encoded.image_tokens)
    bundle.check("mlm.uni_modal_image_feats", encoded.image)
    bundle.check("mlm.multi_modal_text_feats", fused_text)
    bundle.check("mlm.full_text_embeddings", encoded.text_embeddings)
    logits = net.mlm_head.vocabulary_logits(net.mlm_head.transform(fused_text))
    bundle.check("mlm.logits_first_sample", logits[0])
    bundle.check("mim.encoder_image_tokens", encoded.masked_image_tokens)
    bundle.check("mim.multi_modal_image_feats", net.fuse_report(encoded.text, encoded.masked_image)[1])
    bundle.check("mim.recon", create_objective("swin_unetr_mim", net.options).reconstruct(net, encoded))
    for position, row in enumerate(unpadded(encoded.sentence_targets, encoded.sentences[1])):
        bundle.check(f"itc.sentence_text_embeddings.{position}", row)


def _check_local_contrast(bundle: Bundle, net: MG3DNetwork, encoded: EncodedBatch, reuse: str) -> None:
    found = create_objective("local_itc", net.options).features(net, encoded)
    bundle.check(f"itc.{reuse}.uni_modal_cls_feats", found.uni_modal)
    bundle.check(f"itc.{reuse}.multi_modal_cls_feats", found.multi_modal)
    bundle.check(f"itc.{reuse}.multi_modal_image_cls_feats", found.fused_image)
    bundle.check(f"itc.{reuse}.multi_modal_agg_image_cls_feats", found.aggregated_image)
    bundle.check(f"itc.{reuse}.uni_modal_image_feats", encoded.contrast_image)
    for position, row in enumerate(unpadded(found.visual_sentences, found.mask)):
        bundle.check(f"itc.{reuse}.agg_image_feats.{position}", row)


def _check_losses(bundle: Bundle, net: MG3DNetwork, batch: dict[str, Any], entry: Entry, reuse: str) -> None:
    terms = net(batch)
    total = weighted_total(terms, bundle.config["loss_weights"])
    named = {
        "total": total,
        "sen_mlm": terms["sen_mlm"]["sen_mlm_loss"],
        "mlm_ce": terms["sen_mlm"]["mlm"],
        "sal": terms["sen_mlm"]["sal"],
        "mim": terms["swin_unetr_mim"]["swin_unetr_mim_loss"],
        "local_itc": terms["local_itc"]["local_itc_loss"],
        **{key: terms["local_itc"][key] for key in ("cml", "dcl", "ssm")},
    }
    bundle.check_json(entry, reuse, {key: float(value.detach()) for key, value in named.items()})
    total.backward()


def _check_gradients(bundle: Bundle, net: MG3DNetwork, entry: Entry, reuse: str) -> None:
    norms = gradient_norms(net)
    stored = entry.body[f"{reuse}_no_gradient"]
    # Modules that the published checkpoint holds but nobody runs need not exist here; they have no gradient either way.
    without = [name for name in stored if name not in norms]
    silent = [name for name, value in net.named_parameters() if value.requires_grad and name not in norms]
    unexpected = [name for name in silent if name not in stored]
    bundle.check_json(entry, f"{reuse}_no_gradient", without + unexpected)
    bundle.check_json_norms(entry, f"{reuse}_grad_l2", norms)
    frozen, pattern = f"{reuse}_frozen", entry.body[f"{reuse}_frozen"]
    prefix = pattern.split("*")[0]
    agrees = all(value.requires_grad != name.startswith(prefix) for name, value in net.named_parameters())
    bundle.check_json(entry, frozen, pattern if agrees else "other parameters are frozen")


def _check_optimizer(bundle: Bundle, net: MG3DNetwork, entry: Entry) -> None:
    step = entry.body["adam_step"]
    rates = {"lr_multiplier_head": step["multiplier_head"], "lr_multiplier_multi_modal": step["multiplier_multi_modal"]}
    bundle.read_json(entry, *(f"adam_step/{key}" for key in ("lr_base", "multiplier_head", "multiplier_multi_modal")))
    decay = max(step["group_weight_decay"])
    groups = build_parameter_groups(net, learning_rate=step["lr_base"], weight_decay=decay, **rates)
    bundle.check_json(entry, "adam_step/group_lrs", [group["lr"] for group in groups])
    bundle.check_json(entry, "adam_step/group_weight_decay", [group["weight_decay"] for group in groups])
    optimizer = build_optimizer(groups, "adam", step["lr_base"])
    ranges = step_ranges(net, optimizer, bundle.step_floor(entry))
    sizes = {name: value.numel() for name, value in net.named_parameters()}
    bundle.check_json_steps(entry, "adam_step/delta_l2", ranges, f"{bundle.options['adam_step_mode']}_grad_l2", sizes)
    names = entry.body["param_group_of"]
    bundle.check_json(entry, "param_group_of", {name: parameter_group_index(name) for name in names})


def pretraining_step(bundle: Bundle) -> None:
    """Run the step once for every stored way of reusing image features."""
    entry = bundle.bodies()[0]
    batch = _batch(bundle)
    for reuse in bundle.options["image_feature_reuse"]:
        net = loaded(network(bundle, reuse), bundle.state())
        with torch.no_grad():
            encoded = net.encode(batch)
            _check_masked_branches(bundle, net, encoded)
            _check_local_contrast(bundle, net, encoded, reuse)
        _check_losses(bundle, net, batch, entry, reuse)
        _check_gradients(bundle, net, entry, reuse)
        if reuse == bundle.options["adam_step_mode"]:
            _check_optimizer(bundle, net, entry)
