"""What the contrastive terms share: gathered pairs, left-out reports and remembered keys.

Shape legend: B batch, M gathered batch, K remembered keys, F features, P shared space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from mg3d.models.distributed import gather_features
from mg3d.models.losses import contrastive_loss
from mg3d.models.memory_queues import CrossBatchMemory, MoCoSentenceQueue
from mg3d.models.options import NetworkOptions

if TYPE_CHECKING:
    from mg3d.models.encoded_batch import EncodedBatch

Queue = CrossBatchMemory | MoCoSentenceQueue
Pair = tuple[Tensor, Tensor]


class LogitsHead(Protocol):
    """A head that compares unit vectors."""

    def logits(self, image_MF: Tensor, text_KF: Tensor) -> Pair:
        """Logits [M, K] and their transpose."""
        ...


def build_queue(name: str, kind: str, size: int, dim: int) -> dict[str, nn.Module]:
    """A memory of paired keys under its name on the network.

    The MoCo ring used here takes any number of rows, because reports without text are not remembered.

    Args:
        name: attribute name, part of the checkpoint.
        kind: ``none``, ``moco`` or ``xbm``.
        size: capacity K in pairs.
        dim: width of both keys.

    Returns:
        One entry, or none for ``kind="none"``.
    """
    if kind == "none":
        return {}
    return {name: CrossBatchMemory(size, dim) if kind == "xbm" else MoCoSentenceQueue(size, dim, dim)}


def contrast(
    head: LogitsHead,
    left_BP: Tensor,
    right_BP: Tensor,
    valid_B: Tensor,
    gather: str,
    keys: Pair,
    same_MM: Tensor | None = None,
) -> Tensor:
    """Symmetric contrastive loss of a batch of pairs.

    Args:
        head: turns unit vectors into logits.
        left_BP: unit vectors of one side [B, P].
        right_BP: unit vectors of the other side [B, P].
        valid_B: pairs that take part [B], bool.
        gather: one of `mg3d.models.distributed.GATHER_MODES`.
        keys: extra negatives for the left and for the right anchors, [K, P] each; K may be 0.
        same_MM: pairs of studies that are no negatives of each other, see :func:`same_report_pairs`.

    Returns:
        Scalar.
    """
    left_MP, right_MP = gather_features(left_BP, gather), gather_features(right_BP, gather)
    valid_M = gather_features(valid_B, gather)
    logits_left, _ = head.logits(left_MP, torch.cat([right_MP, keys[0]]))
    logits_right, _ = head.logits(right_MP, torch.cat([left_MP, keys[1]]))
    return contrastive_loss(logits_left, logits_right, valid_M, same_MM)


@torch.no_grad()
def same_report_pairs(encoded: EncodedBatch, options: NetworkOptions) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Which studies of the gathered batch share one report (other reconstructions of a scan, template texts).

    Remembered keys of earlier batches are not compared.

    Args:
        encoded: holds the reports' keys.
        options: uses ``same_report_pairs`` and ``contrastive_gather``.

    Returns:
        bool [M, M] and the term ``same_report_pairs``, the number of such pairs i < j with text; None and no term when
        the option is ``keep``.
    """
    if options.same_report_pairs == "keep":
        return None, {}
    key_M = gather_features(encoded.report_key, options.contrastive_gather)
    valid_M = gather_features(encoded.has_text, options.contrastive_gather)
    same_MM = (key_M[:, None] == key_M[None, :]) & valid_M[:, None] & valid_M[None, :]
    return same_MM, {"same_report_pairs": same_MM.triu(1).sum().float()}


@torch.no_grad()
def remembered_keys(
    queue: Queue | None, embed_left: Callable[[Tensor], Tensor], embed_right: Callable[[Tensor], Tensor], like: Tensor
) -> Pair:
    """Negatives for left and right anchors: the embedded right and left sides of earlier pairs, detached.

    Args:
        queue: the memory, or None.
        embed_left: maps stored left features to unit vectors.
        embed_right: maps stored right features to unit vectors.
        like: any tensor [..., P] that gives width and device when nothing is remembered.

    Returns:
        Two tensors [K, P]; K is 0 without a memory.
    """
    if queue is None:
        empty = like.new_zeros(0, like.shape[-1])
        return empty, empty
    left, right = queue.get()
    return embed_right(right), embed_left(left)


@torch.no_grad()
def remember(queue: Queue | None, left_BF: Tensor, right_BF: Tensor, valid_B: Tensor) -> None:
    """Store the valid pairs of all processes, so that the memories of all processes stay equal.

    Args:
        queue: the memory; None does nothing.
        left_BF: features of one side [B, F].
        right_BF: features of the other side [B, F].
        valid_B: pairs to keep [B], bool.
    """
    if queue is None:
        return
    valid_M = gather_features(valid_B)
    left, right = gather_features(left_BF.detach())[valid_M], gather_features(right_BF.detach())[valid_M]
    if left.shape[0]:
        queue.enqueue(left[-queue.size :], right[-queue.size :])
