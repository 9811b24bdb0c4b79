"""``tools/convert_meter_weights.py``: both directions, counts, exit codes, and the JSON line at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import Tensor

from mg3d.models.checkpoint import load_weights
from mg3d.models.export import read_folder
from mg3d.models.vision_encoders import VisionEncoder, create_vision_encoder
from mg3d.models.vision_encoders.monai_swin import LegacyPatchMerging
from tools.convert_meter_weights import main

SIZES = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24)}


def encoder(seed: int, patch_merging: str = "legacy", name: str = "swin_b") -> VisionEncoder:
    torch.manual_seed(seed)
    return create_vision_encoder(name, patch_merging=patch_merging, **SIZES)


def published(path: Path, model: VisionEncoder) -> dict[str, Tensor]:
    """A flat file as the authors publish it, index buffers included."""
    state = {f"vision_encoder.{name}": value for name, value in model.state_dict().items()}
    state |= {f"vision_encoder.{name}": value for name, value in model.named_buffers() if name.endswith("_index")}
    torch.save(state | {"mlm_head.bias": torch.ones(5)}, path)
    return state


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    if code:
        lines = captured.err.splitlines()
        assert len(lines) <= 5 and lines[0].startswith("error: ") and lines[-1].startswith("  mend: "), captured.err
        return {"told": captured.err}
    return {"printed": captured.out} | json.loads(captured.out.splitlines()[-1])


def test_a_published_file_reaches_swin_unetr_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = encoder(1)
    state = published(tmp_path / "swin.pt", source)
    there = run(capsys, tmp_path / "swin.pt", tmp_path / "unetr.pt", "--to", "monai_swin_unetr")
    assert (there["entries"], there["target_loaded"], there["target_entries"]) == (126, 126, 159)
    assert there["patch_merging"] == "legacy" and "LegacyPatchMerging" in there["printed"]
    assert any("does not say its merging order" in note for note in there["notes"])
    network = SwinUNETR(out_channels=2, downsample=LegacyPatchMerging, **there["arguments"])
    lacking, unknown = network.load_state_dict(
        torch.load(tmp_path / "unetr.pt", weights_only=True)["state_dict"], False
    )
    assert len(lacking) == 33 and not unknown
    volume = torch.rand(1, 1, 32, 32, 64)
    with torch.no_grad():
        for ours, theirs in zip(source.eval()(volume), network.eval().swinViT(volume), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.save(network.state_dict(), tmp_path / "trained.pt")
    back = run(capsys, tmp_path / "trained.pt", tmp_path / "own.pt", "--to", "mg3d", "--report", tmp_path / "r.json")
    assert (back["family"], back["loaded"], back["unexpected"], back["dropped"]) == ("swin_unetr", 129, 22, 8)
    assert len(json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["renamed"]) == 129
    own = torch.load(tmp_path / "own.pt", weights_only=True)
    assert own["mg3d_metadata"]["patch_merging"] == "legacy"
    assert all(torch.equal(own["state_dict"][name], state[name]) for name in own["state_dict"] if name in state)
    target = encoder(2)
    assert load_weights(target, tmp_path / "own.pt").encoder_fraction == 1


def test_the_stated_order_travels_with_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(SwinUNETR(in_channels=1, out_channels=2, feature_size=12).state_dict(), tmp_path / "new_monai.pt")
    words = (tmp_path / "new_monai.pt", tmp_path / "own.safetensors", "--to", "safetensors")
    done = run(capsys, *words, "--patch-merging", "fixed")
    assert done["patch_merging"] == "fixed" and done["notes"] == []
    assert load_weights(encoder(2, "fixed"), tmp_path / "own.safetensors").patch_merging == "fixed"
    told = run(
        capsys, tmp_path / "own.safetensors", tmp_path / "b.pt", "--to", "mg3d", "--patch-merging", "legacy", code=2
    )
    assert "says patch_merging='fixed', not 'legacy'" in told["told"]
    out = run(capsys, tmp_path / "own.safetensors", tmp_path / "u.safetensors", "--to", "monai_swin_unetr")
    assert out["patch_merging"] == "fixed" and out["entries"] == 137 and "runs it as it is" in out["notes"][0]


def test_an_export_folder_is_written_and_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = encoder(1, name="swin_l")
    state = published(tmp_path / "swin.pt", source)
    words = ("--licence", "cc-by-nc-sa-4.0", "--training-data", "CT-RATE, CTRG-Chest", "--title", "3D Swin-L-47K")
    done = run(capsys, tmp_path / "swin.pt", tmp_path / "m", "--to", "folder", *words)
    model = read_folder(tmp_path / "m")
    assert done["entries"] == len(model.state) and model.config["vision_encoder"] == source.metadata()
    assert all(torch.equal(value, state.get(name, torch.ones(5))) for name, value in model.state.items())
    card = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert "# 3D Swin-L-47K" in card and "license: cc-by-nc-sa-4.0" in card and "CT-RATE, CTRG-Chest" in card
    assert str(tmp_path) not in card
    run(capsys, tmp_path / "m", tmp_path / "m2", "--to", "folder")
    assert read_folder(tmp_path / "m2").config["licence"] == model.config["licence"]
    assert "exists already" in run(capsys, tmp_path / "m", tmp_path / "m2", "--to", "folder", code=2)["told"]


def test_other_precisions_are_cast_only_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = {name: value.half() for name, value in encoder(1).state_dict().items()}
    torch.save(half, tmp_path / "half.pt")
    told = run(capsys, tmp_path / "half.pt", tmp_path / "own.pt", "--to", "mg3d", code=2)["told"]
    assert "torch.float16" in told and "--cast-float32" in told
    run(capsys, tmp_path / "half.pt", tmp_path / "own.pt", "--to", "mg3d", "--cast-float32")
    target = encoder(2)
    load_weights(target, tmp_path / "own.pt")
    assert all(torch.equal(value, half[name].float()) for name, value in target.state_dict().items())


def test_a_2d_file_needs_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"vit_model.conv1.weight": torch.zeros(4, 3, 2, 2), "text_transformer.embeddings.x": torch.ones(3)}
    torch.save({"state_dict": state}, tmp_path / "meter.ckpt")
    told = run(capsys, tmp_path / "meter.ckpt", tmp_path / "own.pt", "--to", "mg3d", code=2)["told"]
    assert "text and fusion parts only" in told
    done = run(capsys, tmp_path / "meter.ckpt", tmp_path / "own.pt", "--to", "mg3d", "--allow-partial")
    assert done["family"] == "meter" and done["dropped"] == 1 and done["entries"] == 1
    told = run(
        capsys, tmp_path / "meter.ckpt", tmp_path / "u.pt", "--to", "monai_swin_unetr", "--allow-partial", code=2
    )
    assert "only Swin encoders fit" in told["told"]


def test_refusals_and_help_need_no_torch(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "w.pt").touch()
    script = repository / "tools" / "convert_meter_weights.py"
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(script)!r}, *sys.argv[1:]]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules, 'monai' in sys.modules)\n"
    )
    cases = {
        ("--help",): "0 False False",
        ("absent.pt", "out", "--to", "mg3d"): "2 False False",
        ("w.pt", "dir", "--to", "mg3d", "--overwrite"): "2 False False",
        ("w.pt", "w.pt", "--to", "mg3d", "--overwrite"): "2 False False",
        ("w.pt", "out", "--to", "onnx"): "2 False False",
    }
    for words, expected in cases.items():
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, encoding="utf-8", check=True
        )
        assert done.stdout.splitlines()[-1] == expected, (words, done.stdout[-500:], done.stderr)
        assert len(done.stderr.splitlines()) <= 5
