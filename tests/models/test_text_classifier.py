"""The report labeller: batches, pooling, groups of parameters, saving, and a tiny encoder that learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mg3d.datasets.labelled_reports import split_report
from mg3d.errors import CheckpointError, ConfigError, EnvironmentProblem
from mg3d.models.finetune import text_classifier
from mg3d.models.finetune.text_classifier import ClassifierOptions, ReportLabeller, parameter_groups
from mg3d.phantoms.text_encoder import write_text_encoder

FINDINGS = ("Nodule", "Effusion", "Hernia")
TEXTS = (
    "There is a nodule. No effusion.",
    "Pleural effusion is seen on both sides. The heart is normal.",
    "",
    "Hernia.",
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    write_text_encoder(folder, TEXTS, seed=0)
    return folder


def labeller(encoder: Path, **options: object) -> ReportLabeller:
    torch.manual_seed(0)
    return ReportLabeller.create(
        str(encoder), ClassifierOptions(FINDINGS, **{"max_length": 64, **options}), split_report
    )


@pytest.mark.parametrize("unit", ["report", "sentence"])
@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_a_report_scores_the_same_alone_and_in_a_batch(encoder: Path, unit: str, pooling: str) -> None:
    found = labeller(encoder, unit=unit, pooling=pooling)
    together = found.probabilities(TEXTS)
    alone = np.concatenate([found.probabilities([text], batch_size=1) for text in TEXTS])
    assert together.shape == (4, 3) and ((together > 0) & (together < 1)).all()
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert found.probabilities([]).shape == (0, 3)
    stated = found.label(TEXTS, threshold=0.0)
    assert stated.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 1]]  # an empty report states nothing


def test_small_chunks_change_nothing(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = labeller(encoder, unit="sentence", pooling="mean")
    whole = found.probabilities(TEXTS)
    monkeypatch.setattr(text_classifier, "TOKENS_PER_CHUNK", 1)
    assert len(found.encode(TEXTS).chunks) == 6
    np.testing.assert_allclose(found.probabilities(TEXTS), whole, atol=1e-5)


def test_sentences_are_encoded_once_and_the_clearest_counts(encoder: Path) -> None:
    found = labeller(encoder, unit="sentence", pooling="mean")
    batch = found.encode(["One. Two.", "Two. Three.", ""])
    assert sum(len(ids) for ids, _ in batch.chunks) == 4 and batch.reports == 3
    assert sorted(batch.report.tolist()) == [0, 0, 1, 1, 2]
    single = {text: found.probabilities([text])[0] for text in ("One.", "Two.", "Three.")}
    both = found.probabilities(["One. Two.", "Two. Three."])
    np.testing.assert_allclose(both[0], np.maximum(single["One."], single["Two."]), atol=1e-6)
    np.testing.assert_allclose(both[1], np.maximum(single["Two."], single["Three."]), atol=1e-6)


def test_features_encoded_once_score_like_the_whole(encoder: Path) -> None:
    found = labeller(encoder, unit="sentence", pooling="mean")
    found.network.eval()
    features = found.features(TEXTS)
    assert features.batch.chunks == () and len(features.pooled) == 6
    rows = np.array([3, 0])
    with torch.no_grad():
        logits = found.network.score(*features.take(rows))
    np.testing.assert_allclose(torch.sigmoid(logits), found.probabilities([TEXTS[3], TEXTS[0]]), atol=1e-5)


def test_long_reports_are_cut_only_as_a_whole(encoder: Path) -> None:
    long = "nodule " * 200 + ". effusion."
    assert labeller(encoder).encode([long]).chunks[-1][0].shape[1] == 64
    with pytest.raises(ConfigError, match="192 positions"):
        labeller(encoder, max_length=512)


def test_biases_and_norms_have_no_weight_decay(encoder: Path) -> None:
    network = labeller(encoder, pooling="mean").network
    groups = parameter_groups(network, 1e-3, 0.1)
    optimizer = torch.optim.AdamW(groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    named = {id(parameter): name for name, parameter in network.named_parameters()}
    free = [named[id(parameter)] for parameter in groups[1]["params"]]
    assert all(name.endswith("bias") or "LayerNorm" in name for name in free)
    held = [named[id(parameter)] for parameter in groups[0]["params"]]
    assert not any("LayerNorm" in name or name.endswith("bias") for name in held)
    assert len(free) + len(held) == len(named)
    # a step without gradient moves only what decays
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in held if before[name].abs().sum() > 0}


def test_lower_layers_can_stay(encoder: Path) -> None:
    network = labeller(encoder).network
    network.freeze_lower_layers(1)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen and all("embeddings" in name or "layer.0" in name for name in frozen)
    free = sum(len(group["params"]) for group in parameter_groups(network, 1e-3, 0.1))
    assert free + len(frozen) == len(list(network.parameters()))
    with pytest.raises(ConfigError, match="0 to 2"):
        network.freeze_lower_layers(3)


def test_saved_and_loaded_it_says_the_same(encoder: Path, tmp_path: Path) -> None:
    found = labeller(encoder, unit="sentence", pooling="mean")
    found.save(tmp_path / "best")
    again = ReportLabeller.load(tmp_path / "best", split_report)
    assert again.options == found.options and not again.network.training
    np.testing.assert_array_equal(again.probabilities(TEXTS), found.probabilities(TEXTS))
    with pytest.raises(ConfigError, match="splits reports"):
        ReportLabeller.load(tmp_path / "best")


def test_damaged_folders_are_refused(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks classifier\.json"):
        ReportLabeller.load(tmp_path)
    labeller(encoder).save(tmp_path)
    content = json.loads((tmp_path / "classifier.json").read_text(encoding="utf-8"))
    (tmp_path / "classifier.json").write_text(json.dumps(content | {"findings": ["One"]}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="size mismatch"):
        ReportLabeller.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00")
    with pytest.raises(CheckpointError, match="train the classifier anew"):
        ReportLabeller.load(tmp_path)


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    for wrong in ({"unit": "word"}, {"pooling": "max"}, {"max_length": 2}, {"dropout": 1.0}):
        with pytest.raises(ConfigError):
            ClassifierOptions(FINDINGS, **wrong)
    with pytest.raises(EnvironmentProblem, match="does not exist"):
        ReportLabeller.create(str(tmp_path / "nowhere"), ClassifierOptions(FINDINGS))
