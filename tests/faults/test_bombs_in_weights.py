"""Weights files that claim more than they hold: sizes, depths, nesting and inflation are bounded before use."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mg3d import load_model, load_processor
from mg3d.datasets.stored_geometry import published_geometry
from mg3d.errors import CheckpointError
from mg3d.finetuning.config import resolve_finetune_config
from mg3d.models.checkpoint import check_resumable, describe_weights, load_weights
from mg3d.models.conversion import read_own_weights
from mg3d.models.export import export_folder
from mg3d.models.finetune.weights import build_encoder
from mg3d.models.nnunet_format import describe_encoder, stated_architecture
from mg3d.models.vision_encoders import create_vision_encoder, encoder_from_metadata
from mg3d.models.weights_file import read_weights_file, write_sidecar
from mg3d.training.checkpoint_io import AtomicCheckpointIO
from tests.inference.tiny_weights import checkpoint as whole_checkpoint
from tests.peak_memory import PEAK_MIB

SIZES = {"embed_dim": 4, "depths": (2, 2), "num_heads": (2, 4), "window_size": 3}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_encoder = create_vision_encoder("swin_b", **SIZES)


def content(**changes: Any) -> dict[str, Any]:
    model = Model()
    metadata = describe_weights(model, input_size_dhw=[32, 32, 32], **published_geometry()) | changes
    return {"state_dict": model.state_dict(), "mg3d_metadata": metadata}


def described(**changes: Any) -> dict[str, Any]:
    return {"vision_encoder": Model().vision_encoder.metadata() | changes}


HUGE: dict[str, dict[str, Any]] = {
    "depths": described(depths=[10**6, 2]),
    "width": described(embed_dim=100_000),
    "window": described(window_size=[4096] * 3),
    "heads": described(num_heads=[10**9, 4]),
    "no_number": described(embed_dim="forty-eight"),
    "a_bool": described(embed_dim=True),
    "nan": described(mlp_ratio=float("nan")),
    "many_stages": described(depths=[1] * 10**5, num_heads=[1] * 10**5),
    "nested": described(depths=[[[[[2]]]], 2]),
    "crop": {"crop_fractions_dhw": [5, 1, 1]},
    "input": {"input_size_dhw": [10**6] * 3},
    "spacing": {"spacing_mm": [1e9, 1, 1]},
    "options": {"options": {"num_top_layer": 10**9}},
    "options_kind": {"options": [1, 2]},
    "corpora": {"corpora": {"clm_ct_rate": {"spacing_mm": [0, 0, 0]}}},
    "licence": {"licence": "CC"},
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_description_out_of_bounds_is_refused_before_anything_is_built(tmp_path: Path, kind: str) -> None:
    torch.save(content(**HUGE[kind]), tmp_path / "w.ckpt")
    cfg = resolve_finetune_config({"weights": str(tmp_path / "w.ckpt")})
    doors: tuple[Callable[[], object], ...] = (
        lambda: read_own_weights(tmp_path / "w.ckpt", allow_partial=True),
        lambda: load_model(tmp_path / "w.ckpt"),
        lambda: load_processor(tmp_path / "w.ckpt"),
        lambda: build_encoder(cfg),
        lambda: export_folder(tmp_path / "w.ckpt", tmp_path / "out"),
    )
    for enter in doors:
        with pytest.raises(CheckpointError, match=r"w\.ckpt|description") as caught:
            enter()
        assert len(str(caught.value).splitlines()) <= 5 and len(str(caught.value)) < 500


def test_sizes_within_bounds_that_make_an_immense_network_are_refused() -> None:
    """Every number is possible, all of them together are not; the network exists only without memory."""
    with pytest.raises(CheckpointError, match=r"takes .* GiB, more than 8"):
        encoder_from_metadata({"name": "swin_b", "embed_dim": 4096, "depths": [2] * 4, "num_heads": [4, 8, 16, 32]})
    with pytest.raises(CheckpointError, match=r"cannot be built \(stage 1 has 5 channels"):
        encoder_from_metadata({"name": "swin_b", "embed_dim": 5, "depths": [1], "num_heads": [2]})


@pytest.mark.parametrize("name", ["config.json", "preprocessor.json"])
def test_the_parts_of_an_export_folder_are_bounded_too(tmp_path: Path, name: str) -> None:
    torch.save(content(), tmp_path / "w.ckpt")
    folder = export_folder(tmp_path / "w.ckpt", tmp_path / "out")
    good = json.loads((folder / name).read_text(encoding="utf-8"))
    bad = {"vision_encoder": {"embed_dim": 10**6}} if name == "config.json" else {"crop_fractions_dhw": [5, 5, 5]}
    for text in (json.dumps(good | bad), "[" * 10**6, "[1, 2]", '{"a": ' * 10**5, "\x00"):
        (folder / name).write_text(text)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load_model(folder)
        if name == "preprocessor.json":
            with pytest.raises(CheckpointError, match=r"preprocessor\.json|stored preparation"):
                load_processor(folder)


def test_hyper_parameters_of_another_program_are_bounded_too(tmp_path: Path) -> None:
    state = content()["state_dict"]
    torch.save({"state_dict": state, "hyper_parameters": {"hidden_size": 10**9}}, tmp_path / "w.ckpt")
    with pytest.raises(CheckpointError, match="hidden_size"):
        read_own_weights(tmp_path / "w.ckpt")


@pytest.mark.parametrize("plans", [[], "x", {"configurations": 3}, {"configurations": {"3d_fullres": [1]}}])
def test_plans_of_another_kind_are_no_plans(plans: object) -> None:
    assert stated_architecture({"plans": plans}) == {}


def test_plans_of_immense_networks_are_refused() -> None:
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    sizes = {"features_per_stage": 8, "strides": 1, "kernel_sizes": 3, "n_conv_per_stage": 2}
    for stages in (10**9, "x", None, -1):
        with pytest.raises(CheckpointError, match="plans"):
            describe_encoder({"network_class_name": name, "arch_kwargs": sizes | {"n_stages": stages}})
    with pytest.raises(CheckpointError, match="plans"):
        describe_encoder({"network_class_name": name, "arch_kwargs": [1]})


def packed_again(path: Path, source: bytes, compression: int) -> None:
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(path, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deflated torch file of well under a mebibyte that holds half a gibibyte of zeros."""
    stream = io.BytesIO()
    torch.save({"state_dict": {"vision_encoder.x": torch.zeros(2**27)}}, stream)
    path = tmp_path_factory.mktemp("bomb") / "w.ckpt"
    packed_again(path, stream.getvalue(), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    write_sidecar(path)
    return path


def test_a_deflated_torch_file_is_refused_by_every_door_without_inflating_it(bomb: Path) -> None:
    doors = {
        "load_model": "from mg3d import load_model as enter",
        "convert": "from mg3d.models.conversion import read_own_weights as enter",
        "resume": "from mg3d.training.checkpoint_io import AtomicCheckpointIO as IO; enter = IO().load_checkpoint",
    }
    for door, importing in doors.items():
        code = (
            f"{PEAK_MIB}\n{importing}\nimport sys\nfrom mg3d.errors import CheckpointError\n"
            "before = peak_mib()\n"
            "try:\n    enter(sys.argv[1])\nexcept CheckpointError as error:\n    print(error)\n"
            "print(peak_mib() - before)"
        )
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code, str(bomb)], capture_output=True, encoding="utf-8", env=environ, check=True
        )
        *told, mib = done.stdout.splitlines()
        assert "is compressed" in " ".join(told), (door, done.stdout)
        assert int(mib) < 128, (door, mib)


def test_a_stored_archive_passes_and_one_that_claims_too_much_does_not(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(content(), stream)
    packed_again(tmp_path / "stored.ckpt", stream.getvalue(), zipfile.ZIP_STORED)
    load_weights(Model(), tmp_path / "stored.ckpt")
    data = bytearray((tmp_path / "stored.ckpt").read_bytes())
    place = data.rfind(b"PK\x01\x02")  # last entry of the directory: claim 2 GiB
    data[place + 20 : place + 28] = (2**31).to_bytes(4, "little") * 2
    (tmp_path / "claims.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match="claim more bytes"):
        load_weights(Model(), tmp_path / "claims.ckpt")


class Allocates:
    def __reduce__(self) -> tuple:
        return bytearray, (10**12,)


@pytest.mark.parametrize("old_format", [False, True])
def test_memory_by_a_number_alone_is_refused(tmp_path: Path, old_format: bool) -> None:
    path = tmp_path / "w.ckpt"
    torch.save(content() | {"notes": Allocates()}, path, _use_new_zipfile_serialization=not old_format)
    for enter in (read_weights_file, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(CheckpointError, match=r"bytearray|not a whole checkpoint"):
            enter(path)


def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path: Path) -> None:
    plain = torch.ones(4, 4)
    cases = {
        "expanded": torch.zeros(1).expand(10**6, 10**6),
        "meta": torch.empty(4, device="meta"),
        "sparse": plain.to_sparse(),
        "quantised": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "complex": plain.to(torch.complex64),
        "nested": torch.nested.nested_tensor([plain, plain]),
    }
    for name, value in cases.items():
        path = tmp_path / f"{name}.ckpt"
        torch.save({"state_dict": {"vision_encoder.x": value}}, path)
        with pytest.raises(CheckpointError, match=r"no plain numbers|GiB of tensors|is refused"):
            read_weights_file(path)


def test_safetensors_with_an_immense_or_deep_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for size in (2**62, 10**8):
        with open(path, "wb") as stream:
            stream.write(size.to_bytes(8, "little") + b"{")
            stream.truncate(10**8 + 100)
        with pytest.raises(CheckpointError, match=r"header|damaged"):
            read_weights_file(path)
    for metadata in ("[" * 10**6, '{"a":' * 10**5, "{", "nul"):
        save_file({"x": torch.zeros(2)}, path, {"mg3d_metadata": metadata})
        with pytest.raises(CheckpointError, match="damaged"):
            read_weights_file(path)


ADVICE = ("weights_only", "trust", "add_safe_globals", "arbitrary code", "safe_globals")


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_no_door_repeats_the_advice_to_load_unsafely(tmp_path: Path) -> None:
    files: dict[str, Callable[[Path], object]] = {
        "reduce": lambda path: torch.save(content() | {"x": Evil(tmp_path / "marker")}, path),
        "class": lambda path: torch.save(content() | {"x": Path("a")}, path),
        "module": lambda path: torch.save(nn.Linear(2, 2), path),
        "plain_pickle": lambda path: path.write_bytes(pickle.dumps({"x": Evil(tmp_path / "marker")}, protocol=2)),
        "script": lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path)),
        "html": lambda path: path.write_text("<html>quota</html>"),
    }
    for name, write in files.items():
        path = tmp_path / f"{name}.ckpt"
        write(path)
        for enter in (read_weights_file, load_model, AtomicCheckpointIO().load_checkpoint):
            with pytest.raises(CheckpointError) as caught:
                enter(path)
            assert not [word for word in ADVICE if word in str(caught.value)], (name, str(caught.value))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 16384, "num_top_layer": 256},
        {"hidden_size": 7},
        {"fusion_variant": ["mean"]},
        {"objectives": 3},
        {"volume_size": [10, 20]},
    ],
)
def test_a_network_around_the_encoder_that_cannot_be_built_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    good = torch.load(whole_checkpoint(tmp_path), weights_only=True)
    good["mg3d_metadata"]["options"] |= options
    torch.save(good, tmp_path / "w.ckpt")
    with pytest.raises(CheckpointError, match=r"network|options"):
        load_model(tmp_path / "w.ckpt")


def test_a_state_dict_without_tensors_is_not_resumed() -> None:
    for state in ([1], {"x": 3}, {"x": {"y": torch.ones(1)}}):
        with pytest.raises(CheckpointError, match="no tensors"):
            check_resumable(Model(), {"state_dict": state})
