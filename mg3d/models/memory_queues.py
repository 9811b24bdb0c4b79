"""Memories of earlier features that enlarge the set of negatives (spec section 11).

All content lives in registered buffers, so it follows the module to its device and into checkpoints. Keys are
detached; with ``gather`` other than ``"local"`` the keys of all processes are stored, which keeps the memories of all
processes equal. Axes: K capacity, n new rows, B batch, S sentences.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mg3d.models.distributed import gather_features, gather_sentences


class _PairedQueue(nn.Module):
    """Two ring buffers of equal length with their pointers."""

    queue_1: Tensor
    queue_2: Tensor
    queue_1_ptr: Tensor
    queue_2_ptr: Tensor

    def __init__(self, size: int, dim_1: int, dim_2: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("queue_1", functional.normalize(torch.randn(size, dim_1), dim=0))
        self.register_buffer("queue_2", functional.normalize(torch.randn(size, dim_2), dim=0))
        self.register_buffer("queue_1_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("queue_2_ptr", torch.zeros(1, dtype=torch.long))

    def get(self) -> tuple[Tensor, Tensor]:
        """Copies of both banks, ``[K, dim_1]`` and ``[K, dim_2]``."""
        return self.queue_1.clone(), self.queue_2.clone()

    @torch.no_grad()
    def _write(self, keys_1: Tensor, keys_2: Tensor) -> None:
        for keys, queue, pointer in (
            (keys_1, self.queue_1, self.queue_1_ptr),
            (keys_2, self.queue_2, self.queue_2_ptr),
        ):
            rows = (pointer + torch.arange(keys.shape[0], device=queue.device)) % self.size
            queue[rows] = keys.to(queue.dtype)
            pointer.copy_((pointer + keys.shape[0]) % self.size)


class MoCoQueue(_PairedQueue):
    """Ring buffer of paired global features; the capacity is a multiple of the batch (spec section 11, ``MoCo``).

    Args:
        size: capacity K.
        dim: width of both kinds of keys.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__(size, dim, dim)

    @torch.no_grad()
    def enqueue(self, keys_1: Tensor, keys_2: Tensor, gather: str = "local") -> None:
        """Store ``[n, dim]`` pairs over the oldest ones.

        Raises:
            ValueError: K is not a multiple of the number of (gathered) rows.
        """
        keys_1, keys_2 = gather_features(keys_1.detach(), gather), gather_features(keys_2.detach(), gather)
        if self.size % keys_1.shape[0]:
            raise ValueError(f"queue size {self.size} is not a multiple of the batch of {keys_1.shape[0]} rows")
        self._write(keys_1, keys_2)


class MoCoSentenceQueue(_PairedQueue):
    """Ring buffer of paired sentence features of two widths, for any number of sentences (``MoCo_SSM``).

    Args:
        size: capacity K.
        dim_1: width of the visual sentence features.
        dim_2: width of the text sentence features.
    """

    @torch.no_grad()
    def enqueue(self, keys_1: Tensor, keys_2: Tensor) -> None:
        """Store ``[n, dim_1]`` and ``[n, dim_2]``, wrapping around at the end.

        Raises:
            ValueError: more rows than the capacity.
        """
        if keys_1.shape[0] > self.size:
            raise ValueError(f"{keys_1.shape[0]} sentences exceed the queue size {self.size}")
        self._write(keys_1.detach(), keys_2.detach())

    @torch.no_grad()
    def enqueue_sentences(self, sen_1_BSF: Tensor, sen_2_BSC: Tensor, mask_BS: Tensor, gather: str = "local") -> None:
        """Store the valid sentences of padded batches ``[B, S, dim]`` with bool mask ``[B, S]``."""
        keys_1, _ = gather_sentences(sen_1_BSF.detach(), mask_BS, gather)
        keys_2, mask = gather_sentences(sen_2_BSC.detach(), mask_BS, gather)
        self.enqueue(keys_1[mask], keys_2[mask])


class CrossBatchMemory(nn.Module):
    """Cross-batch memory: returns only what was stored (spec section 11, ``XBM`` and ``XBM_SSM``).

    A batch that does not fit behind the pointer overwrites the last rows and the pointer returns to 0, as published.

    Args:
        size: capacity K.
        dim_1: width of the first kind of keys.
        dim_2: width of the second kind; None = the same.
    """

    queue_1: Tensor
    queue_2: Tensor
    queue_ptr: Tensor
    queue_full: Tensor

    def __init__(self, size: int, dim_1: int, dim_2: int | None = None) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("queue_1", torch.zeros(size, dim_1))
        self.register_buffer("queue_2", torch.zeros(size, dim_1 if dim_2 is None else dim_2))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))
        self.register_buffer("queue_full", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def enqueue(self, keys_1: Tensor, keys_2: Tensor, gather: str = "local") -> None:
        """Store ``[n, dim_1]`` and ``[n, dim_2]``.

        Raises:
            ValueError: more rows than the capacity.
        """
        keys_1, keys_2 = gather_features(keys_1.detach(), gather), gather_features(keys_2.detach(), gather)
        count, start = keys_1.shape[0], int(self.queue_ptr)
        if count > self.size:
            raise ValueError(f"{count} rows exceed the memory size {self.size}")
        wraps = start + count > self.size
        start = self.size - count if wraps else start
        self.queue_1[start : start + count] = keys_1.to(self.queue_1.dtype)
        self.queue_2[start : start + count] = keys_2.to(self.queue_2.dtype)
        self.queue_full |= start + count == self.size
        self.queue_ptr.fill_(0 if wraps else start + count)

    def get(self) -> tuple[Tensor, Tensor]:
        """Copies of what is stored: all K rows once the memory was filled, else the rows before the pointer."""
        count = self.size if bool(self.queue_full) else int(self.queue_ptr)
        return self.queue_1[:count].clone(), self.queue_2[:count].clone()
