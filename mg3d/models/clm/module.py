"""The Lightning module that fine-tunes the pre-trained MG-3D module to write reports.

Image side as pre-trained (encoder, projection into the fusion space, type embedding), then `CausalReportHead`. Logged:
``train/loss`` (and ``train/loss_epoch``), ``{val,test}/loss``, ``bleu_1..4``, ``rouge_l``, ``cider``, and the monitored
``{val,test}/the_metric``, the sum of BLEU-1 to BLEU-4 (spec 12). Axes: B studies, N image tokens, C fusion width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from mg3d import __version__
from mg3d.config_schema import MG3DConfig
from mg3d.errors import ConfigError
from mg3d.metrics.captioning import score_captions
from mg3d.models.checkpoint import describe_weights
from mg3d.models.clm.decoder import SpecialTokens
from mg3d.models.clm.head import CausalReportHead, GenerationOptions
from mg3d.models.distributed import global_mean
from mg3d.models.epoch_means import EpochMeans
from mg3d.models.finetune.case_module import CaseModule
from mg3d.models.finetune.case_rows import gather_rows
from mg3d.models.language_encoders import BertTextEncoder, encoder_revision
from mg3d.models.mg3d_module import UNSTATED_LICENCE, build_encoders
from mg3d.models.network import IMAGE_TYPE, published_init
from mg3d.models.optimization import configured_optimization

__all__ = ["ReportWritingModule"]

log = logging.getLogger(__name__)

BLEUS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")


class ReportWritingModule(CaseModule):
    """Image side of the pre-trained module, report head, loss, generation and case rows.

    Args:
        cfg: the checked config, with ``loss_names.clm`` above 0.
        tokenizer: that of the text encoder.
        num_training_steps: optimizer steps of the run; None takes ``cfg.max_steps``.
        geometry: how volumes were prepared, stored with the weights.

    Attributes:
        case_rows: after a validation or test epoch one row a study: ``id``, ``patient``, ``corpus``, ``reference``,
            ``hypothesis`` (beam search), in a test with ``clm_do_sample`` also ``hypothesis_sampled``, ``labels``, and
            ``row`` of the split.
        unread: studies of the last such epoch that have no report to compare with.

    Raises:
        ConfigError: keys that do not fit the encoders, the tokenizer or each other.
    """

    def __init__(
        self,
        cfg: MG3DConfig,
        tokenizer: Any,
        num_training_steps: int | None = None,
        geometry: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        self.num_training_steps = num_training_steps or cfg.max_steps
        self.geometry = dict(geometry or {})
        self.vision_encoder, text = build_encoders(cfg)
        self.multi_modal_vision_proj = nn.Linear(self.vision_encoder.out_channels, cfg.hidden_size)
        self.modality_type_embeddings = nn.Embedding(2, cfg.hidden_size)
        for part in (self.multi_modal_vision_proj, self.modality_type_embeddings):
            part.apply(published_init)
        seen = (math.prod(self.vision_encoder.token_grid(cfg.volume_size)), self.vision_encoder.out_channels)
        self.clm_head = CausalReportHead(text, SpecialTokens.of(tokenizer), cfg.hidden_size, seen)
        self._check_text(text)
        self._text_source = [text]  # in a list: it gives first weights and is no part of the model
        self._about_text = {
            "text_encoder": cfg.tokenizer,
            "text_encoder_revision": encoder_revision(cfg.tokenizer, text.config),
            "text_encoder_config": text.plain_config(),
        }
        if cfg.freeze_image_encoder:
            self.vision_encoder.requires_grad_(False)
        self.save_hyperparameters(cfg.to_dict_without_places())
        self._losses = {phase: EpochMeans() for phase in ("val", "test")}
        self._kept: dict[tuple[str, int], Tensor] = {}
        self.unread = 0

    def release_text_encoder(self) -> BertTextEncoder:
        """Hand out the text encoder that the decoder starts from, once; the module does not hold it any longer."""
        return self._text_source.pop()

    def _check_text(self, text: BertTextEncoder) -> None:
        self.clm_head.check_length("max_text_len", self.cfg.max_text_len)
        self.clm_head.check_length("clm_max_text_len", self.cfg.clm_max_text_len)
        if len(self.tokenizer) > text.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(self.tokenizer)} entries, its text model {text.vocab_size}",
                "use the tokenizer that belongs to the model",
            )

    def train(self, mode: bool = True) -> ReportWritingModule:
        """Set training mode; a frozen image encoder stays in evaluation mode."""
        super().train(mode)
        if self.cfg.freeze_image_encoder:
            self.vision_encoder.eval()
        return self

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """With ``clm_standardise`` take mean and spread of the image tokens, once; a resumed run has them already."""
        if not self.cfg.clm_standardise or self.clm_head.is_standardised:
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.eval()
        batches = data.training_volumes(self.cfg.clm_standardise)
        found = [self.encode(batch["image"].to(self.device)) for batch in batches]
        self.clm_head.standardise(torch.cat(found).float())
        self.train()

    # ---------------------------------------------------------------- features
    def encode(self, image_BD1HW: Tensor) -> Tensor:
        """Volumes in batch layout -> encoder tokens [B, N, E]; without gradient from a frozen encoder."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.cfg.freeze_image_encoder):
            return self.vision_encoder.tokens(image_BD1HW.transpose(1, 2))

    def project(self, tokens_BNE: Tensor) -> Tensor:
        """Encoder tokens -> [B, N, C] with the image type embedding, as in pre-training."""
        return (
            self.multi_modal_vision_proj(self.clm_head.standard(tokens_BNE))
            + self.modality_type_embeddings.weight[IMAGE_TYPE]
        )

    def image_tokens(self, batch: Mapping[str, Any], phase: str) -> Tensor:
        """Projected image tokens [B, N, C] of a batch; arguments as `encoder_tokens`."""
        return self.project(self.encoder_tokens(batch, phase))

    def encoder_tokens(self, batch: Mapping[str, Any], phase: str) -> Tensor:
        """Encoder tokens [B, N, E] of a batch; with ``cache_image_tokens`` each volume is encoded once.

        Args:
            batch: of the data module.
            phase: train, val or test, whose rows are counted apart.
        """
        if not self.cfg.cache_image_tokens:
            return self.encode(batch["image"])
        keys = [(phase, row) for row in batch["index"].tolist()]
        new = [place for place, key in enumerate(keys) if key not in self._kept]
        if new:
            self._kept |= zip([keys[place] for place in new], self.encode(batch["image"][new]), strict=True)
        return torch.stack([self._kept[key] for key in keys])

    def write(self, image_BNC: Tensor, *, sample: bool = False, cache: bool = True) -> list[str]:
        """Write the reports of projected image tokens: by beam search, or by drawing every word."""
        options = GenerationOptions(self.cfg.clm_max_text_len, self.cfg.clm_num_beams, sample, cache)
        ids = self.clm_head.generate(image_BNC, options)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    # ---------------------------------------------------------------- steps
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One training batch; returns the loss."""
        words = batch["text_masks"][:, 1:].sum()
        loss = global_mean(self._loss(self.image_tokens(batch, "train"), batch) * words, words)
        self._train_means.add("loss", loss, len(batch["index"]))
        self.log("train/loss", loss.detach(), batch_size=len(batch["index"]))
        return {"loss": loss * self.cfg.loss_names["clm"]}

    def _loss(self, image_BNC: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return self.clm_head.loss(image_BNC, batch["text_ids"], batch["text_masks"])

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Loss and reports of a validation batch."""
        self._note(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Loss and reports of a test batch, sampled ones too with ``clm_do_sample``."""
        self._note(batch, "test")

    def _note(self, batch: Mapping[str, Any], phase: str) -> None:
        studies = len(batch["index"])
        if not studies:  # the last batch of a process may be empty, but all of them count the same losses
            self._losses[phase].add("loss", torch.zeros((), device=self.device), 0.0)
            return
        image = self.image_tokens(batch, phase)
        self._losses[phase].add("loss", self._loss(image, batch), studies)
        written = {"hypothesis": self.write(image)}
        if phase == "test" and self.cfg.clm_do_sample:
            written["hypothesis_sampled"] = self.write(image, sample=True)
        for place, reference in enumerate(batch["report"]):
            about = {"id": batch["image_id"][place], "patient": batch["patient_id"][place]}
            texts = {"corpus": batch["corpus"][place], "reference": reference}
            found = {column: texts_of[place] for column, texts_of in written.items()}
            self._rows.append(
                {
                    **about,
                    **texts,
                    **found,
                    "labels": batch["labels"][place].tolist(),
                    "row": int(batch["index"][place]),
                }
            )

    # ---------------------------------------------------------------- epochs
    def _begin(self, phase: str) -> None:
        super()._begin(phase)
        self._losses[phase].reset()

    def _finish(self, phase: str) -> None:
        rows = gather_rows(self._rows)
        self.case_rows, self._rows = [row for row in rows if row["reference"].strip()], []
        self.unread = len(rows) - len(self.case_rows)
        logged = {f"{phase}/loss": self._losses[phase].means().get("loss", 0.0)}
        if self.case_rows:
            texts = ([row[column] for row in self.case_rows] for column in ("reference", "hypothesis"))
            scores = score_captions(*texts, meteor="none").values
            logged |= {f"{phase}/{name}": value for name, value in scores.items() if value is not None}
            logged[f"{phase}/the_metric"] = sum(logged[f"{phase}/{name}"] for name in BLEUS)
        self.log_dict(logged, sync_dist=True)  # equal on all ranks already

    # ---------------------------------------------------------------- optimisation and checkpoints
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer over the published parameter groups (``clm_head`` is a head) and the schedule.

        Raises:
            ConfigError: the number of steps is not known.
        """
        return configured_optimization(self, self.cfg, self.num_training_steps)

    def metadata(self) -> dict[str, Any]:
        """What is needed to use the weights, in plain JSON types."""
        return describe_weights(
            self,
            architecture="ReportWritingModule",
            mg3d_version=__version__,
            input_size_dhw=list(self.cfg.volume_size),
            **self._about_text,
            licence=dict(UNSTATED_LICENCE),
            **self.geometry,
        )
