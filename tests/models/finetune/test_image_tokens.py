"""Image tokens of vocabulary runs: Swin-L's two sets, its projection, and the published sizes (downstream 7.4, 8.4)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel

from mg3d.datasets.report_vocabulary import ReportVocabulary
from mg3d.finetuning.benchmark import ReportTask, VocabularyTask
from mg3d.finetuning.config import resolve_finetune_config
from mg3d.models.finetune.beam_search import SearchOptions
from mg3d.models.finetune.image_tokens import EncoderTokens
from mg3d.models.finetune.memory_generator import GeneratorOptions, MemoryGenerator
from mg3d.models.finetune.pairwise import naive_scores, pairwise_scores
from mg3d.models.finetune.report_features import MultiScaleFeatures
from mg3d.models.finetune.report_generation import build_report_module
from mg3d.models.finetune.vocabulary import VocabularyNetwork, VocabularyOptions
from mg3d.models.finetune.vocabulary_module import build_vocabulary_module
from mg3d.models.finetune.weights import load_encoder_weights
from mg3d.models.language_encoders import BertTextEncoder, create_text_encoder
from mg3d.models.vision_encoders import create_vision_encoder
from mg3d.models.vision_encoders.base import VisionEncoder, channel_norm
from mg3d.models.vision_encoders.swin import TokenPositionNorm
from mg3d.phantoms.text_encoder import write_text_encoder

SIZE = (64, 64, 32)


def swin_l(width: int = 12) -> VisionEncoder:
    torch.manual_seed(0)
    return create_vision_encoder("swin_l", embed_dim=width, proj_hidden_dim=8 * width, proj_out_dim=8 * width)


@pytest.fixture(scope="module")
def volumes() -> Tensor:
    return torch.rand(3, 1, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "encoder"
    write_text_encoder(folder, ["Cardiomegaly."], seed=0)
    return folder


def small_network(text_folder: Path, image_tokens: str = "two_sets", **options: object) -> VocabularyNetwork:
    torch.manual_seed(0)
    sizes = {"size_dhw": SIZE, "width": 32, "latent": 16, "image_tokens": image_tokens, **options}
    text = create_text_encoder(str(text_folder))
    return VocabularyNetwork(swin_l(), text, VocabularyOptions(**sizes)).eval()  # type: ignore[arg-type]


@torch.no_grad()
def test_two_sets_by_the_published_formula(volumes: Tensor) -> None:
    encoder = swin_l().eval()
    published_norms = encoder.proj_head.layer1[1], encoder.proj_head.layer2[1]  # type: ignore[union-attr]
    assert all(isinstance(norm, TokenPositionNorm) for norm in published_norms)
    one = volumes[:1]
    maps, projected = encoder.forward_features(one), encoder.tokens(one)  # one volume, as published
    torch.manual_seed(2)
    tokens = EncoderTokens(encoder, two_sets=True).eval()
    refined = [block(each) for block, each in zip(blocks_of(tokens), [one, *maps[:3]], strict=True)]
    finer = torch.cat([functional.adaptive_avg_pool3d(each, (2, 2, 1)) for each in refined], dim=1)
    found = tokens.arrange(tokens.pooled(one))
    assert found.shape == (1, 8, 96) and tokens.count(SIZE) == 8 and tokens.width == 96
    torch.testing.assert_close(found[:, :4], finer.flatten(2).mT, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[:, 4:], projected, atol=1e-5, rtol=1e-4)


def blocks_of(tokens: EncoderTokens) -> list[torch.nn.Module]:
    return [tokens.get_submodule(f"encoder{number}") for number in range(1, 5)]


@torch.no_grad()
def test_the_last_map_alone_is_projected_volume_by_volume(volumes: Tensor) -> None:
    tokens = EncoderTokens(swin_l()).eval()
    kept = tokens.pooled(volumes)
    assert kept.shape == (3, 4, 192) and tokens.arrange(kept).shape == (3, 4, 96)
    alone = torch.cat([tokens.arrange(kept[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(tokens.arrange(kept), alone, atol=1e-5, rtol=1e-4)


def test_a_trial_width_is_projected_to_that_of_the_finer_maps(volumes: Tensor) -> None:
    tokens = EncoderTokens(create_vision_encoder("swin_l", embed_dim=12), two_sets=True)
    assert tokens.arrange(tokens.pooled(volumes[:1])).shape == (1, 8, 96)
    with pytest.raises(ValueError, match="encoder=swin_l, not swin_b"):
        EncoderTokens(create_vision_encoder("swin_b", embed_dim=12), two_sets=True)


def test_the_projection_learns_on_kept_features(text_folder: Path, volumes: Tensor) -> None:
    network = small_network(text_folder)
    with torch.no_grad():
        kept = network.image_features(volumes)
    named = network.set_trainable(["projections", "latents"])
    network.logits(kept, torch.randn(2, 2, 96)).square().sum().backward()
    assert {name for name, each in network.named_parameters() if each.grad is not None} == set(named)
    assert (
        "visual.encoder.proj_head.layer3.0.weight" in named and "visual.encoder1.layer.conv1.conv.weight" not in named
    )
    other = small_network(text_folder, "multi_scale")
    assert not any(name.startswith("visual.") for name in other.set_trainable(["projections"]))


def test_pairwise_scores_and_statistics_of_two_sets(text_folder: Path, volumes: Tensor) -> None:
    network = small_network(text_folder, standardise=True)
    with torch.no_grad():
        kept = network.image_features(volumes)
    texts = torch.randn(4, 96, generator=torch.Generator().manual_seed(3))
    network.fit(kept, texts)
    assert network.image_scale.mean.shape == (8, 96)
    found = pairwise_scores(network, texts, kept)
    torch.testing.assert_close(found, naive_scores(network, texts, kept), atol=1e-5, rtol=0)


def test_every_part_of_a_swin_l_file_finds_its_place(text_folder: Path, tmp_path: Path) -> None:
    """Encoder, projection and the four blocks that published Swin-L files are said to hold."""

    class Holder(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.network = small_network(text_folder)
            self.encoder = self.network.visual.encoder
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for each in self.network.visual.parameters():
                    each.copy_(torch.rand(each.shape, generator=generator))

    source, made = Holder(1), Holder(2)
    stored = {name.removeprefix("encoder."): value for name, value in source.network.visual.state_dict().items()}
    torch.save({f"vision_encoder.{name}": value for name, value in stored.items()}, tmp_path / "swin_l.pt")
    report = load_encoder_weights(made, resolve_finetune_config({"weights": str(tmp_path / "swin_l.pt")}))
    found = made.network.visual.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in source.network.visual.state_dict().items())
    assert report.encoder_fraction == 1.0 and len(report.loaded) == len(stored) and not report.unexpected
    assert sum(name.startswith(("encoder1.", "encoder2.", "encoder3.", "encoder4.")) for name in report.loaded) == 9


@torch.no_grad()
@pytest.mark.parametrize("encoder", ["unet", "swin_l"])
def test_kept_features_do_not_depend_on_the_batch(encoder: str, text_folder: Path, volumes: Tensor) -> None:
    cfg = resolve_finetune_config({"encoder": encoder, "feature_size": 12, "cache": "memory"})
    task = VocabularyTask(("A",), "binary", SIZE, text_encoder=str(text_folder), width=16, latent=8)
    module = build_vocabulary_module(cfg, task, 1).eval()
    together = module.network.project_image(module.network.image_features(volumes))
    alone = module.network.project_image(module.network.image_features(volumes[1:2]))
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)
    if encoder == "unet":
        words = ReportTask({}, ReportVocabulary.build(["a b"], 1), size_dhw=SIZE, width=16)
        writer = build_report_module(cfg, words, 1).eval()
        pooled = writer.visual.pooled(volumes)
        torch.testing.assert_close(pooled[1:2], writer.visual.pooled(volumes[1:2]), atol=1e-5, rtol=1e-4)


class Once(torch.nn.Module):
    """A block that computes its map once: those of 96 channels at full resolution take most of the time."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block, self.kept = block, torch.empty(0)

    def forward(self, seen: Tensor) -> Tensor:
        self.kept = self.kept if len(self.kept) else self.block(seen)
        return self.kept


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("name", "width"), [("swin_b", 1152), ("swin_l", 2304)])
def test_one_forward_pass_in_the_published_sizes(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CTRG with both encoders; CT-RATE with Swin-L on the same maps (with Swin-B: test_vocabulary)."""
    torch.manual_seed(0)
    encoder, volume = create_vision_encoder(name), torch.rand(1, 1, 128, 96, 128)
    raw = encoder.eval().forward_features(volume, normalize=False)
    told = {True: [channel_norm(each) for each in raw], False: raw}
    monkeypatch.setattr(encoder, "forward_features", lambda volume, normalize: told[normalize])  # both want them
    visual = MultiScaleFeatures(encoder, "positions_reference").eval()
    for number in range(1, 5):
        visual.add_module(f"encoder{number}", Once(visual.get_submodule(f"encoder{number}")))
    feat, whole = visual(visual.pooled(volume))
    assert feat.shape == (1, 27, width) and whole.shape == (1, width)
    generator = MemoryGenerator(GeneratorOptions(words=1028, feature_width=width)).eval()
    ids = torch.randint(1, 1029, (1, 150))
    ids[:, [0, -1]] = 0
    output = generator(feat, whole, ids)
    assert output.logits.shape == (1, 149, 1029) and output.image_labels.shape == (1, 14)
    tokens = generator.encoder_tokens(feat, output.image, generator.initial_memory(1))
    assert tokens.shape == (1, 41, width) and generator.encode_tokens(tokens).shape == (1, 41, 512)
    assert generator.generate(feat, whole, SearchOptions(max_words=5)).ids.shape[1] <= 5
    if name == "swin_l":
        scores_of_ct_rate(encoder, visual, volume)


def scores_of_ct_rate(encoder: VisionEncoder, visual: MultiScaleFeatures, volume: Tensor) -> None:
    text = BertTextEncoder(BertModel(BertConfig(num_hidden_layers=1, vocab_size=64)))
    sizes = VocabularyOptions(size_dhw=(128, 96, 128), project=False, image_tokens="two_sets")
    network = VocabularyNetwork(encoder, text, sizes).eval()
    for number in range(1, 5):
        network.visual.add_module(f"encoder{number}", visual.get_submodule(f"encoder{number}"))
    kept = network.image_features(volume)
    texts = network.text_features(torch.randint(5, 60, (2, 250)), torch.ones(2, 250, dtype=torch.long))
    assert kept.shape == (1, 48, 2304) and texts.shape == (2, 768)
    assert network.project_image(kept).shape == (1, 96, 768)
    assert network.to_visual_latent.weight.shape == (768, 73728)
    assert network.logits(kept, texts[None]).shape == (1, 1, 2)
    assert network.image_latents(kept, texts[None]).shape == (1, 768)


@torch.no_grad()
def test_shapes_of_swin_l_in_the_published_order_of_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 x 128 x 96 (z, x, y) without computing anything: the maps' sizes are those of the spec's table."""
    with torch.device("meta"):
        encoder = create_vision_encoder("swin_l")
        maps = [torch.empty(1, 96 << k, 64 >> k, 64 >> k, 48 >> k) for k in range(5)]
        monkeypatch.setattr(encoder, "forward_features", lambda volume, normalize: maps)
        tokens = EncoderTokens(encoder, two_sets=True).eval()
        kept = tokens.pooled(torch.empty(1, 1, 128, 128, 96))
        assert kept.shape == (1, 48, 2304) and tokens.arrange(kept).shape == (1, 96, 768)
    assert tokens.count((128, 128, 96)) == 96
