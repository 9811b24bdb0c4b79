"""Plain restatements of the fusion layers, poolers and heads, one sample, token or sentence at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

Tensors = dict[str, Tensor]
Read = Mapping[str, Tensor]
POOL_HEADS = 8


def linear(state: Read, name: str, x: Tensor) -> Tensor:
    """The linear layer of that name."""
    return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def attention_pool(state: Read, prefix: str, rows_SC: Tensor, heads: int) -> Tensor:
    """Self-attention of the mean row over itself and all rows; the layer CLIP uses, through torch's own function."""
    rows = torch.cat([rows_SC.mean(0, keepdim=True), rows_SC])
    table = state.get(f"{prefix}positional_embedding")
    if table is not None:
        rows = rows + table[: len(rows)]
    weights = {f"{kind}_proj_weight": state[f"{prefix}{kind}_proj.weight"] for kind in "qkv"}
    biases = torch.cat([state[f"{prefix}{kind}_proj.bias"] for kind in "qkv"])
    out, _ = functional.multi_head_attention_forward(
        rows[:1].unsqueeze(1),
        rows.unsqueeze(1),
        rows.unsqueeze(1),
        rows.shape[1],
        heads,
        None,
        biases,
        None,
        None,
        False,
        0.0,
        state[f"{prefix}c_proj.weight"],
        state[f"{prefix}c_proj.bias"],
        training=False,
        use_separate_proj_weight=True,
        need_weights=False,
        **weights,
    )
    return out[0, 0]


def _gates(query_TC: Tensor, key_IC: Tensor) -> Tensor:
    scale = query_TC.shape[1] ** 0.5
    return torch.stack([torch.stack([torch.sigmoid((q * k).sum() / scale) for k in key_IC]) for q in query_TC])


def _contexts(value_TC: Tensor, gates_TI: Tensor, weights_I: Tensor, bias: Tensor | float) -> Tensor:
    rows = []
    for value, gates in zip(value_TC, gates_TI, strict=True):
        rows.append(sum(weight * gate * value for weight, gate in zip(weights_I, gates, strict=True)) + bias)
    return torch.stack(rows)


def cross_attention(branch: str, variant: str):
    """Both directions of the gated fusion for ``branch`` "mlm" or "mim", token by token."""
    learned_1 = (branch, variant) in (("mlm", "ctrate"), ("mim", "unet"))

    def forward(state: Read, inputs: Read) -> Tensors:
        a, b = inputs["tensor1"], inputs["tensor2"]
        probs1 = _gates(linear(state, "query2", b), linear(state, "key1", a))
        probs2 = _gates(linear(state, "query1", a), linear(state, "key2", b))
        value1, value2 = linear(state, "value1", a), linear(state, "value2", b)
        evenly = {len(a): torch.full((len(a),), 1 / len(a)), len(b): torch.full((len(b),), 1 / len(b))}
        if learned_1:
            context1 = _contexts(value2, probs1, state["fc1.weight"][0], state["fc1.bias"])
        else:
            context1 = _contexts(value2, probs1, evenly[len(a)], 0.0)
        if variant == "mean":
            context2 = _contexts(value1, probs2, evenly[len(b)], 0.0)
        elif branch == "mlm":
            context2 = _contexts(value1, probs2, state["fc2.weight"][0], state["fc2.bias"])
        else:
            built = [gates.unsqueeze(1) * value for gates, value in zip(probs2, value1, strict=True)]
            context2 = torch.stack([attention_pool(state, "fc2.", rows, POOL_HEADS) for rows in built])
        return {"context2": context2, "probs2": probs2, "context1": context1, "probs1": probs1}

    return forward


def unidirectional(state: Read, inputs: Read) -> Tensors:
    """Keys and values of the first set, queries of the second."""
    a, b = inputs["tensor1"], inputs["tensor2"]
    probs1 = _gates(linear(state, "query2", b), linear(state, "key1", a))
    values = linear(state, "value1", a)
    context1 = torch.stack([sum(gate * value for gate, value in zip(row, values, strict=True)) for row in probs1])
    return {"context1": context1, "probs1": probs1}


def pooled_attention(heads: int):
    """Attention pool of every sample."""

    def forward(state: Read, inputs: Read) -> Tensors:
        return {"pooled": torch.stack([attention_pool(state, "", rows, heads) for rows in inputs["x"]])}

    return forward


def first_token(state: Read, inputs: Read) -> Tensors:
    """Pooler."""
    return {"pooled": torch.tanh(linear(state, "dense", inputs["x"][:, 0]))}


def weighted_tokens(state: Read, inputs: Read) -> Tensors:
    """Swin pooler."""
    weights, bias = state["fc.weight"][0], state["fc.bias"]
    rows = [sum(w * token for w, token in zip(weights, tokens, strict=True)) + bias for tokens in inputs["x"]]
    return {"pooled": torch.tanh(linear(state, "dense", torch.stack(rows)))}


def mean_tokens(state: Read, inputs: Read) -> Tensors:
    """Swin attention pooler, whose attention never runs."""
    return {"pooled": torch.tanh(linear(state, "dense", inputs["x"].mean(1)))}


def standardised(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Zero mean and unit biased variance over some axes."""
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()


def sentence_features(state: Read, prefix: str, x: Tensor, axes: tuple[int, ...] = (-1,)) -> Tensor:
    """Linear, normalisation, GELU, Linear."""
    hidden = functional.gelu(standardised(linear(state, f"{prefix}.0", x), axes))
    return linear(state, f"{prefix}.3", hidden)


def sentence_pooler(state: Read, inputs: Read) -> Tensors:
    """Feature of every sentence."""
    return {"pooled": torch.tanh(sentence_features(state, "dense", inputs["x"]))}


def gathered_sentences(tok_LC: Tensor, index_L: Tensor) -> Tensor:
    """Mean token of every sentence that has one, ``[1, S, C]``."""
    rows = [tok_LC[index_L == k].mean(0) for k in range(1, int(index_L.max()) + 1) if (index_L == k).any()]
    return torch.stack(rows).unsqueeze(0)


def sentence_gather(state: Read, inputs: Read) -> Tensors:
    """Sentences of every sample."""
    pairs = zip(inputs["x"], inputs["sentence_index"], strict=True)
    return {str(b): gathered_sentences(tokens, index) for b, (tokens, index) in enumerate(pairs)}


def sentence_mlm(eps: float):
    """Vocabulary logits and sentence features."""

    def forward(state: Read, inputs: Read) -> Tensors:
        hidden = functional.gelu(linear(state, "transform.dense", inputs["x"]))
        scale, shift = state["transform.LayerNorm.weight"], state["transform.LayerNorm.bias"]
        hidden = functional.layer_norm(hidden, hidden.shape[-1:], scale, shift, eps)
        outputs = {"logits": hidden @ state["decoder.weight"].t() + state["bias"]}
        for b, (tokens, index) in enumerate(zip(hidden, inputs["sentence_index"], strict=True)):
            outputs[f"sen.{b}"] = sentence_features(state, "fc", gathered_sentences(tokens, index))
        return outputs

    return forward


def masked_image(state: Read, inputs: Read) -> Tensors:
    """Five times convolution, normalisation, leaky ReLU and doubling; then one channel."""
    x = inputs["x"]
    tokens = x.flatten(2).transpose(1, 2)
    *blocks, last = sorted({int(name.split(".")[1]) for name in state if name.startswith("conv.")})
    for k in blocks:
        x = functional.conv3d(x, state[f"conv.{k}.weight"], state[f"conv.{k}.bias"], padding=1)
        x = functional.leaky_relu(standardised(x, (2, 3, 4)), 0.01)
        x = functional.interpolate(x, scale_factor=2, mode="trilinear")
    recon = functional.conv3d(x, state[f"conv.{last}.weight"], state[f"conv.{last}.bias"])
    return {"recon": recon, "rec_feats": sentence_features(state, "fc", tokens, (0, 2))}


def unit(x: Tensor) -> Tensor:
    """Rows of length one."""
    return torch.stack([row / row.norm() for row in x])


def embedded(state: Read, side: str, x: Tensor, prefix: str = "") -> Tensor:
    """LayerNorm, projection, unit length."""
    scale, shift = state[f"{prefix}{side}_ln.weight"], state[f"{prefix}{side}_ln.bias"]
    return unit(linear(state, f"{prefix}{side}_proj", functional.layer_norm(x, x.shape[-1:], scale, shift)))


def contrast_logits(temperature: float, prefix: str = ""):
    """Cosines over the temperature, pair by pair."""

    def forward(state: Read, inputs: Read) -> Tensors:
        image = embedded(state, "vision", inputs["image"], prefix)
        text = embedded(state, "language", inputs["text"], prefix)
        rows = [torch.stack([(i * t).sum() / temperature for t in text]) for i in image]
        return {"logits_per_image": torch.stack(rows), "logits_per_text": torch.stack(rows).t()}

    return forward


def matching(state: Read, inputs: Read) -> Tensors:
    """Match or no match."""
    return {"logits": linear(state, "fc", inputs["x"])}


def diagonal_loss(logits: Tensor) -> Tensor:
    """Cross entropy of every row with its own column as the right answer."""
    return torch.stack([row.logsumexp(0) - row[k] for k, row in enumerate(logits)]).mean()


def symmetric_loss(logits: Tensor) -> Tensor:
    """Mean over both directions."""
    return (diagonal_loss(logits) + diagonal_loss(logits.t())) / 2


def sentence_matching(visual: list[Tensor], text: list[Tensor], positive: float, negative: float) -> Tensor:
    """Similarity matching over the pairs of reports, sentence by sentence."""
    total, pairs = torch.zeros(()), 0
    for i in range(len(text)):
        for j in range(i + 1, len(text)):
            costs = []
            for s in range(text[i].shape[1]):
                for t in range(text[j].shape[1]):
                    g = functional.cosine_similarity(text[i][0, s], text[j][0, t], dim=0)
                    w = functional.cosine_similarity(visual[i][0, s], visual[j][0, t], dim=0)
                    costs.append((w - g).abs() if g >= positive else w.abs() if g <= negative else w * 0)
            total, pairs = total + torch.stack(costs).mean(), pairs + 1
    return total / (pairs + 1e-6)
