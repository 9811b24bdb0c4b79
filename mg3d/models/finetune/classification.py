"""The Lightning module that fine-tunes an image encoder as a classifier.

Batches come from `mg3d.datamodules.classification`. Logged: ``train/loss``, ``train/loss_epoch``, ``{val,test}/loss``,
``{val,test}/<figure>`` and the monitored ``{val,test}/the_metric`` (higher is better).
Axes: B batch, K outputs, F pooled features, D/H/W volume axes in the order the network sees.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mg3d import __version__
from mg3d.errors import ConfigError
from mg3d.models.checkpoint import describe_weights
from mg3d.models.distributed import global_mean
from mg3d.models.epoch_means import EpochMeans
from mg3d.models.finetune.case_module import CaseModule
from mg3d.models.finetune.case_rows import gather_rows, rows_of_batch, rows_to_arrays
from mg3d.models.finetune.decoders import build_segmenter, check_window
from mg3d.models.finetune.figures import figures, monitored
from mg3d.models.finetune.heads import build_head, encoder_features, fit_encoder, pooled_features
from mg3d.models.finetune.layer_decay import freeze_encoder
from mg3d.models.finetune.schedule import build_optimization
from mg3d.models.finetune.weights import build_encoder
from mg3d.models.vision_encoders.base import VisionEncoder

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import ClassificationTask
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["ClassificationModule", "build_classification_module", "classification_loss"]

log = logging.getLogger(__name__)


def classification_loss(logits_BK: Tensor, target: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of classes, or binary cross-entropy of independent outputs, as a mean over all processes.

    Args:
        logits_BK: one value an output.
        target: class index ``[B]``; or ``[B, K]`` of 0 and 1, other values are unknown and do not count.
        class_weights: ``[K]`` weight of a class, or of the positive cases of a binary output.

    Returns:
        Scalar; 0 when nothing is known. A weighted cross-entropy is divided by the weights, as torch does.
    """
    logits = logits_BK.float()
    if not target.is_floating_point():
        total = functional.cross_entropy(logits, target, weight=class_weights, reduction="sum")
        share = class_weights[target].sum() if class_weights is not None else logits.new_tensor(float(len(target)))
        return global_mean(total, share)
    known = ((target == 0) | (target == 1)).float()
    terms = functional.binary_cross_entropy_with_logits(
        logits, target * known, pos_weight=class_weights, reduction="none"
    )
    return global_mean((terms * known).sum(), known.sum())


class ClassificationModule(CaseModule):
    """Encoder, head, loss, optimizer and case rows of a classification benchmark.

    Args:
        cfg: the run's config.
        task: what is predicted.
        encoder: the image encoder, fitted to the head (`mg3d.models.finetune.heads.fit_encoder`).
        total_steps: optimizer steps of the run, for the schedule.

    Attributes:
        case_rows: after a validation or test epoch one row a case, see `mg3d.models.finetune.case_rows`.
        prediction_dir: unused; the probabilities are in the case rows.
        ensemble: modules whose probabilities are averaged with this one's in testing.
    """

    def __init__(self, cfg: FinetuneConfig, task: ClassificationTask, encoder: VisionEncoder, total_steps: int) -> None:
        super().__init__()
        self.cfg, self.task, self.total_steps = cfg, task, total_steps
        self.segmenter: nn.Module | None = None
        self.head: nn.Module | None = None
        if task.head == "decoder_gap":
            self.segmenter = build_segmenter(encoder, len(task.outputs))
        else:
            self.vision_encoder = encoder
            unet = encoder.name.startswith("unet")
            self.head = build_head(task.head, encoder.out_channels, len(task.outputs), unet=unet)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", _class_weights(task), persistent=False)
        self._losses = EpochMeans()

    @property
    def encoder(self) -> VisionEncoder:
        """The image encoder, which receives pre-trained weights."""
        return self.vision_encoder if self.segmenter is None else self.segmenter.vision_encoder  # type: ignore[return-value]

    def forward(self, image_B1DHW: Tensor) -> Tensor:
        """Logits ``[B, K]`` of volumes in [0, 1]."""
        if self.head is not None:
            return self.head(pooled_features(self.encoder, image_B1DHW))
        if self.cfg.protocol == "reference":  # published: the volume twice, one after the other
            image_B1DHW = torch.cat((image_B1DHW, image_B1DHW), dim=2)
        return self.segmenter(image_B1DHW).mean(dim=(2, 3, 4))  # type: ignore[misc]  # one of the two is there

    def features(self, image_B1DHW: Tensor) -> Tensor:
        """Frozen encoder features ``[B, F]`` for the probes."""
        return encoder_features(self.encoder, image_B1DHW)

    def probabilities(self, image_B1DHW: Tensor) -> Tensor:
        """Probabilities ``[B, K]``: softmax over classes, or a sigmoid for every binary output."""
        logits = self(image_B1DHW).double()
        return logits.softmax(dim=1) if self.task.kind == "multiclass" else logits.sigmoid()

    # ---------------------------------------------------------------- steps
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One training batch."""
        loss = classification_loss(self(batch["image"]), batch["target"], self.class_weights)
        self._train_means.add("loss", loss, len(batch["image"]))
        self.log("train/loss", loss.detach(), batch_size=len(batch["image"]))
        return {"loss": loss}

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Note the probabilities of a validation batch."""
        self._note("val", batch, self.probabilities)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Note the probabilities of a test batch, averaged over flips (``tta``) and the ensemble."""
        self._note("test", batch, self._averaged)

    def _note(self, phase: str, batch: Mapping[str, Any], predict: Any) -> None:
        count = len(batch["image"])
        probs_BK = predict(batch["image"]) if count else torch.zeros(0, len(self.task.outputs), device=self.device)
        log_loss = _log_loss(probs_BK, batch["target"])
        self._losses.add("loss", log_loss, count)
        self._rows += rows_of_batch(self.task, batch, probs_BK)

    def _averaged(self, image_B1DHW: Tensor) -> Tensor:
        views = [image_B1DHW]
        if self.cfg.tta:
            views.append(image_B1DHW.flip(self.cfg.axis_order.index("x") + 2))
        members = [self, *(member.to(self.device).eval() for member in self.ensemble)]
        found = [member.probabilities(view) for member in members for view in views]
        return torch.stack(found).mean(dim=0)

    # ---------------------------------------------------------------- epochs

    def _begin(self, phase: str) -> None:
        super()._begin(phase)
        self._losses.reset()

    def _finish(self, phase: str) -> None:
        self.case_rows, self._rows = gather_rows(self._rows), []
        found = self._losses.means()
        if self.case_rows:
            ids, _, probabilities, targets = rows_to_arrays(self.case_rows, self.task)
            found |= figures(self.task, ids, probabilities, targets)
        chosen = monitored(self.task, found)
        if not math.isfinite(chosen):
            log.warning("%s: %s is undefined on these cases; minus the loss stands in", phase, self.task.monitor)
            chosen = -found["loss"]
        logged = {f"{phase}/{name}": value for name, value in found.items() if math.isfinite(value)}
        self.log_dict({**logged, f"{phase}/the_metric": chosen}, sync_dist=True)  # equal on all ranks already

    # ---------------------------------------------------------------- optimisation and checkpoints
    def configure_optimizers(self) -> Any:
        """Optimizer and schedule of the config, with layer-wise rates."""
        return build_optimization(self, self.encoder, self.cfg, self.total_steps)

    def metadata(self) -> dict[str, Any]:
        """What is needed to use the weights, in plain JSON types."""
        return describe_weights(
            self,
            architecture="ClassificationModule",
            mg3d_version=__version__,
            benchmark=self.cfg.benchmark,
            protocol=self.cfg.protocol,
            outputs=list(self.task.outputs),
            kind=self.task.kind,
            head=self.task.head,
            input_size_dhw=list(self.task.size_dhw),
            axis_order=self.cfg.axis_order,
        )


def build_classification_module(
    cfg: FinetuneConfig, task: ClassificationTask, total_steps: int
) -> ClassificationModule:
    """Build the module of a run; pre-trained weights are loaded into its ``encoder`` afterwards.

    Args:
        cfg: the run's config.
        task: what is predicted.
        total_steps: optimizer steps of the run.

    Raises:
        ConfigError: keys that do not fit each other.
    """
    _check_task(task)
    encoder = build_encoder(cfg)
    size = tuple(task.size_dhw["zyx".index(axis)] for axis in cfg.axis_order)
    fit_encoder(encoder, task.head, size, reference=cfg.protocol == "reference")
    if task.head == "decoder_gap":
        check_window(encoder, size)
    module = ClassificationModule(cfg, task, encoder, total_steps)
    freeze_encoder(module.encoder, cfg)
    return module


def _check_task(task: ClassificationTask) -> None:
    if task.kind not in ("multiclass", "binary"):
        raise ConfigError(f"kind={task.kind!r} is unknown", "choose multiclass or binary")
    if task.kind == "multiclass" and len(task.outputs) < 2:
        raise ConfigError(
            f"kind=multiclass with {len(task.outputs)} output", "name two classes or more, or kind=binary"
        )
    if task.class_weights and len(task.class_weights) != len(task.outputs):
        raise ConfigError(
            f"{len(task.class_weights)} class_weights for {len(task.outputs)} outputs", "give one for each output"
        )


def _class_weights(task: ClassificationTask) -> Tensor | None:
    return torch.tensor(task.class_weights, dtype=torch.float32) if task.class_weights else None


def _log_loss(probs_BK: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood of known targets, unweighted, on this process."""
    if not len(target):
        return probs_BK.new_zeros(())
    safe = probs_BK.clamp(1e-12, 1 - 1e-12)
    if not target.is_floating_point():
        return functional.nll_loss(safe.log(), target)
    known = (target == 0) | (target == 1)
    terms = -torch.where(target == 1, safe, 1 - safe).log()
    return (terms * known).sum() / known.sum().clamp(min=1)
