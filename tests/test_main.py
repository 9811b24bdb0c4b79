"""The entry: refusals of at most five lines with exit code 2, help, notices, and the way to the trainer."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mg3d.config_schema import MG3DConfig
from mg3d.errors import DataError, RunFailedError


@pytest.fixture(scope="module")
def entry(repository: Path) -> ModuleType:
    """The script main.py as a module."""
    spec = importlib.util.spec_from_file_location("mg3d_entry", repository / "main.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def trained(entry: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[MG3DConfig]:
    """Configs that reached the trainer, which is replaced: what it does is tested elsewhere."""
    import mg3d.training

    seen: list[MG3DConfig] = []
    trainer = ModuleType("mg3d.training.trainer")
    trainer.run = lambda config: (seen.append(config), {"run_dir": "none", "steps": 0, "metrics": {}})[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mg3d.training.trainer", trainer)
    monkeypatch.setattr(mg3d.training, "trainer", trainer, raising=False)
    monkeypatch.setenv("MG3D_PROCESS_DEFAULTS", "off")
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(entry, "NOTICES", [])
    return seen


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("with nonsense=1", ["nonsense=1", "allowed", "nearest", "mend"]),
        ("with learning_rat=1e-4", ["learning_rat=1e-4", "nearest: learning_rate", "write learning_rate=1e-4"]),
        ("with lr=abc", ["lr=abc", "learning_rate"]),
        ("with learning_rate=abc", ["learning_rate='abc'", "allowed: a number >= 0"]),
        ("with per_gpu_batchsize=two", ["per_gpu_batchsize='two'", "an integer >= 1"]),
        ("with seed=abc", ["seed='abc'", "an integer"]),
        ("with loss_names.typo=1", ["loss_names.typo", "sen_mlm"]),
        ("with loss_names.swin_unter_mim=1", ["write loss_names.swin_unetr_mim"]),
        ("with loss_names=5", ["loss_names=5", "a dictionary"]),
        ("with loss_names=5 loss_names.itc=1", ["whole and in parts"]),
        ("with seed.x=1", ["seed has no parts"]),
        ("with vision_encoder=swin_c", ["swin_c", "swin_b"]),
        ("with swin_c", ["swin_c", "nearest: swin_"]),
        ("with task_pretrain_ptunifer", ["nearest: task_pretrain_ptunifier"]),
        ("with task_finetune_cls_chemprot", ["planned"]),
        ("with task_finetune_clm_mimic_cxr_vision_only", ["planned"]),
        ("with clip_randaug", ["planned"]),
        ("with mim_prob=0.75", ["no effect", "mim_mask_ratio"]),
        ("with patch_size_squeeze=16", ["no effect"]),
        ("with pseudo_vision_token_pool_size=2", ["planned", "allowed: 0"]),
        ("with draw_false_text=1", ["planned"]),
        ("with train_transform_keys=clip_resizedcrop", ["breaks a volume"]),
        ("with image_size=[100,96,128]", ["multiple of 32", "[96,96,128]"]),
        ("with missing.json", ["missing.json", "config.json"]),
        ("print_config with seed=abc", ["seed='abc'"]),
        ("print_confg", ["print_config"]),
        ("seed=3", ["python main.py with seed=3"]),
        ("task_pretrain_mg3d seed=3", ["python main.py with task_pretrain_mg3d seed=3"]),
        ("with", ["no such command"]),
        ("--nonsense", ["--help"]),
    ],
)
def test_refusals_are_short_and_name_the_mend(
    entry: ModuleType, trained: list[MG3DConfig], capsys: pytest.CaptureFixture[str], line: str, wanted: list[str]
) -> None:
    assert entry.main(line.split()) == 2
    output = capsys.readouterr()
    assert output.out == "" and not trained
    assert 2 <= len(output.err.strip().splitlines()) <= 5, output.err
    assert "mend:" in output.err and "Traceback" not in output.err
    assert all(words in output.err for words in wanted), output.err


def test_published_command_reaches_the_trainer(
    entry: ModuleType, trained: list[MG3DConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "with seed=3 num_gpus=1 num_nodes=1 task_pretrain_ptunifier per_gpu_batchsize=4 vit3d16 text_radbert "
        "image_size=128 max_text_len=250 tokenizer=StanfordAIMI/RadBERT vit=ViT-B/16"
    ).split()
    assert entry.main([*words, "data_root=/data/a folder with 'quotes'"]) == 0
    assert trained[0].volume_size == (128, 96, 128) and trained[0].seed == 3 and trained[0].max_steps == 300000
    assert trained[0].data_root == "/data/a folder with 'quotes'"
    notices = capsys.readouterr().err.strip().splitlines()
    assert len(notices) == 1 and "vit=ViT-B/16" in notices[0] and "vision_encoder" in notices[0]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DataError("the file is empty", "pack it again", path="a.arrow"), 2, "a.arrow: the file is empty"),
        (RunFailedError("the loss is not finite", "lower learning_rate"), 1, "mend: lower learning_rate"),
        (RunFailedError("\n".join(f"line {k}" for k in range(20)), "do this"), 1, "mend: do this"),
    ],
)
def test_errors_of_a_run_become_exit_codes(
    entry: ModuleType,
    trained: list[MG3DConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    words: str,
) -> None:
    def fail(config: MG3DConfig) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(sys.modules["mg3d.training.trainer"], "run", fail)
    assert entry.main(["with", "task_pretrain_mg3d"]) == code
    text = capsys.readouterr().err
    assert words in text and len(text.strip().splitlines()) <= 5


def test_one_process_of_a_job_speaks_for_all(
    entry: ModuleType, trained: list[MG3DConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert entry.main(["with", "nonsense=1"]) == 2
    assert capsys.readouterr().err == ""


def test_help_and_listings(entry: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["help"], ["-h"]):
        assert entry.main(words) == 0
        text = capsys.readouterr().out
        assert "python main.py with" in text and "task_pretrain_mg3d" in text and len(text.splitlines()) < 50
    assert entry.main(["print_keys"]) == 0
    assert "loss_names" in capsys.readouterr().out
    assert entry.main(["print_config", "with", "tiny", "loss_names.itm=1"]) == 0
    text = capsys.readouterr().out
    assert "max_steps = 2" in text and "draw_false_image = 1" in text


def test_refusal_and_help_in_a_process_of_their_own_load_nothing_heavy(repository: Path) -> None:
    refused = subprocess.run(
        [sys.executable, "main.py", "with", "nonsense=1"],
        cwd=repository,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert refused.returncode == 2 and "nonsense" in refused.stderr and "Traceback" not in refused.stderr
    assert refused.stdout == "" and len(refused.stderr.strip().splitlines()) <= 5
    script = (
        "import sys, main\n"
        "lines = ('with nonsense=1', '--help', 'check with task_pretrain_mg3d')\n"
        "codes = [main.main(words.split()) for words in lines]\n"
        "heavy = {'torch', 'monai', 'pytorch_lightning', 'lightning', 'transformers'} & set(sys.modules)\n"
        "print(codes, sorted(heavy), file=sys.stderr)\n"
    )
    light = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, encoding="utf-8", timeout=60, check=True
    )
    assert light.stderr.strip().splitlines()[-1] == "[2, 0, 0] []"


def test_entry_is_short(repository: Path) -> None:
    assert len((repository / "main.py").read_text(encoding="utf-8").splitlines()) <= 60
