"""Segmentation scores: golden tables, two tools' definitions, empty masks, and what must not change them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mg3d.metrics.segmentation import mean_score, metric_names, score_label_maps
from mg3d.metrics.surface import surface_distances, surface_element_areas

Pair = tuple[np.ndarray, np.ndarray, tuple[float, float, float]]


def box(shape: tuple[int, int, int], *limits: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*limit) for limit in limits)] = True
    return mask


def ball(size: int, radius: float, centre: tuple[float, float, float]) -> np.ndarray:
    grid = np.indices((size, size, size)).astype(float)
    return sum((axis - place) ** 2 for axis, place in zip(grid, centre, strict=True)) <= radius**2


@pytest.mark.parametrize(
    ("shift", "spacing", "tolerance", "nsd", "hd95", "dice"),
    [
        (1, (1, 1, 1), 1, 1.0, 1.0, 0.875),
        (2, (1, 1, 1), 1, 0.733435, 2.0, 0.75),
        (3, (1, 1, 1), 1, 0.646626, 3.0, 0.625),
        (2, (1.5, 1.5, 1.5), 2, 0.733435, 3.0, 0.75),
        (2, (1.25, 1.25, 5), 2, 0.623673, 2.5, 0.75),
        (3, (1.25, 1.25, 5), 2, 0.551382, 3.75, 0.625),
    ],
)
def test_the_published_table_of_shifted_boxes(
    shift: int, spacing: tuple[float, float, float], tolerance: float, nsd: float, hd95: float, dice: float
) -> None:
    truth = box((24, 24, 24), (6, 14), (6, 14), (6, 14)).astype(np.uint8)
    scores = score_label_maps(truth, np.roll(truth, shift, axis=0), spacing, {1: "box"}, tolerances_mm=[tolerance])
    assert scores["box"][f"nsd@{tolerance}"] == pytest.approx(nsd, abs=1e-6)
    assert scores["box"]["hd95"] == pytest.approx(hd95)
    assert scores["box"]["dice"] == pytest.approx(dice)


def readers(shared: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    image = nib.load(shared / "data/ct/lidc_0314_chest_2mm_nodule_readers.nii.gz")
    return np.asarray(image.dataobj), tuple(float(size) for size in image.header.get_zooms()[:3])


def lesion(shared: Path) -> Pair:
    import SimpleITK

    image = SimpleITK.ReadImage(str(shared / "data/ct/pyradiomics_lung1_label.nrrd"))
    array = SimpleITK.GetArrayFromImage(image) > 0
    return array, np.roll(array, 3, axis=-1), tuple(image.GetSpacing()[::-1])


SHAPES: dict[str, Callable[[], Pair]] = {
    "balls r8 vs r8 shifted 2 voxels on axis0; 48^3; spacing (2,1,1)": lambda: (
        ball(48, 8, (24, 24, 24)),
        np.roll(ball(48, 8, (24, 24, 24)), 2, axis=0),
        (2, 1, 1),
    ),
    "balls r10 vs r7 concentric; 48^3; spacing (1,1,1)": lambda: (
        ball(48, 10, (24, 24, 24)),
        ball(48, 7, (24, 24, 24)),
        (1, 1, 1),
    ),
    "boxes [10:20,8:18,6:16] vs [12:22,8:18,6:16]; 32^3; spacing (2.5,1,1)": lambda: (
        box((32, 32, 32), (10, 20), (8, 18), (6, 16)),
        box((32, 32, 32), (12, 22), (8, 18), (6, 16)),
        (2.5, 1, 1),
    ),
    "box vs empty prediction; 32^3; spacing 1": lambda: (
        box((32, 32, 32), (10, 20), (8, 18), (6, 16)),
        np.zeros((32, 32, 32), dtype=bool),
        (1, 1, 1),
    ),
    "both empty; 32^3": lambda: (np.zeros((32, 32, 32), bool), np.zeros((32, 32, 32), bool), (1, 1, 1)),
}
REAL: dict[str, Callable[[Path], Pair]] = {
    "lidc_0314_chest_2mm_nodule_readers: gt = value>=2, pred = value==4; file spacing": lambda shared: (
        readers(shared)[0] >= 2,
        readers(shared)[0] == 4,
        readers(shared)[1],
    ),
    "same file: gt = value>=1, pred = value>=3": lambda shared: (
        readers(shared)[0] >= 1,
        readers(shared)[0] >= 3,
        readers(shared)[1],
    ),
    "pyradiomics_lung1_label: gt = label, pred = label rolled +3 on last (x) axis of the (z,y,x) array": lesion,
}


@pytest.mark.parametrize("case", SHAPES)
def test_both_tools_recorded_values(case: str, reference_dir: Path) -> None:
    check_recorded(reference_dir, case, SHAPES[case]())


@pytest.mark.realdata
@pytest.mark.parametrize("case", REAL)
def test_both_tools_recorded_values_of_real_masks(case: str, reference_dir: Path, shared_dir: Path) -> None:
    check_recorded(reference_dir, case, REAL[case](shared_dir))


def check_recorded(reference: Path, case: str, pair: Pair) -> None:
    """Scores of a pair of masks against the two recorded tools."""
    recorded = json.loads((reference / "expected/segmentation_metrics.json").read_text(encoding="utf-8"))
    assert set(recorded) == {*SHAPES, *REAL}
    expected, (truth, pred, spacing) = recorded[case], pair
    assert (truth.sum(), pred.sum()) == (expected["n_gt"], expected["n_pred"])
    deepmind, monai = (surface_distances(truth, pred, spacing, name) for name in ("deepmind", "monai"))
    forth, back = deepmind.average()
    found = {
        "deepmind": {"asd_gt_to_pred": forth, "asd_pred_to_gt": back},
        "monai_1.6.1": {"assd": monai.assd()},
    }
    for name, distances in (("deepmind", deepmind), ("monai_1.6.1", monai)):
        found[name] |= {
            "hd100": distances.hausdorff(100),
            "hd95": distances.hausdorff(95),
            "nsd_1mm": distances.surface_dice(1),
            "nsd_2mm": distances.surface_dice(2),
        }
        for key, value in expected[name].items():
            # six digits are recorded, and MONAI interpolates percentiles in single precision
            assert found[name][key] == pytest.approx(value, abs=4e-6, nan_ok=True), (name, key)
        scores = score_label_maps(truth, pred, spacing, {1: "it"}, definition=name.split("_")[0])["it"]
        assert scores["dice"] == pytest.approx(expected["dice"], abs=1e-6, nan_ok=True)
        assert scores["iou"] == pytest.approx(expected["iou"], abs=1e-6, nan_ok=True)
        assert scores["nsd@2"] == pytest.approx(expected[name]["nsd_2mm"], abs=1e-6, nan_ok=True)


def test_empty_masks_follow_the_stated_policy() -> None:
    full, empty = box((12, 12, 12), (3, 8), (3, 8), (3, 8)).astype(np.uint8), np.zeros((12, 12, 12), np.uint8)
    nothing = score_label_maps(empty, empty, (1, 1, 1), {1: "a"})["a"]
    assert list(nothing) == metric_names() and all(math.isnan(value) for value in nothing.values())
    missed = score_label_maps(full, empty, (1, 1, 1), {1: "a"})["a"]
    assert (missed["dice"], missed["iou"], missed["nsd@1"], missed["nsd@2"]) == (0, 0, 0, 0)
    assert missed["hd95"] == missed["assd"] == math.inf
    invented = score_label_maps(empty, full, (1, 1, 1), {1: "a"})["a"]
    assert math.isnan(invented["dice"]) and math.isnan(invented["iou"]) and invented["nsd@1"] == 0
    assert invented["hd95"] == math.inf


def test_means_leave_out_what_is_undefined_and_say_so() -> None:
    entry = mean_score([0.5, math.nan, 0.7, math.inf], ["a", "b", "c", "d"], rounds=200)
    assert entry["mean"] == pytest.approx(0.6) and entry["n"] == 2
    assert (entry["undefined"], entry["infinite"]) == (1, 1)
    assert 0.5 <= entry["ci95"][0] <= 0.6 <= entry["ci95"][1] <= 0.7
    assert mean_score([math.nan], ["a"])["mean"] is None
    assert mean_score([0.5, 0.7], ["a", "b"], rounds=0)["ci95"] is None
    with pytest.raises(ValueError, match="groups"):
        mean_score([0.5], [])


def test_areas_are_those_of_the_triangles_that_monai_keeps_too() -> None:
    from monai.metrics.utils import create_table_neighbour_code_to_surface_area

    for spacing in ((1.0, 1.0, 1.0), (0.7, 1.3, 5.0), (3.0, 0.5, 1.1)):
        table = create_table_neighbour_code_to_surface_area(spacing)[0].numpy()
        np.testing.assert_allclose(surface_element_areas(spacing), table, rtol=1e-5)


def test_surface_scores_equal_monai_on_random_shapes() -> None:
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(4)
    for spacing in ([1.0, 1.0, 1.0], [0.7, 1.9, 3.0]):
        truth, pred = (gaussian_filter(rng.normal(size=(22, 20, 18)), 2) > 0.02 for _ in range(2))
        one_hot = [torch.tensor(np.stack([~mask, mask])[None].astype(np.float32)) for mask in (pred, truth)]
        ours = surface_distances(truth, pred, spacing, "monai")
        hd95 = compute_hausdorff_distance(*one_hot, percentile=95, spacing=spacing)
        assd = compute_average_surface_distance(*one_hot, symmetric=True, spacing=spacing)
        assert ours.hausdorff(95) == pytest.approx(float(hd95), rel=1e-5)
        assert ours.assd() == pytest.approx(float(assd), rel=1e-5)
        for tolerance in (0.9, 1.6, 3.1):
            nsd = compute_surface_dice(*one_hot, class_thresholds=[tolerance], spacing=spacing)
            assert ours.surface_dice(tolerance) == pytest.approx(float(nsd), abs=1e-6)
            areas = compute_surface_dice(*one_hot, class_thresholds=[tolerance], spacing=spacing, use_subvoxels=True)
            fine = surface_distances(truth, pred, spacing, "deepmind").surface_dice(tolerance)
            assert fine == pytest.approx(float(areas), abs=1e-5)


def test_scores_do_not_depend_on_place_axes_or_empty_space() -> None:
    rng = np.random.default_rng(0)
    truth, pred = (rng.random((9, 8, 7)) > 0.4 for _ in range(2))
    spacing = (0.7, 1.1, 2.5)
    for definition in ("deepmind", "monai"):
        plain = score_label_maps(truth, pred, spacing, {1: "a"}, definition=definition)
        padded = [np.pad(mask, ((3, 40), (0, 5), (11, 0))) for mask in (truth, pred)]
        assert score_label_maps(*padded, spacing, {1: "a"}, definition=definition)["a"] == pytest.approx(plain["a"])
        turned = [mask.transpose(2, 0, 1)[:, ::-1] for mask in (truth, pred)]
        moved = score_label_maps(*turned, (2.5, 0.7, 1.1), {1: "a"}, definition=definition)
        assert moved["a"] == pytest.approx(plain["a"])


@pytest.mark.parametrize("definition", ["deepmind", "monai"])
def test_the_way_to_the_nearest_element_does_not_change_distances(
    definition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    truth, pred = (rng.random((14, 12, 10)) > share for share in (0.97, 0.98))
    found = []
    for share in (0.0, 1e9):
        monkeypatch.setattr("mg3d.metrics.surface.DENSE_SHARE", share)
        found.append(surface_distances(truth, pred, (0.7, 1.3, 2.0), definition))
    np.testing.assert_array_equal(found[0].truth_mm, found[1].truth_mm)
    np.testing.assert_array_equal(found[0].pred_mm, found[1].pred_mm)


def test_a_tolerance_of_one_voxel_includes_a_shift_of_one_voxel() -> None:
    truth = box((30, 10, 10), (17, 25), (2, 8), (2, 8)).astype(np.int16)
    for size in (0.7, 0.1, 0.3, 1.1):
        scores = score_label_maps(truth, np.roll(truth, 1, axis=0), (size, 5, 5), {1: "a"}, tolerances_mm=[size])
        assert scores["a"][f"nsd@{size:g}"] == 1.0


def test_classes_are_scored_apart_and_others_ignored() -> None:
    truth = np.zeros((20, 20, 20), dtype=np.int32)
    truth[2:8, 2:8, 2:8], truth[12:18, 12:18, 12:18], truth[0, 0, 0] = 3, 700, 9
    pred = np.where(truth == 700, 3, truth)
    scores = score_label_maps(truth, pred, (1, 1, 1), {3: "three", 700: "many", 5: "none"})
    assert list(scores) == ["three", "many", "none"]
    assert scores["three"]["dice"] == pytest.approx(2 / 3) and scores["many"]["dice"] == 0
    assert math.isnan(scores["none"]["dice"])
    perfect = score_label_maps(truth, truth, (1, 1, 1), {3: "three"})["three"]
    assert perfect == {"dice": 1, "iou": 1, "hd95": 0, "nsd@1": 1, "nsd@2": 1, "assd": 0}


def test_bad_input_is_refused() -> None:
    mask = np.ones((4, 4, 4), np.uint8)
    with pytest.raises(ValueError, match="shape"):
        score_label_maps(mask, mask[:3], (1, 1, 1), {1: "a"})
    with pytest.raises(ValueError, match="integers"):
        score_label_maps(mask, mask.astype(float), (1, 1, 1), {1: "a"})
    for labels in ({}, {0: "background"}, {1: "a", 2: "a"}):
        with pytest.raises(ValueError, match="labels"):
            score_label_maps(mask, mask, (1, 1, 1), labels)
    with pytest.raises(ValueError, match="definition"):
        score_label_maps(mask, mask, (1, 1, 1), {1: "a"}, definition="itk")
    with pytest.raises(ValueError, match="tolerances"):
        score_label_maps(mask, mask, (1, 1, 1), {1: "a"}, tolerances_mm=[-1])
    for spacing in ((1, 1), (1, 0, 1), (1, math.nan, 1)):
        with pytest.raises(ValueError, match="spacing"):
            score_label_maps(mask, mask, spacing, {1: "a"})
