"""The files that CT-CLIP's scripts leave: names, keys, shapes and lines; pools and maps are checked before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import config, load_folder

from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.errors import ConfigError, DataError
from mg3d.finetuning.ct_rate_results import write_ct_rate_results
from mg3d.finetuning.label_tables import write_label_tables
from mg3d.finetuning.pools import read_pools
from mg3d.finetuning.retrieval_tables import write_report_recall, write_shared_findings

BENCHMARK = load_folder("CT-RATE").BENCHMARK
CASES = 12
SCORES = np.array([[0.9, 0.2, 0.1, 0.3], [0.8, 0.7, 0.1, 0], [0.1, 0.2, 0.3, 0.4], [0, 0.1, 0.2, 0.9]])
LABELS = np.array([[1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]])
LATENTS = np.array([(1, 0, 0), (0.9, 0.1, 0), (0, 1, 0), (0, 0, 1), (0.6, 0.6, 0)])


def test_labels_and_probabilities(tmp_path: Path) -> None:
    rows = [
        {"id": f"valid_{n}_a_1", **{f"{part}_{name}": n % 2 for name in ("A", "B") for part in ("target", "prob")}}
        for n in range(4)
    ]
    for row in rows:
        row |= {"target_C": 0, "prob_C": 0.5, "target_D": int(row["prob_A"]), "prob_D": float("nan")}
    write_label_tables(tmp_path / "results", rows, ("A", "B", "C", "D"))
    labels, found = (np.load(tmp_path / f"results/{name}_weights.npz")["data"] for name in ("labels", "predicted"))
    assert labels.shape == found.shape == (4, 4) and found[:, :2].tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]
    assert (tmp_path / "results/accessions.txt").read_text(encoding="utf-8").split()[0] == "valid_0_a_1.nii.gz"
    lines = (tmp_path / "results/aurocs.csv").read_text(encoding="utf-8").splitlines()
    assert lines == ["A_auc,B_auc,C_auc,D_auc", "1.0,1.0,,"]  # undefined ones are empty


def test_report_recall_is_a_line_a_file(tmp_path: Path) -> None:
    paths = write_report_recall(tmp_path, SCORES, (1, 2, 4, 5))
    assert [path.name for path in paths] == ["internal_accessions_t2i_1.txt", "internal_accessions_t2i_2.txt"]
    first, second = (path.read_text(encoding="utf-8") for path in paths)
    assert first.startswith("K=1, clip = 0.500000, rand= ") and second.startswith("K=2, clip = 1.000000, rand= ")
    large = np.eye(400)
    (path,) = write_report_recall(tmp_path, large, (50,))
    share = float(path.read_text(encoding="utf-8").split("rand= ")[1])
    assert 50 / 400 - 0.06 < share < 50 / 400 + 0.06


def test_shared_findings_are_a_number_a_line(tmp_path: Path) -> None:
    path = tmp_path / "i2i_real.txt"
    assert write_shared_findings(path, LATENTS, LABELS, (1, 2, 3), protocol="clean")
    assert path.read_text(encoding="utf-8").split() == ["0.416667", "0.416667", "0.305556"]
    assert write_shared_findings(path, LATENTS, LABELS, (1, 2, 3), protocol="reference")
    assert path.read_text(encoding="utf-8").split() == ["0.800000", "0.566667", "0.488889"]
    assert not write_shared_findings(tmp_path / "none.txt", LATENTS, LABELS * 0, (1,), protocol="clean")
    assert not (tmp_path / "none.txt").exists()


def test_every_published_file_is_in_results(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(CASES):
        truth = {f"target_{name}": int(rng.random() < 0.4) for name in CT_RATE_LABELS}
        found = {f"prob_{name}": rng.random() for name in CT_RATE_LABELS}
        rows.append({"id": f"valid_{number}_a_1", "patient": f"valid_{number}", **truth, **found})
    (tmp_path / "predictions").mkdir()
    for name in ("image_latents", "text_latents"):
        np.savez(tmp_path / "predictions" / f"{name}.npz", data=rng.normal(size=(CASES, 1, 8)))
    np.savez(tmp_path / "predictions/report_to_volume.npz", data=rng.random((CASES, CASES)))
    write_ct_rate_results(config(BENCHMARK), tmp_path, rows, CT_RATE_LABELS)
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "labels_weights.npz",
        "predicted_weights.npz",
        "text_latents.npz",
        "image_latents.npz",
        "accessions.txt",
        "aurocs.csv",
        "internal_accessions_t2i_5.txt",
        "internal_accessions_t2i_10.txt",
        "i2i_real.txt",
    }
    with np.load(tmp_path / "results/image_latents.npz") as stored:
        assert stored.files == ["data"] and stored["data"].shape == (CASES, 1, 8)
    assert len((tmp_path / "results/i2i_real.txt").read_text(encoding="utf-8").split()) == 4
    assert not (tmp_path / "maps").exists()  # too few volumes


def test_pools_are_checked_before_training(tmp_path: Path) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text("dataset/valid/valid_1_a_1.nii.gz,rotated\nvalid_2_a_1\n\n", encoding="utf-8")
    assert read_pools(["volumes", "corrected"], str(path)) == {"valid_1_a_1", "valid_2_a_1"}
    assert read_pools(["volumes", "studies", "unique_reports"], "") == frozenset()
    with pytest.raises(ConfigError, match="excluded="):
        read_pools(["corrected"], "")
    with pytest.raises(ConfigError, match="corrected"):
        read_pools(["everything"], "")
    path.write_text("\n", encoding="utf-8")
    for place in (path, tmp_path / "none.txt"):
        with pytest.raises(DataError, match="excluded="):
            read_pools(["corrected"], str(place))
