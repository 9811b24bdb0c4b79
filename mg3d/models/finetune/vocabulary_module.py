"""The Lightning module that learns to match findings, named by prompts, with volumes (spec downstream 7.4 to 7.9).

Batches come from `mg3d.datamodules.vocabulary`. Logged: ``train/loss`` and its parts, ``{val,test}/<figure>`` and the
monitored ``{val,test}/the_metric``, the mean AUROC of the findings. Axes: B volumes, L findings, I tokens of width E,
F text width, P latent width.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from mg3d import __version__
from mg3d.atomic import atomic_path
from mg3d.errors import ConfigError, MG3DError
from mg3d.models.checkpoint import CoverageReport, describe_weights, read_weights_file
from mg3d.models.distributed import is_distributed
from mg3d.models.finetune.case_module import FrozenFeaturesModule
from mg3d.models.finetune.case_rows import gather_rows, rows_of_batch, rows_to_arrays
from mg3d.models.finetune.figures import figures, monitored
from mg3d.models.finetune.heads import use_running_statistics
from mg3d.models.finetune.pairwise import pairwise_scores
from mg3d.models.finetune.schedule import build_optimization, reference_factor
from mg3d.models.finetune.text_weights import LANGUAGE, load_text_weights
from mg3d.models.finetune.vocabulary import PRETRAINED_PARTS, VocabularyNetwork, VocabularyOptions
from mg3d.models.finetune.weights import build_encoder
from mg3d.models.language_encoders import create_text_encoder, create_tokenizer
from mg3d.models.vision_encoders.base import VisionEncoder

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import VocabularyTask
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["VocabularyModule", "build_vocabulary_module"]

log = logging.getLogger(__name__)

PUBLISHED_WARMUP_VOLUMES = 10_000
TEXTS_AT_ONCE = 64
REPORT_TEMPERATURE = 0.1
"""Of the contrastive loss between reports and volumes."""


class VocabularyModule(FrozenFeaturesModule):
    """Network, losses, optimizer and case rows of a vocabulary benchmark.

    Texts are encoded once. So are volumes where the image encoder does not learn; the data module then reads none any
    more (`VocabularyDataModule.features`).

    Args:
        cfg: the run's config.
        task: findings, reports, prompts.
        network: encoders and cross-attention.
        tokenizer: of the text encoder.
        total_steps: optimizer steps of the run, for the schedule.

    Attributes:
        case_rows: after a validation or test epoch one row a case, as of a classification with binary outputs.
        case_arrays: after a test epoch, in the order of ``case_rows``: ``image_latents`` [n, P] and ``text_latents``
            [n, P] of volumes and reports on their own, ``similarity`` [n, n] of reports (rows) with volumes; and
            ``tuning_rows``, the rows of the validation cases, which choose the thresholds.
        prediction_dir: set before testing: receives the arrays as ``.npz``.
        ensemble: unused; prompts are the ensemble here (``templates``).
        text_report: what became of the tensors of ``text_weights``; None without it.
    """

    def __init__(
        self, cfg: FinetuneConfig, task: VocabularyTask, network: VocabularyNetwork, tokenizer: Any, total_steps: int
    ) -> None:
        super().__init__()
        self.cfg, self.task, self.network, self.total_steps = cfg, task, network, total_steps
        self.tokenizer = tokenizer
        self.frozen = "image_encoder" not in task.trainable
        self.case_arrays: dict[str, Any] = {}
        self.text_report: CoverageReport | None = None
        self._texts: dict[str, Tensor] = {}
        self._seen: dict[str, Tensor] = {}

    @property
    def pretrained_parts(self) -> tuple[str, ...]:
        """What ``weights`` gives besides the image encoder; ``text_weights`` has the last word on texts."""
        return PRETRAINED_PARTS if self.text_report is None else tuple(p for p in PRETRAINED_PARTS if p != LANGUAGE)

    @property
    def encoder(self) -> VisionEncoder:
        """The image encoder, which receives pre-trained weights."""
        return self.network.visual.encoder

    def features(self, image_B1DHW: Tensor) -> Tensor:
        """Pooled image features [B, E]."""
        return self.network.image_features(image_B1DHW).mean(dim=1)

    # ---------------------------------------------------------------- what goes in
    def text_vectors(self, texts: Sequence[str]) -> Tensor:
        """Text features [T, F]; each text is encoded once."""
        new = list(dict.fromkeys(text for text in texts if text not in self._texts))
        for start in range(0, len(new), TEXTS_AT_ONCE):
            part = new[start : start + TEXTS_AT_ONCE]
            limit = min(self.task.max_tokens, self.network.language_encoder.max_length)
            tokens = self.tokenizer(part, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            with torch.no_grad():
                ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
                self._texts |= zip(part, self.network.text_features(ids, mask).cpu(), strict=True)
        return torch.stack([self._texts[text] for text in texts]).to(self.device)

    def prompts(self, template: tuple[str, str]) -> Tensor:
        """Features [L, 2, F] of the pair (present, absent) of every finding."""
        pairs = [side.format(name=name) for name in self.task.outputs for side in template]
        return self.text_vectors(pairs).view(len(self.task.outputs), 2, -1)

    def image_features(self, batch: Mapping[str, Any]) -> Tensor:
        """Image features [B, I, E] of a batch of volumes or of such features."""
        image = batch["image"]
        if image.ndim == 3:
            return image
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.network.image_features(image)

    def probabilities(self, image_BIE: Tensor) -> Tensor:
        """Probability [B, L] of every finding, averaged over the templates."""
        found = [self.network.probabilities(image_BIE, self.prompts(each)) for each in self.task.templates]
        return torch.stack(found).mean(dim=0).double()

    # ---------------------------------------------------------------- steps
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One step: all findings, or with ``protocol=reference`` those of one group."""
        image_BIE = self.image_features(batch)
        groups = range(len(self.task.outputs))
        if self.cfg.protocol == "reference":
            steps = math.ceil(len(groups) / self.task.group)
            groups = groups[batch_idx % steps * self.task.group :][: self.task.group]
        pairs = self.prompts(self.task.templates[0])[groups.start : groups.stop]
        terms = {"prompt_loss": self.prompt_loss(image_BIE, pairs, batch["target"][:, groups.start : groups.stop])}
        if self.task.report_loss:
            terms["report_loss"] = self.report_loss(image_BIE, [self.task.reports[name] for name in batch["id"]])
        loss = terms["prompt_loss"] + self.task.report_loss * terms.get("report_loss", torch.zeros(()).to(image_BIE))
        for name, value in {"loss": loss, **terms}.items():
            self._train_means.add(name, value, len(image_BIE))
            self.log(f"train/{name}", value.detach(), batch_size=len(image_BIE))
        return {"loss": loss}

    def prompt_loss(self, image_BIE: Tensor, pairs_G2F: Tensor, target_BG: Tensor) -> Tensor:
        """Mean squared error of both probabilities of a pair; unknown findings do not count.

        Exchanging the prompts of an absent finding, as published, is the same as exchanging the target.
        """
        found_BG = self.network.probabilities(image_BIE, pairs_G2F)
        known = ((target_BG == 0) | (target_BG == 1)).to(found_BG)
        return ((found_BG - target_BG).square() * known).sum() / known.sum().clamp(min=1.0)

    def report_loss(self, image_BIE: Tensor, reports: Sequence[str]) -> Tensor:
        """Cross-entropy of every report among the volumes of the batch, and the other way round."""
        text_BF = self.text_vectors(reports)
        if self.task.fusion == "none":
            scores_BB = self.network.text_latents(text_BF) @ self.network.image_latents(image_BIE, text_BF).t()
        else:
            image_BIC, text_BC = self.network.project_image(image_BIE), self.network.project_text(text_BF)
            image_BBP, text_BB1P = self.network.latents(image_BIC.unsqueeze(0), text_BC[:, None, None])
            scores_BB = (image_BBP * text_BB1P.squeeze(2)).sum(dim=-1)
        scores_BB = scores_BB / REPORT_TEMPERATURE
        same = torch.tensor([[one == other for other in reports] for one in reports], device=scores_BB.device)
        wanted = same / same.sum(dim=1, keepdim=True)
        return (functional.cross_entropy(scores_BB, wanted) + functional.cross_entropy(scores_BB.t(), wanted)) / 2

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Note the probabilities of a validation batch."""
        self._note(batch)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Note probabilities and image features of a test batch."""
        image_BIE = self._note(batch)
        self._seen |= zip(batch["id"], image_BIE.cpu(), strict=True)

    def _note(self, batch: Mapping[str, Any]) -> Tensor:
        if not batch["id"]:
            return torch.zeros(0)
        image_BIE = self.image_features(batch)
        self._rows += rows_of_batch(self.task, batch, self.probabilities(image_BIE))
        return image_BIE

    # ---------------------------------------------------------------- epochs
    def _seer(self) -> nn.Module:
        return self.network

    def _image_features(self, image_B1DHW: Tensor) -> Tensor:
        """Tokens [B, I, E]."""
        return self.network.image_features(image_B1DHW)

    def _fit(self, train: Sequence[str], features: Mapping[str, Tensor], device: torch.device) -> None:
        """Fit the standardisation of images and texts."""
        texts = self.text_vectors([self.task.reports[name] for name in train])
        prompts = self.prompts(self.task.templates[0]).flatten(0, 1).to(texts)
        self.network.fit(
            torch.stack([features[name] for name in train]).to(device), torch.cat([texts, prompts]).to(device)
        )

    def on_train_epoch_start(self) -> None:
        """Keep frozen encoders in evaluation mode."""
        self.network.language_encoder.eval()
        if self.frozen:
            self.network.visual.eval()

    def on_test_epoch_start(self) -> None:
        """Note the validation cases under the same weights; then begin an empty list of rows."""
        self._rows, self._seen = [], {}
        for batch in self.trainer.datamodule.complete_dataloader("val"):  # type: ignore[attr-defined]
            self._note({**batch, "image": batch["image"].to(self.device)})
        self.case_arrays = {"tuning_rows": gather_rows(self._rows)}
        self._rows, self.case_rows = [], []

    def on_test_epoch_end(self) -> None:
        """Gather the rows of all processes, compare volumes and reports, and log the figures."""
        self._finish("test")
        seen = _gathered(self._seen)
        if self.case_rows:
            self.case_arrays |= self.compare([row["id"] for row in self.case_rows], seen)
            if self.prediction_dir is not None and self.global_rank == 0:
                self._write(self.prediction_dir)

    def _finish(self, phase: str) -> None:
        self.case_rows, self._rows = gather_rows(self._rows), []
        if not self.case_rows:
            return
        ids, _, probabilities, targets = rows_to_arrays(self.case_rows, self.task)
        found = figures(self.task, ids, probabilities, targets)
        chosen = monitored(self.task, found)
        if not math.isfinite(chosen):
            log.warning("%s: no finding has both values; minus the squared error stands in", phase)
            chosen = -float(np.square(probabilities - targets).mean())
        logged = {f"{phase}/{name}": value for name, value in found.items() if math.isfinite(value)}
        self.log_dict({**logged, f"{phase}/the_metric": chosen}, sync_dist=True)  # equal on all ranks already

    @torch.no_grad()
    def compare(self, ids: Sequence[str], seen: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Latents of volumes and reports on their own, and the scores of every report with every volume.

        Args:
            ids: cases, in order.
            seen: their image features.
        """
        images = torch.stack([seen[name] for name in ids])
        texts = self.text_vectors([self.task.reports[name] for name in ids])
        pairs = self.prompts(self.task.templates[0])
        alone = [self.network.image_latents(each.to(self.device), pairs) for each in images.split(self.cfg.batch_size)]
        found = {
            "image_latents": torch.cat(alone),
            "text_latents": self.network.text_latents(texts),
            "similarity": pairwise_scores(self.network, texts, images),
        }
        return {name: value.float().cpu().numpy() for name, value in found.items()}

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("image_latents", "text_latents"):
            _save_array(folder / f"{name}.npz", self.case_arrays[name][:, None])
        _save_array(folder / "report_to_volume.npz", self.case_arrays["similarity"])

    # ---------------------------------------------------------------- optimisation and checkpoints
    def configure_optimizers(self) -> Any:
        """Optimizer and schedule of the config; ``reference`` warms up over 10,000 volumes, as published (D46)."""
        found = build_optimization(self, self.encoder, self.cfg, self.total_steps)
        if self.cfg.protocol == "reference":
            steps = math.ceil(len(self.task.outputs) / self.task.group)
            volumes = max(self.total_steps // steps, 1)
            factor = LambdaLR(
                found["optimizer"],
                lambda step: reference_factor(step // steps, PUBLISHED_WARMUP_VOLUMES, volumes),
            )
            found["lr_scheduler"] = {"scheduler": factor, "interval": "step"}
        return found

    def metadata(self) -> dict[str, Any]:
        """What is needed to use the weights, in plain JSON types."""
        return describe_weights(
            self,
            architecture="VocabularyModule",
            mg3d_version=__version__,
            benchmark=self.cfg.benchmark,
            protocol=self.cfg.protocol,
            outputs=list(self.task.outputs),
            templates=[list(pair) for pair in self.task.templates],
            text_encoder=self.task.text_encoder,
            network=self.network.describe(),
            axis_order=self.cfg.axis_order,
        )


def _gathered(seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Image features of all processes (collective)."""
    parts: list[Any] = [dict(seen)]
    if is_distributed():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, dict(seen))
    return {name: value for part in parts for name, value in part.items()}


def build_vocabulary_module(cfg: FinetuneConfig, task: VocabularyTask, total_steps: int) -> VocabularyModule:
    """Build the module of a run; pre-trained weights are loaded into it afterwards.

    Args:
        cfg: the run's config.
        task: findings, reports, prompts.
        total_steps: optimizer steps of the run.

    Raises:
        ConfigError: keys that do not fit each other.
    """
    if cfg.mode != "full":
        raise ConfigError(f"mode={cfg.mode} trains no prompts", "choose objective=classification with it")
    size = [task.size_dhw["zyx".index(axis)] for axis in cfg.axis_order]
    if task.standardise and (cfg.cache == "none" or "image_encoder" in task.trainable):
        raise ConfigError("standardise=True needs the features of all training volumes", "add cache=memory")
    try:
        options = VocabularyOptions(
            size_dhw=(size[0], size[1], size[2]),
            width=_stored_width(cfg) or task.width,
            latent=task.latent,
            fusion=task.fusion,
            project=task.project,
            image_tokens=_image_tokens(cfg, task),
            text_pooling=task.text_pooling,
            standardise=task.standardise,
        )
        text = create_text_encoder(task.text_encoder, random_init=bool(task.text_weights))
        encoder = build_encoder(cfg)
        if cfg.protocol == "clean":  # no volume changes the features of another
            use_running_statistics(encoder, size)
        network = VocabularyNetwork(encoder, text, options)
        network.set_trainable(task.trainable)
    except ValueError as error:
        if isinstance(error, MG3DError):
            raise
        raise ConfigError(str(error), "see the keys of this benchmark in --help") from error
    module = VocabularyModule(cfg, task, network, create_tokenizer(task.text_encoder), total_steps)
    if task.text_weights:
        published = "left out as published" if cfg.protocol == "reference" else ""
        projected = "texts are projected before it (project=False takes it)" if task.project else ""
        place = os.path.expanduser(task.text_weights)
        module.text_report = load_text_weights(network, place, latents_out=published or projected)
    return module


def _image_tokens(cfg: FinetuneConfig, task: VocabularyTask) -> str:
    """Which tokens are read; ``auto`` is as published for the encoder."""
    if task.image_tokens != "auto":
        return task.image_tokens
    return "two_sets" if cfg.encoder == "swin_l" else "x4"


def _stored_width(cfg: FinetuneConfig) -> int:
    """Channels of the cross-attention in the weights; 0 without any."""
    if not cfg.weights:
        return 0
    tensors = read_weights_file(cfg.weights).tensors
    found = tensors.get("local_img_cross_multihead_attention.0.query1.weight")
    return 0 if found is None else int(found.shape[0])


def _save_array(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as partial, partial.open("wb") as stream:
        np.savez_compressed(stream, data=array)
