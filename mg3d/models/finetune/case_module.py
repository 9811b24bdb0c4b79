"""What all fine-tuning modules do around their steps: rows of cases, means of an epoch, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from mg3d.models.checkpoint import METADATA_KEY, check_resumable
from mg3d.models.epoch_means import EpochMeans

__all__ = ["CaseModule", "FrozenFeaturesModule"]

log = logging.getLogger(__name__)

EPOCH_SUMS_KEY = "mg3d_epoch_sums"


class CaseModule(pl.LightningModule):
    """Base of the modules that `mg3d.finetuning.run` trains; the steps add to ``_rows`` and ``_train_means``.

    Attributes:
        case_rows: after a validation or test epoch the rows of all processes, sorted by id.
        prediction_dir: set before testing: where predictions are written; None writes none.
        ensemble: set before testing: other modules whose predictions are combined with this one's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.case_rows: list[dict[str, Any]] = []
        self.prediction_dir: Path | None = None
        self.ensemble: list[Any] = []
        self._rows: list[dict[str, Any]] = []
        self._train_means = EpochMeans()

    def metadata(self) -> dict[str, Any]:
        """What is needed to use the weights, in plain JSON types."""
        raise NotImplementedError

    def _begin(self, phase: str) -> None:
        """Forget the rows of the last epoch of ``phase`` (``val`` or ``test``)."""
        self._rows, self.case_rows = [], []

    def _finish(self, phase: str) -> None:
        """Gather the rows of all processes and log their figures, among them ``{phase}/the_metric``."""
        raise NotImplementedError

    def on_train_epoch_end(self) -> None:
        """Log the mean losses of the training epoch."""
        for name, value in self._train_means.means().items():
            self.log(f"train/{name}_epoch", value, sync_dist=True)
        self._train_means.reset()

    def on_validation_epoch_start(self) -> None:
        """Begin an empty list of rows."""
        self._begin("val")

    def on_test_epoch_start(self) -> None:
        """Begin an empty list of rows."""
        self._begin("test")

    def on_validation_epoch_end(self) -> None:
        """Gather and score the rows of the validation cases."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Gather and score the rows of the test cases."""
        self._finish("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the metadata and the running sums of the epoch."""
        checkpoint[METADATA_KEY] = self.metadata()
        checkpoint[EPOCH_SUMS_KEY] = self._train_means.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another model, then take the running sums of an interrupted epoch up again."""
        check_resumable(self, checkpoint)
        sums: dict[str, Tensor] = checkpoint.get(EPOCH_SUMS_KEY, {})
        self._train_means.load_state_dict(sums, self.device)


class FrozenFeaturesModule(CaseModule):
    """A module that computes the features of a frozen image encoder once, before the first epoch.

    Its data module has ``splits``, ``image_loader(part)`` and ``features`` (case id -> feature); once these are
    filled it reads no image any more.

    Attributes:
        frozen: whether the image encoder does not learn.
        cfg: the run's config.
    """

    frozen: bool
    cfg: Any

    def _seer(self) -> nn.Module:
        """The part that computes image features."""
        raise NotImplementedError

    def _image_features(self, image_B1DHW: Tensor) -> Tensor:
        """What is kept of volumes."""
        raise NotImplementedError

    def _fit(self, train: Sequence[str], features: Mapping[str, Tensor], device: torch.device) -> None:
        """Take statistics of the training cases; ``train`` holds the ids of those that could be read, at least one."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Compute the features of a frozen image encoder once, and take the statistics of the training cases."""
        data = getattr(self._trainer, "datamodule", None)
        if self.frozen and self.cfg.cache != "none" and data is not None and not data.features:
            self.cache_features(data, self._trainer.strategy.root_device if self._trainer else torch.device("cpu"))

    @torch.no_grad()
    def cache_features(self, data: Any, device: torch.device) -> None:
        """Fill ``data.features`` from its images, then take the statistics of the training cases.

        Args:
            data: the data module.
            device: where to compute.
        """
        self._seer().to(device).eval()
        found: dict[str, Tensor] = {}
        for part in ("train", "val", "test"):
            for batch in data.image_loader(part) if getattr(data.splits, part) else ():
                if batch["id"]:
                    found |= zip(batch["id"], self._image_features(batch["image"].to(device)).cpu(), strict=True)
        train = [case.id for case in data.splits.train if case.id in found]
        if train:
            self._fit(train, found, device)
        data.features.update(found)
        log.info("features of %d volumes computed once", len(found))
