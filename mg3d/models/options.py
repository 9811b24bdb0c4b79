"""Everything that shapes the pre-training network, as one plain value without any link to the config file."""

from __future__ import annotations

from dataclasses import dataclass

PUBLISHED_OBJECTIVES = ("sen_mlm", "swin_unetr_mim", "local_itc")

_CHOICES: dict[str, tuple[str, ...]] = {
    "fusion_variant": ("mean", "unet", "ctrate"),
    "mim_fusion": ("mlm_cross", "mim_cross"),
    "image_feature_reuse": ("encoder", "projected_reference"),
    "contrastive_gather": ("global", "local", "published_reference"),
    "memory_queue": ("none", "moco", "xbm"),
    "same_report_pairs": ("keep", "mask"),
    "itc_text_source": ("report", "sentence"),
}


@dataclass(frozen=True)
class NetworkOptions:
    """Sizes and switches of the network and its objectives (spec sections 7, 8, 9 and 14).

    Attributes:
        volume_size: (D, H, W) of the input in voxels; multiples of the encoder stride.
        max_text_len: L, text tokens after padding.
        vocab_size: V, entries of the tokenizer.
        hidden_size: C, width of the shared space in which image and text are fused.
        num_top_layer: number of stacked cross-attention layers.
        fusion_variant: ``mean`` | ``unet`` | ``ctrate``, form of the two bidirectional cross attentions.
        image_only: train without any text; only masked-image modelling is possible then.
        objectives: names of the active objectives.
        sal_weight: weight of the sentence alignment term beside the word-masking term.
        sal_detach_target: stop the gradient into the alignment target.
        mim_window: edge of a masking cell in voxels.
        mim_fusion: cross attention used by masked-image modelling; ``mlm_cross`` is the published one.
        image_feature_reuse: image features of the local contrast; ``projected_reference`` projects twice as published.
        itc_detach_sentences: stop the gradient from the local contrast into the text projection (published).
        ssm_positive_threshold: text cosine from which two sentences count as the same finding.
        ssm_negative_threshold: text cosine up to which two sentences count as different findings.
        cl_temp: fixed temperature of every contrastive term.
        contrastive_gather: ``global`` | ``local`` | ``published_reference``, see :mod:`mg3d.models.distributed`.
        same_report_pairs: ``keep`` | ``mask``, whether studies with one report are negatives of each other (published)
            or left out of each other's negatives and counted.
        memory_queue: ``none`` | ``moco`` | ``xbm``, extra negatives from earlier batches.
        memory_queue_size: keys kept per queue.
        itc_embed_dim: width of the shared space of the dual-encoder objective.
        itc_text_source: ``report`` averages the report's contextual tokens over each sentence, ``sentence``
            encodes every sentence on its own, as a prompt is.
        mlp_ratio: width of the never-run layers' MLP over C; only with ``legacy_unused_modules``.
        legacy_unused_modules: also build the modules that published checkpoints hold but never run.
    """

    volume_size: tuple[int, int, int] = (128, 96, 128)
    max_text_len: int = 250
    vocab_size: int = 28996
    hidden_size: int = 768
    num_top_layer: int = 2
    fusion_variant: str = "mean"
    image_only: bool = False
    objectives: tuple[str, ...] = PUBLISHED_OBJECTIVES
    sal_weight: float = 0.1
    sal_detach_target: bool = False
    mim_window: int = 16
    mim_fusion: str = "mlm_cross"
    image_feature_reuse: str = "encoder"
    itc_detach_sentences: bool = True
    ssm_positive_threshold: float = 0.9
    ssm_negative_threshold: float = 0.6
    cl_temp: float = 0.1
    contrastive_gather: str = "global"
    same_report_pairs: str = "keep"
    memory_queue: str = "none"
    memory_queue_size: int = 32
    itc_embed_dim: int = 256
    itc_text_source: str = "report"
    mlp_ratio: int = 4
    legacy_unused_modules: bool = False

    def __post_init__(self) -> None:
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r}: choose one of {', '.join(allowed)}")
        if self.image_only and set(self.objectives) - {"swin_unetr_mim"}:
            raise ValueError(f"image_only leaves only swin_unetr_mim, but objectives are {', '.join(self.objectives)}")
