"""Resuming compares what it goes on with: applied and said, refused with both values, or a new optimisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import make_job
from tiny_runs import compared, lines, newest
from tiny_task import TINY_TASK, tiny_config

from mg3d.config_schema import config_defaults
from mg3d.errors import CheckpointError, ConfigError
from mg3d.finetuning.config import finetune_defaults
from mg3d.training import provenance
from mg3d.training.checkpoint_io import save_file
from mg3d.training.continuation import RunRecord, compare
from mg3d.training.resume_rules import APPLIED, DECIDES_SPLIT, DECISIVE, OVERRULED
from mg3d.training.trainer import run

DEFAULTS = config_defaults()
STORED = RunRecord(DEFAULTS | {"max_steps": 10, "loss_names": {"itc": 0.0, "sen_mlm": 1.0}}, {"a": "1"}, 2, 4, 1)


def train(log_dir: Path, **keys: Any) -> Path:
    return Path(run(tiny_config(log_dir=str(log_dir), **keys), TINY_TASK)["run_dir"])


def held_against(record: RunRecord = STORED, world_size: int = 2, **changes: Any) -> Any:
    return compare(Path("last.ckpt"), record, record.config | changes, DEFAULTS, world_size, places=("load_path",))


def test_every_key_stands_in_one_class() -> None:
    keys = {*DEFAULTS, *finetune_defaults()}
    assert keys == APPLIED | OVERRULED.keys() | DECISIVE
    assert len(keys) == len(APPLIED) + len(OVERRULED) + len(DECISIVE) and set(DECIDES_SPLIT) <= keys


@pytest.mark.parametrize(
    ("changes", "key", "new", "old"),
    [
        ({"learning_rate": 1e-3}, "learning_rate", "0.001", "2e-05"),
        ({"weight_decay": 0.5}, "weight_decay", "0.5", "1e-08"),
        ({"batch_size": 8}, "batch_size", "8", "4"),
        ({"optim_type": "sgd"}, "optim_type", "'sgd'", "'adam'"),
        ({"loss_names": {"itc": 1.0, "sen_mlm": 1.0}}, "loss_names.itc", "1.0", "0.0"),
        ({"seed": 1}, "seed", "1", "0"),
        ({"warmup_steps": 7}, "warmup_steps", "7", "10000"),
        ({"vision_encoder_options": {"embed_dim": 12}}, "vision_encoder_options.embed_dim", "12", "None"),
        ({"load_path": "other.ckpt"}, "load_path", "'other.ckpt'", "''"),
        ({"max_steps": 3}, "max_steps", "3", "4"),
        ({"a_later_key": 2}, "a_later_key", "2", "None"),
    ],
)
def test_what_would_mean_nothing_or_break_is_refused_with_both_values(
    changes: dict[str, Any], key: str, new: str, old: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        held_against(**changes).check()
    assert caught.value.exit_code == 2 and f"{key}={new}, in the checkpoint {old}" in caught.value.message
    assert "resume_weights_only=True" in caught.value.remedy and len(str(caught.value).splitlines()) <= 5


def test_a_key_of_a_future_version_is_refused() -> None:
    later = RunRecord(STORED.config | {"invented_later": True}, None, 2)
    with pytest.raises(ConfigError, match="invented_later=None, in the checkpoint True"):
        compare(Path("a"), later, STORED.config, DEFAULTS, 2).check()


def test_many_differences_fit_into_five_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        held_against(seed=1, batch_size=8, hidden_size=8, optim_type="sgd", grad_clip=1.0).check()
    told = str(caught.value)
    assert len(told.splitlines()) == 5 and all(
        key in told for key in ("seed", "hidden_size", "optim_type", "grad_clip")
    )


def test_other_data_and_another_number_of_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="world_size=1, in the checkpoint 2"):
        held_against(world_size=1).check({"a": "1"})
    with pytest.raises(ConfigError, match="data: other content in a"):
        held_against().check({"a": "2"})
    held_against().check({"a": "1"})
    held_against(world_size=1, resume_allow=["world_size", "data"]).check({"a": "2"})


def test_what_is_safe_is_applied_and_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    found = held_against(max_steps=20, num_workers=0, log_dir="elsewhere", exp_name="b", evaluate=True, load_path="")
    found.check({"a": "1"})
    assert found.in_force(STORED.config | {"max_steps": 20})["max_steps"] == 20
    assert len(caplog.records) == 1 and "max_steps=20 (was 10)" in caplog.text and "num_workers=0" in caplog.text


def test_allowed_differences_are_applied_or_said_to_be_unused(caplog: pytest.LogCaptureFixture) -> None:
    found = held_against(grad_clip=1.0, learning_rate=1.0, resume_allow=["grad_clip", "learning_rate"])
    found.check()
    in_force = found.in_force({"grad_clip": 1.0, "learning_rate": 1.0})
    assert in_force == {"grad_clip": 1.0, "learning_rate": 2e-5}
    assert "learning_rate=1.0 is not used, it stays 2e-05" in caplog.text and "grad_clip=1.0 (was 0.0)" in caplog.text
    with pytest.raises(ConfigError, match="learning_rat'"):
        held_against(resume_allow=["learning_rat"])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of eight steps."""
    return train(tmp_path_factory.mktemp("first"), max_steps=8, learning_rate=1e-3)


def test_a_refused_run_records_no_value_that_was_not_used(first: Path, tmp_path: Path) -> None:
    last = first / "checkpoints/last.ckpt"
    with pytest.raises(ConfigError, match=r"learning_rate=0\.5, in the checkpoint 0\.001"):
        train(tmp_path, max_steps=12, learning_rate=0.5, resume_from=str(last))
    left = newest(tmp_path)
    assert json.loads((left / "config.json").read_text(encoding="utf-8"))["learning_rate"] == 1e-3
    status = json.loads((left / "status.json").read_text(encoding="utf-8"))
    assert status["state"] == "failed" and "learning_rate" in status["reason"]
    assert not list((left / "checkpoints").iterdir())


def test_another_number_of_workers_reads_the_same_data(first: Path, tmp_path: Path) -> None:
    whole = lines(train(tmp_path / "whole", max_steps=14, learning_rate=1e-3))
    resumed = lines(
        train(tmp_path, max_steps=14, learning_rate=1e-3, num_workers=2, resume_from=str(first), deterministic=False)
    )
    assert [line["noise"] for line in resumed.values()] == [line["noise"] for line in whole.values()]
    assert [line["epoch"] for line in resumed.values()] == [line["epoch"] for line in whole.values()]


def test_weights_alone_start_a_new_optimisation(first: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "max_steps": 3,
        "learning_rate": 0.5,
        "seed": 3,
        "batch_size": 8,
        "resume_weights_only": True,
    }
    second = train(tmp_path, resume_from=str(first), **keys)
    assert sorted(lines(second)) == [1, 2, 3]
    assert json.loads((second / "config.json").read_text(encoding="utf-8"))["learning_rate"] == 0.5
    again = train(tmp_path / "again", resume_from=str(first), **keys)
    assert [compared(line) for line in lines(again).values()] == [compared(line) for line in lines(second).values()]
    fresh = train(tmp_path / "fresh", **{**keys, "resume_weights_only": False})
    assert lines(fresh)[1]["loss"] != lines(second)[1]["loss"]
    other = tmp_path / "other.ckpt"
    save_file({"state_dict": {"net.0.weight": torch.zeros(2, 2)}}, other)
    with pytest.raises(CheckpointError, match="does not fit"):
        train(tmp_path, resume_from=str(other), **keys)


def test_a_checkpoint_without_a_record_goes_on_and_says_what_is_not_compared(
    first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = torch.load(first / "checkpoints/last.ckpt", weights_only=True)
    del content["mg3d_run"]
    save_file(content, tmp_path / "old.ckpt")
    keys: dict[str, Any] = {"max_steps": 10, "resume_from": str(tmp_path / "old.ckpt")}
    assert max(lines(train(tmp_path / "a", **keys))) == 10
    assert "does not record its config and data" in caplog.text
    content["hyper_parameters"] = {**tiny_config(max_steps=8, learning_rate=1e-3).to_dict_without_places()}
    save_file(content, tmp_path / "old.ckpt")
    with pytest.raises(ConfigError, match=r"learning_rate=2e-05, in the checkpoint 0\.001"):
        train(tmp_path / "b", **keys)
    train(tmp_path / "c", learning_rate=1e-3, **keys)
    assert "does not record its data" in caplog.text


def test_a_run_that_only_tests_does_not_take_a_checkpoint_to_resume(first: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="test_only"):
        train(tmp_path, test_only=True, resume_from=str(first))


def test_data_are_known_by_content_and_not_by_place(tmp_path: Path) -> None:
    def digests(folder: Path, rows: int, tokenizer: str = "") -> dict[str, str]:
        words = dict(word.partition("=")[::2] for word in make_job(folder, rows))
        manifest = provenance.data_manifest(words["data_root"], ["clm_ct_rate"])
        return provenance.content_digests(manifest, ["clm_ct_rate"], tokenizer or words["tokenizer"])

    one = digests(tmp_path / "one", 4)
    assert one == digests(tmp_path / "two", 4)
    more = digests(tmp_path / "three", 5, "org/other")
    assert {name for name in one if one[name] != more[name]} == {"clm_ct_rate_train", "text encoder"}
