"""Every kind of bad weights file through every door: refused with a message that names it, nothing run or changed."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_job import make_job
from torch import nn

from mg3d import load_model
from mg3d.datasets.stored_geometry import published_geometry
from mg3d.errors import CheckpointError
from mg3d.finetuning.config import resolve_finetune_config
from mg3d.models.checkpoint import check_resumable, describe_weights, load_weights, write_sidecar
from mg3d.models.export import export_folder, read_folder
from mg3d.models.finetune.weights import build_encoder, load_encoder_weights
from mg3d.models.vision_encoders import create_vision_encoder
from mg3d.training.checkpoint_io import AtomicCheckpointIO, check_file

ONE = torch.ones(1)
SIZES = {"depths": (2, 2), "num_heads": (2, 4), "window_size": 3}


class Model(nn.Module):
    """What every door loads into: an encoder under its published name."""

    def __init__(self, embed_dim: int = 4, patch_merging: str = "legacy") -> None:
        super().__init__()
        self.vision_encoder = create_vision_encoder("swin_b", embed_dim=embed_dim, patch_merging=patch_merging, **SIZES)

    def checkpoint(self, **metadata: object) -> dict:
        described = describe_weights(self, input_size_dhw=[32, 32, 32], **published_geometry()) | metadata
        content = {"state_dict": self.state_dict(), "mg3d_metadata": described}
        return content | {"optimizer_states": [], "global_step": 3, "epoch": 0}


def half(value: torch.Tensor) -> torch.Tensor:
    return value.half() if value.is_floating_point() else value


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(1).randrange(len(content) // 3, len(content) // 2)] ^= 4
    path.write_bytes(content)


def truncated(path: Path) -> None:
    torch.save(Model().checkpoint(), path)
    os.truncate(path, path.stat().st_size // 2)


def flipped_with_sidecar(path: Path) -> None:
    torch.save(Model().checkpoint(), path)
    write_sidecar(path)
    flip(path)


def flipped_without_sidecar(path: Path) -> None:
    torch.save(Model().checkpoint(), path)
    flip(path)


def malicious(path: Path) -> None:
    torch.save(Model().checkpoint() | {"callbacks": Evil(path.parent / "marker")}, path)


def malicious_bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Evil(path.parent / "marker")}))


def folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("no weights here")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "truncated|damaged|not a whole|sha256|no export"),
    "flipped_with_sidecar": (flipped_with_sidecar, "checksum file|sha256"),
    "flipped_without_sidecar": (flipped_without_sidecar, "checksum of|damaged"),
    "malicious": (malicious, "more than tensors|is refused"),
    "malicious_bare_pickle": (malicious_bare_pickle, "no weights file.*unsupported pickle|is refused|not a whole"),
    "empty_file": (lambda path: path.touch(), "0 bytes|empty file"),
    "empty_dict": (lambda path: torch.save({}, path), "holds no tensors|cannot be resumed"),
    "directory": (folder, r"is a directory|no such file|has no config\.json|is no export folder"),
    "absent": (lambda path: None, "does not exist|no such file|no folder|no weights at"),
    "python_file": (lambda path: path.write_text("import os\nos.mkdir('marker')\n"), "no weights file|not a whole"),
    "newer_format": (lambda path: torch.save(Model().checkpoint(format_version=2), path), "format version 2"),
    "half_precision": (
        lambda path: torch.save(
            Model().checkpoint() | {"state_dict": {k: half(v) for k, v in Model().state_dict().items()}}, path
        ),
        r"another dtype: vision_encoder\S* is torch.float16",
    ),
    "bfloat16": (
        lambda path: torch.save(
            Model().checkpoint() | {"state_dict": {k: v.bfloat16() for k, v in Model().state_dict().items()}}, path
        ),
        r"another dtype: vision_encoder\S* is torch.bfloat16",
    ),
    "foreign": (lambda path: torch.save({"convInit.weight": torch.ones(2)}, path), r"convInit \(1\)|cannot be resumed"),
    "left_over": (
        lambda path: torch.save(
            Model().checkpoint()
            | {"state_dict": Model().state_dict() | {"vision_encoder.layers1c.0.layer.conv1.conv.weight": ONE}},
            path,
        ),
        "SwinUNETR v2|1 unknown|residual_blocks",
    ),
    "other_half": (
        lambda path: torch.save({"state_dict": Model().state_dict() | {"optimizer_states": Path("x")}}, path),
        "more than tensors",
    ),
    "text_named_safetensors": (
        lambda path: path.write_bytes((10**7).to_bytes(8, "little") + b"{" + b" " * 100),
        "damaged|not a whole",
    ),
    "quantised_safetensors": (
        lambda path: save_file({k: v.to(torch.int8) for k, v in Model().state_dict().items()}, path),
        "is torch.int8|not a whole",
    ),
    "wrong_merging": (
        lambda path: torch.save(Model(patch_merging="fixed").checkpoint(), path),
        "'fixed', the model is built with 'legacy'",
    ),
    "wrong_width": (
        lambda path: torch.save(Model(embed_dim=8).checkpoint(), path),
        "covers only|tensors of another shape",
    ),
}
CONVERTIBLE = ("wrong_merging", "wrong_width")
"""Whole files of another model: a door without a model of its own has nothing to refuse."""
OF_ANY_PRECISION = ("half_precision", "bfloat16")
"""Fine-tuning takes them and computes on in full precision."""


def by_load_weights(path: Path) -> None:
    load_weights(Model(), path)


def by_resume(path: Path) -> None:
    problem = check_file(path)
    if problem:
        raise CheckpointError(f"resume_from={path}: {problem}")
    check_resumable(Model(), AtomicCheckpointIO().load_checkpoint(path))


def by_convert_tool(path: Path) -> None:
    from tools.convert_meter_weights import main

    out = path.with_name("converted.pt")
    code = main([str(path), str(out), "--to", "mg3d"])
    assert not out.exists() or code == 0
    if code:
        raise CheckpointError(f"exit code {code}")


def by_export(path: Path) -> None:
    export_folder(path, path.with_name("exported"))


def by_folder(path: Path) -> None:
    """The file takes the place of the weights inside an export folder, checksum file and all."""
    torch.save(Model().checkpoint(), path.with_name("good.ckpt"))
    place = export_folder(path.with_name("good.ckpt"), path.with_name("export"))
    weights = place / "model.safetensors"
    weights.unlink()
    weights.with_name("model.safetensors.sha256").unlink()
    if path.exists():
        shutil.move(path, weights)
    if path.with_name(f"{path.name}.sha256").exists():
        shutil.move(path.with_name(f"{path.name}.sha256"), weights.with_name("model.safetensors.sha256"))
    read_folder(place)


def by_load_model(path: Path) -> None:
    load_model(path)


def by_fine_tuning(path: Path) -> None:
    cfg = resolve_finetune_config({"weights": str(path)})
    module = nn.Module()
    module.encoder = build_encoder(cfg)
    load_encoder_weights(module, cfg)


DOORS: dict[str, Callable[[Path], None]] = {
    "load_weights": by_load_weights,
    "resume_from": by_resume,
    "convert_tool": by_convert_tool,
    "export_folder": by_export,
    "read_folder": by_folder,
    "load_model": by_load_model,
    "fine_tuning": by_fine_tuning,
}
HARMLESS: dict[str, Callable[[dict], dict]] = {
    "module_prefix": lambda state: {f"module.{name}": value for name, value in state.items()},
    "position_ids": lambda state: state | {"language_encoder.embeddings.position_ids": torch.arange(4)[None]},
    "position_index": lambda state: (
        state | {"vision_encoder.layers1.0.blocks.0.attn.relative_position_index": torch.zeros(27, 27).long()}
    ),
    "classes_of_another_task": lambda state: state | {"head.weight": torch.ones(7, 16), "head.bias": torch.ones(7)},
    "decoder": lambda state: state | {"decoder5.transp_conv.conv.weight": torch.ones(2)},
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", BAD)
def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], door: str, kind: str) -> None:
    write, message = BAD[kind]
    path = tmp_path / "weights.ckpt"
    write(path)
    own_model = door not in ("convert_tool", "export_folder", "load_model", "fine_tuning")
    if (kind in CONVERTIBLE and not own_model) or (kind in OF_ANY_PRECISION and door == "fine_tuning"):
        DOORS[door](path)
        return
    with pytest.raises(CheckpointError) as caught:
        DOORS[door](path)
    told = capsys.readouterr().err if door == "convert_tool" else str(caught.value)
    if door == "convert_tool":
        assert "Traceback" not in told and len(told.splitlines()) <= 5 and "mend:" in told
    expected = message if door != "read_folder" else f"{message}|damaged|other tensors|has no model|truncated"
    assert re.search(expected, told), told
    assert "weights_only" not in told and "trust" not in told
    assert not (tmp_path / "marker").exists()


def test_the_same_file_unharmed_passes_every_door(tmp_path: Path) -> None:
    for door, enter in DOORS.items():
        place = tmp_path / door
        place.mkdir()
        path = place / "weights.ckpt"
        torch.save(Model().checkpoint(), path)
        if door != "read_folder":
            enter(path)
    read_folder(tmp_path / "export_folder" / "exported")
    by_load_weights(tmp_path / "export_folder" / "exported")
    by_load_weights(tmp_path / "convert_tool" / "converted.pt")


@pytest.mark.parametrize("kind", HARMLESS)
def test_names_that_belong_to_no_encoder_do_no_harm(tmp_path: Path, kind: str) -> None:
    content = Model().checkpoint()
    for door, enter in DOORS.items():
        place = tmp_path / door
        place.mkdir()
        torch.save(content | {"state_dict": HARMLESS[kind](content["state_dict"])}, place / "weights.ckpt")
        if door not in ("resume_from", "read_folder"):  # these go on with the very same model
            enter(place / "weights.ckpt")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words that name a tiny job."""
    words = make_job(tmp_path_factory.mktemp("job"))
    return ["task_pretrain_mg3d", "tiny", "image_size=[64,32,32]", "max_steps=2", "num_gpus=0", "num_workers=0", *words]


def main_py(repository: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "main.py", "with", *words]
    return subprocess.run(command, cwd=repository, env=environ, capture_output=True, encoding="utf-8", check=False)


@pytest.mark.slow
def test_main_py_refuses_them_as_initial_weights_and_as_resume(
    repository: Path, tmp_path: Path, job: list[str]
) -> None:
    good = main_py(repository, [*job, f"log_dir={tmp_path / 'good'}", "save_top_k=0"])
    assert good.returncode == 0, good.stderr[-2000:]
    last = Path(json.loads(good.stdout.splitlines()[-1])["run_dir"]) / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    metadata = content["mg3d_metadata"]
    assert metadata["spacing_mm"] == [1.5, 0.75, 0.75] and metadata["crop_fractions_dhw"] == [1, 1, 1]
    assert metadata["text_encoder_revision"].startswith("sha256:") and metadata["source_commit"]
    assert read_folder(export_folder(last, tmp_path / "export")).preprocessor["size_dhw"] == [64, 32, 32]
    order = {"fixed": "legacy", "legacy": "fixed"}[metadata["patch_merging"]]
    other = metadata | {"patch_merging": order, "vision_encoder": metadata["vision_encoder"] | {"patch_merging": order}}
    cases = {
        "evil": content | {"callbacks": Evil(tmp_path / "marker")},
        "newer": content | {"mg3d_metadata": metadata | {"format_version": 2}},
        "order": content | {"mg3d_metadata": other},
        "half": content | {"state_dict": {name: half(value) for name, value in content["state_dict"].items()}},
    }
    for name, case in cases.items():
        path = tmp_path / f"{name}.ckpt"
        torch.save(case, path)
        for key in ("load_path", "resume_from"):
            done = main_py(repository, [*job, f"log_dir={tmp_path / name}", "max_steps=4", f"{key}={path}"])
            assert done.returncode == 2, (name, key, done.stderr[-2000:])
            told = [line for line in done.stderr.splitlines() if line.startswith(("error:", "  mend:"))]
            assert "Traceback" not in done.stderr and len(told) == 2, (name, key, done.stderr[-2000:])
    assert not (tmp_path / "marker").exists()
    words = [*job, f"resume_from={last}", "vision_encoder_options.embed_dim=24"]
    refused = main_py(repository, [*words, f"log_dir={tmp_path / 'other'}"])
    assert refused.returncode == 2 and "embed_dim=24, in the checkpoint 12" in refused.stderr, refused.stderr[-2000:]
    wide = main_py(repository, [*words, f"log_dir={tmp_path / 'wide'}", "resume_allow=[vision_encoder_options]"])
    assert wide.returncode == 2 and "tensors of another shape" in wide.stderr, wide.stderr[-2000:]
    again = main_py(repository, [*job, f"log_dir={tmp_path / 'again'}", "max_steps=3", f"resume_from={last}"])
    assert again.returncode == 0, again.stderr[-2000:]
