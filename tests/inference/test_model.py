"""Any source of weights gives the same model; its numbers are those of the network; what it cannot do it refuses."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import mg3d
from mg3d.datasets.collate import collate_reports
from mg3d.datasets.report_text import encode_report
from mg3d.errors import CheckpointError, DataError, EnvironmentProblem
from mg3d.evaluation.features import embed_batch, embed_prompts
from mg3d.inference.model import MG3DModel, load_model
from mg3d.inference.processor import ProcessedScan
from mg3d.inference.volumes import pool_crops
from mg3d.models.network import MG3DNetwork
from mg3d.models.vision_encoders import create_vision_encoder
from tests.inference.tiny_weights import SPACING_ZYX, checkpoint, chest_hu, export, network, save_nifti, volumes
from tests.models.checkpoint_files import manifest_state, tiny_swin

PROMPTS = ["cardiomegaly is present", "no pleural effusion", "the lungs clear"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run: Path) -> MG3DModel:
    return load_model(run)


def as_batch(vol_B1DHW: Tensor) -> dict[str, Tensor]:
    return {"image": vol_B1DHW.transpose(1, 2)}


# ---------------------------------------------------------------- sources
def test_checkpoint_run_folder_and_export_are_one_model(
    run: Path, model: MG3DModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "version_0" / "checkpoints").mkdir(parents=True)
    shutil.copy(run, tmp_path / "version_0" / "checkpoints" / "last.ckpt")
    (tmp_path / "version_0" / "checkpoints" / "best-epoch1-step2.ckpt").write_bytes(b"not read")
    wanted = model.encode_image(volumes())
    with caplog.at_level(logging.INFO, logger="mg3d"):
        for place in (tmp_path / "version_0", export(tmp_path / "e")):
            again = load_model(place)
            assert torch.equal(again.encode_image(volumes()), wanted)  # type: ignore[arg-type]
            assert again.has_shared_space and again.report is not None and again.report.encoder_fraction == 1
            assert torch.equal(again.encode_text(PROMPTS), model.encode_text(PROMPTS))
    assert "loaded" in caplog.text and "encoder" in caplog.text
    assert not any(parameter.requires_grad for parameter in again.network.parameters())
    assert not again.network.training and again.digest == model.digest


def test_loading_draws_nothing_from_the_global_generator(run: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    load_model(run)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["swin_b", "swin_l"])
def test_the_architecture_of_a_flat_file_follows_from_its_tensors(tmp_path: Path, name: str) -> None:
    sizes = {"proj_hidden_dim": 24, "proj_out_dim": 48} if name == "swin_l" else {}
    encoder = tiny_swin(name=name, **sizes).eval()
    torch.save({f"module.{key}": value for key, value in encoder.state_dict().items()}, tmp_path / "w.pt")
    found = load_model(tmp_path / "w.pt")
    assert found.vision_encoder.name == name and found.metadata["patch_merging"] == "legacy"
    assert not found.has_shared_space and found.processor.size_dhw == (128, 96, 128)
    with torch.no_grad():
        assert torch.equal(found.vectors(volumes(), "pooled"), encoder.tokens(volumes()).mean(1))
    with pytest.raises(CheckpointError, match="holds an image encoder alone"):
        _ = found.network


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_b", "swin_l"])
def test_a_file_with_every_published_key_loads_whole(reference_dir: Path, tmp_path: Path, name: str) -> None:
    state = manifest_state(reference_dir, name)
    torch.save({key: value.clone() for key, value in state.items()}, tmp_path / "released.ckpt")
    found = load_model(tmp_path / "released.ckpt")
    assert found.report is not None and found.report.encoder_fraction == 1 and not found.report.missing
    assert isinstance(found.network, MG3DNetwork) and not found.has_shared_space
    held = found.network.state_dict()
    assert all(torch.equal(held[key], state[key]) for key in found.report.loaded)
    with pytest.raises(CheckpointError, match="no trained space"):
        found.encode_text(["effusion"])


def test_an_architecture_needs_to_be_meant(run: Path) -> None:
    with pytest.raises(CheckpointError, match="random_init=True"):
        load_model("swin_b")
    with pytest.raises(CheckpointError, match="holds weights"):
        load_model(run, random_init=True)
    torch.manual_seed(0)
    first = load_model("unet_pcrlv2", random_init=True)
    torch.manual_seed(0)
    assert torch.equal(next(first.vision_encoder.parameters()), next(create_vision_encoder("unet_pcrlv2").parameters()))
    assert not first.has_shared_space and "no shared image-text space" in repr(first)


def test_names_that_stand_for_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights at swim_b"):
        load_model("swim_b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="it holds nothing"):
        load_model(tmp_path / "empty")
    (tmp_path / "w.pt").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(tmp_path / "w.pt")
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "other.pt")


def test_half_an_encoder_is_refused_unless_allowed(run: Path, tmp_path: Path) -> None:
    content = torch.load(run, weights_only=True)
    names = [name for name in content["state_dict"] if name.startswith("vision_encoder.layers3")]
    for name in names:
        del content["state_dict"][name]
    torch.save(content, tmp_path / "half.ckpt")
    with pytest.raises(CheckpointError, match="covers only"):
        load_model(tmp_path / "half.ckpt")
    assert load_model(tmp_path / "half.ckpt", allow_partial=True).report.encoder_fraction < 1  # type: ignore[union-attr]


def test_a_hub_id_offline_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EnvironmentProblem, match="give the local folder"):
        load_model("nobody/no-such-model")


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(name: str, file: str, mend: str) -> None:
        raise EnvironmentProblem(f"the hub did not answer for {name!r}", mend)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("mg3d.inference.hub.hub_is_off", lambda: False)
    monkeypatch.setattr("mg3d.inference.hub.ask_hub", silent)
    with pytest.raises(EnvironmentProblem, match=r"did not answer.*\n.*local folder"):
        mg3d.load_processor("nobody/no-such-model")


def test_a_hub_id_gives_its_export_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(tmp_path)
    asked: list[dict[str, object]] = []

    def download(name: str, **options: object) -> str:
        asked.append(options)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_model("someone/tiny-mg3d").has_shared_space
    assert asked[0]["local_files_only"] and "*.bin" not in asked[0]["allow_patterns"]  # type: ignore[operator]


# ---------------------------------------------------------------- numbers
def test_features_are_those_of_the_network_and_its_evaluation(model: MG3DModel) -> None:
    made, vol = network(), volumes(3)
    with torch.no_grad():
        encoded = made.encode(as_batch(vol))
        assert torch.equal(model.vectors(vol, "tokens"), encoded.image_tokens)
        assert torch.equal(model.vectors(vol, "pooled"), encoded.image_tokens.mean(1))
        assert torch.equal(model.vectors(vol), made.encode_image(as_batch(vol)["image"]))
        maps = made.vision_encoder.forward_features(vol)
    found = model.encode_image(vol, "stages")
    assert len(found) == len(maps) and all(torch.equal(a, b) for a, b in zip(found, maps, strict=True))
    assert torch.allclose(model.vectors(vol).norm(dim=1), torch.ones(3), atol=1e-6)


def test_texts_and_reports_are_encoded_as_in_the_evaluation(model: MG3DModel) -> None:
    made = network()
    made.device = torch.device("cpu")  # what the training module has
    with torch.no_grad():
        assert torch.equal(model.encode_text(PROMPTS), embed_prompts(made, model.tokenizer, PROMPTS))
    reports = [
        encode_report(model.tokenizer, [text], ["the lungs clear."], max_text_len=24)
        for text in ("no pleural effusion.", "cardiomegaly is present.")
    ]
    batch = collate_reports(reports) | as_batch(volumes())
    with torch.no_grad():
        image, text = embed_batch(made, batch, made.encode(batch))
    assert torch.equal(model.encode_reports(reports), text)
    assert torch.equal(model.vectors(volumes()), image)


def test_zero_shot_is_the_evaluations_score(model: MG3DModel) -> None:
    vol, negatives = volumes(2), ["no cardiomegaly", "pleural effusion", "nodule"]
    image, text, against = model.vectors(vol), model.encode_text(PROMPTS), model.encode_text(negatives)
    alone = model.zero_shot(vol, PROMPTS)
    assert torch.allclose(alone.scores, image @ text.t()) and alone.prompts == tuple(PROMPTS)
    assert torch.allclose(alone.probabilities.sum(1), torch.ones(2))
    paired = model.zero_shot(vol, PROMPTS, negatives)
    assert torch.allclose(paired.scores, image @ (text - against).t(), atol=1e-6)
    assert torch.allclose(paired.probabilities, torch.sigmoid(paired.scores / 0.1))
    assert model.logit_scale == pytest.approx(10.0)
    with pytest.raises(DataError, match="one negative per prompt"):
        model.zero_shot(vol, PROMPTS, negatives[:1])


def test_crops_are_averaged(model: MG3DModel) -> None:
    scan = model.processor(chest_hu(), SPACING_ZYX, mode="crops")
    each = model.vectors(scan.volumes)
    assert len(each) == 8
    mean = each.mean(0, keepdim=True)
    assert torch.allclose(model.vectors(scan), mean / mean.norm(), atol=1e-6)
    pooled = model.vectors(scan.volumes, "pooled").mean(0, keepdim=True)
    assert torch.allclose(model.vectors(scan, "pooled"), pooled, atol=1e-6)
    assert model.vectors(scan, "tokens").shape == (1, 8 * 2, 48)
    assert torch.equal(pool_crops(each[:1], "embedding"), each[:1])


def test_one_call_for_one_scan(model: MG3DModel, run: Path, tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", chest_hu())
    processor = mg3d.load_processor(run)
    wanted = model.vectors(processor(path))
    assert wanted.shape == (1, 12)
    assert torch.equal(mg3d.encode_image(model, processor, path), wanted)  # type: ignore[arg-type]
    assert torch.equal(mg3d.encode_image(model, processor, chest_hu(), spacing_mm=SPACING_ZYX), wanted)  # type: ignore[arg-type]
    assert mg3d.zero_shot(model, processor, path, PROMPTS, mode="crops").scores.shape == (1, 3)
    assert torch.equal(mg3d.encode_text(model, PROMPTS), model.encode_text(PROMPTS))


def test_batch_size_changes_nothing_not_even_where_the_batch_normalises(model: MG3DModel) -> None:
    vol = volumes(3)
    assert torch.allclose(model.encode_image(vol, batch_size=1), model.encode_image(vol, batch_size=3), atol=1e-5)  # type: ignore[arg-type]
    torch.manual_seed(0)
    encoder = create_vision_encoder("unet", base_width=2).eval()
    unet = MG3DModel(
        torch.nn.ModuleDict({"vision_encoder": encoder}),
        name="unet",
        metadata={},
        report=None,
        has_shared_space=False,
        preparation={},
    )
    unet._network.vision_encoder = encoder  # type: ignore[assignment]
    together = unet.vectors(vol, "pooled", 3)
    assert torch.equal(together[:1], unet.vectors(vol[:1], "pooled"))


# ---------------------------------------------------------------- refusals
def test_without_a_trained_space_nothing_is_compared(tmp_path: Path) -> None:
    plain = load_model(checkpoint(tmp_path / "plain", shared=False))
    assert not plain.has_shared_space and plain.vectors(volumes(), "pooled").shape == (2, 48)
    for ask in (
        lambda: plain.encode_image(volumes()),
        lambda: plain.encode_text(PROMPTS),
        lambda: plain.zero_shot(volumes(), PROMPTS),
        lambda: plain.encode_reports([]),
        lambda: plain.logit_scale,
        lambda: plain.embedding_width,
    ):
        with pytest.raises(CheckpointError, match="no trained space that images and texts share"):
            ask()
    # heads that were never trained: the weights say so
    untrained = load_model(checkpoint(tmp_path / "untrained", has_shared_space=False))
    with pytest.raises(CheckpointError, match="no trained space"):
        untrained.encode_text(PROMPTS)


def test_a_space_of_which_parts_are_missing_is_not_used(run: Path, tmp_path: Path) -> None:
    content = torch.load(run, weights_only=True)
    del content["state_dict"]["image_text_itc_head.text_norm.mean"]
    torch.save(content, tmp_path / "w.ckpt")
    assert not load_model(tmp_path / "w.ckpt").has_shared_space


def test_values_that_are_no_volumes_are_refused(model: MG3DModel) -> None:
    for wrong, why in (
        (chest_hu()[None, None].astype(np.float32), "are not in \\[0, 1\\]"),
        (volumes()[0], "got shape"),
        (torch.zeros(1, 2, 64, 32, 32), "got shape"),
        (torch.zeros(1, 1, 64, 32, 32, dtype=torch.int16), "got torch.int16"),
        (torch.full((1, 1, 64, 32, 32), float("nan")), "are not in"),
        (torch.zeros(0, 1, 64, 32, 32), "got shape"),
    ):
        with pytest.raises(DataError, match=why):
            model.encode_image(wrong)
    with pytest.raises(DataError, match="choose one of"):
        model.encode_image(volumes(), "features")  # type: ignore[arg-type]
    for texts in ([], "one text", ["a", " "], [None]):
        with pytest.raises(DataError, match=r"text"):
            model.encode_text(texts)  # type: ignore[arg-type]


def test_a_missing_tokenizer_is_named(run: Path, tmp_path: Path) -> None:
    content = torch.load(run, weights_only=True)
    content["mg3d_metadata"]["text_encoder"] = str(tmp_path / "gone" / "text")
    torch.save(content, tmp_path / "w.ckpt")
    lost = load_model(tmp_path / "w.ckpt")
    assert lost.vectors(volumes()).shape == (2, 12)
    with pytest.raises(EnvironmentProblem, match=r"tokenizer=<folder of the tokenizer>"):
        lost.encode_text(PROMPTS)
    found = load_model(tmp_path / "w.ckpt", tokenizer=run.parent / "text")
    assert found.encode_text(PROMPTS).shape == (3, 12)


def test_a_relative_tokenizer_is_found_beside_the_run(run: Path, tmp_path: Path) -> None:
    content = torch.load(run, weights_only=True)
    content["mg3d_metadata"]["text_encoder"] = "data/text"
    (tmp_path / "result" / "version_0").mkdir(parents=True)
    shutil.copytree(run.parent / "text", tmp_path / "data" / "text")
    torch.save(content, tmp_path / "result" / "version_0" / "last.ckpt")
    assert load_model(tmp_path / "result" / "version_0").encode_text(PROMPTS).shape == (3, 12)


def test_an_unknown_device_is_refused(run: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot use device"):
        load_model(run, device="cuda:99")


def test_a_scan_is_a_sequence_of_volumes() -> None:
    grid = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4) / 24
    scan = ProcessedScan(grid, (2, 3, 2), ((0, 0, 0), (0, 0, 2)), (1, 1, 1), "crops", {})
    assert len(scan) == 2 and np.array_equal(scan.volumes[1, 0], grid[:, :, 2:])
