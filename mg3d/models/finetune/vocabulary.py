"""Volumes and prompts in one space, by gated cross-attention over frozen encoders (spec downstream 7.4).

Axes: B volumes, I image tokens of width E, T texts of width F, C channels of the attention, P latent width. Modules
that pre-training has too carry its names, so that its checkpoints fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mg3d.models.finetune.image_tokens import EncoderTokens
from mg3d.models.finetune.report_features import LEAST_DEVIATION, PATCHES, MultiScaleFeatures
from mg3d.models.fusion import MIMCrossAttention
from mg3d.models.language_encoders import BertTextEncoder
from mg3d.models.vision_encoders.base import VisionEncoder

__all__ = ["PRETRAINED_PARTS", "TRAINABLE", "Standardised", "VocabularyNetwork", "VocabularyOptions", "pool_text"]

PRETRAINED_PARTS = (
    "language_encoder.",
    "local_img_cross_multihead_attention.",
    "multi_modal_vision_proj.",
    "multi_modal_language_proj.",
    "modality_type_embeddings.",
)
"""What a pre-training checkpoint gives besides the image encoder."""

SWIN_L = "visual.encoder.proj_head."
TRAINABLE = {
    "latents": ("to_text_latent.", "to_visual_latent."),
    "temperature": ("temperature",),
    "fusion": ("local_img_cross_multihead_attention.",),
    "projections": ("multi_modal_vision_proj.", "multi_modal_language_proj.", "modality_type_embeddings.", SWIN_L),
    "image_encoder": ("visual.",),
}
"""Names that ``trainable`` takes -> first parts of the parameters' names."""

TEXT_TYPE, IMAGE_TYPE = 0, 1
TYPE_STD = 0.02
VALUE_PATH = (".value1", ".value2", ".fc2.v_proj", ".fc2.c_proj")
IMAGE_FLOOR, TEXT_FLOOR = 0.1, 0.01
OWN_LINEARS = ("multi_modal_vision_proj", "multi_modal_language_proj", "local_img_cross_multihead_attention.")
FUSIONS = ("gated", "none")
IMAGE_TOKENS = ("x4", "two_sets", "multi_scale")
POOLINGS = ("cls", "mean")


@dataclass(frozen=True)
class VocabularyOptions:
    """Sizes and switches; see `mg3d.finetuning.benchmark.VocabularyTask`.

    Attributes:
        size_dhw: voxels of a volume, which fix the number of image tokens.
        width: C, channels of the cross-attention.
        latent: P.
        layers: cross-attention layers.
        heads: heads of their attention pool, a divisor of C.
        fusion: "gated" or "none".
        project: bring both sides to C by the pre-trained projections; else both must be C wide.
        image_tokens: "x4", "two_sets" (see `mg3d.models.finetune.image_tokens`) or "multi_scale".
        text_pooling: "cls" or "mean".
        standardise: both sides by the statistics that `VocabularyNetwork.fit` takes.
    """

    size_dhw: tuple[int, int, int]
    width: int = 768
    latent: int = 768
    layers: int = 2
    heads: int = 8
    fusion: str = "gated"
    project: bool = True
    image_tokens: str = "x4"
    text_pooling: str = "cls"
    standardise: bool = False

    def __post_init__(self) -> None:
        """Refuse unknown words.

        Raises:
            ValueError: naming the word and the choices.
        """
        for name, choices in (("fusion", FUSIONS), ("image_tokens", IMAGE_TOKENS), ("text_pooling", POOLINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")


class Standardised(nn.Module):
    """Subtract a mean, divide by a deviation and decorrelate the channels; nothing changes before it is fitted.

    Frozen features have few strong directions that all volumes share; without them findings are learned in fewer steps.

    Args:
        shape: shape of one item, channels last.
        floor: variance that is added in every direction before it is divided by.
    """

    mean: Tensor
    deviation: Tensor
    mix: Tensor

    def __init__(self, *shape: int, floor: float = IMAGE_FLOOR) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(shape))
        self.register_buffer("mix", torch.eye(shape[-1]))

    @torch.no_grad()
    def fit(self, items: Tensor) -> None:
        """Take the statistics of items ``[n, *shape]``; constant channels stay near 0."""
        deviation, mean = torch.std_mean(items.float(), dim=0, correction=0)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp(min=LEAST_DEVIATION))
        rows = ((items - self.mean) / self.deviation).flatten(0, -2)
        values, vectors = torch.linalg.eigh(rows.t() @ rows / len(rows))
        self.mix.copy_((vectors * (values.clamp(min=0.0) + self.floor).rsqrt()) @ vectors.t())

    def forward(self, items: Tensor) -> Tensor:
        """Standardise ``[..., *shape]``."""
        return (items - self.mean) / self.deviation @ self.mix


def pool_text(hidden_TLF: Tensor, mask_TL: Tensor, pooling: str) -> Tensor:
    """One vector a text ``[T, F]``: its first token, or the mean of those that are no padding.

    Args:
        hidden_TLF: contextual tokens.
        mask_TL: 1 on tokens.
        pooling: "cls" or "mean".
    """
    if pooling == "cls":
        return hidden_TLF[:, 0]
    weights = mask_TL.to(hidden_TLF.dtype).unsqueeze(-1)
    return (hidden_TLF * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


class VocabularyNetwork(nn.Module):
    """Encoders, projections, gated cross-attention and the two latent projections.

    Args:
        vision_encoder: the image encoder.
        language_encoder: the text encoder.
        options: sizes and switches.

    Raises:
        ValueError: without projections, encoders whose widths are not C.
    """

    def __init__(
        self, vision_encoder: VisionEncoder, language_encoder: BertTextEncoder, options: VocabularyOptions
    ) -> None:
        super().__init__()
        self.options = options
        self.language_encoder = language_encoder
        multi = options.image_tokens == "multi_scale"
        two_sets = options.image_tokens == "two_sets"
        self.visual: MultiScaleFeatures | EncoderTokens = (
            MultiScaleFeatures(vision_encoder) if multi else EncoderTokens(vision_encoder, two_sets=two_sets)
        )
        if isinstance(self.visual, MultiScaleFeatures):
            del self.visual.norm  # statistics are kept here
            self.tokens = PATCHES
        else:
            self.tokens = self.visual.count(options.size_dhw)
        given, text, width = self.visual.width, language_encoder.embed_dim, options.width
        if not options.project and {given, text} != {width}:
            raise ValueError(f"project=False: image tokens ({given}) and texts ({text}) must be {width} wide")
        self.image_scale, self.text_scale = Standardised(self.tokens, given), Standardised(text, floor=TEXT_FLOOR)
        self.multi_modal_vision_proj = nn.Linear(given, width)
        self.multi_modal_language_proj = nn.Linear(text, width)
        self.modality_type_embeddings = nn.Embedding(2, width)
        self.local_img_cross_multihead_attention = nn.ModuleList(
            MIMCrossAttention(width, self.tokens, "ctrate", options.heads) for _ in range(options.layers)
        )
        self.to_text_latent = nn.Linear(width, options.latent, bias=False)
        self.to_visual_latent = nn.Linear(self.tokens * width, options.latent, bias=False)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self._initialise()

    def _initialise(self) -> None:
        """Start as if there were no attention but its gates: random layers would hide what differs between volumes."""
        nn.init.normal_(self.modality_type_embeddings.weight, std=TYPE_STD)
        for name, part in self.named_modules():
            if isinstance(part, nn.Linear) and name.startswith(OWN_LINEARS) and part.bias is not None:
                nn.init.zeros_(part.bias)
                if name.endswith(VALUE_PATH):
                    nn.init.eye_(part.weight)

    # ---------------------------------------------------------------- what the frozen encoders give
    def image_features(self, vol_B1DHW: Tensor) -> Tensor:
        """Tokens ``[B, I, E]`` of volumes in [0, 1]: what is computed once where the encoder is frozen."""
        return self.visual.pooled(vol_B1DHW)

    def text_features(self, ids_TL: Tensor, mask_TL: Tensor) -> Tensor:
        """Vectors ``[T, F]`` of tokenised texts."""
        return pool_text(self.language_encoder(ids_TL, mask_TL), mask_TL, self.options.text_pooling)

    @torch.no_grad()
    def fit(self, image_BIE: Tensor, text_TF: Tensor) -> None:
        """Take the statistics of the training volumes and texts, where ``standardise`` asks for it."""
        if self.options.standardise:
            self.image_scale.fit(self._arranged(image_BIE))
            self.text_scale.fit(text_TF)

    # ---------------------------------------------------------------- what is learned
    def project_image(self, image_BIE: Tensor) -> Tensor:
        """Image features ``[B, I, E]`` -> ``[B, I, C]``."""
        image_BIE = self._arranged(image_BIE)
        scaled = self.image_scale(image_BIE) if self.options.standardise else image_BIE
        if not self.options.project:
            return scaled
        return self.multi_modal_vision_proj(scaled) + self.modality_type_embeddings.weight[IMAGE_TYPE]

    def _arranged(self, image_BIE: Tensor) -> Tensor:
        """Tokens of what `image_features` gives, through what of the encoder learns."""
        return self.visual.arrange(image_BIE) if isinstance(self.visual, EncoderTokens) else image_BIE

    def project_text(self, text_TF: Tensor) -> Tensor:
        """Text features ``[..., F]`` -> ``[..., C]``."""
        scaled = self.text_scale(text_TF) if self.options.standardise else text_TF
        if not self.options.project:
            return scaled
        return self.multi_modal_language_proj(scaled) + self.modality_type_embeddings.weight[TEXT_TYPE]

    def latents(self, image_BIC: Tensor, text_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Let texts and image gate each other, then project both.

        Args:
            image_BIC: projected image tokens. B may be several axes that broadcast with those of the texts, so that
                what a volume's pairs share is computed once.
            text_BTC: projected texts, T together with each image.

        Returns:
            Unit vectors: image ``[B, P]``, texts ``[B, T, P]``.
        """
        if self.options.fusion == "gated":
            for layer in self.local_img_cross_multihead_attention:
                image_BIC, _, text_BTC, _ = layer(image_BIC, text_BTC)
        image_BP = self.to_visual_latent(image_BIC.flatten(-2))
        return functional.normalize(image_BP, dim=-1), functional.normalize(self.to_text_latent(text_BTC), dim=-1)

    def logits(self, image_BIE: Tensor, text_GTF: Tensor) -> Tensor:
        """Similarity of every volume with G groups of T prompts that are read together.

        Args:
            image_BIE: image features.
            text_GTF: text features.

        Returns:
            ``[B, G, T]``: exp(temperature) times the cosine.
        """
        if self.options.fusion == "none":
            cosines = self.image_latents(image_BIE, text_GTF) @ self.text_latents(text_GTF.flatten(0, 1)).t()
            return self.temperature.exp() * cosines.view(len(image_BIE), *text_GTF.shape[:2])
        image_BGP, text_BGTP = self._together(image_BIE, text_GTF)
        return self.temperature.exp() * (text_BGTP @ image_BGP.unsqueeze(-1)).squeeze(-1)

    def probabilities(self, image_BIE: Tensor, pairs_G2F: Tensor) -> Tensor:
        """Probability ``[B, G]`` of the first prompt of each pair (softmax over the two)."""
        return self.logits(image_BIE, pairs_G2F).softmax(dim=-1)[..., 0]

    def image_latents(self, image_BIE: Tensor, pairs_G2F: Tensor) -> Tensor:
        """Unit vectors ``[B, P]`` of volumes that no report has a part in: fused with fixed prompts, then averaged."""
        if self.options.fusion == "none":
            return functional.normalize(self.to_visual_latent(self.project_image(image_BIE).flatten(1)), dim=-1)
        image_BGP, _ = self._together(image_BIE, pairs_G2F)
        return functional.normalize(image_BGP.mean(dim=1), dim=-1)

    def text_latents(self, text_TF: Tensor) -> Tensor:
        """Unit vectors ``[T, P]`` of texts that no volume has a part in."""
        return functional.normalize(self.to_text_latent(self.project_text(text_TF)), dim=-1)

    def _together(self, image_BIE: Tensor, text_GTF: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``[B, G, P]`` and ``[B, G, T, P]`` of every volume with every group."""
        return self.latents(self.project_image(image_BIE).unsqueeze(1), self.project_text(text_GTF).unsqueeze(0))

    # ---------------------------------------------------------------- what learns
    def set_trainable(self, parts: Sequence[str]) -> list[str]:
        """Let only the named parts learn; everything else is frozen and in evaluation mode.

        Args:
            parts: keys of `TRAINABLE`.

        Returns:
            Names of the parameters that learn.

        Raises:
            ValueError: an unknown part.
        """
        unknown = [part for part in parts if part not in TRAINABLE]
        if unknown:
            raise ValueError(f"trainable={unknown[0]!r}: choose from {', '.join(TRAINABLE)}")
        places = tuple(place for part in parts for place in TRAINABLE[part])
        unused = () if self.options.project else tuple(place for place in TRAINABLE["projections"] if place != SWIN_L)
        if isinstance(self.visual, MultiScaleFeatures):
            unused += (SWIN_L,)
        if self.options.fusion == "none":
            unused += TRAINABLE["fusion"]
        for name, parameter in self.named_parameters():
            # the learned sum over the tokens belongs to published files, this variant does not use it
            idle = ".fc1." in name or (unused and name.startswith(unused))
            parameter.requires_grad_(bool(places) and name.startswith(places) and not idle)
        for part in (self.language_encoder, self.visual):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def describe(self) -> dict[str, Any]:
        """Options in plain types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self.options).items()}
