"""A few phantom chests with their true reports as packed arrows, and a small text encoder for their words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from mg3d.config import ex
from mg3d.config_cli import compose_config
from mg3d.config_schema import MG3DConfig
from mg3d.datasets.arrow_schema import make_row_batch, make_schema
from mg3d.datasets.report_text import split_fragments
from mg3d.phantoms.chest import render
from mg3d.phantoms.findings import label_vector
from mg3d.phantoms.studies import Study, plan_studies
from mg3d.phantoms.text_encoder import write_text_encoder

SIZE = 32
WORDS = (
    "task_finetune_clm_ct_rate_vision_only tiny image_size=[32,32,32] max_text_len=160 clm_max_text_len=24 num_gpus=0 "
    "decay_power=0 clm_findings=phantom clm_meteor=none max_epoch=None"
).split()


def write_job(folder: Path, rows: int = 4, without_report: int = 0) -> None:
    """Write ``clm_ct_rate_{train,val,test}.arrow`` and ``text`` under ``folder``; val and test hold the train studies.

    Args:
        folder: target.
        rows: studies of each split.
        without_report: how many of them, the first ones, have no text.
    """
    studies = list(plan_studies("train", rows, SIZE, seed=5))
    for split in ("train", "val", "test"):
        _write(folder / f"clm_ct_rate_{split}.arrow", split, studies, without_report)
    write_text_encoder(folder / "text", [f"{study.report.findings} {study.report.impression}" for study in studies], 1)


def _write(path: Path, split: str, studies: list[Study], without_report: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    geometry = {"crop_fractions": [1, 1, 1], "size": [SIZE] * 3, "target_spacing_mm": [1.5, 0.75, 0.75]}
    schema = make_schema(geometry=geometry | {"store": "crop"})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for row, study in enumerate(studies):
            findings, impression = (
                (study.report.findings, study.report.impression) if row >= without_report else ("", "")
            )
            writer.write_batch(
                make_row_batch(
                    schema,
                    image=render(study.case, study.grids[0]).hu,
                    image_id=f"{split}_{row}",
                    patient_id=f"patient_{row}",
                    corpus="clm_ct_rate",
                    split=split,
                    findings=findings,
                    impression=impression,
                    findings_sen=split_fragments(findings),
                    impression_sen=split_fragments(impression),
                    spacing_mm=(1.5, 0.75, 0.75),
                    labels=label_vector(study.case.lesions).tolist(),
                )
            )


def writing_config(job: Path, log_dir: Path, *words: str) -> MG3DConfig:
    """The config of a run on a job; later words win."""
    places = [f"data_root={job}", f"tokenizer={job / 'text'}", f"log_dir={log_dir}"]
    given = {word.partition("=")[0] for word in words}
    return compose_config(ex, [*(word for word in [*WORDS, *places] if word.partition("=")[0] not in given), *words])


def step_losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss of a run."""
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines}


def read_json(path: Path) -> Any:
    """Content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
