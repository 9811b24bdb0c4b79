"""Maps of latents: one picture of every finding, none where there are too few volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mg3d.finetuning.pictures.latent_maps import draw_latent_maps, plane

NAMES = tuple(f"Finding {number}" for number in range(18))


def test_a_picture_of_every_finding(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "predictions").mkdir()
    np.savez(tmp_path / "predictions/image_latents.npz", data=rng.normal(size=(31, 1, 8)))
    rows = [{"id": str(n), **{f"target_{name}": n % 2 for name in NAMES}} for n in range(31)]
    paths = draw_latent_maps(tmp_path, rows, NAMES)
    assert [path.stem for path in paths] == list(NAMES)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_too_few_volumes_and_missing_latents(tmp_path: Path) -> None:
    assert draw_latent_maps(tmp_path, [{"target_A": 1}] * 40, ("A",)) == []
    with pytest.raises(ValueError, match="31"):
        plane(np.zeros((30, 4)))
