"""The optional scorers of RadEval (RadGraph, CheXbert, its CT labeller ...); never imported unless asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mg3d.errors import EnvironmentProblem, RunFailedError

DEFAULT_METRICS = ("f1radbert_ct",)


def radeval_scores(
    references: Sequence[str], hypotheses: Sequence[str], metrics: Sequence[str] = DEFAULT_METRICS
) -> dict[str, Any]:
    """Scores of RadEval under its own names.

    Args:
        references: D texts.
        hypotheses: D texts.
        metrics: RadEval's names, such as ``f1radbert_ct`` (18 CT findings), ``radgraph`` or ``f1chexbert``.

    Returns:
        RadEval's numbers, each name prefixed with ``radeval_``.

    Raises:
        EnvironmentProblem: RadEval is not installed.
        RunFailedError: RadEval itself failed (its models come from the hub).
    """
    try:
        from radeval import RadEval
    except ImportError as error:
        raise EnvironmentProblem(
            "RadEval is not installed", 'pip install "radeval>=2.2,<3" (Python 3.11 or newer)'
        ) from error
    try:
        found = RadEval(metrics=list(metrics), show_progress=False)(refs=list(references), hyps=list(hypotheses))
    except Exception as error:  # a third-party scorer may raise anything; the user needs the name and the reason
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunFailedError(f"RadEval failed: {first[:200]}", "try it alone, or leave --radeval out") from error
    return {f"radeval_{name}": value for name, value in found.items()}
