"""Evaluate a pre-trained model: encode two splits, compute the entries, print the table, write the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mg3d.atomic import write_text_atomically
from mg3d.config_schema import MG3DConfig
from mg3d.evaluation.features import Collected, collect, embed_prompts, finding_columns, space_name
from mg3d.evaluation.figure import draw_figure
from mg3d.evaluation.report import Cases, ProbeArrays, SharedSpace, evaluation_entries
from mg3d.evaluation.table import render_table


@contextmanager
def _initial_state(seed: int) -> Iterator[None]:
    """Random state with which a run of that seed builds its model; the caller's state is restored."""
    with torch.random.fork_rng():
        python_independent = np.random.get_state()
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(python_independent)


def initial_encoder(cfg: MG3DConfig) -> torch.nn.Module:
    """The image encoder as a run of this config starts with it, before any weights are loaded."""
    from mg3d.models.mg3d_module import MG3DModule

    with _initial_state(cfg.seed):
        return MG3DModule(cfg, num_training_steps=1).vision_encoder.eval()


def _cases(found: Collected, columns: list[int]) -> Cases:
    return Cases(found.cases.labels[:, columns], found.cases.patients, found.cases.reports)


def _space(module: Any, tokenizer: Any, cfg: MG3DConfig, found: Collected, findings: list[str]) -> SharedSpace | None:
    if found.image is None or found.text is None:
        return None
    present, absent = (
        [prompt.format(finding=finding.lower()) for finding in findings]
        for prompt in (cfg.eval_prompt_positive, cfg.eval_prompt_negative)
    )
    with torch.no_grad():
        direction = embed_prompts(module, tokenizer, present) - embed_prompts(module, tokenizer, absent)
    return SharedSpace(found.image, found.text, direction.float().cpu().numpy(), str(space_name(module)))


def evaluate_run(module: Any, datamodule: Any, cfg: MG3DConfig, run_dir: Path) -> dict[str, Any]:
    """Linear probe, retrieval, zero-shot and effective rank of a trained model.

    The probe is fitted on training volumes (at most ``eval_probe_cases``) and everything is scored on ``eval_split``.

    Args:
        module: trained :class:`~mg3d.models.mg3d_module.MG3DModule`.
        datamodule: data of the run, offers ``complete_dataloader(split)``.
        cfg: the run's config.
        run_dir: gets ``evaluation.txt`` (the table) and ``evaluation.png``.

    Returns:
        Entries for ``metrics.json``.
    """
    trained = module.training
    module.eval()
    random_encoder = initial_encoder(cfg).to(module.device)
    found: Mapping[str, Collected] = {
        split: _collect(module, random_encoder, datamodule, split, limit)
        for split, limit in (("train", cfg.eval_probe_cases), (cfg.eval_split, None))
    }
    train, test = found["train"], found[cfg.eval_split]
    findings, columns = finding_columns(cfg.eval_findings)
    metrics = evaluation_entries(
        trained=ProbeArrays(train.features, test.features),
        random=ProbeArrays(train.random_features, test.random_features),
        train=_cases(train, columns),
        test=_cases(test, columns),
        findings=findings,
        space=_space(module, datamodule.tokenizer, cfg, test, findings),
        rounds=cfg.eval_bootstrap,
        seed=cfg.seed,
    )
    write_text_atomically(run_dir / "evaluation.txt", render_table(metrics) + "\n")
    draw_figure(metrics, run_dir / "evaluation.png")
    module.train(trained)
    return metrics


def _collect(module: Any, random_encoder: Any, datamodule: Any, split: str, limit: int | None) -> Collected:
    loader = datamodule.complete_dataloader(split)
    size = datamodule.cfg.per_gpu_batchsize
    count = len(loader) if limit is None else min(len(loader), -(-limit // size))
    return collect(module, random_encoder, islice(loader, count), count, split)
