"""The command line of a benchmark: what wins, what is refused and how, what starts without the heavy libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_benchmark import BALLS

from mg3d.errors import ConfigError
from mg3d.finetuning.config import resolve_finetune_config
from mg3d.finetuning.experiment import compose_finetune_config, run_benchmark

PROGRAM = Path(__file__).with_name("tiny_benchmark.py")


def test_command_line_beats_named_config_beats_benchmark_beats_default(tmp_path: Path) -> None:
    assert resolve_finetune_config().learning_rate == 3e-4
    assert compose_finetune_config(BALLS, []).learning_rate == 1e-3
    assert compose_finetune_config(BALLS, ["other"]).learning_rate == 0.5
    assert compose_finetune_config(BALLS, ["learning_rate=2", "other"]).learning_rate == 2.0
    assert compose_finetune_config(BALLS, ["phantom"]).phantom and not compose_finetune_config(BALLS, []).phantom
    stored = tmp_path / "config.json"
    stored.write_text(json.dumps(compose_finetune_config(BALLS, ["other", "flavour=red"]).to_dict()), encoding="utf-8")
    again = compose_finetune_config(BALLS, [str(stored), "seed=3"])
    assert (again.learning_rate, again.extra["flavour"], again.seed) == (0.5, "red", 3)


@pytest.mark.parametrize(("word", "value"), [("false", False), ("False", False), ("true", True), ("True", True)])
def test_booleans_are_typed(word: str, value: bool) -> None:
    assert compose_finetune_config(BALLS, [f"tta={word}", f"augment={word}"]).tta is value


def test_own_keys_are_typed_by_their_default() -> None:
    cfg = compose_finetune_config(BALLS, ["strength=2", "stages=train,evaluate", "ensemble=[a,b]"])
    assert cfg.extra == {"flavour": "plain", "strength": 2.0}
    assert cfg.stages == ("train", "evaluate") and cfg.ensemble == ("a", "b")
    assert compose_finetune_config(BALLS, ["resume_from=last"]).resume == "last"
    with pytest.raises(ConfigError, match="strength"):
        compose_finetune_config(BALLS, ["strength=much"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["with", "leraning_rate=3"], ["leraning_rate=3", "nearest: learning_rate", "write learning_rate=3"]),
        (["with", "lr=3"], ["write learning_rate=3"]),
        (["with", "mode=linear"], ["mode='linear'", "full, linear_probe, knn_probe", "mode=linear_probe"]),
        (["with", "tta=no"], ["tta='no'", "True or False"]),
        (["with", "fold=9"], ["fold=9", "0 to 4"]),
        (["with", "data_fraction=0"], ["data_fraction=0", "> 0"]),
        (["with", "phantm"], ["phantm", "nearest: phantom"]),
        (["with", "freeze=stages_x"], ["stages_2"]),
        (["with", "feature_size=13"], ["feature_size=13"]),
        (["with", "max_epoch=None"], ["max_epoch"]),
        (["with", "mode=knn_probe", "layer_decay=0.5"], ["layer_decay"]),
        (["phantom"], ["with phantom"]),
        (["prnt_config"], ["print_config"]),
        (["--check-data", "with", "foldd=1"], ["foldd=1", "fold"]),
    ],
)
def test_refusals_name_key_value_allowed_and_nearest(
    words: list[str], told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_benchmark(BALLS, words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) <= 5 and "Traceback" not in shown.err
    assert shown.err.startswith("error: ") and "mend: " in shown.err
    for part in told:
        assert part in shown.err


def test_help_keys_and_config_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_benchmark(BALLS, ["--help"]) == 0
    text = capsys.readouterr().out
    assert "find balls" in text and "flavour" in text and "with phantom" in text and "--check-data" in text
    assert run_benchmark(BALLS, ["print_keys"]) == 0
    assert "learning_rate = 0.001" in capsys.readouterr().out
    assert run_benchmark(BALLS, ["check", "with", "phantom"]) == 0


def test_check_data_lists_everything_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = [f"data_root={tmp_path / 'data'}", f"work_dir={tmp_path / 'work'}"]
    assert run_benchmark(BALLS, ["--check-data", "with", "phantom", *place]) == 0
    assert "nothing wrong" in capsys.readouterr().out
    for name in ("p03-0", "p07-1"):
        (tmp_path / "data" / f"{name}.npy").unlink()
    assert run_benchmark(BALLS, ["--check-data", "with", *place]) == 2
    shown = capsys.readouterr().err
    assert "p03-0.npy: missing" in shown and "p07-1.npy: missing" in shown and "2 problems" in shown


def test_help_and_refusals_start_no_heavy_library(repository: Path) -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]; from tiny_benchmark import BALLS;"
        "from mg3d.finetuning.experiment import run_benchmark;"
        "codes = [run_benchmark(BALLS, words) for words in (['--help'], ['print_keys'], ['with', 'x=1'])];"
        "heavy = {'torch', 'monai', 'pytorch_lightning'} & set(sys.modules);"
        "sys.exit(str((codes, heavy)) if codes != [0, 0, 2] or heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(repository), str(PROGRAM.parent)],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
