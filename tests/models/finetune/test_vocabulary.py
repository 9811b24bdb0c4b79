"""Prompts against volumes: probabilities of pairs, what learns, learning by heart, pairwise scores, real sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mg3d.models.finetune.pairwise import naive_scores, pairwise_scores
from mg3d.models.finetune.vocabulary import VocabularyNetwork, VocabularyOptions, pool_text
from mg3d.models.language_encoders import create_text_encoder, create_tokenizer
from mg3d.models.vision_encoders import create_vision_encoder
from mg3d.phantoms.text_encoder import write_text_encoder

SIZE = (64, 64, 64)
PROMPTS = ["Cardiomegaly. ", "not Cardiomegaly. ", "Emphysema. ", "not Emphysema. "]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "encoder"
    write_text_encoder(folder, PROMPTS, seed=0)
    return folder


def build(folder: Path, **options: object) -> VocabularyNetwork:
    torch.manual_seed(0)
    chosen = VocabularyOptions(**{"size_dhw": SIZE, "width": 48, "latent": 32, **options})  # type: ignore[arg-type]
    vision = create_vision_encoder("swin_b", embed_dim=12, patch_merging="fixed")
    return VocabularyNetwork(vision, create_text_encoder(str(folder)), chosen).eval()


def tokens_of(folder: Path, texts: list[str]) -> tuple[Tensor, Tensor]:
    found = create_tokenizer(str(folder))(texts, padding=True, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


@pytest.fixture(scope="module")
def seen(text_folder: Path) -> tuple[Tensor, Tensor]:
    """Image tokens of four volumes and vectors of two pairs of prompts, from untrained encoders."""
    network = build(text_folder)
    volumes = torch.rand(4, 1, *SIZE, generator=torch.Generator().manual_seed(1))
    for number in range(4):  # blobs in other places
        volumes[number, :, 16 * number : 16 * number + 16] += 1.0
    with torch.no_grad():
        texts = network.text_features(*tokens_of(text_folder, PROMPTS))
        return network.image_features(volumes / 2), texts.view(2, 2, -1)


def test_probabilities_of_a_pair_sum_to_one_and_swap_with_the_prompts(
    text_folder: Path, seen: tuple[Tensor, Tensor]
) -> None:
    image, pairs = seen
    network = build(text_folder)
    with torch.no_grad():
        logits = network.logits(image, pairs)
        swapped = network.logits(image, pairs.flip(1))
        found = network.probabilities(image, pairs)
    assert logits.shape == (4, 2, 2) and found.shape == (4, 2)
    torch.testing.assert_close(swapped, logits.flip(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(network.probabilities(image, pairs.flip(1)), 1 - found, atol=1e-5, rtol=0)
    assert logits.abs().max() <= torch.tensor(1.0).exp() + 1e-5


@pytest.mark.parametrize("fusion", ["gated", "none"])
def test_only_the_configured_parts_have_gradients(text_folder: Path, seen: tuple[Tensor, Tensor], fusion: str) -> None:
    network = build(text_folder, fusion=fusion)
    named = network.set_trainable(["latents", "fusion"])
    network.logits(*seen).square().sum().backward()
    with_gradient = {name for name, each in network.named_parameters() if each.grad is not None}
    assert with_gradient == set(named)
    roots = {"to_text_latent", "to_visual_latent"}
    assert {name.split(".")[0] for name in named} - roots == (
        {"local_img_cross_multihead_attention"} if fusion == "gated" else set()
    )
    with pytest.raises(ValueError, match="text_encoder"):
        network.set_trainable(["text_encoder"])


def test_four_volumes_are_learned_by_heart(text_folder: Path, seen: tuple[Tensor, Tensor]) -> None:
    image, pairs = seen
    network = build(text_folder, standardise=True)
    network.fit(image, pairs.flatten(0, 1))
    network.set_trainable(["latents", "fusion", "projections", "temperature"])
    truth = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    optimizer = torch.optim.AdamW([each for each in network.parameters() if each.requires_grad], lr=2e-3)
    for _ in range(60):
        loss = (network.probabilities(image, pairs) - truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


@pytest.mark.parametrize("fusion", ["gated", "none"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_batched_pairs_equal_the_double_loop(
    text_folder: Path, seen: tuple[Tensor, Tensor], fusion: str, layers: int
) -> None:
    network = build(text_folder, fusion=fusion, layers=layers)
    texts = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    found = pairwise_scores(network, texts, seen[0])
    assert found.shape == (5, 4)
    torch.testing.assert_close(found, naive_scores(network, texts, seen[0]), atol=1e-5, rtol=0)


def test_volumes_have_latents_that_no_report_changes(text_folder: Path, seen: tuple[Tensor, Tensor]) -> None:
    image, pairs = seen
    network = build(text_folder)
    with torch.no_grad():
        alone = network.image_latents(image, pairs)
        with_a_report = network.latents(
            network.project_image(image), network.project_text(pairs[:1, :1]).expand(4, -1, -1)
        )
    torch.testing.assert_close(alone.norm(dim=-1), torch.ones(4))
    assert not torch.allclose(alone, with_a_report[0], atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(network.image_latents(image[:1], pairs), alone[:1], atol=1e-5, rtol=0)


def test_padding_has_no_part_in_the_mean(text_folder: Path) -> None:
    network = build(text_folder, text_pooling="mean")
    with torch.no_grad():
        alone = network.text_features(*tokens_of(text_folder, PROMPTS[:1]))
        padded = network.text_features(*tokens_of(text_folder, [PROMPTS[0], " ".join(PROMPTS)]))
    torch.testing.assert_close(alone[0], padded[0], atol=1e-5, rtol=0)
    hidden = torch.arange(6.0).view(1, 3, 2)
    assert pool_text(hidden, torch.tensor([[1, 1, 0]]), "mean").tolist() == [[1.0, 2.0]]


def test_widths_that_do_not_fit_and_unknown_words_are_refused(text_folder: Path) -> None:
    with pytest.raises(ValueError, match="48 wide"):
        build(text_folder, project=False)
    with pytest.raises(ValueError, match="gated, none"):
        build(text_folder, fusion="softmax")


@pytest.mark.slow
def test_the_published_geometry_runs() -> None:
    from transformers import BertConfig, BertModel

    from mg3d.models.language_encoders import BertTextEncoder

    text = BertTextEncoder(BertModel(BertConfig(num_hidden_layers=1, vocab_size=64)))
    options = VocabularyOptions(size_dhw=(128, 128, 96), project=False)
    network = VocabularyNetwork(create_vision_encoder("swin_b"), text, options).eval()
    with torch.no_grad():
        image = network.image_features(torch.rand(1, 1, 128, 128, 96))
        texts = network.text_features(torch.randint(5, 60, (2, 250)), torch.ones(2, 250, dtype=torch.long))
        assert image.shape == (1, 48, 768) and texts.shape == (2, 768)
        assert network.to_visual_latent.weight.shape == (768, 36864)
        assert network.logits(image, texts[None]).shape == (1, 1, 2)
        assert network.image_latents(image, texts[None]).shape == (1, 768)
