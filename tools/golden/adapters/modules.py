"""Cross attentions and poolers."""

from __future__ import annotations

from mg3d.models.fusion import MIMCrossAttention, MLMCrossAttention, UnidirectionalCrossAttention
from mg3d.models.pooling import (
    Pooler,
    SentenceAttentionPool,
    SentencePooler,
    SwinAttPooler,
    SwinPooler,
    sentence_gather,
)
from tools.golden.adapters.common import compare, leaf, loaded, unpadded
from tools.golden.bundle import Bundle


def _cross(bundle: Bundle, layer: MLMCrossAttention | MIMCrossAttention) -> None:
    inputs = {name: leaf(bundle, f"in.{name}") for name in ("tensor1", "tensor2")}
    context2, probs2, context1, probs1 = layer(inputs["tensor1"].unsqueeze(0), inputs["tensor2"].unsqueeze(0))
    outputs = {"context2": context2, "probs2": probs2, "context1": context1, "probs1": probs1}
    compare(bundle, layer, inputs, {name: value.squeeze(0) for name, value in outputs.items()})


def mlm_cross(bundle: Bundle) -> None:
    """Fusion of the masked-language branch."""
    state = bundle.state()
    hidden, num_a, num_b = (state[f"{name}.weight"].shape[1] for name in ("query1", "fc1", "fc2"))
    variant = bundle.options["fusion_variant"]
    _cross(bundle, loaded(MLMCrossAttention(hidden, num_a, num_b, variant), state))


def mim_cross(bundle: Bundle) -> None:
    """Fusion of the local contrast branch."""
    state = bundle.state()
    hidden, num_a = (state[f"{name}.weight"].shape[1] for name in ("query1", "fc1"))
    _cross(bundle, loaded(MIMCrossAttention(hidden, num_a, bundle.options["fusion_variant"]), state))


def unidirectional(bundle: Bundle) -> None:
    """One-way fusion."""
    state = bundle.state()
    layer = loaded(UnidirectionalCrossAttention(state["key1.weight"].shape[1]), state)
    inputs = {name: leaf(bundle, f"in.{name}") for name in ("tensor1", "tensor2")}
    context1, probs1 = layer(inputs["tensor1"].unsqueeze(0), inputs["tensor2"].unsqueeze(0))
    compare(bundle, layer, inputs, {"context1": context1.squeeze(0), "probs1": probs1.squeeze(0)})


def _pool(bundle: Bundle, layer: object) -> None:
    inputs = {"x": leaf(bundle, "in.x")}
    compare(bundle, layer, inputs, {"pooled": layer(inputs["x"])})


def sentence_attention_pool(bundle: Bundle) -> None:
    """Attention pool; the length of its position table comes from the stored table."""
    state = bundle.state()
    table = state.get("positional_embedding")
    length = bundle.read("in.x").shape[1] if table is None else range(table.shape[0])[-1]
    width = state["k_proj.weight"].shape[1]
    layer = SentenceAttentionPool(length, width, bundle.config["heads"], pos_embed=bundle.options["pos_embed"])
    _pool(bundle, loaded(layer, state))


def pooler(bundle: Bundle) -> None:
    """First-token pooler."""
    state = bundle.state()
    _pool(bundle, loaded(Pooler(state["dense.weight"].shape[1]), state))


def swin_pooler(bundle: Bundle) -> None:
    """Learned weighted sum over the tokens."""
    state = bundle.state()
    layer = SwinPooler(state["fc.weight"].shape[1], state["dense.weight"].shape[1])
    _pool(bundle, loaded(layer, state))


def swin_att_pooler(bundle: Bundle) -> None:
    """Mean over the tokens."""
    state = bundle.state()
    _pool(bundle, loaded(SwinAttPooler(state["dense.weight"].shape[1]), state))


def sentence_pooler(bundle: Bundle) -> None:
    """Sentence-wise visual features."""
    state = bundle.state()
    middle, hidden = state["dense.0.weight"].shape
    layer = SentencePooler(hidden, middle, state["dense.3.weight"].shape[0])
    _pool(bundle, loaded(layer, state))


def sentence_gathering(bundle: Bundle) -> None:
    """Means over the tokens of each sentence."""
    inputs = {"x": leaf(bundle, "in.x")}
    rows = unpadded(*sentence_gather(inputs["x"], bundle.read("in.sentence_index")))
    compare(bundle, None, inputs, {str(position): row for position, row in enumerate(rows)})
    for position, row in enumerate(unpadded(*sentence_gather(inputs["x"], None))):
        bundle.check(f"out_no_batch.{position}", row)
