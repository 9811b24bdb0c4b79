"""What the shapes of a state dict say about the network they belong to, for files that carry no description.

Names are this project's (see :mod:`mg3d.models.weight_maps`). What shapes cannot say: the patch-merging order, the
number of attention heads of the text encoder (64 channels each are assumed, as in BERT), how volumes were prepared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mg3d.errors import CheckpointError

ENCODER_PREFIX = "vision_encoder."
INPUT_SIZE_OF_TOKENS = {27: (96, 96, 96), 48: (128, 96, 128), 50: (64, 160, 160), 36: (32, 192, 192)}
"""Published input sizes (D, H, W) by their number of image tokens."""

_TOKEN_LAYERS = ("uni_modal_vision_pooler.fc.weight", "multi_modal_vision_pooler.fc.weight")
_CHANNELS_PER_HEAD = 64


def infer_encoder(
    tensors: Mapping[str, Tensor], patch_merging: str = "legacy", batch_statistics: bool = True
) -> dict[str, Any]:
    """Describe the image encoder of a state dict, as its ``metadata()`` would.

    Args:
        tensors: name -> tensor in this project's names; the encoder under ``vision_encoder.``.
        patch_merging: order of a Swin encoder, which leaves no trace in the shapes.
        batch_statistics: which of the two U-Nets of equal shapes it is: ``unet``, or ``unet_pcrlv2`` if False.

    Returns:
        Plain values; empty when no encoder is recognised.

    Raises:
        CheckpointError: a Swin encoder of more than one input channel or of windows that are no cubes.
    """
    own = {name[len(ENCODER_PREFIX) :]: value for name, value in tensors.items() if name.startswith(ENCODER_PREFIX)}
    if "patch_embed.proj.weight" in own and own["patch_embed.proj.weight"].dim() == 5:
        try:
            return _swin(own, patch_merging)
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"the Swin encoder of the file is incomplete or odd: {error}", "use the whole file"
            ) from error
    if "down_tr64.ops.0.conv1.weight" in own and own["down_tr64.ops.0.conv1.weight"].dim():
        width = int(own["down_tr64.ops.0.conv1.weight"].shape[0])
        name = "unet" if batch_statistics else "unet_pcrlv2"
        return {"name": name, "base_width": width, "out_channels": 16 * width, "stride": [32, 32, 32]}
    return {}


def _swin(own: Mapping[str, Tensor], patch_merging: str) -> dict[str, Any]:
    patch = own["patch_embed.proj.weight"]
    if patch.shape[1] != 1:
        raise CheckpointError(
            f"the Swin encoder of the file takes {patch.shape[1]} channels", "only one-channel (CT) encoders are used"
        )
    width, stages = int(patch.shape[0]), _count(own, r"layers(\d+)\.")
    tables = [own[f"layers{k + 1}.0.blocks.0.attn.relative_position_bias_table"] for k in range(stages)]
    projection = [own[f"proj_head.layer{k}.0.weight"] for k in (1, 3)] if "proj_head.layer1.0.weight" in own else []
    edges = [int(size) * 2**stages for size in patch.shape[2:]]
    return {
        "name": "swin_l" if projection else "swin_b",
        "patch_merging": patch_merging,
        "embed_dim": width,
        "depths": [_count(own, rf"layers{k + 1}\.0\.blocks\.(\d+)\.") for k in range(stages)],
        "num_heads": [int(table.shape[1]) for table in tables],
        "window_size": [_window(tables[0])] * 3,
        "patch_size": [int(size) for size in patch.shape[2:]],
        "mlp_ratio": own["layers1.0.blocks.0.mlp.linear1.weight"].shape[0] / width,
        "proj_dims": [int(weight.shape[0]) for weight in projection],
        "out_channels": int(projection[-1].shape[0]) if projection else width * 2**stages,
        "stride": edges,
        **({"residual_blocks": True} if any(re.match(r"layers\d+c\.", name) for name in own) else {}),
    }


def _count(names: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for match in (re.match(pattern, name) for name in names) if match})


def _window(table: Tensor) -> int:
    rows = int(table.shape[0])
    edge = round(rows ** (1 / 3))
    if edge**3 != rows:
        raise CheckpointError(f"a table of {rows} relative positions belongs to no cubic window", "give the metadata")
    return (edge + 1) // 2


def infer_network(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describe what surrounds the image encoder: sizes of the shared space, text encoder, input size.

    Args:
        tensors: name -> tensor in this project's names.

    Returns:
        Plain values of the keys that the checkpoint metadata uses; only what the shapes tell.
    """
    found: dict[str, Any] = {"has_shared_space": any(name.startswith("image_text_itc_head.") for name in tensors)}
    tokens = next((int(tensors[name].shape[1]) for name in _TOKEN_LAYERS if name in tensors), 0)
    if tokens in INPUT_SIZE_OF_TOKENS:
        found["input_size_dhw"] = list(INPUT_SIZE_OF_TOKENS[tokens])
    options: dict[str, Any] = {}
    if "multi_modal_vision_proj.weight" in tensors:
        options["hidden_size"] = int(tensors["multi_modal_vision_proj.weight"].shape[0])
        options["num_top_layer"] = _count(tensors, r"local_img_cross_multihead_attention\.(\d+)\.")
    if "local_text_cross_multihead_attention.0.fc1.weight" in tensors:
        options["max_text_len"] = int(tensors["local_text_cross_multihead_attention.0.fc1.weight"].shape[1])
    text = _text_encoder(tensors)
    if text:
        options["vocab_size"], found["text_encoder_config"] = text["vocab_size"], text
    return {**found, "options": options} if options else found


def _text_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    words = tensors.get("language_encoder.embeddings.word_embeddings.weight")
    positions = tensors.get("language_encoder.embeddings.position_embeddings.weight")
    inner = tensors.get("language_encoder.encoder.layer.0.intermediate.dense.weight")
    if words is None or positions is None or inner is None:
        return {}
    types = tensors.get("language_encoder.embeddings.token_type_embeddings.weight")
    return {
        "model_type": "bert",
        "vocab_size": int(words.shape[0]),
        "hidden_size": int(words.shape[1]),
        "num_hidden_layers": _count(tensors, r"language_encoder\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": max(1, int(words.shape[1]) // _CHANNELS_PER_HEAD),
        "intermediate_size": int(inner.shape[0]),
        "max_position_embeddings": int(positions.shape[0]),
        "type_vocab_size": 2 if types is None else int(types.shape[0]),
    }
