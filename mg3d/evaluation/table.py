"""The evaluation entries as text a person reads in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOT_TRAINED = "not computed: the run trained no shared image-text space (switch the objective itc on)"


def score_cell(entry: Mapping[str, Any] | None) -> str:
    """``0.712 [0.650, 0.771]``, or a dash for an undefined value."""
    if not entry or entry.get("mean") is None:
        return "-"
    interval = entry.get("ci95")
    return f"{entry['mean']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def grid(header: list[str], rows: list[list[str]]) -> list[str]:
    """Left-aligned columns separated by two blanks."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _finding_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """One row per finding plus the mean: trained probe, random probe, zero-shot."""
    columns = ("linear_probe_auroc_trained", "linear_probe_auroc_random", "zero_shot_auroc")
    entries = [metrics.get(column) or {} for column in columns]
    names = list(entries[0].get("per_class", {}))
    rows = [[name, *(score_cell(entry.get("per_class", {}).get(name)) for entry in entries)] for name in names]
    rows = [row for row in rows if set(row[1:]) != {"-"}]  # a finding nobody has, or everybody, has no score
    return [*rows, ["mean", *(score_cell(entry) for entry in entries)]]


def _retrieval_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """One row per direction and K: recall, chance, ratio, and the same with shuffled volumes."""
    rows = []
    for name in (key for key in metrics if "_recall_at_" in key):
        direction, k = name.split("_recall_at_")
        entry, control = metrics[name], metrics["permuted_images"][name]
        ratio = f"{entry['times_chance']:.1f}x"
        label = f"{direction.replace('_', ' ')} R@{k}"
        rows.append([label, score_cell(entry), f"{entry['chance']:.4f}", ratio, score_cell(control)])
    return rows


def render_retrieval(metrics: Mapping[str, Any]) -> list[str]:
    """Lines of recall beside chance from the entries of ``retrieval_entries`` and ``permuted_images``; [] for none."""
    rows = _retrieval_rows(metrics)
    return grid(["retrieval", "recall", "chance", "ratio", "volumes shuffled"], rows) if rows else []


def render_table(metrics: Mapping[str, Any]) -> str:
    """Render the entries of ``evaluation_entries``.

    Args:
        metrics: the entries.

    Returns:
        Several lines: AUROC per finding, probe gain, retrieval beside chance, effective ranks.
    """
    probe = metrics["linear_probe_auroc_trained"]
    lines = [f"Held-out pool: {probe['n']} volumes. Brackets hold 95 % bootstrap intervals over patients.", ""]
    lines += grid(
        ["AUROC per finding", "probe, pre-trained", "probe, random encoder", "zero-shot"], _finding_rows(metrics)
    )
    lines += ["", f"probe gain over the random encoder: {score_cell(metrics['linear_probe_gain'])}", ""]
    lines += render_retrieval(metrics) or [f"retrieval and zero-shot: {NOT_TRAINED}"]
    ranks = [key for key in metrics if key.startswith("effective_rank") and metrics[key]]
    lines += ["", *(f"{key.replace('_', ' ')}: {score_cell(metrics[key])}" for key in ranks)]
    return "\n".join(lines)
