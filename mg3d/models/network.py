"""The MG-3D pre-training network: two encoders, projections into a shared space, fusion, poolers and heads.

All modules carry the names of the published checkpoints. Shape legend: B batch, D/H/W volume axes, N image tokens,
L text tokens, S sentences, C hidden, E encoder width. Numbers and flow: spec sections 7 and 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mg3d.models.encoded_batch import EncodedBatch
from mg3d.models.fusion import MIMCrossAttention, MLMCrossAttention
from mg3d.models.heads import ITCHead, ITMHead, MIMHead, SentenceMLMHead
from mg3d.models.language_encoders import BertTextEncoder
from mg3d.models.legacy_modules import unused_modules
from mg3d.models.objectives import create_objective, objective_components
from mg3d.models.objectives.image_text_contrast import (
    ImageTextContrast,
    SharedSpaceHead,
    lone_sentences,
    prompt_sentences,
)
from mg3d.models.options import PUBLISHED_OBJECTIVES, NetworkOptions
from mg3d.models.pooling import Pooler, SentenceAttentionPool, SentencePooler, SwinAttPooler, SwinPooler
from mg3d.models.vision_encoders import VisionEncoder

TEXT_TYPE, IMAGE_TYPE = 0, 1
DECODER_STRIDE = 32
# Published initialisation (spec 7.4): these modules and all heads are drawn from normal(0, 0.02), the attentions and
# small embedding stacks keep the library default.
_DEFAULT_INITIALISED = (
    "language_encoder",
    "vision_encoder",
    "local_",
    "agg_",
    "uni_global_text_attention",
    "multi_global_text_attention",
    "uni_emd_",
)


def published_init(module: nn.Module) -> None:
    """Initialise Linear and Embedding weights from normal(0, 0.02), biases 0, LayerNorm 1 and 0 (spec 7.4)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
    if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
        nn.init.zeros_(module.bias)


class MG3DNetwork(nn.Module):
    """Encoders, shared space, fusion and the heads of the active objectives.

    Args:
        vision_encoder: see :func:`mg3d.models.vision_encoders.create_vision_encoder`.
        language_encoder: see :func:`mg3d.models.language_encoders.create_text_encoder`.
        options: sizes and switches.

    Raises:
        ValueError: if the encoders' widths do not fit the options.
    """

    # Heads that the objectives contribute, see their ``components``.
    mlm_head: SentenceMLMHead
    uni_emd_sen: nn.Sequential
    mim_swin_unter_head: MIMHead
    agg_img_cross_attention: nn.ModuleList
    multi_modal_agg_vision_pooler: SwinAttPooler
    multi_modal_sen_vision_pooler: SentencePooler
    itc_cross_head: ITCHead
    itc_agg_head: ITCHead
    image_text_itc_head: SharedSpaceHead
    itm_head: ITMHead

    def __init__(
        self, vision_encoder: VisionEncoder, language_encoder: BertTextEncoder, options: NetworkOptions
    ) -> None:
        super().__init__()
        _check_fit(vision_encoder, language_encoder, options)
        self.options = options
        self.token_grid = vision_encoder.token_grid(options.volume_size)
        self.objectives = tuple(create_objective(name, options) for name in options.objectives)
        self.language_encoder = language_encoder
        self.vision_encoder = vision_encoder
        self._build_trunk()
        self._build_heads()
        for name, module in self.named_children():
            if not name.startswith(_DEFAULT_INITIALISED):
                module.apply(published_init)

    def _build_trunk(self) -> None:
        options, hidden = self.options, self.options.hidden_size
        image_tokens, layers = math.prod(self.token_grid), range(self.options.num_top_layer)
        self.multi_modal_language_proj = nn.Linear(self.language_encoder.embed_dim, hidden)
        self.multi_modal_vision_proj = nn.Linear(self.vision_encoder.out_channels, hidden)
        self.modality_type_embeddings = nn.Embedding(2, hidden)
        self.local_text_cross_multihead_attention = nn.ModuleList(
            MLMCrossAttention(hidden, options.max_text_len, image_tokens, options.fusion_variant) for _ in layers
        )
        self.local_img_cross_multihead_attention = nn.ModuleList(
            MIMCrossAttention(hidden, image_tokens, options.fusion_variant) for _ in layers
        )
        self.uni_modal_vision_pooler = SwinPooler(image_tokens, hidden)
        self.multi_modal_vision_pooler = SwinPooler(image_tokens, hidden)
        self.uni_global_text_attention = SentenceAttentionPool(32, hidden)
        self.multi_global_text_attention = SentenceAttentionPool(32, hidden)
        # Part of every published checkpoint, without gradient in pre-training.
        self.uni_modal_language_pooler = Pooler(hidden)
        self.multi_modal_language_pooler = Pooler(hidden)
        if options.legacy_unused_modules:
            for name, module in unused_modules(hidden, options.num_top_layer, options.mlp_ratio).items():
                self.add_module(name, module)

    def _build_heads(self) -> None:
        image_width, text_width = self.vision_encoder.out_channels, self.language_encoder.embed_dim
        # The published three are always present: a checkpoint then has one layout, whatever is being trained.
        for name in dict.fromkeys((*PUBLISHED_OBJECTIVES, *self.options.objectives)):
            for key, module in objective_components(name, self.options, image_width, text_width).items():
                self.add_module(key, module)

    # ---------------------------------------------------------------- features
    def encode(self, batch: Mapping[str, Any]) -> EncodedBatch:
        """Lazy features of a batch; nothing is computed before an objective asks for it."""
        return EncodedBatch(self, batch)

    def project_image(self, tokens_BNE: Tensor) -> Tensor:
        """Encoder tokens [B, N, E] -> shared space [B, N, C], with the image type embedding."""
        return self.multi_modal_vision_proj(tokens_BNE) + self.modality_type_embeddings.weight[IMAGE_TYPE]

    def project_text(self, tokens_BLE: Tensor) -> Tensor:
        """Contextual text tokens [B, L, E] -> shared space [B, L, C], with the text type embedding."""
        return self.multi_modal_language_proj(tokens_BLE) + self.modality_type_embeddings.weight[TEXT_TYPE]

    def embed_text(self, ids_BL: Tensor) -> Tensor:
        """Token ids [B, L] -> embedding-layer output [B, L, E]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_encoder_trains):
            return self.language_encoder.embed(ids_BL)

    def contextualize_text(self, embedded_BLE: Tensor, mask_BL: Tensor) -> Tensor:
        """Embedding-layer output [B, L, E] and token mask [B, L] -> contextual tokens [B, L, E]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_encoder_trains):
            return self.language_encoder.contextualize(embedded_BLE, mask_BL)

    @property
    def text_encoder_trains(self) -> bool:
        """Whether any parameter of the text encoder takes gradients."""
        return any(parameter.requires_grad for parameter in self.language_encoder.parameters())

    # ---------------------------------------------------------------- fusion
    def fuse_report(self, text_BLC: Tensor, image_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """Let report tokens and image tokens gate each other through the MLM cross attentions (spec 8.A).

        Padded positions take part in the gates, as published.

        Args:
            text_BLC: report tokens [B, L, C].
            image_BNC: image tokens [B, N, C].

        Returns:
            Fused text [B, L, C] and fused image [B, N, C].
        """
        for layer in self.local_text_cross_multihead_attention:
            text_BLC, _, image_BNC, _ = layer(text_BLC, image_BNC)
        return text_BLC, image_BNC

    def fuse_sentences(self, image_BNC: Tensor, sentences_BSC: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Let image tokens and sentences gate each other through the MIM cross attentions (spec 8.C.4).

        Args:
            image_BNC: image tokens [B, N, C].
            sentences_BSC: sentence features [B, S, C].
            mask_BS: which sentences exist [B, S].

        Returns:
            Fused image [B, N, C] and fused sentences [B, S, C].
        """
        for layer in self.local_img_cross_multihead_attention:
            image_BNC, _, sentences_BSC, _ = layer(image_BNC, sentences_BSC, mask_b_BT=mask_BS)
        return image_BNC, sentences_BSC

    def fused_cls(self, image_BNC: Tensor, sentences_BSC: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Global vectors after fusion: text [B, C] and image [B, C]; arguments as :meth:`fuse_sentences`."""
        image_BNC, sentences_BSC = self.fuse_sentences(image_BNC, sentences_BSC, mask_BS)
        return self.multi_global_text_attention(sentences_BSC, mask_BS), self.multi_modal_vision_pooler(image_BNC)

    # ---------------------------------------------------------------- shared space of the dual encoder
    def encode_image(self, image_BD1HW: Tensor) -> Tensor:
        """Volumes in batch layout [B, D, 1, H, W] -> unit vectors [B, P] of the shared space.

        Raises:
            ValueError: if the network was built without the objective ``itc``.
        """
        return self._shared_space().embed_image(self.vision_encoder.tokens(image_BD1HW.transpose(1, 2)))

    def encode_text(self, ids: Tensor, mask: Tensor, sentence_index: Tensor | None = None) -> Tensor:
        """Texts -> unit vectors [B, P] of the shared space.

        Args:
            ids: token ids with [CLS] and [SEP]: [B, L] whole texts (prompts, reports), or [B, S, n] sentences that are
                encoded one by one and averaged.
            mask: 1 on tokens, shape of ``ids``; a sentence without tokens is left out.
            sentence_index: for [B, L]: 1-based sentence of each token; None takes each text as one sentence.

        Returns:
            Unit vectors [B, P]; zeros for a text without words.

        Raises:
            ValueError: if the network was built without the objective ``itc``.
        """
        head = self._shared_space()
        if ids.dim() == 3:
            return head.embed_text(*lone_sentences(self, ids, mask))
        return head.embed_text(*prompt_sentences(self, ids, mask, sentence_index))

    def encode_report(self, batch: Mapping[str, Any]) -> Tensor:
        """Reports of a batch -> unit vectors [B, P], with the text source used in training; raises as encode_text."""
        objective = ImageTextContrast(self.options)
        return self._shared_space().embed_text(*objective.report_sentences(self, self.encode(batch), batch))

    def _shared_space(self) -> SharedSpaceHead:
        if "image_text_itc_head" not in self._modules:
            raise ValueError("this network has no shared image-text space: train it with loss_names.itc above 0")
        return self.image_text_itc_head

    def forward(self, batch: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Run every active objective on shared features.

        Args:
            batch: output of the collate function.

        Returns:
            Objective name -> its terms; each holds ``"<name>_loss"``.
        """
        encoded = self.encode(batch)
        return {objective.name: objective(self, encoded, batch) for objective in self.objectives}


def _check_fit(vision_encoder: VisionEncoder, language_encoder: BertTextEncoder, options: NetworkOptions) -> None:
    width, hidden = vision_encoder.out_channels, options.hidden_size
    if options.image_feature_reuse == "projected_reference" and width != hidden:
        raise ValueError(
            f"image_feature_reuse=projected_reference projects twice and needs image tokens of width {hidden}, "
            f"the encoder's have {width}: use image_feature_reuse=encoder"
        )
    if "swin_unetr_mim" in options.objectives and tuple(vision_encoder.stride) != (DECODER_STRIDE,) * 3:
        raise ValueError(
            f"the encoder's stride {tuple(vision_encoder.stride)} does not fit masked-image modelling, whose decoder "
            f"enlarges by {DECODER_STRIDE}: switch loss_names.swin_unetr_mim off or use a stride of {DECODER_STRIDE}"
        )
    if not options.image_only and options.max_text_len > language_encoder.max_length:
        raise ValueError(
            f"max_text_len={options.max_text_len} exceeds the text encoder's {language_encoder.max_length} positions"
        )
