"""Heads and their sizes, losses, independence of the batch, case rows, resuming."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_cases import SIZE, build, config, data, flip_and_shift, small_splits, task, trainer
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.nn import functional

from mg3d.errors import CheckpointError, ConfigError
from mg3d.models.checkpoint import METADATA_KEY
from mg3d.models.finetune.case_rows import case_row, gather_rows, rows_to_arrays
from mg3d.models.finetune.classification import ClassificationModule, classification_loss
from mg3d.models.finetune.figures import figures, monitored
from mg3d.models.vision_encoders.unet import AlwaysBatchNorm3d
from mg3d.training.exact_resume import CatchUp, ExactResume

WIDE = (64, 64, 32)


def parameters(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def three() -> dict[str, Any]:
    return {"kind": "multiclass", "outputs": ("Normal", "CP", "NCP")}


# -------------------------------------------------------------------- sizes
def test_swin_b_with_three_classes_has_the_published_size(tmp_path: Path) -> None:
    module = build(config(tmp_path, feature_size=0), task(head="norm_linear", **three()))
    assert parameters(module) == 8_065_845
    assert parameters(module.encoder) == 8_062_002


@pytest.mark.parametrize(
    ("head", "encoder", "width", "expected"),
    [
        ("linear", "swin_b", 12, 192 + 1),
        ("norm_linear", "swin_b", 12, 2 * 192 + 192 + 1),
        ("mlp_linear", "swin_b", 12, 2 * 768 + 768 + 1),
        ("linear", "unet", 4, 64 * 1024 + 1024 + 1024 + 1),
        ("linear", "unet_pcrlv2", 4, 64 * 1024 + 1024 + 1024 + 1),
        ("norm_linear", "unet", 4, 2 * 64 + 64 + 1),
    ],
)
def test_a_head_has_its_parameters(tmp_path: Path, head: str, encoder: str, width: int, expected: int) -> None:
    module = build(config(tmp_path, encoder=encoder, feature_size=width), task(head=head))
    assert parameters(module.head) == expected


def test_swin_l_projects_its_tokens_only_for_the_mlp_head(tmp_path: Path) -> None:
    with torch.device("meta"):
        plain = build(config(tmp_path, encoder="swin_l", feature_size=0), task(head="linear"))
        projected = build(config(tmp_path, encoder="swin_l", feature_size=0), task(head="mlp_linear"))
    assert parameters(plain.encoder) == 31_593_474
    mlp = (1536 * 768 + 768) + 2 * (768 * 768 + 768)
    assert parameters(projected.encoder) == 31_593_474 + mlp
    assert parameters(plain.head) == 1536 + 1


# -------------------------------------------------------------------- independence of the batch
HEADS = [
    pytest.param("linear", "swin_b", 12, SIZE, id="swin-linear"),
    pytest.param("norm_linear", "swin_b", 12, SIZE, id="swin-norm"),
    pytest.param("mlp_linear", "swin_b", 12, SIZE, id="swin-mlp"),
    pytest.param("linear", "unet", 4, SIZE, id="unet"),
    pytest.param("linear", "nnunet", 4, WIDE, id="nnunet"),
    pytest.param("decoder_gap", "unet", 4, SIZE, id="unet-decoder"),
    pytest.param("decoder_gap", "swin_b", 12, WIDE, id="swin-decoder", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("head", "encoder", "width", "size"), HEADS)
def test_a_prediction_does_not_depend_on_the_batch(
    tmp_path: Path, head: str, encoder: str, width: int, size: tuple[int, int, int]
) -> None:
    module = build(config(tmp_path, encoder=encoder, feature_size=width), task(head=head, size_dhw=size))
    images = torch.rand(3, 1, *size)
    with torch.no_grad():
        module.train()
        module(images)  # running statistics, where there are any, leave their start
        module.eval()
        together = module.probabilities(images)
        alone = torch.cat([module.probabilities(image[None]) for image in images])
        backwards = module.probabilities(images.flip(0)).flip(0)
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.allclose(together, backwards, atol=1e-6)
    assert together.std() > 0


@pytest.mark.parametrize(("head", "encoder", "width"), [("mlp_linear", "swin_b", 12), ("linear", "unet", 4)])
def test_the_reference_keeps_the_published_dependence(tmp_path: Path, head: str, encoder: str, width: int) -> None:
    cfg = config(tmp_path, encoder=encoder, feature_size=width, protocol="reference")
    module = build(cfg, task(head=head)).eval()
    images = torch.rand(3, 1, *SIZE) * torch.tensor([0.1, 0.5, 1.0]).reshape(3, 1, 1, 1, 1)
    with torch.no_grad():
        together = module.probabilities(images)
        alone = torch.cat([module.probabilities(image[None]) for image in images])
    assert not torch.allclose(together, alone, atol=1e-6)
    assert any(isinstance(part, AlwaysBatchNorm3d) for part in module.modules()) == (encoder == "unet")


def test_a_projection_needs_a_swin_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Swin"):
        build(config(tmp_path, encoder="unet", feature_size=4), task(head="mlp_linear"))
    with pytest.raises(ConfigError, match="choose one of"):
        build(config(tmp_path), task(head="no_such_head"))


# -------------------------------------------------------------------- losses
def test_binary_loss_equals_cross_entropy_of_the_probabilities() -> None:
    logits, target = (
        torch.randn(5, 2, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1.0, 0], [0, 1]] * 2 + [[1.0, 1]]),
    )
    expected = functional.binary_cross_entropy(logits.sigmoid(), target)
    assert torch.allclose(classification_loss(logits, target), expected, atol=1e-6)


def test_unknown_targets_do_not_count() -> None:
    logits, target = torch.randn(3, 2), torch.tensor([[1.0, -1.0], [0.0, 1.0], [-1.0, -1.0]])
    expected = functional.binary_cross_entropy_with_logits(
        torch.stack([logits[0, 0], logits[1, 0], logits[1, 1]]), torch.tensor([1.0, 0.0, 1.0])
    )
    assert torch.allclose(classification_loss(logits, target), expected)
    nothing = torch.full((3, 2), -1.0)
    assert classification_loss(logits, nothing) == 0


def test_class_weights_are_those_of_torch() -> None:
    logits, classes, weights = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([1.0, 2.0, 5.0])
    assert torch.allclose(classification_loss(logits, classes), functional.cross_entropy(logits, classes))
    weighted = functional.cross_entropy(logits, classes, weight=weights)
    assert torch.allclose(classification_loss(logits, classes, weights), weighted)
    binary = torch.tensor([[1.0, 0, 1]] * 6)
    positive = functional.binary_cross_entropy_with_logits(logits, binary, pos_weight=weights)
    assert torch.allclose(classification_loss(logits, binary, weights), positive)


def test_class_weights_must_fit_the_outputs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="class_weights"):
        build(config(tmp_path), task(class_weights=(1.0, 2.0)))


# -------------------------------------------------------------------- figures and rows
def test_figures_of_three_classes_by_hand() -> None:
    truth, predicted = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 1, 2, 0])
    found = figures(task(**three()), list("abcdef"), np.eye(3)[predicted], truth[:, None])
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert monitored(task(**three()), found) == found["accuracy"]
    assert monitored(task(monitor="macro_f1", **three()), found) == pytest.approx((0.5 + 0.8 + 2 / 3) / 3)


def test_the_figure_that_chooses_the_epoch() -> None:
    scores, truth = np.array([[0.9], [0.2], [0.7], [0.1]]), np.array([[1], [0], [0], [1]])
    assert monitored(task(), figures(task(), list("abcd"), scores, truth)) == pytest.approx(0.5)
    constant = figures(task(), list("abcd"), np.full((4, 1), 0.3), truth)
    assert constant["auroc"] == 0.5

    def own(ids: list[str], probs: np.ndarray, targets: np.ndarray) -> Mapping[str, float]:
        return {"first": float(probs[0, 0])}

    chosen = task(metrics=own, monitor="first")
    assert monitored(chosen, figures(chosen, list("abcd"), scores, truth)) == 0.9
    with pytest.raises(ConfigError, match="no figure"):
        monitored(task(monitor="beauty"), figures(task(), list("abcd"), scores, truth))


def test_rows_give_back_the_arrays() -> None:
    two = task(outputs=("covid", "severe"))
    rows = [case_row(two, name, "p", {"phase": "x"}, target, probs) for name, target, probs in (
        ("b", (1, -1), (0.25, 0.5)), ("a", (0, 1), (0.75, 1.0)))]  # fmt: skip
    assert rows[0] == {
        "phase": "x", "id": "b", "patient": "p", "target_covid": 1, "target_severe": -1,
        "prob_covid": 0.25, "prob_severe": 0.5,
    }  # fmt: skip
    ids, patients, probabilities, targets = rows_to_arrays(gather_rows([*rows, rows[0]]), two)
    assert ids == ["a", "b"] and patients == ["p", "p"]
    assert targets.tolist() == [[0, 1], [1, -1]]
    assert probabilities.tolist() == [[0.75, 1.0], [0.25, 0.5]]


def test_validation_and_test_leave_a_row_a_case(tmp_path: Path) -> None:
    splits, what = small_splits(tmp_path / "c"), task(kind="multiclass", outputs=("no", "yes"))
    cfg = config(tmp_path)
    module = build(cfg, what)
    runner = trainer()
    runner.test(module, data(cfg, what, splits), verbose=False)
    assert [row["id"] for row in module.case_rows] == sorted(case.id for case in splits.test)
    assert all(row["prob_no"] + row["prob_yes"] == pytest.approx(1.0) for row in module.case_rows)
    assert {row["id"]: row["target"] for row in module.case_rows} == {
        case.id: int(case.targets[0]) for case in splits.test
    }
    assert 0 <= float(runner.callback_metrics["test/the_metric"]) <= 1
    small = dataclasses.replace(cfg, batch_size=1)
    again = build(small, what)
    trainer().test(again, data(small, what, splits), verbose=False)
    for left, right in zip(module.case_rows, again.case_rows, strict=True):
        assert left["prob_no"] == pytest.approx(right["prob_no"], abs=1e-6)


def test_an_ensemble_of_equal_members_is_one_member_and_flips_are_averaged(tmp_path: Path) -> None:
    splits, what, cfg = small_splits(tmp_path / "c", held=2), task(), config(tmp_path)

    def scores(module: ClassificationModule) -> list[float]:
        trainer().test(module, data(module.cfg, what, splits), verbose=False)
        return [row["prob_finding"] for row in module.case_rows]

    alone, crowd = build(cfg, what), build(cfg, what)
    crowd.ensemble = [build(cfg, what), build(cfg, what)]
    single = scores(alone)
    assert scores(crowd) == pytest.approx(single, abs=1e-9)
    flipping = build(dataclasses.replace(cfg, tta=True), what)
    images = torch.stack([data(cfg, what, splits).dataset("test")[row].image for row in range(2)])
    with torch.no_grad():
        mirrored = alone.eval().probabilities(images.flip(4))[:, 0].tolist()
    expected = [(left + right) / 2 for left, right in zip(single, mirrored, strict=True)]
    assert scores(flipping) == pytest.approx(expected, abs=1e-6)


def test_one_class_alone_falls_back_to_the_loss(tmp_path: Path) -> None:
    splits, what, cfg = small_splits(tmp_path / "c"), task(), config(tmp_path)
    splits = dataclasses.replace(splits, val=tuple(case for case in splits.val if case.targets == (1.0,)))
    runner = trainer()
    runner.validate(build(cfg, what), data(cfg, what, splits), verbose=False)
    assert float(runner.callback_metrics["val/the_metric"]) == pytest.approx(
        -float(runner.callback_metrics["val/loss"])
    )
    assert "val/auroc" not in runner.callback_metrics


# -------------------------------------------------------------------- training
@pytest.mark.parametrize("keys", [{"freeze": "encoder"}, {"freeze": "stages_2"}])
def test_frozen_parts_stay_as_they_are(tmp_path: Path, keys: dict[str, Any]) -> None:
    splits, what, cfg = small_splits(tmp_path / "c", train=4, held=2), task(), config(tmp_path, **keys)
    module = build(cfg, what)
    before = {name: value.clone() for name, value in module.named_parameters()}
    trainer(max_steps=1).fit(module, data(cfg, what, splits))
    changed = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert changed and not any(
        name.startswith(("vision_encoder.patch_embed", "vision_encoder.layers1")) for name in changed
    )
    assert any(name.startswith("vision_encoder.layers4") for name in changed) == (keys["freeze"] == "stages_2")


class SaveAt(Callback):
    """A checkpoint right after an optimizer step, in the middle of an epoch."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def run_to(step: int, cfg: Any, splits: Any, checkpoint: Path | None = None, *extra: Callback) -> Any:
    what = task(augment=flip_and_shift, balance="class", monitor="accuracy")
    module = build(cfg, what, steps=5)
    exact = ExactResume()
    runner = trainer(max_steps=step, callbacks=[exact, *extra, CatchUp(exact)])
    runner.fit(module, data(cfg, what, splits), ckpt_path=checkpoint and str(checkpoint), weights_only=True)
    return module, {name: float(value) for name, value in runner.callback_metrics.items()}


def test_resuming_in_the_middle_of_an_epoch_changes_nothing(tmp_path: Path) -> None:
    splits, cfg = small_splits(tmp_path / "c", train=6, held=2), config(tmp_path, weight_decay=0.01, batch_size=2)
    whole, whole_figures = run_to(5, cfg, splits, None, SaveAt(2, tmp_path / "half.ckpt"))  # three batches an epoch
    resumed, resumed_figures = run_to(5, cfg, splits, tmp_path / "half.ckpt")
    for (name, left), right in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    assert whole_figures == resumed_figures
    assert whole.case_rows == resumed.case_rows


def test_a_checkpoint_is_plain_and_describes_itself(tmp_path: Path) -> None:
    splits, cfg = small_splits(tmp_path / "c", train=4, held=2), config(tmp_path)
    run_to(1, cfg, splits, None, SaveAt(1, tmp_path / "one.ckpt"))
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    described = content[METADATA_KEY]
    assert described["vision_encoder"]["embed_dim"] == 12
    assert described["outputs"] == ["finding"] and described["head"] == "linear"
    other = build(dataclasses.replace(cfg, feature_size=24), task())
    with pytest.raises(CheckpointError, match="does not fit"):
        other.on_load_checkpoint(content)
