"""Modules that published checkpoints hold although no objective ever runs them (spec 7 and 13, item 47).

They are built only on request, so that such a checkpoint can be read and written back without losing a key.
"""

from __future__ import annotations

from torch import nn

from mg3d.models.heads import ITCHeadSingle


def _attention(width: int) -> nn.ModuleDict:
    projections = nn.ModuleDict({key: nn.Linear(width, width) for key in ("query", "key", "value")})
    return nn.ModuleDict({"self": projections, "output": _dense_norm(width, width)})


def _dense_norm(inputs: int, outputs: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inputs, outputs), "LayerNorm": nn.LayerNorm(outputs, eps=1e-12)})


def _bert_cross_layer(width: int, mlp_ratio: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "attention": _attention(width),
            "crossattention": _attention(width),
            "intermediate": nn.ModuleDict({"dense": nn.Linear(width, mlp_ratio * width)}),
            "output": _dense_norm(mlp_ratio * width, width),
        }
    )


def _local_cross_layer(width: int) -> nn.ModuleDict:
    names = ("query1", "key1", "value1", "query2", "key2", "value2")
    return nn.ModuleDict({name: nn.Linear(width, width) for name in names})


def unused_modules(hidden_size: int, num_layers: int, mlp_ratio: int = 4) -> dict[str, nn.Module]:
    """The never-run modules under their published top-level names.

    Args:
        hidden_size: C, width of every layer.
        num_layers: number of stacked layers of each kind.
        mlp_ratio: width of the MLP over C.

    Returns:
        Name -> module; the modules only carry parameters and have no forward pass.
    """
    width, count = hidden_size, range(num_layers)
    return {
        "multi_modal_vision_layers": nn.ModuleList(_bert_cross_layer(width, mlp_ratio) for _ in count),
        "multi_modal_language_layers": nn.ModuleList(_bert_cross_layer(width, mlp_ratio) for _ in count),
        "local_cross_attention": nn.ModuleList(_local_cross_layer(width) for _ in count),
        "itc_head": ITCHeadSingle(width),
        "uni_emd_img": nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 8)),
    }
