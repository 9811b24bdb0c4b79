"""Every named config, composed with `tiny`, trains for one step and leaves a run folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tiny_job import make_job

from mg3d.config import ex
from mg3d.config_cli import compose_config
from mg3d.config_named import NAMED_CONFIGS


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words that name the data and the text encoder."""
    return make_job(tmp_path_factory.mktemp("job"), rows=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NAMED_CONFIGS))
def test_named_config_trains_for_one_step(name: str, job: list[str], tmp_path: Path) -> None:
    from mg3d.training import trainer

    words = ["task_pretrain_mg3d", name, "tiny", *job]
    words += ["image_size=[64,32,32]", "max_steps=1", "num_gpus=0", f"log_dir={tmp_path}"]
    config = compose_config(ex, words)
    result = trainer.run(config)
    run_dir = Path(result["run_dir"])
    stored = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert stored["vision_encoder"] == config.vision_encoder
    assert result["steps"] == 1 and math.isfinite(lines[-1]["loss"])
    assert compose_config(ex, [str(run_dir / "config.json")]) == config
