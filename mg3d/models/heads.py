"""Prediction heads of the pre-training objectives (spec 7.4).

Axes: B batch, L text tokens, S sentences, C hidden, V vocabulary, D/H/W volume, d/h/w token grid, F features.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from mg3d.models.distributed import gather_features
from mg3d.models.pooling import FeatureNorm, sentence_gather

__all__ = [
    "FeatureNorm",
    "ITCHead",
    "ITCHeadSingle",
    "ITMHead",
    "MIMHead",
    "SentenceMLMHead",
    "TokenBatchNorm",
    "unit_rows",
]


class _Float32LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 whatever the dtype of input and parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over the last axis."""
        y = functional.layer_norm(
            input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return y.to(input.dtype)


class TokenBatchNorm(nn.Module):
    """Normalise each token position over batch and features (no affine, biased variance), in float32.

    This is what the published ``BatchNorm1d`` computes on ``[B, N, F]`` (spec 6.2, 7.4): the result of a sample
    depends on the rest of the batch, also in evaluation.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x_BNF: Tensor) -> Tensor:
        """Normalise ``[B, N, F]``."""
        x = x_BNF.float()
        variance, mean = torch.var_mean(x, dim=(0, 2), correction=0, keepdim=True)
        return ((x - mean) * torch.rsqrt(variance + self.eps)).to(x_BNF.dtype)


class _PredictionTransform(nn.Module):
    """BERT's prediction transform: Linear, exact GELU, LayerNorm (eps 1e-12)."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``[..., C]``."""
        return self.LayerNorm(functional.gelu(self.dense(x)))


class SentenceMLMHead(nn.Module):
    """Vocabulary logits of the tokens and a small feature of every sentence (spec 7.4, ``SEN_MLMHead``).

    The decoder is not tied to the embeddings. The sentence branch averages the transformed tokens of each sentence,
    then Linear, `FeatureNorm`, GELU, Linear.

    Args:
        hidden: channels C.
        vocab: vocabulary size V.
        middle: width of the sentence branch.
        out: width F of the sentence feature.
        layer_norm_eps: of the transform.
    """

    def __init__(self, hidden: int, vocab: int, middle: int = 128, out: int = 8, layer_norm_eps: float = 1e-12) -> None:
        super().__init__()
        self.transform = _PredictionTransform(hidden, layer_norm_eps)
        self.decoder = nn.Linear(hidden, vocab, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab))
        self.fc = nn.Sequential(nn.Linear(hidden, middle), FeatureNorm(middle), nn.GELU(), nn.Linear(middle, out))

    def forward(
        self, tok_BLC: Tensor, sentence_index_BL: Tensor, num_sentences: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict tokens and sentences.

        Args:
            tok_BLC: fused text tokens ``[B, L, C]``.
            sentence_index_BL: int64 ``[B, L]``, 1-based, below 1 = none.
            num_sentences: slots S, see `mg3d.models.pooling.sentence_gather`.

        Returns:
            logits ``[B, L, V]``, sentence features ``[B, S, F]`` (zeros on padding), bool mask ``[B, S]``.
        """
        transformed = self.transform(tok_BLC)
        features, mask = self.sentence_features(transformed, sentence_index_BL, num_sentences)
        return self.vocabulary_logits(transformed), features, mask

    def vocabulary_logits(self, transformed: Tensor) -> Tensor:
        """Logits ``[..., V]`` of transformed tokens ``[..., C]`` (any selection of them)."""
        return self.decoder(transformed) + self.bias

    def sentence_features(
        self, transformed_BLC: Tensor, sentence_index_BL: Tensor, num_sentences: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sentence features ``[B, S, F]`` and mask ``[B, S]`` of transformed tokens."""
        sen_BSC, mask_BS = sentence_gather(transformed_BLC, sentence_index_BL, num_sentences)
        return self.fc(sen_BSC).masked_fill(~mask_BS.unsqueeze(-1), 0.0), mask_BS


class MIMHead(nn.Module):
    """Decoder from the token grid to the volume, factor 32 per axis (spec 7.4, ``MIM_SWINUNETR_Head`` "vae").

    Five times Conv3d 3, InstanceNorm3d without affine, LeakyReLU 0.01, trilinear x2; widths C, C/2, C/4, C/8, C/16,
    C/16; then Conv3d 1 to one channel.

    Args:
        hidden: channels C, divisible by 16.
        middle: width of the token branch `token_features`.
        out: output width of that branch.
    """

    def __init__(self, hidden: int, middle: int = 128, out: int = 8) -> None:
        super().__init__()
        if hidden % 16:
            raise ValueError(f"hidden {hidden} is not divisible by 16: the decoder halves it four times")
        widths = [hidden, hidden // 2, hidden // 4, hidden // 8, hidden // 16, hidden // 16]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [
                nn.Conv3d(width_in, width_out, kernel_size=3, padding=1),
                nn.InstanceNorm3d(width_out),
                nn.LeakyReLU(0.01),
                nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
            ]
        self.conv = nn.Sequential(*layers, nn.Conv3d(widths[-1], 1, kernel_size=1))
        self.fc = nn.Sequential(nn.Linear(hidden, middle), TokenBatchNorm(), nn.GELU(), nn.Linear(middle, out))

    def forward(self, grid_BCdhw: Tensor) -> Tensor:
        """Reconstruct ``[B, C, d, h, w]`` to ``[B, 1, 32 d, 32 h, 32 w]``."""
        x = self.conv[:-2](grid_BCdhw)
        # Trilinear weights sum to one, so the 1x1x1 convolution commutes with the last upsampling: doing it first
        # spares a full-resolution map with C/16 channels.
        return self.conv[-2](self.conv[-1](x))

    def token_features(self, grid_BCdhw: Tensor) -> Tensor:
        """The published head's second output ``[B, N, F]``, which no loss uses (N in D-major order)."""
        return self.fc(grid_BCdhw.flatten(2).transpose(1, 2))


def unit_rows(x: Tensor) -> Tensor:
    """Divide the rows of ``[..., F]`` by their L2 norm, without epsilon; a zero row stays zero, its gradient finite."""
    square = (x * x).sum(dim=-1, keepdim=True)
    return x * torch.rsqrt(square.masked_fill(square == 0, 1.0))


class ITCHead(nn.Module):
    """Contrastive logits of two sets of vectors: LayerNorm, bias-free projection, cosine / temperature (spec 7.4).

    Args:
        in_dim: width of the inputs.
        proj_dim: width of the shared space.
        temperature: fixed divisor of the cosines, > 0.
    """

    def __init__(self, in_dim: int, proj_dim: int, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature
        self.vision_ln = _Float32LayerNorm(in_dim)
        self.language_ln = _Float32LayerNorm(in_dim)
        self.vision_proj = nn.Linear(in_dim, proj_dim, bias=False)
        self.language_proj = nn.Linear(in_dim, proj_dim, bias=False)

    def embed_image(self, image: Tensor) -> Tensor:
        """Unit vectors ``[B, proj_dim]`` in float32 of ``[B, in_dim]``."""
        return unit_rows(self.vision_proj(self.vision_ln(image)).float())

    def embed_text(self, text: Tensor) -> Tensor:
        """Unit vectors ``[B, proj_dim]`` in float32 of ``[B, in_dim]``."""
        return unit_rows(self.language_proj(self.language_ln(text)).float())

    def forward(self, image: Tensor, text: Tensor, gather: str = "local") -> tuple[Tensor, Tensor]:
        """Compute the logits of all pairs.

        Args:
            image: ``[B, in_dim]``.
            text: ``[B, in_dim]``.
            gather: one of `mg3d.models.distributed.GATHER_MODES`.

        Returns:
            logits per image ``[M, M]`` and its transpose, M = B times the number of gathered processes, float32.
        """
        image_MF = gather_features(self.embed_image(image), gather)
        text_MF = gather_features(self.embed_text(text), gather)
        return self.logits(image_MF, text_MF)

    def logits(self, image_MF: Tensor, text_KF: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[M, K]`` of unit vectors, and their transpose, in float32 also under autocast."""
        with torch.autocast(image_MF.device.type, enabled=False):
            logits = image_MF.float() @ text_KF.float().t() / self.temperature
        return logits, logits.t()


class ITCHeadSingle(ITCHead):
    """`ITCHead` on vectors of the hidden width, projected to the hidden width (``ITCHead_Single``)."""

    def __init__(self, hidden: int, temperature: float = 0.1) -> None:
        super().__init__(hidden, hidden, temperature)


class ITMHead(nn.Module):
    """Match or no match of an image-report pair: Linear(2 C, 2)."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 2]`` of ``[B, in_dim]``."""
        return self.fc(x)
