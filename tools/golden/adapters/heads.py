"""Prediction heads."""

from __future__ import annotations

from mg3d.models.heads import ITCHead, ITMHead, MIMHead, SentenceMLMHead
from tools.golden.adapters.common import compare, leaf, loaded, unpadded
from tools.golden.bundle import Bundle


def sentence_mlm(bundle: Bundle) -> None:
    """Vocabulary logits and sentence features."""
    state = bundle.state()
    vocab, hidden = state["decoder.weight"].shape
    out, middle = state["fc.3.weight"].shape
    head = loaded(SentenceMLMHead(hidden, vocab, middle, out, bundle.config["layer_norm_eps"]), state)
    inputs = {"x": leaf(bundle, "in.x")}
    logits, sentences, mask = head(inputs["x"], bundle.read("in.sentence_index"))
    rows = {f"sen.{position}": row for position, row in enumerate(unpadded(sentences, mask))}
    compare(bundle, head, inputs, {"logits": logits} | rows)


def masked_image(bundle: Bundle) -> None:
    """Decoder from tokens to voxels."""
    state = bundle.state()
    out, middle = state["fc.3.weight"].shape
    head = loaded(MIMHead(state["conv.0.weight"].shape[1], middle, out), state)
    inputs = {"x": leaf(bundle, "in.x")}
    compare(bundle, head, inputs, {"recon": head(inputs["x"]), "rec_feats": head.token_features(inputs["x"])})


def image_text(bundle: Bundle) -> None:
    """Cosine logits of both kinds of contrastive heads."""
    state = bundle.state()
    projected, width = state["vision_proj.weight"].shape
    head = loaded(ITCHead(width, projected, bundle.config["temp"]), state)
    inputs = {name: leaf(bundle, f"in.{name}") for name in ("image", "text")}
    per_image, per_text = head(inputs["image"], inputs["text"])
    compare(bundle, head, inputs, {"logits_per_image": per_image, "logits_per_text": per_text})


def matching(bundle: Bundle) -> None:
    """Match or no match."""
    state = bundle.state()
    head = loaded(ITMHead(state["fc.weight"].shape[1]), state)
    inputs = {"x": leaf(bundle, "in.x")}
    compare(bundle, head, inputs, {"logits": head(inputs["x"])})
