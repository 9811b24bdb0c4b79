from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tiny_network import HIDDEN, TEXT_LEN, VOCAB, VOLUME, bert_config, tiny_batch
from torch.utils.data import DataLoader

from mg3d.config_schema import resolve_config
from mg3d.errors import ConfigError
from mg3d.models.epoch_means import EpochMeans
from mg3d.models.mg3d_module import EPOCH_SUMS_KEY, MG3DModule
from mg3d.models.weights_file import METADATA_KEY

TASKS = ("sen_mlm", "swin_unetr_mim", "local_itc")


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    bert_config().save_pretrained(folder)
    return folder


def module(bert_folder: Path, num_training_steps: int | None = None, **keys) -> MG3DModule:
    torch.manual_seed(0)
    values = {
        "tokenizer": str(bert_folder),
        "text_encoder_random_init": True,
        "vocab_size": VOCAB,
        "max_text_len": TEXT_LEN,
        "hidden_size": HIDDEN,
        "image_size": list(VOLUME),
        "vision_encoder_options": {
            "embed_dim": 6,
            "depths": [2, 1, 1],
            "num_heads": [3, 6, 12],
            "window_size": 2,
            "patch_size": 4,
        },
        "data_root": "/somewhere/private/arrows",
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "max_steps": 4,
    }
    return MG3DModule(resolve_config(values | keys), num_training_steps=num_training_steps)


def loader(*seeds: int, counts: tuple[int, ...] = (3, 2)) -> DataLoader:
    return DataLoader([tiny_batch(counts, seed) for seed in seeds], batch_size=None)


def trainer(folder: Path, **options) -> pl.Trainer:
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    checkpoint = ModelCheckpoint(dirpath=folder, monitor="val/the_metric", mode="max", save_last=True)
    return pl.Trainer(default_root_dir=folder, callbacks=[checkpoint], num_sanity_val_steps=0, **(quiet | options))


@pytest.fixture(scope="module")
def fitted(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MG3DModule, pl.Trainer, Path]:
    folder = tmp_path_factory.mktemp("run")
    model, run = module(bert_folder), trainer(folder, max_epochs=1)
    run.fit(model, loader(0, 1), loader(5, 6))
    return model, run, folder


def test_logged_names_and_the_metric(fitted):
    _, run, _ = fitted
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    for task in TASKS:
        for phase in ("train", "val"):
            keys = ("loss", "accuracy", "loss_epoch", "accuracy_epoch")
            assert {f"{task}/{phase}/{key}" for key in keys} <= set(logged)
    assert not any("accusracy" in name for name in logged)
    for phase in ("train", "val"):
        wanted = logged[f"sen_mlm/{phase}/accuracy_epoch"]
        wanted -= logged[f"swin_unetr_mim/{phase}/loss_epoch"] + logged[f"local_itc/{phase}/loss_epoch"]
        assert logged[f"{phase}/the_metric"] == pytest.approx(wanted, rel=1e-5)
    assert logged["swin_unetr_mim/val/accuracy_epoch"] == -logged["swin_unetr_mim/val/loss_epoch"]


def test_validation_means_over_batches(fitted):
    model, run, _ = fitted
    model.eval()
    with torch.no_grad():
        each = [model(tiny_batch((3, 2), seed)) for seed in (5, 6)]
    loss = sum(float(out["local_itc"]["local_itc_loss"]) for out in each) / 2
    assert float(run.callback_metrics["local_itc/val/loss_epoch"]) == pytest.approx(loss, rel=1e-4)
    counts = [int(out["sen_mlm"]["accuracy_count"]) for out in each]
    hits = sum(float(out["sen_mlm"]["accuracy"]) * count for out, count in zip(each, counts, strict=True))
    assert float(run.callback_metrics["sen_mlm/val/accuracy_epoch"]) == pytest.approx(hits / sum(counts), abs=1e-6)


def test_checkpoints_hold_plain_values_and_metadata(fitted, bert_folder):
    _, _, folder = fitted
    stored = torch.load(folder / "last.ckpt", weights_only=True)
    assert not any(name.startswith(("net.", "model.")) for name in stored["state_dict"])
    assert "vision_encoder.patch_embed.proj.weight" in stored["state_dict"]
    metadata = stored[METADATA_KEY]
    assert json.loads(json.dumps(metadata)) == metadata
    assert metadata["patch_merging"] == "legacy"
    assert metadata["input_size_dhw"] == list(VOLUME)
    assert metadata["text_encoder"] == str(bert_folder)
    assert metadata["options"]["hidden_size"] == HIDDEN
    assert json.loads(json.dumps(stored["hyper_parameters"])) == stored["hyper_parameters"]
    assert stored["hyper_parameters"]["loss_names"]["local_itc"] == 0.1
    assert stored["hyper_parameters"]["data_root"] == "arrows"
    fresh = module(bert_folder)
    fresh.load_state_dict(stored["state_dict"], strict=True)


def test_geometry_goes_into_the_metadata(bert_folder):
    model = module(bert_folder)
    model.geometry = {"spacing_mm": [1.5, 0.75, 0.75]}
    assert model.metadata()["spacing_mm"] == [1.5, 0.75, 0.75]


def test_test_step_logs_like_validation(fitted, tmp_path):
    model, _, _ = fitted
    run = trainer(tmp_path)
    (logged,) = run.test(model, loader(5, 6), verbose=False)
    assert {"test/the_metric", "sen_mlm/test/loss", "local_itc/test/loss_epoch"} <= set(logged)


def test_training_step_returns_the_weighted_total_and_its_terms(bert_folder):
    weights = {"sen_mlm": 0.5, "local_itc": 2.0}
    model, batch = module(bert_folder, loss_names=weights).train(), tiny_batch((3, 2))
    found = model.training_step(batch, 0)
    terms = model.last_step_terms
    total = 0.5 * terms["sen_mlm/train/loss"] + 2.0 * terms["local_itc/train/loss"]
    assert float(found["loss"].detach()) == pytest.approx(total, rel=1e-6)
    assert not any("swin_unetr_mim" in name for name in terms)
    assert all(isinstance(value, float) for value in terms.values())
    assert {"sen_mlm/train/sal", "local_itc/train/cml", "local_itc/train/ssm", "train/loss"} <= set(terms)
    assert not any(value.requires_grad for name, value in found.items() if name != "loss")


def test_optimizer_covers_what_trains(bert_folder):
    found = module(bert_folder, num_training_steps=10, warmup_steps=2).configure_optimizers()
    groups = found["optimizer"].param_groups
    assert [group["initial_lr"] for group in groups] == pytest.approx([1e-3, 1e-3, 5e-3, 5e-3, 5e-3, 5e-3])
    model = module(bert_folder)
    held = sum(len(group["params"]) for group in groups)
    assert held == sum(p.requires_grad for p in model.parameters())
    assert found["lr_scheduler"]["interval"] == "step"
    assert groups[0]["lr"] == 0.0  # the first step of the warm-up
    with pytest.raises(ConfigError, match="number of training steps"):
        module(bert_folder, max_steps=None).configure_optimizers()


def test_pictures(bert_folder):
    model = module(bert_folder).eval()
    pictures = model.visualise(tiny_batch((3, 0, 2)))
    depth, height, width = VOLUME
    assert pictures["reconstruction/axial"].shape == (height, 3 * width)
    assert pictures["reconstruction/coronal"].shape == (depth, 3 * width)
    assert pictures["sentence_similarity/text"].shape == pictures["sentence_similarity/image"].shape == (40, 40)
    assert all(0.0 <= float(each.min()) <= float(each.max()) <= 1.0 for each in pictures.values())
    assert "sentence_similarity/text" not in model.visualise(tiny_batch((0, 0)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"input_image_embed_size": 99}, "input_image_embed_size=99"),
        ({"input_text_embed_size": 99}, "input_text_embed_size=99"),
        ({"vocab_size": VOCAB + 1}, "vocab_size"),
        ({"max_text_len": 65}, "max_text_len"),
        ({"hidden_size": 56}, "56"),
    ],
)
def test_keys_that_do_not_fit_are_refused(bert_folder, keys, message):
    with pytest.raises(ConfigError, match=message):
        module(bert_folder, **keys)


def test_an_open_vocabulary_size_is_the_encoders(bert_folder):
    assert module(bert_folder, vocab_size=None).options.vocab_size == VOCAB


def test_every_objective_and_switch_of_the_config_reaches_the_network(bert_folder):
    keys = {
        "loss_names": {"itc": 1, "itm": 1, "local_itc": 1},
        "contrastive_gather": "local",
        "memory_queue": "xbm",
        "itc_text_source": "sentence",
        "ssm_positive_threshold": 0.8,
        "patch_merging": "fixed",
        "legacy_unused_modules": True,
    }
    model = module(bert_folder, **keys)
    assert model.options.objectives == ("local_itc", "itc", "itm")
    assert (model.options.contrastive_gather, model.options.ssm_positive_threshold) == ("local", 0.8)
    assert model.metadata()["patch_merging"] == "fixed"
    assert hasattr(model, "multi_modal_vision_layers")
    found = model.training_step(tiny_batch((3, 2), false_images=1), 0)
    assert torch.isfinite(found["loss"].detach())


def test_epoch_sums_survive_a_checkpoint(bert_folder):
    model = module(bert_folder)
    model.training_step(tiny_batch((3, 2)), 0)
    checkpoint: dict = {}
    model.on_save_checkpoint(checkpoint)
    fresh = module(bert_folder)
    fresh.on_load_checkpoint(checkpoint)
    again: dict = {}
    fresh.on_save_checkpoint(again)
    torch.testing.assert_close(again[EPOCH_SUMS_KEY], checkpoint[EPOCH_SUMS_KEY])
    assert "sen_mlm/train/loss" in again[EPOCH_SUMS_KEY]


def test_epoch_means_weigh_their_cases():
    means = EpochMeans()
    means.add("a", torch.tensor(1.0), 1)
    means.add("a", torch.tensor(4.0), 3)
    means.add("empty", torch.tensor(0.0), 0)
    assert means.means() == {"a": 3.25, "empty": 0.0}
    means.reset()
    assert means.means() == {}


def test_steps_are_not_asked_from_the_trainer():
    """Reading the trainer's own estimate would silently drop the state of a stateful loader."""
    code = Path(sys.modules[MG3DModule.__module__].__file__ or "").read_text(encoding="utf-8")
    assert "estimated_stepping_batches" not in code


def test_importing_the_objectives_registry_is_light():
    """Names can be listed without building or importing an encoder."""
    script = (
        "import sys; from mg3d.models.objectives import OBJECTIVES; "
        "print(sorted(m for m in sys.modules if m in ('monai', 'transformers', 'pytorch_lightning')), len(OBJECTIVES))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    assert result.stdout.strip() == "[] 5"
