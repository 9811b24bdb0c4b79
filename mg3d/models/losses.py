"""Loss terms as pure functions: tensors in, scalar out (spec section 9).

Distributed training: sums are divided by counts of all processes (`mg3d.models.distributed.global_mean`), so N
processes with batch b, averaged by DistributedDataParallel, give the loss and gradient of one process with batch N b.
``gather`` names one of `mg3d.models.distributed.GATHER_MODES`; the two modes other than ``"global"`` take local
means. Every term is zero, with a zero gradient, when nothing in the batch takes part. All arithmetic is float32.

Axes: B batch, M gathered batch, L text tokens, V vocabulary, S sentences, C and F features, D/H/W volume.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mg3d.models.distributed import gather_sentences, global_mean

IGNORE_LABEL = -100


def mlm_loss(logits: Tensor, labels: Tensor, gather: str = "global") -> Tensor:
    """Masked language modelling: mean cross entropy over the labelled positions of the batch.

    Args:
        logits: ``[..., V]``, for example ``[B, L, V]``.
        labels: int64 ``[...]``, -100 = not labelled.
        gather: how counts are shared between processes.

    Returns:
        Scalar; zero when no position is labelled.
    """
    chosen = labels != IGNORE_LABEL
    # Only the labelled rows (about 15 %) are turned into float32 probabilities.
    total = functional.cross_entropy(logits[chosen].float(), labels[chosen], reduction="sum")
    return global_mean(total, chosen.sum(), gather)


def sentence_alignment_loss(
    recon_BSF: Tensor,
    target_BSF: Tensor,
    mask_BS: Tensor,
    has_text_B: Tensor | None = None,
    weight: float = 0.1,
    detach_target: bool = False,
    gather: str = "global",
) -> Tensor:
    """Sentence alignment (SAL): weight * sum over sentences of (1 - cosine) / number of reports.

    Args:
        recon_BSF: sentence features predicted from the fused text ``[B, S, F]``.
        target_BSF: sentence features of the unmasked text ``[B, S, F]``.
        mask_BS: bool ``[B, S]``, True on real sentences.
        has_text_B: bool ``[B]``; reports that are False leave the sum and the count. None = all have text.
        weight: 0.1 as published.
        detach_target: stop the gradient at the target (off as published, where both sides may collapse).
        gather: how counts are shared between processes.

    Returns:
        Scalar. It sums (does not average) over the sentences of a report, as published; the cosine uses eps 1e-6.
    """
    target = target_BSF.detach() if detach_target else target_BSF
    present = mask_BS.any(dim=1).new_ones(mask_BS.shape[0]) if has_text_B is None else has_text_B
    valid = mask_BS & present.unsqueeze(1)
    distance = 1.0 - functional.cosine_similarity(recon_BSF.float(), target.float(), dim=-1, eps=1e-6)
    total = distance.masked_fill(~valid, 0.0).sum()
    return weight * global_mean(total, present.sum(), gather)


def mim_loss(recon: Tensor, target: Tensor, mask: Tensor, ratio: float | None = None, gather: str = "global") -> Tensor:
    """Masked image modelling: squared error on the zeroed voxels.

    Args:
        recon: ``[B, 1, D, H, W]``.
        target: image in [0, 1], same shape.
        mask: 1 (or True) on zeroed voxels, broadcastable to ``recon``.
        ratio: the configured mask ratio: the published mean over *all* voxels divided by it. None divides by the
            number of zeroed voxels instead; both agree when exactly that share of the voxels is zeroed (as at 0.5).
        gather: how counts are shared between processes.

    Returns:
        Scalar.

    Raises:
        ValueError: ``recon`` and ``target`` differ in shape.
    """
    if recon.shape != target.shape:
        raise ValueError(f"reconstruction {tuple(recon.shape)} and target {tuple(target.shape)} differ in shape")
    weight = mask.to(torch.float32)
    total = ((recon.float() - target.float()).square() * weight).sum()
    count = weight.sum() * (recon.numel() // mask.numel()) if ratio is None else recon.numel() * ratio
    return global_mean(total, count, gather)


def contrastive_loss(
    logits_ab: Tensor, logits_ba: Tensor, valid_M: Tensor | None = None, same_MM: Tensor | None = None
) -> Tensor:
    """Symmetric contrastive cross entropy with the diagonal as positives (CML, DCL and ITC).

    Every process computes it on the gathered logits, see `mg3d.models.heads.ITCHead`; no further reduction is needed.

    Args:
        logits_ab: ``[M, K]``, K >= M; columns beyond M are extra negatives (a memory queue).
        logits_ba: ``[M, K']`` the other way round.
        valid_M: bool ``[M]``, gathered like the logits. A False sample (an empty report) is neither anchor nor
            negative.
        same_MM: bool ``[M, M]``, symmetric; pairs that are True off the diagonal are no negatives of each other. None
            leaves none out.

    Returns:
        Mean of the two cross entropies over the valid samples; zero without any.
    """
    one_way, other_way = (_diagonal_cross_entropy(logits, valid_M, same_MM) for logits in (logits_ab, logits_ba))
    return 0.5 * (one_way + other_way)


def _diagonal_cross_entropy(logits_MK: Tensor, valid_M: Tensor | None, same_MM: Tensor | None) -> Tensor:
    logits = logits_MK.float()
    labels = torch.arange(logits.shape[0], device=logits.device)
    extra = logits.shape[1] - logits.shape[0]
    if same_MM is not None:
        others_MM = same_MM & (labels[:, None] != labels)
        logits = logits.masked_fill(functional.pad(others_MM, (0, extra)), torch.finfo(logits.dtype).min)
    if valid_M is None:
        return functional.cross_entropy(logits, labels)
    column_K = functional.pad(valid_M, (0, extra), value=True)
    # A finite floor instead of -inf: rows of invalid samples are computed and then dropped, and must not turn into NaN.
    logits = logits.masked_fill(~column_K, torch.finfo(logits.dtype).min)
    logits = logits.masked_fill(~valid_M.unsqueeze(1), 0.0)
    each = functional.cross_entropy(logits, labels, reduction="none")
    return each.masked_fill(~valid_M, 0.0).sum() / valid_M.sum().clamp(min=1)


def cosine_matrix(x_SF: Tensor, y_TF: Tensor) -> Tensor:
    """Cosines ``[S, T]`` of the rows of two matrices in float32, also under autocast; a zero row has cosine 0."""
    with torch.autocast(x_SF.device.type, enabled=False):
        x_unit, y_unit = (functional.normalize(z.float(), dim=-1, eps=1e-8) for z in (x_SF, y_TF))
        return x_unit @ y_unit.t()


def sentence_similarity_loss(
    visual_BSF: Tensor,
    text_BSC: Tensor,
    mask_BS: Tensor,
    positive_threshold: float = 0.9,
    negative_threshold: float = 0.6,
    gather: str = "global",
) -> Tensor:
    """Sentence similarity matching (SSM) over all pairs of reports i < j at once.

    With g and w the cosine matrices of text targets and visual features of two reports, pos = g >= positive_threshold
    and neg = g <= negative_threshold, a pair costs the mean over all S_i S_j entries of abs(w (pos + neg) - g pos);
    the loss is the sum over the pairs / (number of pairs + 1e-6). Text targets receive no gradient.

    Args:
        visual_BSF: sentence-wise visual features ``[B, S, F]``.
        text_BSC: stand-alone text features of the same sentences ``[B, S, C]``.
        mask_BS: bool ``[B, S]``; a report without a sentence forms no pair.
        positive_threshold: cosine from which two sentences count as the same.
        negative_threshold: cosine up to which they count as different.
        gather: ``"global"`` forms the pairs of all processes, the other modes those of this process (as published).

    Returns:
        Scalar; zero when fewer than two reports have sentences.
    """
    visual, _ = gather_sentences(visual_BSF, mask_BS, gather)
    text, mask = gather_sentences(text_BSC.detach(), mask_BS, gather)
    g = cosine_matrix(text.flatten(0, 1), text.flatten(0, 1))
    w = cosine_matrix(visual.flatten(0, 1), visual.flatten(0, 1))
    positive = g >= positive_threshold
    used = positive | (g <= negative_threshold)
    entry = (w * used - g * positive).abs()
    weight_RR, pairs = _pair_weights(mask)
    return (entry * weight_RR).sum() / (pairs + 1e-6)


def _pair_weights(mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[B S, B S]``, 1 / (S_i S_j) on valid sentences of reports i < j, and the number of such pairs."""
    count_B1 = mask_BS.sum(dim=1, keepdim=True)
    share_R = (mask_BS.float() / count_B1.clamp(min=1)).flatten()
    report_R = torch.arange(mask_BS.shape[0], device=mask_BS.device).repeat_interleave(mask_BS.shape[1])
    upper_RR = report_R.unsqueeze(1) < report_R.unsqueeze(0)
    reports = (count_B1 > 0).sum()
    return share_R.unsqueeze(1) * share_R.unsqueeze(0) * upper_RR, reports * (reports - 1) / 2
