"""The Lightning module that fine-tunes an image encoder to write reports (spec downstream 8.4-8.8).

Batches come from `mg3d.datamodules.report_generation`. Logged: ``train/loss``, ``train/{word,label,ranking}_loss`` (and
their ``_epoch`` means), ``{val,test}/bleu_1..4``, ``rouge_l``, ``cider`` and the monitored ``{val,test}/the_metric``,
which is BLEU-4. Axes: B batch, P patches, F feature width, L ids of a report.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mg3d import __version__
from mg3d.errors import ConfigError
from mg3d.metrics.captioning import score_captions
from mg3d.models.checkpoint import describe_weights
from mg3d.models.finetune.beam_search import SearchOptions
from mg3d.models.finetune.case_module import FrozenFeaturesModule
from mg3d.models.finetune.case_rows import gather_rows
from mg3d.models.finetune.heads import use_running_statistics
from mg3d.models.finetune.layer_decay import freeze_encoder, frozen_stages
from mg3d.models.finetune.memory_generator import GeneratorOptions, GeneratorOutput, MemoryGenerator
from mg3d.models.finetune.report_features import PATCHES, MultiScaleFeatures
from mg3d.models.finetune.report_losses import label_loss, ranking_loss, word_loss
from mg3d.models.finetune.schedule import build_optimization
from mg3d.models.finetune.weights import build_encoder
from mg3d.models.vision_encoders.base import VisionEncoder

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import ReportTask
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["CaseViews", "ReportGenerationModule", "build_report_module"]

log = logging.getLogger(__name__)

PUBLISHED_CLIP_VALUE = 5.0
PUBLISHED_DECAY = 0.8
PUBLISHED_VISUAL_SHARE = 0.5
ALL_STAGES = 6
LABEL_COLUMN = "p_{}"
"""Column of ``per_case.csv`` with the probability of a label."""


@dataclass(frozen=True)
class CaseViews:
    """What a module makes of the images of n cases, without writing.

    Attributes:
        ids: [n].
        features: [n, 2 F]: mean and maximum over the patches, float32.
        labels: [n, C] probabilities of the label head, float32.
    """

    ids: tuple[str, ...]
    features: np.ndarray
    labels: np.ndarray


class ReportGenerationModule(FrozenFeaturesModule):
    """Encoder, generator, losses, optimizer and case rows of a report-generation benchmark.

    With a frozen encoder and ``cache=memory`` the pooled maps of every volume are computed once, before the first
    epoch, and handed to the data module (`ReportDataModule.features`), which then reads no image any more.

    Args:
        cfg: the run's config.
        task: reports, vocabulary, weights of the losses, search.
        encoder: the image encoder.
        total_steps: optimizer steps of the run, for the schedule.

    Attributes:
        case_rows: after a validation or test epoch one row a case: tags, ``id``, ``patient``, ``reference`` (cleaned,
            whole), ``reference_published`` (through the vocabulary and the length limit, D61), ``hypothesis``,
            ``score`` and, with a label loss, ``p_<label>``.
        prediction_dir: unused; the reports are in the case rows.
        ensemble: unused; reports cannot be averaged.
    """

    def __init__(self, cfg: FinetuneConfig, task: ReportTask, encoder: VisionEncoder, total_steps: int) -> None:
        super().__init__()
        if task.vocabulary is None:
            raise ConfigError("the task has no vocabulary", "build one from the training reports")
        self.cfg, self.task, self.total_steps = cfg, task, total_steps
        self.vocabulary = task.vocabulary
        published = cfg.protocol == "reference"
        self.visual = MultiScaleFeatures(encoder, "positions_reference" if published else "channels")
        self.generator = MemoryGenerator(
            GeneratorOptions(
                words=self.vocabulary.size,
                feature_width=self.visual.width,
                labels=max(len(task.labels), 1),
                width=task.width,
                hidden=task.width,
                longest=task.max_tokens + 2,
                text_memory=task.text_memory,
                patch_dropout=task.patch_dropout,
                dropout=task.dropout,
                place_scale=task.place_scale,
                places=0 if published else PATCHES,
            )
        )
        self.search = SearchOptions(
            beams=task.beams,
            max_words=task.max_tokens,
            min_words=task.min_words,
            length_penalty=task.length_penalty,
            block_trigrams=task.block_trigrams,
        )
        self.frozen = frozen_stages(cfg) >= ALL_STAGES
        self.ranks = bool(task.labels and task.ranking_loss)

    @property
    def encoder(self) -> VisionEncoder:
        """The image encoder, which receives pre-trained weights."""
        return self.visual.encoder

    def features(self, image_B1DHW: Tensor) -> Tensor:
        """Global features [B, F] of volumes in [0, 1]."""
        return self.visual(self.visual.pooled(image_B1DHW))[1]

    def _seen(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Patch and global features of a batch."""
        if "features" in batch:
            return self.visual(batch["features"])
        if self.frozen:
            with torch.no_grad():
                return self.visual(self.visual.pooled(batch["image"]))
        return self.visual(self.visual.pooled(batch["image"]))

    # ---------------------------------------------------------------- steps
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One training batch: word loss, and where they are on, label and ranking loss."""
        output = self.generator(*self._seen(batch), batch["ids"], encode_report=self.ranks)
        terms = self.losses(output, batch)
        weights = {"label_loss": self.task.label_loss, "ranking_loss": self.task.ranking_loss}
        loss = torch.stack([weights.get(name, 1.0) * value for name, value in terms.items()]).sum()
        for name, value in {"loss": loss, **terms}.items():
            self._train_means.add(name, value, len(batch["ids"]))
            self.log(f"train/{name}", value.detach(), batch_size=len(batch["ids"]))
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def losses(self, output: GeneratorOutput, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The losses that are on, without their weights."""
        terms = {"word_loss": word_loss(output.logits, batch["ids"][:, 1:], batch["counts"][:, 1:])}
        if self.task.labels and self.task.label_loss:
            terms["label_loss"] = label_loss(output.image_labels, batch["labels"])
        if self.ranks and output.text is not None:
            terms["ranking_loss"] = ranking_loss(output.image, output.text, batch["labels"])
        return terms

    def write(self, batch: Mapping[str, Any]) -> tuple[list[str], list[float]]:
        """Write the reports of a batch; returns texts and scores."""
        return self._write(self._seen(batch))

    def _write(self, seen: tuple[Tensor, Tensor]) -> tuple[list[str], list[float]]:
        found = self.generator.generate(*seen, self.search)
        return [self.vocabulary.decode([0, *ids]) for ids in found.ids.tolist()], found.scores.tolist()

    def _label_probabilities(self, seen: tuple[Tensor, Tensor]) -> Tensor:
        """What the label head says, [B, C]."""
        return self.generator.image_labels(self.generator.image_vector(*seen)).sigmoid().float()

    @torch.no_grad()
    def look(self, data: Any, part: str, device: torch.device) -> CaseViews:
        """Features and label probabilities of the cases of a part, in the order of its loader.

        Args:
            data: the data module.
            part: train, val or test.
            device: where to compute.
        """
        self.to(device).eval()
        ids: list[str] = []
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for batch in data.image_loader(part):
            if batch["id"]:
                given = batch["features"] if "features" in batch else None
                pooled = self.visual.pooled(batch["image"].to(device)) if given is None else given.to(device)
                ids += batch["id"]
                found[0].append(torch.cat([pooled.mean(dim=1), pooled.amax(dim=1)], dim=1).float().cpu())
                found[1].append(self._label_probabilities(self.visual(pooled)).cpu())
        features, labels = (torch.cat(each).numpy() if each else np.zeros((0, 0), np.float32) for each in found)
        return CaseViews(tuple(ids), features, labels)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Write the reports of a validation batch."""
        self._note(batch)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Write the reports of a test batch."""
        self._note(batch)

    def _note(self, batch: Mapping[str, Any]) -> None:
        if not batch["id"]:
            return
        seen = self._seen(batch)
        told = zip(*self._write(seen), self._label_probabilities(seen).tolist(), strict=True)
        names = [LABEL_COLUMN.format(name) for name in self.task.labels] if self.task.label_loss else []
        for case_id, patient, tags, (text, score, chances) in zip(
            batch["id"], batch["patient"], batch["tags"], told, strict=True
        ):
            report = self.task.reports[case_id]
            limited = self.vocabulary.encode(report, self.task.max_tokens, keep_end=self.cfg.protocol == "clean")
            self._rows.append(
                {
                    **tags,
                    "id": case_id,
                    "patient": patient,
                    "reference": self.vocabulary.clean(report),
                    "reference_published": self.vocabulary.decode(limited),
                    "hypothesis": text,
                    "score": score,
                    **dict(zip(names, chances, strict=False)),
                }
            )

    # ---------------------------------------------------------------- epochs
    def _seer(self) -> nn.Module:
        return self.visual

    def _image_features(self, image_B1DHW: Tensor) -> Tensor:
        """Patch features [B, P, F]."""
        return self.visual.pooled(image_B1DHW)

    def _fit(self, train: Sequence[str], features: Mapping[str, Tensor], device: torch.device) -> None:
        if self.cfg.protocol == "clean":
            self.visual.fit(torch.stack([features[name] for name in train]).to(device))

    def _finish(self, phase: str) -> None:
        self.case_rows, self._rows = gather_rows(self._rows), []
        if not self.case_rows:
            return
        column = "reference" if self.cfg.protocol == "clean" else "reference_published"
        references = [row[column] for row in self.case_rows]
        scores = score_captions(
            references, [row["hypothesis"] for row in self.case_rows], pretokenised=True, meteor="none"
        )
        logged = {f"{phase}/{name}": value for name, value in scores.values.items() if value is not None}
        # equal on all ranks already
        self.log_dict({**logged, f"{phase}/the_metric": logged[f"{phase}/bleu_4"]}, sync_dist=True)

    # ---------------------------------------------------------------- optimisation and checkpoints
    def configure_optimizers(self) -> Any:
        """Optimizer and schedule of the config, or the published ones (spec downstream 8.7).

        Published are Adam (amsgrad), half the rate for what sees voxels, and times 0.8 an epoch.
        """
        if self.cfg.protocol == "clean":
            return build_optimization(self, self.encoder, self.cfg, self.total_steps)
        rate, epochs = self.cfg.learning_rate, self.cfg.max_epoch or 1
        groups = [
            {"params": [each for each in part.parameters() if each.requires_grad], "lr": share * rate}
            for part, share in ((self.visual, PUBLISHED_VISUAL_SHARE), (self.generator, 1.0))
        ]
        optimizer = torch.optim.Adam(groups, lr=rate, weight_decay=self.cfg.weight_decay, amsgrad=True)
        steps = max(self.total_steps // epochs, 1)
        schedule = LambdaLR(optimizer, lambda step: PUBLISHED_DECAY ** (step // steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip as the config says; ``reference`` clips every gradient value at 5."""
        if self.cfg.protocol == "reference":
            torch.nn.utils.clip_grad_value_(self.parameters(), PUBLISHED_CLIP_VALUE)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def metadata(self) -> dict[str, Any]:
        """What is needed to use the weights, in plain JSON types; the vocabulary among it."""
        return describe_weights(
            self,
            architecture="ReportGenerationModule",
            mg3d_version=__version__,
            benchmark=self.cfg.benchmark,
            protocol=self.cfg.protocol,
            generator=self.generator.options.to_plain(),
            vocabulary=list(self.vocabulary.words),
            labels=list(self.task.labels),
            input_size_dhw=list(self.task.size_dhw),
        )


def build_report_module(cfg: FinetuneConfig, task: ReportTask, total_steps: int) -> ReportGenerationModule:
    """Build the module of a run; pre-trained weights are loaded into its ``encoder`` afterwards.

    Args:
        cfg: the run's config.
        task: what is written.
        total_steps: optimizer steps of the run.

    Raises:
        ConfigError: keys that do not fit each other.
    """
    if cfg.mode == "knn_probe":
        raise ConfigError("mode=knn_probe writes no report", "choose mode=full, or freeze=encoder")
    encoder = build_encoder(cfg)
    if cfg.protocol == "clean" and cfg.encoder.startswith("unet"):  # no volume changes the features of another
        use_running_statistics(encoder, task.size_dhw)
    module = ReportGenerationModule(cfg, task, encoder, total_steps)
    freeze_encoder(module.encoder, cfg)
    if module.frozen:
        module.visual.freeze()
    module.generator.freeze_unused(ranking=module.ranks)
    return module
