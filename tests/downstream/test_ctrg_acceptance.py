"""CTRG's acceptance list (downstream 12.8): where every clause is tested, and those that need the published layout."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from folders import config, load_folder

from mg3d.datamodules.report_generation import ReportDataModule
from mg3d.datasets.labels import CHEXBERT_LABELS
from mg3d.finetuning.report_scores import score_reports
from mg3d.models.finetune.report_generation import build_report_module

BENCHMARK = load_folder("CTRG").BENCHMARK
FINDINGS, TRAINING, GENERATOR = (
    "downstream/test_ctrg.py",
    "finetune/test_report_training.py",
    "test_memory_generator.py",
)
CLAUSES = {
    "volumes of 512 x 512 x 50 in the published layout": "test_ctrg_acceptance.py::test_the_published_layout",
    "item (1, 128, 96, 128) in [0, 1]": "test_ctrg_acceptance.py::test_the_published_layout",
    "z flipped once": f"{FINDINGS}::test_nifti_volumes_are_turned_upside_up_once",
    "14 labels, only code 1 is 1": f"{FINDINGS}::test_only_code_1_is_present",
    "tokeniser examples": "test_report_vocabulary.py::test_cleaning_as_measured",
    "threshold monotone": "test_report_vocabulary.py::test_vocabulary_has_frequent_words_in_order",
    "real vocabulary sizes 1043, 447, 223": "test_report_vocabulary.py::test_sizes_on_the_real_training_reports",
    "EOS even when cut": "test_report_vocabulary.py::test_a_cut_report_keeps_its_end_unless_published",
    "decode(encode(x)) = x": "test_report_vocabulary.py::test_decoding_gives_the_cleaned_text_back",
    "features (B, 27, 1152 or 2304)": f"{GENERATOR}::test_feature_widths_of_both_published_encoders",
    "full published sizes": "test_image_tokens.py::test_one_forward_pass_in_the_published_sizes",
    "41 tokens, logits (B, T, V + 1)": f"{GENERATOR}::test_shapes",
    "memory and mask are stored": f"{GENERATOR}::test_memory_and_mask_are_saved_and_used",
    "one beam is greedy": "test_beam_search.py::test_one_beam_is_greedy",
    "no beam below greedy": f"{GENERATOR}::test_beams_never_score_below_greedy_and_every_score_is_that_of_its_words",
    "no trigram twice": "test_beam_search.py::test_no_trigram_twice_when_blocking",
    "losses on and off": f"{TRAINING}::test_the_loss_is_the_sum_of_what_is_on",
    "ranking 0 for equal labels": f"{GENERATOR}::test_ranking_loss_by_hand",
    "two reports, BLEU-4 > 0.9": f"{TRAINING}::test_two_reports_are_learned_by_heart",
    "BLEU 0.749498 to 0.396998, ROUGE-L 0.732840, CIDEr 3.455521": "test_captioning.py::test_the_recorded_three_pairs",
    "CE 0.142857 0.125 0.130952, 0.15 0.12 0.133333": "test_clinical.py::test_the_recorded_arrays",
    "test and selection are disjoint": f"{FINDINGS}::test_clean_splits_share_no_case_and_select_on_training_cases",
    "METEOR null, both references": "test_ctrg_acceptance.py::test_both_protocols_score_both_references",
    "both in metrics.json": "test_ctrg_run.py::test_a_run_leaves_scores_reports_and_the_published_table",
}


@pytest.mark.parametrize("clause", CLAUSES)
def test_every_clause_has_its_test(clause: str, repository: Path) -> None:
    file, _, name = CLAUSES[clause].partition("::")
    (path,) = (each for each in (repository / "tests").rglob("test_*.py") if each.as_posix().endswith(file))
    assert re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.M)


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve volumes of 512 x 512 x 50, the split and the table of codes under their published names."""
    root = tmp_path_factory.mktemp("ctrg_published")
    reports = [
        "The lungs are clear. No effusion.",
        "The heart is large. 1. Nodule of 0.8cm; 2. Effusion.",
        "Emphysema.",
    ]
    rows = []
    for number in range(1, 13):
        volume = np.zeros((512, 512, 50), dtype=np.uint8)
        volume[64:448, 96:416] = np.arange(50, dtype=np.uint8) * 5
        volume[0, 0, 0] = 255
        image = nib.Nifti1Image(volume, np.eye(4))
        nib.save(image, root / f"{number}.nii.gz")
        report = reports[number % 3]
        rows.append({"id": f"{number}.nii.gz", "report": report, "result": "None.", "image_path": f"{number}.nii.gz"})
    lists = {"train": rows[:9], "val": rows[9:], "test": rows[9:]}
    told = {part: [row | {"split": part} for row in chosen] for part, chosen in lists.items()}
    (root / "chest_ctrg_nitfy_ori_split.json").write_text(json.dumps(told), encoding="utf-8")
    with (root / "CTRG_finding_labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", *CHEXBERT_LABELS], *([n, *[0, 1, 2, 3] * 3, 1, 2] for n in range(1, 13))])
    return root


def cfg_of(root: Path, **keys: Any) -> Any:
    quick = {"feature_size": 12, "freeze": "encoder", "cache": "memory", "num_workers": 0, "width": 16, "min_count": 1}
    return config(BENCHMARK, data_root=str(root), meteor="none", bootstrap_rounds=5, **quick, **keys)


def test_the_published_layout(download: Path) -> None:
    cfg = cfg_of(download)
    assert BENCHMARK.check_data(cfg) == []
    chosen, task = BENCHMARK.splits(cfg), BENCHMARK.resolve_task(cfg)
    assert {case.id for case in chosen.test} == {"10", "11", "12"} and len(chosen.train) + len(chosen.val) == 9
    sample = ReportDataModule(cfg, task, chosen).dataset("test")[0]
    assert sample.image.shape == (1, 128, 96, 128) and 0 <= sample.image.min() and sample.image.max() <= 1
    assert sample.image[0, 0].max() > 0.85 > 0.1 > sample.image[0, -1].max()  # stored from head to feet
    assert sample.case.targets == (0, 1, 0, 0) * 3 + (1, 0)
    ids = sample.ids.tolist()
    assert (ids[0], ids[-1]) == (0, 0) and task.vocabulary.decode(ids) == task.vocabulary.clean(task.reports["10"])


@pytest.mark.parametrize("protocol", ["clean", "reference"])
def test_both_protocols_score_both_references(protocol: str, download: Path) -> None:
    """What the protocol chooses: splits, references of the figures without prefix, and whether a cut report ends."""
    cfg = cfg_of(download, protocol=protocol, roi=[32, 32, 32], max_tokens=8)
    chosen, task = BENCHMARK.splits(cfg), BENCHMARK.resolve_task(cfg)
    assert ({case.id for case in chosen.val} == {case.id for case in chosen.test}) == (protocol == "reference")
    longest = max(ReportDataModule(cfg, task, chosen).dataset("train").ids, key=len)
    assert len(longest) == 8 and (longest[-1] == 0) == (protocol == "clean")
    module = build_report_module(cfg, task, 1).eval()
    features = torch.rand(3, 27, module.visual.width)
    cases = chosen.test
    module._note(
        {"features": features, "id": [c.id for c in cases], "patient": [c.patient for c in cases], "tags": [{}] * 3}
    )
    for row in module._rows:
        cut = len(row["reference"].split()) > len(row["reference_published"].split())
        assert cut == (row["id"] != "11")  # whose report is one word
        row["hypothesis"] = row["reference_published"]
    entries, notes = score_reports(module._rows, task, cfg)
    assert entries["reference/bleu_1"]["mean"] == pytest.approx(1.0)
    assert entries["full/bleu_1"]["mean"] < 0.9
    own = "full" if protocol == "clean" else "reference"
    assert entries["bleu_1"] == entries[f"{own}/bleu_1"] and any(f"references: {own}" in note for note in notes)
    assert entries["meteor_java"]["mean"] is None and entries["meteor_nltk"]["mean"] is None
