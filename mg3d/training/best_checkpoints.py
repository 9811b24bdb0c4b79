"""The best checkpoints of a run, those of the run that it goes on with included."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from mg3d.atomic import atomic_path, write_text_atomically
from mg3d.training.checkpoint_io import check_file, sidecar_path

__all__ = ["BestCheckpoints", "copy_checkpoint"]


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint with its digest unless it is missing, damaged, or the target is there."""
    if target.is_file() or not source.is_file() or check_file(source):
        return
    with atomic_path(target, needed=source.stat().st_size, mode=0o600) as partial:
        shutil.copyfile(source, partial)
        if sidecar_path(source).is_file():
            text = sidecar_path(source).read_text(encoding="utf-8").replace(f"  {source.name}", f"  {target.name}")
            write_text_atomically(sidecar_path(target), text)


class BestCheckpoints(ModelCheckpoint):
    """``best-epoch{e}-step{s}.ckpt`` of the highest validation metrics; a resumed run knows those before it.

    Args:
        folder: checkpoint folder of the run.
        monitored: name of the metric, larger is better.
        keep: how many are kept.
        weights_only: leave optimizer, schedule and random state out.
        resume: checkpoint that is resumed; the best ones beside it are copied.
    """

    def __init__(
        self, folder: Path, monitored: str, keep: int, *, weights_only: bool = False, resume: Path | None = None
    ) -> None:
        super().__init__(
            dirpath=folder,
            filename="best-epoch{epoch}-step{step}",
            auto_insert_metric_name=False,
            monitor=monitored,
            mode="max",
            save_top_k=keep,
            save_weights_only=weights_only,
            save_on_train_epoch_end=False,
        )
        self._earlier = resume.parent if resume else None
        self._copies: list[Path] = []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the scores over, for the files that are there."""
        if self._earlier is None or self.save_top_k == 0:
            return
        known = {Path(path).name: score for path, score in state_dict["best_k_models"].items()}
        ranked = sorted((name for name in known if (self._earlier / name).is_file()), key=lambda name: known[name])
        self._copies = [self._earlier / name for name in ranked[-self.save_top_k :]]
        self.best_k_models = {str(Path(str(self.dirpath)) / path.name): known[path.name] for path in self._copies}
        if not self.best_k_models:
            return
        places = list(self.best_k_models)
        self.kth_best_model_path, self.best_model_path = places[0], places[-1]
        self.best_model_score = self.best_k_models[places[-1]]
        if len(places) == self.save_top_k:
            self.kth_value = self.best_k_models[places[0]]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the files of the run before, also where nothing is left to train."""
        for path in self._copies if trainer.is_global_zero else ():
            copy_checkpoint(path, Path(str(self.dirpath)) / path.name)
