"""The Lightning module that fine-tunes an image encoder for segmentation.

Batches come from `mg3d.datamodules.segmentation`. Logged: ``train/loss``, ``train/loss_epoch``, ``{val,test}/dice`` and
``{val,test}/dice_<class>``, and the monitored ``{val,test}/the_metric``, the mean Dice over the classes.
Axes: B crops, K classes with background, X/Y/Z axes of the working grid.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mg3d import __version__
from mg3d.errors import ConfigError
from mg3d.models.checkpoint import describe_weights
from mg3d.models.finetune.case_module import CaseModule
from mg3d.models.finetune.case_rows import gather_rows
from mg3d.models.finetune.decoders import build_segmenter, check_window
from mg3d.models.finetune.heads import use_running_statistics
from mg3d.models.finetune.layer_decay import freeze_encoder
from mg3d.models.finetune.schedule import build_optimization
from mg3d.models.finetune.segmentation_loss import SegmentationLoss
from mg3d.models.finetune.segmentation_rows import class_means, dice_rows, scored_rows
from mg3d.models.finetune.weights import build_encoder
from mg3d.models.finetune.window_inference import FLIPS, WindowOptions, predict_probabilities
from mg3d.models.vision_encoders.base import VisionEncoder

if TYPE_CHECKING:
    import numpy as np

    from mg3d.finetuning.benchmark import SegmentationTask
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["SegmentationModule", "build_segmentation_module"]

log = logging.getLogger(__name__)


class SegmentationModule(CaseModule):
    """Encoder with decoder, loss, optimizer, sliding-window evaluation and case rows of a segmentation benchmark.

    With ``protocol=clean`` scores are taken in the geometry of the stored image, on its complete label map; with
    ``reference`` on the working grid, after its crop. Predictions are written in the stored geometry either way:
    probabilities are interpolated linearly, then the largest one wins.

    Args:
        cfg: the run's config.
        task: what is predicted.
        encoder: the image encoder.
        total_steps: optimizer steps of the run, for the schedule.

    Attributes:
        network: the segmentation network.
        case_rows: after a validation or test epoch one row a case and class, sorted by id; validation has Dice alone.
        prediction_dir: set before testing: folder for ``<id>.nii.gz``; None writes none.
        ensemble: set before testing: other modules whose probabilities are averaged with this one's.
    """

    def __init__(self, cfg: FinetuneConfig, task: SegmentationTask, encoder: VisionEncoder, total_steps: int) -> None:
        super().__init__()
        self.cfg, self.task, self.total_steps = cfg, task, total_steps
        self.network = build_segmenter(encoder, len(task.classes) + 1, cfg.decoder)
        self.loss = SegmentationLoss(task.loss)

    @property
    def encoder(self) -> VisionEncoder:
        """The image encoder, which receives pre-trained weights."""
        return self.network.vision_encoder  # type: ignore[return-value]

    def forward(self, image_B1XYZ: Tensor) -> Tensor:
        """Logits ``[B, K, X, Y, Z]`` of windows."""
        return self.network(image_B1XYZ)

    def features(self, image_B1XYZ: Tensor) -> Tensor:
        """Pooled encoder features ``[B, F]``."""
        return self.encoder.pool(image_B1XYZ)

    def probabilities(self, image_11XYZ: Tensor, *, testing: bool = False) -> Tensor:
        """Probabilities ``[K, X, Y, Z]`` of a whole volume.

        Args:
            image_11XYZ: on the working grid.
            testing: with the flips of ``tta`` and the ensemble.
        """
        members = [self.network]
        if testing:
            members += [member.to(self.device).eval().network for member in self.ensemble]
        options = WindowOptions(
            roi=self.task.roi,
            overlap=self.task.overlap,
            blending=self.task.blending,
            batch_size=self.cfg.sw_batch_size,
            flips=FLIPS if testing and self.cfg.tta else FLIPS[:1],
            vote=self.cfg.protocol == "reference" and len(members) > 1,
        )
        return predict_probabilities(members, image_11XYZ, options)

    # ---------------------------------------------------------------- steps
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One batch of crops."""
        loss = self.loss(self(batch["image"]), batch["label"])
        count = len(batch["image"])
        self._train_means.add("loss", loss, count)
        self.log("train/loss", loss.detach(), batch_size=count)
        return {"loss": loss}

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Dice of one whole volume."""
        self._evaluate(batch, testing=False)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """All scores of one whole volume; its prediction is written where ``prediction_dir`` is set."""
        self._evaluate(batch, testing=True)

    def _evaluate(self, batch: Mapping[str, Any], *, testing: bool) -> None:
        sample = batch.get("sample")
        if sample is None:  # another process has one case more
            return
        values = self.probabilities(batch["image"], testing=testing).cpu().numpy()
        stored: np.ndarray | None = None
        clean = self.cfg.protocol == "clean"
        if clean or self._writes(testing):
            stored = sample.grid.labels_on_stored(values)
        if self._writes(testing) and stored is not None:
            self._write(sample, stored)
        if clean and stored is not None:
            truth, found, spacing = sample.stored_label, stored, sample.grid.stored_spacing_mm
        else:
            truth, found, spacing = sample.label, values.argmax(axis=0).astype("uint8"), sample.grid.spacing_mm
        if truth is not None:
            score = scored_rows if testing else dice_rows
            rows = score(sample.case, truth.numpy(), found, spacing, self.task)
            self._rows.append({"id": sample.case.id, "rows": rows})

    def _writes(self, testing: bool) -> bool:
        return testing and self.prediction_dir is not None

    def _write(self, sample: Any, labels: np.ndarray) -> None:
        from mg3d.finetuning.predictions import write_label_map

        if self.prediction_dir is not None:
            write_label_map(Path(self.prediction_dir) / f"{sample.case.id}.nii.gz", labels, sample.case.image)

    # ---------------------------------------------------------------- epochs

    def _finish(self, phase: str) -> None:
        self.case_rows = [row for case in gather_rows(self._rows) for row in case["rows"]]
        self._rows = []
        means = class_means(self.case_rows, "dice")
        chosen = sum(means.values()) / len(means) if means else 0.0
        if not means:
            log.warning("%s: no case holds a labelled structure, so there is no Dice; 0 stands in", phase)
        logged = {f"{phase}/dice_{name}": value for name, value in means.items()}
        self.log_dict({**logged, f"{phase}/dice": chosen, f"{phase}/the_metric": chosen}, sync_dist=True)

    # ---------------------------------------------------------------- optimisation and checkpoints
    def configure_optimizers(self) -> Any:
        """Optimizer and schedule of the config, with layer-wise rates."""
        return build_optimization(self, self.encoder, self.cfg, self.total_steps)

    def metadata(self) -> dict[str, Any]:
        """What is needed to use the weights, in plain JSON types."""
        task = self.task
        return describe_weights(
            self,
            architecture=type(self.network).__name__,
            mg3d_version=__version__,
            benchmark=self.cfg.benchmark,
            protocol=self.cfg.protocol,
            classes=list(task.classes),
            label_map=[[int(raw), int(index)] for raw, index in sorted(task.label_map.items())],
            orientation=task.orientation,
            spacing_mm=None if task.spacing_mm is None else list(task.spacing_mm),
            window=None if task.window is None else list(task.window),
            foreground_crop=task.foreground_crop,
            roi=list(task.roi),
        )


def build_segmentation_module(cfg: FinetuneConfig, task: SegmentationTask, total_steps: int) -> SegmentationModule:
    """Build the module of a run; pre-trained weights are loaded into its ``encoder`` afterwards.

    Args:
        cfg: the run's config.
        task: what is predicted.
        total_steps: optimizer steps of the run.

    Raises:
        ConfigError: keys that do not fit each other, or a window too small for the encoder.
    """
    if not task.classes:
        raise ConfigError("the task names no class", "give SegmentationTask.classes")
    if cfg.mode == "knn_probe":
        raise ConfigError("mode=knn_probe answers one question an image", "choose mode=full or linear_probe")
    encoder = build_encoder(cfg)
    check_window(encoder, task.roi)
    if cfg.protocol == "clean":
        use_running_statistics(encoder, task.roi)
    module = SegmentationModule(cfg, task, encoder, total_steps)
    freeze_encoder(module.encoder, cfg)
    return module
