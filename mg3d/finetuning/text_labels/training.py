"""The training loop of the report labeller: plain torch, early stopping on the validation loss."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from mg3d.datasets.labelled_reports import LabelledReports, shuffle_sentences
from mg3d.errors import ConfigError, RunFailedError
from mg3d.finetuning.text_labels.state import Progress, note, restore, store
from mg3d.metrics.clinical import clinical_scores
from mg3d.models.finetune.text_classifier import ReportLabeller, parameter_groups

logger = logging.getLogger(__name__)

BEST, LAST = "best", "last"


@dataclass(frozen=True)
class TrainingOptions:
    """How the labeller is trained; published values are the defaults where not said otherwise.

    Attributes:
        learning_rate: of AdamW.
        weight_decay: of all weights but biases and norms.
        batch_size: reports a step.
        max_epochs: at most (published: 1,000).
        patience: epochs without a lower validation loss before the end (published: 100).
        schedule: ``none``; ``plateau``: a tenth after 25 epochs without progress, at least 2e-6; ``cosine``: linear
            warm-up over a tenth of the steps, then to zero.
        shuffle_share: chance that a training report's sentences are put in random order (published option: 0.5).
        positive_weight: weigh findings by absent / present reports of the training set.
        probe_epochs: first train the linear layer alone, on text vectors that are encoded once (published: 0).
        probe_rate: learning rate of these epochs; the layer needs far larger steps than the encoder.
        freeze_layers: lower transformer layers (and the embeddings) that stay as they are.
        precision: 32, or ``bf16`` mixed precision in training.
        max_minutes: start no further epoch after this time; 0: no limit.
        seed: of weights, order and shuffling.
    """

    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    batch_size: int = 32
    max_epochs: int = 100
    patience: int = 10
    schedule: Literal["none", "plateau", "cosine"] = "none"
    shuffle_share: float = 0.0
    positive_weight: bool = False
    probe_epochs: int = 0
    probe_rate: float = 3e-2
    freeze_layers: int = 0
    precision: Literal["32", "bf16"] = "32"
    max_minutes: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        sound = (
            min(self.learning_rate, self.probe_rate) > 0
            and self.probe_epochs >= 0
            and self.weight_decay >= 0
            and self.batch_size >= 1
            and self.max_epochs >= 0
        )
        if not sound or self.patience < 1 or not 0 <= self.shuffle_share <= 1 or self.max_minutes < 0:
            raise ConfigError(f"unusable options: {asdict(self)}", "see --help for their ranges")
        if self.schedule not in ("none", "plateau", "cosine") or self.precision not in ("32", "bf16"):
            raise ConfigError(
                f"schedule={self.schedule!r}, precision={self.precision!r}",
                "choose none, plateau or cosine, and 32 or bf16",
            )


def fit(
    labeller: ReportLabeller,
    train: LabelledReports,
    val: LabelledReports,
    options: TrainingOptions,
    folder: Path,
    *,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Train; leaves ``best/`` (lowest validation loss), ``last/``, ``metrics.jsonl`` and ``state.ckpt`` in the folder.

    Without an epoch both hold the untrained classifier. The labeller ends with the best weights, in eval mode.

    Args:
        labeller: fresh.
        train: reports with labels.
        val: reports that decide when to stop.
        options: see :class:`TrainingOptions`.
        folder: exists already.
        resume: go on after the last epoch that the folder's state knows.

    Returns:
        One row an epoch: ``epoch``, ``train_loss``, ``val_loss``, ``val_f1_macro``, ``learning_rate``, ``seconds``.

    Raises:
        RunFailedError: the loss is not finite.
        CheckpointError: the state to resume from is damaged.
    """
    torch.manual_seed(options.seed)
    network = labeller.network
    network.freeze_lower_layers(options.freeze_layers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    optimizer = AdamW(parameter_groups(network, options.learning_rate, options.weight_decay))
    loop = _Loop(labeller, options, optimizer, _positive_weight(train.labels, options).to(device))
    scheduler = _scheduler(optimizer, options, math.ceil(len(train) / options.batch_size))
    progress = restore(folder, network, optimizer, scheduler) if resume else None
    if progress is None:
        progress = Progress()
        labeller.save(folder / BEST)
        if options.probe_epochs:
            began = time.monotonic()
            progress.lowest = fit_probe(labeller, train, val, options, folder, loop, progress.probe)
            progress.seconds = time.monotonic() - began
    else:
        logger.info("resumed after %d epochs", progress.epoch)
    while not _finished(progress, options):
        _one_epoch(loop, train, val, scheduler, progress, folder)
        store(folder, progress, network, optimizer, scheduler)
    labeller.save(folder / LAST)
    network.load_state_dict(ReportLabeller.load(folder / BEST, labeller.splitter).network.state_dict())
    network.eval()
    return progress.history


def _finished(progress: Progress, options: TrainingOptions) -> bool:
    late = options.max_minutes and progress.epoch and progress.seconds > 60 * options.max_minutes
    return bool(progress.epoch >= options.max_epochs or progress.stale >= options.patience or late)


def _one_epoch(
    loop: _Loop, train: LabelledReports, val: LabelledReports, scheduler: Any, progress: Progress, folder: Path
) -> None:
    """Train and validate once; the best weights are written before the state that counts them as the best."""
    began = time.monotonic()
    train_loss = loop.epoch(train, progress.epoch, scheduler if isinstance(scheduler, LambdaLR) else None)
    val_loss, f1_macro = loop.validate(val)
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(val_loss)
    better = val_loss < progress.lowest
    progress.lowest, progress.stale = (val_loss, 0) if better else (progress.lowest, progress.stale + 1)
    if better:
        loop.labeller.save(folder / BEST)
    took = time.monotonic() - began
    row = {"epoch": progress.epoch, "train_loss": train_loss, "val_loss": val_loss, "val_f1_macro": f1_macro}
    row |= {"learning_rate": loop.optimizer.param_groups[0]["lr"], "seconds": round(took, 1)}
    progress.history.append(row)
    progress.epoch, progress.seconds = progress.epoch + 1, progress.seconds + took
    note(folder, row)
    logger.info(
        "epoch %d: train loss %.4f, val loss %.4f, val macro F1 %.3f, %.0f s",
        *(row[key] for key in ("epoch", "train_loss", "val_loss", "val_f1_macro", "seconds")),
    )


def fit_probe(
    labeller: ReportLabeller,
    train: LabelledReports,
    val: LabelledReports,
    options: TrainingOptions,
    folder: Path,
    loop: _Loop,
    rows: list[dict[str, Any]],
) -> float:
    """Train the linear layer alone and keep its best epoch (validation loss), in the labeller and in ``best/``.

    Args:
        labeller: whose head is trained.
        train: reports with labels.
        val: reports that choose the epoch.
        options: see :class:`TrainingOptions`.
        folder: the run.
        loop: loss and precision.
        rows: receives a row an epoch.

    Returns:
        that validation loss.
    """
    network = labeller.network.eval()
    with loop.precision():
        known, unknown = labeller.features(train.texts), labeller.features(val.texts)
    optimizer = AdamW(parameter_groups(network.head, options.probe_rate, options.weight_decay))
    lowest, best = math.inf, network.head.state_dict()
    for epoch in range(options.probe_epochs):
        order = np.random.default_rng((options.seed, epoch, 1)).permutation(len(train))
        losses = [
            loop.step(optimizer, network.score(*known.take(rows)), train.labels[rows])
            for rows in np.split(order, range(options.batch_size, len(order), options.batch_size))
        ]
        with torch.no_grad():
            logits = network.score(*unknown.take(np.arange(len(val))))
            val_loss = float(loop.loss(logits, val.labels))
        if val_loss < lowest:
            lowest, best = val_loss, {name: value.clone() for name, value in network.head.state_dict().items()}
        f1_macro = clinical_scores(val.labels, (logits > 0).cpu().numpy())["ce_f1_macro"]
        row = {"probe_epoch": epoch, "train_loss": float(np.mean(losses)), "val_loss": val_loss}
        rows.append(row | {"val_f1_macro": f1_macro})
        note(folder, rows[-1])
    network.head.load_state_dict(best)
    labeller.save(folder / BEST)
    logger.info("linear layer alone: lowest val loss %.4f of %d epochs", lowest, options.probe_epochs)
    return lowest


class _Loop:
    """One epoch of training, one pass of validation."""

    def __init__(
        self, labeller: ReportLabeller, options: TrainingOptions, optimizer: Optimizer, positive_weight: Tensor
    ) -> None:
        self.labeller, self.options, self.optimizer = labeller, options, optimizer
        self.positive_weight = positive_weight

    def epoch(self, train: LabelledReports, epoch: int, scheduler: LambdaLR | None) -> float:
        """Mean training loss of one pass in random order."""
        self.labeller.network.train()
        total = 0.0
        for texts, targets in self._batches(train, epoch):
            total += self.step(self.optimizer, self._forward(texts), targets) * len(texts)
            if scheduler is not None:
                scheduler.step()
        return total / len(train)

    def step(self, optimizer: Optimizer, logits: Tensor, targets: np.ndarray) -> float:
        """One step; returns the loss.

        Raises:
            RunFailedError: it is not finite.
        """
        loss = self.loss(logits, targets)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RunFailedError(f"the loss is {value}", "lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return value

    @torch.no_grad()
    def validate(self, val: LabelledReports) -> tuple[float, float]:
        """Loss and macro F1 at 0.5."""
        probabilities = self.labeller.probabilities(val.texts, self.options.batch_size)
        found = torch.from_numpy(probabilities).double().clamp(1e-7, 1 - 1e-7)
        truth = torch.from_numpy(val.labels).double()
        weight = 1 + truth * (self.positive_weight.cpu().double() - 1)
        loss = -(weight * (truth * found.log() + (1 - truth) * (1 - found).log())).mean()
        return float(loss), clinical_scores(val.labels, probabilities > 0.5)["ce_f1_macro"]

    def _batches(self, train: LabelledReports, epoch: int) -> Iterator[tuple[list[str], np.ndarray]]:
        order = np.random.default_rng((self.options.seed, epoch)).permutation(len(train))
        rng = random.Random(f"{self.options.seed}/{epoch}")
        for start in range(0, len(order), self.options.batch_size):
            rows = order[start : start + self.options.batch_size]
            texts = [train.texts[row] for row in rows]
            share = self.options.shuffle_share
            yield [shuffle_sentences(text, rng) if rng.random() < share else text for text in texts], train.labels[rows]

    def _forward(self, texts: list[str]) -> Tensor:
        with self.precision():
            return self.labeller.network(self.labeller.encode(texts).to(self.positive_weight.device)).float()

    def precision(self) -> torch.autocast:
        """The precision of forward passes in training."""
        return torch.autocast(
            self.positive_weight.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"
        )

    def loss(self, logits: Tensor, targets: np.ndarray) -> Tensor:
        """Binary cross-entropy of logits [B, L] against labels [B, L]."""
        truth = torch.from_numpy(targets).to(logits.device, logits.dtype)
        return binary_cross_entropy_with_logits(logits, truth, pos_weight=self.positive_weight)


def _positive_weight(labels: np.ndarray, options: TrainingOptions) -> Tensor:
    """Weight of present findings [L]; a finding that no training report has keeps 1."""
    present = (labels == 1).sum(axis=0)
    weight = np.where((present > 0) & options.positive_weight, (len(labels) - present) / np.maximum(present, 1), 1.0)
    return torch.from_numpy(np.maximum(weight, 1e-3).astype(np.float32))


def _scheduler(optimizer: Optimizer, options: TrainingOptions, steps: int) -> LambdaLR | ReduceLROnPlateau | None:
    if options.schedule == "plateau":
        return ReduceLROnPlateau(optimizer, factor=0.1, patience=25, min_lr=2e-6)
    if options.schedule == "none":
        return None
    total = max(1, steps * options.max_epochs)
    warm_up = max(1, total // 10)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, total - warm_up))))

    return LambdaLR(optimizer, factor)
