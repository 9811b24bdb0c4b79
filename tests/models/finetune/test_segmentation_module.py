"""Whole-volume inference, predictions in the geometry of the image, scores, and resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from segmentation_cases import AFFINES, task, two_balls, write_case
from torch import Tensor, nn

from mg3d.datamodules.segmentation import SegmentationDataModule
from mg3d.datasets.segmentation import SegmentationDataset, collate_volume
from mg3d.errors import ConfigError
from mg3d.finetuning.benchmark import Case, SegmentationTask, Splits
from mg3d.finetuning.config import FinetuneConfig, resolve_finetune_config
from mg3d.finetuning.predictions import write_label_map
from mg3d.models.finetune.segmentation import SegmentationModule, build_segmentation_module
from mg3d.models.finetune.segmentation_rows import class_means
from mg3d.models.finetune.window_inference import FLIPS, WindowOptions, predict_probabilities

TINY = {"encoder": "unet", "feature_size": 2, "num_workers": 0, "num_gpus": 0}


def config(**keys: Any) -> FinetuneConfig:
    return resolve_finetune_config({**TINY, **keys})


BALLS = task(classes=("ball",), label_map={1: 1, 2: 1})


class Oracle(nn.Module):
    """Logits that give the balls of `ct_of` images windowed to [-1000, 500] back."""

    def forward(self, image: Tensor) -> Tensor:
        above = (image * 1500 - 1000 + 300) / 100
        return torch.cat([-above, above], dim=1)


def oracle(cfg: FinetuneConfig | None = None, **changes: Any) -> SegmentationModule:
    module = build_segmentation_module(cfg or config(), replace(BALLS, **changes), 10).eval()
    module.network = Oracle()
    return module


def whole(case: Case, options: SegmentationTask) -> dict[str, Any]:
    return collate_volume([SegmentationDataset([case], options, config(), train=False)[0]])


def evaluated(module: SegmentationModule, case: Case, folder: Path | None = None) -> list[dict[str, Any]]:
    module.prediction_dir = folder
    with torch.no_grad():
        module.test_step(whole(case, module.task), 0)
    return module._rows[-1]["rows"]


# -------------------------------------------------------------------- geometry
@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("spacing", [None, (2.0, 2.0, 3.5)])
def test_a_prediction_has_the_shape_and_the_affine_of_the_image(
    tmp_path: Path, name: str, spacing: tuple[float, ...] | None
) -> None:
    case = write_case(tmp_path, affine=AFFINES[name])
    rows = evaluated(oracle(spacing_mm=spacing), case, tmp_path / "predictions")
    image, written = nib.load(case.image), nib.load(tmp_path / "predictions" / "case.nii.gz")
    assert written.shape == image.shape and np.array_equal(written.affine, image.affine)
    for field in ("srow_x", "srow_y", "srow_z", "pixdim", "sform_code", "qform_code", "quatern_b", "xyzt_units"):
        assert np.array_equal(written.header[field], image.header[field]), field
    found = np.asarray(written.dataobj)
    truth = np.asarray(nib.load(case.label).dataobj)
    assert found.dtype == np.uint8
    if spacing is None:
        assert np.array_equal(found > 0, truth > 0)
        assert [(row["dice"], row["hd95"]) for row in rows] == [(1.0, 0.0)]
    else:
        assert 0.85 < rows[0]["dice"] < 1
    voxel_ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    assert rows[0]["truth_volume_ml"] == pytest.approx((truth > 0).sum() * voxel_ml)


def test_geometry_that_only_the_quaternion_tells_is_kept(tmp_path: Path) -> None:
    case = write_case(tmp_path, affine=AFFINES["oblique"])
    image = nib.load(case.image)
    image.set_sform(None, code=0)
    image.set_qform(AFFINES["oblique"], code=1)
    path = tmp_path / "q.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), path)
    written = nib.load(write_label_map(tmp_path / "out" / "q.nii.gz", two_balls(image.shape), path))
    assert int(written.header["sform_code"]) == 0 and int(written.header["qform_code"]) == 1
    assert np.array_equal(written.affine, nib.load(path).affine)
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["q.nii.gz"]
    with pytest.raises(ValueError, match="for an image of shape"):
        write_label_map(tmp_path / "out" / "r.nii.gz", two_balls((4, 5, 6)), path)


def test_other_formats_get_the_affine_that_was_read(tmp_path: Path) -> None:
    import SimpleITK

    volume = SimpleITK.GetImageFromArray(two_balls((12, 14, 16)).astype(np.int16))
    volume.SetSpacing((1.5, 1.25, 4.0))
    SimpleITK.WriteImage(volume, str(tmp_path / "scan.mha"))
    written = nib.load(write_label_map(tmp_path / "scan.nii.gz", two_balls((16, 14, 12)), tmp_path / "scan.mha"))
    np.testing.assert_allclose(written.affine, np.diag([-1.5, -1.25, 4.0, 1.0]))


def test_clean_scores_the_stored_labels_and_reference_those_after_the_crop(tmp_path: Path) -> None:
    case = write_case(tmp_path, affine=AFFINES["lps"])
    modules = [oracle(config(protocol=name), spacing_mm=(4.0, 4.0, 6.0)) for name in ("clean", "reference")]
    clean, published = (evaluated(module, case)[0] for module in modules)
    stored = np.asarray(nib.load(case.label).dataobj) > 0
    assert clean["truth_volume_ml"] == pytest.approx(stored.sum() * 1.5 * 1.5 * 3.0 / 1000)
    assert published["truth_volume_ml"] != clean["truth_volume_ml"]
    assert published["dice"] > clean["dice"]  # the grid it was predicted on flatters


# -------------------------------------------------------------------- inference
class Uneven(nn.Module):
    """Three logits that no flip leaves alone."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv3d(1, 3, kernel_size=3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image)


def volume() -> Tensor:
    return torch.rand(1, 1, 20, 18, 14, generator=torch.Generator().manual_seed(0))


OPTIONS = WindowOptions((16, 16, 16), overlap=0.5, blending="gaussian", batch_size=2)


def test_flips_are_the_mean_of_eight_views() -> None:
    net = Uneven()
    with torch.no_grad():
        found = predict_probabilities([net], volume(), replace(OPTIONS, flips=FLIPS))
        views = []
        for axes in ((), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)):
            turned = torch.flip(volume(), axes) if axes else volume()
            probabilities = predict_probabilities([net], turned, OPTIONS)[None]
            views.append(torch.flip(probabilities, axes) if axes else probabilities)
    torch.testing.assert_close(found, torch.stack(views).mean(dim=0)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sum(dim=0), torch.ones(20, 18, 14), rtol=0, atol=1e-5)
    assert not torch.allclose(found, predict_probabilities([net], volume(), OPTIONS), atol=1e-3)


def test_three_equal_networks_are_one_and_others_are_averaged_or_vote() -> None:
    nets = [Uneven(seed) for seed in range(3)]
    with torch.no_grad():
        single = [predict_probabilities([net], volume(), OPTIONS) for net in nets]
        same = predict_probabilities([nets[0]] * 3, volume(), OPTIONS)
        mean = predict_probabilities(nets, volume(), OPTIONS)
        votes = predict_probabilities(nets, volume(), replace(OPTIONS, vote=True))
    torch.testing.assert_close(same, single[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mean, sum(single) / 3, rtol=1e-5, atol=1e-6)
    best = torch.stack([each.argmax(dim=0) for each in single])
    counted = torch.stack([(best == k).sum(dim=0) for k in range(3)]) / 3
    torch.testing.assert_close(votes, counted, rtol=0, atol=1e-6)


def test_an_ensemble_of_equal_checkpoints_predicts_like_one(tmp_path: Path) -> None:
    case = write_case(tmp_path)
    torch.manual_seed(0)
    for protocol in ("clean", "reference"):
        module = build_segmentation_module(config(protocol=protocol), task(), 10).eval()
        files = []
        for name, others in (("one", []), ("three", [module, module])):
            module.ensemble = others
            evaluated(module, case, tmp_path / f"{protocol}_{name}")
            files.append(np.asarray(nib.load(tmp_path / f"{protocol}_{name}" / "case.nii.gz").dataobj))
        assert np.array_equal(*files) and len(np.unique(files[0])) > 1
        module.ensemble = []


def test_windows_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="overlap lies in"):
        WindowOptions((8, 8, 8), overlap=1.0)
    with pytest.raises(ConfigError, match="constant or gaussian"):
        WindowOptions((8, 8, 8), blending="mean")
    with pytest.raises(ValueError, match="at least one network"):
        predict_probabilities([], volume(), OPTIONS)


# -------------------------------------------------------------------- training
def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        **options,
    )


def data_of(tmp_path: Path, cfg: FinetuneConfig) -> SegmentationDataModule:
    cases = [write_case(tmp_path, f"c{k}", seed=k, shape=(24, 22, 18)) for k in range(4)]
    return SegmentationDataModule(cfg, task(roi=(16, 16, 16)), Splits(tuple(cases[:2]), (cases[2],), tuple(cases[2:])))


def test_rows_and_monitor_of_validation_and_test(tmp_path: Path) -> None:
    cfg = config(val_every_epochs=1)
    data = data_of(tmp_path, cfg)
    module = build_segmentation_module(cfg, data.task, 2)
    running = trainer(tmp_path, max_epochs=1)
    running.fit(module, datamodule=data)
    metrics = running.callback_metrics
    rows = module.case_rows
    assert [(row["id"], row["class"]) for row in rows] == [("c2", "soft"), ("c2", "bright")]
    means = class_means(rows, "dice")
    assert float(metrics["val/the_metric"]) == pytest.approx(np.mean(list(means.values())), abs=1e-6)
    assert float(metrics["train/loss_epoch"]) > 0
    module.prediction_dir = tmp_path / "predictions"
    running.test(module, datamodule=data, verbose=False)
    assert [(row["id"], row["class"]) for row in module.case_rows] == [
        (name, kind) for name in ("c2", "c3") for kind in ("soft", "bright")
    ]
    assert {"patient", "dice", "iou", "hd95", "nsd@2", "assd", "volume_ml"} <= set(module.case_rows[0])
    assert sorted(path.name for path in module.prediction_dir.iterdir()) == ["c2.nii.gz", "c3.nii.gz"]


def test_two_and_two_epochs_are_four_bit_for_bit(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> dict[str, Tensor]:
        cfg = config()
        pl.seed_everything(0, verbose=False)
        data = data_of(tmp_path, cfg)
        module = build_segmentation_module(cfg, data.task, 8)
        running = trainer(tmp_path, max_epochs=epochs, limit_val_batches=0)
        running.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
        running.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return {key: value.clone() for key, value in module.state_dict().items()}

    straight = run(4)
    run(2)
    resumed = run(4, tmp_path / "2.ckpt")
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())


def test_a_case_without_structure_leaves_no_dice(tmp_path: Path) -> None:
    case = write_case(tmp_path)
    empty = np.zeros((40, 36, 20), dtype=np.uint8)
    nib.save(nib.Nifti1Image(empty, AFFINES["lps"]), case.label)
    rows = evaluated(oracle(), case)
    assert all(np.isnan(row["dice"]) and row["truth_volume_ml"] == 0 for row in rows)
    assert class_means(rows, "dice") == {}


def test_a_process_without_a_case_adds_nothing() -> None:
    module = oracle()
    module.validation_step(collate_volume([]), 0)
    assert module._rows == []
