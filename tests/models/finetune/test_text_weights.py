"""CT-CLIP's text side through the door for weights: values, what is left out and why, refusals (downstream 7.4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from mg3d.errors import CheckpointError, ConfigError
from mg3d.finetuning.config import resolve_finetune_config
from mg3d.models import weight_maps
from mg3d.models.finetune.text_weights import NO_TEXT, load_text_weights
from mg3d.models.finetune.vocabulary import VocabularyNetwork, VocabularyOptions
from mg3d.models.finetune.weights import build_encoder, load_encoder_weights
from mg3d.models.language_encoders import create_text_encoder, create_tokenizer
from mg3d.models.vision_encoders import create_vision_encoder
from mg3d.phantoms.text_encoder import HIDDEN_SIZE, write_text_encoder

LATENT = 32
SIZE = (32, 32, 32)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "encoder"
    write_text_encoder(folder, ["Cardiomegaly is present."], seed=0)
    return folder


def ct_clip(text_folder: Path, seed: int = 1, **sizes: int) -> dict[str, Tensor]:
    """A random model in the layout of CT-CLIP's published checkpoint, with parts of its image encoder."""
    torch.manual_seed(seed)
    config = BertConfig.from_pretrained(text_folder, **sizes)
    text = {f"text_transformer.{name}": value for name, value in BertModel(config).state_dict().items()}
    positions = torch.arange(config.max_position_embeddings)[None]
    latents = {"to_text_latent.weight": (LATENT, config.hidden_size), "to_visual_latent.weight": (LATENT, 4096)}
    image = {
        "visual_transformer.to_patch_emb.1.weight": (64,),
        "visual_transformer.enc_spatial_transformer.layers.0.1.to_q.weight": (16, 16),
        "visual_transformer.vq._codebook.embed": (1, 64, 16),
    }
    others = {name: torch.randn(shape) for name, shape in {**latents, **image}.items()}
    extras = {name.replace(".weight", "_extra.weight"): others[name].clone() for name in latents}
    constants = {"text_transformer.embeddings.position_ids": positions}
    return {**text, **others, **extras, **constants, "temperature": torch.tensor(1.375)}


def network(text_folder: Path, **options: Any) -> VocabularyNetwork:
    chosen = VocabularyOptions(**{"size_dhw": SIZE, "width": HIDDEN_SIZE, "latent": LATENT, **options})
    vision = create_vision_encoder("swin_b", embed_dim=12, patch_merging="fixed")
    return VocabularyNetwork(vision, create_text_encoder(str(text_folder), random_init=True), chosen)


@pytest.mark.parametrize("wrapped", ["flat", "state_dict"])
def test_every_tensor_of_the_text_side_arrives(text_folder: Path, tmp_path: Path, wrapped: str) -> None:
    stored, made = ct_clip(text_folder), network(text_folder)
    torch.save(stored if wrapped == "flat" else {"state_dict": stored, "epoch": 3}, tmp_path / "ctclip.pt")
    before = {name: value.clone() for name, value in made.state_dict().items()}
    report = load_text_weights(made, str(tmp_path / "ctclip.pt"))
    after = made.state_dict()
    arrived = {name for name, value in after.items() if not torch.equal(value, before[name])}
    wanted = {
        name.replace("text_transformer.", "language_encoder."): value
        for name, value in stored.items()
        if name.startswith("text_transformer.") and not name.endswith("position_ids")
    }
    wanted |= {name: stored[name] for name in ("to_text_latent.weight", "temperature")}
    assert set(report.loaded) == set(wanted) >= arrived
    for name, value in wanted.items():
        assert torch.equal(after[name], value), name
    assert {"language_encoder.encoder.layer.1.output.dense.weight", "temperature", "to_text_latent.weight"} <= arrived
    assert report.family == "ct_clip" and report.encoder_loaded == report.encoder_total == len(wanted) - 4
    assert report.dropped["visual_transformer.to_patch_emb.1.weight"] == weight_maps.OTHER_ENCODER
    assert report.dropped["to_visual_latent.weight"] == weight_maps.OF_OTHER_ENCODER
    assert report.dropped["to_text_latent_extra.weight"] == weight_maps.NEVER_USED
    assert report.dropped["text_transformer.embeddings.position_ids"] == weight_maps.CONSTANT
    assert len(report.loaded) + len(report.dropped) == len(stored) and not report.unexpected
    assert "CTViT" in str(report)


def test_prompts_are_read_as_ct_clip_reads_them(text_folder: Path, tmp_path: Path) -> None:
    stored = ct_clip(text_folder)
    torch.save(stored, tmp_path / "ctclip.pt")
    made = network(text_folder, project=True, fusion="none").eval()
    load_text_weights(made, str(tmp_path / "ctclip.pt"))
    model = BertModel(BertConfig.from_pretrained(text_folder)).eval()
    model.load_state_dict(
        {n.removeprefix("text_transformer."): v for n, v in stored.items() if n.startswith("text_transformer.")},
        strict=False,
    )
    tokens = create_tokenizer(str(text_folder))(
        ["Cardiomegaly.", "not Cardiomegaly."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        first = model(**tokens).last_hidden_state[:, 0]
        found = made.text_features(tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(found, first, atol=1e-5, rtol=1e-4)
    latents = made.to_text_latent(first)
    torch.testing.assert_close(latents, first @ stored["to_text_latent.weight"].t(), atol=1e-5, rtol=1e-4)


def test_latents_that_do_not_fit_or_are_not_wanted_stay_and_are_told(text_folder: Path, tmp_path: Path) -> None:
    torch.save(ct_clip(text_folder), tmp_path / "ctclip.pt")
    wide = network(text_folder, latent=48)
    report = load_text_weights(wide, str(tmp_path / "ctclip.pt"))
    assert "latent=32 width=96" in report.dropped["to_text_latent.weight"] and not report.reshaped
    made = network(text_folder)
    before = made.to_text_latent.weight.detach().clone()
    report = load_text_weights(made, str(tmp_path / "ctclip.pt"), latents_out="left out as published")
    assert report.dropped["to_text_latent.weight"] == "left out as published"
    assert torch.equal(made.to_text_latent.weight, before) and "temperature" in report.loaded


def test_another_width_and_missing_layers_are_refused(text_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "ctclip.pt"
    made = network(text_folder)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    torch.save(ct_clip(text_folder, hidden_size=48), path)
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight \(\d+, 48\), not \(\d+, 96\)"):
        load_text_weights(made, str(path))
    torch.save(ct_clip(text_folder, num_hidden_layers=1), path)
    with pytest.raises(CheckpointError, match=r"16 missing, first language_encoder\.encoder\.layer\.1\."):
        load_text_weights(made, str(path))
    torch.save({"visual_transformer.x": torch.zeros(1), "to_visual_latent.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="no text encoder"):
        load_text_weights(made, str(path))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_more_than_tensors_is_never_run(text_folder: Path, tmp_path: Path) -> None:
    torch.save({**ct_clip(text_folder), "args": Path("x")}, tmp_path / "ctclip.pt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_text_weights(network(text_folder), str(tmp_path / "ctclip.pt"))


def test_it_is_no_image_encoder_and_says_where_it_belongs(text_folder: Path, tmp_path: Path) -> None:
    torch.save(ct_clip(text_folder), tmp_path / "ctclip.pt")
    with pytest.raises(ConfigError, match="text_weights="):
        build_encoder(resolve_finetune_config({"weights": str(tmp_path / "ctclip.pt")}))


def test_pre_trained_text_is_taken_whole_or_not_at_all(text_folder: Path, tmp_path: Path) -> None:
    """MG-3D's own text encoder has other words than CXR-BERT: half of each would read nothing."""

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(text_folder)
            self.encoder = self.network.visual.encoder

    pretrained, made = network(text_folder), Holder()
    state = {name.replace("visual.encoder.", "vision_encoder."): v for name, v in pretrained.state_dict().items()}
    words = "language_encoder.embeddings.word_embeddings.weight"
    cfg = resolve_finetune_config({"weights": str(tmp_path / "mg3d.pt"), "patch_merging": "fixed"})
    torch.save({**state, words: torch.zeros(7, HIDDEN_SIZE)}, tmp_path / "mg3d.pt")
    before = {name: value.clone() for name, value in made.network.language_encoder.state_dict().items()}
    report = load_encoder_weights(made, cfg, ("language_encoder.",))
    assert report.encoder_fraction == 1.0
    assert all(torch.equal(v, before[name]) for name, v in made.network.language_encoder.state_dict().items())
    assert "text encoder of other sizes" in report.dropped["language_encoder.encoder.layer.0.output.dense.weight"]
    torch.save(state, tmp_path / "mg3d.pt")
    load_encoder_weights(made, cfg, ("language_encoder.",))
    found = made.network.language_encoder.state_dict()
    assert all(torch.equal(v, found[name]) for name, v in pretrained.language_encoder.state_dict().items())
    report = load_text_weights(made.network, str(tmp_path / "mg3d.pt"))
    assert report.family == "mg3d" and NO_TEXT in report.dropped.values()


def test_cxr_bert_is_read_without_running_its_program(text_folder: Path, tmp_path: Path) -> None:
    """Its config names a program; the architecture is BERT's, and nobody is asked whether to run it."""
    folder = tmp_path / "cxr_bert"
    write_text_encoder(folder, ["Cardiomegaly is present."], seed=0)
    for file, changes in (
        ("config.json", {"model_type": "cxr-bert", "architectures": ["CXRBertModel"], "projection_size": 128}),
        ("tokenizer_config.json", {"tokenizer_class": "CXRBertTokenizer"}),
    ):
        stored = json.loads((folder / file).read_text(encoding="utf-8"))
        stored |= changes | {"auto_map": {"AutoConfig": "x.C", "AutoModel": "x.M", "AutoTokenizer": ["x.T", None]}}
        (folder / file).write_text(json.dumps(stored), encoding="utf-8")
    found, wanted = create_text_encoder(str(folder)), create_text_encoder(str(text_folder))
    assert all(torch.equal(v, found.state_dict()[name]) for name, v in wanted.state_dict().items())
    texts = ["Cardiomegaly is present.", "No emphysema"]
    assert create_tokenizer(str(folder))(texts)["input_ids"] == create_tokenizer(str(text_folder))(texts)["input_ids"]
