"""Clinical efficacy: recorded values, scikit-learn, CRG by hand, and label sets without findings."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from mg3d.errors import EnvironmentProblem, RunFailedError
from mg3d.metrics.clinical import CRG_FLOOR, clinical_entries, clinical_scores, crg_score, finding_table, positives
from mg3d.metrics.clinical_radeval import radeval_scores

NAMES = [f"finding {number}" for number in range(14)]


def recorded() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState(0)
    truth = rng.randint(0, 4, (8, 14))
    return truth, rng.randint(0, 4, (8, 14))


def test_the_recorded_arrays() -> None:
    found = clinical_scores(*recorded())
    macro = [found[f"ce_{kind}_macro"] for kind in ("precision", "recall", "f1")]
    micro = [found[f"ce_{kind}_micro"] for kind in ("precision", "recall", "f1")]
    assert macro == pytest.approx([0.142857, 0.125, 0.130952], abs=1e-6)
    assert micro == pytest.approx([0.15, 0.12, 0.133333], abs=1e-6)
    assert found["ce_num_examples"] == 8.0


@pytest.mark.parametrize("average", ["macro", "micro", "samples"])
def test_equal_to_scikit_learn(average: str) -> None:
    rng = np.random.default_rng(3)
    truth, predicted = rng.random((40, 18)) < 0.3, rng.random((40, 18)) < 0.3
    wanted = precision_recall_fscore_support(truth, predicted, average=average, zero_division=0)[:3]
    found = clinical_scores(truth, predicted)
    name = "example" if average == "samples" else average
    assert [found[f"ce_{kind}_{name}"] for kind in ("precision", "recall", "f1")] == pytest.approx(wanted)
    rows = finding_table(truth, predicted, [str(number) for number in range(18)])
    by_class = precision_recall_fscore_support(truth, predicted, average=None, zero_division=0)
    for key, column in zip(("precision", "recall", "f1", "support"), by_class, strict=True):
        assert [row[key] for row in rows] == pytest.approx(column.tolist())


def test_only_code_one_is_a_finding() -> None:
    codes = np.array([[1, 0, 2, 3], [1.0, np.nan, -1, 0]])
    assert positives(codes).tolist() == [[True, False, False, False], [True, False, False, False]]
    with pytest.raises(ValueError, match="filled"):
        positives(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="differ"):
        clinical_scores(np.zeros((2, 3)), np.zeros((2, 4)))


def test_crg_by_hand_and_without_skill() -> None:
    truth = np.array([[1, 0, 0, 0], [1, 1, 0, 0]])  # 3 findings in 8 slots: found and missed weigh 5 / 6
    predicted = np.array([[1, 0, 0, 1], [1, 0, 0, 0]])  # 2 found, 1 missed, 1 false
    best, score = 2.5, 5 / 6 * (2 - 1) - 1
    assert crg_score(truth, predicted) == pytest.approx(best / (2 * best - score))
    assert crg_score(truth, truth) == pytest.approx(1.0)
    assert crg_score(truth, np.zeros_like(truth)) == pytest.approx(CRG_FLOOR)
    assert crg_score(truth, np.ones_like(truth)) == pytest.approx(CRG_FLOOR)
    assert crg_score(truth, 1 - truth) == pytest.approx(0.2)


def test_no_finding_anywhere_is_stated() -> None:
    nothing = np.zeros((5, 14))
    assert crg_score(nothing, nothing) is None
    entries, notes = clinical_entries(nothing, recorded()[1][:5], NAMES, rounds=20)
    assert entries["ce_f1_macro"]["mean"] == 0.0 and entries["crg"]["mean"] is None
    assert entries["crg"]["ci95"] is None and "undefined" in notes[0]
    assert entries["ce_f1_macro_present"]["mean"] is None
    assert crg_score(np.ones((2, 3)), np.ones((2, 3))) is None


def test_entries_have_intervals_a_floor_and_name_absent_findings() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((120, 14)) < 0.3
    truth[:, 6] = False
    predicted = truth ^ (rng.random((120, 14)) < 0.1)
    entries, notes = clinical_entries(truth, predicted, NAMES, rounds=200)
    plain = clinical_scores(truth, predicted)
    for name, entry in entries.items():
        assert entry["n"] == 120 and entry["ci95"][0] < entry["mean"] < entry["ci95"][1], name
        assert name in ("crg", "ce_f1_macro_present") or entry["mean"] == pytest.approx(plain[name])
    assert entries["ce_f1_macro_present"]["mean"] == pytest.approx(plain["ce_f1_macro"] * 14 / 13)
    assert entries["crg"]["floor"] == pytest.approx(1 / 3)
    assert list(entries["ce_f1_macro"]["per_class"]) == NAMES
    assert "finding 6" in notes[0] and "1 findings" in notes[0]
    assert clinical_entries(truth, predicted, NAMES, rounds=200)[0] == entries
    same_patient = clinical_entries(truth, predicted, NAMES, rounds=200, groups=["one"] * 120)[0]
    assert same_patient["ce_f1_micro"]["ci95"] == pytest.approx([plain["ce_f1_micro"]] * 2)


def test_radeval_is_asked_only_when_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "radeval", None)
    with pytest.raises(EnvironmentProblem, match="pip install"):
        radeval_scores(["a"], ["a"])

    class Evaluator:
        def __init__(self, metrics: list[str], show_progress: bool) -> None:
            self.metrics = metrics

        def __call__(self, refs: list[str], hyps: list[str]) -> dict[str, float]:
            if refs != hyps:
                raise RuntimeError("no weights")
            return dict.fromkeys(self.metrics, 1.0)

    monkeypatch.setitem(sys.modules, "radeval", types.SimpleNamespace(RadEval=Evaluator))
    assert radeval_scores(["a"], ["a"]) == {"radeval_f1radbert_ct": 1.0}
    with pytest.raises(RunFailedError, match="no weights"):
        radeval_scores(["a"], ["b"])
