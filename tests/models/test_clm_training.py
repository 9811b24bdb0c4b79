"""Writing reports through the trainer: overfitting, resuming, first weights, what a run leaves, and refusals."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from clm_job import WORDS, read_json, step_losses, write_job, writing_config
from kept_checkpoints import assert_same, final_state, keep_every_checkpoint

from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.errors import CheckpointError, ConfigError, DataError
from mg3d.metrics.captioning import score_captions
from mg3d.models.clm.weights import initialise
from mg3d.models.language_encoders import create_text_encoder
from mg3d.models.mg3d_module import MG3DModule
from mg3d.models.weights_file import save_weights
from mg3d.training import report_task, trainer


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clm job")
    write_job(folder)
    return folder


def made(job: Path, *words: str) -> Any:
    """A new report-writing module with its first weights, and the report on them."""
    torch.manual_seed(0)
    cfg = writing_config(job, job, *words)
    module = report_task.module(cfg, 4)
    return module, initialise(module)


@pytest.fixture(scope="module")
def short_run(job: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two epochs of two steps, with evaluation on the test split."""
    return trainer.run(
        writing_config(
            job,
            tmp_path_factory.mktemp("short"),
            "max_steps=4",
            "evaluate=True",
            "learning_rate=1e-3",
            "clm_standardise=3",
        )
    )


def test_a_run_leaves_reports_figures_and_tables(short_run: dict[str, Any]) -> None:
    run_dir = Path(short_run["run_dir"])
    with (run_dir / "per_case.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {"id", "patient", "corpus", "reference", "hypothesis", "hypothesis_sampled", "findings", "stated"}
    assert [row["id"] for row in rows] == [f"test_{place}" for place in range(4)] and columns <= set(rows[0])
    published = read_json(run_dir / "generated.json")
    assert [row["prediction"] for row in published] == [row["hypothesis"] for row in rows]
    assert {"filename", "prediction", "ground_truth", "sampled"} == set(published[0])
    metrics = read_json(run_dir / "metrics.json")
    wanted = {"bleu_4", "rouge_l", "cider", "ce_f1_micro", "ce_f1_macro", "sampled/bleu_4", "sampled/ce_f1_micro"}
    wanted |= {"label_to_report/bleu_4", "label_to_report/classifier_f1_micro", "constant_report/ce_f1_micro"}
    assert wanted <= set(metrics) and metrics["bleu_1"]["n"] == 4 and metrics["weights"].startswith("best-")
    bleus = sum(metrics[f"val/bleu_{order}"]["mean"] for order in range(1, 5))
    assert metrics["val/the_metric"]["mean"] == pytest.approx(bleus, rel=1e-5)
    assert metrics["reader/ce_f1_micro"]["mean"] == 1.0, "phantom reports name what was drawn"
    table = (run_dir / "evaluation.txt").read_text(encoding="utf-8")
    assert "beam search" in table and "sampled" in table and "constant_report" in table
    assert "gallery.html" in {path.name for path in run_dir.iterdir()}
    report = read_json(run_dir / "weights_report.json")["decoder"]
    assert report["from"].endswith("text") and all("crossattention" in name for name in report["new"][:-1])


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["max_steps=5", "max_epoch=3 max_steps=None"])
def test_a_run_with_a_published_name_can_be_resumed_exactly(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    words = [
        "learning_rate=1e-3",
        "end_lr=1e-3",
        "drop_rate=0.1",
        "clm_num_beams=1",
        "clm_standardise=3",
        "per_gpu_batchsize=2",
    ]
    words += ["exp_name=task_finetune_clm", "evaluate=True", "checkpoint_every_n_steps=1", *limit.split()]
    with monkeypatch.context() as patch:
        keep_every_checkpoint(patch, tmp_path / "kept")
        straight = Path(trainer.run(writing_config(job, tmp_path / "a", *words))["run_dir"])
    written, losses = read_json(straight / "generated.json"), step_losses(straight)
    whole = sorted((tmp_path / "kept").glob("*-last.ckpt"))
    assert len(whole) > len(losses) > 4
    for path in whole:
        again = Path(trainer.run(writing_config(job, tmp_path / path.stem, *words, f"resume_from={path}"))["run_dir"])
        found = step_losses(again) if (again / "metrics.jsonl").exists() else {}  # no step was left
        assert found == {step: losses[step] for step in found}, path.name
        assert_same(final_state(straight), final_state(again), path.name)
    first = trainer.run(writing_config(job, tmp_path / "b", *words, "max_steps=3"))
    best_before = {path.name for path in (Path(first["run_dir"]) / "checkpoints").glob("best-*.ckpt")}
    resumed = Path(trainer.run(writing_config(job, tmp_path / "b", *words, "resume_from=last"))["run_dir"])
    assert best_before and step_losses(resumed) == losses
    assert read_json(resumed / "generated.json") == written
    assert read_json(resumed / "metrics.json")["weights"] == read_json(straight / "metrics.json")["weights"]


def test_a_report_writer_is_tested_as_it_was_left(short_run: dict[str, Any], job: Path, tmp_path: Path) -> None:
    run_dir = Path(short_run["run_dir"])
    best = run_dir / "checkpoints" / read_json(run_dir / "metrics.json")["weights"]
    words = ("test_only=True", "evaluate=True", f"load_path={best}", "clm_do_sample=False")
    again = trainer.run(writing_config(job, tmp_path, *words))
    assert again["steps"] == 0 and "sampled/bleu_1" not in again["metrics"]
    written, before = (read_json(Path(folder) / "generated.json") for folder in (again["run_dir"], run_dir))
    assert [row["prediction"] for row in written] == [row["prediction"] for row in before]
    assert again["metrics"]["weights"] == best.name


def pretrained(job: Path, place: Path, *words: str) -> MG3DModule:
    """Weights of a pre-trained module, all of them changed, written to ``place``."""
    words = ("loss_names.clm=0", "loss_names.sen_mlm=1", "vision_only=False", "max_steps=2", *words)
    module = MG3DModule(writing_config(job, job, *words))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.01
    save_weights(module, place, module.metadata())
    return module


def test_the_image_side_and_a_fitting_text_encoder_come_from_the_pretrained_module(job: Path, tmp_path: Path) -> None:
    source = pretrained(job, tmp_path / "mg3d.safetensors")
    module, report = made(job, f"load_path={tmp_path / 'mg3d.safetensors'}")
    held, given = module.state_dict(), source.state_dict()
    for name in given:
        if name.startswith(("vision_encoder.", "multi_modal_vision_proj.", "modality_type_embeddings.")):
            assert torch.equal(held[name], given[name]), name
    layer = "encoder.layer.1.output.dense.weight"
    assert torch.equal(held[f"clm_head.decoder.bert.{layer}"], given[f"language_encoder.{layer}"])
    assert report["decoder"]["from"] == "text encoder of load_path" and report["encoder_loaded"] > 20
    assert not any(name.startswith("language_encoder") for name in held)


def test_another_text_encoder_in_the_weights_is_left_out(job: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_job(other, rows=1)
    assert len(create_text_encoder(str(other / "text")).state_dict()) > 10
    pretrained(job, tmp_path / "mg3d.safetensors", f"tokenizer={other / 'text'}")
    module, report = made(job, f"load_path={tmp_path / 'mg3d.safetensors'}")
    own = create_text_encoder(str(job / "text"))
    copied = module.clm_head.decoder.bert.encoder.layer[1].output.dense.weight
    assert torch.equal(copied, own.encoder.layer[1].output.dense.weight)
    assert report["decoder"]["from"] == f"text encoder {job / 'text'}"


def test_a_report_writer_of_other_sizes_is_refused(job: Path, tmp_path: Path) -> None:
    module, _ = made(job)
    save_weights(module, tmp_path / "writer.safetensors", module.metadata())
    again, report = made(job, f"load_path={tmp_path / 'writer.safetensors'}")
    assert report["decoder"] == {"from": "report writer of load_path"} and again.clm_head.longest == 192
    with pytest.raises(CheckpointError, match="another report writer"):
        made(job, f"load_path={tmp_path / 'writer.safetensors'}", "hidden_size=64")


def test_a_frozen_encoder_is_kept_and_its_tokens_can_be_cached(job: Path) -> None:
    batch = next(iter(report_task.datamodule(writing_config(job, job)).train_dataloader()))
    module, _ = made(job, "freeze_image_encoder=True", "cache_image_tokens=True", "batch_size=4", "per_gpu_batchsize=4")
    assert not any(parameter.requires_grad for parameter in module.vision_encoder.parameters())
    assert not module.train().vision_encoder.training and module.clm_head.training
    plain = module.project(module.encode(batch["image"]))
    assert torch.allclose(module.image_tokens(batch, "train"), plain, atol=1e-6)
    module.vision_encoder.forward_features = None  # the second time nothing is encoded
    assert torch.allclose(module.image_tokens(batch, "train"), plain, atol=1e-6)
    assert module.training_step(batch, 0)["loss"].requires_grad


def test_studies_without_a_report_are_left_out_and_none_at_all_is_refused(tmp_path: Path) -> None:
    write_job(tmp_path / "some", rows=3, without_report=1)
    data = report_task.datamodule(writing_config(tmp_path / "some", tmp_path))
    assert data.rows("test").tolist() == [1, 2] and data.batches_per_epoch() == 1
    assert [name for batch in data.test_dataloader() for name in batch["image_id"]] == ["test_1", "test_2"]
    write_job(tmp_path / "none", rows=2, without_report=2)
    with pytest.raises(DataError, match=r"no study of the train split has a report \(2 studies\)"):
        trainer.run(writing_config(tmp_path / "none", tmp_path, "max_steps=1"))


@pytest.mark.parametrize("key", ["max_text_len", "clm_max_text_len"])
def test_reports_longer_than_the_text_model_are_refused(job: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}=200 exceeds the text model's 192 positions"):
        report_task.module(writing_config(job, job, f"{key}=200"), 1)


def test_labels_come_with_the_batch(job: Path) -> None:
    (batch,) = report_task.datamodule(writing_config(job, job, "batch_size=4", "per_gpu_batchsize=4")).test_dataloader()
    assert batch["labels"].shape == (4, len(CT_RATE_LABELS)) and batch["image"].shape == (4, 32, 1, 32, 32)
    assert batch["text_ids"].shape == batch["text_masks"].shape


def test_four_reports_are_learned_by_heart(job: Path) -> None:
    words = "freeze_image_encoder=True cache_image_tokens=True batch_size=4 per_gpu_batchsize=4 drop_rate=0.0"
    module, _ = made(job, *words.split(), "clm_max_text_len=160")
    (batch,) = report_task.datamodule(module.cfg).test_dataloader()
    module.clm_head.standardise(module.encode(batch["image"]).detach())
    optimizer = torch.optim.AdamW(module.clm_head.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        module._loss(module.image_tokens(batch, "train"), batch).backward()
        optimizer.step()
    written = module.eval().write(module.image_tokens(batch, "train"))
    assert score_captions(batch["report"], written, meteor="none").values["bleu_4"] > 0.9


@pytest.mark.slow
def test_two_processes_train_as_one_and_write_every_report_once(job: Path, tmp_path: Path, repository: Path) -> None:
    more = ["max_steps=2", "batch_size=4", "evaluate=True", "clm_do_sample=False", "drop_rate=0.0"]
    words = [*WORDS, f"data_root={job}", f"tokenizer={job / 'text'}", *more]
    one = trainer.run(writing_config(job, tmp_path / "one", *more, "per_gpu_batchsize=4"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "main.py", "with"]
    done = subprocess.run(
        [*launcher, *words, "per_gpu_batchsize=2", f"log_dir={tmp_path / 'two'}"],
        cwd=repository, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, encoding="utf-8", timeout=500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (two,) = (tmp_path / "two").glob("*/version_0")
    assert step_losses(two) == pytest.approx(step_losses(Path(one["run_dir"])), rel=1e-4)
    written, alone = (read_json(Path(folder) / "generated.json") for folder in (two, one["run_dir"]))
    assert [row["filename"] for row in written] == [row["filename"] for row in alone]
    assert '"bleu_4"' in done.stdout.strip().splitlines()[-1]
