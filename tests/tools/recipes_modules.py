"""Recordings of fusion layers, poolers, heads, losses and queues from the restatements in ``formulas``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from formulas import (
    contrast_logits,
    cross_attention,
    embedded,
    first_token,
    masked_image,
    matching,
    mean_tokens,
    pooled_attention,
    sentence_gather,
    sentence_matching,
    sentence_mlm,
    sentence_pooler,
    symmetric_loss,
    unidirectional,
    weighted_tokens,
)
from recording import (
    Draws,
    Recording,
    Tensors,
    differentiated,
    precise_leaves,
    prefixed,
    sampled,
    stored_precision,
)
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def layers(hidden: int, *names: str, out: int | None = None) -> Shapes:
    """Shapes of linear layers."""
    out = hidden if out is None else out
    shapes: Shapes = {}
    for name in names:
        shapes |= {f"{name}.weight": (out, hidden), f"{name}.bias": (out,)}
    return shapes


def pool_shapes(hidden: int, prefix: str = "") -> Shapes:
    """Shapes of an attention pool."""
    return layers(hidden, *(f"{prefix}{kind}_proj" for kind in "kqvc"))


def module(
    name: str,
    family: str,
    seed: int,
    function: Any,
    shapes: Shapes,
    inputs: Tensors,
    config: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> Recording:
    """Entry of one module with all its gradients."""
    draws = Draws(seed)
    tensors, silent = differentiated(draws, function, draws.state(shapes), inputs)
    settings = (config or {}) | {"params_without_gradient": silent}
    return Recording(name, family, tensors, config=settings, options=options or {}, **more)


def cross_attentions() -> list[Recording]:
    """All bidirectional variants, each with other sizes, and the one-way layer."""
    found = []
    for number, variant in enumerate(("mean", "unet", "ctrate")):
        hidden, first, second = 16 + 8 * number, 3 + number, 4 - number
        six = layers(hidden, *(f"{kind}{side}" for kind in ("query", "key", "value") for side in (1, 2)))
        draws = Draws(10 + number)
        inputs = {"tensor1": draws.normal(first, hidden), "tensor2": draws.normal(second, hidden)}
        mlm = six | layers(first, "fc1", out=1) | layers(second, "fc2", out=1)
        mim = six | layers(first, "fc1", out=1) | pool_shapes(hidden, "fc2.")
        for branch, shapes in (("mlm", mlm), ("mim", mim)):
            family, formula = f"attn_{branch}_cross_{variant}", cross_attention(branch, variant)
            options = {"fusion_variant": variant}
            found.append(module(f"{branch} {variant}", family, 20 + number, formula, shapes, inputs, options=options))
    shapes = layers(12, "key1", "value1", "query2")
    inputs = {"tensor1": Draws(30).normal(5, 12), "tensor2": Draws(31).normal(2, 12)}
    return [*found, module("one way", "attn_unidir", 32, unidirectional, shapes, inputs, parts=2)]


def poolers() -> list[Recording]:
    """Poolers and the sentence gather."""
    draws = Draws(40)
    table = {"positional_embedding": (7, 20)} | pool_shapes(20)
    index = torch.tensor([[-1, 1, 1, 2, 4, 4, -1], [-1, 2, 2, 2, 3, -1, -1]])
    plain = pool_shapes(18)
    unused = layers(24, "dense") | pool_shapes(24, "global_attention.")
    narrow = layers(14, "dense.0", out=22) | layers(22, "dense.3", out=6)
    pool = "sentence_attention_pool"
    found = [
        module("pool", pool, 41, pooled_attention(6), plain, {"x": draws.normal(3, 4, 18)}, {"heads": 6}),
        module("pool one", pool, 42, pooled_attention(3), plain, {"x": draws.normal(2, 1, 18)}, {"heads": 3}),
        module("pool table", pool, 43, pooled_attention(4), table, {"x": draws.normal(1, 3, 20)}, {"heads": 4}),
        module("first", "pooler", 44, first_token, layers(14, "dense"), {"x": draws.normal(2, 3, 14)}),
        module(
            "weighted",
            "swin_pooler",
            45,
            weighted_tokens,
            layers(5, "fc", out=1) | layers(10, "dense"),
            {"x": draws.normal(2, 5, 10)},
        ),
        module("mean", "swin_att_pooler", 46, mean_tokens, unused, {"x": draws.normal(2, 3, 24)}),
        module("sentences", "sentence_pooler", 47, sentence_pooler, narrow, {"x": draws.normal(1, 4, 14)}),
        module(
            "gather", "sentence_gather", 48, sentence_gather, {}, {"x": draws.normal(2, 7, 9), "sentence_index": index}
        ),
    ]
    for each in found[:3]:
        each.options["pos_embed"] = each.name == "pool table"
    whole = found[-1].tensors["in.x"]
    found[-1].tensors |= {f"out_no_batch.{b}": row.mean(0)[None, None] for b, row in enumerate(whole)}
    return found


def heads() -> list[Recording]:
    """Prediction heads."""
    draws = Draws(60)
    index = torch.tensor([[-1, 1, 2, 2, 3, -1], [-1, 1, 1, 1, 1, -1], [-1, 2, 2, 4, -1, -1]])
    mlm = layers(12, "transform.dense") | {f"transform.LayerNorm.{kind}": (12,) for kind in ("weight", "bias")}
    mlm |= {"decoder.weight": (31, 12), "bias": (31,)} | layers(12, "fc.0", out=10) | layers(10, "fc.3", out=4)
    inputs = {"x": draws.normal(3, 6, 12), "sentence_index": index}
    widths = [32, 16, 8, 4, 2, 2]
    mim = layers(32, "fc.0", out=9) | layers(9, "fc.3", out=3)
    for k in range(5):
        mim |= {f"conv.{4 * k}.weight": (widths[k + 1], widths[k], 3, 3, 3), f"conv.{4 * k}.bias": (widths[k + 1],)}
    mim |= {"conv.20.weight": (1, 2, 1, 1, 1), "conv.20.bias": (1,)}
    grid = {"x": draws.normal(1, 32, 1, 2, 1)}
    pair = {"image": draws.normal(5, 14), "text": draws.normal(5, 14)}
    found = [
        module("words", "sen_mlm_head", 61, sentence_mlm(1e-7), mlm, inputs, {"layer_norm_eps": 1e-7}),
        module("voxels", "mim_head_vae", 62, masked_image, mim, grid),
        module("cosines", "itc_head", 63, contrast_logits(0.25), contrast_shapes(14, 6), pair, {"temp": 0.25}),
        module("square", "itc_head_single", 64, contrast_logits(0.5), contrast_shapes(14, 14), pair, {"temp": 0.5}),
        module("match", "itm_head", 65, matching, layers(8, "fc", out=2), {"x": draws.normal(4, 8)}),
    ]
    voxels = found[1]
    strided = {name: [(1, 1, 8, 8, 8)] for name in ("out.recon",)}
    voxels.tensors = sampled(voxels.tensors, strided | {"grad.param.conv.0.weight": [(3, 5, 1, 1, 1), "l2"]})
    return found


def contrast_shapes(width: int, projected: int, prefix: str = "") -> Shapes:
    """Shapes of a contrastive head."""
    shapes: Shapes = {f"{prefix}{side}_proj.weight": (projected, width) for side in ("vision", "language")}
    for side in ("vision", "language"):
        shapes |= {f"{prefix}{side}_ln.weight": (width,), f"{prefix}{side}_ln.bias": (width,)}
    return shapes


def loss_entry(terms: Tensors, differentiated_term: str, leaves: Tensors) -> Tensors:
    """Stored losses and the gradients of one of them."""
    found = torch.autograd.grad(terms[differentiated_term], list(leaves.values()), allow_unused=True)
    gradients = {name: value for name, value in zip(leaves, found, strict=True) if value is not None}
    return stored_precision(prefixed("loss.", terms) | prefixed("grad.", gradients))


def _rows(draws: Draws, counts: tuple[int, ...], width: int, base: Tensor | None = None) -> list[Tensor]:
    return [
        (draws.normal(1, count, width) if base is None else base + draws.normal(1, count, width, scale=0.5))
        for count in counts
    ]


def _named(prefix: str, rows: list[Tensor]) -> Tensors:
    return {f"{prefix}.{position}": row for position, row in enumerate(rows)}


def local_contrast(name: str, counts: tuple[int, ...], terms: list[str], seed: int) -> Recording:
    """Alignment, aggregation and similarity terms on two heads."""
    draws, batch = Draws(seed), len(counts)
    state = draws.state(contrast_shapes(10, 4, "itc_cross_head.") | contrast_shapes(6, 3, "itc_agg_head."))
    widths = {"multi_modal_cls": 10, "uni_modal_cls": 10, "multi_modal_image_cls": 6, "agg_image_cls": 6}
    inputs = {key: draws.normal(batch, width) for key, width in widths.items()}
    visual, text = _rows(draws, counts, 5), _rows(draws, counts, 7, draws.normal(1, 1, 7))
    stored = prefixed("state.", state) | prefixed(
        "in.", inputs | _named("sen_image", visual) | _named("sen_text", text)
    )
    inputs, state = precise_leaves(inputs), precise_leaves(state)
    visual = [row.double().requires_grad_() for row in visual]
    cross = contrast_logits(0.3, "itc_cross_head.")(state, _pair(inputs, "multi_modal_cls", "uni_modal_cls"))
    agg = contrast_logits(0.3, "itc_agg_head.")(state, _pair(inputs, "multi_modal_image_cls", "agg_image_cls"))
    losses = {key: symmetric_loss(found["logits_per_image"]) for key, found in (("cml", cross), ("dcl", agg))}
    losses["ssm"] = sentence_matching(visual, text, 0.7, 0.4)
    losses["total"] = sum(losses[key] for key in terms)
    names = (
        "itc_logits_cross_image",
        "itc_logits_cross_text",
        "agg_itc_logits_gl_image",
        "agg_itc_logits_gl_image_agg",
    )
    logits = dict(zip(names, (*cross.values(), *agg.values()), strict=True))
    leaves = prefixed("in.", inputs | _named("sen_image", visual)) | prefixed("param.", state)
    tensors = stored | loss_entry(losses, "total", leaves) | stored_precision(logits)
    config = {"temp": 0.3, "thresholds": [0.7, 0.4]}
    return Recording(name, "loss_local_itc", tensors, config=config, options={"terms": terms})


def _pair(inputs: Tensors, image: str, text: str) -> Tensors:
    return {"image": inputs[image], "text": inputs[text]}


def losses() -> list[Recording]:
    """Loss functions."""
    draws = Draws(80)
    terms = ["cml", "dcl", "ssm"]
    found = [
        local_contrast("contrast 4", (2, 1, 3, 2), terms, 81),
        local_contrast("contrast two terms", (1, 2), terms[:2], 82),
        local_contrast("contrast single", (2,), terms[:2], 83),
    ]
    visual, text = _rows(draws, (2, 3), 4), _rows(draws, (2, 3), 6, draws.normal(1, 1, 6))
    leaves = [row.double().requires_grad_() for row in visual]
    tensors = prefixed("in.", _named("sen_image", visual) | _named("sen_text", text))
    loss = {"ssm": sentence_matching(leaves, text, 0.9, 0.6)}
    tensors |= loss_entry(loss, "ssm", prefixed("in.", _named("sen_image", leaves)))
    found.append(Recording("similarity", "loss_ssm", tensors))
    return [*found, words_loss(draws), voxels_loss(draws)]


def words_loss(draws: Draws) -> Recording:
    """Cross entropy of the labelled tokens and the distance of sentence features."""
    weight, counts = 0.3, (2, 1, 4)
    inputs = {"logits": draws.normal(3, 9, 17)}
    inputs |= _named("recon", _rows(draws, counts, 5)) | _named("target", _rows(draws, counts, 5))
    labels = torch.full((3, 9), -100)
    labels[0, 2], labels[1, 4], labels[2, 1], labels[2, 7] = 3, 16, 0, 9
    leaves = precise_leaves(inputs)
    chosen = [(b, k) for b in range(3) for k in range(9) if labels[b, k] >= 0]
    each = [leaves["logits"][b, k].logsumexp(0) - leaves["logits"][b, k, labels[b, k]] for b, k in chosen]
    distance = torch.zeros(())
    for b, count in enumerate(counts):
        for s in range(count):
            r, t = leaves[f"recon.{b}"][0, s], leaves[f"target.{b}"][0, s]
            distance = distance + 1 - (r @ t) / (r.norm() * t.norm())
    terms = {"mlm_ce": torch.stack(each).mean(), "sal": weight * distance / len(counts)}
    terms["total"] = terms["mlm_ce"] + terms["sal"]
    tensors = prefixed("in.", inputs) | {"in.labels": labels} | loss_entry(terms, "total", prefixed("in.", leaves))
    return Recording("words loss", "loss_sen_mlm", tensors, config={"weight": weight})


def cells(seed: int, grid: tuple[int, ...], ratio: float) -> np.ndarray:
    """Hidden cells of the published draw: the drawn ones are kept."""
    count = int(np.prod(grid))
    np.random.seed(seed)
    kept = set(np.random.choice(count, round(count * ratio), replace=False).tolist())
    return np.array([position not in kept for position in range(count)]).reshape(grid)


def voxels_loss(draws: Draws) -> Recording:
    """Squared error on the hidden voxels."""
    config = {"dhw": [6, 9, 6], "window": 3, "ratio": 0.25, "numpy_seed": 5}
    hidden = torch.from_numpy(np.kron(cells(5, (2, 3, 2), 0.25), np.ones((3, 3, 3)))).to(torch.uint8)
    recon, target = draws.normal(3, 1, 6, 9, 6), draws.normal(3, 6, 1, 9, 6)
    leaf = recon.double().requires_grad_()
    swapped = target.transpose(1, 2)
    loss = {"mim": ((leaf * hidden - swapped * hidden) ** 2).mean() / 0.25}
    tensors = {"in.recon": recon, "in.target_bdchw": target, "in.mask": hidden, "masked_image": swapped * (1 - hidden)}
    return Recording("voxels loss", "loss_mim", tensors | loss_entry(loss, "mim", {"in.recon": leaf}), config=config)


def ranks() -> list[Recording]:
    """Every process sees all features; the gradient goes through its own ones only."""
    draws, world, batch, width = Draws(90), 3, 2, 10
    state = draws.state(contrast_shapes(width, 4))
    inputs = [{"image": draws.normal(batch, width), "text": draws.normal(batch, width)} for _ in range(world)]
    tensors, fixed = prefixed("state.", state), {name: value.double() for name, value in state.items()}
    sides = {"image": "vision", "text": "language"}
    for rank in range(world):
        leaves, own = precise_leaves(inputs[rank]), precise_leaves(state)
        found: Tensors = {}
        for key, side in sides.items():
            parts = [embedded(fixed, side, other[key].double()) for other in inputs]
            parts[rank] = embedded(own, side, leaves[key])
            found[key] = torch.cat(parts)
        logits = found["image"] @ found["text"].t() / 0.4
        loss = symmetric_loss(logits)
        wanted = prefixed("in.", leaves) | prefixed("param.", own)
        gradients = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
        mine = {"loss": loss, "logits_per_image": logits} | prefixed("in.", inputs[rank])
        tensors |= prefixed(f"rank{rank}.", stored_precision(mine | prefixed("grad.", gradients)))
    options = {"world_size": world, "gather": "published: own slice"}
    return [Recording("processes", "itc_gather_two_ranks", tensors, config={"temp": 0.4}, options=options)]


def queues() -> list[Recording]:
    """Ring buffers and memory, row by row in lists."""
    draws, size = Draws(95), 6
    tensors: Tensors = {}
    for prefix, widths, batches in (("moco", (4, 4), (3, 3, 2)), ("moco_ssm", (3, 5), (4, 1, 5))):
        banks = [list(draws.normal(size, width)) for width in widths]
        tensors |= {f"{prefix}.init.queue_{side + 1}": torch.stack(bank) for side, bank in enumerate(banks)}
        pointer = 0
        for step, count in enumerate(batches):
            for side, bank in enumerate(banks):
                rows = draws.normal(count, widths[side])
                tensors[f"{prefix}.in{side + 1}.{step}"] = rows
                for offset, row in enumerate(rows):
                    bank[(pointer + offset) % size] = row
                tensors[f"{prefix}.after{step}.queue_{side + 1}"] = torch.stack(bank)
            pointer = (pointer + count) % size
            tensors[f"{prefix}.after{step}.ptr"] = torch.tensor([pointer, pointer])
    return [Recording("memories", "memory_queues", tensors | memory(draws, size), config={"K": size})]


def memory(draws: Draws, size: int) -> Tensors:
    """Cross-batch memory: a batch that does not fit replaces the last rows and the pointer starts again."""
    tensors: Tensors = {}
    banks: list[list[Tensor]] = [[], []]
    pointer = 0
    for step, count in enumerate((4, 1, 3, 2)):
        start = size - count if pointer + count > size else pointer
        for side, width in enumerate((3, 2)):
            rows = draws.normal(count, width)
            tensors[f"xbm.in{side + 1}.{step}"] = rows
            banks[side][start : start + count] = list(rows)
            tensors[f"xbm.after{step}.get_{side + 1}"] = torch.stack(banks[side])
        pointer = 0 if pointer + count > size else pointer + count
        tensors[f"xbm.after{step}.ptr"] = torch.tensor(pointer)
    return tensors


def recordings() -> list[Recording]:
    """Everything of this file."""
    return [*cross_attentions(), *poolers(), *heads(), *losses(), *ranks(), *queues()]
