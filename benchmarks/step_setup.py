"""The training step that the benchmark measures: sizes, network, a random batch, and the step itself.

Shape legend: B batch, D/H/W volume axes, L text tokens, S sentences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from mg3d.mim_cells import cell_grid, random_cells
from mg3d.models.language_encoders import BertTextEncoder
from mg3d.models.network import MG3DNetwork, NetworkOptions
from mg3d.models.objectives import weighted_total
from mg3d.models.optimization import build_optimizer_and_scheduler
from mg3d.models.vision_encoders import create_vision_encoder

LOSS_WEIGHTS = {"sen_mlm": 1.0, "swin_unetr_mim": 1.0, "local_itc": 0.1}
MASKED_WORDS = 0.15
CLS, SEP, MASK, FIRST_WORD = 1, 2, 3, 5


@dataclass(frozen=True)
class Sizes:
    """Sizes of network and batch; the defaults are the published ones."""

    volume: tuple[int, int, int] = (128, 96, 128)
    embed_dim: int = 48
    window: int = 7
    hidden: int = 768
    text_layers: int = 12
    text_heads: int = 12
    vocab: int = 28996
    text_len: int = 250
    sentences: int = 20


SIZES = {
    "published": Sizes(),
    "tiny": Sizes((64, 32, 32), 3, 2, 48, text_layers=2, text_heads=4, vocab=60, text_len=24, sentences=4),
}


def build_text_encoder(sizes: Sizes) -> BertTextEncoder:
    """Frozen BERT with random weights."""
    config = BertConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        intermediate_size=4 * sizes.hidden,
    )
    return BertTextEncoder(BertModel(config))


def build_network(sizes: Sizes, checkpointed: bool) -> MG3DNetwork:
    """The pre-training network with the three published objectives, in training mode."""
    vision = create_vision_encoder(
        "swin_b", gradient_checkpointing=checkpointed, embed_dim=sizes.embed_dim, window_size=sizes.window
    )
    options = NetworkOptions(
        volume_size=sizes.volume, max_text_len=sizes.text_len, vocab_size=sizes.vocab, hidden_size=sizes.hidden
    )
    return MG3DNetwork(vision, build_text_encoder(sizes), options).train()


def make_batch(sizes: Sizes, studies: int) -> dict[str, Tensor]:
    """Random batch in the layout of the collate function; reports fill all L tokens."""
    words = sizes.text_len - 2
    ids = torch.randint(FIRST_WORD, sizes.vocab, (studies, sizes.text_len))
    ids[:, 0], ids[:, -1] = CLS, SEP
    sentence = 1 + torch.arange(words) * sizes.sentences // words
    index = torch.nn.functional.pad(sentence, (1, 1), value=-1).expand(studies, -1)
    chosen = (index > 0) & (torch.rand(ids.shape) < MASKED_WORDS)
    lone = torch.randint(FIRST_WORD, sizes.vocab, (studies, sizes.sentences, words // sizes.sentences + 2))
    lone[..., 0], lone[..., -1] = CLS, SEP
    d, h, w = sizes.volume
    hidden = [torch.from_numpy(random_cells(study, cell_grid(sizes.volume, 16), 0.5)) for study in range(studies)]
    return {
        "image": torch.rand(studies, d, 1, h, w),
        "text_ids": ids,
        "text_masks": torch.ones_like(ids),
        "text_ids_mlm": ids.masked_fill(chosen, MASK),
        "text_labels_mlm": ids.masked_fill(~chosen, -100),
        "sentence_index": index,
        "sen_txt_ids": lone,
        "sen_txt_masks": torch.ones_like(lone),
        "sentence_mask": torch.ones(studies, sizes.sentences, dtype=torch.bool),
        "has_text": torch.ones(studies, dtype=torch.bool),
        "mim_mask": torch.stack(hidden),
        "index": torch.arange(studies),
    }


class TrainingStep:
    """Network, batch, optimizer and schedule of a run, stepped by calling it.

    Args:
        sizes: of network and batch.
        studies: batch size B.
        checkpointed: recompute activations in the backward pass.
    """

    def __init__(self, sizes: Sizes, studies: int, checkpointed: bool) -> None:
        torch.manual_seed(0)
        self.net = build_network(sizes, checkpointed)
        self.batch: dict[str, Any] = dict(make_batch(sizes, studies))
        self.optimizer, self.scheduler = build_optimizer_and_scheduler(self.net, total_steps=1000, learning_rate=1e-5)

    def losses(self) -> float:
        """Forward and backward pass; returns the total loss."""
        total = weighted_total(self.net(self.batch), LOSS_WEIGHTS)
        total.backward()
        return float(total.detach())

    def update(self) -> None:
        """Optimizer and schedule, then forget the gradients."""
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> float:
        """One whole step; returns its loss."""
        loss = self.losses()
        self.update()
        return loss
