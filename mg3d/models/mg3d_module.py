"""The LightningModule of pre-training: encode once, run the objectives, weigh and sum their losses, log.

Logged names (spec 10): ``{task}/{phase}/loss`` and the parts of each loss, ``{task}/{phase}/accuracy``, over the epoch
``{task}/{phase}/loss_epoch`` and ``accuracy_epoch``, and ``{phase}/the_metric``. phase is train, val or test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from mg3d import __version__
from mg3d.config_schema import MG3DConfig
from mg3d.errors import ConfigError, MG3DError
from mg3d.models.checkpoint import check_resumable, describe_weights
from mg3d.models.epoch_means import EpochMeans
from mg3d.models.language_encoders import BertTextEncoder, create_text_encoder, encoder_revision
from mg3d.models.network import MG3DNetwork
from mg3d.models.objectives import weighted_total
from mg3d.models.optimization import configured_optimization
from mg3d.models.options import NetworkOptions
from mg3d.models.pictures import draw
from mg3d.models.vision_encoders import VisionEncoder, create_vision_encoder
from mg3d.models.weights_file import METADATA_KEY

EPOCH_SUMS_KEY = "mg3d_epoch_sums"
UNSTATED_LICENCE = {"code": "Apache-2.0", "weights": "not stated", "data": "not stated"}
# As published, a checkpoint is chosen by the accuracy of word prediction and by the loss of everything else.
METRIC_IS_ACCURACY = ("sen_mlm",)


def network_options(cfg: MG3DConfig, vocab_size: int) -> NetworkOptions:
    """Options of the network from the config keys of the same names.

    Args:
        cfg: the checked config.
        vocab_size: V, used when the config leaves it open.
    """
    names = {field.name for field in dataclasses.fields(NetworkOptions)} - {"objectives", "vocab_size"}
    chosen = {name: getattr(cfg, name) for name in names}
    return NetworkOptions(objectives=cfg.active_losses, vocab_size=cfg.vocab_size or vocab_size, **chosen)


def build_encoders(cfg: MG3DConfig) -> tuple[VisionEncoder, BertTextEncoder]:
    """Image and text encoder of a config.

    Raises:
        ConfigError: a width or the vocabulary that the config states is not the encoder's.
    """
    vision = create_vision_encoder(
        cfg.vision_encoder,
        patch_merging=cfg.patch_merging,
        gradient_checkpointing=cfg.gradient_checkpointing,
        **cfg.vision_encoder_options,
    )
    language = create_text_encoder(
        cfg.tokenizer,
        random_init=cfg.text_encoder_random_init,
        drop_rate=cfg.drop_rate,
        frozen=cfg.freeze_text_encoder,
        eval_mode=cfg.text_encoder_eval,
    )
    widths = (
        ("input_image_embed_size", vision.out_channels),
        ("input_text_embed_size", language.embed_dim),
    )
    for key, width in widths:
        if getattr(cfg, key) not in (None, width):
            raise ConfigError(f"{key}={getattr(cfg, key)}, but the encoder's width is {width}", f"write {key}={width}")
    if cfg.vocab_size not in (None, language.vocab_size):
        raise ConfigError(
            f"vocab_size={cfg.vocab_size}, but {cfg.tokenizer} has {language.vocab_size} entries",
            f"write vocab_size={language.vocab_size}, or vocab_size=None to take the text encoder's",
        )
    return vision, language


class MG3DModule(MG3DNetwork, pl.LightningModule):
    """Network, weights of its losses, optimizer and logging; parameter names are those of the network.

    Args:
        cfg: the checked config.
        num_training_steps: optimizer steps of the run; None takes ``cfg.max_steps``.
        geometry: how volumes were prepared (spacing, window, crop) and further facts, stored with the weights.

    Raises:
        ConfigError: keys that do not fit the encoders or each other.
    """

    def __init__(
        self, cfg: MG3DConfig, num_training_steps: int | None = None, geometry: Mapping[str, Any] | None = None
    ) -> None:
        try:
            vision, language = build_encoders(cfg)
            super().__init__(vision, language, network_options(cfg, language.vocab_size))
        except ValueError as error:
            if isinstance(error, MG3DError):
                raise
            raise ConfigError(str(error), "change the keys named above") from error
        self.cfg = cfg
        self.num_training_steps = num_training_steps or cfg.max_steps
        self.geometry = dict(geometry or {})
        self.save_hyperparameters(cfg.to_dict_without_places())
        self._epoch = {phase: EpochMeans() for phase in ("train", "val", "test")}
        self._last_terms: dict[str, Tensor] = {}

    # ---------------------------------------------------------------- steps
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One training batch.

        Returns:
            ``loss`` to minimise, and every logged term, detached.
        """
        total, terms = self._step(batch, "train")
        self.log_dict(terms, on_step=True, on_epoch=False, batch_size=len(batch["image"]))
        return {"loss": total, **terms}

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One validation batch; returns its weighted loss."""
        return self._step(batch, "val")[0]

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One test batch, as in validation."""
        return self._step(batch, "test")[0]

    def _step(self, batch: Mapping[str, Any], phase: str) -> tuple[Tensor, dict[str, Tensor]]:
        found = self(batch)
        total = weighted_total(found, self.cfg.loss_names)
        terms = {f"{phase}/loss": total.detach()}
        for name, out in found.items():
            terms |= self._note(name, out, phase, len(batch["image"]))
        self._last_terms = terms
        return total, terms

    def _note(self, name: str, out: Mapping[str, Tensor], phase: str, rows: int) -> dict[str, Tensor]:
        """Add an objective's scalars to the epoch's means and give them their logged names."""
        loss = out[f"{name}_loss"].detach()
        accuracy, cases = out.get("accuracy", -loss), out.get("accuracy_count", rows)
        self._epoch[phase].add(f"{name}/{phase}/loss", loss, rows)
        self._epoch[phase].add(f"{name}/{phase}/accuracy", accuracy, cases)
        parts = {key: value.detach() for key, value in out.items() if key not in (f"{name}_loss", "accuracy_count")}
        for key in parts.keys() - {"accuracy"}:
            self._epoch[phase].add(f"{name}/{phase}/{key}", parts[key], rows)
        return {f"{name}/{phase}/{key}": value for key, value in {"loss": loss, **parts, "accuracy": accuracy}.items()}

    @property
    def last_step_terms(self) -> dict[str, float]:
        """Terms of the latest batch by logged name (waits for the device)."""
        return {name: float(value) for name, value in self._last_terms.items()}

    # ---------------------------------------------------------------- epochs
    def on_train_epoch_end(self) -> None:
        """Log the means of the training epoch."""
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        """Log the means of the validation, among them ``val/the_metric``."""
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Log the means of the test."""
        self._log_epoch("test")

    def _log_epoch(self, phase: str) -> None:
        means = self._epoch[phase].means()
        self._epoch[phase].reset()
        if not means:
            return
        ends = ("/loss", "/accuracy")
        logged = {f"{name}_epoch": value for name, value in means.items() if name.endswith(ends)}
        if phase != "train":  # in training these names hold the values of single steps
            logged |= means
        logged[f"{phase}/the_metric"] = sum(
            means[f"{name}/{phase}/accuracy"] if name in METRIC_IS_ACCURACY else -means[f"{name}/{phase}/loss"]
            for name in self.options.objectives
        )
        self.log_dict(logged, sync_dist=True)  # equal on all ranks already; the flag keeps Lightning quiet

    # ---------------------------------------------------------------- optimisation
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer over the six parameter groups and the schedule, stepped with every optimizer step.

        Raises:
            ConfigError: the number of steps is not known.
        """
        return configured_optimization(self, self.cfg, self.num_training_steps)

    # ---------------------------------------------------------------- checkpoints
    def metadata(self) -> dict[str, Any]:
        """What is needed to use the weights, in plain JSON types."""
        return describe_weights(
            self,
            architecture="MG3DNetwork",
            mg3d_version=__version__,
            input_size_dhw=list(self.options.volume_size),
            token_grid_dhw=list(self.token_grid),
            text_encoder=self.cfg.tokenizer,
            text_encoder_revision=encoder_revision(self.cfg.tokenizer, self.language_encoder.config),
            text_encoder_config=self.language_encoder.plain_config(),
            objectives=list(self.options.objectives),
            has_shared_space="image_text_itc_head" in self._modules,
            licence=dict(UNSTATED_LICENCE),
            options={key: _plain(value) for key, value in dataclasses.asdict(self.options).items()},
            **self.geometry,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the metadata and the running sums of the epoch."""
        checkpoint[METADATA_KEY] = self.metadata()
        checkpoint[EPOCH_SUMS_KEY] = self._epoch["train"].state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another model, then take the running sums of an interrupted epoch up again."""
        check_resumable(self, checkpoint)
        self._epoch["train"].load_state_dict(checkpoint.get(EPOCH_SUMS_KEY, {}), self.device)

    def visualise(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Pictures of a batch, see :func:`mg3d.models.pictures.draw`."""
        return draw(self, batch)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
