"""Two processes against one: the same rows and figures, every case once, the same gradient, the same features."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from planted_cases import build, config, data, small_splits, task

from mg3d.finetuning.benchmark import Splits
from mg3d.models.finetune.classification import ClassificationModule, classification_loss
from mg3d.models.finetune.probes import case_features
from mg3d.training.checkpoint_io import to_safe

WORLD = 2


def measured(folder: Path, splits: Splits, batch_size: int) -> dict[str, Any]:
    """Rows, figures, features and the gradient of the first training batch, from this process' share of the cases."""
    what = task(balance="class", class_weights=(3.0,))
    cfg = config(folder, batch_size=batch_size, mode="knn_probe", freeze="none")
    module = build(cfg, what)
    logged: dict[str, float] = {}
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign,assignment]
    loaders = data(cfg, what, splits)
    module.on_validation_epoch_start()
    with torch.no_grad():
        for number, batch in enumerate(loaders.val_dataloader()):
            module.validation_step(batch, number)
    module.on_validation_epoch_end()
    features = case_features(module, loaders, cfg, "val")
    found = {"rows": module.case_rows, "figures": logged, "ids": features.ids, "features": features.values}
    return {**found, "gradient": head_gradient(module, next(iter(loaders.train_dataloader())))}


def head_gradient(module: ClassificationModule, batch: dict[str, Any]) -> torch.Tensor:
    """Gradient of the head as gradient averaging gives it, with one target unknown."""
    target = torch.where(torch.tensor([name.endswith("0") for name in batch["id"]])[:, None], -1.0, batch["target"])
    module.zero_grad()
    classification_loss(module(batch["image"]), target, module.class_weights).backward()
    gradient = next(module.head.parameters()).grad.clone()
    if dist.is_initialized():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradient


def on_rank(rank: int, folder: str, splits: Splits) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    torch.save(to_safe(measured(Path(folder) / "two", splits, 2)), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_rows_the_figures_and_the_gradient_of_one(tmp_path: Path) -> None:
    splits = small_splits(tmp_path / "cases", train=12, held=5)
    mp.spawn(on_rank, args=(str(tmp_path), splits), nprocs=WORLD)
    one = measured(tmp_path / "one", splits, 4)
    assert [row["id"] for row in one["rows"]] == [case.id for case in splits.val]
    for rank in range(WORLD):
        two = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert [row["id"] for row in two["rows"]] == [row["id"] for row in one["rows"]]
        for left, right in zip(two["rows"], one["rows"], strict=True):
            assert left["prob_finding"] == pytest.approx(right["prob_finding"], abs=1e-6)
        assert two["figures"] == pytest.approx(one["figures"], abs=1e-5)
        assert two["ids"] == one["ids"]
        assert torch.allclose(torch.tensor(two["features"]), torch.tensor(one["features"]), atol=1e-5)
        assert torch.allclose(two["gradient"], one["gradient"], atol=1e-6)
