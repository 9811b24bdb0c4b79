"""Vocabulary runs: what is trained in which step, features computed once, arrays after testing, refusals, weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mg3d.datamodules.vocabulary import GroupBatchSampler, VocabularyDataModule
from mg3d.errors import ConfigError, DataError
from mg3d.finetuning.benchmark import Case, Splits, VocabularyTask
from mg3d.finetuning.config import FinetuneConfig, resolve_finetune_config
from mg3d.finetuning.vocabulary_scores import score_vocabulary
from mg3d.models.finetune.case_rows import rows_of_batch
from mg3d.models.finetune.vocabulary_module import PUBLISHED_WARMUP_VOLUMES, VocabularyModule, build_vocabulary_module
from mg3d.models.finetune.weights import load_encoder_weights
from mg3d.phantoms.text_encoder import write_text_encoder

NAMES = ("Cardiomegaly", "Emphysema", "Consolidation")
SIZE = (32, 32, 32)
KNOWN: dict[str, torch.Tensor] = {}


def load(case: Case, cfg: FinetuneConfig) -> np.ndarray:
    rng = np.random.default_rng(int(case.id[1:]))
    image = 0.1 * rng.random(SIZE, dtype=np.float32)
    for place, present in enumerate(case.targets):
        image[8 * place : 8 * place + 8] += 0.8 * present
    return image


def some_cases(first: int, count: int) -> tuple[Case, ...]:
    numbers = range(first, first + count)
    return tuple(
        Case(f"c{n}", f"p{n}", Path("none"), targets=tuple(float(n >> k & 1) for k in range(3))) for n in numbers
    )


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "encoder"
    write_text_encoder(folder, [*NAMES, "not present"], seed=0)
    return folder


@pytest.fixture
def parts() -> Splits:
    return Splits(some_cases(0, 8), some_cases(8, 4), some_cases(16, 8))


@pytest.fixture
def task(text_folder: Path, parts: Splits) -> VocabularyTask:
    cases = (*parts.train, *parts.val, *parts.test)
    reports = {
        case.id: f"{case.id}: " + ", ".join(name for name, t in zip(NAMES, case.targets, strict=True) if t)
        for case in cases
    }
    return VocabularyTask(
        outputs=NAMES, kind="binary", load=load, size_dhw=SIZE, reports=reports, text_encoder=str(text_folder),
        width=32, latent=16, group=2, image_tokens="multi_scale",
    )  # fmt: skip


def cfg_of(**keys: Any) -> FinetuneConfig:
    shared = {"feature_size": 12, "batch_size": 4, "num_workers": 0, "cache": "memory", "learning_rate": 2e-3}
    return resolve_finetune_config({**shared, "max_epoch": 20, "bootstrap_rounds": 20, **keys})


def built(cfg: FinetuneConfig, task: VocabularyTask, parts: Splits) -> tuple[VocabularyModule, VocabularyDataModule]:
    torch.manual_seed(0)
    data, module = VocabularyDataModule(cfg, task, parts), build_vocabulary_module(cfg, task, 40)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    data.features.update(KNOWN)  # the encoder starts alike every time
    if not KNOWN or task.standardise:
        module.cache_features(data, torch.device("cpu"))
        KNOWN.update(data.features)
    return module, data


def fit(module: VocabularyModule, data: VocabularyDataModule, epochs: int) -> None:
    optimizer = module.configure_optimizers()["optimizer"]
    for _ in range(epochs):
        for number, batch in enumerate(data.train_dataloader()):
            optimizer.zero_grad()
            module.training_step(batch, number)["loss"].backward()
            optimizer.step()


def rows_in(module: VocabularyModule, data: VocabularyDataModule, part: str) -> list[dict[str, Any]]:
    with torch.no_grad():
        batches = [
            (batch, module.probabilities(module.image_features(batch))) for batch in data.complete_dataloader(part)
        ]
    return [row for batch, found in batches for row in rows_of_batch(module.task, batch, found)]


def test_volumes_are_read_once_and_their_findings_are_learned(task: VocabularyTask, parts: Splits) -> None:
    module, data = built(cfg_of(max_epoch=30), replace(task, standardise=True, report_loss=1.0), parts)
    assert set(data.features) == {case.id for part in (parts.train, parts.val, parts.test) for case in part}
    data.dataset("train").load = None  # type: ignore[assignment]  # from here on nothing is read
    fit(module, data, 30)
    rows, tuning = rows_in(module, data, "test"), rows_in(module, data, "val")
    arrays = module.compare([row["id"] for row in rows], data.features)
    entries, notes = score_vocabulary(rows, {**arrays, "tuning_rows": tuning}, module.task, module.cfg)
    assert entries["auroc"]["mean"] > 0.9
    assert list(entries["auroc"]["per_class"]) == list(NAMES)
    assert entries["recall@5"]["chance"] == pytest.approx(5 / 8)
    assert arrays["similarity"].shape == (8, 8) and arrays["image_latents"].shape == (8, 16)
    assert {"f1", "f1/own_threshold", "threshold", "map@1", "effective_rank_image_latents"} <= set(entries)
    assert any("validation" in note for note in notes)


def test_the_report_of_a_volume_has_no_part_in_its_latent(task: VocabularyTask, parts: Splits) -> None:
    ids = [case.id for case in parts.test]
    module, data = built(cfg_of(), task, parts)
    other, other_data = built(cfg_of(), replace(task, reports=dict.fromkeys(task.reports, "emphysema")), parts)
    first, second = module.compare(ids, data.features), other.compare(ids, other_data.features)
    np.testing.assert_array_equal(first["image_latents"], second["image_latents"])
    assert not np.allclose(first["similarity"], second["similarity"])


def test_published_steps_take_one_group_of_a_volume_after_the_other(task: VocabularyTask, parts: Splits) -> None:
    cfg = cfg_of(protocol="reference", batch_size=1)
    module, data = built(cfg, task, parts)
    assert data.batches_per_epoch() == 16  # two groups of 8 volumes
    ids = [batch["id"][0] for batch in data.train_dataloader()]
    assert ids[::2] == ids[1::2] and len(set(ids)) == 8
    asked: list[int] = []
    module.prompt_loss = lambda image, pairs, target: asked.append(len(pairs)) or target.sum() * 0.0  # type: ignore
    for number, batch in enumerate(data.train_dataloader()):
        module.training_step(batch, number)
    assert asked == [2, 1] * 8
    sampler = GroupBatchSampler(3, np.arange(4), 1, seed=1)
    assert list(sampler.batches(2, start=4)) == list(sampler.batches(2))[4:]


def test_the_published_warm_up_counts_volumes_and_the_clean_rate_ends(task: VocabularyTask, parts: Splits) -> None:
    module, _ = built(cfg_of(protocol="reference"), task, parts)
    schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert schedule.lr_lambdas[0](2 * 100) == pytest.approx(100 / (PUBLISHED_WARMUP_VOLUMES - 1))
    clean, _ = built(cfg_of(), task, parts)
    schedule = clean.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert schedule.lr_lambdas[0](0) > 0.9 and schedule.lr_lambdas[0](40) == pytest.approx(0.0, abs=1e-9)


def test_unknown_findings_do_not_count(task: VocabularyTask, parts: Splits) -> None:
    module, data = built(cfg_of(), task, parts)
    image = torch.stack([data.features["c1"]])
    pairs = module.prompts(task.templates[0])
    found = module.network.probabilities(image, pairs)
    loss = module.prompt_loss(image, pairs, torch.tensor([[1.0, -1.0, -1.0]]))
    assert loss.item() == pytest.approx((1 - found[0, 0].item()) ** 2, abs=1e-6)
    assert module.prompt_loss(image, pairs, torch.full((1, 3), -1.0)).item() == 0.0


def test_probabilities_are_averaged_over_templates(task: VocabularyTask, parts: Splits) -> None:
    other = ("There is {name}.", "There is no {name}.")
    module, data = built(cfg_of(), replace(task, templates=(*task.templates, other)), parts)
    image = torch.stack(list(data.features.values()))
    singles = [module.network.probabilities(image, module.prompts(each)) for each in module.task.templates]
    torch.testing.assert_close(module.probabilities(image), torch.stack(singles).mean(dim=0).double())


def test_pre_trained_fusion_and_text_encoder_are_taken(task: VocabularyTask, parts: Splits, tmp_path: Path) -> None:
    module, _ = built(cfg_of(), task, parts)
    state = {
        (
            "vision_encoder." + name.removeprefix("visual.encoder.") if name.startswith("visual.encoder.") else name
        ): value
        for name, value in module.network.state_dict().items()
    }
    path = tmp_path / "pretrained.ckpt"
    metadata = {"mg3d_format_version": 1, **module.metadata(), "vision_encoder": module.encoder.metadata()}
    torch.save({"state_dict": state, "mg3d_metadata": metadata}, path)
    torch.manual_seed(5)
    cfg = cfg_of(weights=str(path), feature_size=0)
    fresh = build_vocabulary_module(cfg, replace(task, width=64), 10)
    assert fresh.network.options.width == 32
    report = load_encoder_weights(fresh, cfg, fresh.pretrained_parts)
    assert report.encoder_fraction == 1.0
    for name in ("local_img_cross_multihead_attention.0.query1.weight", "modality_type_embeddings.weight"):
        torch.testing.assert_close(fresh.network.state_dict()[name], module.network.state_dict()[name])
    assert not torch.equal(fresh.network.to_text_latent.weight, module.network.to_text_latent.weight)


@pytest.mark.parametrize(
    ("keys", "options", "said"),
    [
        ({"mode": "linear_probe"}, {}, "objective=classification"),
        ({"cache": "none"}, {"standardise": True}, "cache=memory"),
        ({}, {"trainable": ("everything",)}, "everything"),
        ({}, {"project": False}, "wide"),
    ],
)
def test_what_does_not_fit_is_refused(
    task: VocabularyTask, keys: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        build_vocabulary_module(cfg_of(**keys), replace(task, **options), 10)


def test_a_case_without_a_report_is_named(task: VocabularyTask, parts: Splits) -> None:
    with pytest.raises(DataError, match="c16"):
        VocabularyDataModule(cfg_of(), replace(task, reports={**task.reports, "c16": " "}), parts)
