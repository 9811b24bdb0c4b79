"""Figures of written reports: wording and findings, beside what needs no image, as entries, table and files.

n studies, L findings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from mg3d.atomic import write_text_atomically
from mg3d.config_schema import MG3DConfig
from mg3d.evaluation.finding_reader import FROM_LABELS, FindingReader, finding_reader
from mg3d.evaluation.table import grid, score_cell
from mg3d.finetuning.evaluation import write_rows
from mg3d.finetuning.report_gallery import PAGE, GalleryCase, write_gallery
from mg3d.finetuning.report_scores import best_constant
from mg3d.metrics.captioning import MeteorKind, score_captions
from mg3d.metrics.clinical import clinical_entries, clinical_scores

__all__ = ["HYPOTHESES", "draw_gallery", "render_reports", "score_written", "write_files"]

HYPOTHESES = {"": "hypothesis", "sampled/": "hypothesis_sampled"}
"""Prefix of the figures -> column of the rows: beam search, and one report drawn word by word."""
EMPTY_REFERENCE = "there is no evidence of pulmonary."
"""What the published code puts in the place of an empty report."""
INTERNAL = ("labels", "row")
"""Columns of the rows that stay out of ``per_case.csv``."""
SHOWN = (*(f"bleu_{n}" for n in range(1, 5)), "rouge_l", "cider", "meteor_java", "meteor_nltk")
CLINICAL = ("ce_f1_micro", "ce_f1_macro", "ce_f1_example", "ce_precision_micro", "ce_recall_micro", "crg")
CONTROLS = {
    "label_to_report": "what a linear probe of the image tokens finds, in sentences of the training reports",
    "constant_report": "best report that is the same for all",
    "shuffled_reports": "the written reports, each given to another study",
    "reader": "the reader of findings on the reference reports themselves",
}


def score_written(rows: Sequence[Mapping[str, Any]], cfg: MG3DConfig) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Score the case rows of a test.

    Args:
        rows: of `mg3d.models.clm.ReportWritingModule.case_rows`, at least one.
        cfg: bootstrap rounds, seed, reader of findings, treatment of empty reports.

    Returns:
        ``{metric: {"mean", "ci95", "n"}}``; metrics of sampled reports begin with ``sampled/``; and notes.
    """
    entries: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    reader = finding_reader(cfg)
    for prefix, column in HYPOTHESES.items():
        if column not in rows[0]:
            continue
        found, said = _score_column(rows, column, cfg, reader)
        entries |= {f"{prefix}{name}": entry for name, entry in found.items()}
        notes += [f"{prefix.rstrip('/')}: {each}" if prefix else each for each in said if each not in notes]
    if reader is not None:
        entries |= _controls(rows, cfg, reader)
        notes += [f"{name}: {meaning}" for name, meaning in CONTROLS.items() if f"{name}/ce_f1_micro" in entries]
    return entries, list(dict.fromkeys(notes))


def _score_column(
    rows: Sequence[Mapping[str, Any]], column: str, cfg: MG3DConfig, reader: FindingReader | None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    patients = [str(row["patient"]) for row in rows]
    texts = [str(row[column]) for row in rows]
    empty = sum(not text for text in texts)
    scored = [text or EMPTY_REFERENCE for text in texts] if cfg.clm_empty_report == "sentence_reference" else texts
    scores = score_captions(
        [str(row["reference"]) for row in rows],
        scored,
        ids=[str(row["id"]) for row in rows],
        meteor=cast(MeteorKind, cfg.clm_meteor),
        rounds=cfg.eval_bootstrap,
        groups=patients,
        seed=cfg.seed,
    )
    entries = scores.entries() | {"empty_reports": {"mean": empty / len(rows), "ci95": None, "n": len(rows)}}
    notes = [*scores.notes, f"text: {scores.protocol['text']}"]
    if empty and scored is not texts:
        notes.append(f"{empty} empty reports were replaced by {EMPTY_REFERENCE!r}, as published")
    if reader is not None:
        truth, origin = _truth(rows, reader)
        clinical, more = clinical_entries(
            truth, reader.table(scored), reader.names, rounds=cfg.eval_bootstrap, groups=patients, seed=cfg.seed
        )
        entries |= clinical
        notes += [*more, f"findings of the references: {origin}; of the written reports: {cfg.clm_findings}"]
    return entries, notes


def _truth(rows: Sequence[Mapping[str, Any]], reader: FindingReader) -> tuple[np.ndarray, str]:
    """Findings of the references [n, L] and where they come from."""
    return reader.of_studies(np.asarray([row["labels"] for row in rows]), [str(row["reference"]) for row in rows])


def _controls(rows: Sequence[Mapping[str, Any]], cfg: MG3DConfig, reader: FindingReader) -> dict[str, dict[str, Any]]:
    """Micro F1 of what knows nothing of the image, and of the reader itself."""
    truth, origin = _truth(rows, reader)
    order = np.random.default_rng(cfg.seed).permutation(len(rows))
    giver = np.empty_like(order)
    giver[order] = np.roll(order, 1)  # nobody keeps a report, where there are two studies
    stated = {
        "constant_report": np.tile(best_constant(truth), (len(rows), 1)),
        "shuffled_reports": reader.table([str(rows[place]["hypothesis"]) for place in giver]),
    }
    if origin == FROM_LABELS:
        stated["reader"] = reader.table([str(row["reference"]) for row in rows])
    return {
        f"{name}/ce_f1_micro": {"mean": clinical_scores(truth, found)["ce_f1_micro"], "ci95": None, "n": len(rows)}
        for name, found in stated.items()
    }


def render_reports(entries: Mapping[str, Mapping[str, Any]], notes: Sequence[str], about: str) -> str:
    """The figures as a table: beam search and sampling side by side, then the controls, findings and notes.

    Args:
        entries: of `score_written`.
        notes: of `score_written`.
        about: first line.
    """
    columns = [prefix for prefix in HYPOTHESES if f"{prefix}bleu_1" in entries]
    titles = {"": "beam search", "sampled/": "sampled"}
    names = [name for name in (*SHOWN, *CLINICAL, "empty_reports") if name in entries]
    body = [[name, *(score_cell(entries[f"{prefix}{name}"]) for prefix in columns)] for name in names]
    lines = [about, "Brackets hold 95 % bootstrap intervals over patients.", ""]
    lines += grid(["written reports", *(titles[prefix] for prefix in columns)], body)
    known = [name for name in CONTROLS if f"{name}/ce_f1_micro" in entries]
    figures = ("ce_f1_micro", "bleu_4")
    controls = [[name, *(score_cell(entries.get(f"{name}/{key}")) for key in figures)] for name in known]
    if controls:
        lines += ["", *grid(["beside it", *figures], controls)]
        classes = entries["ce_f1_macro"]["per_class"]
        lines += ["", *grid(["F1 of a finding", "beam search"], [[name, f"{f1:.3f}"] for name, f1 in classes.items()])]
    return "\n".join([*lines, "", *(f"note: {note}" for note in notes)])


def write_files(run_dir: Path, rows: Sequence[Mapping[str, Any]], cfg: MG3DConfig) -> None:
    """Write ``per_case.csv`` (id, patient, corpus, reference, hypothesis ...) and the published ``generated.json``.

    Args:
        run_dir: the run folder.
        rows: case rows.
        cfg: reader of findings: with one, the columns ``findings`` and ``stated`` name them.
    """
    reader = finding_reader(cfg)
    table = [{name: value for name, value in row.items() if name not in INTERNAL} for row in rows]
    if reader is not None:
        truth = _truth(rows, reader)[0]
        stated = reader.table([str(row["hypothesis"]) for row in rows])
        for row, held, said in zip(table, truth, stated, strict=True):
            for column, flags in (("findings", held), ("stated", said)):
                row[column] = "; ".join(name for name, flag in zip(reader.names, flags, strict=True) if flag)
    write_rows(run_dir / "per_case.csv", table)
    published = [
        {"filename": row["id"], "prediction": row["hypothesis"], "ground_truth": row["reference"]}
        | ({"sampled": row["hypothesis_sampled"]} if "hypothesis_sampled" in row else {})
        for row in rows
    ]
    write_text_atomically(run_dir / "generated.json", json.dumps(published, indent=1, ensure_ascii=False) + "\n")


def draw_gallery(run_dir: Path, rows: Sequence[Mapping[str, Any]], cfg: MG3DConfig, studies: Any) -> Path:
    """Draw ``gallery.html``: slices, reference, written reports, and which findings agree.

    Args:
        run_dir: the run folder.
        rows: case rows.
        cfg: reader of findings, seed.
        studies: the data set of the split, indexed by a row's ``row``.
    """
    reader, places = finding_reader(cfg), {str(row["id"]): row["row"] for row in rows}
    cases = [
        GalleryCase(
            str(row["id"]),
            row["reference"],
            row["hypothesis"],
            {"sampled": row["hypothesis_sampled"]} if "hypothesis_sampled" in row else {},
        )
        for row in rows
    ]
    path = run_dir / PAGE
    write_gallery(
        path,
        cases,
        title=f"Written reports: {cfg.exp_name}",
        reader=reader.read if reader else None,
        volumes=lambda name: studies[places[name]].image[:, 0].numpy(),
        seed=cfg.seed,
    )
    return path
