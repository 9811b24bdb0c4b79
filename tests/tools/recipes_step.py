"""A whole pre-training step recorded once from the shipped network, with the parts that follow by rule restated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from recording import GRADIENT_RULE, TOLERANCE, Draws, Recording, Tensors
from torch import Tensor

from tools.golden.adapters.pretraining import REUSE, network, pretraining_step
from tools.golden.bundle import Bundle
from tools.golden.index import Entry

CONFIG: dict[str, Any] = {
    "embed_dim": 2,
    "swin_depths": [1, 1, 1, 1],
    "swin_heads": [1, 2, 2, 4],
    "swin_l": False,
    "hidden_size": 32,
    "text_layers": 1,
    "text_heads": 2,
    "text_intermediate": 24,
    "vocab_size": 41,
    "max_position_embeddings": 30,
    "type_vocab_size": 2,
    "text_len": 18,
    "num_top_layer": 1,
    "image_dhw": [32, 64, 32],
    "cl_temp": 0.2,
    "mask": {"window": 8, "ratio": 0.25, "numpy_seed": 17},
    "loss_weights": {"sen_mlm": 0.5, "swin_unetr_mim": 2, "local_itc": 0.3},
    "special_ids": {"pad": 0},
    "bert_layer_norm_eps": 1e-10,
}
MODES = ["encoder", "projected"]
OPTIONS: dict[str, Any] = {
    "image_feature_reuse": MODES,
    "fusion_variant": "unet",
    "adam_step_mode": "encoder",
    "text_encoder_eval": True,
    "patch_merging": "fixed",
}
NAMES = ("step weights", "step batch", "step values", "step numbers")
COUNTS = (3, 2)
RATE, HEAD, FUSED, DECAY = 2e-3, 3, 7, 1e-4


class RecordingBundle(Bundle):
    """Keeps what an adapter would compare."""

    def __init__(self, entries: list[Entry]) -> None:
        super().__init__(entries)
        self.found: Tensors = {}

    def check(self, name: str, value: Tensor, *, gradient: bool = False) -> None:
        """Keep a tensor."""
        self.found[name] = value.detach().clone()

    def check_json(self, entry: Entry, path: str, value: Any, **tolerance: float) -> None:
        """Keep a JSON value; what is stored already stays."""
        holder = entry.body
        *parents, last = path.split("/")
        for key in parents:
            holder = holder.setdefault(key, {})
        if not holder.get(last):
            holder[last] = value

    def check_json_norms(self, entry: Entry, path: str, norms: Mapping[str, float]) -> None:
        """Keep gradient norms."""
        entry.body[path] = dict(norms)

    def check_json_steps(self, entry: Entry, path: str, ranges: Mapping[str, tuple[float, float]], *more: Any) -> None:
        """Keep the norms of a step that are determined."""
        section, name = path.split("/")
        entry.body[section][name] = {key: low for key, (low, high) in ranges.items() if low == high and low > 0}


def batch() -> Tensors:
    """Random reports whose sentences follow each other, and volumes."""
    draws, length = Draws(71), CONFIG["text_len"]
    depth, height, width = CONFIG["image_dhw"]
    ids = torch.zeros(len(COUNTS), length, dtype=torch.long)
    index = torch.full_like(ids, -1)
    tensors: Tensors = {"image_u8": draws.grey(len(COUNTS), depth, 1, height, width)}
    for b, count in enumerate(COUNTS):
        words = draws.integers(5, CONFIG["vocab_size"], count, 4)
        used = words.numel()
        ids[b, 0], ids[b, 1 + used] = 2, 3
        ids[b, 1 : 1 + used], index[b, 1 : 1 + used] = words.flatten(), torch.arange(used) // 4 + 1
        for s, row in enumerate(words):
            tensors[f"sen_txt_ids.{b}.{s}"] = torch.tensor([[2, *row.tolist(), 3]])
    hidden = (index > 0) & (draws.normal(*ids.shape) > 0.6)
    tensors |= {"text_ids": ids, "text_masks": (ids != 0).long(), "sentence_index": index}
    return tensors | {"text_ids_mlm": ids.masked_fill(hidden, 4), "text_labels_mlm": torch.where(hidden, ids, -100)}


def _entry(name: str, role: str, tensors: Tensors, body: Any = None) -> Entry:
    partners = [other for other in NAMES if other != name]
    return Entry(name, role, "pretraining_step", partners, CONFIG, OPTIONS, TOLERANCE, GRADIENT_RULE, tensors, body)


def _state() -> Tensors:
    """Random weights of every parameter; a throw-away state only names and sizes them."""
    empty = RecordingBundle([_entry(NAMES[0], "state", {"x.relative_position_bias_table": torch.zeros(125, 1)})])
    shapes = network(empty, next(iter(REUSE))).state_dict()
    draws = Draws(72)
    return {
        name: 1 + draws.normal(*value.shape, scale=0.1)
        if "norm" in name.lower() and name.endswith("weight")
        else draws.normal(*value.shape, scale=0.2 if value.dim() < 2 else value[0].numel() ** -0.5)
        for name, value in shapes.items()
    }


def restated_groups() -> dict[str, Any]:
    """Rates and decays of the six groups: plain, heads, between the modalities; with and without decay."""
    rates = [RATE, RATE, RATE * HEAD, RATE * HEAD, RATE * FUSED, RATE * FUSED]
    settings = {"lr_base": RATE, "multiplier_head": HEAD, "multiplier_multi_modal": FUSED}
    return settings | {"group_lrs": rates, "group_weight_decay": [DECAY, 0.0] * 3}


def restated_group(name: str) -> int:
    """Group of a parameter by the rule of the published code."""
    heads = ("mlm_head", "mim_swin_unter_head", "itc_agg_head")
    base = 2 if any(part in name for part in heads) else 4 if "multi_modal" in name else 0
    plain = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")
    return base + any(part in name for part in plain)


@functools.cache
def recordings() -> list[Recording]:
    """The four entries of one step."""
    state, inputs = _state(), batch()
    frozen = "language_encoder.* (not trained)"
    body: dict[str, Any] = {"adam_step": restated_groups()}
    body["param_group_of"] = {name: restated_group(name) for name in state}
    for mode in MODES:
        body |= {f"{mode}_no_gradient": [], f"{mode}_frozen": frozen}
    run = RecordingBundle(
        [
            _entry(NAMES[0], "state", state),
            _entry(NAMES[1], "input", inputs),
            _entry(NAMES[3], "json", {}, body),
        ]
    )
    pretraining_step(run)
    for mode in MODES:
        terms, weights = body[mode], CONFIG["loss_weights"]
        parts = {"sen_mlm": terms["sen_mlm"], "swin_unetr_mim": terms["mim"], "local_itc": terms["local_itc"]}
        terms["total"] = sum(weights[name] * value for name, value in parts.items())
    recon = run.found.pop("mim.recon")
    values = run.found | {"mim.recon_slice": recon[:, :, ::8, ::4, ::2], "mim.recon_l2": recon.norm()}
    shared = {"config": CONFIG, "options": OPTIONS}
    tolerance = {"rtol": 1e-3, "atol": 1e-4}
    made = [
        Recording(NAMES[0], "pretraining_step", state, role="state", **shared),
        Recording(NAMES[1], "pretraining_step", inputs, role="input", **shared),
        Recording(NAMES[2], "pretraining_step", values, tolerance=tolerance, **shared),
        Recording(NAMES[3], "pretraining_step", body=body, role="json", results=_results(body), **shared),
    ]
    return [dataclasses.replace(each, uses=[name for name in NAMES if name != each.name]) for each in made]


def _results(body: dict[str, Any]) -> list[str]:
    deltas, norms = body["adam_step"]["delta_l2"], body["projected_grad_l2"]
    largest = [f"{path}/{max(found, key=found.get)}" for path, found in _paths(deltas, norms)]
    return ["encoder/total", "projected/ssm", *largest, "adam_step/group_lrs", "encoder_no_gradient"]


def _paths(deltas: dict[str, float], norms: dict[str, float]) -> list[tuple[str, dict[str, float]]]:
    return [("adam_step/delta_l2", deltas), ("projected_grad_l2", norms)]
