"""Two processes against one: the same rows and figures, every volume evaluated and written once."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from segmentation_cases import task, write_case

from mg3d.datamodules.segmentation import SegmentationDataModule
from mg3d.finetuning.benchmark import Case, Splits
from mg3d.finetuning.config import resolve_finetune_config
from mg3d.models.finetune.segmentation import build_segmentation_module
from mg3d.training.checkpoint_io import to_safe

WORLD = 2


def measured(folder: Path, cases: list[Case]) -> dict[str, Any]:
    """Rows and figures of a validation and a test from this process' share of the cases."""
    cfg = resolve_finetune_config({"encoder": "unet", "feature_size": 2, "num_workers": 0, "num_gpus": 0})
    options = task(roi=(16, 16, 16))
    torch.manual_seed(0)
    module = build_segmentation_module(cfg, options, 1).eval()
    module.prediction_dir = folder / "predictions"
    logged: dict[str, float] = {}
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign,assignment]
    data = SegmentationDataModule(cfg, options, Splits((), tuple(cases), tuple(cases)))
    ranks = {"rank": dist.get_rank(), "world_size": WORLD} if dist.is_initialized() else {"rank": 0, "world_size": 1}
    data._processes = lambda: ranks  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    with torch.no_grad():
        for phase, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader())):
            getattr(module, f"on_{phase}_epoch_start")()
            for number, batch in enumerate(loader):
                getattr(module, f"{phase}_step")(batch, number)
            getattr(module, f"on_{phase}_epoch_end")()
            found[phase] = module.case_rows
    return {**found, "figures": logged}


def on_rank(rank: int, folder: str, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    torch.save(to_safe(measured(Path(folder) / f"two_{rank}", cases)), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_rows_and_figures_of_one(tmp_path: Path) -> None:
    cases = [write_case(tmp_path / "cases", f"c{k}", seed=k, shape=(24, 22, 18)) for k in range(3)]
    mp.spawn(on_rank, args=(str(tmp_path), cases), nprocs=WORLD)
    one = measured(tmp_path / "one", cases)
    assert [row["id"] for row in one["test"]] == ["c0", "c0", "c1", "c1", "c2", "c2"]
    written = [
        sorted(path.name for path in (tmp_path / f"two_{rank}" / "predictions").iterdir()) for rank in range(WORLD)
    ]
    assert sorted(written[0] + written[1]) == ["c0.nii.gz", "c1.nii.gz", "c2.nii.gz"]
    for rank in range(WORLD):
        two = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert two["figures"] == pytest.approx(one["figures"], nan_ok=True)
        for phase in ("validation", "test"):
            assert len(two[phase]) == len(one[phase])
            for left, right in zip(two[phase], one[phase], strict=True):
                assert left == pytest.approx(right, nan_ok=True)
