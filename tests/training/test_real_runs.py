"""Runs of the real network on a tiny job: the same twice, traced, and silent about what reports say."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tiny_job import make_job
from tiny_runs import compared, lines, newest

from mg3d.config import ex
from mg3d.config_cli import compose_config
from mg3d.errors import DataError
from mg3d.training import trainer

STEPS = 20
SENTENCE, PATIENT = b"lungs are clear", b"train_3"
WORDS = ["task_pretrain_mg3d", "tiny", "image_size=[64,32,32]", "num_gpus=0", "num_workers=0", "loss_names.itc=1"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_job(tmp_path_factory.mktemp("job"))


def train(log_dir: Path, job: list[str], *words: str) -> Path:
    trainer.run(compose_config(ex, [*WORDS, *job, f"log_dir={log_dir}", *words]))
    return newest(log_dir)


@pytest.mark.slow
def test_one_seed_gives_the_same_twenty_steps_and_another_seed_others(tmp_path: Path, job: list[str]) -> None:
    words = (f"max_steps={STEPS}", "learning_rate=1e-3", "warmup_steps=0")
    one, two, other = (
        lines(train(tmp_path / name, job, *words, f"seed={seed}")) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert sorted(one) == list(range(1, STEPS + 1))
    assert [compared(line) for line in one.values()] == [compared(line) for line in two.values()]
    assert all(one[step]["loss"] != other[step]["loss"] for step in one)


def test_a_run_records_what_it_was_made_of(tmp_path: Path, job: list[str]) -> None:
    run_dir = train(tmp_path, job, "max_steps=1", "seed=5")
    config, made = (
        json.loads((run_dir / f"{name}.json").read_text(encoding="utf-8")) for name in ("config", "environment")
    )
    assert config["seed"] == 5 and config["max_steps"] == 1
    assert made["code"]["commit"] is None or (
        len(made["code"]["commit"]) == 40 and made["code"]["dirty"] in (True, False)
    )
    assert {"torch", "pytorch-lightning", "numpy", "pyarrow"} <= {name.lower() for name in made["packages"]}
    assert made["hardware"]["cpu"] and made["hardware"]["memory_gib"] > 0 and made["world_size"] == 1
    file = made["data"]["clm_ct_rate_train.arrow"]
    assert file["rows"] == 8 and len(file["digest"]) == 64 and len(made["data"]) == 6


def leaked(folder: Path, *secrets: bytes) -> list[str]:
    """Files below a folder that hold one of the texts, in any case."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [path.name for path in files if any(secret in path.read_bytes().lower() for secret in secrets)]


def test_neither_output_nor_run_folder_tells_what_reports_say(
    tmp_path: Path, job: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Pictures, logs, checkpoints, metrics, temporary files; and a message about a row that cannot be read."""
    made: list[Path] = []
    replace = os.replace

    def watched(source: Any, target: Any, **more: Any) -> None:
        if Path(source).exists() and not Path(source).is_dir():
            made.append(Path(source))
        replace(source, target, **more)

    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    monkeypatch.setattr(os, "replace", watched)
    run_dir = train(tmp_path / "result", job, "max_steps=2", "checkpoint_every_n_steps=1")
    output = capfd.readouterr()
    assert leaked(run_dir, SENTENCE, PATIENT) == []
    assert list(elsewhere.iterdir()) == [] and made and all(run_dir in path.parents for path in made)
    data = Path(next(word for word in job if word.startswith("data_root=")).partition("=")[2])
    copy = tmp_path / "arrows"
    copy.mkdir()
    for path in data.iterdir():
        (copy / path.name).write_bytes(path.read_bytes().replace(b"Normal size.", b"normal size."))
    with pytest.raises(DataError, match="checksum") as caught:
        train(tmp_path / "bad", [word for word in job if word[:5] != "data_"], f"data_root={copy}", "max_steps=1")
    told = (str(caught.value) + output.out + output.err + "".join(capfd.readouterr())).lower()
    assert SENTENCE.decode() not in told and "normal size" not in told
