from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from arrow_builders import SHAPE_DHW, tokenizer, volume, write_arrow
from torch import nn

from mg3d.datamodules.sampler import EpochBatchSampler
from mg3d.datamodules.stateful_loader import StatefulLoader, finished_batches
from mg3d.datasets.arrow_table import ArrowTable
from mg3d.datasets.collate import PretrainCollator
from mg3d.datasets.volume_report import VolumeReportDataset
from mg3d.datasets.whole_word_mask import WholeWordMasker
from mg3d.errors import DataError

TOKENIZER = tokenizer()
BATCHES = 5


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write_arrow(tmp_path / "a.arrow", 11)


def loader(path: Path, *, workers: int = 0, batch: int = 2, bad: float = 0.0, seed: int = 0, **options: Any):
    data = VolumeReportDataset(
        ArrowTable([path]),
        corpus="clm_ct_rate",
        tokenizer=TOKENIZER,
        size_dhw=SHAPE_DHW,
        max_text_len=30,
        seed=seed,
        **options,
    )
    sampler = EpochBatchSampler(range(len(data)), batch, seed=seed)
    collate = PretrainCollator(WholeWordMasker(TOKENIZER), mim_window=2)
    return StatefulLoader(data, sampler, collate, num_workers=workers, max_bad_fraction=bad)


def digest(batch: dict[str, Any]) -> tuple:
    """Everything random about a batch."""
    words = batch["text_ids_mlm"].flatten().tolist()
    return (*batch["index"].tolist(), *words, *batch["mim_mask"].flatten().tolist(), float(batch["image"].sum()))


def stream(source: StatefulLoader, epochs: int) -> list[tuple]:
    return [digest(batch) for _ in range(epochs) for batch in source]


def test_epochs_advance_and_workers_change_nothing(packed: Path) -> None:
    plain = stream(loader(packed), 3)
    assert len(plain) == 3 * BATCHES and len(set(plain)) == len(plain)
    assert stream(loader(packed, workers=2), 3) == plain


def test_resume_at_every_batch_continues_the_stream(packed: Path) -> None:
    whole = stream(loader(packed), 2)
    for stop in range(2 * BATCHES + 1):
        first = loader(packed)
        seen, passes = [], 0
        while len(seen) < stop:
            for batch in first:
                seen.append(digest(batch))
                if len(seen) == stop:
                    break
            passes += 1
        state = first.state_dict()
        assert all(type(value) is int for value in state.values())
        second = loader(packed)
        second.load_state_dict(state)
        rest = [digest(batch) for batch in second]
        while len(seen) + len(rest) < len(whole):
            rest += [digest(batch) for batch in second]
        assert seen + rest[: len(whole) - stop] == whole, stop


def test_prefetched_batches_do_not_count(packed: Path) -> None:
    source = loader(packed, workers=2)
    batches = iter(source)
    next(batches)
    assert source.state_dict()["batches_done"] == 1
    source.progress = lambda: 0  # handed out, but its step is not done
    assert source.state_dict()["batches_done"] == 0


def test_global_random_state_is_left_alone(packed: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    stream(loader(packed), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_batch_size_goes_on_at_the_same_study_and_other_data_start_anew(
    packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = loader(packed).state_dict() | {"epoch": 3, "batches_done": 4}
    wider = loader(packed, batch=4)
    with caplog.at_level(logging.WARNING):
        wider.load_state_dict(state)
    assert wider.state_dict()["batches_done"] == 2 and wider.epoch == 3
    assert "global batch size changed" in caplog.text
    other = loader(write_arrow(tmp_path / "b.arrow", 9))
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(state)
    assert other.state_dict()["batches_done"] == 0 and "starts anew" in caplog.text


def damage(path: Path, numbers: list[int]) -> None:
    data = bytearray(path.read_bytes())
    for number in numbers:
        data[data.index(volume(number).tobytes())] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_counted_and_bounded(packed: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    damage(packed, [2, 7])
    with pytest.raises(DataError, match="checksum"):
        stream(loader(packed, workers=workers), 2)
    source = loader(packed, workers=workers, on_bad_sample="skip", bad=0.2)
    batches = [batch for _ in range(2) for batch in source]
    assert set(source.bad_rows) == {2, 7} and "scan_2" in source.bad_rows[2]
    assert caplog.text.count("skipped a study") == 2
    assert not {2, 7} & {row for batch in batches for row in batch["index"].tolist()}
    assert all(len(batch["index"]) == 2 and "bad_samples" not in batch for batch in batches)
    strict = loader(packed, workers=workers, on_bad_sample="skip", bad=0.1)
    with pytest.raises(DataError, match=r"2 of 11 studies cannot be read, more than max_bad_fraction 0\.1"):
        stream(strict, 2)


class Recorder(pl.LightningModule):
    """A model whose training notes what it was fed."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[tuple] = []
        self.stop_at = stop_at

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if self.stop_at is not None and len(self.seen) == self.stop_at:
            raise KeyError("stopped before the step")
        self.seen.append(digest(batch))
        return self.layer(batch["image"].mean().view(1, 1)).sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val_loss", torch.zeros(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Data(pl.LightningDataModule):
    def __init__(self, make: Callable[[], StatefulLoader]) -> None:
        super().__init__()
        self.make = make

    def train_dataloader(self) -> StatefulLoader:
        source = self.make()
        source.progress = finished_batches(self.trainer)
        return source

    def val_dataloader(self) -> StatefulLoader:
        return self.make()


def fit(
    folder: Path, make: Callable[[], StatefulLoader], module: Recorder, resume: Path | None = None, **save: Any
) -> None:
    checkpoint = pl.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}-{step}", **save)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        callbacks=[checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=Data(make), ckpt_path=str(resume) if resume else None, weights_only=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_resumes_from_every_checkpoint(packed: Path, tmp_path: Path, workers: int) -> None:
    def make() -> StatefulLoader:
        return loader(packed, workers=workers)

    whole = Recorder()
    fit(tmp_path / "whole", make, whole, every_n_train_steps=1)
    assert len(whole.seen) == 3 * BATCHES and len(set(whole.seen)) == len(whole.seen)
    assert whole.seen == stream(loader(packed), 3)
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert len(checkpoints) == 3 * BATCHES
    for path in checkpoints if workers == 0 else checkpoints[7:8]:
        step = int(path.stem.split("step=")[1])
        resumed = Recorder()
        fit(tmp_path / "resumed", make, resumed, resume=path)
        assert resumed.seen == whole.seen[step:], path.name


def test_lightning_resumes_from_epoch_and_validation_ends(packed: Path, tmp_path: Path) -> None:
    whole = stream(loader(packed), 3)
    for name, save in (
        ("epoch", {"save_on_train_epoch_end": True}),
        ("validation", {"save_on_train_epoch_end": False}),
    ):
        fit(tmp_path / name, lambda: loader(packed), Recorder(), **save)
        for path in sorted((tmp_path / name).glob("*.ckpt")):
            step = int(path.stem.split("step=")[1])
            resumed = Recorder()
            fit(tmp_path / "resumed", lambda: loader(packed), resumed, resume=path)
            assert resumed.seen == whole[step:], (name, path.name)


def test_a_step_that_failed_is_done_again_after_resume(packed: Path, tmp_path: Path) -> None:
    whole = stream(loader(packed), 3)
    for stop_at in (1, BATCHES, BATCHES + 2):
        broken = Recorder(stop_at=stop_at)
        folder = tmp_path / f"stop{stop_at}"
        with pytest.raises(KeyError, match="stopped"):
            fit(folder, lambda: loader(packed), broken, save_on_exception=True)
        path = max(folder.glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
        resumed = Recorder()
        fit(tmp_path / "resumed", lambda: loader(packed), resumed, resume=path)
        assert resumed.seen == whole[stop_at:], stop_at


def resident_kib(pid: int | str = "self") -> int:
    fields = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in fields if line.startswith(("Private_Clean", "Private_Dirty")))


def test_memory_of_a_worker_does_not_grow(tmp_path: Path) -> None:
    source = loader(write_arrow(tmp_path / "many.arrow", 200, labels=[]), workers=1)
    early = 0
    for number, _ in enumerate(source):
        worker = max(int(pid) for pid in Path("/proc/thread-self/children").read_text(encoding="utf-8").split())
        if number == 30:
            early = resident_kib(worker)
        if number == 90:
            assert resident_kib(worker) - early < 2048
            return
    pytest.fail("the epoch was too short")
