from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from arrow_builders import SHAPE_DHW, tokenizer, write_corpus

from mg3d.config_schema import MG3DConfig, resolve_config
from mg3d.datamodules.pretraining import MG3DDataModule
from mg3d.datamodules.stateful_loader import StatefulLoader
from mg3d.errors import DataError

TOKENIZER = tokenizer()
COUNTS = {"train": 9, "val": 5, "test": 4}


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., MG3DConfig]:
    write_corpus(tmp_path, "clm_ct_rate", COUNTS)
    write_corpus(tmp_path, "clm_chest_ctrg", {"train": 3, "val": 1, "test": 2})

    def build(**changes: Any) -> MG3DConfig:
        values = {
            "data_root": str(tmp_path),
            "datasets": ["clm_ct_rate", "clm_chest_ctrg"],
            "image_size": [32, 32, 64],
            "num_workers": 0,
            "per_gpu_batchsize": 2,
            "batch_size": 2,
            "max_epoch": 1,
            "num_gpus": 0,
        }
        return resolve_config(values | changes)

    return build


def rows(source: StatefulLoader) -> list[list[int]]:
    return [batch["index"].tolist() for batch in source]


def as_rank(module: MG3DDataModule, rank: int, world: int) -> MG3DDataModule:
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return module


@pytest.mark.parametrize("name", ["a folder", "Röntgen 肺", 'it\'s "so"', "$HOME;x", "-n", "relative", "~"])
def test_paths_of_every_kind_are_read(
    config: Callable[..., MG3DConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Blanks, letters of any script, quotes, relative places and the home folder; what a shell would expand is not."""
    whole = config()
    place = tmp_path / ("home" if name == "~" else "places") / ("arrows" if name == "~" else name)
    place.mkdir(parents=True)
    for path in tmp_path.glob("*.arrow"):
        path.rename(place / path.name)
    monkeypatch.chdir(place.parent)
    monkeypatch.setenv("HOME", str(place.parent))
    given = {"~": "~/arrows", "relative": "./relative"}.get(name, name)
    data = MG3DDataModule(resolve_config(whole.to_dict() | {"data_root": given}), TOKENIZER)
    assert len(data.dataset("train")) == 12
    assert len(rows(data.val_dataloader())) == 3


def test_batches_of_the_concatenated_corpora(config: Callable[..., MG3DConfig]) -> None:
    data = MG3DDataModule(config(), TOKENIZER)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == data.batches_per_epoch() == 6
    assert sorted(row for b in batches for row in b["index"].tolist()) == list(range(12))
    assert {name for b in batches for name in b["corpus"]} == {"clm_ct_rate", "clm_chest_ctrg"}
    assert batches[0]["image"].shape == (2, 32, 1, 32, 64) and batches[0]["mim_mask"].shape == (2, 2, 2, 4)
    assert rows(data.val_dataloader()) == [[0, 1], [2, 3], [4, 5]]
    assert rows(data.test_dataloader()) == [[0, 1], [2, 3], [4, 5]]
    assert [b["image_id"] for b in data.complete_dataloader("val")][-1] == ["scan_4", "scan_0"]


def test_two_processes_equal_one_with_twice_the_batch(config: Callable[..., MG3DConfig]) -> None:
    one = list(MG3DDataModule(config(per_gpu_batchsize=4, batch_size=4), TOKENIZER).train_dataloader())
    ranks = [list(as_rank(MG3DDataModule(config(), TOKENIZER), rank, 2).train_dataloader()) for rank in (0, 1)]
    assert MG3DDataModule(config(), TOKENIZER).batches_per_epoch(2) == len(one) == len(ranks[0]) == 3
    for whole, *parts in zip(one, *ranks, strict=True):
        for key in ("index", "image", "text_ids_mlm", "mim_mask", "sentence_index"):
            assert torch.equal(whole[key], torch.cat([part[key] for part in parts])), key


def test_evaluation_is_complete_on_every_process(config: Callable[..., MG3DConfig]) -> None:
    data = as_rank(MG3DDataModule(config(), TOKENIZER), 1, 4)
    assert list(chain(*rows(data.complete_dataloader("train")))) == list(range(12))


def test_part_of_the_training_data(config: Callable[..., MG3DConfig]) -> None:
    data = MG3DDataModule(config(data_frac=0.5), TOKENIZER)
    used = {row for batch in rows(data.train_dataloader()) for row in batch}
    assert len(used) == 6 and len(rows(data.val_dataloader())) == 3


def test_cells_come_with_the_batch_only_when_drawn_per_sample(config: Callable[..., MG3DConfig]) -> None:
    for changes in (
        {"mim_mask_mode": "batch_reference"},
        {"loss_names": {"swin_unetr_mim": 0.0, "sen_mlm": 1.0}},
    ):
        assert "mim_mask" not in next(iter(MG3DDataModule(config(**changes), TOKENIZER).train_dataloader()))


def test_reference_cells_are_one_draw_of_the_global_generator(config: Callable[..., MG3DConfig]) -> None:
    data = MG3DDataModule(config(mim_mask_mode="batch_reference"), TOKENIZER)
    np.random.seed(7)
    batch = data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)
    np.random.seed(7)
    kept = np.random.choice(16, 8, replace=False)
    expected = np.ones(16, dtype=bool)
    expected[kept] = False
    assert batch["mim_mask"].shape == (2, 2, 2, 4) and batch["mim_mask"].dtype == torch.bool
    for cells in batch["mim_mask"]:
        np.testing.assert_array_equal(cells.flatten().numpy(), expected)
    other = MG3DDataModule(config(), TOKENIZER)
    drawn = next(iter(other.train_dataloader()))
    assert other.on_before_batch_transfer(drawn, 0)["mim_mask"] is drawn["mim_mask"]


def test_missing_and_damaged_files_are_known_at_setup(config: Callable[..., MG3DConfig], tmp_path: Path) -> None:
    path = tmp_path / "clm_ct_rate_val.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"clm_ct_rate_val\.arrow"):
        MG3DDataModule(config(), TOKENIZER).setup("fit")
    path.unlink()
    with pytest.raises(DataError, match=r"expected clm_ct_rate_val\.arrow"):
        MG3DDataModule(config(), TOKENIZER).setup("fit")
    MG3DDataModule(config(), TOKENIZER).setup("test")


def test_stored_crop_is_taken_as_it_is(config: Callable[..., MG3DConfig]) -> None:
    data = MG3DDataModule(config(), TOKENIZER).dataset("val")
    assert data.datasets[0].table.row(0)["image"].shape == SHAPE_DHW
    assert repr(data).startswith("VolumeReportDataset(clm_ct_rate, 5 studies, input DHW 32x32x64) + ")
