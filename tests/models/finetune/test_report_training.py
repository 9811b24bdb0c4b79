"""Learning to write reports: losses, features computed once, protocols, and reports that are learned by heart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from mg3d.datamodules.report_generation import ReportDataModule
from mg3d.datasets.report_vocabulary import ReportVocabulary, clean_published
from mg3d.errors import ConfigError, DataError
from mg3d.finetuning.benchmark import Case, ReportTask, Splits
from mg3d.finetuning.config import FinetuneConfig, resolve_finetune_config
from mg3d.metrics.captioning import score_captions
from mg3d.models.checkpoint import METADATA_KEY
from mg3d.models.finetune.report_generation import ReportGenerationModule, build_report_module

REPORTS = {
    "a": "The lungs are clear. No pleural effusion is present. The heart is of normal size.",
    "b": "There is a nodule in the left upper lobe. Marked cardiomegaly. Right pleural effusion of moderate size.",
    "c": "Emphysema in both lungs. The heart is of normal size.",
    "d": "The lungs are clear. Marked cardiomegaly is present.",
}
reads: list[str] = []


def load(case: Case, cfg: FinetuneConfig) -> np.ndarray:
    reads.append(case.id)
    if case.id == "broken":
        raise DataError("cut short")
    return np.random.default_rng(ord(case.id)).random((32, 32, 32), dtype=np.float32)


def task(**changes: Any) -> ReportTask:
    given = {
        "reports": REPORTS | {"broken": "Nothing."},
        "vocabulary": ReportVocabulary.build(REPORTS.values(), min_count=1),
        "labels": ("effusion", "cardiomegaly"),
        "size_dhw": (32, 32, 32),
        "load": load,
        "width": 64,
        "max_tokens": 40,
    }
    return ReportTask(**{**given, **changes})


def cases(*names: str) -> tuple[Case, ...]:
    labels = {"a": (0.0, 0.0), "b": (1.0, 1.0), "c": (0.0, 0.0), "d": (0.0, 1.0)}
    return tuple(Case(name, name, Path("none"), targets=labels.get(name, (0.0, 0.0))) for name in names)


def cfg_of(**keys: Any) -> FinetuneConfig:
    shared = {"feature_size": 12, "batch_size": 2, "max_epoch": 2, "num_workers": 0, "learning_rate": 1e-3}
    return resolve_finetune_config({**shared, "freeze": "encoder", "cache": "memory", **keys})


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    plain = {"enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 0}
    return pl.Trainer(**{**quiet, **plain, "use_distributed_sampler": False, "max_epochs": 2, **options})


def learn_by_heart(module: ReportGenerationModule, batch: dict[str, Any], steps: int) -> float:
    """Train on one batch and return BLEU-4 of the reports written for it."""
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()
    module.eval()
    written, _ = module.write(batch)
    references = [clean_published(module.task.reports[case_id]) for case_id in batch["id"]]
    return float(score_captions(references, written, pretokenised=True, meteor="none").values["bleu_4"] or 0.0)


def batch_of(data: ReportDataModule, names: str) -> dict[str, Any]:
    data.features.update({name: torch.from_numpy(_pooled(name)) for name in names})
    return next(iter(data.image_loader("train")))


def _pooled(name: str) -> np.ndarray:
    return np.random.default_rng(ord(name)).standard_normal((27, 288)).astype(np.float32)


def test_two_reports_are_learned_by_heart() -> None:
    torch.manual_seed(0)
    cfg, splits = cfg_of(), Splits(cases("a", "b"), cases("c"), cases("d"))
    module = build_report_module(cfg, task(), 100)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    batch = batch_of(ReportDataModule(cfg, task(), splits), "ab")
    assert learn_by_heart(module, batch, steps=80) > 0.9


@pytest.mark.parametrize(("labels", "ranking"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.1)])
def test_the_loss_is_the_sum_of_what_is_on(labels: float, ranking: float) -> None:
    chosen = task(label_loss=labels, ranking_loss=ranking)
    cfg, splits = cfg_of(), Splits(cases("a", "b"), cases("c"), cases("d"))
    module = build_report_module(cfg, chosen, 100)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    out = module.training_step(batch_of(ReportDataModule(cfg, chosen, splits), "ab"), 0)
    total = out["word_loss"] + labels * out.get("label_loss", 0.0) + ranking * out.get("ranking_loss", 0.0)
    assert out["loss"].item() == pytest.approx(total.item(), abs=1e-5)
    assert ("label_loss" in out, "ranking_loss" in out) == (labels > 0, ranking > 0)


def test_a_frozen_encoder_sees_every_image_once_and_stays_as_it_is(tmp_path: Path) -> None:
    reads.clear()
    cfg, splits = cfg_of(), Splits(cases("a", "b"), cases("c"), cases("d"))
    module = build_report_module(cfg, task(), 2)
    before = {name: value.clone() for name, value in module.visual.state_dict().items() if "encoder" in name}
    data = ReportDataModule(cfg, task(), splits)
    runner = trainer(tmp_path)
    runner.fit(module, datamodule=data)
    assert [row["id"] for row in module.case_rows] == ["c"]
    assert "val/the_metric" in runner.callback_metrics
    runner.test(module, datamodule=data, verbose=False)
    assert sorted(reads) == ["a", "b", "c", "d"]
    assert all(torch.equal(module.visual.state_dict()[name], value) for name, value in before.items())
    row = module.case_rows[0]
    assert (row["id"], row["reference"]) == ("d", clean_published(REPORTS["d"]))
    labelled = {"p_effusion", "p_cardiomegaly"}
    assert set(row) == {"id", "patient", "reference", "reference_published", "hypothesis", "score"} | labelled
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint[METADATA_KEY]["vocabulary"] == list(module.vocabulary.words)
    assert module.state_dict()["visual.deviation"].max() > 1e-3


def test_features_from_the_cache_are_those_of_the_image() -> None:
    cfg, splits = cfg_of(), Splits(cases("a", "b"), cases("c"), cases("d"))
    module = build_report_module(cfg, task(), 2).eval()
    data = ReportDataModule(cfg, task(), splits)
    images = next(iter(data.image_loader("train")))
    module.cache_features(data, torch.device("cpu"))
    kept = next(iter(data.image_loader("train")))
    assert "image" in images and "features" in kept
    for one, other in zip(module._seen(images), module._seen(kept), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_an_encoder_that_is_not_frozen_learns() -> None:
    cfg = cfg_of(freeze="none", cache="none")
    module = build_report_module(cfg, task(), 2)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    data = ReportDataModule(cfg, task(), Splits(cases("a", "b"), cases("c"), cases("d")))
    module.training_step(next(iter(data.train_dataloader())), 0)["loss"].backward()
    without = [name for name, value in module.named_parameters() if value.grad is None and value.requires_grad]
    assert without == []


def test_published_optimisation(tmp_path: Path) -> None:
    cfg = cfg_of(protocol="reference", freeze="none", cache="none", learning_rate=1e-4)
    module = build_report_module(cfg, task(), total_steps=10)
    assert module.visual.norm_kind == "positions_reference"
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["amsgrad"]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-5, 1e-4])
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.8e-4)
    weight = module.generator.scores.weight
    weight.grad = torch.full_like(weight, 100.0)
    module.configure_gradient_clipping(optimizer)
    assert weight.grad.max() == 5.0


def test_published_references_pass_through_the_vocabulary() -> None:
    chosen = task(vocabulary=ReportVocabulary.build(REPORTS.values(), min_count=2), max_tokens=6)
    cfg = cfg_of(protocol="reference")
    data = ReportDataModule(cfg, chosen, Splits(cases("a", "b"), cases("c"), cases("d")))
    module = build_report_module(cfg, chosen, 2).eval()
    assert 0 not in data.dataset("train").ids[0][1:].tolist()  # the end is cut away
    module._note(batch_of(data, "ab"))
    row = module._rows[1]
    assert row["reference"] == clean_published(REPORTS["b"])
    assert len(row["reference_published"].split()) == 5 and "<unk>" in row["reference_published"]


def test_cases_that_cannot_be_read_are_left_out_or_stop_the_run() -> None:
    splits = Splits(cases("a", "broken"), cases("c"), cases("d"))
    data = ReportDataModule(cfg_of(on_bad_sample="skip", max_bad_fraction=1.0), task(), splits)
    assert next(iter(data.image_loader("train")))["id"] == ["a"]
    with pytest.raises(DataError, match="cut short"):
        next(iter(ReportDataModule(cfg_of(on_bad_sample="raise"), task(), splits).image_loader("train")))


def test_what_cannot_be_learned_is_refused() -> None:
    nothing = Splits((), (), ())
    with pytest.raises(DataError, match="no case"):
        ReportDataModule(cfg_of(), task(), nothing).batches_per_epoch(1)
    silent = Splits(cases("e"), (), ())
    with pytest.raises(DataError, match="missing or empty"):
        ReportDataModule(cfg_of(), task(), silent).dataset("train")
    with pytest.raises(DataError, match="2 labels, expected 1"):
        ReportDataModule(cfg_of(), task(labels=("x",)), Splits(cases("a"), (), ())).dataset("train")
    with pytest.raises(ConfigError, match="writes no report"):
        build_report_module(cfg_of(mode="knn_probe"), task(), 2)
    with pytest.raises(ConfigError, match="no vocabulary"):
        build_report_module(cfg_of(), task(vocabulary=None), 2)
