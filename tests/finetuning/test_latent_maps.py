"""Maps of latents: one picture of every finding, none where there are too few volumes, UMAP only where it is."""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mg3d.errors import ConfigError, EnvironmentProblem
from mg3d.finetuning.pictures.latent_maps import check_maps, draw_latent_maps, plane

NAMES = tuple(f"Finding {number}" for number in range(18))
LABELS = np.arange(31)[:, None] % 2 * np.ones((1, 18), dtype=int)
LATENTS = np.random.default_rng(0).normal(size=(31, 8))


def test_a_picture_of_every_finding(tmp_path: Path) -> None:
    paths = draw_latent_maps(tmp_path, LATENTS, LABELS, NAMES)
    assert [path.relative_to(tmp_path) for path in paths] == [Path("maps") / f"{name}.png" for name in NAMES]
    assert len(paths) == 18 and all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_too_few_volumes_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert draw_latent_maps(tmp_path, LATENTS[:30], LABELS[:30], NAMES) == []
    assert "30 volumes, 31 are needed" in caplog.text and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="31"):
        plane(LATENTS[:30])


def test_umap_that_is_not_installed_is_refused_and_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "umap" else find(name, *more))
    for call in (
        lambda: check_maps(["tsne", "umap"]),
        lambda: draw_latent_maps(tmp_path, LATENTS, LABELS, NAMES, "umap"),
    ):
        with pytest.raises(EnvironmentProblem, match="pip install umap-learn"):
            call()
    with pytest.raises(ConfigError, match="tsne, umap"):
        check_maps(["pca"])
    check_maps(["tsne"])


def test_umap_draws_into_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class UMAP:
        """Stands for umap-learn, which is optional."""

        def __init__(self, **options: Any) -> None:
            asked.update(options)

        def fit_transform(self, latents: np.ndarray) -> np.ndarray:
            return latents[:, :2]

    module = types.ModuleType("umap")
    module.UMAP = UMAP  # type: ignore[attr-defined]
    module.__spec__ = importlib.util.spec_from_loader("umap", None)
    monkeypatch.setitem(sys.modules, "umap", module)
    paths = draw_latent_maps(tmp_path, LATENTS, LABELS, NAMES, "umap")
    assert len(paths) == 18 and {path.parent.name for path in paths} == {"maps_umap"}
    assert asked == {"n_components": 2, "random_state": 1231}
