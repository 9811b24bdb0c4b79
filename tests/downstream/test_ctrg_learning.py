"""The proof that CTRG learns: planted findings of held-out phantoms are written, and not after images were shuffled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from folders import config, load_folder
from torch import Tensor

from mg3d.datamodules.report_generation import ReportDataModule
from mg3d.finetuning.benchmark import Case, ReportTask, Splits
from mg3d.finetuning.config import FinetuneConfig
from mg3d.finetuning.report_scores import finding_table, score_reports
from mg3d.finetuning.splits import permuted_images
from mg3d.metrics.clinical import clinical_scores
from mg3d.models.finetune.report_generation import LABEL_COLUMN, ReportGenerationModule, build_report_module
from mg3d.phantoms.downstream.ctrg import write_ctrg

BENCHMARK = load_folder("CTRG").BENCHMARK
STUDIES = 500
SIZE = 32
# 32 voxels of the phantom's field are 28 x 21 x 28 of the crop: 24 lose little
QUICK = {"roi": [24, 24, 24], "max_epoch": 18, "feature_size": 12, "phantom": True}
QUICK |= {"num_workers": 0, "num_gpus": 0, "meteor": "none", "bootstrap_rounds": 20}
TOLERANCE = 0.05


@dataclass(frozen=True)
class Drawn:
    """Phantoms and what the frozen encoder sees of them.

    Attributes:
        cfg: the phantom config, smaller and shorter.
        task: reports.
        train: four fifths of the studies; nothing is selected, so that the validation cases train as well.
        test: held-out patients.
        features: case id -> patch features.
    """

    cfg: FinetuneConfig
    task: ReportTask
    train: tuple[Case, ...]
    test: tuple[Case, ...]
    features: dict[str, Tensor]


def drawn_studies(root: Path, seed: int) -> Drawn:
    """Draw a download and compute its features."""
    write_ctrg(root, studies=STUDIES, size=SIZE, seed=seed)
    cfg = config(BENCHMARK, **{**BENCHMARK.named_configs["phantom"], **QUICK, "data_root": str(root)})
    parts, task = BENCHMARK.splits(cfg), BENCHMARK.resolve_task(cfg)
    train = (*parts.train, *parts.val)
    data = ReportDataModule(cfg, task, Splits(train, (), parts.test))
    new_module(cfg, task, 1).cache_features(data, torch.device("cpu"))
    return Drawn(cfg, task, train, parts.test, data.features)


def new_module(cfg: FinetuneConfig, task: ReportTask, steps: int) -> ReportGenerationModule:
    torch.manual_seed(cfg.seed)
    return build_report_module(cfg, task, steps)


@dataclass(frozen=True)
class Scores:
    """Micro F1 of the planted findings of held-out patients.

    Attributes:
        written: of the generated reports.
        head: of the label head, at the threshold that suits it best on these very patients.
        constant: of the best constant report.
    """

    written: float
    head: float
    constant: float


def scores_of(drawn: Drawn, train: tuple[Case, ...]) -> Scores:
    """Train on cases, write the reports of the held-out patients."""
    data = ReportDataModule(drawn.cfg, drawn.task, Splits(train, (), drawn.test))
    image_of = {case.image: drawn.features[case.id] for case in (*drawn.train, *drawn.test)}
    data.features.update({case.id: image_of[case.image] for case in (*train, *drawn.test)})
    module = new_module(drawn.cfg, drawn.task, data.batches_per_epoch() * drawn.cfg.max_epoch)
    module.visual.fit(torch.stack([data.features[case.id] for case in train]))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=drawn.cfg.max_epoch,
        gradient_clip_val=drawn.cfg.grad_clip,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    rows = module.case_rows
    entries, _ = score_reports(rows, drawn.task, drawn.cfg)
    truth = finding_table(rows, drawn.task, "reference")
    chances = np.asarray([[row[LABEL_COLUMN.format(name)] for name in drawn.task.finding_names] for row in rows])
    head = max(clinical_scores(truth, (chances > t).astype(int))["ce_f1_micro"] or 0 for t in np.linspace(0, 0.9, 46))
    return Scores(entries["ce_f1_micro"]["mean"], head, entries["constant_report/ce_f1_micro"]["mean"])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return drawn_studies(tmp_path_factory.mktemp("ctrg_learning") / "download", seed=1)


@pytest.mark.slow
def test_planted_findings_of_held_out_patients_are_written(drawn: Drawn) -> None:
    assert len(drawn.train) >= 200
    assert not {case.patient for case in drawn.train} & {case.patient for case in drawn.test}
    scores = scores_of(drawn, drawn.train)
    assert scores.written >= scores.constant + 0.2


@pytest.mark.slow
def test_with_shuffled_images_nothing_is_left_above_the_constant_report(drawn: Drawn) -> None:
    scores = scores_of(drawn, permuted_images(drawn.train, drawn.cfg.seed))
    # the most probable report states next to nothing; a classifier at its best threshold is the constant report
    assert scores.written <= scores.constant + TOLERANCE
    assert abs(scores.head - scores.constant) <= TOLERANCE
